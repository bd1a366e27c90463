"""One adaptive solve: attempt a step, keep it where its error meets the tolerance, and choose the size of the next.

    ratio = | h sum_i e_i k_i / (atol + rtol max(|x|, |x+|)) |,    kept where ratio <= 1
    h+ = h min(10, max(0.9 ratio^(-1/order), 1 if kept else 0.2))

These are torchdiffeq's rules, for pairs whose last stage is the next first one. What differs is the cost: stages are tensors
of their own, depths and sizes are Python floats, the device is waited for once an attempt (the ratio) and once for the first
size, a step ends where a state is wanted, so that nothing is interpolated.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from continuum.fields import Field
from continuum.fields.base import checked
from continuum.schemes.base import inside
from continuum.solvers.arithmetic import Arithmetic, arithmetic_of
from continuum.solvers.base import Cost, SolveError, advice, check_closed, cut_at_knots, rows_not_finite
from continuum.solvers.norms import NORMS, any_rank
from continuum.solvers.packed import components
from continuum.solvers.pairs import Pair, pair_of
from continuum.solvers.replay import RandomState, random_state, unless_unused
from continuum.types import State, Time

if TYPE_CHECKING:
    from continuum.solvers.adaptive import Adaptive

Keep = Literal["nothing", "graphs", "states"]
"""What a solve keeps for its gradient: nothing, the graph of every evaluation, or what is needed to evaluate again."""

Evaluate: TypeAlias = Callable[[float, State], State]
"""f(t, x) as numbers, without a gradient."""

SAFETY, LARGEST_GROWTH, LARGEST_CUT = 0.9, 10.0, 0.2
"""torchdiffeq's numbers."""


@dataclass
class Evaluation:
    """The graph behind a value of the field: its leaf x, and the edge it comes out at (None if nothing needs a gradient)."""

    x: State
    edge: GradientEdge | None


@dataclass
class Repeat:
    """What it takes to evaluate the field once more as it was: where, and the random numbers it drew."""

    depth: float
    x: State
    random: RandomState | None
    version: int
    """That of x, which changes when x is written to."""


@dataclass
class Step:
    """An accepted step, as its gradient needs it.

    Its new state is made of the value at its `start`, and of those behind it: their graphs, in `evaluations`, or what it takes
    to repeat them, the value at the start (`slope`) and where they were (x is not known before they are repeated). `output`
    says which of the requested states the step ends in, if in any.
    """

    h: float
    start: Evaluation | Repeat
    evaluations: list[Evaluation] = field(default_factory=list)
    slope: State | None = None
    depths: Sequence[float] = ()
    random: Sequence[RandomState | None] = ()
    output: int | None = None


@dataclass
class Point:
    """Where a solve is: the state at depth t, the slope there, and how that came about."""

    t: float
    x: State
    slope: State
    origin: Evaluation | Repeat | None


def evaluated(field: Callable[[Time, State], State], t: Time, x: State) -> tuple[Evaluation, State]:
    """f(t, x) with its graph, and as numbers."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        slope = checked(field(t, leaf), x).to(x.dtype)
    return Evaluation(leaf, get_gradient_edge(slope) if slope.requires_grad else None), slope.detach()


def attempt(
    pair: Pair, evaluate: Evaluate, sums: Arithmetic, x: State, first: State, h: float, depths: Sequence[float]
) -> tuple[State, list[State]]:
    """The state after a step from `x` with the slope `first`, and the slopes of all stages; the last is at that state.

    With fewer depths, as many stages.
    """
    slopes = [first]
    end = x
    for depth, row in zip(depths, pair.a[1:], strict=False):
        end = sums.combine(x, h, row, slopes)
        slopes.append(evaluate(depth, end))
    return end, slopes


class Stepper:
    """A solve of `field` from times[0] through all `times`, in progress or done, with all that its gradient needs."""

    def __init__(self, solver: "Adaptive", field: Field, times: Sequence[float], keep: Keep, device: torch.device) -> None:
        self.solver, self.field, self.times, self.keep = solver, field, times, keep
        self.pair = pair_of(solver.method)
        self.sums = arithmetic_of(field, device)
        self.norm = NORMS[solver.norm]
        self.differentiated = torch.is_grad_enabled()
        self.way = 1.0 if times[-1] > times[0] else -1.0
        self.step = solver.first_step
        self.grid = [times[0]]
        self.ratios: list[float] = []
        self.tried: list[float] = []
        self.evaluations = 0
        self.made: list[Evaluation | Repeat] = []
        self.steps: list[Step] = []

    def cost(self) -> Cost:
        accepted = len(self.ratios)
        return Cost(self.evaluations, accepted, len(self.tried) - accepted, tuple(self.grid), tuple(self.ratios))

    def run(self, x: State) -> list[State]:
        """The states at all times behind the first."""
        states: list[State] = []
        for start, stop in pairwise(cut_at_knots(self.field.knots, self.times[0], self.times[-1])):
            # Depths just inside the piece, so that no stage reads a layer beyond a knot.
            bounds = [inside(self.field.knots, start, stop - start, c, x.dtype) for c in (0, 1)]
            point = self._start(start, x, bounds)
            for end in (*(t for t in self.times if min(start, stop) < t < max(start, stop)), stop):
                while point.t != end:
                    point = self._advance(point, end, bounds)
                if end in self.times:
                    states.append(point.x.detach())
                    if self.steps:
                        self.steps[-1].output = len(states) - 1
            x = point.x
        self.made.clear()
        return states

    def _start(self, t: float, x: State, bounds: list[float]) -> Point:
        """The slope at the start of a piece; with its graph wherever a gradient may be wanted, to see that it leads nowhere
        else.
        """
        before = self._random_state(x)
        self._count(t)
        if self.differentiated:
            evaluation, slope = evaluated(self.field, bounds[0], x)
            check_closed(evaluation.edge, evaluation.x, self.field, str(self.solver))
        else:
            evaluation, slope = None, self._numbers(self.field, bounds[0], x)
        origin = evaluation
        if before is not None:
            origin = Repeat(bounds[0], x, unless_unused(before, x.device), x._version)
        point = Point(t, x, slope, origin)
        if self.step is None:
            self.step = self._choose_first_step(point, bounds)
        return point

    def _advance(self, point: Point, stop: float, bounds: list[float]) -> Point:
        """Attempt one step towards `stop`: where it leads to, or the point itself if it is rejected."""
        t, x = point.t, point.x
        h = self._size(point)
        left = abs(stop - t)
        # A step that comes within rounding of the stop ends on it.
        hits = h >= left - 4 * sys.float_info.epsilon * max(abs(t), abs(stop))
        size = left if hits else h
        end = stop if hits else t + self.way * size
        depths = [_between(end if c == 1 else t + c * (end - t), bounds) for c in self.pair.c[1:]]
        self.made = []
        signed = self.way * size
        new, slopes = attempt(self.pair, self._evaluate, self.sums, x, point.slope, signed, depths)
        error = self.sums.scaled_error(signed, self.pair.e, slopes, x, new, self.solver.rtol, self.solver.atol)
        ratio = self.norm(components(self.field, error)).item()
        self.tried.append(size)
        if ratio != ratio:
            self._check_finite("the state or its field is not finite", t, size, x, point.slope)
            ratio = float("inf")  # the step went too far: a smaller one may be finite
        factor = SAFETY * ratio ** (-1 / self.pair.order) if ratio else float("inf")
        grown = size * min(LARGEST_GROWTH, max(factor, 1.0 if ratio < 1 else LARGEST_CUT))
        # A step that was cut short to end on the stop need not grow back to its size.
        self.step = max(grown, min(h, size * factor)) if hits else grown
        if not ratio <= 1:
            return point
        self.grid.append(end)
        self.ratios.append(ratio)
        return Point(end, new, slopes[-1], self._keep(point, signed, depths))

    def _keep(self, point: Point, h: float, depths: list[float]) -> Evaluation | Repeat | None:
        """Keep what the gradient of an accepted step needs; its last evaluation belongs to the step that begins with it."""
        if point.origin is None or self.keep == "nothing":
            return None
        *made, last = self.made
        step = Step(h, point.origin)
        if self.keep == "graphs":
            step.evaluations = [evaluation for evaluation in made if isinstance(evaluation, Evaluation)]
        else:
            step.slope, step.depths = point.slope, depths[:-1]
            step.random = [repeat.random for repeat in made if isinstance(repeat, Repeat)]
        self.steps.append(step)
        return last

    def _size(self, point: Point) -> float:
        assert self.step is not None
        t = point.t
        h = min(self.step, self.solver.max_step)
        if not h >= self.solver.min_step or t + self.way * h == t:
            self._check_finite("the state or its field is not finite", t, h, point.x, point.slope)
            raise self._error("the step size underflows", t, h)
        return h

    def _evaluate(self, t: float, x: State) -> State:
        self._count(t)
        if self.keep == "nothing":
            return self._numbers(self.field, t, x)
        before = self._random_state(x)
        evaluation, slope = evaluated(self.field, t, x)
        self.made.append(evaluation if before is None else Repeat(t, x, unless_unused(before, x.device), x._version))
        return slope

    def _random_state(self, x: State) -> RandomState | None:
        return random_state(x.device) if self.keep == "states" else None

    def _count(self, t: Time) -> None:
        if self.evaluations >= self.solver.max_evaluations:
            raise self._error("the evaluation budget is spent", t, self.step or 0.0)
        self.evaluations += 1

    def _numbers(self, field: Field, t: Time, x: State) -> State:
        """f(t, x) alone; where a gradient is wanted with a graph for the moment, for fields that differentiate inside."""
        return checked(field(t, x), x).detach().to(x.dtype) if self.keep == "nothing" else evaluated(field, t, x)[1]

    def _choose_first_step(self, point: Point, bounds: list[float]) -> float:
        """A first step from the size of the field and of its change (Hairer, Norsett, Wanner I, II.4), as torchdiffeq's.

        The sizes stay on the device until the end, so that it is waited for once.
        """
        t, x, slope = point.t, point.x, point.slope
        scale = self.solver.atol + self.solver.rtol * x.abs()

        def size(change: State) -> Tensor:
            return self.norm(components(self.field, change / scale))

        state, speed = size(x), size(slope)
        tiny = torch.full_like(state, 1e-6)
        h = torch.where((state < 1e-5) | (speed < 1e-5), tiny, 0.01 * state / speed)
        later = (bounds[0] + self.way * h).clamp(min(bounds), max(bounds)).to(x.dtype)
        moved = x + self.way * h.to(x.dtype) * slope
        # A layer is looked up by a number: of piecewise constant weights, ask the one in force.
        smooth = self.field.at(bounds[0])
        self._count(t)
        change = size(self._numbers(smooth, later, moved) - slope) / h
        fastest = torch.maximum(speed, change)
        careful = torch.maximum(tiny, 1e-3 * h)
        chosen = torch.where(fastest <= 1e-15, careful, (0.01 / fastest) ** (1 / self.pair.order))
        first = torch.minimum(100 * h, chosen).item()
        if not 0 < first < float("inf"):
            self._check_finite("the state or its field is not finite", t, 0.0, x, slope)
            raise self._error("the field is not finite near the start", t, 0.0)
        return min(first, self.solver.max_step)

    def _check_finite(self, reason: str, t: float, step: float, *states: State) -> None:
        """Raise SolveError if a state, or a slope at its start, is not finite, on this rank or on another that solves along."""
        rows = rows_not_finite(*(part for state in states for part in components(self.field, state)))
        if any_rank(bool(rows), self.solver.norm, states[0].device):
            raise self._error(reason if rows else f"{reason} on another rank", t, step, rows)

    def _error(self, reason: str, t: Time, step: float, rows: Sequence[int] = ()) -> SolveError:
        return SolveError(
            f"{reason} ({self.solver})",
            depth=float(t),
            step=step,
            evaluations=self.evaluations,
            rows=rows,
            steps=self.tried[-8:],
            advice=advice(rows, self.tried, len(self.ratios))
            if not reason.endswith("another rank")
            else "See that rank's message",
        )


def _between(depth: float, bounds: list[float]) -> float:
    return min(max(depth, min(bounds)), max(bounds))
