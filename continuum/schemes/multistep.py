"""Linear multistep schemes, x+ = sum_j alpha_j x_{n-j} + h sum_j beta_j f_{n-j}: the past is passed along as memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from continuum.fields import Field
from continuum.schemes.base import Evaluate, Memory, Multistep, ReversibleScheme, Scheme, combine, inside, knot_at
from continuum.schemes.runge_kutta import RK4, Heun, Kutta3, runge_kutta_step
from continuum.types import State

BETA = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
STARTER = {2: Heun.tableau, 3: Kutta3.tableau, 4: RK4.tableau}


@dataclass(frozen=True)
class AdamsBashforth(Scheme):
    """The Adams-Bashforth scheme x+ = x + h sum_j beta_j f_{n-j} of order 2, 3 or 4, one evaluation a step.

    It starts with Runge-Kutta steps of its own order (Heun, Kutta3, RK4) and starts anew at every knot of the field, where
    its past belongs to another layer; with h = 1 on piecewise-constant weights it therefore is the starter.

    Args:
        order: 2, 3 or 4, the number of slopes in a step.

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

    def multistep(self, k: Any) -> Multistep:
        return (*[0] * (self.order - 1), -1, 1), (*reversed(BETA[self.order]), 0), 1

    def continued(self, layer: Field, x: State, h: float, past: Sequence[State]) -> tuple[State, Memory]:
        return x, tuple(layer(0.0, state) for state in past)

    def evaluations(self, field: Field, steps: Sequence[tuple[float, float]]) -> int:
        starter = len(STARTER[self.order].b)
        total = known = 0
        for t, _ in steps:
            known = 1 if knot_at(field.knots, t) is not None else min(known + 1, self.order)
            total += 1 if known == self.order else starter
        return total


@dataclass(frozen=True)
class LinearTwoStep(ReversibleScheme):
    """The two-step scheme of LM-ResNet, x_{n+1} = (1 - k_n) x_n + k_n x_{n-1} + h f_n(x_n) (arXiv 1710.10121).

    It steps `Momentum` layers, which own their k; layers without one take a plain residual step. Of order 1 for
    (1 + k) x' = f, and zero-stable for -1 < k <= 1. The first step, if no previous state is given, is Euler's for the same
    equation.

    A step is undone by x_{n-1} = (x_{n+1} - (1 - k) x_n - h f(x_n)) / k, which multiplies rounding errors by 1 / |k|: fit for
    momentum networks with k near -1, not for a new LM-ResNet, whose k lie in (-0.1, 0].

    Raises:
        TypeError: no layer of the field is a `Momentum`; to undo steps, every layer but the first must be one.
    """

    order = 1
    stages = 1
    variable_steps = False
    remembers = True

    def check(self, field: Field) -> None:
        if all(layer.friction()[1] is None for layer in field.pieces()):
            raise TypeError(
                f"LinearTwoStep steps Momentum(field) or PiecewiseConstant layers of them, which hold k; got a "
                f"{type(field).__name__} without any. Wrap the layers in Momentum, or use Euler()"
            )

    def check_undo(self, field: Field) -> None:
        for index, layer in enumerate(field.pieces()[1:], 1):
            if layer.friction()[1] is None:
                raise TypeError(
                    f"layer {index} is a {type(layer).__name__} without k: its step forgets the state before, so LinearTwoStep "
                    "cannot undo it. Wrap it in Momentum, or take gradient='direct'"
                )

    def begin(self, field: Field, x: State, previous: State | None, steps: Sequence[tuple[float, float]]) -> Memory:
        return () if previous is None else (one_step_before(x, previous, steps[0][1]),)

    def multistep(self, k: Any) -> Multistep:
        return (-k, k - 1, 1), (0, 1, 0), 1

    def continued(self, layer: Field, x: State, h: float, past: Sequence[State]) -> tuple[State, Memory]:
        return x, (past[0],)

    def coefficients(self, field: Field, t: float) -> tuple[Tensor, ...]:
        _, k = field.at(t).friction()
        return (k,) if isinstance(k, Tensor) else ()

    def forth(self, evaluate: Evaluate, field: Field, t: float, x: State, h: float, memory: Memory) -> tuple[State, Memory]:
        t = inside(field.knots, t, h, 0, x.dtype)
        inner, k = field.at(t).friction()
        if k is not None and memory:
            return combine((1 - k) * x + k * memory[0], h, (1,), (evaluate(inner, t, x),)), (x,)
        slope = evaluate(inner, t, x)
        return combine(x, h, (1,), (slope if k is None else slope / (1 + k),)), (x,)

    def back(
        self, evaluate: Evaluate, field: Field, t: float, x: State, h: float, memory: Memory, first: bool
    ) -> tuple[State, Memory]:
        t = inside(field.knots, t, h, 0, x.dtype)
        (inner, k), (before,) = field.at(t).friction(), memory
        slope = evaluate(inner, t, before)
        if first:
            return before, ()
        assert k is not None  # check_undo has seen it
        return before, (combine(x - (1 - k) * before, h, (-1,), (slope,)) / k,)


@dataclass(frozen=True)
class TwoStepMidpoint(ReversibleScheme):
    """The two-step midpoint rule x_{n+1} = x_{n-1} + 2 h f_n(x_n): order 2, one evaluation (arXiv 1709.03698).

    It is `LinearTwoStep` with k = 1 and 2 f. The first step, if no previous state is given, is Euler's. Undone by
    x_{n-1} = x_{n+1} - 2 h f_n(x_n). Stable on the imaginary axis only: for fields that neither grow nor damp.

    Raises:
        TypeError: layers in `Momentum`, which belong to `LinearTwoStep`.
    """

    order = 2
    stages = 1
    variable_steps = False
    remembers = True

    def check(self, field: Field) -> None:
        if any(layer.friction()[1] is not None for layer in field.pieces()):
            raise TypeError("TwoStepMidpoint has its own k = 1: give it the fields without Momentum, or use LinearTwoStep()")

    def multistep(self, k: Any) -> Multistep:
        return (-1, 0, 1), (0, 2, 0), 1

    def continued(self, layer: Field, x: State, h: float, past: Sequence[State]) -> tuple[State, Memory]:
        return x, (past[0],)

    def begin(self, field: Field, x: State, previous: State | None, steps: Sequence[tuple[float, float]]) -> Memory:
        return () if previous is None else (one_step_before(x, previous, steps[0][1]),)

    def forth(self, evaluate: Evaluate, field: Field, t: float, x: State, h: float, memory: Memory) -> tuple[State, Memory]:
        slope = evaluate(field.at(t), inside(field.knots, t, h, 0, x.dtype), x)
        return (combine(memory[0], h, (2,), (slope,)) if memory else combine(x, h, (1,), (slope,))), (x,)

    def back(
        self, evaluate: Evaluate, field: Field, t: float, x: State, h: float, memory: Memory, first: bool
    ) -> tuple[State, Memory]:
        slope = evaluate(field.at(t), inside(field.knots, t, h, 0, x.dtype), memory[0])
        return memory[0], (() if first else (combine(x, h, (-2,), (slope,)),))


def one_step_before(x: State, previous: State, h: float) -> State:
    """The state one step back, where `previous` lies one layer back; shorter steps start from its velocity."""
    return previous if abs(h) == 1 else torch.lerp(x, previous, abs(h))
