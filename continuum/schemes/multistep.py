"""Linear multistep schemes, x+ = sum_j alpha_j x_{n-j} + h sum_j beta_j f_{n-j}: the past is passed along as memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from continuum.fields import Field, Momentum
from continuum.schemes.base import Memory, Scheme, combine, inside, knot_at
from continuum.schemes.runge_kutta import RK4, Heun, Kutta3, runge_kutta_step
from continuum.types import State
from continuum.weights import PiecewiseConstant

BETA = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
STARTER = {2: Heun.tableau, 3: Kutta3.tableau, 4: RK4.tableau}


@dataclass(frozen=True)
class AdamsBashforth(Scheme):
    """The Adams-Bashforth scheme x+ = x + h sum_j beta_j f_{n-j} of order 2, 3 or 4, one evaluation a step.

    It starts with Runge-Kutta steps of its own order (Heun, Kutta3, RK4) and starts anew at every knot of the field, where
    its past belongs to another layer; with h = 1 on piecewise-constant weights it therefore is the starter.

    Raises:
        ValueError: another order.
    """

    order: int = 2
    stages = 1
    variable_steps = False

    def __post_init__(self) -> None:
        if self.order not in BETA:
            raise ValueError(f"AdamsBashforth has order 2, 3 or 4, not {self.order}")

    def step(self, field: Field, t: float, x: State, h: float, memory: Memory) -> tuple[State, Memory]:
        if knot_at(field.knots, t) is not None:
            memory = ()
        slope = field(inside(field.knots, t, h, 0, x.dtype), x)
        slopes = (slope, *memory)[: self.order]
        if len(slopes) < self.order:
            return runge_kutta_step(STARTER[self.order], field, t, x, h, first=slope), slopes
        return combine(x, h, BETA[self.order], slopes), slopes

    def evaluations(self, field: Field, steps: Sequence[tuple[float, float]]) -> int:
        starter = len(STARTER[self.order].b)
        total = known = 0
        for t, _ in steps:
            known = 1 if knot_at(field.knots, t) is not None else min(known + 1, self.order)
            total += 1 if known == self.order else starter
        return total


@dataclass(frozen=True)
class LinearTwoStep(Scheme):
    """The two-step scheme of LM-ResNet, x_{n+1} = (1 - k_n) x_n + k_n x_{n-1} + h f_n(x_n) (arXiv 1710.10121).

    It steps `Momentum` layers, which own their k; layers without one take a plain residual step. Of order 1 for
    (1 + k) x' = f, and zero-stable for -1 < k <= 1. The first step, if no previous state is given, is Euler's for the same
    equation.

    Raises:
        TypeError: no layer of the field is a `Momentum`.
    """

    order = 1
    stages = 1
    variable_steps = False

    def check(self, field: Field) -> None:
        layers = field.layers if isinstance(field, PiecewiseConstant) else [field]
        if not any(isinstance(layer, Momentum) for layer in layers):
            raise TypeError(
                f"LinearTwoStep steps Momentum(field) or PiecewiseConstant layers of them, which hold k; got a "
                f"{type(field).__name__} without any. Wrap the layers in Momentum, or use Euler()"
            )

    def begin(self, x: State, previous: State | None, h: float) -> Memory:
        if previous is None:
            return ()
        # The previous state lies one layer back; a shorter step starts from the same velocity.
        return (previous if abs(h) == 1 else torch.lerp(x, previous, abs(h)),)

    def step(self, field: Field, t: float, x: State, h: float, memory: Memory) -> tuple[State, Memory]:
        t = inside(field.knots, t, h, 0, x.dtype)
        layer = field.layer(t) if isinstance(field, PiecewiseConstant) else field
        if not isinstance(layer, Momentum) or not memory:
            return combine(x, h, (1,), (layer(t, x),)), (x,)
        k = layer.k
        return combine((1 - k) * x + k * memory[0], h, (1,), (layer.field(t, x),)), (x,)
