"""Certificates that a network is the published discrete one: equal to the bit to a loop written without the library's parts.

Logits in training and in evaluation mode and BatchNorm's buffers are compared with `torch.equal`, gradients to a relative
`GRADIENTS`. The loops they are compared with are in `continuum.verify.plain`.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from continuum.fields import Field
from continuum.flow import Flow
from continuum.models import Network
from continuum.models.fractal import FractalStages
from continuum.models.network import Blueprint
from continuum.schemes import RK4, Euler, EulerMaruyama
from continuum.schemes.base import scheme_of
from continuum.solvers import FixedStep, Solver, parse
from continuum.types import Images, Logits, State
from continuum.verify.plain import PLAIN, Layer, Weights, bare
from continuum.zoo import BUILDERS

GRADIENTS = 1e-6
"""The largest relative difference of the gradient of a parameter: the two graphs may add up in different orders."""

NOISE = 1e-3
"""A gradient below this share of the largest is measured against that share: what cancels is rounding noise."""

SEEDS = (0, 1)
"""A training pass with each: the first sends a FractalNet through one column, the second drops inputs of its joins."""

CPU = torch.device("cpu")

CONTINUOUS = ("continuous_resnet", "odenet", "mlp", "neural_sde")
"""Builders whose plain loops take steps of any size, by Euler's method or RK4, or with noise by Euler-Maruyama's."""


@dataclass(frozen=True)
class Certificate:
    """What a network has in common with its plain loop.

    `parameters` counts the numbers that are trained. `training`, `evaluation` and `buffers` say whether logits and
    BatchNorm's buffers are equal to the bit; `gradient` is the largest relative difference in the gradient of a parameter.
    Where something differs, `place` is the first layer or buffer that does, or the last parameter (gradients come from
    behind), and `difference` by how much.
    """

    network: str
    solver: str
    parameters: int
    training: bool
    evaluation: bool
    buffers: bool
    gradient: float
    place: str = ""
    difference: float = 0.0

    @property
    def passed(self) -> bool:
        return self.training and self.evaluation and self.buffers and self.gradient <= GRADIENTS


def certify(network: Network, images: Images, labels: Tensor | None = None, device: torch.device = CPU) -> Certificate:
    """Compare `network`, on a batch of images, with the plain loop of its builder under its published discrete scheme.

    The scheme is the builder's default, or Euler's method with h = 1 where that is adaptive; networks continuous in depth
    keep fixed steps of Euler's method or RK4, and a neural SDE those of Euler-Maruyama's. What is random is drawn alike. The
    network itself stays as it is: its copy is compared, on the CPU or on a `device` whose kernels are deterministic.

    Raises:
        ValueError: the network is not from the zoo, or was projected onto a basis: no plain loop is written for it.
    """
    network, images = _discrete(network).to(device), images.to(device)
    with torch.no_grad():
        ours, theirs = (run(network.eval(), images) for run in (_logits, _logits_of_loop))
    evaluation, training, buffers, gradient = torch.equal(ours, theirs), True, True, 0.0
    faults = [] if evaluation else [_first_difference(network, images, 0)]
    labels = (torch.arange(len(images)) % ours.shape[1] if labels is None else labels).to(device)
    network.train()
    for seed in SEEDS:
        ours, gradients, moved = _trained(network, images, labels, _logits, seed)
        theirs, their_gradients, their_buffers = _trained(network, images, labels, _logits_of_loop, seed)
        if not torch.equal(ours, theirs):
            training = False
            faults.append(_first_difference(network, images, seed))
        wrong = [(name, distance) for name, buffer in moved.items() if (distance := _distance(buffer, their_buffers[name]))]
        buffers = buffers and not wrong
        errors = _relative(gradients, their_gradients)
        gradient = max(gradient, *errors.values(), 0.0)
        faults += wrong[:1] + [(name, error) for name, error in errors.items() if error > GRADIENTS][-1:]
    return Certificate(
        _blueprint(network).builder,
        str(network.solver) if network.flows else "",
        sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad),
        training,
        evaluation,
        buffers,
        gradient,
        *(faults[0] if faults else ("", 0.0)),
    )


def _blueprint(network: Network) -> Blueprint:
    blueprint = network.blueprint
    if blueprint is None or blueprint.builder not in PLAIN:
        name = "This network" if blueprint is None else blueprint.builder
        raise ValueError(f"{name} is not from the zoo: no plain loop is written for it. There is one for {', '.join(PLAIN)}")
    if any(change[0] != "refine" for change in blueprint.changes):
        raise ValueError(
            f"this {blueprint.builder} was changed by {', '.join(str(change[0]) for change in blueprint.changes)}: no plain "
            "loop is written for it"
        )
    return blueprint


def _discrete(network: Network) -> Network:
    """A copy, on the CPU, under the discrete scheme of its plain loop."""
    blueprint = _blueprint(network)
    network = copy.deepcopy(network).cpu()
    solvers = {flow.solver for flow in network.flows}
    if not solvers or (blueprint.builder in CONTINUOUS and len(solvers) == 1 and _has_loop(*solvers)):
        return network
    published = parse(inspect.signature(BUILDERS[blueprint.builder]).parameters["solver"].default)
    return network.with_solver(published if scheme_of(published) else FixedStep(Euler()))


def _has_loop(solver: Solver) -> bool:
    """Whether the plain loops of continuous networks know the steps: one of these schemes with h = 1/m."""
    scheme = scheme_of(solver)
    if scheme not in (Euler(), RK4(), EulerMaruyama("own")):
        return False
    try:
        steps = solver.steps(0.0, 1.0)
    except ValueError:
        return False
    return steps is not None and solver.direct() == FixedStep(scheme, steps[0][1])


Run: TypeAlias = Callable[[Network, Images], Logits]


def _logits(network: Network, images: Images) -> Logits:
    return network(images)


def _logits_of_loop(network: Network, images: Images) -> Logits:
    *_, (_, logits) = _loop(network, images)
    return logits


def _loop(network: Network, images: Images) -> Iterator[Layer]:
    """The plain loop on the parameters and buffers of the network, in its mode; in training it moves the buffers."""
    blueprint = _blueprint(network)
    tensors = {bare(name): tensor for name, tensor in (*network.named_parameters(), *network.named_buffers())}
    weights = Weights(tensors, network.training, max((flow.refined for flow in network.flows), default=1))
    solver = str(network.solver) if network.flows else ""
    return PLAIN[blueprint.builder](weights, {**blueprint.arguments, "solver": solver}, images)


def _states(network: Network, images: Images) -> Iterator[State]:
    """The states of the network itself, after every layer that its plain loop names."""
    inside: list[State] = []

    def end(flow: Flow, x: State, previous: State | None) -> State:
        inside.extend(flow.states(x, previous)[1:])
        return inside[-1]

    def pooled(module: nn.Module, inputs: tuple[State, ...], output: State) -> None:
        inside.append(output)

    hooks = [stage.pool.register_forward_hook(pooled) for stage in network.stages if isinstance(stage, FractalStages)]
    for _, _, x in network.walk(images, end):
        yield from inside or [x]
        inside.clear()
    for hook in hooks:
        hook.remove()


def _trained(
    network: Network, images: Images, labels: Tensor, run: Run, seed: int
) -> tuple[Logits, dict[str, Tensor], dict[str, Tensor]]:
    """What a pass in training mode leaves: logits, and gradients and buffers by the names of the network."""
    network = copy.deepcopy(network)
    with _seeded(seed):
        logits = run(network, images)
    parameters = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    gradients: tuple[Tensor, ...] = ()
    if parameters:
        loss = cross_entropy(logits, labels)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return logits.detach(), dict(zip(parameters, gradients, strict=True)), dict(network.named_buffers())


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference; 0.0 only for what is equal to the bit."""
    if one.shape != other.shape:
        return math.inf
    return 0.0 if torch.equal(one, other) else float((one - other).abs().max())


def _relative(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """The difference of each gradient, relative to its norm; infinite where it is not a number."""
    norms = {name: float(gradient.norm()) for name, gradient in theirs.items()}
    floor = NOISE * max(norms.values(), default=0.0)
    errors = {name: float((ours[name] - theirs[name]).norm()) / (max(norm, floor) or 1.0) for name, norm in norms.items()}
    return {name: math.inf if math.isnan(error) else error for name, error in errors.items()}


@torch.no_grad()
def _first_difference(network: Network, images: Images, seed: int) -> tuple[str, float]:
    """The first layer whose state is not that of the plain loop, and by how much; "forward" if no layer alone is at fault."""
    with _seeded(seed):
        found = list(_states(copy.deepcopy(network), images))
    with _seeded(seed):
        expected = list(_loop(copy.deepcopy(network), images))
    for state, (name, other) in zip(found, expected, strict=False):
        if distance := _distance(state, other):
            return name, distance
    return "forward", math.nan


THREE = {"widths": (4, 8, 12)}
RESNEXT = {"depth": 20, "cardinality": 2, "group_width": 16, "width": 4}
MODULES = (("mpoly-2", "poly-2"), ("poly-2", "mpoly-2"), ("poly-3", "2-way"))
SMALL: dict[str, dict[str, Any]] = {
    "resnet": {"depth": 20, "width": 4},
    "resnet B": {"depth": 20, "width": 4, "shortcut": "B"},
    "imagenet_resnet": {"depth": 18, "num_classes": 10},
    "imagenet_resnet bottleneck": {
        "blocks": (2, 1, 2, 2),
        "block": "bottleneck",
        "groups": 2,
        "group_width": 16,
        "dilated": (False, True, True),
        "num_classes": 10,
    },
    "imagenet_resnet cifar": {"blocks": (1, 2, 1, 2), "block": "basic", "num_classes": 10, "stem": "cifar"},
    "se_resnet": {"depth": 20, "width": 4, "reduction": 2},
    "resnext": RESNEXT,
    "polynet": {"blocks": (2, 3, 2), "width": 4},
    "polynet mpoly-2, poly-2": {"blocks": (2, 2, 3), "width": 4, "modules": MODULES},
    "preresnet": {"depth": 20, "width": 4},
    "preresnet bottleneck": {"depth": 20, "width": 4, "block": "bottleneck"},
    "preresnet scaled": {"depth": 20, "width": 4, "scale": 0.2},
    "wide_resnet": {"depth": 16, "widen": 1, "dropout": 0.3},
    "lm_resnet": {"depth": 20, "width": 4},
    "lm_resnet bottleneck": {"depth": 20, "width": 4, "block": "bottleneck"},
    "lm_resnext": RESNEXT,
    "momentum_resnet": {"depth": 20, "width": 4},
    "fractal_resnet": {"depth": 20, "width": 4},
    "fractalnet": {"widths": (4, 6), "dropout": (0.0, 0.2), "drop_path": 0.5},
    "fractalnet all paths": {"widths": (4, 6), "dropout": (0.1, 0.2), "drop_path": 0.0},
    "revnet": {"depth": 26, **THREE},
    "hamiltonian": {"depth": 26, **THREE},
    "midpoint": {"depth": 20, **THREE},
    "midpoint from zero": {"depth": 20, "start": "zero", **THREE},
    "leapfrog": {"depth": 20, **THREE},
    "leapfrog from rest": {"depth": 20, "start": "rest", **THREE},
    "antisymmetric": {"depth": 20, **THREE},
    "continuous_resnet": {"size": 3, "width": 4},
    "continuous_resnet Euler": {"size": 3, "width": 4, "solver": "euler"},
    "continuous_resnet constant": {"size": 3, "width": 4, "basis": "constant"},
    "continuous_resnet constant Euler": {"size": 3, "width": 4, "basis": "constant", "solver": "euler"},
    "continuous_resnet chebyshev": {"size": 3, "width": 4, "basis": "chebyshev"},
    "continuous_resnet legendre": {"size": 4, "width": 4, "basis": "legendre"},
    "continuous_resnet fourier": {"size": 4, "width": 4, "basis": "fourier"},
    "odenet": {"width": 4},
    "odenet three stages": {"width": 4, "stages": 3, "in_channels": 3, "solver": "euler:h=0.25"},
    "mlp": {"hidden": 8, "augment": 1},
    "mlp in quarters": {"hidden": 8, "solver": "euler:h=0.25"},
    "stochastic_depth_resnet": {"depth": 26, "width": 4},
    "stochastic_depth_resnet image": {"depth": 20, "width": 4, "per": "image"},
    "shake_shake": {"depth": 20, "width": 4},
    "shake_shake without the first transition": {"depth": 14, "width": 16},
    "shake_shake keep": {"depth": 20, "width": 4, "backward_mode": "keep"},
    "shake_shake even": {"depth": 20, "width": 4, "backward_mode": "even"},
    "shake_shake even, shake": {"depth": 20, "width": 4, "forward_mode": "even"},
    "shake_shake even, even": {"depth": 20, "width": 4, "forward_mode": "even", "backward_mode": "even"},
    "shake_shake batch": {"depth": 20, "width": 4, "per": "batch"},
    "stochastic_lm_resnet": {"depth": 26, "width": 4},
    "stochastic_lm_resnet image": {"depth": 20, "width": 4, "per": "image"},
    "dropout_resnet": {"depth": 20, "width": 4},
    "neural_sde": {"width": 4},
    "neural_sde multiplicative": {"width": 4, "kind": "multiplicative", "downsample": False},
    "neural_sde in one step": {"width": 4, "solver": "euler_maruyama"},
}
"""Arguments of small networks of every builder, which is the first word of the name."""


def small(name: str) -> Network:
    """The network of `SMALL` with random weights in which nothing is trivial: norms, their statistics, biases and k."""
    with _seeded(0):
        network = BUILDERS[name.split()[0]](**SMALL[name])
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
            if isinstance(module, Field) and isinstance(k := module.friction()[1], nn.Parameter):
                nn.init.uniform_(k, -0.4, 0.3)
        for parameter in (p for name, p in network.named_parameters() if name.endswith("bias")):
            nn.init.normal_(parameter, std=0.1)
    return network


def some_images(network: Network, batch: int = 4) -> Images:
    """Random images, or vectors for `mlp`, of a shape that the network takes.

    Raises:
        ValueError: the network is not from the zoo.
    """
    blueprint = _blueprint(network)
    arguments: dict[str, Any] = blueprint.arguments
    if blueprint.builder == "mlp":
        shape = (batch, arguments["features"])
    else:
        size = max(32, 2 ** len(arguments["widths"])) if blueprint.builder == "fractalnet" else 32
        shape = (batch, arguments["in_channels"], size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))
