"""The queue of experiments/gpu: it goes on where it stopped, begins nothing that cannot end, and loses nothing."""

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from continuum.bench.fit import RandomImages
from continuum.bench.report import summary
from continuum.zoo import lm_resnet

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def module(name: str) -> Any:
    return importlib.import_module(f"experiments.gpu.{name}")


class Queue:
    """Three jobs of ten seconds, the second of which trains: each call does a quarter of it. Time is what the jobs say."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.done, self.faults = 0.0, [], dict[str, str]()
        self.settings = module("jobs").Settings(None, str(folder), "cpu", True)
        monkeypatch.setattr("experiments.gpu.runner.time.perf_counter", lambda: self.clock)
        job = module("jobs").Job
        measures = {name: partial(self.measure, name) for name in ("first", "training", "last")}
        first, training, last = (
            job(name, 40.0 if name == "training" else 10.0, measure, name, 4 if name == "training" else 1)
            for name, measure in measures.items()
        )
        part = module("jobs").Part
        self.parts = [part("a", [first, training], str), part("b", [last], str)]

    def measure(self, name: str, seconds: float) -> Row:
        self.done.append(name)
        self.clock += 10.0
        return {"share": self.done.count(name) / 4} if name == "training" else {"value": 1.0}

    def perform(self, jobs: Sequence[Any], seconds: float) -> list[Row | str]:
        return [self.faults.get(job.name) or job.measure(seconds) for job in jobs]

    def call(self, seconds: float, only: str | None = None, perform: Callable[..., Any] | None = None) -> list[str]:
        """What one call does."""
        self.done_before = len(self.done)
        module("runner").run(self.parts, self.settings, seconds, perform or self.perform, only)
        return self.done[self.done_before :]

    def results(self, part: str) -> Any:
        return module("results").Results(part, self.settings)


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    return Queue(tmp_path, monkeypatch)


def test_the_next_call_goes_on_and_leaves_out_what_is_done(queue: Queue) -> None:
    assert queue.call(60.0) == ["first", "training", "last"]
    assert queue.call(60.0) == ["training"]
    assert queue.results("a").state(queue.parts[0].jobs[1]) == "50 %"
    assert queue.call(60.0) == queue.call(60.0) == ["training"]
    assert queue.call(60.0) == []
    assert queue.results("a").rows.keys() == {"first", "training"}


def test_nothing_is_begun_that_cannot_end(queue: Queue, capsys: pytest.CaptureFixture[str]) -> None:
    assert queue.call(9.0) == []
    assert queue.call(25.0) == ["first", "last"]  # a quarter of the training and its start take 25
    assert "a, training: left out, 15 s remain and it takes 25" in capsys.readouterr().out


def test_measured_durations_replace_the_estimates(queue: Queue) -> None:
    queue.call(60.0)
    results, (first, training) = queue.results("a"), queue.parts[0].jobs
    assert (results.left(first), results.left(training)) == (0.0, 30.0)
    queue.results("a").end(training, {"share": 0.75}, elapsed=40.0)  # half of it in 40 s: 80 s in all
    assert queue.results("a").left(training) == pytest.approx(20.0)
    assert queue.results("a").least(training) == pytest.approx(module("results").START + 20.0)


def test_a_job_that_fails_is_recorded_and_tried_again_where_it_is_named(queue: Queue) -> None:
    queue.faults["first"] = "RuntimeError: no such kernel"
    assert queue.call(60.0) == ["training", "last"]
    assert queue.results("a").errors == {"first": "RuntimeError: no such kernel"}
    queue.faults.clear()
    assert queue.call(60.0) == ["training"]
    assert queue.call(60.0, only="first") == ["first"]
    assert not queue.results("a").errors


def test_what_ends_the_queue_twice_has_failed(queue: Queue) -> None:
    """A job in which the machine itself goes away would otherwise be begun for ever."""

    def killed(jobs: Sequence[Any], seconds: float) -> list[Row | str]:
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            queue.call(60.0, perform=killed)
    assert queue.call(60.0) == ["training", "last"]
    assert "begun twice" in queue.results("a").errors["first"]


@pytest.mark.parametrize("damage", ["", '{"rows": {}}', '{"rows": {"first"', "[1]"])
def test_damaged_results_are_kept_aside(queue: Queue, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    queue.call(60.0)
    path = queue.results("a").path
    path.write_text(damage)
    assert queue.call(60.0)[0] == "first"
    assert path.with_name("a.damaged1.json").read_text() == damage
    assert "is damaged" in capsys.readouterr().out
    path.write_text(damage)
    queue.call(60.0)
    assert path.with_name("a.damaged2.json").exists()


def test_trainings_of_a_kind_share_the_card_where_that_was_measured_to_pay(queue: Queue) -> None:
    job, runner = module("jobs").Job, module("runner")
    trainings = [job(f"seed {seed}", 10.0, lambda limit: {}, "kind", 4) for seed in range(4)]
    assert runner.at_once(queue.settings) == 1
    three = job("three seeds", 1.0, lambda limit: {}, "three seeds")
    for rates, count in (((100.0, 105.0), 1), ((100.0, 190.0), 3)):
        queue.results("epochs").end(three, dict(zip(("one_alone", "three_at_once"), rates, strict=True)), 1.0)
        assert runner.at_once(queue.settings) == count
    assert runner.together(trainings, 3) == trainings[:3]
    assert runner.together([three, *trainings], 3) == [three]


def test_a_job_in_a_process_gives_its_row_or_its_error(tmp_path: Path) -> None:
    settings = module("jobs").Settings(None, str(tmp_path), "cpu", True)
    perform = module("runner").in_processes(settings)
    (job,) = (job for part in module("parts").all_parts(settings) for job in part.jobs if job.name == "synchronisations")
    nobody = module("jobs").Job("nobody", 1.0, job.measure, "nobody")
    row, error = perform([job, nobody], 120.0)
    assert {found["library"] for found in row["synchronisations"]} >= {"continuum", "plain loop"}
    assert error.startswith("exit status 1: ValueError: not enough values")
    (stopped,) = perform([job], 0.5)
    assert stopped.startswith("stopped: it was not done")


def training(folder: Path) -> Any:
    trainings, momentum = module("trainings"), importlib.import_module("experiments.momentum.__main__")
    recipe = trainings.Recipe(epochs=3, learning_rate=0.05, milestones=(1, 2), batch_size=8)
    build = partial(lm_resnet, 14, width=4)
    return trainings.Training(
        build, lambda: RandomImages(32, 16, 8), recipe, 0, folder, CPU, lambda: {"k": momentum.Frictions()}
    )


def test_a_training_that_is_cut_ends_as_one_that_is_not(tmp_path: Path) -> None:
    """Weights to the bit, behind milestones and within; and what is kept of its epochs."""
    ends: list[torch.Tensor] = []
    weights = module("truth").weights
    finish = lambda network, data: ends.append(weights(network)) or {}  # noqa: E731
    whole = training(tmp_path / "whole").run(1000.0, finish)
    shares = [training(tmp_path / "cut").run(0.0, finish)["share"] for _ in range(2)]
    cut = training(tmp_path / "cut").run(0.0, finish)
    assert shares == [pytest.approx(1 / 3), pytest.approx(2 / 3)]
    assert (whole["share"], cut["share"], cut["epochs"]) == (1, 1, 3)
    assert torch.equal(*ends)
    assert cut["k"] == whole["k"]
    assert len(cut["k"]) == 4  # before training, and after each epoch
    assert (cut["loss"], cut["accuracy"]) == (whole["loss"], whole["accuracy"])
    again = training(tmp_path / "cut").run(0.0, finish)  # trained, but its row was lost
    assert (again["share"], again["loss"]) == (1, whole["loss"])


def test_every_job_has_a_name_and_every_part_is_shown(tmp_path: Path) -> None:
    for quick in (False, True):
        settings = module("jobs").Settings("data", str(tmp_path), "cpu", quick)
        parts = module("parts").all_parts(settings)
        assert [part.name for part in parts] == ["truth", "solves", "epochs", "momentum", "noise", "infinite depth", "fashion"]
        names = [name for part in parts for name in (part.name, *(job.name for job in part.jobs))]
        assert len(set(names)) == len(names)
    assert {
        f"{network}({depth}), seed {seed}"
        for network in ("preresnet", "lm_resnet")
        for depth in (20, 32, 44, 56)
        for seed in range(3)
    } <= {
        job.name
        for part in module("parts").all_parts(module("jobs").Settings("data", "out", "cpu", False))
        for job in part.jobs
    }


def test_tables_say_how_many_seeds_and_epochs(tmp_path: Path) -> None:
    settings = module("jobs").Settings(None, str(tmp_path), "cpu", True)
    parts = module("parts").all_parts(settings)
    (momentum,) = (part for part in parts if part.name == "momentum")
    recipe = {"data": "ImageFolder", "recipe": asdict(module("trainings").PUBLISHED)}
    done = {"seed": 0, **recipe, "share": 1, "epochs": 160, "of": 160, "accuracy": 91.5, "loss": 0.3, "k": [[0.0, 0.1]] * 161}
    rows = {
        "lm_resnet(20), seed 0": done,
        "lm_resnet(20), seed 1": {"seed": 1, **recipe, "share": 0.1, "epochs": 16, "of": 160, "k": []},
    }
    rows["preresnet(20), seed 0"] = rows["lm_resnet(20), seed 1"]
    assert "| lm_resnet(20) | 1 | 160, 16 of 160 | 91.50 | 91.50 | 0.300 |" in momentum.show(rows)
    assert "| preresnet(20) | 0 | 16 of 160 | - | - | - |" in momentum.show(rows)
    assert "JPEG CIFAR-10, batches of 128, a learning rate of 0.1," in momentum.show(rows)
    after, during = momentum.figure(rows)
    assert [line.y for line in after.lines] == [[0.0, 0.1]]
    assert len(during.lines[0].x) == 161
    results = module("results").Results("momentum", settings)
    for name, row in rows.items():
        results.end(module("jobs").Job(name, 1.0, lambda limit: {}, "kind", 160), row, 1.0)
    assert "91.50" in module("publish").tables(momentum, tmp_path, published=False)
    assert results.path.with_suffix(".png").stat().st_size > 1000


def test_what_the_script_before_measured_stands_in_the_readme() -> None:
    folder = ROOT / "experiments" / "gpu"
    report, readme = json.loads((folder / "results" / "h100.json").read_text()), (folder / "README.md").read_text()
    measured = [line for line in summary(report).splitlines()[2:] if line.split("|")[4].strip() != "-"]
    assert len(measured) == 10
    assert set(measured) <= set(readme.splitlines())
    assert all(f"| {row['images_per_second']:.0f} |" in readme for row in report["training"])


def test_what_is_measured_is_published_where_it_belongs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the README and the claims, a part each, and nowhere else."""
    publish, parts = module("publish"), module("parts")
    written: dict[tuple[str, str], str] = {}
    monkeypatch.setattr(publish, "publish", lambda page, mark, text: written.update({(page.name, mark): text}))
    settings = module("jobs").Settings(None, str(tmp_path), "cpu", True)
    row = {"seed": 0, "share": 0.5, "epochs": 1, "of": 2, "data": "RandomImages", "recipe": asdict(module("trainings").SMALL)}
    noise = next(part for part in parts.all_parts(settings) if part.name == "noise")
    module("results").Results("noise", settings).end(noise.jobs[0], row, 1.0)
    module("results").Results("truth", settings).end(parts.all_parts(settings)[0].jobs[1], "no such kernel", 1.0)
    publish.publish_all(parts.all_parts(settings), tmp_path, published=True)
    assert written.keys() == {("README.md", "queue"), ("claims.md", "gpu noise")}
    assert "1 of 2" in written["claims.md", "gpu noise"]
    assert "gradients failed: no such kernel" in written["README.md", "queue"]
    claims = (ROOT / "docs" / "claims.md").read_text()
    assert all(f"<!-- gpu {name} -->\n" in claims and f"<!-- end of gpu {name} -->" in claims for name in publish.CLAIMS)
