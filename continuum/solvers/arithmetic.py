"""The sums of a Runge-Kutta step, x + h sum_i w_i k_i and h sum_i e_i k_i / (atol + rtol max(|x|, |x+|)).

A term is one pass over memory that is already there. A sum is linear, so autograd saves nothing for it: the backward pass
hands the gradient to x, and h w_i times it to each slope.
"""

from collections.abc import Sequence

import torch

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
