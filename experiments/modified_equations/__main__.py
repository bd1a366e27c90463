"""Modified equations on a trained field: the defect of one step, measured, beside the leading term that predicts it
(arXiv 1710.10121).

Networks of one smooth field are trained with Euler's step (ResNet), the two-step scheme with a learnt k (LM-ResNet), poly-2
(PolyNet) and leapfrog. From the states that reach the flow, each scheme takes one step of h, after an exact past.
"""

import statistics
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import jvp

from continuum import Autonomous, Field, FixedStep, Flow
from continuum.analysis.convergence import copied
from continuum.analysis.defects import SOLUTION, Defect, scheme_defects
from continuum.analysis.equations import method_of
from continuum.analysis.figures import Axes, Line
from continuum.fields import Momentum, SecondOrder
from continuum.fields.branches import conv3x3
from continuum.schemes import Euler, Leapfrog, LinearTwoStep, NeumannSeries, Scheme
from continuum.types import State, Time
from experiments.common import Experiment, Row, cifar10, evaluated, seeded, single_flow, table, train

SCHEMES: dict[str, Scheme] = {
    "ResNet": Euler(),
    "LM-ResNet": LinearTwoStep(),
    "PolyNet": NeumannSeries(2),
    "leapfrog": Leapfrog(),
}
COMPOSED = "PolyNet, not linearised"
EQUATIONS = {name: str(method_of(scheme)) for name, scheme in SCHEMES.items()} | {COMPOSED: "x' = f(x) + f(0) + O(h)"}


class Linearised(Field):
    """y' = f'(x) y at the states x."""

    def __init__(self, field: Field, x: Tensor) -> None:
        super().__init__()
        self.field = field
        self.register_buffer("x", x)

    def forward(self, t: Time, x: State) -> State:
        return jvp(lambda state: self.field(t, state), (self.x,), (x,))[1]


def field_of(scheme: Scheme, width: int) -> Field:
    """conv3x3-tanh-conv3x3 in the form that the scheme steps; smooth, so that it has all derivatives."""
    channels = width // 2 if isinstance(scheme, Leapfrog) else width
    branch = Autonomous(nn.Sequential(conv3x3(channels, channels), Bias(channels), nn.Tanh(), conv3x3(channels, channels)))
    match scheme:
        case LinearTwoStep():
            return Momentum(branch)
        case Leapfrog():
            return SecondOrder(branch)
        case _:
            return branch


class Bias(nn.Module):
    """x + b, a b for each channel, at first uniform in (-1/2, 1/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.rand(channels, 1, 1) - 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def run(experiment: Experiment, name: str, seed: int) -> Row:
    settings, scheme = experiment.settings, SCHEMES[name]
    width, solver = settings["width"], FixedStep(scheme, h=settings["h"])
    network = seeded(lambda: single_flow(Flow(field_of(scheme, width), solver, depth=1), width), seed)
    data = cifar10(experiment.data, settings["images"], seed, settings["batch"])
    train(network, data, settings["epochs"], seed, settings["learning_rate"], settings["weight_decay"])
    accuracy, _ = evaluated(network, data, settings["test_images"])
    network.cpu()
    with torch.no_grad():
        x = network.stem(next(data.test_batches(settings["states"]))[0])
    (flow,) = network.flows
    field = flow.field
    found = {name: scheme_defects(Linearised(field, x) if name == "PolyNet" else field, x, scheme, settings["sizes"])}
    if name == "PolyNet":
        found[COMPOSED] = composed(field, x, scheme, settings["sizes"])
    k = float(field.k) if isinstance(field, Momentum) else None
    size = float(x.double().norm())
    return {"accuracy": accuracy, "k": k, "defects": {name: [relative(d, size) for d in row] for name, row in found.items()}}


@torch.no_grad()
def composed(field: Field, x: Tensor, scheme: Scheme, sizes: list[float]) -> list[Defect]:
    """The defects of poly-2 on the field as it is, beside h f(0), for f(h f(x)) = f(0) + O(h)."""
    field, x = copied(field), x.double()
    found = []
    for h in sizes:
        exact = Flow(field, SOLUTION, depth=1).trajectory(x, (0.0, h))[-1]
        measured = scheme.step(field, 0.0, x, h, ())[0] - exact
        predicted = h * field(0.0, torch.zeros_like(x))
        difference = float((measured - predicted).norm() / predicted.norm())
        found.append(Defect(h, float(measured.norm()), float(predicted.norm()), difference))
    return found


def relative(defect: Defect, size: float) -> Row:
    """A defect as numbers, relative to the size of the states."""
    return {"measured": defect.measured / size, "predicted": defect.predicted / size, "difference": defect.relative_difference}


def values(experiment: Experiment, name: str, place: int, number: str) -> list[float]:
    """A number of every seed, at the size with this place in the list."""
    return [row["defects"][name][place][number] for row in experiment.runs if name in row["defects"]]


def mean(experiment: Experiment, name: str, number: str) -> list[float]:
    """The mean over the seeds at every size."""
    places = range(len(experiment.settings["sizes"]))
    return [statistics.mean(values(experiment, name, place, number)) for place in places]


def significant(values: list[float]) -> str:
    """The mean and the standard deviation, to as many digits as they are worth."""
    return f"{statistics.mean(values):.2g} ± {statistics.stdev(values):.1g}"


def report(experiment: Experiment) -> str:
    rows = []
    for name, equation in EQUATIONS.items():
        for place, h in enumerate(experiment.settings["sizes"]):
            if place % 2 == 0:
                measured, predicted = (values(experiment, name, place, number) for number in ("measured", "predicted"))
                difference = values(experiment, name, place, "difference")
                cells = [f"{statistics.mean(row):.2e}" for row in (measured, predicted)]
                rows.append([name, f"`{equation}`", f"{h:g}", *cells, significant(difference)])
    ks = ", ".join(f"{row['k']:.3f}" for row in experiment.chosen(scheme="LM-ResNet"))
    headings = ["network", "modified equation", "h", "defect, measured", "predicted", "relative difference"]
    accuracy = statistics.mean(row["accuracy"] for row in experiment.runs)
    notes = f"Defects relative to the state, means over the seeds. k after training: {ks}. Mean test accuracy: {accuracy:.0f}%."
    return f"{table(headings, rows)}\n\n{notes}"


def figure(experiment: Experiment) -> None:
    sizes = experiment.settings["sizes"]
    measured = [Line(name, sizes, mean(experiment, name, "measured"), "points") for name in EQUATIONS]
    # A name that begins with _ is left out of the legend.
    names = dict(zip(EQUATIONS, ["predicted", *["_predicted"] * (len(EQUATIONS) - 1)], strict=True))
    predicted = [Line(text, sizes, mean(experiment, name, "predicted"), "reference") for name, text in names.items()]
    differences = [Line(name, sizes, mean(experiment, name, "difference")) for name in EQUATIONS]
    finest = differences[0].y[-1]
    slope = Line("slope 1", sizes, [finest * h / sizes[-1] for h in sizes], "reference")
    panels = [
        Axes("defect of one step", "h (layers)", "relative to the state", [*measured, *predicted], "log", "log"),
        Axes("measured and predicted", "h (layers)", "relative difference", [*differences, slope], "log", "log"),
    ]
    experiment.plot(panels)


def main() -> None:
    experiment = Experiment(__file__, __doc__)
    for seed in experiment.settings["seeds"]:
        for name in SCHEMES:
            experiment.run({"scheme": name, "seed": seed}, partial(run, experiment, name, seed))
    figure(experiment)
    experiment.publish(report(experiment))


if __name__ == "__main__":
    main()
