"""Files of torch.save, read so that they can do nothing: run code, take more memory than their size, hide damage."""

import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from continuum.files import whole_file


class CheckpointError(ValueError):
    """A file that holds no network of ours, or one that does not fit: one line that says which and why."""


def existing(path: str | os.PathLike[str]) -> Path:
    """The path of a file.

    Raises:
        FileNotFoundError: there is none.
    """
    try:
        if os.path.isfile(path):
            return Path(path)
    except ValueError:  # a null character
        pass
    raise FileNotFoundError(f"no checkpoint at {os.path.abspath(str(path))}")


def pack(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write plain data and tensors to `path`, whole.

    Raises:
        CheckpointError: the file cannot be written; the one before is whole.
    """
    try:
        with whole_file(path) as temporary:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as error:  # torch's writer raises a RuntimeError where a disk is full
        kept = "; the file that was there is whole" if Path(path).exists() else ""
        raise CheckpointError(
            f"{path} cannot be written ({one_line(error)}){kept}: make room, or give another folder"
        ) from error


def unpacked(path: str | os.PathLike[str]) -> Any:
    """The plain data and tensors in the file at `path`, on the CPU.

    Raises:
        FileNotFoundError: nothing at `path`.
        CheckpointError: no archive as torch.save writes it, code in it, a record that is damaged or compressed, or a tensor of
            more numbers than are stored.
    """
    path = existing(path)
    try:
        _check_records(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        for tensor in _tensors(content):
            _check_tensor(tensor)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        named = f" ({code[1]})" if code else ""
        raise CheckpointError(
            f"{path} holds pickled code{named}, which is never executed; a checkpoint is plain data"
        ) from None
    except (Exception, RecursionError) as error:  # a damaged file fails anywhere in the reader
        raise CheckpointError(f"{path} is not a checkpoint, or it is damaged or truncated: {one_line(error)}") from None
    return content


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:450]


def _check_records(path: Path) -> None:
    """Raise ValueError unless all records of the archive are stored as they are, within the file, with their checksums."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if len({record.filename for record in records}) < len(records):
            raise ValueError("two of its records have one name")
        for record in records:
            if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
                raise ValueError(f"its record {record.filename} is compressed or encrypted, as torch.save writes none")
        if sum(record.file_size for record in records) > size:
            raise ValueError("its records claim more bytes than it has")
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"its record {damaged} is not what was written, by its checksum")


def _tensors(content: Any) -> Iterator[Tensor]:
    """All tensors in nested mappings and lists."""
    ahead, seen = [content], set()
    while ahead:
        value = ahead.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            ahead += [*value.keys(), *value.values()] if isinstance(value, Mapping) else value


def _check_tensor(tensor: Tensor) -> None:
    """Raise ValueError unless a tensor holds numbers, each of them stored."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise ValueError(f"a tensor of it is {tensor.layout} on {tensor.device}, not plain numbers")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has more numbers than are stored")
