"""One step: a scheme moves the state from depth t to t + h, (x, memory) -> (x, memory)."""

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from continuum.fields import Field
from continuum.fields.base import checked
from continuum.types import State

Memory: TypeAlias = tuple[Any, ...]
"""What a step hands to the next one: states, and draws yet to be used; () where there is nothing to remember."""


if TYPE_CHECKING:
    from continuum.schemes.runge_kutta import Tableau

Multistep: TypeAlias = tuple[Sequence[Any], Sequence[Any], int]
"""alpha, beta and p of sum_j alpha_j x_{n+j} = h^p sum_j beta_j f_{n+j}, for the equation x^(p) = f."""


class Scheme(ABC):
    """A rule for one step. A scheme has no state of its own: what it remembers is passed in and returned.

    `order` is the order of its global error on smooth fields, `stages` the number of field evaluations of a step,
    `variable_steps` whether neighbouring steps may differ in size, `remembers` whether a state before the first changes what it
    does, `takes_noise` whether it steps fields with noise, `one_graph` whether torch.compile can follow a step.

    What it is in numbers, for those who analyse it, is its `tableau`, the coefficients `series` of a step R(h rate) x for
    linear fields only, or `multistep`; a scheme that says none of them is left out there.
    """

    order: int
    stages: int
    variable_steps: bool = True
    remembers: bool = False
    takes_noise: bool = False
    one_graph: bool = True
    tableau: "Tableau | None" = None
    series: tuple[int, ...] | None = None

    def __str__(self) -> str:
        """The scheme in the grammar of `solvers.parse`: its name in snake case, and its fields (adams_bashforth:order=2)."""
        name = re.sub("(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()
        options = [f"{f.name}={getattr(self, f.name)}" for f in fields(self)] if is_dataclass(self) else []
        return f"{name}:{','.join(options)}" if options else name

    def check(self, field: Field) -> None:
        """Raise TypeError if this scheme cannot step `field`, with what it needs."""

    def begin(self, field: Field, x: State, previous: State | None, steps: Sequence[tuple[float, float]]) -> Memory:
        """The memory of the first of `steps` (t, h): `previous` is the state one layer before x, where the network has one."""
        return ()

    def without_noise(self) -> "Scheme":
        """The scheme that this one is where the field has no noise."""
        return self

    def multistep(self, k: Any) -> Multistep | None:
        """The scheme as a linear multistep method, for layers of friction `k`, a number or a symbol."""
        return None

    def continued(self, layer: Field, x: State, h: float, past: Sequence[State]) -> tuple[State, Memory]:
        """From where a step of `layer` from x at depth 0 goes on, and its memory, where states h, 2h, ... before are `past`."""
        return x, ()

    def observed(self, layer: Field, x: State) -> State:
        """The part of x whose steps `multistep` describes.

        Raises:
            TypeError: it describes no part of the states of this layer.
        """
        return x

    @abstractmethod
    def step(self, field: Field, t: float, x: State, h: float, memory: Memory) -> tuple[State, Memory]:
        """The state at depth t + h from `x` at depth `t`, and the memory of the next step; h < 0 goes back."""

    def evaluations(self, field: Field, steps: Sequence[tuple[float, float]]) -> int:
        """Field evaluations of a solve with these steps (t, h)."""
        return len(steps) * self.stages


def scheme_of(solver: object) -> Scheme | None:
    """The scheme that a solver repeats; None where it has none."""
    scheme = getattr(solver, "scheme", None)
    return scheme if isinstance(scheme, Scheme) else None


Evaluate: TypeAlias = Callable[[Field, float, State], State]
"""How a reversible scheme asks a field for its value: field(t, x), or a value that is known already."""


def evaluate(field: Field, t: float, x: State) -> State:
    return field(t, x)


class ReversibleScheme(Scheme):
    """A scheme whose steps can be undone, so that a gradient needs no stored states.

    A subclass writes its step as `forth` and the inverse as `back`. Both get every value of a field from `evaluate`, and
    `back` asks for those that `forth` asked for in the reverse order: the solver keeps random masks by that order, and uses
    the values of `back` again for the gradient of `forth`.
    """

    def step(self, field: Field, t: float, x: State, h: float, memory: Memory) -> tuple[State, Memory]:
        return self.forth(evaluate, field, t, x, h, memory)

    def undo(self, field: Field, t: float, x: State, h: float, memory: Memory, first: bool = False) -> tuple[State, Memory]:
        """The inverse of `step`: what it was given at depth `t`, from what it returned.

        `first` says that the step had no memory, as at the start of a multistep scheme.
        """
        return self.back(evaluate, field, t, x, h, memory, first)

    @abstractmethod
    def forth(self, evaluate: Evaluate, field: Field, t: float, x: State, h: float, memory: Memory) -> tuple[State, Memory]: ...

    @abstractmethod
    def back(
        self, evaluate: Evaluate, field: Field, t: float, x: State, h: float, memory: Memory, first: bool
    ) -> tuple[State, Memory]: ...

    def check_undo(self, field: Field) -> None:
        """Raise TypeError if steps of `field` can be taken but not undone."""

    def coefficients(self, field: Field, t: float) -> tuple[Tensor, ...]:
        """Parameters that the step itself multiplies with, beside those inside the evaluated fields."""
        return ()


def combine(x: State, h: float, weights: Sequence[float], slopes: Sequence[State]) -> State:
    """x + h sum_i w_i k_i, summed from left to right; zero weights cost nothing."""
    for weight, slope in zip(weights, slopes, strict=False):
        if weight:
            x = torch.add(x, checked(slope, x), alpha=h * weight)
    return x


def knot_at(knots: Sequence[float], t: float) -> float | None:
    """The knot that depth t hits, to within four units in the last place, or None."""
    tolerance = 4 * sys.float_info.epsilon * max(1.0, abs(t))
    low, high = 0, len(knots)
    while low < high:  # the bisect module would break the graph under torch.compile
        middle = (low + high) // 2
        if knots[middle] < t - tolerance:
            low = middle + 1
        else:
            high = middle
    return knots[low] if low < len(knots) and knots[low] <= t + tolerance else None


def inside(knots: Sequence[float], t: float, h: float, c: float, dtype: torch.dtype) -> float:
    """The depth t + c h of a stage, moved off a knot by one unit of `dtype` into the step [t, t + h].

    A stage on a knot thus reads the layer its step belongs to, in both directions of time. The unit is the state's (at
    least float32's), so that a field may turn the depth into a tensor without landing on the knot again.
    """
    depth = t + c * h
    knot = knot_at(knots, depth)
    if knot is None or 0 < c < 1:
        return depth
    unit = min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) * max(1.0, abs(knot))
    return knot + unit if (h > 0) == (c <= 0) else knot - unit
