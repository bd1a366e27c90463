"""Weights as functions of depth, theta(t): fields made of fields.

| class               | theta(t)                                 |
| ------------------- | ---------------------------------------- |
| `PiecewiseConstant` | theta_floor(t)                           |
| `Expansion`         | sum_k phi_k(t) theta_k, on a `Basis` phi |
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from continuum.fields import Field, Scaled
from continuum.types import State, Time

Terms: TypeAlias = list[tuple[int, float]]
"""The functions of a basis that are not zero at a depth, as (index, value)."""


# Bases


@dataclass(frozen=True)
class Basis(ABC):
    """Functions phi_0, ..., phi_{size - 1} of the depths [0, depth]; depths outside count as the nearer end.

    `basis(t)` lists those that are not zero at t, as (index, value); `knots` are the interior depths where one of them has
    a kink. In a `nodal` basis no value is negative and at every depth they sum to one, so that theta(t) is an average of
    the coefficients: what running statistics need.

    Raises:
        ValueError: too few functions, or a depth that is not positive.
    """

    size: int
    depth: float = 1.0

    least: ClassVar[int] = 1
    nodal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < self.least:
            raise ValueError(f"{type(self).__name__} has {self.least} or more functions: size is an integer, not {self.size!r}")
        if not 0 < self.depth < float("inf"):
            raise ValueError(f"depth is a positive number of layers, not {self.depth}")

    @property
    def knots(self) -> tuple[float, ...]:
        return ()

    def __call__(self, t: float) -> Terms:
        return self.terms(min(max(t, 0.0), self.depth))

    @abstractmethod
    def terms(self, t: float) -> Terms:
        """What `basis(t)` lists, at a depth in [0, depth]."""


@dataclass(frozen=True)
class Hat(Basis):
    """Piecewise-linear functions: phi_k is one at its node, depth k / (size - 1), and zero at all others.

    They sum to one at every depth, and the coefficients are theta at the nodes. A depth within float32's rounding of a
    node counts as the node: that is how far a solver moves a stage off a knot.

    >>> Hat(3, depth=2)(0.25)
    [(0, 0.75), (1, 0.25)]
    >>> Hat(3, depth=2)(1.0)
    [(1, 1.0)]
    """

    least = 2
    nodal = True

    @property
    def knots(self) -> tuple[float, ...]:
        return tuple(self.depth * k / (self.size - 1) for k in range(1, self.size - 1))

    def terms(self, t: float) -> Terms:
        per_depth = (self.size - 1) / self.depth
        place = t * per_depth
        nearest = round(place)
        if abs(place - nearest) <= 2**-21 * max(1.0, t) * per_depth:
            return [(nearest, 1.0)]
        left = math.floor(place)
        return [(left, 1 - (place - left)), (left + 1, place - left)]


@dataclass(frozen=True)
class Chebyshev(Basis):
    """Chebyshev's polynomials T_k(s) with s = 2 t / depth - 1: T_{k+1} = 2 s T_k - T_{k-1}.

    >>> Chebyshev(3)(0.75)
    [(0, 1.0), (1, 0.5), (2, -0.5)]
    """

    def terms(self, t: float) -> Terms:
        s = 2 * t / self.depth - 1
        values = [1.0, s]
        for k in range(1, self.size - 1):
            values.append(2 * s * values[k] - values[k - 1])
        return _not_zero(values[: self.size])


@dataclass(frozen=True)
class Legendre(Basis):
    """Legendre's polynomials P_k(s) with s = 2 t / depth - 1: (k + 1) P_{k+1} = (2 k + 1) s P_k - k P_{k-1}.

    >>> Legendre(3)(0.75)
    [(0, 1.0), (1, 0.5), (2, -0.125)]
    """

    def terms(self, t: float) -> Terms:
        s = 2 * t / self.depth - 1
        values = [1.0, s]
        for k in range(1, self.size - 1):
            values.append(((2 * k + 1) * s * values[k] - k * values[k - 1]) / (k + 1))
        return _not_zero(values[: self.size])


@dataclass(frozen=True)
class Fourier(Basis):
    """The functions 1, cos(w t), sin(w t), cos(2 w t), sin(2 w t), ... with w = 2 pi / depth.

    >>> Fourier(3)(0.0)
    [(0, 1.0), (1, 1.0)]
    """

    def terms(self, t: float) -> Terms:
        angle = 2 * math.pi * t / self.depth
        waves = [wave(k * angle) for k in range(1, self.size // 2 + 1) for wave in (math.cos, math.sin)]
        return _not_zero([1.0, *waves][: self.size])


@dataclass(frozen=True)
class _Box(Basis):
    """Step functions: phi_k is one on the k-th of `size` equal parts and zero elsewhere; the weights of layers."""

    nodal = True

    @property
    def knots(self) -> tuple[float, ...]:
        return tuple(self.depth * k / self.size for k in range(1, self.size))

    def terms(self, t: float) -> Terms:
        return [(min(math.floor(t * self.size / self.depth), self.size - 1), 1.0)]


def _not_zero(values: Sequence[float]) -> Terms:
    return [(k, value) for k, value in enumerate(values) if value]


def named_basis(name: str, size: int, depth: float) -> Basis:
    """The basis called `name`: hat, chebyshev, legendre or fourier.

    >>> named_basis("hat", 4, depth=3)
    Hat(size=4, depth=3)

    Raises:
        ValueError: another name, or a size or depth that the basis refuses.
    """
    bases = {"hat": Hat, "chebyshev": Chebyshev, "legendre": Legendre, "fourier": Fourier}
    if name not in bases:
        raise ValueError(f"unknown basis {name!r}; there are {', '.join(bases)}")
    return bases[name](size, depth)


def projection(old: Basis, new: Basis) -> Tensor:
    """The matrix (new.size, old.size), in float64, from coefficients on `old` to those of the nearest function on `new`.

    Nearest in L2[0, depth]: least squares over the points of a Gauss-Legendre rule on each piece between knots. The more
    functions oscillate over the whole depth, the more points.
    """
    rule = _gauss_legendre(32 + 2 * max([basis.size for basis in (old, new) if not basis.knots], default=0))
    pieces = list(pairwise([0.0, *sorted({*old.knots, *new.knots}), old.depth]))
    points = [(start + stop + (stop - start) * s) / 2 for start, stop in pieces for s, _ in rule]
    roots = [math.sqrt((stop - start) * weight) for start, stop in pieces for _, weight in rule]
    scale = torch.tensor(roots, dtype=torch.float64, device="cpu")[:, None]
    return torch.linalg.lstsq(scale * _sampled(new, points), scale * _sampled(old, points)).solution


def _sampled(basis: Basis, points: Sequence[float]) -> Tensor:
    """The values of the functions, (points, basis.size) in float64."""
    rows = [[0.0] * basis.size for _ in points]
    for row, t in zip(rows, points, strict=True):
        for k, value in basis(t):
            row[k] = value
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def _gauss_legendre(points: int) -> list[tuple[float, float]]:
    """Nodes and weights on [-1, 1], exact for polynomials of degree 2 points - 1 (Golub and Welsch, 1969)."""
    k = torch.arange(1, points, dtype=torch.float64, device="cpu")
    beside = k / (4 * k**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(beside.diag(1) + beside.diag(-1))
    return list(zip(nodes.tolist(), (2 * vectors[0] ** 2).tolist(), strict=True))


# Fields

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""The buffers of BatchNorm that vary with depth where its weights do."""


class Expansion(Field):
    """One field whose weights vary with depth: f(t, x) = field(t, x) with the weights theta(t) = sum_k phi_k(t) theta_k.

    Every parameter of the field becomes one of shape (basis.size, *shape) that holds the coefficients theta_k
    (arXiv 2008.02389); its name stays. `field` is one field, whose weights are then the same at all depths to begin with, or
    `basis.size` fields of one kind, whose weights are the coefficients: with `Hat`, the weights at the nodes.

    BatchNorm needs `Hat`: each node has running statistics of its own. Evaluation at t takes their average; training at t
    moves those of node k with momentum m phi_k(t), for BatchNorm's m. All other buffers are common to all depths.

    >>> from continuum.fields import MLP
    >>> field = Expansion(MLP(2, hidden=8), Hat(3, depth=2))
    >>> field(0.5, torch.zeros(4, 2)).shape
    torch.Size([4, 2])
    >>> field.field.outer.bias.shape
    torch.Size([3, 2])

    Raises:
        TypeError: something else than fields, a field that jumps in depth, or BatchNorm on a basis other than `Hat`.
        ValueError: not one field or `basis.size` of them, fields that differ in more than their numbers, or BatchNorm
            without a momentum.
    """

    def __init__(self, field: Field | Sequence[Field], basis: Basis) -> None:
        super().__init__()
        if not isinstance(basis, Basis):
            raise TypeError(f"an Expansion needs a basis such as Hat(4, depth=3), not {basis!r}")
        fields = [field] if isinstance(field, Field) else list(field)
        if not isinstance(field, Field) and len(fields) != basis.size:
            raise ValueError(f"{basis} needs {basis.size} fields, one a coefficient, or a single one; got {len(fields)}")
        _check_one_kind(fields)
        self.field = copy.deepcopy(fields[0])
        self.norms = tuple(
            name
            for name, module in self.field.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        )
        self._set_basis(basis)
        if isinstance(field, Field):
            self._replace(lambda name, tensor: _constant(tensor, basis))
        else:
            coefficients = [dict(_tensors(other, self.norms)) for other in fields]
            self._replace(lambda name, tensor: torch.stack([tensors[name].detach() for tensors in coefficients]))

    def _set_basis(self, basis: Basis) -> None:
        for name in self.norms:
            norm = cast(_BatchNorm, self.field.get_submodule(name))
            if not basis.nodal:
                raise TypeError(
                    f"{name} is a {type(norm).__name__}: its running statistics cannot be expanded in {type(basis).__name__}, "
                    "whose values may be negative. Take Hat, or nn.GroupNorm, which keeps no statistics"
                )
            if norm.momentum is None:
                raise ValueError(f"{name} is a {type(norm).__name__} with momentum=None: give it a number, such as 0.1")
        self.basis = basis
        self.knots = basis.knots

    def _replace(self, new: Callable[[str, Tensor], Tensor]) -> None:
        """Put new(name, tensor) in the place of each tensor that varies with depth; tied parameters stay tied."""
        made: dict[Tensor, Tensor] = {}
        for name, old in list(_tensors(self.field, self.norms)):
            if old not in made:
                tensor = new(name, old.detach())
                made[old] = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
            owner, _, attribute = name.rpartition(".")
            setattr(self.field.get_submodule(owner), attribute, made[old])

    def forward(self, t: Time, x: State) -> State:
        terms = self.basis(float(t.detach() if isinstance(t, Tensor) else t))
        tensors = {name: _combined(parameter, terms) for name, parameter in self.field.named_parameters()}
        training: list[tuple[_BatchNorm, list[Tensor]]] = []
        for name in self.norms:
            norm = cast(_BatchNorm, self.field.get_submodule(name))
            stacked = [cast(Tensor, getattr(norm, attribute)) for attribute in STATISTICS]
            if norm.training:
                # While it trains, BatchNorm does not read its statistics: from zeros it leaves momentum times what it saw.
                values = [torch.zeros_like(tensor[0]) for tensor in stacked]
                training.append((norm, values))
            else:
                values = [_combined(tensor, terms) for tensor in stacked[:2]]
            tensors.update({f"{name}.{attribute}": value for attribute, value in zip(STATISTICS, values, strict=False)})
        slope = functional_call(self.field, tensors, (t, x))
        for norm, seen in training:
            _update(norm, seen, terms)
        return slope

    def project(self, basis: Basis) -> "Expansion":
        """The field with the nearest theta(t) on another basis, in the norm of L2[0, depth], without data.

        Usually with fewer weights. Running statistics are projected too; variances stay in the range of the old nodes.

        Raises:
            ValueError: the basis has another depth.
            TypeError: BatchNorm on a basis other than `Hat`.
        """
        if basis.depth != self.basis.depth:
            raise ValueError(f"a projection keeps the depth, which is {self.basis.depth:g} here; got {basis}")
        projected = copy.deepcopy(self)
        projected._set_basis(basis)
        matrix = projection(self.basis, basis)
        projected._replace(lambda name, tensor: _projected(name, tensor, matrix))
        return projected

    def extra_repr(self) -> str:
        return str(self.basis)


def _check_one_kind(fields: Sequence[Field]) -> None:
    """Raise TypeError or ValueError if these fields could not be one with other weights."""
    for index, field in enumerate(fields):
        if not isinstance(field, Field):
            raise TypeError(f"an Expansion is made of Fields, not of a {type(field).__name__}: wrap it as Autonomous(module)")
        if field.knots:
            raise TypeError(f"the field jumps at {field.knots}: an Expansion is made of fields that are smooth in depth")
        shapes, first = ({name: tuple(p.shape) for name, p in f.named_parameters()} for f in (field, fields[0]))
        for name in [*first, *shapes]:
            if shapes.get(name) != first.get(name):
                raise ValueError(
                    f"the coefficients are fields of one kind: parameter {name} has shape {first.get(name, 'none')} in field 0 "
                    f"and {shapes.get(name, 'none')} in field {index}"
                )
        for one, other in zip(str(fields[0]).splitlines(), str(field).splitlines(), strict=False):
            if one != other:
                raise ValueError(
                    f"the coefficients are fields of one kind: field 0 has {one.strip()}, field {index} {other.strip()}"
                )


def _tensors(field: Field, norms: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """What varies with depth: the parameters, tied ones under each of their names, and the statistics of `norms`."""
    yield from field.named_parameters(remove_duplicate=False)
    for name in norms:
        for attribute in STATISTICS:
            yield f"{name}.{attribute}", getattr(field.get_submodule(name), attribute)


def _constant(tensor: Tensor, basis: Basis) -> Tensor:
    """The coefficients of a theta(t) that is `tensor` at all depths."""
    if basis.nodal:
        return torch.stack([tensor] * basis.size)
    return torch.cat([tensor[None], tensor.new_zeros(basis.size - 1, *tensor.shape)])


def _combined(stacked: Tensor, terms: Terms) -> Tensor:
    """sum_k phi_k theta_k; the coefficient itself where it is alone with the value one."""
    (first, value), *rest = terms
    total = stacked[first] if value == 1.0 else value * stacked[first]
    for k, value in rest:
        total = torch.add(total, stacked[k], alpha=value)
    return total


@torch.no_grad()
def _update(norm: _BatchNorm, seen: Sequence[Tensor], terms: Terms) -> None:
    """running_k <- (1 - m phi_k) running_k + phi_k seen, where seen is m times the statistics of the batch.

    m is the share that all calls since `seen` was zero have had: one call, as a rule, but a field may call a norm twice or
    leave it out.
    """
    *measured, calls = seen
    assert norm.momentum is not None
    share = 1 - (1 - norm.momentum) ** calls.to(measured[0].dtype)
    for k, value in terms:
        for attribute, statistic in zip(STATISTICS, measured, strict=False):
            getattr(norm, attribute)[k].mul_(1 - value * share).add_(statistic, alpha=value)
        getattr(norm, STATISTICS[-1])[k].add_(calls)


def _projected(name: str, stacked: Tensor, matrix: Tensor) -> Tensor:
    """matrix @ stacked; variances and counts, which a projection may overshoot, stay in the range that they had."""
    exact = torch.tensordot(matrix, stacked.to(matrix), 1)
    if name.endswith(("running_var", "num_batches_tracked")):
        old = stacked.to(matrix)
        exact = exact.clamp(old.amin(0), old.amax(0))
    return (exact if stacked.is_floating_point() else exact.round()).to(stacked)


class PiecewiseConstant(Field):
    """One field a layer, f(t, x) = f_floor(t)(t, x): layer k is in force on [k, k + 1).

    Its depth is the number of layers n, its knots are 1, ..., n - 1. The index is clamped to [0, n - 1], for an adaptive
    solver may look past the end.

    >>> from torch import nn
    >>> from continuum.fields import Autonomous
    >>> field = PiecewiseConstant([Autonomous(nn.Linear(2, 2)) for _ in range(3)])
    >>> field.knots
    (1.0, 2.0)

    Raises:
        ValueError: no layers.
        TypeError: a layer is not a `Field`, or jumps inside.
    """

    def __init__(self, layers: Iterable[Field]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if not self.layers:
            raise ValueError("PiecewiseConstant needs at least one layer")
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, Field):
                raise TypeError(f"layer {index} is a {type(layer).__name__}, not a Field: wrap it as Autonomous(module)")
            if layer.knots:
                raise TypeError(f"layer {index} jumps at {layer.knots}: a layer is smooth in depth")
        self.knots = tuple(float(k) for k in range(1, len(self.layers)))

    def layer(self, t: Time) -> Field:
        """The layer in force at depth `t`."""
        index = math.floor(t) if isinstance(t, float | int) else int(t.floor())
        return cast(Field, self.layers[min(max(index, 0), len(self.layers) - 1)])

    def forward(self, t: Time, x: State) -> State:
        return self.layer(t)(t, x)

    def project(self, basis: Basis) -> Expansion:
        """The expansion whose theta(t) is nearest to these steps in the norm of L2[0, n]; running statistics too.

        >>> from torch import nn
        >>> from continuum.fields import Autonomous
        >>> field = PiecewiseConstant([Autonomous(nn.Linear(2, 2)) for _ in range(6)])
        >>> field.project(Hat(3, depth=6)).field.module.weight.shape
        torch.Size([3, 2, 2])

        Raises:
            ValueError: the basis has another depth than n, or the layers differ in more than their numbers.
            TypeError: BatchNorm on a basis other than `Hat`.
        """
        if basis.depth != len(self.layers):
            raise ValueError(f"the depth of these layers is their number, {len(self.layers)}; got {basis}")
        scales = {layer.scale if isinstance(layer, Scaled) else 1.0 for layer in self.layers}
        if len(scales) > 1:
            raise ValueError(f"the layers have different scales, {sorted(scales)}: one field cannot have them all")
        expansion = Expansion([cast(Field, layer) for layer in self.layers], _Box(len(self.layers), basis.depth)).project(basis)
        expansion.training = self.training
        return expansion
