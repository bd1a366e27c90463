"""Gradients without stored states: on the way back a reversible scheme rebuilds x_n = undo(x_{n+1}), step by step.

At each step the field is evaluated once more, with batch statistics, random masks and precision as in the forward pass. All
steps are one autograd function, which returns the gradients of the parameters itself (DistributedDataParallel would not
accept a backward pass within the backward pass).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from continuum.fields import Field
from continuum.schemes import Memory, ReversibleScheme
from continuum.solvers.base import check_closed, refuse_create_graph, statistics_untouched
from continuum.solvers.recompute import (
    Gradients,
    Precision,
    RandomState,
    aliases_of,
    as_drawn,
    holding,
    random_state,
    slots_of,
    unless_unused,
)
from continuum.types import BatchNorm, State

Step = tuple[float, float]


def solve_reversibly(
    scheme: ReversibleScheme, field: Field, x: State, memory: Memory, steps: Sequence[Step]
) -> tuple[State, Memory]:
    """The state and memory after `steps`, with a gradient that stores only these two, whatever the number of steps."""
    run = _Run(scheme, field, steps, has_memory=bool(memory))
    x, *memory_after = _Reversible.apply(run, x, *memory, *run.parameters)  # pyright: ignore[reportGeneralTypeIssues]
    return x, tuple(memory_after)


class _Run:
    """One solve: what the forward pass leaves for the backward pass, beside the end state."""

    def __init__(self, scheme: ReversibleScheme, field: Field, steps: Sequence[Step], has_memory: bool) -> None:
        self.scheme, self.field, self.steps, self.has_memory = scheme, field, steps, has_memory
        self.slots = slots_of([field], buffers=False)
        self.aliases = aliases_of(self.slots)
        self.parameters = tuple(dict.fromkeys(self.slots[i].tensor for i in self.aliases))
        # For each evaluation, in order, the state of the random numbers before it, if it drew any.
        self.random: list[RandomState | None] = []
        self.precision: Precision | None = None

    def forward(self, x: State, memory: Memory) -> tuple[State, Memory]:
        device = x.device
        self.precision = Precision.now(device)
        buffers = [
            (b, b._version)
            for m in self.field.modules()
            if not isinstance(m, BatchNorm)
            for b in m._buffers.values()
            if b is not None
        ]

        def evaluate(part: Field, t: float, x: State) -> State:
            before = random_state(device)
            slope = part(t, x)
            self.random.append(unless_unused(before, device))
            return slope

        for t, h in self.steps:
            x, memory = self.scheme.forth(evaluate, self.field, t, x, h, memory)
        if any(buffer._version != version for buffer, version in buffers):
            raise TypeError(
                "this field moves buffers that its values may depend on, as spectral_norm does in training mode, and "
                "gradient='reversible' would evaluate it again with later ones: take gradient='direct' or 'checkpoint'"
            )
        return x, memory

    def backward(self, x: State, memory: Memory, grads: list[Tensor]) -> tuple[list[Tensor], Gradients]:
        """The gradients of the first state and memory, and of the parameters, from those of the last state and memory."""
        total, random = Gradients(), list(self.random)
        assert self.precision is not None, "forward comes first"
        with self.precision.again(), holding(self.aliases, self.slots):
            for index in reversed(range(len(self.steps))):
                first = index == 0 and not self.has_memory
                x, memory, grads = self._step_back(index, x, memory, grads, first, random, total)
        return grads, total

    def of_parameters(self, total: Gradients) -> list[Tensor | None]:
        """The gradients of `parameters`, from those of their aliases."""
        return [total.get(alias) for alias in dict.fromkeys(self.aliases.values())]

    def _step_back(
        self,
        index: int,
        x: State,
        memory: Memory,
        grads: list[Tensor],
        first: bool,
        random: list[RandomState | None],
        total: Gradients,
    ) -> tuple[State, Memory, list[Tensor]]:
        t, h = self.steps[index]
        scheme, made = self.scheme, []

        def again(part: Field, t: float, y: State) -> State:
            y = y.detach().requires_grad_()
            drawn = random.pop()
            with torch.enable_grad(), statistics_untouched(part), as_drawn(drawn, y.device):
                slope = part(t, y)
            aliases = tuple(p for p in part.parameters() if p.requires_grad)
            check_closed(get_gradient_edge(slope) if slope.requires_grad else None, (y, *aliases), "gradient='reversible'")
            made.append(_Evaluation(y, slope, aliases))
            return slope.detach()

        def known(part: Field, t: float, y: State) -> State:
            return _Known.apply(y, made.pop(), total)  # pyright: ignore[reportReturnType]

        with torch.no_grad():
            x, memory = scheme.back(again, self.field, t, x, h, memory, first)
        leaves = [tensor.detach().requires_grad_() for tensor in (x, *memory)]
        coefficients = [k for k in scheme.coefficients(self.field, t) if isinstance(k, Tensor) and k.requires_grad]
        with torch.enable_grad():
            after, memory_after = scheme.forth(known, self.field, t, leaves[0], h, tuple(leaves[1:]))
        outputs = [(out, grad) for out, grad in zip((after, *memory_after), grads, strict=True) if out.requires_grad]
        found = torch.autograd.grad(
            [out for out, _ in outputs], [*leaves, *coefficients], [grad for _, grad in outputs], allow_unused=True
        )
        total.add(coefficients, found[len(leaves) :])
        grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=False)]
        return leaves[0].detach(), tuple(leaf.detach() for leaf in leaves[1:]), grads


@dataclass(frozen=True)
class _Evaluation:
    """A value of a field with the graph behind it."""

    x: State
    slope: State
    parameters: tuple[Tensor, ...]


class _Reversible(torch.autograd.Function):
    """All steps of a solve: (x, *memory, *parameters) -> (x, *memory) after them."""

    @staticmethod
    def forward(ctx: Any, run: _Run, x: State, *others: Tensor) -> tuple[State, ...]:
        memory = others[: len(others) - len(run.parameters)]
        x, memory = run.forward(x, memory)
        ctx.run = run
        # The parameters too, so that autograd notices when they are changed before the backward pass.
        ctx.save_for_backward(x, *memory, *run.parameters)
        return x, *memory

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        refuse_create_graph("gradient='reversible'")
        x, *memory = ctx.saved_tensors[: len(grads)]
        before, found = run.backward(x, tuple(memory), list(grads))
        return None, *before, *run.of_parameters(found)


class _Known(torch.autograd.Function):
    """A field's value that is known already, as a function of the state: its gradient goes through the graph kept with it."""

    @staticmethod
    def forward(ctx: Any, x: State, evaluation: _Evaluation, total: Gradients) -> State:
        ctx.evaluation, ctx.total = evaluation, total
        return evaluation.slope.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        evaluation: _Evaluation = ctx.evaluation
        if not evaluation.slope.requires_grad:
            return None, None, None
        through, *found = torch.autograd.grad(evaluation.slope, (evaluation.x, *evaluation.parameters), grad, allow_unused=True)
        ctx.total.add(evaluation.parameters, found)
        return through, None, None
