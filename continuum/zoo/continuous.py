"""Networks whose weights are functions of depth: constant for an ODE-Net, expanded on a basis for a continuous ResNet."""

from typing import Literal

from torch import nn

from continuum.bases import Basis, named_basis
from continuum.fields import MLP, Autonomous, ODENetBranch, PreActivation
from continuum.fields.branches import group_norm
from continuum.flow import Flow
from continuum.models.network import Network, builder
from continuum.models.parts import Augment, ConvStem, Downsample, MNISTStem, PooledHead, Projection, Transition
from continuum.solvers import Solver
from continuum.weights import Expansion, PiecewiseConstant


@builder
def continuous_resnet(
    size: int = 8,
    basis: Literal["constant", "hat", "chebyshev", "legendre", "fourier"] = "hat",
    num_classes: int = 10,
    width: int = 16,
    in_channels: int = 3,
    solver: Solver | str = "rk4",
) -> Network:
    """A ResNet continuous in depth: three flows whose weights are expanded on `size` basis functions (arXiv 2008.02389).

    conv-BN-ReLU; three times a residual step that changes the size and a flow of pre-activation branches. With "constant"
    weights the flow has `size` layers, and Euler with h = 1 is a residual network; with "hat" its depth is size - 1 and the
    nodes are integers; with the others it is `size`, and the branches have GroupNorm (only nodes can keep statistics).

    Args:
        size: number of basis functions of each flow.
        basis: "constant", one set of weights a layer, or a basis of functions of depth.
        num_classes: number of logits.
        width: channels of the first stage, doubling from stage to stage.
        in_channels: channels of the images.
        solver: solver of every flow, or its text.

    Raises:
        ValueError: an unknown basis, or a size that it cannot have; with GroupNorm, images of less than 5 x 5 pixels.
    """

    def flow(channels: int) -> Flow:
        if basis == "constant":
            layers = [Autonomous(PreActivation(channels, channels)) for _ in range(size)]
            return Flow(PiecewiseConstant(layers), solver, depth=size)
        functions: Basis = named_basis(basis, size, depth=size - 1 if basis == "hat" else size)
        norm = nn.BatchNorm2d if functions.nodal else group_norm
        field = Expansion([Autonomous(PreActivation(channels, channels, norm=norm)) for _ in range(size)], functions)
        return Flow(field, solver, functions.depth)

    stages: list[nn.Module] = []
    inputs = width
    for stage in range(3):
        outputs, stride = width * 2**stage, 2 if stage else 1
        stages += [Transition(Projection(inputs, outputs, stride), PreActivation(inputs, outputs, stride)), flow(outputs)]
        inputs = outputs
    nodal = basis in ("constant", "hat")
    stem = ConvStem(in_channels, width, pool=False, smallest=1 if nodal else 5)
    return Network(stem, stages, PooledHead(inputs, num_classes))


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

    Images have at least 10 x 10 pixels, or with three stages 8 x 8: a smaller state is one pixel, of which GroupNorm leaves
    signs only.

    Args:
        stages: 1, for images of digits, or 3, for CIFAR.
        num_classes: number of logits.
        width: channels of the first stage, doubling from stage to stage.
        in_channels: channels of the images.
        downsample: take images to a quarter of their size in the stem; False keeps the size.
        solver: solver of every flow, or its text.

    Raises:
        ValueError: other numbers of stages; in the forward pass, smaller images.
    """
    if stages not in (1, 3):
        raise ValueError(f"odenet has 1 or 3 stages, not {stages}")
    # GroupNorm right before pooling takes away much of what tells images apart: with few channels, training is far slower.
    norm = group_norm if stages == 1 else nn.BatchNorm2d
    modules: list[nn.Module] = []
    for stage in range(stages):
        channels = width * 2**stage
        if stage:
            modules.append(Downsample(channels // 2, channels, norm(channels // 2), smallest=2 ** (4 - stage)))
        modules.append(Flow(ODENetBranch(channels), solver, depth=1))
    channels = width * 2 ** (stages - 1)
    stem = MNISTStem(in_channels, width) if stages == 1 and downsample else nn.Conv2d(in_channels, width, 3, padding=1)
    return Network(stem, modules, PooledHead(channels, num_classes, norm))


@builder
def mlp(
    features: int = 2,
    num_classes: int = 2,
    hidden: int = 32,
    augment: int = 0,
    solver: Solver | str = "dopri5:rtol=1e-3,atol=1e-3",
) -> Network:
    """A flow on vectors (batch, features) for toy problems: `augment` zeros appended, an MLP field, a linear head.

    Args:
        features: numbers of an input, (batch, features).
        num_classes: number of logits.
        hidden: features of the hidden layer.
        augment: zeros that are appended to an input.
        solver: solver of every flow, or its text.
    """
    size = features + augment
    return Network(Augment(augment), [Flow(MLP(size, hidden), solver, depth=1)], nn.Linear(size, num_classes))
