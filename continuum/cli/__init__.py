"""The `continuum` command. What a subcommand needs is imported when it runs, so that help comes at once."""

import argparse
import sys
from importlib import import_module

import continuum
from continuum.cli.parser import COMMANDS, LIGHTNING
from continuum.models.archive import CheckpointError
from continuum.solvers import SolveError
from continuum.zoo import BUILDERS


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; problems a user can mend end in one line and exit status 2, a failed solve in status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else ""
    try:
        if name in COMMANDS:
            getattr(import_module(f"continuum.cli.{name}"), f"{name}_command")(arguments[1:])
        elif name in LIGHTNING or name.partition("=")[0] in ("-c", "--config"):  # whose file may name the subcommand
            import_module("continuum.cli.training").training_command(arguments)
        else:
            _about(arguments)
    except (CheckpointError, OSError) as error:  # files that are not there or cannot be written, a full disk
        print(f"continuum: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except SolveError as error:
        print(f"continuum: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _about(arguments: list[str]) -> None:
    """Help, the version, or what is wrong with a line that names no subcommand."""
    words = f"Networks are built by {', '.join(BUILDERS)}, or a function of your own decorated with continuum.models.builder."
    parser = argparse.ArgumentParser(
        "continuum", description=f"Train networks of continuous depth and run their weights under any solver. {words}"
    )
    parser.add_argument("--version", action="version", version=continuum.__version__)
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", description="COMMAND --help lists the options of each"
    )
    for name, description in {**LIGHTNING, **COMMANDS}.items():
        commands.add_parser(name, help=description)
    if arguments and arguments[0] in ("-h", "--help", "--version"):
        parser.parse_args(arguments[:1])
    given = f"{arguments[0]!r} is no command" if arguments else "no command is given"
    parser.exit(2, f"continuum: {given}; there are {', '.join([*LIGHTNING, *COMMANDS])}, and --help explains them\n")
