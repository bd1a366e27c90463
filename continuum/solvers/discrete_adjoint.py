"""The exact gradient of adaptive steps: for x+ = x + h sum_i b_i k_i, k_i = f(X_i), X_i = x + h sum_j a_ij k_j,

    k~_i = h (b_i x~+ + sum_{j > i} a_ji X~_j),    X~_i = f'(X_i)^T k~_i,    x~ = x~+ + sum_i X~_i

from the last stage to the first, where v~ is the gradient of the loss with respect to v. Step sizes are constants. The last
slope of a step is the first of the next one, so k~_1 is handed on. All steps are one autograd function.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph as keeps_graph

from continuum.solvers.base import needs_grad, statistics_untouched
from continuum.solvers.replay import Gradients, Precision, as_drawn, with_parameters
from continuum.solvers.stepping import Evaluation, Repeat, Step, Stepper, attempt, evaluated
from continuum.types import State, Time

ONCE = (
    "{solver} computes its gradient by hand and can be differentiated once only (create_graph=True was asked for): to "
    "differentiate twice, take fixed steps with gradient='direct', or Adaptive(..., engine='torchdiffeq')"
)


def solve(stepper: Stepper, x: State) -> list[State]:
    """The states at the stepper's times behind the first."""
    if not needs_grad(stepper.field, x):
        with torch.no_grad():
            return stepper.run(x)
    backward = _Backward(stepper, x)
    return list(_Solve.apply(backward, x, *backward.parameters))  # pyright: ignore[reportGeneralTypeIssues]


class _Solve(torch.autograd.Function):
    """All steps of a solve: (x, *parameters) -> the states at the requested times."""

    @staticmethod
    def forward(ctx: Any, backward: "_Backward", x: State, *parameters: Tensor) -> tuple[State, ...]:
        ctx.backward_pass = backward
        # So that autograd notices when parameters are changed before the backward pass.
        ctx.save_for_backward(*parameters)
        return tuple(backward.stepper.run(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        run: _Backward = ctx.backward_pass
        if torch.is_grad_enabled():
            raise RuntimeError(ONCE.format(solver=run.stepper.solver))
        assert len(ctx.saved_tensors) == len(run.parameters)  # asking for them checks their versions
        before, found = run(grads)
        return None, before, *(found.get(parameter) for parameter in run.parameters)


class _Backward:
    """The way back through the steps of a solve."""

    def __init__(self, stepper: Stepper, x: State) -> None:
        self.stepper = stepper
        self.parameters = tuple(p for p in stepper.field.parameters() if p.requires_grad)
        self.named_parameters = dict(stepper.field.named_parameters())
        self.precision = Precision.now(x.device)

    def __call__(self, grads: Sequence[Tensor]) -> tuple[Tensor, Gradients]:
        """The gradients of the first state and of the parameters, from those of the requested states."""
        keep, total = keeps_graph(), Gradients()
        steps = reversed(self.stepper.steps) if keep else _emptied(self.stepper.steps)
        end = grads[-1]
        for step in steps:
            if step.output is not None and step.output < len(grads) - 1:
                end = end + grads[step.output]
            evaluations = self._repeat(step, step.start) if isinstance(step.start, Repeat) else list(step.evaluations)
            step.evaluations = step.evaluations if keep else []
            end, slope = self._stages_back(step.h, evaluations, end, keep, total)
            if slope is not None:
                end = _added(end, self._through(self._at_start(step.start), slope, keep, total))
        return end, total

    def _stages_back(
        self, h: float, evaluations: list[Evaluation], end: Tensor, keep: bool, total: Gradients
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of the state before a step, without the part through the slope there, and of that slope.

        Evaluations are taken off the list, so that their memory is free again.
        """
        pair, combine = self.stepper.pair, self.stepper.sums.combine
        stages = len(pair.b) - 1  # those that the new state is made of
        through: list[Tensor | None] = [None] * stages
        slope = None
        for i in reversed(range(stages)):
            terms = [(pair.b[i], end), *((pair.a[j][i], through[j]) for j in range(i + 1, stages))]
            terms = [(weight, grad) for weight, grad in terms if weight and grad is not None]
            slope = combine(None, h, *zip(*terms, strict=True)) if terms else None
            if i and (evaluation := evaluations.pop()) and slope is not None:
                through[i] = self._through(evaluation, slope, keep, total)
        return combine(end, 1.0, [1.0] * stages, through), slope

    def _through(self, evaluation: Evaluation, grad: Tensor, keep: bool, total: Gradients) -> Tensor | None:
        """The gradient of the state that the field was evaluated at; those of the parameters are added to `total`."""
        if evaluation.edge is None:
            return None
        inputs = (evaluation.x, *self.parameters)
        through, *found = torch.autograd.grad((evaluation.edge,), inputs, (grad,), retain_graph=keep, allow_unused=True)
        total.add(self.parameters, found)
        return through

    def _repeat(self, step: Step, start: Repeat) -> list[Evaluation]:
        """The evaluations of a step behind the one at its start, once more."""
        assert step.slope is not None
        made: list[Evaluation] = []
        random = iter(step.random)

        def evaluate(t: float, x: State) -> State:
            with as_drawn(next(random), x.device):
                evaluation, slope = evaluated(field, t, x)
            made.append(evaluation)
            return slope

        with self._as_before(start) as field:
            attempt(self.stepper.pair, evaluate, self.stepper.sums, start.x, step.slope, step.h, step.depths)
        return made

    def _at_start(self, start: Evaluation | Repeat) -> Evaluation:
        if isinstance(start, Evaluation):
            return start
        with self._as_before(start) as field, as_drawn(start.random, start.x.device):
            return evaluated(field, start.depth, start.x)[0]

    @contextmanager
    def _as_before(self, start: Repeat) -> Iterator[Callable[[Time, State], State]]:
        if start.x._version != start.version:
            raise RuntimeError(
                f"the state at depth {start.depth:g} was changed in place after the solve, and its gradient needs it as it "
                "was: clone a state before you write to it"
            )
        with self.precision.again(), statistics_untouched(self.stepper.field):
            yield with_parameters(self.stepper.field, self.named_parameters)


def _emptied(steps: list[Step]) -> Iterator[Step]:
    """The steps from the last to the first, each forgotten when the next is asked for."""
    while steps:
        yield steps.pop()


def _added(total: Tensor, part: Tensor | None) -> Tensor:
    return total if part is None else total + part
