"""All steps and their gradients: fixed and adaptive ones, those of each image, and those on a Brownian path."""

from continuum.solvers.adaptive import Adaptive
from continuum.solvers.base import Cost, Solution, SolveError, Solver
from continuum.solvers.brownian import Brownian
from continuum.solvers.fixed import FixedStep
from continuum.solvers.pairs import Embedded
from continuum.solvers.per_image import PerImage
from continuum.solvers.text import parse

__all__ = ["Adaptive", "Brownian", "Cost", "Embedded", "FixedStep", "PerImage", "Solution", "SolveError", "Solver", "parse"]
