"""Noise: a stochastic field is a sum of branches with random coefficients, c_1 f_1(t, x) + c_2 f_2(t, x) + ...

One random number eta drives all coefficients, c_i = c_i(eta), with means m_i and deviations s_i. A step of size h is

    x+ = x + sum_i [h m_i + sqrt(h) (c_i - m_i)] f_i       with eta from its own law: at h = 1 the regulariser as published,
    x+ = x + sum_i [h m_i + sqrt(h) s_i Z] f_i             with Z from N(0, 1): Euler-Maruyama's method

for the Ito equation dx = sum_i m_i f_i dt + sum_i s_i f_i dB, its drift and its diffusion.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from continuum.fields import Field
from continuum.fields.base import in_mode_of, shallow
from continuum.noise.laws import Law
from continuum.types import State, Time

Coefficient: TypeAlias = Tensor | float
Coefficients: TypeAlias = tuple[Coefficient | None, ...]
"""What a step multiplies the branches with; None for a branch that is zero for the whole batch and need not be evaluated."""

Per = Literal["batch", "image"]


class StochasticField(Field):
    """A field with noise: branches f_i, the law of a number eta, and the coefficients c_i(eta), affine in eta.

    A subclass says these three, and the `knots` of its branches; drift, diffusion and the steps follow. Called as a field,
    f(t, x) is the drift, which is what evaluation mode integrates. `noise` is "scalar", one eta for an image or, with `per`
    "batch", for the whole mini-batch; or "diagonal", one an entry of the state. `separable` says of diagonal noise that an
    entry of the diffusion depends on the same entry of x only, as Milstein's method needs it. `scale` is a change of the unit
    of depth: scaled by s, the field runs s times as fast, with drift s m_i f_i and diffusion sqrt(s) s_i f_i.

    >>> from continuum.noise import Bernoulli
    >>> class ShakeDrop(StochasticField):  # one branch, whose coefficient is 1 or -1
    ...     def __init__(self, field: Field) -> None:
    ...         super().__init__()
    ...         self.field, self.knots = field, field.knots
    ...     def branches(self, t: Time, x: State):
    ...         return (lambda: self.field(t, x),)
    ...     def law(self, t: Time) -> Law:
    ...         return Bernoulli(0.75)
    ...     def coefficients(self, t: Time, eta: Tensor | float):
    ...         return (2 * eta - 1,)
    >>> from continuum.fields import MLP
    >>> field = ShakeDrop(MLP(2, hidden=4))
    >>> field.means(0.0), field.deviations(0.0)
    ((0.5,), (0.8660254037844386,))
    """

    takes_number = True
    noise: Literal["scalar", "diagonal"] = "scalar"
    per: Per = "image"
    separable: bool = True
    scale: float = 1.0

    @abstractmethod
    def branches(self, t: Time, x: State) -> Sequence[Callable[[], State]]:
        """The branches at depth t and state x, each evaluated when it is called."""

    @abstractmethod
    def law(self, t: Time) -> Law:
        """The law of eta at depth t."""

    @abstractmethod
    def coefficients(self, t: Time, eta: Coefficient) -> Sequence[Coefficient]:
        """c_i(eta) = A_i + B_i eta of every branch, as published; a plain number where nothing is random."""

    def means(self, t: Time) -> tuple[float, ...]:
        """m_i, the weights of the branches in the drift."""
        return tuple(self.scale * float(c) for c in self.coefficients(t, self.law(t).mean))

    def deviations(self, t: Time) -> tuple[float, ...]:
        """s_i, the weights of the branches in the diffusion; their signs say which coefficients move together."""
        ends = zip(self.coefficients(t, 1.0), self.coefficients(t, 0.0), strict=True)
        deviation = math.sqrt(self.scale) * self.law(t).deviation
        return tuple(deviation * (float(one) - float(zero)) for one, zero in ends)

    def forward(self, t: Time, x: State) -> State:
        return _sum(self.means(t), [branch() for branch in self.branches(t, x)], x)

    def terms(self, t: Time, x: State) -> tuple[State, State]:
        """Drift and diffusion at depth t and state x, from one evaluation of each branch."""
        slopes = [branch() for branch in self.branches(t, x)]
        return _sum(self.means(t), slopes, x), _sum(self.deviations(t), slopes, x)

    def draw(self, t: Time, x: State) -> Tensor:
        """eta for one step of the states x; what one image or batch shares is drawn on the CPU, where it can be looked at."""
        if self.noise == "diagonal":
            return self.law(t).draw(x.shape, x.dtype, x.device)
        return self.law(t).draw(self.size(x), x.dtype, torch.device("cpu"))

    def normals(self, x: State) -> Tensor:
        """Standard normals in the place of eta."""
        device = x.device if self.noise == "diagonal" else torch.device("cpu")
        return torch.randn(self.size(x), dtype=x.dtype, device=device)

    def check(self) -> None:
        """Look at what a subclass says, as far as that goes without a state.

        Raises:
            ValueError: an unknown `noise` or `per`, or coefficients that are not affine in eta.
            TypeError: coefficients that are no sequence, or that would be trained.
        """
        if self.noise not in ("scalar", "diagonal") or self.per not in get_args(Per):
            raise ValueError(
                f"noise is 'scalar' or 'diagonal' and per is 'image' or 'batch'; {type(self).__name__} has {self.noise!r} and "
                f"{self.per!r}"
            )
        try:
            values = [self.coefficients(0.0, eta) for eta in (0.0, 1.0, 2.0)]
        except (TypeError, IndexError) as error:
            raise TypeError(
                f"eta is one number a layer, which drives all of its branches; {type(self).__name__}.coefficients takes it for "
                f"something else ({error}): give each number a layer of its own"
            ) from error
        if not all(isinstance(row, Sequence) for row in values):
            raise TypeError(f"{type(self).__name__}.coefficients returns a sequence, one for each branch, not {values[0]!r}")
        for a, b, c in zip(*values, strict=True):
            if any(isinstance(value, Tensor) and value.requires_grad for value in (a, b, c)):
                raise TypeError(
                    f"a coefficient of {type(self).__name__} depends on a parameter, whose gradient would be lost: multiply "
                    "the branch with it instead"
                )
            if abs(float(c) - 2 * float(b) + float(a)) > 1e-6 * max(abs(float(value)) for value in (a, b, c)):
                raise ValueError(
                    f"coefficients are affine in eta, c = A + B eta; {type(self).__name__} gives {float(a):g}, {float(b):g}, "
                    f"{float(c):g} for eta = 0, 1, 2. Put the curve into a Law of its own, with the coefficient as its eta"
                )

    def size(self, x: State) -> tuple[int, ...]:
        """The shape of eta, which broadcasts to the states x."""
        return tuple(x.shape) if self.noise == "diagonal" else (1 if self.per == "batch" else len(x), *[1] * (x.dim() - 1))

    def own(self, t: Time, x: State, h: float, eta: Tensor | None = None) -> Coefficients:
        """The coefficients h m_i + sqrt(h) (c_i - m_i) of a step by the field's own law, for this eta or a new one."""
        eta = self.draw(t, x) if eta is None else eta
        return self._placed(self.stepped(t, h, self.coefficients(t, eta)), x)

    def brownian(self, t: Time, x: State, h: float, z: Tensor | None = None) -> Coefficients:
        """The coefficients h m_i + sqrt(h) s_i z of a step with Brownian increments sqrt(h) z, z given or from N(0, 1)."""
        z = self.normals(x) if z is None else z
        weights = zip(self.means(t), self.deviations(t), strict=True)
        return self._placed([h * m + (math.sqrt(h) * s) * z if s else h * m for m, s in weights], x)

    def stepped(self, t: Time, h: float, published: Sequence[Coefficient]) -> list[Coefficient]:
        """h m + sqrt(h) (c - m) for each published c, written so that h = 1 leaves c as it is, to the bit."""
        h = h * self.scale
        means = self.coefficients(t, self.law(t).mean)
        root = math.sqrt(h)
        return [
            c if h == 1 else root * c + (h - root) * float(m) if isinstance(c, Tensor) else h * c
            for c, m in zip(published, means, strict=True)
        ]

    def _placed(self, coefficients: Sequence[Coefficient], x: State) -> Coefficients:
        """Coefficients where x is; one of the batch as a number, None for zeros; a compiled graph keeps tensors."""
        if self.noise == "diagonal":
            return tuple(coefficients)
        placed: list[Coefficient | None] = []
        for c in coefficients:
            if not isinstance(c, Tensor):
                placed.append(float(c))
            elif torch.compiler.is_compiling():
                placed.append(c.to(x.device))
            elif c.numel() == 1:
                placed.append(float(c) or None)
            else:
                placed.append(c.to(x.device, non_blocking=True) if c.any() else None)
        return tuple(placed)

    def move(self, t: Time, x: State, coefficients: Coefficients) -> State | None:
        """sum_i a_i f_i(t, x), which a step adds to x; None if no branch counts. Branches without coefficient do not run."""
        total: State | None = None
        for a, branch in zip(coefficients, self.branches(t, x), strict=True):
            if a is not None:
                part = branch() if isinstance(a, float) and a == 1 else a * branch()
                total = part if total is None else total + part
        return total

    def scaled(self, scale: float) -> "Field":
        if not scale > 0:
            raise ValueError(f"noise is scaled by a positive number, the length of the new unit of depth, not {scale}")
        field = shallow(self)  # so that nothing set on one appears on the other
        field.scale = self.scale * scale
        return field

    def drift(self) -> "Field":
        return Drift(self)

    def check_path_gradient(self) -> None:
        """Raise TypeError where the gradients that the field lets back are not those of what it computed."""


def _sum(weights: Sequence[float], slopes: Sequence[State], x: State) -> State:
    """sum_i w_i f_i from left to right; a weight of one is not multiplied with."""
    total: State | None = None
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            part = slope if weight == 1 else weight * slope
            total = part if total is None else total + part
    return torch.zeros_like(x) if total is None else total


class Drift(Field):
    """The drift of a stochastic field as a field without noise, with the same weights, in training mode too."""

    takes_number = True

    def __init__(self, field: StochasticField) -> None:
        super().__init__()
        self.field = field
        self.knots, self.extent = field.knots, field.extent
        in_mode_of(field, self)

    def forward(self, t: Time, x: State) -> State:
        return self.field(t, x)


def noise_of(layer: Field) -> StochasticField | None:
    """The stochastic field that a layer is, or whose friction it adds; None if the layer is deterministic."""
    inner, _ = layer.friction()
    return inner if isinstance(inner, StochasticField) else None


def noises(field: Field) -> list[StochasticField]:
    """The stochastic fields among the layers."""
    return [noisy for layer in field.pieces() if (noisy := noise_of(layer)) is not None]


def without_noise(field: Field) -> Field:
    """The field whose layers have lost their noise: the same weights, open to deterministic schemes."""
    return field.mapped(lambda layer: layer.drift())


def terms(layer: Field, t: Time, x: State) -> tuple[State, State | None]:
    """Drift and diffusion of a layer, from one evaluation of its branches; no diffusion where the layer has no noise.

    Under `Momentum`, (1 + k) dx = drift dt + diffusion dB: both are divided by 1 + k.
    """
    field = noise_of(layer)
    if field is None:
        return layer(t, x), None
    moved, noise = field.terms(t, x)
    _, k = layer.friction()
    return (moved, noise) if k is None else (moved / (1 + k), noise / (1 + k))


def stochastic_fields(module: nn.Module) -> Iterator[StochasticField]:
    """All stochastic fields in `module` whose noise acts: those in a `Drift` have none."""
    if isinstance(module, StochasticField):
        yield module
    elif not isinstance(module, Drift):
        for child in module.children():
            yield from stochastic_fields(child)


def has_noise(module: nn.Module) -> bool:
    """Whether there is a stochastic field in `module` whose noise acts."""
    return any(True for _ in stochastic_fields(module))


def drops_branches(field: StochasticField) -> bool:
    """Whether a draw may leave a branch out for the whole batch, which then has no gradient."""
    return field.noise == "scalar" and any(float(c) == 0 for eta in field.law(0.0).atoms for c in field.coefficients(0.0, eta))


@contextmanager
def noise_only(module: nn.Module) -> Iterator[None]:
    """Inside the block the noise in `module` acts, whatever the mode of the rest: BatchNorm may evaluate."""
    fields = [(field, field.training) for field in stochastic_fields(module)]
    for field, _ in fields:
        field.training = True
    try:
        yield
    finally:
        for field, training in fields:
            field.training = training
