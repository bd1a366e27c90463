"""Adaptive solvers: their errors in units of the tolerance, and what it is worth to know a field's knots.

Errors: the largest over four problems with exact solutions (linear, logistic, oscillator, one driven by time), at rtol = atol,
divided by the tolerance, in float64. Knots: nine tanh layers of eight features with random weights, solved by dopri5 with and
without the layer boundaries, against each layer solved alone at 1e-12.
"""

import math
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from continuum import Adaptive, Autonomous, Field, Flow, PiecewiseConstant
from continuum.analysis.figures import Axes, Line
from continuum.fields import Function
from experiments.common import Experiment, Row, table

Exact = Callable[[float], Tensor]


def problems() -> dict[str, tuple[Field, Exact]]:
    """Fields with their solutions from x(0) = exact(0), on [0, 2]."""

    def row(*values: float) -> Tensor:
        return torch.tensor([values], dtype=torch.float64)

    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    return {
        "linear": (Function(lambda t, x: -x), lambda t: row(math.exp(-t))),
        "logistic": (Function(lambda t, x: x * (1 - x)), lambda t: row(1 / (1 + 9 * math.exp(-t)))),
        "oscillator": (Function(lambda t, x: x @ turn.T), lambda t: row(math.cos(t), -math.sin(t))),
        "driven": (Function(lambda t, x: -x + torch.sin(t)), lambda t: row((math.sin(t) - math.cos(t) + 3 * math.exp(-t)) / 2)),
    }


def errors(method: str, tolerance: float) -> Row:
    worst = 0.0
    for field, exact in problems().values():
        flow = Flow(field, Adaptive(method, tolerance, tolerance, max_evaluations=1_000_000), depth=2)
        worst = max(worst, float((flow(exact(0.0)) - exact(2.0)).abs().max()))
    return {"error_in_tolerances": worst / tolerance}


def tanh_layers(seed: int, layers: int = 9, features: int = 8) -> tuple[PiecewiseConstant, Tensor]:
    torch.manual_seed(seed)
    modules = [nn.Sequential(nn.Linear(features, features), nn.Tanh()) for _ in range(layers)]
    return PiecewiseConstant(map(Autonomous, modules)).double(), torch.randn(4, features, dtype=torch.float64)


@torch.no_grad()
def knots(tolerance: float, seed: int) -> Row:
    """Evaluations and error with the knots known and unknown."""
    field, x = tanh_layers(seed)
    exact = x
    for layer in field.layers:
        exact = Flow(layer, Adaptive("dopri5", 1e-12, 1e-12, max_evaluations=1_000_000), depth=1)(exact)
    flow = Flow(field, Adaptive("dopri5", tolerance, tolerance), depth=len(field.layers))
    found: Row = {}
    for suffix in ("", "_without"):
        error = float((flow(x) - exact).abs().max())
        assert flow.cost is not None
        found |= {f"evaluations{suffix}": flow.cost.evaluations, f"error{suffix}": error}
        field.knots = ()
    return found


def report(experiment: Experiment) -> str:
    methods = experiment.settings["tolerances"]
    tolerances = sorted({tol for chosen in methods.values() for tol in chosen}, reverse=True)
    rows = []
    for method in methods:
        found = {row["tolerance"]: row["error_in_tolerances"] for row in experiment.chosen(part="errors", method=method)}
        rows.append([f"`{method}`", *(f"{found[tol]:.3g}" if tol in found else "-" for tol in tolerances)])
    first = table(["error / tolerance", *(f"{tol:g}" for tol in tolerances)], rows)
    rows = []
    for tolerance in experiment.settings["knots"]:
        runs = experiment.chosen(part="knots", tolerance=tolerance)
        numbers = {name: statistics.median(row[name] for row in runs) for name in runs[0] if name.startswith(("ev", "er"))}
        ratio = min(row["error_without"] / row["error"] for row in runs)
        evaluations = f"{numbers['evaluations']:g} / {numbers['evaluations_without']:g}"
        rows.append([f"{tolerance:g}", evaluations, f"{numbers['error']:.1e} / {numbers['error_without']:.1e}", f"{ratio:.0f}"])
    headings = ["tolerance", "evaluations, knots known / not", "error, known / not", "smallest ratio of errors"]
    return f"{first}\n\n{table(headings, rows)}"


def figure(experiment: Experiment) -> None:
    lines = []
    for method in experiment.settings["tolerances"]:
        runs = experiment.chosen(part="errors", method=method)
        lines.append(Line(method, [row["tolerance"] for row in runs], [row["error_in_tolerances"] for row in runs]))
    runs = experiment.chosen(part="knots")
    known, blind = (
        Line(name, [row[f"evaluations{suffix}"] for row in runs], [row[f"error{suffix}"] for row in runs], "points")
        for name, suffix in (("knots known", ""), ("not known", "_without"))
    )
    experiment.plot(
        [
            Axes("errors", "tolerance", "error / tolerance", lines, "log", "log"),
            Axes("nine layers, dopri5", "evaluations", "error", [known, blind], "log", "log"),
        ]
    )


def main() -> None:
    torch.set_num_threads(1)
    experiment = Experiment(__file__, __doc__)
    for method, tolerances in experiment.settings["tolerances"].items():
        for tolerance in tolerances:
            key = {"part": "errors", "method": method, "tolerance": tolerance, "seed": 0}
            experiment.run(key, partial(errors, method, tolerance))
    for tolerance in experiment.settings["knots"]:
        for seed in experiment.settings["seeds"]:
            key = {"part": "knots", "method": "dopri5", "tolerance": tolerance, "seed": seed}
            experiment.run(key, partial(knots, tolerance, seed))
    figure(experiment)
    experiment.publish(report(experiment))


if __name__ == "__main__":
    main()
