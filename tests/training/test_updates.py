"""A training step is the plain loop's, waits for nothing, and what it found is read later."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from runs import quiet_trainer
from torch import nn, optim
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from continuum import CheckpointError
from continuum.models import Network
from continuum.solvers import SolveError
from continuum.training import Classifier, Launch, LogCost, Nesterov, OneCycle, Schedule, Steps
from continuum.training.launch import obstacle
from continuum.zoo import lm_resnet, odenet, preresnet, stochastic_depth_resnet

WAITS = ("_local_scalar_dense", "nonzero", "item", "is_nonzero")


def network(make: Callable[..., Network] = preresnet, depth: int = 14) -> Network:
    torch.manual_seed(0)
    return make(depth, width=4, in_channels=1).double()


def loader(batches: int, size: int = 6, last: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batches * size + last, 1, 8, 8, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(images, torch.arange(len(images)) % 10), batch_size=size)


def fit(model: Classifier, data: DataLoader[Any], *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    trainer = quiet_trainer(callbacks=list(callbacks), **{"max_epochs": 1, **options})
    trainer.fit(model, data)
    return trainer


NESTEROV = partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)


def plain_loop(
    net: Network, data: DataLoader[Any], epochs: int, clip: float = 0.0, accumulated: int = 1, make: Any = NESTEROV
) -> Network:
    """Training as it is written down, with torch's own update."""
    optimizer = make(net.parameters())
    for _ in range(epochs):
        for number, (images, labels) in enumerate(data, 1):
            (nn.functional.cross_entropy(net(images), labels) / accumulated).backward()
            if number % accumulated == 0 or number == len(data):
                if clip:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return net


def launched(model: Classifier) -> pl.Callback:
    class Put(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            model.launch = Launch(model.whole_step, trainer.optimizers[0])

    return Put()


def same(first: Network, second: Network, tolerance: float = 0.0) -> None:
    for (name, one), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(("clip", "accumulated"), [(0.0, 1), (0.05, 1), (0.0, 3), (0.05, 2)])
def test_fifty_steps_are_the_plain_loop(clip: float, accumulated: int, captured: bool) -> None:
    if captured and (clip or accumulated > 1):
        pytest.skip("is not captured")
    model = Classifier(network())
    callbacks = [launched(model)] if captured else []
    fit(model, loader(9, last=3), *callbacks, max_epochs=5, gradient_clip_val=clip or None, accumulate_grad_batches=accumulated)
    same(model.network, plain_loop(network(), loader(9, last=3), 5, clip, accumulated), 1e-12)


@pytest.mark.parametrize("schedule", [OneCycle(), Steps([1, 2])])
def test_a_launched_step_follows_the_schedule(schedule: Schedule) -> None:
    runs = []
    for captured in (False, True):
        model = Classifier(network(), schedule=schedule)
        trainer = fit(model, loader(6), *([launched(model)] if captured else []), max_epochs=3)
        assert isinstance(trainer.optimizers[0].param_groups[0]["lr"], float)
        assert trainer.global_step == 18
        runs.append(model.network)
    same(runs[0], runs[1])


class Watch(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class WatchStep(pl.Callback):
    """Counts the operators from the beginning of the fourth step to that of the fifth, between readings."""

    def __init__(self) -> None:
        self.watch = Watch()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            assert isinstance(pl_module, Classifier)
            pl_module.read()
            self.watch.__enter__()
        elif batch_idx == 4:
            self.watch.__exit__(None, None, None)


def operators(net: Network) -> tuple[Counter[str], Counter[str]]:
    """Those of a step here, and of the plain loop with a fused update."""
    here = WatchStep()
    fit(Classifier(net), loader(6), LogCost(), here)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True)
    batches = iter(loader(3))
    for watch in (Watch(), plain := Watch()):
        with watch:
            images, labels = next(batches)
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return here.watch.counts, plain.counts


def test_a_step_waits_for_nothing_and_adds_as_many_operators_at_every_depth() -> None:
    added = []
    for depth in (14, 26):
        here, plain = operators(network(depth=depth))
        assert not {name: here[name] for name in WAITS if here[name]}
        added.append(here.total() - plain.total())
    assert added[0] == added[1]
    assert added[0] <= 30


def strides(optimizer: torch.optim.Optimizer) -> list[tuple[Any, Any]]:
    return [(weight.stride(), state["momentum_buffer"].stride()) for weight, state in optimizer.state.items()]


def test_momenta_from_a_file_lie_in_memory_as_their_weights_do(tmp_path: Any) -> None:
    """torch's fused update would pair the wrong numbers of the two, and say nothing."""
    whole = Classifier(network())
    fit(whole, loader(4), max_epochs=2)
    half = fit(Classifier(network()), loader(4), max_epochs=1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt")
    for state in saved["optimizer_states"][0]["state"].values():
        state["momentum_buffer"] = state["momentum_buffer"].contiguous()
    torch.save(saved, tmp_path / "half.ckpt")
    model = Classifier(network())
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(model, loader(4), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    same(model.network, whole.network)
    assert all(one == other for one, other in strides(trainer.optimizers[0]))


def breaking(number: int, batches: int) -> DataLoader[Any]:
    """Batches, one of which has an image that is no number."""
    data = loader(batches)
    images, labels = data.dataset.tensors  # type: ignore[attr-defined]
    images[6 * number + 2] = float("nan")
    return DataLoader(TensorDataset(images, labels), batch_size=6)


class Count(pl.Callback):
    steps = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps += 1


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("make", [preresnet, lm_resnet, stochastic_depth_resnet])
def test_a_broken_step_is_named_at_the_next_reading_and_nothing_is_lost(make: Callable[..., Network], captured: bool) -> None:
    good = Classifier(network(make))
    fit(good, breaking(4, 9), limit_train_batches=4)
    model, count = Classifier(network(make)), Count()
    model.INTERVAL = 1e9
    with pytest.raises(SolveError, match=r"not finite .* in batch 4 of epoch 0") as caught:
        fit(model, breaking(4, 9), count, *([launched(model)] if captured else []))
    assert caught.value.batch == (0, 4)
    assert count.steps == 8, "the end of the epoch reads"
    same(model.network, good.network)


FUSED = {
    "Nesterov": Nesterov,
    "plain SGD": partial(optim.SGD, lr=0.1),
    "Adam": partial(optim.Adam, lr=0.01, weight_decay=1e-3),
    "AdamW": partial(optim.AdamW, lr=0.01, amsgrad=True),
}
READ = {
    "dampening": partial(optim.SGD, lr=0.1, momentum=0.9, dampening=0.5),
    "foreach": partial(optim.AdamW, lr=0.01, foreach=True),
    "not fused": partial(optim.AdamW, lr=0.01, fused=False),
    "RMSprop": partial(optim.RMSprop, lr=0.01, momentum=0.9),
    "Adagrad": partial(optim.Adagrad, lr=0.01),
    "NAdam": partial(optim.NAdam, lr=0.01),
}
"""What looks at the flag itself, and what is read before every update."""


@pytest.mark.parametrize("name", [*FUSED, *READ])
def test_every_optimiser_takes_torchs_own_steps(name: str) -> None:
    make = {**FUSED, **READ}[name]
    model = Classifier(network(), make)
    trainer = fit(model, loader(9, last=3), max_epochs=3)
    assert model.looks_itself(trainer.optimizers[0]) == (name in FUSED)
    same(model.network, plain_loop(network(), loader(9, last=3), 3, make=make), 1e-9)


def memory(trainer: pl.Trainer) -> list[Any]:
    """What the optimiser keeps of every weight, as numbers."""
    state = trainer.optimizers[0].state_dict()["state"]
    return [(number, name, torch.as_tensor(kept).tolist()) for number in state for name, kept in state[number].items()]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", [*FUSED, *READ])
def test_a_broken_step_leaves_weights_moments_and_counts_of_steps(name: str, captured: bool) -> None:
    """Those that follow it until it is read are left out too."""
    if captured and name in READ:
        pytest.skip("is not captured")
    make = {**FUSED, **READ}[name]
    good = Classifier(network(), make)
    before = memory(fit(good, breaking(4, 9), limit_train_batches=4))
    model, count = Classifier(network(), make), Count()
    model.INTERVAL = 1e9
    with pytest.raises(SolveError, match="in batch 4 of epoch 0"):
        fit(model, breaking(4, 9), count, *([launched(model)] if captured else []))
    assert count.steps == (8 if name in FUSED else 4)
    same(model.network, good.network)
    assert memory(model.trainer) == before


@pytest.mark.parametrize("name", FUSED)
def test_a_broken_first_step_leaves_moments_of_zero(name: str) -> None:
    model = Classifier(network(), FUSED[name])
    model.INTERVAL = 1e9
    with pytest.raises(SolveError, match="in batch 0 of epoch 0"):
        fit(model, breaking(0, 3))
    same(model.network, network())
    assert all(torch.tensor(kept).count_nonzero() == 0 for _, _, kept in memory(model.trainer))


class Careless(optim.AdamW):
    """Takes a step of its own, which knows of no flag."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data.sub_(group["lr"] * weight.grad)


def test_a_class_with_a_step_of_its_own_is_read_before_every_update() -> None:
    model = Classifier(network(), partial(Careless, fused=True))
    good = Classifier(network(), Careless)
    fit(good, breaking(4, 9), limit_train_batches=4)
    model.INTERVAL = 1e9
    with pytest.raises(SolveError, match="in batch 4 of epoch 0"):
        fit(model, breaking(4, 9))
    same(model.network, good.network)


@pytest.mark.parametrize("name", ["AdamW", "RMSprop"])
def test_another_optimiser_does_not_go_on_from_a_checkpoint(name: str, tmp_path: Any) -> None:
    make = {**FUSED, **READ}[name]
    whole = Classifier(network(), make)
    fit(whole, loader(4), max_epochs=2)
    fit(Classifier(network(), make), loader(4)).save_checkpoint(tmp_path / "half.ckpt")
    model = Classifier(network(), make)
    quiet_trainer(max_epochs=2).fit(model, loader(4), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    same(model.network, whole.network)
    with pytest.raises(CheckpointError, match="another optimiser than Nesterov, without its dampening"):
        quiet_trainer(max_epochs=2).fit(Classifier(network()), loader(4), ckpt_path=tmp_path / "half.ckpt", weights_only=True)


def test_a_checkpoint_is_not_written_over_by_a_broken_state(tmp_path: Any) -> None:
    kept = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2)
    model = Classifier(network())
    model.INTERVAL = 1e9
    with pytest.raises(SolveError, match="in batch 3 of epoch 0"):
        fit(model, breaking(3, 9), kept)
    assert [path.name for path in tmp_path.iterdir()] == ["step=2.ckpt"]


def test_readings_are_means_over_the_images(tmp_path: Any) -> None:
    model = Classifier(network(), partial(Nesterov, lr=1e-12))
    trainer = fit(model, loader(4, last=3))
    with torch.no_grad():
        net = network().train()
        parts = [(net(images), labels) for images, labels in loader(4, last=3)]
    losses = torch.cat([nn.functional.cross_entropy(logits, labels, reduction="none") for logits, labels in parts])
    correct = torch.cat([logits.argmax(1) == labels for logits, labels in parts])
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(losses.mean().item(), rel=1e-6)
    assert trainer.callback_metrics["train/accuracy"].item() == pytest.approx(correct.double().mean().item())


class Asks(pl.Callback):
    """Keeps the loss that callbacks see at the end of an epoch."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen = float(trainer.callback_metrics["train/loss"])


def test_callbacks_see_the_means_of_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Classifier, "INTERVAL", 0.0)
    asks, model = Asks(), Classifier(network())
    trainer = fit(model, loader(4, last=3), asks)
    assert asks.seen == pytest.approx(trainer.callback_metrics["train/loss"].item(), rel=1e-6)
    assert asks.seen != pytest.approx(model.means["train/loss"], rel=1e-6), "which is that of the last step"


class Hooked(pl.Callback):
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes part in a step."""


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (preresnet, {}, None),
        (preresnet, {"callbacks": [Hooked()]}, "Hooked takes part in it by on_after_backward"),
        (preresnet, {"gradient_clip_val": 1.0}, "clips or accumulates"),
        (stochastic_depth_resnet, {}, "look at the coin"),
        (lambda *_, **__: odenet(width=4), {}, "dopri5"),
    ],
)
def test_what_cannot_be_captured_says_why(make: Callable[..., Network], options: dict[str, Any], reason: str | None) -> None:
    model, trainer = Classifier(make(14, width=4)), quiet_trainer(**options)
    found = obstacle(trainer, model)
    assert found is None if reason is None else reason in (found or "")


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true", "64-true"])
def test_every_precision_trains(precision: str) -> None:
    torch.manual_seed(0)
    model = Classifier(preresnet(14, width=4, in_channels=1), partial(Nesterov, lr=0.01))
    images, labels = loader(4).dataset.tensors  # type: ignore[attr-defined]
    kind = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    before = next(model.network.parameters()).detach().double()
    fit(model, DataLoader(TensorDataset(images.to(kind), labels), batch_size=6), precision=precision)
    assert not torch.equal(next(model.network.parameters()).detach().double(), before)
