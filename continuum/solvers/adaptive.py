"""Adaptive steps: torchdiffeq's embedded Runge-Kutta pairs choose h so that the error of each step meets a tolerance.

A field that jumps is solved from knot to knot: each piece is smooth, ends exactly on the knot, and is never evaluated on
its far side. The step size is carried from piece to piece.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import ClassVar, Literal, cast, get_args

import torch
import torchdiffeq
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver
from torchdiffeq._impl.scipy_wrapper import ScipyWrapperODESolver

from continuum.fields import Field
from continuum.fields.base import checked
from continuum.schemes import RungeKutta, Tableau
from continuum.schemes.base import inside
from continuum.solvers.base import (
    Cost,
    Solution,
    SolveError,
    Solver,
    needs_grad,
    option_text,
    refuse_noise,
    restored_on_error,
    rows_not_finite,
    statistics_untouched,
)
from continuum.types import State, Time

Gradient = Literal["direct", "adjoint"]

PAIRS = tuple(name for name, solver in SOLVERS.items() if issubclass(solver, RKAdaptiveStepsizeODESolver))
METHODS = PAIRS + tuple(name for name, solver in SOLVERS.items() if issubclass(solver, ScipyWrapperODESolver))
"""The adaptive methods of the installed torchdiffeq."""

LOOSER = "Try a looser tolerance, a smoother activation, or a fixed-step solver"


@dataclass(frozen=True)
class Adaptive(Solver):
    """Integrates with torchdiffeq's adaptive `method`, each step's error below atol + rtol |x| (root mean square).

    `gradient="direct"` back-propagates through the accepted steps, whose sizes are constants: the exact gradient of what
    was computed. `"adjoint"` solves the adjoint equation backwards (arXiv 1806.07366) with the seminorm (arXiv 2009.09457):
    memory independent of the steps, gradients only as exact as the tolerance. `first_step`, `min_step` and `max_step` are
    in layers.

    >>> str(Adaptive("dopri5", rtol=1e-4, atol=1e-4))
    'dopri5:rtol=0.0001,atol=0.0001'

    Raises:
        ValueError: an unknown method (the message lists the valid ones), a fixed-grid one, or a limit out of range.
        TypeError: a field with dropout, in training mode.
        SolveError: on solving: a state not finite, a step below `min_step` or below rounding, or `max_evaluations` spent.
    """

    method: str = "dopri5"
    rtol: float = 1e-3
    atol: float = 1e-3
    gradient: Gradient = "direct"
    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = float("inf")
    max_evaluations: int = 10_000

    def __post_init__(self) -> None:
        if self.method in SOLVERS and self.method not in METHODS:
            raise ValueError(
                f"{self.method!r} is a fixed-grid method: use FixedStep with a scheme, for example FixedStep(RK4(), h=1)"
            )
        if self.method not in METHODS:
            raise ValueError(f"unknown adaptive method {self.method!r}; torchdiffeq has {', '.join(METHODS)}")
        if self.gradient not in get_args(Gradient):
            raise ValueError(f"gradient is one of {', '.join(get_args(Gradient))}, not {self.gradient!r}")
        if not (self.rtol >= 0 and self.atol >= 0 and self.rtol + self.atol > 0):
            raise ValueError(f"rtol and atol are not negative and not both zero; got {self.rtol} and {self.atol}")
        if not 0 <= self.min_step <= self.max_step or self.max_step == 0:
            raise ValueError(f"0 <= min_step <= max_step is needed; got {self.min_step} and {self.max_step}")
        if self.first_step is not None and not self.first_step > 0:
            raise ValueError(f"first_step is positive, not {self.first_step}")
        if self.max_evaluations < 1:
            raise ValueError(f"max_evaluations is at least 1, not {self.max_evaluations}")
        if self.method not in PAIRS and (self.first_step is not None or self.gradient == "adjoint"):
            raise ValueError(f"{self.method} goes forward only, through SciPy: it has no first_step and no adjoint")

    def __str__(self) -> str:
        others = [f for f in fields(self) if f.name not in ("method", "rtol", "atol") and getattr(self, f.name) != f.default]
        options = [f"{name}={option_text(getattr(self, name))}" for name in ("rtol", "atol", *(f.name for f in others))]
        return f"{self.method}:{','.join(options)}"

    def check(self, field: Field) -> None:
        refuse_noise(field, str(self))
        for name, module in field.named_modules():
            if isinstance(module, _DropoutNd) and module.p and module.training:
                raise TypeError(
                    f"{name} of this field draws anew at every evaluation, and an adaptive solver would take its noise for an "
                    "error of the step: set its rate to 0, put the network in eval() mode, or take fixed steps"
                )

    def __call__(self, field: Field, x: State, times: Sequence[float], previous: State | None = None) -> Solution:
        self.check(field)  # again, because training may have been switched on since
        if self.method not in PAIRS and needs_grad(field, x):
            raise RuntimeError(f"{self.method} goes forward only: solve under torch.no_grad(), or with another method")
        if not x.numel():  # an empty batch has no error to control
            return Solution([x] * len(times), Cost(0, 0, 0, tuple(times)))
        solve = _Solve(self, field, times[0])
        states = [x]
        with restored_on_error(field):
            for leg in pairwise(times):
                for start, stop in pairwise(_with_knots(field.knots, *leg)):
                    x = solve.piece(x, start, stop)
                states.append(x)
        return Solution(states, solve.cost())


class _Solve:
    """One solve in progress: what torchdiffeq integrates and calls back, counted and checked."""

    def __init__(self, solver: Adaptive, field: Field, start: float) -> None:
        self.solver = solver
        self.field = field
        self.grid = [start]
        self.evaluations = 0
        self.attempts = 0
        self.step = solver.first_step

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
            return cast(Tensor, states)[-1]
        if self.step is None:
            self.step = equation.first_step(x, start, stop)
        states = self._integrate(equation, x, times)
        equation.backward = True  # from here on torchdiffeq calls only for the adjoint
        self.grid[-1] = stop
        return states[-1]

    def _integrate(self, equation: "_Equation", x: State, times: Tensor) -> Tensor:
        solver = self.solver
        # The end is handed over as a step, or torchdiffeq would step past it and interpolate back.
        options = {"first_step": self.step, "max_step": solver.max_step, "step_t": times[1:]}
        backward = {"norm": "seminorm", "max_step": solver.max_step, "step_t": times[:1]}
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
                adjoint_params=tuple(self.field.parameters()),
            )
            return cast(Tensor, states)
        except AssertionError:  # torchdiffeq's way of saying that the state is not finite
            raise equation.error("the state is not finite", self.grid[-1], self.step or 0.0, x) from None


class _Equation:
    """The field on one smooth piece [start, stop], as torchdiffeq sees it: a function of (t, x) with callbacks."""

    def __init__(self, solve: _Solve, start: float, stop: float, x: State) -> None:
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
        self.autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type), x.device.type

    def evaluate(self, t: Time, x: State) -> State:
        solve = self.solve
        if self.clamp and isinstance(t, Tensor):
            t = t.clamp(min(self.first, self.last), max(self.first, self.last))
        if self.backward:
            return self._recompute(t, x)
        if self.known is not None and self.known[0] is x:
            slope, self.known = self.known[1], None
            return slope
        if solve.evaluations >= solve.solver.max_evaluations:
            raise self.error("the evaluation budget is spent", t, 0.0)
        solve.evaluations += 1
        slope = checked(solve.field(t, x), x).to(x.dtype)
        self.recent.append(slope.detach())
        return slope

    __call__ = evaluate

    def _recompute(self, t: Time, x: State) -> State:
        """The field in the adjoint's backward pass: as in the forward pass, and without touching BatchNorm's buffers."""
        self.backward_evaluations += 1
        if self.backward_evaluations > self.solve.solver.max_evaluations:
            raise self.error("the evaluation budget is spent in the adjoint's backward solve", t, 0.0)
        enabled, dtype, device = self.autocast
        with statistics_untouched(self.solve.field), torch.autocast(device, dtype=dtype, enabled=enabled):
            slope = self.solve.field(t, x).to(x.dtype)
        if not torch.isfinite(slope).all():
            raise self.error("the field is not finite in the adjoint's backward solve", t, 0.0, slope)
        return slope

    def first_step(self, x: State, start: float, stop: float) -> float:
        """A first step from the size of the field and of its change (Hairer, Norsett, Wanner I, II.4).

        torchdiffeq's own choice lets the gradient through; here step sizes are constants.
        """
        solver, way = self.solve.solver, 1.0 if stop > start else -1.0
        t = torch.tensor(start, dtype=x.dtype, device=x.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and solver.gradient == "direct"):
            slope = self.evaluate(t, x)
        with torch.no_grad():
            if rows_not_finite(x, slope):
                raise self.error("the state or its field is not finite", start, 0.0, x)
            scale = solver.atol + solver.rtol * x.abs()
            size, speed = _norm(x / scale), _norm(slope / scale)
            h = 1e-6 if size < 1e-5 or speed < 1e-5 else 0.01 * size / speed
            change = _norm((self.evaluate(t + way * h, x + way * h * slope) - slope) / scale) / h
        self.known = x, slope
        fastest = max(speed, change)
        order = SOLVERS[solver.method].order
        h = min(100 * h, (0.01 / fastest) ** (1 / order) if fastest > 1e-15 else max(1e-6, h * 1e-3))
        if not h > 0:  # also when NaN
            raise self.error("the field is not finite", start, h, x)
        return min(h, solver.max_step)

    def callback_step(self, t: Tensor, x: State, h: Tensor) -> None:
        solve, step = self.solve, float(h)
        if not step >= solve.solver.min_step or float(t) + step == float(t):
            broken = rows_not_finite(x, *self.recent)
            reason = "the state or its field is not finite" if broken else "the step size underflows"
            raise self.error(reason, t, step, x)
        solve.attempts += 1
        solve.step = step

    def callback_accept_step(self, t: Tensor, x: State, h: Tensor) -> None:
        end = float(t) + (float(h) if self.last > self.first else -float(h))
        self.solve.grid.append(end)
        self.recent.clear()

    def error(self, reason: str, t: Time, step: float, *states: State) -> SolveError:
        rows = rows_not_finite(*states, *self.recent)
        return SolveError(
            f"{reason} ({self.solve.solver})",
            depth=float(t),
            step=step or self.solve.step or 0.0,
            evaluations=self.solve.evaluations,
            rows=rows,
            advice="Check these inputs and the weights, or lower the learning rate" if rows else LOOSER,
        )


def _with_knots(knots: Sequence[float], start: float, stop: float) -> list[float]:
    """The way from start to stop, cut at the knots strictly between them."""
    between = list(knots[bisect_right(knots, min(start, stop)) : bisect_left(knots, max(start, stop))])
    return [start, *(between if start < stop else between[::-1]), stop]


def _norm(x: Tensor) -> float:
    return float(x.pow(2).mean().sqrt())


@dataclass(frozen=True)
class Embedded(RungeKutta):
    """The Runge-Kutta scheme inside torchdiffeq's adaptive `method`, for fixed steps: what `Flow.frozen` repeats.

    Raises:
        ValueError: the method is not one of torchdiffeq's embedded pairs.
    """

    method: str
    tableaus: ClassVar[dict[str, Tableau]] = {}

    def __post_init__(self) -> None:
        if self.method not in PAIRS:
            raise ValueError(f"no embedded pair {self.method!r}; torchdiffeq has {', '.join(PAIRS)}")

    def __str__(self) -> str:
        return self.method

    @property
    def tableau(self) -> Tableau:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self.method not in self.tableaus:
            pair = SOLVERS[self.method]
            rows = ((), *(tuple(row.tolist()) for row in pair.tableau.beta))
            weights = tuple(pair.tableau.c_sol.tolist())
            # A last stage that only estimates the error is of no use to a fixed step.
            used = len(weights) if weights[-1] else len(weights) - 1
            self.tableaus[self.method] = Tableau(
                c=(0.0, *pair.tableau.alpha.tolist())[:used], a=rows[:used], b=weights[:used], order=pair.order
            )
        return self.tableaus[self.method]
