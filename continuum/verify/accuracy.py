"""How accurate the schemes are, measured: the order of each, and what undoing the steps of the reversible ones loses."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from continuum import schemes
from continuum.analysis.convergence import order
from continuum.analysis.stochastic import limit_moment, linear_moment
from continuum.fields import Autonomous, Coupled, Field, Function, Momentum, PreActivation, Split, TwoColumns
from continuum.flow import Flow
from continuum.noise import StochasticDepth
from continuum.schemes import (
    AdamsBashforth,
    Coupling,
    EulerMaruyama,
    Fractal,
    Leapfrog,
    LieTrotter,
    LinearTwoStep,
    Midpoint,
    NeumannSeries,
    ReversibleScheme,
    Scheme,
    StochasticScheme,
    StochasticTwoStep,
    Strang,
    TwoStepMidpoint,
    Verlet,
)
from continuum.solvers import FixedStep
from continuum.types import State
from continuum.weights import PiecewiseConstant

VARIANTS = (AdamsBashforth(3), AdamsBashforth(4), NeumannSeries(3), EulerMaruyama("brownian"), Strang(Midpoint()))
SCHEMES: tuple[Scheme, ...] = (*schemes.SCHEMES, *VARIANTS)
REVERSIBLE = [scheme for scheme in schemes.SCHEMES if isinstance(scheme, ReversibleScheme)]

START = torch.tensor([[0.1, 0.3], [0.5, 0.8]], dtype=torch.float64)


@dataclass(frozen=True)
class Order:
    """The order that a scheme declares, and log2 of the ratio of its errors with steps of h and h / 2."""

    scheme: Scheme
    measured: float

    @property
    def passed(self) -> bool:
        return abs(self.measured - self.scheme.order) <= 0.25


SEASONS = Function(lambda t, x: torch.cos(t) * x * (1 - x))
"""Logistic growth by seasons, x(t) = x0 / (x0 + (1 - x0) exp(-sin t))."""

PENDULUM = Coupled(Function(lambda t, v: v), Function(lambda t, q: 0.3 * torch.cos(t) - torch.sin(q)))
"""A driven pendulum, whose solution is the one of an adaptive method of order eight."""

HALVES = Split(
    Function(lambda t, x: _half(0, x.chunk(2, 1)[1])), Function(lambda t, x: _half(1, PENDULUM(t, x).chunk(2, 1)[1]))
)
"""The same pendulum as the sum of what moves its place and what moves its speed."""

SUITED: dict[Scheme, Field] = {
    **dict.fromkeys((Coupling(), Leapfrog(), Verlet()), PENDULUM),
    **dict.fromkeys((LieTrotter(), Strang(), Strang(Midpoint())), HALVES),
    LinearTwoStep(): Momentum(SEASONS.scaled(0.75), k=-0.25).double(),
    StochasticTwoStep(): Momentum(StochasticDepth(SEASONS.scaled(0.75), 0.5, "rescaled"), k=-0.25).double().eval(),
    # f = f1 / 2 + f2, but not with the coefficients of a method of order two.
    Fractal(): TwoColumns(SEASONS.scaled(0.4), SEASONS.scaled(0.8)),
}
"""The equation in the form that a scheme can step, where that is not `SEASONS` as it is."""


def _half(index: int, slope: State) -> State:
    """The slope of one half of the state, the other at rest."""
    rest = torch.zeros_like(slope)
    return torch.cat([slope, rest] if index == 0 else [rest, slope], dim=1)


@torch.no_grad()
def scheme_orders(schemes: Sequence[Scheme] = SCHEMES) -> Iterator[Order]:
    """The measured order of each scheme, in float64 on smooth fields with a known solution, between h = 1/128 and 1/256.

    Of stochastic schemes it is the weak order, in the second moment of a linear equation with stochastic depth, p = 1/2, which
    is known without sampling; of `StochasticTwoStep` the order of its drift.
    """
    season = START / (START + (1 - START) * math.exp(-math.sin(2.0)))
    swing = Flow(PENDULUM, "dopri8:rtol=1e-13,atol=1e-13", 2)(START)
    for scheme in schemes:
        if isinstance(scheme, StochasticScheme) and scheme not in SUITED:
            half = StochasticDepth(SEASONS, 0.5)
            moments = [linear_moment(half, scheme, [1.0], steps, power=2) for steps in (128, 256)]
            yield Order(scheme, order((128, 256), [moment - limit_moment(half, [1.0], power=2) for moment in moments]))
            continue
        field = SUITED.get(scheme, SEASONS)
        solution = swing if field in (PENDULUM, HALVES) else season
        errors = [float((Flow(field, FixedStep(scheme, h=1 / m), 2)(START) - solution).norm()) for m in (128, 256)]
        yield Order(scheme, math.log2(errors[0] / errors[1]))


@dataclass(frozen=True)
class Undone:
    """The relative error of states that were rebuilt through so many layers, and what it may be."""

    scheme: ReversibleScheme
    layers: int
    dtype: torch.dtype
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


BOUNDS = {torch.float32: (1e-6, 1e-5), torch.float64: (1e-14, 1e-12)}
"""For one layer, and for a hundred."""


@torch.no_grad()
def undo_errors() -> Iterator[Undone]:
    """The error of undo(step(x)) for every reversible scheme, and there and back through a hundred layers of a RevNet.

    The fields are pre-activation branches with the statistics of the batch, over the hundred layers scaled by 0.1. The k of
    `LinearTwoStep` is -0.9, as in a momentum ResNet: it loses eps / |k|.
    """
    for dtype, (bound, bound_of_many) in BOUNDS.items():
        for scheme in REVERSIBLE:
            yield Undone(scheme, 1, dtype, _there_and_back(scheme, 1, 1.0, dtype), bound)
        for scheme in (Coupling(), Verlet()):
            yield Undone(scheme, 100, dtype, _there_and_back(scheme, 100, 0.1, dtype), bound_of_many)


LAYERS: dict[Scheme, Callable[[], Field]] = {
    LinearTwoStep(): lambda: Momentum(Autonomous(PreActivation(8, 8)), k=-0.9),
    TwoStepMidpoint(): lambda: Autonomous(PreActivation(8, 8)),
}
"""A layer that a scheme can step, where that is not one of two halves."""


def _there_and_back(scheme: ReversibleScheme, layers: int, scale: float, dtype: torch.dtype) -> float:
    """The largest relative error of the state and memory from which the layers set out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = LAYERS.get(scheme, lambda: Coupled(*(Autonomous(PreActivation(4, 4)) for _ in range(2))))
        field = PiecewiseConstant(layer().scaled(scale) for _ in range(layers)).to(dtype)
        x, previous = torch.randn(2, 4, 8, 6, 6, dtype=dtype)
    start = (x, *scheme.begin(field, x, previous, [(0.0, 1.0)]))
    x, memory = x, start[1:]
    for n in range(layers):
        x, memory = scheme.step(field, float(n), x, 1.0, memory)
    for n in reversed(range(layers)):
        x, memory = scheme.undo(field, float(n), x, 1.0, memory)
    return max(float((one - other).norm() / other.norm()) for one, other in zip((x, *memory), start, strict=True))
