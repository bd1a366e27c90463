"""Attempted steps as one compiled function: the numbers, steps and errors of the eager ones, and few graphs."""

import copy
import math
import warnings

import pytest
import torch
from problems import FLOAT64, small_mlp, solved, states, tanh_layers
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, vmap

from continuum import Autonomous, Flow, PiecewiseConstant, SolveError
from continuum.fields import Field, Function, PreActivation

POINTS = states(5, 4)
PASSES = pytest.mark.parametrize("gradient", ["direct", "checkpoint"])


@pytest.fixture(autouse=True)
def no_doubts():
    """A warning says that an attempt is not compiled as a whole."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="an attempted step")
        yield


def twins(field, solver, depth=2):
    """A flow and its compiled copy."""
    flow = Flow(field, solver, depth)
    compiled = copy.deepcopy(flow)
    compiled.compile()
    return flow, compiled


def assert_same(flow, compiled, solve=lambda flow: solved(flow, POINTS)):
    """The same numbers, by the same steps, both to rounding."""
    torch.testing.assert_close(solve(compiled), solve(flow), rtol=1e-10, atol=1e-10)
    for name in ("evaluations", "accepted", "rejected"):
        assert getattr(compiled.cost, name) == getattr(flow.cost, name)
    for name in ("grid", "error_ratios"):
        found, expected = (torch.tensor(getattr(cost, name)) for cost in (compiled.cost, flow.cost))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


CASES = {
    "mlp": (small_mlp, "dopri5:rtol=1e-4,atol=1e-4"),
    "rejections": (small_mlp, "dopri5:rtol=1e-5,atol=1e-5,first_step=2"),
    "checkpoints": (small_mlp, "bosh3:rtol=1e-4,atol=1e-4,gradient=checkpoint"),
    "some checkpoints": (small_mlp, "dopri5:rtol=1e-6,atol=1e-6,first_step=1,gradient=checkpoint,every=3"),
    "layers": (lambda features, _: tanh_layers(2, features, gain=2.0), "bosh3:rtol=1e-3,atol=1e-3"),
    "depth": (lambda *_: Function(lambda t, x: t.cos() * x), "dopri5:rtol=1e-4,atol=1e-4,norm=sample"),
    "all ranks": (small_mlp, "bosh3:norm=global"),
    "a slope more": (small_mlp, "fehlberg2:rtol=1e-3,atol=1e-3"),
}


@pytest.mark.parametrize("case", CASES)
def test_numbers_and_steps_are_the_eager_ones(graphs, case):
    make, solver = CASES[case]
    flow, compiled = twins(make(4, 5), solver)
    for _ in range(2):
        assert_same(flow, compiled)
    assert 1 <= graphs.frame_count <= 2, "one graph, and one of attempts whose last slope nothing uses"
    if case == "rejections":
        assert flow.cost.rejected


@pytest.mark.parametrize("backward", [False, True])
def test_depth_goes_both_ways_and_states_are_read_off(graphs, backward):
    times, x = torch.linspace(0, 2, 7, dtype=FLOAT64), POINTS.clone().requires_grad_()
    flow, compiled = twins(tanh_layers(2, gain=2.0), "dopri5:rtol=1e-3,atol=1e-3")
    for exact in (False, True):
        assert_same(flow, compiled, lambda flow: flow.trajectory(x, times.flip(0) if backward else times, exact))  # noqa: B023
    assert graphs.frame_count <= 3


def test_another_solve_compiles_nothing(graphs):
    flow, compiled = twins(small_mlp(4, 5), "dopri5:rtol=1e-3,atol=1e-3")
    assert_same(flow, compiled)
    count = graphs.frame_count
    for solver, depth in [
        ("dopri5:rtol=1e-6,atol=1e-5", 2),
        ("dopri5:first_step=0.3", 1.5),
        ("dopri5:gradient=checkpoint", 0.7),
    ]:
        for other in (flow, compiled):
            other.solver, other.end = flow.with_solver(solver).solver, depth
        assert_same(flow, compiled, lambda flow: solved(flow, 2 * POINTS))
    assert graphs.frame_count == count


def test_layers_of_one_kind_share_a_graph(graphs):
    counts = []
    for layers in (1, 9):
        before = graphs.frame_count
        assert_same(*twins(tanh_layers(layers, gain=2.0), "bosh3:rtol=1e-3,atol=1e-3", layers))
        counts.append(graphs.frame_count - before)
    # The state that enters the second layer has a gradient of its own, as the first one here.
    assert counts[0] == counts[1]


def test_flows_are_counted_alone(graphs):
    """torch gives up on the ninth graph of one function."""
    for features in range(1, 6):
        flow, compiled = twins(small_mlp(features, 3), "bosh3:rtol=1e-4,atol=1e-4")
        assert_same(flow, compiled, lambda flow: solved(flow, states(2, features)))  # noqa: B023
    assert graphs.frame_count == 10


@PASSES
# A backend that decides, as inductor does, what is stored.
@pytest.mark.parametrize("graphs", ["aot_eager"], indirect=True)
def test_batch_statistics_move_as_in_eager_mode(graphs, gradient):
    torch.manual_seed(0)
    field = PiecewiseConstant([Autonomous(PreActivation(3, 3)).scaled(0.3) for _ in range(2)]).double()
    flow, compiled = twins(field, f"bosh3:gradient={gradient},first_step=1")
    for _ in range(2):
        assert_same(flow, compiled, lambda flow: solved(flow, states(4, 3, 5, 5)))
    torch.testing.assert_close(compiled.state_dict(), flow.state_dict(), rtol=1e-10, atol=1e-10)
    assert graphs.frame_count


class Rotation(Field):
    """A field of tuples."""

    def forward(self, t, x):
        return t * x[1], -x[0]


@PASSES
def test_tuples_of_states(graphs, gradient):
    flow, compiled = twins(Rotation(), f"dopri5:rtol=1e-4,atol=1e-4,gradient={gradient}")
    for _ in range(3):
        x = tuple(states(3, 2, seed=seed).requires_grad_() for seed in (0, 1))
        assert_same(flow, compiled, lambda flow: torch.autograd.grad(sum(end.square().sum() for end in flow(x)), x))  # noqa: B023
    assert 1 <= graphs.frame_count <= 2


def test_weights_put_in_the_place_of_a_fields_own(graphs):
    flow, compiled = twins(small_mlp(4, 5), "dopri5:rtol=1e-3,atol=1e-3")
    flow(POINTS), compiled(POINTS)
    other = {name: (2 * p.detach()).requires_grad_() for name, p in flow.named_parameters()}

    def solve(flow):
        end = functional_call(flow, {name: p * p for name, p in other.items()}, (POINTS,))
        return end, torch.autograd.grad(end.sum(), list(other.values()))

    assert_same(flow, compiled, solve)
    assert graphs.frame_count


def test_where_autograd_goes_forward_attempts_are_as_written(graphs):
    flow, compiled = twins(small_mlp(4, 5), "dopri5:rtol=1e-3,atol=1e-3")

    def tangent(flow):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(flow(forward_ad.make_dual(POINTS, torch.ones_like(POINTS)))).tangent

    assert_same(flow, compiled, tangent)
    assert_same(flow, compiled, lambda flow: vmap(flow)(POINTS[None]))
    assert graphs.frame_count == 0
    assert_same(flow, compiled, torch.inference_mode()(lambda flow: flow(POINTS)))
    assert graphs.frame_count


def test_a_copy_is_not_compiled(graphs):
    _, compiled = twins(small_mlp(4, 5), "dopri5")
    copy.deepcopy(compiled)(POINTS)
    assert graphs.frame_count == 0


# What is not one graph
class Number(Field):
    """Reads the depth as a number."""

    takes_number = True

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4, dtype=FLOAT64)

    def forward(self, t, x):
        return math.cos(t) * self.inner(x).tanh()


class Energy(Number):
    """Differentiates inside."""

    def forward(self, t, x):
        with torch.enable_grad():
            y = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(self.inner(y).tanh().sum(), y, create_graph=True)[0]


@PASSES
@pytest.mark.parametrize("kind", [Number, Energy])
def test_what_is_not_one_graph_says_so_once_and_is_right(graphs, kind, gradient):
    torch.manual_seed(0)
    flow, compiled = twins(kind(), f"dopri5:rtol=1e-4,atol=1e-4,gradient={gradient}")
    with pytest.warns(UserWarning, match=f"step of this {kind.__name__} is not compiled as a whole, its evaluations are"):
        assert_same(flow, compiled)
    assert_same(flow, compiled)
    assert graphs.frame_count, "the evaluations"


# Failures
def failure(flow, x):
    with pytest.raises((SolveError, TypeError, RuntimeError)) as caught:
        flow(x)
    return str(caught.value)


@pytest.mark.parametrize("budget", [1, 2, 3, 8, 9, 20])
def test_the_budget_is_spent_where_it_was(graphs, budget):
    flow, compiled = twins(tanh_layers(2), f"dopri5:rtol=1e-9,atol=1e-9,max_evaluations={budget}")
    assert failure(compiled, POINTS) == failure(flow, POINTS)
    assert bool(graphs.frame_count) == (budget >= 8)


@PASSES
def test_states_that_are_not_finite_are_named(graphs, gradient):
    x = POINTS.clone()
    field = Function(lambda t, x: torch.where(t > 1, x / x.clamp(max=0).sign().abs(), -0.1 * x), knots=(1.0,))
    flow, compiled = twins(field, f"dopri5:gradient={gradient}")
    assert "batch rows at fault" in failure(flow, x)
    assert failure(compiled, x) == failure(flow, x)
    assert graphs.frame_count


def test_an_overflow_in_an_attempt_is_survived(graphs):
    x = torch.tensor([[10.0, -30.0]], dtype=FLOAT64)
    flow, compiled = twins(Function(lambda t, x: -(x**9)), "dopri5:rtol=1e-4,atol=1e-4,first_step=1", 1)
    assert_same(flow, compiled, lambda flow: solved(flow, x))
    assert flow.cost.rejected
    assert graphs.frame_count


@pytest.mark.parametrize("options", ["", ":first_step=0.1"])
@pytest.mark.parametrize("module", [nn.Dropout(0.3), nn.ReLU(inplace=True)])
def test_fields_that_draw_or_write_are_refused_as_ever(graphs, module, options):
    flow, compiled = twins(Autonomous(nn.Sequential(module)), f"dopri5{options}")
    assert failure(compiled, POINTS.clone()) == failure(flow, POINTS.clone())


class Growth(Field):
    """A kernel or two."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.5, dtype=FLOAT64))

    def forward(self, t, x):
        return self.rate * (t - x)


def test_machine_code():
    flow, compiled = twins(Growth(), "bosh3:rtol=1e-3,atol=1e-3,gradient=checkpoint")
    assert_same(flow, compiled)
    torch.compiler.reset()
