"""Time of a training step of preresnet(20) under FixedStep(Euler()), as a ratio to the loop a person would write.

Both run the same modules on the same images; steps alternate, and the figure is the median of the ratios of neighbours. Run as

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456 \
        python -m experiments.benchmarks.plain_loop --out experiments/benchmarks/results/plain_loop.json

(the allocator settings keep page faults out of the measurement), with the machine otherwise idle.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import continuum
from continuum.files import write_json


class PlainResNet(nn.Module):
    """The residual network written as its textbook loop, over the modules of `network`."""

    def __init__(self, network: continuum.Network) -> None:
        super().__init__()
        self.stem, self.head = network.stem, network.head
        first, widen1, second, widen2, third = network.stages
        self.stages = nn.ModuleList([nn.ModuleList(layer.module for layer in s.field.layers) for s in (first, second, third)])
        self.transitions = nn.ModuleList([widen1, widen2])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, stage in enumerate(self.stages):
            if index:
                x, _ = self.transitions[index - 1](x)
            for block in stage:
                x = x + block(x)
        return self.head(x)


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()

    return step


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.randn(options.batch_size, 3, 32, 32, device=device)
    labels = torch.randint(10, (options.batch_size,), device=device)
    flow = continuum.zoo.preresnet(20).to(device)
    plain = PlainResNet(continuum.zoo.preresnet(20).to(device))
    runs = training_step(flow, images, labels), training_step(plain, images, labels)
    for run in runs * 3:
        run()
    pairs = []
    for index in range(options.pairs):  # who goes first alternates
        a, b = (seconds(run) for run in (runs if index % 2 else runs[::-1]))
        pairs.append((a, b) if index % 2 else (b, a))
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    result = {
        "ratio": statistics.median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
        "milliseconds": 1000 * statistics.median(ours for ours, _ in pairs),
        "plain_milliseconds": 1000 * statistics.median(theirs for _, theirs in pairs),
        "pairs": options.pairs,
        "batch_size": options.batch_size,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=1))
    if options.out:
        write_json(result, options.out)


if __name__ == "__main__":
    main()
