"""Runs: of Lightning on the CPU that print nothing, what cuts them short, and of two processes."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from continuum import Network
from continuum.training import Classifier, ImageData

NETWORK = """
model:
  network:
    class_path: continuum.zoo.odenet
    init_args:
      width: 4
      downsample: false
      solver: bosh3:rtol=1e-2,atol=1e-2
"""
CONFIG = f"""seed_everything: 1
data:
  class_path: continuum.training.Digits
  init_args:
    train_size: 64
    batch_size: 32
{NETWORK}
trainer:
  accelerator: cpu
  max_epochs: 2
  logger:
    class_path: pytorch_lightning.loggers.CSVLogger
    init_args:
      save_dir: runs
      name: small
      version: ""
"""
"""Of the command line: two epochs of two batches."""


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


def fit(
    network: Network,
    data: ImageData,
    callbacks: Sequence[pl.Callback] = (),
    resume: Path | None = None,
    options: dict[str, Any] | None = None,
    **limits: Any,
) -> Classifier:
    """A classifier with these options after a run, which a `StopAt` may have cut short."""
    pl.seed_everything(0)
    model = Classifier(network, **(options or {}))
    try:
        quiet_trainer(callbacks, **limits).fit(model, data, ckpt_path=resume)
    except InterruptedError:
        assert any(isinstance(callback, StopAt) for callback in callbacks)
    return model


def same_state(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def in_two_processes(worker: Path, folder: Path, *arguments: str) -> list[int]:
    """The exit codes of `python worker RANK FOLDER ...` for both ranks."""
    command = [sys.executable, str(worker)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [subprocess.Popen([*command, str(rank), str(folder), *arguments], env=environment) for rank in range(2)]
    try:
        return [rank.wait(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
