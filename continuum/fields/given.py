"""A field with its further arguments: f(t, x) = field(t, x, *context), for a solve that knows nothing of them."""

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from continuum.fields.base import Field, in_mode_of, shallow
from continuum.types import State, Time


class Given(Field):
    """A field whose `forward` takes further arguments, with these: f(t, x) = field(t, x, *context).

    Tensors of the context that require a gradient stand among its parameters, where solvers look for what they differentiate
    by. They are what was passed, and no parameters of anybody's.
    """

    def __init__(self, field: Field, context: Sequence[Any]) -> None:
        super().__init__()
        self.field = field
        self.knots, self.extent, self.proportional = field.knots, field.extent, field.proportional
        self.takes_number, self.training = field.takes_number, field.training
        self.context = tuple(context)
        self.leaves: list[Any] = []
        _mapped(self.context, self.leaves.append)
        for index, leaf in enumerate(self.leaves):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                self._parameters[f"context{index}"] = leaf  # pyright: ignore[reportArgumentType]

    def _now(self) -> tuple[Any, ...]:
        """The context; a backward pass may have put aliases in the places of its tensors."""
        leaves = (self._parameters.get(f"context{index}", leaf) for index, leaf in enumerate(self.leaves))
        return _mapped(self.context, lambda _: next(leaves))

    def forward(self, t: Time, x: State) -> State:
        return self.field(t, x, *self._now())

    def weighted(self, t: Time, x: State, share: float) -> State:
        return self.field.weighted(t, x, share, *self._now())

    def addends(self) -> Sequence[Field]:
        return [Given(part, self._now()) for part in self.field.addends()]

    def own_weights(self) -> dict[str, Tensor]:
        return self.field.own_weights()


def given(field: Field, context: Sequence[Any]) -> Field:
    """The field with further arguments, which it takes itself or hands to the fields that it is made of.

    Raises:
        TypeError: a context that is no tuple or list, or a field that takes no or other arguments.
    """
    if not isinstance(context, tuple | list):
        raise TypeError(
            f"context is a tuple of further arguments of the field, not a {type(context).__name__}: write (context,)"
        )
    signature = _signature(type(field))
    if len(signature.parameters) > 2:
        _check_arguments(field, signature, context)
        return Given(field, context)
    twin, found = shallow(field), False
    for name, child in field.named_children():
        listed = isinstance(child, nn.ModuleList)
        layers = list(child) if listed else [child]
        if layers and all(isinstance(layer, Field) for layer in layers):
            new = [given(layer, context) for layer in layers]  # pyright: ignore[reportArgumentType]
            twin._modules[name] = in_mode_of(child, nn.ModuleList(new)) if listed else new[0]
            found = True
    if not found:
        raise TypeError(
            f"the flow was given a context of {len(context)}, and a {type(field).__name__} takes none: its forward is (t, x). "
            "Let it be forward(t, x, *context), or leave the context out"
        )
    return twin


@lru_cache
def _signature(kind: type[Field]) -> inspect.Signature:
    """What the forward of a class of fields takes, without itself."""
    signature = inspect.signature(kind.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _check_arguments(field: Field, signature: inspect.Signature, context: Sequence[Any]) -> None:
    try:
        signature.bind(None, None, *context)
    except TypeError as error:
        raise TypeError(
            f"the flow was given a context of {len(context)}, and the forward of a {type(field).__name__} is "
            f"{signature}: {error}"
        ) from None


def _mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """A tuple, list or dictionary, nested or not, with change(leaf) in the place of each leaf."""
    if type(tree) in (tuple, list):
        return type(tree)(_mapped(part, change) for part in tree)
    if type(tree) is dict:
        return {key: _mapped(part, change) for key, part in tree.items()}
    return change(tree)
