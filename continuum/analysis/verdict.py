"""Is a network an equation? Its accuracy with the steps it was trained with, with smaller ones, and in their limit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from continuum.analysis.compare import paired
from continuum.models.flows import flows, with_flows, with_solver
from continuum.solvers import Adaptive, SolveError
from continuum.solvers.base import evaluating

MARGIN = 0.02
"""Accuracies that differ by less are those of one network."""

TOLERANCE = 1e-4
DIVISORS = (1, 2, 4, 8)

Answer = Literal["yes", "no", "not to be told"]


@dataclass(frozen=True)
class Verdict:
    """Accuracies with steps of h / m, m = 1, 2, 4, 8, and in the limit.

    `differences` are those from the limit with their 95% intervals, paired by image. The `answer` is that of m = 1: "yes" if
    the interval lies within two points, "no" if it lies beyond zero, else "not to be told" from so few images. `enough` is the
    smallest m from which on all of them are "yes", None if there is none.
    """

    divisors: tuple[int, ...]
    accuracies: tuple[float, ...]
    limit: float
    differences: tuple[tuple[float, float, float], ...]
    answer: Answer
    enough: int | None
    images: int

    def __str__(self) -> str:
        mean, low, high = (100 * number for number in self.differences[0])
        found = f"{mean:+.1f} points of accuracy from the limit of small steps, 95% interval [{low:.1f}, {high:.1f}]"
        text = {
            "yes": f"Yes: as it was trained it is the same network as its equation ({found}, {self.images} images).",
            "no": f"No: as it was trained it is another network than its equation ({found}, {self.images} images).",
            "not to be told": f"Not to be told from {self.images} images ({found}): take more of them.",
        }[self.answer]
        if self.answer != "yes" and self.enough is not None:
            text += f" It is one from steps of h / {self.enough} on."
        return text


@torch.no_grad()
def verdict(model: nn.Module, images: Tensor, labels: Tensor) -> Verdict:
    """Whether a model with flows of fixed steps classifies as its equation does.

    >>> from continuum import zoo
    >>> _ = torch.manual_seed(0)
    >>> verdict(zoo.preresnet(14, width=4), torch.randn(8, 3, 8, 8), torch.arange(8)).answer
    'not to be told'

    Args:
        model: from images to logits, without noise.
        images: a batch.
        labels: one an image.

    Raises:
        TypeError: no flow, or flows whose steps are adaptive: what it computes is the equation already.
        SolveError: the equation cannot be solved.
    """
    if not flows(model) or any(flow.solver.adaptive for flow in flows(model)):
        raise TypeError("its steps are adaptive, or it has none: what it computes is its equation to the tolerance")
    with evaluating(model):
        limit = _right(with_solver(model, Adaptive("dopri5", TOLERANCE, TOLERANCE)), images, labels)
        right = [_right(_divided(model, m), images, labels) for m in DIVISORS]
    differences = tuple(paired(found - limit) for found in right)
    answers: list[Answer] = [_answer(low, high) for _, low, high in differences]
    last = next((i for i in range(len(answers)) if set(answers[i:]) == {"yes"}), None)
    return Verdict(
        DIVISORS,
        tuple(float(found.mean()) for found in right),
        float(limit.mean()),
        differences,
        answers[0],
        None if last is None else DIVISORS[last],
        len(labels),
    )


def _answer(low: float, high: float) -> Answer:
    if low > -MARGIN and high < MARGIN:
        return "yes"
    return "no" if low > 0 or high < 0 else "not to be told"


def _divided(model: nn.Module, m: int) -> nn.Module:
    return model if m == 1 else with_flows(model, lambda flow: flow.with_solver(flow.solver.refined(m)))


def _right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """1 for each image whose class is right, else 0; 0 for all where a flow cannot be solved."""
    try:
        return (model(images).argmax(1) == labels).double()
    except SolveError:
        return torch.zeros(len(labels), dtype=torch.float64, device=labels.device)


def table(found: Verdict) -> Sequence[dict[str, str]]:
    """A line for each step, and one for the limit."""
    rows = [
        {
            "steps": "as trained" if m == 1 else f"h / {m}",
            "accuracy (%)": f"{100 * accuracy:.1f}",
            "from the limit": f"{100 * mean:+.1f} [{100 * low:.1f}, {100 * high:.1f}]",
            "the same network": _answer(low, high),
        }
        for m, accuracy, (mean, low, high) in zip(found.divisors, found.accuracies, found.differences, strict=True)
    ]
    return [*rows, {"steps": "limit", "accuracy (%)": f"{100 * found.limit:.1f}", "from the limit": "", "the same network": ""}]
