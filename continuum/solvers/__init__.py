"""All steps and their gradients: fixed steps, torchdiffeq's adaptive ones, and torchsde's on a Brownian path."""

from continuum.solvers.adaptive import Adaptive
from continuum.solvers.base import Cost, Solution, SolveError, Solver
from continuum.solvers.brownian import Brownian
from continuum.solvers.fixed import FixedStep
from continuum.solvers.pairs import Embedded
from continuum.solvers.text import parse

__all__ = ["Adaptive", "Brownian", "Cost", "Embedded", "FixedStep", "Solution", "SolveError", "Solver", "parse"]
