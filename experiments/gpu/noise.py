"""Noise in training at published size: without it, as published, and as its SDE with h = 1; losses are those of the drift."""

from functools import partial

import continuum
from continuum.training import ImageData
from experiments.common import Row, spread, table
from experiments.gpu.jobs import Part, Rows, Settings
from experiments.gpu.momentum import SEEDS, kinds, progress
from experiments.gpu.trainings import PUBLISHED, SMALL, Training, caption, cifar10_images, job
from experiments.noise.__main__ import CONFIGURATIONS, on_training_images

NETWORKS = {"stochastic depth": (56, 16, 12.0), "shake-shake": (26, 32, 20.0)}
"""Layers, width, and seconds an epoch on an H100."""

NOISE = ("no noise", "discrete", "SDE, h = 1")


def noise(settings: Settings) -> Part:
    recipe, seeds = (SMALL, (0,)) if settings.quick else (PUBLISHED, SEEDS)
    jobs = []
    for network, (depth, width, epoch) in NETWORKS.items():
        depth, width = (14, 8) if settings.quick else (depth, width)
        for how in NOISE:
            for seed in seeds:
                kind = f"{network}, {how}"
                name = f"{kind}, seed {seed}"
                training = Training(
                    partial(CONFIGURATIONS[network][how], depth, width=width),
                    partial(cifar10_images, settings, seed, recipe.batch_size),
                    recipe,
                    seed,
                    settings.checkpoints(name),
                    settings.chosen_device(),
                )
                jobs.append(job(name, kind, epoch * recipe.epochs, training, of_the_drift))
    return Part("noise", jobs, show, data="cifar10")


def of_the_drift(network: continuum.Network, data: ImageData) -> Row:
    """Accuracy in % and loss on the images of training, neither shifted nor mirrored."""
    accuracy, loss = on_training_images(network, data)
    return {"train_accuracy": accuracy, "train_loss": loss}


def show(rows: Rows) -> str:
    lines = []
    for name, runs in kinds(rows).items():
        done = [row for row in runs if row["share"] == 1]
        losses = [[row["train_loss"] for row in done], [row["loss"] for row in done]]
        gaps = [test - training for training, test in zip(*losses, strict=True)]
        numbers = (
            [spread([row["accuracy"] for row in done]), *(spread(values, 3) for values in (*losses, gaps))] if done else []
        )
        lines.append([name, str(len(done)), progress(runs), *(numbers or ["-"] * 4)])
    headings = ["network, noise", "seeds done", "epochs by seed", "test accuracy (%)", "training loss", "test loss", "gap"]
    return f"{table(headings, lines)}\n\n{caption(rows)}"
