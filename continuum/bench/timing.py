"""What a solve costs beyond its evaluations: time of the solve / (its evaluations x time of one evaluation of f).

What is compared runs in turn, forwards in one round and backwards in the next, and figures are medians of the ratios within a
round. Each library is divided by its own number of evaluations, so that 1 is a solver that costs nothing, whoever chooses the
steps. Evaluations are those of the forward pass; in training, one is f with its backward pass, as a link of a chain f(f(...)).
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from continuum.analysis.memory import seconds_of
from continuum.bench import rivals
from continuum.bench.rivals import FlowMap, MakeFlowMap
from continuum.fields import Autonomous, Field, PreActivation
from continuum.fields.branches import group_norm
from continuum.flow import Flow
from continuum.models import Network
from continuum.solvers import Adaptive
from continuum.types import State
from continuum.zoo import preresnet

SEED = 0
TOLERANCE = 1e-3
TIGHT = 1e-4
"""The tolerance at which checkpoints are compared with torchdiffeq's adjoint, whose gradients are only as exact as that."""

Row: TypeAlias = dict[str, Any]
Run: TypeAlias = Callable[[], object]
Loss: TypeAlias = Callable[[Tensor], Tensor]

LOSSES: dict[str, Loss] = {"sum": lambda y: y.square().sum(), "mean": lambda y: y.square().mean()}
"""Of the end state. An adjoint's atol is absolute, so what it costs depends on the size of the gradient; nothing else does."""


@dataclass(frozen=True)
class Problem:
    """A field, states of so many images, and a depth at which dopri5 takes 26 evaluations at `TOLERANCE`.

    What is timed is `repeats` solves, where one alone is too short for the clock.
    """

    shape: tuple[int, ...]
    batch: int
    depth: float = 1.5
    repeats: int = 1

    @property
    def name(self) -> str:
        return "x".join(map(str, self.shape)) if len(self.shape) > 1 else "MLP"

    @property
    def label(self) -> str:
        return f"{self.name}, batch {self.batch}"

    def build(self, device: torch.device) -> tuple[Autonomous, State]:
        torch.manual_seed(SEED)
        size = self.shape[0]
        if len(self.shape) > 1:
            module: nn.Module = PreActivation(size, size, norm=group_norm)
        else:
            module = nn.Sequential(nn.Linear(size, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, size))
        return Autonomous(module).to(device), torch.randn(self.batch, *self.shape).to(device)


@dataclass(frozen=True)
class Case:
    """A training step of preresnet(depth, width) on so many images of size x size; `windows` of a few steps are timed."""

    depth: int
    width: int
    size: int
    batch: int
    windows: int

    @property
    def name(self) -> str:
        return f"preresnet({self.depth})" + (f", {self.width} channels" if self.width != 16 else "")


SMALL = Case(depth=14, width=4, size=8, batch=4, windows=100)
"""Hardly any arithmetic, so that what surrounds it is timed. It is not compiled, for then nothing is left."""


@dataclass(frozen=True)
class Plan:
    """How much is measured: `rounds` of each comparison behind those of the `warm_up`; where they take `seconds`, fewer.

    `adjoint`, `memory` and `compiled` are measured on problems of their own, the training step of fixed steps on so many
    `images`, and the one of `fit` in the cases of `steps`.
    """

    problems: tuple[Problem, ...]
    adjoint: tuple[Problem, ...]
    compiled: tuple[Problem, ...]
    memory: Problem
    steps: tuple[Case, ...] = ()
    rounds: int = 15
    warm_up: int = 2
    seconds: float = 20.0
    images: int = 128


@dataclass(frozen=True)
class Way:
    """Something to time, how many evaluations it takes, and the name of the way that takes evaluations alone."""

    run: Run
    evaluations: int
    against: str = "f"


def compared(ways: Mapping[str, Way], plan: Plan, device: torch.device, repeats: int = 1) -> tuple[Row, dict[str, list[float]]]:
    """Each way's cost beyond its evaluations, as a row, and the seconds of its rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    end = float("inf")
    for index in range(plan.warm_up + plan.rounds):
        done = index - plan.warm_up
        if done == 0:
            end = time.perf_counter() + plan.seconds
        if done >= 3 and time.perf_counter() > end:
            break
        for name in list(ways) if index % 2 else list(ways)[::-1]:
            elapsed = seconds_of(ways[name].run, device, repeats)
            if done >= 0:
                seconds[name].append(elapsed)
    found = {}
    for name, way in ways.items():
        own, base = seconds[name], seconds[way.against]
        work = way.evaluations / ways[way.against].evaluations
        found[name] = {
            "evaluations": way.evaluations,
            "against": way.against,
            "milliseconds": 1000 * statistics.median(own) / repeats,
            **ratio([a / (work * b) for a, b in zip(own, base, strict=True)]),
        }
    return {"rounds": len(next(iter(seconds.values()))), "ways": found}, seconds


def ratio(ratios: list[float]) -> Row:
    """The median and the quartiles."""
    first, middle, third = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"ratio": middle, "quartiles": [first, third]}


def ours(gradient: Literal["direct", "checkpoint", "adjoint"] = "direct") -> MakeFlowMap:
    """dopri5 of this library, as its user would have it."""
    return lambda field, depth, tolerance: Flow(field, Adaptive("dopri5", tolerance, tolerance, gradient=gradient), depth)


def libraries() -> dict[str, MakeFlowMap]:
    """dopri5 with the exact gradient of its steps, by every library of torch that is installed, and by hand."""
    found = {"continuum": ours(), "torchdiffeq": rivals.odeint, "plain loop": rivals.plain_dopri5}
    return {**found, "torchode": rivals.torchode_dopri5} if rivals.optional("torchode") else found


def counted(field: Field, solve: FlowMap, x: State) -> int:
    """How often a solve evaluates the field on its way forward."""
    calls: list[None] = []
    handle = field.register_forward_hook(lambda *_: calls.append(None))
    with torch.no_grad():
        solve(x)
    handle.remove()
    return len(calls)


def chained(field: Callable[[float, State], State], evaluations: int) -> FlowMap:
    """f(f(...f(x))), through which a backward pass goes as through a solve."""

    def run(x: State) -> State:
        for _ in range(evaluations):
            x = field(0.0, x)
        return x

    return run


def trained(solve: FlowMap, field: Field, x: State, loss: Loss) -> Run:
    """A solve and its backward pass, to the parameters and the state that it starts from."""
    leaves = [x, *field.parameters()]

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss(solve(x)).backward()

    return run


def forward(problem: Problem, plan: Plan, device: torch.device) -> Row:
    """Solves under no_grad, against as many evaluations of f at the initial state."""
    field, x = problem.build(device)
    solves = {name: make(field, problem.depth, TOLERANCE) for name, make in libraries().items()}
    counts = {name: counted(field, solve, x) for name, solve in solves.items()}

    def evaluate() -> None:
        for _ in range(counts["continuum"]):
            field(0.0, x)

    ways = {"f": Way(evaluate, counts["continuum"])}
    ways |= {name: Way(partial(solve, x), counts[name]) for name, solve in solves.items()}
    if isinstance(field.module, nn.Sequential) and rivals.optional("diffrax"):
        solve, evaluations, count = rivals.diffrax_dopri5(field.module, x, problem.depth, TOLERANCE)
        ways |= {"f in JAX": Way(evaluations, count, "f in JAX"), "diffrax": Way(solve, count, "f in JAX")}
    with torch.no_grad():
        row, _ = compared(ways, plan, device, problem.repeats)
    return {"field": problem.name, "batch": problem.batch, "pass": "forward", **row}


def training(problem: Problem, plan: Plan, device: torch.device) -> Row:
    """Solves and their backward passes, against a chain of as many evaluations and its own; and checkpoints against direct."""
    makers = {**libraries(), "continuum, checkpoint": ours("checkpoint")}
    row, seconds = _training_ways(makers, problem, TOLERANCE, "sum", plan, device)
    pairs = zip(seconds["continuum, checkpoint"], seconds["continuum"], strict=True)
    return {**row, "checkpoint / direct": ratio([own / direct for own, direct in pairs])}


def adjoint(problem: Problem, loss: str, plan: Plan, device: torch.device) -> Row:
    """The adjoints, with the seminorm and as torchdiffeq has it, against checkpoints, all at the tolerance `TIGHT`."""
    makers = {
        "continuum, checkpoint": ours("checkpoint"),
        "continuum, adjoint": ours("adjoint"),
        "torchdiffeq, adjoint": rivals.odeint_adjoint,
    }
    # One takes many times as long as all other ways.
    few = replace(plan, warm_up=min(plan.warm_up, 1), rounds=min(plan.rounds, 5))
    row, seconds = _training_ways(makers, problem, TIGHT, loss, few, device)
    pairs = zip(seconds["torchdiffeq, adjoint"], seconds["continuum, checkpoint"], strict=True)
    return {**row, "adjoint / checkpoint": ratio([theirs / own for theirs, own in pairs])}


def _training_ways(
    makers: Mapping[str, MakeFlowMap], problem: Problem, tolerance: float, loss: str, plan: Plan, device: torch.device
) -> tuple[Row, dict[str, list[float]]]:
    field, x = problem.build(device)
    x.requires_grad_()
    solves = {name: make(field, problem.depth, tolerance) for name, make in makers.items()}
    counts = {name: counted(field, solve, x) for name, solve in solves.items()}
    links = next(iter(counts.values()))
    ways = {"f": Way(trained(chained(field, links), field, x, LOSSES[loss]), links)}
    ways |= {name: Way(trained(solve, field, x, LOSSES[loss]), counts[name]) for name, solve in solves.items()}
    row, seconds = compared(ways, plan, device, problem.repeats)
    facts = {"field": problem.name, "batch": problem.batch, "pass": "training", "tolerance": tolerance, "loss": loss}
    return {**facts, **row}, seconds


def euler_step(plan: Plan, device: torch.device) -> Row:
    """A training step of preresnet(20) under FixedStep(Euler()) against the loop a person would write over its modules."""
    torch.manual_seed(SEED)
    images = torch.randn(plan.images, 3, 32, 32).to(device)
    labels = torch.randint(10, (plan.images,)).to(device)

    def step(network: Network, run: FlowMap) -> Run:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True)

        def take() -> None:
            optimizer.zero_grad()
            cross_entropy(run(images), labels).backward()
            optimizer.step()

        return take

    network, other = preresnet(20).to(device), preresnet(20).to(device)
    ways = {"plain loop": step(other, textbook(other)), "continuum": step(network, network)}
    more = replace(plan, rounds=4 * plan.rounds)  # cheap, and its target is close to 1
    row, _ = compared({name: Way(run, 1, "plain loop") for name, run in ways.items()}, more, device)
    return {"network": "preresnet(20)", "batch": plan.images, **row}


def textbook(network: Network) -> FlowMap:
    """The residual network as its textbook loop, over the modules of `network`."""
    stages = list(cast(Iterable[Any], network.stages))
    blocks = [[layer.module for layer in stage.field.layers] if hasattr(stage, "field") else [] for stage in stages]

    def run(x: State) -> State:
        x = network.stem(x)
        for stage, residual in zip(stages, blocks, strict=True):
            if not residual:
                x, _ = stage(x)
            for block in residual:
                x = x + block(x)
        return network.head(x)

    return run


def compiled(problem: Problem, direction: Literal["forward", "training"], plan: Plan, device: torch.device) -> Row:
    """The compiled flow against as many evaluations of f, not compiled and compiled; below 1 it is faster than they are."""
    torch.compiler.reset()
    # A field each, for compiling is in place.
    (field, x), (faster, _), (inside, _) = (problem.build(device) for _ in range(3))
    flow = Flow(inside, Adaptive("dopri5", TOLERANCE, TOLERANCE), problem.depth)
    count = counted(field, ours()(field, problem.depth, TOLERANCE), x)
    faster.compile()
    flow.compile()
    solves = {"f": chained(field, count), "f, compiled": chained(faster, count), "continuum, compiled": flow}
    x.requires_grad_(direction == "training")
    ways = {}
    for (name, solve), own in zip(solves.items(), (field, faster, inside), strict=True):
        ways[name] = Way(trained(solve, own, x, LOSSES["sum"]) if x.requires_grad else partial(solve, x), count)
    with torch.set_grad_enabled(x.requires_grad):
        row, _ = compared(ways, plan, device, problem.repeats)
    return {"field": problem.name, "batch": problem.batch, "pass": direction, **row}
