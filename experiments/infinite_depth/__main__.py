"""Infinite depth: an ODE-Net and a ResNet continuous in depth against residual networks of as many parameters.

One block, stepped once, has the parameters of an ODE-Net with that block as its field; n blocks have those of n nodes between
which the weights are interpolated. All have the same stem and head.
"""

from collections.abc import Callable
from functools import partial

import pytorch_lightning as pl

import continuum
from continuum import Expansion, Flow, PiecewiseConstant
from continuum.analysis import peak_memory
from continuum.analysis.figures import Axes, Line
from continuum.bases import Hat
from continuum.fields import Autonomous, ODENetBranch, PreActivation
from continuum.fields.branches import group_norm
from experiments.common import Experiment, History, Row, cifar10, evaluated, seeded, single_flow, spread, table, train


def networks(settings: Row) -> dict[str, Callable[[], continuum.Network]]:
    width, layers, tolerance = settings["width"], settings["layers"], settings["tolerance"]
    dopri5 = f"dopri5:rtol={tolerance:g},atol={tolerance:g}"

    def block() -> Autonomous:
        return Autonomous(PreActivation(width, width, norm=group_norm))

    return {
        "ResNet, 1 block": lambda: single_flow(Flow(ODENetBranch(width), "euler", depth=1), width),
        "ODE-Net": lambda: single_flow(Flow(ODENetBranch(width), dopri5, depth=1), width),
        f"ResNet, {layers} blocks": lambda: single_flow(
            Flow(PiecewiseConstant([block() for _ in range(layers)]), "euler", depth=layers), width
        ),
        "continuous ResNet": lambda: single_flow(
            Flow(Expansion([block() for _ in range(layers)], Hat(layers, depth=layers - 1)), dopri5, depth=layers - 1), width
        ),
    }


class Evaluations(History):
    """The mean number of evaluations a step in every epoch."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.counts: list[int] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self.counts.append(sum(flow.cost.evaluations for flow in pl_module.network.flows if flow.cost))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.append(sum(self.counts) / len(self.counts))


def run(experiment: Experiment, build: Callable[[], continuum.Network], seed: int) -> Row:
    settings = experiment.settings
    network = seeded(build, seed)
    data = cifar10(experiment.data, settings["images"], seed)
    watch = Evaluations()
    train(network, data, settings["epochs"], seed, settings["learning_rate"], settings["weight_decay"], callbacks=[watch])
    accuracy, loss = evaluated(network, data)
    images = next(data.test_batches(128))[0].to(next(network.parameters()).device)
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "accuracy": accuracy,
        "loss": loss,
        "evaluations": watch.epochs,
        "memory": peak_memory(lambda: network(images).sum().backward(), images.device) / 2**20,
    }


def report(experiment: Experiment) -> str:
    rows = []
    for name in networks(experiment.settings):
        runs = experiment.chosen(network=name)
        rows.append(
            [
                name,
                f"{runs[0]['parameters']:,}",
                ", ".join(f"{row['accuracy']:.2f}" for row in runs),
                spread([row["accuracy"] for row in runs]),
                spread([row["loss"] for row in runs], 3),
                spread([row["evaluations"][-1] for row in runs], 1),
                f"{sum(row['memory'] for row in runs) / len(runs):.0f}",
                spread([row["seconds"] / 60 for row in runs], 1),
            ]
        )
    headings = [
        "network",
        "parameters",
        "test accuracy by seed (%)",
        "mean ± deviation",
        "test loss",
        "evaluations, last epoch",
        "MiB of a step with 128 images",
        "minutes of processor time",
    ]
    return table(headings, rows)


def figure(experiment: Experiment) -> None:
    first = experiment.settings["seeds"][0]
    lines = []
    for name in networks(experiment.settings):
        counts = experiment.chosen(network=name, seed=first)[0]["evaluations"]
        lines.append(Line(name, list(range(1, len(counts) + 1)), counts))
    experiment.plot([Axes(f"cost over training, seed {first}", "epoch", "evaluations of the field", lines)])


def main() -> None:
    experiment = Experiment(__file__, __doc__)
    for seed in experiment.settings["seeds"]:
        for name, build in networks(experiment.settings).items():
            experiment.run({"network": name, "seed": seed}, partial(run, experiment, build, seed))
    figure(experiment)
    experiment.publish(report(experiment))


if __name__ == "__main__":
    main()
