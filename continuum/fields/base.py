"""What moves: a field f says where a state goes at each depth, dx/dt = f(t, x)."""

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from continuum.bases import Basis
from continuum.types import State, StateOrStates, Time

M = TypeVar("M", bound=nn.Module)


class Field(nn.Module, ABC):
    """The right-hand side of dx/dt = f(t, x).

    The signature is torchdiffeq's, so a field runs under its solvers as it is, and a field written for them runs here. Solvers
    hand the depth over as a Python float; `forward` receives a 0-dim tensor on the device of x, as torchdiffeq gives it,
    unless the class says that a number will do (`takes_number`).

    `knots` are the interior depths where the field jumps, in increasing order; a solver never steps across one unknowingly,
    and never calls the field exactly on one: a stage there is evaluated just inside the step it belongs to. `extent` is the
    depth up to which the field is defined, None where there is no such end.

    A field answers for itself what solvers, schemes and analyses ask of it. All answers have defaults, so that a subclass
    needs `forward` alone; a wrapper passes on those that its inner field answers otherwise.
    """

    knots: tuple[float, ...] = ()
    extent: float | None = None
    takes_number: bool = False

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module | nn.Parameter) and name in vars(Field):  # which Python would never find again
            raise AttributeError(f"every Field answers to {name!r} itself: give this {type(value).__name__} another name")
        super().__setattr__(name, value)

    @abstractmethod
    def forward(self, t: Time, x: State) -> State:
        """dx/dt at depth `t` (in layers) of the states `x`; the result has the shape of `x`."""

    def __call__(self, t: Time, x: StateOrStates, *context: Any) -> StateOrStates:
        """`forward` with its hooks, and with a look at what it did.

        Raises:
            RuntimeError: the state was written to in place, which would change the state that the step starts from.
        """
        if not self.takes_number:
            t = depth_tensor(t, x[0] if isinstance(x, tuple) else x)
        if isinstance(x, tuple) or torch.compiler.is_compiling():
            return super().__call__(t, x, *context)
        if x.is_inference():  # where torch does not count how often a tensor was written to
            return super().__call__(t, x, *context)
        version = x._version
        slope = super().__call__(t, x, *context)
        if x._version != version:
            raise RuntimeError(
                f"this {type(self).__name__} writes to its state in place, and the step needs that state as it was: build its "
                "first layer with inplace=False, or let forward begin with x = x.clone()"
            )
        return slope

    def at(self, t: float) -> "Field":
        """The field in force at depth `t`, smooth up to the next knots."""
        return self

    def pieces(self) -> Sequence["Field"]:
        """The smooth fields that this one is made of, in the order of depth: its layers, or itself alone."""
        return (self,)

    def mapped(self, change: Callable[["Field"], "Field"]) -> "Field":
        """The field with change(piece) in the place of each of its `pieces`, in the mode of this one."""
        return change(self)

    def divided(self, k: int) -> "Field | None":
        """The field of k layers in the place of one, each a copy divided by k, on k times the depth; None without layers."""
        return None

    def scaled(self, scale: float) -> "Field":
        """The field s f of the same weights, and of a kind that the same schemes can step."""
        return in_mode_of(self, Scaled(self, scale))

    def drift(self) -> "Field":
        """The field without its noise, of the same weights; itself where it has none."""
        return self

    def held(self, t: float) -> "Field":
        """The field as it is at depth `t`, at all depths: smooth, autonomous, and of a kind that the same schemes can step."""
        return in_mode_of(self, Held(self, t))

    # What it is made of, for the schemes that step some fields only; None where it is of another kind.

    def friction(self) -> tuple["Field", Tensor | float | None]:
        """f and k of the equation (1 + k) x' = f that this field states; k is None where it states x' = f."""
        return self, None

    def coupled(self) -> tuple["Field", "Field"] | None:
        """f and g of the equations y' = f(t, z), z' = g(t, y) that this field states for the halves of its state."""
        return None

    def acceleration(self) -> "Field | None":
        """a of the equation q'' = a(t, q) that this field states for the first half of its state, the second being q'."""
        return None

    def columns(self) -> tuple["Field", "Field", float] | None:
        """f1, f2 and k of a field k f1 + f2 whose f2 sees the state that f1 has moved, within a step of `Fractal`."""
        return None

    def addends(self) -> Sequence["Field"]:
        """f1, f2, ... of a field that is their sum, in the order in which splitting schemes step them."""
        return ()

    def innermost(self) -> "Field":
        """The part that each evaluation of the field calls once, whichever scheme it is by."""
        return self

    # Noise

    proportional: bool = True
    """Whether `weighted` gives a multiple of the field."""

    def weighted(self, t: Time, x: State, share: float, *context: Any) -> State:
        """dx/dt where what the layer adds counts by `share` only, as in the mean over layers that are dropped at random."""
        return share * self(t, x, *context)

    # Weights as functions of depth

    def own_weights(self) -> dict[str, Tensor]:
        """The parameters that are theta, by names that wrappers do not change: neither a common scale nor the k of a scheme."""
        return dict(self.named_parameters())

    def expanded(self) -> tuple[Basis, list[Tensor]] | None:
        """A basis, and of each weight theta(t) = sum_k phi_k(t) theta_k the coefficients, a tensor (basis.size, *shape).

        None where the weights are no function of depth.

        Raises:
            ValueError: layers whose weights differ in more than their numbers.
        """
        return None

    def project(self, basis: Basis) -> "Field":
        """The field whose theta(t) is nearest to this one's on another basis, in the norm of L2[0, depth], without data.

        Raises:
            TypeError: the weights are no function of depth.
        """
        raise TypeError(
            f"the weights of a {type(self).__name__} are not a function of depth: only an Expansion or PiecewiseConstant "
            "layers can be projected"
        )


def in_mode_of(module: nn.Module, other: M) -> M:
    """`other` in the mode of `module`; not by train(), which would set the modes of the parts that both share."""
    other.training = module.training
    for child in other.children():
        if isinstance(child, nn.ModuleList):  # a list of parts is the whole's own
            child.training = module.training
    return other


def shallow(module: M) -> M:
    """A copy that has the same tensors and submodules, and whose own can be replaced without that the module's are."""
    twin = copy.copy(module)
    for owned in ("_modules", "_parameters", "_buffers"):
        setattr(twin, owned, getattr(module, owned).copy())
    return twin


def depth_tensor(t: Time, x: Tensor) -> Tensor:
    """The depth as a 0-dim tensor on the device of x, real and of float32's precision at least.

    Filled on the device: a copy from the host would wait for it. What is no number is handed on, as the depth that `PerImage`
    forbids to read.
    """
    dtype = torch.float64 if x.dtype in (torch.float64, torch.complex128) else torch.float32
    if isinstance(t, Tensor):
        return t.to(dtype=dtype, device=x.device)
    return torch.full((), t, dtype=dtype, device=x.device) if isinstance(t, float | int) else t


class Autonomous(Field):
    """A field that does not depend on depth: f(t, x) = module(x), for any module that keeps the shape of x.

    >>> import torch
    >>> from torch import nn
    >>> field = Autonomous(nn.Linear(3, 3))
    >>> field(0.0, torch.zeros(2, 3)).shape
    torch.Size([2, 3])
    """

    takes_number = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, t: Time, x: State, *context: Any) -> State:
        return self.module(x, *context)

    def held(self, t: float) -> Field:
        return self


class Held(Field):
    """A field with its depth held at one value, f(x) = field(depth, x)."""

    takes_number = True

    def __init__(self, field: Field, depth: float) -> None:
        super().__init__()
        self.field = field
        self.at_depth = depth

    def forward(self, t: Time, x: State) -> State:
        return self.field(self.at_depth, x)

    def extra_repr(self) -> str:
        return f"depth={self.at_depth:g}"


class Function(Field):
    """The field of a function or a module of (t, x), such as one that was written for torchdiffeq: f(t, x) = function(t, x).

    A `Flow` and the fields made of fields take a module with `forward(t, x)` as it is and put it into one of these.

    Args:
        function: dx/dt of t, a 0-dim tensor on the device of x, and x; a module's parameters are the field's.
        knots: the interior depths where it jumps.

    >>> import torch
    >>> Function(lambda t, x: torch.sin(t) * x)(0.0, torch.ones(2, 3))
    tensor([[0., 0., 0.],
            [0., 0., 0.]])
    """

    def __init__(self, function: Callable[..., Tensor], knots: Sequence[float] = ()) -> None:
        super().__init__()
        self.function = function
        self.knots = tuple(knots)
        if isinstance(function, nn.Module):
            self.training = function.training

    def forward(self, t: Time, x: State, *context: Any) -> State:
        return self.function(t, x, *context)  # pyright: ignore[reportArgumentType]


def as_field(field: nn.Module, whole: str) -> Field:
    """The field itself; a module of (t, x) as a `Function`; TypeError for anything else, of which `whole` would be made."""
    if isinstance(field, Field):
        return field
    if isinstance(field, nn.Module) and _takes_two(field.forward):
        return Function(field)
    raise TypeError(
        f"{whole} needs a Field or a module with forward(t, x), not a {type(field).__name__}: wrap a module of x alone as "
        "Autonomous(module), and a function of (t, x) as Function(function)"
    )


def _takes_two(function: Callable[..., Any]) -> bool:
    """Whether a call needs two positional arguments, or more."""
    parameters = inspect.signature(function).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters) >= 2


class PostActivation(Field):
    """The field of a residual block with its activation behind the sum: f(t, x) = relu(x + branch(x)) - x.

    Its Euler step with h = 1 is the block relu(x + branch(x)) of arXiv 1512.03385, bit for bit where x >= 0, as it is behind
    a ReLU. Every other solver, and every other h, integrates the same field and keeps x >= 0 where Euler's h is at most 1.

    >>> import torch
    >>> block = PostActivation(torch.nn.Linear(3, 3))
    >>> x = torch.rand(2, 3)
    >>> torch.equal(x + block(0.0, x), torch.relu(x + block.branch(x)))
    True
    """

    takes_number = True
    proportional = False

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, t: Time, x: State, *context: Any) -> State:
        return torch.relu(x + self.branch(x, *context)) - x

    def weighted(self, t: Time, x: State, share: float, *context: Any) -> State:
        return torch.relu(x + share * self.branch(x, *context)) - x

    def held(self, t: float) -> Field:
        return self


class Scaled(Field):
    """The field s f(t, x): what a residual scaling s, such as Inception-ResNet's (arXiv 1602.07261), does to a layer."""

    takes_number = True

    def __init__(self, field: Field, scale: float) -> None:
        super().__init__()
        if field.friction()[1] is not None:
            raise TypeError("a Momentum field is scaled inside: write Momentum(Scaled(field, s)), not the reverse")
        self.field = field
        self.scale = scale
        self.knots, self.extent = field.knots, field.extent

    def forward(self, t: Time, x: State) -> State:
        return self.scale * self.field(t, x)

    def scaled(self, scale: float) -> Field:
        return self.field.scaled(self.scale * scale)

    def held(self, t: float) -> Field:
        return in_mode_of(self, self.field.held(t).scaled(self.scale))

    def innermost(self) -> Field:
        return self.field.innermost()

    def own_weights(self) -> dict[str, Tensor]:
        return self.field.own_weights()

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


def as_part(part: nn.Module, whole: str) -> Field:
    """`part` as a field that is smooth in depth; TypeError if it is no field, or jumps, and `whole` is not made of such."""
    part = as_field(part, whole)
    if part.knots:
        raise TypeError(f"{whole} is made of fields that are smooth in depth; this {type(part).__name__} jumps at {part.knots}")
    return part


def checked(slope: State, x: State) -> State:
    """`slope`; ValueError unless it has the shape of the state, or adding it would broadcast silently."""
    if slope.shape != x.shape:
        raise ValueError(
            f"the field returned shape {tuple(slope.shape)} for a state of shape {tuple(x.shape)}: dx/dt has the shape of x"
        )
    return slope


def depth_channel(t: Time, x: Tensor) -> Tensor:
    """The depth as one more channel: a tensor of shape (batch, 1, ...) filled with t, like x elsewhere."""
    return torch.ones_like(x[:, :1]) * t
