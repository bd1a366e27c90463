"""What to watch and to keep while Lightning runs: the cost of each flow, and predictions in a file."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter, Callback
from torch import Tensor

from continuum.files import whole_file
from continuum.models import Network


class LogCost(Callback):
    """Logs evaluations, accepted and rejected steps of every flow, and all evaluations in the progress bar.

    For modules that have a `network`, such as `Classifier`.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        network = getattr(pl_module, "network", None)
        if not isinstance(network, Network):
            return
        total = 0
        for index, flow in enumerate(network.flows):
            if flow.cost is None:
                continue
            total += flow.cost.evaluations
            costs = {"evaluations": flow.cost.evaluations, "accepted": flow.cost.accepted, "rejected": flow.cost.rejected}
            pl_module.log_dict({f"flow{index}/{name}": float(value) for name, value in costs.items()})
        pl_module.log("evaluations", float(total), prog_bar=True)


class WritePredictions(BasePredictionWriter):
    """Writes `predictions.csv` after `predict`: one row an image with its class and the probability of each class.

    It goes to `folder`, or to the trainer's log folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__(write_interval="epoch")
        self.folder = folder

    def write_on_epoch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        probabilities = torch.cat(_flat(predictions))
        classes = list(getattr(getattr(trainer, "datamodule", None), "classes", None) or range(probabilities.shape[1]))
        folder = Path(self.folder or trainer.log_dir or trainer.default_root_dir)
        name = "predictions.csv" if trainer.world_size == 1 else f"predictions-rank{trainer.global_rank}.csv"
        with whole_file(folder / name) as temporary, open(temporary, "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["image", "class", *(f"p({c})" for c in classes)])
            for index, row in enumerate(probabilities.tolist()):
                best = max(range(len(row)), key=row.__getitem__)
                rows.writerow([index, classes[best], *(f"{p:.6f}" for p in row)])
        if trainer.is_global_zero:
            print(f"predictions: {folder / name}")


def _flat(predictions: Sequence[Any]) -> list[Tensor]:
    """Batches in order; Lightning nests them by data loader where there are several."""
    return [leaf for item in predictions for leaf in ([item] if isinstance(item, Tensor) else _flat(item))]
