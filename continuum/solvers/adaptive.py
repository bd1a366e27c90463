"""Adaptive steps: embedded Runge-Kutta pairs choose h so that the error of each step meets a tolerance.

A field that jumps is solved from knot to knot: each piece is smooth, ends exactly on the knot, and is never evaluated on
its far side. The step size is carried from piece to piece.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch.nn.modules.dropout import _DropoutNd
from torchdiffeq._impl.odeint import SOLVERS

from continuum.fields import Field
from continuum.solvers.base import (
    Cost,
    Solution,
    Solver,
    cut_at_knots,
    needs_grad,
    option_text,
    refuse_noise,
    restored_on_error,
)
from continuum.solvers.discrete_adjoint import solve
from continuum.solvers.fixed import FixedStep
from continuum.solvers.library import LibrarySolve
from continuum.solvers.norms import Norm
from continuum.solvers.pairs import METHODS, PAIRS, Embedded, pair_of
from continuum.solvers.per_image import PER_IMAGE_METHODS, check_per_image, solve_per_image
from continuum.solvers.stepping import Keep, Stepper
from continuum.types import State

Gradient = Literal["direct", "checkpoint", "adjoint", "full_adjoint"]
Engine = Literal["continuum", "torchdiffeq", "torchode"]


@dataclass(frozen=True)
class Adaptive(Solver):
    """Integrates with torchdiffeq's adaptive `method`, each step's error below atol + rtol |x|.

    `gradient` says how the gradient comes back. `"direct"`: the exact gradient of the accepted steps, whose sizes are
    constants, through the stored graph of every evaluation. `"checkpoint"`: the same gradient; stores the state and first
    slope of every accepted step and evaluates the others again, step by step. `"adjoint"`: solves the adjoint equation
    backwards (arXiv 1806.07366) with the seminorm (arXiv 2009.09457), in memory independent of the steps, only as exact as the
    tolerance; `"full_adjoint"` has the gradients of the parameters take part in the error control, torchdiffeq's default.

    `norm` is the size of an error: the root mean square over the `"batch"`, the largest root mean square of an image
    (`"sample"`: each meets the tolerance, whatever its neighbours; the steps are shared), or that over the batches of all
    ranks (`"global"`: equal steps everywhere). For a tuple of states it is the largest of the components'.

    `engine` is the code that takes the steps. `"continuum"`, where the pair allows it: torchdiffeq's steps at the cost of their
    evaluations. `"torchdiffeq"`: the library's own, for its other pairs, SciPy's methods and the adjoints; its direct gradient
    can be differentiated again. `"torchode"`: steps for each image alone, for autonomous fields (`pip install torchode`).
    None takes the first of these that fits. `first_step`, `min_step` and `max_step` are in layers.

    >>> str(Adaptive("dopri5", rtol=1e-4, atol=1e-4))
    'dopri5:rtol=0.0001,atol=0.0001'

    Raises:
        ValueError: an unknown method (the message lists the valid ones), a fixed-grid one, a limit out of range, or an engine,
            norm or gradient that does not fit the method.
        TypeError: a field with dropout, in training mode; on solving, a gradient that leads out of the field.
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

    def __post_init__(self) -> None:
        if self.method in SOLVERS and self.method not in METHODS:
            raise ValueError(
                f"{self.method!r} is a fixed-grid method: use FixedStep with a scheme, for example FixedStep(RK4(), h=1)"
            )
        if self.method not in METHODS and not (self.engine == "torchode" and self.method in PER_IMAGE_METHODS):
            raise ValueError(f"unknown adaptive method {self.method!r}; torchdiffeq has {', '.join(METHODS)}")
        for name, valid in (("gradient", Gradient), ("engine", Engine | None), ("norm", Norm)):
            choices = [choice for part in get_args(valid) for choice in (get_args(part) or (part,))]
            if (value := getattr(self, name)) not in choices and not (name == "engine" and value is None):
                raise ValueError(f"{name} is one of {', '.join(c for c in choices if isinstance(c, str))}, not {value!r}")
        if not (self.rtol >= 0 and self.atol >= 0 and self.rtol + self.atol > 0):
            raise ValueError(f"rtol and atol are not negative and not both zero; got {self.rtol} and {self.atol}")
        if not 0 <= self.min_step <= self.max_step or self.max_step == 0:
            raise ValueError(f"0 <= min_step <= max_step is needed; got {self.min_step} and {self.max_step}")
        if self.first_step is not None and not self.first_step > 0:
            raise ValueError(f"first_step is positive, not {self.first_step}")
        if self.max_evaluations < 1:
            raise ValueError(f"max_evaluations is at least 1, not {self.max_evaluations}")
        self._check_combination()

    @property
    def chosen_engine(self) -> Engine:
        """The engine asked for, or else the fast one where it fits."""
        fits = self.method in PAIRS and pair_of(self.method).reuses_last and "adjoint" not in self.gradient
        return self.engine or ("continuum" if fits else "torchdiffeq")

    @property
    def _forward_only(self) -> bool:
        """Whether the method is SciPy's."""
        return self.method in METHODS and self.method not in PAIRS

    def _check_combination(self) -> None:
        engine = self.chosen_engine
        if self._forward_only and (self.first_step is not None or self.gradient != "direct" or self.norm != "batch"):
            raise ValueError(f"{self.method} goes forward only, through SciPy: no first_step, no other gradient, no other norm")
        if engine != "torchdiffeq" and "adjoint" in self.gradient:
            raise ValueError(f"gradient={self.gradient!r} is torchdiffeq's: leave the engine out, or say engine='torchdiffeq'")
        if engine == "torchdiffeq" and self.gradient == "checkpoint":
            fast = [name for name in PAIRS if pair_of(name).reuses_last]
            raise ValueError(f"gradient='checkpoint' needs engine='continuum' and one of {', '.join(fast)}, not {self.method}")
        if engine == "torchdiffeq" and self.norm == "global":
            raise ValueError("norm='global' needs engine='continuum': torchdiffeq's steps are chosen rank by rank")
        if engine == "continuum" and not (self.method in PAIRS and pair_of(self.method).reuses_last):
            raise ValueError(
                f"engine='continuum' takes pairs whose last stage is the next first one, and that of {self.method} is not: "
                "leave the engine out"
            )
        if engine == "torchode" and self.method not in PER_IMAGE_METHODS:
            raise ValueError(f"engine='torchode' has {', '.join(PER_IMAGE_METHODS)}, not {self.method}")
        if engine == "torchode" and (self.norm != "sample" or self.gradient != "direct"):
            raise ValueError(
                "engine='torchode' controls the error of each image and differentiates its steps: it needs norm='sample' and "
                "gradient='direct'"
            )

    def __str__(self) -> str:
        others = [f for f in fields(self) if f.name not in ("method", "rtol", "atol") and getattr(self, f.name) != f.default]
        options = [f"{name}={option_text(getattr(self, name))}" for name in ("rtol", "atol", *(f.name for f in others))]
        return f"{self.method}:{','.join(options)}"

    @property
    def adaptive(self) -> bool:
        return True

    def direct(self) -> Solver:
        return replace(self, gradient="direct", engine=None)

    def alone(self) -> Solver:
        return replace(self, norm="batch") if self.norm == "global" else self

    def frozen(self, grid: tuple[float, ...]) -> Solver:
        try:
            return FixedStep(Embedded(self.method), grid=grid)
        except ValueError as error:
            raise TypeError(str(error)) from None

    def check(self, field: Field) -> None:
        refuse_noise(field, str(self))
        if self.chosen_engine == "torchode":
            check_per_image(field)
        for name, module in field.named_modules():
            if isinstance(module, _DropoutNd) and module.p and module.training:
                raise TypeError(
                    f"{name} of this field draws anew at every evaluation, and an adaptive solver would take its noise for an "
                    "error of the step: set its rate to 0, put the network in eval() mode, or take fixed steps"
                )

    def __call__(self, field: Field, x: State, times: Sequence[float], previous: State | None = None) -> Solution:
        self.check(field)  # again, because training may have been switched on since
        differentiated = needs_grad(field, x)
        if self._forward_only and differentiated:
            raise RuntimeError(f"{self.method} goes forward only: solve under torch.no_grad(), or with another method")
        if not x.numel() and self.norm != "global":  # an empty batch has no error to control
            if differentiated:  # gradients of zero, because DistributedDataParallel would wait for them
                x = x + 0 * sum(p.sum() for p in field.parameters() if p.requires_grad)
            return Solution([x] * len(times), Cost(0, 0, 0, tuple(times)))
        self._warn_of_rounding(x)
        if self.chosen_engine == "torchode":
            return solve_per_image(
                field,
                x,
                times,
                method=self.method,
                rtol=self.rtol,
                atol=self.atol,
                first_step=self.first_step,
                min_step=self.min_step,
                max_step=self.max_step,
                max_evaluations=self.max_evaluations,
            )
        with restored_on_error(field):
            if self.chosen_engine == "continuum":
                kept: dict[Gradient, Keep] = {"direct": "graphs", "checkpoint": "states"}
                keep = kept[self.gradient] if differentiated else "nothing"
                stepper = Stepper(self, field, times, keep, x.device)
                return Solution([x, *solve(stepper, x)], stepper.cost())
            library, states = LibrarySolve(self, field, times[0]), [x]
            for leg in pairwise(times):
                for start, stop in pairwise(cut_at_knots(field.knots, *leg)):
                    x = library.piece(x, start, stop)
                states.append(x)
            return Solution(states, library.cost())

    def _warn_of_rounding(self, x: State) -> None:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if x.is_floating_point() and self.rtol < (eps := torch.finfo(dtype).eps):
            warnings.warn(
                f"{self}: rtol = {self.rtol:g} is below the rounding of a field computed in {str(dtype)[6:]} ({eps:.2g}); "
                "where the error is mostly rounding, steps get shorter in vain: take a looser rtol, or a wider type",
                stacklevel=4,
            )
