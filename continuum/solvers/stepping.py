"""One adaptive solve: attempt a step, keep it where its error meets the tolerance, and choose the size of the next.

The steps are torchdiffeq's (see `control`). What differs is the cost: stages are tensors of their own, depths and sizes are
Python floats, and the device is waited for once an attempt (the ratio) and twice for the first size. All of it is a plain loop
under autograd, in which step sizes are constants and rejected attempts are dropped; so the gradient is that of the accepted
steps, whatever autograd is asked for. Of a compiled field an attempt is one function (see `compiled`), in the same loop.
"""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from continuum.fields import Field
from continuum.fields.base import checked, depth_tensor
from continuum.schemes.base import inside
from continuum.solvers.arithmetic import Sums, combined, scaled_error
from continuum.solvers.base import Cost, SolveError, advice, cut_at_knots, rows_not_finite
from continuum.solvers.compiled import compiled_attempt, in_one
from continuum.solvers.control import StepControl, any_rank
from continuum.solvers.packed import components
from continuum.solvers.pairs import Pair
from continuum.solvers.recompute import Recomputation, refusing_draws
from continuum.types import State, Time

NOTHING = nullcontext()


@dataclass
class Attempt:
    """A step that was tried from depth t in a piece of the field, between `bounds`: its signed size h and where it ends.

    `shares` are the parts of the step at which a state is wanted. A `final` one ends the piece: nothing uses the slope at its
    new point but the error. `limits` are `bounds` and the tolerances, as a compiled attempt is given them.
    """

    piece: Field
    t: float
    h: float
    end: float
    bounds: tuple[float, float]
    shares: Sequence[float]
    final: bool
    limits: Tensor | None
    accepted: bool = False

    def depth(self, c: float) -> float:
        """The depth of a stage, t + c h."""
        return min(max(self.end if c == 1 else self.t + c * (self.end - self.t), min(self.bounds)), max(self.bounds))


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
        self.whole = compiled_attempt(field, pair)
        self.under_way = True  # afterwards, evaluations repeat those of an attempt and are not counted
        self.stages = pair.c[1:]
        self.rows = pair.a[1:] if pair.reuses_last else (*pair.a[1:], pair.b)

    def cost(self) -> Cost:
        accepted = len(self.ratios)
        return Cost(self.evaluations, accepted, len(self.tried) - accepted, tuple(self.grid), tuple(self.ratios))

    def run(self, x: State) -> list[State]:
        """The states at all times behind the first."""
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
        limits = None
        if self.whole:
            numbers = (min(bounds), max(bounds), self.control.rtol, self.control.atol)
            limits = torch.stack([depth_tensor(number, x) for number in numbers])
        t = start
        wanted = [time for time in self.times if self.way * start < self.way * time < self.way * stop]
        while t != stop:
            # Where nothing is read off between the ends, a step ends at the next requested time.
            goal = stop if self.inner is not None or not wanted else wanted[0]
            run = _Span(self, piece, t, goal, goal == stop, wanted, bounds, limits)
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
        shares = self._shares(t, end, span.wanted) if span.wanted else []
        final = span.last and hits and not shares
        return Attempt(span.piece, t, self.way * size, end, span.bounds, shares, final, span.limits), h

    def stages_of(self, attempt: Attempt, x: State, slope: State, keep: bool) -> tuple[State, list[State], Tensor | None]:
        """The new state, the slopes of all stages, or the last one alone, and, of a compiled attempt, the size of its error."""
        if found := self._in_one(attempt, x, slope):
            return found
        last = len(self.stages) - 1
        sums, end = Sums(x, attempt.h, self.rows, 0 if keep else last + 1), x
        sums.add(slope)
        for stage, c in enumerate(self.stages):
            end = sums.total(stage)
            unused = attempt.final and self.pair.reuses_last and stage == last
            sums.add((self._number if unused else self._slope)(attempt.piece, attempt.depth(c), end))
        if not self.pair.reuses_last:
            end = sums.total(last + 1)
        return end, sums.slopes, None

    def _in_one(self, attempt: Attempt, x: State, slope: State) -> tuple[State, list[State], Tensor] | None:
        """The same by one compiled function; None where there is none, the budget ends in it, or autograd goes forward."""
        if self.whole is None or attempt.limits is None:
            return None
        count = len(self.stages) if self.under_way else 0
        if self.evaluations + count > self.control.max_evaluations:
            return None
        if torch._C._are_functorch_transforms_active() or unpack_dual(slope).tangent is not None:
            return None
        keep = bool(attempt.shares)
        final = attempt.final and self.pair.reuses_last and torch.is_grad_enabled()
        with self._refusing_draws(self.watched < 2 <= self.watched + count, x):
            t, h = depth_tensor(attempt.t, x), depth_tensor(attempt.h, x)
            shared = (self.pair, self.control.norm, attempt.piece)
            found = in_one(self.whole, *shared, x, slope, t, h, attempt.limits, keep, final)
        if found is None:
            return None
        self.evaluations += count
        self.watched += count
        if self.recompute and self.under_way:
            self.recompute.forget()
        end, slopes, size = found
        return end, [slope, *slopes] if keep else slopes, size

    def finished(self, attempt: Attempt, x: State, end: State, slopes: list[State]) -> tuple[State, list[Tensor]]:
        """The slope at the end of an accepted step, and the states wanted inside it, stacked."""
        if not (self.pair.reuses_last or attempt.final):
            slopes = [*slopes, self._slope(attempt.piece, attempt.depth(1), end)]
        last = slopes[-1]
        if not attempt.shares:
            return last, []
        for c, row in self.inner or ():
            slopes = [*slopes, self._slope(attempt.piece, attempt.depth(c), combined(x, attempt.h, row, slopes))]
        return last, [self._between(attempt, x, slopes)]

    def error_of(self, attempt: Attempt, x: State, end: State, slopes: list[State], found: Tensor | None) -> float:
        """The error of an attempt as a part of what the tolerances allow; `found` is what a compiled one knows of it."""
        with torch.no_grad():
            if found is None or self.control.norm == "global":
                if found is None:
                    found = scaled_error(attempt.h, self.pair.e, slopes, x, end, self.control.rtol, self.control.atol)
                found = self.control.size(components(self.field, found))
            return found.item()

    def accept(self, attempt: Attempt, free: float, x: State, slope: State, ratio: float) -> bool:
        """Whether the error meets the tolerance; it also decides the size of the next attempt."""
        size = abs(attempt.h)
        self.tried.append(size)
        if ratio != ratio:
            self._check_finite("the state or its field is not finite", attempt.t, size, x, slope)
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
        with self._refusing_draws(self.watched == 2, x):
            slope = checked(piece(t, x), x)
        if slope.dtype != x.dtype:
            slope = slope.to(x.dtype)
        if self.recompute and self.under_way:
            self.recompute.forget()
        return slope

    def _refusing_draws(self, second: bool, x: State) -> AbstractContextManager[None]:
        return refusing_draws(x.device, self.title) if second and self.field.training else NOTHING

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
        limits: Tensor | None,
    ) -> None:
        self.stepper, self.piece, self.goal, self.last, self.wanted = stepper, piece, goal, last, wanted
        self.bounds, self.limits = bounds, limits
        self.end = t
        self.made: list[Attempt] = []
        self.done = False

    def __call__(self, x: State, slope: State) -> tuple[State, State, list[Tensor]]:
        """The state and the slope at the end, and the states wanted inside each step, stacked."""
        inner: list[Tensor] = []
        for attempt in self.made if self.done else ():
            end, slopes, _ = self.stepper.stages_of(attempt, x, slope, keep=bool(attempt.shares))
            if attempt.accepted:
                x, slope = self._taken(attempt, x, end, slopes, inner)
        if self.done:
            return x, slope, inner
        self.done, accepted = True, 0
        while accepted < max(self.stepper.every, 1) and self.end != self.goal:
            attempt, free = self.stepper.plan(self, x, slope)
            end, slopes, size = self.stepper.stages_of(attempt, x, slope, keep=True)
            ratio = self.stepper.error_of(attempt, x, end, slopes, size)
            attempt.accepted = self.stepper.accept(attempt, free, x, slope, ratio)
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
