"""`continuum weak`: how far a network with noise is from its SDE, as tables, files and a picture."""

import sys
from pathlib import Path

import torch
from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.table import Table

from continuum.analysis.plots import plot_weak
from continuum.analysis.weak import Gap, WeakReport, weak_report, write_csv, write_json
from continuum.cli.checkpoints import opened, reading_parser
from continuum.cli.inputs import images_of
from continuum.cli.parser import Parser, chosen_device, device_name
from continuum.training import ImageData


def weak_parser() -> Parser:
    parser = reading_parser("weak")
    parser.add_argument("checkpoint", help="a file of continuum.save, or a checkpoint of `continuum fit`")
    parser.add_subclass_arguments(
        ImageData, "data", required=False, help="the images to measure on (default: the test set of the training's data)"
    )
    parser.add_argument("--images", type=PositiveInt, default=64, help="use so many test images, chosen by the data's seed")
    parser.add_argument("--paths", type=PositiveInt, default=100, help="draw the noise so often; intervals shrink as its root")
    parser.add_argument("--steps", type=PositiveInt, default=16, help="steps a layer for the SDE, an even number")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the noise")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--out", help="folder for the table and picture (default: weak/ beside the checkpoint)")
    return parser


def weak_command(arguments: list[str]) -> None:
    """`continuum weak`: prints the noise of every layer and the largest weak errors, and writes all as CSV, JSON and PNG."""
    parser = weak_parser()
    options = parser.parse_args(arguments)
    content, network = opened(options.checkpoint, options.builder)
    device = chosen_device(parser, options.device)
    if not network.stochastic:
        parser.error(f"{options.checkpoint} holds a network without noise: there is no SDE for it to be near to")
    found = images_of(parser, options, content, network, options.images)
    images, labels = (torch.cat([batch[k] for batch in found.batches]).to(device) for k in (0, 1))
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        with console.status(f"{options.paths} paths of {len(images)} images"):
            report = weak_report(network.to(device), images, options.paths, options.steps, options.seed, labels)
    except (RuntimeError, ValueError) as error:  # steps, or images of another size than the network's
        parser.error(str(error))
    console.print(_layers(report))
    console.print(_errors(report))
    facts = {
        "checkpoint": str(options.checkpoint),
        "data": found.name,
        "images": len(images),
        "paths": options.paths,
        "steps_per_layer": options.steps,
        "seed": options.seed,
        "device": device_name(device),
        "torch": torch.__version__,
    }
    out = Path(options.out) if options.out else Path(options.checkpoint).parent / "weak"
    write_csv(report, out / "weak.csv")
    write_json(report, facts, out / "weak.json")
    plot_weak(report, out / "weak.png")
    print(f"table:   {out / 'weak.csv'}, {out / 'weak.json'}")
    print(f"picture: {out / 'weak.png'}")


def _layers(report: WeakReport) -> Table:
    table = Table(title="noise of the layers: moments of xi = (eta - mean) / deviation, h = 1 / layers of the flow")
    for heading in (
        "layer",
        "law",
        "E eta",
        "E xi",
        "E xi^2",
        "E xi^3",
        "E xi^4",
        "E (eta - mean)^3 / var",
        "sqrt h",
        "|E xi^3|",
    ):
        table.add_column(heading, justify="left" if heading in ("layer", "law", "|E xi^3|") else "right")
    for layer in report.layers:
        if not layer.noisy:
            table.add_row(layer.layer, layer.law)
            continue
        moments = zip(layer.moments, layer.confidence, strict=True)
        cells = [_number(moment) + (f" ± {half:.3f}" if half else "") for moment, half in moments]
        verdict = "[green]small[/green]" if layer.small else "[red]not small[/red]"
        law = layer.law.partition("(")[0]
        table.add_row(layer.layer, law, _number(layer.mean), *cells, _number(layer.asymmetry), _number(layer.bound), verdict)
    return table


def _number(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"  # no -0.000


def _errors(report: WeakReport) -> Table:
    table = Table(title="differences of E g with 95% intervals, for the class that is furthest from the SDE at h = 1")
    for heading in ("g", "class", "E g of the SDE", "h = 1, and SDE", "h = 1/2, and SDE", "evaluation, and noise at h = 1"):
        table.add_column(heading, justify="left" if heading == "g" else "right")
    for test, gaps in report.largest().items():
        first = gaps["h=1"]
        number = "" if test == "accuracy" else str(first.number)
        table.add_row(test, number, f"{first.value:.4g}", *(_interval(gaps[k]) for k in ("h=1", "h=1/2", "evaluation")))
    return table


def _interval(gap: Gap) -> str:
    return f"{gap.error:.2e} ± {gap.confidence:.1e}"
