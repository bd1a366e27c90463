"""Reversible steps: undone to rounding, and gradients from rebuilt states that are those of the stored ones."""

import copy

import pytest
import torch
from networks import build
from problems import FLOAT64, Negative, small_mlp, solved, states
from torch import nn

import continuum
from continuum import MLP, Autonomous, Coupled, Expansion, FixedStep, Flow, Momentum, PiecewiseConstant, SecondOrder
from continuum.analysis.memory import peak_memory
from continuum.bases import Hat
from continuum.fields import Hamiltonian, PreActivation
from continuum.schemes import Coupling, Leapfrog, LinearTwoStep, TwoStepMidpoint, Verlet

IMAGES = (4, 4, 6, 6)


def branch(channels, dropout=0.0):
    """A residual branch, with norms that are not trivial."""
    module = PreActivation(channels, channels, dropout=dropout)
    for norm in (module.norm1, module.norm2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
    return Autonomous(module)


def coupled(dropout=0.0):
    return Coupled(branch(2, dropout), branch(2, dropout))


LAYERS = {
    Coupling(): coupled,
    Leapfrog(): coupled,
    Verlet(): coupled,
    TwoStepMidpoint(): lambda dropout=0.0: branch(4, dropout),
    LinearTwoStep(): lambda dropout=0.0: Momentum(branch(4, dropout).scaled(0.1), k=-0.9),  # a momentum ResNet's
}


def layers(scheme, count, scale, dtype, dropout=0.0):
    torch.manual_seed(0)
    return PiecewiseConstant(LAYERS[scheme](dropout).scaled(scale) for _ in range(count)).to(dtype)


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


# Undoing
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (FLOAT64, 1e-14)], ids=str)
@pytest.mark.parametrize("h", [1.0, 0.5, -0.5])
@pytest.mark.parametrize("scheme", LAYERS, ids=str)
def test_a_step_is_undone(scheme, h, dtype, bound):
    field, t = layers(scheme, 3, 1.0, dtype), 1.0
    x = states(*IMAGES, dtype=dtype)
    memory = scheme.begin(field, x, states(*IMAGES, dtype=dtype, seed=2), [(t, h)])
    with torch.no_grad():
        after = scheme.step(field, t, x, h, memory)
        before, memory_before = scheme.undo(field, t, *after[:1], h, after[1])
    assert error(before, x) <= bound
    assert len(memory_before) == len(memory)
    for found, expected in zip(memory_before, memory, strict=True):
        assert error(found, expected) <= bound


@pytest.mark.parametrize("scheme", [TwoStepMidpoint(), LinearTwoStep()], ids=str)
def test_a_first_step_has_no_memory_to_give_back(scheme):
    field, x = layers(scheme, 1, 1.0, FLOAT64), states(*IMAGES)
    with torch.no_grad():
        after, memory = scheme.step(field, 0.0, x, 1.0, ())
        assert scheme.undo(field, 0.0, after, 1.0, memory, first=True)[1] == ()
        assert torch.equal(scheme.undo(field, 0.0, after, 1.0, memory, first=True)[0], x)


@pytest.mark.parametrize("k", [-0.5, -0.1, 0.02])
def test_undoing_a_linear_two_step_loses_eps_over_k(k):
    torch.manual_seed(0)
    field, scheme = Momentum(branch(4), k), LinearTwoStep()
    x, before = states(*IMAGES, dtype=torch.float32), states(*IMAGES, dtype=torch.float32, seed=2)
    with torch.no_grad():
        after, memory = scheme.step(field, 0.0, x, 1.0, (before,))
        _, (found,) = scheme.undo(field, 0.0, after, 1.0, memory)
    eps = torch.finfo(torch.float32).eps
    assert error(found, before) <= 20 * eps / abs(k)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (FLOAT64, 1e-12)], ids=str)
@pytest.mark.parametrize("scheme", [Coupling(), Verlet()], ids=str)
def test_a_hundred_layers_are_undone(scheme, dtype, bound):
    field, x = layers(scheme, 100, 0.1, dtype), states(*IMAGES, dtype=dtype)
    with torch.no_grad():
        end = x
        for n in range(100):
            end, _ = scheme.step(field, float(n), end, 1.0, ())
        for n in reversed(range(100)):
            end, _ = scheme.undo(field, float(n), end, 1.0, ())
    assert error(end, x) <= bound


# Gradients


def pair(field, scheme, depth, h=1):
    """The flow with stored states, and its twin with rebuilt ones."""
    flow = Flow(field, FixedStep(scheme, h=h), depth)
    return flow, copy.deepcopy(flow).with_solver(FixedStep(scheme, h=h, gradient="reversible"))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (FLOAT64, 1e-8)], ids=str)
@pytest.mark.parametrize("h", [1, 0.5])
@pytest.mark.parametrize("starts_with", ["nothing", "a previous state"])
@pytest.mark.parametrize("scheme", LAYERS, ids=str)
def test_gradients_are_the_direct_ones(scheme, starts_with, h, dtype, bound):
    """With batch statistics and dropout: what is recomputed sees the same batch and the same masks."""
    previous = None if starts_with == "nothing" else states(*IMAGES, dtype=dtype, seed=2)
    direct, rebuilt = pair(layers(scheme, 12, 0.1, dtype, dropout=0.2), scheme, 12, h)
    expected, found = (solved(flow, states(*IMAGES, dtype=dtype), previous) for flow in (direct, rebuilt))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if name == "end" or name in dict(direct.named_buffers()):
            assert torch.equal(found[name], value), f"{name}: running statistics move once"
        else:
            assert error(found[name], value) <= bound, name


@pytest.mark.parametrize("name", ["revnet", "hamiltonian", "midpoint", "leapfrog", "momentum_resnet"])
def test_networks_train_with_rebuilt_states(name):
    network, images = build(name, **({"scale": 0.1} if name == "revnet" else {}))
    network.double()
    other = copy.deepcopy(network).with_solver(FixedStep(network.solver.scheme, gradient="reversible"))
    for model in (network, other):
        model(images.double()).square().sum().backward()
    for (label, ours), theirs in zip(other.named_parameters(), network.parameters(), strict=True):
        if theirs.requires_grad:
            assert error(ours.grad, theirs.grad) <= 1e-8, label
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), other.buffers(), strict=True))


def test_states_along_the_way_have_gradients_too():
    field, x = layers(Coupling(), 4, 0.1, FLOAT64), states(*IMAGES)
    found = []
    for flow in pair(field, Coupling(), 4):
        start = x.clone().requires_grad_()
        flow.trajectory(start, [0, 1, 4]).pow(3).sum().backward()
        found.append([start.grad, *(p.grad for p in flow.parameters())])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_weights_on_a_basis_have_gradients_too():
    field = Expansion([small_mlp(3, 5, seed) for seed in range(3)], Hat(3, depth=4.0))
    direct, rebuilt = (solved(flow, states(5, 3)) for flow in pair(field, TwoStepMidpoint(), 4, h=0.5))
    torch.testing.assert_close(rebuilt, direct, rtol=1e-10, atol=1e-12)


def test_the_coefficient_of_momentum_has_a_gradient_and_a_frozen_weight_has_none():
    field = layers(LinearTwoStep(), 3, 0.1, FLOAT64)
    frozen = field.layers[1].field.field.module.conv1.weight.requires_grad_(False)
    for flow in pair(field, LinearTwoStep(), 3):
        solved(flow, states(*IMAGES))
    assert frozen.grad is None
    assert field.layers[1].k.grad.abs() > 0


def test_the_precision_of_the_forward_pass_is_kept():
    """Under autocast the rebuilt evaluations run in bfloat16 too: the gradients are much closer than bfloat16's rounding."""
    direct, rebuilt = pair(layers(Coupling(), 4, 0.1, torch.float32), Coupling(), 4)
    x = states(*IMAGES, dtype=torch.float32)
    expected, found = (solved(flow, x, precision=torch.bfloat16) for flow in (direct, rebuilt))
    assert found["end"].dtype == torch.float32
    for name, _ in direct.named_parameters():
        assert error(found[name], expected[name]) <= 1e-3


def test_a_gradient_that_leads_out_of_the_field_is_refused():
    foreign = torch.ones(3, dtype=FLOAT64, requires_grad=True)

    class Foreign(nn.Module):
        def forward(self, x):
            return foreign * x

    flow = Flow(Coupled(Autonomous(Foreign()), Autonomous(nn.Tanh())), FixedStep(Coupling(), gradient="reversible"), 1)
    with pytest.raises(TypeError, match=r"gradient='reversible' would lose that gradient"):
        flow(torch.randn(2, 6, dtype=FLOAT64, requires_grad=True)).sum().backward()


def test_a_second_derivative_is_refused():
    _, rebuilt = pair(layers(Coupling(), 2, 0.1, FLOAT64), Coupling(), 2)
    x = states(*IMAGES).requires_grad_()
    with pytest.raises(RuntimeError, match=r"gradient='reversible' computes its gradient by hand.*gradient='direct'"):
        torch.autograd.grad(rebuilt(x).square().sum(), x, create_graph=True)


def test_memory_does_not_grow_with_the_number_of_layers():
    """Without parameters and their gradients; the states of the direct gradient grow."""

    def peak(depth, gradient):
        torch.manual_seed(0)
        field = PiecewiseConstant(Hamiltonian(8).scaled(0.1) for _ in range(depth))
        flow = Flow(field, FixedStep(Coupling(), gradient=gradient), depth)
        x = states(8, 8, 16, 16, dtype=torch.float32)
        kept = sum(p.numel() * p.element_size() for p in flow.parameters())
        return peak_memory(lambda: flow(x).square().sum().backward(), torch.device("cpu")) - kept

    assert peak(64, "reversible") < 1.05 * peak(8, "reversible")
    assert peak(64, "direct") > 4 * peak(8, "direct")


# What cannot be
def test_layers_that_cannot_be_undone_are_refused():
    with pytest.raises(TypeError, match="layer 1 is a Autonomous without k"):
        Flow(PiecewiseConstant([Momentum(branch(2)), branch(2)]), "linear_two_step:gradient=reversible", 2)


@pytest.mark.parametrize("scheme", [Coupling(), Leapfrog(), Verlet()], ids=str)
def test_split_schemes_need_two_halves(scheme):
    with pytest.raises(TypeError, match=r"steps Coupled fields.*got a MLP"):
        Flow(MLP(2, 3), FixedStep(scheme), 1)
    flow = Flow(SecondOrder(Autonomous(Negative())), FixedStep(scheme), 1)
    with pytest.raises(ValueError, match=r"even number of channels.*\(2, 3\)"):
        flow(torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Coupled(nn.Linear(2, 2), branch(2)), TypeError, "Autonomous"),
        (lambda: Coupled(branch(2), PiecewiseConstant([branch(2), branch(2)])), TypeError, "jumps"),
        (lambda: Hamiltonian(5), ValueError, "even number of channels, not 5"),
        (lambda: continuum.zoo.revnet(38, widths=(32, 33, 64)), ValueError, "even number of channels, not 33"),
        (lambda: Flow(Momentum(branch(2)), "two_step_midpoint", 1), TypeError, "k = 1"),
        (lambda: Momentum(branch(2), k=-1), ValueError, "SecondOrder"),
    ],
)
def test_fields_that_no_step_undoes(make, error, message):
    with pytest.raises(error, match=message):
        make()
