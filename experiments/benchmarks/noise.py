"""What noise costs: a step of Euler-Maruyama against its drift and diffusion, and what stochastic depth saves in training.

Everything alternates, and figures are medians of the ratios of neighbours. Run as

    OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456 \
        python -m experiments.benchmarks.noise --out experiments/benchmarks/results/noise_cost.json

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
from typing import Any

import torch
import torchsde
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import continuum
from continuum import Autonomous, Brownian, Field, FixedStep
from continuum.fields import PreActivation
from continuum.files import write_json
from continuum.noise import Dropout, StochasticDepth, StochasticField
from continuum.noise.base import stochastic_fields
from continuum.schemes import EulerMaruyama
from continuum.types import State
from experiments.common import table

STEPS = 8
SHAPES = ((16, 32, 32), (32, 16, 16), (64, 8, 8))


class Plain(nn.Module):
    """The equation as torchsde takes it, flattened; drift and diffusion share their evaluation here too."""

    sde_type = "ito"

    def __init__(self, field: StochasticField, shape: torch.Size) -> None:
        super().__init__()
        self.field, self.shape = field, shape
        self.noise_type = field.noise

    def f_and_g(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        drift, diffusion = (term.flatten(1) for term in self.field.terms(0.0, y.view(self.shape)))
        return drift, diffusion if self.noise_type == "diagonal" else diffusion.unsqueeze(2)

    def solve(self, x: State) -> State:
        times = torch.tensor([0.0, float(STEPS)])
        return torchsde.sdeint(self, x.flatten(1), times, method="euler", dt=1.0)[-1].view(self.shape)  # pyright: ignore


def evaluations(field: StochasticField, x: State) -> State:
    """Drift and diffusion, as often as the solve needs them."""
    total = x
    for step in range(STEPS):
        total, _ = field.terms(float(step), x)
    return total


def normals(field: StochasticField, x: State) -> Tensor:
    """The random numbers alone, as many as the solve needs."""
    return torch.stack([field.normals(x).sum() for _ in range(STEPS)])


def timed(run: Callable[[], Tensor], backward: bool) -> float:
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        end = run()
        if end.requires_grad:
            end.square().mean().backward()
    return time.perf_counter() - start


def step_cost(field: StochasticField, x: State, backward: bool, rounds: int) -> dict[str, float]:
    """The time of STEPS steps by each solver, as a ratio to that many evaluations of drift and diffusion."""
    own, library = FixedStep(EulerMaruyama("brownian")), Brownian("euler")
    plain = Plain(field, x.shape)

    def evaluated() -> Tensor:
        if not backward:
            return evaluations(field, x)
        # A chain through both terms, so that the way back passes every evaluation as in a solve.
        y = x
        for step in range(STEPS):
            drift, diffusion = field.terms(float(step), y)
            y = torch.add(drift, diffusion)
        return y

    runs: dict[str, Callable[[], Tensor]] = {
        "evaluations": evaluated,
        "FixedStep(EulerMaruyama('brownian'))": lambda: own(field, x, (0.0, float(STEPS))).states[-1],
        "Brownian('euler')": lambda: library(field, x, (0.0, float(STEPS))).states[-1],
        "torchsde.sdeint": lambda: plain.solve(x),
        "normals alone": lambda: normals(field, x),
    }
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 2):
        names = list(runs) if index % 2 else list(runs)[::-1]
        seconds = {name: timed(runs[name], backward) for name in names}
        if index >= 2:  # two rounds to warm up
            for name, value in seconds.items():
                ratios[name].append(value / seconds["evaluations"])
    return {name: round(statistics.median(values), 3) for name, values in ratios.items() if name != "evaluations"}


def saving(pairs: int, depth: int, batch_size: int) -> dict[str, float]:
    """The time that a training step with stochastic depth saves, and the share of blocks that it dropped meanwhile."""
    torch.manual_seed(0)
    images, labels = torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
    networks = [continuum.zoo.stochastic_depth_resnet(depth, last=last) for last in (0.5, 1.0)]
    counts = [0]
    blocks = list(stochastic_fields(networks[0]))
    for block in blocks:
        block.field.register_forward_hook(lambda *_: counts.__setitem__(0, counts[0] + 1))  # pyright: ignore
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True) for network in networks]

    def step(index: int) -> float:
        start = time.perf_counter()
        optimizers[index].zero_grad()
        cross_entropy(networks[index](images), labels).backward()
        optimizers[index].step()
        return time.perf_counter() - start

    for index in (0, 1, 0, 1):
        step(index)
    noisy, full, dropped = [], [], []
    for pair in range(pairs):
        counts[0] = 0
        seconds = [(index, step(index)) for index in ((0, 1) if pair % 2 else (1, 0))]
        times = dict(seconds)
        noisy.append(times[0])
        full.append(times[1])
        dropped.append(1 - counts[0] / len(blocks))
    return {
        "layers": depth,
        "saved": round(1 - statistics.mean(noisy) / statistics.mean(full), 4),
        "dropped": round(statistics.mean(dropped), 4),
        "seconds": round(statistics.median(full), 4),
        "pairs": pairs,
    }


def report(content: dict[str, Any]) -> str:
    solvers = [name for name in content["step"][0] if name not in ("state", "noise", "backward")]
    rows = []
    for row in content["step"]:
        way = "forward and backward" if row["backward"] else "forward"
        rows.append([row["state"], row["noise"], way, *(f"{row[solver]:.2f}" for solver in solvers)])
    saved, dropped = (100 * content["stochastic depth"][name] for name in ("saved", "dropped"))
    names = [f"`{solver}`".replace("'", '"') for solver in solvers]
    saving = f"stochastic depth: {saved:.1f} % of the time saved, {dropped:.1f} % of the layers dropped"
    return f"{table(['state', 'noise', 'pass', *names], rows)}\n\n{saving}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    makers: dict[str, Callable[[Field], StochasticField]] = {
        "scalar": lambda f: StochasticDepth(f, 0.8, per="image"),
        "diagonal": lambda f: Dropout(f, 0.2),
    }
    costs = []
    for shape in SHAPES:
        for kind, make in makers.items():
            torch.manual_seed(0)
            field, x = make(Autonomous(PreActivation(shape[0], shape[0]))), torch.randn(options.batch_size, *shape)
            for backward in (False, True):
                row = {"state": "x".join(map(str, shape)), "noise": kind, "backward": backward}
                costs.append({**row, **step_cost(field, x, backward, options.rounds)})
                print(json.dumps(costs[-1]), flush=True)
    result = {
        "step": costs,
        "stochastic depth": saving(options.pairs, 56, 32),
        "batch_size": options.batch_size,
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} thread",
        "torch": torch.__version__,
    }
    print(report(result))
    if options.out:
        write_json(result, options.out)


if __name__ == "__main__":
    main()
