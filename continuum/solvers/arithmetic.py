"""The sums of a Runge-Kutta step, x + h sum_i w_i k_i and h sum_i e_i k_i / (atol + rtol max(|x|, |x+|)).

In eager mode a term is one pass over memory that is already there; where the field is compiled, a sum is one fused kernel on a
GPU. On a CPU both wait for the memory, and the call of a compiled function costs more than the passes that it saves.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from continuum.fields import Field
from continuum.solvers.packed import Packed
from continuum.types import State


class Arithmetic(NamedTuple):
    """How the sums are taken: combine(x, h, weights, slopes) and scaled_error(h, weights, slopes, x, x+, rtol, atol)."""

    combine: Callable[[State | None, float, Sequence[float], Sequence[State | None]], State]
    scaled_error: Callable[[float, Sequence[float], Sequence[State], State, State, float, float], State]


def combine(x: State | None, h: float, weights: Sequence[float], slopes: Sequence[State | None]) -> State:
    """x + h sum_i w_i k_i without gradient, one pass a term; what is None or has weight zero costs nothing."""
    total, own = x, False
    for weight, slope in zip(weights, slopes, strict=False):
        if slope is None or not weight:
            continue
        if own and total is not None:
            total.add_(slope, alpha=h * weight)
        else:
            total = slope * (h * weight) if total is None else torch.add(total, slope, alpha=h * weight)
            own = True
    assert total is not None, "a sum needs a term"
    return total


def scaled_error(h: float, weights: Sequence[float], slopes: Sequence[State], x: State, end: State, rtol: float, atol: float):
    allowed = x.detach().abs()
    torch.maximum(allowed, end.detach().abs(), out=allowed)
    torch.add(torch.tensor(atol, dtype=allowed.dtype), allowed, alpha=rtol, out=allowed)
    return combine(None, h, weights, slopes).div_(allowed)


def _sum(x: Tensor, weight: Tensor, weights: Sequence[Tensor], slopes: Sequence[Tensor]) -> Tensor:
    total = weight * x
    for w, slope in zip(weights, slopes, strict=True):
        total = total + w * slope
    return total


def _ratio(weights: Sequence[Tensor], slopes: Sequence[Tensor], x: Tensor, end: Tensor, rtol: Tensor, atol: Tensor) -> Tensor:
    error = weights[0] * slopes[0]
    for w, slope in zip(weights[1:], slopes[1:], strict=True):
        error = error + w * slope
    return error / (atol + rtol * torch.maximum(x.abs(), end.abs()))


@lru_cache
def _fused(sums: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(sums, dynamic=True)


# Numbers come in as tensors without axes, and sums of few terms are filled up, so that few kernels serve all steps.


def _fused_combine(x: State | None, h: float, weights: Sequence[float], slopes: Sequence[State | None]) -> State:
    terms = [(h * w, k.detach()) for w, k in zip(weights, slopes, strict=False) if w and k is not None]
    if not terms:
        assert x is not None, "a sum needs a term"
        return x
    filled = terms + [(0.0, terms[0][1].detach()) for _ in range(-len(terms) % FILL)]
    first = terms[0][1].detach() if x is None else x.detach()
    numbers = torch.tensor([0.0 if x is None else 1.0, *(w for w, _ in filled)], dtype=torch.float64).unbind()
    return _fused(_sum)(first, numbers[0], numbers[1:], [k for _, k in filled])


def _fused_scaled_error(
    h: float, weights: Sequence[float], slopes: Sequence[State], x: State, end: State, rtol: float, atol: float
) -> State:
    terms = [(h * w, k.detach()) for w, k in zip(weights, slopes, strict=True) if w]
    numbers = torch.tensor([rtol, atol, *(w for w, _ in terms)], dtype=torch.float64).unbind()
    return _fused(_ratio)(numbers[2:], [k for _, k in terms], x.detach(), end.detach(), numbers[0], numbers[1])


FILL = 7
"""Sums are filled up to a multiple of so many terms: those of dopri5."""

EAGER = Arithmetic(combine, scaled_error)
FUSED = Arithmetic(_fused_combine, _fused_scaled_error)


def arithmetic_of(field: Field, device: torch.device) -> Arithmetic:
    """Fused sums where the field was compiled in place, but not on a CPU."""
    return FUSED if device.type != "cpu" and any(part._compiled_call_impl is not None for part in _parts(field)) else EAGER


def compile_field(field: Field) -> None:
    """Compile `field` in place: layer by layer if it jumps, since the depth, a number, would be a constant of the graph."""
    for part in _parts(field):
        if part._compiled_call_impl is None:
            part.compile()


def _parts(field: Field) -> Sequence[Field]:
    return (field.field if isinstance(field, Packed) else field).pieces()
