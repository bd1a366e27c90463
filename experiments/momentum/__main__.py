"""ResNet against LM-ResNet, x_{n+1} = (1 - k_n) x_n + k_n x_{n-1} + f_n(x_n): accuracy, and the k that were learnt."""

from functools import partial

import pytorch_lightning as pl

import continuum
from continuum.analysis import frictions
from continuum.analysis.figures import Axes, Line
from continuum.training import Steps
from experiments.common import Experiment, History, Row, cifar10, evaluated, seeded, spread, table, train

NETWORKS = {"ResNet": continuum.zoo.preresnet, "LM-ResNet": continuum.zoo.lm_resnet}


class Frictions(History):
    """The k of every layer, before training and after every epoch."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.epochs:
            self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.append([friction.k for friction in frictions(pl_module.network)])


def run(experiment: Experiment, network: str, depth: int, seed: int) -> Row:
    settings = experiment.settings
    model = seeded(partial(NETWORKS[network], depth, width=settings["width"]), seed)
    data = cifar10(experiment.data, settings["images"], seed)
    schedule = Steps(settings["milestones"]) if settings["milestones"] else None
    watch = Frictions()
    train(
        model,
        data,
        settings["epochs"],
        seed,
        learning_rate=settings["learning_rate"],
        weight_decay=settings["weight_decay"],
        schedule=schedule,
        callbacks=[watch],
    )
    accuracy, loss = evaluated(model, data)
    places = [f"{friction.flow}, layer {friction.layer}" for friction in frictions(model)]
    return {"accuracy": accuracy, "loss": loss, "places": places, "k": watch.epochs}


def report(experiment: Experiment) -> str:
    rows = []
    for depth in experiment.settings["depths"]:
        for network in NETWORKS:
            runs = experiment.chosen(network=network, depth=depth)
            accuracies = [row["accuracy"] for row in runs]
            cells = [", ".join(f"{a:.2f}" for a in accuracies), spread(accuracies), spread([row["loss"] for row in runs], 3)]
            rows.append([f"{network}-{depth}", *cells])
    return table(["network", "test accuracy by seed (%)", "mean ± deviation", "test loss"], rows)


def figure(experiment: Experiment) -> None:
    deepest = max(experiment.settings["depths"])
    runs = experiment.chosen(network="LM-ResNet", depth=deepest)
    over_depth = [Line(f"seed {row['seed']}", list(range(1, len(row["places"]) + 1)), row["k"][-1]) for row in runs]
    epochs = list(range(len(runs[0]["k"])))
    over_training = [Line(place, epochs, [k[index] for k in runs[0]["k"]]) for index, place in enumerate(runs[0]["places"])]
    experiment.plot(
        [
            Axes("k after training", "layer with memory, from the first to the last", "k", over_depth),
            Axes("k during training, seed 0", "epoch", "k", over_training),
        ]
    )


def main() -> None:
    experiment = Experiment(__file__, __doc__)
    for seed in experiment.settings["seeds"]:
        for depth in experiment.settings["depths"]:
            for network in NETWORKS:
                key = {"network": network, "depth": depth, "seed": seed}
                experiment.run(key, partial(run, experiment, network, depth, seed))
    figure(experiment)
    experiment.publish(report(experiment))


if __name__ == "__main__":
    main()
