"""Embedded Runge-Kutta pairs: from the same stages k_i a step x + h sum_i b_i k_i and its error h sum_i e_i k_i.

The coefficients are those of the installed torchdiffeq, read when they are needed.
"""

from dataclasses import dataclass
from functools import lru_cache

from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver
from torchdiffeq._impl.scipy_wrapper import ScipyWrapperODESolver

from continuum.schemes import RungeKutta, Tableau

PAIRS = tuple(name for name, solver in SOLVERS.items() if issubclass(solver, RKAdaptiveStepsizeODESolver))
METHODS = PAIRS + tuple(name for name, solver in SOLVERS.items() if issubclass(solver, ScipyWrapperODESolver))
"""The adaptive methods of the installed torchdiffeq."""


@dataclass(frozen=True)
class Pair:
    """c, a and b as in a Butcher tableau, the weights e of the error, and the order of the step."""

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    e: tuple[float, ...]
    order: int

    @property
    def reuses_last(self) -> bool:
        """Whether the last stage is f at the new point, and so the first one of the next step.

        adaptive_heun and fehlberg2 hand their last stage on without that.
        """
        return self.c[-1] == 1 and self.a[-1] == self.b[:-1] and self.b[-1] == 0


@lru_cache
def pair_of(method: str) -> Pair:
    solver = SOLVERS[method]
    tableau = solver.tableau
    return Pair(
        c=(0.0, *tableau.alpha.tolist()),
        a=((), *(tuple(row.tolist()) for row in tableau.beta)),
        b=tuple(tableau.c_sol.tolist()),
        e=tuple(tableau.c_error.tolist()),
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
