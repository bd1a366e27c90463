"""What moves: a field f says where a state goes at each depth, dx/dt = f(t, x)."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from continuum.types import State, Time


class Field(nn.Module, ABC):
    """The right-hand side of dx/dt = f(t, x).

    The signature is torchdiffeq's, so a field runs under its solvers as it is. `knots` are the interior depths
    where the field jumps, in increasing order; a solver never steps across one unknowingly, and never calls the
    field exactly on one: a stage there is evaluated just inside the step it belongs to.
    """

    knots: tuple[float, ...] = ()

    @abstractmethod
    def forward(self, t: Time, x: State) -> State:
        """dx/dt at depth `t` (in layers) of the states `x`; the result has the shape of `x`."""


class Autonomous(Field):
    """A field that does not depend on depth: f(t, x) = module(x), for any module that keeps the shape of x.

    >>> import torch
    >>> from torch import nn
    >>> field = Autonomous(nn.Linear(3, 3))
    >>> field(0.0, torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, t: Time, x: State) -> State:
        return self.module(x)


class Scaled(Field):
    """The field s f(t, x): what a residual scaling s does to a layer."""

    def __init__(self, field: Field, scale: float) -> None:
        super().__init__()
        if isinstance(field, Momentum):
            raise TypeError("a Momentum field is scaled inside: write Momentum(Scaled(field, s)), not the reverse")
        self.field = field
        self.scale = scale
        self.knots = field.knots

    def forward(self, t: Time, x: State) -> State:
        return self.scale * self.field(t, x)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


class Momentum(Field):
    """A layer of the equation (1 + k) x' = f(t, x), with one learnt scalar k.

    -k is a momentum and 1 + k a friction: under the scheme `LinearTwoStep` a step is
    x_{n+1} = (1 - k) x_n + k x_{n-1} + h f(x_n), the layer of LM-ResNet (arXiv 1710.10121); every other scheme and
    solver integrates f / (1 + k). k starts uniform in (-0.1, 0] unless it is given, and is zero-stable for -1 < k <= 1.
    """

    def __init__(self, field: Field, k: float | None = None) -> None:
        super().__init__()
        self.field = field
        self.knots = field.knots
        self.k = nn.Parameter(-0.1 * torch.rand(()) if k is None else torch.tensor(float(k)))

    def forward(self, t: Time, x: State) -> State:
        return self.field(t, x) / (1 + self.k)


class SecondOrder(Field):
    """The second-order equation q'' = a(t, q) on the state x = (q, v): q' = v, v' = a(t, q).

    Axis 1 of x holds the positions q in its first half and the velocities v in its second; `Augment` appends zeros, so
    that motion starts from rest (papers: arXiv 2002.08071, 2006.07220).

    Raises:
        ValueError: x has an odd number of channels.
    """

    def __init__(self, acceleration: Field) -> None:
        super().__init__()
        self.acceleration = acceleration
        self.knots = acceleration.knots

    def forward(self, t: Time, x: State) -> State:
        if x.shape[1] % 2:
            raise ValueError(f"SecondOrder needs an even number of channels, (q, v) on axis 1; got shape {tuple(x.shape)}")
        position, velocity = x.chunk(2, dim=1)
        return torch.cat([velocity, self.acceleration(t, position)], dim=1)


def checked(slope: State, x: State) -> State:
    """`slope`, if it has the shape of the state; otherwise adding it would broadcast silently.

    Raises:
        ValueError: another shape.
    """
    if slope.shape != x.shape:
        raise ValueError(
            f"the field returned shape {tuple(slope.shape)} for a state of shape {tuple(x.shape)}: dx/dt has the shape of x"
        )
    return slope


def depth_channel(t: Time, x: Tensor) -> Tensor:
    """The depth as one more channel: a tensor of shape (batch, 1, ...) filled with t, like x elsewhere."""
    return torch.ones_like(x[:, :1]) * t
