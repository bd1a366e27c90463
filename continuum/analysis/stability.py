"""Where steps on x' = rate x do not grow: roots of polynomials with z = h rate in them, and curves in the plane of z."""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", complex, Tensor)

STEPS_OF_A_TURN = 360
"""How finely a curve |R(z)| = 1 is followed, whatever is asked for."""


def polynomial_roots(coefficients: Tensor) -> Tensor:
    """The roots (..., n), complex, of polynomials c_0 + c_1 r + ... + c_n r^n with coefficients (..., n + 1), c_n not zero.

    >>> [round(root, 6) for root in sorted(polynomial_roots(torch.tensor([-2.0, -1.0, 1.0])).real.tolist())]
    [-1.0, 2.0]

    Raises:
        ValueError: c_n is zero, or a coefficient is not finite.
    """
    # LAPACK may bring the process down over numbers that are not finite.
    if not coefficients.isfinite().all() or not coefficients[..., -1].all():
        raise ValueError("roots are of polynomials with finite coefficients, the highest not zero")
    degree = coefficients.shape[-1] - 1
    companion = coefficients.new_zeros(*coefficients.shape[:-1], degree, degree)
    companion[..., 1:, :-1] = torch.eye(degree - 1, dtype=coefficients.dtype)
    companion[..., -1] = -coefficients[..., :-1] / coefficients[..., -1:]
    return torch.linalg.eigvals(companion)


def value(coefficients: Sequence[complex], z: Number) -> Number:
    """c_0 + c_1 z + ... + c_n z^n, of a tensor z at every entry."""
    total = 0 * z
    for coefficient in reversed(coefficients):
        total = total * z + coefficient
    return total


def level_curve(coefficients: Sequence[float], points: int) -> tuple[list[float], list[float]]:
    """The curve |R(z)| = 1 through z = 0 of the polynomial R, R(0) = 1, as real and imaginary parts of about `points` points.

    Along it R = exp(i a) with a growing from 0, and z with dz/da = i R(z) / R'(z); it is closed after as many turns as it goes
    round zeros of R, at most its degree.
    """
    steps = max(points, STEPS_OF_A_TURN)
    slopes = [n * coefficient for n, coefficient in enumerate(coefficients)][1:]
    turned = torch.exp(2j * math.pi * torch.arange(steps, dtype=torch.float64) / steps)
    shifted = torch.tensor(coefficients, dtype=torch.complex128).repeat(steps, 1)
    shifted[:, 0] -= turned
    roots = polynomial_roots(shifted).tolist()  # of R(z) = exp(i a), at every a
    z, curve = 0j, [0j]
    for n in range(1, (len(coefficients) - 1) * steps + 1):
        ahead = z + 2j * math.pi / steps * value(coefficients, z) / value(slopes, z)
        z = min(roots[n % steps], key=lambda root: abs(root - ahead))
        curve.append(z)
        if n % steps == 0 and abs(z) < 1e-9:
            break
    kept = [curve[round(n * (len(curve) - 1) / (points - 1))] for n in range(points)]
    return [z.real for z in kept], [z.imag for z in kept]
