"""Gradients compared: their errors, what they evaluate and what they store."""

import itertools
import math

import pytest
import torch
from problems import FLOAT64, small_mlp, states, tanh_layers
from torch import nn

import continuum
from continuum import Autonomous, Coupled, Euler, FixedStep, Flow, Momentum, PiecewiseConstant
from continuum.analysis.gradients import compare_gradients
from continuum.fields import Function
from continuum.schemes import Coupling, LinearTwoStep, Verlet
from continuum.solvers import Adaptive, parse


def smooth():
    field = small_mlp()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.mul_(2)
    return Flow(field, "dopri5", depth=2), states()


def dopri5(tolerance, gradient):
    return parse(f"dopri5:rtol={tolerance:g},atol={tolerance:g},gradient={gradient}")


def branch():
    return Autonomous(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))


def coupled(layers, count=4):
    torch.manual_seed(0)
    field = PiecewiseConstant([Coupled(branch(), branch()) for _ in range(layers)])
    return Flow(field, FixedStep(Coupling()), depth=layers), torch.randn(count, 8)


class Decay(Autonomous):
    """x' = -a x, so that x(T) = exp(-a T) x(0) and d x(T) / d a = -T x(T)."""

    def __init__(self):
        super().__init__(nn.Identity())
        self.a = nn.Parameter(torch.tensor(0.7, dtype=FLOAT64))

    def forward(self, t, x):
        return -self.a * x


@pytest.mark.parametrize("steps", [4, 8, 32])
def test_error_is_that_of_the_known_gradient(steps):
    # Of x (1 - a h)^N the derivative with respect to a is -T (1 - a h)^(N - 1) x; of the equation, -T exp(-a T) x.
    x = torch.ones(3, 2, dtype=FLOAT64)
    (row,) = compare_gradients(Flow(Decay(), "euler", depth=2), x, [FixedStep(Euler(), h=2 / steps)])
    exact = math.exp(-0.7 * 2)
    assert row.error == pytest.approx(abs((1 - 0.7 * 2 / steps) ** (steps - 1) - exact) / exact, rel=1e-6)


def test_direct_error_falls_with_the_tolerance():
    flow, x = smooth()
    errors = [row.error for row in compare_gradients(flow, x, [dopri5(10.0**-n, "direct") for n in (2, 4, 6, 8)])]
    assert all(tight < loose / 5 for loose, tight in itertools.pairwise(errors))
    assert errors[-1] < 1e-6


def test_adjoint_is_worse_at_a_loose_tolerance():
    flow, x = smooth()
    for mode in ("adjoint", "full_adjoint"):
        loose, tight = compare_gradients(flow, x, [dopri5(1e-2, mode), dopri5(1e-8, mode)])
        assert loose.step_error > 100 * tight.step_error > 0
        assert loose.error > 100 * tight.error


@pytest.mark.parametrize("solver", ["dopri5:rtol=0.001,atol=0.001", "rk4:h=0.5", "rk4:h=0.5,every=2"])
def test_checkpoint_is_the_gradient_of_the_same_steps(solver):
    flow, x = smooth()
    (row,) = compare_gradients(flow, x, [parse(f"{solver},gradient=checkpoint")])
    (direct,) = compare_gradients(flow, x, [parse(solver.removesuffix(",every=2"))])
    assert direct.step_error is None
    assert row.step_error < 1e-14
    assert row.error == pytest.approx(direct.error, rel=1e-9)


def test_evaluations_out_and_back():
    flow, x = smooth()
    solvers = [parse("rk4:h=0.5"), parse("rk4:h=0.5,gradient=checkpoint"), dopri5(1e-3, "direct"), dopri5(1e-3, "adjoint")]
    fixed, again, adaptive, adjoint = compare_gradients(flow, x, solvers)
    assert (fixed.evaluations, fixed.backward_evaluations) == (16, 0)
    assert (again.evaluations, again.backward_evaluations) == (16, 16)
    solved = flow.with_solver(dopri5(1e-3, "direct"))
    solved(x)
    assert (adaptive.evaluations, adaptive.backward_evaluations) == (solved.cost.evaluations, 0)
    assert adjoint.evaluations == adaptive.evaluations
    assert adjoint.backward_evaluations > 6


@pytest.mark.parametrize(("scheme", "stages"), [(Coupling(), 1), (Verlet(), 2)])
@pytest.mark.parametrize(("gradient", "back"), [("direct", 0), ("reversible", 1), ("checkpoint", 1)])
def test_evaluations_of_coupled_layers(scheme, stages, gradient, back):
    flow, x = coupled(5)
    (row,) = compare_gradients(flow, x, [FixedStep(scheme, gradient=gradient)])
    assert (row.evaluations, row.backward_evaluations) == (5 * stages, back * 5 * stages)


def test_evaluations_of_layers_with_momentum():
    torch.manual_seed(0)
    flow = Flow(PiecewiseConstant([Momentum(branch(), k=-0.9) for _ in range(4)]), FixedStep(LinearTwoStep()), depth=4)
    direct, euler = compare_gradients(flow, torch.randn(3, 4), [FixedStep(LinearTwoStep()), FixedStep(Euler())])
    assert direct.evaluations == euler.evaluations == 4
    assert direct.error is None
    assert euler.error is not None


def test_reversible_stores_less_than_direct():
    flow, x = coupled(16, count=256)
    direct, reversible = compare_gradients(flow, x, [FixedStep(Coupling()), FixedStep(Coupling(), gradient="reversible")])
    assert reversible.memory < direct.memory / 2
    assert direct.error is reversible.error is None
    assert 0 < reversible.step_error < 1e-4


def test_memory_is_without_the_parameters_and_their_gradients():
    wide = nn.Linear(300, 300)
    flow = Flow(Autonomous(nn.Sequential(wide, nn.Tanh())), "euler", depth=1)
    (row,) = compare_gradients(flow, torch.randn(2, 300), [FixedStep(Euler())])
    size = wide.weight.numel() * 4 / 2**20
    assert row.memory < 1.1 * size  # the gradient itself on its way to where it is added, and nothing else of that size


def test_float32_with_batch_norm_and_its_buffers_untouched():
    network = continuum.zoo.resnet(14, width=4)
    flow = network.flows[0].train()
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)).relu()
    before = {name: buffer.clone() for name, buffer in flow.named_buffers()}
    rows = compare_gradients(flow, x, [FixedStep(Euler()), FixedStep(Euler(), gradient="checkpoint"), dopri5(1e-3, "adjoint")])
    assert [row.failure for row in rows] == [None] * 3
    assert rows[1].step_error < 1e-6
    assert rows[0].error > rows[2].error
    assert all(torch.equal(buffer, before[name]) for name, buffer in flow.named_buffers())
    assert flow.training
    assert all(parameter.grad is None for parameter in flow.parameters())


def test_a_solver_that_fails_has_its_failure():
    flow, x = smooth()
    failed, solved = compare_gradients(flow, x, [Adaptive("dopri5", 1e-8, 1e-8, max_evaluations=20), dopri5(1e-3, "direct")])
    assert "budget" in failed.failure
    assert math.isnan(failed.memory)
    assert failed.error is solved.failure is None
    assert solved.error is not None


def test_bad_input():
    flow, x = smooth()
    with pytest.raises(ValueError, match="requires a gradient"):
        compare_gradients(Flow(Function(lambda t, x: -x), "euler", depth=1), x, [FixedStep(Euler())])
    with pytest.raises(TypeError, match="no noise"):
        compare_gradients(flow, x, [parse("brownian:method=euler")])
    with pytest.raises(TypeError, match="Coupled"):
        compare_gradients(Flow(tanh_layers(2), "euler", depth=2), torch.ones(1, 4, dtype=FLOAT64), [FixedStep(Coupling())])
