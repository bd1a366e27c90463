"""All steps: a solver carries x through the given depths, (field, x, times) -> states."""

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from continuum.fields import Field
from continuum.noise.base import stochastic_fields
from continuum.solvers.compiled import compile_field
from continuum.types import REPLACING, State


@dataclass(frozen=True)
class Cost:
    """What a solve took: field evaluations, accepted and rejected steps, and the grid of the accepted ones.

    `error_ratios` are the errors of the accepted steps as parts of what the tolerance allows, where the solver knows them.
    """

    evaluations: int
    accepted: int
    rejected: int
    grid: tuple[float, ...]
    error_ratios: tuple[float, ...] = ()


@dataclass(frozen=True)
class Solution:
    """The states at the requested times (the first is the initial one) and what they cost."""

    states: list[State]
    cost: Cost


Step: TypeAlias = tuple[float, float]
"""A step as (t, h)."""


class Solver(ABC):
    """Repeats steps from the first of `times` to the last and decides how gradients come back."""

    @abstractmethod
    def __call__(
        self, field: Field, x: State, times: Sequence[float], previous: State | None = None, exact: bool = False
    ) -> Solution:
        """Solve dx/dt = field(t, x) from x at times[0]; `times` are strictly monotone, in either direction.

        `previous` is the state one layer before x, for multistep schemes; other solvers have no use for it. The state at the
        last time is the end of a step; those at times in between may be read off the steps, unless `exact` is asked for.
        """

    def depths(self, times: Tensor) -> list[float]:
        """The depths that `times` stand for, shape (n,)."""
        return times.tolist()

    def check(self, field: Field) -> None:
        """Raise TypeError if this solver cannot solve `field`."""

    @property
    def one_graph(self) -> bool:
        """Whether torch.compile can follow all steps; where it cannot, `compile` says what it is given."""
        return False

    def compile(self, field: Field) -> None:
        """Compile the parts of a solve of `field`, in place: its evaluations, unless more of it is one function."""
        compile_field(field)

    @property
    def remembers(self) -> bool:
        """Whether a state before the first changes what it does."""
        return False

    @property
    def adaptive(self) -> bool:
        """Whether the size of an error chooses the steps: they may end at any depth, and a solve may fail."""
        return False

    @property
    def forward_only(self) -> bool:
        """Whether its solutions have no gradient."""
        return False

    def steps(self, start: float, stop: float) -> list[Step] | None:
        """The steps (t, h) from `start` to `stop`, h negative on the way back; None where they are not known beforehand.

        Raises:
            ValueError: the steps cannot end at `stop`.
        """
        return None

    def without_noise(self) -> "Solver":
        """The solver that this one is where the field has no noise."""
        return self

    def direct(self) -> "Solver":
        """The solver of the same steps whose gradient is theirs, by autograd through all of them."""
        return self

    def alone(self) -> "Solver":
        """The solver whose steps this rank chooses by itself."""
        return self

    def refined(self, k: int) -> "Solver":
        """The solver with k steps in the place of one; itself where an error chooses the steps.

        Raises:
            ValueError: there are no such steps.
        """
        return self

    def over(self, grid: tuple[float, ...]) -> "Solver":
        """The solver with the same fixed steps, but over the depths of `grid`.

        Raises:
            TypeError: the steps are not fixed.
            ValueError: the method needs equal steps.
        """
        raise TypeError(f"{self} chooses its steps itself: only fixed ones can be laid over a grid")

    def frozen(self, grid: tuple[float, ...]) -> "Solver":
        """The solver of the same method with fixed steps over `grid`, which an adaptive solve has accepted.

        Raises:
            TypeError: the steps are fixed already, or the method has no steps of its own.
        """
        raise TypeError(f"only an adaptive flow can be frozen; this one is solved by {self}")


def option_text(value: object) -> str:
    """A value in the grammar of `parse`: numbers as short as they are exact, a grid with slashes between its depths."""
    if isinstance(value, tuple):
        return "/".join(repr(depth) for depth in value)
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


class SolveError(RuntimeError):
    """A solve that cannot go on: a state that is not finite, a step that underflows, a spent budget.

    Weights and BatchNorm buffers are those from before the solve. The message is made from the attributes: `reason`,
    `flow` (its name in the network), `batch` (epoch and batch of a training, both from 0 on), `depth` and `step` where it
    stopped, `evaluations` spent, `rows` of the batch at fault, the sizes of the last `steps` that an adaptive solver tried,
    and `advice`.
    """

    def __init__(
        self,
        reason: str,
        *,
        depth: float,
        step: float,
        evaluations: int,
        rows: Sequence[int] = (),
        steps: Sequence[float] = (),
        advice: str,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.flow: str | None = None
        self.batch: tuple[int, int] | None = None
        self.depth = depth
        self.step = step
        self.evaluations = evaluations
        self.rows = tuple(rows)
        self.steps = tuple(steps)
        self.advice = advice

    def __str__(self) -> str:
        where = f"in flow {self.flow} " if self.flow else ""
        when = f" in batch {self.batch[1]} of epoch {self.batch[0]}" if self.batch else ""
        rows = ", ".join(map(str, self.rows[:8])) + (", ..." if len(self.rows) > 8 else "")
        at_fault = f"; batch rows at fault: {rows}" if self.rows else ""
        tried = f"; last steps tried: {', '.join(f'{step:.2g}' for step in self.steps)}" if self.steps else ""
        return (
            f"{self.reason} {where}at depth {self.depth:.6g} with step {self.step:.3g} after {self.evaluations} "
            f"evaluations{when}{at_fault}{tried}. {self.advice}"
        )


CHECK_INPUTS = "Check these inputs and the weights, or lower the learning rate"
LOOSER = "Try a looser tolerance, a smoother activation, or a fixed-step solver"


def advice(rows: Sequence[int], tried: Sequence[float], accepted: int) -> str:
    """What may help a solve that cannot go on, by the steps it tried."""
    if rows:
        return CHECK_INPUTS
    last = tried[-20:]
    if len(last) == 20 and max(last) > 100 * min(last):
        return (
            "The steps change by orders of magnitude, as where a field has kinks or jumps: try a smoother activation (tanh, "
            "softplus), a looser tolerance, or a method of low order such as bosh3; name the field's knots if it jumps"
        )
    if len(last) == 20 and max(last) < 4 * min(last) and accepted < 0.95 * len(tried):
        return (
            "The steps stay near one size and some are rejected all along, as where stability limits them (a stiff field), not "
            "accuracy: try a method of low order such as bosh3, a looser tolerance, smaller weights, or a fixed-step solver"
        )
    return f"{LOOSER}; at tight tolerances a method of high order such as dopri8 takes the fewest steps"


def refuse_noise(field: Field, solver: Solver) -> None:
    """Raise TypeError if `field` is stochastic, for a solver that integrates deterministic fields."""
    for noisy in stochastic_fields(field):
        raise TypeError(
            f"{solver} is deterministic and this field has noise, {type(noisy).__name__}: take its drift alone, "
            "flow.drift() or network.drift(), or a stochastic solver: euler_maruyama, milstein, brownian:method=euler"
        )


def rows_not_finite(*tensors: Tensor) -> list[int]:
    """The batch rows in which any of the tensors has a NaN or an infinity."""
    bad: set[int] = set()
    for tensor in tensors:
        rows = tensor.detach().reshape(tensor.shape[0] if tensor.dim() else 1, -1) if tensor.numel() else tensor.new_ones(1, 1)
        finite = torch.isfinite(rows).all(dim=1)
        bad.update(torch.nonzero(~finite).flatten().tolist())
    return sorted(bad)


def needs_grad(field: Field, x: State) -> bool:
    """Whether a solve of `field` from `x` will be differentiated."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in field.parameters()))


def unmoved(field: Field, x: State, times: Sequence[float]) -> Solution:
    """The solution of an empty batch, which has no error to control."""
    if needs_grad(field, x):  # gradients of zero, because DistributedDataParallel would wait for them
        x = x + 0 * sum(p.sum() for p in field.parameters() if p.requires_grad)
    return Solution([x] * len(times), Cost(0, 0, 0, tuple(times)))


def check_closed(edge: GradientEdge | None, known: Iterable[Tensor], solver: str) -> None:
    """Raise TypeError if the graph from `edge` on leads to anything that requires a gradient but the `known` tensors.

    A gradient that a solve computes inside its own backward pass would be lost there, in silence.
    """
    if edge is None:
        return
    seen: set[Any] = {get_gradient_edge(tensor).node for tensor in known if tensor.requires_grad}
    ahead = [edge.node]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            raise TypeError(
                f"this field uses a tensor of shape {tuple(leaf.shape)} that requires a gradient and is neither its "
                f"state nor one of its parameters, and {solver} would lose that gradient: pass it as context, flow(x, "
                "context=(tensor,)), make it a parameter or a component of the state, detach it, or let autograd see all "
                "steps: gradient='direct' or 'checkpoint'"
            )
        ahead += [following for following, _ in node.next_functions]


def refuse_create_graph(solver: str) -> None:
    """Raise RuntimeError in a backward pass that is to be differentiated again."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{solver} computes its gradient by hand and can be differentiated once only (create_graph=True was asked for): to "
            "differentiate twice, take gradient='direct'"
        )


def cut_at_knots(knots: Sequence[float], start: float, stop: float) -> list[float]:
    """The way from start to stop, cut at the knots strictly between them."""
    between = list(knots[bisect_right(knots, min(start, stop)) : bisect_left(knots, max(start, stop))])
    return [start, *(between if start < stop else between[::-1]), stop]


@contextmanager
def restored_on_error(module: nn.Module) -> Iterator[None]:
    """Give the buffers of `module` (BatchNorm statistics) back their values if a solve fails inside the block."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()] if module.training else []
    try:
        yield
    except SolveError:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
        raise


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put `module` into evaluation mode, and give every part of it back the mode it had, which train() would not."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def statistics_untouched(module: nn.Module) -> Iterator[None]:
    """Let `module` compute with batch statistics while its running ones stay as they are, for recomputations.

    The buffers are replaced by copies for the time of the block, so that nothing saved for a backward pass is written to.
    One thread does so at a time, and each puts back what it found.
    """
    with REPLACING:
        yield from _with_copies(module)


def _with_copies(module: nn.Module) -> Iterator[None]:
    owners = [(child, name, buffer) for child in module.modules() for name, buffer in child.named_buffers(recurse=False)]
    for child, name, buffer in owners:
        setattr(child, name, buffer.clone())
    try:
        yield
    finally:
        for child, name, buffer in owners:
            setattr(child, name, buffer)
