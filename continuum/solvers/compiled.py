"""What torch.compile is given: a flow of fixed steps, the evaluations of a field, and one attempted step as one function,

    k_i = f(t + c_i h, x + h sum_j a_ij k_j),    x+ = x + h sum_i b_i k_i,
    ratio = | h sum_i e_i k_i / (atol + rtol max(|x|, |x+|)) |.

Depth, size and tolerances are tensors without axes, so that one graph serves all steps, of this solve and of the next. The
piece of the field is an argument, so that layers of one kind share it.
"""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from continuum.fields import Field
from continuum.fields.base import checked
from continuum.solvers.control import NORMS, Norm
from continuum.solvers.packed import components, unpacked
from continuum.solvers.pairs import Pair
from continuum.types import State


def counted_alone() -> dict[str, Any]:
    """Options of torch.compile with which torch counts graphs for each call of it alone.

    It counts them by code, to eight, and all modules share that of `nn.Module.__call__`, as all attempts do theirs. An older
    torch runs the ninth eagerly, with a warning, rather than refuse it for not being one graph.
    """
    isolates = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    return {"fullgraph": True, "isolate_recompiles": True} if isolates else {}


def compile_whole(module: nn.Module) -> None:
    """Compile `module` in place, as one graph for each way it is called, whatever else is compiled in this process."""
    nn.Module.compile(module, **counted_alone())


def compile_field(field: Field) -> None:
    """Compile `field` in place: piece by piece if it jumps, since the depth, a number, would be a constant of the graph."""
    for part in unpacked(field).pieces():
        if part._compiled_call_impl is None:
            part.compile()


def attempted(
    pair: Pair, norm: Norm, piece: Field, x: State, slope: State, t: Tensor, h: Tensor, limits: Tensor, keep: bool, final: bool
) -> tuple[State, list[State], Tensor]:
    """The new state, the slopes behind the first (the last one alone, unless `keep`), and the ratio.

    `limits` are the depths between which the piece is evaluated, rtol and atol. The norm over all ranks waits for the others,
    and is no part of a graph: in the place of its ratio stands the scaled error. The last slope of a `final` attempt is a
    number.
    """
    low, high, rtol, atol = limits.unbind()
    slopes, end = [slope], x
    for stage, (c, row) in enumerate(zip(pair.c[1:], pair.a[1:], strict=True), start=2):
        end = x + h * _weighted(row, slopes)
        depth = (t + c * h).clamp(low, high)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not (final and stage == len(pair.c))):
            slopes.append(checked(piece(depth, end), end).to(x.dtype))
    if not pair.reuses_last:
        end = x + h * _weighted(pair.b, slopes)
    with torch.no_grad():
        error = h * _weighted(pair.e, slopes) / (atol + rtol * torch.maximum(x.abs(), end.abs()))
        ratio = error if norm == "global" else NORMS[norm](components(piece, error))
    return end, slopes[1 if keep else -1 :], ratio


def _weighted(weights: Sequence[float], slopes: Sequence[State]) -> State:
    first, *others = [w * k for w, k in zip(weights, slopes, strict=False) if w]
    return sum(others, start=first)


Attempted: TypeAlias = Callable[..., tuple[State, list[State], Tensor]]
"""`attempted`, compiled."""

_ATTEMPTS: WeakKeyDictionary[Field, dict[Pair, Attempted]] = WeakKeyDictionary()
"""Of each compiled field, by pair; a copy of the field is not among them."""

_NOT_WHOLE: WeakSet[Field] = WeakSet()
"""Pieces that the compiler could not follow."""


def compile_attempts(field: Field) -> None:
    """Compile, when they are first needed, the attempted steps on `field`, each as one function.

    A piece with buffers is evaluated by compiled code alone. This tells autograd that it moves batch statistics, and eager
    evaluations, which do not, would miss those that they have saved.
    """
    _ATTEMPTS.setdefault(unpacked(field), {})
    for part in unpacked(field).pieces():
        if part._compiled_call_impl is None and next(part.buffers(), None) is not None:
            part.compile()


def compiled_attempt(field: Field, pair: Pair) -> Attempted | None:
    """The function of all attempts on `field` by `pair`, where it is compiled."""
    known = _ATTEMPTS.get(unpacked(field))
    if known is None:
        return None
    if pair not in known:
        known[pair] = torch.compile(attempted, options={"guard_filter_fn": _may_change}, **counted_alone())
    return known[pair]


def _may_change(guards: Sequence[Any]) -> list[bool]:
    """Which assumptions of a graph are looked at before each call: all but the hundred numbers of the pair."""
    return [not guard.name.startswith("L['pair']") for guard in guards]


def in_one(function: Attempted, pair: Pair, norm: Norm, piece: Field, *others: Any) -> tuple[State, list[State], Tensor] | None:
    """The attempt by `function`; None on a piece that the compiler cannot follow, whose evaluations are compiled instead."""
    from torch._dynamo.exc import TorchDynamoException  # the compiler is loaded only where it is used

    part = unpacked(piece)
    if part in _NOT_WHOLE:
        return None
    try:
        return function(pair, norm, piece, *others)
    except TorchDynamoException as error:
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"an attempted step of this {type(part).__name__} is not compiled as a whole, its evaluations are: {reason}",
            stacklevel=2,
        )
        _NOT_WHOLE.add(part)
        compile_field(part)
        return None
