"""Which gradients to trust: the error, memory and time of each mode, and training with those of the adjoint equation.

Errors are those of the gradient of all parameters as one vector, |g - exact| / |exact|, for the field that the first run with
the first solver has learnt. Exact is the gradient of the equation itself (dopri8 at 1e-10, float64).
"""

import copy
from functools import partial

import pytorch_lightning as pl
import torch

from continuum import Coupled, FixedStep, Flow, PiecewiseConstant
from continuum.analysis import compare_gradients
from continuum.analysis.figures import Axes, Line
from continuum.fields import Autonomous, ODENetBranch, PreActivation
from continuum.fields.branches import group_norm
from continuum.schemes import Coupling
from continuum.solvers import parse
from experiments.common import Experiment, Row, cifar10, evaluated, seeded, single_flow, spread, table, train

MODES = ("direct", "checkpoint", "adjoint", "full_adjoint")


class Losses(pl.Callback):
    """The mean loss of every epoch."""

    def __init__(self) -> None:
        self.epochs: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        assert isinstance(outputs, dict)
        self.losses.append(float(outputs["loss"]))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.append(sum(self.losses) / len(self.losses))


def run(experiment: Experiment, solver: str, seed: int) -> Row:
    """Train; the first run also keeps the gradients of its flow in every mode."""
    settings = experiment.settings
    width = settings["width"]
    network = seeded(lambda: single_flow(Flow(ODENetBranch(width), solver, depth=1), width), seed)
    data = cifar10(experiment.data, settings["images"], seed)
    watch = Losses()
    train(network, data, settings["epochs"], seed, settings["learning_rate"], settings["weight_decay"], callbacks=[watch])
    accuracy, loss = evaluated(network, data)
    row: Row = {"losses": watch.epochs, "accuracy": accuracy, "loss": loss, "gradients": []}
    if seed == settings["seeds"][0] and solver == settings["training"][0]:
        images, _ = next(data.test_batches(8))
        row["gradients"] = gradients(network, images, settings["tolerances"])
    return row


def gradients(network: torch.nn.Module, images: torch.Tensor, tolerances: list[float]) -> list[Row]:
    """Every mode at every tolerance, and steps that are fixed: checkpointed, or undone."""
    network = copy.deepcopy(network).cpu()
    with torch.no_grad():
        x = network.stem(images.cpu())
    (flow,) = network.flows
    solvers = [parse(f"dopri5:rtol={tol:g},atol={tol:g},gradient={mode}") for mode in MODES for tol in tolerances]
    solvers += [parse("rk4:h=0.25"), parse("rk4:h=0.25,gradient=checkpoint")]
    rows = [{"field": "ODE-Net", **vars(row)} for row in compare_gradients(flow, x, solvers)]
    return rows + reversible(x)


def reversible(x: torch.Tensor) -> list[Row]:
    """Sixteen coupled layers, which are not learnt, with states that are stored and states that are rebuilt."""
    half = x.shape[1] // 2

    def branch() -> Autonomous:
        return Autonomous(PreActivation(half, half, norm=group_norm))

    torch.manual_seed(0)
    flow = Flow(PiecewiseConstant([Coupled(branch(), branch()) for _ in range(16)]), FixedStep(Coupling()), depth=16)
    solvers = [FixedStep(Coupling()), FixedStep(Coupling(), gradient="reversible")]
    return [{"field": "coupled layers", **vars(row)} for row in compare_gradients(flow, x, solvers)]


def report(experiment: Experiment) -> str:
    settings = experiment.settings
    first = experiment.chosen(trained=settings["training"][0], seed=settings["seeds"][0])[0]
    rows = [
        [
            f"{row['field']}, `{row['solver']}`",
            "-" if row["error"] is None else f"{row['error']:.1e}",
            "-" if row["step_error"] is None else f"{row['step_error']:.1e}",
            str(row["evaluations"]),
            str(row["backward_evaluations"]),
            f"{row['memory']:.1f}",
            f"{1000 * row['seconds']:.0f}",
        ]
        for row in first["gradients"]
    ]
    headings = [
        "field and solver",
        "error against the equation's gradient",
        "against that of the same steps",
        "evaluations forward",
        "and on the way back",
        "MiB",
        "ms",
    ]
    modes = table(headings, rows)
    rows = []
    for trained in settings["training"]:
        runs = experiment.chosen(trained=trained)
        accuracies = [row["accuracy"] for row in runs]
        cells = [spread([row["losses"][-1] for row in runs], 3), ", ".join(f"{a:.2f}" for a in accuracies), spread(accuracies)]
        rows.append([f"`{trained}`", *cells, spread([row["seconds"] / 60 for row in runs], 1)])
    headings = [
        "trained with",
        "training loss, last epoch",
        "test accuracy by seed (%)",
        "mean ± deviation",
        "minutes of processor time",
    ]
    return f"{modes}\n\n{table(headings, rows)}"


def figure(experiment: Experiment) -> None:
    settings = experiment.settings
    epochs = list(range(1, settings["epochs"] + 1))
    curves = []
    for trained in settings["training"]:
        runs = [row["losses"] for row in experiment.chosen(trained=trained)]
        curves.append(Line(trained, epochs, [sum(values) / len(values) for values in zip(*runs, strict=True)]))
    experiment.plot([Axes("mean over the seeds", "epoch", "training loss", curves)])


def main() -> None:
    experiment = Experiment(__file__, __doc__)
    for seed in experiment.settings["seeds"]:
        for solver in experiment.settings["training"]:
            experiment.run({"trained": solver, "seed": seed}, partial(run, experiment, solver, seed))
    figure(experiment)
    experiment.publish(report(experiment))


if __name__ == "__main__":
    main()
