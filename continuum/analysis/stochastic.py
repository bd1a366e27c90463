"""Convergence to the SDE, measured: the weak error E g(X_N) - E g(X(T)) = O(h^r) and the strong error E |X_N - X(T)| = O(h^s).

Where the branches are f_i(x) = rate_i x, moments are known in closed form: with a_i the coefficients of one step of h = T / N,

    E X_N^q = (E (1 + sum_i a_i rate_i)^q)^N  ->  E X(T)^q = exp(q mu T + q (q - 1) s^2 T / 2),

mu and s being the sums of m_i rate_i and s_i rate_i. Elsewhere paths are sampled with common noise: one fine sequence of
normals Z_j drives all of them. A step over m fine ones takes z = (Z_1 + ... + Z_m) / sqrt(m), and by its own law the number
eta = Q(Phi(z)) with Q the quantile function, which has the law of eta and moves with z as closely as it can.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from continuum.fields import Field
from continuum.noise import StochasticField
from continuum.noise.base import noise_of
from continuum.schemes import EulerMaruyama, StochasticScheme
from continuum.schemes.base import Memory, inside
from continuum.schemes.stochastic import dot
from continuum.types import State

SDE = EulerMaruyama("brownian")
CONFIDENCE = 1.96
"""Standard errors in the half-width of a 95% interval."""


def linear_moment(
    field: StochasticField, scheme: StochasticScheme, rates: Sequence[float], steps: int, power: int, depth: float = 1.0
) -> float:
    """E X_N^q of `steps` N steps from X_0 = 1 if the branches of `field` were f_i(x) = rates[i] x; they are not evaluated.

    >>> from continuum.fields import MLP
    >>> from continuum.noise import StochasticDepth
    >>> field = StochasticDepth(MLP(1, hidden=1), 0.5)
    >>> limit = limit_moment(field, [1.0], power=2)
    >>> [round(limit - linear_moment(field, EulerMaruyama(), [1.0], steps, power=2), 4) for steps in (8, 16, 32)]
    [0.2084, 0.1097, 0.0564]

    Raises:
        TypeError: a scheme other than `EulerMaruyama` and `Milstein`, or a law without closed-form moments.
        ValueError: a law that varies with depth.
    """
    _check_constant(field, depth)
    moves = scheme.moves(field, rates, depth / steps, power)
    # (1 + d)^q - 1 and log1p: near N = 2^16 a step changes little, and what it changes must not be lost beside 1.
    growth = math.fsum(weight * math.comb(power, k) * d**k for d, weight in moves for k in range(1, power + 1))
    return math.exp(steps * math.log1p(growth)) if growth > -1 else (1 + growth) ** steps


def limit_moment(field: StochasticField, rates: Sequence[float], power: int, depth: float = 1.0) -> float:
    """E X(T)^q = exp(q mu T + q (q - 1) s^2 T / 2) of the SDE, for branches as in `linear_moment`."""
    _check_constant(field, depth)
    mu, s = (dot(weights, rates) for weights in (field.means(0.0), field.deviations(0.0)))
    return math.exp(power * mu * depth + power * (power - 1) * s**2 * depth / 2)


def _check_constant(field: StochasticField, depth: float) -> None:
    seen = {(field.law(t).mean, field.law(t).deviation, field.means(t), field.deviations(t)) for t in (0.0, depth / 3, depth)}
    if len(seen) > 1:
        raise ValueError(
            f"the law of this {type(field).__name__} varies with depth: closed forms are for one law at all depths"
        )


@dataclass
class CoupledPath:
    """One of several solutions by common noise: its scheme, its number of steps, its state, and what the scheme remembers."""

    scheme: StochasticScheme
    steps: int
    x: State
    memory: Memory

    def step(self, field: Field, t: float, h: float, normals: Mapping[str, Tensor]) -> None:
        depth = inside(field.knots, t, h, 0, self.x.dtype)
        noisy = noise_of(field.at(depth))
        drawn = None if noisy is None else self.scheme.driven(noisy, depth, self.x, h, normals[noisy.noise])
        self.x, self.memory = self.scheme.step(field, t, self.x, h, (*self.memory, drawn))


def run_coupled(field: Field, depth: float, paths: Sequence[CoupledPath], fine: int, generator: torch.Generator) -> None:
    """Take all paths to the end of `field` by the same normals, drawn on `fine` steps as they are needed.

    There is a Brownian motion of an image, and one of an entry of the state; each layer takes the kind that it has. `per` does
    not count: images of one batch are as good as images of several.
    """
    x = paths[0].x
    shapes = {"scalar": (len(x), *[1] * (x.dim() - 1)), "diagonal": tuple(x.shape)}
    kinds = sorted({noisy.noise for layer in field.pieces() if (noisy := noise_of(layer)) is not None})
    sums = [{kind: x.new_zeros(shapes[kind]) for kind in kinds} for _ in paths]
    for j in range(1, fine + 1):
        normals = {kind: torch.randn(shapes[kind], dtype=x.dtype, device=x.device, generator=generator) for kind in kinds}
        for path, total in zip(paths, sums, strict=True):
            for kind in kinds:
                total[kind] += normals[kind]
            m = fine // path.steps
            if j % m == 0:
                scaled = {kind: z / math.sqrt(m) for kind, z in total.items()}
                path.step(field, (j - m) * depth / fine, depth / path.steps, scaled)
                for z in total.values():
                    z.zero_()


@dataclass(frozen=True)
class Estimate:
    """An error after so many steps, and the half-width of its 95% confidence interval."""

    steps: int
    test: str
    error: float
    confidence: float


@torch.no_grad()
def weak_errors(
    field: Field,
    scheme: StochasticScheme,
    x: State,
    depth: float,
    steps: Sequence[int],
    tests: Mapping[str, Callable[[Tensor], Tensor]],
    paths: int,
    reference_steps: int,
    seed: int,
) -> list[Estimate]:
    """E g(X_N) - E g(X_ref) for every N in `steps` and every g in `tests`, the reference being the SDE on `reference_steps`.

    x is one state (1, *shape); g takes states (paths, *shape) to numbers (paths,). The reference is Euler-Maruyama's method
    with Brownian increments, or Milstein's if `scheme` is, and has an error of its own: take `reference_steps` large. The paths
    are one batch, whose rows the field must not mix: let BatchNorm evaluate. A step longer than a layer reads the first one.

    Raises:
        ValueError: more than one state, fewer than two paths, or steps that do not divide the reference's.
        TypeError: the scheme cannot step the field.
    """
    ends, reference = _sampled(field, scheme, x, depth, steps, paths, reference_steps, seed)
    return [
        Estimate(count, name, *mean_of(g(end) - g(reference)))
        for name, g in tests.items()
        for count, end in zip(steps, ends, strict=True)
    ]


@torch.no_grad()
def strong_errors(
    field: Field,
    scheme: StochasticScheme,
    x: State,
    depth: float,
    steps: Sequence[int],
    paths: int,
    reference_steps: int,
    seed: int,
) -> list[Estimate]:
    """E |X_N - X_ref| for every N in `steps`, both on the same Brownian path, with |.| the Euclidean norm; see `weak_errors`.

    Increments by a law of their own follow no Brownian path: their strong error does not vanish unless the law is normal.

    Raises:
        ValueError, TypeError: as `weak_errors`.
    """
    ends, reference = _sampled(field, scheme, x, depth, steps, paths, reference_steps, seed)
    distances = [(end - reference).flatten(1).norm(dim=1) for end in ends]
    return [Estimate(count, "distance", *mean_of(far)) for count, far in zip(steps, distances, strict=True)]


def _sampled(
    field: Field,
    scheme: StochasticScheme,
    x: State,
    depth: float,
    steps: Sequence[int],
    paths: int,
    reference_steps: int,
    seed: int,
) -> tuple[list[State], State]:
    """The end states for every number of steps, and those of the reference."""
    if len(x) != 1 or paths < 2:
        raise ValueError(f"needs one state to start from, (1, *shape), and two or more paths, not {tuple(x.shape)} and {paths}")
    if wrong := [count for count in steps if count < 1 or reference_steps % count]:
        raise ValueError(f"the reference takes several steps in the place of one: {reference_steps} is no multiple of {wrong}")
    scheme.check(field)
    start = x.expand(paths, *x.shape[1:])
    runs = [CoupledPath(scheme, count, start, scheme.past(start, None, depth / count)) for count in steps]
    sde = scheme.of_sde()
    reference = CoupledPath(sde, reference_steps, start, sde.past(start, None, depth / reference_steps))
    with torch.random.fork_rng(devices=forked_devices(x)):  # shake-shake draws for its backward pass too
        run_coupled(field, depth, [*runs, reference], reference_steps, torch.Generator(x.device).manual_seed(seed))
    return [run.x for run in runs], reference.x


def mean_of(samples: Tensor) -> tuple[float, float]:
    """The mean of samples (n,) and the half-width of its confidence interval."""
    samples = samples.double()
    return float(samples.mean()), CONFIDENCE * float(samples.std()) / math.sqrt(len(samples))


def forked_devices(x: Tensor) -> list[torch.device]:
    return [x.device] if x.device.type == "cuda" else []
