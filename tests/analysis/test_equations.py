"""Modified equations in exact numbers, regions of stability, and defects of single steps beside what they predict."""

import cmath
import copy
import math
from fractions import Fraction as Q
from functools import partial
from itertools import pairwise

import pytest
import sympy
import torch
from problems import FLOAT64, MATRIX, tanh_layers
from torch import nn

from continuum import Autonomous, Field, PiecewiseConstant
from continuum.analysis.defects import elementary_differential, scheme_defects, time_derivative
from continuum.analysis.equations import (
    LinearMultistep,
    OneStep,
    differential,
    dominant_rate,
    method_of,
    modified_rate,
    symmetry,
)
from continuum.bases import Chebyshev
from continuum.fields import MLP, Coupled, Function, Momentum, SecondOrder
from continuum.schemes import RK4, Coupling, Euler, EulerMaruyama, Leapfrog, Midpoint, NeumannSeries, Scheme, Verlet
from continuum.schemes.multistep import AdamsBashforth, LinearTwoStep, TwoStepMidpoint
from continuum.schemes.runge_kutta import Fractal, Heun, Kutta3, RungeKutta, Tableau, density, rooted_trees
from continuum.solvers import Embedded
from continuum.weights import Expansion

K = sympy.Symbol("k", real=True)
ADAMS_BASHFORTH = [AdamsBashforth(order) for order in (2, 3, 4)]
RUNGE_KUTTA: list[RungeKutta] = [Euler(), Midpoint(), Heun(), Kutta3(), RK4(), Embedded("bosh3"), Embedded("dopri5")]
LINEAR = [Euler(), NeumannSeries(1), NeumannSeries(2), NeumannSeries(3), Midpoint(), RK4(), *ADAMS_BASHFORTH, TwoStepMidpoint()]
SIZES = (1 / 8, 1 / 16, 1 / 32)


def multistep(scheme: Scheme, k: float | None = None) -> LinearMultistep:
    method = method_of(scheme, k)
    assert isinstance(method, LinearMultistep)
    return method


def one_step(scheme: Scheme) -> OneStep:
    method = method_of(scheme)
    assert isinstance(method, OneStep)
    return method


# Coefficients
def test_the_coefficients_of_lm_resnet() -> None:
    """rho / sigma = e^z - (1 - k) - k e^-z: c_q = (1 - (-1)^q k) / q!."""
    c = multistep(LinearTwoStep()).modified(6)
    assert list(c) == [1, 2, 3, 4, 5, 6]
    for q, found in c.items():
        assert sympy.simplify(found - (1 - (-1) ** q * K) / sympy.factorial(q)) == 0
    assert multistep(LinearTwoStep(), -0.3).modified() == {1: Q(7, 10), 2: Q(13, 20)}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (LinearMultistep((-1, 1), (1, 0)), {q: Q(1, math.factorial(q)) for q in range(1, 7)}),  # e^z - 1
        (LinearMultistep((-1, 1), (Q(1, 2), Q(1, 2))), {1: 1, 2: 0, 3: -Q(1, 12), 4: 0, 5: Q(1, 120)}),  # 2 tanh(z / 2)
        (multistep(Leapfrog()), {2: 1, 3: 0, 4: Q(1, 12), 5: 0, 6: Q(1, 360)}),  # 2 cosh(z) - 2
        (multistep(TwoStepMidpoint()), {1: 1, 2: 0, 3: Q(1, 6), 4: 0, 5: Q(1, 120)}),  # sinh(z)
        (multistep(AdamsBashforth(2)), {1: 1, 2: 0, 3: Q(5, 12)}),
        (multistep(AdamsBashforth(3)), {1: 1, 2: 0, 3: 0, 4: Q(3, 8)}),
        (multistep(AdamsBashforth(4)), {1: 1, 2: 0, 3: 0, 4: 0, 5: Q(251, 720)}),
    ],
    ids=str,
)
def test_exact_coefficients_of_multistep_methods(method: LinearMultistep, expected: dict[int, Q]) -> None:
    found = method.modified(len(expected))
    assert found == expected
    assert all(isinstance(c, sympy.Rational) for c in found.values())


def test_exact_coefficients_of_runge_kutta_methods() -> None:
    chain, bush = ((((((),),),),), ((), (), (), ()))
    assert one_step(Euler()).defect == {((),): -Q(1, 2)}
    assert one_step(Midpoint()).defect == {(((),),): -Q(1, 6), ((), ()): -Q(1, 24)}
    assert one_step(Heun()).defect == {(((),),): -Q(1, 6), ((), ()): Q(1, 12)}
    rk4 = one_step(RK4()).defect
    assert len(rk4) == 9
    assert rk4[chain] == -Q(1, 120)
    # (sum_i b_i c_i^4 - 1/5) / 4!
    assert rk4[bush] == (2 * Q(1, 3) * Q(1, 2) ** 4 + Q(1, 6) - Q(1, 5)) / 24
    assert all(isinstance(c, Q) for c in rk4.values())


@pytest.mark.parametrize("scheme", RUNGE_KUTTA, ids=str)
def test_the_order_is_the_tableaus(scheme: RungeKutta) -> None:
    method = one_step(scheme)
    assert method.order == scheme.tableau.order
    assert set(method.defect) <= set(rooted_trees(method.order + 1))
    assert 0 not in method.defect.values()
    # log R(z) = z + c z^(p + 1), c that of the tree without branches, whose differential alone is left on linear fields.
    unbranched = ()
    for _ in range(method.order):
        unbranched = (unbranched,)
    c = method.modified(method.order + 1)
    assert c.pop(1) == 1
    assert c.pop(method.order + 1) == method.defect.get(unbranched, 0)
    assert not any(c.values())


def test_a_tableau_of_higher_order_than_it_says() -> None:
    heun = Heun.tableau
    assert OneStep.of(Tableau(heun.c, heun.a, heun.b, order=1)) == one_step(Heun())


@pytest.mark.parametrize("scheme", [*ADAMS_BASHFORTH, TwoStepMidpoint(), LinearTwoStep()], ids=str)
def test_the_order_is_the_schemes(scheme: Scheme) -> None:
    assert multistep(scheme).order == scheme.order


def test_symmetries_count_labellings() -> None:
    """n! / (symmetry density) labellings of a tree grow from its root, (n - 1)! of all trees together."""
    for nodes in range(1, 8):
        counts = [Q(math.factorial(nodes), symmetry(tree) * density(tree)) for tree in rooted_trees(nodes)]
        assert all(count.denominator == 1 for count in counts)
        assert sum(counts) == math.factorial(nodes - 1)


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (method_of(LinearTwoStep()), "(1 + k) x' + (1 - k) h/2 x'' = f + O(h^2)"),
        (method_of(LinearTwoStep(), 0), "x' + h/2 x'' = f + O(h^2)"),
        (method_of(LinearTwoStep(), -0.0731234), "0.9269 x' + 0.5366 h x'' = f + O(h^2)"),
        (method_of(LinearTwoStep(), -1.2), "-1/5 x' + 11 h/10 x'' = f + O(h^2)"),
        (method_of(AdamsBashforth(2)), "x' + 5 h^2/12 x''' = f + O(h^3)"),
        (method_of(AdamsBashforth(4)), "x' + 251 h^4/720 x^(5) = f + O(h^5)"),
        (LinearMultistep((-1, 1), (0, 1)), "x' - h/2 x'' = f + O(h^2)"),
        (method_of(Leapfrog()), "x'' + h^2/12 x'''' = f + O(h^3)"),
        (method_of(Midpoint()), "x' = f - h^2/6 f'f'f - h^2/24 f''(f, f) + O(h^3)"),
        (method_of(NeumannSeries(1)), "x' = f - h/2 f'f + O(h^2), for linear f"),
        (method_of(NeumannSeries(2)), "x' = f + h/2 f'f + O(h^2), for linear f"),
    ],
    ids=str,
)
def test_an_equation_as_text(method: LinearMultistep | OneStep, text: str) -> None:
    assert str(method) == text


# Stability
def backward_differentiation(steps: int) -> LinearMultistep:
    """sum_{j <= steps} (1/j) nabla^j x_{n+m} = h f_{n+m}."""
    alpha = [Q(0)] * (steps + 1)
    for j in range(1, steps + 1):
        for i in range(j + 1):
            alpha[steps - i] += Q((-1) ** i * math.comb(j, i), j)
    return LinearMultistep(tuple(alpha), (*[0] * steps, 1))


def test_the_root_condition() -> None:
    assert multistep(LinearTwoStep()).roots() == {1: 1, -K: 1}
    for k in (-0.999, -0.3, 0, 0.5, 1):
        assert multistep(LinearTwoStep(), k).zero_stable
    for k in (-1.5, -1.001, -1, 1.001, 3):
        assert not multistep(LinearTwoStep(), k).zero_stable
    assert multistep(Leapfrog()).roots() == {1: 2}
    assert multistep(Leapfrog()).zero_stable
    assert not LinearMultistep((1, -2, 1), (0, 1, 0)).zero_stable
    assert all(multistep(scheme).zero_stable for scheme in (*ADAMS_BASHFORTH, TwoStepMidpoint()))
    # Backward differentiation of order six is zero-stable, of order seven not (Hairer, Norsett, Wanner I, III.3).
    for steps, stable in ((2, True), (6, True), (7, False)):
        method = backward_differentiation(steps)
        assert (method.order, method.zero_stable) == (steps, stable)


def rotating(rate: complex) -> Field:
    """x' = rate x for x = x_1 + i x_2."""
    matrix = torch.tensor([[rate.real, -rate.imag], [rate.imag, rate.real]], dtype=FLOAT64)
    return Function(lambda t, x: x @ matrix.T)


@pytest.mark.parametrize("scheme", LINEAR, ids=str)
@pytest.mark.parametrize("rate", [-0.4 + 0.3j, 0.1 + 0.7j, -2.5 + 0j], ids=str)
def test_amplification_is_the_growth_of_many_steps(scheme: Scheme, rate: complex) -> None:
    field, memory = rotating(rate), ()
    x = torch.tensor([[1.0, 0.2]], dtype=FLOAT64)
    sizes = []
    for _ in range(400):
        x, memory = scheme.step(field, 0.0, x, 1.0, memory)
        size = x.norm()  # steps are linear: the state and its past may be divided by one number
        x, memory = x / size, tuple(part / size for part in memory)
        sizes.append(float(size))
    growth = math.exp(math.fsum(map(math.log, sizes[200:])) / 200)
    (expected,) = method_of(scheme).amplification([rate]).tolist()
    assert growth == pytest.approx(expected, rel=0.01)


def test_amplification_of_lm_resnet_and_leapfrog() -> None:
    """The roots of r^2 - (1 - k + z) r - k, and of r^2 - (2 + z) r + 1."""
    z = torch.tensor([[-0.5, 0.3], [-3.0, -1.0]], dtype=FLOAT64)
    for method, kept, product in ((multistep(LinearTwoStep(), -0.3), 1.3, 0.3), (multistep(Leapfrog()), 2.0, 1.0)):
        sums = [kept + value for value in z.flatten().tolist()]
        roots = [[(b + sign * cmath.sqrt(b**2 - 4 * product)) / 2 for sign in (1, -1)] for b in sums]
        assert method.amplification(z).shape == (2, 2)
        assert method.amplification(z).flatten().tolist() == pytest.approx([max(map(abs, pair)) for pair in roots])


@pytest.mark.parametrize("scheme", [s for s in LINEAR if not isinstance(s, TwoStepMidpoint)], ids=str)
def test_the_boundary_is_where_steps_neither_grow_nor_shrink(scheme: Scheme) -> None:
    method = method_of(scheme)
    x, y = method.boundary(300)
    assert len(x) == len(y) == 300
    assert (x[0], y[0]) == pytest.approx((0, 0), abs=1e-9)
    assert (x[-1], y[-1]) == pytest.approx((0, 0), abs=1e-9)
    if isinstance(method, OneStep):
        assert method.amplification(list(map(complex, x, y))).tolist() == pytest.approx([1] * 300)
    else:  # some root is on the circle, be it the largest or not
        assert float(method.amplification(list(map(complex, x, y))).min()) > 1 - 1e-9
    assert float(method.amplification([0.5 * min(x)])[0]) < 1


LEFT_ENDS = [(method_of(Euler()), -2), (method_of(Midpoint()), -2), (method_of(Kutta3()), -2.51275)]
LEFT_ENDS += [(method_of(RK4()), -2.78529), (method_of(NeumannSeries(2)), -1), (method_of(AdamsBashforth(2)), -1)]
LEFT_ENDS += [(method_of(AdamsBashforth(3)), -6 / 11), (method_of(AdamsBashforth(4)), -3 / 10)]
LEFT_ENDS += [(method_of(LinearTwoStep(), -0.3), -2.6), (method_of(LinearTwoStep(), 0.5), -1), (method_of(Leapfrog()), -4)]


@pytest.mark.parametrize(("method", "left"), LEFT_ENDS, ids=str)
def test_stability_on_the_real_axis(method: LinearMultistep | OneStep, left: float) -> None:
    """Steps are stable from 0 down to `left`: R(left) = +-1, or rho(-1) / sigma(-1) = left."""
    x, y = method.boundary(721)
    assert min(abs(complex(a - left, b)) for a, b in zip(x, y, strict=True)) < 0.01
    assert float(method.amplification([left + 1e-3])[0]) <= 1 + 1e-9
    assert float(method.amplification([left - 1e-3])[0]) > 1


def test_implicit_steps() -> None:
    """Backward Euler, x+ = x / (1 - z): stable but in the circle |z - 1| < 1, without a solution at its middle."""
    method = LinearMultistep((-1, 1), (0, 1))
    assert method.amplification([-3, 0.5, 1, 1 + 2j, 5]).tolist() == pytest.approx([1 / 4, 2, math.inf, 1 / 2, 1 / 4])


def test_the_scale_of_a_method_does_not_count() -> None:
    one, three = LinearMultistep((-1, 1), (1, 0)), LinearMultistep((-3, 3), (3, 0))
    assert one.defect() == three.defect() == -Q(1, 2)
    assert one.modified(4) == three.modified(4)
    assert one.boundary(9)[0] == pytest.approx(three.boundary(9)[0])
    assert LinearMultistep((-1, 0, 1), (0, 2, 0)).defect() == -Q(1, 3)


def test_a_region_in_two_parts() -> None:
    """|1 + z + z^2 / 10| > 1 between its zeros: the curve through 0 goes round one of them, once."""
    method = OneStep((Q(1), Q(1), Q(1, 10)), 1, {})
    points = list(map(complex, *method.boundary(101)))
    assert method.amplification(points).tolist() == pytest.approx([1] * 101)
    assert abs(points[0]) + abs(points[-1]) < 1e-9
    assert min(abs(z) for z in points[5:-5]) > 0.1
    assert min(z.real for z in points) > -5


def test_poly_2_is_stable_on_the_imaginary_axis_where_euler_is_not() -> None:
    on_axis = [0.2j, 0.9j, 1j]
    assert max(method_of(NeumannSeries(2)).amplification(on_axis).tolist()) <= 1 + 1e-12
    assert min(method_of(Euler()).amplification(on_axis).tolist()) > 1
    assert method_of(NeumannSeries(2)).amplification([1.1j]).item() > 1


# Growth
@pytest.mark.parametrize(
    ("k", "exact", "modified", "crude"),
    [(-0.5, -2.06374, -2.06389, -2), (0, -1.005034, -1.005051, -1), (0.3, -0.770823, -0.770830, -1 / 1.3)],
)
def test_the_rates_of_lm_resnet(k: float, exact: float, modified: float, crude: float) -> None:
    """f(x) = -x, h = 0.01, and the roots of the two quadratic equations."""
    method = multistep(LinearTwoStep(), k)
    assert dominant_rate(method, -1, 0.01) == pytest.approx(exact, rel=5e-6)
    assert modified_rate(method, -1, 0.01) == pytest.approx(modified, rel=5e-6)
    assert modified_rate(method, -1, 0.01, terms=1) == pytest.approx(crude)
    root = (1 - k - 0.01 + math.sqrt((1 - k - 0.01) ** 2 + 4 * k)) / 2
    assert dominant_rate(method, -1, 0.01) == pytest.approx(math.log(root) / 0.01, rel=1e-12)


@pytest.mark.parametrize("scheme", [*LINEAR, LinearTwoStep()], ids=str)
def test_each_term_takes_the_modified_rate_closer(scheme: Scheme) -> None:
    # The other root of the two-step midpoint rule must not dominate.
    method, rate = method_of(scheme, -0.3), (1 if isinstance(scheme, TwoStepMidpoint) else -1) + 0.5j
    previous = 0.0
    for terms in (method.order, method.order + 1, method.order + 3):
        coarse, fine = (abs(dominant_rate(method, rate, h) - modified_rate(method, rate, h, terms)) for h in (1 / 16, 1 / 32))
        measured = math.log2(coarse / fine)
        assert measured > terms - 0.3
        assert measured > previous + 0.7
        previous = measured


def test_what_one_step_ends_has_no_rate() -> None:
    assert dominant_rate(method_of(Euler()), -4.0, 0.25) == -math.inf


def test_the_frequency_of_leapfrog() -> None:
    """q'' = -q: sin(w h / 2) = h / 2, and w = 1 + h^2 / 24 + O(h^4)."""
    method = multistep(Leapfrog())
    assert dominant_rate(method, -1, 0.1) == pytest.approx(1j * 2 * math.asin(0.05) / 0.1, rel=1e-9)
    assert modified_rate(method, -1, 0.1, terms=1) == pytest.approx(1j)
    assert modified_rate(method, -1, 0.1, terms=3) == pytest.approx(1j * (1 + 0.01 / 24), rel=2e-6)


# Defects


def tanh_field(features: int = 3) -> Field:
    return tanh_layers(1, features, gain=2.0).at(0.0)


def start(features: int = 3) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(4, features, dtype=FLOAT64)


@pytest.mark.parametrize(
    ("field", "scheme"),
    [
        *((tanh_field(), scheme) for scheme in RUNGE_KUTTA[:6]),
        *((tanh_field(), scheme) for scheme in ADAMS_BASHFORTH),
        (tanh_field(), TwoStepMidpoint()),
        (Momentum(tanh_field(), k=-0.3), LinearTwoStep()),
        (Momentum(tanh_field(), k=0.4), LinearTwoStep()),
        (Momentum(tanh_field(), k=-0.3), Midpoint()),
        (SecondOrder(tanh_field(2)), Leapfrog()),
        (Function(lambda t, x: x @ MATRIX.T), NeumannSeries(1)),
        (Function(lambda t, x: x @ MATRIX.T), NeumannSeries(2)),
        (Expansion([MLP(3, hidden=5).double() for _ in range(3)], Chebyshev(3)), Heun()),
    ],
    ids=lambda value: str(value) if isinstance(value, Scheme) else type(value).__name__,
)
def test_measured_defects_approach_the_predicted_ones(field: Field, scheme: Scheme) -> None:
    found = scheme_defects(field, start(4 if isinstance(scheme, Leapfrog) else 3), scheme, SIZES)
    assert [defect.h for defect in found] == list(SIZES)
    assert found[-1].relative_difference < 0.15
    method = method_of(scheme, 0.1)
    power = method.power if isinstance(method, LinearMultistep) else 1
    for coarse, fine in pairwise(found):
        assert fine.relative_difference < 0.65 * coarse.relative_difference
        assert coarse.predicted / fine.predicted == pytest.approx(2 ** (method.order + power))
        assert abs(fine.measured / fine.predicted - 1) <= fine.relative_difference


def test_defects_of_plain_loops() -> None:
    """Euler's and LM-ResNet's on x' = A x, whose solution is known: x+ - e^(hA) x beside -h^2/2 A^2 x, and so on."""
    field, x, h, k = Function(lambda t, x: x @ MATRIX.T), start(), 1 / 8, -0.3

    def moved(t: float) -> torch.Tensor:
        return x @ torch.linalg.matrix_exp(t * MATRIX).T

    (euler,) = scheme_defects(field, x, Euler(), (h,))
    assert euler.measured == pytest.approx(float((x + h * x @ MATRIX.T - moved(h)).norm()), rel=1e-7)
    assert euler.predicted == pytest.approx(float((h**2 / 2 * x @ (MATRIX @ MATRIX).T).norm()))
    # With (1 + k) f the layer stands for x' = f.
    (lm,) = scheme_defects(Momentum(field.scaled(1 + k), k=k).double(), x, LinearTwoStep(), (h,))
    measured = (1 - k) * x + k * moved(-h) + h * (1 + k) * x @ MATRIX.T - moved(h)
    predicted = -(1 - k) / 2 * h**2 * x @ (MATRIX @ MATRIX).T
    assert lm.measured == pytest.approx(float(measured.norm()), rel=1e-6)
    assert lm.predicted == pytest.approx(float(predicted.norm()), rel=1e-6)
    assert lm.relative_difference == pytest.approx(float((measured - predicted).norm() / predicted.norm()), rel=1e-5)


def test_differentials_are_derivatives() -> None:
    """f''(f'f, f) by the Hessian of torch.autograd, and x''' = f'f'f + f''(f, f)."""
    field, x = tanh_field(), start()[:1]

    def f(y: torch.Tensor) -> torch.Tensor:
        return field(0.0, y)

    def row(y: torch.Tensor) -> torch.Tensor:
        return f(y[None])[0]

    slope, jacobian = f(x)[0], torch.autograd.functional.jacobian(row, x[0])
    hessian = torch.stack([torch.autograd.functional.hessian(lambda y, i=i: row(y)[i], x[0]) for i in range(3)])
    expected = torch.einsum("ijk,j,k->i", hessian, jacobian @ slope, slope)
    assert torch.allclose(elementary_differential(f, x, (((),), ()))[0], expected, rtol=1e-10, atol=0)
    third = jacobian @ jacobian @ slope + torch.einsum("ijk,j,k->i", hessian, slope, slope)
    assert torch.allclose(time_derivative(f, x, 3)[0], third, rtol=1e-10, atol=0)
    assert differential((((),), ())) == "f''(f'f, f)"


def test_a_field_that_sees_the_depth_is_held_at_zero() -> None:
    torch.manual_seed(0)
    field, x = MLP(3, hidden=5).double(), start()
    held = Function(lambda t, x: field(0.0, x))
    assert scheme_defects(field, x, Heun(), SIZES) == scheme_defects(held, x, Heun(), SIZES)


def test_a_field_stays_as_it_is() -> None:
    torch.manual_seed(0)
    field = Autonomous(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Tanh(), nn.Dropout(0.5)))
    before = copy.deepcopy(field.state_dict())
    x = start().float()
    found = scheme_defects(field, x, Heun(), SIZES)
    assert found == scheme_defects(copy.deepcopy(field).double().eval(), x.double(), Heun(), SIZES)
    assert found[-1].relative_difference < 0.1
    after = field.state_dict()
    assert all(torch.equal(value, after[name]) and value.dtype == after[name].dtype for name, value in before.items())
    assert all(module.training for module in field.modules())
    assert all(parameter.requires_grad for parameter in field.parameters())


def test_poly_2_on_another_field_is_of_another_equation() -> None:
    """f(h f(x)) = f(0) + O(h): with f(0) not zero, the steps follow x' = f(x) + f(0)."""
    field, x = tanh_field(), start()
    with pytest.raises(ValueError, match="not linear"):
        scheme_defects(field, x, NeumannSeries(2), SIZES)
    for h in (1e-3, 1e-5):
        moved, _ = NeumannSeries(2).step(field, 0.0, x, h, ())
        speed = (moved - x) / h
        assert (speed - field(0.0, x) - field(0.0, torch.zeros_like(x))).norm() < 10 * h
        assert (speed - field(0.0, x)).norm() > 0.1


# What is refused


WITHOUT = [Verlet(), Coupling(), Fractal(), EulerMaruyama()]
BACKWARD = LinearMultistep((-1, 1), (0, 1))
LM, FIELD, PAIR = multistep(LinearTwoStep()), tanh_field(), tanh_field(2)
NONE = [((1,), (1,), 1), ((-1, 1), (1,), 1), ((1, 0), (1, 0), 1), ((-1, 1), (1, 0), 0)]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        *((lambda none=none: LinearMultistep(*none), ValueError, "alpha_m") for none in NONE),
        (lambda: BACKWARD.amplification([math.nan]), ValueError, "finite"),
        (lambda: dominant_rate(BACKWARD, 2.0, 0.5), ValueError, "not zero"),
        (lambda: multistep(LinearTwoStep(), -1).modified(), ValueError, r"begins with z\^2"),
        (lambda: LinearMultistep((-2, 1), (1, 0)).modified(), ValueError, r"begins with z\^0"),
        (lambda: LinearMultistep((-1, 1), (1, 0), power=2).modified(), ValueError, r"begins with z\^1"),
        (lambda: LinearMultistep((-1, 1), (1, -1)).modified(), ValueError, "sum to 0"),
        (lambda: method_of(Embedded("dopri8")), ValueError, "fraction"),
        *((partial(method_of, s), TypeError, f"tableau.*{type(s).__name__}") for s in WITHOUT),
        (lambda: LM.amplification([0.1]), ValueError, r"k=-0\.1"),
        (lambda: LM.boundary(), ValueError, r"k=-0\.1"),
        (lambda: LM.zero_stable, ValueError, r"k=-0\.1"),
        (lambda: modified_rate(LM, -1, 0.1), ValueError, r"k=-0\.1"),
        *((lambda method=method: method.boundary(1), ValueError, "two points") for method in (LM, one_step(Euler()))),
        (lambda: scheme_defects(PiecewiseConstant([FIELD]), start(), Euler(), SIZES), TypeError, "layer"),
        (lambda: scheme_defects(FIELD, start(), Euler(), (0.1, 0.0)), ValueError, "positive"),
        (lambda: scheme_defects(Coupled(PAIR, PAIR), start(4), Leapfrog(), SIZES), TypeError, "SecondOrder"),
        (lambda: scheme_defects(FIELD, start(), LinearTwoStep(), SIZES), TypeError, "Momentum"),
        (lambda: scheme_defects(SecondOrder(PAIR), start(4), Verlet(), SIZES), TypeError, "Verlet"),
    ],
)
def test_methods_symbols_and_fields_without_an_equation(make, error, message):
    with pytest.raises(error, match=message):
        make()
