"""Noise in training, discrete and as an SDE: accuracy, loss and the gap between test and training of two networks."""

import statistics
from collections.abc import Callable
from functools import partial

import torch

from continuum import Network
from continuum.analysis.figures import Axes, Line
from continuum.training import ImageData
from continuum.zoo import shake_shake, stochastic_depth_resnet
from experiments.common import Experiment, Row, cifar10, evaluated, scored, seeded, spread, table, train

BROWNIAN = "euler_maruyama:increments=brownian,h="
CONFIGURATIONS: dict[str, dict[str, Callable[..., Network]]] = {
    "stochastic depth": {
        "no noise": partial(stochastic_depth_resnet, last=1.0),
        "discrete": stochastic_depth_resnet,
        "SDE, h = 1": partial(stochastic_depth_resnet, solver=BROWNIAN + "1"),
        "SDE, h = 1/2": partial(stochastic_depth_resnet, solver=BROWNIAN + "0.5"),
    },
    "shake-shake": {
        "no noise": partial(shake_shake, forward_mode="even", backward_mode="even"),
        "discrete": shake_shake,
        "SDE, h = 1": partial(shake_shake, backward_mode="keep", solver=BROWNIAN + "1"),
    },
}


def run(experiment: Experiment, network: str, noise: str, seed: int) -> Row:
    settings = experiment.settings["networks"][network]
    build = partial(CONFIGURATIONS[network][noise], settings["depth"], width=settings["width"])
    model = seeded(build, seed)
    data = cifar10(experiment.data, experiment.settings["images"], seed, validation=0.1)
    train(model, data, settings["epochs"], seed)
    accuracy, loss = evaluated(model, data)
    train_accuracy, train_loss = on_training_images(model, data)
    return {"accuracy": accuracy, "loss": loss, "train_accuracy": train_accuracy, "train_loss": train_loss}


def on_training_images(network: Network, data: ImageData) -> tuple[float, float]:
    """Accuracy in % and loss of the drift on the images of training, neither shifted nor mirrored."""
    images = data.train_images
    assert images is not None
    return scored(network, data.plain_batches(images, data.train_indices))


def report(experiment: Experiment) -> str:
    rows = []
    for network, configurations in CONFIGURATIONS.items():
        for noise in configurations:
            runs = experiment.chosen(network=network, noise=noise)
            accuracies = [row["accuracy"] for row in runs]
            losses = [[row["train_loss"] for row in runs], [row["loss"] for row in runs]]
            gaps = [test - training for training, test in zip(*losses, strict=True)]
            cells = [", ".join(f"{a:.2f}" for a in accuracies), spread(accuracies)]
            minutes = statistics.mean(row["seconds"] for row in runs) / 60
            rows.append([network, noise, *cells, *(spread(values, 3) for values in (*losses, gaps)), f"{minutes:.1f}"])
    headings = ["network", "noise", "test accuracy by seed (%)", "mean ± deviation", "training loss", "test loss", "gap"]
    return table([*headings, "minutes"], rows)


def figure(experiment: Experiment) -> None:
    panels = []
    for network, configurations in CONFIGURATIONS.items():
        lines = []
        for noise in configurations:
            runs = experiment.chosen(network=network, noise=noise)
            lines.append(Line(noise, [row["train_loss"] for row in runs], [row["loss"] for row in runs], "points"))
        ends = [f(x for line in lines for x in line.x) for f in (min, max)]
        lines.append(Line("no gap", ends, ends, "reference"))
        panels.append(Axes(network, "training loss", "test loss", lines))
    experiment.plot(panels)


def main() -> None:
    torch.set_num_threads(1)
    experiment = Experiment(__file__, __doc__)
    for network, configurations in CONFIGURATIONS.items():
        for seed in experiment.settings["seeds"]:
            for noise in configurations:
                key = {"network": network, "noise": noise, "seed": seed}
                experiment.run(key, partial(run, experiment, network, noise, seed))
    figure(experiment)
    experiment.publish(report(experiment))


if __name__ == "__main__":
    main()
