"""The same solve by others: y(depth) of dy/dt = f(t, y), y(0) = x, by dopri5 as the user of each library would write it.

torchode, and diffrax on JAX, are measured where they are installed; continuum needs neither.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, TypeAlias

import torch
import torchdiffeq
from torch import nn

from continuum.fields import Field
from continuum.solvers.pairs import pair_of
from continuum.types import State

FlowMap: TypeAlias = Callable[[State], State]
"""From the state at depth 0 to the one at the end."""

MakeFlowMap: TypeAlias = Callable[[Field, float, float], FlowMap]
"""From a field, a depth and a tolerance to a solve, with what is made once outside it."""


def optional(name: str) -> Any | None:
    """The module `name`, or None where it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        return None


def odeint(field: Field, depth: float, tolerance: float, solve: Callable[..., Any] = torchdiffeq.odeint) -> FlowMap:
    """torchdiffeq.odeint, with the gradient of autograd through it."""
    return lambda x: solve(
        field, x, torch.tensor([0.0, depth], device=x.device), rtol=tolerance, atol=tolerance, method="dopri5"
    )[-1]


def odeint_adjoint(field: Field, depth: float, tolerance: float) -> FlowMap:
    """torchdiffeq.odeint_adjoint with the library's default norm."""
    return odeint(field, depth, tolerance, torchdiffeq.odeint_adjoint)


def odeint_euler(field: Field, steps: int) -> FlowMap:
    """torchdiffeq's Euler with so many steps of one layer."""
    solve: Callable[..., Any] = torchdiffeq.odeint
    return lambda x: solve(field, x, torch.arange(steps + 1.0, device=x.device), method="euler")[-1]


def torchode_dopri5(field: Field, depth: float, tolerance: float) -> FlowMap:
    """torchode's AutoDiffAdjoint, whose images choose their own steps; it takes states of shape (batch, features).

    Its documentation writes torch.compile(solver).solve, which is the solver's own method, not a compiled one.
    """
    to: Any = import_module("torchode")
    shape: Sequence[int] = ()
    term = to.ODETerm(lambda t, y: field(t, y.view(shape)).flatten(1))
    solver = to.AutoDiffAdjoint(to.Dopri5(term=term), to.IntegralController(atol=tolerance, rtol=tolerance, term=term))

    def solve(x: State) -> State:
        nonlocal shape
        shape = x.shape
        start = torch.zeros(len(x), device=x.device)
        problem = to.InitialValueProblem(y0=x.flatten(1), t_start=start, t_end=torch.full_like(start, depth))
        return solver.solve(problem).ys[:, -1].view(shape)

    return solve


def plain_dopri5(field: Field, depth: float, tolerance: float) -> FlowMap:
    """dopri5 written by hand: a loop over tensors, with autograd through it."""
    pair = pair_of("dopri5")

    def norm(x: State) -> float:
        return x.square().mean().sqrt().item()

    def first_step(x: State, slope: State) -> float:
        with torch.no_grad():
            scale = tolerance * (1 + x.abs())
            h = 0.01 * norm(x / scale) / norm(slope / scale)
            change = norm((field(h, x + h * slope) - slope) / scale) / h
            return min(100 * h, (0.01 / max(norm(slope / scale), change)) ** (1 / pair.order))

    def solve(x: State) -> State:
        t, slope = 0.0, field(0.0, x)
        h = first_step(x, slope)
        while t < depth:
            h = min(h, depth - t)
            end, slopes = x, [slope]
            for c, row in zip(pair.c[1:], pair.a[1:], strict=True):
                end = x + h * sum(a * k for a, k in zip(row, slopes, strict=True) if a)
                slopes.append(field(t + c * h, end))
            with torch.no_grad():
                error = h * sum(e * k for e, k in zip(pair.e, slopes, strict=True) if e)
                ratio = norm(error / (tolerance * (1 + torch.maximum(x.abs(), end.abs()))))
            if ratio <= 1:
                t, x, slope = t + h, end, slopes[-1]
            h *= min(10.0, max(0.2, 0.9 * ratio ** (-1 / pair.order)))
        return x

    return solve


def diffrax_dopri5(
    layers: nn.Sequential, x: State, depth: float, tolerance: float
) -> tuple[Callable[[], object], Callable[[], object], int]:
    """diffrax's dopri5 of a field of linear layers with tanh between: a solve, its evaluations alone, and their number.

    All of it is JAX, compiled; the evaluations are a loop of the compiled field over its own result.
    """
    jax, diffrax = import_module("jax"), import_module("diffrax")
    numpy, y0 = jax.numpy, jax.numpy.asarray(x.numpy(force=True))
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    weights = [(numpy.asarray(m.weight.numpy(force=True).T), numpy.asarray(m.bias.numpy(force=True))) for m in linear]
    calls = 0

    def field(t: Any, y: Any, args: Any) -> Any:
        for weight, bias in weights[:-1]:
            y = numpy.tanh(y @ weight + bias)
        return y @ weights[-1][0] + weights[-1][1]

    def counting(t: Any, y: Any, args: Any) -> Any:
        def count() -> None:
            nonlocal calls
            calls += 1

        jax.debug.callback(count)
        return field(t, y, args)

    def solved(f: Callable[..., Any]) -> Any:
        controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)
        term = diffrax.ODETerm(f)
        return jax.jit(
            lambda y: diffrax.diffeqsolve(term, diffrax.Dopri5(), 0.0, depth, None, y, stepsize_controller=controller).ys
        )

    solved(counting)(y0).block_until_ready()
    jax.effects_barrier()
    solve = solved(field)
    chain = jax.jit(lambda y: jax.lax.fori_loop(0, calls, lambda i, y: field(0.0, y, None), y))
    return lambda: solve(y0).block_until_ready(), lambda: chain(y0).block_until_ready(), calls
