"""Defects: one step minus the exact solution, measured, beside the leading term of the modified equation on that field.

x_{n+m} - x(t_{n+m}) = d h^q x^(q) + O(h^(q + 1))                          for a multistep method with an exact past,
x_{n+1} - x(t_{n+1}) = h^(p + 1) sum_tau c(tau) F(tau) + O(h^(p + 2))      for a one-step method of order p.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor
from torch.func import jvp

from continuum.analysis.convergence import copied
from continuum.analysis.equations import LinearMultistep, OneStep, method_of
from continuum.fields import Field
from continuum.flow import Flow
from continuum.schemes import Scheme
from continuum.schemes.runge_kutta import Tree
from continuum.types import State

SOLUTION = "dopri8:rtol=1e-12,atol=1e-12"

Map: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Defect:
    """The Euclidean norms of the measured and the predicted defect of a step h, and |measured - predicted| / |predicted|."""

    h: float
    measured: float
    predicted: float
    relative_difference: float


@torch.no_grad()
def scheme_defects(field: Field, x: State, scheme: Scheme, sizes: Sequence[float]) -> list[Defect]:
    """One step of `scheme` from x minus the exact solution, for every step h in `sizes`, and its leading term.

    A multistep scheme is given the exact past. All is computed in float64 on a copy in evaluation mode, with the depth held at
    0, where x is. On a smooth field the relative difference shrinks like h. Derivatives of the field are nested `jvp`.

    `LinearTwoStep` steps a `Momentum` field, `Leapfrog` a `SecondOrder` one, whose positions are compared. `NeumannSeries` has
    an equation on linear fields only: elsewhere F F is a composition, f(h f(x)), which is no value of f near x.

    >>> from continuum.fields import MLP
    >>> from continuum.schemes import Euler
    >>> coarse, fine = scheme_defects(MLP(2, hidden=8), torch.ones(1, 2), Euler(), (1 / 8, 1 / 16))
    >>> 3 < coarse.measured / fine.measured < 5
    True

    Raises:
        TypeError: layers rather than one field, or a scheme that has no modified equation or cannot step the field.
        ValueError: a step that is not positive, or `NeumannSeries` on a field that is not linear.
    """
    if field.at(0.0) is not field:
        raise TypeError("a defect is of one smooth field: give a layer of these, field.at(0.0)")
    if not all(h > 0 for h in sizes):
        raise ValueError(f"steps are positive, not {list(sizes)}")
    layer, x = copied(field).held(0.0).requires_grad_(False), x.double()
    scheme.check(layer)
    scheme.observed(layer, x)
    _, k = layer.friction()
    method = method_of(scheme, None if k is None else float(k))
    if method.linear:
        check_linear(layer, x)
    degree, leading = _leading(method, lambda y: layer(0.0, y), x)
    found: list[Defect] = []
    for h in sizes:
        after, exact = _stepped(layer, scheme, method, x, h)
        measured, predicted = (scheme.observed(layer, part) for part in (after - exact, h**degree * leading))
        size = float(predicted.norm())
        found.append(Defect(h, float(measured.norm()), size, float((measured - predicted).norm()) / size))
    return found


def check_linear(field: Field, x: State) -> None:
    """Raise ValueError unless f(x + y) = f(x) + f(y) at x and at some y."""
    y = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0)).to(x.device)
    both = field(0.0, x) + field(0.0, y)
    if (field(0.0, x + y) - both).norm() > 1e-9 * both.norm():
        raise ValueError(
            "F F is F applied twice, and only for a linear field the second term of a series; this one is not linear. Take "
            "the field's linearisation at a state, or a Runge-Kutta scheme"
        )


def _stepped(layer: Field, scheme: Scheme, method: LinearMultistep | OneStep, x: State, h: float) -> tuple[State, State]:
    """The state after a step of `scheme`, and the exact one."""
    flow = Flow(layer, SOLUTION, depth=1)
    past = list(flow.trajectory(x, [-h * n for n in range(method.past + 1)])[1:]) if method.past else []
    start, memory = scheme.continued(layer, x, h, past)
    return scheme.step(layer, 0.0, start, h, memory)[0], flow.trajectory(x, (0.0, h))[-1]


def _leading(method: LinearMultistep | OneStep, f: Map, x: State) -> tuple[int, State]:
    """(q, v) of the leading term h^q v of the defect."""
    if isinstance(method, LinearMultistep):
        q, _ = method.leading()
        return q, float(cast(float, method.defect())) * time_derivative(f, x, q)
    terms = [float(c) * elementary_differential(f, x, tree) for tree, c in method.defect.items()]
    return method.order + 1, torch.stack(terms).sum(0)


def time_derivative(f: Map, x: State, order: int) -> State:
    """x^(order) where x' = f(x): each derivative is the one before, differentiated along f."""
    moving = f
    for _ in range(order - 1):
        moving = _along(moving, f)
    return moving(x)


def elementary_differential(f: Map, x: State, tree: Tree) -> State:
    """F(tree)(x): f differentiated at x along the elementary differentials of the subtrees, once along each."""
    derivative = f
    for subtree in tree:
        direction = elementary_differential(f, x, subtree)
        derivative = _along(derivative, lambda y, direction=direction: direction)
    return derivative(x)


def _along(g: Map, f: Map) -> Map:
    """g' f."""
    return lambda y: jvp(g, (y,), (f(y),))[1]
