"""Initial-value problems with known solutions, and fields that watch what a solver does."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from continuum import RK4, Euler, EulerMaruyama
from continuum.fields import MLP, Autonomous, Coupled, Field, Function, Momentum, SecondOrder
from continuum.noise import StochasticDepth
from continuum.schemes import Coupling, Heun, Milstein, NeumannSeries, Scheme, StochasticTwoStep, Verlet
from continuum.schemes.multistep import AdamsBashforth, LinearTwoStep, TwoStepMidpoint
from continuum.weights import PiecewiseConstant

FLOAT64 = torch.float64


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


def cosine(t, x: Tensor) -> Tensor:
    """cos t in the precision of x."""
    return torch.as_tensor(t, dtype=x.dtype, device=x.device).cos()


def _grown(t: float, s: float) -> Tensor:
    growth = torch.tensor(s * t, dtype=FLOAT64).exp()
    return SHARES * growth / (1 + SHARES * (growth - 1))


def _driven(t: float, s: float) -> Tensor:
    return SHARES * (s * torch.tensor(t, dtype=FLOAT64).sin()).exp()


def _moved(t: float, s: float) -> Tensor:
    return STARTS @ torch.linalg.matrix_exp(s * t * MATRIX).T


LINEAR = Problem("linear", Function(lambda t, x: x @ MATRIX.T), STARTS, _moved)
LOGISTIC = Problem("logistic", Function(lambda t, x: x * (1 - x)), SHARES, _grown)
OSCILLATOR = Problem("oscillator", SecondOrder(Autonomous(Negative())), ANGLE_STARTS, _rotated)
SEASONAL = Problem("seasonal", Function(lambda t, x: cosine(t, x) * x), SHARES, _driven)
PROBLEMS = [LINEAR, LOGISTIC, OSCILLATOR, SEASONAL]


def tanh_layers(count: int, features: int = 4, gain: float = 1.0, seed: int = 0) -> PiecewiseConstant:
    """Layers tanh(W x + b) with random weights in float64."""
    torch.manual_seed(seed)
    layers = [nn.Sequential(nn.Linear(features, features, dtype=FLOAT64), nn.Tanh()) for _ in range(count)]
    with torch.no_grad():
        for layer in layers:
            layer[0].weight.mul_(gain)
    return PiecewiseConstant(Autonomous(layer) for layer in layers)


def small_mlp(features: int = 3, hidden: int = 8, seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    return MLP(features, hidden).double()


def mlp_layers(count: int, wrap: Callable[[Field], Field] = lambda field: field) -> PiecewiseConstant:
    """Layers of MLPs of four features, each wrapped."""
    torch.manual_seed(0)
    return PiecewiseConstant(wrap(MLP(4, 5).double()) for _ in range(count))


def halves(count: int) -> PiecewiseConstant:
    torch.manual_seed(0)
    return PiecewiseConstant(Coupled(MLP(2, 5).double(), MLP(2, 5).double()) for _ in range(count))


def dropped(field: Field) -> StochasticDepth:
    return StochasticDepth(field, 0.6)


STEPPED: dict[Scheme, Callable[[int], Field]] = {
    **dict.fromkeys((Euler(), Heun(), RK4(), TwoStepMidpoint(), NeumannSeries()), mlp_layers),
    AdamsBashforth(3): lambda count: small_mlp(4, 5),
    LinearTwoStep(): lambda count: mlp_layers(count, lambda field: Momentum(field, -0.3)),
    **dict.fromkeys((Coupling(), Verlet()), halves),
    **dict.fromkeys((EulerMaruyama(), EulerMaruyama("brownian"), Milstein()), lambda count: mlp_layers(count, dropped)),
    StochasticTwoStep(): lambda count: mlp_layers(count, lambda field: Momentum(dropped(field), -0.3)),
}
"""Schemes of every kind, each with so many layers that it steps, or a field that is smooth."""


class Normed(Field):
    """tanh(W BN(x) + b)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.BatchNorm1d(3, dtype=FLOAT64), nn.Linear(3, 3, dtype=FLOAT64)

    def forward(self, t, x):
        return torch.tanh(self.linear(self.norm(x)))


def states(*shape: int, dtype: torch.dtype = FLOAT64, seed: int = 1) -> Tensor:
    """Standard normal numbers of this shape, or of (4, 3)."""
    return torch.randn(shape or (4, 3), dtype=dtype, generator=torch.Generator().manual_seed(seed))


def solved(flow, x, previous=None, precision=None, seed=3) -> dict[str, Tensor]:
    """End state, gradients of start and parameters, and buffers, after a forward and a backward pass."""
    flow.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    with torch.autocast("cpu", dtype=precision or torch.bfloat16, enabled=precision is not None):
        end = flow(x, previous)
    end.square().sum().backward()
    gradients = {name: p.grad for name, p in flow.named_parameters() if p.grad is not None}
    return {"end": end.detach(), "start": x.grad, **gradients, **dict(flow.named_buffers())}


def each(values, make: Callable, error: type[Exception], message: str) -> list[tuple]:
    """Rows of a table of what is refused, where make(value) is for the same reason."""
    return [(partial(make, value), error, message) for value in values]
