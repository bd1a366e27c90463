"""Steps of each image: an image meets the tolerance alone, whatever its neighbours are."""

import subprocess
import sys

import pytest
import torch
from problems import FLOAT64, LINEAR, MATRIX, STARTS, small_mlp, states, tanh_layers
from torch import nn

from continuum import Autonomous, Expansion, Field, FixedStep, PiecewiseConstant, SolveError
from continuum.bases import Hat
from continuum.fields import Coupled, Function, Momentum, PostActivation, Scaled, TwoColumns
from continuum.solvers import Embedded, per_image
from continuum.solvers.packed import Packed
from continuum.solvers.per_image import METHODS, PerImage, check_per_image

torchode = pytest.importorskip("torchode", reason="steps of each image need torchode: pip install torchode")


class Counted(Field):
    """Counts calls, and reads no depth."""

    def __init__(self, field: Field) -> None:
        super().__init__()
        self.field = field
        self.calls = 0

    def forward(self, t, x):
        self.calls += 1
        return self.field(t, x)


def solve(field, x, times=(0.0, 1.0), method="dopri5", tolerance=1e-6, **limits):
    return PerImage(method, tolerance, tolerance, **limits)(field, x, times)


def rates(*values):
    """Images that decay at these rates, of which each sees its own alone: x' = -x_1 x_0, x_1' = 0."""
    return torch.tensor([[1.0, value] for value in values], dtype=FLOAT64)


DECAY = Function(lambda t, x: torch.stack([-x[:, 1] * x[:, 0], torch.zeros_like(x[:, 0])], dim=1))


def test_torchode_is_not_imported_before_it_is_needed():
    code = "import sys, continuum, continuum.solvers.per_image; sys.exit('torchode' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("times", [(0.0, 2.0), (0.0, 0.7, 2.0), (2.0, 0.7, 0.0), (-1.0, 0.5, 1.0)])
def test_linear_states_at_all_times(method, times):
    start = LINEAR.exact(times[0], 1.0)
    tolerance = 1e-5 if method == "adaptive_heun" else 1e-9
    solution = solve(LINEAR.field, start, times, method, tolerance)
    assert solution.states[0] is start
    for t, state in zip(times, solution.states, strict=True):
        torch.testing.assert_close(state, LINEAR.exact(t, 1.0), rtol=0, atol=20 * tolerance)


def test_the_end_does_not_depend_on_the_times_between():
    two, three = solve(LINEAR.field, STARTS), solve(LINEAR.field, STARTS, (0.0, 0.31, 1.0))
    assert torch.equal(two.states[-1], three.states[-1])
    assert two.cost == three.cost


def test_any_shape_of_state():
    x = states(3, 2, 4, 4)
    path = solve(Function(lambda t, x: -x), x, (0.0, 0.5, 1.0), tolerance=1e-9).states
    for t, state in zip((0.0, 0.5, 1.0), path, strict=True):
        torch.testing.assert_close(state, x * torch.tensor(-t).exp(), rtol=1e-7, atol=1e-7)
    with pytest.raises(ValueError, match=r"batch, features"):
        solve(Function(lambda t, x: -x), x.flatten())


@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_every_image_meets_the_tolerance(method):
    x = rates(0.1, 1.0, 10.0, 100.0)
    for tolerance in (1e-4, 1e-7):
        end = solve(DECAY, x, method=method, tolerance=tolerance).states[-1]
        assert ((end[:, 0] - torch.exp(-x[:, 1])).abs() < 10 * tolerance).all()


@pytest.mark.parametrize("way", [1.0, -1.0])
@pytest.mark.parametrize("method", METHODS)
def test_an_image_does_not_depend_on_its_neighbours(method, way):
    x = rates(1.0, 0.3, 200.0)
    times = (0.0, 0.4 * way, way)
    x[:, 1] *= way
    tolerance = 1e-3 if method == "adaptive_heun" else 1e-6
    together = solve(DECAY, x, times, method, tolerance)
    alone = [solve(DECAY, x[i : i + 1], times, method, tolerance) for i in range(3)]
    for index, state in enumerate(together.states):
        torch.testing.assert_close(state, torch.cat([one.states[index] for one in alone]), rtol=1e-12, atol=1e-12)
    assert (together.cost.accepted, together.cost.rejected) == (alone[2].cost.accepted, alone[2].cost.rejected)
    assert alone[0].cost.accepted < together.cost.accepted / 3


@pytest.mark.parametrize(("method", "stages", "first"), [("dopri5", 6, 2), ("tsit5", 6, 2), ("adaptive_heun", 2, 2)])
def test_evaluations_are_calls_of_the_field(method, stages, first):
    field = Counted(DECAY)
    cost = solve(field, rates(1.0, 30.0), method=method, tolerance=1e-4).cost
    assert cost.evaluations == field.calls == first + stages * (cost.accepted + cost.rejected)
    assert cost.rejected > 0
    assert cost.grid == ()


def test_steps_keep_their_limits(monkeypatch):
    steps = recorded(monkeypatch)
    solve(Function(lambda t, x: -x), STARTS, max_step=0.125, tolerance=1e-2)
    assert max(float(h.max()) for _, h, _ in steps) <= 0.125
    assert len(steps) == 8
    steps.clear()
    solve(Function(lambda t, x: -x), STARTS, (1.0, 0.0), first_step=0.25, tolerance=1e-2)
    assert steps[0][1].tolist() == [-0.25, -0.25]


def test_an_image_that_is_finished_does_not_fail():
    # With torchode's own shortest step and its own largest number of steps it would.
    x = rates(0.01, 50.0)
    free = solve(DECAY, x)
    limited = solve(DECAY, x, min_step=1e-4, max_evaluations=free.cost.evaluations)
    assert torch.equal(limited.states[-1], free.states[-1])


def test_a_finished_image_may_stand_where_the_field_is_undefined():
    x = rates(0.01, 50.0)
    end = solve(DECAY, x, method="adaptive_heun", tolerance=1e-3).states[-1]
    undefined = Function(lambda t, x: torch.where(x[:, :1] == end[0, 0], torch.nan, DECAY(t, x)))
    assert torch.equal(solve(undefined, x, method="adaptive_heun", tolerance=1e-3).states[-1], end)


def test_failures_name_their_images():
    x = rates(1.0, 2.0, 3.0)
    x[1, 0] = torch.nan
    with pytest.raises(SolveError, match=r"not finite .* at depth 0 .* batch rows at fault: 1\.") as caught:
        solve(DECAY, x)
    assert caught.value.evaluations > 0
    with pytest.raises(SolveError, match="budget is spent") as caught:
        solve(DECAY, rates(1.0, 1e4, 1.0), max_evaluations=200)
    assert caught.value.rows == (1,)
    assert caught.value.evaluations == 200
    assert 0 < caught.value.depth < 1
    with pytest.raises(SolveError, match="underflows") as caught:
        solve(DECAY, rates(1.0, 1e4, 1.0), min_step=0.01)
    assert caught.value.rows == (1,)


def test_a_solution_that_leaves_for_infinity_is_named():
    # x' = x^2 from 1/2, 2 and 1/4 is infinite at depth 2, 1/2 and 4.
    x = torch.tensor([[0.5], [2.0], [0.25]], dtype=FLOAT64)
    with pytest.raises(SolveError, match=r"underflows|not finite") as caught:
        solve(Function(lambda t, x: x * x), x)
    assert caught.value.rows == (1,)
    assert caught.value.depth == pytest.approx(0.5, abs=1e-6)


READ_BY = [lambda t, x: t * x, lambda t, x: x - x.new_full((), t), lambda t, x: x if t < 0.5 else -x]
READ_BY += [lambda t, x: torch.as_tensor(t, dtype=x.dtype).cos() * x, lambda t, x: torch.tensor([t]) * x]
READ_BY += [lambda t, x: x * float(t), lambda t, x: x * getattr(t, "real", 1.0), lambda t, x: {0.0: x}.get(t, -x)]
READING = [Momentum(Scaled(Function(lambda t, x: x**t), 2.0)), Expansion(small_mlp(2), Hat(2, depth=1)), small_mlp(2)]


@pytest.mark.parametrize("reads", [*map(Function, READ_BY), *READING])
def test_a_field_that_reads_the_depth_is_refused(reads):
    with pytest.raises(TypeError, match=r"reads the depth.*for the whole batch"):
        solve(reads, rates(1.0, 2.0))


def test_a_field_that_jumps_is_refused():
    with pytest.raises(TypeError, match=r"jumps at \(1\.0, 2\.0\)"):
        solve(tanh_layers(3), torch.zeros(2, 4, dtype=FLOAT64), (0.0, 3.0))


def test_fields_that_only_pass_the_depth_on():
    def linear():
        return Autonomous(nn.Linear(2, 2, dtype=FLOAT64))

    half = Autonomous(nn.Linear(1, 1, dtype=FLOAT64))
    fields = [linear(), PostActivation(linear().module), Momentum(linear().scaled(0.5)), Coupled(half, half)]
    for field in (*fields, TwoColumns(linear(), linear()), PiecewiseConstant([linear()]), Function(lambda t, x: -x)):
        assert solve(field, rates(1.0, 2.0)).cost.accepted


def test_batch_statistics_are_refused():
    field = Autonomous(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))).double()
    with pytest.raises(TypeError, match="statistics of the batch"):
        solve(field, rates(1.0, 2.0))
    solve(field.eval(), rates(1.0, 2.0))
    with pytest.raises(TypeError, match="statistics of the batch"):
        check_per_image(Autonomous(nn.BatchNorm1d(2, track_running_stats=False)).eval())


def test_a_tuple_of_states_is_refused():
    x = rates(1.0, 2.0)
    with pytest.raises(TypeError, match="a tuple of states"):
        solve(Packed(Function(lambda t, x: x), [x.shape, x.shape]), torch.cat([x.flatten(), x.flatten()]))


def test_unknown_methods_and_a_missing_library(monkeypatch):
    with pytest.raises(ValueError, match=r"dopri5, tsit5, adaptive_heun; torchode has no 'bosh3'"):
        solve(DECAY, rates(1.0), method="bosh3")
    monkeypatch.setitem(sys.modules, "torchode", None)
    with pytest.raises(ImportError, match="pip install torchode"):
        solve(DECAY, rates(1.0))


def test_an_empty_batch():
    solution = solve(DECAY, rates(1.0)[:0], (0.0, 0.5, 1.0))
    assert [state.shape for state in solution.states] == [(0, 2)] * 3
    assert solution.cost.evaluations == 0


def recorded(monkeypatch):
    """The steps of solves from now on: (depths, sizes, accepted)."""
    steps = []
    original = per_image._Solve.adapt_step_size

    def adapt(self, t, h, x, step, state, stats):
        answer = original(self, t, h, x, step, state, stats)
        steps.append((t, h, answer[0]))
        return answer

    monkeypatch.setattr(per_image._Solve, "adapt_step_size", adapt)
    return steps


def gradients(field, x, end):
    return torch.autograd.grad(end.square().sum(), [x, *field.parameters()])


@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun"])
def test_the_gradient_is_that_of_the_steps(monkeypatch, method):
    # With step sizes that are constants, the gradient is the one of the same steps on a fixed grid, to rounding.
    steps = recorded(monkeypatch)
    torch.manual_seed(0)
    field = Autonomous(nn.Sequential(nn.Linear(3, 3), nn.Tanh())).double()
    x = STARTS[:1].clone().requires_grad_()
    end = solve(field, x, (0.0, 2.0), method, 1e-3).states[-1]
    grid = (*(float(t) for t, _, accepted in steps if accepted), 2.0)
    fixed = FixedStep(Embedded(method), grid=grid)(field, x, (0.0, 2.0)).states[-1]
    torch.testing.assert_close(end, fixed, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradients(field, x, end), gradients(field, x, fixed), rtol=1e-12, atol=1e-12)


def test_gradients_against_a_tight_solve():
    torch.manual_seed(0)
    field = Autonomous(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))).double()
    x = states(5, 3).requires_grad_()
    ends = [solve(field, x, (0.0, 2.0), "tsit5", tolerance).states[-1] for tolerance in (1e-5, 1e-12)]
    for loose, tight in zip(*(gradients(field, x, end) for end in ends), strict=True):
        assert 0 < (loose - tight).norm() < 1e-4 * tight.norm()


def test_autocast_is_for_the_field_alone():
    x = torch.randn(4, 3)
    field = Function(lambda t, x: -x)
    plain = solve(field, x, (0.0, 0.5, 1.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = solve(field, x, (0.0, 0.5, 1.0))
        halves = []

        def half(t, x):
            slope = x @ MATRIX.to(x.dtype)
            halves.append(slope.dtype)
            return slope

        ends = solve(Function(half), x, tolerance=1e-1).states
    assert all(torch.equal(one, other) for one, other in zip(plain.states, cast.states, strict=True))
    assert set(halves) == {torch.bfloat16}
    assert ends[-1].dtype == torch.float32
