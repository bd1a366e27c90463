"""One step: Runge-Kutta, linear multistep, truncated implicit and reversible schemes."""

from continuum.schemes.base import Memory, ReversibleScheme, Scheme
from continuum.schemes.implicit import NeumannSeries
from continuum.schemes.multistep import AdamsBashforth, LinearTwoStep, TwoStepMidpoint
from continuum.schemes.reversible import Coupling, Leapfrog, Verlet
from continuum.schemes.runge_kutta import RK4, Euler, Fractal, Heun, Kutta3, Midpoint, RungeKutta, Tableau

__all__ = [
    "RK4",
    "AdamsBashforth",
    "Coupling",
    "Euler",
    "Fractal",
    "Heun",
    "Kutta3",
    "Leapfrog",
    "LinearTwoStep",
    "Memory",
    "Midpoint",
    "NeumannSeries",
    "ReversibleScheme",
    "RungeKutta",
    "Scheme",
    "Tableau",
    "TwoStepMidpoint",
    "Verlet",
]
