"""Tuples of states, dx_i/dt = f_i(t, x_1, ..., x_n): one equation for the components laid behind one another."""

from collections.abc import Sequence

import torch
from torch import Tensor

from continuum.fields import Field
from continuum.fields.base import in_mode_of
from continuum.types import State, Time


class Packed(Field):
    """A field of tuples, f(t, (x, y)) -> (dx/dt, dy/dt), as a field of one flat tensor, which solvers carry like any other.

    `shapes` are those of the components. Parameters, buffers, knots and the mode are those of `field`.

    >>> class Swap(Field):
    ...     def forward(self, t, x):
    ...         return x[1], -x[0]
    >>> x = (torch.ones(3, 2), torch.zeros(3, 2))
    >>> packed = Packed(Swap(), [part.shape for part in x])
    >>> packed(0.0, pack(x)).shape
    torch.Size([12])
    >>> [part.shape for part in packed.split(pack(x))]
    [torch.Size([3, 2]), torch.Size([3, 2])]
    """

    takes_number = True

    def __init__(self, field: Field, shapes: Sequence[torch.Size]) -> None:
        super().__init__()
        self.field = field
        self.knots, self.extent = field.knots, field.extent
        self.shapes = tuple(shapes)
        self.training = field.training  # not train(), which would set the modes of the field's parts too

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """The components, as views of `flat`."""
        parts = flat.split([shape.numel() for shape in self.shapes])
        return tuple(part.view(shape) for part, shape in zip(parts, self.shapes, strict=True))

    def at(self, t: float) -> Field:
        return in_mode_of(self, Packed(self.field.at(t), self.shapes))

    def forward(self, t: Time, x: State) -> State:
        slopes = self.field(t, self.split(x))
        if not isinstance(slopes, tuple) or _shapes(slopes) != self.shapes:
            raise ValueError(
                f"the field returned {_described(slopes)} for states of shapes {_described(self.split(x))}: it returns a tuple "
                "with one slope for each state, of the shape of that state"
            )
        # Under autocast a slope may come in half precision; the state keeps its own.
        return torch.cat([slope.to(x.dtype).reshape(-1) for slope in slopes])


def unpacked(field: Field) -> Field:
    """The field of tuples where `field` is packed, otherwise itself."""
    return field.field if isinstance(field, Packed) else field


def components(field: Field, x: State) -> tuple[Tensor, ...]:
    """The states inside `x`: those of the tuple where `field` is packed, otherwise x alone."""
    return field.split(x) if isinstance(field, Packed) else (x,)


def pack(states: tuple[Tensor, ...]) -> Tensor:
    """The states laid behind one another in one flat tensor.

    Raises:
        ValueError: no states, or states that differ in dtype, device or batch size.
    """
    if not states:
        raise ValueError("a tuple of states holds one tensor or more; this one is empty")
    kinds = {(state.dtype, state.device) for state in states}
    if len(kinds) > 1:
        kinds = ", ".join(f"{state.dtype} on {state.device}" for state in states)
        raise ValueError(f"states of a tuple have one dtype and one device, not {kinds}: convert them first")
    if not all(state.dim() for state in states) or len({len(state) for state in states}) > 1:
        raise ValueError(f"states of a tuple have one batch size, their axis 0; got shapes {_described(states)}")
    return torch.cat([state.reshape(-1) for state in states])


def _shapes(tensors: Sequence[Tensor]) -> tuple[torch.Size | None, ...]:
    return tuple(getattr(tensor, "shape", None) for tensor in tensors)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"one tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        return ", ".join(str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__ for part in value) or "()"
    return f"a {type(value).__name__}"
