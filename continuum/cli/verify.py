"""`continuum verify`: networks against plain loops, schemes against their orders, reversible steps against their inverses."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from continuum.cli.checkpoints import opened, reading_parser
from continuum.cli.parser import Parser
from continuum.models import Network
from continuum.verify.accuracy import Order, Undone, scheme_orders, undo_errors
from continuum.verify.certificate import GRADIENTS, SMALL, Certificate, certify, small, some_images

Checks = list[tuple[bool, str]]
"""Whether each check passed, and what to say if it did not."""


def verify_parser() -> Parser:
    parser = reading_parser("verify")
    parser.add_argument(
        "checkpoint",
        nargs="?",
        help="certify the network in a file of continuum.save or a checkpoint of `continuum fit` "
        "(default: a small one of each kind, the orders of all schemes, and the inverses of the reversible ones)",
    )
    return parser


def verify_command(arguments: list[str]) -> None:
    """`continuum verify`: prints a table of each kind of check, and exits with status 1 if one fails."""
    parser = verify_parser()
    options = parser.parse_args(arguments)
    path = options.checkpoint
    if path is None and options.builder is not None:
        parser.error("--builder is of the network in a file: give CHECKPOINT too")
    console = Console(width=None if sys.stdout.isatty() else 160)
    with _one_thread():
        if path is not None:
            _, network = opened(path, options.builder)
            try:
                checks = _certified(console, {str(path): network})
            except ValueError as error:
                parser.error(str(error))
        else:
            checks = _certified(console, {name: small(name) for name in SMALL})
            checks += _measured(console, scheme_orders())
            checks += _undone(console, undo_errors())
    failed = [message for passed, message in checks if not passed]
    for message in failed:
        print(message)
    print(f"{len(failed)} of {len(checks)} checks failed" if failed else f"all {len(checks)} checks passed")
    if failed:
        raise SystemExit(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small networks spend more time on waking threads than on work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _certified(console: Console, networks: Mapping[str, Network]) -> Checks:
    rows: list[Sequence[str]] = []
    checks: Checks = []
    for name, network in track(networks.items(), "networks", transient=True):
        found = certify(network, some_images(network).to(next(network.parameters())))
        equal = [_equal(same) for same in (found.training, found.evaluation, found.buffers)]
        rows.append(
            (name, found.solver or "none", f"{found.parameters:,}", *equal, f"{found.gradient:.1e}", _verdict(found.passed))
        )
        checks += _checks(name, found)
    title = f"networks and plain loops: logits and buffers equal to the bit, gradients to a relative {GRADIENTS:g}"
    headings = ("network", "scheme", "parameters", "training", "evaluation", "buffers", "gradients", "verdict")
    console.print(_table(title, headings, rows))
    return checks


def _checks(name: str, found: Certificate) -> Checks:
    where = f"the first difference is at {found.place}, of {found.difference:.1e}"
    return [
        (found.training, f"{name}: logits in training differ; {where}"),
        (found.evaluation, f"{name}: logits in evaluation differ; {where}"),
        (found.buffers, f"{name}: buffers differ; {where}"),
        (found.gradient <= GRADIENTS, f"{name}: gradients differ by {found.gradient:.1e}; {where}"),
    ]


def _measured(console: Console, orders: Iterable[Order]) -> Checks:
    found = list(orders)
    rows = [(str(order.scheme), str(order.scheme.order), f"{order.measured:.3f}", _verdict(order.passed)) for order in found]
    console.print(_table("orders of the schemes", ("scheme", "declared", "measured", "verdict"), rows))
    return [(order.passed, f"{order.scheme}: order {order.measured:.3f}, not {order.scheme.order}") for order in found]


def _undone(console: Console, errors: Iterable[Undone]) -> Checks:
    rows: list[Sequence[str]] = []
    checks: Checks = []
    for undone in errors:
        precision = str(undone.dtype).removeprefix("torch.")
        numbers = (f"{undone.error:.1e}", f"{undone.bound:.0e}")
        rows.append((str(undone.scheme), str(undone.layers), precision, *numbers, _verdict(undone.passed)))
        message = f"{undone.scheme}: {undone.layers} layers in {precision} are undone with an error of {undone.error:.1e}"
        checks.append((undone.passed, message))
    headings = ("scheme", "layers", "precision", "error", "bound", "verdict")
    console.print(_table("undone steps of the reversible schemes", headings, rows))
    return checks


def _equal(same: bool) -> str:
    return "equal" if same else "[red]differ[/red]"


def _verdict(passed: bool) -> str:
    return "[green]passed[/green]" if passed else "[red]failed[/red]"


def _table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table
