"""Gradients without stored states: on the way back a reversible scheme rebuilds x_n = undo(x_{n+1}), step by step.

At each step the field is evaluated once more, with batch statistics, random masks and precision as in the forward pass. All
steps are one autograd function, which returns the gradients of the parameters itself (DistributedDataParallel would not
accept a backward pass within the backward pass).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from continuum.fields import Field
from continuum.schemes import Memory, ReversibleScheme
from continuum.solvers.base import statistics_untouched
from continuum.types import State

Step = tuple[float, float]


def solve_reversibly(
    scheme: ReversibleScheme, field: Field, x: State, memory: Memory, steps: Sequence[Step]
) -> tuple[State, Memory]:
    """The state and memory after `steps`, with a gradient that stores only these two, whatever the number of steps."""
    parameters = tuple(p for p in field.parameters() if p.requires_grad)
    run = _Run(scheme, field, steps, has_memory=bool(memory), parameters=parameters)
    x, *memory_after = _Reversible.apply(run, x, *memory, *parameters)  # pyright: ignore[reportGeneralTypeIssues]
    return x, tuple(memory_after)


@dataclass
class _Run:
    """One solve: what the forward pass leaves for the backward pass, beside the end state."""

    scheme: ReversibleScheme
    field: Field
    steps: Sequence[Step]
    has_memory: bool
    parameters: tuple[nn.Parameter, ...]
    # For each evaluation, in order, the state of the random numbers before it, if it drew any.
    random: list["RandomState | None"] = dataclasses.field(default_factory=list)
    autocast: tuple[str, bool, torch.dtype] = ("cpu", False, torch.float32)

    def forward(self, x: State, memory: Memory) -> tuple[State, Memory]:
        device = x.device
        self.autocast = device.type, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)

        def evaluate(part: Field, t: float, x: State) -> State:
            before = _random_state(device)
            slope = part(t, x)
            drew = any(not torch.equal(a, b) for a, b in zip(before, _random_state(device), strict=True))
            self.random.append(before if drew else None)
            return slope

        for t, h in self.steps:
            x, memory = self.scheme.forth(evaluate, self.field, t, x, h, memory)
        return x, memory

    def backward(self, x: State, memory: Memory, grads: list[Tensor]) -> tuple[list[Tensor], "_Gradients"]:
        """The gradients of the first state and memory, and of the parameters, from those of the last state and memory."""
        total, random = _Gradients(), list(self.random)
        device, enabled, dtype = self.autocast
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            for index in reversed(range(len(self.steps))):
                first = index == 0 and not self.has_memory
                x, memory, grads = self._step_back(index, x, memory, grads, first, random, total)
        return grads, total

    def _step_back(
        self,
        index: int,
        x: State,
        memory: Memory,
        grads: list[Tensor],
        first: bool,
        random: list["RandomState | None"],
        total: "_Gradients",
    ) -> tuple[State, Memory, list[Tensor]]:
        t, h = self.steps[index]
        scheme, made = self.scheme, []

        def again(part: Field, t: float, y: State) -> State:
            y = y.detach().requires_grad_()
            drawn = random.pop()
            with torch.enable_grad(), statistics_untouched(part), _as_drawn(drawn, y.device) if drawn else nullcontext():
                slope = part(t, y)
            made.append(_Evaluation(y, slope, tuple(p for p in part.parameters() if p.requires_grad)))
            return slope.detach()

        def known(part: Field, t: float, y: State) -> State:
            return _Known.apply(y, made.pop(), total)  # pyright: ignore[reportReturnType]

        with torch.no_grad():
            x, memory = scheme.back(again, self.field, t, x, h, memory, first)
        leaves = [tensor.detach().requires_grad_() for tensor in (x, *memory)]
        coefficients = [p for p in scheme.coefficients(self.field, t) if p.requires_grad]
        with torch.enable_grad():
            after, memory_after = scheme.forth(known, self.field, t, leaves[0], h, tuple(leaves[1:]))
        outputs = [(out, grad) for out, grad in zip((after, *memory_after), grads, strict=True) if out.requires_grad]
        found = torch.autograd.grad(
            [out for out, _ in outputs], [*leaves, *coefficients], [grad for _, grad in outputs], allow_unused=True
        )
        total.add(coefficients, found[len(leaves) :])
        grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=False)]
        return leaves[0].detach(), tuple(leaf.detach() for leaf in leaves[1:]), grads


class _Gradients(dict[Tensor, Tensor]):
    """Sums of gradients, by parameter."""

    def add(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                self[parameter] = self[parameter] + gradient if parameter in self else gradient


@dataclass(frozen=True)
class _Evaluation:
    """A value of a field with the graph behind it."""

    x: State
    slope: State
    parameters: tuple[nn.Parameter, ...]


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
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        x, *memory = ctx.saved_tensors[: len(grads)]
        before, found = run.backward(x, tuple(memory), list(grads))
        return None, *before, *(found.get(parameter) for parameter in run.parameters)


class _Known(torch.autograd.Function):
    """A field's value that is known already, as a function of the state: its gradient goes through the graph kept with it."""

    @staticmethod
    def forward(ctx: Any, x: State, evaluation: _Evaluation, total: _Gradients) -> State:
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


RandomState = tuple[Tensor, ...]
"""The states of the CPU's generator and, on a GPU, of the device's."""


def _random_state(device: torch.device) -> RandomState:
    cpu = torch.get_rng_state()
    return (cpu, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (cpu,)


@contextmanager
def _as_drawn(state: RandomState, device: torch.device) -> Iterator[None]:
    """Random numbers from `state` on, and afterwards as if none had been drawn."""
    cpu, *gpu = state
    with torch.random.fork_rng(devices=[device] if gpu else []):
        torch.set_rng_state(cpu)
        for own in gpu:
            torch.cuda.set_rng_state(own, device)
        yield
