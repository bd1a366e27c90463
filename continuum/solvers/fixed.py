"""Fixed steps: x_{n+1} = step(t_n, x_n, h) on a grid known beforehand; with Euler and h = 1, a residual network."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from continuum.fields import Field
from continuum.noise.base import has_noise
from continuum.schemes import Memory, ReversibleScheme, Scheme
from continuum.schemes.base import inside
from continuum.solvers.arithmetic import combined
from continuum.solvers.base import (
    Cost,
    Solution,
    Solver,
    Step,
    needs_grad,
    option_text,
    refuse_noise,
    statistics_untouched,
)
from continuum.solvers.recompute import Recomputation
from continuum.solvers.reversible import solve_reversibly
from continuum.types import State

Gradient = Literal["direct", "reversible", "checkpoint"]

MOST_STEPS = 100_000
"""More are a mistake in h, as a rule: as many take minutes and gigabytes for the smallest field."""


@dataclass(frozen=True)
class FixedStep(Solver):
    """Repeats `scheme` with step `h`, or over the depths of `grid`; the gradient is the exact one of these steps.

    Depth is counted in layers, so h is 1/m (m steps a layer) or an integer (that many layers a step), and the points
    k/m are exact at every layer boundary. A plain loop: no host synchronisation, no checks, one graph under torch.compile.

    `gradient="direct"` differentiates what was computed, and stores it. `"reversible"` stores the end state only, whatever the
    number of steps, and rebuilds the others on the way back: the same gradient up to the rounding of `undo`, for about one
    more evaluation a step. A backward pass through it cannot be differentiated again. `"checkpoint"` stores every `every`-th
    state only and takes the steps between two of them again on the way back: the same gradient, under any scheme, for one
    more evaluation of each stage; random masks and precision are those of the way out, and running statistics move once.

    >>> from continuum.schemes import RK4, Coupling
    >>> str(FixedStep(RK4(), h=1 / 4))
    'rk4:h=0.25'
    >>> str(FixedStep(Coupling(), gradient="reversible"))
    'coupling:h=1,gradient=reversible'
    >>> str(FixedStep(RK4(), gradient="checkpoint", every=4))
    'rk4:h=1,gradient=checkpoint,every=4'

    Raises:
        ValueError: h is neither 1/m nor an integer, or does not divide the depth; the grid is not strictly monotone, or a
            multistep scheme is given an uneven one; an unknown gradient; `every` is no positive integer, or the gradient is
            not "checkpoint".
        TypeError: the scheme cannot step the field, or cannot undo its steps.
    """

    scheme: Scheme
    h: float = 1
    grid: tuple[float, ...] | None = field(default=None, kw_only=True)
    gradient: Gradient = field(default="direct", kw_only=True)
    every: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.scheme, Scheme):
            raise TypeError(f"FixedStep needs a Scheme such as Euler(), not {self.scheme!r}")
        if self.gradient not in get_args(Gradient):
            raise ValueError(f"gradient is one of {', '.join(get_args(Gradient))}, not {self.gradient!r}")
        if self.gradient == "reversible" and not isinstance(self.scheme, ReversibleScheme):
            raise TypeError(
                f"gradient='reversible' needs a scheme that can undo its steps, such as Coupling(), Verlet() or "
                f"TwoStepMidpoint(); {type(self.scheme).__name__} cannot"
            )
        check_every(self.every, self.gradient)
        if self.grid is not None:
            self._check_grid(self.grid)
        elif not (0 < self.h < float("inf") and _whole(self.h if self.h >= 1 else 1 / self.h)):
            raise ValueError(f"h counts layers: it is 1/m or an integer, not {self.h}")

    def _check_grid(self, grid: tuple[float, ...]) -> None:
        if self.h != 1:
            raise ValueError(f"a grid says its own steps: give h or grid, not both (got h={self.h})")
        steps = [b - a for a, b in pairwise(grid)]
        if not steps or not (all(h > 0 for h in steps) or all(h < 0 for h in steps)):
            raise ValueError(f"a grid is a strictly monotone sequence of two or more depths, not {grid}")
        if not self.scheme.variable_steps and max(steps) - min(steps) > 1e-9 * max(map(abs, steps)):
            raise ValueError(f"{type(self.scheme).__name__} needs equal steps; the grid has {min(steps)} to {max(steps)}")

    def __str__(self) -> str:
        name = str(self.scheme)
        option = f"h={option_text(self.h)}" if self.grid is None else f"grid={option_text(self.grid)}"
        gradient = "" if self.gradient == "direct" else f",gradient={self.gradient}"
        every = "" if self.every == 1 else f",every={self.every}"
        return f"{name}{',' if ':' in name else ':'}{option}{gradient}{every}"

    def check(self, field: Field) -> None:
        if not self.scheme.takes_noise:
            refuse_noise(field, self)
        self.scheme.check(field)
        if self.gradient == "reversible" and isinstance(self.scheme, ReversibleScheme):
            self.scheme.check_undo(field)

    @property
    def one_graph(self) -> bool:  # not where steps are taken back
        return self.gradient != "reversible" and self.scheme.one_graph

    @property
    def remembers(self) -> bool:
        return self.scheme.remembers

    def without_noise(self) -> Solver:
        return replace(self, scheme=self.scheme.without_noise())

    def direct(self) -> Solver:
        return replace(self, gradient="direct", every=1)

    def over(self, grid: tuple[float, ...]) -> Solver:
        return replace(self, h=1, grid=grid)

    def refined(self, k: int) -> Solver:
        if self.grid is not None:
            raise ValueError(
                f"steps over a grid cannot be refined: choose even ones first, for example with_solver('{self.scheme}')"
            )
        try:
            return replace(self, h=self.h / k)
        except ValueError:
            raise ValueError(
                f"refine({k}) would take h = {self.h:g} to {self.h / k:g}, which is neither 1/m nor an integer: take "
                "another k, or choose another step with with_solver first"
            ) from None

    def steps(self, start: float, stop: float) -> list[Step]:
        """The steps (t, h) from `start` to `stop`, h negative on the way back."""
        start, stop, size = _constant(start), _constant(stop), _constant(self.h)
        if self.grid is not None:
            return self._grid_steps(tuple(map(_constant, self.grid)), start, stop)
        if size >= 1:
            h = round(size)
            first, last = start / h, stop / h
        else:
            h = 1 / round(1 / size)
            first, last = start * round(1 / size), stop * round(1 / size)
        if not (_whole(first) and _whole(last)):
            raise ValueError(
                f"h = {size} does not divide the way from depth {start} to {stop}: take h = 1/m with an integer m, or an "
                "integer that divides both"
            )
        count = abs(round(last) - round(first))
        if count > MOST_STEPS:
            raise ValueError(
                f"h = {size:g} takes {count:,} steps from depth {start:g} to {stop:g}, and no solve takes more than "
                f"{MOST_STEPS:,}: take a larger h, or an adaptive solver"
            )
        direction = 1 if last > first else -1
        points = range(round(first), round(last), direction)
        if size >= 1:
            return [(float(k * h), float(direction * h)) for k in points]
        return [(k / round(1 / size), direction * h) for k in points]

    def _grid_steps(self, grid: tuple[float, ...], start: float, stop: float) -> list[Step]:
        if start not in grid or stop not in grid:
            raise ValueError(f"the grid has no point at depth {start if start not in grid else stop}; its points: {grid}")
        first, last = grid.index(start), grid.index(stop)
        way = grid[first : last + 1] if first < last else grid[last : first + 1][::-1]
        return [(a, b - a) for a, b in pairwise(way)]

    def depths(self, times: Tensor) -> list[float]:
        """Times of less than float64's precision that stand for points of the grid become these points."""
        exact = times.detach().double()
        if times.dtype == torch.float64 or not times.is_floating_point():
            return exact.tolist()
        if self.grid is not None:
            points = torch.tensor(self.grid, dtype=torch.float64)
            near = points[(exact.cpu()[:, None] - points).abs().argmin(dim=1)].to(exact.device)
        else:
            near = (exact / self.h).round() * self.h if self.h >= 1 else (exact * round(1 / self.h)).round() / round(1 / self.h)
        return torch.where(near.to(times.dtype) == times.detach(), near, exact).tolist()

    def __call__(
        self, field: Field, x: State, times: Sequence[float], previous: State | None = None, exact: bool = False
    ) -> Solution:
        steps = self.steps(times[0], times[-1])
        places = [self._place(t, times[0], steps) for t in times]
        between = [place for place in places if not isinstance(place, int)]
        if between and (exact or has_noise(field)):
            for start, stop in pairwise(times):
                self.steps(start, stop)  # says which time is off the grid
        memory = self.scheme.begin(field, x, previous, steps)
        ends = {place for place in places if isinstance(place, int)} | {n for n, _ in between} | {n + 1 for n, _ in between}
        states, taken = {0: x}, 0
        for end in sorted(ends - {0}):
            x, memory = self._solve(field, x, memory, steps[taken:end])
            states[end], taken = x, end
        read, evaluations = self._read(field, steps, states, between)
        inner = iter(read)
        found = [states[place] if isinstance(place, int) else next(inner) for place in places]
        grid = (*(t for t, _ in steps), times[-1])
        return Solution(found, Cost(self.scheme.evaluations(field, steps) + evaluations, len(steps), 0, grid))

    def _place(self, t: float, start: float, steps: Sequence[Step]) -> "int | tuple[int, float]":
        """Behind how many steps the depth t lies; of a depth inside a step, its number and the share of it before t."""
        t, start = _constant(t), _constant(start)
        if self.grid is None:
            way = (t - start) / abs(steps[0][1])
            count = abs(way)
            if _whole(count):
                return round(count)
        else:
            ends = [steps[0][0], *(a + h for a, h in steps)]
            if t in self.grid:
                return min(range(len(ends)), key=lambda n: abs(ends[n] - t))
            count = float(sum(abs(end - start) < abs(t - start) for end in ends[1:]))
        n = int(count)
        depth, h = steps[n]
        return n, (t - depth) / h

    def _read(
        self, field: Field, steps: Sequence[Step], states: dict[int, State], between: Sequence[tuple[int, float]]
    ) -> tuple[list[State], int]:
        """The states inside steps by Hermite's cubic, whose slopes at the ends of a step cost an evaluation each."""
        slopes: dict[tuple[int, float], State] = {}

        def slope(n: int, c: int) -> State:
            t, h = steps[n]
            depth = inside(field.knots, t, h, c, states[n].dtype)
            if (n + c, depth) not in slopes:
                with statistics_untouched(field):
                    slopes[n + c, depth] = field(depth, states[n + c]).to(states[n].dtype)
            return slopes[n + c, depth]

        read: list[State] = []
        for n, s in between:
            h = steps[n][1]
            weights = (s * s * (3 - 2 * s), h * s * (1 - s) ** 2, h * s * s * (s - 1))
            read.append(combined(states[n], 1.0, weights, (states[n + 1] - states[n], slope(n, 0), slope(n, 1))))
        return read, len(slopes)

    def _solve(self, field: Field, x: State, memory: Memory, steps: Sequence[Step]) -> tuple[State, Memory]:
        """The state and memory after `steps`."""
        if self.gradient == "direct" or not needs_grad(field, x):
            return self._take(field, x, memory, steps)
        if self.gradient == "reversible" and isinstance(self.scheme, ReversibleScheme):
            return solve_reversibly(self.scheme, field, x, memory, steps)
        for first in range(0, len(steps), self.every):
            x, memory = self._take_twice(field, x, memory, steps[first : first + self.every])
        return x, memory

    def _take(self, field: Field, x: State, memory: Memory, steps: Sequence[Step]) -> tuple[State, Memory]:
        for t, h in steps:
            x, memory = self.scheme.step(field, t, x, h, memory)
        return x, memory

    def _take_twice(self, field: Field, x: State, memory: Memory, steps: Sequence[Step]) -> tuple[State, Memory]:
        """The steps, of whose graph the inputs alone are stored; the backward pass takes them again."""

        if torch.compiler.is_compiling():  # a graph moves running statistics once, whatever it recomputes
            return checkpoint(lambda x, *memory: self._take(field, x, memory, steps), x, *memory, use_reentrant=False)
        layers = [field.at(inside(field.knots, t, h, c, x.dtype)) for t, h in steps for c in (0, 1)]
        recompute = Recomputation(layers)

        def take(x: State, *memory: Any) -> tuple[State, Memory]:
            for step in steps:
                x, memory = self._take(field, x, memory, [step])
                recompute.forget()
            return x, memory

        return recompute(take, x, *memory)


def check_every(every: int, gradient: str) -> None:
    """Raise ValueError unless `every` is a number of steps, and of use."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every counts the steps from one stored state to the next, an integer from 1 on, not {every!r}")
    if every != 1 and gradient != "checkpoint":
        raise ValueError(
            f"every={every} says which states gradient='checkpoint' stores; gradient={gradient!r} has no use for it: leave one "
            "of them out"
        )


def _constant(number: float) -> float:
    """`number`; to torch.compile, which may have made it a symbol, a constant of the graph that its guards check.

    A float that is another one in a second compilation, as depth and step are from flow to flow, becomes a symbol there.
    """
    if not torch.compiler.is_compiling():
        return number
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # half a second, which whoever compiles has spent already

    return guard_scalar(number)


def _whole(number: float) -> bool:
    return math.isfinite(number) and abs(number - round(number)) <= 1e-9 * max(1.0, abs(number))
