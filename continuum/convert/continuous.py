"""Any residual network as a flow: a run of blocks x_{k+1} = x_k + f_k(x_k) is an equation dx/dt = f_floor(t)(x) with h = 1.

Weights stay the same tensors in both, so that going there and back changes nothing.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias, TypeVar

from torch import nn

from continuum.convert.blocks import Difference, Residual
from continuum.convert.families import field_of
from continuum.fields import Field
from continuum.flow import Flow
from continuum.models.flows import with_flows
from continuum.noise.base import has_noise
from continuum.schemes import Euler, EulerMaruyama, LieTrotter
from continuum.schemes.base import scheme_of
from continuum.solvers import FixedStep, Solver
from continuum.weights import PiecewiseConstant

M = TypeVar("M", bound=nn.Module)

Blocks: TypeAlias = Mapping[type[nn.Module], Callable[[Any], Field | None]]
"""Of a class of blocks, which field a block is; None for one that is no residual block, as where the size changes."""


class Run(nn.Module):
    """A flow in the place of a run of residual blocks, called as a block is.

    Further arguments of a call are the context of the flow, in the order of the block's own forward, what it takes by any name
    as one dictionary at the end. `blocks` are what the run came from: their weights are those of the field, so they are kept
    aside, unregistered.

    Raises:
        ValueError: when called with a key-value cache, to which a layer that is evaluated several times would write each time.
    """

    def __init__(self, flow: Flow, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.flow, self.blocks = flow, tuple(blocks)
        self.training = flow.training

    def forward(self, x: Any, *further: Any, **named: Any) -> Any:
        return self.flow(x, context=self._context(x, further, named) if further or named else ())

    def _context(self, x: Any, further: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        bound = inspect.signature(self.blocks[0].forward).bind(x, *further, **named)
        bound.apply_defaults()
        _, *context = bound.arguments.values()
        if any(hasattr(value, "get_seq_length") for value in context) and not self._once:
            raise ValueError(
                f"a key-value cache holds one key and value a layer, and {self.flow.solver} evaluates layers more than once or "
                "elsewhere: call the model with use_cache=False, or under the solver that it came with"
            )
        return tuple(context)

    @property
    def _once(self) -> bool:
        """Whether each layer is evaluated once, in its order, and not again for its gradient."""
        solver, layers = self.flow.solver, len(self.blocks)
        scheme, steps = scheme_of(solver), solver.steps(0.0, self.flow.depth)
        whole = steps == [(float(k), 1.0) for k in range(layers)]
        return whole and scheme is not None and scheme.stages == 1 and solver == solver.direct()

    def blocks_back(self) -> tuple[nn.Module, ...]:
        """The blocks, in the mode of the flow.

        Raises:
            TypeError: the field has other weights than the blocks.
        """
        layers = self.flow.field.pieces()
        mine, theirs = (
            {id(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}
            for modules in (layers, self.blocks)
        )
        if mine != theirs or len(layers) != len(self.blocks):
            raise TypeError(
                f"its {len(layers)} layers are no longer the {len(self.blocks)} blocks of {_kinds(self.blocks)} that it came "
                "from: what was refined, projected or given other weights cannot go back"
            )
        for block in self.blocks:
            block.training = self.training
        return self.blocks


class Passed(nn.Module):
    """Where a block of a run stood: the flow in the place of the first has taken its step too."""

    def forward(self, x: Any, *context: Any, **named: Any) -> Any:
        return x


class Found(NamedTuple):
    """A run of residual blocks in a container: the names of their places, the blocks, their fields, and the solver of h = 1."""

    name: str
    container: nn.Module
    places: list[str]
    blocks: list[nn.Module]
    fields: list[Field]
    solver: Solver

    def __str__(self) -> str:
        return f"{self.name}: {len(self.blocks)} {_kinds(self.blocks)}, {self.solver}"


@dataclass(frozen=True)
class Survey:
    """The runs of residual blocks in a model, and the classes of blocks that are left alone, with their numbers."""

    runs: tuple[Found, ...]
    left: Mapping[str, int]

    def __str__(self) -> str:
        left = ", ".join(f"{count} {name}" for name, count in self.left.items()) or "no block"
        return "\n".join([*map(str, self.runs), f"left alone: {left}"])


def survey(model: nn.Module, blocks: Blocks | None = None) -> Survey:
    """What `continuous` makes a flow of, and what it leaves alone.

    >>> from torchvision.models import convnext_tiny
    >>> import torch
    >>> with torch.device("meta"):
    ...     model = convnext_tiny()
    >>> print(survey(model))
    features.1.0: 3 CNBlock, euler:h=1
    features.3.0: 3 CNBlock, euler:h=1
    features.5.0: 9 CNBlock, euler:h=1
    features.7.0: 3 CNBlock, euler:h=1
    left alone: 1 Conv2dNormActivation
    """
    left: dict[str, int] = {}
    return Survey(tuple(_runs(model, "", blocks or {}, left, set())), left)


def continuous(model: M, blocks: Blocks | None = None) -> M:
    """A copy of a model in which every run of residual blocks is one flow of piecewise-constant weights.

    A run is what follows each other without a gap in a `Sequential` or `ModuleList`. Its flow stands in the place of the first
    block, and passes stand in the places of the others; all else stays as it is, where it is. Under the solver that the flows
    come with, Euler or Lie-Trotter with h = 1, outputs, gradients and buffers are those of the model, to the bit, in both
    modes. `survey` says what is found and what is left. The copy is not compiled.

    >>> import torch
    >>> from torchvision.models import VisionTransformer
    >>> from continuum.models.flows import with_solver
    >>> vit = VisionTransformer(32, 16, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=5).eval()
    >>> images = torch.randn(2, 3, 32, 32)
    >>> equation = continuous(vit)
    >>> torch.equal(equation(images), vit(images))
    True
    >>> with_solver(equation, "dopri5")(images).shape
    torch.Size([2, 5])

    Args:
        model: any module; it stays as it is.
        blocks: of further classes of blocks, or of known ones, which field a block is: `lambda block: Autonomous(block.body)`
            for x + body(x), `PostActivation(block.body)` for relu(x + body(x)), `Split` for parts one after the other, or
            `Difference` for any block that keeps the shape, to rounding.

    Raises:
        TypeError: no run of residual blocks; a field without some of the weights of its block; a block with hooks, which
            no flow would call.
    """
    model = copy.deepcopy(model)
    found = survey(model, blocks)
    if not found.runs:
        seen = ", ".join(found.left) or "none"
        raise TypeError(
            f"no residual block of a known class is in a Sequential or ModuleList of this {type(model).__name__}; blocks seen "
            f"there: {seen}. Say which field a block is, such as continuous(model, blocks={{MyBlock: lambda block: "
            "Autonomous(block.body)}), or blocks={MyBlock: Difference} for any that keeps the shape of its input"
        )
    for run in found.runs:
        _check(run)
        whole = Run(Flow(PiecewiseConstant(run.fields), run.solver, len(run.blocks)), run.blocks)
        theirs = {id(module) for block in run.blocks for module in block.modules()}
        for module in whole.modules():
            if id(module) not in theirs:
                module.training = run.blocks[0].training
        first, *others = run.places
        run.container._modules[first] = whole
        for place in others:
            run.container._modules[place] = Passed()
    return model


def discrete(model: M) -> M:
    """A copy of a model made by `continuous`, with the blocks in their places again: the same classes, state dict and outputs.

    The weights are what they are now, whatever the solver.

    >>> from torchvision.models import resnet18
    >>> model = resnet18()
    >>> list(discrete(continuous(model)).state_dict()) == list(model.state_dict())
    True

    Raises:
        TypeError: there is no such flow, or one whose layers are no longer the blocks: refined, projected or changed.
    """
    model = copy.deepcopy(model)
    runs = {name: module for name, module in model.named_modules() if isinstance(module, Run)}
    if not runs:
        raise TypeError(f"no flow of this {type(model).__name__} was made of blocks by continuous(model)")
    for name, run in runs.items():
        owner, _, leaf = name.rpartition(".")
        container = model.get_submodule(owner)
        places = list(container._modules)
        places = places[places.index(leaf) :][: len(run.blocks)]
        if not all(isinstance(container._modules[place], Passed) for place in places[1:]) or len(places) < len(run.blocks):
            raise TypeError(f"flow {name}: the places of its {len(run.blocks)} blocks in {owner or 'the model'} were changed")
        try:
            container._modules.update(zip(places, run.blocks_back(), strict=True))
        except TypeError as error:
            raise TypeError(f"flow {name}: {error}") from None
    return model


def with_noise(model: M) -> M:
    """The model whose dropped paths are noise: stochastic depth by image, as random coefficients of its blocks.

    With h = 1 and their own law the coefficients are those of the model, draw for draw, if nothing else in a flow draws. With
    Brownian increments they are its stochastic differential equation; `models.flows.drift` is the equation without noise, and
    `models.flows.sample` draws predictions. Weights are shared with `model`. Networks with the ReLU behind the sum, which a
    dropped path does not scale, keep their own dropping.

    >>> from torchvision.models import convnext_tiny
    >>> import torch
    >>> from continuum.models.flows import flows
    >>> with torch.device("meta"):
    ...     noisy = with_noise(continuous(convnext_tiny()))
    >>> [str(flow.solver) for flow in flows(noisy)][:2]
    ['euler_maruyama:increments=own,h=1', 'euler_maruyama:increments=own,h=1']

    Raises:
        TypeError: no flow that `continuous` made drops a path.
    """

    def noisy(flow: Flow) -> Flow:
        field = flow.field.mapped(lambda layer: layer.with_noise() if isinstance(layer, Residual) else layer)
        solver = _solver_of(field.pieces()[-1])
        return flow.with_field(field, solver) if has_noise(field) else flow

    found = with_flows(model, noisy)
    if not has_noise(found):
        raise TypeError(f"no flow of this {type(model).__name__} drops a path of its blocks")
    return found


def _runs(module: nn.Module, name: str, blocks: Blocks, left: dict[str, int], seen: set[int]) -> Iterator[Found]:
    """The runs in a module, outermost first; blocks of a run are not looked into."""
    if id(module) in seen:
        return
    seen.add(id(module))
    listed = isinstance(module, nn.Sequential | nn.ModuleList)
    children = [(place, child) for place, child in module._modules.items() if child is not None]
    fields = [_field(child, blocks) if listed else None for _, child in children]
    solvers = [field and _solver_of(field) for field in fields]
    for solver, group in groupby(zip(children, fields, solvers, strict=True), key=lambda row: row[2]):
        run = list(group)
        if solver is not None:
            places = [place for (place, _), _, _ in run]
            path = f"{name}.{places[0]}" if name else places[0]
            yield Found(path, module, places, [b for (_, b), _, _ in run], [f for _, f, _ in run if f], solver)
            continue
        for (place, child), _, _ in run:
            kind = type(child)
            if listed and not kind.__module__.startswith("torch.nn.") and next(child.children(), None) is not None:
                left[kind.__qualname__] = left.get(kind.__qualname__, 0) + 1
            yield from _runs(child, f"{name}.{place}" if name else place, blocks, left, seen)


def _field(block: nn.Module, blocks: Blocks) -> Field | None:
    known = blocks.get(type(block))
    field = field_of(block) if known is None else known(block)
    if field is not None and not isinstance(field, Field):
        raise TypeError(f"blocks says which Field a {type(block).__name__} is; it returned a {type(field).__name__}")
    return field


def _solver_of(field: Field) -> Solver:
    """Whose step with h = 1 is the block."""
    return FixedStep(LieTrotter() if field.addends() else EulerMaruyama() if has_noise(field) else Euler())


def _check(run: Found) -> None:
    """Raise TypeError where a flow would lose something of its blocks."""
    for place, block, field in zip(run.places, run.blocks, run.fields, strict=True):
        who = f"block {place} of the run {run.name}, a {type(block).__name__},"
        if any(value for name, value in vars(block).items() if name.endswith("_hooks")):
            raise TypeError(f"{who} has hooks, which a flow would not call: remove them, and hook a submodule or the flow")
        held = {id(tensor) for tensor in (*field.parameters(), *field.buffers())}
        tensors = [*block.named_parameters(), *block.named_buffers()]
        if lost := [name for name, tensor in tensors if id(tensor) not in held]:
            raise TypeError(f"{who} has weights that its {type(field).__name__} leaves out: {', '.join(lost)}")


def _kinds(blocks: Sequence[nn.Module]) -> str:
    return " and ".join(dict.fromkeys(type(block).__name__ for block in blocks))


__all__ = ["Difference", "Run", "Survey", "continuous", "discrete", "survey", "with_noise"]
