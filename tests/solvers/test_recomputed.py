"""gradient="checkpoint": the gradients of the stored states to the last bit, from every k-th of them."""

import copy
import math

import pytest
import torch
from networks import build
from problems import FLOAT64, STEPPED, solved, states, tanh_layers

from continuum import RK4, Autonomous, Euler, Expansion, FixedStep, Flow, PiecewiseConstant, StochasticDepth
from continuum.analysis.memory import peak_memory
from continuum.bases import Hat
from continuum.bench.counts import Synchronisations
from continuum.fields import MLP, Coupled, PreActivation
from continuum.schemes import AdamsBashforth, Coupling, Heun, LinearTwoStep, StochasticTwoStep, TwoStepMidpoint

LAYERS = 6


REMEMBERED = {AdamsBashforth: 2, LinearTwoStep: 1, TwoStepMidpoint: 1, StochasticTwoStep: 1}
"""How many slopes or states a scheme remembers."""
RECOMPUTED = [{"gradient": "checkpoint", "every": 2}, {"gradient": "reversible"}]
CHANGES = [("checkpoint", "start"), ("checkpoint", "before"), ("checkpoint", "weight"), ("reversible", "weight")]


def norms(count, dtype, dropout=0.0):
    """Pre-activation layers, with batch statistics."""
    torch.manual_seed(0)
    return PiecewiseConstant(Autonomous(PreActivation(3, 3, dropout=dropout)).scaled(0.3) for _ in range(count)).to(dtype)


def assert_same(flow, every, *arguments, **options):
    """Under `flow` and its twin that recomputes, the same numbers to the last bit; the twin's come first."""
    solver = flow.solver
    twin = copy.deepcopy(flow).with_solver(FixedStep(solver.scheme, solver.h, gradient="checkpoint", every=every))
    found, expected = solved(twin, *arguments, **options), solved(flow, *arguments, **options)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("h", [0.5, 1, 2])
@pytest.mark.parametrize("every", [1, 3, 100])
@pytest.mark.parametrize("scheme", STEPPED, ids=str)
def test_gradients_are_the_direct_ones(scheme, every, h):
    assert_same(Flow(STEPPED[scheme](LAYERS), FixedStep(scheme, h), LAYERS), every, states(5, 4))


@pytest.mark.parametrize("scheme", [LinearTwoStep(), TwoStepMidpoint(), StochasticTwoStep()], ids=str)
def test_the_state_before_has_a_gradient_too(scheme):
    found = []
    for options in ({}, {"gradient": "checkpoint", "every": 2}):
        previous = states(5, 4, seed=2).requires_grad_()
        solved(Flow(STEPPED[scheme](LAYERS), FixedStep(scheme, **options), LAYERS), states(5, 4), previous)
        found.append(previous.grad)
    assert found[0].abs().sum() > 0
    assert torch.equal(*found)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("h", [0.5, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_statistics_move_once_and_masks_are_those_of_the_way_out(dropout, h, every):
    assert_same(Flow(norms(LAYERS, FLOAT64, dropout), FixedStep(Euler(), h), LAYERS), every, states(4, 3, 6, 6))


def test_statistics_of_shared_layers_and_of_a_basis_move_once():
    layer = norms(1, FLOAT64).layers[0]
    for field in (layer, Expansion([layer] * 3, Hat(3, depth=4.0))):
        flow = Flow(copy.deepcopy(field), "rk4", 4)
        before = copy.deepcopy(flow.state_dict())
        assert_same(flow, 2, states(4, 3, 6, 6))
        moved = [name for name, value in flow.named_buffers() if not torch.equal(before[name], value)]
        assert len(moved) == len(before) - len(list(flow.parameters()))


def test_evaluation_leaves_the_statistics():
    flow = Flow(norms(3, FLOAT64), "euler:gradient=checkpoint,every=2", 3).eval()
    before = copy.deepcopy(flow.state_dict())
    solved(flow, states(4, 3, 6, 6))
    assert all(torch.equal(before[name], value) for name, value in flow.state_dict().items())


@pytest.mark.parametrize("every", [1, 3])
def test_the_precision_of_the_forward_pass_is_kept(every):
    """One layer for all depths, whose weights autocast casts once on the way out."""
    layer = norms(1, torch.float32, dropout=0.2).layers[0]
    for field in (layer, norms(LAYERS, torch.float32, dropout=0.2)):
        assert_same(Flow(field, "euler", LAYERS), every, states(4, 3, 6, 6, dtype=torch.float32), precision=torch.bfloat16)


@pytest.mark.parametrize("options", RECOMPUTED, ids=str)
def test_random_numbers_go_on_as_if_nothing_had_been_recomputed(options):
    draws = []
    for chosen in ({}, options):
        layers = zip(*(norms(3, torch.float32, dropout=0.5).layers for _ in range(2)), strict=True)
        flow = Flow(PiecewiseConstant(Coupled(*pair) for pair in layers), FixedStep(Coupling(), **chosen), 3)
        solved(flow, states(4, 6, 6, 6, dtype=torch.float32))
        draws.append(torch.rand(4))
    assert torch.equal(*draws)


@pytest.mark.parametrize("options", RECOMPUTED, ids=str)
def test_without_gradients_nothing_is_kept(options):
    flow = Flow(STEPPED[Coupling()](3), FixedStep(Coupling(), **options), 3)
    with torch.no_grad():
        assert not flow(states(5, 4)).requires_grad
    flow.requires_grad_(False)
    assert not flow(states(5, 4)).requires_grad


@pytest.mark.parametrize("name", ["resnet", "lm_resnet", "fractal_resnet", "revnet", "stochastic_depth_resnet"])
def test_networks_train_so(name):
    network, images = build(name)
    network.double()
    other = copy.deepcopy(network).with_solver(FixedStep(network.solver.scheme, gradient="checkpoint", every=2))
    for model in (network, other):
        torch.manual_seed(3)
        model(images.double()).square().sum().backward()
    for (label, ours), theirs in zip(other.named_parameters(), network.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), label
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), label
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), other.buffers(), strict=True))


def test_second_derivatives_and_repeated_backward_passes():
    found = []
    for options in ({}, {"gradient": "checkpoint", "every": 2}):
        flow = Flow(tanh_layers(5), FixedStep(RK4(), **options), 5)
        x = states(5, 4).requires_grad_()
        loss = flow(x).square().sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        gradient.square().sum().backward(retain_graph=True)
        loss.backward()
        found.append([gradient, x.grad, *(p.grad for p in flow.parameters())])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("gradient", "changed"), CHANGES)
def test_what_changes_before_the_backward_pass_is_noticed(gradient, changed):
    flow = Flow(STEPPED[LinearTwoStep()](LAYERS), FixedStep(LinearTwoStep(), gradient=gradient), LAYERS)
    tensors = {"start": states(5, 4), "before": states(5, 4, seed=2), "weight": next(flow.parameters())}
    end = flow(tensors["start"], tensors["before"])
    with torch.no_grad():
        tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        end.sum().backward()


# What is stored
@pytest.mark.parametrize("every", [1, 2, 5, 32])
@pytest.mark.parametrize("scheme", STEPPED, ids=str)
def test_every_kth_state_is_stored_and_nothing_else(scheme, every):
    """And what a multistep scheme remembers beside each of them; the same tensor twice is stored once."""
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor
        return tensor

    x = states(5, 4).requires_grad_()
    flow = Flow(STEPPED[scheme](LAYERS), FixedStep(scheme, 0.5, gradient="checkpoint", every=every), LAYERS)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        flow(x)
    stored = sum(tensor.shape == x.shape for tensor in saved.values())
    segments = math.ceil(2 * LAYERS / every)
    assert segments <= stored <= segments * (1 + REMEMBERED.get(type(scheme), 0))


@pytest.mark.parametrize("scheme", [Euler(), LinearTwoStep()], ids=str)
def test_nothing_waits_for_the_device(scheme):
    flow = Flow(STEPPED[scheme](LAYERS), FixedStep(scheme, gradient="checkpoint", every=2), LAYERS)
    x = states(5, 4).requires_grad_()
    with Synchronisations(x.device) as mode:
        flow(x).square().sum().backward()
    assert mode.count == 0


def test_memory_is_that_of_the_stored_states_and_one_group():
    """32 layers of two evaluations each."""

    def peak(options, depth=32):
        torch.manual_seed(0)
        field = PiecewiseConstant(Autonomous(PreActivation(8, 8)).scaled(0.1) for _ in range(depth))
        flow = Flow(field, FixedStep(Heun(), **options), depth)
        x = torch.randn(16, 8, 8, 8)
        kept = sum(p.numel() * p.element_size() for p in flow.parameters())
        return (peak_memory(lambda: flow(x).square().sum().backward(), torch.device("cpu")) - kept) / x.nbytes

    direct, single = peak({}), peak({"gradient": "checkpoint"})
    four, all_ = (peak({"gradient": "checkpoint", "every": every}) for every in (4, 32))
    assert direct > 5 * single
    assert direct > 5 * four
    assert single < 32 + 1.5 * direct / 32 + 4
    assert four < 8 + 1.5 * direct / 8 + 4
    assert all_ > 0.9 * direct, "one group is the whole solve"


def test_a_refined_flow_and_one_without_noise_recompute_too():
    flow = Flow(MLP(4, 5), "euler:h=0.5,gradient=checkpoint,every=2", 2)
    assert str(flow.refine(2).solver) == "euler:h=0.25,gradient=checkpoint,every=2"
    noisy = Flow(StochasticDepth(MLP(4, 5), 0.5), "euler_maruyama:gradient=checkpoint,every=2", 2)
    assert str(noisy.drift().solver) == "euler:h=1,gradient=checkpoint,every=2"
