"""The f of residual blocks: what a layer adds to its input, x + f(x)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from continuum.fields.base import Field, depth_channel
from continuum.types import State, Time


class Narrow(nn.Conv2d):
    """A strided 1x1 convolution of few channels, whose input gets the usual strides.

    In channels_last, oneDNN's gradient of one of stride 2 and fewer than 8 input channels writes outside its memory on CPUs
    with AVX2 only (torch 2.14, oneDNN 3.12).
    """

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.contiguous())


def convolution(
    in_channels: int, out_channels: int, size: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Conv2d:
    """A convolution of residual networks: padded to keep the size, no bias, He-normal by fan-out (arXiv 1502.01852)."""
    padding = dilation * (size // 2)
    kind = Narrow if size == 1 and stride > 1 and in_channels < 8 else nn.Conv2d
    conv = kind(in_channels, out_channels, size, stride, padding, dilation, groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return convolution(in_channels, out_channels, 3, stride, groups, dilation)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return convolution(in_channels, out_channels, 1, stride)


class PreActivation(nn.Module):
    """The basic branch with pre-activation, BN-ReLU-conv3x3-BN-ReLU-conv3x3 (arXiv 1603.05027).

    Maps (batch, in_channels, height, width) to (batch, out_channels, height / stride, width / stride). With equal
    channels and stride 1, `Autonomous(PreActivation(c, c))` is a field. A `dropout` rate acts between the convolutions, as in
    wide residual networks (arXiv 1605.07146); `norm` may be another norm of so many channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dropout: float = 0.0,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.norm2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv3x3(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.activated(torch.relu(self.norm1(x)))

    def activated(self, x: Tensor) -> Tensor:
        """The branch behind its first BN-ReLU, for transitions that share it with their shortcut."""
        x = self.conv1(x)
        return self.conv2(self.dropout(torch.relu(self.norm2(x))))


class PreBottleneck(nn.Module):
    """The bottleneck with pre-activation: BN-ReLU-conv1x1, BN-ReLU-conv3x3 of `groups`, BN-ReLU-conv1x1 (arXiv 1603.05027)."""

    def __init__(self, in_channels: int, inner: int, out_channels: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv1x1(in_channels, inner)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, stride, groups)
        self.norm3 = nn.BatchNorm2d(inner)
        self.conv3 = conv1x1(inner, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(torch.relu(self.norm1(x)))
        x = self.conv2(torch.relu(self.norm2(x)))
        return self.conv3(torch.relu(self.norm3(x)))


class BasicBranch(nn.Module):
    """The basic branch of post-activation blocks, conv3x3-BN-ReLU-conv3x3-BN (arXiv 1512.03385), for `PostActivation`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.norm2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(x))


class ShakeBranch(BasicBranch):
    """The branch of shake-shake's blocks, ReLU-conv3x3-BN-ReLU-conv3x3-BN (arXiv 1705.07485)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.relu(x))


class Bottleneck(nn.Module):
    """The post-activation bottleneck conv1x1-BN-ReLU-conv3x3-BN-ReLU-conv1x1-BN (arXiv 1512.03385).

    The 3x3 convolution has the stride, `groups` (ResNeXt, arXiv 1611.05431) and `dilation`.
    """

    def __init__(
        self, in_channels: int, inner: int, out_channels: int, stride: int = 1, groups: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        self.conv1 = conv1x1(in_channels, inner)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, stride, groups, dilation)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv3 = conv1x1(inner, out_channels)
        self.norm3 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        return self.norm3(self.conv3(x))


class SqueezeExcite(nn.Module):
    """Any branch with its channels weighted by what it sees: s(F(x)) F(x) (arXiv 1709.01507).

    s(u) = sigmoid(W2 relu(W1 mean(u) + b1) + b2), with the mean over height and width and channels / `reduction` inside.

    Raises:
        ValueError: a reduction that leaves no channel.
    """

    def __init__(self, branch: nn.Module, channels: int, reduction: int = 16) -> None:
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction divides the {channels} channels of the branch, at most down to one; got {reduction}")
        self.branch = branch
        self.squeeze = nn.Linear(channels, channels // reduction)
        self.excite = nn.Linear(channels // reduction, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        scale = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean(dim=(2, 3))))))
        return scale[:, :, None, None] * y


class PolyBranch(nn.Module):
    """The branch of a PolyNet module: F + F F (+ F F F), or F + G F (arXiv 1611.05725).

    F is conv3x3-BN-ReLU-conv1x1-BN, a small one in the place of the published Inception; a ReLU stands between orders. As in
    the published networks, the orders of a `shared` branch (poly-2, poly-3) share the 3x3 convolution, while each has its own
    norms and last convolution; else each has its own of everything (mpoly-2).

    Raises:
        ValueError: fewer than one order.
    """

    def __init__(self, channels: int, orders: int, shared: bool) -> None:
        super().__init__()
        if orders < 1:
            raise ValueError(f"a PolyNet branch has one order or more, not {orders}")
        self.convs = nn.ModuleList([conv3x3(channels, channels) for _ in range(1 if shared else orders)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels) for _ in range(orders)])
        self.last_convs = nn.ModuleList([conv1x1(channels, channels) for _ in range(orders)])
        self.last_norms = nn.ModuleList([nn.BatchNorm2d(channels) for _ in range(orders)])

    def forward(self, x: Tensor) -> Tensor:
        x = total = self.term(x, 0)
        for order in range(1, len(self.norms)):
            x = self.term(torch.relu(x), order)
            total = total + x
        return total

    def term(self, x: Tensor, order: int) -> Tensor:
        """F of the given order."""
        y = torch.relu(self.norms[order](self.convs[order % len(self.convs)](x)))
        return self.last_norms[order](self.last_convs[order](y))


class Sum(nn.Module):
    """The sum of branches, F + G: PolyNet's 2-way module, and in general any split of a field into parts."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.branches
        total = first(x)
        for branch in others:
            total = total + branch(x)
        return total


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm in groups of two channels, as published for 64, up to 32 groups; larger groups for odd channel numbers."""
    groups = 32
    while channels % (2 * groups) and groups > 1:
        groups //= 2
    return nn.GroupNorm(groups, channels)


class ODENetBranch(Field):
    """The field of the image ODE-Net: GN, then twice ReLU-conv3x3-GN with depth as one more input channel.

    The convolutions have a bias and see (t, x); states are (batch, channels, height, width) (arXiv 1806.07366).
    """

    takes_number = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels + 1, channels, 3, padding=1)
        self.norm2 = group_norm(channels)
        self.conv2 = nn.Conv2d(channels + 1, channels, 3, padding=1)
        self.norm3 = group_norm(channels)

    def forward(self, t: Time, x: State) -> State:
        depth = depth_channel(t, x)
        y = self.conv1(torch.cat([depth, torch.relu(self.norm1(x))], dim=1))
        y = self.conv2(torch.cat([depth, torch.relu(self.norm2(y))], dim=1))
        return self.norm3(y)


class MLP(Field):
    """A field on vectors, f(t, x) = W2 tanh(W1 (t, x) + b1) + b2, with `hidden` units; x is (batch, features)."""

    takes_number = True

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(features + 1, hidden)
        self.outer = nn.Linear(hidden, features)

    def forward(self, t: Time, x: State) -> State:
        return self.outer(torch.tanh(self.inner(torch.cat([depth_channel(t, x), x], dim=1))))
