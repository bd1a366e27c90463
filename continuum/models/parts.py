"""What stands around the flows of a network: stems, shortcuts and transitions between sizes, heads."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad

from continuum.fields import Field, PreActivation
from continuum.fields.base import in_mode_of
from continuum.fields.branches import conv1x1, conv3x3, convolution, group_norm
from continuum.flow import Flow
from continuum.noise.base import noise_of
from continuum.solvers import Solver
from continuum.weights import PiecewiseConstant

Block = Literal["basic", "bottleneck"]
Branch = Callable[[int, int, int], nn.Module]
"""Makes the branch of a block from its input channels, output channels and stride."""


def staged(
    inputs: int,
    channels: Sequence[int],
    blocks: Sequence[int],
    transition: Callable[[int, int, int], nn.Module],
    layer: Callable[[int, int, int], Field],
    solver: Solver | str,
) -> list[nn.Module]:
    """Stages of so many `channels` and `blocks` behind a stem of `inputs` channels.

    The first block of every stage changes the size and is transition(stage, channels before, channels), but in the first
    stage only where the channels differ from the stem's. The other blocks are one flow, layer(stage, channels, index of the
    block); a stage whose only block is the transition has none.
    """
    modules: list[nn.Module] = []
    for stage, (outputs, count) in enumerate(zip(channels, blocks, strict=True)):
        changes = stage > 0 or inputs != outputs
        modules += [transition(stage, inputs, outputs)] if changes else []
        layers = [layer(stage, outputs, index) for index in range(int(changes), count)]
        modules += [Flow(PiecewiseConstant(layers), solver, depth=len(layers))] if layers else []
        inputs = outputs
    return modules


def doubling(channels: int, stages: int) -> list[int]:
    """The channels of so many stages, each with twice those of the one before."""
    return [channels * 2**stage for stage in range(stages)]


def grouped(outputs: int, groups: int, group_width: int) -> int:
    """The channels inside a ResNeXt bottleneck: groups x group_width where it has 64 outside / 4, and in proportion."""
    channels = outputs // 4 * group_width // 64
    if groups < 1:
        raise ValueError(f"the number of groups (cardinality) is at least 1, not {groups}")
    if channels < 1:
        raise ValueError(
            f"a group has group_width * width // 64 channels, at least 1: group_width={group_width} is too small for a width "
            f"of {outputs // 4}"
        )
    return groups * channels


def blocks_of(depth: int, layers: int) -> list[int]:
    """The blocks of three stages, with so many layers in a row of three blocks."""
    blocks, rest = divmod(depth - 2, layers)
    if rest or blocks < 2:
        examples = ", ".join(str(layers * n + 2) for n in (2, 3, 5, 18))
        raise ValueError(f"depth is {layers} n + 2 with n >= 2 blocks a stage ({examples} ...), not {depth}")
    return [blocks] * 3


class Augment(nn.Module):
    """A stem that appends `channels` zeros to axis 1: a flow can go around in dimensions the data does not have
    (arXiv 1904.01681), and a second-order field finds its velocities there.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 0:
            raise ValueError(f"channels is the number of zeros to append, not {channels}")
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(x.shape[0], self.channels, *x.shape[2:])], dim=1)


class ConvStem(nn.Module):
    """conv-BN-ReLU; with `pool`, the 7x7 convolution and 3x3 max pooling of ImageNet networks, to a quarter of the size.

    Images of less than `smallest` pixels are refused, where what follows takes no smaller ones.
    """

    def __init__(self, in_channels: int, channels: int, pool: bool, smallest: int = 1) -> None:
        super().__init__()
        self.smallest = smallest
        self.conv = convolution(in_channels, channels, 7, stride=2) if pool else conv3x3(in_channels, channels)
        self.norm = nn.BatchNorm2d(channels)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        refuse_smaller(x, self.smallest)
        return self.pool(torch.relu(self.norm(self.conv(x))))


class MNISTStem(nn.Sequential):
    """Three convolutions, GroupNorm and ReLU between them, to a quarter of the size: 10 x 10 or more (arXiv 1806.07366)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, channels, 3),
            group_norm(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 4, stride=2, padding=1),
            group_norm(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 4, stride=2, padding=1),
        )

    def forward(self, input: Tensor) -> Tensor:
        refuse_smaller(input, 10, "; downsample=False keeps the size")
        return super().forward(input)


def refuse_smaller(images: Tensor, smallest: int, advice: str = "") -> None:
    """Raise ValueError if `images` would shrink to states of one pixel, of whose channels GroupNorm leaves the signs only."""
    height, width = images.shape[-2:]
    if min(height, width) < smallest:
        raise ValueError(
            f"images of {height} x {width} pixels shrink to one pixel here, of which GroupNorm leaves signs only: at least "
            f"{smallest} x {smallest} are needed{advice}"
        )


class Projection(nn.Module):
    """The shortcut of pre-activation blocks that change size: BN-ReLU-conv1x1 of stride `stride`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 2) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = conv1x1(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu(self.norm(x)))


class ConvNorm(nn.Module):
    """The shortcut of post-activation blocks that change size, option B of arXiv 1512.03385: conv1x1-BN."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 2) -> None:
        super().__init__()
        self.conv = conv1x1(in_channels, out_channels, stride)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Subsample(nn.Module):
    """A shortcut without weights, option A of arXiv 1512.03385: every second pixel, and zero channels on both sides."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.zeros = added_channels(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return pad(x[:, :, ::2, ::2], (0, 0, 0, 0, *self.zeros))


class PoolPad(nn.Module):
    """A shortcut without weights: averages of 2x2 pixels, and zero channels on both sides (arXiv 1707.04585, 1709.03698)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.zeros = added_channels(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return pad(avg_pool2d(x, 2), (0, 0, 0, 0, *self.zeros))


class ShiftedPaths(nn.Module):
    """The shortcut of shake-shake's blocks that change channels: ReLU, two paths to half of them each, BN (arXiv 1705.07485).

    A path is a 1x1 convolution of every `stride`-th pixel; the second sees the image moved by one pixel to the right and down.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 2) -> None:
        super().__init__()
        if out_channels % 2:
            raise ValueError(f"the two paths have half of the channels each: an even number is needed, not {out_channels}")
        self.conv1 = conv1x1(in_channels, out_channels // 2, stride)
        self.conv2 = conv1x1(in_channels, out_channels // 2, stride)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        return self.norm(torch.cat([self.conv1(x), self.conv2(pad(x, (1, -1, 1, -1)))], dim=1))


def added_channels(in_channels: int, out_channels: int) -> tuple[int, int]:
    """How many channels of zeros to put before and behind; ValueError if there would be fewer than before."""
    added = out_channels - in_channels
    if added < 0:
        raise ValueError(f"zeros can be added to channels, not taken away: {in_channels} to {out_channels}")
    return added // 2, added - added // 2


class Transition(nn.Module):
    """A residual step that changes size, activation(P(x) + F(x)) with shortcut P and branch F.

    Returns it with P(x): the projected old state is the "previous state" of the layer after it (arXiv 1710.10121).
    """

    def __init__(self, shortcut: nn.Module, branch: nn.Module, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.branch = branch
        self.activation = nn.Identity() if activation is None else activation

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shortcut = self.shortcut(x)
        return self.activation(shortcut + self.branch(x)), shortcut


class SharedTransition(nn.Module):
    """A pre-activation step that changes size, whose shortcut, a conv1x1, shares the first BN-ReLU (arXiv 1605.07146)."""

    def __init__(self, branch: PreActivation, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.branch.norm1(x))
        shortcut = self.shortcut(x)
        return shortcut + self.branch.activated(x), shortcut


class NoisyTransition(nn.Module):
    """A residual step that changes size with a branch of random coefficient, activation(P(x) + c F(x)); c = E c in evaluation.

    The coefficient is drawn from the noise's own law under every solver: a change of size is no step of an equation. Returns
    it with P(x), as `Transition` does.

    Raises:
        TypeError: noise on every entry.
    """

    def __init__(self, shortcut: nn.Module, branch: Field, activation: nn.Module | None = None) -> None:
        super().__init__()
        if (noisy := noise_of(branch)) is not None and noisy.noise == "diagonal":
            raise TypeError("a change of size has no state whose entries could have a draw each: give it scalar noise, or none")
        self.shortcut = shortcut
        self.branch = branch
        self.activation = nn.Identity() if activation is None else activation

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shortcut, noisy = self.shortcut(x), noise_of(self.branch)
        if noisy is None or not noisy.training:
            return self.activation(shortcut + self.branch(0.0, x)), shortcut
        moved = noisy.move(0.0, x, noisy.own(0.0, x, 1.0))
        return self.activation(shortcut if moved is None else shortcut + moved), shortcut

    def drift(self) -> "NoisyTransition":
        """The transition without noise, with the same weights."""
        return in_mode_of(self, NoisyTransition(self.shortcut, self.branch.drift(), self.activation))


class AtRest(nn.Module):
    """The state as its own "previous state": a two-step scheme starts from rest."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class FromZero(nn.Module):
    """Zero as the "previous state" (arXiv 1709.03698)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.zeros_like(x)


class CoupledTransition(nn.Module):
    """The step of a RevNet that changes size, y+ = P(y) + F(z), z+ = P(z) + G(y+), on the halves (y, z) (arXiv 1707.04585).

    P is `PoolPad`; F has the stride, G does not, since it sees the smaller y+. It is not undone: its input is stored.
    """

    def __init__(self, shortcut: nn.Module, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.first = first
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        y, z = x.chunk(2, dim=1)
        y = self.shortcut(y) + self.first(z)
        z = self.shortcut(z) + self.second(y)
        return torch.cat([y, z], dim=1)


class StartMotion(nn.Module):
    """(q, v) from positions q, for second-order fields: at rest, or with v = q as if the state one layer before were zero."""

    def __init__(self, rest: bool) -> None:
        super().__init__()
        self.rest = rest

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.zeros_like(x) if self.rest else x], dim=1)


class Positions(nn.Module):
    """The positions q of a state (q, v)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.chunk(2, dim=1)[0]


class Downsample(nn.Module):
    """A transition without a residual: a convolution that halves states of `smallest` or more pixels between two flows."""

    def __init__(self, in_channels: int, out_channels: int, norm: nn.Module, smallest: int = 1) -> None:
        super().__init__()
        self.smallest = smallest
        self.norm = norm
        self.conv = nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        refuse_smaller(x, self.smallest)
        return self.conv(torch.relu(self.norm(x)))


def post_transition(in_channels: int, branch: nn.Module, out_channels: int, stride: int, shortcut: str) -> Transition:
    """The post-activation step relu(P(x) + F(x)), with shortcut "A" or "B"."""
    if shortcut not in ("A", "B"):
        raise ValueError(f"shortcut is 'A' (subsampling, zero channels) or 'B' (1x1 convolution), not {shortcut!r}")
    projection = Subsample(in_channels, out_channels) if shortcut == "A" else ConvNorm(in_channels, out_channels, stride)
    return Transition(projection, branch, nn.ReLU())


class PooledHead(nn.Module):
    """norm-ReLU, average over height and width, linear: (batch, channels, height, width) to (batch, classes)."""

    def __init__(self, channels: int, num_classes: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.norm(x)).mean(dim=(2, 3)))


class PlainHead(nn.Module):
    """Average over height and width, or another `pool` to one pixel, linear: the head behind post-activation blocks."""

    def __init__(self, channels: int, num_classes: int, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.pool = pool or WholeAverage()
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.pool(x).flatten(1))


class WholeAverage(nn.Module):
    """The average over height and width by average pooling, which CIFAR networks use; AdaptiveAvgPool2d rounds otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        return avg_pool2d(x, x.shape[2:])
