"""Layers with a momentum: fields of the equation (1 + k) x' = f(t, x)."""

from typing import Any

import torch
from torch import Tensor, nn

from continuum.fields.base import Field, in_mode_of
from continuum.types import State, Time


class Momentum(Field):
    """A layer of the equation (1 + k) x' = f(t, x), with one scalar k, learnt or constant.

    -k is a momentum and 1 + k a friction: under the scheme `LinearTwoStep` a step is
    x_{n+1} = (1 - k) x_n + k x_{n-1} + h f(x_n), the layer of LM-ResNet (arXiv 1710.10121); every other scheme and
    solver integrates f / (1 + k). k starts uniform in (-0.1, 0] unless it is given, and is zero-stable for -1 < k <= 1.
    `Momentum(f.scaled(1 - gamma), k=-gamma, learnt=False)` is the layer of a momentum ResNet (arXiv 2102.07870).

    Args:
        field: f.
        k: the value to start with; None draws it.
        learnt: whether k is a parameter. Otherwise it is a Python float, which no conversion rounds and no file holds.

    Raises:
        ValueError: k = -1, where there is no first-order equation: that is `SecondOrder`; or a constant k that is not given.
    """

    k: nn.Parameter | float
    takes_number = True

    def __init__(self, field: Field, k: float | None = None, learnt: bool = True) -> None:
        super().__init__()
        self.field = field
        self.knots, self.extent = field.knots, field.extent
        if k == -1:
            raise ValueError("k = -1 makes (1 + k) x' = f an equation without x': the second-order one is SecondOrder(field)")
        if learnt:
            self.k = nn.Parameter(-0.1 * torch.rand(()) if k is None else torch.tensor(float(k)))
        elif k is None:
            raise ValueError("a k that is not learnt has to be given: Momentum(field, k=-0.9, learnt=False)")
        else:
            self.k = float(k)

    def forward(self, t: Time, x: State) -> State:
        return self.field(t, x) / (1 + self.k)

    def scaled(self, scale: float) -> Field:
        return self.around(self.field.scaled(scale))

    def drift(self) -> Field:
        return self.around(self.field.drift())

    def held(self, t: float) -> Field:
        return self.around(self.field.held(t))

    def innermost(self) -> Field:
        return self.field.innermost()

    def own_weights(self) -> dict[str, Tensor]:
        return self.field.own_weights()

    def friction(self) -> tuple[Field, Tensor | float | None]:
        return self.field, self.k

    def around(self, field: Field) -> "Momentum":
        """The layer of another field with the same k."""
        layer = in_mode_of(self, Momentum(field, k=0.0, learnt=isinstance(self.k, nn.Parameter)))
        layer.k = self.k
        return layer

    def extra_repr(self) -> str:
        return "" if isinstance(self.k, nn.Parameter) else f"k={self.k}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if not isinstance(self.k, nn.Parameter):  # files once held a constant k too, rounded to float32
            state_dict.pop(f"{prefix}k", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)
