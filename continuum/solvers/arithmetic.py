"""The sums of a Runge-Kutta step, x + h sum_i w_i k_i and h sum_i e_i k_i / (atol + rtol max(|x|, |x+|)).

In eager mode a term is one pass over memory that is already there; where the field is compiled, a sum is one fused kernel.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from continuum.fields import Field
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


EAGER = Arithmetic(combine, scaled_error)


def arithmetic_of(field: Field) -> Arithmetic:
    return EAGER
