"""Equations in two halves, y' = f(t, z) and z' = g(t, y), on the state x = (y, z): Hamiltonian, reversible, second-order."""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d

from continuum.fields.base import Autonomous, Field, Scaled, as_part, in_mode_of
from continuum.types import State, Time


class Coupled(Field):
    """y' = first(t, z), z' = second(t, y); axis 1 of the state holds y in its first half and z in its second.

    Each half moves by the other alone, so that schemes which update them in turn can be undone: `Coupling` (RevNet, arXiv
    1707.04585), `Leapfrog` and `Verlet`.

    >>> rotation = Coupled(Autonomous(nn.Identity()), Scaled(Autonomous(nn.Identity()), -1.0))
    >>> rotation(0.0, torch.tensor([[1.0, 0.0]]))
    tensor([[ 0., -1.]])

    Raises:
        TypeError: a half is no `Field`, or jumps in depth.
        ValueError: when called, a state with an odd number of channels.
    """

    takes_number = True

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = as_part(first, "Coupled")
        self.second = as_part(second, "Coupled")

    def forward(self, t: Time, x: State) -> State:
        y, z = halves(x)
        return torch.cat([self.first(t, z), self.second(t, y)], dim=1)

    def scaled(self, scale: float) -> Field:
        return in_mode_of(self, Coupled(self.first.scaled(scale), self.second.scaled(scale)))

    def held(self, t: float) -> Field:
        return in_mode_of(self, Coupled(self.first.held(t), self.second.held(t)))

    def coupled(self) -> tuple[Field, Field]:
        return self.first, self.second

    def innermost(self) -> Field:
        return self.second.innermost()


class SecondOrder(Coupled):
    """The second-order equation q'' = a(t, q) on the state x = (q, v): q' = v, v' = a(t, q).

    Axis 1 of x holds the positions q in its first half and the velocities v in its second; `Augment` appends zeros, so
    that motion starts from rest (papers: arXiv 2002.08071, 2006.07220).

    Raises:
        TypeError: the acceleration is no `Field`, or jumps in depth.
        ValueError: when called, a state with an odd number of channels.
    """

    def __init__(self, acceleration: Field) -> None:
        super().__init__(Autonomous(nn.Identity()), acceleration)

    def held(self, t: float) -> Field:
        return in_mode_of(self, SecondOrder(self.second.held(t)))

    def acceleration(self) -> Field:
        return self.second


class DoubleLayer(nn.Module):
    """K^T relu(K x + b) + c with a 3x3 convolution K and its transpose: the two-layer branch of arXiv 1709.03698.

    It is the gradient of a function of x, so a `Coupled` pair of them (one negated) is a Hamiltonian system.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        self.inner_bias = nn.Parameter(torch.zeros(channels))
        self.outer_bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(conv2d(x, self.weight, self.inner_bias, padding=1))
        return conv_transpose2d(y, self.weight, self.outer_bias, padding=1)


class Antisymmetric(nn.Module):
    """relu((K - K^T - gamma I) x + b) with a 3x3 convolution K (arXiv 1705.03341).

    The eigenvalues of K - K^T are imaginary, so that signals neither grow nor vanish; a small gamma > 0 damps them, which
    Euler's steps need: they are stable for h <= 2 gamma / (gamma^2 + w^2) at frequency w.

    Raises:
        ValueError: gamma is negative.
    """

    def __init__(self, channels: int, gamma: float) -> None:
        super().__init__()
        if not gamma >= 0:
            raise ValueError(f"gamma damps and is not negative; got {gamma}")
        self.gamma = gamma
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        # The transpose of a convolution swaps its channels and mirrors its kernel.
        weight = self.weight - self.weight.transpose(0, 1).flip(2, 3)
        return torch.relu(conv2d(x, weight, self.bias, padding=1) - self.gamma * x)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma:g}"


class Hamiltonian(Coupled):
    """y' = K1^T relu(K1 z + b1) + c1, z' = -K2^T relu(K2 y + b2) - c2 on (y, z) of `channels` in all (arXiv 1709.03698).

    Raises:
        ValueError: an odd number of channels.
    """

    def __init__(self, channels: int) -> None:
        half = half_of(channels)
        super().__init__(Autonomous(DoubleLayer(half)), Scaled(Autonomous(DoubleLayer(half)), -1.0))


def halves(x: State) -> tuple[State, State]:
    """(y, z) of the state x, its halves on axis 1; ValueError for an odd number of channels."""
    if x.shape[1] % 2:
        raise ValueError(f"a state in two halves needs an even number of channels, on axis 1; got shape {tuple(x.shape)}")
    y, z = x.chunk(2, dim=1)
    return y, z


def half_of(channels: int) -> int:
    """The channels of each half; ValueError for an odd number."""
    if channels % 2:
        raise ValueError(f"a state in two halves needs an even number of channels, not {channels}")
    return channels // 2
