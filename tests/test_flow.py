"""What a flow takes: fields from elsewhere, depths and times; and what it refuses."""

import math

import pytest
import torch
import torchdiffeq
from problems import FLOAT64, LOGISTIC, PROBLEMS, states
from torch import nn

from continuum import Adaptive, Expansion, Flow, PiecewiseConstant, StochasticDepth
from continuum.bases import Hat
from continuum.fields import MLP, Autonomous, Function, TwoColumns

SOLVERS = ["rk4:h=0.0625", "adams_bashforth:order=3,h=0.015625", "bosh3", "dopri8", "rk4:h=0.0625,gradient=checkpoint"]
SOLVERS += ["dopri5:gradient=adjoint", "dopri5:engine=torchdiffeq"]
ODD_TIMES = [[], [0], [0, 0], [0, 1, 1], [0, 1, 0.5], [1, 0, 0.5], [0, float("nan")]]
ODD_TENSORS = [torch.tensor([[0.0, 1.0], [0.0, 2.0]]), torch.tensor(1.0)]


class Driven(nn.Module):
    """Written for torchdiffeq: t is a tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(2, 2, dtype=FLOAT64)

    def forward(self, t, y):
        time = t.expand(len(y), 1)
        return torch.tanh(self.linear(y)) * torch.sin(t) + torch.cos(time)


# Fields from elsewhere
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_module_for_torchdiffeq_runs_as_it_is(solver):
    module, x = Driven(), states(3, 2).requires_grad_()
    expected = torchdiffeq.odeint(module, x, torch.tensor([0.0, 1.0], dtype=FLOAT64), rtol=1e-10, atol=1e-10)[-1]
    tight = ":rtol=1e-8,atol=1e-8" if ":" not in solver else ",rtol=1e-8,atol=1e-8"
    end = Flow(module, solver + tight if "h=" not in solver else solver, 1)(x)
    torch.testing.assert_close(end, expected, rtol=1e-5, atol=1e-5)
    inputs = [x, *module.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), inputs) for out in (end, expected)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "build",
    [
        lambda field: PiecewiseConstant([field, MLP(2, hidden=3).double()]),
        lambda field: Expansion(field, Hat(2, depth=2)),
        lambda field: TwoColumns(field, field),
        lambda field: StochasticDepth(field, 0.5).eval(),
    ],
    ids=["layers", "weights of depth", "columns", "noise"],
)
def test_fields_are_made_of_such_modules_as_of_fields(build):
    for solver in ("euler:h=0.25", "bosh3"):
        flow, twin = (Flow(build(field).drift(), solver, 2) for field in (Driven(), Function(Driven())))
        torch.manual_seed(0)
        twin.load_state_dict(flow.state_dict())
        assert torch.equal(flow(states(3, 2)), twin(states(3, 2)))


@pytest.mark.parametrize(
    "solver", ["rk4", "rk4:gradient=checkpoint", "dopri5", "dopri5:gradient=adjoint", "dopri5:engine=torchdiffeq"]
)
@pytest.mark.parametrize("differentiated", [False, True])
def test_a_field_that_writes_to_its_state_is_refused(solver, differentiated):
    flow, x = Flow(Autonomous(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 2))), solver, 1), torch.randn(3, 2)
    kept = x.clone()
    with (
        pytest.raises(RuntimeError, match=r"writes to its state in place|leaf Variable .* in-place"),
        torch.set_grad_enabled(differentiated),
    ):
        flow(x)
    copying = Flow(Function(lambda t, x: torch.relu_(x.clone())), solver, 1)
    assert copying(kept).isfinite().all()


# Depths and times
def test_depths_that_do_not_fit_the_field_are_refused():
    layers = PiecewiseConstant(MLP(2, hidden=3) for _ in range(6))
    for field in (layers, Expansion(MLP(2, hidden=3), Hat(3, depth=6))):
        for depth in (1, 9):
            with pytest.raises(ValueError, match=rf"defined from depth 0 to 6, not to {depth}"):
                Flow(field, "euler", depth)
        Flow(field, "euler", 6)
    for solver in ("rk4", "dopri5"):
        with pytest.raises(ValueError, match=r"increasing order.*\(0\.8, 0\.37\)"):
            Flow(Function(lambda t, x: x, knots=(0.8, 0.37)), solver, 1)


@pytest.mark.parametrize("solver", ["euler:h=0.5", "dopri5"])
@pytest.mark.parametrize(
    ("times", "message"),
    [*((times, "strictly monotone") for times in ODD_TIMES), *((times, "common to the batch") for times in ODD_TENSORS)],
)
def test_times_are_monotone_and_common_to_the_batch(times, message, solver):
    with pytest.raises(ValueError, match=f"times are .*{message}"):
        Flow(MLP(2, hidden=3), solver, 2).trajectory(torch.ones(2, 2), times)


@pytest.mark.parametrize("solver", ["rk4:h=0.1", "rk4:grid=0/0.1/0.3/0.7/1", "euler_maruyama:h=0.1"])
def test_numbers_of_float32_stand_for_points_of_the_grid(solver):
    field = StochasticDepth(MLP(2, hidden=3), 1.0) if "maruyama" in solver else MLP(2, hidden=3)
    flow, x = Flow(field, solver, depth=1), torch.ones(1, 2)
    torch.manual_seed(0)
    expected = flow.trajectory(x, [0.0, 0.1, 0.3, 0.7, 1.0], exact=True)
    torch.manual_seed(0)
    assert torch.equal(flow.trajectory(x, torch.tensor([0.0, 0.1, 0.3, 0.7, 1.0]), exact=True), expected)
    assert Flow(field, solver, depth=torch.tensor(0.7)).depth == 0.7


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_states_between_the_points_of_a_fixed_grid_are_of_order_four(problem):
    times = [0.0, 0.55, 1.35, 2.0]
    exact = torch.stack([problem.exact(t, 1.0) for t in times])
    for solver in ("rk4", "rk4:gradient=checkpoint"):
        option = "," if ":" in solver else ":"
        errors = [
            (Flow(problem.field, f"{solver}{option}h={1 / m}", 2).trajectory(problem.start, times) - exact).abs().max().item()
            for m in (10, 20, 40)
        ]
        assert math.log2(errors[0] / errors[-1]) > 2 * 3.3, errors


def test_times_between_the_points_of_a_fixed_grid_have_gradients():
    flow, x = Flow(MLP(2, hidden=3).double(), "rk4:h=0.5", 1), states(3, 2)
    times = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=FLOAT64, requires_grad=True)
    (found,) = torch.autograd.grad(flow.trajectory(x, times)[1].sum(), times)
    slope = flow.field(0.3, flow.trajectory(x, [0.0, 0.3, 1.0])[1]).sum()
    torch.testing.assert_close(found[1], slope)


@pytest.mark.parametrize("solver", ["rk4:h=0.0078125", "dopri5:rtol=1e-8,atol=1e-8"])
def test_complex_states(solver):
    """x' = 2i x, whose field sees a real depth; d Im x(T) / dT = 2 cos 2T."""
    seen = []

    def rotation(t, x):
        seen.append(t.dtype)
        return 2j * x

    times = torch.tensor([0.0, 1.0], dtype=FLOAT64, requires_grad=True)
    end = Flow(Function(rotation), solver, 1).trajectory(torch.ones(1, 1, dtype=torch.complex128), times)[-1]
    (found,) = torch.autograd.grad(end.imag.sum(), times)
    assert abs(found[1].item() - 2 * math.cos(2)) < 1e-6
    assert set(seen) == {FLOAT64}


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
def test_a_state_without_axes(gradient):
    """It is one sample."""
    field = Function(lambda t, x: x * (1 - x))
    x = torch.tensor(0.2, dtype=FLOAT64, requires_grad=True)
    flow = Flow(field, Adaptive("dopri5", 1e-8, 1e-8, gradient=gradient, norm="sample"), 1)
    end = flow(x)
    expected = LOGISTIC.exact(1.0, 1.0)
    assert end.shape == ()
    assert expected.dim() == 2
    torch.testing.assert_close(end, x * math.e / (1 + x * (math.e - 1)), rtol=1e-6, atol=1e-6)
