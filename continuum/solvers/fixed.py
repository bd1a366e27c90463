"""Fixed steps: x_{n+1} = step(t_n, x_n, h) on a grid known beforehand; with Euler and h = 1, a residual network."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal, get_args

from continuum.fields import Field
from continuum.schemes import ReversibleScheme, Scheme, StochasticScheme
from continuum.solvers.base import Cost, Solution, Solver, needs_grad, option_text, refuse_noise
from continuum.solvers.reversible import solve_reversibly
from continuum.types import State

Gradient = Literal["direct", "reversible"]

Step = tuple[float, float]
"""A step as (t, h)."""


@dataclass(frozen=True)
class FixedStep(Solver):
    """Repeats `scheme` with step `h`, or over the depths of `grid`; the gradient is the exact one of these steps.

    Depth is counted in layers, so h is 1/m (m steps a layer) or an integer (that many layers a step), and the points
    k/m are exact at every layer boundary. A plain loop: no host synchronisation, no checks, one graph under torch.compile.

    `gradient="direct"` differentiates what was computed, and stores it. `"reversible"` stores the end state only, whatever the
    number of steps, and rebuilds the others on the way back: the same gradient up to the rounding of `undo`, for about one
    more evaluation a step. A backward pass through it cannot be differentiated again.

    >>> from continuum.schemes import RK4, Coupling
    >>> str(FixedStep(RK4(), h=1 / 4))
    'rk4:h=0.25'
    >>> str(FixedStep(Coupling(), gradient="reversible"))
    'coupling:h=1,gradient=reversible'

    Raises:
        ValueError: h is neither 1/m nor an integer, or does not divide the depth; the grid is not strictly monotone, or a
            multistep scheme is given an uneven one; an unknown gradient.
        TypeError: the scheme cannot step the field, or cannot undo its steps.
    """

    scheme: Scheme
    h: float = 1
    grid: tuple[float, ...] | None = field(default=None, kw_only=True)
    gradient: Gradient = field(default="direct", kw_only=True)

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
        return f"{name}{',' if ':' in name else ':'}{option}{gradient}"

    def check(self, field: Field) -> None:
        if not isinstance(self.scheme, StochasticScheme):
            refuse_noise(field, str(self))
        self.scheme.check(field)
        if self.gradient == "reversible" and isinstance(self.scheme, ReversibleScheme):
            self.scheme.check_undo(field)

    def without_noise(self) -> Solver:
        return replace(self, scheme=self.scheme.without_noise())

    def steps(self, start: float, stop: float) -> list[Step]:
        """The steps (t, h) from `start` to `stop`, h negative on the way back."""
        if self.grid is not None:
            return self._grid_steps(self.grid, start, stop)
        if self.h >= 1:
            h = round(self.h)
            first, last = start / h, stop / h
        else:
            h = 1 / round(1 / self.h)
            first, last = start * round(1 / self.h), stop * round(1 / self.h)
        if not (_whole(first) and _whole(last)):
            raise ValueError(
                f"h = {self.h} does not divide the way from depth {start} to {stop}: take h = 1/m with an integer m, or an "
                "integer that divides both"
            )
        direction = 1 if last > first else -1
        points = range(round(first), round(last), direction)
        if self.h >= 1:
            return [(float(k * h), float(direction * h)) for k in points]
        return [(k / round(1 / self.h), direction * h) for k in points]

    def _grid_steps(self, grid: tuple[float, ...], start: float, stop: float) -> list[Step]:
        if start not in grid or stop not in grid:
            raise ValueError(f"the grid has no point at depth {start if start not in grid else stop}; its points: {grid}")
        first, last = grid.index(start), grid.index(stop)
        way = grid[first : last + 1] if first < last else grid[last : first + 1][::-1]
        return [(a, b - a) for a, b in pairwise(way)]

    def __call__(self, field: Field, x: State, times: Sequence[float], previous: State | None = None) -> Solution:
        legs = [self.steps(start, stop) for start, stop in pairwise(times)]
        steps = [step for leg in legs for step in leg]
        memory = self.scheme.begin(field, x, previous, steps)
        states = [x]
        for leg in legs:
            if self.gradient == "reversible" and isinstance(self.scheme, ReversibleScheme) and needs_grad(field, x):
                x, memory = solve_reversibly(self.scheme, field, x, memory, leg)
            else:
                for t, h in leg:
                    x, memory = self.scheme.step(field, t, x, h, memory)
            states.append(x)
        grid = (*(t for t, _ in steps), times[-1])
        return Solution(states, Cost(self.scheme.evaluations(field, steps), len(steps), 0, grid))


def _whole(number: float) -> bool:
    return abs(number - round(number)) <= 1e-9 * max(1.0, abs(number))
