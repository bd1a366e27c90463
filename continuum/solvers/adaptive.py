"""Adaptive steps: embedded Runge-Kutta pairs choose h so that the error of each step meets a tolerance.

A field that jumps is solved from knot to knot: each piece is smooth, ends exactly on the knot, and is never evaluated on
its far side. The step size is carried from piece to piece.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import torch

from continuum.fields import Field
from continuum.solvers.base import Solution, Solver, needs_grad, option_text, refuse_noise, restored_on_error, unmoved
from continuum.solvers.compiled import compile_attempts
from continuum.solvers.control import Norm, StepControl
from continuum.solvers.fixed import FixedStep, check_every
from continuum.solvers.pairs import FIXED, METHODS, PAIRS, Embedded, pair_of
from continuum.solvers.stepping import Stepper
from continuum.types import State

Gradient = Literal["direct", "checkpoint", "adjoint", "full_adjoint"]
Engine = Literal["continuum", "torchdiffeq"]


@dataclass(frozen=True)
class Adaptive(Solver):
    """Integrates with an embedded Runge-Kutta pair, each step's error below atol + rtol |x|.

    `gradient` says how the gradient comes back:

    | gradient         | the gradient of              | stored for the backward pass                            |
    | ---------------- | ---------------------------- | ------------------------------------------------------- |
    | `"direct"`       | the accepted steps, exactly  | all evaluations, by autograd                            |
    | `"checkpoint"`   | the same                     | state and first slope of every `every`-th accepted step |
    | `"adjoint"`      | the equation, to a tolerance | the end (arXiv 1806.07366, seminorm: arXiv 2009.09457)  |
    | `"full_adjoint"` | the equation, to a tolerance | the end; parameters take part in the error control      |

    Step sizes are constants of the gradient. Autograd follows the direct one, and the checkpoints of it, wherever it leads:
    into closures, twice, forward, or under torch.func's transforms, where all that vmap runs over shares its steps.

    `engine` is the code that takes the steps. `"continuum"`: torchdiffeq's steps at the cost of their evaluations, for every
    pair. `"torchdiffeq"`: the library's own loop, for SciPy's methods and the adjoints too. None takes the first that fits.

    Args:
        method: one of torchdiffeq's pairs, such as dopri5, dopri8, bosh3, or of SciPy's methods through it.
        rtol: the relative tolerance.
        atol: the absolute tolerance, in units of the state.
        gradient: see above.
        engine: see above.
        norm: the size of an error: the root mean square over the `"batch"`, the largest root mean square of an image
            (`"sample"`: each meets the tolerance, whatever its neighbours; the steps are shared), or that over the batches of
            all ranks (`"global"`: equal steps everywhere). For a tuple of states it is the largest of the components'.
        first_step: the first step size in layers; None lets the field decide.
        min_step: a smaller step size in layers fails.
        max_step: the largest step size in layers.
        max_evaluations: the budget of a solve.
        every: how many accepted steps `"checkpoint"` recomputes together.

    >>> str(Adaptive("dopri5", rtol=1e-4, atol=1e-4))
    'dopri5:rtol=0.0001,atol=0.0001'

    Raises:
        ValueError: an unknown method (the message lists the valid ones), a fixed-grid one, a tolerance or limit out of range,
            or an engine, norm or gradient that does not fit the method.
        TypeError: on solving, a field that draws random numbers at every evaluation; an adjoint's gradient that leads out of
            the field.
        SolveError: on solving: a state not finite, a step below `min_step` or below rounding, or `max_evaluations` spent.
    """

    method: str = "dopri5"
    rtol: float = 1e-3
    atol: float = 1e-3
    gradient: Gradient = "direct"
    engine: Engine | None = None
    norm: Norm = "batch"
    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = float("inf")
    max_evaluations: int = 10_000
    every: int = 1

    def __post_init__(self) -> None:
        if self.method in FIXED:
            raise ValueError(
                f"{self.method!r} is a fixed-grid method: use FixedStep with a scheme, for example FixedStep(RK4(), h=1)"
            )
        if self.method not in METHODS:
            raise ValueError(f"unknown adaptive method {self.method!r}; torchdiffeq has {', '.join(METHODS)}")
        if self.gradient not in get_args(Gradient):
            raise ValueError(f"gradient is one of {', '.join(get_args(Gradient))}, not {self.gradient!r}")
        if self.engine not in (None, *get_args(Engine)):
            raise ValueError(f"engine is one of {', '.join(get_args(Engine))}, not {self.engine!r}")
        check_every(self.every, self.gradient)
        self._check_combination(self.control)

    @property
    def control(self) -> StepControl:
        """Tolerances, norm and limits."""
        return StepControl(self.rtol, self.atol, self.norm, self.first_step, self.min_step, self.max_step, self.max_evaluations)

    @property
    def chosen_engine(self) -> Engine:
        """The engine asked for, or else the fast one where it fits."""
        return self.engine or ("torchdiffeq" if "adjoint" in self.gradient or self.forward_only else "continuum")

    @property
    def forward_only(self) -> bool:
        """Whether the method is SciPy's, which has no gradient."""
        return self.method not in PAIRS

    def _check_combination(self, control: StepControl) -> None:
        if self.forward_only and (control.first_step is not None or self.gradient != "direct" or control.norm != "batch"):
            raise ValueError(f"{self.method} goes forward only, through SciPy: no first_step, no other gradient, no other norm")
        if self.chosen_engine == "continuum" and (self.forward_only or "adjoint" in self.gradient):
            asked = self.method if self.forward_only else f"gradient={self.gradient!r}"
            raise ValueError(f"{asked} is torchdiffeq's: leave the engine out, or say engine='torchdiffeq'")
        if self.chosen_engine == "torchdiffeq" and (self.gradient == "checkpoint" or control.norm == "global"):
            asked = "gradient='checkpoint'" if self.gradient == "checkpoint" else "norm='global'"
            raise ValueError(f"{asked} needs engine='continuum', whose steps it knows: leave the engine out")

    def __str__(self) -> str:
        others = [f for f in fields(self) if f.name not in ("method", "rtol", "atol") and getattr(self, f.name) != f.default]
        options = [f"{name}={option_text(getattr(self, name))}" for name in ("rtol", "atol", *(f.name for f in others))]
        return f"{self.method}:{','.join(options)}"

    @property
    def adaptive(self) -> bool:
        return True

    def direct(self) -> Solver:
        return replace(self, gradient="direct", engine=None, every=1)

    def alone(self) -> Solver:
        return replace(self, norm="batch") if self.norm == "global" else self

    def frozen(self, grid: tuple[float, ...]) -> Solver:
        try:
            return FixedStep(Embedded(self.method), grid=grid)
        except ValueError as error:
            raise TypeError(str(error)) from None

    def compile(self, field: Field) -> None:
        if self.chosen_engine == "continuum":
            compile_attempts(field)
        else:
            super().compile(field)

    def check(self, field: Field) -> None:
        refuse_noise(field, self)

    def __call__(
        self, field: Field, x: State, times: Sequence[float], previous: State | None = None, exact: bool = False
    ) -> Solution:
        self.check(field)
        differentiated = needs_grad(field, x)
        if self.forward_only and differentiated:
            raise RuntimeError(f"{self.method} goes forward only: solve under torch.no_grad(), or with another method")
        if not x.numel() and self.norm != "global":
            return unmoved(field, x, times)
        self._warn_of_rounding(x)
        with restored_on_error(field):
            if self.chosen_engine == "torchdiffeq":
                from continuum.solvers.library import solve_by_library  # torchdiffeq is loaded where it is used

                return solve_by_library(self, field, x, times)
            every = self.every if self.gradient == "checkpoint" and differentiated else 0
            stepper = Stepper(pair_of(self.method), self.control, field, times, self, exact, every)
            return Solution([x, *stepper.run(x)], stepper.cost())

    def _warn_of_rounding(self, x: State) -> None:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if x.is_floating_point() and self.rtol < (eps := torch.finfo(dtype).eps):
            warnings.warn(
                f"{self}: rtol = {self.rtol:g} is below the rounding of a field computed in {str(dtype)[6:]} ({eps:.2g}); "
                "where the error is mostly rounding, steps get shorter in vain: take a looser rtol, or a wider type",
                stacklevel=4,
            )
