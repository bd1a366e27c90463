"""The report of `continuum analyse`: what a trained network is as a differential equation, section by section.

A section is a few sentences, a table and figures, all as numbers; the page and the JSON file are written from the same ones.
What does not apply to a network is said in its section.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from continuum.analysis.convergence import Convergence, deep_limit, reference_end, scheme_errors
from continuum.analysis.cost import tolerance_sweep
from continuum.analysis.dynamics import flow_dynamics
from continuum.analysis.equations import LinearMultistep, OneStep, method_of
from continuum.analysis.figures import Axes, Line, Panel
from continuum.analysis.gradients import compare_gradients
from continuum.analysis.layers import layer_map
from continuum.analysis.momentum import frictions
from continuum.analysis.verdict import table as verdict_table
from continuum.analysis.verdict import verdict
from continuum.bases import Hat
from continuum.fields import Field
from continuum.flow import Flow
from continuum.models.flows import entering, flows, named_flows, without_noise
from continuum.schemes import RK4, Euler, Midpoint, Scheme
from continuum.schemes.base import scheme_of
from continuum.solvers import SolveError, parse
from continuum.types import Images, State

FEW = 4
"""Images where a tight reference is needed: kinks in the field make it dear, and each image has its own."""


@dataclass(frozen=True)
class Sample:
    """Images (batch, channels, height, width) and labels (batch,) to look at the network with."""

    images: Images
    labels: Tensor


@dataclass(frozen=True)
class Section:
    """A part of the report; without rows and panels it says in `summary` why it is left out. `numbers` go into the JSON."""

    title: str
    summary: str
    headings: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    panels: Sequence[Panel] = ()
    numbers: Sequence[Mapping[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Entry:
    """A flow without its noise, its name, and the state (and the one before it) that reaches it."""

    name: str
    flow: Flow
    x: State
    memory: State | None


def report(network: nn.Module, sample: Sample, content: Mapping[str, Any]) -> Iterator[Section]:
    """The sections, as they are done; `content` is what the network's file holds, for what training has left there.

    A network with noise is analysed without it, as evaluation runs it.
    """
    network = without_noise(network)
    network.eval()
    entries = entered(network, sample.images)
    parts: list[tuple[str, Callable[[], Section]]] = [
        ("Is it an equation?", partial(_verdict, network, sample)),
        ("Flows", partial(_flows, entries)),
        ("Layers", partial(_layers, network, sample)),
        ("Order of convergence", partial(_convergence, entries)),
        ("Deep limit", partial(_deep_limit, entries)),
        ("Modified equation and stability", partial(_equations, network)),
        ("Momentum", partial(momentum_section, network, content)),
        ("Dynamics", partial(_dynamics, network, sample)),
        ("Cost of a tolerance", partial(_cost, network, sample)),
        ("Gradients", partial(_gradients, entries)),
    ]
    for title, part in parts:
        try:
            yield part()
        except (TypeError, ValueError, SolveError) as error:
            yield Section(title, f"Left out: {error}")


def entered(network: nn.Module, images: Images) -> list[Entry]:
    """What reaches every flow when these images pass the network in evaluation mode."""
    names = {flow: name for name, flow in named_flows(network).items()}
    return [Entry(names[flow], flow, x, memory) for flow, (x, memory, _) in entering(network, images).items()]


Table = Sequence[Mapping[str, str]]
"""Rows of cells by their headings."""


def _section(title: str, summary: str, table: Table, numbers: Sequence[Mapping[str, Any]], *panels: Panel) -> Section:
    return Section(title, summary, list(table[0]), [list(row.values()) for row in table], panels, numbers)


def _verdict(network: nn.Module, sample: Sample) -> Section:
    found = verdict(network, sample.images, sample.labels)
    return _section("Is it an equation?", str(found), verdict_table(found), [asdict(found)])


def _layers(network: nn.Module, sample: Sample) -> Section:
    """How far the logits move where a layer takes two steps, all others their one."""
    found = list(layer_map(network, sample.images, measure=lambda y: float((y.argmax(1) == sample.labels).double().mean())))
    table, panel = [], []
    for flow in dict.fromkeys(row.flow for row in found):
        rows = [row for row in found if row.flow == flow]
        worst = max(rows, key=lambda row: row.difference)
        panel.append(Line(flow, [row.layer for row in rows], [row.difference for row in rows]))
        table.append(
            {
                "flow": flow,
                "layers": f"{len(rows)}",
                "median change of the logits": f"{statistics.median(row.difference for row in rows):.2g}",
                "largest": f"{worst.difference:.2g}, layer {worst.layer}",
                "classes that change (%)": f"{100 * worst.changed:.1f}",
                "accuracy (points)": _number(100 * (worst.measure or 0.0), "+.1f"),
            }
        )
    summary = (
        "Each layer alone in two steps, all others in one: a layer that is a step of an equation hardly moves the logits "
        "(relative to their size), one that jumps moves them as far as it reaches. The last two columns are of the layer that "
        "moves them most."
    )
    axes = Axes("a layer in two steps", "layer", "change of the logits, relative", panel)
    return _section("Layers", summary, table, [asdict(row) for row in found], axes)


def _flows(entries: Sequence[Entry]) -> Section:
    numbers = [
        {
            "flow": entry.name,
            "field": type(entry.flow.field).__name__,
            "depth": entry.flow.depth,
            "solver": str(entry.flow.solver),
            "state": list(entry.x.shape[1:]),
            "parameters": sum(p.numel() for p in entry.flow.parameters()),
            "evaluations": entry.flow.cost.evaluations if entry.flow.cost else 0,
        }
        for entry in entries
    ]
    table = [{name: _text(value) for name, value in row.items()} for row in numbers]
    return _section("Flows", f"{len(entries)} flows; depth is counted in layers.", table, numbers)


def _convergence(entries: Sequence[Entry]) -> Section:
    """The order of the classical schemes, and of the network's own, on what was learnt."""
    table, numbers, panels = [], [], []
    for entry in entries:
        own, x = scheme_of(entry.flow.solver), entry.x[:FEW]
        schemes: list[Scheme] = [Euler(), Midpoint(), RK4()]
        schemes += [own] if own and own not in schemes else []
        exact = reference_end(entry.flow, x)
        found = [scheme_errors(entry.flow, x, scheme, reference=exact) for scheme in schemes]
        panels.append(_orders(entry.name, "steps", found))
        numbers += [{"flow": entry.name, **_plain(row)} for row in found]
        table += [
            {
                "flow": entry.name,
                "scheme": row.name,
                "order of the scheme": f"{row.expected}",
                "order measured": _order(row),
                "error, one step a layer": f"{row.errors[0]:.1e}",
                "error, finest": f"{row.errors[-1]:.1e}",
            }
            for row in found
        ]
    coarse = max(row["errors"][0] for row in numbers)
    summary = (
        "How fast each scheme approaches the equation that these weights define, as its steps shrink from one a layer. A "
        "scheme with an error near 1 at one step a layer computes something else than the equation; the largest here is "
        f"{coarse:.1e}. Fields with kinks, such as ReLU, hold the orders of high-order schemes down."
    )
    return _section("Order of convergence", summary, table, numbers, *panels)


def _deep_limit(entries: Sequence[Entry]) -> Section:
    expansions = {entry: _as_expansion(entry.flow.field) for entry in entries}
    found = {entry: deep_limit(field, entry.x[:FEW]) for entry, field in expansions.items() if field is not None}
    if not found:
        raise TypeError("no flow has weights that vary with depth over three layers or more")
    table = [
        {"flow": entry.name, "order measured": _order(limit)}
        | {f"N = {n}": f"{error:.1e}" for n, error in zip(limit.steps, limit.errors, strict=True)}
        for entry, limit in found.items()
    ]
    numbers = [{"flow": entry.name, **_plain(limit)} for entry, limit in found.items()]
    summary = (
        "Networks of N layers, whose weights are samples of a function of depth (the learnt weights, joined by straight "
        "lines), against the equation with that function: the distance falls like 1/N."
    )
    panel = _orders("deep limit", "layers N", [replace(limit, name=entry.name) for entry, limit in found.items()])
    return _section("Deep limit", summary, table, numbers, panel)


def _as_expansion(field: Field) -> Field | None:
    """The field with weights that are continuous in depth; None where they do not vary, or jump too seldom to tell."""
    found = field.expanded()
    if found is None or found[0].continuous:
        return None if found is None else field
    basis, _ = found
    return field.project(Hat(basis.size, basis.depth)) if basis.size >= 3 else None


def _equations(network: nn.Module) -> Section:
    """The modified equations of the fixed schemes in use, and where they are stable."""
    methods: dict[str, LinearMultistep | OneStep] = {}
    learnt = [friction.k for friction in frictions(network)]
    for scheme in map(scheme_of, (flow.solver for flow in flows(network))):
        if scheme is not None:
            for k in sorted({min(learnt), statistics.mean(learnt), max(learnt)}) if learnt else [None]:
                name = str(scheme).partition(":")[0] + (f", k = {k:.3g}" if k is not None else "")
                methods[name] = method_of(scheme, k)
    if not methods:
        raise TypeError("no flow has fixed steps, and adaptive ones have no single modified equation")
    lines = [Line(name, *method.boundary(240)) for name, method in methods.items()]
    table = [
        {"scheme": name, "modified equation": str(method), "zero-stable": _yes(method.zero_stable)}
        for name, method in methods.items()
    ]
    numbers = [
        {"method": line.name, "equation": str(method), "zero_stable": method.zero_stable, "boundary": [line.x, line.y]}
        for line, method in zip(lines, methods.values(), strict=True)
    ]
    summary = (
        "What the steps solve more exactly than the equation itself, and the boundary of the region of absolute stability: "
        "h times an eigenvalue of the field's Jacobian must lie inside for the steps not to blow up."
    )
    panel = Axes("boundary of absolute stability", "Re hλ (leapfrog: h²λ)", "Im hλ (leapfrog: h²λ)", lines)
    return _section("Modified equation and stability", summary, table, numbers, panel)


def momentum_section(network: nn.Module, content: Mapping[str, Any]) -> Section:
    """The k of every layer; over training too, where the checkpoint `content` has the history that KeepFriction keeps."""
    found = frictions(network)
    if not found:
        raise TypeError("no layer of this network has a k (LM-ResNet's have)")
    table = [
        {
            "layer": f"{f.flow}, layer {f.layer}",
            "k": f"{f.k:.4f}",
            "momentum -k": f"{f.momentum:.4f}",
            "friction 1 + k": f"{f.friction:.4f}",
            "zero-stable": _yes(f.zero_stable),
        }
        for f in found
    ]
    panels = [Axes("k after training", "layer with memory, in order", "k", [_counted("k", [f.k for f in found])])]
    kept = (state for name, state in content.get("callbacks", {}).items() if str(name).startswith("KeepFriction"))
    history = next((state for state in kept if state.get("epochs")), None)
    if history:
        places = zip(history["flows"], history["layers"], zip(*history["k"], strict=True), strict=True)
        lines = [Line(f"{flow}, layer {layer}", history["epochs"], list(ks)) for flow, layer, ks in places]
        panels.append(Axes("k during training", "epoch", "k", lines))
    mean = statistics.mean(f.k for f in found)
    motion = "a momentum that carries on" if mean < 0 else "which damps the motion"
    summary = f"A step is (1 - k) x + k x_before + f: -k is a momentum, 1 + k a friction. The mean k is {mean:.3f}, {motion}."
    if not history:
        summary += " How k moved during training is not in this file: train with the callback KeepFriction to see it."
    return _section("Momentum", summary, table, [asdict(f) for f in found], *panels)


def _dynamics(network: nn.Module, sample: Sample) -> Section:
    found = flow_dynamics(network, sample.images[:FEW])
    table = [
        {
            "flow": d.flow,
            "Lipschitz constant": f"{d.lipschitz:.3g}",
            "Lyapunov exponent (1/layer)": f"{d.lyapunov:.3g}",
            "size of the steps": _range(d.steps),
            "change of the weights": _range(d.smoothness),
        }
        for d in found
    ]
    steps = [_counted(d.flow, d.steps) for d in found if d.steps]
    panels = [Axes("size of the steps", "step, through each flow", "|h f(x)| / |x|", steps)]
    if changes := [_counted(d.flow, d.smoothness) for d in found if d.smoothness]:
        panels.append(Axes("smoothness of the weights", "between a layer and the next", "|Δθ| / |θ|", changes))
    summary = (
        "How far the flows stretch small differences between states (the largest over the images, and as a rate a layer), how "
        "large each step is beside its state, and how much the weights change from layer to layer. Steps and changes well "
        "below 1 are those of an equation; near 1 the layers act one by one."
    )
    return _section("Dynamics", summary, table, [asdict(d) for d in found], *panels)


def _cost(network: nn.Module, sample: Sample) -> Section:
    found = tolerance_sweep(network, sample.images, sample.labels)
    table = [
        {
            "method": row.method,
            "tolerance": f"{row.tolerance:g}",
            "evaluations": "failed" if row.failure else f"{row.evaluations:.0f}",
            "accepted": _number(row.accepted, ".0f"),
            "rejected": _number(row.rejected, ".0f"),
            "error of the logits": _number(row.error, ".1e"),
            "accuracy (%)": _number(100 * row.accuracy, ".1f"),
        }
        for row in found
    ]
    lines = []
    for method in dict.fromkeys(row.method for row in found):
        solved = [row for row in found if row.method == method and not row.failure and row.error > 0]
        lines.append(Line(method, [row.evaluations for row in solved], [row.error for row in solved]))
    panel = Axes("what exactness costs", "evaluations of the field", "relative error of the logits", lines, "log", "log")
    summary = (
        "The same weights as an equation, solved to a tolerance: what it costs, how far logits are from its own, and accuracy."
    )
    return _section("Cost of a tolerance", summary, table, [asdict(row) for row in found], panel)


def _gradients(entries: Sequence[Entry]) -> Section:
    entry = entries[0]
    modes = ("direct", "checkpoint", "adjoint", "full_adjoint")
    solvers = [parse(f"dopri5:rtol={tol},atol={tol},gradient={mode}") for mode in modes for tol in ("1e-2", "1e-4")]
    found = compare_gradients(entry.flow, entry.x[:FEW], solvers)
    table = [
        {
            "solver": row.solver,
            "error": _number(row.error, ".1e"),
            "error against its own steps": _number(row.step_error, ".1e"),
            "evaluations forward": f"{row.evaluations}",
            "and back": f"{row.backward_evaluations}",
            "MiB": f"{row.memory:.1f}",
            "failure": row.failure or "",
        }
        for row in found
    ]
    summary = (
        f"The gradient of the parameters of {entry.name} in every mode. The first error is against the gradient of the "
        "equation, which no solver has exactly; the second against that of the steps that were taken, which training descends "
        "along."
    )
    return _section("Gradients", summary, table, [asdict(row) for row in found])


def _orders(title: str, x: str, found: Sequence[Convergence]) -> Axes:
    lines = [Line(row.name, row.steps, row.errors) for row in found if all(row.errors)]
    return Axes(title, x, "relative error", lines, "log", "log")


def _counted(name: str, values: Sequence[float]) -> Line:
    """Values in the order in which they come."""
    return Line(name, range(1, len(values) + 1), values)


def _plain(row: Convergence) -> dict[str, Any]:
    return {**asdict(row), "order": row.order if len(row.errors) > 1 and all(row.errors) else None}


def _order(row: Convergence) -> str:
    return f"{row.order:.2f}" if all(row.errors) else "-"


def _number(number: float | None, form: str) -> str:
    return "-" if number is None or math.isnan(number) else format(number, form)


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2g} to {max(values):.2g}" if values else "-"


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "x".join(map(str, value)) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else str(value)
