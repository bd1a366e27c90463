"""What the error norm means for a single image: evaluations, and the worst image's error in units of the tolerance.

    python -m experiments.benchmarks.norms --out experiments/benchmarks/results/norms.json

64 images of 8 numbers in float64 under dopri5, by the norm over the batch, the norm of the worst image, and steps of each image
alone (torchode). Decay: x' = -r x with rates from 0.1 to 32, up to depth 1. Tanh: x' = B tanh(A x + a), random, up to depth 2,
on images of sizes from 0.1 to 3. The exact end is that of dopri8 at 1e-13. Moved is how far, in tolerances, the first image's
end moves when it is solved alone.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import continuum
from continuum import Adaptive, Autonomous, Field, Flow
from continuum.files import write_json
from continuum.solvers import PerImage, Solver

IMAGES, FEATURES = 64, 8
SOLVERS: dict[str, Callable[[float], Solver]] = {
    "batch": lambda tolerance: Adaptive("dopri5", tolerance, tolerance),
    "sample": lambda tolerance: Adaptive("dopri5", tolerance, tolerance, norm="sample"),
    "each image": lambda tolerance: PerImage("dopri5", tolerance, tolerance),
}


class Decay(nn.Module):
    """x' = -r x, where the last feature is the rate of the image and does not move."""

    def forward(self, x: Tensor) -> Tensor:
        slope = -x[:, -1:] * x
        return torch.cat([slope[:, :-1], torch.zeros_like(slope[:, -1:])], dim=1)


def decay() -> tuple[Field, Tensor, float]:
    rates = torch.logspace(-1, 1.505, IMAGES, dtype=torch.float64)
    return Autonomous(Decay()), torch.cat([torch.randn(IMAGES, FEATURES - 1, dtype=torch.float64), rates[:, None]], dim=1), 1.0


def tanh() -> tuple[Field, Tensor, float]:
    field = Autonomous(nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, FEATURES, bias=False)).double())
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.mul_(3)
    sizes = torch.linspace(0.1, 3, IMAGES, dtype=torch.float64)
    return field, sizes[:, None] * torch.randn(IMAGES, FEATURES, dtype=torch.float64), 2.0


PROBLEMS: dict[str, Callable[[], tuple[Field, Tensor, float]]] = {"decay": decay, "tanh": tanh}


@torch.no_grad()
def rows(name: str, tolerance: float, seed: int) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    field, x, depth = PROBLEMS[name]()
    exact = Flow(field, Adaptive("dopri8", 1e-13, 1e-13, max_evaluations=1_000_000), depth)(x)
    allowed = tolerance * (1 + exact.abs())
    found = []
    for norm, solver in SOLVERS.items():
        flow = Flow(field, solver(tolerance), depth)
        error = ((flow(x) - exact) / allowed).square().mean(dim=1).sqrt()
        cost = flow.cost
        assert cost is not None
        moved = ((flow(x[:1]) - flow(x)[:1]) / allowed[:1]).square().mean().sqrt()
        row = {"problem": name, "tolerance": tolerance, "norm": norm, "evaluations": cost.evaluations}
        found.append(row | {"worst": float(error.max()), "median": float(error.median()), "moved": float(moved)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    table = [row for name in PROBLEMS for tolerance in (1e-3, 1e-5) for row in rows(name, tolerance, options.seed)]
    print("| problem | tolerance | norm | evaluations | worst image | median image | moved |\n" + "| --- " * 7 + "|")
    for row in table:
        numbers = (f"{row[key]:.2g}" for key in ("worst", "median", "moved"))
        print(f"| {row['problem']} | {row['tolerance']:g} | {row['norm']} | {row['evaluations']} | {' | '.join(numbers)} |")
    if options.out:
        content = {"seed": options.seed, "torch": torch.__version__, "continuum": continuum.__version__, "rows": table}
        write_json(content, options.out)


if __name__ == "__main__":
    main()
