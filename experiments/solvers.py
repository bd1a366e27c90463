"""Two tables about adaptive solvers: their errors in units of the tolerance, and what it is worth to know a field's knots.

    python experiments/solvers.py --out experiments/results/solvers.json

Errors: the largest over four problems with exact solutions (linear, logistic, oscillator, one driven by time), at rtol = atol,
divided by the tolerance, in float64. Knots: nine tanh layers of eight features with random weights, solved by dopri5 with and
without the layer boundaries, against each layer solved alone at 1e-12; median over seeds.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from continuum import Adaptive, Autonomous, Field, Flow, PiecewiseConstant
from continuum.files import write_json

Exact = Callable[[float], Tensor]

TOLERANCES = (1e-3, 1e-5, 1e-7, 1e-9)


class Problem(Field):
    """dx/dt = function(t, x) as a field."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, t: float | Tensor, x: Tensor) -> Tensor:
        return self.function(torch.as_tensor(t, dtype=x.dtype), x)


def problems() -> dict[str, tuple[Field, Exact]]:
    """Fields with their solutions from x(0) = exact(0), on [0, 2]."""

    def row(*values: float) -> Tensor:
        return torch.tensor([values], dtype=torch.float64)

    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    return {
        "linear": (Problem(lambda t, x: -x), lambda t: row(math.exp(-t))),
        "logistic": (Problem(lambda t, x: x * (1 - x)), lambda t: row(1 / (1 + 9 * math.exp(-t)))),
        "oscillator": (Problem(lambda t, x: x @ turn.T), lambda t: row(math.cos(t), -math.sin(t))),
        "driven": (Problem(lambda t, x: -x + torch.sin(t)), lambda t: row((math.sin(t) - math.cos(t) + 3 * math.exp(-t)) / 2)),
    }


def error_in_tolerances(method: str, tolerance: float) -> float:
    worst = 0.0
    for field, exact in problems().values():
        flow = Flow(field, Adaptive(method, tolerance, tolerance, max_evaluations=1_000_000), depth=2)
        worst = max(worst, float((flow(exact(0.0)) - exact(2.0)).abs().max()))
    return worst / tolerance


def tanh_layers(seed: int, layers: int = 9, features: int = 8) -> tuple[PiecewiseConstant, Tensor]:
    torch.manual_seed(seed)
    modules = [nn.Sequential(nn.Linear(features, features), nn.Tanh()) for _ in range(layers)]
    return PiecewiseConstant(map(Autonomous, modules)).double(), torch.randn(4, features, dtype=torch.float64)


@torch.no_grad()
def knots(tolerance: float, seeds: range) -> dict[str, float]:
    """Evaluations and errors with the knots known and unknown: medians over the seeds, and of the ratio of errors."""
    known_evaluations, blind_evaluations, known_errors, blind_errors = [], [], [], []
    for seed in seeds:
        field, x = tanh_layers(seed)
        exact = x
        for layer in field.layers:
            exact = Flow(layer, Adaptive("dopri5", 1e-12, 1e-12, max_evaluations=1_000_000), depth=1)(exact)
        flow = Flow(field, Adaptive("dopri5", tolerance, tolerance), depth=len(field.layers))
        known_errors.append(float((flow(x) - exact).abs().max()))
        known_evaluations.append(flow.cost.evaluations)
        field.knots = ()
        blind_errors.append(float((flow(x) - exact).abs().max()))
        blind_evaluations.append(flow.cost.evaluations)
    return {
        "evaluations": statistics.median(known_evaluations),
        "evaluations_without": statistics.median(blind_evaluations),
        "error": statistics.median(known_errors),
        "error_without": statistics.median(blind_errors),
        "smallest_error_ratio": min(b / k for b, k in zip(blind_errors, known_errors, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    errors: dict[str, dict[str, float]] = {}
    for method in ("dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2"):
        # The second-order pairs need millions of evaluations below 1e-5.
        limit = 1e-5 if method in ("adaptive_heun", "fehlberg2") else 0.0
        errors[method] = {f"{tol:g}": error_in_tolerances(method, tol) for tol in TOLERANCES if tol >= limit}
        print(method, {tol: f"{value:.3g}" for tol, value in errors[method].items()})
    seeds = range(10)
    known = {f"{tol:g}": knots(tol, seeds) for tol in (1e-3, 1e-5)}
    for tolerance, row in known.items():
        print(f"knots at {tolerance}:", {name: f"{value:.3g}" for name, value in row.items()})
    if options.out:
        content = {"errors_in_tolerances": errors, "knots": known, "seeds": len(seeds), "torch": torch.__version__}
        write_json(content, options.out)


if __name__ == "__main__":
    main()
