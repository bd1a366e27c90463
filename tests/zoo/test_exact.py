"""The discrete networks are recovered to the bit, and other solvers integrate the same weights."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import torchdiffeq
from problems import FLOAT64
from torch import nn

from continuum import MLP, Autonomous, FixedStep, Flow, Momentum, PiecewiseConstant, SecondOrder
from continuum.fields import Scaled
from continuum.models import Augment
from continuum.noise import StochasticDepth
from continuum.schemes import LinearTwoStep
from continuum.zoo import (
    dropout_resnet,
    lm_resnet,
    neural_sde,
    odenet,
    preresnet,
    resnet,
    shake_shake,
    stochastic_depth_resnet,
    stochastic_lm_resnet,
)


def images(batch=8, size=16, seed=0):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """BN-ReLU-conv-BN-ReLU-conv, as a residual network writes it."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)])
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
                nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            ]
        )

    def forward(self, x):
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = conv(F.relu(norm(x)))
        return x


class ResNet(nn.Module):
    """Three stages of n blocks; with `momentum` every block that keeps its size, but for the first, has a k."""

    def __init__(self, n, width, momentum):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.blocks, self.shortcuts, self.k = nn.ModuleList(), nn.ModuleDict(), nn.ParameterDict()
        inputs = width
        for index, (stage, block) in enumerate(itertools.product(range(3), range(n))):
            outputs = width * 2**stage
            grows = outputs != inputs
            self.blocks.append(Block(inputs, outputs, stride=2 if grows else 1))
            if grows:
                conv = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)
                self.shortcuts[str(index)] = nn.ModuleList([nn.BatchNorm2d(inputs), conv])
            elif momentum and (stage or block):
                self.k[str(index)] = nn.Parameter(torch.zeros(()))
            inputs = outputs
        self.norm = nn.BatchNorm2d(4 * width)
        self.linear = nn.Linear(4 * width, 10)

    def forward(self, x):
        x = self.stem(x)
        previous = None
        for index, block in enumerate(self.blocks):
            old = x
            if str(index) in self.shortcuts:
                norm, conv = self.shortcuts[str(index)]
                old = conv(F.relu(norm(x)))
                x = old + block(x)
            elif str(index) in self.k:
                k = self.k[str(index)]
                x = (1 - k) * x + k * previous + block(x)
            else:
                x = x + block(x)
            previous = old
        return self.linear(F.relu(self.norm(x)).mean(dim=(2, 3)))


def copy_branch(block, branch):
    for ours, theirs in [(block.norms[0], branch.norm1), (block.norms[1], branch.norm2)]:
        ours.load_state_dict(theirs.state_dict())
    for ours, theirs in [(block.convs[0], branch.conv1), (block.convs[1], branch.conv2)]:
        ours.load_state_dict(theirs.state_dict())


def layers_and_transitions(network):
    """The network's blocks in order, each as (layer or transition, index of the block)."""
    parts = []
    for stage in network.stages:
        parts += stage.field.layers if isinstance(stage, Flow) else [stage]
    return parts


def plain_copy(network, n, width):
    """A network written out block by block with the weights of `network`."""
    parts = layers_and_transitions(network)
    plain = ResNet(n, width, momentum=any(isinstance(part, Momentum) for part in parts))
    plain.stem.load_state_dict(network.stem.state_dict())
    for index, (part, block) in enumerate(zip(parts, plain.blocks, strict=True)):
        if isinstance(part, Momentum):
            plain.k[str(index)].data.copy_(part.k.data)
            part = part.field
        elif not isinstance(part, Autonomous):
            plain.shortcuts[str(index)][0].load_state_dict(part.shortcut.norm.state_dict())
            plain.shortcuts[str(index)][1].load_state_dict(part.shortcut.conv.state_dict())
        copy_branch(block, part.module if isinstance(part, Autonomous) else part.branch)
    plain.norm.load_state_dict(network.head.norm.state_dict())
    plain.linear.load_state_dict(network.head.linear.state_dict())
    return plain


def tensors(network):
    """All parameters and buffers of a network, whether written out or made of flows, in one order."""
    if isinstance(network, ResNet):
        stem, head, parts = network.stem, [network.norm, network.linear], []
        for index, block in enumerate(network.blocks):
            extra = list(network.shortcuts[str(index)]) if str(index) in network.shortcuts else []
            k = [network.k[str(index)]] if str(index) in network.k else []
            parts.append(([block.norms[0], block.convs[0], block.norms[1], block.convs[1], *extra], k))
    else:
        stem, head, parts = network.stem, [network.head.norm, network.head.linear], []
        for part in layers_and_transitions(network):
            k = [part.k] if isinstance(part, Momentum) else []
            inner = part.field if k else part
            branch = inner.module if isinstance(inner, Autonomous) else inner.branch
            extra = [] if isinstance(inner, Autonomous) else [inner.shortcut.norm, inner.shortcut.conv]
            parts.append(([branch.norm1, branch.conv1, branch.norm2, branch.conv2, *extra], k))
    modules = [stem, *(module for inner, _ in parts for module in inner), *head]
    parameters = [p for module in modules for p in module.parameters()] + [k for _, ks in parts for k in ks]
    return parameters, [buffer for module in modules for buffer in module.buffers()]


@pytest.fixture(params=[preresnet, lm_resnet], ids=lambda build: build.__name__)
def pair(request):
    """A network of depth 20 made of flows and the same network written out, with k and norms that are not trivial."""
    torch.manual_seed(0)
    network = request.param(20, width=4)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, Momentum):
            nn.init.uniform_(module.k, -0.4, 0.3)
    return network, plain_copy(network, 3, 4)


def test_the_copy_holds_every_number(pair):
    for one, other in zip(*(tensors(network) for network in pair), strict=True):
        assert len(one) == len(other)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    network, plain = pair
    assert len(tensors(network)[0]) == len(list(network.parameters())) == len(list(plain.parameters()))
    assert len(tensors(network)[1]) == len(list(network.buffers())) == len(list(plain.buffers()))


def test_logits_are_equal_to_the_bit(pair):
    network, plain = pair
    x = images()
    assert torch.equal(network.train()(x), plain.train()(x))
    assert torch.equal(network.eval()(x), plain.eval()(x))


def test_gradients_agree(pair):
    network, plain = pair
    labels = torch.arange(8)
    for model in pair:
        F.cross_entropy(model.train()(images()), labels).backward()
    for ours, theirs in zip(tensors(network)[0], tensors(plain)[0], strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-6 * theirs.grad.norm()


def test_training_steps_leave_equal_statistics_and_weights(pair):
    for model in pair:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for step in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(images(seed=step)), torch.arange(8)).backward()
            optimizer.step()
    network, plain = pair
    for ours, theirs in zip(tensors(network)[1], tensors(plain)[1], strict=True):
        assert torch.equal(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(tensors(network)[0], tensors(plain)[0], strict=True))


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
    torch.manual_seed(0)
    network = preresnet(20, width=4)
    plain = plain_copy(network, 3, 4)
    x = images()
    assert torch.equal(through_torchdiffeq(network.train(), x), plain.train()(x))
    assert all(torch.equal(a, b) for a, b in zip(tensors(network)[1], tensors(plain)[1], strict=True))
    assert torch.equal(through_torchdiffeq(network.eval(), x), plain.eval()(x))
    for logits in (through_torchdiffeq(network, x), plain(x)):
        F.cross_entropy(logits, torch.arange(8)).backward()
    for ours, theirs in zip(tensors(network)[0], tensors(plain)[0], strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-6 * theirs.grad.norm()


# Parameters


def size(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("depth", "plain", "scalars"),
    [(20, 272_378, 6), (32, 466_810, 12), (44, 661_242, 18), (56, 855_674, 24), (110, 1_730_618, 51)],
)
def test_parameter_counts(depth, plain, scalars):
    with torch.device("meta"):
        assert size(preresnet(depth)) == plain
        assert size(lm_resnet(depth)) == plain + scalars


@pytest.mark.parametrize(("width", "millions"), [(32, "2.92"), (64, "11.65"), (96, "26.19"), (112, "35.64")])
def test_parameter_counts_of_shake_shake(width, millions):
    with torch.device("meta"):
        assert f"{size(shake_shake(26, width)) / 1e6:.2f}" == millions


def test_noise_has_no_parameters():
    with torch.device("meta"):
        assert size(stochastic_depth_resnet(110)) == size(resnet(110)) == 1_727_962
        assert size(stochastic_lm_resnet(110)) == size(lm_resnet(110))
        assert size(dropout_resnet(20)) == size(preresnet(20))
        assert size(neural_sde()) == size(odenet(in_channels=3))


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


def test_parameter_count_of_the_mnist_odenet():
    assert size(odenet()) == 208_266


@pytest.mark.parametrize("depth", [2, 8, 18, 21])
@pytest.mark.parametrize("build", [preresnet, lm_resnet])
def test_depths_that_no_network_has(build, depth):
    with pytest.raises(ValueError, match="6 n \\+ 2"):
        build(depth, width=4)


def test_k_starts_slightly_negative():
    torch.manual_seed(0)
    ks = torch.stack([module.k for module in lm_resnet(110, width=2).modules() if isinstance(module, Momentum)]).detach()
    assert ks.shape == (51,)
    assert -0.1 < ks.min() < -0.08
    assert -0.02 < ks.max() <= 0


# One set of weights under many solvers


def smooth_layers(count=3, features=4):
    torch.manual_seed(0)
    return [Autonomous(nn.Sequential(nn.Linear(features, features), nn.Tanh()).double()) for _ in range(count)]


@pytest.mark.parametrize("solver", ["rk4:h=0.05", "heun", "adams_bashforth:order=2,h=0.25", "dopri5:rtol=1e-8,atol=1e-8"])
def test_other_solvers_integrate_the_limit_equation_of_linear_two_step(solver):
    layers, ks = smooth_layers(), (-0.3, 0.2, -0.05)
    momentum = PiecewiseConstant(Momentum(layer, k).double() for layer, k in zip(layers, ks, strict=True))
    exact = [module.k.item() for module in momentum.layers]
    scaled = PiecewiseConstant(Scaled(layer, 1 / (1 + k)) for layer, k in zip(layers, exact, strict=True))
    x = torch.linspace(-1, 1, 8, dtype=FLOAT64).reshape(2, 4)
    torch.testing.assert_close(Flow(momentum, solver, 3)(x), Flow(scaled, solver, 3)(x), rtol=1e-12, atol=1e-12)


def test_refined_linear_two_step_converges_to_the_limit_equation():
    layers, ks = smooth_layers(), (-0.3, 0.2, -0.05)
    flow = Flow(PiecewiseConstant(Momentum(f, k).double() for f, k in zip(layers, ks, strict=True)), "linear_two_step", 3)
    x = torch.linspace(-1, 1, 8, dtype=FLOAT64).reshape(2, 4)
    with torch.no_grad():
        limit = flow.with_solver("dopri5:rtol=1e-11,atol=1e-11")(x)
        errors = [(flow.with_solver(FixedStep(LinearTwoStep(), h=1 / m))(x) - limit).abs().max() for m in (64, 128, 256)]
    for coarse, fine in itertools.pairwise(errors):
        assert float(torch.log2(coarse / fine)) == pytest.approx(1, abs=0.15)


def test_refined_euler_converges_with_order_one_to_the_adaptive_solution():
    torch.manual_seed(0)
    network = preresnet(14, width=4).double()
    for flow in network.flows:
        for name, parameter in flow.named_parameters():
            if "conv2" in name:  # weaker branches, so that the asymptotic regime begins at moderate steps
                parameter.data.mul_(0.2)
    network.eval()
    x = images(2, 8).double()
    with torch.no_grad():
        limit = network.with_solver("dopri5:rtol=1e-9,atol=1e-9")(x)
        errors = [(network.with_solver(f"euler:h={1 / m!r}")(x) - limit).abs().max() for m in (8, 16, 32)]
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
