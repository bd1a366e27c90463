"""Initial-value problems with known solutions, and fields that watch what a solver does."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from continuum import Autonomous, Field, PiecewiseConstant, SecondOrder

FLOAT64 = torch.float64


class Function(Field):
    """A field given as a function of (t, x)."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, t, x):
        return self.function(t, x)


class Watched(Field):
    """Passes calls on to a field and keeps the depths, so that evaluations can be counted from outside."""

    def __init__(self, field: Field) -> None:
        super().__init__()
        self.field = field
        self.knots = field.knots
        self.depths: list[float] = []

    def forward(self, t, x):
        self.depths.append(float(t))
        return self.field(t, x)


class Negative(nn.Module):
    def forward(self, x):
        return -x


@dataclass(frozen=True)
class Problem:
    """x' = s field(t, x) from `start`, whose solution at depth t is `exact(t, s)`."""

    name: str
    field: Field
    start: Tensor
    exact: Callable[[float, float], Tensor]

    def __str__(self) -> str:
        return self.name


MATRIX = torch.tensor([[-0.3, 1.0, 0.2], [-0.8, -0.1, 0.5], [0.0, 0.3, -0.6]], dtype=FLOAT64)
STARTS = torch.tensor([[1.0, 0.5, -0.3], [0.2, -1.0, 0.8]], dtype=FLOAT64)
SHARES = torch.tensor([[0.1, 0.3], [0.5, 0.8], [1.5, 0.2]], dtype=FLOAT64)
ANGLE_STARTS = torch.tensor([[1.0, 0.0], [0.3, -0.7]], dtype=FLOAT64)


def _rotated(t: float, s: float) -> Tensor:
    # q' = s v, v' = -s q: the same circle, s times as fast.
    angle = torch.tensor(s * t, dtype=FLOAT64)
    q, v = ANGLE_STARTS[:, :1], ANGLE_STARTS[:, 1:]
    return torch.cat([q * angle.cos() + v * angle.sin(), v * angle.cos() - q * angle.sin()], dim=1)


def _cosine(t, x):
    return torch.as_tensor(t, dtype=FLOAT64).cos() * x


def _grown(t: float, s: float) -> Tensor:
    growth = torch.tensor(s * t, dtype=FLOAT64).exp()
    return SHARES * growth / (1 + SHARES * (growth - 1))


LINEAR = Problem(
    "linear", Function(lambda t, x: x @ MATRIX.T), STARTS, lambda t, s: STARTS @ torch.linalg.matrix_exp(s * t * MATRIX).T
)
LOGISTIC = Problem("logistic", Function(lambda t, x: x * (1 - x)), SHARES, _grown)
OSCILLATOR = Problem("oscillator", SecondOrder(Autonomous(Negative())), ANGLE_STARTS, _rotated)
SEASONAL = Problem(
    "seasonal", Function(_cosine), SHARES, lambda t, s: SHARES * (s * torch.tensor(t, dtype=FLOAT64).sin()).exp()
)
PROBLEMS = [LINEAR, LOGISTIC, OSCILLATOR, SEASONAL]


def tanh_layers(count: int, features: int = 4, gain: float = 1.0, seed: int = 0) -> PiecewiseConstant:
    """Layers tanh(W x + b) with random weights in float64."""
    torch.manual_seed(seed)
    layers = [nn.Sequential(nn.Linear(features, features, dtype=FLOAT64), nn.Tanh()) for _ in range(count)]
    with torch.no_grad():
        for layer in layers:
            layer[0].weight.mul_(gain)
    return PiecewiseConstant(Autonomous(layer) for layer in layers)
