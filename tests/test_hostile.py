"""Whatever comes in from outside ends in a network, a solver, or an error of ours on one line; nothing of it runs."""

import importlib
import io
import itertools
import random
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import continuum
from continuum.cli import main
from continuum.solvers import Solver, parse
from continuum.training import ImageFolder

sys.path.append(str(Path(__file__).parent.parent))
hostile = importlib.import_module("experiments.endurance.hostile")

QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of a training, as a path and as its content."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["continuum"])
        main(["fit", *QUIET, "--trainer.max_steps", "1"])
    path = folder / "checkpoints" / "last.ckpt"
    return path, torch.load(path, weights_only=True)


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A module that says when it is imported."""
    module, mark = tmp_path / f"{hostile.PLANTED}.py", tmp_path / "imported"
    module.write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\ndef evil(*a): return a\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, hostile.PLANTED, raising=False)
    return mark


def error_of(call):
    """The error of ours that a call ends in; None where there is none."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def test_texts_of_solvers():
    draw = random.Random(0)
    for _ in range(3000):
        text = hostile.solver_text(draw)
        error = error_of(lambda text=text: parse(text))
        assert error != ""
        assert error is not None or isinstance(parse(text), Solver)
    for text in ("euler:h=1e-310", "dopri5:rtol=inf", "rk4:h=0.5,h=0.25"):
        with pytest.raises(ValueError, match=r"\S"):
            parse(text)


def test_damaged_files(checkpoint, tmp_path):
    """An error, or the weights as they were."""
    path, _ = checkpoint
    weights = continuum.load(path).state_dict()
    whole, draw, file = path.read_bytes(), random.Random(0), tmp_path / "damaged.ckpt"
    errors = 0
    for _ in range(300):
        file.write_bytes(hostile.damaged(whole, draw))
        error = error_of(lambda: continuum.load(file))
        if error is None:
            found = continuum.load(file).state_dict()
            assert all(torch.equal(tensor, found[name]) for name, tensor in weights.items())
        else:
            assert "\n" not in error
            errors += 1
    assert errors > 200


@pytest.mark.parametrize("seed", range(120))
def test_files_that_state_what_is_not_so(checkpoint, planted, tmp_path, seed):
    file = tmp_path / "stated.ckpt"
    file.write_bytes(hostile.written(hostile.misstated(checkpoint[1], random.Random(seed))))
    start = time.process_time()
    assert "\n" not in (error_of(lambda: continuum.load(file)) or "")
    assert time.process_time() - start < 5
    assert not planted.exists()


COMMANDS = {
    "test": lambda file: ["test", *QUIET, "--ckpt_path", file, "--trainer.limit_test_batches", "1"],
    "predict": lambda file: ["predict", *QUIET, "--ckpt_path", file, "--trainer.limit_predict_batches", "1"],
    "fit": lambda file: ["fit", "--config", "config.yaml", *QUIET, "--ckpt_path", file, "--trainer.max_steps", "2"],
    "compare": lambda file: ["compare", file, "--solver", "euler:h=1", "--images", "4"],
    "convert": lambda file: ["convert", file, "out.pth"],
    "verify": lambda file: ["verify", file],
}


@pytest.mark.usefixtures("command_line")
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_on_hostile_files(checkpoint, planted, capsys, command):
    """Status 0, or 2 and one line."""
    Path("config.yaml").write_text((checkpoint[0].parent.parent / "config.yaml").read_text())
    for seed in range(12):
        file = Path(f"{seed}.ckpt")
        draw = random.Random(f"{command} {seed}")
        content = hostile.written(hostile.misstated(checkpoint[1], draw))
        file.write_bytes(hostile.damaged(content, draw) if seed % 4 == 3 else content)
        status = 0
        try:
            main(COMMANDS[command](str(file)))
        except SystemExit as ended:
            status = ended.code
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("continuum:")]
        assert (status, len(errors)) in ((0, 0), (2, 1)), (seed, status, errors)
        assert not planted.exists(), seed


@pytest.mark.usefixtures("command_line")
@pytest.mark.parametrize("seed", range(16))
def test_configurations(planted, capsys, seed):
    Path("config.yaml").write_bytes(hostile.configuration(random.Random(seed)).encode())
    status = 0
    start = time.process_time()
    try:
        main(["fit", "--config", "config.yaml", *QUIET, "--trainer.max_steps", "1", "--trainer.limit_val_batches", "1"])
    except SystemExit as ended:
        status = ended.code
    lines = capsys.readouterr().err.splitlines()
    assert status in (0, 1, 2), lines
    assert status == 0 or any(line.startswith("continuum:") for line in lines)
    assert time.process_time() - start < 30


@pytest.mark.parametrize(
    "text",
    ["a: !!float abc", "a: !!int xyz", "\tkey: 1", "a: &x [*x]", f"a: {hostile.bomb()}", "a: [", "a: !!python/name:os.system"],
)
@pytest.mark.usefixtures("command_line")
def test_a_configuration_that_is_none(text, capsys):
    Path("config.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "config.yaml"])
    assert ended.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("continuum:"))
    assert "config.yaml is no configuration" in line


@pytest.mark.parametrize("options", [("--config", "good.yaml", "--config"), ("--model",), ("--trainer",), ("--data",)])
@pytest.mark.usefixtures("command_line")
def test_aliases_are_bounded_in_every_configuration(options, capsys):
    """In a second one, in one of a part, and in a text, which is read as YAML once more."""
    Path("good.yaml").write_text("trainer:\n  max_steps: 1\n")
    for content in (f"a: {hostile.bomb()}", f'model:\n  samples: "{hostile.bomb()}"'):
        Path("bad.yaml").write_text(content)
        start = time.process_time()
        with pytest.raises(SystemExit) as ended:
            main(["fit", *options, "bad.yaml"])
        assert ended.value.code == 2
        assert "aliases stand for more than" in capsys.readouterr().err
        assert time.process_time() - start < 10


def test_damaged_images(tmp_path):
    """All that cannot be read are named at once; the others are images."""
    draw, named = random.Random(0), 0
    for number in range(20):
        folder, damaged = tmp_path / str(number), []
        for part, kind, image in itertools.product(("train", "test"), ("cat", "dog"), range(3)):
            path = folder / part / kind / f"{image}.{'png' if number % 2 else 'jpg'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            out = io.BytesIO()
            Image.effect_noise((8, 8), 50).convert("RGB").save(out, "PNG" if number % 2 else "JPEG")
            whole = out.getvalue()
            path.write_bytes(hostile.scratched(whole, draw) if draw.random() < 0.2 else whole)
            if path.read_bytes() != whole:
                damaged.append(path.name)
        data = ImageFolder(str(folder), size=8)
        error = error_of(data.setup)
        if error is None:
            assert data.shape == (3, 8, 8)
        else:
            named += 1
            assert damaged
            assert "\n" not in error
    assert named
