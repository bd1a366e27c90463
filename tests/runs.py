"""Runs: of Lightning on the CPU that print nothing, what cuts them short, and of two processes."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint


def quiet_trainer(callbacks: Sequence[pl.Callback] | None = None, **options: Any) -> pl.Trainer:
    """A trainer without logs, and without checkpoints but those of the callbacks."""
    callbacks = list(callbacks or ())
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    keep = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return pl.Trainer(accelerator="cpu", callbacks=callbacks, enable_checkpointing=keep, **quiet, **options)


class StopAt(pl.Callback):
    """Raises when so many steps are done and their checkpoints are written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            raise InterruptedError


def in_two_processes(worker: Path, folder: Path, *arguments: str) -> list[int]:
    """The exit codes of `python worker RANK FOLDER ...` for both ranks."""
    command, environment = [sys.executable, str(worker)], {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(rank), str(folder), *arguments], env=environment) for rank in range(2)]
    try:
        return [rank.wait(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
