"""Networks with noise: residual networks whose branches have random coefficients, and an ODE-Net driven by Brownian motion."""

from typing import Literal

from torch import nn

from continuum.fields import Autonomous, BasicBranch, Field, Momentum, ODENetBranch, PostActivation, PreActivation, ShakeBranch
from continuum.fields.branches import conv3x3, group_norm
from continuum.flow import Flow
from continuum.models.network import Network, builder
from continuum.models.parts import (
    ConvStem,
    MNISTStem,
    NoisyTransition,
    PlainHead,
    PooledHead,
    PoolPad,
    Projection,
    ShiftedPaths,
    blocks_of,
    doubling,
    staged,
)
from continuum.noise import Dropout, Gaussian, ShakeShake, StochasticDepth, linear_decay
from continuum.noise.base import Per
from continuum.solvers import Solver
from continuum.zoo.pre_activation import pre_activation


@builder
def stochastic_depth_resnet(
    depth: int = 110,
    num_classes: int = 10,
    width: int = 16,
    in_channels: int = 3,
    last: float = 0.5,
    per: Per = "batch",
    solver: Solver | str = "euler_maruyama",
) -> Network:
    """The ResNet with stochastic depth (arXiv 1603.09382): training relu(x + b F(x)), evaluation relu(x + p F(x)).

    Block l of L, transitions included, survives with p_l = 1 - l / L (1 - `last`), drawn once a mini-batch or, with `per`
    "image", once an image. Otherwise `resnet`, but for its shortcut: averages of 2x2 pixels and zero channels.

    Args:
        depth: layers with weights, 6 n + 2.
        num_classes: number of logits.
        width: channels of the first stage, doubling from stage to stage.
        in_channels: channels of the images.
        last: probability that the last block survives, in (0, 1].
        per: what shares a draw: the whole "batch", or each "image" has its own.
        solver: solver of every flow, or its text.

    Raises:
        ValueError: depth is not 6 n + 2, `last` is outside (0, 1], or an unknown per.
    """
    blocks = blocks_of(depth, 6)
    survivals = linear_decay(sum(blocks), last)

    def transition(stage: int, inputs: int, outputs: int) -> NoisyTransition:
        branch = StochasticDepth(Autonomous(BasicBranch(inputs, outputs, 2)), survivals[stage * blocks[0]], per=per)
        return NoisyTransition(PoolPad(inputs, outputs), branch, nn.ReLU())

    def layer(stage: int, channels: int, index: int) -> Field:
        return StochasticDepth(PostActivation(BasicBranch(channels, channels)), survivals[stage * blocks[0] + index], per=per)

    stages = staged(width, doubling(width, 3), blocks, transition, layer, solver)
    return Network(ConvStem(in_channels, width, pool=False), stages, PlainHead(4 * width, num_classes))


@builder
def shake_shake(
    depth: int = 26,
    width: int = 32,
    num_classes: int = 10,
    in_channels: int = 3,
    forward_mode: Literal["shake", "even"] = "shake",
    backward_mode: Literal["shake", "even", "keep"] = "shake",
    per: Per = "image",
    solver: Solver | str = "euler_maruyama",
) -> Network:
    """Shake-shake, "`depth` 2x`width`d" (arXiv 1705.07485): training x + a F(x) + (1 - a) G(x), evaluation with a = 1/2.

    Three stages of (depth - 2) / 6 blocks, `width` channels doubling, behind a stem of 16 channels: the first block of each
    stage changes the channels on a shortcut of two shifted paths, and its branches are shaken as the others are. The modes are
    those of `ShakeShake`: "shake" backward draws other coefficients for the gradients. Training with Brownian increments needs
    backward_mode="keep".

    Args:
        depth: layers with weights, 6 n + 2.
        width: channels of the first stage, doubling from stage to stage.
        num_classes: number of logits.
        in_channels: channels of the images.
        forward_mode: coefficients of the forward pass: "shake" draws them, "even" is 1/2.
        backward_mode: of the backward pass: "shake" draws others, "even" is 1/2, "keep" those of the forward pass.
        per: what shares a draw: the whole "batch", or each "image" has its own.
        solver: solver of every flow, or its text.

    Raises:
        ValueError: depth is not 6 n + 2, an odd width, an unknown mode or per.
    """

    def shaken(inputs: int, outputs: int, stride: int) -> ShakeShake:
        first, second = (Autonomous(ShakeBranch(inputs, outputs, stride)) for _ in range(2))
        return ShakeShake(first, second, forward_mode, backward_mode, per)

    def transition(stage: int, inputs: int, outputs: int) -> NoisyTransition:
        stride = 2 if stage else 1
        return NoisyTransition(ShiftedPaths(inputs, outputs, stride), shaken(inputs, outputs, stride))

    def layer(stage: int, channels: int, index: int) -> Field:
        return shaken(channels, channels, 1)

    stages = staged(16, doubling(width, 3), blocks_of(depth, 6), transition, layer, solver)
    stem = nn.Sequential(conv3x3(in_channels, 16), nn.BatchNorm2d(16))
    return Network(stem, stages, PooledHead(4 * width, num_classes, nn.Identity))


@builder
def stochastic_lm_resnet(
    depth: int = 110,
    num_classes: int = 10,
    width: int = 16,
    in_channels: int = 3,
    last: float = 0.5,
    per: Per = "batch",
    solver: Solver | str = "stochastic_two_step",
) -> Network:
    """`lm_resnet` with stochastic depth (arXiv 1710.10121): x_{n+1} = (1 - k_n) x_n + k_n x_{n-1} + b_n / p_n f_n(x_n).

    In evaluation mode b / p is 1. Of N blocks with transitions, block i survives with p = 1 - i / (N - 1) (1 - `last`): the
    very first one, i = 0, which has no k, always. Only branches are dropped, never what is kept of the two states before.

    Args:
        depth: layers with weights, 6 n + 2.
        num_classes: number of logits.
        width: channels of the first stage, doubling from stage to stage.
        in_channels: channels of the images.
        last: probability that the last block survives, in (0, 1].
        per: what shares a draw: the whole "batch", or each "image" has its own.
        solver: solver of every flow, or its text.

    Raises:
        ValueError: depth is not 6 n + 2, `last` is outside (0, 1], or an unknown per.
    """
    blocks = blocks_of(depth, 6)
    survivals = [1.0, *linear_decay(sum(blocks) - 1, last)]

    def dropped(branch: nn.Module, block: int) -> StochasticDepth:
        return StochasticDepth(Autonomous(branch), survivals[block], "rescaled", per)

    def transition(stage: int, inputs: int, outputs: int) -> NoisyTransition:
        return NoisyTransition(Projection(inputs, outputs), dropped(PreActivation(inputs, outputs, 2), stage * blocks[0]))

    def layer(stage: int, channels: int, index: int) -> Field:
        block = stage * blocks[0] + index
        field = dropped(PreActivation(channels, channels), block)
        return Momentum(field) if block else field

    stages = staged(width, doubling(width, 3), blocks, transition, layer, solver)
    return Network(conv3x3(in_channels, width), stages, PooledHead(4 * width, num_classes))


@builder
def dropout_resnet(
    depth: int = 20,
    num_classes: int = 10,
    width: int = 16,
    in_channels: int = 3,
    rate: float = 0.1,
    solver: Solver | str = "euler_maruyama",
) -> Network:
    """`preresnet` with dropout behind its branches, x + dropout(f(x)): dx = f dt + sqrt(q / (1 - q)) f dB with q = `rate`.

    Every entry of f has noise of its own (arXiv 1812.00174, 1906.02355). Blocks that change the size have none.

    Args:
        depth: layers with weights, 6 n + 2.
        num_classes: number of logits.
        width: channels of the first stage, doubling from stage to stage.
        in_channels: channels of the images.
        rate: share q of the entries that are dropped, in [0, 1).
        solver: solver of every flow, or its text.

    Raises:
        ValueError: depth is not 6 n + 2, or a rate outside [0, 1).
    """

    def layer(channels: int, first: bool) -> Field:
        return Dropout(Autonomous(PreActivation(channels, channels)), rate)

    return pre_activation(blocks_of(depth, 6), num_classes, width, in_channels, 1, PreActivation, layer, solver)


@builder
def neural_sde(
    num_classes: int = 10,
    width: int = 64,
    in_channels: int = 3,
    sigma: float = 0.1,
    kind: Literal["additive", "multiplicative"] = "additive",
    downsample: bool = True,
    solver: Solver | str = "euler_maruyama:h=0.1",
) -> Network:
    """The neural SDE dx = f(t, x) dt + sigma dB, or + sigma x dB with `kind` "multiplicative" (arXiv 1906.02355).

    `odenet` with one flow and noise on every entry of its state, which is published with ten Euler-Maruyama steps. With
    `downsample=False` its stem is a single convolution; otherwise images have at least 10 x 10 pixels.

    Args:
        num_classes: number of logits.
        width: channels of the flow.
        in_channels: channels of the images.
        sigma: size of the noise, for one unit of depth.
        kind: "additive", sigma dB, or "multiplicative", sigma x dB.
        downsample: take images to a quarter of their size in the stem; False keeps the size.
        solver: solver of every flow, or its text.

    Raises:
        ValueError: a negative sigma, or an unknown kind; in the forward pass, smaller images.
    """
    flow = Flow(Gaussian(ODENetBranch(width), sigma, kind), solver, depth=1)
    stem = MNISTStem(in_channels, width) if downsample else nn.Conv2d(in_channels, width, 3, padding=1)
    return Network(stem, [flow], PooledHead(width, num_classes, group_norm))
