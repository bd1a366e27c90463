"""Every solve ends in finite states or a SolveError, within its budget, and leaves nothing behind."""

import gc

import pytest
import torch

from continuum import Adaptive, Brownian, FixedStep, Flow
from continuum.fields import MLP, Function
from continuum.noise import Gaussian, StochasticDepth
from continuum.schemes import Euler
from continuum.solvers import SolveError, parse
from continuum.solvers.coefficients import COEFFICIENTS


def test_coefficients_are_those_of_torchdiffeq():
    solvers = pytest.importorskip("torchdiffeq._impl.odeint").SOLVERS
    for name, ours in COEFFICIENTS.items():
        theirs, tableau = solvers[name], solvers[name].tableau
        assert ours.order == theirs.order
        assert ours.c == (0, *tableau.alpha.tolist())
        assert ours.a == ((), *(tuple(row.tolist()) for row in tableau.beta))
        assert ours.b == tuple(tableau.c_sol.tolist())
        assert ours.e == tuple(tableau.c_error.tolist())
        assert ours.middle == tuple(theirs.mid.tolist())


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "adaptive_heun", "scipy_solver"])
@pytest.mark.parametrize(
    "field",
    [
        lambda t, x: x * x,  # grows beyond all bounds at depth 1 / x
        lambda t, x: torch.sqrt(0.5 - t) * x,  # no number from a depth on
        lambda t, x: x / 0,
        lambda t, x: 1e38 * x.exp(),
    ],
)
@torch.no_grad()
def test_a_solve_that_has_no_end(method, field):
    x = torch.full((2, 3), 2.0)
    with pytest.raises(SolveError):
        Flow(Function(field), Adaptive(method, max_evaluations=2000), 1)(x)


@pytest.mark.parametrize("gradient", ["adjoint", "full_adjoint"])
@pytest.mark.parametrize("loss", [lambda y: (y * 1e38).sum() * 1e38, lambda y: (0 * y).sqrt().sum()])
def test_an_adjoint_that_has_no_end(gradient, loss):
    """Its solve is finite; the gradient that it starts from is not."""
    flow = Flow(MLP(3, hidden=4), Adaptive(gradient=gradient), 1)
    with pytest.raises(SolveError, match="not finite in the adjoint's backward solve"):
        loss(flow(torch.ones(2, 3))).backward()


def noisy():
    torch.manual_seed(0)
    return Gaussian(Function(lambda t, x: -50 * x), 5.0)


@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
def test_adaptive_brownian_steps_have_a_budget(gradient):
    solver = Brownian("milstein", rtol=1e-4, atol=1e-4, max_evaluations=300, gradient=gradient)
    assert parse(str(solver)) == solver
    with pytest.raises(SolveError, match="budget is spent") as found:
        Flow(noisy(), solver, 1)(torch.ones(2, 3))
    assert found.value.evaluations == 300


def test_a_number_of_steps_beyond_all_use_is_refused_with_the_number():
    with pytest.raises(ValueError, match="takes 100,000,000 steps from depth 0 to 1"):
        Flow(MLP(2, 4), FixedStep(Euler(), h=1e-8), 1)


@pytest.mark.parametrize(
    "solver", ["dopri5", "dopri5:engine=torchdiffeq", "dopri5:gradient=checkpoint", "dopri5:gradient=adjoint", "rk4:h=0.25"]
)
def test_a_solve_is_gone_when_its_result_is(solver):
    check_gone(Flow(MLP(3, hidden=4), solver, 1))


@pytest.mark.parametrize("options", ["method=euler,h=0.25", "method=srk,h=0.25", "method=milstein,rtol=1e-2,atol=1e-2,h=0.25"])
@pytest.mark.parametrize("gradient", ["direct", "adjoint"])
def test_a_path_is_gone_when_its_result_is(options, gradient):
    """But for the two increments over the whole depth, with which torchsde's path begins."""
    flow = Flow(StochasticDepth(MLP(3, hidden=4), 0.5, per="image"), f"brownian:{options},gradient={gradient}", 1)
    check_gone(flow, at_most=2)


def check_gone(flow, at_most=0):
    """No more states of a solve than these wait for the garbage collector."""
    x = torch.randn(64, 3)
    for _ in range(2):
        flow(x).sum().backward()
    gc.collect()
    gc.disable()
    try:
        before = states_alive()
        flow(x).sum().backward()
        assert states_alive() - before <= at_most
    finally:
        gc.enable()


def states_alive():
    return sum(isinstance(thing, torch.Tensor) and thing.shape[:1] == (64,) for thing in gc.get_objects())
