"""Weak and strong convergence: closed forms, sampled errors beside independent computations, and reports on networks."""

import copy
import csv
import json
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import FLOAT64, Negative, states
from runs import same_state
from torch import Tensor

import continuum
from continuum import Autonomous, FixedStep, Flow, Momentum, PiecewiseConstant, zoo
from continuum.analysis.convergence import order
from continuum.analysis.plots import plot_weak
from continuum.analysis.stochastic import limit_moment, linear_moment, strong_errors, weak_errors
from continuum.analysis.weak import weak_report
from continuum.cli import main
from continuum.fields import Function
from continuum.noise import Bernoulli, Dropout, Gaussian, Law, ShakeShake, StochasticDepth, StochasticField
from continuum.schemes import EulerMaruyama, Milstein, StochasticTwoStep
from continuum.zoo import BUILDERS

OWN, BROWNIAN = EulerMaruyama("own"), EulerMaruyama("brownian")
UNUSED = Autonomous(Negative())
SIZES = (8, 16, 32, 64, 128)


# Closed forms
def depth(p: float) -> tuple[StochasticField, Sequence[float]]:
    return StochasticDepth(UNUSED, p), [1.0]


SHAKE = ShakeShake(UNUSED, UNUSED), [1.0, -1.0]


@pytest.mark.parametrize(
    ("case", "q", "exact", "errors"),
    [
        (depth(0.5), 1, "1.64872", "2.455e-2 1.257e-2 6.362e-3 3.200e-3 1.605e-3"),
        (depth(0.5), 2, "3.49034", "2.084e-1 1.097e-1 5.636e-2 2.857e-2 1.438e-2"),
        (depth(0.5), 3, "9.48774", "1.377 7.542e-1 3.960e-1 2.031e-1 1.029e-1"),
        (depth(0.8), 1, "2.22554", "8.195e-2 4.267e-2 2.178e-2 1.101e-2 5.534e-3"),
        (depth(0.8), 2, "5.81244", "5.735e-1 3.069e-1 1.590e-1 8.100e-2 4.088e-2"),
        (depth(0.8), 3, "17.81427", "3.656 2.151 1.228 6.957e-1 3.979e-1"),
        (SHAKE, 2, "1.395612", "9.399e-3 4.771e-3 2.404e-3 1.207e-3 6.046e-4"),
        (SHAKE, 3, "2.718282", "1.525e-1 8.035e-2 4.129e-2 2.094e-2 1.054e-2"),
        (SHAKE, 4, "7.389056", "1.308 7.323e-1 3.893e-1 2.010e-1 1.022e-1"),
    ],
)
def test_moments_of_stochastic_depth_and_shake_shake(case, q: int, exact: str, errors: str) -> None:
    field, rates = case
    limit = limit_moment(field, rates, q)
    assert f"{limit:.{len(exact.partition('.')[2])}f}" == exact
    for steps, printed in zip(SIZES, errors.split(), strict=True):
        digits = len(printed.partition("e")[0].replace(".", ""))
        error = limit - linear_moment(field, OWN, rates, steps, q)
        assert f"{error:.{digits - 1}e}" == f"{float(printed):.{digits - 1}e}"


def test_the_third_moment_takes_half_an_order_unless_p_nears_one_half() -> None:
    def local(field: Callable[[int], StochasticField], steps: int) -> float:
        one, two = (limit_moment(field(n), [1.0], 3) - linear_moment(field(n), OWN, [1.0], n, 3) for n in (steps // 2, steps))
        return math.log2(one / two)

    fixed = StochasticDepth(UNUSED, 0.8)
    assert 0.55 < local(lambda n: fixed, 2**13) < 0.61
    assert 0.5 < local(lambda n: fixed, 2**16) < 0.55
    assert f"{local(lambda n: StochasticDepth(UNUSED, (1 - 0.5 / math.sqrt(n)) / 2), 512):.2f}" == "0.96"
    # Brownian increments have no third moment: order 1 for every p.
    for scheme in (BROWNIAN, Milstein()):
        errors = [limit_moment(fixed, [1.0], 3) - linear_moment(fixed, scheme, [1.0], n, 3) for n in (2**12, 2**13)]
        assert order((2**12, 2**13), errors) == pytest.approx(1, abs=0.01)


def test_errors_of_many_steps_have_digits() -> None:
    """In exact rational arithmetic where the step is rational, N = 2^16 and h = 2^-16."""
    field, n = StochasticDepth(UNUSED, 0.5), 2**16
    root = Fraction(1, 2**8)
    growth = sum((1 + root**2 / 2 + sign * root / 2) ** 3 for sign in (1, -1)) / 2 - 1
    exact = n * (float(growth) - float(growth**2) / 2 + float(growth**3) / 3)
    error = limit_moment(field, [1.0], 3) * -math.expm1(exact - (1.5 + 0.75))
    assert limit_moment(field, [1.0], 3) - linear_moment(field, OWN, [1.0], n, 3) == pytest.approx(error, rel=1e-5)


def test_scaling_the_whole_branch_loses_the_noise() -> None:
    class Whole(StochasticDepth):
        def stepped(self, t, h, published):
            return [h * c for c in published]

    field = Whole(UNUSED, 0.8)
    found = [linear_moment(field, OWN, [1.0], n, 2) - linear_moment(field, OWN, [1.0], n, 1) ** 2 for n in (8, 32, 128, 512)]
    assert [f"{variance:.3g}" for variance in found] == ["0.0765", "0.0232", "0.00609", "0.00154"]
    assert linear_moment(field, OWN, [1.0], 2**14, 1) == pytest.approx(math.exp(0.8), rel=1e-4)


def test_linear_moments_of_brownian_steps_are_those_of_normals() -> None:
    """E (a + b Z)^m by the moments (k - 1)!! of Z, for one and for two branches; and sampled paths."""
    p, rate, n = 0.7, -0.6, 8
    for field, rates, mu, s in (
        (StochasticDepth(UNUSED, p), [rate], p * rate, math.sqrt(p * (1 - p)) * abs(rate)),
        (Gaussian(UNUSED, 0.5, "multiplicative"), [rate, 1.0], rate, 0.5),
    ):
        for m in (1, 2, 3, 4):
            for steps in (n, 1):  # a single step: 1 + h mu may be anything
                a, b = 1 + mu / steps, s / math.sqrt(steps)
                step = sum(math.comb(m, k) * a ** (m - k) * b**k * math.prod(range(k - 1, 0, -2)) for k in range(0, m + 1, 2))
                assert linear_moment(field, BROWNIAN, rates, steps, m) == pytest.approx(step**steps, rel=1e-12)
    linear = Function(lambda t, x: rate * x)
    torch.manual_seed(0)
    flow = Flow(StochasticDepth(linear, p, per="image"), FixedStep(BROWNIAN, h=1 / n), depth=1)
    ends = flow(torch.ones(200_000, 1, dtype=FLOAT64))
    for m in (1, 2, 3, 4):
        expected = linear_moment(StochasticDepth(UNUSED, p), BROWNIAN, [rate], n, m)
        assert abs(float((ends**m).mean()) - expected) < 3 * float((ends**m).std()) / math.sqrt(len(ends))


# Sampled paths
GRID = np.linspace(-12, 12, 1201)
NORMAL = np.polynomial.hermite_e.hermegauss(24)
Moves = Sequence[tuple[Callable[[np.ndarray], np.ndarray], float]]
"""What a step may add to x, and with which probability."""


def averaged(moves: Moves) -> np.ndarray:
    """The matrix that takes u(x) on the grid to E u(x + move), by cubic interpolation between its points."""
    matrix, rows = np.zeros((len(GRID), len(GRID))), np.arange(len(GRID))
    for move, weight in moves:
        place = np.clip((GRID + move(GRID) + 12) / 0.02, 1, len(GRID) - 3)
        i = np.floor(place).astype(int)
        s = place - i
        outer, inner = s * (s - 1) / 6, (s + 1) * (s - 2) / 2
        for k, value in enumerate((-outer * (s - 2), inner * (s - 1), -inner * s, outer * (s + 1))):
            matrix[rows, i + k - 1] += weight * value
    return matrix


def expected(matrix: np.ndarray, steps: int, values: np.ndarray) -> np.ndarray:
    for _ in range(steps):
        values = matrix @ values
    return values


def at(values: np.ndarray, x: float) -> float:
    return float(values[round((x + 12) / 0.02)])


def euler_maruyama(h: float, drift: Callable, diffusion: Callable) -> np.ndarray:
    z, w = NORMAL
    w = w / w.sum()
    return averaged([(lambda x, z=z: h * drift(x) + math.sqrt(h) * z * diffusion(x), w) for z, w in zip(z, w, strict=True)])


def bernoulli(h: float, p: float, f: Callable, divisor: float = 1.0) -> np.ndarray:
    root, f = math.sqrt(h), (lambda x, f=f: f(x) / divisor)
    return averaged([(lambda x: (h * p + root * (1 - p)) * f(x), p), (lambda x: (h * p - root * p) * f(x), 1 - p)])


def uniform(h: float, one: Callable, other: Callable) -> np.ndarray:
    nodes, weights = np.polynomial.legendre.leggauss(20)

    def move(x: np.ndarray, e: float) -> np.ndarray:
        return h * (one(x) + other(x)) / 2 + math.sqrt(h) * e / 2 * (one(x) - other(x))

    return averaged([(partial(move, e=e), w / 2) for e, w in zip(nodes, weights, strict=True)])


def slope(x):
    return np.tanh(x + 0.5)


TANH, SINE = Function(lambda t, x: torch.tanh(x + 0.5)), Function(lambda t, x: -torch.sin(x))
TESTS: dict[str, tuple[Callable, Callable]] = {  # on tensors and on arrays
    "x": (lambda x: x[:, 0], lambda x: x),
    "cube": (lambda x: x[:, 0] ** 3, lambda x: x**3),
    "bump": (lambda x: torch.exp(-(x[:, 0] ** 2)), lambda x: np.exp(-(x**2))),
}
FIELDS = {
    "stochastic depth": StochasticDepth(TANH, 0.5),
    "shake-shake": ShakeShake(TANH, SINE, backward_mode="shake"),
    "gaussian": Gaussian(TANH, 0.6, "multiplicative"),
    "dropout": Dropout(TANH, 0.4),
}
STEPS = {
    "stochastic depth": lambda h: bernoulli(h, 0.5, slope),
    "shake-shake": lambda h: uniform(h, slope, lambda x: -np.sin(x)),
    "gaussian": lambda h: euler_maruyama(h, slope, lambda x: 0.6 * x),
    "dropout": lambda h: bernoulli(h, 0.6, slope, divisor=0.6),
}
LIMITS = {  # drift and diffusion
    "stochastic depth": (lambda x: 0.5 * slope(x), lambda x: 0.5 * slope(x)),
    "shake-shake": (lambda x: (slope(x) - np.sin(x)) / 2, lambda x: (slope(x) + np.sin(x)) / math.sqrt(12)),
    "gaussian": (slope, lambda x: 0.6 * x),
    "dropout": (slope, lambda x: math.sqrt(0.4 / 0.6) * slope(x)),
}
START = torch.tensor([[0.4]], dtype=FLOAT64)


@pytest.mark.parametrize("name", FIELDS)
def test_sampled_weak_errors_beside_expectations_by_quadrature(name: str) -> None:
    field, own, (drift, diffusion) = FIELDS[name], STEPS[name], LIMITS[name]
    steps, fine = (1, 2, 4, 8), 128
    tests = {key: on_tensors for key, (on_tensors, _) in TESTS.items()}
    found = weak_errors(field, OWN, START, 1.0, steps, tests, paths=40_000, reference_steps=fine, seed=1)
    assert [(row.test, row.steps) for row in found] == [(key, n) for key in TESTS for n in steps]
    reference, coarse = euler_maruyama(1 / fine, drift, diffusion), {n: own(1 / n) for n in steps}
    sampled = {key: [row.error for row in found if row.test == key] for key in TESTS}
    exact: dict[str, list[float]] = {}
    for key, (_, g) in TESTS.items():
        limit = at(expected(reference, fine, g(GRID)), 0.4)
        exact[key] = [at(expected(coarse[n], n, g(GRID)), 0.4) - limit for n in steps]
    for row, error in zip(found, [error for key in TESTS for error in exact[key]], strict=True):
        assert abs(row.error - error) < 3 / 1.96 * row.confidence, row
        assert row.confidence < 0.05 * (1 + abs(error))
    # The mean of x: order 1 for every law, seen through the noise of the sample.
    assert order(steps, exact["x"]) == pytest.approx(1, abs=0.25)
    assert order(steps, sampled["x"]) == pytest.approx(1, abs=0.35)


def test_a_common_normal_reduces_the_variance() -> None:
    field, g = StochasticDepth(TANH, 0.5), {"x": lambda x: x[:, 0]}
    (row,) = weak_errors(field, OWN, START, 1.0, [16], g, paths=5000, reference_steps=64, seed=0)
    torch.manual_seed(0)
    ends = [
        Flow(StochasticDepth(TANH, 0.5, per="image"), FixedStep(s, h=1 / 16), 1)(START.expand(5000, 1)) for s in (OWN, BROWNIAN)
    ]
    apart = 1.96 * float((ends[0] - ends[1]).std()) / math.sqrt(5000)
    assert row.confidence < 0.6 * apart


def test_layers_of_several_kinds_in_one_flow() -> None:
    """Noise of an image, of an entry, under Momentum, and none: an exact sum over the outcomes beside the sampled error."""
    layers = [StochasticDepth(TANH, 0.5), Momentum(StochasticDepth(SINE, 0.7), k=-0.3).double(), Dropout(TANH, 0.3), SINE]
    fine, h = 32, 1 / 32
    tests = {"square": lambda x: x[:, 0] ** 2}
    (row,) = weak_errors(PiecewiseConstant(layers), OWN, START, 4.0, [4], tests, paths=40_000, reference_steps=4 * fine, seed=2)
    one = 0.0
    for a, b, c in product((0, 1), repeat=3):
        x = 0.4
        x += a * math.tanh(x + 0.5)
        x += b * -math.sin(x) / 0.7
        x += c / 0.7 * math.tanh(x + 0.5)
        x -= math.sin(x)
        one += 0.5 * (0.7 if b else 0.3) * (0.7 if c else 0.3) * x**2
    spread = math.sqrt(0.7 * 0.3)
    pieces = (
        (lambda x: 0.5 * slope(x), lambda x: 0.5 * slope(x)),
        (lambda x: -np.sin(x), lambda x: -spread * np.sin(x) / 0.7),
        (slope, lambda x: spread / 0.7 * slope(x)),
        (lambda x: -np.sin(x), lambda x: 0 * x),
    )
    values = GRID**2
    for drift, diffusion in reversed(pieces):
        values = expected(euler_maruyama(h, drift, diffusion), fine, values)
    assert abs(row.error - (one - at(values, 0.4))) < 3 / 1.96 * row.confidence
    assert row.confidence < 0.05


def test_dropout_of_two_entries_beside_all_its_outcomes() -> None:
    """Entries that see each other, with independent masks: sixteen outcomes of two steps, and a plain loop for the SDE."""
    weight = torch.tensor([[0.8, -0.5], [0.6, 0.3]], dtype=FLOAT64)
    start = torch.tensor([[0.5, -0.8]], dtype=FLOAT64)

    def f(x: Tensor) -> Tensor:
        return torch.tanh(x @ weight.T)

    def g(x: Tensor) -> Tensor:
        return x[:, 0] * x[:, 1] ** 2

    (row,) = weak_errors(Dropout(Function(lambda t, x: f(x)), 0.5), OWN, start, 1.0, [2], {"g": g}, 40_000, 32, seed=3)
    h = 1 / 2
    own = 0.0
    for masks in product((0.0, 1.0), repeat=4):
        x = start
        for mask in (masks[:2], masks[2:]):
            x = x + (h + math.sqrt(h) * (torch.tensor([mask], dtype=FLOAT64) / 0.5 - 1)) * f(x)
        own += float(g(x)) / 16
    torch.manual_seed(0)
    x = start.expand(40_000, 2)
    for _ in range(32):
        slopes = f(x)
        x = x + slopes / 32 + slopes * torch.randn_like(x) / math.sqrt(32)
    sde, half = float(g(x).mean()), 1.96 * float(g(x).std()) / math.sqrt(len(x))
    assert abs(row.error - (own - sde)) < 3 / 1.96 * math.hypot(row.confidence, half)


MATRIX = torch.tensor([[-0.4, 1.2, 0.1], [-0.7, 0.2, 0.5], [0.3, 0.0, -0.8]], dtype=FLOAT64)
FAST, TURNED = Function(lambda t, x: torch.sin(2 * x)), Function(lambda t, x: -1.5 * x.flip(1))
STRONG = {
    "scalar": (StochasticDepth(Function(lambda t, x: x), 0.5), [1.0]),
    "matrix": (StochasticDepth(Function(lambda t, x: x @ (1.5 * MATRIX).T), 0.5), [1.0, -0.5, 0.7]),
    "shake-shake": (ShakeShake(FAST, TURNED, backward_mode="keep"), [1.0, -0.5]),
}
STRONG = {name: (field, torch.tensor([start], dtype=FLOAT64)) for name, (field, start) in STRONG.items()}


@pytest.mark.parametrize("name", STRONG)
def test_strong_orders(name: str) -> None:
    field, start = STRONG[name]
    steps = (8, 16, 32, 64)
    for scheme, expected, fine in ((BROWNIAN, 0.5, 2048), (Milstein(), 1.0, 1024)):
        found = strong_errors(field, scheme, start, 1.0, steps, paths=1500, reference_steps=fine, seed=4)
        assert all(row.confidence < 0.15 * row.error for row in found)
        assert order(steps, [row.error for row in found]) == pytest.approx(expected, abs=0.1)


def test_strong_errors_beside_the_solution() -> None:
    """dX = A X / 2 dt + A X / 2 dB has X(1) = exp(A / 2 - A^2 / 8 + A B / 2) X(0): E |X_N - X(1)| by a plain loop."""
    field, start = STRONG["matrix"]
    matrix, n, paths = 1.5 * MATRIX, 8, 4000
    (row,) = strong_errors(field, BROWNIAN, start, 1.0, [n], paths, reference_steps=1024, seed=5)
    torch.manual_seed(6)
    increments = torch.randn(n, paths, 1, 1, dtype=FLOAT64) / math.sqrt(n)
    exponent = (matrix / 2 - matrix @ matrix / 8) + increments.sum(0) * matrix / 2
    exact = (torch.linalg.matrix_exp(exponent) @ start[0][:, None])[..., 0]
    x = start.expand(paths, 3)
    for increment in increments[..., 0]:
        x = x + x @ matrix.T / 2 / n + increment * (x @ matrix.T) / 2
    distances = (x - exact).norm(dim=1)
    half = 1.96 * float(distances.std()) / math.sqrt(paths)
    assert abs(row.error - float(distances.mean())) < 3 / 1.96 * math.hypot(row.confidence, half) + 0.03 * row.error


def test_sampling_repeats_itself_and_leaves_the_generator_alone() -> None:
    field, g = ShakeShake(TANH, SINE), {"x": lambda x: x[:, 0]}
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, two, other = (weak_errors(field, OWN, START, 1.0, [2], g, 10, 4, seed) for seed in (0, 0, 1))
    assert one == two != other
    assert torch.equal(before, torch.get_rng_state())


# Networks
def seeded(build: Callable[..., continuum.Network], **options) -> continuum.Network:
    torch.manual_seed(0)
    network = build(14, width=4, in_channels=1, **options).double().eval()
    for parameter in network.parameters():  # not so wild that a sample has no mean to speak of
        parameter.requires_grad_(False).mul_(0.7)
    return network


def pictures(count: int = 4) -> Tensor:
    return states(count, 1, 8, 8, seed=7)


def test_the_noise_of_the_layers() -> None:
    network = seeded(zoo.stochastic_lm_resnet)
    layers = weak_report(network, pictures(), paths=2, steps_per_layer=2, seed=0).layers
    assert [layer.layer for layer in layers] == [
        f"stages.{k}" for k in ("0.field.layers.0", "0.field.layers.1", "2.field.layers.0", "4.field.layers.0")
    ]
    assert [layer.noisy for layer in layers] == [False, True, True, True]
    assert layers[0].law == "no noise"
    assert layers[0].small
    for layer, p, bound in zip(layers[1:], (0.9, 0.7, 0.5), (math.sqrt(0.5), 1.0, 1.0), strict=True):
        third = (1 - 2 * p) / math.sqrt(p * (1 - p))
        assert layer.mean == pytest.approx(p)
        assert layer.moments == pytest.approx((0, 1, third, 1 / (p * (1 - p)) - 3), abs=1e-12)
        assert layer.asymmetry == pytest.approx(1 - 2 * p, abs=1e-12)
        assert layer.bound == pytest.approx(bound)
        assert layer.small == (abs(third) <= bound)
        assert not any(layer.confidence)


class Doubtful(Law):
    """Bernoulli(0.8) that keeps its moments to itself."""

    mean, deviation = 0.8, 0.4

    def quantile(self, u: Tensor) -> Tensor:
        return Bernoulli(0.8).quantile(u)


class Doubted(StochasticDepth):
    def law(self, t):
        return Doubtful()


def small_network(*layers: continuum.Field) -> continuum.Network:
    return headed(Flow(PiecewiseConstant(layers), "euler_maruyama", len(layers)))


def headed(flow: Flow) -> continuum.Network:
    torch.manual_seed(1)
    head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3, dtype=FLOAT64))
    return continuum.Network(torch.nn.Identity(), [flow], head).eval()


def test_moments_that_only_a_sample_knows() -> None:
    (layer, exact) = weak_report(small_network(Doubted(TANH, 0.8), StochasticDepth(TANH, 0.8)), pictures(), 2, 2, 0).layers
    assert all(layer.confidence)
    for found, half, expected in zip(layer.moments, layer.confidence, exact.moments, strict=True):
        assert abs(found - expected) < 3 / 1.96 * half


def test_a_law_along_one_field() -> None:
    field = StochasticDepth(TANH, lambda t: 1 - round(t) / 4)
    layers = weak_report(headed(Flow(field, "euler_maruyama", 2)), pictures(), 2, 2, 0).layers
    assert [(layer.layer, layer.depth, layer.law) for layer in layers] == [
        ("stages.0.field", 0, "no noise"),
        ("stages.0.field", 1, "Bernoulli(p=0.75)"),
    ]


@pytest.mark.parametrize("name", ["stochastic_depth_resnet", "shake_shake", "stochastic_lm_resnet", "dropout_resnet"])
def test_a_report_beside_plain_samples(name: str) -> None:
    """E g of the network, of its SDE and of its evaluation, beside `Network.sample` under other draws."""
    options = {"backward_mode": "keep"} if name == "shake_shake" else {}
    network, images, paths = seeded(BUILDERS[name], **options), pictures(), 60
    report = weak_report(network, images, paths, steps_per_layer=4, seed=0)
    gaps = {(gap.test, gap.number, gap.between): gap for gap in report.gaps}
    torch.manual_seed(3)
    one = network.sample(images, paths)
    sde = network.with_solver(FixedStep(BROWNIAN, h=1 / 4)).sample(images, paths)

    def near(value: float, samples: Tensor) -> bool:
        """Within 4.5 standard errors of the difference between two samples of this size."""
        return abs(value - float(samples.mean())) < 4.5 * math.sqrt(2 / paths) * float(samples.std())

    tests = {"logit": lambda x: x, "logit squared": lambda x: x**2, "logit cubed": lambda x: x**3}
    for test, g in (tests | {"probability": lambda x: x.softmax(-1)}).items():
        for number in range(10):
            own, evaluation = (gaps[test, number, between] for between in ("h=1", "evaluation"))
            assert near(evaluation.value, g(one)[..., number].mean(1))
            assert near(own.value, g(sde)[..., number].mean(1))
            assert own.value + own.error == pytest.approx(evaluation.value, abs=1e-12)
            expected = float(g(network(images))[:, number].mean())
            assert evaluation.value + evaluation.error == pytest.approx(expected, abs=1e-12)
    # The noise is common: the sides are closer than independent samples are.
    widths = [gaps["logit", number, "h=1/2"].confidence for number in range(10)]
    assert sum(widths) < 1.96 * math.sqrt(2 / paths) * float(one.mean(1).std(0).sum())


@pytest.mark.parametrize(
    ("build", "scheme"), [(zoo.stochastic_depth_resnet, "euler"), (zoo.stochastic_lm_resnet, "linear_two_step")]
)
def test_without_chance_a_report_is_the_difference_of_two_steps(build: Callable[..., continuum.Network], scheme: str) -> None:
    network, images = seeded(build, last=1.0), pictures()
    labels = network(images).argmax(1)
    report = weak_report(network, images, 2, 8, 0, labels)
    assert not any(layer.noisy for layer in report.layers)
    assert all(gap.confidence < 1e-12 for gap in report.gaps if gap.test != "accuracy")
    solvers = (f"{scheme}:h=1", f"{scheme}:h=0.5", "euler:h=0.125")
    one, half, fine = (network.drift().with_solver(solver)(images).mean(0) for solver in solvers)
    for gap in report.gaps:
        if gap.test == "logit":
            sides = {"h=1": one - fine, "h=1/2": half - fine, "evaluation": one - one}
            assert gap.error == pytest.approx(float(sides[gap.between][gap.number]), abs=1e-12)
    (accuracy,) = (gap for gap in report.gaps if gap.test == "accuracy" and gap.between == "h=1")
    assert accuracy.value + accuracy.error == 1
    # Even answers that agree under all paths say only so much about other images.
    never_zero = [gap.confidence for gap in report.gaps if gap.test == "accuracy"]
    assert min(never_zero) > 1.9 / (len(images) + 2)


def test_transitions_draw_the_same_on_all_sides() -> None:
    """Where only the changes of size have noise, there is nothing between the network and its SDE."""
    noisy = seeded(zoo.shake_shake)
    network = continuum.Network(noisy.stem, [s.drift() if isinstance(s, Flow) else s for s in noisy.stages], noisy.head)
    gaps = weak_report(network, pictures(), 3, 2, 0).gaps
    assert all(gap.error == 0 for gap in gaps if gap.between != "evaluation")
    assert all(gap.error != 0 and gap.confidence > 0 for gap in gaps if gap.between == "evaluation")


def test_the_weak_error_of_half_a_step_is_about_half_as_large() -> None:
    """The head is linear and so is the drift: E x_{n+1} = E x_n + h (1 - E x_n / 2)."""
    layers = [Gaussian(Function(lambda t, x: 1 - x / 2), 0.5)] * 2
    gaps = weak_report(small_network(*layers), pictures(16), paths=100, steps_per_layer=16, seed=0).largest()["logit"]
    assert abs(gaps["h=1/2"].error) > 2 * gaps["h=1/2"].confidence
    (one, half, fine) = ((1 - 1 / (2 * m)) ** (2 * m) for m in (1, 2, 16))
    assert (one - fine) / (half - fine) == pytest.approx(2.4, abs=0.1)
    assert gaps["h=1"].error / gaps["h=1/2"].error == pytest.approx(2.4, abs=0.8)


def test_a_report_leaves_all_as_it_was() -> None:
    network, images = seeded(zoo.stochastic_depth_resnet), pictures()
    network.train()
    network.head.eval()
    modes, before, state = [module.training for module in network.modules()], copy.deepcopy(network), torch.get_rng_state()
    one, two, other = (weak_report(network, images, 2, 2, seed) for seed in (0, 0, 1))
    assert one.gaps == two.gaps != other.gaps
    assert modes == [module.training for module in network.modules()]
    assert same_state(network, before)
    assert torch.equal(state, torch.get_rng_state())
    # Solvers do not matter: a report is on one step a layer.
    assert weak_report(network.with_solver("euler_maruyama:h=0.25"), images, 2, 2, 0).gaps == one.gaps


# The command
@pytest.mark.usefixtures("command_line")
def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    path = "noisy.pt"
    continuum.save(zoo.stochastic_depth_resnet(14, width=4, in_channels=1), path)
    options = ("--data", "Digits", "--images", "6", "--paths", "4", "--steps", "2", "--seed", "5", "--device", "cpu")
    main(["weak", path, *options])
    out = capsys.readouterr().out
    assert "stages.0.field.layers.1" in out
    assert "logit cubed" in out
    assert "weak/weak.png" in out
    content = json.loads(Path("weak/weak.json").read_text())
    assert [content[key] for key in ("images", "paths", "steps_per_layer", "seed")] == [6, 4, 2, 5]
    assert [layer["mean"] for layer in content["layers"]] == pytest.approx([1 - 1 / 12, 1 - 2 / 12, 1 - 4 / 12, 0.5])
    with open("weak/weak.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * (4 * 10 + 1)
    assert Path("weak/weak.png").stat().st_size > 5000
    data = continuum.training.Digits()
    data.setup("test")
    ((images, labels),) = data.test_batches(6)
    expected = weak_report(continuum.load(path), images, 4, 2, 5, labels)
    assert [float(row["error"]) for row in rows] == pytest.approx([gap.error for gap in expected.gaps], abs=1e-6)
    main(["weak", path, *options, "--out", "elsewhere"])
    assert Path("elsewhere/weak.csv").read_text() == Path("weak/weak.csv").read_text()


@pytest.mark.usefixtures("command_line")
def test_a_picture_of_layers_without_noise_and_of_zeros() -> None:
    network = small_network(StochasticDepth(TANH, 1.0), Gaussian(TANH, 0.0))
    plot_weak(weak_report(network, pictures(), 2, 2, 0), "weak.png")
    assert Path("weak.png").stat().st_size > 5000


@pytest.mark.usefixtures("command_line")
def test_what_the_command_refuses(refused: Callable[..., str]) -> None:
    continuum.save(zoo.dropout_resnet(14, width=4, in_channels=1), "noisy.pt")
    continuum.save(zoo.dropout_resnet(14, width=4, in_channels=3), "colours.pt")
    continuum.save(zoo.preresnet(14, width=4, in_channels=1), "silent.pt")
    few = ("--data", "Digits", "--images", "2", "--device", "cpu")
    for arguments, word in (
        (("silent.pt", *few), "without noise"),
        (("noisy.pt",), "--data"),
        (("noisy.pt", *few, "--steps", "3"), "even"),
        (("noisy.pt", *few, "--paths", "1"), "two or more paths"),
        (("noisy.pt", *few, "--paths", "0"), "paths"),
        (("colours.pt", *few, "--paths", "2"), "channels"),
        (("nothing.pt",), "nothing.pt"),
    ):
        assert word in refused("weak", *arguments)
    assert not Path("weak").exists()


# What is refused
def strong(field=FIELDS["dropout"], scheme=OWN, x=START, steps=(2,), paths=4):
    return strong_errors(field, scheme, x, 1.0, steps, paths, 8, 0)


def report(paths=2, steps=2, change=lambda network: network):
    return weak_report(change(seeded(zoo.dropout_resnet)), pictures(), paths, steps, 0)


HALF = StochasticDepth(TANH, 0.5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: linear_moment(HALF, StochasticTwoStep(), [1.0], 8, 2), TypeError, "StochasticTwoStep"),
        (lambda: limit_moment(StochasticDepth(UNUSED, lambda t: 1 - t / 2), [1.0], 2), ValueError, "varies with depth"),
        (lambda: order([8], [0.1]), ValueError, "two or more"),
        (lambda: order([8, 16], [0.1, 0.0]), ValueError, "other than 0"),
        (lambda: strong(steps=(2, 3)), ValueError, r"no multiple of \[3\]"),
        (lambda: strong(x=START.expand(2, 1)), ValueError, "one state"),
        (lambda: strong(paths=1), ValueError, "two or more paths"),
        (lambda: strong(scheme=Milstein()), TypeError, "Milstein"),
        (lambda: strong(field=TANH), TypeError, "no noise"),
        (lambda: report(change=continuum.Network.drift), TypeError, "no noise"),
        *((lambda given=given: report(*given), ValueError, "even number") for given in ((1, 2), (2, 3), (2, 0))),
        (lambda: weak_report(headed(Flow(HALF, "euler_maruyama:h=0.5", 0.5)), pictures(), 2, 2, 0), ValueError, r"0\.5"),
    ],
)
def test_what_moments_samples_and_reports_refuse(make, error, message):
    with pytest.raises(error, match=message):
        make()
