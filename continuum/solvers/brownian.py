"""All steps of a stochastic equation, dx = a(t, x) dt + b(t, x) dB in Ito's sense, by torchsde's methods on a Brownian path.

torchsde takes the single steps and knows the path, the grid is ours: its own loop takes one step too many for about half of
all step sizes, and evaluates the field once before it starts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from continuum.fields import Field
from continuum.noise.base import has_noise, noises, stochastic_fields, without_noise
from continuum.schemes import Euler, EulerMaruyama, Heun
from continuum.schemes.base import inside, knot_at
from continuum.schemes.stochastic import check_batch_statistics, check_path_gradient
from continuum.solvers.adaptive import Adaptive
from continuum.solvers.base import Cost, Solution, Solver, Step, cut_at_knots, needs_grad, option_text, restored_on_error
from continuum.solvers.fixed import FixedStep
from continuum.types import State

Gradient = Literal["direct", "adjoint"]

METHODS = ("euler", "milstein", "srk")
STRATONOVICH = ("midpoint", "heun", "euler_heun", "reversible_heun", "adjoint_reversible_heun", "log_ode")


@dataclass(frozen=True)
class Brownian(Solver):
    """Integrates the drift and diffusion of stochastic fields with torchsde's Ito `method`, on a new path for every solve.

    | method     | strong order | evaluations a step         |
    | "euler"    | 1/2          | 1                          |
    | "milstein" | 1            | 1, and two backward passes |
    | "srk"      | 3/2          | 6                          |

    Steps are those of `FixedStep`, 1/m or an integer of layers. With `rtol` and `atol` they are chosen so that a step and its
    two halves agree, h is the first, and `max_evaluations` is the budget of a solve. The path comes from torch's global CPU
    generator: one seed, one path.

    `gradient="direct"` is the exact gradient of the steps taken. "adjoint" solves the adjoint equation backwards on the same
    path (arXiv 2001.01328): memory independent of the steps, and a gradient that is only as exact as they are small.

    In evaluation mode the drift alone is solved, by the solver of `without_noise`.

    >>> from continuum.fields import MLP
    >>> from continuum.noise import StochasticDepth
    >>> field = StochasticDepth(MLP(2, hidden=4), 0.8, per="image")
    >>> solver = Brownian("milstein", h=1 / 4)
    >>> solver(field, torch.ones(3, 2), (0.0, 1.0)).states[-1].shape
    torch.Size([3, 2])
    >>> str(solver), str(solver.without_noise())
    ('brownian:method=milstein,h=0.25', 'euler:h=0.25')

    Raises:
        ValueError: a method that is unknown or of Stratonovich's calculus, an h that is no step, one tolerance without the
            other, tolerances with "euler", an unknown gradient; on solving, depths that go down.
        TypeError: a field without noise or with noise inside other fields, layers whose noise differs in kind, noise on entries
            that see each other (`Dropout`), except by "euler" with the direct gradient; on solving, where a gradient is wanted,
            shake-shake's backward modes other than "keep", and BatchNorm in training mode by "milstein" or the adjoint.
        SolveError: on solving, a drift, diffusion or state that is not finite, an adaptive step below 1e-5 layers, or
            `max_evaluations` spent by adaptive steps.
    """

    method: str = "euler"
    h: float = 1
    rtol: float | None = field(default=None, kw_only=True)
    atol: float | None = field(default=None, kw_only=True)
    max_evaluations: int = field(default=10_000, kw_only=True)
    gradient: Gradient = field(default="direct", kw_only=True)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            kind = "of Stratonovich's calculus" if self.method in STRATONOVICH else "unknown"
            raise ValueError(f"the method {self.method!r} is {kind}; equations are Ito here: euler, milstein or srk")
        if self.gradient not in get_args(Gradient):
            raise ValueError(f"gradient is one of {', '.join(get_args(Gradient))}, not {self.gradient!r}")
        self._fixed()  # which knows what a step may be
        if self.max_evaluations < 1:
            raise ValueError(f"max_evaluations is at least 1, not {self.max_evaluations}")
        if self.rtol is None and self.atol is None:
            return
        if self.rtol is None or self.atol is None:
            raise ValueError(f"steps are adaptive with both tolerances; got rtol={self.rtol} and atol={self.atol}")
        if not (self.rtol >= 0 and self.atol >= 0 and 0 < self.rtol + self.atol < float("inf")):
            raise ValueError(f"rtol and atol are not negative and not both zero; got {self.rtol} and {self.atol}")
        if self.method == "euler":
            raise ValueError(
                "adaptive steps of Euler-Maruyama need not converge where the noise depends on the state: take milstein or srk "
                "with tolerances, or euler without"
            )

    def __str__(self) -> str:
        options: dict[str, object] = {"method": self.method, "h": self.h, "rtol": self.rtol, "atol": self.atol}
        if self.max_evaluations != 10_000:
            options["max_evaluations"] = self.max_evaluations
        if self.gradient != "direct":
            options["gradient"] = self.gradient
        return "brownian:" + ",".join(f"{name}={option_text(value)}" for name, value in options.items() if value is not None)

    def steps(self, start: float, stop: float) -> list[Step] | None:
        """The steps (t, h) from `start` to `stop`; None where tolerances choose them."""
        return None if self.rtol is not None else self._fixed().steps(start, stop)

    def _fixed(self) -> FixedStep:
        return FixedStep(EulerMaruyama("brownian"), self.h)

    def without_noise(self) -> Solver:
        if self.rtol is not None and self.atol is not None:
            return Adaptive("dopri5", self.rtol, self.atol)
        return FixedStep(Heun() if self.method == "srk" else Euler(), self.h)

    def direct(self) -> Solver:
        return replace(self, gradient="direct")

    def refined(self, k: int) -> Solver:
        return replace(self, h=cast(FixedStep, self._fixed().refined(k)).h)

    @property
    def adaptive(self) -> bool:
        return self.rtol is not None

    def check(self, field: Field) -> None:
        if not has_noise(field):
            raise TypeError(
                f"Brownian needs a StochasticField such as StochasticDepth(f, 0.8) or layers of them; this "
                f"{type(field).__name__} has no noise. Take a deterministic solver, such as {self.without_noise()}"
            )
        EulerMaruyama("brownian").check(field)
        fields = noises(field)
        kinds = {"an entry" if noisy.noise == "diagonal" else f"for each {noisy.per}" for noisy in fields}
        if len(kinds) > 1:
            raise TypeError(
                f"all layers of a flow share one Brownian path: their noise is one number {' or '.join(sorted(kinds))}, not "
                "both; give the layers one kind of noise, and one per"
            )
        plain = self.method == "euler" and self.gradient == "direct"
        for noisy in fields:
            if noisy.noise == "diagonal" and not noisy.separable and not plain:
                raise TypeError(
                    f"{self} needs one noise for all entries, or entries that do not see each other; in "
                    f"{type(noisy).__name__} they do. Take the method 'euler' with the direct gradient"
                )

    def __call__(
        self, field: Field, x: State, times: Sequence[float], previous: State | None = None, exact: bool = False
    ) -> Solution:
        if not any(noisy.training for noisy in stochastic_fields(field)):
            return self.without_noise()(without_noise(field), x, times)
        start, stop = times[0], times[-1]
        if stop < start:
            raise ValueError(f"a stochastic solve has no way back: depth goes up, not from {start:g} to {stop:g}")
        if not x.numel():  # an empty batch moves along no path
            return Solution([x] * len(times), Cost(0, 0, 0, tuple(times)))
        legs = [list(self._pieces(field, *leg)) for leg in pairwise(times)]
        adjoint = torch.is_grad_enabled() and self.gradient == "adjoint"
        differentiated = adjoint or needs_grad(field, x) or (torch.is_grad_enabled() and self.method != "milstein")
        if differentiated:
            self._check_gradient(field, x)
        try:
            from continuum.solvers.ito import Adjoint, Closed, Rule, Solve  # torchsde is loaded where it is used
        except ImportError as error:
            raise ImportError(
                f"Brownian solves take torchsde's own steps, known to work with 0.2.6; the one installed lacks them: {error}"
            ) from error
        with restored_on_error(field), torch.set_grad_enabled(differentiated):
            closed = Closed(field) if adjoint else None
            rule = Rule(self.method, self.h, self.rtol, self.atol, self.max_evaluations)
            solve = Solve(rule, field, x, start, stop, closed)
            y, states = solve.y, [x]
            for leg in legs:
                for points in leg:
                    if adjoint:
                        y = cast(Tensor, Adjoint.apply(solve, points, y, *_parameters(field, points, x.dtype)))
                    else:
                        y = solve.forth(y, points)
                states.append(y.reshape(x.shape))
            if not torch.isfinite(y).all():
                raise solve.failure()
        return Solution(states, solve.cost())

    def _check_gradient(self, field: Field, x: State) -> None:
        """Raise TypeError for a gradient that is not one of the path, or that torch cannot compute."""
        thrice = self.method == "milstein" or self.gradient == "adjoint"
        for noisy in noises(field):
            if not noisy.training:
                continue
            check_path_gradient(noisy, x)
            if thrice and noisy.noise == "scalar":
                check_batch_statistics(noisy, str(self))

    def _pieces(self, field: Field, start: float, stop: float) -> Iterator[list[float]]:
        """The way from start to stop, from knot to knot, each piece with the depths where steps are known to end."""
        steps = self.steps(start, stop)
        points = cut_at_knots(field.knots, start, stop) if steps is None else [*(t for t, _ in steps), stop]
        first = 0
        for index, depth in enumerate(points[1:], 1):
            if index == len(points) - 1 or knot_at(field.knots, depth) is not None:
                yield points[first : index + 1]
                first = index


def _parameters(field: Field, points: Sequence[float], dtype: torch.dtype) -> list[Tensor]:
    """What a piece has gradients for: the parameters of its layer, or of all where a step goes over knots."""
    start, stop = points[0], points[-1]
    if not any(start < knot < stop for knot in field.knots):
        field = field.at(inside(field.knots, start, stop - start, 0, dtype))
    return [parameter for parameter in field.parameters() if parameter.requires_grad]
