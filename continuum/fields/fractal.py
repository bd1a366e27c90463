"""The two-column fractal block as a field, f = k f1 + f2: its columns see different states only within a step."""

from torch import nn

from continuum.fields.base import Field, as_part, in_mode_of
from continuum.types import State, Time


class TwoColumns(Field):
    """Two columns of a fractal block, f(t, x) = k f1(t, x) + f2(t, x) (arXiv 1605.07648, 1710.10121).

    Under the scheme `Fractal` a step is the block x+ = (1 - k) x + k (x + h f1(x)) + h f2(x + h f1(x)), that is a Runge-Kutta
    step of two stages: Heun's for f1 = f, f2 = f / 2, k = 1/2; the midpoint rule for f1 = f / 2, f2 = f, k = 0. Every other
    scheme and solver integrates k f1 + f2.

    Raises:
        TypeError: a column is no `Field`, or jumps in depth.
    """

    takes_number = True

    def __init__(self, first: nn.Module, second: nn.Module, k: float = 0.5) -> None:
        super().__init__()
        self.first = as_part(first, "TwoColumns")
        self.second = as_part(second, "TwoColumns")
        self.k = float(k)

    def forward(self, t: Time, x: State) -> State:
        return self.k * self.first(t, x) + self.second(t, x)

    def scaled(self, scale: float) -> Field:
        return in_mode_of(self, TwoColumns(self.first.scaled(scale), self.second.scaled(scale), self.k))

    def held(self, t: float) -> Field:
        return in_mode_of(self, TwoColumns(self.first.held(t), self.second.held(t), self.k))

    def columns(self) -> tuple[Field, Field, float]:
        return self.first, self.second, self.k

    def innermost(self) -> Field:
        return self.second.innermost()

    def extra_repr(self) -> str:
        return f"k={self.k:g}"
