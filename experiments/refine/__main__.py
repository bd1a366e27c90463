"""Refinement during training against training at full depth: accuracy and time."""

import statistics
import time
from functools import partial

import pytorch_lightning as pl
import torch

from continuum.analysis.figures import Axes, Line
from continuum.training import Refine
from continuum.zoo import preresnet
from experiments.common import Experiment, Row, cifar10, evaluated, seeded, spread, table, train


class Clock(pl.Callback):
    """Seconds of processor time that each training epoch takes: on one thread, whatever else the machine is doing."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = time.process_time()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds.append(round(time.process_time() - self.start, 2))


def schedules(epochs: list[int]) -> dict[str, list[pl.Callback]]:
    """The callbacks of each: two refinements by 2, or one by 4 at the start."""
    refined = f"refined at epochs {' and '.join(map(str, epochs))}"
    return {"shallow throughout": [], refined: [Refine(epochs)], "deep from the start": [Refine([0], factor=4)]}


def run(experiment: Experiment, schedule: str, seed: int) -> Row:
    settings = experiment.settings
    model = seeded(partial(preresnet, settings["depth"], width=settings["width"]), seed)
    data, clock = cifar10(experiment.data, settings["images"], seed, validation=0.1), Clock()
    model = train(model, data, settings["epochs"], seed, callbacks=[clock, *schedules(settings["refine"])[schedule]])
    accuracy, loss = evaluated(model, data)
    layers = sum(int(flow.depth) for flow in model.flows)
    return {"accuracy": accuracy, "loss": loss, "layers": layers, "epoch_seconds": clock.seconds}


def report(experiment: Experiment) -> str:
    rows = []
    for schedule in schedules(experiment.settings["refine"]):
        runs = experiment.chosen(schedule=schedule)
        accuracies = [row["accuracy"] for row in runs]
        cells = [str(runs[0]["layers"]), ", ".join(f"{a:.2f}" for a in accuracies), spread(accuracies)]
        loss = statistics.mean(row["loss"] for row in runs)
        minutes = statistics.mean(sum(row["epoch_seconds"]) for row in runs) / 60
        rows.append([schedule, *cells, f"{loss:.3f}", f"{minutes:.1f}"])
    headings = ["schedule", "layers at the end", "test accuracy by seed (%)", "mean ± deviation", "test loss", "minutes of CPU"]
    return table(headings, rows)


def figure(experiment: Experiment) -> None:
    lines = []
    for schedule in schedules(experiment.settings["refine"]):
        runs = experiment.chosen(schedule=schedule)
        minutes = [sum(row["epoch_seconds"]) / 60 for row in runs]
        lines.append(Line(schedule, minutes, [row["accuracy"] for row in runs], "points"))
    experiment.plot([Axes("one point a seed", "minutes of processor time in training", "test accuracy (%)", lines)])


def main() -> None:
    torch.set_num_threads(1)
    experiment = Experiment(__file__, __doc__)
    for seed in experiment.settings["seeds"]:
        for schedule in schedules(experiment.settings["refine"]):
            experiment.run({"schedule": schedule, "seed": seed}, partial(run, experiment, schedule, seed))
    figure(experiment)
    experiment.publish(report(experiment))


if __name__ == "__main__":
    main()
