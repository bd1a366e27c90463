"""Networks in files: builder and arguments, solvers, weights - plain data that loads with `weights_only`."""

import inspect
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from continuum.flow import Flow
from continuum.models.archive import CheckpointError, one_line, pack, unpacked
from continuum.models.network import Network, name_of
from continuum.solvers import Adaptive, Solver
from continuum.solvers.text import describe
from continuum.zoo import BUILDERS

KEY = "continuum"
"""Where the description stands in a file; a training checkpoint carries it under the same key."""

FORMAT = 1


def description(network: Network) -> dict[str, Any]:
    """What rebuilds `network` without its weights, as plain data.

    Raises:
        ValueError: the network was not built by a function decorated with `continuum.models.builder`.
        TypeError: no `Network`, or an argument that is neither plain data nor a solver with a textual form.
    """
    if not isinstance(network, Network):
        raise TypeError(
            f"a file holds a Network, and how it is built, not a {type(network).__name__}: save its state_dict() with "
            "torch.save, or put it into a Network by a function decorated with @continuum.models.builder"
        )
    if network.blueprint is None:
        raise ValueError(
            "this network does not know its builder, so a file could not say how to build it again: put it together in a "
            "function decorated with @continuum.models.builder"
        )
    arguments = {name: _plain(name, value) for name, value in network.blueprint.arguments.items()}
    return {
        "format": FORMAT,
        "builder": network.blueprint.builder,
        "arguments": arguments,
        "changes": [list(change) for change in network.blueprint.changes],
        "solvers": [describe(flow.solver) for flow in network.flows],
    }


def _plain(name: str, value: object) -> object:
    if isinstance(value, Solver):
        return describe(value)
    if isinstance(value, list | tuple):
        return [_plain(name, item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"the builder's argument {name} is a {type(value).__name__}: a file holds plain data and solvers only")


def save(network: Network, path: str | os.PathLike[str]) -> None:
    """Write `network` to `path`: a file that `load` turns back into it, and that torch.load reads with weights_only.

    A failure leaves an older file as it was. Weights keep their types.

    Raises:
        ValueError: the network was not built by a function decorated with `continuum.models.builder`.
        TypeError: no `Network`, or an argument of its builder that is neither plain data nor a solver with a textual form.
        CheckpointError: the file cannot be written.
    """
    content = {KEY: description(network), "state_dict": network.state_dict()}
    pack(content, path)


def load(path: str | os.PathLike[str], builder: Callable[..., Network] | None = None) -> Network:
    """The network in `path`, on the CPU and in evaluation mode: a file of `save`, or a checkpoint of `continuum fit`.

    No pickled code is executed, and nothing is imported because the file names it.

    Args:
        path: the file.
        builder: the function that built a network of your own. One that is no `builder` itself may stand for it, as where it
            has moved.

    Raises:
        FileNotFoundError: nothing at `path`.
        CheckpointError: not a file of ours, truncated, with weights of another network, or built by another builder than the
            one that is given, or the zoo.
    """
    return restore(read(path), path, builder)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The plain data in a checkpoint file.

    Raises:
        FileNotFoundError: nothing at `path`.
        CheckpointError: not a file of ours, damaged, or with code in it.
    """
    content = unpacked(path)
    if not isinstance(content, dict) or not isinstance(content.get(KEY), Mapping):
        raise CheckpointError(f"{path} is not a continuum checkpoint: it has no entry {KEY!r} that says how to build it")
    return content


def restore(content: dict[str, Any], path: str | os.PathLike[str], builder: Callable[..., Network] | None = None) -> Network:
    """The network described by the `content` that `read` returned for `path`."""
    stated = content[KEY]
    name = stated.get("builder")
    if stated.get("format") != FORMAT:
        raise CheckpointError(f"{path} is written in format {stated.get('format')}; this version reads {FORMAT}")
    if not isinstance(name, str):
        raise CheckpointError(f"{path} names no builder of its network, but has a {type(name).__name__} in that place")
    build, shown = builder or BUILDERS.get(name), repr(name[:LONGEST_PATH])[1:-1]
    if build is None:
        raise CheckpointError(f"{path} was built by '{shown}', which {_how_to_give(name)}")
    if (given := name_of(build)) is not None:
        check_builder(name, given, path)
    weights = weights_of(content, path)
    try:
        plan = Plan.of(stated, build, weights)
        if builder is None:
            # Without memory, to know the sizes before anything is allocated; the builders of others may need numbers.
            with torch.device("meta"), plan.limited():
                misfits = differences(plan.build(build), weights)
            if misfits:
                raise CheckpointError(f"the weights in {path} are not those of its {shown}: {misfits[0]}")
        network = plan.build(build)
    except CheckpointError:
        raise
    except Exception as error:  # whatever odd arguments lead to
        raise CheckpointError(f"{path} does not describe a {shown} network of this version: {one_line(error)}") from None
    if misfits := differences(network, weights):
        raise CheckpointError(f"the weights in {path} are not those of its {shown}: {misfits[0]}")
    for tensor_name, tensor in network.state_dict(keep_vars=True).items():
        if weights[tensor_name].is_floating_point():
            tensor.data = tensor.data.to(weights[tensor_name].dtype)  # the type that the network had
    network.load_state_dict(weights)
    return network.eval()


def _how_to_give(name: str) -> str:
    """What to do about a file that was built by `name`; a text that is no import path is not repeated as one to type."""
    module, _, function = name.rpartition(".")
    if len(name) > LONGEST_PATH or not all(map(str.isidentifier, name.split("."))):
        return "is no import path: pass its builder itself, as continuum.load(path, builder=...)"
    path = f"MODULE.{function}" if module in UNKNOWN else name
    return (
        "is not in the zoo, and nothing is imported because a file asks for it: if the function is yours, give --builder "
        f"{path}, or pass its builder in Python, continuum.load(path, builder={function})"
    )


LONGEST_PATH = 99
"""Characters of an import path; what is longer is not shown whole."""

UNKNOWN = ("", "__main__")
"""Modules in a file that say nothing: none, as of the zoo and in files of before, and that of a script."""


def check_builder(stated: object, given: str, where: object) -> None:
    """Look whether the builder named `given` can be the one that a file states.

    Raises:
        CheckpointError: it is another one.
    """
    (module, _, function), (other, _, name) = str(stated).rpartition("."), given.rpartition(".")
    if function != name or not (module == other or module in UNKNOWN or other == "__main__"):
        raise CheckpointError(
            f"{where} was built by {str(stated)[:LONGEST_PATH]!r}, not by {given!r}: give the builder that it names; where "
            f"that has moved, continuum.load(path, builder=lambda **arguments: {name}(**arguments)), and save it anew"
        )


def weights_of(content: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The network's part of the state dict in a file: in a training checkpoint it is a part of the trained module.

    Raises:
        CheckpointError: there is none.
    """
    weights = content.get("state_dict")
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{path} holds no weights: its entry 'state_dict' is a {type(weights).__name__}")
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items()):
        raise CheckpointError(f"{path} holds no weights: its entry 'state_dict' has more than tensors by name")
    part = {name.removeprefix("network."): value for name, value in weights.items() if name.startswith("network.")}
    return part or dict(weights)


def differences(network: Network, weights: Mapping[str, Tensor]) -> list[str]:
    """In which tensors weights are not those of a network, by name and shape."""
    expected = network.state_dict()
    found = [f"{name} is missing" for name in expected if name not in weights]
    found += [f"{name} is not part of it" for name in weights if name not in expected]
    for name, tensor in expected.items():
        if name in weights and weights[name].shape != tensor.shape:
            found.append(f"{name} is of shape {tuple(weights[name].shape)}, not {tuple(tensor.shape)}")
    return found


LARGEST = 10_000
"""No number of layers and no option of a builder is larger; a width may be, where a tensor of the file is as wide."""

MOST_TENSORS = 30_000
"""How many tensors a network may have beyond those of the file, while it is built and before it is projected."""


@dataclass(frozen=True)
class Plan:
    """How a file says that its network is built: arguments, changes and solvers, all of them plain data within limits."""

    arguments: dict[str, Any]
    changes: list[list[Any]]
    solvers: list[str]
    tensors: int

    @staticmethod
    def of(stated: Mapping[str, Any], build: Callable[..., Network], weights: Mapping[str, Tensor]) -> "Plan":
        """What a file states, looked at.

        Raises:
            KeyError: an entry is missing.
            TypeError: an entry is of another kind than it has to be, or the builder takes other arguments.
            ValueError: a number or a text that is too large.
        """
        arguments, solvers, changes = stated["arguments"], stated["solvers"], stated.get("changes", [])
        if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
            raise TypeError(f"its arguments are a {type(arguments).__name__}, not values by name")
        if not isinstance(solvers, list) or not all(isinstance(text, str) for text in solvers):
            raise TypeError("its solvers are not a list of texts")
        if not isinstance(changes, list) or not all(isinstance(change, list | tuple) for change in changes):
            raise TypeError("its changes are not a list of lists")
        widest = max((max(tensor.shape, default=1) for tensor in weights.values()), default=1)
        for name, value in arguments.items():
            check_plain(name, value, max(LARGEST, widest))
        for change in changes:
            check_plain("changes", list(change), max(100, widest))
        inspect.signature(build).bind(**arguments)
        return Plan(dict(arguments), [list(change) for change in changes], list(solvers), len(weights))

    def build(self, build: Callable[..., Network]) -> Network:
        network = build(**self.arguments)
        if self.changes:
            # Under a solver that any change leaves possible; those of the file come next.
            start = network.with_solver("euler_maruyama" if network.stochastic else Adaptive())
            network = replay(start, self.changes, self.tensors + MOST_TENSORS)
        solve_as(network, self.solvers)
        return network

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Inside the block, no more parameters are made by this thread than the file could have."""
        thread, left = threading.get_ident(), [self.tensors + MOST_TENSORS]

        def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            if threading.get_ident() == thread:
                left[0] -= 1
                if left[0] < 0:
                    raise ValueError(f"it has thousands of tensors, and the file {self.tensors}")

        handle = register_module_parameter_registration_hook(count)
        try:
            yield
        finally:
            handle.remove()


def check_plain(name: str, value: object, largest: int, depth: int = 3) -> None:
    """Raise an error unless `value` is a number, a text, a boolean or None, or a list of these, of a size that makes sense."""
    if isinstance(value, list | tuple) and depth and len(value) <= LARGEST:
        for item in value:
            check_plain(name, item, largest, depth - 1)
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise TypeError(
            f"its {name} holds a {type(value).__name__}, or too much of it; there are numbers, texts, booleans, None"
        )
    elif isinstance(value, int | float) and abs(value) > largest:
        raise ValueError(f"its {name} has the number {str(value)[:40]}, which is larger than anything in the file")
    elif isinstance(value, str) and len(value) > 100 * LARGEST:
        raise ValueError(f"its {name} has a text of {len(value)} characters")


def solve_as(network: Network, solvers: Sequence[str]) -> None:
    """Give each flow of `network` the solver that a file lists for it.

    Raises:
        ValueError: not as many solvers as flows, or text that names none.
        TypeError: a solver that cannot solve its flow.
    """
    if len(solvers) != len(network.flows):
        raise ValueError(f"it lists {len(solvers)} solvers for {len(network.flows)} flows")
    rest = iter(solvers)
    for index, stage in enumerate(network.stages):
        if isinstance(stage, Flow):
            network.stages[index] = stage.with_solver(next(rest))


def replay(network: Network, changes: Iterable[Sequence[object]], most_tensors: int | None = None) -> Network:
    """`network` after the refinements and projections that a file lists; no step of the way has more tensors than that.

    Raises:
        ValueError: a change that this version does not know, or that the network refuses.
        TypeError: a change that the network refuses.
    """
    for change in changes:
        match change:
            case ["refine", int(k)]:
                if most_tensors is not None and k * len(network.state_dict()) > most_tensors:
                    raise ValueError(f"refined by {k}, it has thousands of tensors more than the file")
                network = network.refine(k)
            case ["project", str(name), int(size)]:
                network = network.project(name, size)
            case ["drift"]:
                network = network.drift()
            case _:
                raise ValueError(
                    f"{change!r} is no change of a network; there are [refine, k], [project, basis, size], [drift]"
                )
    return network
