"""What a flow takes and gives beside the numbers of a tensor: tuples of states, gradients of times, half precision."""

import copy
import math

import pytest
import torch
from problems import FLOAT64, LINEAR, MATRIX, SEASONAL, Normed, Watched, small_mlp, states, tanh_layers
from torch import nn

from continuum import Adaptive, Coupled, Dropout, Field, Flow, Momentum, PiecewiseConstant, SolveError, StochasticDepth
from continuum.fields import Function
from continuum.solvers.packed import Packed

HALF = [torch.bfloat16, torch.float16]
LOOSE = "dopri5:rtol=0.05,atol=0.05"
SOLVERS = ["euler", "rk4:h=0.5", "adams_bashforth:h=0.25", LOOSE, f"{LOOSE},gradient=adjoint"]
LOOKING = dict.fromkeys(("coupling", "verlet"), Coupled(small_mlp(2), small_mlp(2)))
LOOKING |= {"linear_two_step": Momentum(small_mlp()), "euler_maruyama": StochasticDepth(small_mlp(), 0.5)}
LOOKING["brownian"] = StochasticDepth(small_mlp(), 0.5, per="image")


def tight(method="dopri5", tolerance=1e-10, **options):
    return Adaptive(method, rtol=tolerance, atol=tolerance, **options)


ADAPTIVE = [tight(tolerance=1e-6, gradient=gradient) for gradient in ("direct", "checkpoint", "adjoint", "full_adjoint")]
TIGHT = [tight(), tight(gradient="checkpoint"), tight("dopri8", gradient="adjoint")]
FIXED = ["euler", "rk4:h=0.5", "adams_bashforth:h=0.25", "neumann_series", "two_step_midpoint", "heun:grid=0/0.7/1/2"]
REVERSIBLE = "two_step_midpoint:h=0.25,gradient=reversible"


# Tuples of states
class Pair(Field):
    """Two states of different shapes that move each other, with weights and, at some rate, with the depth."""

    def __init__(self, seed=0, rate=1.0):
        super().__init__()
        torch.manual_seed(seed)
        self.rate = rate
        self.first, self.second = nn.Linear(4, 3, dtype=FLOAT64), nn.Linear(3, 4, dtype=FLOAT64)

    def forward(self, t, x):
        y, z = x
        return torch.tanh(self.first(z.flatten(1)) + self.rate * t), torch.tanh(self.second(y)).reshape(z.shape) - z


class Joined(Field):
    """The same field of one state that holds both."""

    def __init__(self, pair):
        super().__init__()
        self.pair, self.knots = pair, pair.knots

    def forward(self, t, x):
        y, z = self.pair(t, (x[:, :3], x[:, 3:].reshape(-1, 2, 2)))
        return torch.cat([y, z.flatten(1)], dim=1)


def pair_of_states(rows=5):
    return states(rows, 3), states(rows, 2, 2, seed=2)


def joined(parts, axes=1):
    """One tensor of all entries behind the first axes."""
    return torch.cat([part.flatten(axes) for part in parts], dim=-1)


def jumping():
    return PiecewiseConstant([Pair(seed=1, rate=0.0), Pair(seed=2, rate=0.0)])


@pytest.mark.parametrize("make", [Pair, jumping], ids=["smooth", "layers"])
@pytest.mark.parametrize("solver", [*FIXED, REVERSIBLE, *ADAPTIVE], ids=str)
def test_a_tuple_moves_as_its_states_in_one_tensor(solver, make):
    """Ends, trajectories and all gradients."""
    field = make()
    results = []
    for flow, x in [(Flow(field, solver, 2), pair_of_states()), (Flow(Joined(field), solver, 2), joined(pair_of_states()))]:
        leaves = [part.requires_grad_() for part in (x if isinstance(x, tuple) else (x,))]
        end, path = flow(x), flow.trajectory(x, [0, 1, 2])
        if isinstance(x, tuple):
            assert [part.shape for part in end] == [part.shape for part in x]
            assert [part.shape for part in path] == [(3, *part.shape) for part in x]
            assert torch.equal(path[0][0], x[0])
            end, path = joined(end), joined(path, axes=2)
        parameters = list(field.parameters())
        gradients = torch.autograd.grad((end**3).sum() + path.sin().sum(), [*leaves, *parameters])
        start = joined(gradients[: len(leaves)])
        results.append([end, path, start, *gradients[len(leaves) :]])
    within = 1e-4 if isinstance(solver, Adaptive) else 1e-12
    torch.testing.assert_close(*results, rtol=within, atol=within)


@pytest.mark.parametrize("solver", [*FIXED, "dopri5", "bosh3:rtol=1e-5,atol=1e-5", "adaptive_heun", "dopri5:gradient=adjoint"])
@torch.no_grad()
def test_a_tuple_of_one_is_that_one_to_the_bit(solver):
    alone, x = small_mlp(), states(5, 3)
    flow, packed = Flow(alone, solver, 2), Flow(Function(lambda t, x: (alone(t, *x),)), solver, 2)
    (end,) = packed((x,))
    assert torch.equal(end, flow(x))
    assert packed.cost == flow.cost


@pytest.mark.parametrize("solver", ["dopri5:rtol=1e-6,atol=1e-6", "adaptive_heun:rtol=1e-4,atol=1e-4"])
@torch.no_grad()
def test_the_error_of_a_tuple_is_that_of_its_worst_state(solver):
    """A state that rests, however large, changes no step; in one tensor with the other it would dilute the error."""
    field, x = small_mlp(), states(5, 3)
    flow = Flow(field, solver, 2)
    beside = Flow(Function(lambda t, x: (field(t, x[0]), 0 * x[1])), solver, 2)
    within = Flow(Function(lambda t, x: torch.cat([field(t, x[:, :3]), 0 * x[:, 3:]], dim=1)), solver, 2)
    rest = states(5, 1000)
    flow(x)
    beside((x, rest))
    within(torch.cat([x, rest], dim=1))
    assert beside.cost == flow.cost
    assert within.cost.accepted < flow.cost.accepted


@pytest.mark.parametrize("solver", ["dopri5", "adaptive_heun"])
def test_rows_at_fault_are_rows_of_the_batch(solver):
    y, z = pair_of_states()
    z[3, 0, 1] = torch.nan
    with pytest.raises(SolveError) as caught:
        Flow(Pair(), solver, 1)((y, z))
    assert caught.value.rows == (3,)


@pytest.mark.parametrize("solver", FIXED)
@torch.no_grad()
def test_states_of_a_tuple_are_tuples(solver):
    flow, x = Flow(Pair(), solver, 2), pair_of_states()
    path = flow.states(x)
    end = flow(x)
    assert len(path) == flow.cost.accepted + 1
    assert all(isinstance(state, tuple) for state in path)
    for part, other in zip(path[0] + path[-1], x + end, strict=True):
        assert torch.equal(part, other)


def test_a_tuple_leaves_no_trace_in_the_field():
    flow = Flow(Pair(), "dopri5", 1)
    flow.field.first.eval()
    names = list(flow.state_dict())
    flow(pair_of_states())
    assert (flow.training, flow.field.training, flow.field.first.training) == (True, True, False)
    assert list(flow.state_dict()) == names
    assert [name for name, _ in flow.named_modules()] == ["", "field", "field.first", "field.second"]


@torch.no_grad()
def test_a_frozen_flow_takes_the_tuple_too():
    flow, x = Flow(Pair(), "dopri5", 2), pair_of_states()
    frozen = flow.frozen(x)
    torch.testing.assert_close(frozen(x), flow(x), rtol=1e-12, atol=1e-12)
    assert frozen.cost.grid == flow.cost.grid


def test_a_flow_of_a_tuple_compiles_to_one_graph():
    flow, x = Flow(Pair(), "heun:h=0.5", 2), pair_of_states()
    compiled = torch.compile(flow.forward, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), flow(x))


@pytest.mark.parametrize("solver", ["rk4:h=0.5", "dopri5", "dopri5:gradient=adjoint"])
def test_an_empty_batch_of_tuples(solver):
    x = pair_of_states(rows=0)
    assert [part.shape for part in Flow(Pair(), solver, 2)(x)] == [part.shape for part in x]


ODD_TUPLES = {
    "empty": ((), "holds one tensor or more"),
    "dtypes": ((states(5, 3), states(5, 2, 2).float()), "one dtype and one device, not torch.float64 on cpu, torch.float32"),
    "devices": ((states(5, 3), states(5, 2, 2).to("meta")), "one dtype and one device, .* on meta"),
    "batch sizes": ((states(5, 3), states(4, 2, 2)), r"one batch size.* \(5, 3\), \(4, 2, 2\)"),
    "a number": ((states(5, 3), states(1)[0]), r"one batch size.* \(5, 3\), \(\)"),
}


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
@pytest.mark.parametrize(("x", "message"), ODD_TUPLES.values(), ids=ODD_TUPLES)
def test_a_tuple_that_is_no_batch(x, message, solver):
    with pytest.raises(ValueError, match=message):
        Flow(Pair(), solver, 1)(x)


ODD_SLOPES = {
    "one tensor": (lambda t, x: x[0], r"returned one tensor of shape \(5, 3\)"),
    "too few": (lambda t, x: (x[0],), r"returned \(5, 3\) for states of shapes \(5, 3\), \(5, 2, 2\)"),
    "too many": (lambda t, x: (*x, x[0]), r"returned \(5, 3\), \(5, 2, 2\), \(5, 3\) for"),
    "another shape": (lambda t, x: (x[0][:, :1], x[1]), r"returned \(5, 1\), \(5, 2, 2\)"),
    "the same size": (lambda t, x: (x[0], x[1].flatten(1)), r"returned \(5, 3\), \(5, 4\)"),
    "a list": (lambda t, x: [*x], "returned a list"),
    "numbers": (lambda t, x: (0.0, x[1]), r"returned float, \(5, 2, 2\)"),
}


@pytest.mark.parametrize("solver", ["euler", "dopri5", "dopri5:gradient=adjoint"])
@pytest.mark.parametrize(("function", "message"), ODD_SLOPES.values(), ids=ODD_SLOPES)
def test_slopes_that_are_not_those_of_the_tuple(function, message, solver):
    with pytest.raises(ValueError, match=message):
        Flow(Function(function), solver, 1)(pair_of_states())


@pytest.mark.parametrize("solver", LOOKING)
def test_a_scheme_that_looks_into_the_layer_carries_no_tuple(solver):
    """Silently it would step the pair as one plain layer, without its k or its noise."""
    with pytest.raises(TypeError, match=f"{solver}.* cannot carry a tuple of states"):
        Flow(LOOKING[solver], solver, 1)(pair_of_states())


def test_a_tuple_has_no_memory():
    with pytest.raises(TypeError, match="no memory"):
        Flow(Pair(), "two_step_midpoint", 1)(pair_of_states(), memory=states(5, 3))


# Gradients with respect to times
def linear(t, x):
    return x @ MATRIX.T


TIMED = {
    "autonomous": (small_mlp, [0.2, 0.6, 1.3]),
    "of time": (lambda: Function(SEASONAL.field.function), [0.2, 0.6, 1.3]),
    "layers": (lambda: tanh_layers(3, features=3, gain=2.0), [0.4, 0.6, 2.2]),
}


def differences_agree(function, *inputs):
    """Of a weighted sum of the outputs, by differences wide enough that the tolerance of the solve does not count."""

    def weighted(*inputs):
        outputs = function(*inputs)
        return sum((output * states(*output.shape)).sum() for output in (outputs if isinstance(outputs, tuple) else [outputs]))

    return torch.autograd.gradcheck(weighted, inputs, eps=1e-4, atol=2e-6, rtol=1e-5, check_undefined_grad=False)


@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
@pytest.mark.parametrize("solver", TIGHT, ids=lambda solver: solver.gradient)
@pytest.mark.parametrize(("make", "times"), TIMED.values(), ids=TIMED)
def test_gradient_of_times_is_that_of_differences(make, times, solver, back):
    """All times at once, the first among them."""
    flow = Flow(make(), solver, depth=3)
    times = torch.tensor(times[::-1] if back else times, dtype=FLOAT64, requires_grad=True)
    assert differences_agree(lambda times: flow.trajectory(states(2, 3), times), times)


@pytest.mark.parametrize("solver", TIGHT, ids=lambda solver: solver.gradient)
@pytest.mark.parametrize("make", [make for make, _ in TIMED.values()], ids=TIMED)
def test_gradient_of_the_depth_is_that_of_differences(make, solver):
    field = make()
    depth = torch.tensor(1.3, dtype=FLOAT64, requires_grad=True)
    assert differences_agree(lambda depth: Flow(field, solver, depth)(states(2, 3)), depth)


def test_gradient_of_times_and_of_a_tuple_is_that_of_differences():
    flow = Flow(Pair(), tight(), depth=3)
    times = torch.tensor([0.2, 0.9, 1.7], dtype=FLOAT64, requires_grad=True)
    y, z = (part.requires_grad_() for part in pair_of_states(1))
    assert differences_agree(lambda y, z, times: flow.trajectory((y, z), times), y, z, times)


@pytest.mark.parametrize("times", [[0.0, 0.5, 2.0], [2.0, 1.5, 0.0]], ids=["there", "back"])
@pytest.mark.parametrize("solver", ["rk4:h=0.03125", "adams_bashforth:order=4,h=0.015625", *TIGHT], ids=str)
def test_gradient_of_times_is_that_of_the_solution(times, solver):
    """x' = A x: dx(t)/dt = A x(t) and dx(t)/dt_0 = -A x(t), on a grid that no time could leave."""
    flow = Flow(Function(linear), solver, depth=2)
    moving = torch.tensor(times, dtype=FLOAT64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(lambda moving: flow.trajectory(LINEAR.start[:1], moving), moving)
    for i, t in enumerate(times):
        state = LINEAR.start[:1] @ torch.linalg.matrix_exp((t - times[0]) * MATRIX).T
        for j in range(len(times)):
            expected = ((i == j) - (j == 0)) * linear(t, state)
            torch.testing.assert_close(jacobian[i, ..., j], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("times", [[0.0, 1.0, 2.0], [3.0, 2.0, 1.0], [1.0, 3.0]], ids=str)
@pytest.mark.parametrize("solver", ["euler", "rk4:h=0.5", "dopri5", "dopri5:gradient=adjoint"])
def test_on_a_knot_the_slope_is_that_of_the_piece_in_between(times, solver):
    """x' = c_k on layer k: every time on a knot has c_k of the layer that lies between it and the time before or after."""
    speeds = [2.0, -3.0, 5.0]
    field = PiecewiseConstant(Function(lambda t, x, c=c: c + 0 * x) for c in speeds)
    moving = torch.tensor(times, dtype=FLOAT64, requires_grad=True)
    path = Flow(field, solver, depth=3).trajectory(torch.zeros(1, 1, dtype=FLOAT64), moving)
    (gradient,) = torch.autograd.grad(path[-1], moving)
    up = times[1] > times[0]
    first = speeds[math.floor(times[0] if up else times[0] - 1)]
    last = speeds[math.floor(times[-1] - 1 if up else times[-1])]
    torch.testing.assert_close(gradient, torch.tensor([-first, *[0.0] * (len(times) - 2), last], dtype=FLOAT64))


@pytest.mark.parametrize("solver", ["rk4:h=0.5", "dopri5"])
def test_times_may_be_numbers_and_tensors_mixed(solver):
    flow, x = Flow(small_mlp(), solver, depth=2), states(2, 3)
    end, times = torch.tensor(2.0, requires_grad=True), torch.tensor([0.0, 0.5, 2.0], requires_grad=True)
    mixed, all_times = flow.trajectory(x, [0, 0.5, end]), flow.trajectory(x, times)
    assert torch.equal(mixed, all_times)
    (one,), (every,) = torch.autograd.grad(mixed.sum(), end), torch.autograd.grad(all_times.sum(), times)
    assert one.dtype == torch.float32
    torch.testing.assert_close(one, every[2])


@pytest.mark.parametrize("solver", ["rk4:h=0.5", "dopri5", "dopri5:gradient=adjoint"])
def test_values_do_not_change_and_every_moving_time_costs_one_evaluation(solver):
    field, x = Watched(small_mlp()), states(2, 3)
    flow = Flow(field, solver, depth=2)
    times = torch.tensor([0.0, 0.5, 2.0], requires_grad=True)
    path = flow.trajectory(x, times)
    assert flow.cost.evaluations == len(field.depths)
    with torch.no_grad():
        assert torch.equal(path, flow.trajectory(x, times))
    assert len(field.depths) - flow.cost.evaluations == flow.cost.evaluations + 3


@pytest.mark.parametrize("solver", ["rk4:h=0.5", "dopri5", "dopri5:gradient=adjoint"])
def test_slopes_at_the_times_leave_no_trace(solver):
    """In batch statistics, and in the weights that autocast keeps: a weight cast without gradient would have none later."""
    results = []
    for times in ([0.0, 2.0], torch.tensor([0.0, 2.0], requires_grad=True)):
        flow, x = Flow(Normed().float(), solver, depth=2), states(8, 3).float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            end = flow.trajectory(x, times)[-1]
        end.sum().backward()
        results.append([end, *(parameter.grad for parameter in flow.parameters()), *flow.buffers()])
    for one, other in zip(*results, strict=True):
        assert one is not None
        assert torch.equal(one, other)


def test_the_state_at_a_moving_time_may_be_changed_in_place():
    flow = Flow(small_mlp(), "dopri5", torch.tensor(1.0, requires_grad=True))
    flow(states(2, 3)).relu_().sum().backward()
    assert flow.end.grad is not None


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
def test_a_depth_is_learnt(gradient):
    """x' = -x reaches half of where it began at depth log 2."""
    depth = nn.Parameter(torch.tensor(2.0, dtype=FLOAT64))
    flow = Flow(Function(lambda t, x: -x), tight(tolerance=1e-8, gradient=gradient), depth)
    x = states(4, 3)
    optimiser = torch.optim.SGD(flow.parameters(), lr=1.0)
    for _ in range(40):
        optimiser.zero_grad()
        (flow(x) - x / 2).pow(2).sum().div(x.pow(2).sum()).backward()
        optimiser.step()
    assert abs(flow.depth - math.log(2)) < 1e-6
    assert flow.depth == float(depth.detach())


@pytest.mark.parametrize("solver", ["dopri5", "dopri5:gradient=adjoint"])
def test_a_depth_is_learnt_where_nothing_else_is(solver):
    flow = Flow(small_mlp().requires_grad_(False), solver, nn.Parameter(torch.tensor(1.0)))
    x = states(2, 3)
    y = flow(x)
    y.sum().backward()
    torch.testing.assert_close(flow.end.grad, flow.field(1.0, y).sum().float())
    with torch.no_grad():
        assert not flow(x).requires_grad


def test_a_learnt_depth_is_shared_copied_or_fixed():
    flow = Flow(small_mlp(), "dopri5", nn.Parameter(torch.tensor(1.5)))
    assert isinstance(flow.depth, float)
    assert "end" in dict(flow.named_parameters())
    assert "depth=1.5" in repr(flow)
    assert flow.with_solver("bosh3").end is flow.drift().end is flow.end
    copied = copy.deepcopy(flow)
    refined = flow.refine(3)
    with torch.no_grad():
        flow.end.mul_(2)
    assert (flow.depth, copied.depth, refined.depth) == (3.0, 1.5, 1.5)
    assert isinstance(refined.end, nn.Parameter)
    assert Flow(tanh_layers(2), "dopri5", nn.Parameter(torch.tensor(1.5))).refine(3).depth == 4.5
    frozen = flow.frozen(states(2, 3))
    assert (frozen.depth, frozen.end) == (3.0, 3.0)
    assert frozen.solver.grid[-1] == 3.0


@pytest.mark.parametrize("depth", [2, torch.tensor(2), torch.tensor(2.0)], ids=repr)
def test_a_depth_that_is_not_learnt_is_a_number(depth):
    flow = Flow(small_mlp(), "rk4:h=0.5", depth)
    assert flow.end == flow.depth == 2.0
    assert isinstance(flow.end, float)
    assert "end" not in flow.state_dict()


@pytest.mark.parametrize("solver", ["dopri5", "dopri5:gradient=adjoint", "rk4:h=0.5"])
def test_derivatives_of_times_exist_once(solver):
    flow, x = Flow(small_mlp(), solver, depth=1), states(2, 3).requires_grad_()
    times = torch.tensor([0.0, 1.0], requires_grad=True)
    for wanted in (times, x):
        with pytest.raises(RuntimeError, match="times and depth exist once only"):
            torch.autograd.grad(flow.trajectory(x, times)[-1].sum(), wanted, create_graph=True)


NOISY = {
    "brownian": (lambda: StochasticDepth(small_mlp(), 0.5, per="image"), "brownian:h=0.5"),
    "euler_maruyama": (lambda: StochasticDepth(small_mlp(), 0.5), "euler_maruyama"),
    "dropout": (lambda: Dropout(small_mlp(), 0.5), "euler_maruyama"),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("make", "solver"), NOISY.values(), ids=NOISY)
def test_a_brownian_path_has_no_derivative_in_time(make, solver, training):
    depth = torch.tensor(1.0, requires_grad=True)
    with pytest.raises(TypeError, match=r"no derivative in time.*drift\(\)"):
        Flow(make(), solver, depth)
    flow = Flow(make(), solver, 1).train(training)
    with pytest.raises(TypeError, match=r"no derivative in time.*drift\(\)"):
        flow.trajectory(states(2, 3), [0.0, depth])
    with torch.no_grad():
        assert flow.trajectory(states(2, 3), [0.0, depth]).isfinite().all()
    flow.drift().trajectory(states(2, 3), [0.0, depth]).sum().backward()
    assert depth.grad is not None


def test_scipy_has_no_gradient_of_times_either():
    flow = Flow(small_mlp().requires_grad_(False), "scipy_solver", torch.tensor(1.0, requires_grad=True))
    with pytest.raises(RuntimeError, match="forward only"):
        flow(states(2, 3))
    with torch.no_grad():
        assert flow(states(2, 3)).isfinite().all()


def test_a_depth_that_training_has_taken_away():
    flow = Flow(small_mlp(), "dopri5", nn.Parameter(torch.tensor(1.0)))
    for depth in (0.0, -0.5, float("nan")):
        with torch.no_grad():
            flow.end.fill_(depth)
        assert f"depth={depth:g}" in repr(flow)
        with pytest.raises(ValueError, match=f"training has taken it to {depth:g}"):
            flow(states(2, 3))


# Half precision
class Recording(Field):
    """Keeps the dtypes of the states it sees and of the slopes it gives."""

    def __init__(self, width=3):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(width, width)
        self.seen = set()

    def forward(self, t, x):
        slope = torch.tanh(self.linear(x))
        self.seen.add((x.dtype, slope.dtype))
        return slope


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_under_autocast_the_field_computes_in_half_and_the_state_in_full_precision(solver, half):
    flow = Flow(Recording(), solver, 2)
    x = states(4, 3).to(half).requires_grad_()
    with torch.autocast("cpu", dtype=half):
        y = flow(x)
        path = flow.trajectory(x, [0, 2])
        same = flow(x.float())
    assert y.dtype == path.dtype == torch.float32
    assert torch.equal(y, same)
    assert torch.equal(path[-1], y)
    y.sum().backward()
    assert flow.field.seen == {(torch.float32, half)}, "on the way back too"
    assert x.grad.dtype == half
    assert x.grad.isfinite().all()
    assert all(parameter.grad.abs().sum() > 0 for parameter in flow.parameters())


@pytest.mark.parametrize("solver", SOLVERS)
def test_under_autocast_a_tuple_too(solver):
    """Its states may have come from layers that autocast treats in different ways."""
    first, second = Recording(), Recording(2)
    field = Function(lambda t, x: (first(t, x[0]), second(t, x[1])))
    field.parts = nn.ModuleList([first, second])
    flow = Flow(field, solver, 2)
    x = states(4, 3).bfloat16(), states(4, 2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [part.dtype for part in flow(x)] == [torch.float32, torch.float32]
        assert Packed(field, [part.shape for part in x])(0.0, torch.ones(20)).dtype == torch.float32
    assert first.seen == second.seen == {(torch.float32, torch.bfloat16)}
    with pytest.raises(ValueError, match="one dtype"):
        flow(x)


def test_under_autocast_the_state_one_layer_before_too():
    flow = Flow(Momentum(Recording(), -0.5), "linear_two_step", 2)
    x, before = states(4, 3).bfloat16(), states(4, 3, seed=2).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = flow(x, before)
        assert y.dtype == torch.float32
        assert torch.equal(y, flow(x.float(), before.float()))
        flow.refined = 2
        assert flow(x, before).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64, *HALF], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_without_autocast_the_dtype_stays(solver, dtype):
    if dtype in HALF and solver.startswith("dopri5"):
        solver += ",first_step=0.5"
    flow, x = Flow(Recording().to(dtype), solver, 2), states(4, 3).to(dtype)
    assert flow(x).dtype == flow.trajectory(x, [0, 2]).dtype == dtype
    assert flow.field.seen == {(dtype, dtype)}


@pytest.mark.parametrize("solver", SOLVERS)
def test_autocast_narrows_no_wider_state(solver):
    flow = Flow(Recording().double(), solver, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flow(states(4, 3)).dtype == FLOAT64
