"""One adaptive solve: attempt a step, keep it where its error meets the tolerance, and choose the size of the next.

The steps are torchdiffeq's (see `control`). What differs is the cost: stages are tensors of their own, depths and sizes are
Python floats, and the device is waited for once an attempt (the ratio) and twice for the first size. All of it is a plain loop
under autograd, in which step sizes are constants and rejected attempts are dropped; so the gradient is that of the accepted
steps, whatever autograd is asked for.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from continuum.fields import Field
from continuum.fields.base import checked
from continuum.schemes.base import inside
from continuum.solvers.arithmetic import combined, scaled_error, sums_for
from continuum.solvers.base import Cost, SolveError, advice, cut_at_knots, rows_not_finite
from continuum.solvers.control import StepControl, any_rank
from continuum.solvers.packed import components
from continuum.solvers.pairs import Pair
from continuum.solvers.recompute import Recomputation, refusing_draws
from continuum.types import State, Time

NOTHING = nullcontext()


@dataclass
class Attempt:
    """A step that was tried from depth t in a piece of the field: its signed size h, where it ends, and the depths of its
    stages, of its new point and of the stages of its dense output.

    `shares` are the parts of the step at which a state is wanted. A `final` one ends the piece: nothing uses the slope at its
    new point but the error.
    """

    piece: Field
    t: float
    h: float
    end: float
    depths: Sequence[float]
    last: float
    inner: Sequence[float]
    shares: Sequence[float]
    final: bool
    accepted: bool = False


class Stepper:
    """A solve of `field` through `times`.

    Args:
        pair: the method.
        control: tolerances, limits and norm.
        field: what is solved.
        times: strictly monotone depths; the states at all but the first are wanted.
        title: the solver, as errors name it.
        exact: whether steps end at all times, not only at the last.
        every: how many accepted steps are recomputed together in the backward pass; 0 stores them.
    """

    def __init__(
        self, pair: Pair, control: StepControl, field: Field, times: Sequence[float], title: object, exact: bool, every: int
    ) -> None:
        self.pair, self.control, self.field, self.title, self.every = pair, control, field, title, every
        self.times = times
        self.inner = None if exact else pair.inner
        self.way = 1.0 if times[-1] > times[0] else -1.0
        self.step = control.first_step
        self.grid = [times[0]]
        self.ratios: list[float] = []
        self.tried: list[float] = []
        self.evaluations = 0
        self.watched = 0
        self.recompute: Recomputation | None = None
        self.under_way = True  # afterwards, evaluations repeat those of an attempt and are not counted
        self.stages = pair.c[1:]
        self.rows = pair.a[1:] if pair.reuses_last else (*pair.a[1:], pair.b)

    def cost(self) -> Cost:
        accepted = len(self.ratios)
        return Cost(self.evaluations, accepted, len(self.tried) - accepted, tuple(self.grid), tuple(self.ratios))

    def run(self, x: State) -> list[State]:
        """The states at all times behind the first."""
        self.sums = sums_for(self.field, x.device)
        found: dict[float, State] = {}
        for start, stop in pairwise(cut_at_knots(self.field.knots, self.times[0], self.times[-1])):
            x = found[stop] = self._piece(x, start, stop, found)
        self.under_way = False
        return [found[t] for t in self.times[1:]]

    # One smooth piece of the field

    def _piece(self, x: State, start: float, stop: float, found: dict[float, State]) -> State:
        """The state at `stop`, between which and `start` the field is smooth; those at times in between go to `found`."""
        # Depths just inside the piece, so that no stage reads a layer beyond a knot.
        bounds = (
            inside(self.field.knots, start, stop - start, 0, x.dtype),
            inside(self.field.knots, start, stop - start, 1, x.dtype),
        )
        piece = self.field.at(bounds[0])
        recompute = self.recompute = Recomputation([piece]) if self.every else None
        self.watched = 0

        def slope_at_start(x: State) -> State:
            return self._slope(piece, bounds[0], x)

        slope = recompute(slope_at_start, x) if recompute else slope_at_start(x)
        if self.step is None:
            self.step = self._first_step(piece, start, x, slope, bounds)
        t = start
        wanted = [time for time in self.times if self.way * start < self.way * time < self.way * stop]
        while t != stop:
            # Where nothing is read off between the ends, a step ends at the next requested time.
            goal = stop if self.inner is not None or not wanted else wanted[0]
            run = _Span(self, piece, t, goal, goal == stop, wanted, bounds)
            x, slope, inner = recompute(run, x, slope) if recompute else run(x, slope)
            t = run.end
            states = [state for stacked in inner for state in stacked.unbind()]
            found.update(zip(wanted, states, strict=False))
            wanted = wanted[len(states) :]
            if wanted and wanted[0] == t:
                found[wanted.pop(0)] = x
        return x

    # One step

    def plan(self, span: "_Span", x: State, slope: State) -> tuple[Attempt, float]:
        """The next attempt, and the size that it would have were the goal farther away."""
        assert self.step is not None
        t, goal = span.end, span.goal
        h = min(self.step, self.control.max_step)
        if not h >= self.control.min_step or t + self.way * h == t:
            self._check_finite("the state or its field is not finite", t, h, x, slope)
            raise self._error("the step size underflows", t, h)
        left = abs(goal - t)
        # A step that comes within rounding of the goal ends on it.
        hits = h >= left - 4 * sys.float_info.epsilon * max(abs(t), abs(goal))
        size = left if hits else h
        end = goal if hits else t + self.way * size
        low, high = min(span.bounds), max(span.bounds)

        def depth(c: float) -> float:
            return min(max(end if c == 1 else t + c * (end - t), low), high)

        depths = [depth(c) for c in self.stages]
        shares = self._shares(t, end, span.wanted) if span.wanted else []
        inner = [depth(c) for c, _ in self.inner or ()] if shares else []
        final = span.last and hits and not shares
        return Attempt(span.piece, t, self.way * size, end, depths, depth(1), inner, shares, final), h

    def stages_of(self, attempt: Attempt, x: State, slope: State, keep: bool) -> tuple[State, list[State]]:
        """The new state, and the slopes of all stages, or the last one alone."""
        last = len(self.stages) - 1
        sums, end = self.sums(x, attempt.h, self.rows, 0 if keep else last + 1), x
        sums.add(slope)
        for stage, depth in enumerate(attempt.depths):
            end = sums.total(stage)
            unused = attempt.final and self.pair.reuses_last and stage == last
            sums.add((self._number if unused else self._slope)(attempt.piece, depth, end))
        if not self.pair.reuses_last:
            end = sums.total(last + 1)
        return end, sums.slopes

    def finished(self, attempt: Attempt, x: State, end: State, slopes: list[State]) -> tuple[State, list[Tensor]]:
        """The slope at the end of an accepted step, and the states wanted inside it, stacked."""
        if not (self.pair.reuses_last or attempt.final):
            slopes = [*slopes, self._slope(attempt.piece, attempt.last, end)]
        last = slopes[-1]
        if not attempt.shares:
            return last, []
        for depth, (_, row) in zip(attempt.inner, self.inner or (), strict=True):
            slopes = [*slopes, self._slope(attempt.piece, depth, combined(x, attempt.h, row, slopes))]
        return last, [self._between(attempt, x, slopes)]

    def accept(self, attempt: Attempt, free: float, x: State, end: State, slopes: list[State]) -> bool:
        """Whether the error meets the tolerance; it also decides the size of the next attempt."""
        with torch.no_grad():
            error = scaled_error(attempt.h, self.pair.e, slopes, x, end, self.control.rtol, self.control.atol)
            ratio = self.control.size(components(self.field, error)).item()
        size = abs(attempt.h)
        self.tried.append(size)
        if ratio != ratio:
            self._check_finite("the state or its field is not finite", attempt.t, size, x, slopes[0])
            ratio = float("inf")  # the step went too far: a smaller one may be finite
        grown, factor = self.control.next(size, ratio, self.pair.order)
        # A step that was cut short to end on its goal need not grow back to its size.
        self.step = grown if size == free else max(grown, min(free, size * factor))
        if not ratio <= 1:
            return False
        self.grid.append(attempt.end)
        self.ratios.append(ratio)
        return True

    def _shares(self, start: float, end: float, wanted: Sequence[float]) -> list[float]:
        """Where in a step requested times lie, its ends left out."""
        if self.inner is None:
            return []
        first, last = self.way * start, self.way * end
        return [(time - start) / (end - start) for time in wanted if first < self.way * time < last]

    def _between(self, attempt: Attempt, x: State, slopes: list[State]) -> Tensor:
        """The states at the attempt's shares, stacked: x + h sum_i w_i(s) k_i."""
        s = torch.tensor(attempt.shares, dtype=torch.float64)
        powers = torch.stack([s ** (p + 1) for p in range(len(self.pair.dense))], dim=1)
        weights = attempt.h * powers @ self.pair.dense
        with torch.autocast(x.device.type, enabled=False):
            return x + torch.tensordot(weights.to(x), torch.stack(slopes), 1)

    # The field

    def _slope(self, piece: Field, t: float, x: State) -> State:
        """f(t, x) in the type of x; the second evaluation of a piece shows whether the field draws at each."""
        if self.under_way:
            self._count(t)
        with refusing_draws(x.device, self.title) if self.watched == 2 and self.field.training else NOTHING:
            slope = checked(piece(t, x), x)
        if slope.dtype != x.dtype:
            slope = slope.to(x.dtype)
        if self.recompute and self.under_way:
            self.recompute.forget()
        return slope

    def _number(self, piece: Field, t: float, x: State) -> State:
        """f(t, x) without the graph behind it, of a state that the field may differentiate by."""
        if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return self._slope(piece, t, x)
        # Kept out of a recomputation, which needs no tensor of it.
        with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda tensor: tensor):
            return self._slope(piece, t, x.detach().requires_grad_(x.requires_grad)).detach()

    def _first_step(self, piece: Field, t: float, x: State, slope: State, bounds: tuple[float, float]) -> float:
        def evaluate(t: Time, moved: State) -> State:
            if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
                moved.requires_grad_(x.requires_grad)
            return self._number(piece, t, moved)  # pyright: ignore[reportArgumentType]

        first = self.control.first(evaluate, lambda state: components(self.field, state), x, slope, self.pair.order, bounds)
        if not 0 < first < float("inf"):
            self._check_finite("the state or its field is not finite", t, 0.0, x, slope)
            raise self._error("the field is not finite near the start", t, 0.0)
        return first

    def _count(self, t: float) -> None:
        if self.evaluations == self.control.max_evaluations:
            raise self._error("the evaluation budget is spent", t, self.step or 0.0)
        self.evaluations += 1
        self.watched += 1

    # Failures

    def _check_finite(self, reason: str, t: float, step: float, *states: State) -> None:
        """Raise SolveError if a state, or a slope at its start, is not finite, on this rank or on another that solves along."""
        rows = rows_not_finite(*(part for state in states for part in components(self.field, state)))
        if any_rank(bool(rows), self.control.norm, states[0].device):
            raise self._error(reason if rows else f"{reason} on another rank", t, step, rows)

    def _error(self, reason: str, t: float, step: float, rows: Sequence[int] = ()) -> SolveError:
        elsewhere = reason.endswith("another rank")
        return SolveError(
            f"{reason} ({self.title})",
            depth=t,
            step=step,
            evaluations=self.evaluations,
            rows=rows,
            steps=self.tried[-8:],
            advice="See that rank's message" if elsewhere else advice(rows, self.tried, len(self.ratios)),
        )


class _Span:
    """Attempts from depth t towards `goal`, until one is accepted, or `every` are; called again, the same attempts once more.

    A first attempt that is rejected ends the span where it began, so that nothing of it needs to be repeated.
    """

    def __init__(
        self,
        stepper: Stepper,
        piece: Field,
        t: float,
        goal: float,
        last: bool,
        wanted: Sequence[float],
        bounds: tuple[float, float],
    ) -> None:
        self.stepper, self.piece, self.goal, self.last, self.wanted, self.bounds = stepper, piece, goal, last, wanted, bounds
        self.end = t
        self.made: list[Attempt] = []
        self.done = False

    def __call__(self, x: State, slope: State) -> tuple[State, State, list[Tensor]]:
        """The state and the slope at the end, and the states wanted inside each step, stacked."""
        inner: list[Tensor] = []
        for attempt in self.made if self.done else ():
            end, slopes = self.stepper.stages_of(attempt, x, slope, keep=bool(attempt.shares))
            if attempt.accepted:
                x, slope = self._taken(attempt, x, end, slopes, inner)
        if self.done:
            return x, slope, inner
        self.done, accepted = True, 0
        while accepted < max(self.stepper.every, 1) and self.end != self.goal:
            attempt, free = self.stepper.plan(self, x, slope)
            end, slopes = self.stepper.stages_of(attempt, x, slope, keep=True)
            attempt.accepted = self.stepper.accept(attempt, free, x, end, slopes)
            if not (accepted or attempt.accepted):
                break
            self.made.append(attempt)
            if attempt.accepted:
                accepted += 1
                self.end = attempt.end
                x, slope = self._taken(attempt, x, end, slopes, inner)
        return x, slope, inner

    def _taken(self, attempt: Attempt, x: State, end: State, slopes: list[State], inner: list[Tensor]) -> tuple[State, State]:
        slope, states = self.stepper.finished(attempt, x, end, slopes)
        inner += states
        return end, slope
