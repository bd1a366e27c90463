"""Solves on a Brownian path: the path and the grid, strong orders, gradients, knots, failures and text."""

import copy
from itertools import pairwise

import pytest
import torch
import torchsde
from problems import FLOAT64, MATRIX, Watched, small_mlp, states, tanh_layers
from torch import nn

from continuum import Autonomous, Brownian, FixedStep, Flow, Momentum, Network, PiecewiseConstant, SolveError
from continuum.fields import Function
from continuum.models.failure import find_failure
from continuum.noise import Dropout, Gaussian, Normal, ShakeShake, StochasticDepth, StochasticField
from continuum.schemes import EulerMaruyama
from continuum.solvers import parse
from continuum.solvers.brownian import METHODS
from continuum.solvers.ito import Rule, Solve

STRATONOVICH = ("midpoint", "heun", "euler_heun", "reversible_heun", "log_ode", "adjoint_reversible_heun")
ROWS = 2000
STEPS = (8, 16, 32, 64)
DRIFTS = [(Brownian("euler", 1 / 4), "euler:h=0.25"), (Brownian("milstein", 1 / 4), "euler:h=0.25")]
DRIFTS += [(Brownian("srk", 1 / 4), "heun:h=0.25")]
DRIFTS += [(Brownian("srk", 1 / 4, rtol=1e-5, atol=1e-6), "dopri5:rtol=1e-05,atol=1e-06")]


def seeded(flow, x, seed=0):
    torch.manual_seed(seed)
    return flow(x)


def same_path(size, stop=1.0, seed=0, **options):
    """The path of a solve of depth `stop` after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    entropy = torch.randint(2**62, ()).item()
    return torchsde.BrownianInterval(0.0, stop, size=size, dtype=FLOAT64, entropy=entropy, **options)


NOISY = {
    "image": lambda f: StochasticDepth(f, 0.7, per="image"),
    "batch": lambda f: StochasticDepth(f, 0.7),
    "shake": lambda f: ShakeShake(f, Function(lambda t, x: torch.sin(2 * x)), backward_mode="keep"),
    "additive": lambda f: Gaussian(f, 0.4),
    "multiplicative": lambda f: Gaussian(f, 0.4, "multiplicative"),
    "dropout": lambda f: Dropout(f, 0.3),
    "momentum": lambda f: Momentum(StochasticDepth(f, 0.7, per="image"), -0.3).double(),
}
"""A field of every kind of noise, of its drift."""

KINDS, SMOOTH = list(NOISY), [kind for kind in NOISY if kind != "dropout"]
SIZES = {"batch": (1, 1), **dict.fromkeys(("additive", "multiplicative", "dropout"), (4, 3))}
"""Of the increments for 4 states with 3 entries, where it is not (4, 1)."""


def noisy(kind):
    return NOISY[kind](small_mlp())


def euler_maruyama(field, x, n, increments):
    """The plain loop, with drift and diffusion by the fields' definitions."""
    for k in range(n):
        moved, noise = (field.field if isinstance(field, Momentum) else field).terms(k / n, x)
        friction = 1 + field.k if isinstance(field, Momentum) else 1
        x = x + moved / friction / n + noise / friction * increments(k / n, (k + 1) / n)
    return x


class Split(StochasticField):
    """dx = f dt + g dB for any two fields, one number for each image."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second
        self.knots = first.knots

    def branches(self, t, x):
        return lambda: self.first(t, x), lambda: self.second(t, x)

    def law(self, t):
        return Normal()

    def coefficients(self, t, eta):
        return 1.0, eta


# The path and the grid
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [4, 12, 19, 23, 27, 28])
def test_euler_is_the_plain_loop_and_takes_n_steps(kind, n):
    """torchsde's own loop takes one step more for these n, in float32, and evaluates the field once before."""
    field, size = noisy(kind), SIZES.get(kind, (4, 1))
    flow = Flow(field, Brownian(h=1 / n), depth=1)
    y = seeded(flow, states())
    torch.testing.assert_close(y, euler_maruyama(field, states(), n, same_path(size, dt=1 / n)), rtol=1e-12, atol=1e-12)
    assert (flow.cost.evaluations, flow.cost.accepted, flow.cost.rejected) == (n, n, 0)
    assert flow.cost.grid == tuple(k / n for k in range(n + 1))


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
@pytest.mark.parametrize(("method", "each"), [("euler", 1), ("milstein", 1), ("srk", 6)])
@pytest.mark.parametrize("n", [12, 19, 23, 27, 28])
def test_one_evaluation_for_drift_and_diffusion(method, each, n, dtype):
    watched = Watched(small_mlp().to(dtype))
    flow = Flow(StochasticDepth(watched, 0.7, per="image"), Brownian(method, 1 / n), depth=1)
    assert seeded(flow, states().to(dtype)).dtype == dtype
    assert flow.cost.evaluations == len(watched.depths) == each * n
    assert flow.cost.accepted == n


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", SMOOTH)
def test_images_as_they_are(kind, method):
    """The same states as images and flattened."""
    torch.manual_seed(3)
    conv = nn.Conv2d(3, 3, 3, padding=1, dtype=FLOAT64)
    image = Function(lambda t, x: conv(x).tanh())
    flat = Function(lambda t, x: conv(x.unflatten(1, (3, 4, 5))).tanh().flatten(1))
    x = states(2, 60).unflatten(1, (3, 4, 5))
    y = seeded(Flow(NOISY[kind](image), Brownian(method, 1 / 3), depth=1), x)
    assert y.shape == x.shape
    same = seeded(Flow(NOISY[kind](flat), Brownian(method, 1 / 3), depth=1), x.flatten(1))
    torch.testing.assert_close(y.flatten(1), same, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_who_shares_a_number(method):
    x = states(1, 3).expand(4, 3)
    for kind, different in (("image", True), ("batch", False), ("multiplicative", True)):
        y = seeded(Flow(noisy(kind), Brownian(method, 1 / 4), depth=1), x)
        assert all(torch.equal(a, b) != different for a, b in pairwise(y))


@pytest.mark.parametrize("options", [{}, {"rtol": 1e-2, "atol": 1e-2}], ids=["fixed", "adaptive"])
def test_a_trajectory_is_the_solve(options):
    flow = Flow(noisy("image"), Brownian("milstein", 1 / 4, **options), depth=2)
    torch.manual_seed(0)
    path = flow.trajectory(states(), [0, 0.25, 1, 2])
    assert path.shape == (4, 4, 3)
    assert torch.equal(path[0], states())
    assert {0.25, 1.0} <= set(flow.cost.grid)
    if not options:
        assert torch.equal(path[-1], seeded(flow, states()))


def test_no_way_back():
    flow = Flow(IMAGE, Brownian(h=1 / 4), depth=1)
    with pytest.raises(ValueError, match="no way back"):
        flow.trajectory(states(), [1, 0])
    torch.testing.assert_close(flow.eval().trajectory(states(), [1, 0]), flow.drift().trajectory(states(), [1, 0]))


# Orders


def matrix_problem():
    """dx = p A x dt + s A x dB with a matrix A that is not symmetric, and its solution exp((p A - s^2 A^2 / 2) + s A B) x."""
    field = StochasticDepth(Function(lambda t, x: 1.5 * x @ MATRIX.T), 0.6, per="image")
    ((p,), (s,)) = field.means(0.0), field.deviations(0.0)

    def exact(x, b):
        a = 1.5 * MATRIX
        return (torch.linalg.matrix_exp(p * a - s**2 / 2 * a @ a + s * b[..., None] * a) @ x[..., None])[..., 0]

    return field, (ROWS, 1), exact


def number_problem():
    """The same with a number for a matrix."""
    field = StochasticDepth(Function(lambda t, x: -x), 0.6, per="image")
    ((p,), (s,)) = field.means(0.0), field.deviations(0.0)
    return field, (ROWS, 1), lambda x, b: x * torch.exp(-p - s**2 / 2 - s * b)


def entry_problem():
    """dx = x / 2 dt + 0.6 x dB in every entry."""
    field = Gaussian(Function(lambda t, x: 0.5 * x), 0.6, "multiplicative")
    return field, (ROWS, 3), lambda x, b: x * torch.exp(0.5 - 0.18 + 0.6 * b)


def root_mean_square(x):
    return float(x.pow(2).mean().sqrt())


def slope(errors):
    x = -torch.tensor(STEPS, dtype=FLOAT64).log()
    y = torch.tensor(errors, dtype=FLOAT64).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


@pytest.mark.parametrize(("method", "low", "high"), [("euler", 0.4, 0.6), ("milstein", 0.9, 1.1), ("srk", 1.35, 1.75)])
@pytest.mark.parametrize("problem", [matrix_problem, number_problem, entry_problem])
@torch.no_grad()
def test_strong_order(problem, method, low, high):
    """Whatever the steps, the path ends where it did: its last value is drawn first."""
    field, size, exact = problem()
    x = torch.tensor([1.0, 0.5, -0.8], dtype=FLOAT64).expand(ROWS, 3)
    solution = exact(x, same_path(size)(0.0, 1.0))
    errors = [root_mean_square(seeded(Flow(field, Brownian(method, 1 / n), depth=1), x) - solution) for n in STEPS]
    assert low < slope(errors) < high


@torch.no_grad()
def test_why_milstein_is_not_torchsdes():
    """Its term for one noise on a vector has the transposed Jacobian; when this fails, `ito` need not replace it any more."""
    field, size, exact = matrix_problem()
    x = torch.tensor([1.0, 0.5, -0.8], dtype=FLOAT64).expand(ROWS, 3)

    class Plain(torchsde.SDEIto):
        def f(self, t, y):
            return field.terms(0.0, y)[0]

        def g(self, t, y):
            return field.terms(0.0, y)[1][..., None]

    errors = []
    for n in STEPS:
        path = same_path(size, dt=1 / n)
        y = torchsde.sdeint(Plain("scalar"), x, torch.tensor([0.0, 1.0]), bm=path, method="milstein", dt=1 / n)[-1]
        errors.append(root_mean_square(y - exact(x, path(0.0, 1.0))))
    assert 0.4 < slope(errors) < 0.7


@pytest.mark.parametrize("problem", [matrix_problem, entry_problem])
@pytest.mark.parametrize(("method", "within"), [("milstein", 60), ("srk", 30)])
@torch.no_grad()
def test_adaptive_steps_converge_with_the_tolerance(problem, method, within):
    field, size, exact = problem()
    x = torch.tensor([1.0, 0.5, -0.8], dtype=FLOAT64).expand(ROWS, 3)
    solution = exact(x, same_path(size)(0.0, 1.0))
    errors = []
    for tolerance in (1e-2, 1e-3, 1e-4):
        flow = Flow(field, Brownian(method, 1, rtol=tolerance, atol=tolerance), depth=1)
        errors.append(root_mean_square(seeded(flow, x) - solution))
        assert errors[-1] < within * tolerance
    assert errors == sorted(errors, reverse=True)


def test_the_cost_of_adaptive_steps():
    watched = Watched(small_mlp())
    flow = Flow(StochasticDepth(watched, 0.5, per="image"), Brownian("milstein", rtol=1e-4, atol=1e-4), depth=1)
    seeded(flow, states())
    cost = flow.cost
    # The whole step and the first half share their beginning.
    assert cost.evaluations == len(watched.depths) == 2 * (cost.accepted + cost.rejected)
    assert cost.rejected > 0
    assert len(cost.grid) == cost.accepted + 1
    assert list(cost.grid) == sorted(set(cost.grid))
    assert (cost.grid[0], cost.grid[-1]) == (0.0, 1.0)


# Gradients
def gradients(flow, x, seed=0):
    x = x.clone().requires_grad_()
    y = seeded(flow, x, seed)
    inputs = [x, *flow.field.parameters()]
    return torch.autograd.grad((y**2).sum() + y.sin().sum(), inputs)


def distance(some, others):
    """Relative to all the others."""
    difference = sum(float((a - b).pow(2).sum()) for a, b in zip(some, others, strict=True))
    return (difference / sum(float(b.pow(2).sum()) for b in others)) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_direct_gradient_is_that_of_the_plain_loop(kind):
    field, size = noisy(kind), SIZES.get(kind, (4, 1))
    x = states().requires_grad_()
    y = euler_maruyama(field, x, 5, same_path(size, dt=1 / 5))
    plain = torch.autograd.grad((y**2).sum() + y.sin().sum(), [x, *field.parameters()])
    torch.testing.assert_close(gradients(Flow(field, Brownian(h=1 / 5), depth=1), x.detach()), plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", SMOOTH)
@pytest.mark.parametrize("solver", [Brownian("milstein", 1 / 2), Brownian("srk", 1 / 2)], ids=str)
def test_the_direct_gradient_by_differences(kind, solver):
    flow = Flow(noisy(kind), solver, depth=1)
    weight = next(flow.parameters())

    def solve(x, w):
        with torch.no_grad():
            weight.copy_(w)
        return seeded(flow, x)

    x = states(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: seeded(flow, x), x)
    (exact,) = torch.autograd.grad(seeded(flow, x).sum(), weight)
    way = torch.randn_like(weight)
    before, small = weight.detach().clone(), 1e-6
    change = (solve(x, before + small * way) - solve(x, before - small * way)).sum() / (2 * small)
    torch.testing.assert_close((exact * way).sum(), change.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", SMOOTH)
@pytest.mark.parametrize("method", METHODS)
def test_the_adjoint_comes_near_the_direct_gradient(kind, method):
    field = noisy(kind)
    errors = []
    for h in (1 / 8, 1 / 64):
        direct = gradients(Flow(field, Brownian(method, h), depth=1), states())
        adjoint = gradients(Flow(field, Brownian(method, h, gradient="adjoint"), depth=1), states())
        errors.append(distance(adjoint, direct))
    assert errors[1] < 0.6 * errors[0]
    assert errors[1] < 0.06


@pytest.mark.parametrize("n", [12, 19, 23])
def test_the_adjoint_takes_n_steps_there_and_back(n):
    watched = Watched(small_mlp())
    flow = Flow(StochasticDepth(watched, 0.7, per="image"), Brownian(h=1 / n, gradient="adjoint"), depth=1)
    y = seeded(flow, states().requires_grad_())
    assert len(watched.depths) == flow.cost.evaluations == n
    y.sum().backward()
    assert watched.depths == [k / n for k in range(n)] + [k / n for k in range(n, 0, -1)]


def normed_layers(count=2):
    torch.manual_seed(0)
    return [Autonomous(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh())).double() for _ in range(count)]


def test_the_adjoint_of_layers_with_batch_statistics():
    """Every layer has its own gradient, and statistics move once for each evaluation of the way there."""
    layers = normed_layers()
    field = PiecewiseConstant(Gaussian(layer, 0.3, "multiplicative") for layer in layers)
    flow = Flow(field, Brownian("milstein", 1 / 64, gradient="adjoint"), depth=2)
    adjoint = gradients(flow, states(8, 3))
    assert [int(layer.module[1].num_batches_tracked) for layer in layers] == [64, 64]
    direct = gradients(flow.with_solver(Brownian("milstein", 1 / 64)), states(8, 3))
    assert len(direct) == 9
    assert distance(adjoint, direct) < 0.05


@pytest.mark.parametrize("solver", [Brownian("milstein", 1 / 2), Brownian("euler", 1 / 2, gradient="adjoint")], ids=str)
def test_batch_statistics_have_two_derivatives_only(solver):
    """torch says so in the middle of a backward pass; here it is known before the solve."""
    (layer,) = normed_layers(1)
    flow = Flow(StochasticDepth(layer, 0.7), solver, depth=1)
    with pytest.raises(TypeError, match=r"BatchNorm1d.*direct gradient"):
        flow(states())
    with torch.no_grad():
        flow(states())
    for other in (Brownian("euler", 1 / 2), Brownian("srk", 1 / 2)):
        gradients(flow.with_solver(other), states())
    layer.eval()
    gradients(flow, states())


@pytest.mark.parametrize("kind", ["image", "multiplicative"])
def test_the_adjoint_of_adaptive_steps(kind):
    solver = Brownian("srk", 1 / 4, rtol=1e-3, atol=1e-3)
    field = noisy(kind)
    direct = gradients(Flow(field, solver, depth=1), states())
    adjoint = gradients(Flow(field, parse(f"{solver},gradient=adjoint"), depth=1), states())
    assert distance(adjoint, direct) < 0.02


def test_a_hook_on_a_parameter_acts_once_under_the_adjoint():
    field = StochasticDepth(small_mlp(), 0.7, per="image")
    flow = Flow(field, Brownian(h=1 / 4, gradient="adjoint"), depth=1)
    expected = [2 * gradient for gradient in gradients(flow, states())[1:]]
    for parameter in field.parameters():
        parameter.register_hook(lambda gradient: 2 * gradient)
    torch.testing.assert_close(gradients(flow, states())[1:], expected)


def test_the_adjoint_refuses_what_it_would_lose():
    z, x = states().requires_grad_(), states()
    field = StochasticDepth(Function(lambda t, x: torch.tanh(x + z)), 0.7, per="image")
    with pytest.raises(TypeError, match=r"shape \(4, 3\).*would lose that gradient"):
        Flow(field, Brownian(gradient="adjoint"), depth=1)(x)
    Flow(field, Brownian(), depth=1)(x).sum().backward()
    assert z.grad is not None
    flow = Flow(StochasticDepth(small_mlp(), 0.7, per="image"), Brownian(gradient="adjoint"), depth=1)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(flow(x.requires_grad_()).sum(), x, create_graph=True)


def test_nothing_is_differentiated_that_need_not_be():
    for gradient in ("direct", "adjoint"):
        field = StochasticDepth(Function(lambda t, x: -x), 0.7, per="image")
        assert not seeded(Flow(field, Brownian("milstein", gradient=gradient), depth=1), states()).requires_grad


# Knots, and layers without noise
def layered():
    """Two layers with noise and one without between them."""
    first, plain, last = tanh_layers(3, 3, gain=2.0).layers
    return PiecewiseConstant([StochasticDepth(first, 0.6, per="image"), plain, StochasticDepth(last, 0.8, per="image")])


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_layers_are_solved_one_by_one_on_one_path(method):
    field = layered()
    y = seeded(Flow(field, Brownian(method, 1 / 2), depth=3), states())
    torch.manual_seed(0)
    solve = Solve(Rule(method, 1 / 2, None, None), field, states(), 0.0, 3.0)
    x = solve.y
    for k, layer in enumerate(field.layers):
        solve.equation.field = layer
        x = solve.forth(x, [k, k + 0.5, k + 1])
    assert torch.equal(x, y)


@pytest.mark.parametrize("options", [{}, {"rtol": 1e-2, "atol": 1e-2}], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
def test_no_layer_is_read_beyond_its_knots(options, gradient):
    watched = [Watched(layer) for layer in tanh_layers(3, 3).layers]
    field = PiecewiseConstant(StochasticDepth(layer, 0.6, per="image") for layer in watched)
    y = seeded(Flow(field, Brownian("srk", 1 / 2, gradient=gradient, **options), depth=3), states())
    y.sum().backward()
    for k, layer in enumerate(watched):
        assert k <= min(layer.depths)
        assert max(layer.depths) <= k + 1
        assert all(depth not in (1.0, 2.0) for depth in layer.depths)


def test_steps_over_several_layers():
    """As the fixed steps of the scheme do, a step of two layers reads the first."""
    field = PiecewiseConstant(StochasticDepth(layer, 0.6) for layer in tanh_layers(4, 3).layers)
    flow = Flow(field, Brownian(h=2), depth=4)
    x = states()
    y = seeded(flow, x)
    path = same_path((1, 1), 4.0, dt=2)
    for t in (0.0, 2.0):
        moved, noise = field.at(t).terms(t, x)
        x = x + 2 * moved + noise * path(t, t + 2)
    torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-12)
    # The way back reads another one; every layer has its gradient, be it zero.
    assert len(gradients(flow.with_solver(Brownian(h=2, gradient="adjoint")), states())) == 9


# Evaluation mode


@pytest.mark.parametrize(("solver", "plain"), DRIFTS, ids=str)
@pytest.mark.parametrize("make", [layered, lambda: noisy("momentum")], ids=["layers", "momentum"])
def test_evaluation_is_the_drift(solver, plain, make):
    flow = Flow(make(), solver, depth=3).eval()
    assert str(flow.drift().solver) == str(solver.without_noise()) == plain
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert torch.equal(flow(states()), flow.drift()(states()))
    assert torch.equal(torch.get_rng_state(), before)
    assert flow.cost.evaluations > 0


def test_a_layer_in_evaluation_mode_has_no_noise():
    field = PiecewiseConstant(StochasticDepth(layer, 0.6) for layer in tanh_layers(2, 3).layers)
    flow = Flow(field, Brownian(h=1), depth=2)
    field.layers[0].training = False
    x = seeded(flow, states())
    path = same_path((1, 1), 2.0, dt=1)
    y = states() + field.layers[0](0.0, states())
    moved, noise = field.layers[1].terms(1.0, y)
    path(0.0, 1.0)
    torch.testing.assert_close(x, y + moved + noise * path(1.0, 2.0), rtol=1e-12, atol=1e-12)


# What is refused
@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"method": method}, "Stratonovich.*euler, milstein or srk") for method in STRATONOVICH),
        ({"method": "rk4"}, "unknown.*euler, milstein or srk"),
        ({"gradient": "reversible"}, "direct, adjoint"),
        ({"method": "srk", "rtol": 1e-3}, "both tolerances"),
        ({"method": "srk", "atol": 1e-3}, "both tolerances"),
        ({"method": "srk", "rtol": -1e-3, "atol": 1e-3}, "not negative"),
        ({"method": "srk", "rtol": 0.0, "atol": 0.0}, "not both zero"),
        ({"method": "srk", "rtol": float("nan"), "atol": 1e-3}, "not negative"),
        ({"rtol": 1e-3, "atol": 1e-3}, "milstein or srk"),
    ],
    ids=str,
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Brownian(**options)


IMAGE = noisy("image")


@pytest.mark.parametrize(
    ("field", "solver", "message"),
    [
        (small_mlp(), Brownian(), "no noise.*euler:h=1"),
        (PiecewiseConstant([small_mlp()]), Brownian("srk"), "no noise.*heun:h=1"),
        (Dropout(small_mlp(), 0.5), Brownian("milstein"), "'euler'"),
        (Dropout(small_mlp(), 0.5), Brownian("srk"), "'euler'"),
        (Dropout(small_mlp(), 0.5), Brownian(gradient="adjoint"), "direct gradient"),
        (PiecewiseConstant([IMAGE, StochasticDepth(small_mlp(), 0.5)]), Brownian(), "one kind of noise"),
        (PiecewiseConstant([StochasticDepth(small_mlp(), 0.5), Gaussian(small_mlp(), 0.5)]), Brownian(), "one kind of noise"),
    ],
)
def test_fields_that_are_refused(field, solver, message):
    with pytest.raises(TypeError, match=message):
        Flow(field, solver, depth=1)


# Failures
def poison(row=2, start=0.5):
    """A field that is not a number in one row from a depth on."""

    def value(t, x):
        bad = torch.zeros_like(x)
        bad[row] = float("nan")
        return x + bad if t >= start else x

    return Function(value)


BROKEN = {"drift": Split(poison(), small_mlp()), "diffusion": Split(small_mlp(), poison())}


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_is_named(method, name, gradient):
    with pytest.raises(SolveError, match=f"the {name} is not finite") as failure:
        seeded(Flow(BROKEN[name], Brownian(method, 1 / 4, gradient=gradient), depth=1), states())
    error = failure.value
    assert error.rows == (2,)
    assert error.step == 0.25
    # srk looks at depths within its step, and at its end.
    assert (error.depth, error.evaluations) == ((0.25, 12) if method == "srk" else (0.5, 3))


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_finite_is_named_for_adaptive_steps(name):
    with pytest.raises(SolveError, match=f"the {name} is not finite") as failure:
        seeded(Flow(BROKEN[name], Brownian("srk", 1 / 4, rtol=1e-3, atol=1e-3), depth=1), states())
    assert failure.value.rows == (2,)
    assert failure.value.depth <= 0.5 <= failure.value.depth + failure.value.step


def test_a_start_that_is_not_finite():
    x = states()
    x[1, 1] = float("inf")
    with pytest.raises(SolveError, match="the state is not finite at depth 0 with step 0 after 0") as failure:
        seeded(Flow(noisy("image"), Brownian(h=1 / 4), depth=1), x)
    assert failure.value.rows == (1,)


def test_steps_that_grow_too_small():
    rough = Function(lambda t, x: torch.where((1e7 * x).sin() > 0, 5.0, -5.0))
    with pytest.raises(SolveError, match=r"underflows.*looser"):
        seeded(Flow(Split(small_mlp(), rough), Brownian("milstein", rtol=1e-9, atol=1e-9), depth=1), states())


class Normed(nn.Module):
    """Batch normalisation; what it gives is not finite from its `limit`-th call on."""

    def __init__(self, limit):
        super().__init__()
        self.norm, self.limit, self.calls = nn.BatchNorm1d(3, dtype=FLOAT64), limit, 0

    def forward(self, x):
        self.calls += 1
        return self.norm(x) / (0.0 if self.calls >= self.limit else 1.0)


@pytest.mark.parametrize("solver", [Brownian(h=1 / 4), Brownian("srk", 1 / 4, rtol=1e-2, atol=1e-2)], ids=str)
def test_a_failure_leaves_the_statistics_and_names_the_flow(solver):
    stem = nn.BatchNorm1d(3, dtype=FLOAT64)
    flows = [Flow(StochasticDepth(Autonomous(Normed(limit)), 0.5, per="image"), solver, depth=1) for limit in (1000, 3)]
    alone = Flow(StochasticDepth(Autonomous(Normed(3)), 0.5, per="image"), solver, depth=1)
    for module, words in ((Network(stem, flows, nn.Identity()), r"in flow stages\.1"), (alone, "at depth")):
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(SolveError, match=f"not finite {words}"):
            module(states())
        torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", BROKEN)
def test_fixed_steps_of_a_scheme_say_what_was_not_finite(name):
    network = Network(nn.Identity(), [Flow(BROKEN[name], FixedStep(EulerMaruyama("brownian"), 1 / 4), depth=1)], nn.Identity())
    error = find_failure(network, states())
    assert error.reason == f"the {name} is not finite"
    assert (error.depth, error.step, error.rows, error.flow) == (0.5, 0.25, (2,), "stages.0")
    assert "drift" in str(find_failure(network.eval(), states())) or name == "diffusion"
