"""Fixed against adaptive: an ODE-Net trained with one solver, tested with all of them (arXiv 2007.15386).

Below a critical step size the accuracy is that of the equation, whatever solves it; above it the step is part of the network.
"""

import statistics
from functools import partial

from continuum import Flow
from continuum.analysis.figures import Matrix
from continuum.fields import ODENetBranch
from experiments.common import Experiment, Row, cifar10, evaluated, seeded, single_flow, spread, table, train

SAME = 1.0
"""Accuracies that differ by no more than so many points, on average over the seeds, count as the same."""


def run(experiment: Experiment, solver: str, seed: int) -> Row:
    settings = experiment.settings
    width = settings["width"]
    network = seeded(lambda: single_flow(Flow(ODENetBranch(width), solver, depth=settings["depth"]), width), seed)
    data = cifar10(experiment.data, settings["images"], seed)
    train(network, data, settings["epochs"], seed, settings["learning_rate"], settings["weight_decay"])
    accuracies = {}
    for other in settings["testing"]:
        accuracies[other], _ = evaluated(network.with_solver(other), data, settings["test_images"])
    return {"accuracies": accuracies}


def mean(experiment: Experiment, trained: str, other: str) -> float:
    return statistics.mean(row["accuracies"][other] for row in experiment.chosen(trained=trained))


def report(experiment: Experiment) -> str:
    settings = experiment.settings
    reference, rows = settings["reference"], []
    for trained in settings["training"]:
        runs = [row["accuracies"] for row in experiment.chosen(trained=trained)]
        own, exact = ([accuracies[other] for accuracies in runs] for other in (trained, reference))
        lost = [a - b for a, b in zip(own, exact, strict=True)]
        finer = [
            abs(mean(experiment, trained, trained) - mean(experiment, trained, other))
            for other in finer_than(trained, settings)
        ]
        verdict = "yes" if max(finer) <= SAME else "no"
        rows.append([f"`{trained}`", spread(own), spread(exact), spread(lost), f"{max(finer):.2f}", verdict])
    headings = [
        "trained with",
        "tested with the same (%)",
        f"with `{reference}` (%)",
        "lost (points)",
        "largest change under a finer solver (points)",
        f"an equation (at most {SAME:g} point)",
    ]
    return table(headings, rows)


def finer_than(trained: str, settings: Row) -> list[str]:
    """The tested solvers that come closer to the equation: those of the same method with smaller steps, and the reference."""
    method = trained.partition(":")[0]
    same = [other for other in settings["testing"] if other.partition(":")[0] == method]
    return [*same[same.index(trained) + 1 :], settings["reference"]]


def figure(experiment: Experiment) -> None:
    settings = experiment.settings
    values = [[mean(experiment, trained, other) for other in settings["testing"]] for trained in settings["training"]]
    panel = Matrix(
        "test accuracy (%), mean over the seeds",
        "tested with",
        "trained with",
        settings["testing"],
        settings["training"],
        values,
    )
    experiment.plot([panel])


def main() -> None:
    experiment = Experiment(__file__, __doc__)
    for seed in experiment.settings["seeds"]:
        for solver in experiment.settings["training"]:
            experiment.run({"trained": solver, "seed": seed}, partial(run, experiment, solver, seed))
    figure(experiment)
    experiment.publish(report(experiment))


if __name__ == "__main__":
    main()
