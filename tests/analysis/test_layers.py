"""The map of layers: a layer in several steps, all others as they are."""

import pytest
from problems import states, tanh_layers
from torch import nn

from continuum import Autonomous, FixedStep, Flow, PiecewiseConstant
from continuum.analysis.layers import layer_map
from continuum.fields import Split
from continuum.schemes import LieTrotter

LAYERS = tanh_layers(3)


@pytest.mark.parametrize("m", [2, 5])
def test_a_layer_takes_m_steps_and_all_others_one(m: int) -> None:
    x = states(6, 4)
    model = nn.Sequential(Flow(LAYERS, "euler", 3), nn.Linear(4, 5).double())
    whole = model(x)
    rows = list(layer_map(model, x, m=m, measure=lambda y: float(y.sum())))
    assert [(row.flow, row.layer, row.m) for row in rows] == [("0", k, m) for k in range(3)]
    for row in rows:
        y = x
        for k, layer in enumerate(LAYERS.pieces()):
            for _ in range(m if k == row.layer else 1):
                y = y + layer(0.0, y) / (m if k == row.layer else 1)
        y = model[1](y)
        assert row.difference == pytest.approx(float((y - whole).norm() / whole.norm()), rel=1e-9)
        assert row.changed == float((y.argmax(1) != whole.argmax(1)).double().mean())
        assert row.measure == pytest.approx(float(y.sum() - whole.sum()), rel=1e-6)


def test_the_parts_of_a_layer_are_halved_together() -> None:
    x, a, b = states(6, 4), nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    flow = Flow(PiecewiseConstant([Split(Autonomous(a), Autonomous(b))]), FixedStep(LieTrotter()), 1)
    (row,) = layer_map(flow, x)
    y = x
    for _ in range(2):
        y = y + a(y) / 2
        y = y + b(y) / 2
    assert row.difference == pytest.approx(float((y - flow(x)).norm() / flow(x).norm()), rel=1e-9)


def test_smaller_layers_are_nearer_to_an_equation() -> None:
    x = states(6, 4)
    coarse, fine = (
        max(row.difference for row in layer_map(Flow(PiecewiseConstant(LAYERS.pieces()).scaled(s), "euler", 3), x))
        for s in (1.0, 0.25)
    )
    assert fine < coarse / 8, "the second difference of a step falls like its square"


@pytest.mark.parametrize("solver", ["euler:h=0.5", "dopri5"])
def test_other_steps_are_refused(solver: str) -> None:
    with pytest.raises(TypeError, match="each is one step of its own"):
        list(layer_map(Flow(LAYERS, solver, 3), states(2, 4)))
    with pytest.raises(ValueError, match="needs equal steps"):
        list(layer_map(Flow(LAYERS, "adams_bashforth", 3), states(2, 4)))
    with pytest.raises(TypeError, match="has no flow"):
        list(layer_map(nn.Linear(4, 4), states(2, 4)))
    with pytest.raises(ValueError, match="at least 2, not 1"):
        list(layer_map(Flow(LAYERS, "euler", 3), states(2, 4), m=1))
