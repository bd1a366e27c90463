"""The gradients of adaptive steps: those of plain autograd through the same steps, stored or evaluated again."""

import copy
from itertools import pairwise

import pytest
import torch
from problems import FLOAT64, Normed, Watched, small_mlp, states, tanh_layers
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call
from torchdiffeq._impl.odeint import SOLVERS

from continuum import MLP, Adaptive, Autonomous, Expansion, Field, Flow, PiecewiseConstant
from continuum.analysis.memory import StorageTally, peak_memory
from continuum.bases import Hat
from continuum.fields import Function, PreActivation

FAST = ["dopri5", "bosh3", "dopri8"]
EXACT = pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
ALL = pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
TOLERANCES = [(torch.bfloat16, 7e-3, True), (torch.bfloat16, 8e-3, False), (torch.float16, 9e-4, True)]
TOLERANCES += [(torch.float16, 1e-3, False), (torch.float32, 1e-7, True), (torch.float32, 2e-7, False)]


def constant(h):
    """Every step is accepted, and h long."""
    return {"rtol": 10.0, "atol": 10.0, "first_step": h, "max_step": h}


def autonomous():
    torch.manual_seed(0)
    return Autonomous(nn.Sequential(nn.Linear(2, 2), nn.Tanh()).double())


class Pulled(Field):
    """x' = rate (tanh(W x + b t) - x), with a parameter that it does not use."""

    def __init__(self, rate=1.0, features=2, dtype=FLOAT64):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(features, features, dtype=dtype)
        self.unused = nn.Parameter(torch.ones(1, dtype=dtype))
        self.rate = rate

    def forward(self, t, x):
        return self.rate * (torch.tanh(x @ self.linear.weight.T + self.linear.bias * t) - x)


def on_hats():
    torch.manual_seed(0)
    return Expansion([small_mlp(2, 3) for _ in range(3)], Hat(3, depth=2.0))


class Energy(Field):
    """x' = -dE/dx, by autograd: from a leaf of its own, or from the state as it comes."""

    def __init__(self, own_leaf):
        super().__init__()
        torch.manual_seed(0)
        self.energy = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
        self.own_leaf = own_leaf

    def forward(self, t, x):
        with torch.enable_grad():
            if self.own_leaf and not x.requires_grad:
                x = x.detach()
            x.requires_grad_()
            return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


class Careless(Energy):
    """The same, where it is left to the solver that gradients are enabled and the state requires one."""

    def forward(self, t, x):
        return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


def layer_between(field, t, end):
    return field.at((t + end) / 2) if isinstance(field, PiecewiseConstant) else field


def unrolled(field, x, grid, method):
    """The states on the grid by a plain loop over torchdiffeq's tableau, open to autograd."""
    tableau, path, slope = SOLVERS[method].tableau, [x], None
    for t, end in pairwise(grid):
        h, layer = end - t, layer_between(field, t, end)
        slopes = [layer(t, x).to(x.dtype) if slope is None else slope]
        for c, row in zip(tableau.alpha.tolist(), tableau.beta, strict=True):
            new = x + h * sum(w * k for w, k in zip(row.tolist(), slopes, strict=True) if w)
            slopes.append(layer(end if c == 1 else t + c * h, new).to(x.dtype))
        x, slope = new, None if end in field.knots else slopes[-1]
        path.append(x)
    return path


def loss(some):
    """A smooth function of some states."""
    return sum((state**3).sum() + state.sin().sum() for state in some)


def gradients(field, x, some):
    inputs = [x, *field.parameters()]
    found = torch.autograd.grad(loss(some), inputs, allow_unused=True)
    return [torch.zeros_like(value) if grad is None else grad for value, grad in zip(inputs, found, strict=True)]


def assert_close(found, expected, within=1e-10):
    """Relative to the largest entry of all gradients."""
    size = max(float(gradient.abs().max()) for gradient in expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=within * size)


# Exactness
FIELDS = {
    "autonomous": autonomous,
    "with time": Pulled,
    "jumps": lambda: tanh_layers(2, features=2, gain=2.0),
    "on hats": on_hats,
    "energy": lambda: Energy(True),
    "energy of the state itself": lambda: Energy(False),
    "energy without care": lambda: Careless(False),
}


SPANS, FOUR_TIMES = ((0.0, 1.0), (0.7, 0.2), (0.0, 0.4, 1.0)), (0.0, 0.4, 1.0, 2.0)
CHECKED = [(case, times, slice(1, 2)) for case in ("autonomous", "with time") for times in SPANS]
CHECKED += [("jumps", (0.0, 2.0), slice(1, 2)), ("jumps", (1.7, 0.2), slice(0, 2)), ("jumps", FOUR_TIMES, slice(1, 3))]


@pytest.mark.parametrize(("case", "times", "counted"), CHECKED)
@pytest.mark.parametrize("method", FAST)
@EXACT
def test_gradcheck(gradient, method, case, times, counted):
    """Also of states in which the second of two layers has no part."""
    field = FIELDS[case]()
    flow = Flow(field, Adaptive(method, gradient=gradient, **constant(0.5)), depth=2)
    assert gradcheck(lambda x, *_: flow.trajectory(x, times)[counted], (states(1, 2).requires_grad_(), *field.parameters()))


@pytest.mark.parametrize(
    ("times", "counted"), [((0.0, 0.3, 1.0, 1.1, 2.0), (1, 2, 4)), ((0.0, 0.3, 2.0), (0, 1)), ((2.0, 1.0, 0.1), (2,))], ids=str
)
@pytest.mark.parametrize("case", FIELDS)
@pytest.mark.parametrize("method", FAST)
def test_gradients_are_those_of_the_unrolled_steps(method, case, times, counted):
    """With a loss on all times, or on some of them."""
    field, x, found = FIELDS[case](), states(3, 2).requires_grad_(), {}
    for gradient in ("direct", "checkpoint"):
        flow = Flow(field, Adaptive(method, 1e-4, 1e-4, gradient=gradient), depth=2)
        found[gradient] = gradients(field, x, flow.trajectory(x, times, exact=True)[list(counted)])
    path = unrolled(field, x, flow.cost.grid, method)
    expected = gradients(field, x, [path[flow.cost.grid.index(times[i])] for i in counted])
    assert_close(found["checkpoint"], found["direct"])
    assert_close(found["direct"], expected)


@pytest.mark.parametrize("method", FAST)
@EXACT
def test_rejected_steps_leave_no_trace_in_the_gradient(gradient, method):
    field, x = Pulled(rate=30.0), states(2, 2).requires_grad_()
    flow = Flow(field, Adaptive(method, 1e-4, 1e-4, gradient=gradient, first_step=2.0), depth=2)
    end = flow(x)
    assert flow.cost.rejected >= 3
    assert_close(gradients(field, x, [end]), gradients(field, x, unrolled(field, x, flow.cost.grid, method)[-1:]))


@EXACT
def test_what_has_no_part_in_the_loss_has_no_gradient(gradient):
    field = PiecewiseConstant([Pulled(), Pulled()])
    field.layers[1].linear.bias.requires_grad_(False)
    flow = Flow(field, Adaptive("dopri5", gradient=gradient), depth=2)
    flow.trajectory(states(2, 2), (0, 0.5, 1, 2))[:3].sum().backward()
    for layer in field.layers:
        assert layer.unused.grad is None or not layer.unused.grad.any()
    assert field.layers[0].linear.weight.grad.abs().sum() > 0
    assert not field.layers[1].linear.weight.grad.any()
    assert field.layers[1].linear.bias.grad is None


@EXACT
def test_a_state_alone_or_a_field_alone_has_a_gradient(gradient):
    x = states(2, 2).requires_grad_()
    still = Flow(small_mlp(2, 3).requires_grad_(False), Adaptive("dopri5", gradient=gradient), depth=1)
    still(x).sum().backward()
    assert x.grad.abs().min() > 0
    flow = Flow(small_mlp(2, 3), Adaptive("dopri5", gradient=gradient), depth=1)
    flow(states(2, 2)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in flow.parameters())
    constant = Flow(Function(lambda t, x: torch.ones_like(x)), Adaptive("dopri5", gradient=gradient), depth=1)
    (ones,) = torch.autograd.grad(constant(x).sum(), x)
    assert torch.equal(ones, torch.ones_like(x)), "nothing needs a gradient but the state"


@pytest.mark.parametrize("case", ["energy", "energy of the state itself", "energy without care"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_the_adjoint_of_a_field_that_differentiates_inside(method, case):
    field, x = FIELDS[case](), states(3, 2).requires_grad_()
    flow = Flow(field, Adaptive(method, 1e-7, 1e-7, gradient="adjoint"), depth=2)
    found = gradients(field, x, [flow(x)])
    assert_close(found, gradients(field, x, unrolled(field, x, flow.cost.grid, method)[-1:]), within=1e-5)


def test_the_adjoint_of_a_slope_that_depends_on_nothing():
    x = states(2, 2).requires_grad_()
    flow = Flow(Function(lambda t, x: torch.ones_like(x)), Adaptive("dopri5", gradient="adjoint"), depth=1)
    (found,) = torch.autograd.grad(flow(x).sum(), x)
    torch.testing.assert_close(found, torch.ones_like(x))


def test_the_adjoint_takes_no_steps_for_the_sake_of_the_depth():
    """torchdiffeq solves for a gradient of the times too; where they jump at knots, in hundreds of steps."""
    field = on_hats()
    asked = []
    field.register_forward_pre_hook(lambda field, inputs: asked.append(getattr(inputs[0], "requires_grad", False)))
    flow = Flow(field, Adaptive("dopri5", 1e-6, 1e-6, gradient="adjoint"), depth=2)
    flow(states(3, 2)).sum().backward()
    assert len(asked) > flow.cost.evaluations
    assert not any(asked)


# Precision
class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.second(torch.tanh(self.norm(self.first(x))))


@pytest.fixture
def _supported(dtype):
    try:
        with torch.autocast("cpu", dtype=dtype):
            nn.Linear(2, 2)(torch.ones(1, 2))
            nn.Conv2d(1, 1, 1)(torch.ones(1, 1, 1, 1))
    except RuntimeError as error:
        pytest.skip(f"this torch does not compute in {dtype} on a CPU: {error}")


def under(dtype, solve, field, x):
    """The gradients of the parameters, computed under autocast where a dtype is given."""
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        end = solve(field, x)
    assert end.dtype == torch.float32
    return torch.autograd.grad(end.square().sum(), tuple(field.parameters()))


SHAPES = {"linear": (lambda: MLP(3, 8), (8, 3)), "convolutions": (lambda: Autonomous(Convolved()), (4, 4, 6, 6))}


@NARROW
@pytest.mark.parametrize(("make", "shape"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
@pytest.mark.usefixtures("_supported")
def test_gradients_under_autocast_are_as_near_as_plain_autograds(method, make, shape, dtype):
    """To those in float32, for each parameter; root mean squares over six networks, because with one the errors are luck."""
    grid = (0.0, 0.25, 0.5, 0.75, 1.0)
    solves = {"plain": lambda field, x: unrolled(field, x, grid, method)[-1]}
    for gradient in ("direct", "checkpoint"):
        solver = Adaptive(method, gradient=gradient, **constant(0.25))
        solves[gradient] = lambda field, x, solver=solver: Flow(field, solver, depth=1)(x)
    squares = dict.fromkeys(solves, 0)
    for seed in range(6):
        torch.manual_seed(seed)
        field, x = make(), torch.randn(shape)
        exact = under(None, solves["plain"], field, x)
        found = {name: under(dtype, solve, field, x) for name, solve in solves.items()}
        for name, gradient in found.items():
            squares[name] += torch.stack([(a - b).square().sum() for a, b in zip(gradient, exact, strict=True)])
        assert all(torch.equal(a, b) for a, b in zip(found["direct"], found["checkpoint"], strict=True))
    assert (squares["plain"] > 0).all()
    for name in ("direct", "checkpoint"):
        assert (squares[name] <= 1.2**2 * squares["plain"]).all(), (squares[name] / squares["plain"]).sqrt()


@NARROW
@pytest.mark.parametrize("earlier", [False, True], ids=["", "after an evaluation without gradient"])
@EXACT
@pytest.mark.usefixtures("_supported")
def test_backward_inside_and_outside_of_autocast(gradient, earlier, dtype):
    """A weight that autocast has cast without gradient, for whomever, is not met in a solve that wants one."""
    found = []
    for inside in (True, False):
        flow = Flow(small_mlp(3, 3).float(), Adaptive("dopri5", 0.05, 0.05, gradient=gradient), depth=1)
        x = states(4, 3).float().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            if earlier:
                with torch.no_grad():
                    flow(x)
            end = flow(x)
            assert end.dtype == torch.float32
            if inside:
                end.square().sum().backward()
        if not inside:
            end.square().sum().backward()
        found.append([x.grad, *(parameter.grad for parameter in flow.parameters())])
    for one, other in zip(*found, strict=True):
        assert one.isfinite().all()
        assert one.abs().sum() > 0
        assert torch.equal(one, other)


@NARROW
@EXACT
@pytest.mark.filterwarnings("ignore:.*below the rounding")
@pytest.mark.usefixtures("_supported")
def test_under_autocast_a_gradient_changes_no_step(gradient, dtype):
    """Slopes are taken to the precision of the state before they are summed, in the error too, whatever is kept of them."""
    flow = Flow(small_mlp(3, 3).float(), Adaptive("dopri5", 1e-3, 1e-3, gradient=gradient), depth=4)
    x, costs = states(4, 3).float(), []
    for differentiated in (False, True):
        with torch.autocast("cpu", dtype=dtype), torch.set_grad_enabled(differentiated):
            flow(x)
        costs.append(flow.cost)
    assert costs[0] == costs[1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("gradient", [None, "direct", "checkpoint", "adjoint"])
@pytest.mark.parametrize(("dtype", "rtol", "warns"), TOLERANCES, ids=str)
def test_a_tolerance_below_the_rounding_of_the_field_warns(dtype, rtol, warns, gradient):
    flow = Flow(small_mlp(3, 3).float(), Adaptive("dopri5", rtol, 0.1, gradient=gradient or "direct"), depth=1)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32), torch.set_grad_enabled(gradient is not None):
        if warns:
            with pytest.warns(UserWarning, match=f"rtol = {rtol:g} is below the rounding .* {str(dtype)[6:]}"):
                flow(states(4, 3).float())
        else:
            flow(states(4, 3).float())


# Statistics and random numbers
@pytest.mark.parametrize("options", [{}, {"first_step": 3.0}], ids=["", "rejections"])
@pytest.mark.parametrize("make", [Normed, lambda: PiecewiseConstant([Normed(), Normed()])], ids=["smooth", "jumps"])
def test_batch_statistics_are_those_of_one_forward_pass_in_all_modes(make, options):
    """Also of one without gradient. The adjoint's steps are torchdiffeq's own: behind a knot they differ in size."""
    x, buffers = states(8, 3), {}
    for gradient in ("direct", "checkpoint", "adjoint"):
        for differentiated in (False, True):
            flow = Flow(make(), Adaptive("dopri5", 1e-5, 1e-5, gradient=gradient, **options), depth=2).train()
            with torch.set_grad_enabled(differentiated):
                end = flow(x.clone().requires_grad_(differentiated))
            if differentiated:
                end.square().sum().backward()
                assert all(parameter.grad.abs().sum() > 0 for parameter in flow.parameters())
            counted = sum(int(count) for name, count in flow.named_buffers() if "num_batches" in name)
            assert counted == flow.cost.evaluations
            buffers[gradient, differentiated] = dict(flow.named_buffers())
    for gradient, differentiated in buffers:
        for name, buffer in buffers[gradient, differentiated].items():
            assert torch.equal(buffer, buffers[gradient, False][name]), name
            if gradient == "checkpoint":
                assert torch.equal(buffer, buffers["direct", False][name]), name
            elif make is Normed:
                torch.testing.assert_close(buffer, buffers["direct", False][name], rtol=1e-8, atol=1e-8)


@EXACT
def test_gradients_through_batch_statistics_are_those_of_the_unrolled_steps(gradient):
    field, x = Normed(), states(8, 3).requires_grad_()
    flow = Flow(field, Adaptive("dopri5", 1e-5, 1e-5, gradient=gradient), depth=2).train()
    end = flow(x)
    found = gradients(field, x, [end])
    assert_close(found, gradients(field, x, unrolled(field, x, flow.cost.grid, "dopri5")[-1:]))


class Drawn(Field):
    """A field that draws a mask of its own at every evaluation, in evaluation mode too, of which solvers do not know."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(2, 2, dtype=FLOAT64)

    def forward(self, t, x):
        return torch.rand(x.shape, dtype=x.dtype) * torch.tanh(self.linear(x))


@pytest.mark.parametrize("make", [Drawn, lambda: PiecewiseConstant([Drawn(), Drawn()])], ids=["smooth", "jumps"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_random_numbers_are_drawn_again_and_given_back(method, make):
    found = []
    for gradient in ("direct", "checkpoint"):
        field, x = make().eval(), states(2, 2).requires_grad_()
        flow = Flow(field, Adaptive(method, 0.05, 0.05, gradient=gradient, max_step=0.5, first_step=2.0), depth=2)
        torch.manual_seed(7)
        end = flow(x)
        before = torch.get_rng_state()
        found.append([end, *gradients(field, x, [end])])
        assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("module", [nn.Dropout(0.3), nn.RReLU(), Drawn()], ids=["Dropout", "RReLU", "Drawn"])
@ALL
def test_a_field_that_draws_in_training_is_refused(gradient, module):
    """Whoever draws: an error control would take the noise for an error of the step."""
    field = module if isinstance(module, Field) else Autonomous(nn.Sequential(nn.Linear(2, 2, dtype=FLOAT64), module))
    flow = Flow(field, Adaptive("dopri5", gradient=gradient), depth=1)
    with pytest.raises(TypeError, match="draws random numbers at every evaluation"):
        flow.train()(states(2, 2))
    flow.eval()(states(2, 2))


# Whatever autograd is asked for
@pytest.mark.parametrize("case", FIELDS)
@pytest.mark.parametrize("method", FAST)
@EXACT
def test_second_derivatives_are_those_of_the_unrolled_steps(gradient, method, case):
    field, x = FIELDS[case](), states(3, 2).requires_grad_()
    flow = Flow(field, Adaptive(method, 1e-3, 1e-3, gradient=gradient), depth=2)
    found = []
    for end in (flow(x), unrolled(field, x, flow.cost.grid, method)[-1]):
        (first,) = torch.autograd.grad(loss([end]), x, create_graph=True)
        found.append(gradients(field, x, [first]))
    assert_close(*found)


@EXACT
def test_a_hook_on_a_parameter_acts_once(gradient):
    flow, x = Flow(small_mlp(2, 3), Adaptive("dopri5", gradient=gradient), depth=1), states(2, 2)
    parameters = list(flow.parameters())
    plain = torch.autograd.grad(flow(x).sum(), parameters)
    for parameter in parameters:
        parameter.register_hook(lambda gradient: 2 * gradient)
    flow(x).sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in parameters], [2 * once for once in plain])


@pytest.mark.parametrize("case", ["autonomous", "with time", "jumps"])
@pytest.mark.parametrize("method", FAST)
def test_transforms_of_functions(method, case):
    """Forward-mode and reverse-mode derivatives agree; a map over samples shares its steps, as a batch does."""
    field, x = FIELDS[case](), states(3, 2)
    flow = Flow(field, Adaptive(method, 1e-3, 1e-3), depth=2)
    (expected,) = torch.autograd.grad(loss([flow(x.requires_grad_())]), x)
    x = x.detach()
    assert_close([torch.func.grad(lambda x: loss([flow(x)]))(x)], [expected])
    direction = states(3, 2, seed=2)
    _, along = torch.func.jvp(lambda x: loss([flow(x)]), (x,), (direction,))
    torch.testing.assert_close(along, (expected * direction).sum())
    assert_close([torch.func.vmap(lambda row: flow(row[None])[0])(x)], [flow(x)])


@EXACT
def test_a_checkpoint_around_a_flow_solves_it_twice(gradient):
    field = Watched(small_mlp(2, 3))
    flow, x = Flow(field, Adaptive("dopri5", gradient=gradient), depth=1), states(2, 2).requires_grad_()
    end = torch.utils.checkpoint.checkpoint(flow, x, use_reentrant=False)
    (found,) = torch.autograd.grad(end.sum(), x)
    assert len(field.depths) <= (2 if gradient == "direct" else 3) * flow.cost.evaluations
    (expected,) = torch.autograd.grad(flow(x).sum(), x)
    assert_close([found], [expected])


@pytest.mark.parametrize("case", FIELDS)
@EXACT
def test_a_graph_that_is_retained_gives_the_same_again(gradient, case):
    field, x = FIELDS[case](), states(2, 2).requires_grad_()
    path = Flow(field, Adaptive("dopri5", gradient=gradient), depth=2).trajectory(x, (0, 0.5, 2))
    inputs = [x, *field.parameters()]
    passes = [
        torch.autograd.grad(path.square().sum(), inputs, retain_graph=retain, allow_unused=True)
        for retain in (True, True, False)
    ]
    for first, *others in zip(*passes, strict=True):
        assert all(other is first or torch.equal(other, first) for other in others)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(path.square().sum(), inputs, allow_unused=True)


@EXACT
def test_parameters_changed_before_the_backward_pass_are_noticed(gradient):
    flow = Flow(small_mlp(2, 3), Adaptive("dopri5", gradient=gradient), depth=1)
    end = flow(states(2, 2))
    with torch.no_grad():
        next(iter(flow.parameters())).add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|changed in place"):
        end.sum().backward()


class Square(Field):
    """x' = w x^2, which is not differentiated with a state that was overwritten."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(-0.5, dtype=FLOAT64))

    def forward(self, t, x):
        return self.w * x**2


@pytest.mark.parametrize("which", [0, 1], ids=["the first", "a requested one"])
@EXACT
def test_states_changed_before_the_backward_pass_are_noticed(gradient, which):
    """As where the next batch is copied into the place of this one. A requested state is given to the caller."""
    field, x = Square(), states(2, 2).requires_grad_()
    path = Adaptive("dopri5", gradient=gradient)(field, x, (0.0, 0.5, 1.0), exact=True).states
    with torch.no_grad():
        path[which].mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|changed in place"):
        path[2].sum().backward()


@EXACT
def test_the_end_may_be_changed_in_place(gradient):
    field, x = Square(), states(2, 2).requires_grad_()
    found = []
    for change in (torch.Tensor.mul, torch.Tensor.mul_):
        end = Flow(field, Adaptive("dopri5", gradient=gradient), depth=1)(x)
        found.append(torch.autograd.grad(change(end, 2).sum(), (x, field.w)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("leaf", [True, False], ids=["a leaf", "an output"])
@pytest.mark.parametrize("where", ["alone", "beside parameters", "in a later layer"])
@ALL
def test_a_gradient_that_leads_out_of_the_field_is_not_lost(gradient, where, leaf):
    """It comes back as any other, or is refused by the adjoint, which would lose it in silence."""
    tensor = torch.ones(2, dtype=FLOAT64, requires_grad=True)
    tensor = tensor if leaf else tensor.sin()
    field = Function(lambda t, x: torch.tanh(x * tensor))
    if where == "beside parameters":
        known = small_mlp(2, 3)
        field = Function(lambda t, x: known(t, x) * tensor)
        field.known = known
    elif where == "in a later layer":
        field = PiecewiseConstant([small_mlp(2, 3), field])
    flow, x = Flow(field, Adaptive("dopri5", gradient=gradient), depth=2), states(2, 2)
    if gradient == "adjoint":
        with pytest.raises(TypeError, match=r"requires a gradient and is neither its state nor one of its parameters"):
            flow(x)
        with torch.no_grad():
            assert flow(x).isfinite().all()
        return
    found = torch.autograd.grad(loss([flow(x)]), tensor, retain_graph=True)
    assert_close(found, torch.autograd.grad(loss(unrolled(field, x, flow.cost.grid, "dopri5")[-1:]), tensor))


@ALL
def test_parameters_put_in_the_place_of_a_fields_own_have_gradients(gradient):
    """By `functional_call`, as where another network makes the weights: on the way back the field has its own again."""
    field, x = small_mlp(2, 3), states(2, 2).requires_grad_()
    flow = Flow(field, Adaptive("dopri5", 1e-7, 1e-7, gradient=gradient), depth=1)
    scale = torch.tensor(1.5, dtype=FLOAT64, requires_grad=True)
    other = copy.deepcopy(field)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    end = functional_call(flow, {f"field.{name}": scale * p.detach() for name, p in field.named_parameters()}, (x,))
    found = torch.autograd.grad(loss([end]), (x, scale))
    by_x, *by_parameters = gradients(other, x, unrolled(other, x, flow.cost.grid, "dopri5")[-1:])
    pairs = zip(by_parameters, field.parameters(), strict=True)
    by_scale = sum((gradient * parameter.detach()).sum() for gradient, parameter in pairs)
    assert_close(found, (by_x, by_scale), within=1e-5 if gradient == "adjoint" else 1e-10)


# Memory
def peak(gradient, steps, method="dopri5"):
    """The most memory that a forward and a backward pass hold, in bytes and in states, and the cost."""
    torch.manual_seed(0)
    field = Autonomous(PreActivation(8, 8, norm=lambda channels: nn.GroupNorm(4, channels)))
    flow = Flow(field, Adaptive(method, gradient=gradient, **constant(1 / steps)), depth=1)
    x = torch.randn(2, 8, 8, 8)
    held = peak_memory(lambda: flow(x).square().sum().backward(), torch.device("cpu"))
    return held, held / (x.numel() * x.element_size()), flow.cost


def test_what_is_evaluated_again_is_not_stored():
    """Of the graphs of all evaluations remain two states a step, and the graphs of one step."""
    for steps, evaluations, share in ((4, 25, 0.45), (17, 103, 0.17)):
        stored, _, cost = peak("direct", steps)
        held, _, same = peak("checkpoint", steps)
        assert cost.evaluations == same.evaluations == evaluations
        assert held < share * stored, (evaluations, held / stored)


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_a_further_step_holds_two_states_more(method):
    (_, few, cost), (_, many, more) = (peak("checkpoint", steps, method) for steps in (4, 8))
    assert many - few <= 2.05 * (more.accepted - cost.accepted)


@EXACT
def test_after_the_backward_pass_nothing_is_held(gradient):
    """Though the end is: what remains are it, and the gradients of the parameters."""
    flow = Flow(small_mlp(8, 3).float(), Adaptive("dopri5", gradient=gradient, **constant(0.25)), depth=1)
    x = torch.randn(1000, 8)
    with StorageTally() as tally:
        end = flow(x)
        assert tally.live > 3 * end.nbytes
        end.sum().backward()
        assert tally.live < 1.1 * end.nbytes
