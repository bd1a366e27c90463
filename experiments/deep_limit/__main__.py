"""The deep limit of training (arXiv 1810.11741): N layers x+ = x + (1/N) tanh(K_i x + b_i), trained at growing N, with and
without the penalty lambda (N sum_i |theta_{i+1} - theta_i|^2 + tau |theta_0|^2).

The state is an image itself, averaged to a few pixels, and its first ten entries are the logits: nothing else is learnt, so
that networks of all depths speak of the same equation. Layers start from independent random weights. If there is a limit, the
weights of N and 2N layers, as functions of depth on [0, 1], and their outputs approach each other.
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy
from torch.nn.utils import parameters_to_vector

from continuum import Autonomous, Euler, FixedStep, Flow, PiecewiseConstant
from continuum.analysis.figures import Axes, Line
from continuum.weights import depth_smoothness
from experiments.common import Experiment, Row, cifar10, spread, table

SCALE = 4.0
"""Of the logits, which tanh on [0, 1] could not move far otherwise."""


def images(experiment: Experiment) -> tuple[Tensor, Tensor, Tensor]:
    """States and labels to train on, and states of as many other images to compare outputs on."""
    settings = experiment.settings
    data = cifar10(experiment.data, settings["images"], seed=0, batch_size=settings["images"])
    states, _ = next(data.test_batches(settings["images"]))
    assert data.train_images is not None
    ((train, known),) = data.plain_batches(data.train_images, data.train_indices)

    def state(x: Tensor) -> Tensor:
        return adaptive_avg_pool2d(x, settings["pixels"]).flatten(1)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return state(train).to(device), known.to(device), state(states).to(device)


def run(experiment: Experiment, penalty: float, seed: int) -> Row:
    """Networks of all depths, and how far each is from the next deeper one."""
    data = images(experiment)
    trained = [train(experiment, layers, penalty, seed, data) for layers in experiment.settings["layers"]]
    rows = [row for row, _, _ in trained]
    for (row, weights, outputs), (_, finer, exact) in pairwise(trained):
        repeated = weights.repeat_interleave(len(finer) // len(weights), dim=0)
        row["weight_distance"] = float((repeated - finer).norm() / finer.norm())
        row["output_distance"] = float((outputs - exact).norm() / exact.norm())
    return {"networks": rows}


def train(
    experiment: Experiment, layers: int, penalty: float, seed: int, data: tuple[Tensor, Tensor, Tensor]
) -> tuple[Row, Tensor, Tensor]:
    """What it came to, the weights (layers, numbers of a layer), and the outputs on other images.

    L-BFGS on all images at once, in theta_0 and sqrt(N) (theta_{i+1} - theta_i), in which the penalty is a plain sum of
    squares: as many iterations do at every N.
    """
    settings = experiment.settings
    x, labels, others = data
    torch.manual_seed(seed)
    size = x.shape[1]
    field = PiecewiseConstant(
        [Autonomous(nn.Sequential(nn.Linear(size, size), nn.Tanh())).scaled(1 / layers) for _ in range(layers)]
    )
    flow = Flow(field, FixedStep(Euler()), depth=layers).to(x.device)
    start = torch.stack([parameters_to_vector(layer.parameters()) for layer in field.layers]).detach()
    first = start[0].clone().requires_grad_()
    rises = (start.diff(dim=0) * layers**0.5).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [first, rises], max_iter=settings["iterations"], history_size=30, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    def loss() -> Tensor:
        return cross_entropy(SCALE * functional_call(flow, named(flow, first, rises), (x,))[:, :10], labels)

    def objective() -> Tensor:
        optimizer.zero_grad()
        total = loss() + penalty * (rises.square().sum() + settings["tau"] * first.square().sum())
        total.backward()
        return total

    optimizer.step(objective)
    with torch.no_grad():
        for name, value in named(flow, first, rises).items():
            flow.get_parameter(name).copy_(value)
        weights = torch.stack([parameters_to_vector(layer.parameters()) for layer in field.layers])
        found: Row = {"layers": layers, "loss": float(loss()), "roughness": float(depth_smoothness(field, 0.0))}
        return found, weights, flow(others)


def named(flow: Flow, first: Tensor, rises: Tensor) -> dict[str, Tensor]:
    """The parameters of the layers from those of the first and the scaled differences."""
    layers = len(rises) + 1
    stacked = torch.cat([first[None], first + rises.cumsum(0) / layers**0.5])
    shapes = [(name, parameter.shape) for name, parameter in flow.named_parameters()]
    each = len(shapes) // layers
    found = {}
    for index, numbers in enumerate(stacked):
        own = shapes[index * each : (index + 1) * each]
        parts = numbers.split([shape.numel() for _, shape in own])
        found |= {name: part.view(shape) for (name, shape), part in zip(own, parts, strict=True)}
    return found


def report(experiment: Experiment) -> str:
    rows = []
    for penalty in experiment.settings["penalties"]:
        runs = [row["networks"] for row in experiment.chosen(penalty=penalty)]
        for index, layers in enumerate(experiment.settings["layers"]):
            cells = [
                spread([networks[index]["loss"] for networks in runs], 3),
                spread([n[index]["roughness"] for n in runs], 1),
            ]
            for distance in ("weight_distance", "output_distance"):
                values = [networks[index].get(distance) for networks in runs]
                cells.append("-" if None in values else spread(values, 3))
            rows.append([f"{penalty:g}, {layers}", *cells])
    headings = [
        "penalty, layers N",
        "training loss",
        "N sum of squared differences",
        "weights, distance to those of the next N",
        "outputs, distance to those of the next N",
    ]
    return table(headings, rows)


def figure(experiment: Experiment) -> None:
    layers = experiment.settings["layers"][:-1]
    panels = []
    for distance, title in (("weight_distance", "weights"), ("output_distance", "outputs")):
        lines = []
        for penalty in experiment.settings["penalties"]:
            runs = [row["networks"] for row in experiment.chosen(penalty=penalty)]
            means = [sum(networks[i][distance] for networks in runs) / len(runs) for i in range(len(layers))]
            lines.append(Line(f"penalty {penalty:g}" if penalty else "no penalty", layers, means))
            slope = [means[0] * layers[0] / n for n in layers]
        lines.append(Line("slope -1", layers, slope, "reference"))
        panels.append(Axes(title, "layers N", "relative distance to the next N", lines, "log", "log"))
    experiment.plot(panels)


def main() -> None:
    experiment = Experiment(__file__, __doc__)
    for seed in experiment.settings["seeds"]:
        for penalty in experiment.settings["penalties"]:
            experiment.run({"penalty": penalty, "seed": seed}, partial(run, experiment, penalty, seed))
    figure(experiment)
    experiment.publish(report(experiment))


if __name__ == "__main__":
    main()
