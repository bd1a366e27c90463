"""Evaluating a field again in the backward pass as it was evaluated in the forward pass.

What a field computes depends on more than (t, x): on its parameters, which torch.func.functional_call may have replaced for a
while, on buffers that it moves itself, on random numbers and on autocast. Each recomputation puts all of them back.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from continuum.types import State

Result = TypeVar("Result")


class Slot(NamedTuple):
    """A place in a module that holds a tensor: the dictionary of its parameters or buffers, and the name there."""

    holder: dict[str, Any]
    name: str

    @property
    def tensor(self) -> Tensor:
        return self.holder[self.name]


def slots_of(modules: Iterable[nn.Module], buffers: bool) -> list[Slot]:
    """The places of the parameters, or of the buffers, of all parts of some modules."""
    parts = dict.fromkeys(part for module in modules for part in module.modules())
    holders = [part._buffers if buffers else part._parameters for part in parts]
    return [Slot(holder, name) for holder in holders for name, tensor in holder.items() if tensor is not None]


@contextmanager
def holding(tensors: Mapping[int, Tensor], slots: Sequence[Slot]) -> Iterator[None]:
    """Inside the block, slots[i] holds tensors[i] for each i in `tensors`; afterwards what it held before."""
    before = {i: slots[i].tensor for i in tensors}
    try:
        for i, tensor in tensors.items():
            slots[i].holder[slots[i].name] = tensor
        yield
    finally:
        for i, tensor in before.items():
            slots[i].holder[slots[i].name] = tensor


class Recomputation:
    """Parts of a solve whose inputs alone are stored: the backward pass runs them once more.

    As torch.utils.checkpoint without reentrance, by hooks on saved tensors, so that autograd sees all of it. A field may also
    differentiate inside, which would make torch's recompute at every evaluation: what a run saves is kept until it ends.

    Args:
        modules: all that the parts evaluate.

    Raises:
        RuntimeError: when a part is run, a lazy module that does not know its shapes yet; on the backward pass, a parameter
            that was modified in place since the forward pass.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self.parameters, self.buffers = slots_of(modules, buffers=False), slots_of(modules, buffers=True)
        if any(isinstance(slot.tensor, nn.UninitializedParameter) for slot in self.parameters):
            raise RuntimeError(
                "a lazy module of this field does not know its shapes yet, and gradient='checkpoint' needs its parameters "
                "before the first step: call the field once under torch.no_grad(), or take gradient='direct'"
            )
        # Batch statistics move without telling torch: whatever trains gets copies to write to.
        training = {id(part._buffers) for module in modules for part in module.modules() if part.training}
        self.in_training = [i for i, slot in enumerate(self.buffers) if id(slot.holder) in training]
        self.frame: _Frame | None = None
        self.known_to_move: Sequence[int] = ()
        self.moving: Sequence[int] = range(len(self.buffers))  # those that evaluations may write to, as far as known

    def __call__(self, run: Callable[..., Result], x: State, *others: Any) -> Result:
        """run(x, *others), whose graph keeps these alone."""
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "torch.func's transforms cannot go through gradient='checkpoint', which hooks saved tensors: take the solver "
                "with gradient='direct', for example FixedStep or an adaptive one without the option"
            )
        device, inputs = x.device, (x, *others)
        weights = [(slot.tensor, slot.tensor._version) for slot in self.parameters]
        were = [(slot.tensor, slot.tensor._version) for slot in self.buffers]
        copies = {i: were[i][0].clone() for i in self.moving}
        precision, drawn = Precision.now(device), random_state(device)
        stored = _Stored.apply(torch.empty(0, requires_grad=True), *(i for i in inputs if isinstance(i, Tensor)))
        others = tuple(_Stored if isinstance(i, Tensor) else i for i in inputs)

        def again() -> None:
            if any(tensor._version != version for tensor, version in weights):
                raise RuntimeError(
                    "a parameter has been modified by an inplace operation between the forward and the backward pass: "
                    "gradient='checkpoint' takes the steps again and would take others. Change weights after the backward pass"
                )
            swapped = {i: tensor for i, (tensor, _) in enumerate(weights) if self.parameters[i].tensor is not tensor}
            own = {i: copies.get(i, self.buffers[i].tensor).clone() for i in {*copies, *self.in_training}}
            with holding(swapped, self.parameters), holding(own, self.buffers), precision.again(), as_drawn(drawn, device):
                tensors = iter(stored.grad_fn.saved_tensors)  # pyright: ignore[reportFunctionMemberAccess]
                run(*(next(tensors) if value is _Stored else value for value in others))

        self.frame = frame = _Frame(again)
        result = frame.first(run, inputs)
        self.frame = None  # which would hold the run, and so the solve
        moved = [i for i, (b, v) in enumerate(were) if self.buffers[i].tensor is not b or b._version != v]
        # One that did not move before has no copy from before; that of batch statistics, as a rule, is not read.
        copies = {i: copies[i] if i in copies else self.buffers[i].tensor.clone() for i in moved}
        self.moving = self.known_to_move = sorted({*moved, *self.known_to_move})
        return result

    def forget(self) -> None:
        """Drop what the run in progress has saved, because no more is differentiated inside of it."""
        if self.frame is not None and self.frame.running:
            self.frame.saved.clear()


class _Stored(torch.autograd.Function):
    """Nothing, with the inputs of a run as its saved tensors, so that whoever hooks these sees them."""

    @staticmethod
    def forward(ctx: Any, nothing: Tensor, *states: Tensor) -> Tensor:
        ctx.save_for_backward(*states)
        return nothing.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> NoReturn:
        raise AssertionError("nothing uses it")


class _Frame:
    """What autograd saves in a run, in order: there while it runs, dropped when it ends, made again when it is asked for."""

    def __init__(self, again: Callable[[], None]) -> None:
        self.again = again
        self.running = True
        self.saved: dict[int, Tensor] = {}
        self.count = 0

    def first(self, run: Callable[..., Result], states: Sequence[State]) -> Result:
        with torch.autograd.graph.saved_tensors_hooks(self._keep, self._look_up):
            result = run(*states)
        self.running, self.saved = False, {}
        return result

    def _keep(self, tensor: Tensor) -> int:
        self.saved[self.count] = tensor
        self.count += 1
        return self.count - 1

    def _look_up(self, index: int) -> Tensor:
        if self.running:
            return self.saved[index]
        if index not in self.saved:
            self._make_again()
        return self.saved.pop(index)  # autograd asks once a backward pass

    def _make_again(self) -> None:
        made: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            made.append(tensor.detach())
            if len(made) == self.count:
                raise _DoneError
            return tensor.detach()

        with suppress(_DoneError), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.again()
        if len(made) != self.count:
            raise RuntimeError(
                f"the steps were taken again on the way back and saved {len(made)} tensors, not {self.count}: the field "
                "computes something else the second time, and gradient='checkpoint' cannot know what. Take gradient='direct'"
            )
        self.saved = dict(enumerate(made))


class _DoneError(Exception):
    """All that was saved has been made again."""


RandomState = tuple[Tensor, ...]
"""The states of the CPU's generator and, on a GPU, of the device's."""


def random_state(device: torch.device) -> RandomState:
    cpu = torch.get_rng_state()
    return (cpu, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (cpu,)


def unless_unused(before: RandomState, device: torch.device) -> RandomState | None:
    """`before`, if random numbers have been drawn since."""
    drew = any(not torch.equal(a, b) for a, b in zip(before, random_state(device), strict=True))
    return before if drew else None


@contextmanager
def refusing_draws(device: torch.device, solver: object) -> Iterator[None]:
    """Raise TypeError if random numbers are drawn inside the block, for solvers that estimate errors."""
    before = random_state(device)
    yield
    if unless_unused(before, device) is not None:
        raise TypeError(
            f"this field draws random numbers at every evaluation, and {solver} would take its noise for an error of the step: "
            "switch off its dropout, put the network in eval() mode, or take fixed steps (FixedStep)"
        )


@contextmanager
def as_drawn(state: RandomState | None, device: torch.device) -> Iterator[None]:
    """Random numbers from `state` on, and afterwards as if none had been drawn; None where none will be."""
    if state is None:
        yield
        return
    cpu, *gpu = state
    with torch.random.fork_rng(devices=[device] if gpu else []):
        torch.set_rng_state(cpu)
        for own in gpu:
            torch.cuda.set_rng_state(own, device)
        yield


@dataclass(frozen=True)
class Precision:
    """What autocast does with a field on a device."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @staticmethod
    def now(device: torch.device) -> "Precision":
        kind = device.type
        return Precision(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def again(self) -> AbstractContextManager[Any]:
        """Without autocast's cache: a weight that was cast without gradient must not be met with one, nor the reverse.

        Nothing changes where autocast is off, then and now: a compiled function would not know itself without the cache.
        """
        if not (self.enabled or torch.is_autocast_enabled(self.device)):
            return nullcontext()
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


class Gradients(dict[Tensor, Tensor]):
    """Sums of gradients, by parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.own: set[Tensor] = set()

    def add(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter in self.own:
                self[parameter].add_(gradient)
            elif parameter in self:  # a first gradient may be one of somebody else's tensors
                self[parameter] = self[parameter] + gradient
                self.own.add(parameter)
            else:
                self[parameter] = gradient


def aliases_of(slots: Sequence[Slot]) -> dict[int, Tensor]:
    """A leaf of its own for each parameter that requires a gradient, one for all slots that share it.

    A gradient that a backward pass computes inside itself is taken with respect to these: with respect to the parameters, it
    would run their hooks once there and once more where autograd hands the gradient on.
    """
    made: dict[Tensor, Tensor] = {}
    for slot in slots:
        if slot.tensor.requires_grad and slot.tensor not in made:
            made[slot.tensor] = slot.tensor.detach().requires_grad_()
    return {i: made[slot.tensor] for i, slot in enumerate(slots) if slot.tensor in made}
