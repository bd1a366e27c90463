"""torchdiffeq's own code: its steps, its continuous adjoint, and SciPy's solvers through it.

A field that jumps is solved from knot to knot: each piece is smooth, ends exactly on the knot, and is never evaluated on
its far side. The step size is carried from piece to piece.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
import torchdiffeq
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from continuum.fields import Field
from continuum.fields.base import checked
from continuum.schemes.base import inside
from continuum.solvers.base import (
    CHECK_INPUTS,
    LOOSER,
    Cost,
    Solution,
    SolveError,
    check_closed,
    cut_at_knots,
    refuse_create_graph,
    rows_not_finite,
    statistics_untouched,
)
from continuum.solvers.coefficients import COEFFICIENTS
from continuum.solvers.packed import components
from continuum.solvers.pairs import PAIRS
from continuum.solvers.recompute import Precision, holding, refusing_draws, slots_of
from continuum.types import State, Time

if TYPE_CHECKING:
    from continuum.solvers.adaptive import Adaptive


def solve_by_library(solver: "Adaptive", field: Field, x: State, times: Sequence[float]) -> Solution:
    """The states at `times`, each the end of a piece that torchdiffeq integrates."""
    library, states = LibrarySolve(solver, field, times[0]), [x]
    for leg in pairwise(times):
        for start, stop in pairwise(cut_at_knots(field.knots, *leg)):
            x = library.piece(x, start, stop)
        states.append(x)
    return Solution(states, library.cost())


class LibrarySolve:
    """One solve in progress: what torchdiffeq integrates and calls back, counted and checked."""

    def __init__(self, solver: "Adaptive", field: Field, start: float) -> None:
        self.solver = solver
        self.field = field
        self.grid = [start]
        self.evaluations = 0
        self.attempts = 0
        self.step = solver.first_step
        self.adjoint = solver.gradient != "direct" and torch.is_grad_enabled()
        # What the adjoint differentiates with respect to: an alias of each parameter, so that hooks on parameters run once,
        # where autograd hands the whole gradient on, and not at every evaluation of the backward pass.
        self.slots = slots_of([field], buffers=False) if self.adjoint else []
        made = {slot.tensor: slot.tensor.view_as(slot.tensor) for slot in self.slots if slot.tensor.requires_grad}
        self.aliases = {i: made[slot.tensor] for i, slot in enumerate(self.slots) if slot.tensor in made}

    def norm(self, error: Tensor) -> Tensor:
        return self.solver.control.size(components(self.field, error))

    def cost(self) -> Cost:
        accepted = len(self.grid) - 1
        return Cost(self.evaluations, accepted, self.attempts - accepted, tuple(self.grid))

    def piece(self, x: State, start: float, stop: float) -> State:
        """Integrate from `start` to `stop`, between which the field is smooth."""
        solver = self.solver
        equation = _Equation(self, start, stop, x)
        # Times in float64 even on a float32 state; torchdiffeq rounds them where it calls the field.
        times = torch.tensor([start, stop], dtype=torch.float64, device=x.device)
        if solver.method not in PAIRS:
            limits = {key: value for key, value in (("min_step", solver.min_step), ("max_step", solver.max_step)) if value}
            states = torchdiffeq.odeint(
                equation.evaluate, x, times, rtol=solver.rtol, atol=solver.atol, method=solver.method, options=limits
            )
            self.attempts += 1
            self.grid.append(stop)
            end = cast(Tensor, states)[-1]
            if not torch.isfinite(end).all():  # of which SciPy does not speak
                raise equation.error("the state is not finite", stop, 0.0, end)
            return end
        if self.step is None:
            self.step = equation.first_step(x, start, stop)
        states = self._integrate(equation, x, times)
        equation.backward = True  # from here on torchdiffeq calls only for the adjoint
        self.grid[-1] = stop
        return states[-1]

    def _integrate(self, equation: "_Equation", x: State, times: Tensor) -> Tensor:
        solver = self.solver
        # The end is handed over as a step, or torchdiffeq would step past it and interpolate back.
        options = {"first_step": self.step, "max_step": solver.max_step, "step_t": times[1:], "norm": self.norm}
        backward = {"max_step": solver.max_step, "step_t": times[:1]}
        if solver.gradient == "adjoint":
            backward["norm"] = "seminorm"
        tolerances = {"rtol": solver.rtol, "atol": solver.atol}
        try:
            if solver.gradient == "direct":
                states = torchdiffeq.odeint(equation, x, times, **tolerances, method=solver.method, options=options)
                return cast(Tensor, states)
            states = torchdiffeq.odeint_adjoint(
                equation,
                x,
                times,
                **tolerances,
                method=solver.method,
                options=options,
                adjoint_options=backward,
                adjoint_params=tuple(dict.fromkeys(self.aliases.values())),
            )
            return cast(Tensor, _Once.apply(states, str(solver)))
        except AssertionError:  # torchdiffeq's way of saying that the state is not finite
            raise equation.error("the state is not finite", self.grid[-1], self.step or 0.0, x) from None


class _Once(torch.autograd.Function):
    """The states as they are, whose gradient refuses to be differentiated: torchdiffeq's would be a constant, in silence."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, solver: str) -> Tensor:
        ctx.solver = solver
        return states.clone()  # torchdiffeq stores its own, which whoever comes next may change in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        refuse_create_graph(ctx.solver)
        return grad, None


class _Equation:
    """The field on one smooth piece [start, stop], as torchdiffeq sees it: a function of (t, x) with callbacks."""

    def __init__(self, solve: LibrarySolve, start: float, stop: float, x: State) -> None:
        self.solve = solve
        self.backward = False
        self.backward_evaluations = 0
        knots, way = solve.field.knots, stop - start
        # Depths just inside the piece, so that no stage reads a layer beyond a knot.
        self.first = inside(knots, start, way, 0, x.dtype)
        self.last = inside(knots, start, way, 1, x.dtype)
        self.clamp = (self.first, self.last) != (start, stop)
        self.known: tuple[State, State] | None = None  # a state and its slope, evaluated before torchdiffeq asks
        self.recent: list[Tensor] = []  # slopes since the last accepted step, to name the rows at fault
        self.precision = Precision.now(x.device)

    def evaluate(self, t: Time, x: State) -> State:
        solve = self.solve
        if self.clamp and isinstance(t, Tensor):
            t = t.clamp(min(self.first, self.last), max(self.first, self.last))
        if self.backward:
            return self._recompute(t.detach() if isinstance(t, Tensor) else t, x)
        if self.known is not None and self.known[0] is x:
            slope, self.known = self.known[1], None
            return slope
        if solve.evaluations >= solve.solver.max_evaluations:
            raise self.error("the evaluation budget is spent", t, 0.0)
        solve.evaluations += 1
        watch = solve.evaluations == 2 and solve.field.training
        with refusing_draws(x.device, solve.solver) if watch else nullcontext():
            slope = self._adjoint_slope(t, x) if solve.adjoint else checked(solve.field(t, x), x).to(x.dtype)
        self.recent.append(slope.detach())
        return slope

    def _adjoint_slope(self, t: Time, x: State) -> State:
        """f(t, x) as numbers; with a graph while it lasts, for fields that differentiate inside and to see where it leads."""
        x = x.detach().requires_grad_()
        with torch.enable_grad(), holding(self.solve.aliases, self.solve.slots):
            slope = checked(self.solve.field(t, x), x).to(x.dtype)
        self._check_closed(x, slope)
        return slope.detach()

    def _check_closed(self, x: State, slope: State) -> None:
        edge = get_gradient_edge(slope) if slope.requires_grad else None
        check_closed(edge, (x, *self.solve.aliases.values()), str(self.solve.solver))

    __call__ = evaluate

    def _recompute(self, t: Time, x: State) -> State:
        """The field in the adjoint's backward pass: as in the forward pass, and without touching BatchNorm's buffers."""
        self.backward_evaluations += 1
        field = self.solve.field
        if self.backward_evaluations > self.solve.solver.max_evaluations:
            raise self.error("the evaluation budget is spent in the adjoint's backward solve", t, 0.0)
        with statistics_untouched(field), self.precision.again(), holding(self.solve.aliases, self.solve.slots):
            slope = field(t, x).to(x.dtype)
        if torch.is_grad_enabled():
            self._check_closed(x, slope)
        if torch.is_grad_enabled() and not slope.requires_grad:
            slope = slope + 0 * x  # torchdiffeq differentiates it, whatever it depends on
        if not torch.isfinite(slope).all():
            raise self.error("the field is not finite in the adjoint's backward solve", t, 0.0, slope)
        return slope

    def first_step(self, x: State, start: float, stop: float) -> float:
        """A first step size, chosen without a gradient: torchdiffeq's own choice would let it through."""
        solve, solver = self.solve, self.solve.solver
        t = torch.tensor(start, dtype=torch.float64, device=x.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and solver.gradient == "direct"):
            slope = self.evaluate(t, x)
        with torch.no_grad():
            h = solver.control.first(
                self.evaluate,
                lambda state: components(solve.field, state),
                x,
                slope,
                COEFFICIENTS[solver.method].order,
                (start, stop),
            )
        self.known = x, slope
        if not 0 < h < float("inf"):
            self.recent.clear()  # the second evaluation was of a state that is no number
            broken = self.rows(x, slope)
            reason = "the state or its field is not finite" if broken else "the field is not finite near the start"
            raise self.error(reason, start, 0.0, x, slope)
        return h

    def callback_step(self, t: Tensor, x: State, h: Tensor) -> None:
        solve, step = self.solve, float(h)
        if not step >= solve.solver.min_step or float(t) + step == float(t):
            broken = self.rows(x, *self.recent)
            reason = "the state or its field is not finite" if broken else "the step size underflows"
            raise self.error(reason, t, step, x)
        solve.attempts += 1
        solve.step = step

    def callback_step_adjoint(self, t: Tensor, x: State | tuple[State, ...], h: Tensor) -> None:
        """Look at the state of the backward pass before each of its steps: torchdiffeq would raise an AssertionError."""
        parts, step = (x if isinstance(x, tuple) else (x,)), float(h)
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise self.error("a gradient is not finite in the adjoint's backward solve", t, abs(step))
        if not float(t) + step != float(t):
            raise self.error("the step size underflows in the adjoint's backward solve", t, abs(step))

    def callback_accept_step(self, t: Tensor, x: State, h: Tensor) -> None:
        end = float(t) + (float(h) if self.last > self.first else -float(h))
        self.solve.grid.append(end)
        self.recent.clear()

    def error(self, reason: str, t: Time, step: float, *states: State) -> SolveError:
        rows = self.rows(*states, *self.recent)
        return SolveError(
            f"{reason} ({self.solve.solver})",
            depth=float(t),
            step=step or self.solve.step or 0.0,
            evaluations=self.solve.evaluations,
            rows=rows,
            advice=CHECK_INPUTS if rows else LOOSER,
        )

    def rows(self, *states: State) -> list[int]:
        return rows_not_finite(*(part for state in states for part in components(self.solve.field, state)))
