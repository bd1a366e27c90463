"""A field split into parts, f(t, x) = f1(t, x) + f2(t, x) + ..., which a splitting scheme steps one after the other."""

from torch import nn

from continuum.fields.base import Field, as_part, in_mode_of
from continuum.types import State, Time


class Split(Field):
    """The sum of its parts, f(t, x) = f1(t, x) + f2(t, x) + ...

    Under `LieTrotter` with h = 1 a step takes the parts one after the other, x <- x + f_i(x): a transformer block, with
    attention and feed-forward part in that order. Every other scheme and solver integrates the sum. A part may have noise,
    which then draws for itself; splitting schemes alone take such a field.

    >>> import torch
    >>> from continuum.fields import Autonomous
    >>> field = Split(Autonomous(nn.Identity()), Autonomous(nn.Tanh()))
    >>> field(0.0, torch.zeros(2, 3)).shape
    torch.Size([2, 3])

    Raises:
        TypeError: a part is no `Field`, or jumps in depth.
        ValueError: fewer than two parts.
    """

    takes_number = True

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        if len(parts) < 2:
            raise ValueError(f"a Split has two parts or more, not {len(parts)}")
        self.summands = nn.ModuleList(as_part(part, "a Split") for part in parts)

    def forward(self, t: Time, x: State) -> State:
        first, *others = (part(t, x) for part in self.addends())
        return sum(others, start=first)

    def addends(self) -> tuple[Field, ...]:
        return tuple(self.summands)  # pyright: ignore[reportReturnType]

    def scaled(self, scale: float) -> Field:
        return in_mode_of(self, Split(*(part.scaled(scale) for part in self.addends())))

    def held(self, t: float) -> Field:
        return in_mode_of(self, Split(*(part.held(t) for part in self.addends())))

    def drift(self) -> Field:
        return in_mode_of(self, Split(*(part.drift() for part in self.addends())))
