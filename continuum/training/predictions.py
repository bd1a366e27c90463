"""Predictions in a file: a row an image, which says which image it is, what it is, and what the network takes it for."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import BasePredictionWriter
from torch import Tensor

from continuum.files import write_csv
from continuum.training.batches import BatchLoader
from continuum.training.data import ImageData


class WritePredictions(BasePredictionWriter):
    """Writes `predictions.csv` after `predict`: one row a test image, in their order, by the first of several ranks.

    The columns are `image`, the number of the image; `file` where images have files; `label` and `class`, the name of its
    class and of the one predicted, which is empty where the logits are not finite; and a probability p(class) for each class.
    Where the noise is sampled, the probabilities are means over the samples, and columns s(class) hold their standard
    deviations.

    Args:
        folder: where to write; None is beside the checkpoint, or without one the trainer's log folder.

    Raises:
        RuntimeError: after `predict`, several ranks whose loader does not say which images it has served.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__(write_interval="epoch")
        self.folder = folder

    def write_on_epoch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        samples = torch.cat(list(_leaves(predictions))).float().cpu()
        found = dict(zip(_served(trainer, len(samples), batch_indices), samples, strict=True))
        if trainer.world_size > 1:
            parts: list[dict[int, Tensor]] = [{} for _ in range(trainer.world_size)]
            dist.all_gather_object(parts, found)
            found = {image: row for part in parts for image, row in part.items()}
        if not trainer.is_global_zero:
            return
        beside = Path(trainer.ckpt_path).parent if trainer.ckpt_path else None
        path = Path(self.folder or beside or trainer.log_dir or trainer.default_root_dir) / "predictions.csv"
        data = getattr(trainer, "datamodule", None)
        write_csv(_rows(dict(sorted(found.items())), data if isinstance(data, ImageData) else None), path)
        print(f"predictions: {path}")


def _served(trainer: pl.Trainer, count: int, batch_indices: Sequence[Any]) -> Sequence[int]:
    """The number of each image that this rank has predicted, in the order of its batches."""
    loader = trainer.predict_dataloaders
    if isinstance(loader, BatchLoader):
        return loader.plan.epoch(0).order.tolist()[:count]
    told = [int(index) for index in _leaves(batch_indices)]
    if len(told) == count:
        return told
    if trainer.world_size > 1:
        raise RuntimeError(
            f"the loader served {count} images on rank {trainer.global_rank} and does not say which: predict with an "
            "ImageData, or with devices=1"
        )
    return range(count)


def _rows(found: dict[int, Tensor], data: ImageData | None) -> Iterator[list[Any]]:
    """The table: for each image its probabilities, (classes,), or those of each sample of the noise, (classes, samples)."""
    if not found:
        return
    samples = torch.stack(list(found.values()))
    sampled = samples.dim() == 3
    probabilities = samples.mean(dim=2) if sampled else samples
    spread = samples.std(dim=2, correction=min(samples.shape[2] - 1, 1)) if sampled else samples.new_empty(len(samples), 0)
    classes = (data and data.classes) or [str(number) for number in range(probabilities.shape[1])]
    files = data.test_images.names if data else ()
    heads = ["image", *(["file"] if files else []), *(["label"] if data else []), "class"]
    yield [*heads, *(f"p({name})" for name in classes), *(f"s({name})" for name in classes if sampled)]
    for image, row, widths in zip(found, probabilities.tolist(), spread.tolist(), strict=True):
        label = [classes[int(data.test_images.labels[image])]] if data else []
        best = classes[max(range(len(row)), key=row.__getitem__)] if all(map(math.isfinite, row)) else ""
        numbers = (f"{value:.6f}" for value in (*row, *widths))
        yield [image, *([files[image]] if files else []), *label, best, *numbers]


def _leaves(nested: Any) -> Iterator[Any]:
    """What is in lists of lists, in order: Lightning nests batches by data loader where there are several."""
    if isinstance(nested, list | tuple):
        for item in nested:
            yield from _leaves(item)
    else:
        yield nested
