"""Files that appear whole or not at all: written beside their place, then renamed."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    # A folder of its own, so that the file inside gets the permissions of any new file.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        temporary = Path(folder) / target.name
        yield temporary
        os.replace(temporary, target)
