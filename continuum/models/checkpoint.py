"""Networks in files: builder and arguments, solvers, weights - plain data that loads with `weights_only`."""

import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from continuum.files import whole_file
from continuum.flow import Flow
from continuum.models.network import Network
from continuum.solvers import Adaptive, Solver
from continuum.solvers.text import describe
from continuum.zoo import BUILDERS

KEY = "continuum"
"""Where the description stands in a file; a training checkpoint carries it under the same key."""

FORMAT = 1


class CheckpointError(ValueError):
    """A file that holds no network of ours, or one that does not fit: one line that says which and why."""


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
    """
    content = {KEY: description(network), "state_dict": network.state_dict()}
    with whole_file(path) as temporary:
        torch.save(content, temporary)


def load(path: str | os.PathLike[str], builder: Callable[..., Network] | None = None) -> Network:
    """The network in `path`, on the CPU and in evaluation mode: a file of `save`, or a checkpoint of `continuum fit`.

    A network of your own needs its `builder`. No pickled code is executed.

    Raises:
        FileNotFoundError: nothing at `path`.
        CheckpointError: not a file of ours, truncated, or with weights of another network.
    """
    return restore(read(path), path, builder)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The plain data in a checkpoint file.

    Raises:
        FileNotFoundError: nothing at `path`.
        CheckpointError: not a file of ours, or truncated.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {Path(path).resolve()}")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is not a checkpoint, or it is truncated: it is no archive as torch.save writes it")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} holds pickled code, which is never executed; a checkpoint is plain data") from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read, it may be truncated: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or not isinstance(content.get(KEY), Mapping):
        raise CheckpointError(f"{path} is not a continuum checkpoint: it has no entry {KEY!r} that says how to build it")
    return content


def restore(content: dict[str, Any], path: str | os.PathLike[str], builder: Callable[..., Network] | None = None) -> Network:
    """The network described by the `content` that `read` returned for `path`."""
    stated = content[KEY]
    name, build = stated.get("builder"), builder
    if stated.get("format") != FORMAT:
        raise CheckpointError(f"{path} is written in format {stated.get('format')}; this version reads {FORMAT}")
    if build is None and isinstance(name, str):
        build = BUILDERS.get(name)
    if build is None:
        raise CheckpointError(
            f"{path} was built by {name!r}, which is not in the zoo ({', '.join(BUILDERS)}): pass its builder to load"
        )
    try:
        network = build(**stated["arguments"])
        if stated.get("changes"):
            # Under a solver that any change leaves possible; those of the file come next.
            start = network.with_solver("euler_maruyama" if network.stochastic else Adaptive())
            network = replay(start, stated["changes"])
        solve_as(network, stated["solvers"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # whatever odd arguments lead to
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} does not describe a {name} network of this version: {reason}") from None
    weights = content.get("state_dict")
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{path} holds no weights: its entry 'state_dict' is a {type(weights).__name__}")
    # In a training checkpoint the network is one part of the trained module.
    part = {key.removeprefix("network."): value for key, value in weights.items() if key.startswith("network.")}
    for tensor_name, tensor in network.state_dict(keep_vars=True).items():
        stored = (part or weights).get(tensor_name)
        if isinstance(stored, torch.Tensor) and stored.is_floating_point():
            tensor.data = tensor.data.to(stored.dtype)  # the type that the network had, as load_state_dict does not
    try:
        network.load_state_dict(part or weights)
    except RuntimeError as error:
        first = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise CheckpointError(f"the weights in {path} are not those of its {name}: {first}") from None
    return network.eval()


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


def replay(network: Network, changes: Iterable[Sequence[object]]) -> Network:
    """`network` after the refinements and projections that a file lists.

    Raises:
        ValueError: a change that this version does not know, or that the network refuses.
        TypeError: a change that the network refuses.
    """
    for change in changes:
        match change:
            case ["refine", int(k)]:
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
