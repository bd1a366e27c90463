"""Networks whose steps can be undone, and their stable relatives: RevNet, Hamiltonian, midpoint, leapfrog, antisymmetric.

With gradient="reversible" in the solver, for example `coupling:h=1,gradient=reversible`, they train without stored states.
"""

from collections.abc import Callable, Sequence
from typing import Literal

from torch import nn

from continuum.fields import (
    Antisymmetric,
    Autonomous,
    Coupled,
    DoubleLayer,
    Field,
    Hamiltonian,
    PreActivation,
    Scaled,
    SecondOrder,
)
from continuum.fields.branches import conv3x3
from continuum.fields.coupled import half_of
from continuum.flow import Flow
from continuum.models.network import Network, builder
from continuum.models.parts import CoupledTransition, FromZero, PooledHead, PoolPad, Positions, StartMotion, blocks_of, staged
from continuum.solvers import Solver
from continuum.weights import PiecewiseConstant

WIDTHS = (32, 64, 112)
"""Channels of the three stages in the smaller networks of arXiv 1707.04585 and 1709.03698; (32, 64, 128) in the larger."""


@builder
def revnet(
    depth: int = 38,
    num_classes: int = 10,
    widths: Sequence[int] = WIDTHS,
    in_channels: int = 3,
    scale: float = 1.0,
    solver: Solver | str = "coupling",
) -> Network:
    """RevNet-`depth` (arXiv 1707.04585): y+ = y + F(z), z+ = z + G(y+) on the halves of the channels, F and G pre-activation.

    Three stages of (depth - 2) / 12 blocks; the blocks that change the size are no reversible ones. RevNet-110 has the widths
    (32, 64, 128). At the published `scale` 1 undoing many blocks with batch statistics loses digits; a scale of 0.1 keeps them.

    Args:
        depth: layers with weights, 12 n + 2.
        num_classes: number of logits.
        widths: channels of the three stages, not decreasing; even, for they are halved.
        in_channels: channels of the images.
        scale: constant factor of the branches.
        solver: solver of every flow, or its text.

    Raises:
        ValueError: depth is not 12 n + 2, or an odd number of channels.
    """
    blocks = blocks_of(depth, 12)
    halves = [half_of(channels) for channels in _three(widths)]

    def transition(stage: int, before: int, after: int) -> CoupledTransition:
        return CoupledTransition(PoolPad(before, after), PreActivation(before, after, 2), PreActivation(after, after))

    def layer(stage: int, half: int, index: int) -> Field:
        pair = Coupled(Autonomous(PreActivation(half, half)), Autonomous(PreActivation(half, half)))
        return pair if scale == 1 else pair.scaled(scale)

    stages = staged(halves[0], halves, blocks, transition, layer, solver)
    return Network(conv3x3(in_channels, widths[0]), stages, PooledHead(widths[-1], num_classes))


@builder
def hamiltonian(
    depth: int = 74,
    num_classes: int = 10,
    widths: Sequence[int] = WIDTHS,
    in_channels: int = 3,
    h: float = 0.1,
    solver: Solver | str = "coupling",
) -> Network:
    """The two-layer Hamiltonian network (arXiv 1709.03698), branches times `h`, with pooling and zero channels between stages.

    y+ = y + h K1^T relu(K1 z + b1), z+ = z - h K2^T relu(K2 y+ + b2). Three stages of (depth - 2) / 12 blocks, of which the
    first block of the second and third stage still has the channels of the stage before.

    Args:
        depth: layers with weights, 12 n + 2.
        num_classes: number of logits.
        widths: channels of the three stages, not decreasing; even, for they are halved.
        in_channels: channels of the images.
        h: factor of every branch, the step size of the published network.
        solver: solver of every flow, or its text.

    Raises:
        ValueError: depth is not 12 n + 2, or an odd number of channels.
    """
    return _pooled(depth, 12, num_classes, widths, in_channels, lambda channels: Hamiltonian(channels).scaled(h), solver)


@builder
def midpoint(
    depth: int = 26,
    num_classes: int = 10,
    widths: Sequence[int] = WIDTHS,
    in_channels: int = 3,
    h: float = 0.1,
    gamma: float = 1e-4,
    start: Literal["euler", "zero"] = "euler",
    solver: Solver | str = "two_step_midpoint",
) -> Network:
    """The midpoint network Y_{n+1} = Y_{n-1} + 2 h relu((K - K^T - gamma I) Y_n + b) (arXiv 1709.03698).

    Three stages of (depth - 2) / 6 blocks, cut as in `hamiltonian`. A stage starts with a step of Euler's, or, as the
    paper starts its leapfrog, as if the state before were "zero".

    Args:
        depth: layers with weights, 6 n + 2.
        num_classes: number of logits.
        widths: channels of the three stages, not decreasing.
        in_channels: channels of the images.
        h: factor of every branch, the step size of the published network.
        gamma: damping of every layer, at least 0.
        start: "euler", a step of Euler's first, or "zero", as if the state before were zero.
        solver: solver of every flow, or its text.

    Raises:
        ValueError: depth is not 6 n + 2, a negative gamma, or an unknown start.
    """

    def layer(channels: int) -> Field:
        return Autonomous(Antisymmetric(channels, gamma)).scaled(h)

    _check_start(start, "euler", "zero")
    before = [FromZero()] if start == "zero" else []
    return _pooled(depth, 6, num_classes, widths, in_channels, layer, solver, before)


@builder
def leapfrog(
    depth: int = 26,
    num_classes: int = 10,
    widths: Sequence[int] = WIDTHS,
    in_channels: int = 3,
    h: float = 0.1,
    start: Literal["zero", "rest"] = "zero",
    solver: Solver | str = "leapfrog",
) -> Network:
    """The leapfrog network Y_{n+1} = 2 Y_n - Y_{n-1} - h^2 K^T relu(K Y_n + b) (arXiv 1709.03698), a second-order equation.

    In its one-step form, on positions and velocities, which any solver can integrate: v+ = v - h^2 K^T relu(K Y + b),
    Y+ = Y + v+. Three stages of (depth - 2) / 6 blocks, cut as in `hamiltonian`. A stage starts as if the state before
    were "zero", as published, or from "rest".

    Args:
        depth: layers with weights, 6 n + 2.
        num_classes: number of logits.
        widths: channels of the three stages, not decreasing.
        in_channels: channels of the images.
        h: factor of every branch, the step size of the published network.
        start: "zero", as if the state before were zero, or "rest", at velocity zero.
        solver: solver of every flow, or its text.

    Raises:
        ValueError: depth is not 6 n + 2, or an unknown start.
    """

    def layer(channels: int) -> Field:
        return SecondOrder(Scaled(Autonomous(DoubleLayer(channels)), -(h**2)))

    _check_start(start, "zero", "rest")
    return _pooled(depth, 6, num_classes, widths, in_channels, layer, solver, [StartMotion(start == "rest")], [Positions()])


@builder
def antisymmetric(
    depth: int = 26,
    num_classes: int = 10,
    widths: Sequence[int] = WIDTHS,
    in_channels: int = 3,
    h: float = 0.1,
    gamma: float = 0.1,
    solver: Solver | str = "euler",
) -> Network:
    """The stable network Y+ = Y + h relu((K - K^T - gamma I) Y + b) (arXiv 1705.03341), which neither explodes nor vanishes.

    Three stages of (depth - 2) / 6 blocks, cut as in `hamiltonian`. Euler's steps need the damping gamma > 0.

    Args:
        depth: layers with weights, 6 n + 2.
        num_classes: number of logits.
        widths: channels of the three stages, not decreasing.
        in_channels: channels of the images.
        h: factor of every branch, the step size of the published network.
        gamma: damping of every layer, at least 0.
        solver: solver of every flow, or its text.

    Raises:
        ValueError: depth is not 6 n + 2, or a negative gamma.
    """

    def layer(channels: int) -> Field:
        return Autonomous(Antisymmetric(channels, gamma)).scaled(h)

    return _pooled(depth, 6, num_classes, widths, in_channels, layer, solver)


def _pooled(
    depth: int,
    layers: int,
    num_classes: int,
    widths: Sequence[int],
    in_channels: int,
    layer: Callable[[int], Field],
    solver: Solver | str,
    before: Sequence[nn.Module] = (),
    after: Sequence[nn.Module] = (),
) -> Network:
    """conv3x3, flows with pooling and zero channels between them, BN-ReLU, average, linear; modules around each flow."""
    stages: list[nn.Module] = []
    for stage, (channels, blocks) in enumerate(zip(_three(widths), blocks_of(depth, layers), strict=True)):
        # The first block of a stage has the channels of the stage before.
        count = blocks + (stage == 0) - (stage == 2)
        stages += [PoolPad(widths[stage - 1], channels)] if stage else []
        flow = Flow(PiecewiseConstant(layer(channels) for _ in range(count)), solver, depth=count)
        stages += [*before, flow, *after]
    return Network(conv3x3(in_channels, widths[0]), stages, PooledHead(widths[-1], num_classes))


def _three(widths: Sequence[int]) -> Sequence[int]:
    if len(widths) != 3 or list(widths) != sorted(widths):
        raise ValueError(f"widths are the channels of three stages, not decreasing; got {widths}")
    return widths


def _check_start(start: str, *choices: str) -> None:
    if start not in choices:
        raise ValueError(f"start is one of {', '.join(choices)}, not {start!r}")
