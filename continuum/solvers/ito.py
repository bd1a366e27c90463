"""One solve of dx = a(t, x) dt + b(t, x) dB in progress: the field and its Brownian path, as torchsde wants and gives them."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast
from weakref import WeakMethod, finalize

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torchsde import BrownianInterval, ReverseBrownian
from torchsde._core import misc
from torchsde._core.adjoint_sde import AdjointSDE
from torchsde._core.base_sde import BaseSDE
from torchsde._core.methods import select

from continuum.fields import Field
from continuum.fields.base import checked
from continuum.noise import StochasticField
from continuum.noise.base import noise_of, noises, terms
from continuum.schemes.base import inside
from continuum.schemes.stochastic import self_derivative
from continuum.solvers.base import (
    LOOSER,
    Cost,
    SolveError,
    check_closed,
    refuse_create_graph,
    rows_not_finite,
    statistics_untouched,
)
from continuum.solvers.recompute import aliases_of, holding, slots_of
from continuum.types import State

SMALLEST = 1e-5
"""The smallest adaptive step in layers, torchsde's own; it would go on with a warning there, and we stop."""

CHECK = "Check these inputs and the weights; a lower learning rate or smaller steps may help"


@dataclass(frozen=True)
class Rule:
    """How steps are taken: torchsde's method, and the step, which is the first one if there are tolerances."""

    method: str
    h: float
    rtol: float | None
    atol: float | None
    max_evaluations: int = 10_000

    @property
    def adaptive(self) -> bool:
        return self.rtol is not None

    def on(self, equation: BaseSDE, path: Any, method: str | None = None) -> Any:
        """torchsde's solver of an equation on a path, by this method or another one."""
        return select(method or self.method, "ito")(
            sde=equation,
            bm=path,
            dt=float(self.h),
            adaptive=self.adaptive,
            rtol=self.rtol,
            atol=self.atol,
            dt_min=0.0,
            options={},
        )


def _rows(noisy: StochasticField, x: State) -> int:
    """How many numbers the field draws for x, each for all entries behind some leading axes: one for none, an image for one."""
    size = noisy.size(x)
    if size not in [(*x.shape[:axes], *[1] * (x.dim() - axes)) for axes in range(x.dim() + 1)]:
        raise TypeError(
            f"Brownian paths are shared by whole rows, with one number for the batch, an image or a channel of it; "
            f"{type(noisy).__name__} draws numbers of shape {size} for states of shape {tuple(x.shape)}. Take EulerMaruyama()"
        )
    return math.prod(size)


Values = tuple[Tensor, Tensor, Tensor]


class Equation(BaseSDE):
    """A stochastic field for torchsde: a(t, y) and b(t, y) of flat states y, evaluated together, and once for each (t, y).

    The entries of y in one row share a noise or have one each: a row is an image, or the batch where that has one number for
    all, or what else the field draws a number for. torchsde calls the noise "scalar" or "diagonal".
    """

    def __init__(self, field: Field, x: State, rule: Rule, closed: "Closed | None") -> None:
        noisy = noises(field)[0]
        super().__init__(noise_type=noisy.noise, sde_type="ito")
        self.field = field
        self.shape = x.shape
        self.rows = len(x) if noisy.noise == "diagonal" else _rows(noisy, x)
        self.milstein = rule.method == "milstein"
        self.budget = rule.max_evaluations if rule.adaptive else math.inf  # fixed steps are as many as was asked for
        self.closed = closed
        self.backward = False  # whether the adjoint equation is solved now: that is not counted, and derives b itself
        self.evaluations = self.backward_evaluations = 0
        self.known: list[tuple[float, Tensor, Values]] = []
        self.seen: list[Values] = []  # since the step began

    def begin(self, a: float, b: float, y: Tensor) -> None:
        """What follows is a step from y at depth a to depth b; a stage on a knot reads the layer on the step's side."""
        self.start = a
        self.first = inside(self.field.knots, a, b - a, 0, y.dtype)
        self.last = inside(self.field.knots, a, b - a, 1, y.dtype)
        self.known = [known for known in self.known if known[1] is y]
        self.seen = []

    def values(self, t: Tensor, y: Tensor) -> Values:
        """a, b and, for Milstein's method, (b . grad) b."""
        depth = float(t)
        if self.backward:
            self.backward_evaluations += 1
            self._check_budget(self.backward_evaluations, depth)
            return self._evaluate(depth, y)
        for at, state, values in self.known:
            if at == depth and state is y:
                return values
        self.evaluations += 1
        self._check_budget(self.evaluations, depth)
        values = self._evaluate(depth, y)
        self.known.append((depth, y, values))
        self.seen.append(values)
        return values

    def _check_budget(self, spent: int, depth: float) -> None:
        if spent > self.budget:
            where = " in the adjoint's backward solve" if self.backward else ""
            step = abs(self.last - self.first)
            raise SolveError(
                f"the evaluation budget is spent{where}", depth=depth, step=step, evaluations=spent - 1, advice=LOOSER
            )

    def _evaluate(self, depth: float, y: Tensor) -> Values:
        if self.closed is None:
            return self._terms(depth, y)
        # With a graph in the forward pass too, to see where it leads while that can still be told.
        y = y if self.backward else y.detach().requires_grad_()
        with torch.set_grad_enabled(torch.is_grad_enabled() or not self.backward), self.closed.parameters():
            values = self._terms(depth, y)
        self.closed.check(y, values)
        return values if self.backward else tuple(value.detach() for value in values)  # pyright: ignore[reportReturnType]

    def _terms(self, depth: float, y: Tensor) -> Values:
        t, x = min(max(depth, self.first), self.last), y.reshape(self.shape)
        layer = self.field.at(t)
        noisy = noise_of(layer)
        noise = along = None
        if noisy is None or not noisy.training:
            moved = layer(t, x)
        elif self.milstein and not self.backward:
            moved, noise, along = self_derivative(layer, t, x)
        else:
            moved, noise = terms(layer, t, x)

        def flat(value: State | None) -> Tensor:
            return torch.zeros_like(y) if value is None else checked(value, x).to(y.dtype).reshape(y.shape)

        return flat(moved), flat(noise), flat(along)

    # What torchsde calls; v is an increment of the path, or a multiple.

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        # The last stage of srk asks for the drift at the start of the step once more, in order to give it the weight zero.
        if self.known and float(t) == self.start:
            return self.known[0][2][0]
        return self.values(t, y)[0]

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return self._column(self.values(t, y)[1])

    def f_and_g(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        drift, diffusion, _ = self.values(t, y)
        return drift, self._column(diffusion)

    def _column(self, diffusion: Tensor) -> Tensor:
        return diffusion if self.noise_type == "diagonal" else diffusion[..., None]

    def prod(self, g: Tensor, v: Tensor) -> Tensor:
        return (g if self.noise_type == "diagonal" else g[..., 0]) * v  # not torchsde's bmm, which autocast would round

    def g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self.values(t, y)[1] * v

    def f_and_g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        drift, diffusion, _ = self.values(t, y)
        return drift, diffusion * v

    def g_prod_and_gdg_prod(self, t: Tensor, y: Tensor, v1: Tensor, v2: Tensor) -> tuple[Tensor, Tensor]:
        # torchsde's own takes sum_j b_j db_j/dx_i from one backward pass. Milstein's method needs sum_j b_j db_i/dx_j: the same
        # where the Jacobian is symmetric, and otherwise its strong order falls from 1 to 1/2.
        _, diffusion, along = self.values(t, y)
        return diffusion * v1, along * v2


class Closed:
    """A field whose gradients the adjoint takes with respect to aliases of its parameters, and no other tensor's."""

    def __init__(self, field: Field) -> None:
        self.slots = slots_of([field], buffers=False)
        self.aliases = aliases_of(self.slots)

    def parameters(self) -> AbstractContextManager[None]:
        """Inside the block the aliases stand for the parameters."""
        return holding(self.aliases, self.slots)

    def alias(self, parameter: Tensor) -> Tensor:
        return next(alias for i, alias in self.aliases.items() if self.slots[i].tensor is parameter)

    def check(self, y: Tensor, values: Values) -> None:
        """Raise TypeError if the values have the gradient of another tensor than the state and the aliases."""
        for value in values:
            if value.requires_grad:
                check_closed(get_gradient_edge(value), (y, *self.aliases.values()), "the adjoint of a Brownian solve")


class Solve:
    """The path of one solve, torchsde's method on it, and what has been spent."""

    def __init__(self, rule: Rule, field: Field, x: State, start: float, stop: float, closed: Closed | None = None) -> None:
        self.rule = rule
        self.field = field
        self.closed = closed
        self.equation = Equation(field, x, rule, closed)
        self.y = x.reshape(self.equation.rows, -1)
        self.path = BrownianInterval(
            t0=start,
            t1=stop,
            size=tuple(self.y.shape) if self.equation.noise_type == "diagonal" else (len(self.y), 1),
            dtype=x.dtype,
            device=x.device,
            # torchsde's default is NumPy's global generator, which torch.manual_seed does not set.
            entropy=int(torch.randint(2**62, (), device="cpu")),
            dt=None if rule.adaptive else rule.h,
            levy_area_approximation="space-time" if rule.method == "srk" else "none",
        )
        # A path is a tree that refers to itself; its increments would wait with it for the garbage collector.
        finalize(self, getattr(self.path, "_increment_and_space_time_levy_area_cache", {}).clear)
        self.method = rule.on(self.equation, self.path)
        self.take = self.method.step
        # torchsde's adaptive loop calls it too. A strong reference would keep every path until the next garbage collection.
        step = WeakMethod(self.step)
        self.method.step = lambda *state: cast(Any, step())(*state)
        self.grid: list[float] = []
        self.end = self.stop = stop
        self.calls = 0
        self.attempt = (start, start, self.y)
        self.autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type), x.device.type

    def cost(self) -> Cost:
        # An adaptive attempt is three steps: the whole one, and its two halves, which are what is kept.
        attempts = self.calls // 3 if self.rule.adaptive else self.calls
        return Cost(self.equation.evaluations, len(self.grid), attempts - len(self.grid), (*self.grid, self.end))

    def forth(self, y: Tensor, points: Sequence[float]) -> Tensor:
        """The state at the last of `points`, between whose ends the field is smooth: over each, or by steps of torchsde's."""
        if not self.rule.adaptive:
            for a, b in pairwise(points):
                y, _ = self.step(_depths(a), _depths(b), y, ())
            return y
        self.stop = points[-1]
        try:
            states, _ = self.method.integrate(y, _depths(points), ())
        except (AssertionError, ZeroDivisionError):  # torchsde's error estimate is not finite
            raise self.failure() from None
        return states[-1]

    def step(self, t0: Tensor, t1: Tensor, y: Tensor, extra: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """torchsde's step from y at depth t0 to depth t1."""
        a, b = float(t0), float(t1)
        if not self.rule.adaptive or self.calls % 3 == 0:
            self.attempt = a, b, y
            if not self.grid or a != self.grid[-1]:  # an attempt at the same depth says that the last one was rejected
                self.grid.append(a)
            if self.rule.adaptive and b - a < SMALLEST and b < self.stop:
                raise self._error("the step size underflows", a, b, LOOSER)
        self.calls += 1
        self.equation.begin(a, b, y)
        return self.take(t0, t1, y, extra)

    def back(self, points: Sequence[float], end: Tensor, gradient: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The gradients at the first of `points`, with respect to the state and each parameter, by the adjoint equation."""
        parts = [end, gradient, *(torch.zeros_like(p) for p in parameters)]
        shapes = [part.shape for part in parts]
        # As torchsde chooses: its adjoint equation for one noise a row lacks what Milstein's method would need.
        method = "milstein" if self.equation.noise_type == "diagonal" else "euler"
        adjoint = AdjointSDE(self.equation, list(parameters), shapes)  # pyright: ignore[reportArgumentType]
        solver = self.rule.on(adjoint, ReverseBrownian(self.path), method)
        state = misc.flatten(parts)[None]
        self.equation.backward = True
        self.equation.begin(points[0], points[-1], end)
        enabled, dtype, device = self.autocast
        with statistics_untouched(self.field), torch.autocast(device, dtype=dtype, enabled=enabled):
            if self.rule.adaptive:
                try:
                    state = solver.integrate(state, -_depths(points[::-1]), ())[0][-1]
                except (AssertionError, ZeroDivisionError):
                    raise self._error("the adjoint's backward solve is not finite", points[0], points[-1], LOOSER) from None
            else:
                for a, b in list(pairwise(points))[::-1]:
                    self.equation.begin(a, b, end)
                    state, _ = solver.step(-_depths(b), -_depths(a), state, ())
        return misc.flat_to_shape(state[0], shapes)[1:]

    def failure(self) -> SolveError:
        """The error that says what is not finite first: fixed steps are all taken again on the same path, else the last."""
        spent = self.equation.evaluations
        if self.rule.adaptive:
            a, b, y = self.attempt
            tries = [[a, b], [a, 0.5 * (a + b), b]]
        else:
            a, b, y = self.grid[-1], self.end, self.y
            tries = [[*self.grid, self.end]]
            self.equation.evaluations = 0
        for points in tries:
            if error := self._look(y, points):
                error.evaluations = spent if self.rule.adaptive else error.evaluations
                return error
        return self._error("the state is not finite", a, b, CHECK)

    @torch.no_grad()
    def _look(self, y: Tensor, points: Sequence[float]) -> SolveError | None:
        """Steps over `points` with a look at each drift, diffusion and state; BatchNorm's statistics stay as they are."""
        if rows := self._rows(y):
            return self._error("the state is not finite", points[0], points[0], CHECK, rows)
        self.equation.known = []
        with statistics_untouched(self.field):
            for a, b in pairwise(points):
                self.equation.begin(a, b, y)
                y, _ = self.take(_depths(a), _depths(b), y, ())
                for drift, diffusion, _ in self.equation.seen:
                    for name, value in (("drift", drift), ("diffusion", diffusion)):
                        if rows := self._rows(value):
                            return self._error(f"the {name} is not finite", a, b, CHECK, rows)
                if rows := self._rows(y):
                    return self._error("the state is not finite", a, b, CHECK, rows)
        return None

    def _rows(self, y: Tensor) -> list[int]:
        return rows_not_finite(y.reshape(self.equation.shape))

    def _error(self, reason: str, a: float, b: float, advice: str, rows: Sequence[int] = ()) -> SolveError:
        return SolveError(reason, depth=a, step=b - a, evaluations=self.equation.evaluations, rows=rows, advice=advice)


class Adjoint(torch.autograd.Function):
    """`forth` over the points of a piece, with the gradients of `back`; of its states only the last is stored."""

    @staticmethod
    def forward(ctx, solve, points, y, *parameters):  # pyright: ignore
        end = solve.forth(y.detach(), points)
        ctx.solve, ctx.points = solve, points
        ctx.save_for_backward(end, *parameters)
        return end

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore
        refuse_create_graph("the adjoint of a Brownian solve")
        end, *parameters = ctx.saved_tensors
        aliases = [ctx.solve.closed.alias(parameter) for parameter in parameters]
        return None, None, *ctx.solve.back(ctx.points, end, gradient, aliases)


def _depths(depths: float | Sequence[float]) -> Tensor:
    """As torchsde wants depths: exact on a float32 state too, and on the CPU, where a look at them stalls nothing."""
    return torch.tensor(depths, dtype=torch.float64)
