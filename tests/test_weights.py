"""Weights as functions of depth: what a basis is, what a field on it computes, and how it is projected onto another."""

import copy
import math

import numpy as np
import pytest
import torch
from numpy.polynomial import chebyshev, legendre
from problems import FLOAT64, small_mlp, states, tanh_layers
from torch import nn
from torch.func import functional_call

from continuum import MLP, Autonomous, Flow, PiecewiseConstant
from continuum.bases import Chebyshev, Fourier, Hat, Legendre, named_basis
from continuum.fields import PreActivation, Scaled
from continuum.solvers.base import statistics_untouched
from continuum.weights import Expansion

NAMES = ["hat", "chebyshev", "legendre", "fourier"]
DEPTHS = [0.0, 0.3, 1.0, 1.7, 2.5, 3.0]


def dense(basis, t):
    values = [0.0] * basis.size
    for k, value in basis(t):
        values[k] = value
    return values


# Bases
@pytest.mark.parametrize("size", [2, 3, 8])
def test_hats_sum_to_one_and_are_one_at_their_nodes(size):
    basis = Hat(size, depth=3.0)
    for t in np.linspace(0, 3, 50).tolist():
        terms = basis(t)
        assert sum(value for _, value in terms) == pytest.approx(1, abs=1e-15)
        assert all(value > 0 for _, value in terms)
        assert len(terms) <= 2
        assert sum(value * 3 * k / (size - 1) for k, value in terms) == pytest.approx(t, abs=1e-6)  # linear functions are exact
    for k in range(size):
        assert basis(3 * k / (size - 1)) == [(k, 1.0)]
    assert basis.knots == pytest.approx([3 * k / (size - 1) for k in range(1, size - 1)])


def test_a_depth_that_a_solver_moved_off_a_node_counts_as_the_node():
    basis = Hat(55, depth=54.0)
    for k in basis.knots:
        unit = torch.finfo(torch.float32).eps * k
        assert basis(k + unit) == basis(k - unit) == [(round(k), 1.0)]
        assert len(basis(k + 1e-4)) == 2


@pytest.mark.parametrize(("basis", "series"), [(Chebyshev, chebyshev.chebval), (Legendre, legendre.legval)])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_polynomials_are_those_of_numpy(basis, series, size):
    for t in DEPTHS:
        expected = [series(2 * t / 3 - 1, [0.0] * k + [1.0]) for k in range(size)]
        assert dense(basis(size, depth=3.0), t) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_fourier_functions(size):
    for t in DEPTHS:
        w = 2 * math.pi / 3
        expected = [1, math.cos(w * t), math.sin(w * t), math.cos(2 * w * t), math.sin(2 * w * t)][:size]
        assert dense(Fourier(size, depth=3.0), t) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_every_basis_clamps_and_lists_what_is_not_zero(name):
    basis = named_basis(name, 5, 2.0)
    assert basis(-1.0) == basis(0.0)
    assert basis(2.5) == basis(2.0)
    for t in DEPTHS:
        assert all(value != 0 and isinstance(value, float) for _, value in basis(t))
        assert [k for k, _ in basis(t)] == sorted({k for k, _ in basis(t)})


# Expansions
def mlps(count):
    return [small_mlp(2, 3, seed) for seed in range(count)]


def test_nodal_weights_are_joined_by_straight_lines():
    fields, x = mlps(4), states(5, 2)
    field = Expansion(fields, Hat(4, depth=3.0))
    for k, layer in enumerate(fields):
        assert torch.equal(field(float(k), x), layer(float(k), x))
        assert torch.equal(field(torch.tensor(float(k)), x), layer(float(k), x))
    for t in (0.25, 1.6, 2.9):
        left = int(t)
        weights = {
            name: torch.lerp(p, dict(fields[left + 1].named_parameters())[name], t - left)
            for name, p in fields[left].named_parameters()
        }
        torch.testing.assert_close(field(t, x), functional_call(fields[0], weights, (t, x)), rtol=1e-14, atol=1e-14)
    assert field.knots == (1.0, 2.0)


@pytest.mark.parametrize("name", NAMES)
def test_one_field_is_the_same_at_all_depths(name):
    (layer,), x = mlps(1), states(5, 2)
    field = Expansion(layer, named_basis(name, 4, 3.0))
    for t in DEPTHS:
        torch.testing.assert_close(field(t, x), layer(t, x), rtol=1e-14, atol=1e-14)
    with torch.no_grad():
        next(layer.parameters()).add_(1)
    assert not torch.equal(field(0.0, x), layer(0.0, x)), "the coefficients are copies"


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_weights_written_out(name):
    basis, x = named_basis(name, 4, 3.0), states(5, 2)
    field = Expansion(mlps(4), basis)
    sum(field(t, x).square().sum() for t in (0.2, 1.3, 2.6)).backward()
    ours = {key: p.grad for key, p in field.field.named_parameters()}
    plain = {key: p.detach().clone().requires_grad_() for key, p in field.field.named_parameters()}
    for t in (0.2, 1.3, 2.6):
        values = torch.tensor(dense(basis, t), dtype=FLOAT64)
        weights = {key: torch.tensordot(values, p, 1) for key, p in plain.items()}
        functional_call(mlps(1)[0], weights, (t, x)).square().sum().backward()
    for key, p in plain.items():
        torch.testing.assert_close(ours[key], p.grad, rtol=1e-12, atol=1e-12)
        assert all(coefficient.any() for coefficient in ours[key])


@pytest.mark.parametrize("name", ["hat", "legendre"])
def test_it_compiles_into_one_graph(name):
    field = Autonomous(PreActivation(2, 2)) if name == "hat" else Autonomous(nn.Conv2d(2, 2, 3, padding=1))
    flow = Flow(Expansion(field, named_basis(name, 3, 2.0)), "rk4:h=0.5", 2)
    other, x = copy.deepcopy(flow), torch.randn(2, 2, 4, 4)
    assert torch.equal(torch.compile(flow, fullgraph=True, backend="eager")(x), other(x))
    # A traced graph may round the statistics otherwise (it does so under torch 2.11).
    torch.testing.assert_close(flow.state_dict(), other.state_dict(), rtol=1e-6, atol=1e-7)


def test_copies_and_files(tmp_path):
    field = Expansion(mlps(3), Legendre(3))
    assert list(field.state_dict()) == [f"field.{name}" for name in MLP(2, 3).state_dict()]
    assert {p.shape[0] for p in field.parameters()} == {3}
    clone, x = copy.deepcopy(field), states(5, 2)
    with torch.no_grad():
        for p in clone.parameters():
            p.add_(1)
    assert not torch.equal(clone(0.3, x), field(0.3, x))
    torch.save(field.state_dict(), tmp_path / "weights.pt")
    clone.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(clone(0.3, x), field(0.3, x))
    assert field.float()(0.3, x.float()).dtype == torch.float32


class Tied(nn.Module):
    """Two linear maps with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_tied_and_frozen_parameters_stay_so():
    module, x = Tied(), states(5, 2)
    module.first.bias.requires_grad_(False)
    field = Expansion(Autonomous(module), Hat(3))
    assert field.field.module.first.weight is field.field.module.second.weight
    assert not field.field.module.first.bias.requires_grad
    assert torch.equal(field(0.5, x), module(x))
    coarse = field.project(Hat(2))
    assert coarse.field.module.first.weight is coarse.field.module.second.weight
    torch.testing.assert_close(coarse(0.5, x), module(x))


# BatchNorm
def norm_field(momentum=0.3):
    return Autonomous(nn.BatchNorm1d(2, momentum=momentum).double())


def test_training_moves_the_statistics_of_the_nodes_around():
    field, x = Expansion(norm_field(), Hat(3, 2.0)), 3 * states(5, 2) + 1
    assert torch.equal(field(0.25, x), norm_field()(0.0, x))
    norm, phi = field.field.module, torch.tensor([[0.75], [0.25], [0.0]], dtype=FLOAT64)
    torch.testing.assert_close(norm.running_mean, 0.3 * phi * x.mean(0))
    torch.testing.assert_close(norm.running_var, 1 - 0.3 * phi + 0.3 * phi * x.var(0))
    assert norm.num_batches_tracked.tolist() == [1, 1, 0]


def test_at_a_node_it_is_the_batch_norm_of_that_node():
    plain, field = norm_field(), Expansion(norm_field(), Hat(3, 2.0))
    for x in (states(5, 2), 3 * states(5, 2) + 1):
        assert torch.equal(field(1.0, x), plain(0.0, x))
    assert torch.equal(field.field.module.running_mean[1], plain.module.running_mean)
    torch.testing.assert_close(field.field.module.running_var[1], plain.module.running_var, rtol=1e-15, atol=0)
    assert torch.equal(field.field.module.running_var[0], torch.ones(2, dtype=FLOAT64))
    assert torch.equal(field.eval()(1.0, x), plain.eval()(0.0, x))


def test_evaluation_takes_the_average_of_the_nodes_and_moves_nothing():
    field, x = Expansion(norm_field(), Hat(3, 2.0)).eval(), states(5, 2)
    norm = field.field.module
    norm.running_mean.copy_(torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]))
    norm.running_var.copy_(torch.tensor([[1.0, 1.0], [2.0, 4.0], [1.0, 1.0]]))
    before = copy.deepcopy(field.state_dict())
    mean, var = torch.tensor([0.5, 1.5], dtype=FLOAT64), torch.tensor([1.25, 1.75], dtype=FLOAT64)
    torch.testing.assert_close(field(0.25, x), (x - mean) / (var + 1e-5).sqrt())
    assert all(torch.equal(value, before[name]) for name, value in field.state_dict().items())


def test_a_norm_that_does_not_train_keeps_its_statistics():
    field, x = Expansion(norm_field(), Hat(2)), 3 * states(5, 2) + 1
    field.field.module.eval()
    torch.testing.assert_close(field(0.5, x), x / math.sqrt(1 + 1e-5))
    assert field.field.module.num_batches_tracked.tolist() == [0, 0]


class Calls(nn.Module):
    """Calls a BatchNorm so many times."""

    def __init__(self, calls):
        super().__init__()
        self.norm, self.calls = nn.BatchNorm1d(2).double(), calls

    def forward(self, x):
        for _ in range(self.calls):
            x = self.norm(x + 1)
        return x


@pytest.mark.parametrize("calls", [0, 2])
def test_a_norm_that_is_called_twice_or_not_at_all(calls):
    plain, x = Autonomous(Calls(calls)), states(5, 2)
    field = Expansion(Autonomous(Calls(calls)), Hat(2))
    assert torch.equal(field(0.0, x), plain(0.0, x))
    torch.testing.assert_close(field.field.module.norm.running_mean[0], plain.module.norm.running_mean)
    torch.testing.assert_close(field.field.module.norm.running_var[0], plain.module.norm.running_var)
    assert field.field.module.norm.num_batches_tracked.tolist() == [calls, 0]


def test_recomputations_leave_the_statistics_alone():
    field, x = Expansion(norm_field(), Hat(2)), states(5, 2)
    before = copy.deepcopy(field.state_dict())
    with statistics_untouched(field):
        field(0.5, x)
    assert all(torch.equal(value, before[name]) for name, value in field.state_dict().items())
    field(0.5, x)
    assert not torch.equal(field.field.module.running_mean, before["field.module.running_mean"])


def test_batch_norm_without_statistics_is_for_every_basis():
    norm = Autonomous(nn.BatchNorm1d(2, track_running_stats=False).double())
    assert torch.equal(Expansion(norm, Chebyshev(3))(0.5, states(5, 2)), norm(0.5, states(5, 2)))


# Projection
def coefficients(field):
    return {name: p.detach() for name, p in field.field.named_parameters()}


def assert_same_coefficients(one, other, tolerance=1e-10):
    for name, value in coefficients(one).items():
        torch.testing.assert_close(value, coefficients(other)[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [2, 6])
def test_projecting_onto_the_same_basis_changes_nothing(name, size):
    field = Expansion(mlps(size), named_basis(name, size, 3.0))
    assert_same_coefficients(field, field.project(named_basis(name, size, 3.0)))


@pytest.mark.parametrize("name", NAMES)
def test_a_finer_basis_holds_the_same_weights(name):
    field, x = Expansion(mlps(3), named_basis(name, 3, 3.0)), states(5, 2)
    fine = field.project(named_basis(name, 5, 3.0))
    for t in DEPTHS:
        torch.testing.assert_close(fine(t, x), field(t, x), rtol=1e-10, atol=1e-10)
    assert_same_coefficients(field, fine.project(named_basis(name, 3, 3.0)))


def test_polynomial_bases_of_one_size_hold_the_same_weights():
    field, x = Expansion(mlps(4), Chebyshev(4, 3.0)), states(5, 2)
    other = field.project(Legendre(4, 3.0))
    for t in DEPTHS:
        torch.testing.assert_close(other(t, x), field(t, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_the_error_on_a_smooth_path_falls_with_the_size(name):
    """The path is exp(sin(2 pi t / 3)), sampled finely; the error is measured at points that the projection does not use."""
    layers = [Autonomous(nn.Linear(1, 1, bias=False).double()) for _ in range(61)]
    with torch.no_grad():
        for k, layer in enumerate(layers):
            layer.module.weight.fill_(math.exp(math.sin(2 * math.pi * k / 60)))
    path, x = Expansion(layers, Hat(61, 3.0)), torch.ones(1, 1, dtype=FLOAT64)
    errors = []
    with torch.no_grad():
        for size in (3, 6, 12):
            projected = path.project(named_basis(name, size, 3.0))
            errors.append(max(abs(float(projected(t, x) - path(t, x))) for t in np.linspace(0.01, 2.99, 37)))
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.5 * errors[1]


def test_the_projection_of_layers_is_the_nearest_path():
    """Against least squares on a fine grid, for one weight."""
    layers = tanh_layers(6, features=2)
    for basis in (Hat(5, 6.0), Legendre(3, 6.0), Fourier(3, 6.0)):  # Hat's pieces between knots are of two widths
        projected = layers.project(basis)
        grid = (np.arange(60_000) + 0.5) / 10_000
        steps = np.array([layer.module[0].bias[1].item() for layer in layers.layers])[grid.astype(int)]
        matrix = np.array([dense(basis, t) for t in grid.tolist()])
        nearest = np.linalg.lstsq(matrix, steps, rcond=None)[0]
        assert coefficients(projected)["module.0.bias"][:, 1].numpy() == pytest.approx(nearest, abs=1e-6)


def test_equal_layers_project_onto_equal_weights():
    layer, x = tanh_layers(1).layers[0], torch.randn(2, 4, dtype=FLOAT64)
    layers = PiecewiseConstant([copy.deepcopy(layer) for _ in range(4)])
    scaled = PiecewiseConstant([Scaled(copy.deepcopy(layer), 0.5) for _ in range(4)])
    for name in NAMES:
        torch.testing.assert_close(layers.project(named_basis(name, 3, 4.0))(1.3, x), layer(0.0, x))
        torch.testing.assert_close(scaled.project(named_basis(name, 3, 4.0))(1.3, x), 0.5 * layer(0.0, x))


def test_statistics_are_projected_and_variances_stay_in_range():
    layers = PiecewiseConstant([norm_field() for _ in range(4)])
    for k, layer in enumerate(layers.layers):
        layer.module.running_mean.fill_(2.0 * k)
        layer.module.running_var.fill_(1e-3 if k < 3 else 1.0)
        layer.module.num_batches_tracked.fill_(7)
    norm = layers.eval().project(Hat(2, 4.0)).field.module
    # The straight line nearest to the steps 0, 2, 4, 6 goes from -0.75 to 6.75.
    torch.testing.assert_close(norm.running_mean[:, 0], torch.tensor([-0.75, 6.75], dtype=FLOAT64))
    assert norm.running_var.min() == 1e-3, "a projection without limits would make this variance negative"
    assert norm.num_batches_tracked.tolist() == [7, 7]
    assert not layers.project(Hat(2, 4.0)).training


# What cannot be
def linear(**options):
    return Autonomous(nn.Linear(2, 2, **options))


def behind(activation):
    return Autonomous(nn.Sequential(nn.Linear(2, 2), activation))


OTHER_SHAPE = r"inner\.weight has shape \(3, 3\) in field 0 and \(4, 3\) in field 1"
NO_BIAS = r"module\.bias has shape \(2,\) in field 0 and none in field 1"
SCALED = PiecewiseConstant([Scaled(layer, s) for layer, s in zip(tanh_layers(2).layers, (0.5, 1.0), strict=True)])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: named_basis("spline", 3, 1.0), ValueError, "hat, chebyshev, legendre, fourier"),
        (lambda: Hat(1), ValueError, "2 or more"),
        (lambda: Legendre(0), ValueError, "1 or more"),
        (lambda: Fourier(2.0), ValueError, "size is an integer"),
        *((lambda d=d: Chebyshev(2, d), ValueError, "positive number of layers") for d in (0.0, -1.0, math.inf, math.nan)),
        (lambda: Expansion(mlps(2), Hat(3)), ValueError, "needs 3 fields"),
        (lambda: Expansion([], Hat(3)), ValueError, "needs 3 fields"),
        (lambda: Expansion(mlps(1)[0], "hat"), TypeError, "basis such as Hat"),
        (lambda: Expansion([nn.Linear(2, 2), nn.Linear(2, 2)], Hat(2)), TypeError, "Autonomous"),
        (lambda: Expansion(tanh_layers(2), Hat(2)), TypeError, "jumps at"),
        (lambda: Expansion([MLP(2, 3), MLP(2, 4)], Hat(2)), ValueError, OTHER_SHAPE),
        (lambda: Expansion([linear(), linear(bias=False)], Hat(2)), ValueError, NO_BIAS),
        (lambda: Expansion([behind(nn.Tanh()), behind(nn.ReLU())], Hat(2)), ValueError, r"Tanh\(\).*field 1 .*ReLU\(\)"),
        (lambda: Expansion(norm_field(), Chebyshev(3)), TypeError, r"module is a BatchNorm1d.*Chebyshev.*GroupNorm"),
        (lambda: Expansion(norm_field(), Hat(3)).project(Legendre(2)), TypeError, "BatchNorm1d"),
        (lambda: Expansion(norm_field(momentum=None), Hat(3)), ValueError, "momentum=None"),
        (lambda: Expansion(mlps(1)[0], Hat(3, 3.0)).project(Hat(3, 2.0)), ValueError, "keeps the depth"),
        (lambda: tanh_layers(4).project(Hat(3, 3.0)), ValueError, "their number, 4"),
        (lambda: SCALED.project(Hat(2, 2.0)), ValueError, r"field 0 has scale=0.5, field 1 scale=1.0"),
    ],
)
def test_bases_fields_and_projections_that_cannot_be(make, error, message):
    with pytest.raises(error, match=message):
        make()
