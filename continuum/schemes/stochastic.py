"""Stochastic schemes, x+ = x + sum_i a_i f_i(t, x): all coefficients a_i are drawn before the first step, layer by layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from continuum.fields import Field
from continuum.fields.base import checked
from continuum.noise import Normal, StochasticField
from continuum.noise.base import Coefficients, noise_of, stochastic_fields, terms
from continuum.schemes.base import Memory, Scheme, combine, inside
from continuum.schemes.multistep import LinearTwoStep, one_step_before
from continuum.schemes.runge_kutta import Euler
from continuum.types import BatchNorm, State

Increments = Literal["own", "brownian"]


class StochasticScheme(Scheme):
    """A scheme for layers that are stochastic fields. In evaluation mode, and for a layer without noise, it steps the drift.

    Its memory is (the states before x, the draws of the steps to come).
    """

    order = 1
    stages = 1
    takes_noise = True

    def check(self, field: Field) -> None:
        """Raise TypeError unless the layers of `field` are what this scheme can step, and one of them has noise."""
        layers = field.pieces()
        fields = [noisy for layer in layers if (noisy := noise_of(layer)) is not None]
        if len(fields) < len(list(stochastic_fields(field))):
            raise TypeError(
                f"noise is outermost in a layer: write StochasticDepth(Scaled(f, s), p), not the reverse; only Momentum goes "
                f"around it. Got a {type(field).__name__} with noise further inside"
            )
        if not fields:
            raise TypeError(
                f"{type(self).__name__} needs a StochasticField such as StochasticDepth(f, 0.8) or layers of them; this "
                f"{type(field).__name__} has no noise. Take a deterministic scheme, such as Euler()"
            )
        for noisy in fields:
            noisy.check()
            self.check_noise(noisy)

    def check_noise(self, field: StochasticField) -> None:
        """Raise TypeError if this scheme cannot step the noise of `field`."""

    def draw(self, field: StochasticField, t: float, x: State, h: float) -> object:
        """What one step of `field` takes from chance."""
        return field.brownian(t, x, h)

    def driven(self, field: StochasticField, t: float, x: State, h: float, z: Tensor) -> object:
        """What `draw` gives, made from the standard normals z: paths with common noise share them."""
        return field.brownian(t, x, h, z)

    def moves(self, field: StochasticField, rates: Sequence[float], h: float, power: int) -> list[tuple[float, float]]:
        """What a step from x = 1 may add where the branches are f_i(x) = rates[i] x, and with which weight.

        As many values as make the expectation of a polynomial of degree `power` a finite sum.

        Raises:
            TypeError: no such sum is known for this scheme, or for the law.
        """
        raise TypeError(f"moments are known for EulerMaruyama and Milstein, not for {type(self).__name__}")

    def past(self, x: State, previous: State | None, h: float) -> Memory:
        """What the memory of a step h from x holds before its draws; `previous` is the state one layer before x."""
        return ()

    def own_law(self) -> "StochasticScheme":
        """The scheme of the network itself, with increments by the law of the regulariser."""
        return EulerMaruyama("own")

    def of_sde(self) -> "StochasticScheme":
        """The scheme whose steps, as they shrink, are the solution of the SDE on a Brownian path."""
        return EulerMaruyama("brownian")

    def draws(self, field: Field, x: State, steps: Sequence[tuple[float, float]]) -> Memory:
        """What every step takes from chance, in order; None for a step of the drift alone."""
        drawn: list[object] = []
        for t, h in steps:
            t = inside(field.knots, t, h, 0, x.dtype)
            noisy = noise_of(field.at(t))
            if noisy is not None and noisy.training and h < 0:
                raise ValueError(f"a stochastic solve has no way back: depth goes up, not from {t:g} to {t + h:g}")
            drawn.append(self.draw(noisy, t, x, h) if noisy is not None and noisy.training else None)
        return tuple(drawn)

    def begin(self, field: Field, x: State, previous: State | None, steps: Sequence[tuple[float, float]]) -> Memory:
        return (*self.past(x, previous, steps[0][1]), *self.draws(field, x, steps))

    def without_noise(self) -> Scheme:
        return Euler()


@dataclass(frozen=True)
class EulerMaruyama(StochasticScheme):
    """Euler-Maruyama's method, or the network itself: x+ = x + sum_i a_i f_i(t, x), of weak order 1 and strong order 1/2.

    With `increments="own"` the coefficients a_i come from the law of the regulariser, and h = 1 is the discrete network, draw
    for draw; its weak order is 1 where the third moment of the increment is O(sqrt h), otherwise 1/2. With "brownian" they are
    h m_i + s_i dB (arXiv 1710.10121). A branch whose coefficient is zero for the whole batch is not evaluated;
    the `cost` of a solve counts it nevertheless.

    Args:
        increments: "own", the law of the field, or "brownian", Gaussian increments of deviation sqrt(h).

    >>> from continuum.fields import MLP
    >>> from continuum.noise import StochasticDepth
    >>> from continuum.solvers import FixedStep
    >>> field = StochasticDepth(MLP(2, hidden=4), 0.8)
    >>> x = torch.ones(3, 2)
    >>> FixedStep(EulerMaruyama("brownian"), h=1 / 4)(field, x, (0.0, 1.0)).states[-1].shape
    torch.Size([3, 2])

    Raises:
        TypeError: a field without noise, or noise inside other fields; with Brownian increments, when a gradient is wanted,
            the backward modes of shake-shake other than "keep", which are no gradients of a path.
    """

    increments: Increments = "own"

    def __post_init__(self) -> None:
        if self.increments not in get_args(Increments):
            raise ValueError(f"increments are {' or '.join(get_args(Increments))}, not {self.increments!r}")

    def draw(self, field: StochasticField, t: float, x: State, h: float) -> Coefficients:
        if self.increments == "own":
            return field.own(t, x, h)
        check_path_gradient(field, x)
        return field.brownian(t, x, h)

    def driven(self, field: StochasticField, t: float, x: State, h: float, z: Tensor) -> object:
        if self.increments == "brownian":
            return field.brownian(t, x, h, z)
        # In float64, for Phi(z) is 1 from z = 5.4 on in float32.
        return field.own(t, x, h, field.law(t).quantile(torch.special.ndtr(z.double())).to(z.dtype))

    def moves(self, field: StochasticField, rates: Sequence[float], h: float, power: int) -> list[tuple[float, float]]:
        if self.increments == "brownian":
            mu, s = (dot(weights, rates) for weights in (field.means(0.0), field.deviations(0.0)))
            return [(h * mu + math.sqrt(h) * s * z, weight) for z, weight in Normal().nodes(power)]
        found: list[tuple[float, float]] = []
        for eta, weight in field.law(0.0).nodes(power):
            published = field.coefficients(0.0, torch.tensor(eta, dtype=torch.float64))
            found.append((dot([float(a) for a in field.stepped(0.0, h, published)], rates), weight))
        return found

    def step(self, field: Field, t: float, x: State, h: float, memory: Memory) -> tuple[State, Memory]:
        t = inside(field.knots, t, h, 0, x.dtype)
        layer, (drawn, *rest) = field.at(t), memory
        noisy = noise_of(layer)
        if noisy is None or drawn is None:
            return combine(x, h, (1,), (layer(t, x),)), tuple(rest)
        moved = noisy.move(t, x, drawn)
        if moved is not None:
            _, k = layer.friction()
            x = x + checked(moved if k is None else moved / (1 + k), x)
        return x, tuple(rest)


@dataclass(frozen=True)
class Milstein(StochasticScheme):
    """Milstein's method for Brownian increments, x+ = x + h f + g dB + (g . grad) g (dB^2 - h) / 2, of strong order 1.

    For noise shared by the entries of an image or batch, g being the diffusion, and for diagonal noise whose diffusion is
    entrywise (`Gaussian`). One evaluation of the branches a step, and two backward passes through them for (g . grad) g.

    Raises:
        TypeError: as `EulerMaruyama`; `Dropout`, whose entries are coupled by the field; and where a gradient is wanted, batch
            statistics in training mode, which torch derives twice at most.
    """

    one_graph = False  # derivatives are taken inside a step

    def check_noise(self, field: StochasticField) -> None:
        if field.noise == "diagonal" and not field.separable:
            raise TypeError(
                f"Milstein's method needs one noise for all entries, or entries that do not see each other; in "
                f"{type(field).__name__} they do. Take EulerMaruyama('brownian')"
            )

    def draw(self, field: StochasticField, t: float, x: State, h: float) -> Tensor:
        check_path_gradient(field, x)
        if torch.is_grad_enabled() and field.noise == "scalar":
            check_batch_statistics(field, "Milstein's method")
        return math.sqrt(h) * field.normals(x).to(x.device)

    def driven(self, field: StochasticField, t: float, x: State, h: float, z: Tensor) -> object:
        return math.sqrt(h) * z

    def moves(self, field: StochasticField, rates: Sequence[float], h: float, power: int) -> list[tuple[float, float]]:
        mu, s = (dot(weights, rates) for weights in (field.means(0.0), field.deviations(0.0)))
        return [(h * (mu + s**2 * (z**2 - 1) / 2) + math.sqrt(h) * s * z, w) for z, w in Normal().nodes(2 * power)]

    def of_sde(self) -> StochasticScheme:
        return self

    def step(self, field: Field, t: float, x: State, h: float, memory: Memory) -> tuple[State, Memory]:
        t = inside(field.knots, t, h, 0, x.dtype)
        layer, (increment, *rest) = field.at(t), memory
        if increment is None:
            return combine(x, h, (1,), (layer(t, x),)), tuple(rest)
        moved, noise, along = self_derivative(layer, t, x)
        return x + h * moved + increment * noise + (0.5 * (increment**2 - h)) * along, tuple(rest)


@dataclass(frozen=True)
class StochasticTwoStep(StochasticScheme):
    """LM-ResNet with noise: x_{n+1} = (1 - k_n) x_n + k_n x_{n-1} + sum_i a_i f_i(x_n) (arXiv 1710.10121).

    `LinearTwoStep` whose field alone is random: what is kept of x_n and x_{n-1} is never dropped. Layers are
    `Momentum(StochasticDepth(f, p))`; one without `Momentum` takes a plain stochastic step, as does the first if there is no
    previous state, then for its equation (1 + k) dx = f dt + g dB. Of weak order 1 for it, in the sense of `EulerMaruyama`.

    Args:
        increments: "own", the law of the field, or "brownian", Gaussian increments of deviation sqrt(h).

    Raises:
        TypeError: as `EulerMaruyama`, and where no layer is a `Momentum`.
    """

    increments: Increments = "own"
    variable_steps = False
    remembers = True

    def __post_init__(self) -> None:
        EulerMaruyama(self.increments)

    def check(self, field: Field) -> None:
        super().check(field)
        if all(layer.friction()[1] is None for layer in field.pieces()):
            raise TypeError("StochasticTwoStep steps Momentum(StochasticDepth(f, p)), which holds k; or take EulerMaruyama()")

    def draw(self, field: StochasticField, t: float, x: State, h: float) -> Coefficients:
        return EulerMaruyama(self.increments).draw(field, t, x, h)

    def driven(self, field: StochasticField, t: float, x: State, h: float, z: Tensor) -> object:
        return EulerMaruyama(self.increments).driven(field, t, x, h, z)

    def past(self, x: State, previous: State | None, h: float) -> Memory:
        return (None if previous is None else one_step_before(x, previous, h),)

    def own_law(self) -> StochasticScheme:
        return StochasticTwoStep("own")

    def without_noise(self) -> Scheme:
        return LinearTwoStep()

    def step(self, field: Field, t: float, x: State, h: float, memory: Memory) -> tuple[State, Memory]:
        before, drawn, *rest = memory
        depth = inside(field.knots, t, h, 0, x.dtype)
        layer = field.at(depth)
        inner, k = layer.friction()
        if k is None or before is None:
            after, _ = EulerMaruyama(self.increments).step(field, t, x, h, (drawn,))
            return after, (x, *rest)
        noisy, kept = noise_of(layer), (1 - k) * x + k * before
        if noisy is None or drawn is None:
            return combine(kept, h, (1,), (inner(depth, x),)), (x, *rest)
        moved = noisy.move(depth, x, drawn)
        return (kept if moved is None else kept + checked(moved, x)), (x, *rest)


def dot(weights: Sequence[float], rates: Sequence[float]) -> float:
    return math.fsum(weight * rate for weight, rate in zip(weights, rates, strict=True))


def check_path_gradient(field: StochasticField, x: State) -> None:
    """Raise TypeError where a gradient through Brownian increments is wanted and the field replaces it by its own."""
    if torch.is_grad_enabled() and (x.requires_grad or any(parameter.requires_grad for parameter in field.parameters())):
        field.check_path_gradient()


def check_batch_statistics(field: StochasticField, method: str) -> None:
    """Raise TypeError for BatchNorm in training mode, where `method` needs a third derivative."""
    for name, module in field.named_modules():
        if isinstance(module, BatchNorm) and module.training and any(p.requires_grad for p in field.parameters()):
            raise TypeError(
                f"{method} differentiates three times, and torch has two derivatives of batch statistics: {name} is a "
                f"{type(module).__name__} in training mode. Take GroupNorm, or Euler-Maruyama's method with the direct gradient"
            )


def self_derivative(layer: Field, t: float, x: State) -> tuple[State, State, State]:
    """Drift, diffusion g and its derivative along itself, (g . grad) g, from one evaluation of the layer.

    The derivative is the gradient with respect to u of g(x)^T grad (u^T g), which is linear in u: two backward passes, whatever
    the field is made of.
    """
    differentiable = torch.is_grad_enabled()
    # Inference mode would record nothing, and the derivative would come out as zero.
    with torch.inference_mode(False), torch.enable_grad():
        x = x if x.requires_grad and differentiable else x.detach().clone().requires_grad_()
        moved, noise = terms(layer, t, x)
        assert noise is not None
        along = torch.zeros_like(noise)
        if noise.requires_grad:
            u = torch.zeros_like(noise, requires_grad=True)
            (pulled,) = torch.autograd.grad(noise, x, u, create_graph=True, allow_unused=True)
            if pulled is not None and pulled.requires_grad:  # else the diffusion does not depend on x
                (along,) = torch.autograd.grad(pulled, u, noise, create_graph=differentiable, retain_graph=True)
    if not differentiable:
        return moved.detach(), noise.detach(), along.detach()
    return moved, noise, along
