"""`continuum convert`: published checkpoints to networks of ours, and ours to state dicts or exported programs."""

from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from continuum.cli.checkpoints import imported, reading_parser
from continuum.cli.parser import Parser
from continuum.convert import from_checkpoint, to_checkpoint
from continuum.export import SUFFIXES, ExportError, export
from continuum.models import Network
from continuum.models.checkpoint import CheckpointError, read, restore, save
from continuum.models.flows import solvers_of
from continuum.solvers import SolveError, parse

STATE_DICTS = (".pth", ".th")
SAMPLES = 8


def convert_parser() -> Parser:
    parser = reading_parser("convert")
    parser.add_argument(
        "source",
        help="a file of continuum.save, a checkpoint of `continuum fit`, or the state dict of a ResNet under the names of "
        "torchvision or of CIFAR networks (conv1, layer1.0.conv1, ..., linear)",
    )
    parser.add_argument(
        "dest",
        help="the file to write: .pth or .th is a state dict under the published names, .pt2 a torch.export program, .onnx an "
        "ONNX model, any other suffix a continuum checkpoint",
    )
    parser.add_argument("--solver", metavar="NAME:KEY=VALUE,...", help="put the network under this solver, such as rk4:h=0.5")
    parser.add_argument(
        "--freeze",
        action="store_true",
        help=f"export the steps that the adaptive solver accepts on {SAMPLES} standard normal images; for those on your own "
        "images, call network.frozen(images) and continuum.export.export in Python",
    )
    parser.add_argument(
        "--image_size",
        type=PositiveInt,
        help="height and width of the images that an export is made for (default: 224 with an ImageNet stem, else 32)",
    )
    return parser


def convert_command(arguments: list[str]) -> None:
    """`continuum convert`: a line on what was read and one on what was written."""
    parser = convert_parser()
    options = parser.parse_args(arguments)
    source, dest = Path(options.source), Path(options.dest)
    exports, state_dict = dest.suffix in SUFFIXES, dest.suffix in STATE_DICTS
    if not exports and (options.freeze or options.image_size):
        parser.error(f"--freeze and --image_size go with an export, to a file {' or '.join(SUFFIXES)}; DEST is {dest}")
    if source.resolve() == dest.resolve():
        parser.error(f"DEST is SOURCE, {source}: write to another file")
    try:
        solver = parse(options.solver) if options.solver else None
        network, ours = _read(source, options.builder)
        unseen = "" if ours else "; what has no weights (strides, activations, pooling) is taken to be as published"
        print(f"read {source}: {_summary(network)}{unseen}")
        if not exports and ours != state_dict:
            form = "a continuum checkpoint" if ours else "a state dict"
            parser.error(f"nothing to do: {source} is {form} already, and by its suffix {dest} would be one too")
        if solver is not None:
            network = network.with_solver(solver)
        if exports:
            written = _export(network, dest, options.freeze, options.image_size)
        elif ours:
            to_checkpoint(network, dest)
            written = "a state dict"
        else:
            save(network, dest)
            written = "a continuum checkpoint"
    except (ExportError, ImportError, OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    print(f"wrote {dest}: {written}")


def _read(path: Path, builder: str | None) -> tuple[Network, bool]:
    """The network in a file, and whether it is a file of ours."""
    try:
        content = read(path)
    except CheckpointError:
        if builder is not None:  # which a published state dict does not have
            raise
        return from_checkpoint(path), False
    return restore(content, path, imported(builder)), True


def _summary(network: Network) -> str:
    assert network.blueprint is not None
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return f"{network.blueprint.builder}, {parameters:,} parameters, {solvers_of(network)}"


def _export(network: Network, dest: Path, freeze: bool, size: int | None) -> str:
    adaptive = [str(flow.solver) for flow in network.flows if flow.solver.steps(0.0, flow.depth) is None]
    if adaptive and not freeze:
        raise TypeError(
            f"a program has fixed steps, but those of {adaptive[0]} depend on the images: give --solver with others, such as "
            "rk4:h=0.25, or --freeze"
        )
    images = _sample(network, size)
    network = network.frozen(images) if freeze else network
    difference = export(network, dest, images)
    frozen = ", with the steps accepted on standard normal ones" if freeze else ""
    shape = ", ".join(map(str, images.shape[1:]))
    return f"a program for images of (batch, {shape}){frozen}; largest relative difference {difference:.1e}"


def _sample(network: Network, size: int | None) -> Tensor:
    """Standard normal images such as the network takes.

    Raises:
        ValueError: the network cannot take images of this size.
    """
    assert network.blueprint is not None
    facts = _facts(network)
    if "features" in facts and size:
        raise ValueError(f"{network.blueprint.builder} takes vectors, not images: leave --image_size out")
    side = size or (224 if facts.get("stem") == "imagenet" else 32)
    shape = [facts["features"]] if "features" in facts else [facts["in_channels"], side, side]
    images = torch.randn([SAMPLES, *shape], generator=torch.Generator().manual_seed(0)).to(next(network.parameters()))
    try:
        with torch.no_grad():
            network(images)
    except SolveError:
        raise
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{network.blueprint.builder} cannot take images of {side}x{side}: {error}") from None
    return images


def _facts(network: Network) -> dict[str, Any]:
    """The arguments of the builder, and what the network's first layer takes where they do not say it.

    Raises:
        ValueError: there is no such layer.
    """
    assert network.blueprint is not None
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            return {"in_channels": module.in_channels, **network.blueprint.arguments}
        if isinstance(module, nn.Linear):
            return {"features": module.in_features, **network.blueprint.arguments}
    raise ValueError(f"{network.blueprint.builder} says not what it takes: call continuum.export.export on images in Python")
