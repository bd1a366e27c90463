"""Explicit Runge-Kutta schemes: k_i = f(t + c_i h, x + h sum_j a_ij k_j), x+ = x + h sum_i b_i k_i.

A method is its Butcher tableau,

    c | A
    --+---
      | b

and the tableau checks itself when it is built: the rows of A sum to c, and every order condition up to the declared order
holds. There is one condition for each rooted tree (Butcher 1963): sum_i b_i phi_i(tree) = 1 / density(tree).
"""

from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement
from math import prod
from typing import ClassVar, TypeAlias

from continuum.fields import Field
from continuum.schemes.base import Memory, Scheme, combine, inside
from continuum.types import State

Tree: TypeAlias = tuple["Tree", ...]
"""A rooted tree as the tuple of its subtrees; () is the single node."""

TOLERANCE = 1e-12
"""How far a sum of coefficients rounded to float64 may be from its exact value."""


@lru_cache
def rooted_trees(nodes: int) -> tuple[Tree, ...]:
    """All rooted trees with so many nodes (1, 1, 2, 4, 9, 20, 48, 115 for 1 to 8)."""

    def forests(total: int, largest: int) -> Iterator[Tree]:
        if total == 0:
            yield ()
        for size in range(min(total, largest), 0, -1):
            for count in range(1, total // size + 1):
                for rest in forests(total - count * size, size - 1):
                    for trees in combinations_with_replacement(rooted_trees(size), count):
                        yield (*trees, *rest)

    return tuple(forests(nodes - 1, nodes - 1))


def size(tree: Tree) -> int:
    return 1 + sum(map(size, tree))


def density(tree: Tree) -> int:
    return size(tree) * prod(map(density, tree))


@dataclass(frozen=True)
class Tableau:
    """The coefficients of an explicit Runge-Kutta method; `a` holds row i as a tuple of i numbers.

    Args:
        c: depths of the stages, in steps.
        a: weights of the slopes before, a row a stage.
        b: weights of all slopes in the step.
        order: order of the global error, which the order conditions are checked for.

    >>> Tableau(c=(0, 1), a=((), (1,)), b=(1 / 2, 1 / 2), order=2).order
    2

    Raises:
        ValueError: the shapes do not fit, a row of `a` does not sum to its c, or an order condition fails.
    """

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int

    def __post_init__(self) -> None:
        if not len(self.c) == len(self.a) == len(self.b) or any(len(row) != i for i, row in enumerate(self.a)):
            raise ValueError(
                f"an explicit tableau of {len(self.b)} stages needs {len(self.b)} entries in c and rows in a, row i with i "
                f"entries; got {len(self.c)} in c and rows of {[len(row) for row in self.a]}"
            )
        for i, (c, row) in enumerate(zip(self.c, self.a, strict=True)):
            if abs(sum(row) - c) > TOLERANCE:
                raise ValueError(f"row {i} of a sums to {sum(row)}, but c[{i}] = {c}: they must be equal")
        for nodes in range(1, self.order + 1):
            for tree in rooted_trees(nodes):
                weight = sum(b * phi for b, phi in zip(self.b, self.elementary_weights(tree), strict=True))
                if abs(weight - 1 / density(tree)) > TOLERANCE:
                    raise ValueError(
                        f"not of order {self.order}: the condition of order {nodes} for the tree {tree} needs "
                        f"1/{density(tree)}, the coefficients give {weight}"
                    )

    def elementary_weights(self, tree: Tree) -> list[float]:
        """phi_i(tree): the product over the subtrees of sum_j a_ij phi_j(subtree)."""
        inner = [self.elementary_weights(subtree) for subtree in tree]
        return [prod(sum(a * phi[j] for j, a in enumerate(row)) for phi in inner) for row in self.a]


def runge_kutta_step(tableau: Tableau, field: Field, t: float, x: State, h: float, first: State | None = None) -> State:
    """One step of `tableau`; `first` is the slope at (t, x) if it is known already."""
    slopes: list[State] = []
    for c, row in zip(tableau.c, tableau.a, strict=True):
        if first is not None and not slopes:
            slopes.append(first)
        else:
            slopes.append(field(inside(field.knots, t, h, c, x.dtype), combine(x, h, row, slopes)))
    return combine(x, h, tableau.b, slopes)


class RungeKutta(Scheme, ABC):
    """An explicit Runge-Kutta scheme; a method is a subclass that names its tableau."""

    tableau: ClassVar[Tableau]  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def order(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.tableau.order

    @property
    def stages(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return len(self.tableau.b)

    def step(self, field: Field, t: float, x: State, h: float, memory: Memory) -> tuple[State, Memory]:
        return runge_kutta_step(self.tableau, field, t, x, h), ()


@dataclass(frozen=True)
class Euler(RungeKutta):
    """Forward Euler, x+ = x + h f(t, x): order 1, one evaluation. With h = 1 it is the residual network."""

    tableau = Tableau(c=(0,), a=((),), b=(1,), order=1)


@dataclass(frozen=True)
class Midpoint(RungeKutta):
    """The explicit midpoint rule, x+ = x + h f(t + h/2, x + h/2 f(t, x)): order 2, two evaluations."""

    tableau = Tableau(c=(0, 1 / 2), a=((), (1 / 2,)), b=(0, 1), order=2)


@dataclass(frozen=True)
class Heun(RungeKutta):
    """Heun's second-order method, the explicit trapezoidal rule: order 2, two evaluations."""

    tableau = Tableau(c=(0, 1), a=((), (1,)), b=(1 / 2, 1 / 2), order=2)


@dataclass(frozen=True)
class Kutta3(RungeKutta):
    """Kutta's third-order method: order 3, three evaluations (torchdiffeq's heun3 is another one)."""

    tableau = Tableau(c=(0, 1 / 2, 1), a=((), (1 / 2,), (-1, 2)), b=(1 / 6, 2 / 3, 1 / 6), order=3)


@dataclass(frozen=True)
class RK4(RungeKutta):
    """The classical fourth-order method of Kutta: four evaluations (torchdiffeq's rk4 is the 3/8 rule)."""

    tableau = Tableau(c=(0, 1 / 2, 1 / 2, 1), a=((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), b=(1 / 6, 1 / 3, 1 / 3, 1 / 6), order=4)


@dataclass(frozen=True)
class Fractal(Scheme):
    """The two-column block of a FractalNet as a step, x+ = x + h k f1(x) + h f2(x + h f1(x)), for `TwoColumns` fields.

    A Runge-Kutta scheme of two stages, each with a function of its own (arXiv 1710.10121). Of order 1 for x' = k f1 + f2; of
    order 2 where both are multiples of one f with the coefficients of Heun's method or the midpoint rule.

    Raises:
        TypeError: a layer of the field is not `TwoColumns`.
    """

    order = 1
    stages = 1

    def check(self, field: Field) -> None:
        for layer in field.pieces():
            if layer.columns() is None:
                raise TypeError(f"Fractal steps TwoColumns(f1, f2), not a {type(layer).__name__}: use Heun() or another scheme")

    def step(self, field: Field, t: float, x: State, h: float, memory: Memory) -> tuple[State, Memory]:
        t = inside(field.knots, t, h, 0, x.dtype)
        columns = field.at(t).columns()
        assert columns is not None  # check has seen it
        one, two, k = columns
        first = one(t, x)
        return combine(x, h, (k, 1), (first, two(t, combine(x, h, (1,), (first,))))), ()
