"""`continuum bench`: what a solve costs beyond its evaluations, and a step of `fit` beyond its loop."""

import logging
import os
import sys

import torch
from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.table import Table

from continuum.bench.fit import HEADINGS, fit_table
from continuum.bench.plots import plot_overhead
from continuum.bench.report import ALLOCATOR, Report, new_report, parts, plan, summary, ways_of
from continuum.cli.parser import Parser, chosen_device, parser_of
from continuum.files import write_json


def bench_parser() -> Parser:
    parser = parser_of("bench")
    parser.add_argument("--threads", type=PositiveInt, default=2, help="threads of torch on the CPU (default: 2)")
    parser.add_argument("--rounds", type=PositiveInt, help="rounds of each comparison, at most (default: 15)")
    parser.add_argument("--quick", action="store_true", help="small fields and two rounds: whether it runs, not how fast")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--out", metavar="FILE.json", help="write the report here (default: it is only printed)")
    parser.add_argument("--picture", metavar="FILE.png", help="draw the overheads here (default: no picture)")
    return parser


def bench_command(arguments: list[str]) -> None:
    """`continuum bench`: prints the overheads and the summary with its targets, and writes them as JSON and PNG."""
    parser = bench_parser()
    options = parser.parse_args(arguments)
    device = chosen_device(parser, options.device)
    if device.type == "cpu" and not options.quick:
        _keep_freed_memory()
    torch.set_num_threads(options.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # which says at every fit what devices there are
    console = Console(width=None if sys.stdout.isatty() else 160)
    chosen = plan(options.quick, options.rounds)
    report = new_report(chosen, device)
    with console.status("") as status:
        for part in parts(chosen, device):
            status.update(part.title)
            part.add_to(report)
    console.print(_overheads(report))
    console.print(_steps(report))
    print(f"\n{summary(report)}\n")
    for name, reason in report["missing"].items():
        print(f"{name}: {reason}")
    if options.out:
        write_json(report, options.out)
        print(f"report:  {options.out}")
    if options.picture:
        plot_overhead(report, options.picture)
        print(f"picture: {options.picture}")


def _keep_freed_memory() -> None:
    """Start this command again with the allocator told to keep what is freed, unless it has been told already.

    glibc gives large blocks back to the system as soon as they are freed, and takes them anew for the next tensor: the page
    faults cost a field of 16x32x32 as much as its arithmetic, at random. It reads its settings once, when a process starts.
    """
    if sys.platform == "linux" and not ALLOCATOR.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**ALLOCATOR, **os.environ})


def _overheads(report: Report) -> Table:
    """A line a field and pass, a column a way, in the order in which they first appear."""
    rows = [*report["overhead"], *report["adjoint"], *report["compiled"]]
    names = ways_of(rows)
    table = Table(title="time / (evaluations x time of one evaluation): medians, with the evaluations in parentheses")
    for heading in ("field", "pass", "f, ms", *names):
        table.add_column(heading, justify="left" if heading in ("field", "pass") else "right")
    for row in rows:
        ways = row["ways"]
        tolerance = f", {row['tolerance']:g}, {row['loss']}" if "tolerance" in row else ""
        cells = [f"{ways[n]['ratio']:.3g} ({ways[n]['evaluations']})" if n in ways else "" for n in names]
        single = ways["f"]["milliseconds"] / ways["f"]["evaluations"]
        table.add_row(f"{row['field']}, batch {row['batch']}", row["pass"] + tolerance, f"{single:.3g}", *cells)
    return table


def _steps(report: Report) -> Table:
    """A line a network, way and progress bar."""
    table = Table(title="a training step of `fit` against the plain loop over the same modules: medians")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("network", "way") else "right")
    for line in fit_table(report["fit_step"]):
        table.add_row(*line)
    return table
