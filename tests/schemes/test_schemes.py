"""One step: orders, tableaus, memories, and the layers that steps read."""

import math

import pytest
import torch
import torchdiffeq
from problems import FLOAT64, LINEAR, LOGISTIC, MATRIX, OSCILLATOR, PROBLEMS, SEASONAL, Watched, states, tanh_layers

from continuum import RK4, Autonomous, Coupled, Euler, FixedStep, Flow, Midpoint, Momentum, PiecewiseConstant, SecondOrder
from continuum.fields import Function, Scaled, TwoColumns
from continuum.schemes import Coupling, Fractal, Heun, Kutta3, Leapfrog, NeumannSeries, Tableau, Verlet
from continuum.schemes.multistep import AdamsBashforth, LinearTwoStep, TwoStepMidpoint
from continuum.solvers import Embedded
from continuum.solvers.pairs import PAIRS

LOW = [Euler(), Midpoint(), Heun(), Kutta3(), RK4(), *map(AdamsBashforth, (2, 3, 4))]
LOW += [TwoStepMidpoint(), *map(NeumannSeries, (1, 2, 3))]
LOW += [Embedded(pair) for pair in PAIRS if Embedded(pair).order < 5]
HIGH = {"dopri5": (32, 64), "dopri8": (2, 4)}
PENDULUM = Coupled(Function(lambda t, v: v), Function(lambda t, q: -torch.sin(q) + 0.3 * math.cos(t)))
MULTISTEP = [AdamsBashforth(2), AdamsBashforth(4), LinearTwoStep()]
CONSTANT = PiecewiseConstant(Function(lambda t, x, v=v: torch.full_like(x, v)) for v in (1.0, 2.0, 3.0))
SOLVERS = [f"{name}:h={h}" for name in ("heun", "kutta3", "rk4") for h in ("1", "0.5", repr(1 / 3))]
BACK = pytest.mark.parametrize("back", [False, True], ids=["forth", "back"])
PRECISE = pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)


@torch.no_grad()
def measured_order(problem, field, scheme, steps, speed=1.0):
    """The slope of log error against log h at the end of depth 2, between steps of 1/m for the two m in `steps`."""
    errors = []
    for m in steps:
        end = Flow(field, FixedStep(scheme, h=1 / m), depth=2)(problem.start)
        errors.append(float((end - problem.exact(2.0, speed)).abs().max()))
    assert errors[-1] > 1e-14, "this close to rounding the slope says nothing"
    return math.log(errors[0] / errors[1]) / math.log(steps[1] / steps[0])


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("scheme", LOW, ids=repr)
def test_order(scheme, problem):
    order = measured_order(problem, problem.field, scheme, (128, 256))
    assert order == pytest.approx(scheme.order, abs=0.15)


@pytest.mark.parametrize("pair", HIGH)
def test_order_of_high_order_pairs(pair):
    """On some problems the leading error term is so small that the next one shows until rounding hides both: the slope may
    be higher there. The order is that of the worst problem."""
    scheme = Embedded(pair)
    orders = [measured_order(problem, problem.field, scheme, HIGH[pair]) for problem in PROBLEMS]
    assert min(orders) == pytest.approx(scheme.order, abs=0.15)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("k", [-0.5, -0.1, 0.0, 0.3])
def test_order_of_linear_two_step(k, problem):
    """The limit of x_{n+1} = (1 - k) x_n + k x_{n-1} + h f is (1 + k) x' = f."""
    field = Momentum(problem.field, k).double()
    order = measured_order(problem, field, LinearTwoStep(), (512, 1024), speed=1 / (1 + field.k.item()))
    assert order == pytest.approx(1, abs=0.15)


def test_linear_two_step_with_k_one_is_the_second_order_midpoint_rule():
    """The error term (1 - k) h/2 u'' vanishes for k = 1."""
    field = Momentum(OSCILLATOR.field, 1.0).double()
    assert measured_order(OSCILLATOR, field, LinearTwoStep(), (64, 128), speed=0.5) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("scheme", [Coupling(), Leapfrog(), Verlet()], ids=repr)
def test_order_of_schemes_that_move_one_half_after_the_other(scheme):
    """On a driven pendulum, so that the depths of the stages count, against a fine solution."""
    with torch.no_grad():
        limit = Flow(PENDULUM, "dopri8:rtol=1e-13,atol=1e-13", 2)(OSCILLATOR.start)
        errors = [Flow(PENDULUM, FixedStep(scheme, h=1 / m), 2)(OSCILLATOR.start) - limit for m in (128, 256)]
    order = math.log2(float(errors[0].abs().max() / errors[1].abs().max()))
    assert order == pytest.approx(scheme.order, abs=0.15)


def test_verlet_takes_the_same_way_back():
    """It is symmetric in time: a step of -h undoes a step of h."""
    flow = Flow(PENDULUM, FixedStep(Verlet(), h=1 / 8), 2)
    there = flow(OSCILLATOR.start)
    torch.testing.assert_close(flow.trajectory(there, [2, 0])[-1], OSCILLATOR.start, rtol=1e-13, atol=1e-13)


# What the schemes have in common
@pytest.mark.parametrize("terms", [1, 2, 3, 4])
def test_neumann_series_converges_to_backward_euler(terms):
    """For h f(x) = A x: the partial sums of A^j x, with a local error of O(h^(terms + 1)) against (I - A)^-1 x."""
    identity = torch.eye(3, dtype=FLOAT64)
    errors = []
    for h in (1 / 16, 1 / 32):
        step, _ = NeumannSeries(terms).step(LINEAR.field, 0.0, LINEAR.start, h, ())
        powers = [torch.linalg.matrix_power(h * MATRIX, j) for j in range(terms + 1)]
        torch.testing.assert_close(step, LINEAR.start @ sum(powers).T, rtol=1e-14, atol=1e-15)
        errors.append(float((step - LINEAR.start @ torch.linalg.inv(identity - h * MATRIX).T).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(terms + 1, abs=0.15)


@pytest.mark.parametrize("problem", PROBLEMS[1:], ids=str)
def test_a_fractal_block_with_their_coefficients_is_heuns_method_and_the_midpoint_rule(problem):
    """Heun: f1 = f, f2 = f / 2, k = 1/2. Midpoint: f1 = f / 2, f2 = f, k = 0. For fields that do not depend on depth."""
    field, x, h = problem.field, problem.start, 0.25
    if problem is SEASONAL:
        field = Autonomous(torch.nn.Softplus())
    heun, _ = Fractal().step(TwoColumns(field, Scaled(field, 0.5), k=0.5), 0.0, x, h, ())
    midpoint, _ = Fractal().step(TwoColumns(Scaled(field, 0.5), field, k=0.0), 0.0, x, h, ())
    torch.testing.assert_close(heun, Heun().step(field, 0.0, x, h, ())[0], rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(midpoint, Midpoint().step(field, 0.0, x, h, ())[0], rtol=1e-15, atol=1e-15)


def test_a_fractal_block_is_the_block_of_the_paper():
    """x+ = k1 x + k2 (k3 x + f1(x)) + f2(k3 x + f1(x)) with k1 = 1 - k, k2 = k, k3 = 1."""
    f1, f2 = tanh_layers(2).layers
    x = states(2, 4)
    inner = x + f1(0.0, x)
    expected = 0.7 * x + 0.3 * inner + f2(0.0, inner)
    torch.testing.assert_close(Fractal().step(TwoColumns(f1, f2, k=0.3), 0.0, x, 1.0, ())[0], expected)


def two_step(flow, x, before):
    with torch.no_grad():
        return flow(x, before)


def test_midpoint_leapfrog_and_momentum_are_linear_two_steps():
    layers = tanh_layers(5)
    x, before = torch.randn(2, 2, 4, dtype=FLOAT64, generator=torch.Generator().manual_seed(0))
    h, gamma = 0.3, 0.9

    # Two-step midpoint: k = 1 and 2 h F.
    ours = two_step(Flow(layers.scaled(h), FixedStep(TwoStepMidpoint()), 5), x, before)
    lm = PiecewiseConstant(Momentum(layer.scaled(2 * h), k=1).double() for layer in layers.layers)
    torch.testing.assert_close(ours, two_step(Flow(lm, "linear_two_step", 5), x, before))

    # Leapfrog: k = -1 and f = h^2 a, from the velocity x - before; the positions are the first half.
    motion = PiecewiseConstant(SecondOrder(layer.scaled(h**2)) for layer in layers.layers)
    ours = two_step(Flow(motion, FixedStep(Leapfrog()), 5), torch.cat([x, x - before], dim=1), None)[:, :4]
    lm = PiecewiseConstant(Momentum(layer.scaled(h**2), k=0) for layer in layers.layers).double()
    for layer in lm.layers:
        layer.k.data.fill_(-1)  # as a coefficient; the constructor refuses it, for (1 + k) x' = f would be no equation of x'
    torch.testing.assert_close(ours, two_step(Flow(lm, "linear_two_step", 5), x, before))

    # Momentum: k = -gamma and f = (1 - gamma) F is v+ = gamma v + (1 - gamma) F, x+ = x + v+ from v = x - before.
    lm = PiecewiseConstant(Momentum(layer.scaled(1 - gamma), k=-gamma).double() for layer in layers.layers)
    for layer in lm.layers:
        layer.k.data.fill_(-gamma)
    y, v = x, x - before
    for layer in layers.layers:
        v = gamma * v + (1 - gamma) * layer(0.0, y)
        y = y + v
    torch.testing.assert_close(two_step(Flow(lm, "linear_two_step", 5), x, before), y)


def test_every_adaptive_pair_was_measured():
    assert {scheme.method for scheme in LOW if isinstance(scheme, Embedded)} | set(HIGH) == set(PAIRS)


HEUN = {"c": (0, 1), "a": ((), (1,)), "b": (1 / 2, 1 / 2), "order": 2}


WRONG = [({"a": ((), (0.9,))}, "row 1 .* sums to 0.9"), ({"c": (0.1, 1)}, "row 0"), ({"order": 3}, "not of order 3")]
WRONG += [({"b": (0.4, 0.5)}, "condition of order 1"), ({"b": (0.4, 0.6)}, "condition of order 2")]
WRONG += [({"c": (0, 1, 1)}, "2 stages"), ({"a": ((),)}, "2 stages"), ({"a": ((), (0.5, 0.5))}, "row i with i entries")]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_tableau_refuses_wrong_coefficients(change, message):
    Tableau(**HEUN)
    with pytest.raises(ValueError, match=message):
        Tableau(**{**HEUN, **change})


@pytest.mark.parametrize("scheme", [RK4(), Kutta3(), Embedded("dopri5")], ids=repr)
def test_no_tableau_claims_less_than_its_order(scheme):
    tableau = scheme.tableau
    with pytest.raises(ValueError, match="not of order"):
        Tableau(tableau.c, tableau.a, tableau.b, order=scheme.order + 1)


@pytest.mark.parametrize("h", [0.5, -0.5])
@pytest.mark.parametrize("scheme", [Euler(), Midpoint(), Heun(), Kutta3(), RK4(), *map(Embedded, PAIRS)], ids=repr)
def test_stages_are_evaluated_at_the_depths_of_the_tableau(scheme, h):
    field = Watched(LOGISTIC.field)
    scheme.step(field, 2.0, LOGISTIC.start, h, ())
    assert field.depths == [2.0 + c * h for c in scheme.tableau.c]
    assert len(field.depths) == scheme.stages


def adams_bashforth_by_hand(field, x, steps, order):
    """Steps of size 1/4 from depth 0, started by the Runge-Kutta scheme of the same order."""
    beta = {2: [1.5, -0.5], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}[order]
    starter = {2: Heun(), 3: Kutta3(), 4: RK4()}[order]
    slopes = []
    for n in range(steps):
        slopes.insert(0, field(n / 4, x))
        if len(slopes) < order:
            x, _ = starter.step(field, n / 4, x, 0.25, ())
        else:
            x = x + 0.25 * sum(b * slope for b, slope in zip(beta, slopes, strict=False))
    return x


@pytest.mark.parametrize("order", [2, 3, 4])
def test_adams_bashforth_is_the_loop_written_by_hand(order):
    flow = Flow(SEASONAL.field, f"adams_bashforth:order={order},h=0.25", depth=2)
    expected = adams_bashforth_by_hand(SEASONAL.field, SEASONAL.start, 8, order)
    torch.testing.assert_close(flow(SEASONAL.start), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("m", [1, 2, 4, 8])
@pytest.mark.parametrize("back", [False, True])
def test_adams_bashforth_counts_its_evaluations(order, m, back):
    """In each layer: order - 1 steps of `order` stages (RK4 has 4, Kutta3 3, Heun 2), then one evaluation a step."""
    field = Watched(tanh_layers(3))
    flow = Flow(field, FixedStep(AdamsBashforth(order), h=1 / m), depth=3)
    flow.trajectory(torch.zeros(1, 4, dtype=FLOAT64), [3, 0] if back else [0, 3])
    in_a_layer = order * min(m, order - 1) + max(m - order + 1, 0)
    assert len(field.depths) == flow.cost.evaluations == 3 * in_a_layer


@pytest.mark.parametrize("order", [2, 3, 4])
def test_adams_bashforth_starts_anew_at_knots(order):
    layers = tanh_layers(3)
    x = states(2, 4)
    solver = FixedStep(AdamsBashforth(order), h=1 / 8)
    expected = x
    for layer in layers.layers:
        expected = Flow(layer, solver, depth=1)(expected)
    assert torch.equal(Flow(layers, solver, depth=3)(x), expected)


def test_multistep_schemes_take_even_grids():
    assert [FixedStep(scheme, grid=(0.0, 0.5, 1.0)).scheme for scheme in MULTISTEP] == MULTISTEP


def test_linear_two_step_needs_momentum_behind_the_first_layer():
    first, second = tanh_layers(2).layers
    assert Flow(PiecewiseConstant([first, Momentum(second).double()]), "linear_two_step", depth=2)(states(1, 4)).shape == (1, 4)


@pytest.mark.parametrize("h", [1, 0.5, 0.25])
def test_linear_two_step_takes_the_state_one_layer_before(h):
    """x(t) = a + b t solves (1 + k) x' = (1 + k) b; the scheme reproduces it from any step's previous state."""
    k, slope = -0.3, torch.tensor([[2.0, -1.0]], dtype=FLOAT64)
    field = Momentum(Function(lambda t, x: (1 + k) * slope), k).double()
    x = torch.ones(1, 2, dtype=FLOAT64)
    end = Flow(field, FixedStep(LinearTwoStep(), h=h), depth=3)(x, x - slope)
    torch.testing.assert_close(end, x + 3 * slope, rtol=1e-7, atol=0)


@pytest.mark.parametrize("back", [False, True], ids=["forth", "back"])
@pytest.mark.parametrize("solver", [*SOLVERS, "dopri5:rtol=1e-10,atol=1e-10"])
@pytest.mark.parametrize("field", [CONSTANT, tanh_layers(3)], ids=["constant", "tanh"])
def test_a_stage_on_a_knot_reads_the_layer_of_its_step(field, solver, back):
    x = states(2, 4)
    expected = x
    for layer in reversed(field.layers) if back else field.layers:
        expected = Flow(layer, solver, depth=1).trajectory(expected, [1, 0] if back else [0, 1])[-1]
    end = Flow(field, solver, depth=3).trajectory(x, [3, 0] if back else [0, 3])[-1]
    tolerance = 1e-8 if solver.startswith("dopri5") else 1e-12
    torch.testing.assert_close(end, expected, rtol=tolerance, atol=tolerance)


def listed(depth):
    """Layers that write their number down whenever they are evaluated, and the list."""
    calls = []

    def layer(number):
        return Function(lambda t, x: calls.append(number) or x)

    return PiecewiseConstant(layer(k) for k in range(depth)), calls


def steps_of(depth, solver, dtype, back):
    """Which layers a flow evaluates, and its cost."""
    field, calls = listed(depth)
    flow = Flow(field, solver, depth)
    flow.trajectory(torch.zeros(1, 1, dtype=dtype), [depth, 0] if back else [0, depth])
    return calls, flow.cost


@BACK
@PRECISE
def test_every_layer_is_stepped_once_and_in_order_for_every_depth(dtype, back):
    for depth in range(1, 257):
        calls, cost = steps_of(depth, "euler", dtype, back)
        assert calls == sorted(range(depth), reverse=back)
        assert cost.accepted == cost.evaluations == depth


@pytest.mark.parametrize("m", [2, 3, 7, 10, 49, 61, 98])
@BACK
@PRECISE
def test_a_step_of_one_mth_stays_m_times_in_every_layer(dtype, back, m):
    for depth in (1, 2, 3, 12, 61, 64):
        calls, cost = steps_of(depth, FixedStep(Euler(), h=1 / m), dtype, back)
        assert calls == sorted([k for k in range(depth) for _ in range(m)], reverse=back)
        assert cost.grid[-1] == (0 if back else depth)
        assert set(map(float, range(depth + 1))) <= set(cost.grid) | {0.0, float(depth)}


@BACK
@PRECISE
def test_stages_at_the_ends_of_rounded_steps_stay_in_their_layer(dtype, back):
    """k/m + 1/m is not always the number (k + 1)/m, nor always on the knot that it stands for."""
    for m in range(1, 100):
        calls, _ = steps_of(12, FixedStep(Heun(), h=1 / m), dtype, back)
        assert calls == sorted([k for k in range(12) for _ in range(2 * m)], reverse=back)


@pytest.mark.parametrize("h", [2, 3, 4])
def test_a_step_of_several_layers_reads_the_first_of_them(h):
    assert steps_of(12, FixedStep(Euler(), h=h), torch.float32, False)[0] == list(range(0, 12, h))


@BACK
@PRECISE
def test_layers_through_torchdiffeq_on_the_integer_grid(dtype, back):
    """torchdiffeq calls the field on the knot itself: forwards that is the layer of its step. Backwards it has to be told to
    look just inside its steps, by `perturb`."""
    for depth in range(1, 257):
        field, calls = listed(depth)
        times = torch.arange(depth, -1, -1, dtype=dtype) if back else torch.arange(depth + 1, dtype=dtype)
        torchdiffeq.odeint(field, torch.zeros(1, 1, dtype=dtype), times, method="euler", options={"perturb": back})
        assert calls == sorted(range(depth), reverse=back)


def test_an_autonomous_field_is_the_same_at_every_depth():
    field, x = Autonomous(torch.nn.Tanh()), states(2, 4)
    assert torch.equal(field(0.0, x), field(7.5, x))
    assert field.knots == ()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        *((lambda terms=terms: NeumannSeries(terms), ValueError, "one term or more") for terms in (0, -1)),
        *((lambda order=order: AdamsBashforth(order), ValueError, "2, 3 or 4") for order in (0, 1, 5, 2.5)),
        (lambda: Flow(tanh_layers(2), "fractal", 2), TypeError, r"TwoColumns\(f1, f2\), not a Autonomous"),
        (lambda: TwoColumns(LINEAR.field, tanh_layers(2)), TypeError, "smooth in depth"),
        *((lambda scheme=scheme: FixedStep(scheme, grid=(0.0, 0.25, 1.0)), ValueError, "equal steps") for scheme in MULTISTEP),
        (lambda: Flow(tanh_layers(2), "linear_two_step", depth=2), TypeError, "Momentum"),
    ],
)
def test_schemes_that_cannot_be(make, error, message):
    with pytest.raises(error, match=message):
        make()
