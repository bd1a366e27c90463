"""The discrete networks are recovered to the bit, and other solvers integrate the same weights."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchdiffeq
from problems import states, tanh_layers
from runs import same_state

from continuum import MLP, FixedStep, Flow, Momentum, PiecewiseConstant, SecondOrder
from continuum.cli.models import size_of
from continuum.fields import Scaled
from continuum.models import Augment
from continuum.noise import StochasticDepth
from continuum.schemes import LinearTwoStep
from continuum.verify.certificate import _logits_of_loop, small
from continuum.zoo import dropout_resnet, lm_resnet, neural_sde, odenet, preresnet, resnet, shake_shake
from continuum.zoo.stochastic import stochastic_depth_resnet, stochastic_lm_resnet

KS = (-0.3, 0.2, -0.05)
MOMENTUM = PiecewiseConstant(Momentum(layer, k).double() for layer, k in zip(tanh_layers(3).layers, KS, strict=True))


@pytest.mark.parametrize("name", ["preresnet", "lm_resnet"])
def test_training_with_a_plain_loop_leaves_equal_statistics_and_weights(name):
    """`verify` compares one pass: its logits, gradients and statistics."""
    ours, theirs = small(name), small(name)
    for network, run in ((ours, ours), (theirs, partial(_logits_of_loop, theirs))):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        for step in range(5):
            optimizer.zero_grad()
            F.cross_entropy(run(states(4, 3, 16, 16, dtype=torch.float32, seed=step)), torch.arange(4)).backward()
            optimizer.step()
    assert same_state(ours, theirs)


def through_torchdiffeq(network, x):
    x = network.stem(x)
    for stage in network.stages:
        if isinstance(stage, Flow):
            times = torch.arange(len(stage.field.layers) + 1, dtype=x.dtype)
            x = torchdiffeq.odeint(stage.field, x, times, method="euler")[-1]
        else:
            x, _ = stage(x)
    return network.head(x)


def test_torchdiffeq_on_the_integer_grid_is_the_residual_network():
    network, twin = small("preresnet"), small("preresnet")
    x = states(4, 3, 16, 16, dtype=torch.float32)
    for mode in (True, False):
        found, expected = through_torchdiffeq(network.train(mode), x), twin.train(mode)(x)
        assert torch.equal(found, expected)
    assert same_state(network, twin)
    for logits in (found, expected):
        F.cross_entropy(logits, torch.arange(len(x))).backward()
    for ours, theirs in zip(network.parameters(), twin.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-6 * theirs.grad.norm()


# Parameters
@pytest.mark.parametrize(("width", "millions"), [(32, "2.92"), (64, "11.65"), (96, "26.19"), (112, "35.64")])
def test_parameter_counts_of_shake_shake(width, millions):
    with torch.device("meta"):
        assert f"{size_of(shake_shake(26, width)) / 1e6:.2f}" == millions


def test_noise_has_no_parameters():
    with torch.device("meta"):
        assert size_of(stochastic_depth_resnet(110)) == size_of(resnet(110)) == 1_727_962
        assert size_of(stochastic_lm_resnet(110)) == size_of(lm_resnet(110))
        assert size_of(dropout_resnet(20)) == size_of(preresnet(20))
        assert size_of(neural_sde()) == size_of(odenet(in_channels=3))


def test_survivals_fall_from_block_to_block():
    """Transitions included: to 1/2 at the last of 54 blocks, 40.25 of which survive on average (arXiv 1603.09382)."""
    with torch.device("meta"):
        huang, lu = (
            [module.survival for module in build(110).modules() if isinstance(module, StochasticDepth)]
            for build in (stochastic_depth_resnet, stochastic_lm_resnet)
        )
    assert huang == pytest.approx([1 - block / 54 / 2 for block in range(1, 55)])
    assert sum(huang) == pytest.approx(40.25)
    assert lu == pytest.approx([1 - block / 53 / 2 for block in range(54)])


def test_k_starts_slightly_negative():
    torch.manual_seed(0)
    ks = torch.stack([module.k for module in lm_resnet(110, width=2).modules() if isinstance(module, Momentum)]).detach()
    assert ks.shape == (51,)
    assert -0.1 < ks.min() < -0.08
    assert -0.02 < ks.max() <= 0


# One set of weights under many solvers


@pytest.mark.parametrize("solver", ["rk4:h=0.05", "heun", "adams_bashforth:order=2,h=0.25", "dopri5:rtol=1e-8,atol=1e-8"])
def test_other_solvers_integrate_the_limit_equation_of_linear_two_step(solver):
    scaled = PiecewiseConstant(Scaled(layer.field, 1 / (1 + layer.k.item())) for layer in MOMENTUM.layers)
    x = states(2, 4)
    torch.testing.assert_close(Flow(MOMENTUM, solver, 3)(x), Flow(scaled, solver, 3)(x), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_refined_linear_two_step_converges_to_the_limit_equation():
    flow, x = Flow(MOMENTUM, "linear_two_step", 3), states(2, 4)
    limit = flow.with_solver("dopri5:rtol=1e-11,atol=1e-11")(x)
    errors = [(flow.with_solver(FixedStep(LinearTwoStep(), h=1 / m))(x) - limit).abs().max() for m in (64, 128, 256)]
    for coarse, fine in itertools.pairwise(errors):
        assert float(torch.log2(coarse / fine)) == pytest.approx(1, abs=0.15)


# What a flow can and cannot do
def fitted(flow, augment):
    """The mean square error of x -> -x on 16 points of [-1, 1] after training through `flow`."""
    x = torch.linspace(-1, 1, 16).reshape(-1, 1)
    stem = Augment(augment)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.03)
    for _ in range(250):
        optimizer.zero_grad()
        loss = (flow(stem(x))[:, :1] + x).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_a_plain_flow_cannot_reflect_the_line():
    """Trajectories on a line do not cross, so the map is increasing; the best increasing one is constant: error 0.376."""
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 16)
    assert fitted(Flow(MLP(1, hidden=16), "rk4:h=0.25", depth=1), augment=0) >= 0.99 * float(x.square().mean())


@pytest.mark.parametrize("second_order", [False, True], ids=["augmented", "second order"])
def test_a_flow_with_room_reflects_the_line(second_order):
    """With one more dimension the points go around each other, or pass through each other with different velocities."""
    torch.manual_seed(0)
    field = SecondOrder(MLP(1, hidden=16)) if second_order else MLP(2, hidden=16)
    assert fitted(Flow(field, "rk4:h=0.25", depth=1), augment=1) < 0.02


def test_augment_appends_zeros_to_any_states():
    for shape in [(2, 3), (2, 3, 4, 4)]:
        x = torch.randn(shape)
        y = Augment(2)(x)
        assert y.shape == (2, 5, *shape[2:])
        assert torch.equal(y[:, :3], x)
        assert not y[:, 3:].any()
    with pytest.raises(ValueError, match="channels"):
        Augment(-1)


def test_second_order_needs_pairs_and_scaled_stays_outside_of_no_momentum():
    with pytest.raises(ValueError, match="even number"):
        SecondOrder(MLP(1, hidden=4))(0.0, torch.zeros(2, 3))
    with pytest.raises(TypeError, match="Momentum"):
        Scaled(Momentum(MLP(1, hidden=4)), 0.5)
