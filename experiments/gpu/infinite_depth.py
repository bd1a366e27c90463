"""Networks of infinite depth against residual networks of equal parameters, on all images; then each under other solvers."""

from functools import partial
from pathlib import Path
from typing import Any

import yaml

from continuum import Network
from continuum.analysis.compare import compare_solvers
from continuum.analysis.figures import Axes, Line, Panel
from continuum.solvers import parse
from continuum.training import ImageData
from experiments.common import Row, spread, table
from experiments.gpu.jobs import Part, Rows, Settings
from experiments.gpu.momentum import SEEDS, kinds, progress
from experiments.gpu.trainings import Recipe, Training, caption, cifar10_images, job
from experiments.infinite_depth.__main__ import Evaluations, networks

SOLVERS = "euler:h=1 euler:h=0.5 euler:h=0.25 midpoint:h=0.5 rk4:h=1 bosh3:rtol=1e-2,atol=1e-2 dopri5:rtol=1e-4,atol=1e-4"
EPOCHS = {"ResNet": 2.0, "ODE-Net": 15.0, "continuous": 40.0}
"""Seconds an epoch on an H100, by the first word of a network's name."""


def infinite_depth(settings: Settings) -> Part:
    config = Path(__file__).resolve().parents[1] / "infinite_depth" / f"{'cpu' if settings.quick else 'full'}.yaml"
    options: dict[str, Any] = yaml.safe_load(config.read_text())
    epochs = 2 if settings.quick else options["epochs"]
    milestones = (epochs // 2, 3 * epochs // 4) if not settings.quick else (1,)
    recipe = Recipe(epochs, options["learning_rate"], options["weight_decay"], milestones, 64 if settings.quick else 128)
    jobs = []
    for network, build in networks(options).items():
        for seed in (0,) if settings.quick else SEEDS:
            name = f"{network}, seed {seed}"
            training = Training(
                build,
                partial(cifar10_images, settings, seed, recipe.batch_size),
                recipe,
                seed,
                settings.checkpoints(name),
                settings.chosen_device(),
                lambda: {"evaluations": Evaluations()},
            )
            jobs.append(job(name, network, EPOCHS[network.split()[0].rstrip(",")] * epochs, training, under_all_solvers))
    return Part("infinite depth", jobs, show, figure, "cifar10")


def under_all_solvers(network: Network, data: ImageData) -> Row:
    """Accuracy in % of the trained network on 2,000 test images, under its own solver and others, by the solver."""
    device = next(network.parameters()).device
    batches = list(data.test_batches(2000))
    rows = compare_solvers(network, batches, [parse(text) for text in SOLVERS.split()], device)
    solvers = {row.solver: None if row.error else round(100 * row.accuracy, 2) for row in rows}
    return {"parameters": sum(p.numel() for p in network.parameters()), "solvers": solvers}


def show(rows: Rows) -> str:
    """What infinite depth costs and buys, and what remains of it under other solvers."""
    lines, others = [], []
    for name, runs in kinds(rows).items():
        done = [row for row in runs if row["share"] == 1]
        if not done:
            lines.append([name, "0", progress(runs), *["-"] * 4])
            continue
        ends = spread([row["evaluations"][-1] for row in done], 1)
        numbers = [spread([row["accuracy"] for row in done]), spread([row["loss"] for row in done], 3), ends]
        lines.append([name, str(len(done)), progress(runs), *numbers, f"{done[0]['parameters']:,}"])
        for solver in done[0]["solvers"]:
            found = [row["solvers"][solver] for row in done if row["solvers"][solver] is not None]
            others.append([name, f"`{solver}`", spread(found) if found else "failed"])
    headings = [
        "network",
        "seeds done",
        "epochs by seed",
        "test accuracy (%)",
        "test loss",
        "evaluations, last epoch",
        "parameters",
    ]
    shown = f"{table(headings, lines)}\n\n{caption(rows)}"
    return f"{shown}\n\n{table(['network', 'solver', 'accuracy, 2,000 images (%)'], others)}" if others else shown


def figure(rows: Rows) -> list[Panel]:
    """Evaluations over the epochs, of the first seed of every network."""
    lines = []
    for name, runs in kinds(rows).items():
        counts = runs[0]["evaluations"]
        lines.append(Line(name, list(range(1, len(counts) + 1)), counts))
    return [Axes("cost over training", "epoch", "evaluations of the field", lines)] if lines else []
