"""A layer of continuous depth: x(0) -> x(T) with dx/dt = f(t, x), integrated by a solver of your choice."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from continuum.fields import Field
from continuum.fields.base import as_field, checked, in_mode_of
from continuum.fields.given import given
from continuum.integral import Integrand, augmented
from continuum.noise.base import has_noise, without_noise
from continuum.schemes.base import inside
from continuum.solvers import Cost, Solver, parse
from continuum.solvers.base import Solution, evaluating, statistics_untouched
from continuum.solvers.compiled import compile_field, compile_whole
from continuum.solvers.packed import Packed, pack
from continuum.types import State, StateOrStates, States


class Flow(nn.Module):
    """The map x(0) -> x(depth) of dx/dt = field(t, x); depth is counted in layers.

    The weights are the field's: `with_solver` integrates the same weights otherwise. A solver may be given as text.
    `cost` holds evaluations, accepted and rejected steps and the grid of the last solve.

    A state is a tensor, or a tuple of tensors where the field takes a tuple and returns one slope for each. Under autocast a
    state that comes in half precision is taken to float32: the field computes in half precision, the sums do not.

    A depth that is a 0-dim parameter is learnt, with dx(depth)/d depth = field(depth, x(depth)), and `depth` is its value now.
    The steps must be free to end where it goes, so the solver is an adaptive one.

    Args:
        field: f, a `Field` or a module with `forward(t, x)`.
        solver: what takes the steps, or its text.
        depth: how far to integrate, in layers.

    >>> from continuum.fields import MLP
    >>> flow = Flow(MLP(2, hidden=16), "dopri5:rtol=1e-4,atol=1e-4", depth=1)
    >>> x = torch.randn(8, 2)
    >>> flow(x).shape
    torch.Size([8, 2])
    >>> flow.with_solver("rk4:h=0.25")(x).shape
    torch.Size([8, 2])

    Raises:
        TypeError: the field is no field, or the solver cannot solve it; a depth is learnt under fixed steps or noise, or is
            computed from something learnt.
        ValueError: the depth is not positive or not the one that the field is made for, the solver's fixed step does not
            divide it, or the field's knots are not in order.
    """

    def __init__(self, field: nn.Module, solver: Solver | str, depth: float | Tensor) -> None:
        super().__init__()
        self.field = as_field(field, "a Flow")
        self.solver = parse(solver) if isinstance(solver, str) else solver
        if not isinstance(self.solver, Solver):
            raise TypeError(f"a Flow needs a Solver or its text, not {solver!r}")
        if isinstance(depth, Tensor) and depth.dim():
            raise ValueError(f"depth is one number, a 0-dim tensor, not a tensor of shape {tuple(depth.shape)}")
        if not depth > 0:
            raise ValueError(f"depth is a positive number of layers, not {_number(depth)}")
        learnt = isinstance(depth, nn.Parameter) or (isinstance(depth, Tensor) and depth.requires_grad)
        if learnt and not cast(Tensor, depth).is_leaf:
            raise TypeError(
                "this depth is computed from something learnt, and its graph would last for one backward pass: give an "
                "nn.Parameter, and map it with torch.nn.utils.parametrize.register_parametrization(flow, 'end', ...)"
            )
        if isinstance(depth, Tensor) and not learnt:
            depth = self.solver.depths(depth.reshape(1))[0]
        self.end: float | Tensor = depth if learnt else float(depth)
        self.refined = 1
        self.cost: Cost | None = None
        self.solver.check(self.field)
        self._check_depths(learnt)

    def _check_depths(self, learnt: bool) -> None:
        """Raise an error where the field or the solver does not fit the depth."""
        knots, extent = self.field.knots, self.field.extent
        if any(a >= b for a, b in pairwise(knots)):
            raise ValueError(f"knots are depths in increasing order; those of this {type(self.field).__name__} are {knots}")
        if learnt:
            return self._check_learnt()
        if extent is not None and abs(self.depth - extent) > 1e-9 * extent:
            raise ValueError(
                f"this {type(self.field).__name__} is defined from depth 0 to {extent:g}, not to {self.depth:g}: give the Flow "
                f"depth={extent:g}, or a field of another depth"
            )
        self.solver.steps(0.0, self.depth)

    @property
    def depth(self) -> float:
        """The depth in layers; where it is learnt, its value now."""
        return _number(self.end)

    def __call__(self, x: StateOrStates, memory: State | None = None, context: Sequence[Any] = ()) -> StateOrStates:
        if not len(context):
            return super().__call__(x) if memory is None else super().__call__(x, memory)
        if self._compiled_call_impl is None:
            return super().__call__(x, memory, context)
        compile_field(self.field)  # no graph holds a field that is made for a call
        return self._call_impl(x, memory, context)  # pyright: ignore[reportReturnType]

    def forward(self, x: StateOrStates, memory: State | None = None, context: Sequence[Any] = ()) -> StateOrStates:
        """x(depth) from x = x(0).

        Args:
            x: the state, or a tuple of states.
            memory: the state one layer before x, for schemes that remember one.
            context: further arguments, which the field gets at every evaluation, field(t, x, *context): a mask, an encoder's
                output, a control. Gradients reach the tensors among them, also in nested tuples, lists and dictionaries.

        Raises:
            TypeError: a tuple of states with a `memory`, or under a solver that cannot carry it; a context that the field
                does not take.
            ValueError: a learnt depth that is not positive any more.
        """
        depth = self.depth
        if not depth > 0:
            raise ValueError(
                f"depth is a positive number of layers, and training has taken it to {depth:g}: clamp it after each step, or "
                "lower its learning rate"
            )
        return cast(StateOrStates, self._solve(x, (0.0, depth), (0.0, self.end), memory, context=context)[-1])

    def _solve(
        self,
        x: States,
        depths: Sequence[float],
        times: Sequence[float | Tensor],
        memory: State | None = None,
        exact: bool = False,
        context: Sequence[Any] = (),
    ) -> list[States]:
        """The states at `depths`; `times` are the same, as tensors where they may have a gradient."""
        field = self.field if isinstance(context, tuple) and not context else given(self.field, context)
        if not isinstance(x, tuple):
            x = _widened(x)
            previous = None if memory is None else self._one_layer_before(x, _widened(memory))
            return [*self._carry(field, x, depths, times, previous, exact)]
        if memory is not None:
            raise TypeError("schemes remember one tensor, so a tuple of states has no memory: pass the tuple alone")
        x = tuple(map(_widened, x))
        flat, packed = pack(x), Packed(field, [part.shape for part in x])
        try:
            self.solver.check(packed)
        except TypeError as error:
            raise TypeError(f"{self.solver} cannot carry a tuple of states: {error}") from None
        return [packed.split(state) for state in self._carry(packed, flat, depths, times, None, exact)]

    def _carry(
        self,
        field: Field,
        x: State,
        depths: Sequence[float],
        times: Sequence[float | Tensor],
        previous: State | None,
        exact: bool,
    ) -> list[State]:
        """The solver's states, and their gradients with respect to `times`, which no solver needs to know."""
        moving = [(i, t) for i, t in enumerate(times) if isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled()]
        if not moving:
            solution = self._solution(field, x, depths, previous, exact)
            self.cost = solution.cost
            return solution.states
        self._check_times()
        start = x
        if moving[0][0] == 0:  # to start later is to start from less far along the slope
            start = _Moving.apply(x, moving[0][1], -_slope(field, x, depths[0], depths[1] - depths[0], 0))
        solution = self._solution(field, start, depths, previous, exact)
        self.cost = replace(solution.cost, evaluations=solution.cost.evaluations + len(moving))
        states = [x, *solution.states[1:]]  # the state at the first time is the given one, whatever that time
        for i, t in moving:
            if i > 0:
                slope = _slope(field, states[i], depths[i - 1], depths[i] - depths[i - 1], 1)
                states[i] = _Moving.apply(states[i], t, slope)
        return states

    def _solution(self, field: Field, x: State, depths: Sequence[float], previous: State | None, exact: bool) -> Solution:
        if torch.compiler.is_compiling() and not self.solver.one_graph:
            from continuum.solvers.between_graphs import solve_between_graphs  # the compiler is loaded only where it is used

            return solve_between_graphs(self.solver, field, x, depths, previous, exact)  # pyright: ignore[reportCallIssue]
        return self.solver(field, x, depths, previous, exact)

    def _check_learnt(self) -> None:
        """Raise TypeError if no gradient could move the depth."""
        if has_noise(self.field):
            raise TypeError(f"depth cannot be learnt here: {NO_DERIVATIVE}")
        if not self.solver.adaptive:
            raise TypeError(
                f"a learnt depth leaves the grid of {self.solver}: take an adaptive solver, such as dopri5, or a number, the "
                "depth as it is now: Flow(flow.field, solver, flow.depth), or flow.frozen(x)"
            )

    def _check_times(self) -> None:
        """Raise TypeError or RuntimeError if the solution has no derivative with respect to times."""
        if has_noise(self.field):
            raise TypeError(f"times and depth have no gradient here: {NO_DERIVATIVE}")
        if self.solver.forward_only:
            raise RuntimeError(f"{self.solver} goes forward only: solve under torch.no_grad(), or with another method")

    def _one_layer_before(self, x: State, memory: State) -> State:
        """The previous state that the solver is given: where layers are refined, `memory` lies one original layer before x,
        and this is the state one refined layer before, on the straight line between them.
        """
        return memory if self.refined == 1 else torch.lerp(x, memory, 1 / self.refined)

    def compile(self) -> None:
        """Compile this flow in place: its class, state dict and results (to rounding) stay.

        Fixed steps become one graph, for each depth and step one of its own. How many steps an adaptive solve takes is not
        known beforehand, so there each attempted step is one function of depth and step. Where steps are taken back
        (`gradient="reversible"`), derived (`Milstein`) or another library's, the evaluations of the field are compiled.
        """
        if self.solver.one_graph:
            compile_whole(self)
        else:
            self.solver.compile(self.field)

    def states(self, x: StateOrStates, memory: State | None = None, context: Sequence[Any] = ()) -> list[StateOrStates]:
        """What `forward` passes through: x, and the state after each step.

        Raises:
            TypeError: the solver does not have fixed steps.
        """
        steps = self.solver.steps(0.0, self.depth)
        if steps is None:
            raise TypeError(f"only fixed steps are known beforehand; this flow is solved by {self.solver}")
        times = [*(t for t, _ in steps), self.depth]
        return cast(list[StateOrStates], self._solve(x, times, times, memory, True, context))

    def trajectory(
        self,
        x: StateOrStates,
        times: Sequence[float | Tensor] | Tensor,
        exact: bool = False,
        context: Sequence[Any] = (),
    ) -> StateOrStates:
        """The states at `times`, stacked on a new first axis; x is the state at times[0]. Of a tuple, a tuple of such stacks.

        Times are strictly monotone, in either direction: (depth, 0) goes back. Those that require grad have the gradients of
        the equation, dx(t)/dt = field(t, x(t)); where the field jumps, the one on the side that the solve passes through.

        Between the first time and the last, states are read off the steps, by the dense output of the adaptive method or,
        between the points of a fixed grid, by Hermite's cubic: many times cost nearly nothing, and change no step.

        Args:
            x: the state at times[0], or a tuple of states.
            times: two or more depths in layers, shape (n,).
            exact: whether a step ends at every time instead, so that states have the error of the end.
            context: further arguments of the field, as in `forward`.

        Raises:
            ValueError: fewer than two times, times that are not monotone or of another shape; where times must be ends of steps
                (`exact` or noise), times that are not.
            TypeError: times that require grad where the field has noise.
        """
        if isinstance(times, Tensor) and times.dim() != 1:
            raise ValueError(
                f"times are depths common to the batch, shape (n,), not {tuple(times.shape)}: solve samples with times "
                "of their own one by one, or all of them at the sorted union of their times"
            )
        depths = self.solver.depths(times) if isinstance(times, Tensor) else [_number(t) for t in times]
        steps = [b - a for a, b in pairwise(depths)]
        if not steps or not (all(h > 0 for h in steps) or all(h < 0 for h in steps)):
            raise ValueError(f"times are two or more strictly monotone depths, not {depths}")
        states = self._solve(x, depths, times.unbind() if isinstance(times, Tensor) else times, None, exact, context)
        if isinstance(x, tuple):
            return tuple(map(torch.stack, zip(*states, strict=True)))
        return torch.stack(cast(list[Tensor], states))

    def integral(
        self, x: State, integrand: Integrand, memory: State | None = None, context: Sequence[Any] = ()
    ) -> tuple[State, Tensor]:
        """x(depth), and the integral of integrand(t, x, dx/dt) over [0, depth] for every image, from one solve of both.

        The integral is one more component of the state, a' = integrand(t, x, f(t, x)) with a(0) = 0, so it has the order and
        the gradients of the solver. An adaptive solver meets its tolerance for it too, and may take other steps than alone.
        The integrand sees dx/dt as a function of x, and may differentiate it: torch.autograd.grad(slope, x, ...).

        >>> from continuum.fields import Autonomous
        >>> flow = Flow(Autonomous(nn.Identity()), "rk4:h=0.125", depth=1)
        >>> end, length = flow.integral(torch.ones(1, 1), lambda t, x, slope: slope.abs().sum(1))
        >>> print(f"{end.item():.3f} {length.item():.3f}")  # e, and the way there
        2.718 1.718

        Raises:
            TypeError: a scheme that needs single states, such as LM-ResNet's, Fractal or Verlet; a field with noise.
            ValueError: an integrand that does not return one number an image.
        """
        flow = self.with_integral(integrand)
        if memory is not None and self.solver.remembers:
            raise TypeError(
                f"{self.solver} starts from two states here, and the integral before the first is unknown. {OTHERS}"
            )
        x = _widened(x)
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()  # so that the integrand can differentiate with respect to all states
        end, total = flow((x, x.new_zeros(len(x))), context=context)
        self.cost = flow.cost
        return end, total

    def with_integral(self, integrand: Integrand) -> "Flow":
        """The flow of the pair (x, a), a' = integrand(t, x, dx/dt), with the weights and the solver of this one.

        Raises:
            TypeError: the solver cannot carry the pair.
        """
        self.solver.check(self.field)
        try:
            flow = self._like(augmented(self.field, integrand), self.solver)
            self.solver.check(Packed(flow.field, ()))
        except TypeError as error:
            raise TypeError(f"{self.solver} cannot carry an integral beside the state. {OTHERS}") from error
        return flow

    def with_solver(self, solver: Solver | str) -> "Flow":
        """A flow of the same field, sharing its weights, under another solver."""
        return self._like(self.field, solver)

    def with_field(self, field: Field, solver: Solver | str | None = None) -> "Flow":
        """A flow of another field up to the same depth, under the same solver or another one."""
        return self._new(field, solver or self.solver, self.depth)

    def _like(self, field: Field, solver: Solver | str) -> "Flow":
        """The flow of another field or solver, with the depth and the mode of this one."""
        # A regulariser may have moved the end for a while, to where the field is not made for.
        flow = self._new(field, solver, self.end if field.extent is None or isinstance(self.end, Tensor) else field.extent)
        flow.end, flow.refined = self.end, self.refined
        return flow

    def _new(self, field: Field, solver: Solver | str, depth: float | Tensor) -> "Flow":
        """A flow in the place of this one, in its mode."""
        return in_mode_of(self, Flow(field, solver, depth))

    def drift(self) -> "Flow":
        """The flow of the drift, the field without its noise: deterministic, with the same weights, and open to every solver.

        A stochastic solver becomes the deterministic one it is without noise; any other flow keeps its own.

        >>> from continuum.fields import MLP
        >>> from continuum.noise import StochasticDepth
        >>> str(Flow(StochasticDepth(MLP(2, hidden=16), 0.5), "euler_maruyama:h=0.5", depth=1).drift().solver)
        'euler:h=0.5'
        """
        return self._like(without_noise(self.field), self.solver.without_noise())

    @torch.no_grad()
    def frozen(self, x: StateOrStates, context: Sequence[Any] = ()) -> "Flow":
        """The flow that repeats, for any input, the steps which the adaptive solver accepts on `x`.

        A learnt depth is frozen with them, at its value now.

        Its solver is a `FixedStep` with the method's own tableau on the accepted grid: no error control, so it compiles and
        exports, and on `x` it gives the adaptive solution (to rounding for the pairs whose last stage is f at the new point:
        dopri5, dopri8, bosh3; adaptive_heun and fehlberg2 reuse another slope, so they agree only to the tolerance).

        Raises:
            TypeError: the solver has fixed steps already, or goes through SciPy.
        """
        if not self.solver.adaptive:
            self.solver.frozen((0.0, self.depth))  # says what is missing
        with evaluating(self):
            self._solve(x, (0.0, self.depth), (0.0, self.depth), context=context)
        grid = cast(Cost, self.cost).grid
        flow = self._new(self.field, self.solver.frozen(grid), grid[-1])
        flow.refined = self.refined
        return flow

    def refine(self, k: int) -> "Flow":
        """The flow with k steps in the place of one, for training to go on at a finer level (arXiv 1710.10348).

        Under `PiecewiseConstant` a layer becomes k copies of itself, each scaled by 1/k, and the depth k times what it was:
        f_i -> f_i / k, ..., f_i / k. Any other field stays on its depth and a fixed step h becomes h / k; an adaptive solver
        remains. Nothing is shared with this flow: weights are copied, and a learnt depth is a parameter of its own.

        >>> from continuum.fields import MLP
        >>> str(Flow(MLP(2, hidden=16), "euler:h=0.5", depth=1).refine(2).solver)
        'euler:h=0.25'

        Raises:
            ValueError: k is no integer of at least 2, h / k is no step, or the solver steps over a grid.
        """
        if not isinstance(k, int) or k < 2:
            raise ValueError(f"refine puts k steps in the place of one: k is an integer of at least 2, not {k!r}")
        solver = self.solver.refined(k)
        divided = self.field.divided(k)
        if divided is not None:
            flow = self._new(divided, self.solver, _copied(self.end, k))
            flow.refined = k * self.refined
        else:
            flow = self._new(copy.deepcopy(self.field), solver, _copied(self.end, 1))
            flow.refined = self.refined
        return flow

    def extra_repr(self) -> str:
        return f"solver={self.solver}, depth={self.depth:g}"


NO_DERIVATIVE = "a Brownian path has no derivative in time. Take the deterministic flow, flow.drift(), or numbers without grad"


OTHERS = "Take a solver that steps any field, such as euler, rk4 or dopri5"


class _Moving(torch.autograd.Function):
    """The state x at depth t as it is, with dx/dt = slope for the gradient of t."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.device, ctx.dtype = t.device, t.dtype
        return x.clone()  # a view of x could not be changed in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "derivatives with respect to times and depth exist once only: leave create_graph=False, or take times and a "
                "depth that do not require grad"
            )
        (slope,) = ctx.saved_tensors
        # Of a complex state, the part of the change that is along the gradient.
        along = (grad.conj() * slope).real if slope.is_complex() else grad * slope
        return grad, along.sum().to(ctx.device, ctx.dtype), None


def _slope(field: Field, x: State, t: float, h: float, c: float) -> State:
    """dx/dt at depth t + c h, on the side of the step, without gradient and without leaving a trace in the field."""
    with torch.no_grad(), statistics_untouched(field):
        return checked(field(inside(field.knots, t, h, c, x.dtype), x), x).to(x.dtype)


def _widened(x: Tensor) -> Tensor:
    """x in float32 where autocast handed it over in half precision: sums over many steps would lose their small terms."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled(x.device.type) else x


def _number(t: float | Tensor) -> float:
    return float(t.detach()) if isinstance(t, Tensor) else float(t)


def _copied(depth: float | Tensor, k: int) -> float | Tensor:
    """k times a depth, which learns if it did."""
    return nn.Parameter(k * depth.detach(), depth.requires_grad) if isinstance(depth, Tensor) else k * depth
