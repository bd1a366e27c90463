"""Bases of functions of depth: theta(t) = sum_k phi_k(t) theta_k, and the projection of one basis onto another."""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

Terms: TypeAlias = list[tuple[int, float]]
"""The functions of a basis that are not zero at a depth, as (index, value)."""


@dataclass(frozen=True)
class Basis(ABC):
    """Functions phi_0, ..., phi_{size - 1} of the depths [0, depth]; depths outside count as the nearer end.

    `basis(t)` lists those that are not zero at t, as (index, value); `knots` are the interior depths where one of them has
    a kink. In a `nodal` basis no value is negative and at every depth they sum to one, so that theta(t) is an average of
    the coefficients: what running statistics need. `continuous` says whether all functions are.

    Raises:
        ValueError: too few functions, or a depth that is not positive.
    """

    size: int
    depth: float = 1.0

    least: ClassVar[int] = 1
    nodal: ClassVar[bool] = False
    continuous: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < self.least:
            raise ValueError(f"{type(self).__name__} has {self.least} or more functions: size is an integer, not {self.size!r}")
        if not 0 < self.depth < float("inf"):
            raise ValueError(f"depth is a positive number of layers, not {self.depth}")

    @property
    def knots(self) -> tuple[float, ...]:
        return ()

    def __call__(self, t: float) -> Terms:
        return self.terms(min(max(t, 0.0), self.depth))

    @abstractmethod
    def terms(self, t: float) -> Terms:
        """What `basis(t)` lists, at a depth in [0, depth]."""

    def roughness(self, theta: Tensor) -> Tensor:
        """int_0^1 |d theta / ds|^2 ds over s = t / depth, for the coefficients theta, (size, *shape).

        Raises:
            TypeError: functions with kinks, for which nothing is said.
        """
        flat = theta.reshape(self.size, -1)
        return (flat * (_derivative_gram(self).to(flat) @ flat)).sum()


@dataclass(frozen=True)
class Hat(Basis):
    """Piecewise-linear functions: phi_k is one at its node, depth k / (size - 1), and zero at all others.

    They sum to one at every depth, and the coefficients are theta at the nodes. A depth within float32's rounding of a
    node counts as the node: that is how far a solver moves a stage off a knot.

    >>> Hat(3, depth=2)(0.25)
    [(0, 0.75), (1, 0.25)]
    >>> Hat(3, depth=2)(1.0)
    [(1, 1.0)]
    """

    least = 2
    nodal = True

    @property
    def knots(self) -> tuple[float, ...]:
        return tuple(self.depth * k / (self.size - 1) for k in range(1, self.size - 1))

    def terms(self, t: float) -> Terms:
        per_depth = (self.size - 1) / self.depth
        place = t * per_depth
        nearest = round(place)
        if abs(place - nearest) <= 2**-21 * max(1.0, t) * per_depth:
            return [(nearest, 1.0)]
        left = math.floor(place)
        return [(left, 1 - (place - left)), (left + 1, place - left)]

    def roughness(self, theta: Tensor) -> Tensor:
        return (self.size - 1) * theta.diff(dim=0).square().sum()


@dataclass(frozen=True)
class Chebyshev(Basis):
    """Chebyshev's polynomials T_k(s) with s = 2 t / depth - 1: T_{k+1} = 2 s T_k - T_{k-1}.

    >>> Chebyshev(3)(0.75)
    [(0, 1.0), (1, 0.5), (2, -0.5)]
    """

    def terms(self, t: float) -> Terms:
        return _recurred(self, t, lambda k, s, value, before: 2 * s * value - before)


@dataclass(frozen=True)
class Legendre(Basis):
    """Legendre's polynomials P_k(s) with s = 2 t / depth - 1: (k + 1) P_{k+1} = (2 k + 1) s P_k - k P_{k-1}.

    >>> Legendre(3)(0.75)
    [(0, 1.0), (1, 0.5), (2, -0.125)]
    """

    def terms(self, t: float) -> Terms:
        return _recurred(self, t, lambda k, s, value, before: ((2 * k + 1) * s * value - k * before) / (k + 1))


@dataclass(frozen=True)
class Fourier(Basis):
    """The functions 1, cos(w t), sin(w t), cos(2 w t), sin(2 w t), ... with w = 2 pi / depth.

    >>> Fourier(3)(0.0)
    [(0, 1.0), (1, 1.0)]
    """

    def terms(self, t: float) -> Terms:
        angle = 2 * math.pi * t / self.depth
        waves = [wave(k * angle) for k in range(1, self.size // 2 + 1) for wave in (math.cos, math.sin)]
        return _not_zero([1.0, *waves][: self.size])


@dataclass(frozen=True)
class Box(Basis):
    """Step functions: phi_k is one on the k-th of `size` equal parts and zero elsewhere; the weights of layers.

    A jump counts in the `roughness` as one between layers, of which there are `size` on the unit of depth.
    """

    nodal = True
    continuous = False

    @property
    def knots(self) -> tuple[float, ...]:
        return tuple(self.depth * k / self.size for k in range(1, self.size))

    def terms(self, t: float) -> Terms:
        return [(min(math.floor(t * self.size / self.depth), self.size - 1), 1.0)]

    def roughness(self, theta: Tensor) -> Tensor:
        return self.size * theta.diff(dim=0).square().sum()


def _recurred(basis: Basis, t: float, following: Callable[[int, float, float, float], float]) -> Terms:
    """Polynomials P_0 = 1, P_1 = s, P_{k+1} = following(k, s, P_k, P_{k-1}) at s = 2 t / depth - 1."""
    values = [1.0, s := 2 * t / basis.depth - 1]
    for k in range(1, basis.size - 1):
        values.append(following(k, s, values[k], values[k - 1]))
    return _not_zero(values[: basis.size])


def _not_zero(values: Sequence[float]) -> Terms:
    return [(k, value) for k, value in enumerate(values) if value]


def named_basis(name: str, size: int, depth: float) -> Basis:
    """The basis called `name`: hat, chebyshev, legendre or fourier.

    >>> named_basis("hat", 4, depth=3)
    Hat(size=4, depth=3)

    Raises:
        ValueError: another name, or a size or depth that the basis refuses.
    """
    bases = {"hat": Hat, "chebyshev": Chebyshev, "legendre": Legendre, "fourier": Fourier}
    if name not in bases:
        raise ValueError(f"unknown basis {name!r}; there are {', '.join(bases)}")
    return bases[name](size, depth)


def projection(old: Basis, new: Basis) -> Tensor:
    """The matrix (new.size, old.size), in float64, from coefficients on `old` to those of the nearest function on `new`.

    Nearest in L2[0, depth]: least squares over the points of a Gauss-Legendre rule on each piece between knots. The more
    functions oscillate over the whole depth, the more points.
    """
    rule = gauss_legendre(32 + 2 * max([basis.size for basis in (old, new) if not basis.knots], default=0))
    pieces = list(pairwise([0.0, *sorted({*old.knots, *new.knots}), old.depth]))
    points = [(start + stop + (stop - start) * s) / 2 for start, stop in pieces for s, _ in rule]
    roots = [math.sqrt((stop - start) * 2 * weight) for start, stop in pieces for _, weight in rule]
    scale = torch.tensor(roots, dtype=torch.float64, device="cpu")[:, None]
    return torch.linalg.lstsq(scale * _sampled(new, points), scale * _sampled(old, points)).solution


@functools.lru_cache
def _derivative_gram(basis: Basis) -> Tensor:
    """The matrix int_0^1 phi_i' phi_j' ds of a smooth basis, in float64, by way of Legendre's polynomials on [0, 1].

    There it is 2 min(i, j) (min(i, j) + 1) for even i + j, else zero. Polynomials lose nothing on the way, and a wave of
    number k needs those of degree up to about pi k, plus a few.
    """
    if basis.knots:
        raise TypeError(f"{basis} has kinks: a basis with kinks says its own `roughness`, as Hat and Box do")
    legendre = Legendre(2 * basis.size + 24, basis.depth)
    k = torch.arange(legendre.size, dtype=torch.float64, device="cpu")
    low = torch.minimum(k[:, None], k)
    stiffness = 2 * low * (low + 1) * ((k[:, None] + k) % 2 == 0)
    matrix = projection(basis, legendre)
    return matrix.T @ stiffness @ matrix


def _sampled(basis: Basis, points: Sequence[float]) -> Tensor:
    """The values of the functions, (points, basis.size) in float64."""
    rows = [[0.0] * basis.size for _ in points]
    for row, t in zip(rows, points, strict=True):
        for k, value in basis(t):
            row[k] = value
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def gauss_legendre(points: int) -> list[tuple[float, float]]:
    """Nodes on [-1, 1] and weights of sum one, exact for polynomials of degree 2 points - 1."""
    k = torch.arange(1, points, dtype=torch.float64, device="cpu")
    return gauss(k / (4 * k**2 - 1).sqrt())


def gauss(beside: Tensor) -> list[tuple[float, float]]:
    """Nodes and weights of the Gauss rule whose orthogonal polynomials have this recurrence (Golub and Welsch, 1969)."""
    nodes, vectors = torch.linalg.eigh(beside.diag(1) + beside.diag(-1))
    return list(zip(nodes.tolist(), (vectors[0] ** 2).tolist(), strict=True))
