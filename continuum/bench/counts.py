"""What a solve costs beside time: peak memory, waits of the host for the device, and graphs under torch.compile."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from continuum.analysis.memory import peak_memory
from continuum.bench import rivals
from continuum.bench.timing import LOSSES, TOLERANCE, Problem, Row, counted, libraries, trained
from continuum.flow import Flow
from continuum.schemes import Euler
from continuum.solvers import Adaptive, FixedStep


def memory(problem: Problem, solver: Literal["dopri5", "euler"], deep: bool, device: torch.device) -> Row:
    """Peak memory of a solve and its backward pass, without the gradients of the parameters: checkpoints against direct.

    Of 26 evaluations, or where it is `deep` of a hundred and more.
    """
    field, x = problem.build(device)
    x.requires_grad_()
    parameters = sum(p.numel() * p.element_size() for p in field.parameters())
    row: Row = {"field": problem.name, "batch": problem.batch, "solver": solver}
    for gradient in ("direct", "checkpoint"):
        if solver == "euler":
            flow = Flow(field, FixedStep(Euler(), gradient=gradient), depth=104 if deep else 26)
        else:
            longest = problem.depth / 17 if deep else float("inf")
            flow = Flow(field, Adaptive("dopri5", TOLERANCE, TOLERANCE, gradient, max_step=longest), problem.depth)
        run = trained(flow, field, x, LOSSES["sum"])
        if device.type == "cuda":
            run()  # what the libraries of the device allocate once, for good, is not the solve's
        for leaf in (x, *field.parameters()):
            leaf.grad = None
        row[f"{gradient}_mib"] = (peak_memory(run, device) - parameters) / 2**20
        assert flow.cost is not None
        row["evaluations"] = flow.cost.evaluations
    return {**row, "ratio": row["checkpoint_mib"] / row["direct_mib"]}


class Synchronisations(TorchDispatchMode):
    """Counts how often the host waits for `device` while it is active, for a number, for a size, for a copy; and all operators.

    On a CPU nothing waits; what is counted there is what a GPU would have to be waited for, `.item()` and its relatives.
    """

    waits = frozenset(getattr(torch.ops.aten, name) for name in ("_local_scalar_dense", "equal", "nonzero", "masked_select"))

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.count = self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators += 1
        if self.device.type in _devices((args, kwargs)):
            copied = self.device.type != "cpu" and "cpu" in _devices(result)
            self.count += func.overloadpacket in self.waits or copied
        return result


def _devices(tree: object) -> set[str]:
    return {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


def synchronisations(library: str, device: torch.device) -> Row:
    """Host synchronisations of one more attempted step, and of the solve beside its steps: from a short and a longer solve."""
    field, x = Problem((64, 8, 8), 2).build(device)
    found = []
    for long in (False, True):
        if library == "continuum, euler":
            solve, attempts = Flow(field, FixedStep(Euler()), depth=16 if long else 4), 16 if long else 4
        else:
            solve = libraries()[library](field, 1.5, 1e-6 if long else TOLERANCE)
            attempts = (counted(field, solve, x) - 2) // 6  # two evaluations choose the first step of every dopri5 here
        with torch.no_grad(), Synchronisations(device) as mode:
            solve(x)
        found.append((attempts, mode.count))
    (few, some), (many, all_) = found
    each = (all_ - some) / (many - few)
    return {"library": library, "attempts": many, "synchronisations": all_, "per_step": each, "per_solve": some - each * few}


def graphs(library: Literal["continuum", "torchdiffeq"], device: torch.device) -> Row:
    """Graphs of four Euler steps under torch.compile; one more than there are breaks."""
    field, x = Problem((2,), 4).build(device)
    solve = Flow(field, FixedStep(Euler()), depth=4) if library == "continuum" else rivals.odeint_euler(field, 4)
    torch.compiler.reset()
    explained = torch._dynamo.explain(solve)(x)
    torch.compiler.reset()
    return {"library": library, "graphs": explained.graph_count}
