"""The published regularisers as stochastic fields."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from continuum.fields import Field
from continuum.fields.base import as_field, checked
from continuum.noise.base import Coefficient, Coefficients, Per, StochasticField, has_noise
from continuum.noise.laws import Bernoulli, Law, Normal, Uniform
from continuum.types import State, Time


class StochasticDepth(StochasticField):
    """Stochastic depth: the field counts with probability p, the `survival` (arXiv 1603.09382).

    | convention | training, eta from Bernoulli(p) | evaluation |
    | "huang"    | x + eta f                       | x + p f    |
    | "rescaled" | x + eta f / p                   | x + f      |

    Drift p f (or f), diffusion sqrt(p (1 - p)) f (divided by p). `survival` is a number or a function p(t) of the depth. By
    default one number is drawn for the whole mini-batch, as published, and a field that is dropped is not evaluated. For a
    `PostActivation` field relu(x + F) - x, evaluation is relu(x + p F), as published: at most the drift's x + p f, and equal to
    it where the ReLU does not cut.

    Args:
        field: f, a field without noise.
        survival: p, or p(t) as a function of the depth in layers.
        convention: "huang" or "rescaled", as in the table.
        per: what shares a draw: the whole "batch", or each "image" has its own.

    >>> from continuum.fields import MLP
    >>> StochasticDepth(MLP(2, hidden=4), 0.8).means(0.0)
    (0.8,)

    Raises:
        ValueError: a survival outside (0, 1], an unknown convention or per.
        TypeError: a `PostActivation` field in the rescaled convention, whose relu(x + F / p) is no multiple of the field.
    """

    def __init__(
        self,
        field: nn.Module,
        survival: float | Callable[[float], float],
        convention: Literal["huang", "rescaled"] = "huang",
        per: Per = "batch",
    ) -> None:
        super().__init__()
        field = _noiseless(field, "StochasticDepth")
        if convention not in ("huang", "rescaled"):
            raise ValueError(f"convention is 'huang' (train f, evaluate p f) or 'rescaled' (train f / p), not {convention!r}")
        if convention == "rescaled" and not field.proportional:
            raise TypeError(
                f"relu(x + F / p) is no multiple of the field relu(x + F) - x: take convention='huang' for "
                f"{type(field).__name__}, or a pre-activation field"
            )
        if not callable(survival):
            _check_survival(survival)
        self.field = field
        self.survival = survival
        self.convention = convention
        self.per = _checked_per(per)
        self.knots = field.knots

    def branches(self, t: Time, x: State) -> Sequence[Callable[[], State]]:
        return (lambda: self.field(t, x),)

    def law(self, t: Time) -> Law:
        return Bernoulli(_check_survival(self.survival(float(t))) if callable(self.survival) else self.survival)

    def coefficients(self, t: Time, eta: Coefficient) -> Sequence[Coefficient]:
        return (eta / self.law(t).mean,) if self.convention == "rescaled" else (eta,)

    def forward(self, t: Time, x: State) -> State:
        if self.field.proportional:
            return super().forward(t, x)
        moved = self.field.weighted(t, x, self.law(t).mean)
        return moved if self.scale == 1 else self.scale * moved

    def extra_repr(self) -> str:
        return f"survival={self.survival}, convention={self.convention}, per={self.per}"


def linear_decay(layers: int, last: float) -> list[float]:
    """Survivals p_l = 1 - l / L (1 - p_L) of the layers l = 1 ... L, down to p_L = `last` (arXiv 1603.09382).

    Args:
        layers: L, the number of layers.
        last: p_L, in (0, 1].

    >>> linear_decay(4, 0.5)
    [0.875, 0.75, 0.625, 0.5]

    Raises:
        ValueError: `last` outside (0, 1].
    """
    _check_survival(last)
    return [1 - layer / layers * (1 - last) for layer in range(1, layers + 1)]


def _check_survival(survival: float) -> float:
    if not 0 < survival <= 1:
        raise ValueError(f"survival is a probability in (0, 1], not {survival}: a layer that never counts can be left out")
    return survival


class ShakeShake(StochasticField):
    """Shake-shake: two branches share what one would give, x + eta f1 + (1 - eta) f2 (arXiv 1705.07485).

    Drift (f1 + f2) / 2, diffusion (f1 - f2) / sqrt(12). `forward_mode` "shake" draws eta uniform on (0, 1), "even" is 1/2.
    `backward_mode` says which coefficients the gradients take on their way back: "keep" those of the forward pass, "even" 1/2,
    "shake" new ones, drawn together with the others. Only with "keep" are they the gradient of what was computed. One draw an
    image, or one for the mini-batch.

    Args:
        first: f1, a field without noise.
        second: f2, a field of the same shapes.
        forward_mode: "shake" or "even".
        backward_mode: "shake", "even" or "keep".
        per: what shares a draw: the whole "batch", or each "image" has its own.

    Raises:
        ValueError: an unknown mode or per, branches whose layers show that they differ in what they take or give.
    """

    def __init__(
        self,
        first: nn.Module,
        second: nn.Module,
        forward_mode: Literal["shake", "even"] = "shake",
        backward_mode: Literal["shake", "even", "keep"] = "shake",
        per: Per = "image",
    ) -> None:
        super().__init__()
        first, second = _noiseless(first, "ShakeShake"), _noiseless(second, "ShakeShake")
        if forward_mode not in ("shake", "even") or backward_mode not in ("shake", "even", "keep"):
            raise ValueError(
                f"forward_mode is 'shake' or 'even' and backward_mode 'shake', 'even' or 'keep', not {forward_mode!r} and "
                f"{backward_mode!r}"
            )
        if (one := _widths(first)) and (other := _widths(second)) and one != other:
            raise ValueError(
                f"the branches have different shapes, {one[0]} to {one[1]} and {other[0]} to {other[1]} channels: both take "
                "the state and give its slope"
            )
        self.first = first
        self.second = second
        self.forward_mode = forward_mode
        self.backward_mode = backward_mode
        self.per = _checked_per(per)
        self.knots = tuple(sorted({*first.knots, *second.knots}))

    def branches(self, t: Time, x: State) -> Sequence[Callable[[], State]]:
        return lambda: self.first(t, x), lambda: self.second(t, x)

    def law(self, t: Time) -> Law:
        return Uniform()

    def coefficients(self, t: Time, eta: Coefficient) -> Sequence[Coefficient]:
        return (eta, 1 - eta) if self.forward_mode == "shake" else (0.5, 0.5)

    def own(self, t: Time, x: State, h: float, eta: Tensor | None = None) -> Coefficients:
        """The coefficients of the two branches, and those of their gradients where they differ."""
        if self.forward_mode == "shake":
            coefficients = super().own(t, x, h, eta)
        else:
            coefficients = self._placed(self.stepped(t, h, (0.5, 0.5)), x)
        if self.backward_mode == "keep" or (self.forward_mode, self.backward_mode) == ("even", "even"):
            return coefficients
        if self.backward_mode == "even":
            return *coefficients, *self._placed(self.stepped(t, h, (0.5, 0.5)), x)
        beta = self.draw(t, x)
        return *coefficients, *self._placed(self.stepped(t, h, (beta, 1 - beta)), x)

    def check_path_gradient(self) -> None:
        if self.backward_mode != "keep":
            raise TypeError(
                f"ShakeShake(backward_mode={self.backward_mode!r}) replaces the coefficients on the way back, which is no "
                "gradient of any path of the SDE: build it with backward_mode='keep', or take EulerMaruyama('own')"
            )

    def move(self, t: Time, x: State, coefficients: Coefficients) -> State | None:
        if len(coefficients) == 2:
            return super().move(t, x, coefficients)
        first, second = self.first(t, x), self.second(t, x)
        return _Shaken.apply(first, checked(second, first), *(0.0 if a is None else a for a in coefficients))  # pyright: ignore

    def extra_repr(self) -> str:
        return f"forward_mode={self.forward_mode}, backward_mode={self.backward_mode}, per={self.per}"


class _Shaken(torch.autograd.Function):
    """a1 f1 + a2 f2, whose gradients come back as b1 g and b2 g."""

    @staticmethod
    def forward(ctx, f1, f2, a1, a2, b1, b2):  # pyright: ignore
        ctx.coefficients = (b1, b2)
        return a1 * f1 + a2 * f2

    @staticmethod
    def backward(ctx, g):  # pyright: ignore
        b1, b2 = ctx.coefficients
        return b1 * g, b2 * g, None, None, None, None


class Gaussian(StochasticField):
    """Gaussian noise on every entry: dx = f dt + sigma dB, or dx = f dt + sigma x dB with `kind` "multiplicative".

    The two diffusions of arXiv 1906.02355. `sigma` is a number or a function of the depth, in units of the state by the square
    root of a layer.

    Args:
        field: f, a field without noise.
        sigma: size of the noise, or sigma(t) as a function of the depth in layers.
        kind: "additive" or "multiplicative".

    Raises:
        ValueError: a negative sigma, an unknown kind.
    """

    noise = "diagonal"

    def __init__(
        self,
        field: nn.Module,
        sigma: float | Callable[[float], float],
        kind: Literal["additive", "multiplicative"] = "additive",
    ) -> None:
        super().__init__()
        field = _noiseless(field, "Gaussian")
        if kind not in ("additive", "multiplicative"):
            raise ValueError(f"kind is 'additive' (sigma dB) or 'multiplicative' (sigma x dB), not {kind!r}")
        if not callable(sigma):
            _check_sigma(sigma)
        self.field = field
        self.sigma = sigma
        self.kind = kind
        self.knots = field.knots

    def branches(self, t: Time, x: State) -> Sequence[Callable[[], State]]:
        return lambda: self.field(t, x), lambda: x if self.kind == "multiplicative" else x.new_ones(()).expand_as(x)

    def law(self, t: Time) -> Law:
        return Normal()

    def coefficients(self, t: Time, eta: Coefficient) -> Sequence[Coefficient]:
        sigma = _check_sigma(self.sigma(float(t))) if callable(self.sigma) else self.sigma
        return 1.0, sigma * eta

    def extra_repr(self) -> str:
        return f"sigma={self.sigma}, kind={self.kind}"


def _check_sigma(sigma: float) -> float:
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma is the size of the noise, a number of at least 0, not {sigma}")
    return sigma


class Dropout(StochasticField):
    """Dropout of the field with rate q: x + eta f / (1 - q), eta from Bernoulli(1 - q) for every entry (arXiv 1906.02355).

    Drift f, diffusion sqrt(q / (1 - q)) f, per entry.

    Args:
        field: f, a field without noise.
        rate: q, the share of entries that are dropped.

    Raises:
        ValueError: a rate outside [0, 1).
    """

    noise = "diagonal"
    separable = False

    def __init__(self, field: nn.Module, rate: float) -> None:
        super().__init__()
        field = _noiseless(field, "Dropout")
        if not 0 <= rate < 1:
            raise ValueError(f"rate is the share of entries dropped, in [0, 1), not {rate}: with 1 nothing would be left")
        self.field = field
        self.rate = rate
        self.knots = field.knots

    def branches(self, t: Time, x: State) -> Sequence[Callable[[], State]]:
        return (lambda: self.field(t, x),)

    def law(self, t: Time) -> Law:
        return Bernoulli(1 - self.rate)

    def coefficients(self, t: Time, eta: Coefficient) -> Sequence[Coefficient]:
        return (eta / (1 - self.rate),)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def _noiseless(field: nn.Module, whole: str) -> Field:
    """`field` as one that can be given noise; TypeError if it cannot."""
    field = as_field(field, whole)
    if field.friction()[1] is not None:
        raise TypeError(f"Momentum holds the noise inside: write Momentum({whole}(field, ...)), not the reverse")
    if has_noise(field):
        raise TypeError(f"{whole} gives noise to a field that has none yet; this {type(field).__name__} holds some already")
    return field


def _checked_per(per: Per) -> Per:
    if per not in get_args(Per):
        raise ValueError(f"per is 'image' (a draw for each) or 'batch' (one for the mini-batch), not {per!r}")
    return per


def _widths(field: Field) -> tuple[int, int] | None:
    """The channels that the first and the last layer of a field say it takes and gives, if there are such layers."""
    layers = [module for module in field.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    if not layers:
        return None
    ins, outs = (
        (m.in_features, m.out_features) if isinstance(m, nn.Linear) else (m.in_channels, m.out_channels)
        for m in (layers[0], layers[-1])
    )
    return ins[0], outs[1]
