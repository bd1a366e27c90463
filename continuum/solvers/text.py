"""Solvers as text, name:key=value,... - one grammar for the command line, configs and saved files."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, cast

from continuum.schemes import (
    RK4,
    AdamsBashforth,
    Coupling,
    Euler,
    EulerMaruyama,
    Fractal,
    Heun,
    Kutta3,
    Leapfrog,
    LinearTwoStep,
    Midpoint,
    Milstein,
    NeumannSeries,
    Scheme,
    StochasticTwoStep,
    TwoStepMidpoint,
    Verlet,
)
from continuum.solvers.adaptive import Adaptive
from continuum.solvers.base import Solver
from continuum.solvers.brownian import Brownian
from continuum.solvers.fixed import FixedStep
from continuum.solvers.pairs import METHODS, PAIRS, Embedded
from continuum.solvers.per_image import PER_IMAGE_METHODS

KNOWN = (
    Euler(),
    Midpoint(),
    Heun(),
    Kutta3(),
    RK4(),
    AdamsBashforth(),
    LinearTwoStep(),
    TwoStepMidpoint(),
    NeumannSeries(),
    Fractal(),
    Coupling(),
    Leapfrog(),
    Verlet(),
    EulerMaruyama(),
    Milstein(),
    StochasticTwoStep(),
)
SCHEMES: dict[str, type[Scheme]] = {str(scheme).partition(":")[0]: type(scheme) for scheme in KNOWN}

FIXED_OPTIONS: dict[str, Callable[[str], object]] = {
    "h": float,
    "grid": lambda text: tuple(float(depth) for depth in text.split("/")),
    "gradient": str,
    "every": int,
}
ADAPTIVE_OPTIONS: dict[str, Callable[[str], object]] = {
    "rtol": float,
    "atol": float,
    "gradient": str,
    "engine": str,
    "norm": str,
    "first_step": float,
    "min_step": float,
    "max_step": float,
    "max_evaluations": int,
}
BROWNIAN_OPTIONS: dict[str, Callable[[str], object]] = {
    "method": str,
    "h": float,
    "rtol": float,
    "atol": float,
    "gradient": str,
}


def parse(text: str) -> Solver:
    """The solver that `text` names, such as euler, rk4:h=0.5, adams_bashforth:order=3,h=0.25, dopri5:rtol=1e-4,atol=1e-4
    or brownian:method=milstein,h=0.25.

    An adaptive name with h (or grid=0/0.5/1) is that pair's scheme with fixed steps.

    >>> parse("adams_bashforth:order=3,h=0.25")
    FixedStep(scheme=AdamsBashforth(order=3), h=0.25, grid=None, gradient='direct', every=1)

    Raises:
        ValueError: an unknown name, option or value; the message lists what is valid.
    """
    name, _, rest = text.partition(":")
    name = name.strip()
    options = dict(_option(text, part) for part in rest.split(",") if part.strip())
    if name in PAIRS and options.keys() & {"h", "grid"}:
        return FixedStep(Embedded(name), **_values(text, options, FIXED_OPTIONS))  # pyright: ignore[reportArgumentType]
    if name in METHODS or name in PER_IMAGE_METHODS:
        return Adaptive(name, **_values(text, options, ADAPTIVE_OPTIONS))  # pyright: ignore[reportArgumentType]
    if name == "brownian":
        return Brownian(**_values(text, options, BROWNIAN_OPTIONS))  # pyright: ignore[reportArgumentType]
    if name not in SCHEMES:
        raise ValueError(
            f"unknown solver {name!r} in {text!r}; fixed-step: {', '.join(SCHEMES)}; adaptive: {', '.join(METHODS)}; "
            "on a Brownian path: brownian"
        )
    own: dict[str, Callable[[str], object]] = {f.name: type(f.default) for f in fields(cast(Any, SCHEMES[name]))}
    values = _values(text, options, {**own, **FIXED_OPTIONS})
    try:
        scheme = SCHEMES[name](**{key: values.pop(key) for key in own if key in values})
        return FixedStep(scheme, **values)  # pyright: ignore[reportArgumentType]
    except TypeError as error:
        raise ValueError(f"in {text!r}: {error}") from None


def _option(text: str, part: str) -> tuple[str, str]:
    key, equals, value = part.partition("=")
    if not equals or not value.strip():
        raise ValueError(f"in {text!r}, {part!r} is not of the form key=value")
    return key.strip(), value.strip()


def _values(text: str, options: dict[str, str], valid: dict[str, Callable[[str], object]]) -> dict[str, object]:
    unknown = options.keys() - valid.keys()
    if unknown:
        raise ValueError(f"unknown option {', '.join(sorted(unknown))} in {text!r}; valid: {', '.join(valid)}")
    try:
        return {key: valid[key](value) for key, value in options.items()}
    except ValueError as error:
        raise ValueError(f"in {text!r}: {error}") from None


def describe(solver: Solver) -> str:
    """str(solver), if `parse` turns it back into an equal solver.

    Raises:
        TypeError: a solver or scheme from outside the library, which text cannot name.
    """
    text = str(solver)
    try:
        if parse(text) == solver:
            return text
    except ValueError:
        pass
    raise TypeError(f"{solver!r} is not one of the library's solvers and schemes: it has no textual form")
