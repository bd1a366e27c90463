"""Experiments: tables in their READMEs are those of their results, and an interrupted one goes on or says what to delete."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted(path.parent.name for path in (ROOT / "experiments").glob("*/__main__.py"))


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def opened(monkeypatch, name, *arguments):
    common = importlib.import_module("experiments.common")
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    return common.Experiment(str(ROOT / "experiments" / name / "__main__.py"), "")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_table_of_the_readme_is_that_of_the_results(name, monkeypatch):
    experiment = opened(monkeypatch, name)
    assert experiment.runs, "not run"
    module = importlib.import_module(f"experiments.{name}.__main__")
    common = importlib.import_module("experiments.common")
    _, table, _ = common.parts(experiment.folder / "README.md", "cpu")
    assert table == experiment.signed(module.report(experiment))
    assert len({row["seed"] for row in experiment.runs}) >= 3


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_listed_and_has_a_figure_and_a_full_config(name):
    folder = ROOT / "experiments" / name
    assert (folder / "full.yaml").is_file()
    assert (ROOT / "docs" / "claims" / f"{name}.png").is_file()
    readme = (folder / "README.md").read_text()
    assert f"python -m experiments.{name}" in readme
    assert f"(../../docs/claims/{name}.png)" in readme
    assert f"({name}/README.md)" in (ROOT / "experiments" / "README.md").read_text()


def test_six_questions_have_an_experiment():
    assert len(EXPERIMENTS) == 6


def test_an_interrupted_experiment_goes_on(monkeypatch, tmp_path):
    config = tmp_path / "some.yaml"
    config.write_text("epochs: 1\n")
    arguments = ("--config", config, "--out", tmp_path)
    measured = []

    def measure(seed):
        measured.append(seed)
        return {"accuracy": 10.0 + seed}

    first = opened(monkeypatch, "momentum", *arguments)
    first.run({"seed": 0}, lambda: measure(0))
    again = opened(monkeypatch, "momentum", *arguments)
    for seed in (0, 1):
        again.run({"seed": seed}, lambda seed=seed: measure(seed))
    assert measured == [0, 1]
    assert [row["accuracy"] for row in json.loads((tmp_path / "some.json").read_text())["runs"]] == [10.0, 11.0]
    config.write_text("epochs: 2\n")
    with pytest.raises(SystemExit, match=r"some\.json holds runs with other settings .* delete it"):
        opened(monkeypatch, "momentum", *arguments)
