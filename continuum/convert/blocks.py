"""The fields of published residual blocks: x + f(x), relu(x + f(x)), or part by part, y = x + f1(x), x+ = y + f2(y).

A field keeps the block whole and calls what lies between its sums.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from continuum.fields import Field, PostActivation, Split
from continuum.fields.base import in_mode_of
from continuum.noise import StochasticDepth
from continuum.types import State, Time

Function: TypeAlias = Callable[..., Tensor]
"""f of (block, x, *context), where `context` are the further arguments of the block's own forward, in their order."""


@dataclass(frozen=True)
class Summand:
    """What a block adds: a function, and the module `drop` of the block, if it has one, that may drop the path behind it.

    Stochastic depth by image, divided by the probability that the path survives: eta f / p, as torchvision's `StochasticDepth`
    and timm's `DropPath` compute it.
    """

    function: Function
    drop: str = ""

    def __call__(self, block: nn.Module, x: Tensor, *context: Any) -> Tensor:
        path = self.function(block, x, *context)
        return getattr(block, self.drop)(path) if self.drop else path

    def survival(self, block: nn.Module) -> float:
        """p; 1 where nothing is dropped, or by a module of an unknown kind."""
        drop = getattr(block, self.drop, None)
        by_image = getattr(drop, "mode", "row") == "row" and getattr(drop, "scale_by_keep", True)
        return 1.0 - getattr(drop, "p", getattr(drop, "drop_prob", 0.0)) if by_image else 1.0


class Residual(Field):
    """The sum of what a block adds, f(t, x) = f1(block, x) + f2(block, x) + ...

    Several are its `addends`, which the block takes one after the other, as `LieTrotter` does.

    Args:
        block: the published block.
        functions: what it adds; functions of a module, so that copies and files find them.
    """

    takes_number = True

    def __init__(self, block: nn.Module, *functions: Summand) -> None:
        super().__init__()
        self.block, self.functions = block, functions
        # A tuple, so that the block is registered once.
        self.summands = tuple(Residual(block, function) for function in functions) if len(functions) > 1 else ()

    def forward(self, t: Time, x: State, *context: Any) -> State:
        first, *others = (function(self.block, x, *context) for function in self.functions)
        return sum(others, start=first)

    def addends(self) -> tuple[Field, ...]:
        return self.summands

    def scaled(self, scale: float) -> Field:
        if not self.summands:
            return super().scaled(scale)
        return in_mode_of(self, Split(*(part.scaled(scale) for part in self.summands)))

    def held(self, t: float) -> Field:
        return self

    def with_noise(self) -> Field:
        """The field whose dropped paths are noise: random coefficients eta / p of its branches."""
        if self.summands:
            parts = [part.with_noise() for part in self.summands]
            noisy = any(part is not summand for part, summand in zip(parts, self.summands, strict=True))
            return in_mode_of(self, Split(*parts)) if noisy else self
        (function,) = self.functions
        survival = function.survival(self.block)
        if survival == 1:
            return self
        kept = in_mode_of(self, Residual(self.block, Summand(function.function)))
        return in_mode_of(self, StochasticDepth(kept, survival, "rescaled", per="image"))

    def extra_repr(self) -> str:
        return ", ".join(summand.function.__name__.strip("_") for summand in self.functions)


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
