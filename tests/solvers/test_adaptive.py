"""The fast adaptive step: torchdiffeq's steps at the cost of their evaluations, in every norm."""

import math
from itertools import pairwise

import pytest
import torch
import torchdiffeq
from problems import FLOAT64, LINEAR, PROBLEMS, SEASONAL, Watched, cosine, small_mlp, states, tanh_layers
from torch.utils._python_dispatch import TorchDispatchMode
from torchdiffeq._impl.odeint import SOLVERS

from continuum import RK4, Adaptive, Euler, FixedStep, Flow, SolveError
from continuum.fields import Function
from continuum.solvers import Embedded

FAST = ["dopri5", "bosh3", "dopri8"]
BOTH_WAYS = pytest.mark.parametrize("way", [1, -1], ids=["there", "back"])
EPS = torch.finfo(FLOAT64).eps


STIFF, BACK_STIFF = Function(lambda t, x: -50 * (x - cosine(t, x))), Function(lambda t, x: 50 * (x - cosine(t, x)))


def stages(method):
    return len(SOLVERS[method].tableau.beta)


@torch.no_grad()
def solve(field, x, times=(0.0, 2.0), method="dopri5", tolerance=1e-4, exact=False, **options):
    """The states at the times, and the cost."""
    solution = Adaptive(method, rtol=tolerance, atol=tolerance, engine="continuum", **options)(field, x, times, exact=exact)
    return solution.states, solution.cost


# The steps of torchdiffeq
class Plain:
    """A field as torchdiffeq calls it by itself, and what it did."""

    def __init__(self, field):
        self.field, self.evaluations, self.rejected = field, 0, 0
        self.tried, self.grid = [], []

    def __call__(self, t, x):
        self.evaluations += 1
        return self.field(t, x)

    def callback_step(self, t, x, h):
        self.tried.append(float(h))

    def callback_accept_step(self, t, x, h):
        self.grid.append(float(t))

    def callback_reject_step(self, t, x, h):
        self.rejected += 1


@torch.no_grad()
def plain(field, x, times, method, tolerance, **options):
    equation, ends = Plain(field), torch.tensor(times, dtype=FLOAT64)
    options = {"step_t": ends[1:], **options}
    end = torchdiffeq.odeint(equation, x, ends, rtol=tolerance, atol=tolerance, method=method, options=options)[-1]
    equation.grid.append(times[-1])
    return end, equation


THERE = {problem.name: (problem.field, problem.start, (0.0, 2.0)) for problem in PROBLEMS}
BACK = {f"{problem.name} back": (problem.field, problem.exact(2.0, 1.0), (2.0, 0.0)) for problem in PROBLEMS}
SMOOTH = THERE | BACK | {"mlp": (small_mlp(), states(), (0.0, 2.0)), "mlp back": (small_mlp(), states(), (2.0, 0.0))}
REJECTED = {
    "a first step too large": (STIFF, torch.zeros(1, 1, dtype=FLOAT64), (0.0, 2.0)),
    "a first step too large, back": (BACK_STIFF, torch.zeros(2, 1, dtype=FLOAT64), (2.0, 0.0)),
}
WITHIN = {"dopri5": (1e-10, 1e-10), "bosh3": (1e-10, 1e-10), "dopri8": (1e-6, 1e-9)}


@pytest.mark.parametrize("case", SMOOTH | REJECTED)
@pytest.mark.parametrize("tolerance", [1e-3, 1e-4])
@pytest.mark.parametrize("method", FAST)
def test_steps_are_torchdiffeqs(method, tolerance, case):
    """Where dopri8's error is seven digits below the tolerance it is made of rounding, and so is the size that it leads to."""
    options = {"first_step": 1.0} if case in REJECTED else {}
    end, expected = plain(*(SMOOTH | REJECTED)[case], method, tolerance, **options)
    (_, state), cost = solve(*(SMOOTH | REJECTED)[case], method, tolerance, **options)
    assert (cost.accepted, cost.rejected) == (len(expected.grid) - 1, expected.rejected)
    assert cost.rejected >= 3 or case not in REJECTED
    assert cost.evaluations <= expected.evaluations
    of_grid, of_state = WITHIN[method]
    assert cost.grid == pytest.approx(expected.grid, rel=0, abs=of_grid)
    torch.testing.assert_close(state, end, rtol=of_state, atol=of_state)


STARTS = {
    **{name: case[:2] for name, case in SMOOTH.items()},
    "no motion": (Function(lambda t, x: 0 * x), states()),
    "from zero": (Function(lambda t, x: cosine(t, x) + x), torch.zeros(2, 2, dtype=FLOAT64)),
    "hardly any motion": (Function(lambda t, x: 1e-12 * x), states()),
}


@pytest.mark.parametrize("case", STARTS)
@pytest.mark.parametrize("method", FAST)
@BOTH_WAYS
def test_the_first_step_is_torchdiffeqs_choice(way, method, case):
    """Both choose it before they look how far it is to go."""
    field, x = STARTS[case]
    _, expected = plain(field, x, (1.0, 1.0 + 1e-9 * way), method, 1e-3)
    with pytest.raises(SolveError, match="budget") as caught:
        solve(field, x, (1.0, 1.0 + 1e9 * way), method, 1e-3, max_evaluations=2 + stages(method))
    assert caught.value.steps == pytest.approx((expected.tried[0],), rel=1e-10)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-4])
@pytest.mark.parametrize("method", FAST)
def test_in_float32_the_counts_are_torchdiffeqs(method, tolerance):
    field, x = small_mlp().float(), states().float()
    end, expected = plain(field, x, (0.0, 4.0), method, tolerance)
    (_, state), cost = solve(field, x, (0.0, 4.0), method, tolerance)
    assert state.dtype == torch.float32
    assert (cost.accepted, cost.rejected) == (len(expected.grid) - 1, expected.rejected)
    assert cost.evaluations <= expected.evaluations
    torch.testing.assert_close(state, end, rtol=tolerance, atol=tolerance)


# Requested times, knots and limits
LAYERS = tanh_layers(3, features=3, gain=2.0)
TIMES = ((0.0, 0.3, 0.31, 1.7, 2.0), (2.0, 1.5, 0.1, 0.0))
SMOOTHLY = [(field, times, 1) for field in (small_mlp(), SEASONAL.field) for times in TIMES]
JUMPING = [(LAYERS, times, 3) for times in ((0.0, 3.0), (0.0, 0.5, 1.0, 2.5, 3.0), (2.5, 2.0, 0.5))]


@pytest.mark.parametrize(("field", "times", "pieces"), [*SMOOTHLY, *JUMPING])
@pytest.mark.parametrize("method", FAST)
def test_every_requested_time_is_a_step_and_none_costs_an_evaluation(method, field, times, pieces):
    """Each step begins with the last slope of the one before, across requested times too, but for those behind a knot, where a
    piece begins with an evaluation; one more chooses the first step."""
    x = states()
    found, cost = solve(field, x, times, method, exact=True)
    assert set(times) | {knot for knot in field.knots if min(times) < knot < max(times)} <= set(cost.grid)
    assert cost.evaluations == pieces + 1 + stages(method) * (cost.accepted + cost.rejected)
    frozen = FixedStep(Embedded(method), grid=cost.grid)(field, x, times).states
    torch.testing.assert_close(found, frozen, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_a_step_cut_short_by_a_requested_time_does_not_shorten_the_next(method):
    """A short way between two times costs one step, and not those in which its size would grow back."""
    times = (0.0, 1.0, 2.0, 3.0, 4.0)
    _, few = solve(SEASONAL.field, states(), times, method, 1e-6, exact=True)
    _, more = solve(SEASONAL.field, states(), sorted((*times, 1.001, 2.001, 3.001)), method, 1e-6, exact=True)
    assert more.accepted + more.rejected <= few.accepted + few.rejected + 3


@pytest.mark.parametrize(("start", "stop"), [(0.0, 1.0), (1.0, 0.0), (2.0, 3.0), (0.0, 1000.0), (-3.0, -2.5)])
@pytest.mark.parametrize(("off", "hits"), [(-3, True), (0, True), (3, True), (9, False)])
def test_a_step_that_comes_within_rounding_of_a_stop_ends_on_it(start, stop, off, hits):
    """`off`: how many units in the last place the step is too short."""
    first = abs(stop - start) - off * EPS * max(abs(start), abs(stop))
    field = Function(lambda t, x: torch.ones_like(x))
    (_, end), cost = solve(field, states(), (start, stop), "bosh3", first_step=first)
    assert cost.grid[0] == start
    assert cost.grid[-1] == stop
    assert cost.accepted == (1 if hits else 2)
    torch.testing.assert_close(end, states() + stop - start)


@pytest.mark.parametrize("method", FAST)
@BOTH_WAYS
def test_first_and_largest_step_are_held(way, method):
    times = (0.0, 2.0)[::way]
    _, cost = solve(LINEAR.field, LINEAR.start, times, method, 1e-2, first_step=0.01, max_step=0.15)
    sizes = [way * (b - a) for a, b in pairwise(cost.grid)]
    assert min(sizes) > 0
    assert sizes[0] == pytest.approx(0.01, rel=1e-12)
    assert max(sizes) == pytest.approx(0.15, rel=1e-12)
    assert sum(size > 0.149 for size in sizes) >= 12
    _, cost = solve(LINEAR.field, LINEAR.start, (times[0], times[0] + way * 0.01), method, 1e-2, max_step=0.002)
    assert cost.accepted == 5, "a first step of the solver's own choice is no larger"


@pytest.mark.parametrize("method", FAST)
@BOTH_WAYS
def test_the_smallest_step_is_held(way, method):
    """A step that ends on a stop may be smaller."""
    times = (0.0, 1.0, 1.001, 2.0)[::way]
    _, cost = solve(SEASONAL.field, states(), times, method, 1e-4)
    smallest = min(abs(b - a) for a, b in pairwise(cost.grid) if b not in times)
    _, same = solve(SEASONAL.field, states(), times, method, 1e-4, min_step=0.9 * smallest)
    assert same == cost
    with pytest.raises(SolveError, match="step size underflows") as caught:
        solve(STIFF if way > 0 else Function(lambda t, x: 50 * x), states(), times, method, 1e-4, min_step=0.5)
    assert 0 < caught.value.step < 0.5


# Norms
@torch.no_grad()
def errors(field, x, grid, method):
    """x, x+ and the error of each step over the grid, from torchdiffeq's tableau."""
    tableau = SOLVERS[method].tableau
    for t, end in pairwise(grid):
        h, slopes = end - t, [field(t, x)]
        for c, row in zip(tableau.alpha.tolist(), tableau.beta, strict=True):
            new = x + h * sum(w * k for w, k in zip(row.tolist(), slopes, strict=True))
            slopes.append(field(t + c * h, new))
        yield x, new, h * sum(w * k for w, k in zip(tableau.c_error.tolist(), slopes, strict=True))
        x = new


def circle(t, x):
    """Images on a circle, (x, y, speed), each at its own speed."""
    return torch.stack([x[:, 2] * x[:, 1], -x[:, 2] * x[:, 0], 0 * x[:, 2]], dim=1)


CIRCLE = Function(circle)
MANY = torch.tensor([[1.0, 0.0, speed] for speed in (2.0, *(0.05,) * 255)], dtype=FLOAT64)
"""One hard image among many easy ones."""


def root_mean_square(error, dims):
    return error.square().mean(dims).sqrt()


NORMS = {
    "batch": lambda error: root_mean_square(error, (0, 1)),
    "global": lambda error: root_mean_square(error, (0, 1)),
    "sample": lambda error: root_mean_square(error, 1).amax(),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", FAST)
def test_the_error_of_every_accepted_step_is_below_the_tolerance_in_its_norm(method, norm):
    """And it is what the cost reports. Without other processes all ranks are this one."""
    tolerance = 1e-5
    _, cost = solve(CIRCLE, MANY, (0.0, 2.0), method, tolerance, norm=norm)
    ratios = [
        float(NORMS[norm](error / (tolerance + tolerance * torch.maximum(x.abs(), new.abs()))))
        for x, new, error in errors(CIRCLE, MANY, cost.grid, method)
    ]
    assert cost.accepted == len(ratios) >= 3
    assert max(ratios) <= 1 + 1e-9
    assert cost.error_ratios == pytest.approx(ratios, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize(("method", "speed"), [("dopri5", 2.0), ("bosh3", 1.0)])
def test_a_hard_image_among_easy_ones_meets_the_tolerance_by_sample_only(method, speed):
    x = MANY.clone()
    x[0, 2] = speed
    found = {norm: solve(CIRCLE, x, (0.0, 1.0), method, 1e-4, norm=norm) for norm in ("sample", "batch")}
    exact = torch.tensor([math.cos(speed), -math.sin(speed), speed], dtype=FLOAT64)
    errors = {
        norm: float(((end[0] - exact).abs() / (1e-4 + 1e-4 * exact.abs())).max()) for norm, ((_, end), _) in found.items()
    }
    assert errors["sample"] < 2
    assert errors["batch"] > 10
    assert found["sample"][1].accepted > found["batch"][1].accepted


@pytest.mark.parametrize("method", FAST)
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
def test_the_sample_norm_takes_as_many_steps_as_the_batch_or_more(method, tolerance):
    for field, x in ((CIRCLE, MANY), (small_mlp(), 3 * states(32, 3)), (SEASONAL.field, states(8, 3))):
        costs = [solve(field, x, (0.0, 4.0), method, tolerance, norm=norm)[1] for norm in ("batch", "sample")]
        assert costs[0].accepted <= costs[1].accepted


@pytest.mark.parametrize("method", FAST)
def test_a_batch_of_one_is_its_sample_and_a_single_process_is_the_globe(method):
    costs = [solve(CIRCLE, MANY[:1], (0.0, 4.0), method, norm=norm)[1] for norm in ("batch", "sample", "global")]
    assert costs[0].grid == costs[2].grid
    assert costs[0].grid == pytest.approx(costs[1].grid, rel=0, abs=1e-7)
    assert costs[0].evaluations == costs[1].evaluations


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", FAST)
def test_idle_states_of_a_tuple_change_no_step(method, norm):
    """Its norm is the largest of its components', so that a large quiet one does not hide a small busy one."""
    x, idle = states(), torch.zeros(4, 1000, dtype=FLOAT64)
    field = small_mlp()
    beside = Function(lambda t, state: (field(t, state[0]), 0 * state[1]))
    flow = Flow(beside, Adaptive(method, rtol=1e-5, atol=1e-5, norm=norm), depth=2)
    with torch.no_grad():
        end, _ = flow((x, idle))
    (_, alone), cost = solve(field, x, (0.0, 2.0), method, 1e-5, norm=norm)
    assert flow.cost.grid == pytest.approx(cost.grid, rel=0, abs=1e-7)
    torch.testing.assert_close(end, alone, rtol=1e-9, atol=1e-9)


# What it costs
class Synchronisations(TorchDispatchMode):
    """Counts how often a number is read from a tensor, for which a GPU would be waited for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def trained(flow, x, differentiated):
    """Numbers read in a solve and on the way back from it."""
    with torch.set_grad_enabled(differentiated), Synchronisations() as forward:
        end = flow(x)
    with Synchronisations() as backward:
        if differentiated:
            end.sum().backward()
    return forward.count, backward.count


@pytest.mark.parametrize("gradient", [None, "direct", "checkpoint"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("make", [small_mlp, lambda: tanh_layers(3, 3), lambda: SEASONAL.field], ids=["mlp", "layers", "cos"])
def test_a_number_is_read_once_an_attempt_and_once_for_the_first_size(make, norm, gradient):
    for first_step, own_choice in ((None, 1), (1.0, 0)):
        solver = Adaptive("dopri5", 1e-6, 1e-6, gradient or "direct", norm=norm, first_step=first_step)
        flow = Flow(make(), solver, depth=3)
        forward, backward = trained(flow, states().requires_grad_(gradient is not None), gradient is not None)
        assert flow.cost.rejected > 0 or own_choice, "a rejected attempt reads a number too"
        assert forward == flow.cost.accepted + flow.cost.rejected + own_choice
        assert backward == 0


@pytest.mark.parametrize("scheme", [Euler(), RK4()], ids=str)
@pytest.mark.parametrize("make", [small_mlp, lambda: tanh_layers(3, 3)], ids=["mlp", "layers"])
def test_fixed_steps_read_no_number(make, scheme):
    assert trained(Flow(make(), FixedStep(scheme, h=0.5), depth=3), states(), True) == (0, 0)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
@pytest.mark.parametrize("make", [lambda: small_mlp(4), lambda: tanh_layers(3, gain=2.0)], ids=["mlp", "layers"])
@pytest.mark.parametrize("method", FAST)
def test_evaluations_of_a_training_step(method, make, gradient):
    """The way back evaluates again what was accepted, if it was not stored: the last slope of the last step is not needed, and
    the first one of a piece is."""
    field = Watched(make())
    flow = Flow(field, Adaptive(method, 1e-5, 1e-5, gradient=gradient, first_step=1.0), depth=3)
    end = flow(states(4, 4).requires_grad_())
    assert flow.cost.evaluations == len(field.depths)
    field.depths.clear()
    end.sum().backward()
    assert len(field.depths) == (stages(method) * flow.cost.accepted if gradient == "checkpoint" else 0)
