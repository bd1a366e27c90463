"""What holds for every test: one thread, as in the measurements that tests are compared with."""

import sys

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def command_line(monkeypatch, tmp_path):
    """The command line in a folder of its own."""
    monkeypatch.setattr(sys, "argv", ["continuum"])
    monkeypatch.chdir(tmp_path)
