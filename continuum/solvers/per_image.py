"""Per-image steps: dx/dt = f(x) where every image has a step size of its own, h_i, by the optional library torchode.

One step of the batch is one step of each image, x_i + h_i sum_j b_j k_ij, so that the images are at different depths at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from continuum.fields import Field
from continuum.fields.base import checked
from continuum.solvers.base import (
    CHECK_INPUTS,
    LOOSER,
    Cost,
    Solution,
    SolveError,
    Solver,
    option_text,
    refuse_noise,
    restored_on_error,
    unmoved,
)
from continuum.solvers.control import StepControl
from continuum.solvers.packed import Packed
from continuum.solvers.recompute import Precision
from continuum.types import BatchNorm, State, Time

METHODS: dict[str, str] = {"dopri5": "Dopri5", "tsit5": "Tsit5", "adaptive_heun": "Heun"}
"""torchode's names of the methods by ours."""

ONE_FOR_ALL = "take one sequence of steps for the whole batch, as Adaptive does"


@dataclass(frozen=True)
class PerImage(Solver):
    """Integrates each image with steps of its own; the root mean square of a step's error is below atol + rtol |x|.

    What an image gets does not depend on the others. It is evaluated for as long as any of them is under way, and steps of
    length zero are stored for the gradient too: both cost as many steps as the image with the most takes. The gradient is the
    exact one of these steps, whose sizes are constants. States between the first time and the last are read from the method's
    interpolation, so that asking for them changes no step; their error can be ten times that of the end.

    In the cost, `evaluations` are calls of the field with the whole batch, `accepted` and `rejected` the steps of the image
    with the most; `grid` is empty, for there is no grid common to all.

    Args:
        method: dopri5, tsit5 or adaptive_heun.
        rtol: the relative tolerance.
        atol: the absolute tolerance, in units of the state.
        first_step: the first step size in layers; None lets the field decide.
        min_step: a smaller step size in layers fails.
        max_step: the largest step size in layers.
        max_evaluations: the budget of a solve.

    >>> str(PerImage("tsit5", rtol=1e-4, atol=1e-4))
    'per_image:method=tsit5,rtol=0.0001,atol=0.0001'

    Raises:
        ValueError: a method that torchode lacks, a tolerance or limit out of range; on solving, a state without features behind
            its batch axis.
        TypeError: a field that depends on depth, batch statistics, noise, or a tuple of states.
        ImportError: on solving, torchode is not installed.
        SolveError: on solving: a state not finite, a step below `min_step` or below rounding, or `max_evaluations` spent.
    """

    method: str = "dopri5"
    rtol: float = 1e-3
    atol: float = 1e-3
    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = float("inf")
    max_evaluations: int = 10_000

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"steps of each image are taken by one of {', '.join(METHODS)}; torchode has no {self.method!r}")
        StepControl(self.rtol, self.atol, "sample", self.first_step, self.min_step, self.max_step, self.max_evaluations)

    def __str__(self) -> str:
        others = [f.name for f in fields(self)[3:] if getattr(self, f.name) != f.default]
        options = (f"{name}={option_text(getattr(self, name))}" for name in ("method", "rtol", "atol", *others))
        return f"per_image:{','.join(options)}"

    @property
    def adaptive(self) -> bool:
        return True

    def frozen(self, grid: tuple[float, ...]) -> Solver:
        raise TypeError(f"steps of each image have no grid common to all that could be frozen: {ONE_FOR_ALL}")

    def check(self, field: Field) -> None:
        refuse_noise(field, self)
        check_per_image(field)

    def __call__(
        self, field: Field, x: State, times: Sequence[float], previous: State | None = None, exact: bool = False
    ) -> Solution:
        self.check(field)
        if x.ndim < 2:
            raise ValueError(f"steps of each image need a state (batch, features, ...), not one of shape {tuple(x.shape)}")
        if not x.numel():
            return unmoved(field, x, times)
        legs = list(pairwise(times)) if exact else [times]
        states, costs = [x], []
        with restored_on_error(field):
            for leg in legs:
                found, cost = _Solve(self, field, states[-1], leg).run()
                states += found
                costs.append(cost)
        spent = [sum(getattr(cost, name) for cost in costs) for name in ("evaluations", "accepted", "rejected")]
        return Solution(states, Cost(spent[0], spent[1], spent[2], ()))


def check_per_image(field: Field) -> None:
    """Raise TypeError if `field` jumps in depth or mixes images, so that they cannot go their own ways.

    Whether a smooth field reads the depth only its evaluation shows: `PerImage` hands it a depth that cannot be read.
    """
    if isinstance(field, Packed):
        raise TypeError(
            "a tuple of states is carried as one flat tensor, which has no row for each image: lay the states side by side on "
            f"axis 1 of one state, or {ONE_FOR_ALL}"
        )
    if field.knots:
        raise TypeError(
            f"with steps of their own, images are at different depths at once, and this {type(field).__name__} jumps at "
            f"{field.knots}: {ONE_FOR_ALL}"
        )
    for name, module in field.named_modules():
        if isinstance(module, BatchNorm) and (module.training or module.running_mean is None):
            raise TypeError(
                f"{name} is a {type(module).__name__} that takes the statistics of the batch, so the images are one equation "
                f"and cannot have steps of their own: put it in eval() mode, take nn.GroupNorm, or {ONE_FOR_ALL}"
            )


def _torchode() -> Any:
    try:
        import torchode
    except ImportError as error:
        raise ImportError("steps of each image are taken by torchode, which is not installed: pip install torchode") from error
    return torchode


def _read(*_: object, **__: object) -> NoReturn:
    raise TypeError(
        "this field reads the depth, and with steps of their own images are at different depths at once, where a field knows "
        f"one: give it another field, f(x) alone, or {ONE_FOR_ALL}"
    )


class _Unreadable:
    """The depth of an autonomous field: it may be passed on, and raises TypeError at any use.

    A NaN would show in a product, but not in a comparison.
    """

    __torch_function__ = classmethod(_read)
    __getattr__ = _read


BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow")
OTHERS = "neg pos abs round trunc floor ceil bool int float complex index lt le gt ge eq ne hash str format len iter getitem"
for _name in (*BINARY, *(f"r{name}" for name in BINARY), *OTHERS.split()):
    setattr(_Unreadable, f"__{_name}__", _read)


class _Solve:
    """One solve in progress: the field as torchode calls it, and torchode's controller of the steps with a look at each.

    torchode's own limits are not used: its shortest step fails every image that is finished before the others, and its
    largest number of steps one that is finished by the last of them.
    """

    def __init__(self, solver: PerImage, field: Field, x: State, times: Sequence[float]) -> None:
        self.solver, self.torchode = solver, _torchode()
        self.status = self.torchode.Status
        self.controller = self.torchode.IntegralController(solver.atol, solver.rtol, dt_max=solver.max_step)
        self.field = field.at(times[0])  # the only one: there are no knots
        self.depth = cast(Time, _Unreadable())
        self.shape, self.times, self.stop = x.shape, times, times[-1]
        self.way = 1.0 if times[-1] > times[0] else -1.0
        self.evaluations = 0
        # The depth and state of each image and the step it was last tried with.
        self.t = torch.full((len(x),), times[0], dtype=torch.float64, device=x.device)
        self.h = torch.zeros_like(self.t)
        self.x = x.flatten(1)
        self.precision = Precision.now(x.device)

    def run(self) -> tuple[list[State], Cost]:
        """The states at all times behind the first, and what they cost."""
        torchode, x, first_step = self.torchode, self.x, self.solver.first_step
        term = torchode.ODETerm(self.evaluate, with_stats=False)
        stepper = getattr(torchode, METHODS[self.solver.method])(term=term)
        loop = torchode.AutoDiffAdjoint(stepper, self, backprop_through_step_size_control=False)
        start, *between, stop = (torch.full((len(x),), t, dtype=torch.float64, device=x.device) for t in self.times)
        problem = torchode.InitialValueProblem(x, start, stop, torch.stack(between, dim=1) if between else None)
        step = None if first_step is None else torch.full_like(start, self.way * first_step)
        # Under autocast torchode would sum its stages in half precision; only the field is meant to be.
        with torch.autocast(x.device.type, enabled=False):
            solution = loop.solve(problem, term=term, dt0=step)
            self.check(solution.status)
        states = [solution.ys[:, i].reshape(self.shape) for i in range(len(between))]
        steps, accepted = solution.stats["n_steps"], solution.stats["n_accepted"]
        slowest = int(steps.argmax())
        cost = Cost(self.evaluations, int(accepted[slowest]), int(steps[slowest] - accepted[slowest]), ())
        return [*states, self.x.reshape(self.shape)], cost

    def evaluate(self, t: Tensor, x: Tensor) -> Tensor:
        if self.evaluations >= self.solver.max_evaluations:
            raise self.error("the evaluation budget is spent", self.under_way(self.t), LOOSER)
        self.evaluations += 1
        images = x.reshape(self.shape)
        with self.precision.again():
            slope = checked(self.field(self.depth, images), images)
        return slope.to(x.dtype).flatten(1)

    def under_way(self, t: Tensor) -> Tensor:
        """Which images have not reached the end."""
        return self.way * t < self.way * self.stop

    def check(self, status: Tensor) -> None:
        """Raise SolveError if torchode stopped before the end."""
        worst = int(status.max())
        if worst == self.status.REACHED_DT_MIN.value:
            raise self.error("the step size underflows", status == worst, LOOSER)
        if worst != self.status.SUCCESS.value:
            raise self.error("the state or its field is not finite", status == worst, CHECK_INPUTS)

    def error(self, reason: str, at_fault: Tensor, advice: str) -> SolveError:
        rows = torch.nonzero(at_fault).flatten().tolist()
        return SolveError(
            f"{reason} ({self.solver})",
            depth=float(self.t[rows[0]]),
            step=float(self.h[rows[0]].abs().nan_to_num()),
            evaluations=self.evaluations,
            rows=rows,
            advice=advice,
        )

    # What torchode asks a controller for.

    def init(self, term: Any, problem: Any, order: int, dt0: Tensor | None, *, stats: Any, args: Any) -> Any:
        h, state, slope = self.controller.init(term, problem, order, dt0, stats=stats, args=args)
        return h.clamp(-self.solver.max_step, self.solver.max_step), state, slope

    def adapt_step_size(self, t: Tensor, h: Tensor, x: Tensor, step: Any, state: Any, stats: Any) -> Any:
        accept, after, state, status = self.controller.adapt_step_size(t, h, x, step, state, stats)
        under_way = self.under_way(t)
        taken = accept & under_way
        stuck = (t + h == t) | (~accept & (after.abs() < self.solver.min_step))
        status = torch.where(stuck & (status == self.status.SUCCESS.value), self.status.REACHED_DT_MIN.value, status)
        self.t, self.h = torch.where(taken, t + h, t), h
        # torchode reads the end from its interpolation too, where up to a hundred units in the last place are lost.
        self.x = torch.where(taken[:, None], step.y, x)
        return accept, after, state, torch.where(under_way, status, self.status.SUCCESS.value)

    def merge_states(self, running: Tensor, current: Any, previous: Any) -> Any:
        return self.controller.merge_states(running, current, previous)
