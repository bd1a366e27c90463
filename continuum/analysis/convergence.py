"""Orders of convergence, measured: |x_N - x| = C N^-r for N steps, or N layers."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from continuum.fields import Field
from continuum.fields.base import in_mode_of
from continuum.flow import Flow
from continuum.schemes import Euler, Scheme
from continuum.solvers import Adaptive, FixedStep, SolveError
from continuum.types import State
from continuum.weights import PiecewiseConstant

TOLERANCES = (1e-6, 1e-8, 1e-10)
"""Of references, each tighter than the one before as long as it is affordable."""

EVALUATIONS = 2_000
"""What a reference may cost, a layer. Smooth fields need a tenth of it at 1e-10; each kink, as of ReLU, costs more."""

SAFE = 30.0
"""An error counts where it is so many times the tolerance of its reference."""


@dataclass(frozen=True)
class Convergence:
    """Relative errors for growing numbers of steps (or layers), beside the order they should fall with.

    Errors below `floor` may be the reference's own; `order` leaves them out.
    """

    name: str
    steps: tuple[int, ...]
    errors: tuple[float, ...]
    expected: int
    floor: float = SAFE * TOLERANCES[-1]

    @property
    def order(self) -> float:
        """The r fitted to error = C steps^-r above the floor; NaN where fewer than two errors are."""
        kept = [(count, error) for count, error in zip(self.steps, self.errors, strict=True) if error > self.floor]
        return order([count for count, _ in kept], [error for _, error in kept]) if len(kept) > 1 else math.nan


def order(steps: Sequence[int], errors: Sequence[float]) -> float:
    """r of |error| = C N^-r, the slope of least squares between the logarithms.

    >>> round(order([8, 16, 32], [0.2, 0.1, 0.05]), 6)
    1.0

    Raises:
        ValueError: fewer than two numbers of steps, or an error of zero.
    """
    if len(set(steps)) < 2 or len(steps) != len(errors) or not all(errors):
        raise ValueError(f"an order is between two or more errors other than 0, got {list(errors)} for {list(steps)} steps")
    x, y = [math.log(count) for count in steps], [math.log(abs(error)) for error in errors]
    mx, my = math.fsum(x) / len(x), math.fsum(y) / len(y)
    return -math.fsum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / math.fsum((a - mx) ** 2 for a in x)


@dataclass(frozen=True)
class Reference:
    """The end x(depth) of a flow in float64, and what solved it."""

    end: State
    solver: Adaptive

    @property
    def tolerance(self) -> float:
        return self.solver.rtol


@torch.no_grad()
def scheme_errors(
    flow: Flow, x: State, scheme: Scheme, per_layer: Sequence[int] = (1, 2, 4, 8, 16), reference: Reference | None = None
) -> Convergence:
    """|x_m - x_ref| / |x_ref| at the end of the flow, for m steps of `scheme` a layer, h = 1/m.

    For several schemes, take their common `reference` from `reference_end`, which is the dear part.

    Computed in float64 on a copy in evaluation mode, without noise. The reference is dopri8 at a tolerance of 1e-10, or 1e-6 or
    1e-8 where kinks in the field make that too dear. A layer of LM-ResNet stands for (1 + k) x' = f. Where the field jumps from
    layer to layer, a multistep scheme may fall behind its order: its past belongs to another layer.

    >>> from continuum.fields import MLP
    >>> flow = Flow(MLP(2, hidden=8), "euler", depth=1)
    >>> abs(scheme_errors(flow, torch.ones(1, 2), Euler(), (8, 16, 32)).order - 1) < 0.1
    True

    Raises:
        ValueError: an m that is no positive integer, or whose step does not divide the depth.
        TypeError: the scheme cannot step the field.
        SolveError: the reference is too dear even at 1e-6.
    """
    counts = _checked_counts(per_layer, "steps a layer")
    field, x = copied(flow.drift().field), x.double()
    flows = [Flow(field, FixedStep(scheme, h=1 / m), flow.depth) for m in counts]
    exact = reference or reference_end(flow, x)
    errors = tuple(_distance(solved(x), exact.end) for solved in flows)
    return Convergence(str(scheme), counts, errors, scheme.order, SAFE * exact.tolerance)


@torch.no_grad()
def reference_end(flow: Flow, x: State) -> Reference:
    """The end of the flow that `scheme_errors` measures from.

    Raises:
        SolveError: it is too dear even at 1e-6.
    """
    return tightest(Flow(copied(flow.drift().field), Adaptive("dopri8"), flow.depth), x.double())


def sampled(field: Field, layers: int) -> PiecewiseConstant:
    """The N layers x+ = x + (T / N) f(x; theta(i T / N)), whose deep limit is the equation of `field` on [0, T].

    Euler's scheme with h = 1 over depth N is that residual network; it converges with order 1 (arXiv 1810.11741). The layers
    have weights of their own, and a field that looks at the depth besides sees i T / N.

    >>> from continuum.bases import Hat
    >>> from continuum.fields import MLP
    >>> from continuum.weights import Expansion
    >>> len(sampled(Expansion(MLP(2, hidden=8), Hat(3, depth=2)), 8).layers)
    8

    Raises:
        TypeError: the weights of the field are no continuous function of depth, as those of an `Expansion` are.
        ValueError: the number of layers is no positive integer.
    """
    _checked_counts([layers], "layers")
    size = _depth_of_weights(field) / layers
    return in_mode_of(field, PiecewiseConstant(field.held(i * size).scaled(size) for i in range(layers)))


@torch.no_grad()
def deep_limit(field: Field, x: State, layers: Sequence[int] = (8, 16, 32, 64, 128)) -> Convergence:
    """|x_N - x(T)| / |x(T)|, for the networks of N layers `sampled` from `field` and the solution of its equation.

    Computed in float64 on a copy in evaluation mode, with the reference of `scheme_errors`.

    Raises:
        TypeError, ValueError: as `sampled`.
        SolveError: the reference is too dear even at 1e-6.
    """
    counts = _checked_counts(layers, "layers")
    depth = _depth_of_weights(field)
    field, x = copied(field), x.double()
    exact = reference_end(Flow(field, Adaptive("dopri8"), depth), x)
    errors = tuple(_distance(Flow(sampled(field, n), FixedStep(Euler()), n)(x), exact.end) for n in counts)
    return Convergence("deep limit", counts, errors, 1, SAFE * exact.tolerance)


F = TypeVar("F", bound=Field)


def copied(field: F) -> F:
    """A copy in float64 and evaluation mode."""
    return copy.deepcopy(field).double().eval()


@torch.no_grad()
def tightest(flow: Flow, x: State) -> Reference:
    """Where dopri8 leads at the tightest tolerance that is affordable on `flow`; SolveError if not even the loosest is."""
    found: Reference | None = None
    budget = math.ceil(EVALUATIONS * max(1.0, flow.depth))
    for tolerance in TOLERANCES:
        solver = Adaptive("dopri8", tolerance, tolerance, max_evaluations=budget)
        solved = flow.with_solver(solver)
        try:
            found = Reference(solved(x), solver)
        except SolveError:
            if found is None:
                raise
            break
        # Kinks make the next tolerance about five times as dear, and to run out of the budget is dear as well.
        if solved.cost is None or 5 * solved.cost.evaluations > budget:
            break
    assert found is not None
    return found


def _distance(x: State, exact: State) -> float:
    return float((x - exact).norm() / exact.norm())


def _depth_of_weights(field: Field) -> float:
    """Where theta(t) ends."""
    found = field.expanded()
    if found is None or not found[0].continuous:
        raise TypeError(
            f"a deep limit takes the weights of an Expansion at N depths; a {type(field).__name__} has no continuous theta(t). "
            "Layers get one by PiecewiseConstant(layers).project(basis)"
        )
    return found[0].depth


def _checked_counts(counts: Sequence[int], what: str) -> tuple[int, ...]:
    if wrong := [count for count in counts if isinstance(count, bool) or not isinstance(count, int) or count < 1]:
        raise ValueError(f"numbers of {what} are positive integers, not {wrong}")
    return tuple(counts)
