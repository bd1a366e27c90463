"""One step: Runge-Kutta, linear multistep, truncated implicit, reversible, splitting and stochastic schemes."""

from continuum.schemes.base import Memory, ReversibleScheme, Scheme
from continuum.schemes.implicit import NeumannSeries
from continuum.schemes.multistep import AdamsBashforth, LinearTwoStep, TwoStepMidpoint
from continuum.schemes.reversible import Coupling, Leapfrog, Verlet
from continuum.schemes.runge_kutta import RK4, Euler, Fractal, Heun, Kutta3, Midpoint, RungeKutta, Tableau
from continuum.schemes.splitting import LieTrotter, Splitting, Strang
from continuum.schemes.stochastic import EulerMaruyama, Milstein, StochasticScheme, StochasticTwoStep

SCHEMES: tuple[Scheme, ...] = (
    Euler(),
    Midpoint(),
    Heun(),
    Kutta3(),
    RK4(),
    AdamsBashforth(),
    LinearTwoStep(),
    TwoStepMidpoint(),
    NeumannSeries(),
    Fractal(),
    Coupling(),
    Leapfrog(),
    Verlet(),
    LieTrotter(),
    Strang(),
    EulerMaruyama(),
    Milstein(),
    StochasticTwoStep(),
)
"""One of each scheme that text can name."""

__all__ = [
    "RK4",
    "SCHEMES",
    "AdamsBashforth",
    "Coupling",
    "Euler",
    "EulerMaruyama",
    "Fractal",
    "Heun",
    "Kutta3",
    "Leapfrog",
    "LieTrotter",
    "LinearTwoStep",
    "Memory",
    "Midpoint",
    "Milstein",
    "NeumannSeries",
    "ReversibleScheme",
    "RungeKutta",
    "Scheme",
    "Splitting",
    "StochasticScheme",
    "StochasticTwoStep",
    "Strang",
    "Tableau",
    "TwoStepMidpoint",
    "Verlet",
]
