"""Which layers are equations? Each layer alone with steps of 1/m, all others with one step: how far the outputs move.

    difference = |y(layer k in m steps) - y| / |y|

A layer that is a step of an equation moves them little, and the less the smaller its step was before.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from continuum.flow import Flow
from continuum.models.flows import named_flows, replaced
from continuum.solvers.base import evaluating

Measure = Callable[[Tensor], float]
"""A number that says how good outputs are, such as their accuracy."""


@dataclass(frozen=True)
class Layer:
    """How far the outputs move if one layer takes other steps: relative to their size, in the largest entry, in the measure.

    `changed` is the share of rows whose largest entry is another one: of samples that change their class.
    """

    flow: str
    layer: int
    m: int
    difference: float
    changed: float
    measure: float | None = None


@torch.no_grad()
def layer_map(model: nn.Module, *inputs: Any, m: int = 2, measure: Measure | None = None) -> Iterator[Layer]:
    """Every layer of a model, one after the other, with m steps in the place of its one; in evaluation mode.

    It takes as many forward passes as there are layers, and one.

    >>> from continuum import zoo
    >>> _ = torch.manual_seed(0)
    >>> rows = list(layer_map(zoo.preresnet(20, width=4), torch.randn(2, 3, 16, 16)))
    >>> [(row.flow, row.layer) for row in rows][:3]
    [('stages.0', 0), ('stages.0', 1), ('stages.0', 2)]

    Args:
        model: with flows of fixed steps, h = 1; its outputs are a tensor, or have one as `logits`.
        inputs: what the model is called with.
        m: steps of the layer that is looked at.
        measure: of the outputs; `Layer.measure` is by how much it changes.

    Raises:
        TypeError: a flow that takes other steps, or no flow.
        ValueError: m is less than 2, or a scheme needs equal steps.
    """
    if m < 2:
        raise ValueError(f"m is how many steps a layer takes in the place of one, at least 2, not {m}")
    flows = named_flows(model)
    if not flows:
        raise TypeError(f"this {type(model).__name__} has no flow, whose layers could be looked at")
    for name, flow in flows.items():
        _check(name, flow)
    with evaluating(model):
        before = logits_of(model(*inputs))
        quality = measure(before) if measure else 0.0
        for name, flow in flows.items():
            for layer in range(round(flow.depth)):
                after = logits_of(_finer(model, flow, layer, m)(*inputs))
                yield Layer(
                    name,
                    layer,
                    m,
                    float((after - before).norm() / before.norm()),
                    float((after.argmax(-1) != before.argmax(-1)).double().mean()),
                    measure(after) - quality if measure else None,
                )


def logits_of(outputs: Any) -> Tensor:
    """The tensor that a model returns, or what it returns as `logits`."""
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def _check(name: str, flow: Flow) -> None:
    if flow.solver.steps(0.0, flow.depth) != [(float(k), 1.0) for k in range(round(flow.depth))]:
        raise TypeError(
            f"flow {name} is solved by {flow.solver}: layers are looked at where each is one step of its own, as under "
            "euler or lie_trotter with h = 1"
        )


def _finer(model: nn.Module, flow: Flow, layer: int, m: int) -> nn.Module:
    """The model, in which one layer of a flow takes m steps."""
    before, after = (float(k) for k in range(layer)), (float(k) for k in range(layer + 1, round(flow.depth) + 1))
    solver = flow.solver.over((*before, *(layer + i / m for i in range(m)), *after))
    return replaced(model, lambda module: flow.with_solver(solver) if module is flow else None)
