"""Splitting schemes: the parts of x' = f1 + f2 + ... are stepped one after the other,

    Lie-Trotter: x+ = s_n(h) ... s_2(h) s_1(h) x,    Strang: x+ = s_1(h/2) ... s_n(h) ... s_1(h/2) x,

where s_i(h) is a step of an inner scheme on x' = f_i.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from continuum.fields import Field
from continuum.noise.base import noise_of
from continuum.schemes.base import Memory, Scheme, inside
from continuum.schemes.runge_kutta import Euler, RungeKutta
from continuum.schemes.stochastic import EulerMaruyama, Increments
from continuum.types import State

Substep = tuple[Field, float, float]
"""A part, the depth at which its step begins, and its size."""


EULER = Euler()


@dataclass(frozen=True)
class Splitting(Scheme):
    """A scheme that steps the parts of a `Split` field one after the other, each by `inner`.

    A part with noise is stepped by Euler-Maruyama in training, with draws of its own.

    Args:
        inner: the scheme of a part without noise.
        increments: what drives a part with noise, its own law or Brownian increments; see `EulerMaruyama`.

    Raises:
        TypeError: `inner` is no Runge-Kutta scheme, or a layer of the field has no parts.
    """

    inner: RungeKutta = EULER
    increments: Increments = "own"
    takes_noise = True

    def __post_init__(self) -> None:
        if not isinstance(self.inner, RungeKutta):
            raise TypeError(f"the inner scheme of {type(self).__name__} is a Runge-Kutta scheme, not {self.inner!r}")
        EulerMaruyama(self.increments)  # looks at the increments

    def __str__(self) -> str:
        name = super().__str__().partition(":")[0]
        options = [f"inner={self.inner}"] * (self.inner != EULER)
        options += [f"increments={self.increments}"] * (self.increments != "own")
        return f"{name}:{','.join(options)}" if options else name

    @abstractmethod
    def substeps(self, parts: Sequence[Field], t: float, h: float) -> list[Substep]:
        """The steps of the parts that make a step from depth t to t + h."""

    def check(self, field: Field) -> None:
        for layer in field.pieces():
            if not layer.addends():
                raise TypeError(
                    f"{type(self).__name__} steps the parts of a Split(f1, f2), and a {type(layer).__name__} has none: write "
                    "the field as such a sum, or take another scheme, such as euler or rk4"
                )

    def begin(self, field: Field, x: State, previous: State | None, steps: Sequence[tuple[float, float]]) -> Memory:
        noise, drawn = EulerMaruyama(self.increments), []
        for depth, h in steps:
            for part, t, size in self._substeps(field, depth, x, h):
                noisy = noise_of(part)
                if noisy is not None and noisy.training:
                    drawn += noise.draws(part, x, [(t, size)])
        return tuple(drawn)

    def step(self, field: Field, t: float, x: State, h: float, memory: Memory) -> tuple[State, Memory]:
        for part, depth, size in self._substeps(field, t, x, h):
            noisy = noise_of(part)
            if noisy is not None and noisy.training:
                x, memory = EulerMaruyama(self.increments).step(part, depth, x, size, memory)
            else:
                x, _ = self.inner.step(part, depth, x, size, ())
        return x, memory

    def _substeps(self, field: Field, t: float, x: State, h: float) -> list[Substep]:
        t = inside(field.knots, t, h, 0, x.dtype)
        return self.substeps(field.at(t).addends(), t, h)


@dataclass(frozen=True)
class LieTrotter(Splitting):
    """Lie-Trotter splitting, part by part in their order: order 1.

    With h = 1 and Euler inside it is the pre-norm transformer block, y = x + attention(x), x+ = y + mlp(y).

    >>> import torch
    >>> from continuum.fields import Autonomous, Split
    >>> attention, mlp = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    >>> x = torch.randn(3, 2)
    >>> end, _ = LieTrotter().step(Split(Autonomous(attention), Autonomous(mlp)), 0.0, x, 1.0, ())
    >>> y = x + attention(x)
    >>> torch.equal(end, y + mlp(y))
    True
    """

    order = 1

    @property
    def stages(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.stages

    def substeps(self, parts: Sequence[Field], t: float, h: float) -> list[Substep]:
        return [(part, t, h) for part in parts]


@dataclass(frozen=True)
class Strang(Splitting):
    """Strang splitting (1968): half a step of each part but the last, the last, and the halves once more in reverse order.

    Of order 2 with an inner scheme of that order, such as Midpoint(); with Euler inside of order 1, and the relative of the
    Macaron block, half a feed-forward part on each side of attention (arXiv 1906.02762). `cost` counts it as twice the
    evaluations of the inner scheme, the last part's being fewer.
    """

    @property
    def order(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return min(2, self.inner.order)

    @property
    def stages(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 2 * self.inner.stages

    def substeps(self, parts: Sequence[Field], t: float, h: float) -> list[Substep]:
        *outer, last = parts
        first = [(part, t, h / 2) for part in outer]
        return [*first, (last, t, h), *((part, t + h / 2, h / 2) for part in reversed(outer))]
