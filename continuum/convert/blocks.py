"""The fields of published residual blocks: x + f(x), relu(x + f(x)), or part by part, y = x + f1(x), x+ = y + f2(y).

A field keeps the block whole and calls what lies between its sums.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, nn

from continuum.fields import Field, PostActivation, Split
from continuum.fields.base import in_mode_of
from continuum.types import State, Time

Function: TypeAlias = Callable[..., Tensor]
"""f of (block, x, *context), where `context` are the further arguments of the block's own forward, in their order."""


class Residual(Field):
    """The sum of the branches of a block, f(t, x) = f1(block, x) + f2(block, x) + ...

    Several are its `parts`, which the block takes one after the other, as `LieTrotter` does.

    Args:
        block: the published block.
        functions: what it computes between its sums; functions of a module, so that copies and files find them.
    """

    takes_number = True

    def __init__(self, block: nn.Module, *functions: Function) -> None:
        super().__init__()
        self.block, self.functions = block, functions
        # A tuple, so that the block is registered once.
        self.summands = tuple(Residual(block, function) for function in functions) if len(functions) > 1 else ()

    def forward(self, t: Time, x: State, *context: Any) -> State:
        first, *others = self.functions
        slope = first(self.block, x, *context)
        for function in others:
            slope = slope + function(self.block, x, *context)
        return slope

    def parts(self) -> tuple[Field, ...]:
        return self.summands

    def scaled(self, scale: float) -> Field:
        if not self.summands:
            return super().scaled(scale)
        return in_mode_of(self, Split(*(part.scaled(scale) for part in self.summands)))

    def held(self, t: float) -> Field:
        return self

    def extra_repr(self) -> str:
        return ", ".join(function.__name__.strip("_") for function in self.functions)


class Branch(nn.Module):
    """One branch of a block as a module of x."""

    def __init__(self, block: nn.Module, function: Function) -> None:
        super().__init__()
        self.block, self.function = block, function

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        return self.function(self.block, x, *context)


def post_activation(block: nn.Module, function: Function) -> Field:
    """The field of a block relu(x + f(x))."""
    return PostActivation(Branch(block, function))


class Difference(Field):
    """The field of any block that keeps the shape of its input, f(t, x) = block(x) - x.

    Exact to rounding only, since x + (block(x) - x) is block(x) only if nothing is lost in the difference. A block that
    normalises its sum, as BERT's, is no step of an equation: its differences do not get smaller with the step.
    """

    takes_number = True

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, t: Time, x: State, *context: Any) -> State:
        return self.block(x, *context) - x

    def held(self, t: float) -> Field:
        return self
