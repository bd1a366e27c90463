"""A stochastic network beside its SDE: the noise of every layer, and the weak error E g(network) - E g(SDE) of its logits."""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from continuum import files
from continuum.analysis.compare import paired
from continuum.analysis.stochastic import SDE, CoupledPath, forked_devices, mean_of, run_coupled
from continuum.flow import Flow
from continuum.models import Network
from continuum.models.flows import with_flows
from continuum.noise import Law, noise_only
from continuum.noise.base import has_noise, noise_of
from continuum.schemes import EulerMaruyama, StochasticScheme
from continuum.schemes.base import inside, scheme_of
from continuum.solvers import FixedStep
from continuum.solvers.base import evaluating
from continuum.types import Images, State


@dataclass(frozen=True)
class LayerNoise:
    """The noise of a layer: the law of eta, and the first four moments of the increment xi = (eta - mean) / deviation.

    `confidence` holds the half-widths of moments that were sampled, zeros where they are exact. `bound` is sqrt(h), h = 1 / L
    in a flow of L layers. A deterministic layer, or one that always counts, has no noise: its moments are NaN.
    """

    layer: str
    depth: int
    law: str
    mean: float
    deviation: float
    moments: tuple[float, ...]
    confidence: tuple[float, ...]
    bound: float

    @property
    def noisy(self) -> bool:
        return self.deviation > 0

    @property
    def asymmetry(self) -> float:
        """E (eta - mean)^3 / variance: 1 - 2 p for Bernoulli(p)."""
        return self.moments[2] * self.deviation

    @property
    def small(self) -> bool:
        """|E xi^3| <= sqrt(h): the condition E xi^3 = O(sqrt h) of weak order 1 with a constant of one.

        A convention. What the O asks is how the moment falls as a family of networks grows deeper; one network cannot say.
        """
        return not self.noisy or abs(self.moments[2]) <= self.bound


@dataclass(frozen=True)
class Gap:
    """How far two expectations of g are apart, E g of one minus E g of the other, with its 95% half-width.

    The half-width is that of the noise; an accuracy's has that of other images of this kind too, paired by image, for a share
    of right answers on a hundred images says little about the next hundred.

    `between` "h=1" and "h=1/2": the network, and the same with half its step, minus the SDE. "evaluation": the network as it
    evaluates minus the network with its noise. `value` is the E g subtracted, `number` the class.
    """

    test: str
    number: int
    between: str
    value: float
    error: float
    confidence: float


@dataclass(frozen=True)
class WeakReport:
    """The noise of every layer of a network's flows, and how far the network is from its SDE."""

    layers: list[LayerNoise]
    gaps: list[Gap]

    def largest(self) -> dict[str, dict[str, Gap]]:
        """Of every test its gaps, by `between`, for the class that is furthest from the SDE at h = 1."""
        found: dict[str, dict[str, Gap]] = {}
        for test in dict.fromkeys(gap.test for gap in self.gaps):
            gaps = [gap for gap in self.gaps if gap.test == test]
            worst = max((gap for gap in gaps if gap.between == "h=1"), key=lambda gap: abs(gap.error))
            found[test] = {gap.between: gap for gap in gaps if gap.number == worst.number}
        return found


@torch.no_grad()
def weak_report(
    network: Network, images: Images, paths: int, steps_per_layer: int, seed: int, labels: Tensor | None = None
) -> WeakReport:
    """How far `network` with its noise, one step of h = 1 a layer, is from the SDE on these images; the rest evaluates.

    g are a class's logit, its square, its cube and its probability, averaged over the images; with `labels` also accuracy. The
    SDE is Euler-Maruyama's method with `steps_per_layer` Brownian steps a layer, whose own error, O(1 / steps_per_layer), is in
    the gaps. All sides have common normals in a flow and the same draws in a transition, which is no step of an equation; a
    flow without noise runs as it is. Under `Momentum` the network takes its two-step scheme, the SDE (1 + k) dx = f dt + g dB.

    Raises:
        TypeError: a network without noise.
        ValueError: fewer than two paths, an odd `steps_per_layer`, or a flow with noise of no whole number of layers.
    """
    if not network.stochastic:
        raise TypeError(
            "this network has no noise, so there is no SDE for it to be near to: no field in it is a StochasticField"
        )
    if paths < 2 or steps_per_layer < 2 or steps_per_layer % 2:
        raise ValueError(f"needs two or more paths and an even number of steps a layer, not {paths} and {steps_per_layer}")
    if wrong := [flow.depth for flow in network.flows if has_noise(flow) and flow.depth != round(flow.depth)]:
        raise ValueError(f"one step a layer needs flows of whole depths, not {wrong[0]:g}")
    # One step a layer, whatever the network's own solver: what it evaluates is then comparable.
    network = with_flows(network, lambda flow: flow.with_solver(FixedStep(_own(flow))) if has_noise(flow) else flow)
    generator = torch.Generator(images.device).manual_seed(seed)
    with torch.random.fork_rng(devices=forked_devices(images)), evaluating(network), noise_only(network):
        layers = _layers(network, images.dtype, seed)
        evaluated = _tests(network.drift()(images), labels)
        sampled = [
            [_tests(logits, labels) for logits in _logits(network, images, steps_per_layer, generator)] for _ in range(paths)
        ]
    gaps: list[Gap] = []
    for name, expected in evaluated.items():
        one, half, sde = (torch.stack([path[side][name] for path in sampled]) for side in range(3))
        for between, of, base in (("h=1", one, sde), ("h=1/2", half, sde), ("evaluation", expected.expand_as(one), one)):
            if name == "accuracy":
                gaps.append(_accuracy_gap(between, of, base))
                continue
            for number in range(len(expected)):
                value = float(base[:, number].mean())
                gaps.append(Gap(name, number, between, value, *mean_of(of[:, number] - base[:, number])))
    return WeakReport(layers, gaps)


def _accuracy_gap(between: str, of: Tensor, base: Tensor) -> Gap:
    """The gap of accuracies from which images are right under which path of the noise, (paths, images)."""
    differences = of - base
    error, by_noise = mean_of(differences.mean(dim=1))
    _, low, high = paired(differences.mean(dim=0))
    return Gap("accuracy", 0, between, float(base.mean()), error, math.hypot(by_noise, (high - low) / 2))


def _tests(logits: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """The averages over images of every g, (classes,) each; of accuracy, which images are right, (images,)."""
    logits = logits.double()
    found = {"logit": logits, "logit squared": logits**2, "logit cubed": logits**3, "probability": logits.softmax(1)}
    averages = {name: values.mean(0) for name, values in found.items()}
    return averages if labels is None else averages | {"accuracy": (logits.argmax(1) == labels).double()}


def _logits(network: Network, images: Images, steps_per_layer: int, generator: torch.Generator) -> list[Tensor]:
    """Logits by common noise: of the network, of the network at h = 1/2, of the SDE. The three are one batch of three times
    as many images."""

    def end(flow: Flow, x: State, previous: State | None) -> State:
        sides = list(zip(x.chunk(3), (None,) * 3 if previous is None else previous.chunk(3), strict=True))
        noisy = has_noise(flow)
        return torch.cat(_flowed(flow, sides, steps_per_layer, generator) if noisy else [flow(*side) for side in sides])

    stages = [stage if isinstance(stage, Flow) else _Alike(stage, generator) for stage in network.stages]
    *_, (_, _, logits) = Network(network.stem, stages, network.head).walk(torch.cat([images] * 3), end)
    return list(logits.chunk(3))


class _Alike(nn.Module):
    """A transition of three sides, which draw the same."""

    def __init__(self, stage: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        self.stage, self.generator = stage, generator

    def forward(self, x: State) -> State | tuple[State, ...]:
        seed = int(torch.randint(2**31, (1,), generator=self.generator, device=x.device))
        after = []
        for side in x.chunk(3):
            torch.manual_seed(seed)
            after.append(self.stage(side))
        return tuple(map(torch.cat, zip(*after, strict=True))) if isinstance(after[0], tuple) else torch.cat(after)


def _flowed(
    flow: Flow, states: Sequence[tuple[State, State | None]], steps_per_layer: int, generator: torch.Generator
) -> list[State]:
    """The states after a flow with noise: by its own law at h = 1 and h = 1/2, and by the SDE."""
    own, layers = _own(flow), round(flow.depth)
    paths: list[CoupledPath] = []
    for scheme, (x, previous), m in zip((own, own, SDE), states, (1, 2, steps_per_layer), strict=True):
        paths.append(CoupledPath(scheme, m * layers, x, scheme.past(x, previous, 1 / (m * flow.refined))))
    run_coupled(flow.field, flow.depth, paths, steps_per_layer * layers, generator)
    return [path.x for path in paths]


def _own(flow: Flow) -> StochasticScheme:
    """The scheme of a flow with noise, with increments by its own law."""
    scheme = scheme_of(flow.solver)
    return scheme.own_law() if isinstance(scheme, StochasticScheme) else EulerMaruyama("own")


def _layers(network: Network, dtype: torch.dtype, seed: int) -> list[LayerNoise]:
    """The noise of all layers of the flows, in order."""
    torch.manual_seed(seed)  # for laws without closed-form moments
    found: list[LayerNoise] = []
    names = {module: name for name, module in network.named_modules()}
    for flow in network.flows:
        for n in range(math.ceil(flow.depth)):
            t = inside(flow.field.knots, float(n), 1.0, 0, dtype)
            layer, bound = flow.field.at(t), 1 / math.sqrt(flow.depth)
            noisy = noise_of(layer)
            if noisy is None or not any(noisy.deviations(t)):
                noise = "no noise", math.nan, 0.0, (math.nan,) * 4, (0.0,) * 4
            else:
                law = noisy.law(t)
                noise = str(law), law.mean, law.deviation, *_moments(law)
            found.append(LayerNoise(names[layer], n, *noise, bound))
    return found


def _moments(law: Law) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """E xi^k for k = 1, ..., 4, exact or from a million samples, and the half-widths of their confidence intervals."""
    try:
        nodes = [((eta - law.mean) / law.deviation, weight) for eta, weight in law.nodes(4)]
    except TypeError:
        xi = (law.draw((10**6,), torch.float64, torch.device("cpu")) - law.mean) / law.deviation
        means = [mean_of(xi**k) for k in range(1, 5)]
        return tuple(mean for mean, _ in means), tuple(half for _, half in means)
    return tuple(math.fsum(weight * xi**k for xi, weight in nodes) for k in range(1, 5)), (0.0,) * 4


def write_csv(report: WeakReport, path: str | os.PathLike[str]) -> None:
    """The gaps, a line each."""
    files.write_csv([Gap.__dataclass_fields__, *(asdict(gap).values() for gap in report.gaps)], path)


def write_json(report: WeakReport, facts: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Layers and gaps under the `facts` of the run; the moments of a layer without noise are null."""
    layers: list[dict[str, Any]] = []
    for layer in report.layers:
        numbers = {"mean": layer.mean, "moments": layer.moments, "asymmetry": layer.asymmetry}
        layers.append(asdict(layer) | ({"small": layer.small} | numbers if layer.noisy else dict.fromkeys(numbers)))
    files.write_json({**facts, "layers": layers, "gaps": [asdict(gap) for gap in report.gaps]}, path)
