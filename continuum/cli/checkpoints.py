"""The file that several subcommands read: its network is built by the zoo, or by the builder that the user names."""

import pkgutil
from collections.abc import Callable
from typing import Any

from continuum.cli.parser import Parser, parser_of
from continuum.models import Network
from continuum.models.archive import CheckpointError, one_line
from continuum.models.checkpoint import read, restore
from continuum.models.network import name_of

BUILDER_HELP = (
    "import path of the function that built the network in the file, such as mynet.mine, where it is not of the zoo: it is "
    "imported because you name it, never because a file does"
)


def reading_parser(name: str) -> Parser:
    """The parser of a subcommand that reads a checkpoint, with `--builder`."""
    parser = parser_of(name)
    parser.add_argument("--builder", metavar="MODULE.FUNCTION", help=BUILDER_HELP)
    return parser


def opened(path: str, builder: str | None) -> tuple[dict[str, Any], Network]:
    """The content of a checkpoint and its network.

    Args:
        path: the file.
        builder: what the user gave as `--builder`.

    Raises:
        FileNotFoundError: nothing at `path`.
        CheckpointError: a file or a builder that is none, or those of two networks.
    """
    content = read(path)
    return content, restore(content, path, imported(builder))


def imported(path: str | None) -> Callable[..., Network] | None:
    """The builder at an import path that the user gave; None where none is given.

    Raises:
        CheckpointError: it cannot be imported, or is no function decorated with `continuum.models.builder`.
    """
    if path is None:
        return None
    try:
        found = pkgutil.resolve_name(path)
    except Exception as error:  # the module runs, and may fail in any way
        raise CheckpointError(
            f"--builder {path[:99]!r} cannot be imported: {one_line(error)}; give MODULE.FUNCTION, of a module that is "
            "installed or in a folder on PYTHONPATH"
        ) from None
    if name_of(found) is None:  # whatever else is there would be called with what the file says
        raise CheckpointError(f"--builder {path[:99]!r} is no builder: decorate the function with @continuum.models.builder")
    return found
