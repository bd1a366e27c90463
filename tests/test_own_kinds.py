"""A field, a scheme, a solver and a noise from outside the library, each in one class, run under everything inside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from problems import small_mlp, states, tanh_layers
from torch import Tensor, nn

import continuum
from continuum.analysis.compare import compare_solvers
from continuum.analysis.convergence import scheme_errors
from continuum.analysis.dynamics import flow_dynamics
from continuum.analysis.gradients import compare_gradients
from continuum.analysis.report import Sample, report
from continuum.analysis.stochastic import limit_moment, linear_moment, strong_errors
from continuum.analysis.weak import weak_report
from continuum.fields import Field
from continuum.fields.base import in_mode_of
from continuum.flow import Flow
from continuum.models import Network, builder
from continuum.models.failure import find_failure
from continuum.noise import Bernoulli, Law, StochasticDepth, StochasticField
from continuum.schemes import EulerMaruyama, Heun, Scheme
from continuum.schemes.base import combine, inside
from continuum.solvers import FixedStep, Solver, parse
from continuum.solvers.base import Cost, Solution, cut_at_knots
from continuum.verify.accuracy import scheme_orders
from continuum.verify.certificate import certify, small, some_images
from continuum.weights import PiecewiseConstant, depth_smoothness


class Damped(Field):
    """f(t, x) - rate x: a wrapper, which passes on what its inner field answers otherwise than most."""

    def __init__(self, field: Field, rate: float | nn.Parameter = 0.5) -> None:
        super().__init__()
        self.field, self.knots, self.extent = field, field.knots, field.extent
        self.rate = rate if isinstance(rate, nn.Parameter) else nn.Parameter(torch.tensor(rate))

    def forward(self, t, x: Tensor) -> Tensor:
        return self.field(t, x) - self.rate * x

    def drift(self) -> Field:
        return in_mode_of(self, Damped(self.field.drift(), self.rate))


@dataclass(frozen=True)
class Extrapolated(Scheme):
    """x+ = 2 (two Euler steps of h/2) - (one of h)."""

    order = 2
    stages = 2

    def step(self, field: Field, t: float, x: Tensor, h: float, memory: tuple) -> tuple[Tensor, tuple]:
        first = field(inside(field.knots, t, h, 0, x.dtype), x)
        half = combine(x, h / 2, (1,), (first,))
        second = field(inside(field.knots, t, h, 1 / 2, x.dtype), half)
        return 2 * combine(half, h / 2, (1,), (second,)) - combine(x, h, (1,), (first,)), ()


@dataclass(frozen=True)
class Pieces(Solver):
    """So many steps of Heun's method from each knot to the next."""

    count: int = 8

    def __call__(
        self, field: Field, x: Tensor, times: Sequence[float], previous: Tensor | None = None, exact: bool = False
    ) -> Solution:
        states, grid = [x], [times[0]]
        for leg in pairwise(times):
            for start, stop in pairwise(cut_at_knots(field.knots, *leg)):
                h = (stop - start) / self.count
                for i in range(self.count):
                    x, _ = Heun().step(field, start + i * h, x, h, ())
                    grid.append(start + (i + 1) * h)
            states.append(x)
        return Solution(states, Cost(2 * len(grid) - 2, len(grid) - 1, 0, tuple(grid)))

    def refined(self, k: int) -> Solver:
        return replace(self, count=k * self.count)


class Flipped(StochasticField):
    """x + (2 eta - 1) f(x), eta from Bernoulli(3/4) for each image."""

    def __init__(self, field: Field) -> None:
        super().__init__()
        self.field, self.knots = field, field.knots

    def branches(self, t, x: Tensor) -> Sequence[Callable[[], Tensor]]:
        return (lambda: self.field(t, x),)

    def law(self, t) -> Law:
        return Bernoulli(0.75)

    def coefficients(self, t, eta: Tensor | float) -> Sequence[Tensor | float]:
        return (2 * eta - 1,)


def plain(seed: int = 0) -> Field:
    return small_mlp(4, 5, seed)


def damped_layers() -> PiecewiseConstant:
    return PiecewiseConstant(Damped(plain(k)) for k in range(3)).double()


def autonomous_layers() -> PiecewiseConstant:
    return tanh_layers(3).mapped(Damped).double()


def around_layers() -> Field:
    return Damped(PiecewiseConstant(plain(k) for k in range(3))).double()


def noisy_layers() -> PiecewiseConstant:
    return damped_layers().mapped(Flipped)


def start(batch: int = 3) -> Tensor:
    return states(batch, 4)


FINE = "dopri8:rtol=1e-9,atol=1e-9"
OWN: list[Solver | str] = [FixedStep(Extrapolated(), h=1 / 16), Pieces(16)]
DOPRI5 = "dopri5:rtol=1e-6,atol=1e-6"
SOLVERS = [*OWN, "rk4:h=0.25", "adams_bashforth:order=3,h=0.03125", "rk4:h=0.25,gradient=checkpoint", DOPRI5]
SOLVERS += [f"{DOPRI5},gradient={gradient}" for gradient in ("checkpoint", "adjoint")]
FIELDS = [damped_layers, around_layers]


def gradient(flow: Flow, x: Tensor) -> Tensor:
    flow.zero_grad()
    flow(x).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None])


# Solving
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("build", FIELDS)
def test_every_solver_agrees_on_the_end_and_on_the_gradient(build: Callable[[], Field], solver: Solver | str) -> None:
    x, exact = start(), Flow(build(), FINE, 3)
    flow = exact.with_solver(solver)
    assert torch.allclose(flow(x), exact(x), rtol=1e-3, atol=1e-4)
    assert torch.allclose(gradient(flow, x), gradient(exact, x), rtol=1e-2, atol=1e-3)
    times = [0.0, 1.0, 3.0]
    assert torch.allclose(flow.trajectory(x, times), exact.trajectory(x, times), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("build", [autonomous_layers, around_layers])
@pytest.mark.parametrize("solver", OWN, ids=str)
def test_refining_keeps_the_solution(build: Callable[[], Field], solver: Solver) -> None:
    flow = Flow(build(), solver, 3)
    assert torch.allclose(flow.refine(2)(start()), flow(start()), rtol=1e-3, atol=1e-4)


def test_a_scheme_is_refined_and_a_solver_asked_for_its_finer_self() -> None:
    assert Flow(plain(), FixedStep(Extrapolated(), h=1 / 4), 1).refine(3).solver == FixedStep(Extrapolated(), h=1 / 12)
    assert Flow(plain(), Pieces(4), 1).refine(3).solver == Pieces(12)


@pytest.mark.parametrize("mode", [True, False])
def test_layers_are_rebuilt_in_their_mode(mode: bool) -> None:
    field = damped_layers().train(mode)
    for rebuilt in (field.scaled(0.5), field.mapped(lambda layer: layer.drift()), field.held(1.5), field.at(0.0).drift()):
        assert {module.training for module in rebuilt.modules()} == {mode}


def test_held_at_a_depth_a_wrapper_is_autonomous() -> None:
    field, x = damped_layers(), start()
    assert torch.equal(field.held(1.5)(0.0, x), field(1.5, x))
    assert torch.equal(field.held(1.5)(7.0, x), field(1.5, x))


def test_wrapped_layers_are_weights_of_depth() -> None:
    network = build_network("euler")
    projected = network.project("hat", 3)
    basis, thetas = projected.flows[0].field.expanded()
    assert basis.size == 3
    assert sorted(tuple(theta.shape[1:]) for theta in thetas) == sorted(
        tuple(p.shape) for p in network.flows[0].field.pieces()[0].parameters()
    )
    assert depth_smoothness(network.flows[0].field) > 0
    with pytest.raises(TypeError, match="weights of a Damped"):
        around_layers().project(basis)


# Noise and drift
MILSTEIN = "brownian:method=milstein,h=0.25"
STOCHASTIC = ["euler_maruyama", "euler_maruyama:h=0.5", "euler_maruyama:increments=brownian,h=0.25", "milstein:h=0.25"]
STOCHASTIC += [MILSTEIN, "brownian:method=euler,h=0.25", "brownian:method=srk,h=0.5", f"{MILSTEIN},rtol=0.01,atol=0.01"]
STOCHASTIC += [f"{MILSTEIN},gradient=adjoint"]


@pytest.mark.parametrize("solver", STOCHASTIC)
def test_own_noise_moves_training_and_evaluation_is_its_drift(solver: str) -> None:
    flow, x = Flow(noisy_layers(), solver, 3), start()
    torch.manual_seed(3)
    first = flow(x)
    assert not torch.allclose(first, flow(x))
    torch.manual_seed(3)
    assert torch.equal(flow(x), first)
    assert torch.isfinite(gradient(flow, x)).all()
    drift = flow.drift()
    assert torch.allclose(flow.eval()(x), drift(x))
    assert torch.allclose(drift.with_solver(FINE)(x), Flow(noisy_layers().mapped(lambda layer: layer.drift()), FINE, 3)(x))
    assert torch.allclose(drift.with_solver(OWN[1])(x), drift.with_solver(FINE)(x), rtol=1e-3, atol=1e-4)


def test_noise_inside_a_wrapper_is_refused_and_its_drift_is_not() -> None:
    inside_out = Damped(StochasticDepth(plain(), 0.5)).double()
    with pytest.raises(TypeError, match="outermost"):
        Flow(inside_out, "euler_maruyama", 1)
    for solver in (*OWN, "dopri5"):
        if solver != OWN[1]:
            with pytest.raises(TypeError, match="drift"):
                Flow(inside_out, solver, 1)
        assert Flow(inside_out.drift(), solver, 1)(start()).shape == (3, 4)


def test_moments_and_strong_order_of_own_noise() -> None:
    field = Flipped(plain())
    for scheme in (EulerMaruyama("own"), EulerMaruyama("brownian")):
        limit = limit_moment(field, [0.3], power=2)
        coarse, fine = (abs(linear_moment(field, scheme, [0.3], n, power=2) - limit) for n in (64, 128))
        assert 1.8 < coarse / fine < 2.2
    far, near = strong_errors(field, EulerMaruyama("brownian"), start(1), 1.0, (4, 32), 64, 128, seed=0)
    assert near.error < far.error / 2


# Networks
@builder
def own_network(solver: str = "euler", noise: bool = False) -> Network:
    torch.manual_seed(0)
    return Network(nn.Linear(2, 4), [Flow(noisy_layers() if noise else damped_layers(), solver, 3)], nn.Linear(4, 3)).double()


def build_network(solver: Solver | str, noise: bool = False) -> Network:
    network = own_network(noise=noise, solver="euler_maruyama" if noise else "euler")
    return network.with_solver(solver)


def images(batch: int = 5) -> Tensor:
    return states(batch, 2, seed=2)


@pytest.mark.parametrize(
    ("solver", "noise"),
    [("dopri5:rtol=0.001,atol=0.001", False), ("rk4:h=0.5", False), ("euler_maruyama:increments=own,h=1", True)],
)
def test_files_bring_back_fields_and_noise(solver: str, noise: bool, tmp_path: Path) -> None:
    network = build_network(solver, noise).eval()
    if not noise:
        network = network.refine(2).project("hat", 4)
    continuum.save(network, tmp_path / "own.pt")
    loaded = continuum.load(tmp_path / "own.pt", builder=own_network)
    assert loaded.solver == network.solver
    assert torch.equal(loaded(images()), network(images()))


@pytest.mark.parametrize("solver", OWN, ids=str)
def test_files_refuse_solvers_that_text_cannot_name(solver: Solver, tmp_path: Path) -> None:
    network = build_network(solver)
    with pytest.raises(TypeError, match="no textual form"):
        continuum.save(network, tmp_path / "own.pt")
    continuum.save(network.with_solver("euler"), tmp_path / "own.pt")
    loaded = continuum.load(tmp_path / "own.pt", builder=own_network).with_solver(solver)
    assert torch.equal(loaded(images()), network.eval()(images()))


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("solver", [*OWN, "rk4", "dopri5"], ids=str)
def test_compiled_networks_compute_the_same(solver: Solver | str) -> None:
    network = build_network(solver)
    expected = network(images())
    network.compile()
    assert torch.allclose(network(images()), expected)


def test_comparison_has_a_row_for_each() -> None:
    batches = [(images(), torch.tensor([0, 1, 2, 0, 1]))]
    rows = list(compare_solvers(build_network("rk4:h=0.25"), batches, [*OWN, parse("dopri5")], torch.device("cpu")))
    assert [row.solver for row in rows[1:3]] == list(map(str, OWN))
    assert max(row.logit_difference for row in rows) < 1e-2
    noisy = build_network("euler_maruyama", noise=True)
    *_, row = compare_solvers(noisy, batches, [parse("euler_maruyama:h=0.5")], torch.device("cpu"), paths=2)
    assert row.loss_deviation > 0


@pytest.mark.parametrize("solver", OWN, ids=str)
def test_analyses_of_a_network(solver: Solver | str) -> None:
    network, data = build_network(solver), Sample(images(2), torch.tensor([0, 1]))
    sections = {section.title: section for section in report(network, data, {})}
    left_out = {title for title, section in sections.items() if section.summary.startswith("Left out")}
    # There is no k here, no equation of a scheme that says none or of steps that an error chooses, and layers take many steps.
    assert left_out == {"Layers", "Momentum", "Modified equation and stability"}
    assert "Order of convergence" in sections


def test_analyses_ask_own_kinds() -> None:
    network = build_network(OWN[0])
    flow, x = network.flows[0], start()
    measured = scheme_errors(flow, x, Extrapolated(), (8, 16, 32))
    assert measured.order == pytest.approx(2, abs=0.2)
    (row,) = compare_gradients(flow, x, [parse("dopri5:rtol=1e-6,atol=1e-6,gradient=adjoint")])
    assert row.error < 1e-4
    assert row.evaluations > 0
    (found,) = flow_dynamics(network, images())
    assert len(found.steps) == 48
    assert len(found.smoothness) == 2


def test_failures_are_found_under_each() -> None:
    bad = images()
    bad[1, 0] = torch.nan
    for solver in (*OWN, "rk4"):
        network = build_network(solver)
        assert find_failure(network, bad).rows == (1,)
        with torch.no_grad():
            network.flows[0].field.pieces()[1].rate.fill_(torch.inf)
        assert find_failure(network, images()).rows == (0, 1, 2, 3, 4)


def test_weak_report_of_own_noise() -> None:
    found = weak_report(build_network("euler_maruyama", noise=True), images(2), paths=4, steps_per_layer=2, seed=0)
    assert [layer.law for layer in found.layers] == ["Bernoulli(p=0.75)"] * 3


# Verification
def test_own_schemes_are_measured_as_those_of_the_library() -> None:
    (found,) = scheme_orders([Extrapolated()])
    assert found.passed


@pytest.mark.parametrize("solver", OWN, ids=str)
def test_networks_of_the_zoo_are_certified_under_own_solvers(solver: Solver) -> None:
    network = small("resnet").with_solver(solver)
    assert certify(network, some_images(network)).passed
