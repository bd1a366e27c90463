"""What a published network costs as flows: time and peak memory of its equation over its own, forward and as a training step.

    OMP_NUM_THREADS=1 python -m experiments.benchmarks.existing --out experiments/benchmarks/results/existing.json

The two alternate; a ratio is the median over pairs of neighbours, with its quartiles. Weights are random, images are noise.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import convnext_tiny, resnet50, swin_t, vit_b_16

from continuum.analysis.memory import peak_memory
from continuum.convert import continuous
from continuum.files import write_json
from experiments.common import facts, machine, table

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ConvNeXt-T": convnext_tiny,
    "Swin-T": swin_t,
    "ViT-B/16": vit_b_16,
    "ResNet-50": resnet50,
}
PAIRS, BATCH = 12, 2


def passes(model: nn.Module, images: Tensor) -> dict[str, Callable[[], None]]:
    def forward() -> None:
        with torch.no_grad():
            model(images)

    def train() -> None:
        model(images).square().mean().backward()

    return {"forward": forward, "training step": train}


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measured(name: str) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model, images = NETWORKS[name]().train(), torch.randn(BATCH, 3, 224, 224)
    theirs, ours = passes(model, images), passes(continuous(model), images)
    rows = []
    for kind in theirs:
        memory = [peak_memory(runs[kind], torch.device("cpu")) / 2**20 for runs in (ours, theirs)]  # also warms up
        pairs = [(seconds(ours[kind]), seconds(theirs[kind])) for _ in range(PAIRS)]
        low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
        rows.append(
            {
                "network": name,
                "pass": kind,
                "milliseconds": 1000 * statistics.median(b for _, b in pairs),
                "ratio": middle,
                "quartiles": [low, high],
                "mib": memory[1],
                "memory_ratio": memory[0] / memory[1],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    rows = [row for name in NETWORKS for row in measured(name)]
    lines = [
        [
            row["network"],
            row["pass"],
            f"{row['milliseconds']:.0f}",
            f"{row['ratio']:.3f} ({row['quartiles'][0]:.3f} to {row['quartiles'][1]:.3f})",
            f"{row['mib']:.0f}",
            f"{row['memory_ratio']:.3f}",
        ]
        for row in rows
    ]
    headings = ["network", "pass", "its own, ms", "as flows, ratio", "its own, MiB", "as flows, ratio"]
    print(f"{table(headings, lines)}\n\n{BATCH} images; {facts(machine())}")
    write_json({"machine": machine(), "batch": BATCH, "pairs": PAIRS, "seed": 0, "rows": rows}, out)


if __name__ == "__main__":
    main()
