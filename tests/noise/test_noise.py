"""Noise: every regulariser draw for draw, its moments, its gradients, what stays deterministic, and what is refused."""

import contextlib
import math

import pytest
import torch
from problems import FLOAT64, states
from torch import nn
from torchvision.ops import stochastic_depth

import continuum
from continuum import MLP, Autonomous, Flow, Momentum, Network, PiecewiseConstant, PostActivation
from continuum.fields import Function, Scaled
from continuum.models.parts import NoisyTransition
from continuum.noise import Drift, Dropout, Gaussian, ShakeShake, StochasticDepth, StochasticField, linear_decay, noise_only
from continuum.noise.laws import Bernoulli, Normal, Uniform
from continuum.schemes import EulerMaruyama, Milstein
from continuum.solvers import FixedStep


def branch(channels=3, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Autonomous(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.Tanh()))


def frozen_norms(module):
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    return module


def images(batch=5, dtype=torch.float32):
    return states(batch, 3, 6, 6, dtype=dtype)


FIELDS = {
    "stochastic depth": lambda seed=0: StochasticDepth(branch(seed=seed), 0.6),
    "stochastic depth, image": lambda seed=0: StochasticDepth(branch(seed=seed), 0.6, per="image"),
    "rescaled": lambda seed=0: StochasticDepth(branch(seed=seed), 0.6, "rescaled"),
    "rescaled, image": lambda seed=0: StochasticDepth(branch(seed=seed), 0.6, "rescaled", per="image"),
    "shake-shake": lambda seed=0: ShakeShake(branch(seed=seed), branch(seed=seed + 9), "shake", "keep"),
    "shake-shake, batch": lambda seed=0: ShakeShake(branch(seed=seed), branch(seed=seed + 9), "shake", "keep", "batch"),
    "even": lambda seed=0: ShakeShake(branch(seed=seed), branch(seed=seed + 9), "even", "keep"),
    "additive": lambda seed=0: Gaussian(branch(seed=seed), 0.3),
    "multiplicative": lambda seed=0: Gaussian(branch(seed=seed), 0.3, "multiplicative"),
    "dropout": lambda seed=0: Dropout(branch(seed=seed), 0.4),
}

every_field = pytest.mark.parametrize("name", FIELDS)


def layers(name, count=4):
    return PiecewiseConstant([FIELDS[name](seed) for seed in range(count)])


PUBLISHED = {
    "stochastic depth": lambda field, x, draw: x + draw * field.field(0.0, x) if draw.any() else x,
    "rescaled": lambda field, x, draw: x + draw / 0.6 * field.field(0.0, x) if draw.any() else x,
    "shake-shake": lambda field, x, draw: x + (draw * field.first(0.0, x) + (1 - draw) * field.second(0.0, x)),
    "even": lambda field, x, draw: x + (0.5 * field.first(0.0, x) + 0.5 * field.second(0.0, x)),
    "additive": lambda field, x, draw: x + (field.field(0.0, x) + 0.3 * draw),
    "multiplicative": lambda field, x, draw: x + (field.field(0.0, x) + 0.3 * draw * x),
    "dropout": lambda field, x, draw: x + draw / (1 - 0.4) * field.field(0.0, x),
}
"""One layer of the published regulariser, written down from its paper; `draw` is its random number."""


def drawn(name, x):
    """The random number of a layer, from torch's generator."""
    size = (1 if name in ("stochastic depth", "rescaled", "shake-shake, batch") else len(x), 1, 1, 1)
    if name.startswith(("stochastic depth", "rescaled")):
        return torch.empty(size).bernoulli_(0.6)
    if name.startswith(("shake-shake", "even")):
        return torch.rand(size)
    return torch.empty(x.shape).bernoulli_(0.6) if name == "dropout" else torch.randn(x.shape)


def expected_solve(name, field, x):
    draws = [drawn(name, x) for _ in field.layers]
    for layer, draw in zip(field.layers, draws, strict=True):
        x = PUBLISHED[name.partition(",")[0]](layer, x, draw)
    return x


@every_field
def test_a_layer_is_the_published_one_draw_for_draw(name):
    ours, theirs = Flow(layers(name), "euler_maruyama", 4), layers(name)
    dropped = False
    for seed in range(6):
        torch.manual_seed(seed)
        found = ours(images())
        torch.manual_seed(seed)
        expected = expected_solve(name, theirs, images())
        assert torch.equal(found, expected)
        ours.zero_grad()
        theirs.zero_grad()
        found.square().sum().backward()
        expected.square().sum().backward()
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            dropped = dropped or one.grad is None
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-6 * float(other.grad.norm()))
    assert dropped == (name in ("stochastic depth", "rescaled"))
    for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(one, other)


@every_field
def test_evaluation_is_the_drift(name):
    field = layers(name).eval()
    flow, x = Flow(field, "euler_maruyama", 4), images()
    expected = x
    for layer in field.layers:
        if name.startswith(("shake", "even")):
            expected = expected + (0.5 * layer.first(0.0, expected) + 0.5 * layer.second(0.0, expected))
        else:
            f = layer.field(0.0, expected)
            expected = expected + (0.6 * f if name.startswith("stochastic depth") else f)
    assert torch.equal(flow(x), expected)
    drift = flow.drift()
    assert str(drift.solver) == "euler:h=1"
    assert torch.equal(drift(x), expected)
    assert {id(p) for p in drift.parameters()} == {id(p) for p in flow.parameters()}
    drift.train()
    torch.manual_seed(0)
    first = drift(x)
    assert torch.equal(first, drift(x)), "the drift draws nothing, in training mode either"
    drift.with_solver("dopri5")(x)


@pytest.mark.parametrize(("mode", "per"), [("row", "image"), ("batch", "batch")])
def test_stochastic_depth_is_the_operation_of_torchvision(mode, per):
    field = PiecewiseConstant([StochasticDepth(branch(seed=i), 0.6, "rescaled", per=per) for i in range(4)])
    for seed in range(5):
        torch.manual_seed(seed)
        found = Flow(field, "euler_maruyama", 4)(images())
        torch.manual_seed(seed)
        x = images()
        for layer in field.layers:
            x = x + stochastic_depth(layer.field(0.0, x), 1 - 0.6, mode)
        assert torch.equal(found, x)


@pytest.mark.parametrize("per", ["image", "batch"])
@pytest.mark.parametrize("forward_mode", ["shake", "even"])
@pytest.mark.parametrize("backward_mode", ["shake", "even", "keep"])
def test_shake_shake_goes_back_as_it_says(forward_mode, backward_mode, per):
    """x + a f1 + (1 - a) f2 with linear branches: the gradients by hand, through two layers, with b in the place of a."""
    first, second = (nn.Linear(3, 3, dtype=FLOAT64) for _ in range(2))
    field = ShakeShake(Autonomous(first), Autonomous(second), forward_mode, backward_mode, per)
    x = torch.randn(4, 3, dtype=FLOAT64, requires_grad=True)
    torch.manual_seed(3)
    y = Flow(field, "euler_maruyama", 2)(x)
    y.square().sum().backward()
    size = (len(x) if per == "image" else 1, 1)
    torch.manual_seed(3)
    forward, backward = [], []
    for _ in range(2):
        a = torch.rand(size, dtype=FLOAT64) if forward_mode == "shake" else torch.full(size, 0.5, dtype=FLOAT64)
        b = a if backward_mode == "keep" else torch.full(size, 0.5, dtype=FLOAT64)
        if backward_mode == "shake":
            b = torch.rand(size, dtype=FLOAT64)
        forward, backward = [*forward, a], [*backward, b]
    states = [x.detach()]
    for a in forward:
        z = states[-1]
        states.append(z + (a * first(z) + (1 - a) * second(z)).detach())
    torch.testing.assert_close(y.detach(), states[-1], rtol=1e-13, atol=1e-13)
    g, weights = 2 * states[-1], [torch.zeros(3, 3, dtype=FLOAT64) for _ in range(2)]
    for b, z in zip(reversed(backward), reversed(states[:-1]), strict=True):
        weights[0] += (b * g).T @ z
        weights[1] += ((1 - b) * g).T @ z
        g = g + (b * g) @ first.weight + ((1 - b) * g) @ second.weight
    found = [x.grad, first.weight.grad, second.weight.grad]
    torch.testing.assert_close(found, [value.detach() for value in (g, *weights)], rtol=1e-12, atol=1e-12)


def test_stochastic_depth_behind_the_sum_is_the_published_one():
    field = PiecewiseConstant([StochasticDepth(PostActivation(branch(seed=i).module), 0.6) for i in range(4)])
    flow, x = Flow(field, "euler_maruyama", 4), images().relu()
    for seed in range(5):
        torch.manual_seed(seed)
        found = flow(x)
        torch.manual_seed(seed)
        expected, draws = x, [torch.empty(1).bernoulli_(0.6) for _ in range(4)]
        for layer, draw in zip(field.layers, draws, strict=True):
            expected = torch.relu(expected + layer.field.branch(expected)) if draw else torch.relu(expected)
        assert torch.equal(found, expected)
    flow.eval()
    expected = x
    for layer in field.layers:
        expected = torch.relu(expected + 0.6 * layer.field.branch(expected))
    assert torch.equal(flow(x), expected)


# Laws and moments
@pytest.mark.parametrize("law", [Bernoulli(0.3), Uniform(), Normal()], ids=str)
def test_a_law_has_the_moments_it_states(law):
    torch.manual_seed(0)
    count = 400_000
    numbers = {
        "drawn": law.draw((count,), FLOAT64, torch.device("cpu")),
        "quantiles": law.quantile(torch.rand(count, dtype=FLOAT64)),
    }
    for sample in numbers.values():
        assert abs(float(sample.mean()) - law.mean) < 4 * law.deviation / math.sqrt(count)
        assert abs(float(sample.std()) / law.deviation - 1) < 0.01
    for power in range(1, 7):
        exact = sum(weight * value**power for value, weight in law.nodes(power))
        sampled = numbers["drawn"] ** power
        assert abs(float(sampled.mean()) - exact) < 4 * float(sampled.std()) / math.sqrt(count)
    assert sum(weight for _, weight in law.nodes(9)) == pytest.approx(1, abs=1e-12)


MOMENTS = {  # drift and diffusion from the table of the regularisers, by hand
    "stochastic depth": lambda f: (0.6 * f(0), math.sqrt(0.6 * 0.4) * f(0)),
    "rescaled": lambda f: (f(0), math.sqrt(0.4 / 0.6) * f(0)),
    "shake-shake": lambda f: ((f(0) + f(9)) / 2, (f(0) - f(9)) / math.sqrt(12)),
    "even": lambda f: ((f(0) + f(9)) / 2, 0 * f(0)),
    "dropout": lambda f: (f(0), math.sqrt(0.4 / 0.6) * f(0)),
    "additive": lambda f: (f(0), 0.3 * torch.ones_like(f(0))),
    "multiplicative": lambda f: (f(0), 0.3 * images(dtype=FLOAT64)),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_drift_and_diffusion_are_those_of_the_table(name):
    field, x = FIELDS[name]().double(), images(dtype=FLOAT64)
    expected = MOMENTS[name](lambda seed: branch(seed=seed).double()(0.0, x))
    torch.testing.assert_close(field.terms(0.0, x), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("h", [1.0, 0.25])
@pytest.mark.parametrize("increments", ["own", "brownian"])
@every_field
def test_a_step_has_the_mean_and_variance_of_drift_and_diffusion(name, increments, h):
    """For the coefficients of many steps: E a_i = h m_i and Cov(a_i, a_j) = h s_i s_j."""
    field = FIELDS[name]()
    field.per = "image"
    x = torch.zeros(40_000, 1, 1, 1, dtype=FLOAT64)
    torch.manual_seed(0)
    coefficients = field.own(0.0, x, h) if increments == "own" else field.brownian(0.0, x, h)
    a = torch.stack([torch.as_tensor(c, dtype=FLOAT64).expand_as(x).flatten() for c in coefficients])
    means, deviations = (torch.tensor(values, dtype=FLOAT64) for values in (field.means(0.0), field.deviations(0.0)))
    covariance = h * torch.outer(deviations, deviations)
    bound = 5 * covariance.diagonal().sqrt().max() / math.sqrt(len(x))
    assert ((a.mean(dim=1) - h * means).abs() <= bound + 1e-12).all()
    assert (torch.cov(a) - covariance).abs().max() <= 0.04 * covariance.abs().max() + 1e-12


@every_field
def test_scaling_is_a_change_of_the_unit_of_depth(name):
    """One step of size 1 of the field scaled by h is a step of size h of the field, for the same draw."""
    field, x, h = FIELDS[name](), images(), 0.25
    scaled = field.scaled(h)
    assert scaled.means(0.0) == pytest.approx([h * m for m in field.means(0.0)])
    assert scaled.deviations(0.0) == pytest.approx([math.sqrt(h) * s for s in field.deviations(0.0)])
    for draw in ("own", "brownian"):
        torch.manual_seed(0)
        small = getattr(field, draw)(0.0, x, h)
        torch.manual_seed(0)
        unit = getattr(scaled, draw)(0.0, x, 1.0)
        for one, other in zip(small, unit, strict=True):
            torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=1e-6, atol=1e-7)
    assert field.scale == 1
    assert {id(p) for p in scaled.parameters()} == {id(p) for p in field.parameters()}


@pytest.mark.parametrize("solver", ["euler_maruyama", "euler_maruyama:increments=brownian,h=0.5"])
@every_field
def test_images_differ_where_the_noise_is_theirs(name, solver):
    flow = Flow(layers(name), solver, 4)
    frozen_norms(flow)
    torch.manual_seed(0)
    y = flow(images(1).expand(4, -1, -1, -1))
    same = [torch.allclose(y[0], other, rtol=1e-5, atol=1e-6) for other in y[1:]]
    field = flow.field.layers[0]
    assert all(same) == ((field.per == "batch" and field.noise == "scalar") or name == "even")


# Branches that are not evaluated
def test_a_dropped_branch_is_not_evaluated():
    calls = []
    field = StochasticDepth(branch(), 0.5)
    field.field.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for seed in range(20):
        calls.clear()
        torch.manual_seed(seed)
        coefficients = [field.own(0.0, images(), 1.0)[0] for _ in range(3)]
        torch.manual_seed(seed)
        Flow(PiecewiseConstant([field] * 3), "euler_maruyama", 3)(images())
        assert len(calls) == sum(c is not None for c in coefficients)
        counts.append(len(calls))
    assert min(counts) < 3


# Milstein, two steps, sampling
@pytest.mark.parametrize("name", ["stochastic depth, image", "shake-shake", "multiplicative", "additive"])
def test_milstein_adds_the_derivative_of_the_diffusion_along_itself(name):
    field, x, h = frozen_norms(FIELDS[name]().double()), images(dtype=FLOAT64), 0.25
    torch.manual_seed(0)
    found = Flow(field, FixedStep(Milstein(), h), 1).solver(field, x, (0.0, h)).states[-1]
    torch.manual_seed(0)
    increment = math.sqrt(h) * torch.randn(field.size(x), dtype=FLOAT64)
    drift, diffusion = field.terms(0.0, x)
    _, along = torch.autograd.functional.jvp(lambda y: field.terms(0.0, y)[1], x, diffusion.detach())
    expected = x + h * drift + increment * diffusion + 0.5 * (increment**2 - h) * along
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.manual_seed(0)
        assert torch.equal(FixedStep(Milstein(), h)(field, x, (0.0, h)).states[-1], found)


class Learnt(StochasticField):
    """dx = f dt + sigma dB, whose diffusion is learnt and does not depend on x."""

    def __init__(self, noise, shape=None):
        super().__init__()
        self.field, self.noise, self.shape = MLP(3, hidden=4).double(), noise, shape
        self.sigma = nn.Parameter(torch.tensor(0.3, dtype=FLOAT64))

    def branches(self, t, x):
        return (lambda: self.field(t, x), lambda: self.sigma * torch.ones_like(x))

    def law(self, t):
        return Normal()

    def coefficients(self, t, eta):
        return (1.0, eta)

    def size(self, x):
        return self.shape or super().size(x)


@pytest.mark.parametrize("noise", ["scalar", "diagonal"])
@pytest.mark.parametrize(
    ("milstein", "euler"),
    [
        ("milstein:h=0.25", "euler_maruyama:increments=brownian,h=0.25"),
        ("brownian:method=milstein,h=0.25", "brownian:method=euler,h=0.25"),
        ("brownian:method=milstein,h=0.25,gradient=adjoint", "brownian:method=euler,h=0.25,gradient=adjoint"),
    ],
)
def test_milstein_with_additive_noise_is_euler_maruyama(noise, milstein, euler):
    found, x = [], torch.randn(5, 3, dtype=FLOAT64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    field = Learnt(noise)
    for solver in (milstein, euler):
        torch.manual_seed(1)
        end = Flow(field, solver, 1)(x)
        found.append([end, *torch.autograd.grad(end.square().sum(), list(field.parameters()))])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_a_number_for_each_channel_has_a_path_for_each_channel():
    x = torch.zeros(2, 3, 4, dtype=FLOAT64)
    for shape, numbers in (((1, 1, 1), 1), ((2, 1, 1), 2), ((2, 3, 1), 6)):
        field = Learnt("scalar", shape)
        field.field = Autonomous(nn.Tanh())
        for solver in ("euler_maruyama:h=0.5", "brownian:method=euler,h=0.5"):
            assert len(Flow(field, solver, 1)(x).unique()) == numbers
    with pytest.raises(TypeError, match=r"shape \(1, 3, 1\) for states of shape \(2, 3, 4\)"):
        Flow(Learnt("scalar", (1, 3, 1)), "brownian:method=euler,h=0.5", 1)(x)


def test_two_steps_keep_what_they_keep():
    others = [Momentum(StochasticDepth(branch(seed=i), 0.6, "rescaled"), k=-0.1 * i) for i in (1, 2, 3)]
    field = PiecewiseConstant([StochasticDepth(branch(), 1.0), *others])
    flow, x = Flow(field, "stochastic_two_step", 4), images()
    for seed in range(5):
        torch.manual_seed(seed)
        found = flow(x)
        torch.manual_seed(seed)
        draws = [torch.empty(1).bernoulli_(p) for p in (1.0, 0.6, 0.6, 0.6)]
        before, state = x, x + field.layers[0].field(0.0, x)
        for layer, draw in zip(list(field.layers)[1:], draws[1:], strict=True):
            after = (1 - layer.k) * state + layer.k * before
            after = after + draw / 0.6 * layer.field.field(0.0, state) if draw else after
            before, state = state, after
        assert torch.equal(found, state)
    flow.eval()
    drift = flow.drift()
    assert str(drift.solver) == "linear_two_step:h=1"
    assert torch.equal(flow(x), drift(x))
    assert not flow.with_solver("euler_maruyama").training


def test_samples_draw_noise_and_leave_everything_as_it_was():
    network = Network(nn.Identity(), [Flow(layers("dropout"), "euler_maruyama", 4)], nn.Flatten()).train()
    before = [b.clone() for b in network.buffers()]
    torch.manual_seed(0)
    samples = network.sample(images(), 6)
    assert samples.shape == (6, 5, 108)
    assert not torch.equal(samples[0], samples[1])
    assert not samples.requires_grad
    assert all(module.training for module in network.modules())
    assert all(torch.equal(one, other) for one, other in zip(before, network.buffers(), strict=True))
    torch.manual_seed(0)
    assert torch.equal(samples, network.sample(images(), 6))
    # For the mean of many samples of one layer of dropout, whose drift is affine in the noise, the evaluation is exact.
    one = Network(nn.Identity(), [Flow(FIELDS["dropout"](), "euler_maruyama", 1)], nn.Flatten()).eval()
    many = one.sample(images(), 4000)
    assert ((many.mean(0) - one(images())).abs() <= 5 * many.std(0) / math.sqrt(4000) + 1e-6).all()
    drift = network.drift()
    with pytest.raises(TypeError, match="no noise"):
        drift.sample(images(), 2)
    with pytest.raises(ValueError, match="at least 1"):
        network.sample(images(), 0)


def test_noise_only_leaves_batch_statistics_alone():
    flow = Flow(layers("shake-shake"), "euler_maruyama", 4).eval()
    with noise_only(flow):
        assert [module.training for module in flow.field.layers] == [True] * 4
        assert not any(module.training for module in flow.modules() if isinstance(module, nn.BatchNorm2d))
        assert not torch.equal(flow(images()), flow(images()))
    assert not any(module.training for module in flow.modules())
    assert torch.equal(flow(images()), flow(images()))


def test_a_refined_network_goes_on_with_the_same_equation():
    flow = Flow(layers("stochastic depth, image"), "euler_maruyama", 4).refine(2)
    assert flow.depth == 8
    assert [layer.means(0.0)[0] for layer in flow.field.layers] == [0.3] * 8
    assert [layer.deviations(0.0)[0] for layer in flow.field.layers] == pytest.approx([math.sqrt(0.24 / 2)] * 8)
    flow(images())


@pytest.mark.parametrize("solver", ["milstein:h=0.25", "brownian:method=milstein,h=0.25"])
def test_milstein_is_itself_in_inference_mode(solver):
    flow = Flow(StochasticDepth(Autonomous(nn.Sequential(nn.Linear(3, 3), nn.Tanh())), 0.5, per="image"), solver, 1)
    x = torch.randn(4, 3)
    results = []
    for mode in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        with mode():
            results.append(flow(x + 0))
    assert torch.equal(*results)


def test_a_scaled_layer_behind_the_sum_is_a_share_of_the_layer():
    """Refined stochastic depth converges to the flow of its evaluation field, as a smaller step does."""
    field = StochasticDepth(PostActivation(nn.Linear(1, 1, dtype=FLOAT64)), 0.5).eval()
    nn.init.constant_(field.field.branch.weight, 0.0)
    nn.init.constant_(field.field.branch.bias, -5.0)
    x = torch.ones(1, 1, dtype=FLOAT64)
    assert torch.equal(field.scaled(0.25)(0.0, x), 0.25 * field(0.0, x))
    refined, smaller = Flow(PiecewiseConstant([field]), "euler_maruyama", 1).refine(8), Flow(field, "euler_maruyama:h=0.125", 1)
    torch.testing.assert_close(refined(x), smaller(x), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(refined.drift()(x), refined(x), rtol=1e-12, atol=1e-14)


class Odd(StochasticField):
    """A regulariser of a user's, with something wrong in it."""

    def __init__(self, coefficients, noise="scalar"):
        super().__init__()
        self.field = branch()
        self.noise = noise
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.made = coefficients

    def branches(self, t, x):
        return (lambda: self.field(t, x),)

    def law(self, t):
        return Uniform()

    def coefficients(self, t, eta):
        return self.made(self, eta)


@pytest.mark.parametrize(
    ("coefficients", "noise", "error", "message"),
    [
        (lambda self, eta: (eta**2,), "scalar", ValueError, "affine"),
        (lambda self, eta: eta, "scalar", TypeError, "a sequence"),
        (lambda self, eta: (self.weight * eta,), "scalar", TypeError, "depends on a parameter"),
        (lambda self, eta: (eta,), "general", ValueError, "'scalar' or 'diagonal'"),
        (lambda self, eta: (eta[0],), "scalar", TypeError, "one number a layer.*a layer of its own"),
    ],
)
def test_a_regulariser_of_your_own_is_looked_at(coefficients, noise, error, message):
    for solver in ("euler_maruyama", "milstein", "brownian:method=euler"):
        with pytest.raises(error, match=message):
            Flow(Odd(coefficients, noise), solver, 1)
    Flow(Odd(lambda self, eta: (2 * eta - 1,)), "euler_maruyama", 1)(images())


# What cannot be
WIDE = Function(lambda t, x: torch.cat([x, x], dim=1))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda f: StochasticDepth(f, 0.0), ValueError, r"\(0, 1\], not 0.0"),
        (lambda f: StochasticDepth(f, 1.5), ValueError, r"\(0, 1\], not 1.5"),
        (lambda f: StochasticDepth(f, 0.5, "rescale"), ValueError, "'huang'.*'rescaled'"),
        (lambda f: StochasticDepth(f, 0.5, per="row"), ValueError, "'image'"),
        (lambda f: StochasticDepth(PostActivation(f.module), 0.5, "rescaled"), TypeError, "no multiple"),
        (lambda f: StochasticDepth(f.module, 0.5), TypeError, "wrap a module of x alone as Autonomous"),
        (lambda f: StochasticDepth(StochasticDepth(f, 0.5), 0.5), TypeError, "holds some already"),
        (lambda f: StochasticDepth(Momentum(f), 0.5), TypeError, "write Momentum"),
        (lambda f: ShakeShake(f, branch(4)), ValueError, "3 to 3 and 4 to 4"),
        (lambda f: ShakeShake(f, f, "shook"), ValueError, "forward_mode is"),
        (lambda f: ShakeShake(f, f, per="pixel"), ValueError, "per is"),
        (lambda f: Gaussian(f, -0.1), ValueError, "at least 0, not -0.1"),
        (lambda f: Gaussian(f, 0.1, "both"), ValueError, "additive"),
        (lambda f: Dropout(f, 1.0), ValueError, r"\[0, 1\), not 1.0"),
        (lambda f: linear_decay(3, 0.0), ValueError, "survival"),
        (lambda f: Bernoulli(1.75), ValueError, "probability"),
        (lambda f: Dropout(f, 0.1).scaled(-1.0), ValueError, "positive"),
        (lambda f: NoisyTransition(nn.Identity(), Dropout(f, 0.1)), TypeError, "scalar noise"),
        (lambda f: continuum.zoo.shake_shake(20, width=2).project("hat", 2), TypeError, "around an Expansion"),
        (lambda f: EulerMaruyama("wiener"), ValueError, "own or brownian"),
        (lambda f: Flow(Dropout(f, 0.4), "euler", 4), TypeError, r"drift\(\)"),
        (lambda f: Flow(Dropout(f, 0.4), "rk4:h=0.5", 4), TypeError, r"drift\(\)"),
        (lambda f: Flow(Dropout(f, 0.4), "dopri5", 4), TypeError, r"drift\(\)"),
        (lambda f: Flow(Dropout(f, 0.4), "linear_two_step", 4), TypeError, r"drift\(\)"),
        (lambda f: Flow(f, "euler_maruyama", 1), TypeError, r"no noise.*Euler\(\)"),
        (lambda f: Flow(Scaled(Dropout(f, 0.4), 0.5), "euler_maruyama", 1), TypeError, "outermost"),
        (lambda f: Flow(Dropout(f, 0.4), "milstein", 1), TypeError, "EulerMaruyama"),
        (lambda f: Flow(Dropout(f, 0.4), "stochastic_two_step", 1), TypeError, "which holds k"),
        (lambda f: Flow(Dropout(f, 0.4), "euler_maruyama", 1).trajectory(images(), [1.0, 0.0]), ValueError, "no way back"),
        (lambda f: Flow(ShakeShake(f, WIDE), "euler_maruyama", 1)(images()), ValueError, "shape"),
    ],
)
def test_bad_noise_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make(branch())


def test_survival_and_sigma_that_vary_with_depth_are_looked_at():
    assert StochasticDepth(branch(), lambda t: 1 - t / 4).means(1.0) == (0.75,)
    with pytest.raises(ValueError, match="survival"):
        Flow(StochasticDepth(branch(), lambda t: -t), "euler_maruyama", 1)(images())
    assert Gaussian(branch(), lambda t: t).deviations(0.5) == (0.0, 0.5)


@pytest.mark.parametrize("solver", ["euler_maruyama:increments=brownian", "milstein", "brownian"])
@pytest.mark.parametrize("mode", ["shake", "even", "keep"])
def test_backward_modes_of_shake_shake_are_no_gradients_of_an_sde(mode, solver):
    flow = frozen_norms(Flow(ShakeShake(branch(), branch(seed=1), backward_mode=mode), solver, 1))
    with pytest.raises(TypeError, match="backward_mode='keep'") if mode != "keep" else contextlib.nullcontext():
        flow(images()).sum().backward()
    with torch.no_grad():
        assert flow(images()).isfinite().all()
    flow.eval()(images())


def test_the_drift_of_a_layer_without_noise_is_the_layer():
    plain = branch()
    flow = Flow(PiecewiseConstant([plain, StochasticDepth(branch(seed=1), 0.5)]), "euler_maruyama", 2)
    drift = flow.drift()
    assert drift.field.layers[0] is plain
    assert isinstance(drift.field.layers[1], Drift)
    assert not issubclass(Drift, StochasticField)
