"""What moves: a field f says where a state goes at each depth, dx/dt = f(t, x)."""

from abc import ABC, abstractmethod
from typing import Any

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

    def scaled(self, scale: float) -> "Field":
        """The field s f of the same weights, and of a kind that the same schemes can step."""
        field = Scaled(self, scale)
        field.training = self.training
        return field


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


class PostActivation(Field):
    """The field of a residual block with its activation behind the sum: f(t, x) = relu(x + branch(x)) - x.

    Its Euler step with h = 1 is the block relu(x + branch(x)) of arXiv 1512.03385, bit for bit where x >= 0, as it is behind
    a ReLU. Every other solver, and every other h, integrates the same field and keeps x >= 0 where Euler's h is at most 1.

    >>> import torch
    >>> block = PostActivation(torch.nn.Linear(3, 3))
    >>> x = torch.rand(2, 3)
    >>> torch.equal(x + block(0.0, x), torch.relu(x + block.branch(x)))
    True
    """

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, t: Time, x: State) -> State:
        return torch.relu(x + self.branch(x)) - x


class Scaled(Field):
    """The field s f(t, x): what a residual scaling s, such as Inception-ResNet's (arXiv 1602.07261), does to a layer."""

    def __init__(self, field: Field, scale: float) -> None:
        super().__init__()
        if isinstance(field, Momentum):
            raise TypeError("a Momentum field is scaled inside: write Momentum(Scaled(field, s)), not the reverse")
        self.field = field
        self.scale = scale
        self.knots = field.knots

    def forward(self, t: Time, x: State) -> State:
        return self.scale * self.field(t, x)

    def scaled(self, scale: float) -> "Field":
        return self.field.scaled(self.scale * scale)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


class Momentum(Field):
    """A layer of the equation (1 + k) x' = f(t, x), with one scalar k, learnt or constant.

    -k is a momentum and 1 + k a friction: under the scheme `LinearTwoStep` a step is
    x_{n+1} = (1 - k) x_n + k x_{n-1} + h f(x_n), the layer of LM-ResNet (arXiv 1710.10121); every other scheme and
    solver integrates f / (1 + k). k starts uniform in (-0.1, 0] unless it is given, and is zero-stable for -1 < k <= 1.
    `Momentum(f.scaled(1 - gamma), k=-gamma, learnt=False)` is the layer of a momentum ResNet (arXiv 2102.07870).

    Args:
        field: f.
        k: the value to start with; None draws it.
        learnt: whether k is a parameter. Otherwise it is a Python float, which no conversion rounds and no file holds.

    Raises:
        ValueError: k = -1, where there is no first-order equation: that is `SecondOrder`; or a constant k that is not given.
    """

    k: nn.Parameter | float

    def __init__(self, field: Field, k: float | None = None, learnt: bool = True) -> None:
        super().__init__()
        self.field = field
        self.knots = field.knots
        if k == -1:
            raise ValueError("k = -1 makes (1 + k) x' = f an equation without x': the second-order one is SecondOrder(field)")
        if learnt:
            self.k = nn.Parameter(-0.1 * torch.rand(()) if k is None else torch.tensor(float(k)))
        elif k is None:
            raise ValueError("a k that is not learnt has to be given: Momentum(field, k=-0.9, learnt=False)")
        else:
            self.k = float(k)

    def forward(self, t: Time, x: State) -> State:
        return self.field(t, x) / (1 + self.k)

    def scaled(self, scale: float) -> "Field":
        return self.around(self.field.scaled(scale))

    def around(self, field: Field) -> "Momentum":
        """Return the layer with the same k around another field."""
        layer = Momentum(field, k=0.0, learnt=isinstance(self.k, nn.Parameter))
        layer.k, layer.training = self.k, self.training
        return layer

    def extra_repr(self) -> str:
        return "" if isinstance(self.k, nn.Parameter) else f"k={self.k}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if not isinstance(self.k, nn.Parameter):  # files once held a constant k too, rounded to float32
            state_dict.pop(f"{prefix}k", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def check_part(part: Field, whole: str) -> None:
    """Raise TypeError if `part` cannot be a part of the field `whole`: it must be a field, and smooth in depth."""
    if not isinstance(part, Field):
        raise TypeError(f"{whole} is made of Fields, not of a {type(part).__name__}: wrap a module as Autonomous(module)")
    if part.knots:
        raise TypeError(f"{whole} is made of fields that are smooth in depth; this {type(part).__name__} jumps at {part.knots}")


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
