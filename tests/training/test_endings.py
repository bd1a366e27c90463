"""How a run ends before its time: what a kill, a signal or a full disk leaves is whole, and the next run goes on from it."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from runs import quiet_trainer

from continuum import files
from continuum.models.checkpoint import CheckpointError
from continuum.training import Classifier, Digits, EndOnSignal, OneCycle, WholeFiles
from continuum.zoo import preresnet

QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
SMALL = ["--data.init_args.train_size", "64"]


@contextmanager
def started(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`continuum fit` in a process of its own, which writes to `folder`; it does not outlive the block."""
    command = [sys.executable, "-c", "from continuum.cli import main; main()", "fit", *QUIET, *options]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(2400):
        if path.exists():
            return
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.1)
    raise AssertionError(f"{path} did not appear")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_that_the_next_run_goes_on_from(tmp_path: Path, number: signal.Signals) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    with started(tmp_path, *SMALL, "--trainer.max_epochs", "1000") as process:
        wait_for(last, process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 128 + number, errors
    assert f"ended by {number.name}" in errors
    step = torch.load(last, weights_only=True)["global_step"]
    options = ("--config", "config.yaml", "--trainer.max_steps", str(step + 3), "--ckpt_path", str(last))
    with started(tmp_path, *options) as process:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    assert torch.load(last, weights_only=True)["global_step"] == step + 3


class Ended(pl.Callback):
    """Gets a signal in the second epoch, at its second batch, in its validation, or in the check before all training."""

    def __init__(self, place: str) -> None:
        self.place = place

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: object, batch_idx: int) -> None:
        if self.place == "training" and (trainer.current_epoch, batch_idx) == (1, 1):
            signal.raise_signal(signal.SIGTERM)

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if self.place == ("check" if trainer.sanity_checking else f"validation {trainer.current_epoch}"):
            signal.raise_signal(signal.SIGTERM)


def trained(folder: Path, *callbacks: pl.Callback, resume: Path | None = None) -> Classifier:
    pl.seed_everything(0)
    model = Classifier(preresnet(14, width=4, in_channels=1), schedule=OneCycle())
    keep = ModelCheckpoint(folder, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
    trainer = quiet_trainer([keep, EndOnSignal(), *callbacks], max_epochs=3)
    trainer.fit(model, Digits(batch_size=40, train_size=200, crop=1, seed=0), ckpt_path=resume)
    return model


@pytest.mark.parametrize("place", ["training", "validation 0", "validation 1", "check"])
def test_a_run_that_a_signal_ended_goes_on_as_if_it_had_not(tmp_path: Path, place: str) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    whole = trained(tmp_path / "whole")
    with pytest.raises(SystemExit) as ended:
        trained(tmp_path / "cut", Ended(place))
    assert ended.value.code == 128 + signal.SIGTERM
    resumed = trained(tmp_path / "cut", resume=tmp_path / "cut" / "last.ckpt")
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name]), name
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_clears_up(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    code = (
        "import os, sys; from continuum.files import whole_file\n"
        "with whole_file(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / f".continuum-elsewhere-{os.getpid()}-x").mkdir()  # another machine's, which may be at work
    files.write_text("new", path)
    assert path.read_text() == "new"
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", f".continuum-elsewhere-{os.getpid()}-x"}


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no second file system to write to")
def test_a_kill_at_any_moment_leaves_a_checkpoint_on_any_file_system() -> None:
    """Two of 8 MB are written in turn, until the process is killed."""
    code = (
        "import sys, torch; from continuum.training import WholeFiles\n"
        "while True:\n"
        "    for number in (1.0, 2.0):\n"
        "        WholeFiles().save_checkpoint({'weights': torch.full((2_000_000,), number)}, sys.argv[1])\n"
    )
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "last.ckpt"
        for kill in range(6):
            process = subprocess.Popen([sys.executable, "-c", code, str(path)])
            while not path.exists():
                time.sleep(0.01)
            time.sleep(0.013 * kill)
            process.kill()
            process.wait()
            weights = torch.load(path, weights_only=True)["weights"]
            assert weights.eq(weights[0]).all()
            path.unlink()
        files.write_text("", path)
        assert [entry.name for entry in Path(folder).iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    path = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint({"step": 1}, path)

    def full(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"cannot be written .*the file that was there is whole"):
        WholeFiles().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]
