"""One step: Runge-Kutta and linear multistep schemes."""

from continuum.schemes.base import Memory, Scheme
from continuum.schemes.multistep import AdamsBashforth, LinearTwoStep
from continuum.schemes.runge_kutta import RK4, Euler, Heun, Kutta3, Midpoint, RungeKutta, Tableau

__all__ = [
    "RK4",
    "AdamsBashforth",
    "Euler",
    "Heun",
    "Kutta3",
    "LinearTwoStep",
    "Memory",
    "Midpoint",
    "RungeKutta",
    "Scheme",
    "Tableau",
]
