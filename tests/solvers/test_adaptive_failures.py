"""What the fast adaptive step says where it cannot go on, what it survives, and the combinations it refuses."""

import re

import pytest
import torch
from problems import FLOAT64, Watched, cosine, small_mlp, states, tanh_layers

from continuum import Adaptive, Flow, SolveError
from continuum.fields import Function
from continuum.solvers import parse

FAST = ["dopri5", "bosh3", "dopri8"]


@torch.no_grad()
def solve(field, x, method, tolerance=1e-4, **options):
    """The cost of a solve to depth 2."""
    return Adaptive(method, rtol=tolerance, atol=tolerance, engine="continuum", **options)(field, x, (0.0, 2.0)).cost


def budget_spent(field, x, method, tolerance=1e-6, budget=1000):
    with pytest.raises(SolveError, match="budget is spent") as caught:
        solve(field, x, method, tolerance, max_evaluations=budget)
    error = caught.value
    assert error.evaluations == budget
    assert 1 <= len(error.steps) <= 8
    assert f"last steps tried: {', '.join(f'{step:.2g}' for step in error.steps)}." in str(error)
    return error


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_a_stiff_field_is_told_of_stability(method):
    error = budget_spent(Function(lambda t, x: -2000 * (x - cosine(t, x))), states(), method)
    assert "stability" in error.advice
    assert max(error.steps) < 2 * min(error.steps)


SUDDEN = {
    "jumps": (lambda t, x: float(float(t) * 37 % 1 > 0.5) - x, 1e-9),
    "kinks": (lambda t, x: cosine(30 * t, x).abs() - x, 1e-11),
}


@pytest.mark.parametrize(("method", "case"), [(m, c) for m in FAST for c in SUDDEN if (m, c) != ("bosh3", "kinks")])
def test_a_field_whose_jumps_or_kinks_the_solver_does_not_know_is_told_of_them(method, case):
    """bosh3 at such a tolerance takes steps so short that kinks do not matter."""
    field, tolerance = SUDDEN[case]
    error = budget_spent(Function(field), states(), method, tolerance, budget=300)
    assert "kinks" in error.advice
    assert "knots" in error.advice


@pytest.mark.parametrize("method", FAST)
@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
def test_an_overflow_in_an_attempt_is_survived_by_smaller_steps(gradient, method):
    """x' = -x^9 from 10 and -30 with a first step of 1: the first attempts meet infinite minus infinite."""
    x = torch.tensor([[10.0, -30.0]], dtype=FLOAT64, requires_grad=True)
    finite = []
    field = Function(lambda t, x: finite.append(bool(x.detach().isfinite().all())) or -(x**9))
    flow = Flow(field, Adaptive(method, 1e-4, 1e-4, gradient=gradient, first_step=1.0), depth=1)
    end = flow(x)
    assert not all(finite)
    torch.testing.assert_close(end, x.sign() * (x**-8 + 8) ** (-1 / 8), rtol=1e-3, atol=0)
    end.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("method", FAST)
def test_a_region_without_a_field_is_reached_but_not_crossed(method):
    """Beyond x = 1 the field is NaN: steps shrink in front of it, and no state is blamed."""
    field = Function(lambda t, x: 1 + 0 * (1 - x).sqrt())
    with pytest.raises(SolveError, match="step size underflows") as caught:
        solve(field, torch.tensor([[0.0], [-9.0]], dtype=FLOAT64), method)
    assert caught.value.depth == pytest.approx(1, abs=1e-6)
    assert caught.value.rows == ()
    assert "kinks" in caught.value.advice


@pytest.mark.parametrize("norm", ["batch", "sample", "global"])
@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
@pytest.mark.parametrize("options", [{}, {"first_step": 0.1}], ids=str)
def test_a_layer_that_is_not_finite_names_depth_and_rows(options, gradient, norm):
    """Only images whose first entry is positive meet the second layer's pole."""
    pole = Function(lambda t, x: x / x.clamp(max=0).sign().abs() if float(t) > 1 else -0.1 * x)
    pole.knots = (1.0,)
    x = states()
    flow = Flow(pole, Adaptive("dopri5", gradient=gradient, norm=norm, **options), depth=2)
    with pytest.raises(SolveError, match="not finite") as caught:
        flow(x.requires_grad_())
    assert caught.value.depth == 1
    assert caught.value.rows == tuple(torch.nonzero((x > 0).any(dim=1)).flatten().tolist())


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 8, 9, 30])
@pytest.mark.parametrize("gradient", ["direct", "checkpoint"])
@pytest.mark.parametrize("make", [lambda: small_mlp(4), lambda: tanh_layers(2, gain=3.0)], ids=["mlp", "layers"])
def test_the_budget_is_spent_exactly(make, gradient, budget):
    field = Watched(make())
    flow = Flow(field, Adaptive("dopri5", 1e-9, 1e-9, gradient=gradient, max_evaluations=budget), depth=2)
    with pytest.raises(SolveError, match="budget"):
        flow(states(4, 4).requires_grad_())
    assert len(field.depths) == budget


@pytest.mark.parametrize("method", FAST)
def test_a_solve_that_takes_the_whole_budget_succeeds(method):
    cost = solve(small_mlp(), states(), method)
    same = solve(small_mlp(), states(), method, max_evaluations=cost.evaluations)
    assert same == cost
    with pytest.raises(SolveError, match="budget"):
        solve(small_mlp(), states(), method, max_evaluations=cost.evaluations - 1)


# Words
@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("dopri5", {"engine": "fast"}, "engine is one of continuum, torchdiffeq, not 'fast'"),
        ("dopri5", {"norm": "max"}, "norm is one of batch, sample, global, not 'max'"),
        ("dopri5", {"gradient": "both"}, "gradient is one of direct, checkpoint, adjoint, full_adjoint, not 'both'"),
        ("dopri5", {"gradient": "adjoint", "engine": "continuum"}, "gradient='adjoint' is torchdiffeq's"),
        ("dopri5", {"gradient": "full_adjoint", "engine": "continuum"}, "gradient='full_adjoint' is torchdiffeq's"),
        ("dopri5", {"gradient": "checkpoint", "engine": "torchdiffeq"}, "needs engine='continuum'"),
        ("dopri5", {"every": 2}, "every=2 says which states gradient='checkpoint' stores"),
        ("scipy_solver", {"engine": "continuum"}, "scipy_solver is torchdiffeq's"),
        ("scipy_solver", {"norm": "sample"}, "goes forward only"),
        ("dopri5", {"norm": "global", "engine": "torchdiffeq"}, "norm='global' needs engine='continuum'"),
        ("dopri5", {"norm": "global", "gradient": "adjoint"}, "norm='global' needs engine='continuum'"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(method, options, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        Adaptive(method, **options)
    text = ",".join(f"{name}={value}" for name, value in options.items())
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse(f"{method}:{text}")


ENGINES = [
    ("dopri5", {}, "continuum"),
    ("bosh3", {"gradient": "checkpoint", "norm": "global"}, "continuum"),
    ("dopri8", {"engine": "continuum", "norm": "sample"}, "continuum"),
    ("dopri5", {"engine": "torchdiffeq", "norm": "sample"}, "torchdiffeq"),
    ("dopri5", {"gradient": "adjoint"}, "torchdiffeq"),
    ("dopri8", {"gradient": "full_adjoint", "norm": "sample"}, "torchdiffeq"),
    ("fehlberg2", {"norm": "sample", "gradient": "checkpoint", "every": 3}, "continuum"),
    ("adaptive_heun", {}, "continuum"),
    ("scipy_solver", {}, "torchdiffeq"),
]


@pytest.mark.parametrize(("method", "options", "engine"), ENGINES)
def test_the_fast_engine_is_taken_where_it_fits_and_the_text_keeps_what_was_said(method, options, engine):
    solver = Adaptive(method, rtol=1e-4, atol=1e-6, **options)
    assert solver.chosen_engine == engine
    assert parse(str(solver)) == solver
    assert str(parse(str(solver))) == str(solver)
    for name, value in options.items():
        assert f"{name}={value}" in str(solver)
    assert ("engine" in str(solver)) == ("engine" in options)
