"""The command line: one path from training to a comparison, and one line for what a user can mend."""

import csv
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from runs import CONFIG, NETWORK, same_state

import continuum
from continuum.cli import main
from continuum.cli.bench import bench_parser
from continuum.cli.compare import compare_parser
from continuum.cli.parser import COMMANDS, LIGHTNING, Parser
from continuum.training import Classifier, Digits
from continuum.training.sets import DATA

pytestmark = pytest.mark.usefixtures("command_line")
EXPERIMENTS = Path(__file__).parents[2] / "experiments"
CONFIGS = [EXPERIMENTS / "digits" / "demo.yaml", *sorted((EXPERIMENTS / "cifar10").glob("*.yaml"))]
QUIET = ("--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_model_summary", "false")
SHORT = ("fit", "--config", "config.yaml", *QUIET, "--trainer.max_steps", "1")


def run(*arguments: str) -> None:
    main(list(arguments))


def table(path: str | Path) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(path).read_text().splitlines()))


NOISY = """model:
  network:
    class_path: continuum.zoo.stochastic_depth_resnet
    init_args:
      depth: 14
      width: 8
      in_channels: 1"""


def test_fit_test_predict_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_text(CONFIG)
    run("fit", "--config", "config.yaml")
    checkpoint = "runs/small/checkpoints/last.ckpt"
    trained = continuum.load(checkpoint)
    assert str(trained.solver) == "bosh3:rtol=0.01,atol=0.01"

    # The checkpoint alone says which network and data it is.
    run("test", "--ckpt_path", checkpoint, "--trainer.accelerator", "cpu", "--trainer.logger", "false")
    out = capsys.readouterr().out
    assert "test/accuracy" in out
    run("predict", "--ckpt_path", checkpoint, "--trainer.accelerator", "cpu", "--trainer.logger", "false")
    assert len(Path("runs/small/checkpoints/predictions.csv").read_text().splitlines()) == 1 + 359

    solvers = ["euler:h=0.5", "rk4:h=1", "dopri5:rtol=1e-4,atol=1e-4", "dopri5:max_evaluations=3"]
    capsys.readouterr()
    run("compare", checkpoint, *(part for s in solvers for part in ("--solver", s)), "--images", "50", "--device", "cpu")
    out = capsys.readouterr().out
    folder = Path("runs/small/checkpoints/compare")
    rows = table(folder / "compare.csv")
    assert [row["solver"] for row in rows] == [str(trained.solver), *(str(continuum.solvers.parse(s)) for s in solvers)]
    assert [float(row["evaluations"]) for row in rows[1:3]] == [2, 4]
    assert rows[0]["agreement"] == "1.0"
    assert float(rows[0]["logit_difference"]) == 0
    assert float(rows[3]["logit_difference"]) > 0
    assert "budget" in rows[4]["error"]
    assert "budget" in out
    content = json.loads((folder / "compare.json").read_text())
    assert content["images"] == 50
    assert content["rows"][1]["grids"] == [[0.0, 0.5, 1.0]]
    assert content["rows"][4]["accuracy"] is None
    for picture in ("compare.png", "steps.png"):
        assert (folder / picture).stat().st_size > 5000
        assert str(folder / picture) in out

    # The accuracy is that of a plain evaluation of the same images.
    data = continuum.training.Digits(train_size=64, batch_size=32, seed=1)
    data.setup("test")
    correct = [(trained(x).argmax(1) == y).double() for x, y in data.test_batches(50)]
    assert float(rows[0]["accuracy"]) == pytest.approx(float(torch.cat(correct).mean()))


def test_a_stochastic_network_is_fitted_sampled_and_compared(capsys: pytest.CaptureFixture[str], refused) -> None:
    Path("config.yaml").write_text(CONFIG.replace(NETWORK, NOISY))
    run("fit", "--config", "config.yaml")
    checkpoint = "runs/small/checkpoints/last.ckpt"
    quiet = ("--trainer.accelerator", "cpu", "--trainer.logger", "false")
    run("predict", "--ckpt_path", checkpoint, "--samples", "3", *quiet)
    rows = table("runs/small/checkpoints/predictions.csv")
    assert len(rows) == 359
    assert sum(float(rows[0][f"p({c})"]) for c in range(10)) == pytest.approx(1, abs=1e-4)
    assert any(float(rows[0][f"s({c})"]) > 0 for c in range(10))

    solvers = ["euler_maruyama:h=0.5,increments=brownian", "milstein:h=0.5", "brownian:method=euler,h=1", "rk4:h=1"]
    capsys.readouterr()
    arguments = [part for s in solvers for part in ("--solver", s)]
    run("compare", checkpoint, *arguments, "--images", "40", "--paths", "3", "--device", "cpu")
    assert "±" in capsys.readouterr().out
    rows = table("runs/small/checkpoints/compare/compare.csv")
    assert [row["paths"] for row in rows] == ["1", "3", "3", "3", "1"]
    assert rows[0]["solver"] == "euler:h=1"
    assert float(rows[1]["loss_deviation"]) > 0

    # The drift in a file of its own is a deterministic network with the same answers.
    trained = continuum.load(checkpoint)
    continuum.save(trained.drift(), "drift.pt")
    drift = continuum.load("drift.pt")
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(drift(images), trained(images))
    assert not drift.stochastic
    message = refused("compare", "drift.pt", "--solver", "euler_maruyama", "--data", "Digits")
    assert "no noise" in message


def test_two_runs_are_equal_and_a_killed_one_resumes() -> None:
    """`kill -9` after an epoch, then `--ckpt_path last`: the weights of the uninterrupted run, to the bit."""
    Path("config.yaml").write_text(CONFIG.replace("max_epochs: 2", "max_epochs: 6"))

    def arguments(name: str) -> list[str]:
        return ["fit", "--config", "config.yaml", "--trainer.logger.init_args.name", name, "--ckpt_path", "last"]

    run(*arguments("a"))
    run(*arguments("b"))
    # As many threads as here, for sums in another order would differ in the last bit.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "continuum.cli", *arguments("c")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    checkpoint = Path("runs/c/checkpoints/last.ckpt")
    while not checkpoint.is_file() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    run(*arguments("c"))
    a, b, c = (continuum.load(f"runs/{name}/checkpoints/last.ckpt") for name in "abc")
    assert torch.load("runs/a/checkpoints/last.ckpt", weights_only=True)["epoch"] == 5
    assert same_state(a, b)
    assert same_state(a, c)


def test_a_saved_network_is_compared_on_named_data(capsys: pytest.CaptureFixture[str], refused) -> None:
    continuum.save(continuum.zoo.preresnet(14, width=4, in_channels=1), "network.pt")
    assert "--data" in refused("compare", "network.pt")
    wrong = {"Momentum": "--solver linear_two_step", "h=2": "--solver euler:h=2 --solver rk4", "images": "--images 0"}
    for word, options in {**wrong, "device": "--device tpu"}.items():
        assert word in refused("compare", "network.pt", "--data", "Digits", *options.split())
    run("compare", "network.pt", "--data", "Digits", "--images", "20", "--solver", "rk4:h=1", "--out", "out", "--device", "cpu")
    assert "pictures: out/compare.png\n" in capsys.readouterr().out
    assert not Path("out/steps.png").exists()


def test_an_unknown_key_is_named_with_its_line(refused) -> None:
    for key, text in {
        "widht": CONFIG.replace("width", "widht"),
        "trainr": f"trainr: 1\n{CONFIG}",
        "optimiser": CONFIG.replace("model:\n", "model:\n  optimiser: SGD\n"),
    }.items():
        number = next(n for n, content in enumerate(text.splitlines(), 1) if key in content)
        Path("config.yaml").write_text(text)
        message = refused("fit", "--config", "config.yaml")
        assert key in message
        assert f"config.yaml:{number}" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("bosh3:", "bosch3:"), ["bosch3", "bosh3", "dopri5", "rk4"]),
        (("rtol=1e-2,", "tol=1e-2,"), ["tol", "rtol", "max_evaluations"]),
        (("bosh3:rtol=1e-2,atol=1e-2", "euler:h=0.3"), ["1/m", "0.3"]),
        (("continuum.zoo.odenet", "continuum.zoo.odnet"), ["odnet"]),
    ],
)
def test_bad_values_in_a_config(refused, change: tuple[str, str], expected: list[str]) -> None:
    Path("config.yaml").write_text(CONFIG.replace(*change))
    message = refused("fit", "--config", "config.yaml")
    assert all(word in message for word in expected)


def test_missing_files_and_data(refused, tmp_path: Path) -> None:
    assert str(tmp_path / "nothing.ckpt") in refused("compare", "nothing.ckpt")
    Path("junk.ckpt").write_bytes(b"junk")
    assert "not a checkpoint" in refused("compare", "junk.ckpt")
    assert "rk5" in refused("compare", "junk.ckpt", "--solver", "rk5")
    Path("config.yaml").write_text(CONFIG.replace("Digits", "ImageFolder").replace("train_size: 64", "root: nowhere"))
    message = refused("fit", "--config", "config.yaml")
    assert str(tmp_path / "nowhere" / "train") in message
    assert "<class>" in message


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_of_the_experiments_parse(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("fit", "--config", str(config), "--print_config")
    assert stop.value.code in (None, 0)
    assert "class_path: continuum" in capsys.readouterr().out


def test_every_option_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    top = capsys.readouterr().out
    assert all(command in top for command in (*LIGHTNING, *COMMANDS, "lm_resnet"))
    parser = Parser()
    parser.add_class_arguments(Classifier, "model")
    for actions in (parser._actions, compare_parser()._actions, bench_parser()._actions):
        for action in actions:
            if action.dest not in ("help", "model"):
                assert action.help, f"{action.dest} has no help"
    for data in DATA.values():
        parser = Parser()
        parser.add_class_arguments(data, "data")
        assert all(action.help for action in parser._actions), data


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["models"], ["nonsense"], []])
def test_what_is_not_needed_is_not_imported(arguments: list[str]) -> None:
    """Structure instead of time: these take half a second to three seconds each."""
    heavy = ("pytorch_lightning", "torchmetrics", "torchvision", "matplotlib", "sklearn", "torch._dynamo")
    code = f"""import sys
from continuum.cli import main
try:
    main({arguments})
except SystemExit as stop:
    assert stop.code == {0 if arguments and arguments[0] != "nonsense" else 2}, stop.code
assert not [name for name in {heavy} if name in sys.modules], [name for name in {heavy} if name in sys.modules]
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not found.returncode, found.stderr
    if found.stderr:
        assert found.stderr.startswith("continuum: ")
        assert len(found.stderr.splitlines()) == 1
        assert all(name in found.stderr for name in (*LIGHTNING, *COMMANDS))


@pytest.mark.parametrize(("flag", "written"), [("enable_progress_bar", True), ("enable_checkpointing", False)])
def test_the_bar_and_the_checkpoints_can_be_turned_off(flag: str, written: bool) -> None:
    Path("config.yaml").write_text(CONFIG)
    run(*SHORT, f"--trainer.{flag}", "false")
    assert Path("checkpoints/last.ckpt").is_file() == written


def test_an_evaluation_leaves_the_settings_of_the_training() -> None:
    """From which it goes on."""
    Path("first.yaml").write_text(CONFIG)
    run("fit", "--config", "first.yaml", *QUIET)
    settings = Path("config.yaml").read_text()
    for command in ("validate", "test", "predict"):
        run(command, "--ckpt_path", "checkpoints/last.ckpt", *QUIET)
        assert Path("config.yaml").read_text() == settings
    run("fit", "--config", "config.yaml", "--ckpt_path", "checkpoints/last.ckpt", *QUIET, "--trainer.max_epochs", "3")
    assert torch.load("checkpoints/last.ckpt", weights_only=True)["epoch"] == 2


def test_files_that_cannot_be_written_are_one_line(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk: by a limit of their size, which is the system's, and also that of what the test captures."""
    monkeypatch.setattr("logging.raiseExceptions", False)
    run(*SHORT[:1], *QUIET, "--trainer.max_steps", "1")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    checkpoint, limits = "checkpoints/last.ckpt", resource.getrlimit(resource.RLIMIT_FSIZE)
    for arguments in (
        ("fit", "--config", "config.yaml", *QUIET, "--ckpt_path", checkpoint, "--trainer.max_steps", "2"),
        ("predict", "--ckpt_path", checkpoint, *QUIET),
        ("compare", checkpoint, "--solver", "rk4:h=1", "--images", "4", "--device", "cpu"),
        ("convert", checkpoint, "network.pt2", "--solver", "rk4:h=1", "--image_size", "8"),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            message = refused(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "File too large" in message
        assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_a_config_may_come_before_its_command() -> None:
    Path("all.yaml").write_text("fit:\n" + "".join(f"  {line}\n" for line in CONFIG.splitlines()))
    run("--config", "all.yaml", *SHORT[:1], *QUIET, "--trainer.max_steps", "1")
    assert Path("checkpoints/last.ckpt").is_file()


def test_a_callback_that_is_given_takes_the_place_of_ours() -> None:
    Path("config.yaml").write_text(CONFIG)
    run(*SHORT, "--trainer.callbacks", "pytorch_lightning.callbacks.TQDMProgressBar")
    run("predict", "--ckpt_path", "checkpoints/last.ckpt", *QUIET, "--trainer.callbacks", "WritePredictions",
        "--trainer.callbacks.init_args.folder", "elsewhere")  # fmt: skip
    assert [str(path) for path in Path().rglob("predictions.csv")] == ["elsewhere/predictions.csv"]


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_checkpoint_that_is_not_there_is_named(refused, tmp_path: Path, command: str) -> None:
    assert f"no checkpoint at {tmp_path / 'nowhere.ckpt'}" in refused(command, "--ckpt_path", "nowhere.ckpt")
    assert f"no checkpoint at {tmp_path}" in refused(command, f"--ckpt_path={tmp_path}")
    if command != "fit":
        assert "--ckpt_path FILE" in refused(command)
        assert "--ckpt_path FILE" in refused(command, "--ckpt_path", "best")
        continuum.save(continuum.zoo.preresnet(14, width=4), "network.pt")
        assert "no checkpoint of `continuum fit`" in refused(command, "--ckpt_path", "network.pt")
    else:
        Path("some.ckpt").write_bytes(b"")
        assert "--config" in refused(command, "--ckpt_path", "some.ckpt")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.network", "continuum.zoo.preresnet"], ["1 channel", "in_channels=1"]),
        (["--model.network.init_args.downsample", "true"], ["8 x 8", "10 x 10"]),
        (["--model.network.init_args.num_classes", "7"], ["7 outputs", "num_classes=10"]),
        (["--trainer.accelerator", "nonsense"], ["nonsense"]),
        (["--trainer.precision", "transformer-engine"], ["transformer_engine"]),
        (["--trainer.strategy", "nonsense"], ["nonsense"]),
        (["--trainer.devices", "0"], ["0"]),
        (["--data.init_args.batch_size", "0"], ["continuum: batch_size is at least 1, not 0"]),
        (["--data", "Nonsense"], ["Nonsense"]),
        (["--trainer.overfit_batches", "1"], ["train_size"]),
    ],
)
def test_what_does_not_fit_is_one_line(refused, options: list[str], words: list[str]) -> None:
    Path("config.yaml").write_text(CONFIG.replace("solver: bosh3:rtol=1e-2,atol=1e-2", "num_classes: 10"))
    message = refused(*SHORT, *options)
    assert all(word in message for word in words)
    assert not Path("checkpoints").exists()


def test_the_help_of_a_network_lists_its_arguments(capsys: pytest.CaptureFixture[str], refused) -> None:
    for arguments in (["--model.network.help", "continuum.zoo.odenet"], ["--model.network.help=odenet"]):
        with pytest.raises(SystemExit) as stop:
            run("fit", *arguments)
        assert not stop.value.code
        out = capsys.readouterr().out
        assert "The ODE-Net for images" in out
        assert all(f"--model.network.init_args.{name}" in out for name in ("stages", "width", "downsample", "solver"))
    assert "resnet, " in refused("fit", "--model.network.help", "continuum.odnet")
    assert "resnet, " in refused("fit", "--model.network.help")


def test_the_solver_of_training_has_one_row(capsys: pytest.CaptureFixture[str]) -> None:
    network = continuum.zoo.preresnet(14, width=4, in_channels=1)  # euler:h=1, which is among the default solvers
    continuum.save(network, "network.pt")
    options = ("network.pt", "--data", "Digits", "--images", "4", "--device", "cpu", "--out", "out")
    run("compare", *options)
    content = json.loads(Path("out/compare.json").read_text())
    names = [row["solver"] for row in content["rows"]]
    assert len(names) == len(set(names)) == 8
    run("compare", *options, "--solver", "euler:h=1", "--solver", "rk4", "--solver", "rk4:h=1")
    assert [row["solver"] for row in json.loads(Path("out/compare.json").read_text())["rows"]] == ["euler:h=1", "rk4:h=1"]


def test_a_network_keeps_its_precision_on_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    continuum.save(continuum.zoo.preresnet(14, width=4, in_channels=1).double(), "network.pt")
    run("verify", "network.pt")
    assert "all 4 checks passed" in capsys.readouterr().out
    run("compare", "network.pt", "--data", "Digits", "--images", "4", "--device", "cpu", "--out", "out", "--solver", "rk4")
    assert len(json.loads(Path("out/compare.json").read_text())["rows"]) == 2


def test_a_network_without_a_flow_is_tested_and_not_compared(refused) -> None:
    continuum.save(continuum.zoo.fractalnet(2, widths=(4, 4), dropout=(0, 0), in_channels=1), "network.pt")
    assert "no solver" in refused("compare", "network.pt", "--data", "Digits")
    Path("config.yaml").write_text(
        CONFIG.replace("continuum.zoo.odenet", "continuum.zoo.fractalnet").partition("      width")[0]
        + "      columns: 2\n      widths: [4, 4]\n      dropout: [0, 0]\n      in_channels: 1\n"
    )
    run(*SHORT)
    run("test", "--ckpt_path", "checkpoints/last.ckpt", *QUIET)
    assert "noise" in refused("predict", "--ckpt_path", "checkpoints/last.ckpt", *QUIET, "--samples", "2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model.optimizer", "{class_path: Nesterov, init_args: {lr: .nan}}"), "learning rate lr of Nesterov"),
        (("--model.optimizer", "{class_path: AdamW, init_args: {lr: -1}}"), "learning rate"),
        (("--seed_everything", "-1"), "seed"),
        (("--model.network.init_args.width", str(-(2**63))), ""),
    ],
)
def test_numbers_of_no_sense_are_refused_before_training(refused, options: tuple[str, str], message: str) -> None:
    assert message in refused("fit", *QUIET, *options)


def test_every_flow_is_tested_under_its_own_solver() -> None:
    """As `continuum.load` solves it; an option for the solver is for all of them."""
    odenet = ("--model.network", "continuum.zoo.odenet", "--model.network.init_args.stages", "3")
    small = ("--model.network.init_args.width", "4", "--model.network.init_args.downsample", "false")
    run("fit", *QUIET, *odenet, *small, "--trainer.max_steps", "1")
    path = Path("checkpoints/last.ckpt")
    content = torch.load(path, weights_only=True)
    content["continuum"]["solvers"] = ["euler:h=1", "rk4:h=1", "dopri5:rtol=0.01,atol=0.01"]
    torch.save(content, path)
    for options, network in (
        ((), continuum.load(path)),
        (("--model.network.init_args.solver", "euler:h=0.5"), continuum.load(path).with_solver("euler:h=0.5")),
    ):
        run("predict", "--ckpt_path", str(path), *QUIET, *options)
        with open("checkpoints/predictions.csv") as file:
            found = [[float(row[f"p({name})"]) for name in range(10)] for row in csv.DictReader(file)]
        data = Digits()
        data.setup()
        expected = torch.cat([torch.softmax(network(images), 1) for images, _ in data.test_batches()]).detach()
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=2e-6)


# Networks of one's own
MINE = """from torch import nn
from continuum import Flow, Network
from continuum.fields import Autonomous
from continuum.models import builder
from continuum.noise import StochasticDepth

open("imported", "w").close()


def parts(width):
    field = Autonomous(nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Tanh()))
    return nn.Conv2d(1, width, 3), field, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


@builder
def mine(width: int = 4, solver: str = "euler:h=1") -> Network:
    stem, field, head = parts(width)
    return Network(stem, [Flow(field, solver, depth=1)], head)


@builder
def noisy(width: int = 4) -> Network:
    stem, field, head = parts(width)
    return Network(stem, [Flow(StochasticDepth(field, 0.5), "euler_maruyama", depth=1)], head)


def bare(width: int = 4) -> Network:
    return mine(width)
"""
LAST = "checkpoints/last.ckpt"
READERS = {
    "validate": ("validate", "--ckpt_path", LAST, *QUIET),
    "test": ("test", "--ckpt_path", LAST, *QUIET),
    "predict": ("predict", "--ckpt_path", LAST, *QUIET),
    "compare": ("compare", LAST, "--solver", "rk4:h=1", "--images", "4", "--device", "cpu"),
    "analyse": ("analyse", LAST, "--images", "4", "--device", "cpu"),
    "weak": ("weak", LAST, "--images", "4", "--paths", "2", "--steps", "2", "--device", "cpu"),
    "convert": ("convert", LAST, "network.pt2", "--solver", "rk4:h=1", "--image_size", "8"),
    "verify": ("verify", LAST),
}
"""Every command that reads a checkpoint."""


@pytest.fixture
def own_network(command_line: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's, which leaves a mark when it is imported, and a checkpoint of its `mine`."""
    Path("mynet.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.delitem(sys.modules, "mynet", raising=False)
    run("fit", "--model.network", "mynet.mine", "--model.network.init_args.width", "3", *QUIET, "--trainer.max_steps", "1")
    forget()


def forget() -> None:
    del sys.modules["mynet"]
    Path("imported").unlink()


@pytest.mark.usefixtures("own_network")
def test_every_command_reads_a_network_of_ones_own(capsys: pytest.CaptureFixture[str], refused) -> None:
    written = {"predict": "predictions.csv", "compare": "compare/compare.csv", "analyse": "analyse/report.html"}
    for name in ("validate", "test", "predict", "compare", "analyse", "convert"):
        capsys.readouterr()
        run(*READERS[name], "--builder", "mynet.mine")
        out = capsys.readouterr().out
        assert name not in ("validate", "test") or f"{'val' if name == 'validate' else 'test'}/accuracy" in out
    assert all((Path("checkpoints") / file).stat().st_size for file in written.values())
    assert Path("network.pt2").stat().st_size
    assert "a network without noise" in refused(*READERS["weak"], "--builder", "mynet.mine")
    assert "mynet.mine" in refused(*READERS["verify"], "--builder", "mynet.mine")
    run("fit", "--model.network", "mynet.noisy", *QUIET, "--trainer.max_steps", "1")
    run(*READERS["weak"], "--builder", "mynet.noisy")
    assert Path("checkpoints/weak/weak.csv").is_file()


@pytest.mark.usefixtures("own_network")
def test_a_config_names_the_builder_too(refused) -> None:
    run("test", "--config", "config.yaml", "--ckpt_path", LAST, *QUIET)
    run("fit", "--config", "config.yaml", "--ckpt_path", LAST, *QUIET, "--trainer.max_steps", "2")
    assert torch.load(LAST, weights_only=True)["global_step"] == 2
    both = refused("test", "--config", "config.yaml", "--model.network", "mynet.noisy", "--ckpt_path", LAST, *QUIET)
    assert all(name in both for name in ("'mynet.mine'", "'mynet.noisy'"))
    assert "leave --builder out" in refused("test", "--config", "config.yaml", "--builder", "mynet.mine", *QUIET)
    assert "leave --builder out" in refused("fit", "--builder", "mynet.mine", *QUIET)


@pytest.mark.usefixtures("own_network")
@pytest.mark.parametrize("name", READERS)
def test_nothing_is_imported_because_a_file_asks_for_it(refused, name: str) -> None:
    message = refused(*READERS[name])
    assert all(
        words in message for words in ("'mynet.mine'", "nothing is imported because a file asks", "--builder mynet.mine")
    )
    assert not Path("imported").exists()
    both = refused(*READERS[name], "--builder", "mynet.noisy")
    assert all(words in both for words in (LAST, "'mynet.mine'", "'mynet.noisy'"))
    for wrong, words in {
        "mynet.bare": "decorate the function with @continuum.models.builder",
        "os.system": "decorate",
        "nowhere.mine": "No module named 'nowhere'",
        "mynet.nothing": "nothing",
        "": "cannot be imported",
    }.items():
        assert words in refused(*READERS[name], "--builder", wrong)


@pytest.mark.usefixtures("own_network")
def test_a_builder_of_another_name_is_not_typed_from_a_file(refused) -> None:
    """What is no import path is not repeated as an option."""
    content = torch.load(LAST, weights_only=True)
    for name in ("mynet.mine --builder os.system", "mynet\n\x1b[2Jmine", "a" * 10**6, "mynet..mine", "", "x.<locals>.mine"):
        content["continuum"]["builder"] = name
        torch.save(content, LAST)
        for command in ("test", "compare"):
            message = refused(*READERS[command])
            assert "is no import path" in message
            assert "\x1b" not in message
            assert len(message) < 400
    assert not Path("imported").exists()
    content["continuum"]["builder"] = "mine"  # as files of before have it
    torch.save(content, LAST)
    assert "--builder MODULE.mine" in refused(*READERS["test"])
    run(*READERS["test"], "--builder", "mynet.mine")


def test_any_optimiser_and_any_metrics_of_torch(refused) -> None:
    """With the defaults of its class, not those of ours."""
    run("fit", *QUIET, "--model.optimizer", "AdamW", "--trainer.max_steps", "1")
    (group,) = torch.load(LAST, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert (group["initial_lr"], group["weight_decay"], group["betas"]) == (1e-3, 1e-2, (0.9, 0.999))
    f1 = "{class_path: torchmetrics.classification.MulticlassF1Score, init_args: {num_classes: 10}}"
    chosen = "optimizer: {class_path: torch.optim.RMSprop, init_args: {lr: 2.0e-3, momentum: 0.5}}"
    more = f"model:\n  {chosen}\n  metrics: {{f1: {f1}}}\n  network"
    Path("config.yaml").write_text(CONFIG.replace("model:\n  network", more))
    run("fit", "--config", "config.yaml", "--trainer.max_steps", "2")
    (row,) = (row for row in table("runs/small/metrics.csv") if row["val/f1"])
    assert 0 <= float(row["val/f1"]) <= 1
    assert row["val/accuracy"]
    told = yaml.safe_load(Path("runs/small/hparams.yaml").read_text())
    assert told.items() >= {"network": "odenet", "optimizer": "RMSprop", "optimizer/momentum": 0.5, "batch_size": 32}.items()
    assert "AdamV" in refused(*SHORT, "--model.optimizer", "AdamV")
    assert "momentum" in refused(*SHORT, "--model.optimizer", "AdamW", "--model.optimizer.momentum", "0.9")
    assert "LBFGS" in refused(*SHORT, "--model.optimizer", "LBFGS")
    assert "--model.optimizer Nesterov" in refused("fit", *QUIET, "--model.optimizer.lr", "0.2")
