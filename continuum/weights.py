"""Weights as functions of depth, theta(t): fields made of fields.

`depth_smoothness` measures how fast theta changes: int |d theta / ds|^2 ds + tau |theta(0)|^2 on the depths s in [0, 1].
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from continuum.bases import Basis, Box, Terms, projection
from continuum.fields import Field
from continuum.fields.base import as_part, in_mode_of
from continuum.types import REPLACING, BatchNorm, State, Time

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""The buffers of BatchNorm that vary with depth where its weights do."""


class Expansion(Field):
    """One field whose weights vary with depth: f(t, x) = field(t, x) with the weights theta(t) = sum_k phi_k(t) theta_k.

    Every parameter of the field becomes one of shape (basis.size, *shape) that holds the coefficients theta_k
    (arXiv 2008.02389); its name stays. `field` is one field, whose weights are then the same at all depths to begin with, or
    `basis.size` fields of one kind, whose weights are the coefficients: with `Hat`, the weights at the nodes.

    BatchNorm needs `Hat`: each node has running statistics of its own. Evaluation at t takes their average; training at t
    moves those of node k with momentum m phi_k(t), for BatchNorm's m. All other buffers are common to all depths.

    >>> from continuum.bases import Hat
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

    takes_number = True

    def __init__(self, field: nn.Module | Sequence[nn.Module], basis: Basis) -> None:
        super().__init__()
        if not isinstance(basis, Basis):
            raise TypeError(f"an Expansion needs a basis such as Hat(4, depth=3), not {basis!r}")
        one = isinstance(field, nn.Module) and not isinstance(field, nn.ModuleList)
        fields = [as_part(f, "an Expansion") for f in ([field] if one else field)]  # pyright: ignore[reportGeneralTypeIssues]
        if not one and len(fields) != basis.size:
            raise ValueError(f"{basis} needs {basis.size} fields, one a coefficient, or a single one; got {len(fields)}")
        _check_one_kind(fields)
        self.field = copy.deepcopy(fields[0])
        norms = {name: module for name, module in self.field.named_modules() if isinstance(module, BatchNorm)}
        self.norms = tuple(name for name, norm in norms.items() if norm.running_mean is not None)
        self._set_basis(basis)
        if one:
            _replace(self.field, self.norms, lambda name, tensor: _constant(tensor, basis))
        else:
            coefficients = [dict(_tensors(other, self.norms)) for other in fields]
            stacked = {name: torch.stack([tensors[name].detach() for tensors in coefficients]) for name in coefficients[0]}
            _replace(self.field, self.norms, lambda name, tensor: stacked[name])

    def _set_basis(self, basis: Basis) -> None:
        for name in self.norms:
            norm = cast(BatchNorm, self.field.get_submodule(name))
            if not basis.nodal:
                raise TypeError(
                    f"{name} is a {type(norm).__name__}: its running statistics cannot be expanded in {type(basis).__name__}, "
                    "whose values may be negative. Take Hat, or nn.GroupNorm, which keeps no statistics"
                )
            if norm.momentum is None:
                raise ValueError(f"{name} is a {type(norm).__name__} with momentum=None: give it a number, such as 0.1")
        self.basis = basis
        self.knots, self.extent = basis.knots, basis.depth

    def forward(self, t: Time, x: State, *context: Any) -> State:
        if torch.compiler.is_compiling():
            return self._forward(t, x, *context)
        with REPLACING:
            return self._forward(t, x, *context)

    def _forward(self, t: Time, x: State, *context: Any) -> State:
        terms = self.basis(float(t.detach() if isinstance(t, Tensor) else t))
        tensors = {name: combined(parameter, terms) for name, parameter in self.field.named_parameters()}
        training: list[tuple[BatchNorm, list[Tensor]]] = []
        for name in self.norms:
            norm = cast(BatchNorm, self.field.get_submodule(name))
            stacked = [cast(Tensor, getattr(norm, attribute)) for attribute in STATISTICS]
            if norm.training:
                # While it trains, BatchNorm does not read its statistics: from zeros it leaves momentum times what it saw.
                values = [torch.zeros_like(tensor[0]) for tensor in stacked]
                training.append((norm, values))
            else:
                values = [combined(tensor, terms) for tensor in stacked[:2]]
            tensors.update({f"{name}.{attribute}": value for attribute, value in zip(STATISTICS, values, strict=False)})
        slope = functional_call(self.field, tensors, (t, x, *context))
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
        if any(parameter.is_meta for parameter in self.parameters()):  # shapes alone
            _replace(projected.field, self.norms, lambda name, tensor: tensor.new_empty((basis.size, *tensor.shape[1:])))
            return projected
        matrix = projection(self.basis, basis)
        _replace(projected.field, self.norms, lambda name, tensor: _projected(name, tensor, matrix))
        return projected

    def held(self, t: float) -> Field:
        """The expanded field with the weights, and running statistics, that it has at depth t: a copy."""
        layer, terms = copy.deepcopy(self.field), self.basis(t)
        _replace(layer, self.norms, lambda name, tensor: combined(tensor, terms).to(tensor.dtype).clone())  # not a view
        return in_mode_of(self, layer.held(t))

    def innermost(self) -> Field:
        return self.field.innermost()

    def expanded(self) -> tuple[Basis, list[Tensor]]:
        return self.basis, list(self.field.own_weights().values())

    def extra_repr(self) -> str:
        return str(self.basis)


def _check_one_kind(fields: Sequence[Field]) -> None:
    """Raise ValueError if these fields could not be one with other weights."""
    _check_shapes([dict(field.named_parameters()) for field in fields], "the coefficients are fields of one kind", "field")
    for index, field in enumerate(fields):
        for one, other in zip(str(fields[0]).splitlines(), str(field).splitlines(), strict=False):
            if one != other:
                raise ValueError(
                    f"the coefficients are fields of one kind: field 0 has {one.strip()}, field {index} {other.strip()}"
                )


def _check_shapes(fields: Sequence[dict[str, Tensor]], rule: str, part: str) -> None:
    """Raise ValueError, with the rule, unless all fields have tensors of the same names and shapes."""
    kinds = [{name: tuple(tensor.shape) for name, tensor in field.items()} for field in fields]
    for index, kind in enumerate(kinds):
        for name in [*kinds[0], *kind]:
            if kind.get(name) != kinds[0].get(name):
                raise ValueError(
                    f"{rule}: parameter {name} has shape {kinds[0].get(name, 'none')} in {part} 0 and "
                    f"{kind.get(name, 'none')} in {part} {index}"
                )


def _tensors(field: Field, norms: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """What varies with depth: the parameters, tied ones under each of their names, and the statistics of `norms`."""
    yield from field.named_parameters(remove_duplicate=False)
    for name in norms:
        for attribute in STATISTICS:
            yield f"{name}.{attribute}", getattr(field.get_submodule(name), attribute)


def _replace(field: Field, norms: Sequence[str], new: Callable[[str, Tensor], Tensor]) -> None:
    """Put new(name, tensor) in the place of each tensor that varies with depth; tied parameters stay tied."""
    made: dict[Tensor, Tensor] = {}
    for name, old in list(_tensors(field, norms)):
        if old not in made:
            tensor = new(name, old.detach())
            made[old] = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        owner, _, attribute = name.rpartition(".")
        setattr(field.get_submodule(owner), attribute, made[old])


def _constant(tensor: Tensor, basis: Basis) -> Tensor:
    """The coefficients of a theta(t) that is `tensor` at all depths."""
    if basis.nodal:
        return torch.stack([tensor] * basis.size)
    return torch.cat([tensor[None], tensor.new_zeros(basis.size - 1, *tensor.shape)])


def combined(stacked: Tensor, terms: Terms) -> Tensor:
    """sum_k phi_k theta_k; the coefficient itself where it is alone with the value one."""
    (first, value), *rest = terms
    total = stacked[first] if value == 1.0 else value * stacked[first]
    for k, value in rest:
        total = torch.add(total, stacked[k], alpha=value)
    return total


@torch.no_grad()
def _update(norm: BatchNorm, seen: Sequence[Tensor], terms: Terms) -> None:
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

    takes_number = True

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(as_part(layer, f"layer {index}") for index, layer in enumerate(layers))
        if not self.layers:
            raise ValueError("PiecewiseConstant needs at least one layer")
        self.knots = tuple(float(k) for k in range(1, len(self.layers)))
        self.extent = float(len(self.layers))

    def forward(self, t: Time, x: State) -> State:
        return self.at(float(t))(t, x)

    def at(self, t: float) -> Field:
        return cast(Field, self.layers[min(max(math.floor(t), 0), len(self.layers) - 1)])

    def pieces(self) -> list[Field]:
        return [cast(Field, layer) for layer in self.layers]

    def mapped(self, change: Callable[[Field], Field]) -> "PiecewiseConstant":
        return in_mode_of(self, PiecewiseConstant(map(change, self.pieces())))

    def scaled(self, scale: float) -> Field:
        return self.mapped(lambda layer: layer.scaled(scale))

    def divided(self, k: int) -> Field:
        copies = [copy.deepcopy(layer).scaled(1 / k) for layer in self.pieces() for _ in range(k)]
        return in_mode_of(self, PiecewiseConstant(copies))

    def project(self, basis: Basis) -> Expansion:
        """The expansion whose theta(t) is nearest to these steps in the norm of L2[0, n]; running statistics too.

        >>> from torch import nn
        >>> from continuum.bases import Hat
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
        return in_mode_of(self, Expansion(self.pieces(), Box(len(self.layers), basis.depth)).project(basis))

    def held(self, t: float) -> Field:
        return in_mode_of(self, self.at(t).held(t))

    def expanded(self) -> tuple[Basis, list[Tensor]]:
        count = len(self.layers)
        return Box(count, count), _stacked([layer.own_weights() for layer in self.pieces()])


def depth_smoothness(field: Field, tau: float = 1.0) -> Tensor:
    """int |d theta / ds|^2 ds + tau |theta(0)|^2 over all parameters, with the depth s = t / T in [0, 1].

    For N layers it is N sum_i |theta_{i+1} - theta_i|^2 + tau |theta_0|^2 (arXiv 1810.11741). The factor N keeps its size
    as layers are added to the same theta(t); with it as a penalty, the best weights of ever more layers converge to those of
    the ODE. For an `Expansion` on `Hat` the integral is such a sum over its nodes, with their number of gaps for N; on
    smooth bases it is a quadratic form of the coefficients. A jump of `Box` counts as one between layers.

    The theta are those inside `Scaled` and `Momentum`: a common scale T/N is no part of theta, and neither is k, which belongs
    to the scheme and which the first layer of an LM-ResNet does not have. Running statistics are no weights.

    >>> from torch import nn
    >>> from continuum.fields import Autonomous
    >>> layers = [nn.PReLU(1, init) for init in (1.0, 2.0, 4.0)]
    >>> depth_smoothness(PiecewiseConstant(map(Autonomous, layers)), tau=0.5).item()  # 3 (1 + 4) + 0.5
    15.5

    Returns:
        One number, differentiable with respect to the parameters.

    Raises:
        TypeError: a field whose weights are no function of depth, or a basis with kinks that does not say its `roughness`.
        ValueError: layers of several kinds, or a negative tau.
    """
    if not tau >= 0:
        raise ValueError(f"tau weighs |theta(0)|^2 and is not negative; got {tau}")
    found = field.expanded()
    if found is None:
        raise TypeError(
            f"the weights of a {type(field).__name__} are not a function of depth: only PiecewiseConstant layers and an "
            "Expansion have a smoothness"
        )
    basis, thetas = found
    total = torch.zeros(())
    for theta in thetas:
        energy = basis.roughness(theta) + tau * combined(theta, basis(0.0)).square().sum()
        total = total.to(energy) + energy
    return total


def _stacked(layers: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """Each parameter of all layers as one tensor, (layers, *shape)."""
    _check_shapes(layers, "layers are compared if they are of one kind", "layer")
    return [torch.stack([layer[name] for layer in layers]) for name in layers[0]]
