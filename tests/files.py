"""Files that hold code, and writes that fail half way."""

import os
from pathlib import Path


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


class DiskFullError(Exception):
    pass


def failing(error):
    """Leaves half a file at every path that it is given, and raises."""

    def fails(*arguments, **options):
        for argument in arguments:
            if isinstance(argument, Path):
                argument.write_bytes(b"half a file")
        raise error

    return fails
