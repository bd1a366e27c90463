"""Post-activation networks, relu(x + F(x)): fields relu(x + F(x)) - x, one set of weights a layer, Euler's steps."""

from collections.abc import Sequence
from typing import Literal

from torch import nn

from continuum.fields import BasicBranch, Bottleneck, Field, PolyBranch, PostActivation, SqueezeExcite, Sum
from continuum.models.network import Network, builder
from continuum.models.parts import (
    Block,
    Branch,
    ConvStem,
    PlainHead,
    Transition,
    blocks_of,
    doubling,
    grouped,
    post_transition,
    staged,
)
from continuum.solvers import Solver


@builder
def resnet(
    depth: int = 20,
    num_classes: int = 10,
    width: int = 16,
    in_channels: int = 3,
    shortcut: Literal["A", "B"] = "A",
    solver: Solver | str = "euler",
) -> Network:
    """The ResNet for CIFAR (arXiv 1512.03385): three stages of (depth - 2) / 6 basic blocks, `width` channels doubling.

    Blocks that change the size have the shortcut A, subsampling and zero channels, or B, a 1x1 convolution. Under Euler with
    h = 1 it is the discrete network. Images are (batch, in_channels, height, width).

    Args:
        depth: layers with weights, 6 n + 2.
        num_classes: number of logits.
        width: channels of the first stage, doubling from stage to stage.
        in_channels: channels of the images.
        shortcut: of blocks that change the size: "A", subsampling and zero channels, or "B", a 1x1 convolution.
        solver: solver of every flow, or its text.

    Raises:
        ValueError: depth is not 6 n + 2, or an unknown shortcut.
    """
    return _post_activation(blocks_of(depth, 6), num_classes, width, in_channels, shortcut, BasicBranch, solver)


@builder
def se_resnet(
    depth: int = 20,
    num_classes: int = 10,
    width: int = 16,
    in_channels: int = 3,
    reduction: int = 16,
    shortcut: Literal["A", "B"] = "A",
    solver: Solver | str = "euler",
) -> Network:
    """`resnet` with squeeze and excitation on every branch (arXiv 1709.01507).

    Args:
        depth: layers with weights, 6 n + 2.
        num_classes: number of logits.
        width: channels of the first stage, doubling from stage to stage.
        in_channels: channels of the images.
        reduction: channels of a block over those inside its squeeze and excitation.
        shortcut: of blocks that change the size: "A", subsampling and zero channels, or "B", a 1x1 convolution.
        solver: solver of every flow, or its text.

    Raises:
        ValueError: depth is not 6 n + 2, an unknown shortcut, or a reduction of more than `width`.
    """

    def branch(inputs: int, outputs: int, stride: int) -> nn.Module:
        return SqueezeExcite(BasicBranch(inputs, outputs, stride), outputs, reduction)

    return _post_activation(blocks_of(depth, 6), num_classes, width, in_channels, shortcut, branch, solver)


@builder
def resnext(
    depth: int = 29,
    num_classes: int = 10,
    cardinality: int = 8,
    group_width: int = 64,
    width: int = 64,
    in_channels: int = 3,
    solver: Solver | str = "euler",
) -> Network:
    """ResNeXt-`depth`, `cardinality` x `group_width`d, for CIFAR (arXiv 1611.05431): bottlenecks with grouped convolutions.

    Stages have 4 `width` channels, doubling, and cardinality x group_width inside (for width 64), doubling too.

    Args:
        depth: layers with weights, 9 n + 2.
        num_classes: number of logits.
        cardinality: number of groups of the 3x3 convolution.
        group_width: channels of each group in the first stage, for `width` 64.
        width: a quarter of the channels of the first stage, which double.
        in_channels: channels of the images.
        solver: solver of every flow, or its text.

    Raises:
        ValueError: depth is not 9 n + 2, no group, or a `group_width` so small that groups have no channel.
    """

    def branch(inputs: int, outputs: int, stride: int) -> nn.Module:
        return Bottleneck(inputs, grouped(outputs, cardinality, group_width), outputs, stride, groups=cardinality)

    blocks = blocks_of(depth, 9)
    return _post_activation(blocks, num_classes, width, in_channels, "B", branch, solver, expansion=4)


def _post_activation(
    blocks: Sequence[int],
    num_classes: int,
    width: int,
    in_channels: int,
    shortcut: str,
    branch: Branch,
    solver: Solver | str,
    expansion: int = 1,
) -> Network:
    """conv-BN-ReLU, stages of relu(x + F(x)) with expansion x width channels, doubling, average, linear."""

    def transition(stage: int, inputs: int, outputs: int) -> Transition:
        stride = 2 if stage else 1
        return post_transition(inputs, branch(inputs, outputs, stride), outputs, stride, shortcut)

    def layer(stage: int, channels: int, index: int) -> Field:
        return PostActivation(branch(channels, channels, 1))

    channels = doubling(expansion * width, len(blocks))
    stages = staged(width, channels, blocks, transition, layer, solver)
    return Network(ConvStem(in_channels, width, pool=False), stages, PlainHead(channels[-1], num_classes))


IMAGENET: dict[int, tuple[Block, tuple[int, ...]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}


@builder
def imagenet_resnet(
    depth: int = 50,
    num_classes: int = 1000,
    blocks: Sequence[int] | None = None,
    block: Block | None = None,
    groups: int = 1,
    group_width: int = 64,
    dilated: Sequence[bool] = (False, False, False),
    stem: Literal["imagenet", "cifar"] = "imagenet",
    in_channels: int = 3,
    solver: Solver | str = "euler",
) -> Network:
    """The ResNet for ImageNet in torchvision's form, with its relatives: what `continuum.convert.from_torchvision` returns.

    Four stages of 64, 128, 256 and 512 channels (four times as many for bottlenecks, whose stride is in the 3x3 convolution).
    `depth` is 18, 34, 50, 101 or 152; or give the `blocks` of each stage and the kind of `block`. ResNeXt-50 32x4d is
    `groups=32, group_width=4`, a wide ResNet-50-2 `group_width=128`. A `dilated` stage (the second, third, fourth) keeps the
    size and spreads its convolutions. The stem "cifar" is a 3x3 convolution without pooling.

    Args:
        depth: 18, 34, 50, 101 or 152 layers with weights; ignored where `blocks` are given.
        num_classes: number of logits.
        blocks: blocks of each of the four stages, together with `block`.
        block: "basic" or "bottleneck", for `blocks`.
        groups: groups of the 3x3 convolution of a bottleneck.
        group_width: channels of each group in the first stage.
        dilated: whether the second, third and fourth stage keep the size, with dilated convolutions.
        stem: "imagenet", a 7x7 convolution and pooling, or "cifar", a 3x3 convolution.
        in_channels: channels of the images.
        solver: solver of every flow, or its text.

    Raises:
        ValueError: an unknown depth, or basic blocks with groups, another group width or dilation.
    """
    if (blocks is None) != (block is None):
        raise ValueError("blocks and block belong together: give both, or a depth alone")
    if blocks is None and depth not in IMAGENET:
        raise ValueError(f"depth is one of {', '.join(map(str, IMAGENET))}, or give blocks and block; not {depth}")
    kind, sizes = IMAGENET[depth] if blocks is None or block is None else (block, tuple(blocks))
    if len(sizes) != 4 or min(sizes) < 1 or len(dilated) != 3:
        raise ValueError(f"there are four stages, the last three of them dilated or not; got blocks {sizes}, dilated {dilated}")
    if kind == "basic" and (groups != 1 or group_width != 64 or any(dilated)):
        raise ValueError("basic blocks have groups=1, group_width=64 and no dilation: take block='bottleneck'")
    expansion = 4 if kind == "bottleneck" else 1
    dilations = [1]
    for stage in range(3):
        dilations.append(dilations[-1] * (2 if dilated[stage] else 1))

    def branch(inputs: int, outputs: int, stride: int, dilation: int) -> nn.Module:
        if kind == "basic":
            return BasicBranch(inputs, outputs, stride)
        return Bottleneck(inputs, grouped(outputs, groups, group_width), outputs, stride, groups, dilation)

    def transition(stage: int, inputs: int, outputs: int) -> Transition:
        stride = 2 if stage and not dilated[stage - 1] else 1
        # The first block of a dilated stage still has the dilation of the stage before.
        first = branch(inputs, outputs, stride, dilations[max(stage - 1, 0)])
        return post_transition(inputs, first, outputs, stride, "B")

    def layer(stage: int, channels: int, index: int) -> Field:
        return PostActivation(branch(channels, channels, 1, dilations[stage]))

    channels = doubling(expansion * 64, 4)
    stages = staged(64, channels, sizes, transition, layer, solver)
    head = PlainHead(channels[-1], num_classes, nn.AdaptiveAvgPool2d(1))
    return Network(ConvStem(in_channels, 64, pool=stem == "imagenet"), stages, head)


PolyModule = Literal["2-way", "poly-2", "poly-3", "mpoly-2"]
VERY_DEEP: tuple[tuple[PolyModule, ...], ...] = (("2-way",), ("poly-3", "2-way"), ("poly-3", "2-way"))


@builder
def polynet(
    blocks: Sequence[int] = (2, 4, 2),
    modules: Sequence[Sequence[PolyModule]] = VERY_DEEP,
    num_classes: int = 10,
    width: int = 16,
    in_channels: int = 3,
    solver: Solver | str = "euler",
) -> Network:
    """PolyNet on a small branch (arXiv 1611.05725): blocks relu(x + F x + F F x + ...), backward Euler by its Neumann series.

    Stage i has blocks[i] modules, which take turns in modules[i]: 2-way is F + G, poly-2 is F + F F, poly-3 is F + F F + F F F,
    mpoly-2 is F + G F. The stages of Very Deep PolyNet are the default; its numbers of blocks are (10, 20, 10).

    Args:
        blocks: modules of each stage.
        modules: kinds of modules of each stage, which take turns.
        num_classes: number of logits.
        width: channels of the first stage, doubling from stage to stage.
        in_channels: channels of the images.
        solver: solver of every flow, or its text.

    Raises:
        ValueError: an unknown module, or not as many lists of modules as stages.
    """
    known = {"2-way", "poly-2", "poly-3", "mpoly-2"}
    unknown = {name for names in modules for name in names} - known
    if unknown or len(modules) != len(blocks) or not all(modules):
        raise ValueError(
            f"each of the {len(blocks)} stages has a list of modules out of {', '.join(sorted(known))}; got {modules}"
        )

    def transition(stage: int, inputs: int, outputs: int) -> Transition:
        return post_transition(inputs, BasicBranch(inputs, outputs, 2), outputs, 2, "B")

    def layer(stage: int, channels: int, index: int) -> Field:
        names = modules[stage]
        name = names[(index - min(stage, 1)) % len(names)]
        if name == "2-way":
            return PostActivation(Sum(PolyBranch(channels, 1, shared=False), PolyBranch(channels, 1, shared=False)))
        return PostActivation(PolyBranch(channels, int(name[-1]), shared=name != "mpoly-2"))

    # A transition is one block more, as the published reductions are.
    sizes = [count + min(stage, 1) for stage, count in enumerate(blocks)]
    channels = doubling(width, len(blocks))
    stages = staged(width, channels, sizes, transition, layer, solver)
    return Network(ConvStem(in_channels, width, pool=False), stages, PlainHead(channels[-1], num_classes))
