"""Training: two runs agree, a resumed run is the uninterrupted one, and a failed step leaves everything as it was."""

import csv
import itertools
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import runs
import torch
import yaml
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy
from runs import StopAt, in_two_processes, quiet_trainer, same_state
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

import continuum
from continuum.models.checkpoint import KEY, description
from continuum.models.failure import find_failure
from continuum.training import Classifier, Digits, ImageFolder, LogCost, Nesterov, OneCycle, Schedule, Steps, WritePredictions
from continuum.training.images import DataError


def small_network(**options: Any) -> continuum.Network:
    return continuum.zoo.preresnet(14, width=4, in_channels=1, **options)


def fit(
    folder: Path,
    epochs: int = 3,
    resume: Path | None = None,
    schedule: Schedule | None = None,
    network: continuum.Network | None = None,
    callbacks: Sequence[pl.Callback] = (),
) -> continuum.Network:
    """What a run of five batches an epoch makes of a network."""
    torch.manual_seed(0)
    network, data = network or small_network(), Digits(batch_size=40, train_size=200, crop=1, seed=0)
    options = {"schedule": schedule or OneCycle()}
    return runs.fit(network, data, callbacks, resume, options, max_epochs=epochs, default_root_dir=folder).network


@pytest.mark.parametrize("schedule", [OneCycle(), Steps([1, 2])])
@pytest.mark.parametrize("at_epoch_end", [True, False])
def test_resuming_at_an_epoch_boundary_is_the_uninterrupted_run(tmp_path: Path, schedule: Schedule, at_epoch_end: bool) -> None:
    """Whether the checkpoint was written at the end of the epoch or of its validation."""
    whole = fit(tmp_path / "whole", schedule=schedule)
    keep = ModelCheckpoint(tmp_path / "kept", "{epoch}", save_top_k=-1, save_on_train_epoch_end=at_epoch_end)
    fit(tmp_path / "cut", schedule=schedule, callbacks=[keep, StopAt(10)])
    for epoch in (0, 1):
        resumed = fit(tmp_path / "resumed", resume=tmp_path / "kept" / f"epoch={epoch}.ckpt", schedule=schedule)
        assert same_state(whole, resumed), f"after epoch {epoch}"


NETWORKS = {
    "preresnet": lambda: small_network(),
    "stochastic depth": lambda: continuum.zoo.stochastic_depth_resnet(14, width=8, in_channels=1),
    "its SDE": lambda: continuum.zoo.stochastic_depth_resnet(14, width=8, in_channels=1, solver="brownian:h=0.5"),
    "dropout": lambda: continuum.zoo.dropout_resnet(14, width=8, in_channels=1, rate=0.2),
    "dropout inside the field": lambda: continuum.zoo.wide_resnet(10, 1, dropout=0.2, in_channels=1),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_resuming_within_an_epoch_replays_the_rest_of_it_with_its_noise(tmp_path: Path, name: str) -> None:
    def run(part: str, resume: Path | None = None, *callbacks: pl.Callback) -> continuum.Network:
        torch.manual_seed(0)
        network = NETWORKS[name]()
        torch.manual_seed(1234)  # the noise goes on from the checkpoint, not from whatever was drawn before
        return fit(tmp_path / part, resume=resume, network=network, callbacks=callbacks)

    whole = run("whole")
    assert same_state(whole, run("again")), "one seed, one path"
    run("cut", None, ModelCheckpoint(tmp_path / "kept", "{step}", save_top_k=-1, every_n_train_steps=1), StopAt(12))
    for step in (2, 4, 5, 6, 9, 11):
        assert same_state(whole, run("resumed", tmp_path / "kept" / f"step={step}.ckpt")), f"after step {step}"


@pytest.mark.parametrize("solver", ["euler_maruyama", "brownian:h=0.5"])
def test_two_ranks_draw_different_noise_and_learn_the_same_weights(tmp_path: Path, solver: str) -> None:
    """Under DistributedDataParallel with unused parameters allowed, because a rank may drop what the other keeps."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    assert in_two_processes(Path(__file__).parent / "noise_worker.py", tmp_path, solver, port) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert len(first["drawn"]) == 4
    assert all(one != other for one, other in zip(first["drawn"], second["drawn"], strict=True))
    assert len({str(step) for step in first["drawn"]}) == 4, "and another one each step"
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name


def test_dropped_branches_need_unused_parameters_under_several_processes() -> None:
    model = Classifier(continuum.zoo.stochastic_depth_resnet(14, width=8, in_channels=1))
    trainer = quiet_trainer()
    trainer.strategy.__class__ = DDPStrategy
    trainer.strategy._ddp_kwargs = {}
    model.trainer = trainer
    with pytest.raises(ValueError, match="ddp_find_unused_parameters_true"):
        model.on_fit_start()
    trainer.strategy._ddp_kwargs = {"find_unused_parameters": True}
    model.on_fit_start()
    model.network = continuum.zoo.shake_shake(14, width=8)
    trainer.strategy._ddp_kwargs = {}
    model.on_fit_start()


def test_a_checkpoint_of_a_changed_network_brings_its_solvers(tmp_path: Path) -> None:
    """The builder does not know them: neither the drift's, nor a step that refinement made smaller."""
    network = continuum.zoo.neural_sde(width=4, downsample=False, solver="euler_maruyama:h=0.5")
    changed = {"drift": network.drift().with_solver("rk4:h=0.25"), "refined": network.refine(2)}
    for name, other in changed.items():
        content = {KEY: description(other), "state_dict": Classifier(other).state_dict()}
        torch.save(content, tmp_path / f"{name}.ckpt")
        model = Classifier(continuum.zoo.neural_sde(width=4, downsample=False, solver="euler_maruyama:h=0.5"))
        model.on_load_checkpoint(content)
        assert model.network.solver == other.solver
        model.load_state_dict(content["state_dict"])
        assert continuum.load(tmp_path / f"{name}.ckpt").solver == other.solver


class Poisoned(pl.Callback):
    """Makes row 1 of one batch infinite."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: object, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self.before = {name: value.clone() for name, value in module.state_dict().items()}
            batch[0][1] = float("inf")  # type: ignore[index]


@pytest.mark.parametrize("solver", ["euler", "dopri5:rtol=1e-2,atol=1e-2"])
def test_a_loss_that_is_not_finite_stops_before_anything_changes(tmp_path: Path, solver: str) -> None:
    """Weights and BatchNorm buffers are those of the last good step, and the last good checkpoint loads."""
    pl.seed_everything(0)
    model = Classifier(small_network(solver=solver))
    poison = Poisoned(step=2)
    keep = ModelCheckpoint(tmp_path, "good", every_n_train_steps=1, enable_version_counter=False)
    trainer = quiet_trainer([poison, keep], max_epochs=1)
    with pytest.raises(continuum.SolveError) as caught:
        trainer.fit(model, Digits(batch_size=16, train_size=64))
    assert 1 in caught.value.rows
    assert all(torch.equal(value, poison.before[name]) for name, value in model.state_dict().items() if "network" in name)
    good = continuum.load(tmp_path / "good.ckpt")
    assert all(torch.equal(value, poison.before[f"network.{name}"]) for name, value in good.state_dict().items())


def test_the_failing_step_of_a_fixed_solve_is_named() -> None:
    network = small_network().eval()
    flow = network.flows[1]
    with torch.no_grad():
        flow.field.layers[0].module.conv2.weight.fill_(float("nan"))  # type: ignore[union-attr, index]
    error = find_failure(network, torch.randn(3, 1, 8, 8))
    assert error.flow == "stages.2"
    assert (error.depth, error.step, error.evaluations, error.rows) == (0.0, 1.0, 1, (0, 1, 2))
    assert "stages.2" in str(error)
    assert "depth 0" in str(error)


def test_where_a_state_outside_the_flows_breaks() -> None:
    network = small_network().eval()
    images = torch.randn(2, 1, 8, 8)
    images[1] = float("nan")
    assert "stem" in str(find_failure(network, images))
    assert find_failure(network, images).rows == (1,)
    assert "all logits are finite" in str(find_failure(network, torch.randn(2, 1, 8, 8)))


@pytest.mark.parametrize("make", [Nesterov, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_weight_decay_spares_k(make: type[torch.optim.Optimizer]) -> None:
    model = Classifier(continuum.zoo.lm_resnet(14, width=4), partial(make, weight_decay=1e-2))
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, make)
    decayed, spared = optimizer.param_groups
    assert decayed["weight_decay"] == 1e-2
    assert spared["weight_decay"] == 0
    assert len(spared["params"]) == 3
    assert all(k.shape == () for k in spared["params"])
    assert len(decayed["params"]) + 3 == len(list(model.network.parameters()))


def test_costs_are_logged(tmp_path: Path) -> None:
    model = Classifier(small_network(solver="rk4:h=0.5"))
    trainer = quiet_trainer([LogCost()], max_epochs=1, default_root_dir=tmp_path)
    trainer.fit(model, Digits(batch_size=32, train_size=64))
    logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
    assert [logged[f"flow{i}/evaluations"] for i in range(3)] == [16, 8, 8]
    assert [logged[f"flow{i}/accepted"] for i in range(3)] == [4, 2, 2]
    assert logged["evaluations"] == 32


def test_a_row_of_the_predictions_says_which_image_it_is(tmp_path: Path) -> None:
    """Beside the checkpoint, with the file, the label and the names of the classes."""
    for part, name in itertools.product(("train", "test"), ("owl", "emu")):
        (tmp_path / part / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8), (90 * number, 0, 200 * (name == "owl"))).save(tmp_path / part / name / f"{number}.png")
    data = ImageFolder(str(tmp_path), validation=0, batch_size=4)
    torch.manual_seed(0)
    module = Classifier(continuum.zoo.preresnet(14, width=4, num_classes=2))
    trainer = quiet_trainer([WritePredictions()], max_steps=1, default_root_dir=tmp_path)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "kept" / "net.ckpt")
    trainer.predict(module, data, ckpt_path=tmp_path / "kept" / "net.ckpt")
    rows = list(csv.DictReader((tmp_path / "kept" / "predictions.csv").read_text().splitlines()))
    assert [row["file"] for row in rows] == [f"test/{name}/{number}.png" for name in ("emu", "owl") for number in range(3)]
    assert [row["label"] for row in rows] == ["emu"] * 3 + ["owl"] * 3
    logits = torch.cat([module.network.eval()(images) for images, _ in data.test_batches()])
    assert [row["class"] for row in rows] == [("emu", "owl")[k] for k in logits.argmax(1)]


def test_ranks_write_one_file_of_all_images_in_their_order(tmp_path: Path) -> None:
    def rows(devices: int) -> list[dict[str, str]]:
        torch.manual_seed(0)
        folder = tmp_path / str(devices)
        strategy = "ddp_spawn" if devices > 1 else "auto"
        trainer = quiet_trainer([WritePredictions(str(folder))], devices=devices, strategy=strategy)
        trainer.predict(Classifier(small_network()), Digits(batch_size=64), return_predictions=False)
        (path,) = folder.iterdir()
        return list(csv.DictReader(path.read_text().splitlines()))

    one, two = rows(1), rows(2)
    assert [row["image"] for row in two] == [str(number) for number in range(359)]
    assert list(two[0])[:5] == ["image", "label", "class", "p(0)", "p(1)"]
    assert abs(sum(float(two[0][f"p({c})"]) for c in range(10)) - 1) < 1e-5
    for a, b in zip(one, two, strict=True):
        assert a["label"] == b["label"]
        assert float(a["p(3)"]) == pytest.approx(float(b["p(3)"]), abs=1e-4)


def test_sampled_predictions_have_a_mean_and_a_spread(tmp_path: Path) -> None:
    def predicted(folder: Path, samples: int) -> list[list[str]]:
        torch.manual_seed(0)
        network = continuum.zoo.stochastic_depth_resnet(14, width=8, in_channels=1, last=0.3)
        trainer = quiet_trainer([WritePredictions(str(folder))])
        trainer.predict(Classifier(network, samples=samples), Digits())
        return [line.split(",") for line in (folder / "predictions.csv").read_text().splitlines()]

    heads, *rows = predicted(tmp_path / "a", 5)
    assert heads[13:] == [f"s({c})" for c in range(10)]
    assert all(abs(sum(map(float, row[3:13])) - 1) < 1e-4 for row in rows)
    assert any(float(s) > 0 for s in rows[0][13:])
    assert predicted(tmp_path / "b", 5)[1:] == rows, "one seed, one set of samples"
    assert len(predicted(tmp_path / "c", 0)[0]) == 13
    with pytest.raises(TypeError, match="samples need noise"):
        quiet_trainer().predict(Classifier(small_network(), samples=3), Digits())
    with pytest.raises(ValueError, match="-1"):
        Classifier(small_network(), samples=-1)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.3, 0.95])
def test_one_cycle_is_that_of_torch(warmup: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], 0.3)
    expected = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=45, pct_start=warmup, cycle_momentum=False)
    for done in range(45):
        assert 0.3 * OneCycle(warmup).factor(done, 45) == pytest.approx(expected.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        if done < 44:
            expected.step()


@pytest.mark.parametrize("schedule", [None, OneCycle(), Steps([1, 3])])
def test_a_finished_run_goes_on_as_one_that_was_planned_longer(tmp_path: Path, schedule: Schedule | None) -> None:
    """Every step of the second run has the learning rate that one run of four epochs has there."""

    def rates(epochs: int, resume: Path | None) -> list[float]:
        seen: list[float] = []

        class Watch(pl.Callback):
            def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
                seen.append(trainer.optimizers[0].param_groups[0]["lr"])

        trainer = quiet_trainer([Watch()], max_epochs=epochs)
        data = Digits(batch_size=32, train_size=64)
        trainer.fit(Classifier(small_network(), schedule=schedule), data, ckpt_path=resume)
        assert trainer.global_step == 2 * epochs
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return seen

    rates(2, None)
    assert rates(4, tmp_path / "2.ckpt") == rates(4, None)[4:]


@pytest.mark.parametrize("schedule", [None, Steps([1]), OneCycle()])
def test_a_run_without_an_end_is_refused_where_its_schedule_needs_one(schedule: Schedule | None) -> None:
    trainer = quiet_trainer(max_epochs=-1, max_time="00:00:00:01")
    model, data = Classifier(small_network(), schedule=schedule), Digits(batch_size=32, train_size=64)
    if isinstance(schedule, OneCycle):
        with pytest.raises(ValueError, match=r"OneCycle .* no end: give max_epochs"):
            trainer.fit(model, data)
    else:
        trainer.fit(model, data)
    assert bool(trainer.global_step) == (not isinstance(schedule, OneCycle))


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (lambda: continuum.zoo.preresnet(14, width=4), ["Digits have 1 channel and", "takes 3", "in_channels=1"]),
        (lambda: small_network(num_classes=7), ["10 classes", "7 outputs", "num_classes=10"]),
        (lambda: small_network(num_classes=12), ["10 classes", "12 outputs"]),
        (lambda: continuum.zoo.mlp(features=9), ["cannot take", "1 channel of 8 x 8 pixels"]),
        (lambda: continuum.zoo.odenet(width=16), ["8 x 8 pixels", "10 x 10"]),
        (lambda: continuum.zoo.neural_sde(width=16, in_channels=1), ["8 x 8 pixels", "10 x 10"]),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "test", "predict"])
def test_a_network_that_does_not_fit_the_images_is_refused_first(network: Any, words: list[str], stage: str) -> None:
    trainer = quiet_trainer(max_steps=1)
    with pytest.raises(DataError) as caught:
        getattr(trainer, stage)(Classifier(network()), Digits())
    assert all(word in str(caught.value) for word in words)
    assert len(str(caught.value).splitlines()) == 1
    assert trainer.global_step == 0


@pytest.mark.parametrize("make", [lambda: OneCycle(1.0), lambda: OneCycle(-0.1), lambda: Steps([2, 1]), lambda: Steps([1], 0)])
def test_bad_schedules_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match=r"share|increasing"):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (0.1, TypeError, "0.1 does not"),
        (torch.optim.AdamW([torch.zeros(1)]), TypeError, "AdamW"),
        (lambda groups: None, TypeError, "does not"),
        (torch.optim.LBFGS, TypeError, "LBFGS evaluates the loss several times"),
        (partial(Nesterov, lr=0.0), ValueError, "learning rate"),
        (partial(torch.optim.AdamW, lr=float("nan")), ValueError, "nvalid learning rate"),
        (partial(torch.optim.AdamW, betas=(2.0, 0.9)), ValueError, "beta"),
    ],
)
def test_what_makes_no_optimiser_is_refused_at_once(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Classifier(small_network(), make)


def test_metrics_are_those_of_all_images(tmp_path: Path) -> None:
    """In validation and test, beside the accuracy; in its place under its name."""
    metrics = {"f1": MulticlassF1Score(10, average="macro"), "top3": MulticlassAccuracy(10, top_k=3, average="micro")}
    torch.manual_seed(0)
    model, data = Classifier(small_network(), metrics=metrics), Digits(batch_size=50, train_size=200)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(model, data)
    logged = {name: trainer.callback_metrics[f"val/{name}"] for name in ("loss", "accuracy", "f1", "top3")}
    assert logged["top3"] >= logged["accuracy"]
    trainer.test(model, data, verbose=False)
    batches = list(data.test_batches())
    logits, labels = torch.cat([model.network.eval()(images) for images, _ in batches]), torch.cat([y for _, y in batches])
    for name, metric in {**metrics, "accuracy": MulticlassAccuracy(10, average="micro")}.items():
        assert trainer.callback_metrics[f"test/{name}"].item() == pytest.approx(metric.clone()(logits, labels).item(), abs=1e-6)
    other = Classifier(small_network(), metrics={"accuracy": MulticlassAccuracy(10, top_k=10, average="micro")})
    quiet_trainer().test(other, data, verbose=False)
    assert other.trainer.callback_metrics["test/accuracy"] == 1


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (MulticlassF1Score(7), "f1 cannot be taken of 10 classes"),
        (MulticlassF1Score(10, average=None), "f1 is not one number.*average"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused_before_training(metric: Metric, words: str) -> None:
    trainer = quiet_trainer(max_steps=1)
    with pytest.raises(DataError, match=words):
        trainer.fit(Classifier(small_network(), metrics={"f1": metric}), Digits())
    assert trainer.global_step == 0
    with pytest.raises(ValueError, match="other than loss"):
        Classifier(small_network(), metrics={"loss": metric})


def test_loggers_are_told_what_a_run_is_made_of(tmp_path: Path) -> None:
    """Plain values, which both of the usual loggers write."""
    loggers = [CSVLogger(tmp_path, "csv", ""), TensorBoardLogger(tmp_path, "board", "")]
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, logger=loggers, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    model = Classifier(small_network(), partial(torch.optim.AdamW, lr=2e-3), schedule=Steps([1, 2]))
    trainer.fit(model, Digits(batch_size=20, train_size=40))
    for folder in ("csv", "board"):
        told = yaml.safe_load((tmp_path / folder / "hparams.yaml").read_text())
        expected = {
            "network": "preresnet",
            "network/depth": 14,
            "network/width": 4,
            "solver": "euler:h=1",
            "optimizer": "AdamW",
        }
        expected |= {"optimizer/lr": 2e-3, "optimizer/betas": "(0.9, 0.999)", "schedule": "Steps", "batch_size": 20}
        assert told.items() >= expected.items()
    (events,) = (tmp_path / "board").glob("events*")
    assert b"optimizer/lr" in events.read_bytes()
