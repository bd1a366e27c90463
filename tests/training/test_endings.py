"""How a run ends before its time: what a kill, a signal or a full disk leaves is whole, and the next run goes on from it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from continuum import files
from continuum.models.checkpoint import CheckpointError
from continuum.training.endings import WholeFiles

SLOW = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    """`continuum fit` in a process of its own, which writes to `folder`."""
    command = [sys.executable, "-c", "from continuum.cli import main; main()", "fit", *SLOW, *options]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(600):
        if path.exists():
            return
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.1)
    raise AssertionError(f"{path} did not appear")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_that_the_next_run_goes_on_from(tmp_path: Path, number: signal.Signals) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    process = start(tmp_path, "--trainer.max_epochs", "1000")
    wait_for(last, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number, errors
    assert f"ended by {number.name}" in errors
    step = torch.load(last, weights_only=True)["global_step"]
    process = start(tmp_path, "--config", "config.yaml", "--trainer.max_steps", str(step + 3), "--ckpt_path", str(last))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert torch.load(last, weights_only=True)["global_step"] == step + 3


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


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    path = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint({"step": 1}, path)

    def full(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"cannot be written .*the checkpoint that was there is whole"):
        WholeFiles().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]
