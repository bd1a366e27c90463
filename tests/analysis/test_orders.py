"""Orders of convergence on flows of all kinds, and networks of N layers on their way to the deep limit."""

import copy
import math

import pytest
import torch
from problems import states, tanh_layers
from torch import nn

from continuum import Autonomous, Field, Flow, PiecewiseConstant
from continuum.analysis import convergence
from continuum.analysis.convergence import Convergence, deep_limit, sampled, scheme_errors
from continuum.bases import Box, Chebyshev, Fourier, Hat
from continuum.fields import MLP, Coupled, Function, Momentum, ODENetBranch, Scaled, SecondOrder
from continuum.noise import StochasticDepth
from continuum.schemes import RK4, Coupling, Euler, Heun, Kutta3, Midpoint, Scheme, Verlet
from continuum.schemes.multistep import AdamsBashforth, LinearTwoStep, TwoStepMidpoint
from continuum.solvers import SolveError
from continuum.weights import Expansion


def momentum_layers(*ks: float) -> PiecewiseConstant:
    return PiecewiseConstant(Momentum(layer, k=k) for layer, k in zip(tanh_layers(len(ks)).layers, ks, strict=True))


def expansion(basis, features: int = 4, seed: int = 0) -> Expansion:
    """Layers W tanh(V x + b) + c whose weights vary as much with depth as they are large."""
    torch.manual_seed(seed)
    return Expansion([MLP(features, hidden=6).double() for _ in range(basis.size)], basis)


FINE = (4, 8, 16, 32)


CASES = [
    (tanh_layers(3), 3, Euler(), (16, 32, 64)),
    *((tanh_layers(3), 3, scheme, FINE) for scheme in (Midpoint(), Heun(), Kutta3(), AdamsBashforth(2))),
    (tanh_layers(3), 3, RK4(), (2, 4, 8)),
    (tanh_layers(1), 1, TwoStepMidpoint(), FINE),
    (momentum_layers(-0.3), 1, LinearTwoStep(), FINE),
    (momentum_layers(-0.1, -0.3, 0.2), 3, LinearTwoStep(), (32, 64, 128)),
    (momentum_layers(-0.1, -0.3, 0.2), 3, Midpoint(), FINE),
    (expansion(Chebyshev(3, depth=2.0)), 2, RK4(), (4, 8, 16)),
    (expansion(Hat(3, depth=2.0)), 2, AdamsBashforth(3), (8, 16, 32)),
    *((Coupled(*tanh_layers(2, features=2).layers), 1, scheme, FINE) for scheme in (Coupling(), Verlet())),
]


@pytest.mark.parametrize(("field", "depth", "scheme", "per_layer"), CASES)
def test_every_scheme_falls_with_its_order(field: Field, depth: int, scheme: Scheme, per_layer: tuple[int, ...]) -> None:
    found = scheme_errors(Flow(field, "dopri5", depth), states(3, 4), scheme, per_layer)
    assert (found.name, found.steps, found.expected) == (str(scheme), per_layer, scheme.order)
    assert found.order == pytest.approx(scheme.order, abs=0.2)


@torch.no_grad()
def test_errors_are_those_of_a_plain_loop() -> None:
    """Euler's steps of 1/m on (1 + k) x' = f, layer by layer, against RK4's of 1/200."""
    field, x = momentum_layers(-0.3, 0.2), states(3, 4)

    def loop(m: int, step) -> torch.Tensor:
        y = x
        for layer in field.layers:
            for _ in range(m):
                y = step(lambda z, layer=layer: layer.field(0.0, z) / (1 + layer.k.double()), y, 1 / m)
        return y

    def rk4(f, y, h):
        a = f(y)
        b = f(y + h / 2 * a)
        c = f(y + h / 2 * b)
        return y + h / 6 * (a + 2 * b + 2 * c + f(y + h * c))

    exact = loop(200, rk4)
    expected = [float((loop(m, lambda f, y, h: y + h * f(y)) - exact).norm() / exact.norm()) for m in (1, 2, 8)]
    found = scheme_errors(Flow(field, "linear_two_step", 2), x, Euler(), (1, 2, 8))
    assert found.errors == pytest.approx(expected, rel=1e-8)


def test_a_flow_stays_as_it_is() -> None:
    """float32, training mode and half-frozen; its errors are those of evaluation mode in float64."""
    torch.manual_seed(0)
    flow = Flow(Autonomous(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.5))), "euler", 1)
    flow.field.module[0].eval()
    before = copy.deepcopy(flow.state_dict())
    found = scheme_errors(flow, states(3, 4).float(), RK4(), (2, 4))
    assert found == scheme_errors(copy.deepcopy(flow).double().eval(), states(3, 4).float().double(), RK4(), (2, 4))
    assert found.errors[-1] < 1e-6  # of float64, and without dropout
    torch.testing.assert_close(dict(flow.state_dict()), dict(before), rtol=0, atol=0)
    assert [module.training for module in flow.field.module] == [False, True, True, True]
    assert flow.cost is None


def test_noise_is_left_out() -> None:
    (layer,) = tanh_layers(1).layers
    noisy = Flow(StochasticDepth(layer, 0.5), "euler_maruyama", 1)
    assert scheme_errors(noisy, states(3, 4), Midpoint(), (2, 4)).errors == pytest.approx(
        scheme_errors(Flow(layer.scaled(0.5), "euler", 1), states(3, 4), Midpoint(), (2, 4)).errors, rel=1e-9
    )


def test_kinks_hold_the_order_down_and_loosen_the_reference() -> None:
    torch.manual_seed(0)
    flow = Flow(ODENetBranch(4), "rk4", 1)
    found = scheme_errors(flow, torch.randn(2, 4, 5, 5), RK4(), (2, 4, 8, 16))
    assert found.floor > Convergence("", (), (), 1).floor
    assert 1 < found.order < 3


def test_only_errors_above_the_floor_count() -> None:
    assert Convergence("", (1, 2, 4, 8), (1e-2, 1e-4, 1e-6, 3e-10), 4, floor=1e-9).order == pytest.approx(math.log2(100))
    assert math.isnan(Convergence("", (1, 2), (1e-2, 1e-12), 4).order)
    still = Flow(Function(lambda t, x: 0 * x), "euler", 1)
    assert scheme_errors(still, states(3, 4), Euler()).errors == (0,) * 5


FLOW, WRONG = Flow(tanh_layers(2), "euler", 2), ((0, 1), (2.0,), (True, 2))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        *((lambda m=m: scheme_errors(FLOW, states(3, 4), Euler(), m), ValueError, "positive integers") for m in WRONG),
        (lambda: scheme_errors(FLOW, states(3, 4), LinearTwoStep()), TypeError, "Momentum"),
        (lambda: deep_limit(FLOW.field, states(3, 4)), TypeError, "project"),
        (lambda: sampled(FLOW.field, 4), TypeError, "project"),
        (lambda: sampled(expansion(Hat(2)), 0), ValueError, "layers"),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_reference_has_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "EVALUATIONS", 10)
    with pytest.raises(SolveError, match="budget"):
        scheme_errors(FLOW, states(3, 4), Euler())


# The deep limit
@pytest.mark.parametrize(
    "basis", [Chebyshev(4, depth=3.0), Fourier(5, depth=3.0), Hat(4, depth=3.0), Hat(3, depth=0.5)], ids=str
)
def test_networks_of_more_layers_approach_their_limit_with_order_one(basis) -> None:
    found = deep_limit(expansion(basis), states(3, 4))
    assert found.steps == (8, 16, 32, 64, 128)
    assert found.expected == 1
    assert found.order == pytest.approx(1, abs=0.1)


def test_layers_are_samples_of_the_weights() -> None:
    """x+ = x + (T / N) f(i T / N, x; theta(i T / N)), depth and all, written out."""
    field, x, count = expansion(Fourier(3, depth=2.0)), states(3, 4), 5
    network = sampled(field, count)
    y = x
    for i in range(count):
        t = 2 * i / count
        waves = (1.0, math.cos(math.pi * t), math.sin(math.pi * t))
        theta = {name: sum(w * p[k] for k, w in enumerate(waves)) for name, p in field.field.named_parameters()}
        seen = torch.cat([torch.full_like(y[:, :1], t), y], dim=1)
        inner = torch.tanh(seen @ theta["inner.weight"].T + theta["inner.bias"])
        y = y + 2 / count * (inner @ theta["outer.weight"].T + theta["outer.bias"])
    assert torch.allclose(Flow(network, "euler", count)(x), y, rtol=0, atol=1e-13)
    owned = {p.data_ptr() for p in network.parameters()}
    assert len(owned) == 4 * count
    assert owned.isdisjoint(p.data_ptr() for p in field.parameters())
    assert all(p.requires_grad and p.grad_fn is None for p in network.parameters())


def test_samples_with_batch_statistics_and_tied_weights() -> None:
    linear, tied = nn.Linear(4, 4), nn.Linear(4, 4)
    tied.weight = linear.weight
    field = Expansion(Autonomous(nn.Sequential(linear, nn.BatchNorm1d(4), tied)).double(), Hat(3, depth=2.0))
    with torch.no_grad():
        for tensor in (*field.parameters(), field.field.module[1].running_mean, field.field.module[1].running_var):
            tensor.copy_(1 + torch.rand_like(tensor))
    x = states(3, 4)
    for mode in (True, False):
        field.train(mode)
        network = sampled(copy.deepcopy(field), 4)
        assert network.training == mode
        for i, layer in enumerate(network.layers):
            assert torch.allclose(layer(0.0, x), 0.5 * copy.deepcopy(field)(i / 2, x), rtol=0, atol=1e-12)
            module = layer.field.module
            assert module[0].weight is module[2].weight
            assert module[1].num_batches_tracked.dtype == torch.long


def test_a_field_held_at_a_depth_can_be_stepped_by_the_same_schemes() -> None:
    x = states(3, 4)
    f, g = expansion(Chebyshev(2), features=4), expansion(Chebyshev(2), features=2, seed=1)
    layer = PiecewiseConstant([Momentum(f, k=0.1)])
    for field in (Momentum(f, k=-0.3), SecondOrder(g), Coupled(g, g), Scaled(f, 0.5), f, layer):
        field.train()
        autonomous = field.held(0.3)
        assert isinstance(autonomous, Momentum if field is layer else Field if field is f else type(field))
        assert autonomous.training
        for t in (0.0, 0.9):
            assert torch.allclose(autonomous(t, x), field(0.3, x), rtol=0, atol=1e-13)
    mixed = Function(lambda t, x: t * x)
    mixed.part = nn.Linear(1, 1).eval()
    assert mixed.held(0.5)(9.0, x).equal(0.5 * x)
    assert not mixed.part.training


def test_a_jump_in_the_weights_is_read_from_the_right() -> None:
    field = expansion(Box(2, depth=2.0))
    second = {name: p[1] for name, p in field.field.named_parameters()}
    assert all(torch.equal(p, second[name.removeprefix("field.")]) for name, p in field.held(1.0).named_parameters())
