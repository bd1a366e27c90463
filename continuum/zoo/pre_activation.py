"""Pre-activation networks, x + f(x) with the activations inside f, and their two-step relatives."""

from collections.abc import Callable, Sequence

from torch import nn

from continuum.fields import Autonomous, Field, Momentum, PreActivation, PreBottleneck, TwoColumns
from continuum.fields.branches import conv1x1, conv3x3
from continuum.flow import Flow
from continuum.models.network import Network, builder
from continuum.models.parts import (
    AtRest,
    Block,
    Branch,
    PooledHead,
    Projection,
    SharedTransition,
    Transition,
    blocks_of,
    doubling,
    grouped,
    staged,
)
from continuum.solvers import Solver


@builder
def preresnet(
    depth: int = 20,
    num_classes: int = 10,
    width: int = 16,
    in_channels: int = 3,
    block: Block = "basic",
    scale: float = 1.0,
    solver: Solver | str = "euler",
) -> Network:
    """The pre-activation ResNet for CIFAR (arXiv 1603.05027): three stages, `width` channels doubling, to 1001 layers.

    A stage has (depth - 2) / 6 basic blocks, or (depth - 2) / 9 bottlenecks of four times as many channels. Under Euler with
    h = 1 it is the discrete network. The blocks that change the size are plain residual steps on a projected shortcut. The
    others may be scaled by a constant, as in Inception-ResNet (arXiv 1602.07261).

    Args:
        depth: layers with weights, 6 n + 2, or 9 n + 2 for bottlenecks.
        num_classes: number of logits.
        width: channels of the first stage, doubling from stage to stage.
        in_channels: channels of the images.
        block: "basic", two 3x3 convolutions, or "bottleneck", 1x1, 3x3 and 1x1 with four times as many channels outside.
        scale: constant factor of the blocks that keep the size.
        solver: solver of every flow, or its text.

    Raises:
        ValueError: depth is not 6 n + 2, or 9 n + 2 for bottlenecks.
    """
    branch, expansion, blocks = _branch(block, depth)

    def layer(channels: int, first: bool) -> Field:
        field = Autonomous(branch(channels, channels, 1))
        return field if scale == 1 else field.scaled(scale)

    return pre_activation(blocks, num_classes, width, in_channels, expansion, branch, layer, solver)


@builder
def lm_resnet(
    depth: int = 20,
    num_classes: int = 10,
    width: int = 16,
    in_channels: int = 3,
    block: Block = "basic",
    solver: Solver | str = "linear_two_step",
) -> Network:
    """LM-ResNet (arXiv 1710.10121): `preresnet` with x_{n+1} = (1 - k_n) x_n + k_n x_{n-1} + f_n(x_n), k_n learnt.

    The very first block is a plain residual step and has no k; nor have those that change the size.

    Args:
        depth: layers with weights, 6 n + 2, or 9 n + 2 for bottlenecks.
        num_classes: number of logits.
        width: channels of the first stage, doubling from stage to stage.
        in_channels: channels of the images.
        block: "basic", two 3x3 convolutions, or "bottleneck", 1x1, 3x3 and 1x1 with four times as many channels outside.
        solver: solver of every flow, or its text.

    Raises:
        ValueError: depth is not 6 n + 2, or 9 n + 2 for bottlenecks, with n >= 2: else no block has a k.
    """
    branch, expansion, blocks = _branch(block, depth)

    def layer(channels: int, first: bool) -> Field:
        field = Autonomous(branch(channels, channels, 1))
        return field if first else Momentum(field)

    return pre_activation(blocks, num_classes, width, in_channels, expansion, branch, layer, solver)


@builder
def lm_resnext(
    depth: int = 29,
    num_classes: int = 10,
    cardinality: int = 8,
    group_width: int = 64,
    width: int = 64,
    in_channels: int = 3,
    solver: Solver | str = "linear_two_step",
) -> Network:
    """LM-ResNeXt (arXiv 1710.10121): `lm_resnet` with ResNeXt's grouped bottlenecks in pre-activation form.

    Args:
        depth: layers with weights, 9 n + 2.
        num_classes: number of logits.
        cardinality: number of groups of the 3x3 convolution.
        group_width: channels of each group in the first stage, for `width` 64.
        width: a quarter of the channels of the first stage, which double.
        in_channels: channels of the images.
        solver: solver of every flow, or its text.

    Raises:
        ValueError: depth is not 9 n + 2 with n >= 2, no group, or a `group_width` so small that groups have no channel.
    """

    def branch(inputs: int, outputs: int, stride: int) -> nn.Module:
        return PreBottleneck(inputs, grouped(outputs, cardinality, group_width), outputs, stride, groups=cardinality)

    def layer(channels: int, first: bool) -> Field:
        return Momentum(Autonomous(branch(channels, channels, 1)))

    return pre_activation(blocks_of(depth, 9), num_classes, width, in_channels, 4, branch, layer, solver)


@builder
def momentum_resnet(
    depth: int = 20,
    num_classes: int = 10,
    width: int = 16,
    in_channels: int = 3,
    gamma: float = 0.9,
    solver: Solver | str = "linear_two_step",
) -> Network:
    """The momentum ResNet (arXiv 2102.07870): `preresnet` with v+ = gamma v + (1 - gamma) f(x), x+ = x + v+, from rest.

    In its two-step form, x_{n+1} = (1 + gamma) x_n - gamma x_{n-1} + (1 - gamma) f(x_n): LM-ResNet with k = -gamma, not
    learnt. Every step can be undone, so that `linear_two_step:h=1,gradient=reversible` trains it without stored states.

    Args:
        depth: layers with weights, 6 n + 2.
        num_classes: number of logits.
        width: channels of the first stage, doubling from stage to stage.
        in_channels: channels of the images.
        gamma: momentum, in (0, 1).
        solver: solver of every flow, or its text.

    Raises:
        ValueError: depth is not 6 n + 2, or gamma is outside (0, 1).
    """
    if not 0 < gamma < 1:
        raise ValueError(f"gamma lies between 0 and 1, not {gamma}")

    def layer(channels: int, first: bool) -> Field:
        return Momentum(Autonomous(PreActivation(channels, channels)).scaled(1 - gamma), k=-gamma, learnt=False)

    network = pre_activation(blocks_of(depth, 6), num_classes, width, in_channels, 1, PreActivation, layer, solver)
    stages = [part for stage in network.stages for part in ([AtRest(), stage] if isinstance(stage, Flow) else [stage])]
    return Network(network.stem, stages, network.head)


@builder
def wide_resnet(
    depth: int = 28,
    widen: int = 10,
    num_classes: int = 10,
    dropout: float = 0.0,
    in_channels: int = 3,
    solver: Solver | str = "euler",
) -> Network:
    """The wide residual network WRN-`depth`-`widen` (arXiv 1605.07146), with `dropout` between the convolutions.

    Three stages of (depth - 4) / 6 pre-activation blocks with 16, 32 and 64 times `widen` channels; the first block of each
    changes the width, and shares its first BN-ReLU with its shortcut. With dropout, an adaptive solver integrates it in
    evaluation mode only.

    Args:
        depth: layers with weights, 6 n + 4.
        widen: factor of the channels 16, 32 and 64.
        num_classes: number of logits.
        dropout: rate between the two convolutions of a block, in [0, 1).
        in_channels: channels of the images.
        solver: solver of every flow, or its text.

    Raises:
        ValueError: depth is not 6 n + 4, or dropout is not in [0, 1).
        TypeError: dropout and an adaptive solver.
    """
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1:
        raise ValueError(f"depth is 6 n + 4 (10, 16, 22, 28, 40), not {depth}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is a rate in [0, 1), not {dropout}")

    def transition(stage: int, inputs: int, outputs: int) -> SharedTransition:
        stride = 2 if stage else 1
        return SharedTransition(PreActivation(inputs, outputs, stride, dropout), conv1x1(inputs, outputs, stride))

    def layer(stage: int, channels: int, index: int) -> Field:
        return Autonomous(PreActivation(channels, channels, dropout=dropout))

    stages = staged(16, doubling(16 * widen, 3), [blocks] * 3, transition, layer, solver)
    return Network(conv3x3(in_channels, 16), stages, PooledHead(64 * widen, num_classes))


@builder
def fractal_resnet(
    depth: int = 20, num_classes: int = 10, width: int = 16, in_channels: int = 3, solver: Solver | str = "fractal"
) -> Network:
    """`preresnet` with two-column fractal blocks x + f1(x) / 2 + f2(x + f1(x)): Runge-Kutta steps of two stages, each with
    weights of its own (arXiv 1605.07648, as read in arXiv 1710.10121).

    Args:
        depth: layers with weights, 6 n + 2.
        num_classes: number of logits.
        width: channels of the first stage, doubling from stage to stage.
        in_channels: channels of the images.
        solver: solver of every flow, or its text.

    Raises:
        ValueError: depth is not 6 n + 2.
    """

    def layer(channels: int, first: bool) -> Field:
        return TwoColumns(Autonomous(PreActivation(channels, channels)), Autonomous(PreActivation(channels, channels)))

    return pre_activation(blocks_of(depth, 6), num_classes, width, in_channels, 1, PreActivation, layer, solver)


def _branch(block: Block, depth: int) -> tuple[Branch, int, list[int]]:
    """The branch of a kind of block, how many times wider its stages are, and the blocks of each stage."""
    if block not in ("basic", "bottleneck"):
        raise ValueError(f"block is 'basic' or 'bottleneck', not {block!r}")

    def bottleneck(inputs: int, outputs: int, stride: int) -> nn.Module:
        return PreBottleneck(inputs, outputs // 4, outputs, stride)

    return (PreActivation, 1, blocks_of(depth, 6)) if block == "basic" else (bottleneck, 4, blocks_of(depth, 9))


def pre_activation(
    blocks: Sequence[int],
    num_classes: int,
    width: int,
    in_channels: int,
    expansion: int,
    branch: Branch,
    layer: Callable[[int, bool], Field],
    solver: Solver | str,
) -> Network:
    """conv3x3, stages of blocks with expansion x width channels, doubling, BN-ReLU, average, linear.

    A block that changes the size is a plain residual step of `branch`; `layer` makes the field of any other from its channels,
    and is told whether it is the very first.
    """

    def transition(stage: int, inputs: int, outputs: int) -> Transition:
        step = branch(inputs, outputs, 2 if stage else 1)
        return Transition(Projection(inputs, outputs, 2 if stage else 1), step)

    def field(stage: int, channels: int, index: int) -> Field:
        return layer(channels, not stage and not index)

    channels = doubling(expansion * width, len(blocks))
    stages = staged(width, channels, blocks, transition, field, solver)
    return Network(conv3x3(in_channels, width), stages, PooledHead(channels[-1], num_classes))
