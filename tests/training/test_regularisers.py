"""Smoothness in depth against plain sums and quadrature, integrals along a solve, and penalties in training."""

import json
import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import pytest
import pytorch_lightning as pl
import runs
import torch
from problems import FLOAT64, states
from runs import quiet_trainer
from torch import Tensor, nn

import continuum
from continuum import Autonomous, Expansion, Flow, Momentum, Network, PiecewiseConstant
from continuum.bases import Basis, Box, Chebyshev, Fourier, Hat, Legendre
from continuum.cli import main
from continuum.fields import MLP, Function, Scaled
from continuum.training import Classifier, DepthSmoothness, Digits, Nesterov, Transport
from continuum.training.regularisers import random_ends
from continuum.weights import depth_smoothness
from continuum.zoo import BUILDERS


def linear_layers(count: int, seed: int = 0) -> list[continuum.Field]:
    torch.manual_seed(seed)
    return [Autonomous(nn.Linear(3, 3)).to(FLOAT64) for _ in range(count)]


def plain_sum(layers: list[continuum.Field], tau: float) -> float:
    """N sum_i |theta_{i+1} - theta_i|^2 + tau |theta_0|^2, one number after the other."""
    theta = [[v for p in layer.parameters() for v in p.flatten().tolist()] for layer in layers]
    total = 0.0
    for i in range(len(theta) - 1):
        for one, other in zip(theta[i], theta[i + 1], strict=True):
            total += len(theta) * (other - one) ** 2
    return total + tau * sum(v * v for v in theta[0])


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("tau", [0.0, 1.0, 2.5])
def test_smoothness_of_layers_is_the_plain_sum(count: int, tau: float) -> None:
    layers = linear_layers(count)
    assert depth_smoothness(PiecewiseConstant(layers), tau).item() == pytest.approx(plain_sum(layers, tau), rel=1e-12)


def test_scales_k_and_statistics_are_no_part_of_theta() -> None:
    layers = linear_layers(4)
    expected = plain_sum(layers, 1.0)
    wrapped = [layers[0], Momentum(layers[1], k=0.3), Scaled(layers[2], 0.25), Momentum(Scaled(layers[3], 0.25))]
    assert depth_smoothness(PiecewiseConstant(wrapped)).item() == pytest.approx(expected, rel=1e-12)

    norms = [Autonomous(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))).to(FLOAT64) for _ in range(3)]
    expected = plain_sum(norms, 1.0)
    for layer in norms:
        layer(0.0, torch.randn(5, 3, dtype=FLOAT64))
    assert depth_smoothness(PiecewiseConstant(norms)).item() == pytest.approx(expected, rel=1e-12)


def quadrature(field: Expansion, tau: float, points: int = 800) -> float:
    """int_0^1 |d theta / ds|^2 ds + tau |theta(0)|^2 by differences over small intervals, kinks on their ends."""

    coefficients = torch.cat([p.detach().flatten(1) for p in field.field.parameters()], dim=1)

    def theta(s: float) -> Tensor:
        return sum((value * coefficients[k] for k, value in field.basis(s * field.basis.depth)), torch.zeros(()))

    samples = torch.stack([theta(i / points) for i in range(points + 1)])
    return float(points * samples.diff(dim=0).square().sum() + tau * samples[0].square().sum())


@pytest.mark.parametrize(
    "basis", [Hat(5, 3.0), Hat(2), Chebyshev(6, 3.0), Chebyshev(1), Legendre(5, 2.0), Fourier(5, 3.0), Fourier(4)], ids=str
)
def test_smoothness_of_expansions_is_the_integral(basis: Basis) -> None:
    torch.manual_seed(0)
    field = Expansion([Autonomous(nn.Linear(2, 2)).to(FLOAT64) for _ in range(basis.size)], basis)
    # Differences over 1/800 lose (2 pi k / 800)^2 / 12 of a wave.
    assert depth_smoothness(field, 0.7).item() == pytest.approx(quadrature(field, 0.7), rel=2e-4)


def test_smoothness_on_hats_and_boxes_is_a_sum_over_their_gaps() -> None:
    layers = linear_layers(5)
    parts = plain_sum(layers, 0.0)
    assert depth_smoothness(Expansion(layers, Hat(5, 3.0)), 0.0).item() == pytest.approx(parts * 4 / 5, rel=1e-12)
    assert depth_smoothness(Expansion(layers, Box(5, 3.0)), 0.0).item() == pytest.approx(parts, rel=1e-12)


def test_smoothness_has_a_limit_as_layers_are_added() -> None:
    """For theta(s) = sin 3 s, int theta'^2 ds = 9/2 + 9 sin 6 / 12; without the factor N it would go to zero."""
    values = []
    for count in (8, 16, 32, 64):
        layers = [nn.PReLU(1, math.sin(3 * i / count)).to(FLOAT64) for i in range(count)]
        values.append(depth_smoothness(PiecewiseConstant(map(Autonomous, layers))).item())
    errors = [abs(value - (4.5 + 0.75 * math.sin(6))) for value in values]
    assert all(0.4 < finer / coarser < 0.6 for coarser, finer in pairwise(errors))


@pytest.mark.parametrize("basis", [None, Hat(3, 3.0), Chebyshev(3, 3.0)], ids=str)
def test_the_gradient_of_smoothness(basis: Basis | None) -> None:
    layers = linear_layers(3)
    field = PiecewiseConstant(layers) if basis is None else Expansion(layers, basis)
    parameters = list(field.parameters())

    def at(*values: Tensor) -> Tensor:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
        return depth_smoothness(field)

    gradients = torch.autograd.grad(depth_smoothness(field), parameters)
    start = [p.detach().clone() for p in parameters]
    along = [torch.randn_like(p) for p in start]
    step = 1e-5
    ahead, behind = (at(*[p + sign * step * d for p, d in zip(start, along, strict=True)]).item() for sign in (1, -1))
    expected = sum(float((g * d).sum()) for g, d in zip(gradients, along, strict=True))
    assert (ahead - behind) / (2 * step) == pytest.approx(expected, rel=1e-6)


# Integrals along a solve
def mlp_flow(solver: str, layers: int = 3) -> Flow:
    torch.manual_seed(1)
    fields = [Autonomous(nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2))) for _ in range(layers)]
    return Flow(PiecewiseConstant(fields).to(FLOAT64), solver, layers)


def squared_speed(t: float | Tensor, x: Tensor, slope: Tensor) -> Tensor:
    return slope.square().sum(1)


@pytest.mark.parametrize("solver", ["rk4:h=0.0625", "dopri5:rtol=1e-9,atol=1e-9", "adams_bashforth:order=4,h=0.015625"])
def test_an_integral_is_that_of_the_states(solver: str) -> None:
    """By Simpson's rule, layer by layer, over the states of a fine solve."""
    flow, x = mlp_flow(solver), states(4, 2)
    end, total = flow.integral(x, squared_speed)
    count = 128
    path = mlp_flow(f"rk4:h={1 / count}").states(x)
    expected = torch.zeros(4, dtype=FLOAT64)
    for k in range(3):
        rule = [1, *[4, 2] * (count // 2 - 1), 4, 1]
        for i, weight in enumerate(rule):
            slope = flow.field.layers[k](0.0, path[k * count + i])  # type: ignore[union-attr, index, operator]
            expected += weight / (3 * count) * slope.square().sum(1).detach()
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(end, path[-1], rtol=1e-6, atol=1e-8)


def test_eulers_integral_is_its_sum_and_changes_no_state() -> None:
    flow, x = mlp_flow("euler"), states(4, 2)
    expected, state = torch.zeros(4, dtype=FLOAT64), x
    for layer in flow.field.layers:  # type: ignore[union-attr]
        slope = layer(0.0, state)
        expected = expected + slope.square().sum(1)
        state = state + slope
    end, total = flow.integral(x, squared_speed)
    assert torch.equal(end, flow(x))
    torch.testing.assert_close(total, expected, rtol=1e-13, atol=0)
    assert flow.cost is not None
    assert flow.cost.evaluations == 3
    given = torch.autograd.grad(total.sum(), list(flow.parameters()))
    wanted = torch.autograd.grad(expected.sum(), list(flow.parameters()))
    torch.testing.assert_close(given, wanted, rtol=1e-12, atol=1e-14)


def test_a_network_sums_the_integrals_of_its_flows() -> None:
    first, second = mlp_flow("euler", 2), mlp_flow("dopri5:rtol=1e-8,atol=1e-8", 1)
    network = Network(nn.Linear(2, 2).to(FLOAT64), [first, nn.Tanh(), second], nn.Identity())
    x = states(4, 2)
    logits, total = network.integral(x, squared_speed)
    between, one = first.integral(network.stem(x), squared_speed)
    end, other = second.integral(torch.tanh(between), squared_speed)
    torch.testing.assert_close(total, one + other)
    torch.testing.assert_close(logits, end)


SINGLE = {
    "lm_resnet": {"depth": 14, "width": 4},
    "revnet": {"depth": 26, "widths": (4, 8, 8)},
    "stochastic_depth_resnet": {"depth": 14, "width": 4},
    "odenet": {"width": 4, "solver": "per_image"},
}


@pytest.mark.parametrize("name", SINGLE)
def test_schemes_that_need_single_states_say_so_at_once(name: str) -> None:
    with pytest.raises(TypeError, match=r"cannot carry an integral beside the state\. Take a solver"):
        Classifier(BUILDERS[name](**SINGLE[name], in_channels=1), transport=Transport())


def test_a_two_step_scheme_with_a_state_before_carries_no_integral() -> None:
    flow, x = mlp_flow("two_step_midpoint:h=0.125"), states(4, 2)
    flow.integral(x, squared_speed)
    with pytest.raises(TypeError, match="integral before the first is unknown"):
        flow.integral(x, squared_speed, memory=x)


def test_lm_resnet_under_another_solver_has_an_integral() -> None:
    network = continuum.zoo.lm_resnet(14, width=4, in_channels=1).with_solver("heun").to(FLOAT64)
    images = torch.randn(3, 1, 8, 8, dtype=FLOAT64)
    logits, total = network.eval().integral(images, lambda t, x, slope: slope.flatten(1).square().mean(1))
    torch.testing.assert_close(logits, network(images))
    assert (total > 0).all()


@pytest.mark.parametrize(
    "solver",
    ["rk4:h=0.5,gradient=checkpoint,every=3", *(f"dopri5:rtol=1e-6,atol=1e-8,gradient={g}" for g in ("checkpoint", "adjoint"))],
)
def test_penalties_have_the_gradient_of_every_mode(solver: str) -> None:
    """Whatever a solver evaluates again on the way back, it meets the same signs."""

    def gradients(solver: str) -> list[Tensor]:
        flow = mlp_flow(solver, 2)
        torch.manual_seed(3)
        end, total = flow.integral(states(4, 2), Transport(1.0, 1.0).integrand())
        torch.manual_seed(4)
        (end.sum() + total.sum()).backward()
        return [p.grad for p in flow.parameters() if p.grad is not None]

    direct = gradients(solver.partition(",gradient")[0])
    torch.testing.assert_close(gradients(solver), direct, rtol=1e-4, atol=1e-6)


# Penalties
def test_the_jacobian_energy_is_the_exact_one_in_the_mean() -> None:
    """With two entries |e^T J|^2 takes two values only, one for equal signs and one for others."""
    matrix = torch.tensor([[0.3, -1.2], [0.8, 0.5]], dtype=FLOAT64)
    field = Function(lambda t, x: x @ matrix.T)
    energy = Transport(0.0, 1.0)
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        _, total = Flow(field, "euler:h=0.5", 2).integral(torch.zeros(1, 2, dtype=FLOAT64), energy.integrand())
        seen.add(round(total.item(), 10))
    values = [2 * float((torch.tensor([1.0, s], dtype=FLOAT64) @ matrix).square().sum()) / 2 for s in (1.0, -1.0)]
    assert seen == {round(v, 10) for v in values}
    assert sum(values) / 2 == pytest.approx(2 * float(matrix.square().sum()) / 2)

    mlp = MLP(2, 5).to(FLOAT64)
    x = states(1, 2)
    torch.manual_seed(0)
    rate = Transport(0.0, 1.0).integrand()(0.0, x.requires_grad_(), mlp(0.0, x))
    jacobian = torch.autograd.functional.jacobian(lambda x: mlp(0.0, x[None])[0], x[0].detach())
    exact = [float((torch.tensor([1.0, s], dtype=FLOAT64) @ jacobian).square().mean()) for s in (1.0, -1.0)]
    assert any(rate.item() == pytest.approx(value, rel=1e-12) for value in exact)


def test_signs_are_drawn_anew_for_every_pass_and_differ_between_images() -> None:
    flow, x = mlp_flow("euler"), states(1, 2).expand(16, 2)
    energy = Transport(0.0, 1.0)
    torch.manual_seed(0)
    one, other = (flow.integral(x, energy.integrand())[1] for _ in range(2))
    assert len({round(v, 12) for v in one.tolist()}) == 2
    assert not torch.equal(one, other)


def fit(network: Network, callbacks: Sequence[pl.Callback] = (), **options: object) -> tuple[Classifier, pl.Trainer]:
    """Five steps."""
    data, limits = Digits(batch_size=32, train_size=160, crop=0), {"limit_val_batches": 1, "log_every_n_steps": 1}
    model = runs.fit(
        network, data, callbacks, None, {"optimizer": partial(Nesterov, lr=0.05), **options}, max_steps=5, **limits
    )
    return model, model.trainer


def odenet(solver: str = "euler:h=0.5") -> Network:
    torch.manual_seed(0)
    return continuum.zoo.odenet(width=4, downsample=False, in_channels=1, solver=solver)


def kinetic(network: Network) -> float:
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network.eval().integral(images, lambda t, x, slope: slope.flatten(1).square().mean(1))[1].mean().item()


def test_transport_lowers_the_energy_and_smoothness_the_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Classifier, "INTERVAL", 0.0)
    plain, _ = fit(odenet())
    weighted, trainer = fit(odenet(), transport=Transport(kinetic=10.0, jacobian=0.1))
    assert kinetic(weighted.network) < 0.5 * kinetic(plain.network)
    assert trainer.logged_metrics["train/transport"] > 0
    assert "train/smoothness" not in trainer.logged_metrics

    def layers() -> Network:
        torch.manual_seed(0)
        return continuum.zoo.preresnet(14, width=4, in_channels=1)

    def roughness(model: Classifier) -> float:
        return sum(depth_smoothness(flow.field).item() for flow in model.network.flows)  # type: ignore[arg-type]

    plain, _ = fit(layers())
    smooth, _ = fit(layers(), smoothness=DepthSmoothness(weight=0.1))
    assert roughness(smooth) < 0.9 * roughness(plain)
    assert smooth.means["train/smoothness"] == pytest.approx(0.1 * roughness(smooth), rel=0.2)


def test_penalties_are_of_training_alone() -> None:
    """The loss of training is the sum, and what is validated is the plain network."""
    model = Classifier(odenet(), smoothness=None, transport=Transport())
    batch = (torch.randn(8, 1, 8, 8), torch.arange(8))
    model.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    model.trainer = quiet_trainer()
    with model.step_context(0):
        loss, _ = model.objective(batch)
    with model.step_context(0):
        _, energies = model.network.integral(batch[0], Transport().integrand())
    expected = model.loss(model(batch[0]), batch[1]) + energies.mean()
    torch.testing.assert_close(loss, expected)
    called = []
    model.network.integral = lambda *_: called.append(1)  # type: ignore[method-assign, assignment]
    model.eval().validation_step(batch, 0)
    assert not called


class Ends(pl.Callback):
    """Keeps where the solves of training and validation end."""

    def __init__(self) -> None:
        self.training: list[tuple[float, ...]] = []
        self.validation: list[tuple[float, ...]] = []

    def _ends(self, module: pl.LightningModule) -> tuple[float, ...]:
        return tuple(flow.cost.grid[-1] for flow in module.network.flows)  # type: ignore[union-attr, operator]

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        self.training.append(self._ends(module))
        assert all(flow.depth == 1 for flow in module.network.flows)  # type: ignore[union-attr]

    def on_validation_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        self.validation.append(self._ends(module))


def test_random_ends_are_where_they_should_and_in_training_only() -> None:
    def ends(end_time: float) -> Ends:
        seen = Ends()
        fit(odenet("bosh3:rtol=1e-1,atol=1e-1"), [seen], end_time=end_time)
        return seen

    seen = ends(0.5)
    depths = [end for step in seen.training for end in step]
    assert all(0.5 <= end <= 1.5 for end in depths)
    assert len(set(depths)) == len(depths)
    assert max(depths) - min(depths) > 0.4
    assert set(seen.validation) == {(1.0,)}
    assert ends(0.5).training == seen.training, "one seed, one sequence of ends"


def test_random_ends_are_uniform_around_the_depth() -> None:
    flows = [mlp_flow("dopri5", 2) for _ in range(60)]
    with random_ends(flows, 0.5, torch.Generator().manual_seed(0)):
        depths = sorted(flow.depth for flow in flows)
    assert 1.5 <= depths[0] < 1.6
    assert 2.4 < depths[-1] <= 2.5
    assert {flow.depth for flow in flows} == {2.0}


ADAPTIVE = "dopri5:rtol=1e-2,atol=1e-2"
LEARNT = Network(nn.Identity(), [Flow(MLP(2, 4), ADAPTIVE, nn.Parameter(torch.tensor(1.0)))], nn.Identity())
OTHER_LAYERS = PiecewiseConstant([Autonomous(nn.Linear(3, 3)), Autonomous(nn.Linear(3, 4))])
MIXED = PiecewiseConstant([Autonomous(nn.Linear(2, 2)), MLP(2, 4)])


def smoothed(network: Network) -> Classifier:
    return Classifier(network, smoothness=DepthSmoothness())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DepthSmoothness(-1), ValueError, "not negative"),
        (lambda: Transport(0, 0), ValueError, "not negative"),
        (lambda: Transport(1, -1), ValueError, "not negative"),
        (lambda: depth_smoothness(OTHER_LAYERS), ValueError, r"weight has shape \(3, 3\) in layer 0 and \(4, 3\) in layer 1"),
        (lambda: depth_smoothness(MLP(2, 4)), TypeError, "not a function of depth"),
        (lambda: depth_smoothness(PiecewiseConstant(linear_layers(2)), -1.0), ValueError, "tau"),
        (lambda: smoothed(odenet()), TypeError, "no flow of this network has PiecewiseConstant"),
        (lambda: smoothed(Network(nn.Identity(), [Flow(MIXED, "euler", 2)], nn.Identity())), ValueError, "one kind"),
        (lambda: mlp_flow("euler").integral(states(4, 2), lambda t, x, slope: slope), ValueError, r"\(4,\), not \(4, 2\)"),
        (lambda: Network(nn.Identity(), [], nn.Identity()).integral(states(4, 2), squared_speed), TypeError, "no flow"),
        (lambda: Classifier(odenet("euler"), end_time=0.5), TypeError, "adaptive solver such as dopri5"),
        (lambda: Classifier(odenet(ADAPTIVE), end_time=1.0), ValueError, "less than its depth, 1"),
        (lambda: Classifier(odenet(ADAPTIVE), end_time=-0.1), ValueError, "less than its depth, 1"),
        (lambda: Classifier(LEARNT, end_time=0.5), TypeError, "learnt"),
    ],
)
def test_penalties_and_ends_that_have_no_meaning_are_refused_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.usefixtures("command_line")
def test_the_command_line_takes_them_and_a_run_resumes() -> None:
    arguments = {"depth": 14, "width": 4, "in_channels": 1, "solver": "bosh3:rtol=1,atol=1"}
    network = json.dumps({"class_path": "continuum.zoo.preresnet", "init_args": arguments})
    penalties = ["--model.smoothness=continuum.training.DepthSmoothness", "--model.smoothness.weight=0.001"]
    penalties += ["--model.transport.class_path=continuum.training.Transport", "--model.transport.init_args.kinetic=0.1"]
    run = ["fit", f"--model.network={network}", *penalties, "--model.end_time=0.25", "--model.schedule=null"]
    run += ["--data=continuum.training.Digits", "--data.train_size=32", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    main([*run, "--trainer.max_epochs=1"])
    assert continuum.load("checkpoints/last.ckpt").flows
    main([*run, "--trainer.max_epochs=2", "--ckpt_path=checkpoints/last.ckpt"])
