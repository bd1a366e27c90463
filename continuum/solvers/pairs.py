"""Embedded Runge-Kutta pairs: from the same stages k_i a step x + h sum_i b_i k_i and its error h sum_i e_i k_i.

Between the ends of a step the state is read off its dense output, a polynomial in the share s of the step,

    x(s) = x + h sum_i w_i(s) k_i,    w_i(s) = sum_p d_pi s^p,

Hermite's cubic for pairs of order 3 and less, the quartic through the pair's own midpoint for those of order 5. The
coefficients are those of the installed torchdiffeq, read when they are needed.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver
from torchdiffeq._impl.scipy_wrapper import ScipyWrapperODESolver

from continuum.schemes import RungeKutta, Tableau

PAIRS = tuple(name for name, solver in SOLVERS.items() if issubclass(solver, RKAdaptiveStepsizeODESolver))
METHODS = PAIRS + tuple(name for name, solver in SOLVERS.items() if issubclass(solver, ScipyWrapperODESolver))
"""The adaptive methods of the installed torchdiffeq."""

Row = tuple[float, ...]


@dataclass(frozen=True)
class Pair:
    """c, a and b as in a Butcher tableau, the weights e of the error, those of the midpoint, and the order of the step."""

    c: Row
    a: tuple[Row, ...]
    b: Row
    e: Row
    middle: Row
    order: int

    @cached_property
    def reuses_last(self) -> bool:
        """Whether the last stage is f at the new point, and so the first one of the next step.

        The last stages of adaptive_heun and fehlberg2 are not.
        """
        return self.c[-1] == 1 and self.a[-1] == self.b[:-1] and self.b[-1] == 0

    @cached_property
    def dense(self) -> tuple[Row, ...] | None:
        """d_pi for p = 1, 2, ...: a column a stage, and behind them f at the new point if that is no stage.

        None where no polynomial is as good as the step: dopri8's quartic would lose four orders.
        """
        if self.order > 5:
            return None
        new = [] if self.reuses_last else [0.0]
        b, m = [*self.b, *new], [*self.middle, *new]
        first = [1.0] + [0.0] * (len(b) - 1)
        last = first[::-1]
        if self.order < 4:
            rows = [(1, 0, 0), (-2, -1, 3), (1, 1, -2)]
            return tuple(tuple(p * f + q * g + r * w for f, g, w in zip(first, last, b, strict=True)) for p, q, r in rows)
        quartic = [(1, 0, 0, 0), (-4, 1, -5, 16), (5, -3, 14, -32), (-2, 2, -8, 16)]
        columns = list(zip(first, last, b, m, strict=True))
        return tuple(tuple(p * f + q * g + r * w + s * v for f, g, w, v in columns) for p, q, r, s in quartic)


@lru_cache
def pair_of(method: str) -> Pair:
    solver = SOLVERS[method]
    tableau = solver.tableau
    return Pair(
        c=(0.0, *tableau.alpha.tolist()),
        a=((), *(tuple(row.tolist()) for row in tableau.beta)),
        b=tuple(tableau.c_sol.tolist()),
        e=tuple(tableau.c_error.tolist()),
        middle=tuple(solver.mid.tolist()),
        order=solver.order,
    )


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
