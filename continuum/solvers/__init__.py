"""All steps and their gradients: fixed steps, and torchdiffeq's adaptive ones."""

from continuum.solvers.adaptive import Adaptive, Embedded
from continuum.solvers.base import Cost, Solution, SolveError, Solver
from continuum.solvers.fixed import FixedStep
from continuum.solvers.text import parse

__all__ = ["Adaptive", "Cost", "Embedded", "FixedStep", "Solution", "SolveError", "Solver", "parse"]
