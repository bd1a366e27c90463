"""What several subcommands measure on: the images of a checkpoint's training or of `--data`."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jsonargparse
import torch
from torch import Tensor

from continuum.cli.parser import Parser
from continuum.models import Network
from continuum.models.archive import CheckpointError, one_line
from continuum.models.checkpoint import KEY, check_plain
from continuum.training import ImageData
from continuum.training.fitting import check_fit
from continuum.training.sets import DATA


class Images(NamedTuple):
    """The name of a data set, and its test images in batches (images, labels)."""

    name: str
    batch_size: int
    batches: list[tuple[Tensor, Tensor]]


def images_of(
    parser: Parser,
    options: jsonargparse.Namespace,
    content: dict[str, Any],
    network: Network,
    limit: int | None,
    batch_size: int | None = None,
) -> Images:
    """The test images of `--data`, or of the data that the checkpoint's `content` names; in the type of the weights.

    Images that cannot be used, or that the network does not take, end the command.
    """
    try:
        data = parser.instantiate_classes(options)["data"] or described_data(content, options.checkpoint)
        data.batch_size = batch_size or data.batch_size
        data.prepare_data()
        data.setup("test")
        check_fit(network, data)
        weight = next(network.parameters(), torch.empty(0))
        batches = [(images.to(weight), labels) for images, labels in data.test_batches(limit)]
    except (TypeError, ValueError) as error:  # data that cannot be built, cannot be used, or do not fit
        parser.error(str(error))
    return Images(type(data).__name__, data.batch_size, batches)


def described_data(content: dict[str, Any], path: str, changed: Mapping[str, Any] | None = None) -> ImageData:
    """The data that the checkpoint at `path` was trained on, by one of the data modules here; with other arguments if given.

    Raises:
        CheckpointError: the file does not say, or what cannot be.
    """
    stated = content[KEY].get("data")
    if stated is None:
        raise CheckpointError(f"{path} does not say which data it was trained on: name them, for example --data Digits")
    try:
        name, arguments = stated["class"], {**stated["arguments"], **(changed or {})}
        for argument, value in arguments.items():
            check_plain(argument, value, LARGEST_OF_DATA)
        if "workers" in arguments:  # of another machine
            arguments["workers"] = min(arguments["workers"], os.cpu_count() or 1)
        return DATA[name](**arguments)
    except Exception as error:  # whatever odd arguments lead to
        raise CheckpointError(f"{path} names data that cannot be built ({one_line(error)}): give --data") from None


LARGEST_OF_DATA = 2**63 - 1
"""A seed, or a memory limit in bytes."""
