"""Experiments: tables in their READMEs are those of their results, and an interrupted one goes on or says what to delete."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted(path.parent.name for path in (ROOT / "experiments").glob("*/cpu.yaml"))
MEASUREMENTS = [
    ("benchmarks.noise", "report", "noise_cost"),
    ("benchmarks.reversible", "report", "reversible"),
    ("benchmarks.small", "report", "small"),
]


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


def test_nothing_but_folders_and_what_they_share():
    """And every folder says how it is run, and holds what its README shows."""
    entries = {path.name for path in (ROOT / "experiments").iterdir() if path.name != "__pycache__"}
    assert {"README.md", "common.py", *EXPERIMENTS} <= entries
    folders = entries - {"README.md", "common.py"}
    for folder in folders:
        assert f"python -m experiments.{folder}" in (ROOT / "experiments" / folder / "README.md").read_text()
        assert f"({folder}/README.md)" in (ROOT / "experiments" / "README.md").read_text()
        assert any((ROOT / "experiments" / folder / "results").iterdir())


def loaded(name):
    return importlib.import_module(f"experiments.{name}"), ROOT / "experiments" / name.split(".")[0]


def test_the_tables_of_the_comparisons_are_those_of_the_results():
    module, folder = loaded("cifar10.__main__")
    common = importlib.import_module("experiments.common")
    tables = {"training": module.training()}
    tables |= {name: module.comparison(name) for name in (*module.NETWORKS, module.PUBLISHED)}
    for mark, table in tables.items():
        assert common.parts(folder / "README.md", mark)[1] == f"{table}\n"


@pytest.mark.parametrize(("name", "report", "results"), MEASUREMENTS)
def test_the_tables_of_the_measurements_are_those_of_the_results(name, report, results):
    module, folder = loaded(name)
    found = getattr(module, report)(json.loads((folder / "results" / f"{results}.json").read_text()))
    lines = [line for line in found.splitlines() if line.startswith("|")]
    assert lines
    assert set(lines) <= set((folder / "README.md").read_text().splitlines())


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
