"""Classification of images by any network: cross-entropy, SGD with Nesterov momentum, a learning-rate schedule."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR
from torchmetrics.classification import MulticlassAccuracy

from continuum.fields import Momentum
from continuum.models import Network
from continuum.models.checkpoint import KEY, CheckpointError, description, replay
from continuum.models.failure import find_failure
from continuum.solvers import SolveError
from continuum.training.data import ImageData

Batch = tuple[Tensor, Tensor]
"""Images, (batch, channels, height, width) in float32, and labels, (batch,) in int64."""


class Schedule(ABC):
    """How the learning rate changes during training."""

    interval: Literal["step", "epoch"]

    @abstractmethod
    def build(self, optimizer: Optimizer, learning_rate: float, steps: int) -> LRScheduler:
        """The torch scheduler for a run of so many optimiser `steps`."""


class OneCycle(Schedule):
    """One cycle (arXiv 1708.07120): up to the learning rate over a share `warmup` of all steps, then down to zero."""

    interval = "step"

    def __init__(self, warmup: float = 0.3) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup is a share of the training in [0, 1), not {warmup}")
        self.warmup = warmup

    def build(self, optimizer: Optimizer, learning_rate: float, steps: int) -> LRScheduler:
        return OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=self.warmup, cycle_momentum=False)


class Steps(Schedule):
    """The learning rate multiplied by `factor` at each of the epochs `milestones`, as He et al. and Lu et al. train."""

    interval = "epoch"

    def __init__(self, milestones: Sequence[int] = (80, 120), factor: float = 0.1) -> None:
        if list(milestones) != sorted(set(milestones)) or not factor > 0:
            raise ValueError(f"milestones are increasing epochs and factor is positive; got {milestones} and {factor}")
        self.milestones = list(milestones)
        self.factor = factor

    def build(self, optimizer: Optimizer, learning_rate: float, steps: int) -> LRScheduler:
        return MultiStepLR(optimizer, self.milestones, gamma=self.factor)


class Classifier(pl.LightningModule):
    """Trains `network` to classify images.

    Args:
        network: any `Network` from images to logits.
        learning_rate: the largest learning rate of SGD.
        momentum: Nesterov's momentum.
        weight_decay: on all parameters except the k of LM-ResNet, which it would pull away from ResNet.
        label_smoothing: the share of the target spread evenly over the classes.
        schedule: OneCycle, or Steps; None keeps the learning rate.

    Raises:
        SolveError: a solve failed, or the loss is not finite; before any weight has changed, and with BatchNorm's buffers as
            they were after the last good step. Under several ranks all of them raise.
    """

    def __init__(
        self,
        network: Network,
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        label_smoothing: float = 0.0,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.train_accuracy = MulticlassAccuracy(None, average="micro")
        self.val_accuracy = MulticlassAccuracy(None, average="micro")
        self.test_accuracy = MulticlassAccuracy(None, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        buffers = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
        loss, failure = None, None
        try:
            logits = self(images)
            loss = self.loss(logits, labels)
            # The one look at the device a step: fixed steps check nothing themselves.
            if not torch.isfinite(loss):
                failure = find_failure(self.network, images)
        except SolveError as error:
            failure = error
        if not self._all_ranks_solved(failure is None):
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            raise failure or SolveError(
                "a solve failed on another rank", depth=0.0, step=0.0, evaluations=0, advice="See that rank's message"
            )
        assert loss is not None
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.train_accuracy(logits.detach(), labels)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def _all_ranks_solved(self, here: bool) -> bool:
        return here if self.trainer.world_size == 1 else self.trainer.strategy.reduce_boolean_decision(here, all=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", self.val_accuracy, batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", self.test_accuracy, batch)

    def _evaluate(self, stage: str, accuracy: MulticlassAccuracy, batch: Batch) -> None:
        images, labels = batch
        logits = self(images)
        accuracy(logits, labels)
        self.log(f"{stage}/loss", self.loss(logits, labels), batch_size=len(labels), prog_bar=True, sync_dist=True)
        self.log(f"{stage}/accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The probabilities of the classes, (batch, classes)."""
        return torch.softmax(self(batch[0]), dim=1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        friction = {id(module.k) for module in self.network.modules() if isinstance(module, Momentum)}
        parameters = list(self.network.parameters())
        groups = [
            {"params": [p for p in parameters if id(p) not in friction], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if id(p) in friction], "weight_decay": 0.0},
        ]
        optimizer = SGD(
            [group for group in groups if group["params"]],
            lr=self.learning_rate,
            momentum=self.momentum,
            nesterov=self.momentum > 0,
        )
        if self.schedule is None:
            return optimizer
        scheduler = self.schedule.build(optimizer, self.learning_rate, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.schedule.interval}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint say how to build the network, and on which data it was trained."""
        if self.network.blueprint is None:
            return
        checkpoint[KEY] = description(self.network)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ImageData):
            checkpoint[KEY]["data"] = {"class": type(data).__name__, "arguments": data.arguments}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refine and project the network as the checkpoint's was, so that its weights fit.

        Raises:
            CheckpointError: this network was changed otherwise.
        """
        if self.network.blueprint is None or KEY not in checkpoint:
            return
        known = [list(change) for change in self.network.blueprint.changes]
        changes = [list(change) for change in checkpoint[KEY].get("changes", [])]
        if changes[: len(known)] != known:
            raise CheckpointError(
                f"the checkpoint's network went through the changes {changes}, this one through {known}: give the network as "
                "it was built; what the checkpoint says is done to it"
            )
        self.network = replay(self.network, changes[len(known) :])
