"""The sums of a Runge-Kutta step, x + h sum_i w_i k_i and h sum_i e_i k_i / (atol + rtol max(|x|, |x+|)).

A term is one pass over memory that is already there. A sum is linear, so autograd saves nothing for it: the backward pass
hands the gradient to x, and h w_i times it to each slope. Where the field is compiled, a sum is one fused kernel on a GPU. On
a CPU both wait for the memory, and the call of a compiled function costs more than the passes that it saves.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from continuum.fields import Field
from continuum.solvers.packed import Packed
from continuum.types import State


class Sums:
    """The sums x + h sum_i w_ji k_i of a step, one for each row j of weights.

    A term is added as soon as its slope is known. The backward pass goes the other way: it makes the gradient of a slope when
    it is needed, and does not hold those of all slopes at once. `slopes` holds those from number `kept` on.
    """

    def __init__(self, x: State, h: float, rows: Sequence[Sequence[float]], kept: int = 0) -> None:
        self.x, self.h, self.rows, self.kept = x, h, rows, kept
        self.totals = [x] * len(rows)
        self.slopes: list[State] = []
        self.count = 0
        # Under torch.func's transforms one tensor may be batched and another not.
        self.in_place = not torch._C._are_functorch_transforms_active()

    def add(self, slope: State) -> None:
        """The next slope, k_i."""
        i, self.count = self.count, self.count + 1
        if i >= self.kept:
            self.slopes.append(slope)
        totals, x, h = self.totals, self.x, self.h
        for j, row in enumerate(self.rows):
            if i < len(row) and row[i]:
                total = totals[j]
                add = total.add_ if self.in_place and total is not x else total.add
                totals[j] = add(slope, alpha=h * row[i])

    def total(self, j: int) -> State:
        """The sum of row j, whose slopes have all been added."""
        return self.totals[j]


def combined(x: State, h: float, weights: Sequence[float], slopes: Sequence[State]) -> State:
    """x + h sum_i w_i k_i; a weight of zero costs nothing."""
    sums = Sums(x, h, [weights])
    for slope in slopes:
        sums.add(slope)
    return sums.total(0)


def scaled_error(
    h: float, weights: Sequence[float], slopes: Sequence[State], x: State, end: State, rtol: float, atol: float
) -> State:
    """The error of a step in units of what the tolerances allow, without gradient."""
    (first, *others) = [(h * w, k) for w, k in zip(weights, slopes, strict=False) if w]
    error = first[1] * first[0]
    if torch._C._are_functorch_transforms_active():  # where one tensor may be batched and another not
        return sum((w * k for w, k in others), start=error) / (rtol * torch.maximum(x.abs(), end.abs()) + atol)
    for weight, slope in others:
        error.add_(slope, alpha=weight)
    allowed = torch.maximum(x.abs(), end.abs()).mul_(rtol).add_(atol)
    return error.div_(allowed)


def _fused_total(x: Tensor, weights: Sequence[Tensor], slopes: Sequence[Tensor]) -> Tensor:
    total = x
    for w, slope in zip(weights, slopes, strict=True):
        total = total + w * slope
    return total


@lru_cache
def _fused() -> Callable[..., Tensor]:
    return torch.compile(_fused_total, dynamic=True)


class FusedSums(Sums):
    """The same sums, each by one kernel when it is asked for."""

    def add(self, slope: State) -> None:
        self.slopes.append(slope)

    def total(self, j: int) -> State:
        terms = [(self.h * w, k) for w, k in zip(self.rows[j], self.slopes, strict=False) if w]
        if not terms:
            return self.x
        weights, slopes = zip(*terms, strict=True)
        return _Fused.apply(weights, self.x, *slopes)  # pyright: ignore[reportReturnType]


class _Fused(torch.autograd.Function):
    """x + sum_i w_i k_i as one node of the graph, which saves nothing."""

    @staticmethod
    def forward(ctx: Any, weights: Sequence[float], x: State, *slopes: State) -> State:
        """Short sums are filled up with zeros, so that few kernels serve all steps."""
        ctx.weights = weights
        filled = [*weights, *[0.0] * (-len(weights) % FILL)]
        terms = [*slopes, *[slopes[0]] * (len(filled) - len(slopes))]
        # Numbers as tensors without axes are arguments of the kernel, not constants of it; the same tensor twice would be
        # another.
        numbers = torch.tensor(filled, dtype=torch.float64).unbind()
        return _fused()(x.detach(), numbers, [k.detach() for k in terms])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        return None, grad, *(grad * w if needed else None for w, needed in zip(ctx.weights, wanted, strict=True))


FILL = 7
"""Sums are filled up to a multiple of so many terms: those of dopri5."""


def sums_for(field: Field, device: torch.device) -> type[Sums]:
    """Fused sums where the field was compiled in place, but not on a CPU."""
    compiled = device.type != "cpu" and any(part._compiled_call_impl is not None for part in _parts(field))
    return FusedSums if compiled and not torch._C._are_functorch_transforms_active() else Sums


def compile_field(field: Field) -> None:
    """Compile `field` in place: piece by piece if it jumps, since the depth, a number, would be a constant of the graph."""
    for part in _parts(field):
        if part._compiled_call_impl is None:
            part.compile()


def _parts(field: Field) -> Sequence[Field]:
    return (field.field if isinstance(field, Packed) else field).pieces()
