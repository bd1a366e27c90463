"""A solve in a compiled network that the compiler cannot follow step by step: it is given parts of it."""

from collections.abc import Sequence

import torch

from continuum.fields import Field
from continuum.solvers.base import Solution, Solver
from continuum.types import State


@torch.compiler.disable
def solve_between_graphs(
    solver: Solver, field: Field, x: State, times: Sequence[float], previous: State | None = None, exact: bool = False
) -> Solution:
    solver.compile(field)
    return solver(field, x, times, previous, exact)
