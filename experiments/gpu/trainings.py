"""A training that may be cut after any epoch and goes on from its checkpoint as if it had not been, to the bit."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from continuum import Network
from continuum.bench.fit import RandomImages
from continuum.training import Classifier, Compile, FashionMNIST, ImageData, Nesterov, Steps
from experiments.common import History, Row, cifar10, evaluated, seeded
from experiments.gpu.jobs import Job, Rows, Settings


@dataclass(frozen=True)
class Recipe:
    """How long and by which learning rates: divided by ten at the `milestones`. SGD has Nesterov's momentum of 0.9."""

    epochs: int = 160
    learning_rate: float = 0.1
    weight_decay: float = 1e-4
    milestones: tuple[int, ...] = (80, 120)
    batch_size: int = 128


PUBLISHED = Recipe()
"""He et al.'s, by which Lu et al. compare ResNet and LM-ResNet."""

SMALL = Recipe(epochs=3, milestones=(1, 2), batch_size=64)
"""Of networks no narrower than 8 channels: below, the gradients of a CPU with AVX2 only may write outside their memory."""


def one_launch(device: torch.device) -> list[pl.Callback]:
    """The callback of `continuum fit --compile true`, where there is a GPU."""
    return [Compile()] if device.type == "cuda" else []


class Losses(History):
    """The training loss of the last step and the accuracy of every epoch, each with its seconds."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = {name: round(float(trainer.callback_metrics[f"train/{name}"]), 4) for name in ("loss", "accuracy")}
        self.epochs.append({**found, "seconds": round(time.perf_counter() - self.start, 2)})


class Deadline(pl.Callback):
    """Ends the training after the epoch behind which another would not end in time, by `time.perf_counter`."""

    def __init__(self, end: float) -> None:
        self.end = end

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        now = time.perf_counter()
        trainer.should_stop = now + 1.2 * (now - self.start) > self.end


@dataclass(frozen=True)
class Training:
    """What is trained, on what, how, where its checkpoint lies, and what is kept of every epoch by name."""

    build: Callable[[], Network]
    data: Callable[[], ImageData]
    recipe: Recipe
    seed: int
    checkpoints: Path
    device: torch.device
    histories: Callable[[], dict[str, History]] = dict

    def run(self, seconds: float, finish: Callable[[Network, ImageData], Row]) -> Row:
        """Train on for so many seconds; behind the last epoch the row has test accuracy and loss, and what `finish` adds."""
        end = time.perf_counter() + seconds
        network, data, recipe = seeded(self.build, self.seed), self.data(), self.recipe
        histories = {"losses": Losses(), **self.histories()}
        last = self.checkpoints / "last.ckpt"
        keep = ModelCheckpoint(self.checkpoints, "last", save_on_train_epoch_end=True, enable_version_counter=False)
        classifier = Classifier(
            network,
            partial(Nesterov, lr=recipe.learning_rate, weight_decay=recipe.weight_decay),
            schedule=Steps(recipe.milestones),
        )
        torch.manual_seed(self.seed)  # of the noise
        trainer = quiet(
            self.device,
            [*one_launch(self.device), *histories.values(), Deadline(end), keep],
            max_epochs=recipe.epochs,
        )
        trainer.fit(classifier, data, ckpt_path=last if last.exists() else None, weights_only=True)
        done = len(histories["losses"].epochs)
        row: Row = {"seed": self.seed, "share": done / recipe.epochs, "epochs": done, "of": recipe.epochs}
        row |= {"data": type(data).__name__, "recipe": asdict(recipe)}
        row |= {name: history.epochs for name, history in histories.items()}
        if done < recipe.epochs:
            return row
        trained = classifier.network.to(self.device).eval()
        accuracy, loss = evaluated(trained, data)
        return {**row, "share": 1, "accuracy": accuracy, "loss": loss, **finish(trained, data)}


def quiet(device: torch.device, callbacks: Sequence[pl.Callback], precision: Any = "32-true", **limits: Any) -> pl.Trainer:
    """A trainer that prints, logs and validates nothing; checkpoints are those of the callbacks."""
    return pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=precision,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **limits,
    )


def nothing_more(network: Network, data: ImageData) -> Row:
    """A row of what is kept of every training."""
    return {}


IMAGES = {
    "ImageFolder": "JPEG CIFAR-10",
    "CIFAR10": "CIFAR-10",
    "FashionMNIST": "Fashion-MNIST",
    "RandomImages": "random images",
}
"""What the data modules hold here."""


def caption(rows: Rows) -> str:
    """What was trained on, and how."""
    found: dict[str, None] = {}
    for row in rows.values():
        recipe = row["recipe"]
        rates = f"a learning rate of {recipe['learning_rate']:g}, a tenth of it from epochs {recipe['milestones']} on"
        decay = f"weight decay {recipe['weight_decay']:g}"
        found[f"{IMAGES[row['data']]}, batches of {recipe['batch_size']}, {rates}, {decay}, float32."] = None
    return "\n".join(found)


def job(name: str, kind: str, seconds: float, training: Training, finish: Callable[[Network, ImageData], Row]) -> Job:
    """The training as a job of as many pieces as it has epochs."""
    return Job(name, seconds, lambda limit: training.run(limit, finish), kind, training.recipe.epochs)


# Images
def cifar10_images(settings: Settings, seed: int, batch_size: int) -> ImageData:
    """CIFAR-10 with crops and mirrored images; random images where the call is small and names no data."""
    if settings.data is None:
        return RandomImages(256, 32, batch_size)
    return cifar10(str(Path(settings.data) / "cifar10"), 256 if settings.quick else None, seed, batch_size)


def fashion_images(settings: Settings, seed: int, batch_size: int) -> ImageData:
    """Fashion-MNIST with crops and mirrored images; random ones of three channels where the call is small and names no data."""
    if settings.data is None:
        return RandomImages(256, 32, batch_size)
    return FashionMNIST(settings.data, batch_size, 0.0, train_size=256 if settings.quick else None, seed=seed)
