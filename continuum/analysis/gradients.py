"""What each way to a gradient is worth: |g - exact| / |exact| for the gradient g of a flow's parameters as one vector.

The loss is linear in what comes out, L = mean over the batch of <c, x(depth)>, with a fixed random c of norm one an image.
Its gradient at the end is c / batch under every solver, so that an error is one of the way back and of the states along it.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from continuum.analysis.convergence import tightest
from continuum.analysis.memory import peak_memory, seconds_of
from continuum.fields import Field
from continuum.flow import Flow
from continuum.schemes import ReversibleScheme
from continuum.schemes.base import scheme_of
from continuum.solvers import SolveError, Solver
from continuum.types import State


@dataclass(frozen=True)
class GradientRow:
    """One solver's gradient.

    `error` is the relative distance to the gradient of the equation; None where the scheme is a reversible one, which makes
    the coupled layers a network of their own, and where no reference is affordable. `step_error` is that to the gradient of the
    same steps by plain autograd, in the same precision; None for that gradient itself. Evaluations of the field are those on
    the way out and those on the way back; `memory` (MiB) is the peak beside the parameters and their gradients; `seconds` are
    those of a second run. A solver that failed has its `failure` and no numbers: None, 0 and NaN.
    """

    solver: str
    error: float | None
    step_error: float | None
    evaluations: int
    backward_evaluations: int
    memory: float
    seconds: float
    failure: str | None = None


def compare_gradients(flow: Flow, x: State, solvers: Sequence[Solver]) -> list[GradientRow]:
    """The gradient of the parameters of `flow` under each of `solvers`, from the states `x`, beside the two it should be.

    Computed on copies in evaluation mode, in the precision of the flow. The gradient of the equation is that of dopri8 in
    float64 at a tolerance of 1e-10, or of 1e-8 or 1e-6 where kinks in the field make that too dear; near a kink it converges
    slowly, and of an ODE-Net with ReLUs it is good to about half a per cent. The gradient of the same
    steps is the solver's own with `gradient="direct"`: for an adjoint, that of the adaptive method at the same tolerance.

    >>> from continuum.fields import MLP
    >>> from continuum.solvers import parse
    >>> flow = Flow(MLP(2, hidden=8), "rk4", depth=1)
    >>> (row,) = compare_gradients(flow, torch.ones(4, 2), [parse("rk4:h=0.25,gradient=checkpoint")])
    >>> row.evaluations, row.backward_evaluations, row.step_error < 1e-6, row.error < 1e-3
    (16, 16, True, True)

    Raises:
        ValueError: no parameter of the flow requires a gradient.
        TypeError: a solver cannot solve the flow; where the field has noise, compare `flow.drift()`.
    """
    if not any(p.requires_grad for p in flow.parameters()):
        raise ValueError("no parameter of this flow requires a gradient: call flow.requires_grad_(True)")
    flow, x = copy.deepcopy(flow).eval(), x.detach()
    weights = _weights(x)
    approximate = [solver for solver in solvers if not isinstance(scheme_of(solver), ReversibleScheme)]
    exact = _exact(flow, x, weights) if approximate else None
    same_steps: dict[Solver, Tensor | None] = {}
    rows = []
    for solver in solvers:
        direct = solver.direct()
        if direct != solver and direct not in same_steps:
            same_steps[direct] = _unless_it_fails(flow.with_solver(direct), x, weights)
        reference = same_steps[direct] if direct != solver else None
        rows.append(_row(flow.with_solver(solver), x, weights, exact if solver in approximate else None, reference))
    return rows


def _row(flow: Flow, x: State, weights: Tensor, exact: Tensor | None, reference: Tensor | None) -> GradientRow:
    count, solve = Count(), partial(_backward, flow, x, weights)
    try:
        _zero_gradients(flow)
        with counted(flow.field, count):
            memory = peak_memory(partial(solve, count), x.device) / 2**20
        _zero_gradients(flow)
        seconds = seconds_of(solve, x.device)
    except SolveError as error:
        return GradientRow(str(flow.solver), None, None, 0, 0, math.nan, math.nan, str(error))
    error, step_error = (None if other is None else _distance(_gradient(flow), other) for other in (exact, reference))
    return GradientRow(str(flow.solver), error, step_error, count.forward, count.backward, memory, seconds)


def _weights(x: State) -> Tensor:
    """The c of the loss, over the size of the batch, in float64: the same numbers in every precision and on every device."""
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norms = drawn.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.dim() - 1))
    return (drawn / norms / len(x)).to(x.device)


def _backward(flow: Flow, x: State, weights: Tensor, count: "Count | None" = None) -> None:
    """Add the gradient of the loss to those of the parameters."""
    with torch.enable_grad():
        loss = (flow(x) * weights.to(x.dtype)).sum()
        if count is not None:
            count.turned = True
        loss.backward()


def _zero_gradients(flow: Flow) -> None:
    """Zeros that are there before the solve, so that its peak of memory is without them."""
    for parameter in flow.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None


def _gradient(flow: Flow) -> Tensor:
    """The gradients of all parameters as one vector, in float64."""
    return torch.cat([p.grad.flatten().double() for p in flow.parameters() if p.grad is not None])


def _unless_it_fails(flow: Flow, x: State, weights: Tensor) -> Tensor | None:
    _zero_gradients(flow)
    try:
        _backward(flow, x, weights)
    except SolveError:
        return None
    return _gradient(flow)


def _exact(flow: Flow, x: State, weights: Tensor) -> Tensor | None:
    """The gradient of the equation at the tightest tolerance that is affordable; None where the loosest is not.

    The steps are taken again on the way back: the direct gradient, without the graphs of hundreds of evaluations.
    """
    double, x = copy.deepcopy(flow).double(), x.double()
    try:
        solver = tightest(double, x).solver
    except SolveError:
        return None
    return _unless_it_fails(double.with_solver(replace(solver, gradient="checkpoint")), x, weights)


def _distance(gradient: Tensor, reference: Tensor) -> float:
    return float((gradient - reference).norm() / reference.norm())


@dataclass
class Count:
    """Evaluations of a field on the way out and, once it has `turned`, on the way back."""

    forward: int = 0
    backward: int = 0
    turned: bool = False

    def add(self, module: nn.Module, inputs: object) -> None:
        self.backward += self.turned
        self.forward += not self.turned


@contextmanager
def counted(field: Field, count: Count) -> Iterator[None]:
    """Inside the block `count` counts; schemes may pass over a whole layer, so its innermost parts are looked at."""
    hooks = [part.register_forward_pre_hook(count.add) for part in {layer.innermost() for layer in field.pieces()}]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
