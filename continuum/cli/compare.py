"""`continuum compare`: one set of weights under many solvers, as a table, files and pictures."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from continuum.analysis.compare import Row, compare_solvers, is_stochastic, write_csv, write_json
from continuum.analysis.plots import plot_comparison, plot_steps
from continuum.cli.checkpoints import opened, reading_parser
from continuum.cli.inputs import images_of
from continuum.cli.parser import Parser, chosen_device, device_name
from continuum.models.flows import without_noise
from continuum.solvers import parse
from continuum.training import ImageData

DEFAULT_STOCHASTIC = (
    "euler_maruyama:h=1",
    "euler_maruyama:h=0.5",
    "euler_maruyama:increments=brownian,h=1",
    "euler_maruyama:increments=brownian,h=0.25",
)
"""What a stochastic network is run under beside the others, which integrate its drift."""

DEFAULT_SOLVERS = (
    "euler:h=1",
    "euler:h=0.5",
    "euler:h=0.25",
    "midpoint:h=0.5",
    "rk4:h=1",
    "rk4:h=0.25",
    "dopri5:rtol=1e-3,atol=1e-3",
    "dopri5:rtol=1e-5,atol=1e-5",
)


def compare_parser() -> Parser:
    parser = reading_parser("compare")
    parser.add_argument("checkpoint", help="a file of continuum.save, or a checkpoint of `continuum fit`")
    parser.add_argument(
        "--solver",
        action="append",
        metavar="NAME:KEY=VALUE,...",
        help="a solver to run, such as rk4:h=0.5 or dopri5:rtol=1e-3,atol=1e-3; may be repeated "
        f"(default: {', '.join(DEFAULT_SOLVERS)})",
    )
    parser.add_subclass_arguments(
        ImageData, "data", required=False, help="the images to compare on (default: the test set of the training's data)"
    )
    parser.add_argument(
        "--paths", type=PositiveInt, default=5, help="paths of the noise under a stochastic solver (default: 5)"
    )
    parser.add_argument("--images", type=PositiveInt, help="use so many test images, chosen by the data's seed (default: all)")
    parser.add_argument("--batch_size", type=PositiveInt, help="images a batch; an adaptive solver shares its steps within one")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--out", help="folder for the table and pictures (default: compare/ beside the checkpoint)")
    return parser


def compare_command(arguments: list[str]) -> None:
    """`continuum compare`: rows are printed as they come, then written as CSV, JSON and pictures."""
    parser = compare_parser()
    options = parser.parse_args(arguments)
    try:
        solvers = [parse(text) for text in options.solver or DEFAULT_SOLVERS]
    except ValueError as error:
        parser.error(str(error))
    content, network = opened(options.checkpoint, options.builder)
    if network.stochastic and not options.solver:
        solvers += [parse(text) for text in DEFAULT_STOCHASTIC]
    drift = without_noise(network)
    try:
        solvers = [solver for solver in dict.fromkeys(solvers) if solver != drift.solver]  # whose row is the first
    except ValueError as error:
        parser.error(f"{options.checkpoint} has no solver to compare others with: {error}")
    device = chosen_device(parser, options.device)
    for solver in solvers:
        try:
            (network if is_stochastic(solver) else drift).with_solver(solver)
        except (TypeError, ValueError) as error:
            parser.error(f"--solver {solver} does not fit this network: {error}")
    images = images_of(parser, options, content, network, options.images, options.batch_size)
    rows = []
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), transient=True) as progress:
        task = progress.add_task("solvers", total=len(solvers) + 1)
        for row in compare_solvers(network, images.batches, solvers, device, options.paths):
            rows.append(row)
            progress.advance(task)
    Console(width=None if sys.stdout.isatty() else 160).print(_table(rows))
    for row in rows:
        if row.error:
            print(f"{row.solver} failed: {row.error}")
    facts = {
        "checkpoint": str(options.checkpoint),
        "data": images.name,
        "images": sum(len(labels) for _, labels in images.batches),
        "batch_size": images.batch_size,
        "device": device_name(device),
        "torch": torch.__version__,
    }
    out = Path(options.out) if options.out else Path(options.checkpoint).parent / "compare"
    write_csv(rows, out / "compare.csv")
    write_json(rows, facts, out / "compare.json")
    plot_comparison(rows, out / "compare.png")
    steps = plot_steps(rows, out / "steps.png")
    print(f"table:    {out / 'compare.csv'}, {out / 'compare.json'}")
    print(f"pictures: {out / 'compare.png'}" + (f", {out / 'steps.png'}" if steps else ""))


def _table(rows: Sequence[Row]) -> Table:
    table = Table(
        title="one set of weights, many solvers (first its own, without noise; after ±: deviation over paths of noise;\n"
        "in brackets: 95% intervals, of differences from the first solver paired by image, bold if without 0)"
    )
    headings = (
        "solver",
        "evaluations",
        "accep-\nted",
        "rejec-\nted",
        "accuracy %",
        "difference %",
        "loss",
        "agreement\n%",
        "logit\ndiff.",
        "ms/\nimage",
        "MiB",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "solver" else "right", no_wrap=heading == "solver")
    for index, row in enumerate(rows):
        if row.error:
            table.add_row(row.solver, "failed")
            continue
        table.add_row(
            row.solver,
            f"{row.evaluations:.1f}",
            f"{row.accepted:.1f}",
            f"{row.rejected:.1f}",
            f"{100 * row.accuracy:.2f}"
            + ("" if row.paths == 1 else f" ± {100 * row.accuracy_deviation:.2f}")
            + _limits(row.accuracy_low, row.accuracy_high),
            _difference(row) if index else "",
            f"{row.loss:.4f}" + ("" if row.paths == 1 else f" ± {row.loss_deviation:.3f}"),
            f"{100 * row.agreement:.2f}",
            f"{row.logit_difference:.2e}",
            f"{row.milliseconds:.3f}",
            f"{row.memory:.1f}",
        )
    return table


def _difference(row: Row) -> str:
    text = f"{100 * row.difference:+.2f}{_limits(row.difference_low, row.difference_high)}"
    return f"[bold]{text}[/bold]" if row.difference_low > 0 or row.difference_high < 0 else text


def _limits(low: float, high: float) -> str:
    return f" \\[{100 * low:.1f}, {100 * high:.1f}]"
