"""Published networks, each as field x weights x scheme; one short function a network.

| function    | paper            | field                    | weights            | solver by default        |
| ----------- | ---------------- | ------------------------ | ------------------ | ------------------------ |
| `preresnet` | arXiv 1603.05027 | pre-activation branch    | one set a layer    | Euler, h = 1             |
| `lm_resnet` | arXiv 1710.10121 | the same, (1 + k) x' = f | one set a layer    | linear two-step, h = 1   |
| `odenet`    | arXiv 1806.07366 | GN-ReLU-conv, with depth | constant in depth  | dopri5, tolerance 1e-3   |
| `mlp`       | arXiv 1904.01681 | two linear maps and tanh | constant in depth  | dopri5, tolerance 1e-3   |
"""

from collections.abc import Callable
from typing import Literal

from torch import nn

from continuum.fields import MLP, Autonomous, Field, Momentum, ODENetBranch, PreActivation
from continuum.fields.branches import conv3x3, group_norm
from continuum.flow import Flow
from continuum.models.network import Augment, Downsample, Network, PooledHead, Transition, builder
from continuum.solvers import Solver
from continuum.weights import PiecewiseConstant


@builder
def preresnet(
    depth: int = 20, num_classes: int = 10, width: int = 16, in_channels: int = 3, solver: Solver | str = "euler"
) -> Network:
    """The pre-activation ResNet for CIFAR: three stages of (depth - 2) / 6 basic blocks, `width` channels doubling.

    Under Euler with h = 1 it is the discrete network. Images are (batch, in_channels, height, width). The first block of
    the second and third stage changes the size: a plain residual step on a projected shortcut.

    Raises:
        ValueError: depth is not 6 n + 2.
    """
    return _cifar_network(depth, num_classes, width, in_channels, solver, first=Autonomous, layer=Autonomous)


@builder
def lm_resnet(
    depth: int = 20, num_classes: int = 10, width: int = 16, in_channels: int = 3, solver: Solver | str = "linear_two_step"
) -> Network:
    """LM-ResNet: `preresnet` with x_{n+1} = (1 - k_n) x_n + k_n x_{n-1} + f_n(x_n), k_n learnt.

    The very first block is a plain residual step and has no k; nor have those that change the size.

    Raises:
        ValueError: depth is not 6 n + 2, or 8: a network without a second block in its stages has no k.
    """
    return _cifar_network(
        depth, num_classes, width, in_channels, solver, first=Autonomous, layer=lambda branch: Momentum(Autonomous(branch))
    )


def _cifar_network(
    depth: int,
    num_classes: int,
    width: int,
    in_channels: int,
    solver: Solver | str,
    first: Callable[[nn.Module], Field],
    layer: Callable[[nn.Module], Field],
) -> Network:
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 2:
        raise ValueError(f"depth is 6 n + 2 with n >= 2 blocks a stage (14, 20, 32, 44, 56, 110), not {depth}")
    stages: list[nn.Module] = []
    for stage in range(3):
        channels = width * 2**stage
        if stage:
            stages.append(Transition(channels // 2, channels))
        layers = [layer(PreActivation(channels, channels)) for _ in range(blocks - 1)]
        if not stage:
            layers.insert(0, first(PreActivation(channels, channels)))
        stages.append(Flow(PiecewiseConstant(layers), solver, depth=len(layers)))
    head = PooledHead(nn.BatchNorm2d(4 * width), 4 * width, num_classes)
    return Network(conv3x3(in_channels, width), stages, head)


@builder
def odenet(
    stages: Literal[1, 3] = 1,
    num_classes: int = 10,
    width: int = 64,
    in_channels: int = 1,
    downsample: bool = True,
    solver: Solver | str = "dopri5:rtol=1e-3,atol=1e-3",
) -> Network:
    """The ODE-Net for images: flows of depth 1 whose weights do not vary with depth.

    One stage is the published MNIST network: a stem that takes the images to a quarter of their size (with
    `downsample=False` a single convolution, for images as small as 8x8), one flow, head. Three stages are its CIFAR form:
    flows of `width`, 2 `width` and 4 `width` channels with strided convolutions between them, and BatchNorm outside the flows.
    """
    if stages not in (1, 3):
        raise ValueError(f"odenet has 1 or 3 stages, not {stages}")
    # GroupNorm right before pooling takes away much of what tells images apart: with few channels, training is far slower.
    norm = group_norm if stages == 1 else nn.BatchNorm2d
    modules: list[nn.Module] = []
    for stage in range(stages):
        channels = width * 2**stage
        if stage:
            modules.append(Downsample(channels // 2, channels, norm(channels // 2)))
        modules.append(Flow(ODENetBranch(channels), solver, depth=1))
    channels = width * 2 ** (stages - 1)
    stem = _mnist_stem(in_channels, width) if stages == 1 and downsample else nn.Conv2d(in_channels, width, 3, padding=1)
    return Network(stem, modules, PooledHead(norm(channels), channels, num_classes))


def _mnist_stem(in_channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3),
        group_norm(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 4, stride=2, padding=1),
        group_norm(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 4, stride=2, padding=1),
    )


@builder
def mlp(
    features: int = 2,
    num_classes: int = 2,
    hidden: int = 32,
    augment: int = 0,
    solver: Solver | str = "dopri5:rtol=1e-3,atol=1e-3",
) -> Network:
    """A flow on vectors (batch, features) for toy problems: `augment` zeros appended, an MLP field, a linear head."""
    size = features + augment
    return Network(Augment(augment), [Flow(MLP(size, hidden), solver, depth=1)], nn.Linear(size, num_classes))
