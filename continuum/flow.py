"""A layer of continuous depth: x(0) -> x(T) with dx/dt = f(t, x), integrated by a solver of your choice."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from continuum.fields import Field
from continuum.schemes.stochastic import without_noise
from continuum.solvers import Adaptive, Brownian, Cost, Embedded, FixedStep, Solver, parse
from continuum.solvers.base import evaluating
from continuum.types import State
from continuum.weights import PiecewiseConstant


class Flow(nn.Module):
    """The map x(0) -> x(depth) of dx/dt = field(t, x); depth is counted in layers.

    The weights are the field's: `with_solver` integrates the same weights otherwise. A solver may be given as text.
    `cost` holds evaluations, accepted and rejected steps and the grid of the last solve.

    >>> from continuum.fields import MLP
    >>> flow = Flow(MLP(2, hidden=16), "dopri5:rtol=1e-4,atol=1e-4", depth=1)
    >>> x = torch.randn(8, 2)
    >>> flow(x).shape
    torch.Size([8, 2])
    >>> flow.with_solver("rk4:h=0.25")(x).shape
    torch.Size([8, 2])

    Raises:
        TypeError: the field is no `Field`, or the solver cannot solve it.
        ValueError: the depth is not positive, or the solver's fixed step does not divide it.
    """

    def __init__(self, field: Field, solver: Solver | str, depth: float) -> None:
        super().__init__()
        if not isinstance(field, Field):
            raise TypeError(f"a Flow needs a Field, not a {type(field).__name__}: wrap a module as Autonomous(module)")
        if not depth > 0:
            raise ValueError(f"depth is a positive number of layers, not {depth}")
        self.field = field
        self.solver = parse(solver) if isinstance(solver, str) else solver
        self.depth = float(depth)
        self.refined = 1
        self.cost: Cost | None = None
        if not isinstance(self.solver, Solver):
            raise TypeError(f"a Flow needs a Solver or its text, not {solver!r}")
        self.solver.check(field)
        if isinstance(self.solver, FixedStep | Brownian):
            self.solver.steps(0.0, self.depth)

    def forward(self, x: State, memory: State | None = None) -> State:
        """x(depth) from x = x(0); `memory` is the state one layer before x, for schemes that remember one."""
        solution = self.solver(self.field, x, (0.0, self.depth), self._one_layer_before(x, memory))
        self.cost = solution.cost
        return solution.states[-1]

    def _one_layer_before(self, x: State, memory: State | None) -> State | None:
        """The previous state that the solver is given: where layers are refined, `memory` lies one original layer before x,
        and this is the state one refined layer before, on the straight line between them.
        """
        return memory if memory is None or self.refined == 1 else torch.lerp(x, memory, 1 / self.refined)

    def states(self, x: State, memory: State | None = None) -> list[State]:
        """What `forward` passes through: x, and the state after each step.

        Raises:
            TypeError: the solver does not have fixed steps.
        """
        if not isinstance(self.solver, FixedStep):
            raise TypeError(f"only fixed steps are known beforehand; this flow is solved by {self.solver}")
        times = [*(t for t, _ in self.solver.steps(0.0, self.depth)), self.depth]
        return self.solver(self.field, x, times, self._one_layer_before(x, memory)).states

    def trajectory(self, x: State, times: Sequence[float] | Tensor) -> Tensor:
        """The states at `times`, stacked on a new first axis; x is the state at times[0].

        Times are strictly monotone, in either direction: (depth, 0) goes back.

        Raises:
            ValueError: fewer than two times, times that are not monotone, or off the grid of a fixed-step solver.
        """
        depths = times.tolist() if isinstance(times, Tensor) else [float(t) for t in times]
        steps = [b - a for a, b in pairwise(depths)]
        if not steps or not (all(h > 0 for h in steps) or all(h < 0 for h in steps)):
            raise ValueError(f"times are two or more strictly monotone depths, not {depths}")
        solution = self.solver(self.field, x, depths)
        self.cost = solution.cost
        return torch.stack(solution.states)

    def with_solver(self, solver: Solver | str) -> "Flow":
        """A flow of the same field, sharing its weights, under another solver."""
        flow = Flow(self.field, solver, self.depth)
        flow.refined = self.refined
        flow.training = self.training  # not train(), which would set the shared field's modes too
        return flow

    def drift(self) -> "Flow":
        """The flow of the drift, the field without its noise: deterministic, with the same weights, and open to every solver.

        A stochastic solver becomes the deterministic one it is without noise; any other flow keeps its own.

        >>> from continuum.fields import MLP
        >>> from continuum.noise import StochasticDepth
        >>> str(Flow(StochasticDepth(MLP(2, hidden=16), 0.5), "euler_maruyama:h=0.5", depth=1).drift().solver)
        'euler:h=0.5'
        """
        flow = Flow(without_noise(self.field), self.solver.without_noise(), self.depth)
        flow.refined, flow.training = self.refined, self.training
        return flow

    @torch.no_grad()
    def frozen(self, x: State) -> "Flow":
        """The flow that repeats, for any input, the steps which the adaptive solver accepts on `x`.

        Its solver is a `FixedStep` with the method's own tableau on the accepted grid: no error control, so it compiles and
        exports, and on `x` it gives the adaptive solution (to rounding for the pairs whose last stage is f at the new point:
        dopri5, dopri8, bosh3; adaptive_heun and fehlberg2 reuse another slope, so they agree only to the tolerance).

        Raises:
            TypeError: the solver has fixed steps already, or goes through SciPy.
        """
        if not isinstance(self.solver, Adaptive):
            raise TypeError(f"only an adaptive flow can be frozen; this one is solved by {self.solver}")
        try:
            scheme = Embedded(self.solver.method)
        except ValueError as error:
            raise TypeError(str(error)) from None
        with evaluating(self):
            cost = self.solver(self.field, x, (0.0, self.depth)).cost
        return self.with_solver(FixedStep(scheme, grid=cost.grid))

    def refine(self, k: int) -> "Flow":
        """The flow with k steps in the place of one, for training to go on at a finer level (arXiv 1710.10348).

        Under `PiecewiseConstant` a layer becomes k copies of itself, each scaled by 1/k, and the depth k times what it was:
        f_i -> f_i / k, ..., f_i / k. Any other field stays on its depth and a fixed step h becomes h / k; an adaptive solver
        remains. Nothing is shared with this flow: weights are copied.

        >>> from continuum.fields import MLP
        >>> str(Flow(MLP(2, hidden=16), "euler:h=0.5", depth=1).refine(2).solver)
        'euler:h=0.25'

        Raises:
            ValueError: k is no integer of at least 2, h / k is no step, or the solver steps over a grid.
        """
        if not isinstance(k, int) or k < 2:
            raise ValueError(f"refine puts k steps in the place of one: k is an integer of at least 2, not {k!r}")
        if isinstance(self.solver, FixedStep) and self.solver.grid is not None:
            raise ValueError(
                f"steps over a grid cannot be refined: choose even ones first, for example with_solver('{self.solver.scheme}')"
            )
        if isinstance(self.field, PiecewiseConstant):
            flow = Flow(_divided(self.field, k), self.solver, k * self.depth)
            flow.refined = k * self.refined
        else:
            flow = Flow(copy.deepcopy(self.field), _finer(self.solver, k), self.depth)
            flow.refined = self.refined
        flow.training = self.training
        return flow

    def extra_repr(self) -> str:
        return f"solver={self.solver}, depth={self.depth:g}"


def _divided(field: PiecewiseConstant, k: int) -> PiecewiseConstant:
    """Each layer k times in a row, divided by k."""
    layers: list[Field] = []
    for layer in field.layers:
        for _ in range(k):
            layers.append(cast(Field, copy.deepcopy(layer)).scaled(1 / k))
    divided = PiecewiseConstant(layers)
    divided.training = divided.layers.training = field.training
    return divided


def _finer(solver: Solver, k: int) -> Solver:
    if not isinstance(solver, FixedStep | Brownian):
        return solver
    try:
        return replace(solver, h=solver.h / k)
    except ValueError:
        raise ValueError(
            f"refine({k}) would take h = {solver.h:g} to {solver.h / k:g}, which is neither 1/m nor an integer: take another "
            "k, or choose another step with with_solver first"
        ) from None
