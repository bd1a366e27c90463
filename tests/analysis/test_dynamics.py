"""Dynamics of flows and costs of tolerances: linear flows with known singular values, and full Jacobians."""

import copy
import itertools
import math

import pytest
import torch
from problems import FLOAT64, MATRIX, small_mlp, states, tanh_layers
from runs import same_state
from torch import nn

import continuum
from continuum import MLP, Autonomous, Euler, Expansion, FixedStep, Flow, Momentum, Network, PiecewiseConstant
from continuum.analysis.cost import tolerance_sweep
from continuum.analysis.dynamics import flow_dynamics, largest_singular_values
from continuum.bases import Box, Hat, Legendre
from continuum.schemes import LinearTwoStep


def linear(matrix, dtype=FLOAT64):
    layer = nn.Linear(len(matrix), len(matrix), bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(matrix)
    return Autonomous(layer)


def network(*stages):
    return Network(nn.Identity(), stages, nn.Identity())


def sigma_max(matrix):
    return float(torch.linalg.svdvals(matrix)[0])


def test_linear_flow_stretches_as_its_exponential():
    flow = Flow(linear(MATRIX), "dopri5:rtol=1e-10,atol=1e-10", depth=2)
    (found,) = flow_dynamics(network(flow), states(5, 3))
    exact = sigma_max(torch.linalg.matrix_exp(2 * MATRIX))
    assert found.lipschitz == pytest.approx(exact, rel=1e-5)
    assert found.lyapunov == pytest.approx(math.log(exact) / 2, rel=1e-4)


def test_linear_layers_stretch_as_the_product_of_their_matrices():
    others = [MATRIX, 0.5 * MATRIX.T, -MATRIX]
    flow = Flow(PiecewiseConstant(map(linear, others)), FixedStep(Euler(), gradient="checkpoint"), depth=3)
    (found,) = flow_dynamics(network(flow), states(5, 3))
    identity = torch.eye(3, dtype=FLOAT64)
    product = (identity + others[2]) @ (identity + others[1]) @ (identity + others[0])
    assert found.lipschitz == pytest.approx(sigma_max(product), rel=1e-5)
    x = states(5, 3)
    assert found.steps[0] == pytest.approx(float(((x @ others[0].T).norm(dim=1) / x.norm(dim=1)).mean()))
    x = x @ (identity + others[0]).T
    assert found.steps[1] == pytest.approx(float(((x @ others[1].T).norm(dim=1) / x.norm(dim=1)).mean()))
    expected = [sum_of_squares(b - a) / sum_of_squares(a) for a, b in itertools.pairwise(others)]
    assert found.smoothness == pytest.approx(expected)


def sum_of_squares(matrix):
    return float(matrix.square().sum().sqrt())


@pytest.mark.parametrize("solver", ["euler", "rk4:h=0.5", "dopri5:rtol=1e-6,atol=1e-6"])
def test_singular_values_are_those_of_the_full_jacobian(solver):
    flow, x = Flow(tanh_layers(3, gain=2.0), solver, depth=3).eval(), states(5, 4)
    (found,) = flow_dynamics(network(flow), x)
    each = [sigma_max(torch.autograd.functional.jacobian(lambda y: flow(y[None])[0], row)) for row in x]
    rel = 1e-4 if "dopri5" in solver else 1e-5  # alone, an image takes other steps than in the batch
    assert found.lipschitz == pytest.approx(max(each), rel=rel)
    assert found.lyapunov == pytest.approx(sum(map(math.log, each)) / len(each) / 3, rel=10 * rel)
    assert math.exp(3 * found.lyapunov) < found.lipschitz


def test_memory_is_held():
    # One step of x+ = (1 - k) x + k x_before + A x, whose derivative with respect to x alone is (1 - k) I + A.
    flow = Flow(Momentum(linear(MATRIX), k=-0.5), FixedStep(LinearTwoStep()), depth=1).double()
    found = largest_singular_values(flow, states(5, 3), torch.zeros_like(states(5, 3)))
    exact = sigma_max(1.5 * torch.eye(3, dtype=FLOAT64) + MATRIX)
    assert found.tolist() == pytest.approx([exact] * 5, rel=1e-5)


def test_every_accepted_step_has_its_size():
    flow = Flow(linear(MATRIX), "dopri5:rtol=1e-8,atol=1e-8", depth=2)
    (found,) = flow_dynamics(network(flow), states(5, 3))
    flow(states(5, 3))
    assert len(found.steps) == flow.cost.accepted > 2
    x, h = states(5, 3), flow.cost.grid[1]
    assert found.steps[0] == pytest.approx(h * float(((x @ MATRIX.T).norm(dim=1) / x.norm(dim=1)).mean()))


def test_smoothness_at_the_nodes_of_an_expansion():
    torch.manual_seed(0)
    matrices = torch.randn(4, 3, 3, dtype=FLOAT64)
    expected = [sum_of_squares(b - a) / sum_of_squares(a) for a, b in itertools.pairwise(matrices)]
    for basis in (Hat(4, depth=6), Box(4, depth=6)):
        field = Expansion([linear(matrix) for matrix in matrices], basis)
        (found,) = flow_dynamics(network(Flow(field, "rk4:h=0.5", depth=6)), states(5, 3))
        assert found.smoothness == pytest.approx(expected)
    field = Expansion(linear(MATRIX), Legendre(3, depth=6))
    assert flow_dynamics(network(Flow(field, "rk4", depth=6)), states(5, 3))[0].smoothness == pytest.approx([0, 0], abs=1e-12)
    assert flow_dynamics(network(Flow(MLP(3, 4), "rk4", depth=1)), states(5, 3))[0].smoothness == []


def test_smoothness_leaves_out_the_k_of_momentum():
    layers = [linear(MATRIX), Momentum(linear(MATRIX), k=-0.1), Momentum(linear(2 * MATRIX), k=-0.9)]
    flow = Flow(PiecewiseConstant(layers), FixedStep(LinearTwoStep()), depth=3)
    assert flow_dynamics(network(flow), states(5, 3))[0].smoothness == pytest.approx([0, 1])


@pytest.mark.parametrize("build", ["lm_resnet", "stochastic_depth_resnet", "odenet"])
def test_published_networks(build):
    torch.manual_seed(0)
    built = continuum.zoo.odenet(width=8, downsample=False) if build == "odenet" else getattr(continuum.zoo, build)(14)
    before = copy.deepcopy(built)
    found = flow_dynamics(built, torch.randn(2, 1 if build == "odenet" else 3, 8, 8))
    assert len(found) == len(built.flows)
    for row in found:
        assert 0 < row.lipschitz < math.inf
        assert row.steps
        assert math.isfinite(row.lyapunov)
    assert built.training
    assert same_state(built, before)


def sweep(dtype=FLOAT64, tolerances=(1e-2, 1e-4, 1e-6)):
    field = small_mlp(4, 16)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.mul_(3)
    net = Network(nn.Identity(), [Flow(field, "dopri5", depth=1), Flow(field, "dopri5", depth=2)], nn.Linear(4, 3)).to(dtype)
    images = states(6, 4).to(dtype)
    return net, tolerance_sweep(net, images, net(images).argmax(1), ("dopri5", "bosh3"), tolerances)


def test_error_falls_and_evaluations_grow_with_the_tolerance():
    net, rows = sweep()
    for method in ("dopri5", "bosh3"):
        found = [row for row in rows if row.method == method]
        assert [row.tolerance for row in found] == [1e-2, 1e-4, 1e-6]
        assert all(tight.error < loose.error / 5 for loose, tight in itertools.pairwise(found))
        assert all(tight.evaluations > loose.evaluations for loose, tight in itertools.pairwise(found))
        assert found[-1].accuracy == 1
        assert found[-1].error < 1e-4
    costs = [flow.cost for flow in net.flows]
    assert all(cost is not None for cost in costs)


def test_costs_and_errors_are_those_of_the_flows():
    net, rows = sweep(tolerances=(1e-3,))
    x = states(6, 4)
    net.requires_grad_(False)
    first, second = (flow.with_solver("dopri5:rtol=1e-3,atol=1e-3") for flow in net.flows)
    logits = net.head(second(first(x)))
    for count in ("evaluations", "accepted", "rejected"):
        assert getattr(rows[0], count) == getattr(first.cost, count) + getattr(second.cost, count)
    exact = net.with_solver("dopri8:rtol=1e-10,atol=1e-10")(x)
    assert rows[0].error == pytest.approx(float(((logits - exact).norm(dim=1) / exact.norm(dim=1)).max()), rel=0.05)


def test_float32_and_labels_that_are_wrong():
    net, _ = sweep(torch.float32, (1e-2,))
    images = states(6, 4).float()
    labels = (net(images).argmax(1) + 1) % 3
    labels[0] = net(images).argmax(1)[0]
    (row,) = tolerance_sweep(net, images, labels, ["dopri5"], [1e-5])
    assert row.accuracy == pytest.approx(1 / 6)
    assert row.error < 1e-4


def test_a_method_that_fails_and_a_network_that_cannot_be_solved():
    field = Autonomous(nn.Linear(2, 2, bias=False).double())
    with torch.no_grad():
        field.module.weight.copy_(torch.tensor([[math.nan, 0.0], [0.0, 1.0]]))
    (row,) = tolerance_sweep(network(Flow(field, "euler", depth=1)), states(2, 2), torch.zeros(2), ["dopri5"], [1e-2])
    assert row.failure
    assert all(map(math.isnan, (row.error, row.evaluations)))
    with pytest.raises(TypeError, match="no flow"):
        tolerance_sweep(network(), states(2, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="one label"):
        tolerance_sweep(network(Flow(field, "euler", depth=1)), states(2, 2), torch.zeros(3))
