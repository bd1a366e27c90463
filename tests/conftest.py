"""What holds for every test: one thread, as in the measurements that tests are compared with."""

import functools
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from continuum.cli import main

torch.set_num_threads(1)


@pytest.fixture
def command_line(monkeypatch, tmp_path):
    """The command line in a folder of its own."""
    monkeypatch.setattr(sys, "argv", ["continuum"])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(capsys):
    """The one line on which a command gives up, with exit status 2."""

    def line(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, arguments)))
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2
        assert [line for line in lines if line.startswith("continuum: ")] == lines[-1:]
        assert "Traceback" not in "".join(lines)
        return lines[-1]

    return line


@pytest.fixture
def graphs(request, monkeypatch):
    """Counts graphs, which run as they are traced instead of as machine code, in less than a tenth of the time."""
    counter = CompileCounterWithBackend(getattr(request, "param", "eager"))
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", functools.wraps(compiler)(functools.partial(compiler, backend=counter)))
    yield counter
    torch._dynamo.reset()  # behind a test, not within: the graphs of `torch.compile` count for all flows of the process
