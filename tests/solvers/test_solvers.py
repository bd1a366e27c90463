"""All steps: accuracy, gradients, costs and failures of solves, and the text of solvers."""

import contextlib
import copy
import re
from functools import partial

import pytest
import torch
from problems import FLOAT64, LINEAR, LOGISTIC, PROBLEMS, Normed, Watched, each, small_mlp, solved, states, tanh_layers
from torch import nn
from torchdiffeq._impl.odeint import SOLVERS

from continuum import RK4, Adaptive, Brownian, Euler, FixedStep, Flow, Midpoint, SolveError
from continuum.bases import Hat
from continuum.fields import Autonomous, Function, Momentum
from continuum.noise import StochasticDepth
from continuum.schemes import AdamsBashforth, Coupling, Heun, Kutta3, LinearTwoStep
from continuum.solvers import Embedded, parse
from continuum.solvers.pairs import METHODS, PAIRS, pair_of
from continuum.solvers.text import describe
from continuum.weights import Expansion, PiecewiseConstant
from continuum.zoo import odenet, preresnet

WITHIN = {"dopri5": 10, "dopri8": 10, "bosh3": 20, "adaptive_heun": 20}
TOLERANCES = {"dopri5": range(3, 10), "dopri8": range(3, 10), "bosh3": range(3, 10), "adaptive_heun": range(3, 6)}
TIMES = [0.0, 0.4, 1.1, 1.5, 2.0]
HATS = Expansion([small_mlp(4, seed=k) for k in range(3)], Hat(3, 3.0))
ALL_SOLVERS = [*PAIRS, "euler:h=0.25", "midpoint", "heun:h=0.5", "kutta3", "rk4:h=0.2", "adams_bashforth:order=3,h=0.125"]
NINE = tanh_layers(9, gain=2.0)


def tight(method="dopri5", tolerance=1e-12, **options):
    return Adaptive(method, rtol=tolerance, atol=tolerance, max_evaluations=1_000_000, **options)


# Accuracy
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize(("method", "digits"), [(method, d) for method in WITHIN for d in TOLERANCES[method]])
@torch.no_grad()
def test_error_is_a_small_multiple_of_the_tolerance(method, digits, problem):
    """At the end and at every requested time. On the way back the logistic equation makes errors grow up to 15 times."""
    tolerance = 10.0**-digits
    flow = Flow(problem.field, tight(method, tolerance), depth=2)
    exact = torch.stack([problem.exact(t, 1.0) for t in TIMES])
    bound = WITHIN[method] * tolerance * (1 + exact.abs())
    assert ((flow.trajectory(problem.start, TIMES, exact=True) - exact).abs() <= bound).all()
    assert ((flow(problem.start) - exact[-1]).abs() <= bound[-1]).all()
    back = flow.trajectory(exact[-1], TIMES[::-1], exact=True).flip(0)
    assert ((back - exact).abs() <= 2 * bound).all()


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize(("method", "digits"), [(method, d) for method in WITHIN for d in (3, 5, 7) if d in TOLERANCES[method]])
@torch.no_grad()
def test_states_between_the_steps_are_as_good_as_at_their_ends(method, digits, problem):
    """Requested times change no step, and the error between the ends of steps is at most three times that at the ends."""
    flow = Flow(problem.field, tight(method, 10.0**-digits), depth=2)
    flow(problem.start)
    grid, evaluations = list(flow.cost.grid), flow.cost.evaluations
    times = sorted({*grid, *torch.linspace(0, 2, 101).double().tolist()})
    exact = torch.stack([problem.exact(t, 1.0) for t in times])
    errors = (flow.trajectory(problem.start, times) - exact).abs() / (1 + exact.abs())
    at_ends = errors[[times.index(t) for t in grid]].max()
    assert errors.max() <= max(3 * at_ends, 10.0**-digits)
    if method == "dopri8":
        return  # no polynomial is as good as its steps, which end at the times therefore
    assert list(flow.cost.grid) == grid
    assert flow.cost.evaluations <= evaluations + 2 * flow.cost.accepted


def test_fehlberg2_runs():
    """Its error estimate promises too much, so that no tolerance is held; it converges all the same."""
    errors = []
    for tolerance in (1e-3, 1e-5, 1e-7):
        with torch.no_grad():
            end = Flow(LOGISTIC.field, tight("fehlberg2", tolerance), depth=2)(LOGISTIC.start)
        errors.append(float((end - LOGISTIC.exact(2.0, 1.0)).abs().max()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3


def test_methods_are_those_of_the_installed_torchdiffeq():
    fixed = {"euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams", "fixed_adams"}
    known = {"dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2", "scipy_solver", "tsit5"}
    assert set(METHODS) & (fixed | known) == set(SOLVERS) & known
    for method in METHODS:
        assert str(Adaptive(method)).startswith(method)


def test_scipy_goes_forward_only():
    field = small_mlp()
    flow = Flow(field, Adaptive("scipy_solver", rtol=1e-8, atol=1e-8), depth=1)
    with pytest.raises(RuntimeError, match="forward only"):
        flow(states())
    with torch.no_grad():
        torch.testing.assert_close(flow(states()), flow.with_solver(tight())(states()), rtol=1e-6, atol=1e-6)
    assert flow.cost.evaluations > 0
    with pytest.raises(ValueError, match="forward only"):
        Adaptive("scipy_solver", gradient="adjoint")


# Gradients


@pytest.mark.parametrize("method", PAIRS)
@pytest.mark.parametrize("options", [{}, {"first_step": 0.5}], ids=["own first step", "given first step"])
def test_step_sizes_are_constants_of_the_gradient(method, options):
    """For y' = -y every step multiplies y by a number, so dy1/dy0 = y1/y0 unless the gradient runs through the numbers."""
    flow = Flow(Function(lambda t, x: -x), Adaptive(method, rtol=1e-3, atol=1e-6, **options), depth=2)
    y0 = torch.tensor([[1.7]], dtype=FLOAT64, requires_grad=True)
    y1 = flow(y0)
    (gradient,) = torch.autograd.grad(y1, y0)
    torch.testing.assert_close(gradient, (y1 / y0).detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-7])
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
@pytest.mark.parametrize("field", [small_mlp(4), tanh_layers(3), HATS], ids=["mlp", "layers", "hats"])
def test_adjoint_agrees_with_direct_to_the_tolerance(field, method, tolerance):
    solvers = (tight(method, tolerance, gradient=gradient) for gradient in ("direct", "adjoint"))
    direct, adjoint = (solved(Flow(field, solver, depth=3), states(4, 4)) for solver in solvers)
    torch.testing.assert_close(direct.pop("end"), adjoint.pop("end"), rtol=0, atol=20 * tolerance)
    size = max(float(gradient.abs().max()) for gradient in direct.values())
    torch.testing.assert_close(direct, adjoint, rtol=0, atol=20 * tolerance * (1 + size))


# Frozen steps and their cost
@pytest.mark.parametrize("method", PAIRS)
def test_frozen_flow_repeats_the_accepted_steps(method):
    tolerance = 1e-4
    x = states(4, 4)
    for field, depth in [(small_mlp(4), 2), (tanh_layers(3, gain=2.0), 3)]:
        flow = Flow(field, Adaptive(method, rtol=tolerance, atol=tolerance), depth)
        frozen = flow.frozen(x)
        with torch.no_grad():
            first, second = flow(x), frozen(x)
        assert frozen.cost.grid == flow.cost.grid
        assert frozen.field is flow.field
        bound = 1e-12 if method in ("dopri5", "dopri8", "bosh3") else 10 * tolerance
        torch.testing.assert_close(second, first, rtol=bound, atol=bound)


@pytest.mark.parametrize("solver", [*ALL_SOLVERS, "scipy_solver", "dopri5:h=0.5", "bosh3:grid=0/0.3/1/2.5/3"])
@pytest.mark.parametrize("make", [lambda: small_mlp(4), lambda: tanh_layers(3, gain=2.0)], ids=["mlp", "layers"])
@torch.no_grad()
def test_cost_counts_what_the_field_saw(make, solver):
    field = Watched(make())
    flow = Flow(field, solver, depth=3)
    flow(states(4, 4))
    assert flow.cost.evaluations == len(field.depths)
    assert flow.cost.accepted == len(flow.cost.grid) - 1
    assert flow.cost.rejected >= 0
    assert flow.cost.grid[0] == 0
    assert flow.cost.grid[-1] == 3
    assert list(flow.cost.grid) == sorted(set(flow.cost.grid))
    if solver not in ("bosh3:grid=0/0.3/1/2.5/3",):
        assert set(field.knots) <= set(flow.cost.grid)


@pytest.mark.parametrize("method", PAIRS)
@torch.no_grad()
def test_rejected_steps_are_counted(method):
    """A first step far too large for x' = -50 (x - cos t) is rejected, and each attempt costs its stages."""
    field = Watched(Function(lambda t, x: -50 * (x - torch.as_tensor(t, dtype=FLOAT64).cos())))
    x = torch.zeros(1, 1, dtype=FLOAT64)
    flow = Flow(field, Adaptive(method, rtol=1e-4, atol=1e-4, first_step=1.0), depth=1)
    y = flow(x)
    assert flow.cost.rejected >= 1
    stages = len(SOLVERS[method].tableau.beta)
    new = 0 if pair_of(method).reuses_last else flow.cost.accepted - 1  # not at the end
    assert flow.cost.evaluations == len(field.depths) == 1 + stages * (flow.cost.accepted + flow.cost.rejected) + new
    assert abs(float(y) - float(torch.tensor(1.0).cos())) < (0.1 if method == "fehlberg2" else 0.02)


@pytest.mark.parametrize("method", PAIRS)
@torch.no_grad()
def test_choosing_the_first_step_costs_one_evaluation_more(method):
    """The slope at the start is used again by the first step, and that at the end of every step by the next one.

    It is the last stage of most pairs, and one evaluation more of the others.
    """
    flow = Flow(LINEAR.field, Adaptive(method, rtol=1e-4, atol=1e-4), depth=2)
    flow(LINEAR.start)
    attempts = flow.cost.accepted + flow.cost.rejected
    new = 0 if pair_of(method).reuses_last else flow.cost.accepted - 1  # not at the end
    assert flow.cost.evaluations == 2 + len(SOLVERS[method].tableau.beta) * attempts + new


@torch.no_grad()
def test_the_grid_ends_exactly_on_knots_and_depth():
    """However the last step is rounded: a frozen flow needs its grid to hold them."""
    field, x = PiecewiseConstant(Function(lambda t, x: torch.ones_like(x)) for _ in range(3)), torch.zeros(1, 1)
    for k in range(1, 100):
        flow = Flow(field, Adaptive("bosh3", first_step=k / 201), depth=3)
        flow(x)
        assert {0.0, 1.0, 2.0, 3.0} <= set(flow.cost.grid)
        flow.trajectory(x, [3, 0])
        assert {0.0, 1.0, 2.0, 3.0} <= set(flow.cost.grid)


@torch.no_grad()
def test_the_field_is_never_evaluated_outside_the_flow():
    for method in PAIRS:
        field = Watched(small_mlp())
        Flow(field, Adaptive(method, rtol=1e-3, atol=1e-3), depth=1)(states())
        assert min(field.depths) >= 0
        assert max(field.depths) <= 1, method


# Knots


@torch.no_grad()
def layer_by_layer(x):
    for layer in NINE.layers:
        x = Flow(layer, tight(), depth=1)(x)
    return x


@torch.no_grad()
def solve_nine(field, tolerance, **options):
    x = states(4, 4)
    flow = Flow(field, Adaptive("dopri5", rtol=tolerance, atol=tolerance, **options), depth=9)
    error = float((flow(x) - layer_by_layer(x)).abs().max())
    return error, flow.cost


def test_known_knots_save_evaluations_and_give_accuracy():
    assert solve_nine(NINE, 1e-5)[1].evaluations < solve_nine(Function(NINE), 1e-5)[1].evaluations
    known, unknown = (solve_nine(field, 1e-3)[0] for field in (NINE, Function(NINE)))
    assert known < unknown / 10
    assert known < 1e-2


def test_steps_that_land_on_knots_do_no_harm():
    error, cost = solve_nine(NINE, 1e-6, first_step=1.0)
    usual_error, usual_cost = solve_nine(NINE, 1e-6)
    assert cost.evaluations <= 1.5 * usual_cost.evaluations
    assert error <= max(10 * usual_error, 1e-5)


# Failures
def poisoned(rows, total=6):
    x = states(total, 3)
    for row in rows:
        x[row, 1] = torch.nan
    return x


@pytest.mark.parametrize("rows", [(0,), (1, 4), (5,)])
@pytest.mark.parametrize("method", PAIRS)
@pytest.mark.parametrize("options", [{}, {"first_step": 0.1}, {"gradient": "adjoint"}], ids=str)
def test_nan_in_the_state_names_the_rows(method, options, rows):
    with pytest.raises(SolveError) as caught:
        Flow(small_mlp(), Adaptive(method, **options), depth=1)(poisoned(rows))
    error = caught.value
    assert error.rows == rows
    assert error.depth == 0
    assert 1 <= error.evaluations <= 20
    text = str(error)
    assert "\n" not in text
    for part in ("at depth 0", "with step", f"after {error.evaluations} evaluations", ", ".join(map(str, rows)), method):
        assert part in text


@pytest.mark.parametrize("method", PAIRS)
@pytest.mark.parametrize("options", [{}, {"first_step": 0.1}], ids=str)
def test_nan_weights_put_every_row_at_fault(method, options):
    field = small_mlp()
    with torch.no_grad():
        field.outer.weight[0, 0] = torch.nan
    with pytest.raises(SolveError) as caught:
        Flow(field, Adaptive(method, **options), depth=1)(states(3, 3))
    assert caught.value.rows == (0, 1, 2)


@pytest.mark.parametrize("method", PAIRS)
def test_a_blow_up_on_the_way_names_depth_and_row(method):
    """x' = x^2 from 1 reaches infinity at depth 1; from -1 it goes on forever."""
    x = torch.tensor([[-1.0], [1.0], [-0.5]], dtype=FLOAT64)
    with pytest.raises(SolveError) as caught:
        Flow(Function(lambda t, x: x**2), Adaptive(method, rtol=1e-3, atol=1e-3), depth=2)(x)
    assert caught.value.depth == pytest.approx(1, abs=0.2 if method == "fehlberg2" else 0.01)
    assert caught.value.evaluations > 10
    assert set(caught.value.rows) <= {1}


@pytest.mark.parametrize("budget", [1, 2, 20, 50])
@pytest.mark.parametrize("method", PAIRS)
def test_budget(method, budget):
    field = Watched(LINEAR.field)
    with pytest.raises(SolveError, match="budget") as caught:
        Flow(field, Adaptive(method, rtol=1e-9, atol=1e-9, max_evaluations=budget), depth=20)(LINEAR.start)
    assert len(field.depths) == caught.value.evaluations == budget
    assert caught.value.rows == ()
    assert caught.value.step > 0 or budget < 3, "once steps are taken, the error names their size"
    assert "looser tolerance" in str(caught.value)


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
def test_batch_statistics_survive_a_failed_solve(gradient):
    torch.manual_seed(0)
    flow = Flow(Normed(), Adaptive("dopri5", 1e-9, 1e-9, gradient=gradient, max_evaluations=20), depth=30)
    before = copy.deepcopy(dict(flow.named_buffers()))
    with pytest.raises(SolveError):
        flow(states(8, 3))
    for name, buffer in flow.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_a_network_names_the_stage_and_keeps_its_statistics():
    torch.manual_seed(0)
    network = preresnet(14, width=4, solver="dopri5:rtol=1e-3,atol=1e-3").train()
    with torch.no_grad():
        network.stages[2].field.layers[0].module.conv1.weight[0, 0, 0, 0] = torch.nan
    before = copy.deepcopy(dict(network.named_buffers()))
    with pytest.raises(SolveError) as caught:
        network(torch.randn(2, 3, 8, 8))
    assert caught.value.flow == "stages.2"
    assert "in flow stages.2" in str(caught.value)
    assert "BatchNorm" not in str(caught.value)
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_a_network_names_the_images_at_fault():
    torch.manual_seed(0)
    network = odenet(width=8, downsample=False)
    images = torch.randn(4, 1, 8, 8)
    images[2, 0, 3, 3] = torch.inf
    with pytest.raises(SolveError) as caught:
        network(images)
    assert (caught.value.flow, caught.value.rows) == ("stages.0", (2,))


# Wrong arguments


@pytest.mark.parametrize(
    ("text", "listed"),
    [
        ("dopri6", [*PAIRS, "euler", "adams_bashforth"]),
        ("brown", ["brownian"]),
        ("RK4", ["rk4"]),
        ("", ["euler", "dopri5"]),
        ("dopri5:rtoll=1e-3", ["rtoll", "rtol", "atol", "first_step"]),
        ("euler:rtol=1e-3", ["rtol", "h", "grid"]),
        ("rk4:order=3", ["order", "h"]),
        ("euler:h", ["h", "key=value"]),
        ("euler:h=", ["key=value"]),
        ("euler:h=half", ["half"]),
        ("dopri5:max_evaluations=1.5", ["1.5"]),
        ("dopri5:gradient=adjont", ["adjont", "direct", "adjoint"]),
        ("adams_bashforth:order=7", ["2, 3 or 4", "7"]),
        ("dopri5:h=0.5,rtol=1e-3", ["rtol", "h"]),
        ("bosh3:rtol=-1", ["-1"]),
        ("euler:h=0.3", ["0.3"]),
        ("euler:grid=0/1/1", ["monotone"]),
        ("rk4:every=4", ["every=4"]),
        ("rk4:gradient=checkpoint,every=some", ["invalid literal"]),
        ("rk4:gradient=reversible", ["in 'rk4:gradient=reversible'", "undo"]),
        ("brownian:grid=0/1", ["unknown option grid", "method, h, rtol, atol, max_evaluations, gradient"]),
        ("brownian:method=heun", ["Stratonovich"]),
        ("brownian:h=much", ["could not convert"]),
    ],
)
def test_wrong_text_is_answered_with_what_is_valid(text, listed):
    with pytest.raises(ValueError, match=r"\w") as caught:
        parse(text)
    for word in listed:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


NAN = float("nan")


LIMITS = [{"rtol": -1.0}, {"rtol": 0.0, "atol": 0.0}, {"min_step": 2.0, "max_step": 1.0}, {"max_step": 0.0}]
LIMITS += [{"first_step": 0.0}, {"first_step": -1.0}, {"max_evaluations": 0}, {"gradient": "backward"}, {"rtol": NAN}]
FIXED = ["euler", "rk4:h=0.5", "bosh3:grid=0/0.5/1"]
EVERY = ["2", 0, -1, 1.5, True]
UNEVEN = [(2, 3), (4, 6), (1, 1.5), (0.5, 0.7), (3, 1)]
GRIDS, RAW = [(0.0,), (), (0.0, 1.0, 1.0), (0.0, 2.0, 1.0)], nn.Parameter(torch.tensor(0.3))
DEPTHS = [0, -1, NAN, torch.tensor(-1.0), torch.tensor([1.0]), nn.Parameter(torch.tensor(0.0))]
NO_FIELD = r"forward\(t, x\), not a .*Autonomous\(module\).*Function\(function\)"


def off_the_grid(solver, times):
    return Flow(small_mlp(), solver, depth=1).trajectory(states(), times, exact=True)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        *((partial(Adaptive, **options), ValueError, re.escape(str(next(iter(options.values()))))) for options in LIMITS),
        (lambda: Adaptive("dopri7"), ValueError, "dopri5, bosh3"),
        *each([name for name in SOLVERS if name not in METHODS], Adaptive, ValueError, "FixedStep"),
        *each([0, -1, 0.3, 1.5, 2.5, NAN, float("inf")], lambda h: FixedStep(Euler(), h=h), ValueError, "1/m or an integer"),
        *each([0, -1, 0.3, 1.5, 2.5, NAN, float("inf")], lambda h: Brownian(h=h), ValueError, "1/m or an integer"),
        *each(GRIDS, lambda grid: FixedStep(Euler(), grid=grid), ValueError, "monotone"),
        (lambda: FixedStep(Euler(), h=0.5, grid=(0.0, 1.0)), ValueError, "not both"),
        (lambda: FixedStep("euler"), TypeError, "Scheme"),
        (lambda: FixedStep(Euler(), gradient="adjoint"), ValueError, "direct, reversible, checkpoint, not 'adjoint'"),
        (lambda: FixedStep(Coupling(), gradient="adjoint"), ValueError, "direct, reversible"),
        (lambda: FixedStep(Euler(), gradient="reversible"), TypeError, "Euler cannot"),
        (lambda: FixedStep(Euler(), every=2), ValueError, "every=2 says which states .*'checkpoint' stores; gradient='direct'"),
        (lambda: FixedStep(Coupling(), gradient="reversible", every=2), ValueError, r"every=2 .* gradient='reversible'"),
        *each(EVERY, lambda n: FixedStep(Euler(), gradient="checkpoint", every=n), ValueError, "every counts the steps .* not"),
        *each([nn.Linear(2, 2), lambda t, x: x], lambda wrong: Flow(wrong, "euler", 1), TypeError, NO_FIELD),
        (lambda: Flow(small_mlp(), Euler(), depth=1), TypeError, "Solver"),
        *each(DEPTHS, partial(Flow, small_mlp(), "dopri5"), ValueError, r"depth is (one number|a positive number)"),
        (lambda: Flow(small_mlp(), "dopri5", nn.functional.softplus(RAW)), TypeError, "learnt.*register_parametrization"),
        *each(FIXED, lambda solver: Flow(small_mlp(), solver, RAW), TypeError, "adaptive solver"),
        *each(FIXED, Flow(small_mlp(), "dopri5", RAW).with_solver, TypeError, "adaptive solver"),
        *each(UNEVEN, lambda case: Flow(small_mlp(), FixedStep(Euler(), h=case[0]), case[1]), ValueError, "does not divide"),
        (lambda: Flow(small_mlp(), FixedStep(Euler(), grid=(0.0, 1.0)), depth=2), ValueError, "no point at depth 2"),
        (lambda: Flow(small_mlp(), "rk4", depth=1).frozen(states()), TypeError, "only an adaptive flow"),
        (lambda: Flow(small_mlp(), Adaptive("scipy_solver"), depth=1).frozen(states()), TypeError, "scipy_solver"),
        (lambda: off_the_grid("euler:h=0.5", [0, 0.3]), ValueError, "does not divide"),
        (lambda: off_the_grid("euler:grid=0/0.3/1", [0, 0.5, 1]), ValueError, r"no point at depth 0\.5"),
        (lambda: Flow(StochasticDepth(small_mlp(), 0.5), "brownian:h=2", depth=3)(states()), ValueError, "does not divide"),
    ],
)
def test_what_has_no_meaning_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Text
TEXTS = ["euler", "midpoint:h=0.5", "heun:h=2", "kutta3:h=0.3333333333333333", "rk4:grid=0/0.5/1", "adams_bashforth"]
TEXTS += ["adams_bashforth:order=4,h=0.125", "linear_two_step", "dopri5", "dopri5:rtol=1e-4,atol=1e-6,gradient=adjoint"]
TEXTS += ["bosh3:first_step=0.1,min_step=1e-9,max_step=0.5,max_evaluations=77", "scipy_solver:rtol=1e-5,atol=1e-5"]
TEXTS += [" dopri8 : rtol = 1e-4 , atol = 1e-4 ", "dopri5:h=1", "bosh3:h=0.25", "fehlberg2:grid=0/0.1/0.30000000000000004/1"]
WRITTEN = ["rk4:h=0.25,gradient=checkpoint,every=4", "rk4:h=1,gradient=checkpoint", "dopri5:h=0.5,gradient=checkpoint,every=2"]
WRITTEN += ["adams_bashforth:order=3,h=0.5,gradient=checkpoint,every=2", "euler:grid=0.0/0.5/2.0,gradient=checkpoint,every=3"]
BROWNIAN = {
    "brownian:method=euler,h=1": Brownian(),
    "brownian:method=milstein,h=0.3333333333333333": Brownian("milstein", 1 / 3),
    "brownian:method=srk,h=2,rtol=0.001,atol=0.0001": Brownian("srk", 2, rtol=1e-3, atol=1e-4),
    "brownian:method=euler,h=0.125,gradient=adjoint": Brownian("euler", 1 / 8, gradient="adjoint"),
}
OBJECTS = [
    FixedStep(Euler()),
    FixedStep(LinearTwoStep(), h=1 / 3),
    FixedStep(RK4(), h=4),
    FixedStep(Heun(), grid=(0.0, 0.1, 1 / 3, 1.0)),
    FixedStep(Kutta3(), grid=(2.0, 1.0, 0.0)),
    FixedStep(AdamsBashforth(3), h=1 / 7),
    FixedStep(Midpoint(), h=1 / 49),
    *(FixedStep(Embedded(pair)) for pair in PAIRS),
    *(Adaptive(method, rtol=1 / 3, atol=1e-30) for method in METHODS),
    Adaptive("dopri5", gradient="adjoint", first_step=1 / 3, max_evaluations=1),
]


@pytest.mark.parametrize("solver", [*TEXTS, *WRITTEN, *OBJECTS, *BROWNIAN.values()], ids=str)
def test_text_parses_back_to_an_equal_solver(solver):
    solver = parse(solver) if isinstance(solver, str) else solver
    again = parse(str(solver))
    assert (again, hash(again), str(again)) == (solver, hash(solver), str(solver))


def test_text_is_written_as_it_was_read():
    assert [str(parse(text)) for text in WRITTEN] == WRITTEN
    assert {describe(solver): solver for solver in BROWNIAN.values()} == BROWNIAN
    assert {text: parse(text) for text in BROWNIAN} == BROWNIAN
    assert parse("brownian") == Brownian()


def test_a_scheme_from_outside_has_no_text():
    class Mine(Euler):
        pass

    solver = FixedStep(Mine())
    with pytest.raises(TypeError, match="no textual form"):
        describe(solver)
    flow = Flow(small_mlp(), solver, depth=1)
    assert "Mine" in repr(solver)
    assert all("mine" in text for text in (str(solver), repr(flow))), "printing never fails"
    with pytest.raises(TypeError, match="only an adaptive flow"):
        flow.frozen(states())


# Trajectories
@pytest.mark.parametrize("solver", [*ALL_SOLVERS, "dopri5:gradient=adjoint"])
@torch.no_grad()
def test_trajectory_begins_with_the_state_and_ends_as_forward(solver):
    field, x = tanh_layers(3), states(4, 4)
    flow = Flow(field, solver, depth=3)
    path = flow.trajectory(x, [0, 1, 2, 3])
    assert path.shape == (4, *x.shape)
    assert torch.equal(path[0], x)
    torch.testing.assert_close(path[-1], flow(x), rtol=1e-12, atol=1e-12)
    for k in range(1, 3):
        shorter = Flow(PiecewiseConstant(list(field.layers)[:k]), solver, depth=k)
        torch.testing.assert_close(path[k], shorter(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
@pytest.mark.parametrize("field", [small_mlp(4), tanh_layers(4)], ids=["mlp", "layers"])
@torch.no_grad()
def test_the_way_back_undoes_the_way_there(field, method):
    x = states(4, 4)
    flow = Flow(field, tight(method, 1e-8), depth=4)
    back = flow.trajectory(flow(x), [4, 2.5, 0])
    torch.testing.assert_close(back[-1], x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back[1], flow.trajectory(x, [0, 2.5])[-1], rtol=1e-5, atol=1e-5)
    assert flow.cost.grid[0] == 0


# Sharing weights
@pytest.mark.parametrize("trains", [True, False], ids=["training", "fine-tuning"])
@pytest.mark.parametrize("rows", [(), (1,)], ids=["solved", "failed"])
def test_freezing_leaves_the_flow_as_it_was_even_if_it_fails(rows, trains):
    """Also in training mode with a normalisation that keeps its statistics, as for fine-tuning."""
    flow = Flow(Normed(), "dopri5", depth=1)
    flow.field.norm.train(trains)
    with pytest.raises(SolveError) if rows else contextlib.nullcontext():
        assert flow.frozen(poisoned(rows)).training
    assert (flow.training, flow.field.training, flow.field.norm.training) == (True, True, trains)
    assert flow.field.norm.num_batches_tracked == 0


@pytest.mark.parametrize("training", [True, False])
def test_with_solver_shares_weights_and_modes(training):
    flow = Flow(Momentum(Normed(), -0.1).double(), "linear_two_step", depth=2).train(training)
    flow.field.field.norm.eval()
    other = flow.with_solver("dopri5")
    assert other.field is flow.field
    assert (other.training, other.field.training, other.field.field.norm.training) == (training, training, False)
    assert other.state_dict().keys() == flow.state_dict().keys()


def made(solver, field):
    """The flow, whose noise is that of each image."""
    return Flow(StochasticDepth(field, 0.5, per="image") if solver == "brownian" else field, solver, depth=2)


@pytest.mark.parametrize(
    "solver", ["euler", "rk4:h=0.5", "adams_bashforth:h=0.5", "dopri5", "dopri5:gradient=adjoint", "brownian"]
)
def test_a_field_of_another_shape_is_refused(solver):
    """(4, 1) would broadcast against (4, 3) without a word."""
    with pytest.raises(ValueError, match=r"returned shape \(4, 1\) for a state of shape \(4, 3\)"):
        made(solver, Autonomous(nn.Linear(3, 1)))(torch.zeros(4, 3))


@pytest.mark.parametrize("solver", ["rk4:h=0.5", "dopri5", "dopri5:gradient=adjoint", "brownian"])
def test_an_empty_batch(solver):
    flow, x = made(solver, small_mlp()), states(0, 3).requires_grad_()
    y = flow(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert (flow.cost.grid[0], flow.cost.grid[-1]) == (0, 2)
