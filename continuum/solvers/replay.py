"""Evaluating a field again as it was evaluated before: the same random numbers, precision and batch statistics.

Also the sums of the parameters' gradients, which a solve returns from one autograd function: DistributedDataParallel would
not accept a backward pass within the backward pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from continuum.fields import Field
from continuum.types import State, Time

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


def with_parameters(field: Field, parameters: Mapping[str, Tensor]) -> Callable[[Time, State], State]:
    """The field with the parameters that it had: others than now if they were put in their place for the forward pass alone,
    as torch.func.functional_call does.
    """
    now = dict(field.named_parameters())
    if all(now.get(name) is parameter for name, parameter in parameters.items()):
        return field
    return lambda t, x: functional_call(field, dict(parameters), (t, x))


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

    def again(self) -> torch.autocast:
        """Without autocast's cache: a weight that was cast without gradient must not be met with one, nor the reverse."""
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
