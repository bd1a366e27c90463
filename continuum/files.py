"""Files that appear whole or not at all: written beside their place, to the disk, then renamed."""

import csv
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to; it becomes `path` if the block succeeds and vanishes if it fails.

    >>> with whole_file("/tmp/continuum-example.txt") as temporary:
    ...     _ = temporary.write_text("complete")
    >>> Path("/tmp/continuum-example.txt").read_text()
    'complete'
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    clear(target.parent)
    try:
        # A folder of its own, so that the file inside gets the permissions of any new file.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{_mark()}{os.getpid()}-") as folder:
            temporary = Path(folder) / target.name
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
    except OSError as error:
        if error.filename is None:  # as where the disk is full
            error.filename = str(target)
        raise


def clear(folder: Path) -> None:
    """Remove from `folder` what processes of this machine were writing there when they were killed."""
    for left in folder.glob(f"{_mark()}*-*"):
        number = left.name.removeprefix(_mark()).partition("-")[0]
        if number.isdecimal() and not _alive(int(number)):
            shutil.rmtree(left, ignore_errors=True)


def _mark() -> str:
    return f".continuum-{platform.node()}-"


def _alive(process: int) -> bool:
    if os.name != "posix":  # where a signal of zero is none
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def write_text(text: str, path: str | os.PathLike[str]) -> None:
    """Write a text file, whole."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write plain data as JSON, whole; numbers that are not finite become null."""
    write_text(json.dumps(_finite(content), indent=1, ensure_ascii=False) + "\n", path)


def write_csv(rows: Iterable[Iterable[Any]], path: str | os.PathLike[str]) -> None:
    """Write rows as CSV, whole; the first holds the headings."""
    with whole_file(path) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
