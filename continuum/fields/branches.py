"""The f of residual blocks: what a layer adds to its input, x + f(x)."""

import torch
from torch import Tensor, nn

from continuum.fields.base import Field, depth_channel
from continuum.types import State, Time


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """The 3x3 convolution of residual networks: padding 1, no bias, He-normal by fan-out (arXiv 1502.01852)."""
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class PreActivation(nn.Module):
    """The basic branch with pre-activation, BN-ReLU-conv3x3-BN-ReLU-conv3x3 (arXiv 1603.05027).

    Maps (batch, in_channels, height, width) to (batch, out_channels, height / stride, width / stride). With equal
    channels and stride 1, `Autonomous(PreActivation(c, c))` is a field.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(torch.relu(self.norm1(x)))
        return self.conv2(torch.relu(self.norm2(x)))


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

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(features + 1, hidden)
        self.outer = nn.Linear(hidden, features)

    def forward(self, t: Time, x: State) -> State:
        return self.outer(torch.tanh(self.inner(torch.cat([depth_channel(t, x), x], dim=1))))
