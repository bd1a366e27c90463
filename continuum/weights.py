"""Weights as functions of depth, theta(t): fields made of fields."""

import math
from collections.abc import Iterable
from typing import cast

from torch import nn

from continuum.fields import Field
from continuum.types import State, Time


class PiecewiseConstant(Field):
    """One field a layer, f(t, x) = f_floor(t)(t, x): layer k is in force on [k, k + 1).

    Its depth is the number of layers n, its knots are 1, ..., n - 1. The index is clamped to [0, n - 1], for an adaptive
    solver may look past the end.

    >>> from torch import nn
    >>> from continuum.fields import Autonomous
    >>> field = PiecewiseConstant([Autonomous(nn.Linear(2, 2)) for _ in range(3)])
    >>> field.knots
    (1.0, 2.0)

    Raises:
        ValueError: no layers.
        TypeError: a layer is not a `Field`, or jumps inside.
    """

    def __init__(self, layers: Iterable[Field]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if not self.layers:
            raise ValueError("PiecewiseConstant needs at least one layer")
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, Field):
                raise TypeError(f"layer {index} is a {type(layer).__name__}, not a Field: wrap it as Autonomous(module)")
            if layer.knots:
                raise TypeError(f"layer {index} jumps at {layer.knots}: a layer is smooth in depth")
        self.knots = tuple(float(k) for k in range(1, len(self.layers)))

    def layer(self, t: Time) -> Field:
        """The layer in force at depth `t`."""
        index = math.floor(t) if isinstance(t, float | int) else int(t.floor())
        return cast(Field, self.layers[min(max(index, 0), len(self.layers) - 1)])

    def forward(self, t: Time, x: State) -> State:
        return self.layer(t)(t, x)
