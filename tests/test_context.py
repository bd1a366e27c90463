"""Further arguments of a field: they reach it at every evaluation, and gradients reach them in every gradient mode."""

import pytest
import torch
from problems import FLOAT64, states
from torch import Tensor, nn

from continuum import RK4, Adaptive, Autonomous, Brownian, Coupled, Euler, FixedStep, Flow, Momentum, PiecewiseConstant
from continuum.bases import Hat
from continuum.fields import MLP, Field, Function, Scaled, Split, TwoColumns
from continuum.noise import StochasticDepth
from continuum.schemes import Coupling, LieTrotter
from continuum.solvers import SolveError, Solver, parse
from continuum.weights import Expansion


class Driven(Field):
    """x' = tanh(W x + control) * gain["by"], with a name that is no tensor, and nothing in the place of a mask."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.inner = nn.Linear(size, size).double()

    def forward(self, t, x, control, gain, mask=None, name=""):
        assert mask is None
        assert name == "driven"
        return torch.tanh(self.inner(x) + control) * gain["by"][0]


def driven(count: int = 1, size: int = 4) -> Field:
    torch.manual_seed(0)
    return PiecewiseConstant(Driven(size) for _ in range(count))


def context_of(control: Tensor, gain: Tensor) -> tuple[object, ...]:
    return control, {"by": [gain]}, None, "driven"


def inputs(size: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, control = torch.randn(2, 3, size, generator=generator, dtype=FLOAT64)
    return x.requires_grad_(), control.requires_grad_(), torch.tensor(0.7, dtype=FLOAT64, requires_grad=True)


DIRECT: list[tuple[str, float]] = [
    ("euler:h=0.5", 1e-12),
    ("rk4:h=0.5", 1e-12),
    ("rk4:h=0.5,gradient=checkpoint", 1e-12),
    ("rk4:h=0.5,gradient=checkpoint,every=2", 1e-12),
    ("dopri5:rtol=1e-6,atol=1e-6", 1e-12),
    ("dopri5:rtol=1e-6,atol=1e-6,gradient=checkpoint", 1e-12),
    ("two_step_midpoint:h=0.5", 1e-12),
    ("two_step_midpoint:h=0.5,gradient=reversible", 1e-11),
    ("dopri5:rtol=1e-9,atol=1e-9,gradient=adjoint", 1e-6),
    ("dopri5:rtol=1e-9,atol=1e-9,gradient=full_adjoint", 1e-6),
]


def gradients(flow: Flow, *tensors: Tensor) -> list[Tensor]:
    x, control, gain = tensors
    loss = flow(x, context=context_of(control, gain)).square().sum()  # type: ignore[union-attr]
    return list(torch.autograd.grad(loss, [*tensors, *flow.parameters()]))


@pytest.mark.parametrize(("solver", "tolerance"), DIRECT)
def test_gradients_reach_the_context_in_every_mode(solver: str, tolerance: float) -> None:
    """As those of the same values closed over, which autograd follows through a direct solve."""
    field, tensors = driven(2), inputs()
    x, control, gain = tensors
    plain = Flow(PiecewiseConstant(_Closed(layer, control, gain) for layer in field.pieces()), parse(solver).direct(), 2)
    expected = torch.autograd.grad(plain(x).square().sum(), [*tensors, *field.parameters()])
    found = gradients(Flow(field, solver, 2), *tensors)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


class _Closed(Field):
    def __init__(self, layer: Field, *tensors: Tensor) -> None:
        super().__init__()
        self.layer, self.tensors = layer, tensors

    def forward(self, t, x):
        return self.layer(t, x, *context_of(*self.tensors))


@pytest.mark.parametrize("solver", ["rk4:h=0.5", "rk4:h=0.5,gradient=checkpoint", "dopri5:rtol=1e-4,atol=1e-4"])
def test_gradcheck(solver: str) -> None:
    flow = Flow(driven(1, 2), solver, 1)

    def end(x: Tensor, control: Tensor, gain: Tensor) -> Tensor:
        return flow(x, context=context_of(control, gain))  # type: ignore[return-value]

    assert torch.autograd.gradcheck(end, inputs(2))


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
def test_what_is_upstream_of_the_context_learns(gradient: str) -> None:
    torch.manual_seed(0)
    encoder, seen = nn.Linear(5, 4).double(), states(3, 5)
    flow = Flow(driven(), f"dopri5:rtol=1e-8,atol=1e-8,gradient={gradient}", 1)
    flow(states(3, 4), context=context_of(encoder(seen), torch.ones((), dtype=FLOAT64))).sum().backward()  # type: ignore
    reference = nn.Linear(5, 4).double()
    reference.load_state_dict(encoder.state_dict())
    control = reference(seen)
    end = Flow(_Closed(flow.field.pieces()[0], control, torch.ones((), dtype=FLOAT64)), flow.solver.direct(), 1)(states(3, 4))
    end.sum().backward()
    assert encoder.weight.grad is not None
    torch.testing.assert_close(encoder.weight.grad, reference.weight.grad, rtol=1e-6, atol=1e-6)
    assert encoder.weight.grad.any()


class Shifted(nn.Module):
    """A module of x and a shift."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4).double()

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return torch.tanh(self.inner(x)) + shift


def shifted() -> Field:
    torch.manual_seed(2)
    return Autonomous(Shifted())


class Half(nn.Module):
    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return torch.tanh(x) + shift[:, :2]


COMPOUND: list[tuple[Field, Solver | str]] = [
    (Scaled(shifted(), 0.5), "rk4"),
    (Split(shifted(), shifted()), FixedStep(LieTrotter())),
    (Split(shifted(), shifted()), "rk4"),
    (TwoColumns(shifted(), shifted()), "fractal"),
    (Momentum(shifted(), 0.3).double(), "linear_two_step"),
    (Coupled(Autonomous(Half()), Autonomous(Half())), FixedStep(Coupling(), gradient="reversible")),
    (Expansion(shifted(), Hat(2, 1)), "rk4:h=0.5"),
    (PiecewiseConstant([shifted()]), "dopri5"),
    (StochasticDepth(shifted(), 0.5), "euler_maruyama"),
    (StochasticDepth(shifted(), 0.5).eval(), Brownian("euler", h=0.5)),
    (Function(lambda t, x, shift: t * x + shift), "rk4"),
    (shifted().scaled(2.0), FixedStep(RK4(), h=0.5)),
]


@pytest.mark.parametrize(("field", "solver"), COMPOUND, ids=lambda value: str(value).partition("(")[0])
def test_fields_hand_it_to_the_fields_that_they_are_made_of(field: Field, solver: Solver | str) -> None:
    flow, x = Flow(field, solver, 1), states(3, 4)
    ends = []
    for size in (0.0, 1.0):
        torch.manual_seed(3)
        shift = torch.full((3, 4), size, dtype=FLOAT64, requires_grad=True)
        end = flow(x, context=(shift,))
        (slope,) = torch.autograd.grad(end.sum(), shift)  # type: ignore[union-attr]
        assert slope.shape == shift.shape
        ends.append(end)
    assert not torch.equal(*ends)
    assert list(flow.state_dict()) == list(Flow(field, solver, 1).state_dict()), "nothing stays behind"
    assert all(parameter.is_leaf for parameter in flow.parameters())


def test_every_way_through_a_flow_takes_it() -> None:
    field, (x, control, gain) = driven(2), inputs()
    context = context_of(control, gain)
    flow = Flow(field, "dopri5:rtol=1e-8,atol=1e-8", 2)
    end = flow(x, context=context)
    torch.testing.assert_close(flow.trajectory(x, [0, 1, 2], context=context)[-1], end)  # type: ignore[index]
    torch.testing.assert_close(flow.frozen(x, context)(x, context=context), end, rtol=1e-6, atol=1e-6)
    steps = Flow(field, "rk4", 2)
    assert torch.equal(steps.states(x, context=context)[-1], steps(x, context=context))  # type: ignore[arg-type]
    there, length = flow.integral(x, lambda t, x, slope: slope.abs().sum(1), context=context)
    torch.testing.assert_close(there, end, rtol=1e-6, atol=1e-6)
    assert (length > 0).all()
    pair = Flow(Function(lambda t, x, shift: (x[1] + shift, -x[0])), "rk4", 1)
    a, b = pair((x, x), context=(control,))
    assert a.shape == b.shape == x.shape


def test_compiled_flows_take_it() -> None:
    tensors = inputs()
    for solver in ("rk4:h=0.5", "dopri5:rtol=1e-6,atol=1e-6"):
        flow = Flow(driven(2), solver, 2)
        expected = gradients(flow, *tensors)
        flow.compile()
        for one, other in zip(gradients(flow, *tensors), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_tensor_that_is_not_passed_is_still_refused() -> None:
    x, control, gain = inputs()
    flow = Flow(_Closed(driven().pieces()[0], control, gain), Adaptive("dopri5", gradient="adjoint"), 1)
    with pytest.raises(TypeError, match=r"neither its state nor one of its parameters.*pass it as context"):
        flow(x)


def test_a_context_that_does_not_fit_is_an_error() -> None:
    x, control, _ = inputs()
    with pytest.raises(TypeError, match=r"context of 1, and a MLP takes none: its forward is \(t, x\)"):
        Flow(MLP(4, hidden=4).double(), "euler", 1)(x, context=(control,))
    with pytest.raises(
        TypeError, match=r"the forward of a Driven is \(t, x, control, gain.*missing a required argument: 'gain'"
    ):
        Flow(driven(), "euler", 1)(x, context=(control,))
    with pytest.raises(TypeError, match="context is a tuple of further arguments of the field, not a Tensor"):
        Flow(driven(), "euler", 1)(x, context=control)  # type: ignore[arg-type]


def test_a_failed_solve_leaves_nothing_behind() -> None:
    x, control, gain = inputs()
    flow = Flow(driven(), Adaptive("dopri5", max_evaluations=2), 1)
    with pytest.raises(SolveError):
        flow(x, context=context_of(control, gain))
    assert len(list(flow.parameters())) == 2
    assert str(Flow(driven(), FixedStep(Euler()), 1)(x, context=context_of(control, gain)).shape) == "torch.Size([3, 4])"  # type: ignore
