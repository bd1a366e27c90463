"""Reversible steps: undone to rounding, and gradients from rebuilt states that are those of the stored ones."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import FLOAT64, Negative
from torch import nn

import continuum
from continuum import MLP, Autonomous, Coupled, Euler, Expansion, FixedStep, Flow, Momentum, PiecewiseConstant, SecondOrder
from continuum.analysis.memory import peak_memory
from continuum.bases import Hat
from continuum.fields import Hamiltonian, PreActivation
from continuum.schemes import Coupling, Leapfrog, LinearTwoStep, TwoStepMidpoint, Verlet


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


def states(dtype, batch=4, channels=4, size=6, seed=1):
    return torch.randn(batch, channels, size, size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


# Undoing


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (FLOAT64, 1e-14)], ids=str)
@pytest.mark.parametrize("h", [1.0, 0.5, -0.5])
@pytest.mark.parametrize("scheme", LAYERS, ids=str)
def test_a_step_is_undone(scheme, h, dtype, bound):
    field, t = layers(scheme, 3, 1.0, dtype), 1.0
    x = states(dtype)
    memory = scheme.begin(field, x, states(dtype, seed=2), [(t, h)])
    with torch.no_grad():
        after = scheme.step(field, t, x, h, memory)
        before, memory_before = scheme.undo(field, t, *after[:1], h, after[1])
    assert error(before, x) <= bound
    assert len(memory_before) == len(memory)
    for found, expected in zip(memory_before, memory, strict=True):
        assert error(found, expected) <= bound


@pytest.mark.parametrize("scheme", [TwoStepMidpoint(), LinearTwoStep()], ids=str)
def test_a_first_step_has_no_memory_to_give_back(scheme):
    field, x = layers(scheme, 1, 1.0, FLOAT64), states(FLOAT64)
    with torch.no_grad():
        after, memory = scheme.step(field, 0.0, x, 1.0, ())
        assert scheme.undo(field, 0.0, after, 1.0, memory, first=True)[1] == ()
        assert torch.equal(scheme.undo(field, 0.0, after, 1.0, memory, first=True)[0], x)


@pytest.mark.parametrize("k", [-0.5, -0.1, 0.02])
def test_undoing_a_linear_two_step_loses_eps_over_k(k):
    torch.manual_seed(0)
    field, scheme = Momentum(branch(4), k), LinearTwoStep()
    x, before = states(torch.float32), states(torch.float32, seed=2)
    with torch.no_grad():
        after, memory = scheme.step(field, 0.0, x, 1.0, (before,))
        _, (found,) = scheme.undo(field, 0.0, after, 1.0, memory)
    eps = torch.finfo(torch.float32).eps
    assert error(found, before) <= 20 * eps / abs(k)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (FLOAT64, 1e-12)], ids=str)
@pytest.mark.parametrize("scheme", [Coupling(), Verlet()], ids=str)
def test_a_hundred_layers_are_undone(scheme, dtype, bound):
    field, x = layers(scheme, 100, 0.1, dtype), states(dtype)
    with torch.no_grad():
        end = x
        for n in range(100):
            end, _ = scheme.step(field, float(n), end, 1.0, ())
        for n in reversed(range(100)):
            end, _ = scheme.undo(field, float(n), end, 1.0, ())
    assert error(end, x) <= bound


# Gradients


def gradients(flow, x, previous=None, seed=3):
    """End state, gradients of start and parameters, and buffers, after a forward and a backward pass."""
    flow.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    end = flow(x, previous)
    end.square().sum().backward()
    return end, [x.grad, *(p.grad for p in flow.parameters())], list(flow.buffers())


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
    previous = None if starts_with == "nothing" else states(dtype, seed=2)
    direct, rebuilt = pair(layers(scheme, 12, 0.1, dtype, dropout=0.2), scheme, 12, h)
    x = states(dtype)
    end, expected, statistics = gradients(direct, x, previous)
    same_end, found, same_statistics = gradients(rebuilt, x, previous)
    assert torch.equal(end, same_end)
    assert all(torch.equal(a, b) for a, b in zip(statistics, same_statistics, strict=True)), "running statistics moved once"
    for (name, _), ours, theirs in zip([("x", None), *rebuilt.named_parameters()], found, expected, strict=True):
        assert error(ours, theirs) <= bound, name


@pytest.mark.parametrize("name", ["revnet", "hamiltonian", "midpoint", "leapfrog", "momentum_resnet"])
def test_networks_train_with_rebuilt_states(name):
    torch.manual_seed(0)
    small = {"revnet": {"depth": 26, "scale": 0.1}, "hamiltonian": {"depth": 26}, "momentum_resnet": {"width": 4}}
    arguments = small.get(name, {"depth": 14})
    network = getattr(continuum.zoo, name)(
        **arguments, **({} if name == "momentum_resnet" else {"widths": (4, 8, 12)})
    ).double()
    other = copy.deepcopy(network).with_solver(FixedStep(network.solver.scheme, gradient="reversible"))
    images = states(FLOAT64, channels=3, size=16)
    for model in (network, other):
        model(images).square().sum().backward()
    for (label, ours), theirs in zip(other.named_parameters(), network.parameters(), strict=True):
        if theirs.requires_grad:
            assert error(ours.grad, theirs.grad) <= 1e-8, label
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), other.buffers(), strict=True))


def test_states_along_the_way_have_gradients_too():
    field, x = layers(Coupling(), 4, 0.1, FLOAT64), states(FLOAT64)
    found = []
    for flow in pair(field, Coupling(), 4):
        start = x.clone().requires_grad_()
        flow.trajectory(start, [0, 1, 4]).pow(3).sum().backward()
        found.append([start.grad, *(p.grad for p in flow.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_weights_on_a_basis_have_gradients_too():
    torch.manual_seed(0)
    field = Expansion([MLP(3, 5).double() for _ in range(3)], Hat(3, depth=4.0))
    x = torch.randn(5, 3, dtype=FLOAT64)
    direct, rebuilt = (gradients(flow, x)[1] for flow in pair(field, TwoStepMidpoint(), 4, h=0.5))
    for ours, theirs in zip(rebuilt, direct, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_coefficient_of_momentum_has_a_gradient_and_a_frozen_weight_has_none():
    field = layers(LinearTwoStep(), 3, 0.1, FLOAT64)
    frozen = field.layers[1].field.field.module.conv1.weight.requires_grad_(False)
    for flow in pair(field, LinearTwoStep(), 3):
        gradients(flow, states(FLOAT64))
    assert frozen.grad is None
    assert field.layers[1].k.grad.abs() > 0


def test_the_precision_of_the_forward_pass_is_kept():
    """Under autocast the rebuilt evaluations run in bfloat16 too: the gradients are much closer than bfloat16's rounding."""
    direct, rebuilt = pair(layers(Coupling(), 4, 0.1, torch.float32), Coupling(), 4)
    found = []
    for flow in (direct, rebuilt):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            end = flow(states(torch.float32))
        assert end.dtype == torch.float32
        end.square().sum().backward()
        found.append([p.grad for p in flow.parameters()])
    for ours, theirs in zip(*found, strict=True):
        assert error(ours, theirs) <= 1e-3


def test_random_numbers_go_on_as_if_nothing_had_been_recomputed():
    draws = []
    for flow in pair(layers(Coupling(), 3, 0.1, torch.float32, dropout=0.5), Coupling(), 3):
        gradients(flow, states(torch.float32))
        draws.append(torch.rand(4))
    assert torch.equal(*draws)


def test_without_gradients_nothing_is_kept():
    _, rebuilt = pair(layers(Verlet(), 2, 0.1, torch.float32), Verlet(), 2)
    with torch.no_grad():
        assert not rebuilt(states(torch.float32)).requires_grad


def test_weights_changed_before_the_backward_pass_are_noticed():
    _, rebuilt = pair(layers(Coupling(), 2, 0.1, torch.float32), Coupling(), 2)
    end = rebuilt(states(torch.float32))
    with torch.no_grad():
        next(rebuilt.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        end.sum().backward()


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
    x = states(FLOAT64).requires_grad_()
    with pytest.raises(RuntimeError, match=r"gradient='reversible' computes its gradient by hand.*gradient='direct'"):
        torch.autograd.grad(rebuilt(x).square().sum(), x, create_graph=True)


def test_memory_does_not_grow_with_the_number_of_layers():
    """Without parameters and their gradients; the states of the direct gradient grow."""

    def peak(depth, gradient):
        torch.manual_seed(0)
        field = PiecewiseConstant(Hamiltonian(8).scaled(0.1) for _ in range(depth))
        flow = Flow(field, FixedStep(Coupling(), gradient=gradient), depth)
        x = states(torch.float32, batch=8, channels=8, size=16)
        kept = sum(p.numel() * p.element_size() for p in flow.parameters())
        return peak_memory(lambda: flow(x).square().sum().backward(), torch.device("cpu")) - kept

    assert peak(64, "reversible") < 1.05 * peak(8, "reversible")
    assert peak(64, "direct") > 4 * peak(8, "direct")


WORKER = Path(__file__).parent / "reversible_worker.py"


def test_two_processes_train_as_one(tmp_path):
    """DistributedDataParallel accepts the gradients, which are those of the whole batch (fields without batch statistics)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, str(WORKER), str(rank), str(tmp_path)], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    first, second, alone = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("0", "1", "alone"))
    for name, gradient in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], gradient, rtol=1e-10, atol=1e-12)


# What cannot be


def test_schemes_that_cannot_be_undone_are_refused():
    with pytest.raises(TypeError, match="Euler cannot"):
        FixedStep(Euler(), gradient="reversible")
    with pytest.raises(ValueError, match="direct, reversible"):
        FixedStep(Coupling(), gradient="adjoint")
    with pytest.raises(ValueError, match=r"in 'rk4:gradient=reversible'.*undo"):
        Flow(MLP(2, 3), "rk4:gradient=reversible", 1)
    with pytest.raises(TypeError, match="layer 1 is a Autonomous without k"):
        Flow(PiecewiseConstant([Momentum(branch(2)), branch(2)]), "linear_two_step:gradient=reversible", 2)


@pytest.mark.parametrize("scheme", [Coupling(), Leapfrog(), Verlet()], ids=str)
def test_split_schemes_need_two_halves(scheme):
    with pytest.raises(TypeError, match=r"steps Coupled fields.*got a MLP"):
        Flow(MLP(2, 3), FixedStep(scheme), 1)
    flow = Flow(SecondOrder(Autonomous(Negative())), FixedStep(scheme), 1)
    with pytest.raises(ValueError, match=r"even number of channels.*\(2, 3\)"):
        flow(torch.zeros(2, 3))


def test_halves_that_are_none():
    with pytest.raises(TypeError, match="Autonomous"):
        Coupled(nn.Linear(2, 2), branch(2))
    with pytest.raises(TypeError, match="jumps"):
        Coupled(branch(2), PiecewiseConstant([branch(2), branch(2)]))
    with pytest.raises(ValueError, match="even number of channels, not 5"):
        Hamiltonian(5)
    with pytest.raises(ValueError, match="even number of channels, not 33"):
        continuum.zoo.revnet(38, widths=(32, 33, 64))
    with pytest.raises(TypeError, match="k = 1"):
        Flow(Momentum(branch(2)), "two_step_midpoint", 1)
    with pytest.raises(ValueError, match="SecondOrder"):
        Momentum(branch(2), k=-1)
