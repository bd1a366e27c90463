"""Embedded Runge-Kutta pairs: from the same stages k_i a step x + h sum_i b_i k_i and its error h sum_i e_i k_i.

Between the ends of a step the state is read off its dense output, a polynomial in the share s of the step,

    x(s) = x + h sum_i w_i(s) k_i,    w_i(s) = sum_p d_pi s^p,

Hermite's cubic for pairs of order 3 and less. Those of order 5 have a quartic through their own midpoint, whose error is up to
twelve times that of the step; two stages more on this quartic make it a quintic with the error of the step.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

from continuum.schemes import RungeKutta, Tableau
from continuum.solvers.coefficients import COEFFICIENTS, Row

PAIRS = tuple(COEFFICIENTS)
METHODS = (*PAIRS, "scipy_solver")
"""torchdiffeq's adaptive methods."""

FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams", "fixed_adams")
"""torchdiffeq's others."""

INNER = (0.35, 0.65)
"""Where the quintic has its two slopes."""


@dataclass(frozen=True)
class Pair:
    """c, a and b as in a Butcher tableau, the weights e of the error, those of the midpoint, and the order of the step."""

    c: Row
    a: tuple[Row, ...]
    b: Row
    e: Row
    middle: Row
    order: int

    @property
    def reuses_last(self) -> bool:
        """Whether the last stage is f at the new point, and so the first one of the next step.

        The last stages of adaptive_heun and fehlberg2 are not.
        """
        return self.c[-1] == 1 and self.a[-1] == self.b[:-1] and self.b[-1] == 0

    @cached_property
    def inner(self) -> tuple[tuple[float, Row], ...] | None:
        """c and a of the stages that only the dense output needs, behind the others and, if it is no stage, f at the new point.

        None where no polynomial is as good as the step: dopri8's quartic would lose four orders.
        """
        if self.order > 5:
            return None
        return () if self.order < 4 else tuple((c, _row(_powers(c, 4) @ self._quartic)) for c in INNER)

    @cached_property
    def dense(self) -> Tensor:
        """d_pi, a row for each power p = 1, 2, ... and a column for each stage, those of `inner` the last."""
        b, *_ = self._columns
        rows, conditions = [_slope_at(0.0, 3), _slope_at(1.0, 3), _powers(1.0, 3)], [self._first, self._last, b]
        if self.inner:
            stages = len(b) + len(self.inner)
            rows = [*(_slope_at(c, 5) for c in (0.0, 1.0, *INNER)), _powers(1.0, 5)]
            new = [nn.functional.one_hot(torch.tensor(i), stages).double() for i in range(len(b), stages)]
            conditions = [nn.functional.pad(c, (0, 2)) for c in (self._first, self._last)]
            conditions = [*conditions, *new, nn.functional.pad(b, (0, 2))]
        return torch.linalg.solve(torch.stack(rows), torch.stack(conditions))

    @cached_property
    def _quartic(self) -> Tensor:
        """The polynomial with the slopes at both ends, the state at the end and that at the midpoint."""
        b, middle = self._columns
        rows = [_slope_at(0.0, 4), _slope_at(1.0, 4), _powers(1.0, 4), _powers(0.5, 4)]
        return torch.linalg.solve(torch.stack(rows), torch.stack([self._first, self._last, b, middle]))

    @property
    def _columns(self) -> tuple[Tensor, Tensor]:
        """b and the weights of the midpoint, with a column for f at the new point if that is no stage."""
        new = [] if self.reuses_last else [0.0]
        return torch.tensor([*self.b, *new], dtype=torch.float64), torch.tensor([*self.middle, *new], dtype=torch.float64)

    @property
    def _first(self) -> Tensor:
        return nn.functional.one_hot(torch.tensor(0), len(self._columns[0])).double()

    @property
    def _last(self) -> Tensor:
        return self._first.flip(0)


def _powers(s: float, degree: int) -> Tensor:
    """s, s^2, ..., s^degree."""
    return torch.tensor([s**p for p in range(1, degree + 1)], dtype=torch.float64)


def _slope_at(s: float, degree: int) -> Tensor:
    """The derivatives of s, s^2, ..., s^degree."""
    return torch.tensor([p * s ** (p - 1) for p in range(1, degree + 1)], dtype=torch.float64)


def _row(weights: Tensor) -> Row:
    return tuple(weights.tolist())


@lru_cache
def pair_of(method: str) -> Pair:
    return Pair(**COEFFICIENTS[method]._asdict())


@lru_cache
def tableau_of(method: str) -> Tableau:
    """The scheme inside the pair; a last stage that only estimates the error is of no use to it."""
    pair = pair_of(method)
    used = len(pair.b) if pair.b[-1] else len(pair.b) - 1
    return Tableau(c=pair.c[:used], a=pair.a[:used], b=pair.b[:used], order=pair.order)


@dataclass(frozen=True)
class Embedded(RungeKutta):
    """The Runge-Kutta scheme inside torchdiffeq's adaptive `method`, for fixed steps: what `Flow.frozen` repeats.

    Raises:
        ValueError: the method is not one of torchdiffeq's embedded pairs.
    """

    method: str

    def __post_init__(self) -> None:
        if self.method not in PAIRS:
            raise ValueError(f"no embedded pair {self.method!r}; torchdiffeq has {', '.join(PAIRS)}")

    def __str__(self) -> str:
        return self.method

    @property
    def tableau(self) -> Tableau:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tableau_of(self.method)
