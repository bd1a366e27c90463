"""The report of `continuum analyse`: what a trained network is as a differential equation, section by section.

A section is a few sentences, a table and figures, all as numbers; the page and the JSON file are written from the same ones.
What does not apply to a network is said in its section.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from continuum.analysis.convergence import Convergence, deep_limit, reference_end, scheme_errors
from continuum.analysis.cost import tolerance_sweep
from continuum.analysis.dynamics import flow_dynamics
from continuum.analysis.equations import method_of
from continuum.analysis.figures import Axes, Line, Panel
from continuum.analysis.gradients import compare_gradients
from continuum.analysis.momentum import frictions
from continuum.bases import Hat
from continuum.fields import Field
from continuum.flow import Flow
from continuum.models import Network
from continuum.schemes import RK4, Euler, Midpoint, Scheme
from continuum.schemes.base import scheme_of
from continuum.solvers import SolveError, Solver, parse
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


def report(network: Network, sample: Sample, content: Mapping[str, Any]) -> Iterator[Section]:
    """The sections, as they are done; `content` is what the network's file holds, for what training has left there.

    A network with noise is analysed without it, as evaluation runs it.
    """
    network = network.drift() if network.stochastic else network
    network.eval()
    entries = entered(network, sample.images)
    parts: list[tuple[str, Callable[[], Section]]] = [
        ("Flows", partial(_flows, entries)),
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


def entered(network: Network, images: Images) -> list[Entry]:
    """What reaches every flow when these images pass the network in evaluation mode."""
    names = {flow: name for name, flow in network.named_flows.items()}
    return [Entry(names[flow], flow, x, memory) for flow, (x, memory) in network.entering(images).items()]


def _flows(entries: Sequence[Entry]) -> Section:
    numbers = []
    for entry in entries:
        cost = entry.flow.cost
        numbers.append(
            {
                "flow": entry.name,
                "field": type(entry.flow.field).__name__,
                "depth": entry.flow.depth,
                "solver": str(entry.flow.solver),
                "state": list(entry.x.shape[1:]),
                "parameters": sum(p.numel() for p in entry.flow.parameters()),
                "evaluations": cost.evaluations if cost else 0,
            }
        )
    rows = [[_text(value) for value in row.values()] for row in numbers]
    return Section("Flows", f"{len(entries)} flows; depth is counted in layers.", list(numbers[0]), rows, (), numbers)


def _convergence(entries: Sequence[Entry]) -> Section:
    """The order of the classical schemes, and of the network's own, on what was learnt."""
    rows, numbers, panels = [], [], []
    for entry in entries:
        schemes: list[Scheme] = [Euler(), Midpoint(), RK4()]
        own = scheme_of(entry.flow.solver)
        if own is not None and own not in schemes:
            schemes.append(own)
        x = entry.x[:FEW]
        exact = reference_end(entry.flow, x)
        found = [scheme_errors(entry.flow, x, scheme, reference=exact) for scheme in schemes]
        panels.append(_orders(entry.name, "steps", found))
        for row in found:
            numbers.append({"flow": entry.name, **_plain(row)})
            rows.append([entry.name, row.name, f"{row.expected}", _order(row), f"{row.errors[0]:.1e}", f"{row.errors[-1]:.1e}"])
    coarse = max((float(row[4]) for row in rows), default=0.0)
    summary = (
        "How fast each scheme approaches the equation that these weights define, as its steps shrink from one a layer. A "
        "scheme with an error near 1 at one step a layer computes something else than the equation; the largest here is "
        f"{coarse:.1e}. "
        "Fields with kinks, such as ReLU, hold the orders of high-order schemes down."
    )
    headings = ["flow", "scheme", "order of the scheme", "order measured", "error, one step a layer", "error, finest"]
    return Section("Order of convergence", summary, headings, rows, panels, numbers)


def _deep_limit(entries: Sequence[Entry]) -> Section:
    numbers, rows, found = [], [], []
    for entry in entries:
        expansion = _as_expansion(entry.flow.field)
        if expansion is None:
            continue
        limit = deep_limit(expansion, entry.x[:FEW])
        found.append(replace(limit, name=entry.name))
        numbers.append({"flow": entry.name, **_plain(limit)})
        rows.append([entry.name, _order(limit), *(f"{error:.1e}" for error in limit.errors)])
    if not found:
        raise TypeError("no flow has weights that vary with depth over three layers or more")
    summary = (
        "Networks of N layers, whose weights are samples of a function of depth (the learnt weights, joined by straight "
        "lines), against the equation with that function: the distance falls like 1/N."
    )
    headings = ["flow", "order measured", *(f"N = {n}" for n in found[0].steps)]
    return Section("Deep limit", summary, headings, rows, [_orders("deep limit", "layers N", found)], numbers)


def _as_expansion(field: Field) -> Field | None:
    """The field with weights that are continuous in depth; None where they do not vary, or jump too seldom to tell."""
    found = field.expanded()
    if found is None or found[0].continuous:
        return None if found is None else field
    basis, _ = found
    return field.project(Hat(basis.size, basis.depth)) if basis.size >= 3 else None


def _equations(network: Network) -> Section:
    """The modified equations of the fixed schemes in use, and where they are stable."""
    methods: dict[str, Any] = {}
    learnt = [friction.k for friction in frictions(network)]
    for flow in network.flows:
        scheme = scheme_of(flow.solver)
        if scheme is not None:
            for k in sorted({min(learnt), statistics.mean(learnt), max(learnt)}) if learnt else [None]:
                name = str(scheme).partition(":")[0] + (f", k = {k:.3g}" if k is not None else "")
                methods[name] = method_of(scheme, k)
    if not methods:
        raise TypeError("no flow has fixed steps, and adaptive ones have no single modified equation")
    rows, numbers, lines = [], [], []
    for name, method in methods.items():
        stable = "yes" if method.zero_stable else "no"
        rows.append([name, str(method), stable])
        x, y = method.boundary(240)
        lines.append(Line(name, x, y))
        numbers.append({"method": name, "equation": str(method), "zero_stable": stable == "yes", "boundary": [x, y]})
    summary = (
        "What the steps solve more exactly than the equation itself, and the boundary of the region of absolute stability: "
        "h times an eigenvalue of the field's Jacobian must lie inside for the steps not to blow up."
    )
    panel = Axes("boundary of absolute stability", "Re hλ (leapfrog: h²λ)", "Im hλ (leapfrog: h²λ)", lines)
    return Section(
        "Modified equation and stability", summary, ["scheme", "modified equation", "zero-stable"], rows, [panel], numbers
    )


def momentum_section(network: Network, content: Mapping[str, Any]) -> Section:
    """The k of every layer; over training too, where the checkpoint `content` has the history that KeepFriction keeps."""
    found = frictions(network)
    if not found:
        raise TypeError("no layer of this network has a k (LM-ResNet's have)")
    rows = [
        [f"{f.flow}, layer {f.layer}", f"{f.k:.4f}", f"{f.momentum:.4f}", f"{f.friction:.4f}", "yes" if f.zero_stable else "no"]
        for f in found
    ]
    places = list(range(1, len(found) + 1))
    panels = [Axes("k after training", "layer with memory, in order", "k", [Line("k", places, [f.k for f in found])])]
    history = _history(content)
    if history is not None:
        lines = [
            Line(f"{flow}, layer {layer}", history["epochs"], [ks[index] for ks in history["k"]])
            for index, (flow, layer) in enumerate(zip(history["flows"], history["layers"], strict=True))
        ]
        panels.append(Axes("k during training", "epoch", "k", lines))
    mean = statistics.mean(f.k for f in found)
    summary = (
        f"A step is (1 - k) x + k x_before + f: -k is a momentum, 1 + k a friction. The mean k is {mean:.3f}"
        + (", a momentum that carries on" if mean < 0 else ", which damps the motion")
        + "."
        + (
            ""
            if history
            else " How k moved during training is not in this file: train with the callback KeepFriction to see it."
        )
    )
    return Section(
        "Momentum",
        summary,
        ["layer", "k", "momentum -k", "friction 1 + k", "zero-stable"],
        rows,
        panels,
        [asdict(f) for f in found],
    )


def _history(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the callback KeepFriction has left in a training checkpoint."""
    for name, state in content.get("callbacks", {}).items():
        if str(name).startswith("KeepFriction") and state.get("epochs"):
            return state
    return None


def _dynamics(network: Network, sample: Sample) -> Section:
    found = flow_dynamics(network, sample.images[:FEW])
    rows = [[d.flow, f"{d.lipschitz:.3g}", f"{d.lyapunov:.3g}", _range(d.steps), _range(d.smoothness)] for d in found]
    panels = [
        Axes(
            "size of the steps",
            "step, through each flow",
            "|h f(x)| / |x|",
            [Line(d.flow, list(range(1, len(d.steps) + 1)), d.steps) for d in found if d.steps],
        )
    ]
    if any(d.smoothness for d in found):
        lines = [Line(d.flow, list(range(1, len(d.smoothness) + 1)), d.smoothness) for d in found if d.smoothness]
        panels.append(Axes("smoothness of the weights", "between a layer and the next", "|Δθ| / |θ|", lines))
    summary = (
        "How far the flows stretch small differences between states (the largest over the images, and as a rate a layer), how "
        "large each step is beside its state, and how much the weights change from layer to layer. Steps and changes well "
        "below 1 are those of an equation; near 1 the layers act one by one."
    )
    headings = ["flow", "Lipschitz constant", "Lyapunov exponent (1/layer)", "size of the steps", "change of the weights"]
    return Section("Dynamics", summary, headings, rows, panels, [asdict(d) for d in found])


def _cost(network: Network, sample: Sample) -> Section:
    found = tolerance_sweep(network, sample.images, sample.labels)
    rows, lines = [], []
    for row in found:
        if row.failure:
            rows.append([row.method, f"{row.tolerance:g}", "failed", "", "", "", ""])
            continue
        cells = [
            f"{row.evaluations:.0f}",
            f"{row.accepted:.0f}",
            f"{row.rejected:.0f}",
            f"{row.error:.1e}",
            f"{100 * row.accuracy:.1f}",
        ]
        rows.append([row.method, f"{row.tolerance:g}", *cells])
    for method in dict.fromkeys(row.method for row in found):
        solved = [row for row in found if row.method == method and not row.failure and row.error > 0]
        lines.append(Line(method, [row.evaluations for row in solved], [row.error for row in solved]))
    panel = Axes("what exactness costs", "evaluations of the field", "relative error of the logits", lines, "log", "log")
    summary = (
        "The same weights as an equation, solved to a tolerance: what it costs, how far logits are from its own, and accuracy."
    )
    headings = ["method", "tolerance", "evaluations", "accepted", "rejected", "error of the logits", "accuracy (%)"]
    return Section("Cost of a tolerance", summary, headings, rows, [panel], [asdict(row) for row in found])


def _gradients(entries: Sequence[Entry]) -> Section:
    entry = entries[0]
    modes = ("direct", "checkpoint", "adjoint", "full_adjoint")
    solvers: list[Solver] = [
        parse(f"dopri5:rtol={tol},atol={tol},gradient={mode}") for mode in modes for tol in ("1e-2", "1e-4")
    ]
    found = compare_gradients(entry.flow, entry.x[:FEW], solvers)
    rows = []
    for row in found:
        numbers = [row.error, row.step_error]
        cells = ["-" if number is None else f"{number:.1e}" for number in numbers]
        rows.append(
            [row.solver, *cells, f"{row.evaluations}", f"{row.backward_evaluations}", f"{row.memory:.1f}", row.failure or ""]
        )
    summary = (
        f"The gradient of the parameters of {entry.name} in every mode. The first error is against the gradient of the "
        "equation, which no solver has exactly; the second against that of the steps that were taken, which training descends "
        "along."
    )
    headings = ["solver", "error", "error against its own steps", "evaluations forward", "and back", "MiB", "failure"]
    return Section("Gradients", summary, headings, rows, (), [asdict(row) for row in found])


def _orders(title: str, x: str, found: Sequence[Convergence]) -> Axes:
    lines = [Line(row.name, row.steps, row.errors) for row in found if all(row.errors)]
    return Axes(title, x, "relative error", lines, "log", "log")


def _plain(row: Convergence) -> dict[str, Any]:
    return {**asdict(row), "order": row.order if len(row.errors) > 1 and all(row.errors) else None}


def _order(row: Convergence) -> str:
    return f"{row.order:.2f}" if all(row.errors) else "-"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2g} to {max(values):.2g}" if values else "-"


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "x".join(map(str, value)) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else str(value)
