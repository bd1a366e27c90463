"""Splitting schemes: their orders, the blocks that they are with h = 1, noise by part, and what they refuse."""

import math

import pytest
import torch
from problems import FLOAT64, states
from torch import nn

from continuum import RK4, Autonomous, Euler, FixedStep, Flow, Midpoint, PiecewiseConstant
from continuum.fields import Function, Split
from continuum.noise import StochasticDepth
from continuum.schemes import Heun, LieTrotter, Strang
from continuum.solvers import parse
from continuum.solvers.text import describe

A, B, C = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=FLOAT64)
LINEAR = Split(Function(lambda t, x: x @ A), Function(lambda t, x: x @ B))
NONLINEAR = Split(
    Function(lambda t, x: torch.tanh(x @ A) * math.cos(t)),
    Function(lambda t, x: torch.sin(x @ B) + t),
    Function(lambda t, x: torch.tanh(x @ C)),
)
ORDERS = [(LieTrotter(), 1), (LieTrotter(RK4()), 1), (Strang(), 1), (Strang(Midpoint()), 2), (Strang(Heun()), 2)]
ORDERS += [(Strang(RK4()), 2)]


@pytest.mark.parametrize("field", [LINEAR, NONLINEAR], ids=["linear", "nonlinear"])
@pytest.mark.parametrize(("scheme", "order"), ORDERS, ids=str)
def test_order_on_parts_that_do_not_commute(scheme, order, field):
    x = states(2, 4)
    limit = Flow(field, "dopri8:rtol=1e-13,atol=1e-13", 1)(x)
    errors = [float((Flow(field, FixedStep(scheme, h=1 / m), 1)(x) - limit).norm()) for m in (128, 256)]
    assert scheme.order == order
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def parts(seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh()) for _ in range(2)]


LAYERS = [parts(seed) for seed in range(3)]


def flow(scheme, wrap=lambda branch: Autonomous(branch), h=1.0):
    return Flow(PiecewiseConstant(Split(*map(wrap, layer)) for layer in LAYERS), FixedStep(scheme, h=h), 3)


@pytest.mark.parametrize("m", [1, 2])
def test_lie_trotter_is_the_pre_norm_block(m):
    """With h = 1/m, both branches m times in turn, each divided by m."""
    x = states(5, 4).float()
    y = x
    for attention, mlp in LAYERS:
        for _ in range(m):
            y = y + attention(y) / m
            y = y + mlp(y) / m
    assert torch.equal(flow(LieTrotter(), h=1 / m)(x), y)


def test_strang_is_the_macaron_block():
    x = states(5, 4).float()
    y = x
    for mlp, attention in LAYERS:
        y = y + 0.5 * mlp(y)
        y = y + attention(y)
        y = y + 0.5 * mlp(y)
    assert torch.equal(flow(Strang())(x), y)


def test_every_other_scheme_takes_the_sum():
    x = states(5, 4).float()
    y = x
    for attention, mlp in LAYERS:
        y = y + (attention(y) + mlp(y))
    assert torch.equal(flow(Euler())(x), y)


@pytest.mark.parametrize("h", [1.0, 0.5])
def test_a_part_draws_for_itself(h):
    """All draws are made before the first step, in the order of the parts."""
    x, p, steps = states(50, 4).float(), 0.7, round(1 / h)
    torch.manual_seed(1)
    etas = [[torch.empty(50, 1).bernoulli_(p) for _ in range(2 * steps)] for _ in LAYERS]
    y = x
    for layer, drawn in zip(LAYERS, etas, strict=True):
        for eta, branch in zip(drawn, [*layer] * steps, strict=True):
            y = y + (h * p + math.sqrt(h) * (eta - p)) * branch(y)
    torch.manual_seed(1)
    noisy = flow(LieTrotter(), lambda branch: StochasticDepth(Autonomous(branch), p, per="image"), h).train()
    torch.testing.assert_close(noisy(x), y)
    drift = flow(LieTrotter(), lambda branch: Autonomous(nn.Sequential(branch, Times(p))), h)
    torch.testing.assert_close(noisy.eval()(x), drift(x))
    torch.testing.assert_close(noisy.train().drift()(x), drift(x))


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


def test_gradients_are_those_of_the_steps():
    """Stored and recomputed, with noise and without."""
    for wrap in (Autonomous, lambda branch: StochasticDepth(Autonomous(branch), 0.5)):
        found = []
        for gradient in ("direct", "checkpoint"):
            x = states(5, 4).float().requires_grad_()
            torch.manual_seed(0)
            solver = FixedStep(Strang(Midpoint()), h=0.5, gradient=gradient)
            field = PiecewiseConstant(Split(*map(wrap, layer)) for layer in LAYERS)
            found.append(torch.autograd.grad(Flow(field, solver, 3)(x).square().sum(), x)[0])
        assert torch.equal(*found)


@pytest.mark.parametrize("scheme", [LieTrotter(), Strang(Midpoint()), LieTrotter(RK4(), "brownian")], ids=str)
def test_text_names_them(scheme):
    solver = FixedStep(scheme, h=0.5)
    assert parse(describe(solver)) == solver


def test_what_has_no_parts_is_refused():
    with pytest.raises(TypeError, match=r"parts of a Split.*a Function has none"):
        Flow(Function(lambda t, x: x), "lie_trotter", 1)
    with pytest.raises(TypeError, match="the inner scheme of Strang is a Runge-Kutta scheme"):
        Strang(LieTrotter())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown scheme 'simpson'"):
        parse("strang:inner=simpson")
    with pytest.raises(ValueError, match="a Split has two parts or more, not 1"):
        Split(Function(lambda t, x: x))
