"""An adaptive solve in a compiled network: its number of steps is unknown to the compiler, which sees field and sums."""

from collections.abc import Sequence

import torch

from continuum.fields import Field
from continuum.solvers.arithmetic import compile_field
from continuum.solvers.base import Solution, Solver
from continuum.types import State


@torch.compiler.disable
def solve_between_graphs(solver: Solver, field: Field, x: State, times: Sequence[float]) -> Solution:
    compile_field(field)
    return solver(field, x, times)
