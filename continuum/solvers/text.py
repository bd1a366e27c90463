"""Solvers as text, name:key=value,... - one grammar for the command line, configs and saved files."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal, cast, get_args, get_origin

from continuum.schemes import SCHEMES, Scheme
from continuum.solvers.adaptive import Adaptive
from continuum.solvers.base import Solver
from continuum.solvers.brownian import Brownian
from continuum.solvers.fixed import FixedStep
from continuum.solvers.pairs import METHODS, PAIRS, Embedded
from continuum.solvers.per_image import PerImage

NAMES: dict[str, type[Scheme]] = {str(scheme).partition(":")[0]: type(scheme) for scheme in SCHEMES}
OTHERS: dict[str, type[Solver]] = {"brownian": Brownian, "per_image": PerImage}


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
    given = [_option(text, part) for part in rest.split(",") if part.strip()]
    options = dict(given)
    if len(options) < len(given):
        raise ValueError(f"in {text!r} an option is given twice: say each once")
    if name in PAIRS and options.keys() & {"h", "grid"}:
        return FixedStep(Embedded(name), **_values(text, options, _options(FixedStep, "scheme")))
    if name in METHODS:
        return Adaptive(name, **_values(text, options, _options(Adaptive, "method")))
    if name in OTHERS:
        return OTHERS[name](**_values(text, options, _options(OTHERS[name])))
    if name not in NAMES:
        raise ValueError(
            f"unknown solver {name!r} in {text!r}; fixed-step: {', '.join(NAMES)}; adaptive: {', '.join(METHODS)}; "
            "on a Brownian path: brownian; with steps of its own for each image: per_image"
        )
    own = _options(NAMES[name])
    values = _values(text, options, {**own, **_options(FixedStep, "scheme")})
    try:
        scheme = NAMES[name](**{key: values.pop(key) for key in own if key in values})
        return FixedStep(scheme, **values)
    except TypeError as error:
        raise ValueError(f"in {text!r}: {error}") from None


def _options(kind: type, *named: str) -> dict[str, Callable[[str], Any]]:
    """How each field of a dataclass is read from text, but for those that the name stands for."""
    return {f.name: _reader(f.type) for f in fields(cast(Any, kind)) if f.name not in named}


def _reader(hint: Any) -> Callable[[str], Any]:
    kinds = [part for part in get_args(hint) if part is not type(None)] if get_origin(hint) is not Literal else [str]
    kind = kinds[0] if kinds and get_origin(hint) is not tuple else hint
    if isinstance(kind, type) and issubclass(kind, Scheme):
        return _scheme
    if get_origin(kind) is tuple:
        return lambda text: tuple(float(depth) for depth in text.split("/"))
    return str if get_origin(kind) is Literal else kind


def _scheme(name: str) -> Scheme:
    """A scheme inside another, by its name alone."""
    if name not in NAMES:
        raise ValueError(f"unknown scheme {name!r}; known: {', '.join(NAMES)}")
    return NAMES[name]()


def _option(text: str, part: str) -> tuple[str, str]:
    key, equals, value = part.partition("=")
    if not equals or not value.strip():
        raise ValueError(f"in {text!r}, {part!r} is not of the form key=value")
    return key.strip(), value.strip()


def _values(text: str, options: dict[str, str], valid: dict[str, Callable[[str], Any]]) -> dict[str, Any]:
    unknown = options.keys() - valid.keys()
    if unknown:
        said = ", ".join(repr(key)[1:-1] for key in sorted(unknown))
        raise ValueError(f"unknown option {said} in {text!r}; valid: {', '.join(valid)}")
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
