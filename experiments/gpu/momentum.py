"""ResNet against LM-ResNet by the published recipe, on CIFAR-10 at four depths and on Fashion-MNIST at one."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import continuum
from continuum.analysis.figures import Axes, Line, Panel
from continuum.training import ImageData
from experiments.common import Row, spread, table
from experiments.gpu.jobs import Job, Part, Rows, Settings
from experiments.gpu.trainings import PUBLISHED, SMALL, Training, caption, cifar10_images, fashion_images, job, nothing_more
from experiments.momentum.__main__ import Frictions

NETWORKS = {"preresnet": continuum.zoo.preresnet, "lm_resnet": continuum.zoo.lm_resnet}
SEEDS = (0, 1, 2)
EPOCH = 2.0
"""Seconds on an H100, at 20 layers."""


def momentum(settings: Settings) -> Part:
    depths = (14,) if settings.quick else (20, 32, 44, 56)
    return Part("momentum", list(jobs(settings, depths, cifar10_images, 3)), show, figure, "cifar10")


def fashion(settings: Settings) -> Part:
    depths, channels = (14,) if settings.quick else (20,), 3 if settings.data is None else 1
    return Part(
        "fashion", list(jobs(settings, depths, fashion_images, channels, "Fashion-MNIST, ")), show, figure, "FashionMNIST"
    )


def jobs(
    settings: Settings, depths: Sequence[int], images: Callable[[Settings, int, int], ImageData], channels: int, of: str = ""
) -> Iterator[Job]:
    """Every seed of every network, the shallow ones first."""
    recipe, seeds, width = (SMALL, (0,), 8) if settings.quick else (PUBLISHED, SEEDS, 16)
    for depth in depths:
        for network, build in NETWORKS.items():
            for seed in seeds:
                kind = f"{of}{network}({depth})"
                name = f"{kind}, seed {seed}"
                training = Training(
                    partial(build, depth, width=width, in_channels=channels),
                    partial(images, settings, seed, recipe.batch_size),
                    recipe,
                    seed,
                    settings.checkpoints(name),
                    settings.chosen_device(),
                    (lambda: {"k": Frictions()}) if network == "lm_resnet" else dict,
                )
                yield job(name, kind, EPOCH * depth / 20 * recipe.epochs, training, nothing_more)


def kinds(rows: Rows) -> dict[str, list[Row]]:
    """The rows of each network, whose seeds are what its rows differ in."""
    found: dict[str, list[Row]] = {}
    for name, row in rows.items():
        found.setdefault(name.rpartition(", seed ")[0], []).append(row)
    return found


def progress(rows: Sequence[Row]) -> str:
    """How far the trainings are that have begun."""
    return ", ".join(str(row["epochs"]) for row in rows) + f" of {rows[0]['of']}"


def show(rows: Rows) -> str:
    lines = []
    for name, runs in kinds(rows).items():
        done = [row for row in runs if row["share"] == 1]
        numbers = ["-"] * 3
        if done:
            accuracies = [row["accuracy"] for row in done]
            by_seed = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
            numbers = [by_seed, spread(accuracies), spread([row["loss"] for row in done], 3)]
        lines.append([name, str(len(done)), progress(runs), *numbers])
    headings = ["network", "seeds done", "epochs by seed", "test accuracy by seed (%)", "mean ± deviation", "test loss"]
    return f"{table(headings, lines)}\n\n{caption(rows)}"


def figure(rows: Rows) -> list[Panel]:
    """k of every layer of the deepest network, after and during training."""
    found = {name: [row for row in runs if row["share"] == 1] for name, runs in kinds(rows).items() if "lm_resnet" in name}
    found = {name: runs for name, runs in found.items() if runs}
    if not found:
        return []
    name, runs = list(found.items())[-1]
    layers = list(range(1, len(runs[0]["k"][-1]) + 1))
    over_depth = [Line(f"seed {row['seed']}", layers, row["k"][-1]) for row in runs]
    epochs = list(range(len(runs[0]["k"])))
    over_training = [Line(f"layer {layer}", epochs, [k[layer - 1] for k in runs[0]["k"]]) for layer in layers]
    return [
        Axes(f"{name}: k after training", "layer with memory, from the first to the last", "k", over_depth),
        Axes(f"k during training, seed {runs[0]['seed']}", "epoch", "k", over_training),
    ]
