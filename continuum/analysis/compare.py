"""One set of weights under many solvers: what each costs, and how far its answers are from those of the training solver."""

import math
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from continuum import files
from continuum.analysis.memory import peak_memory, seconds_of
from continuum.models.failure import not_finite
from continuum.models.flows import flows, solvers_of, with_solver, without_noise
from continuum.noise import noise_only
from continuum.solvers import SolveError, Solver
from continuum.solvers.base import rows_not_finite


@dataclass
class Row:
    """One solver's results.

    `evaluations` (of the fields, per sample), `accepted` and `rejected` steps are summed over the flows and averaged over
    the samples; `agreement` is the share of predictions equal to the reference's; `logit_difference` the largest absolute one;
    `milliseconds` per image, the median over batches; `memory` the peak of one batch in MiB. `grids` are the steps of each
    flow on the first batch. A stochastic solver runs over several `paths` of its noise: accuracy, loss, agreement and time are
    means over them, with the standard deviations of accuracy and loss. A solver that failed has its `error` and no numbers.

    `accuracy_low` and `accuracy_high` are the 95% interval of the accuracy on any images of this kind. `difference` is the
    accuracy minus the reference's, `difference_low` and `difference_high` its interval, paired by image: an image that both get
    right, or both wrong, casts no doubt on it.
    """

    solver: str
    evaluations: float = math.nan
    accepted: float = math.nan
    rejected: float = math.nan
    accuracy: float = math.nan
    accuracy_low: float = math.nan
    accuracy_high: float = math.nan
    difference: float = math.nan
    difference_low: float = math.nan
    difference_high: float = math.nan
    loss: float = math.nan
    agreement: float = math.nan
    logit_difference: float = math.nan
    paths: int = 1
    accuracy_deviation: float = math.nan
    loss_deviation: float = math.nan
    milliseconds: float = math.nan
    memory: float = math.nan
    error: str = ""
    grids: list[list[float]] = field(default_factory=list)


@torch.no_grad()
def compare_solvers(
    network: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    solvers: Sequence[Solver],
    device: torch.device,
    paths: int = 5,
) -> Iterator[Row]:
    """Run `network` on all `batches` (images, labels) under its own solver, then under each of `solvers`; a row at a time.

    The first row is the reference of `difference`, `agreement` and `logit_difference`. Where the network has noise it is that
    of the drift, which deterministic solvers integrate too; a stochastic one runs over `paths` paths, path i with the seed i.
    """
    network = network.to(device).eval()
    batches = [(images.to(device), labels.to(device)) for images, labels in batches]
    labels = torch.cat([labels for _, labels in batches])
    drift = without_noise(network)
    reference: Tensor | None = None
    for solver in (None, *solvers):
        stochastic = solver is not None and is_stochastic(solver)
        row = Row(str(solver or solvers_of(drift)), paths=paths if stochastic else 1)
        run = drift if solver is None else with_solver(network if stochastic else drift, solver)
        try:
            logits = _paths(run, batches, device, row)
        except SolveError as error:
            row.error = str(error)
            yield row
            if reference is None:
                raise
            continue
        reference = logits[0] if reference is None else reference
        right = (logits.argmax(2) == labels).double()
        accuracies, scores = right.mean(dim=1), right.mean(dim=0)
        losses = torch.stack([cross_entropy(path, labels) for path in logits]).double()
        row.accuracy, row.loss = float(accuracies.mean()), float(losses.mean())
        row.accuracy_low, row.accuracy_high = interval(row.accuracy, len(labels))
        reference_right = (reference.argmax(1) == labels).double()
        row.difference, row.difference_low, row.difference_high = paired(scores - reference_right)
        if len(logits) > 1:
            row.accuracy_deviation, row.loss_deviation = float(accuracies.std()), float(losses.std())
        row.agreement = float((logits.argmax(2) == reference.argmax(1)).double().mean())
        row.logit_difference = float((logits - reference).abs().max())
        yield row


NORMAL = 1.959964
"""How many deviations from its mean a normal number is, 95% of the time."""


def interval(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a probability, of which `share` was found in `count` draws: Wilson's.

    >>> [round(limit, 3) for limit in interval(0.52, 100)]
    [0.423, 0.615]
    """
    square = NORMAL**2 / count
    middle, half = share + square / 2, NORMAL * math.sqrt(share * (1 - share) / count + square / 4 / count)
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


def paired(differences: Tensor) -> tuple[float, float, float]:
    """The mean of differences by image, each in [-1, 1], and its 95% interval: Agresti and Min's, wide enough for few images.

    >>> differences = torch.tensor([1.0] * 14 + [-1.0] * 10 + [0.0] * 76)  # 52% and 56%: the same
    >>> [round(number, 3) for number in paired(differences)]
    [0.04, -0.057, 0.135]
    """
    count, total, squares = len(differences) + 2, float(differences.sum()), float(differences.square().sum()) + 1
    middle, half = total / count, NORMAL * math.sqrt(squares - total**2 / count) / count
    return total / len(differences), max(-1.0, middle - half), min(1.0, middle + half)


def is_stochastic(solver: Solver) -> bool:
    """Whether a solver draws noise."""
    return solver.without_noise() != solver


def _paths(network: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], device: torch.device, row: Row) -> Tensor:
    """The logits of all batches for each path of the noise, (paths, images, classes), filling in what they cost."""
    logits, milliseconds = [], []
    for seed in range(row.paths):
        with torch.random.fork_rng([device] if device.type == "cuda" else []), noise_only(network):
            torch.manual_seed(seed)
            logits.append(_run(network, batches, device, row))
        milliseconds.append(row.milliseconds)
    row.milliseconds = statistics.mean(milliseconds)
    return torch.stack(logits)


def _run(network: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], device: torch.device, row: Row) -> Tensor:
    """The logits of all batches, filling in what they cost."""
    first = batches[0][0]
    row.memory = peak_memory(lambda: network(first), device) / 2**20  # also warms up
    row.grids = [list(flow.cost.grid) for flow in flows(network) if flow.cost]
    logits: list[Tensor] = []
    times, counts = [], torch.zeros(3, dtype=torch.float64)
    for images, _ in batches:
        times.append(1000 * seconds_of(lambda images=images: logits.append(network(images)), device) / len(images))
        for cost in (flow.cost for flow in flows(network) if flow.cost):
            counts += len(images) * torch.tensor([cost.evaluations, cost.accepted, cost.rejected])
    row.evaluations, row.accepted, row.rejected = (counts / sum(map(len, logits))).tolist()
    row.milliseconds = statistics.median(times)
    if broken := rows_not_finite(found := torch.cat(logits)):
        raise not_finite(f"the logits of {len(broken)} of {len(found)} images are")
    return found


def write_csv(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """The table without the grids, a line a solver."""
    columns = [name for name in Row.__dataclass_fields__ if name != "grids"]
    files.write_csv([columns, *([getattr(row, name) for name in columns] for row in rows)], path)


def write_json(rows: Sequence[Row], facts: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """The rows with their grids, under the `facts` of the run; numbers that do not exist are null."""
    files.write_json({**facts, "rows": [asdict(row) for row in rows]}, path)
