"""How a run ends before its time: checkpoints that appear whole or not at all, and signals that leave one behind.

A killed process leaves the files of the last checkpoint as they were. SIGTERM and SIGINT end the training after the batch at
hand, with a checkpoint from which it goes on as if nothing had been. Several ranks, which could not agree on a batch any more,
end at once and leave the checkpoint of the last epoch.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from continuum.models.archive import pack


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place, to the disk, and renames it: at any moment the old file or the new one is there.

    `Classifier` puts it in the place of Lightning's own, which copies from another file system piece by piece. Checkpoints at
    an address (s3://...) are left to Lightning.

    Raises:
        CheckpointError: on saving, the file cannot be written; the one before is whole.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if "://" in str(path) or storage_options is not None:
            return super().save_checkpoint(checkpoint, path, storage_options)
        pack(checkpoint, path)


class EndOnSignal(Callback):
    """Ends a training at SIGINT or SIGTERM, with exit status 128 + the signal's number.

    A single process ends after the batch at hand and saves `last.ckpt` beside the other checkpoints; a second signal ends it
    at once. One of several ranks tells the others on its machine and ends at once, as they do.

    Raises:
        SystemExit: a signal has come.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.before: dict[int, Any] = {}

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_train_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # where Python allows no handlers
        if not self.before:
            self.received = None
        several = trainer.world_size > 1

        def end(number: int, frame: FrameType | None) -> None:
            if several:
                _end_all_ranks(trainer, number)
            if self.received is not None:
                raise KeyboardInterrupt
            self.received = number

        before: dict[int, Any] = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
        self.before = self.before or before

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self._end(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self._end(trainer)

    def _end(self, trainer: pl.Trainer) -> None:
        if self.received is not None:
            raise SystemExit(128 + self.received)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signals back, as Lightning does next."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)
        if self.received is None or not isinstance(exception, SystemExit):
            return
        name = signal.Signals(self.received).name
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.filename == "last" and callback.dirpath:
                path = os.path.join(callback.dirpath, "last.ckpt")
                trainer.save_checkpoint(path)
                print(f"continuum: ended by {name}; --ckpt_path {path} goes on from here", file=sys.stderr)


def _end_all_ranks(trainer: pl.Trainer, number: int) -> None:
    """End this process and the ranks beside it; files are whole at any moment, so nothing is waited for."""
    signal.signal(number, signal.SIG_IGN)
    launcher: Any = trainer.strategy.launcher
    procs = list(getattr(launcher, "procs", []))
    if trainer.local_rank:
        os.kill(os.getppid(), number)
    for process in procs:
        process.kill()
    print(f"continuum: rank {trainer.global_rank} ended by {signal.Signals(number).name}", file=sys.stderr, flush=True)
    os._exit(128 + number)
