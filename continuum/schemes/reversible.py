"""Schemes that move the halves of a `Coupled` field y' = f(t, z), z' = g(t, y) in turn, and can take each step back.

They are symplectic for Hamiltonian fields. The two-step ones, which also can be undone, are in `multistep`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from continuum.fields import Field
from continuum.fields.coupled import halves
from continuum.schemes.base import Evaluate, Memory, Multistep, ReversibleScheme, combine, inside
from continuum.types import State

Half = Literal["y", "z"]
Stage = tuple[Half, float, float]
"""A half that moves, by how many h, at which c of the step."""


class SplitScheme(ReversibleScheme):
    """Moves one half after the other: `stages_of_step` lists which, by how many h, with the other half at which c.

    Raises:
        TypeError: a layer of the field is not `Coupled`.
    """

    stages_of_step: tuple[Stage, ...]

    def check(self, field: Field) -> None:
        for layer in field.pieces():
            if layer.coupled() is None:
                raise TypeError(
                    f"{type(self).__name__} steps Coupled fields, two halves that move by each other (RevNet, Hamiltonian, "
                    f"SecondOrder); got a {type(layer).__name__}"
                )

    def forth(self, evaluate: Evaluate, field: Field, t: float, x: State, h: float, memory: Memory) -> tuple[State, Memory]:
        return self._moved(evaluate, field, t, x, h, 1.0), ()

    def back(
        self, evaluate: Evaluate, field: Field, t: float, x: State, h: float, memory: Memory, first: bool
    ) -> tuple[State, Memory]:
        return self._moved(evaluate, field, t, x, h, -1.0), ()

    def _moved(self, evaluate: Evaluate, field: Field, t: float, x: State, h: float, sign: float) -> State:
        layer = field.at(inside(field.knots, t, h, 0, x.dtype))
        parts = layer.coupled()
        assert parts is not None
        (first, second), (y, z) = parts, halves(x)
        for half, share, c in self.stages_of_step if sign > 0 else reversed(self.stages_of_step):
            depth = inside(field.knots, t, h, c, x.dtype)
            if half == "y":
                y = combine(y, sign * h, (share,), (evaluate(first, depth, z),))
            else:
                z = combine(z, sign * h, (share,), (evaluate(second, depth, y),))
        return torch.cat([y, z], dim=1)


@dataclass(frozen=True)
class Coupling(SplitScheme):
    """Additive coupling, y+ = y + h f(z), z+ = z + h g(y+): the block of RevNet (arXiv 1707.04585) and the symplectic Euler
    method; eq. 10 of arXiv 1709.03698. Order 1, one evaluation of each half.
    """

    order = 1
    stages = 1
    stages_of_step = (("y", 1.0, 0.0), ("z", 1.0, 1.0))


@dataclass(frozen=True)
class Leapfrog(SplitScheme):
    """The leapfrog scheme in its one-step form, z+ = z + h g(y), y+ = y + h f(z+): order 1, one evaluation of each half.

    On `SecondOrder(a)`, where z is the velocity, the positions obey y_{n+1} = 2 y_n - y_{n-1} + h^2 a(y_n) (arXiv 1709.03698):
    `LinearTwoStep` with k = -1. A step of n layers reads all its values from the first.
    """

    order = 1
    stages = 1
    stages_of_step = (("z", 1.0, 0.0), ("y", 1.0, 0.0))

    def multistep(self, k: Any) -> Multistep:
        """The method of the positions of q'' = a."""
        return (1, -2, 1), (0, 1, 0), 2

    def continued(self, layer: Field, x: State, h: float, past: Sequence[State]) -> tuple[State, Memory]:
        (q, _), (before, _) = halves(x), halves(past[0])
        return torch.cat([q, (q - before) / h], dim=1), ()  # the velocity is that between two positions

    def observed(self, layer: Field, x: State) -> State:
        if layer.acceleration() is None:
            raise TypeError(
                f"the positions of Leapfrog obey a two-step method on SecondOrder(a), not on a {type(layer).__name__}"
            )
        return halves(x)[0]


@dataclass(frozen=True)
class Verlet(SplitScheme):
    """The velocity Verlet scheme, z1 = z + h/2 g(y), y+ = y + h f(z1), z+ = z1 + h/2 g(y+): order 2, symmetric in time.

    An evaluation of f and two of g; counted as two of the field.
    """

    order = 2
    stages = 2
    stages_of_step = (("z", 0.5, 0.0), ("y", 1.0, 0.5), ("z", 0.5, 1.0))
