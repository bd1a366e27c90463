"""Backward Euler x+ = x + h f(x+), by its Neumann series: x+ = x + h f(x) + h f(h f(x)) + ..."""

from dataclasses import dataclass

from continuum.fields import Field
from continuum.schemes.base import Memory, Scheme, combine, inside
from continuum.types import State


@dataclass(frozen=True)
class NeumannSeries(Scheme):
    """The first `terms` terms of backward Euler's Neumann series: PolyNet's I + F + F F (+ F F F) (arXiv 1611.05725).

    For a linear field h f(x) = A x the step is sum_{j <= terms} A^j x, whose limit is (I - A)^{-1} x, with a local error of
    O(h^{terms + 1}) against backward Euler. For any other field F F is a composition, and the step only resembles it. Of
    order 1 for x' = f, `terms` evaluations; one term is Euler's step.

    Args:
        terms: number of nested evaluations of the field, at least 1.

    Raises:
        ValueError: fewer than one term.
    """

    terms: int = 2
    order = 1

    def __post_init__(self) -> None:
        if self.terms < 1:
            raise ValueError(f"the series has one term or more, not {self.terms}")

    @property
    def stages(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.terms

    @property
    def series(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (1,) * (self.terms + 1)

    def step(self, field: Field, t: float, x: State, h: float, memory: Memory) -> tuple[State, Memory]:
        t = inside(field.knots, t, h, 0, x.dtype)
        term = x
        for _ in range(self.terms):
            slope = field(t, term)
            x = combine(x, h, (1,), (slope,))
            term = h * slope
        return x, ()
