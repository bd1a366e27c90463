"""Callbacks that follow the weights in depth, and the step that adapts until the solver no longer matters."""

import copy
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import runs
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from runs import quiet_trainer, same_state
from torch import Tensor, nn

import continuum
from continuum import Adaptive, Field, Flow, Network
from continuum.analysis.momentum import frictions
from continuum.solvers import parse
from continuum.training import AdaptStep, Classifier, Digits, KeepFriction, LogSmoothness, Nesterov, Refine
from continuum.training.adaptation import coarser, finer, more_precise, tighter
from continuum.weights import depth_smoothness


def fit(
    folder: Path, network: Network, callbacks: list[pl.Callback], epochs: int = 1, resume: Path | None = None
) -> tuple[Classifier, pl.Trainer]:
    """Four steps an epoch."""
    data, limits = Digits(batch_size=32, train_size=128, crop=0), {"default_root_dir": folder, "limit_val_batches": 1}
    model = runs.fit(network, data, callbacks, resume, {"optimizer": partial(Nesterov, lr=0.01)}, max_epochs=epochs, **limits)
    return model, model.trainer


def lm_resnet() -> Network:
    torch.manual_seed(0)
    return continuum.zoo.lm_resnet(14, width=4, in_channels=1)


def odenet(solver: str) -> Network:
    torch.manual_seed(0)
    return continuum.zoo.odenet(width=4, downsample=False, in_channels=1, solver=solver)


class Watch(pl.Callback):
    """Keeps, after each step, what `look` sees of the network."""

    def __init__(self, look) -> None:
        self.look = look
        self.seen: list[object] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self.seen.append(self.look(pl_module.network))


def keep(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)


# Smoothness and frictions
def test_smoothness_is_logged_at_the_end_of_an_epoch_or_every_so_many_steps(tmp_path: Path) -> None:
    def plain(network: Network) -> list[float]:
        return [depth_smoothness(flow.field, 0.5).item() for flow in network.flows]  # type: ignore[arg-type]

    model, trainer = fit(tmp_path, lm_resnet(), [LogSmoothness(tau=0.5)])
    logged = [trainer.logged_metrics[f"flow{i}/smoothness"].item() for i in range(3)]
    assert logged == pytest.approx(plain(model.network), rel=1e-5)

    watch = Watch(plain)
    _, trainer = fit(tmp_path, lm_resnet(), [LogSmoothness(every=3, tau=0.5), watch])
    logged = [trainer.logged_metrics[f"flow{i}/smoothness"].item() for i in range(3)]
    assert logged == pytest.approx(watch.seen[2], rel=1e-5)
    assert logged != pytest.approx(watch.seen[3], rel=1e-5)


def test_frictions_are_kept_and_go_on_after_a_resume(tmp_path: Path) -> None:
    first = {name: k.item() for name, k in lm_resnet().named_parameters() if name.endswith(".k")}
    kept = KeepFriction()
    model, _ = fit(tmp_path, lm_resnet(), [kept, ModelCheckpoint(tmp_path / "kept", "{epoch}", save_top_k=-1)], epochs=3)
    state = kept.state_dict()
    assert state["epochs"] == [0, 1, 2, 3]
    assert state["k"][0] == list(first.values())
    assert [(f.flow, f.layer, f.k) for f in frictions(model.network)] == list(
        zip(state["flows"], state["layers"], state["k"][3], strict=True)
    )
    assert len({tuple(row) for row in state["k"]}) == 4

    content = torch.load(tmp_path / "kept" / "epoch=1.ckpt", weights_only=True)
    (saved,) = [s for key, s in content["callbacks"].items() if key.startswith("KeepFriction")]
    assert saved == {**state, "epochs": [0, 1, 2], "k": state["k"][:3]}
    resumed = KeepFriction()
    fit(tmp_path, lm_resnet(), [resumed], epochs=3, resume=tmp_path / "kept" / "epoch=1.ckpt")
    assert resumed.state_dict() == state
    fit(tmp_path, lm_resnet(), [kept])
    assert kept.epochs == [0, 1], "a new training forgets the one before"


def test_frictions_of_other_layers_start_a_new_history(tmp_path: Path) -> None:
    kept = KeepFriction()
    model, _ = fit(tmp_path, lm_resnet(), [Refine([1]), kept], epochs=2)
    assert kept.epochs == [2]
    assert kept.k == [[friction.k for friction in frictions(model.network)]]


# The step
class Stiff(Field):
    """x' = -rate (x - (1, -1)) on the logits of two classes: all paths lead to class 0, and steps that are too long beyond."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, t: object, x: Tensor) -> Tensor:
        return -self.rate * (x - torch.tensor([1.0, -1.0]) - self.weight)


def stiff(rate: float, solver: str, depth: float = 1) -> Network:
    return Network(nn.Identity(), [Flow(Stiff(rate), solver, depth)], nn.Identity())


def judged(rate: float, solver: str, steps: int = 1, images: Tensor | None = None, **options: int) -> str:
    """The solver after so many checks on images of class 0."""
    images = torch.tensor([[-1.0, 1.0]] * 8) if images is None else images
    model = Classifier(stiff(rate, solver))
    trainer = quiet_trainer()
    callback = AdaptStep(every=1, **options)
    for step in range(1, steps + 1):
        trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
        callback.on_train_batch_end(trainer, model, None, (images, torch.zeros(len(images), dtype=torch.long)), 0)
    assert callback.solver == str(model.network.solver)
    return str(model.network.solver)


def test_the_step_is_halved_until_the_accuracy_is_that_of_the_equation() -> None:
    """At rate 3 the equation takes both starts to 1 within e^-3 of the way, class 0. Euler's step with h = 1 takes 3 to
    1 + 2 (1 - 3) = -3, and the midpoint rule -3 to 1 - 4 (1 - 3 + 9/2) = -9: class 1.
    """
    far = torch.tensor([[3.0, -3.0]] * 8)
    assert judged(3.0, "euler:h=1", 1, far) == "euler:h=0.5"
    assert judged(3.0, "midpoint:h=1", 1, -far) == "midpoint:h=0.5"
    assert judged(3.0, "euler:h=1", 1, far, finest=1) == "euler:h=1", "no finer than the finest"


def test_the_step_grows_where_it_does_not_matter() -> None:
    assert judged(0.1, "euler:h=0.25", 1) == f"euler:h={1 / 3}"
    assert judged(0.1, "euler:h=0.25", 5) == "euler:h=1"
    assert judged(0.1, "midpoint:h=0.5", 1) == "midpoint:h=1"
    assert judged(0.1, "euler:h=0.02", 1) == f"euler:h={1 / 46}"
    far = torch.tensor([[3.0, -3.0]] * 8)
    assert judged(3.0, "euler:h=0.5", 3, far) == "euler:h=0.5", "h = 1 was tried and not kept"


def test_tolerances_are_adapted_too() -> None:
    larger = parse(judged(0.1, "dopri5:rtol=1e-3,atol=1e-4"))
    assert isinstance(larger, Adaptive)
    assert (larger.rtol, larger.atol) == pytest.approx((1.1e-3, 1.1e-4))
    assert judged(0.1, "dopri5:rtol=1,atol=2") == "dopri5:rtol=1,atol=2"
    far = torch.tensor([[3.0, -3.0]] * 8)
    # One step from -3 to 1 - 4 (1 - 2 + 2) = -3; a step of dopri5 ends at 0.3, the equation at 0.5.
    loose = "adaptive_heun:rtol=3,atol=3,first_step=1"
    assert judged(2.0, loose, 1, -far) == "adaptive_heun:rtol=1.5,atol=1.5,first_step=1"


@pytest.mark.parametrize(
    ("text", "half", "tenth"),
    [
        ("euler:h=1", "euler:h=0.5", "euler:h=1"),
        ("euler:h=0.5", "euler:h=0.25", "euler:h=1"),
        ("midpoint:h=0.05", "midpoint:h=0.025", f"midpoint:h={1 / 19}"),
        ("euler:h=0.004,gradient=checkpoint", "euler:h=0.002,gradient=checkpoint", f"euler:h={1 / 228},gradient=checkpoint"),
        ("euler:h=0.0025", "euler:h=0.0025", f"euler:h={1 / 364}"),
        ("dopri5:rtol=0.01,atol=0.001", "dopri5:rtol=0.005,atol=0.0005", "dopri5:rtol=0.011,atol=0.0011"),
        ("dopri5:rtol=1e-6,atol=1e-6", "dopri5:rtol=1e-6,atol=1e-6", "dopri5:rtol=1.1e-6,atol=1.1e-6"),
    ],
)
def test_half_and_tenth_stay_on_the_grid(text: str, half: str, tenth: str) -> None:
    solver = parse(text)
    assert finer(solver, 500) == parse(half)
    grown = coarser(solver)
    assert str(grown)[:9] == tenth[:9]
    assert parse(str(grown)) == grown
    if isinstance(solver, Adaptive) or isinstance(grown, Adaptive):
        assert isinstance(grown, Adaptive)
        assert isinstance(solver, Adaptive)
        assert (grown.rtol, grown.atol) == pytest.approx((1.1 * solver.rtol, 1.1 * solver.atol))
    else:
        assert grown == parse(tenth)


def test_the_more_precise_solver_has_a_fiftieth_of_the_error() -> None:
    for m in (1, 4, 30, 49, 60, 500):
        euler, midpoint = parse(f"euler:h={1 / m}"), parse(f"midpoint:h={1 / m}")
        better, best = more_precise(euler), more_precise(midpoint)  # type: ignore[arg-type]
        assert str(better).startswith("midpoint")
        assert str(best).startswith("rk4")
        assert better.h <= min(1 / m, (1 / m / 50) ** (1 / 2)) + 1e-12
        assert best.h <= min(1 / m, (1 / m**2 / 50) ** (1 / 4)) + 1e-12
        assert 1 / better.h < max(m, (50 * m) ** 0.5) + 1
    fehlberg = tighter(parse("fehlberg2:rtol=1e-2,atol=1e-3"))  # type: ignore[arg-type]
    assert (fehlberg.method, fehlberg.rtol, fehlberg.atol) == ("dopri5", pytest.approx(2e-3), pytest.approx(2e-4))
    dopri = tighter(parse("dopri5:rtol=1e-2,atol=1e-3"))  # type: ignore[arg-type]
    assert (dopri.method, dopri.rtol, dopri.atol) == ("dopri5", pytest.approx(1e-3), pytest.approx(1e-4))


def test_adapting_changes_the_solver_of_the_run_and_survives_a_resume(tmp_path: Path) -> None:
    def run(epochs: int, resume: Path | None = None) -> tuple[Classifier, list[object]]:
        watch = Watch(lambda network: str(network.solver))
        model, _ = fit(tmp_path, odenet("euler:h=0.125"), [AdaptStep(every=2), watch, keep(tmp_path)], epochs, resume)
        return model, watch.seen

    model, seen = run(3)
    steps = [f"euler:h={1 / m:g}" if m in (1, 2, 4, 5, 8) else f"euler:h={1 / m}" for m in (8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2)]
    assert seen == steps
    saved = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    assert saved["continuum"]["solvers"] == [f"euler:h={1 / 5:g}"]
    assert str(continuum.load(tmp_path / "step=6.ckpt").solver) == "euler:h=0.2"
    resumed, rest = run(3, tmp_path / "step=8.ckpt")
    assert rest == steps[8:]
    assert same_state(model, resumed)


def test_looking_leaves_no_trace(tmp_path: Path) -> None:
    """Buffers, modes, generators and the cost of the training solve are as without the callback."""
    torch.manual_seed(0)
    network = continuum.zoo.preresnet(14, width=4, in_channels=1, solver="euler:h=0.5")
    network.stem.eval()
    model = Classifier(network)
    trainer = quiet_trainer()
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 50
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
    network(images)
    costs, before = [flow.cost for flow in network.flows], copy.deepcopy(network)
    modes, state = [m.training for m in network.modules()], torch.get_rng_state()
    AdaptStep().on_train_batch_end(trainer, model, None, (images, labels), 0)
    assert same_state(model.network, before)
    assert [m.training for m in network.modules()] == [m.training for m in model.network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert [flow.cost for flow in network.flows] == costs
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize(
    ("callback", "network", "error", "message"),
    [
        (AdaptStep(), lm_resnet, TypeError, "not linear_two_step"),
        (AdaptStep(), lambda: odenet("rk4:h=0.5"), TypeError, "not rk4"),
        (AdaptStep(), lambda: odenet("euler:grid=0/0.5/1"), ValueError, "m even steps a layer"),
        (AdaptStep(), lambda: stiff(1.0, "euler:h=0.5", 1.5), ValueError, "whole depths"),
        (KeepFriction(), lambda: odenet("euler"), TypeError, "has none: lm_resnet"),
        (LogSmoothness(), lambda: odenet("euler"), TypeError, "no flow of this network"),
    ],
)
def test_what_cannot_be_adapted_or_followed_is_refused_at_setup(callback, network, error, message) -> None:
    with pytest.raises(error, match=message):
        callback.setup(quiet_trainer(), Classifier(network()), "fit")
    with pytest.raises(TypeError, match="needs a module"):
        LogSmoothness().setup(quiet_trainer(), pl.LightningModule(), "fit")


@pytest.mark.parametrize("options", [{"every": 0}, {"tolerance": 1.0}, {"finest": 0}], ids=str)
def test_bad_numbers_are_refused(options: dict) -> None:
    for make in (lambda: AdaptStep(**options), lambda: LogSmoothness(0)):
        with pytest.raises(ValueError, match=r"every"):
            make()
