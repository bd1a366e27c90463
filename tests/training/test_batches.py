"""Batches: they depend on (seed, epoch) alone, wherever they are made, and resumed runs see the same ones."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pictures import ready
from pytorch_lightning.callbacks import ModelCheckpoint
from runs import StopAt, quiet_trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from continuum.training import Digits, ImageData, ImageFolder
from continuum.training.batches import BatchLoader, InOrder, Shuffled, augmented, corners
from continuum.training.images import InMemory, LabelledImages, free_memory, keyed_generator

CPU, META = torch.device("cpu"), torch.device("meta")
"""A device whose tensors hold no numbers, so that whoever reads one raises."""


def random_set(count: int, channels: int = 3) -> InMemory:
    numbers = keyed_generator("images", channels)
    pixels = torch.randint(256, (count, channels, 7, 9), generator=numbers, dtype=torch.uint8)
    return InMemory(pixels, torch.randint(5, (count,), generator=numbers))


def loader_of(images: LabelledImages, plan: InOrder | Shuffled, device: torch.device = CPU) -> BatchLoader:
    mean, std = (value.expand(images.shape[0]) for value in (torch.tensor(0.4), torch.tensor(0.2)))
    return BatchLoader(images, plan, mean, std, torch.float32, device)


def by_hand(image: Tensor, top: int, left: int, mirrored: bool, crop: int) -> Tensor:
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * crop, width + 2 * crop, dtype=torch.uint8)
    padded[:, crop : crop + height, crop : crop + width] = image[:, :, list(reversed(range(width)))] if mirrored else image
    return padded[:, top : top + height, left : left + width]


def same(first: Iterable[Any], second: Iterable[Any]) -> bool:
    return all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


# Plans
def test_an_epoch_shows_each_training_image_once() -> None:
    plan = Shuffled(torch.arange(100, 350), batch_size=100)
    assert sorted(plan.epoch(3).order.tolist()) == list(range(100, 350))
    assert plan.sizes == [100, 100, 50]


@pytest.mark.parametrize(("count", "sizes"), [(200, [100, 100]), (201, [100, 101]), (202, [100, 100, 2]), (1, [1]), (0, [])])
def test_a_last_batch_of_one_image_joins_the_one_before(count: int, sizes: list[int]) -> None:
    data = random_set(count or 1)
    loader = loader_of(data, Shuffled(torch.arange(count), 100, crop=1))
    assert [len(labels) for _, labels in loader] == sizes
    assert len(loader) == len(sizes)


def test_an_epoch_depends_on_seed_and_number_alone() -> None:
    plan = Shuffled(torch.arange(300), 32, seed=1, crop=2, flip=True)
    first = plan.epoch(4)
    torch.manual_seed(123)
    assert same([first], [Shuffled(torch.arange(300), 64, seed=1, crop=2, flip=True).epoch(4)])
    for other in (plan.epoch(5), Shuffled(torch.arange(300), 32, seed=2, crop=2, flip=True).epoch(4)):
        assert not any(map(torch.equal, first, other))
    assert first.shifts.unique().tolist() == [0, 1, 2, 3, 4]
    assert 100 < first.mirrors.sum() < 200
    plain = Shuffled(torch.arange(300), 32).epoch(4)
    assert not plain.shifts.any()
    assert not plain.mirrors.any()


@pytest.mark.parametrize("count", [64, 65, 66, 67])
def test_two_ranks_see_together_what_one_would(count: int) -> None:
    """Batch for batch, shifted and mirrored alike; the first image of an odd count serves twice."""

    def rank(rank: int, ranks: int) -> Shuffled:
        return Shuffled(torch.arange(100, 100 + count), 32 // ranks, rank, ranks, seed=3, crop=1, flip=True)

    first, second, alone = rank(0, 2), rank(1, 2), rank(0, 1)
    assert first.sizes == second.sizes
    assert sum(first.sizes) == -(-count // 2)
    for one, a, b in zip(alone.epoch(1), first.epoch(1), second.epoch(1), strict=True):
        together = torch.stack([a, b], dim=-1).flatten(-2)
        assert torch.equal(together[..., :count], one)
        assert torch.equal(together[..., count:], one[..., : count % 2])


@pytest.mark.parametrize("count", [0, 1, 7, 8])
def test_ranks_evaluate_every_image_once_as_it_is(count: int) -> None:
    ranks = [InOrder(torch.arange(50, 50 + count), 2, rank, 3) for rank in range(3)]
    epochs = [rank.epoch(0) for rank in ranks]
    assert sorted(torch.cat([epoch.order for epoch in epochs]).tolist()) == list(range(50, 50 + count))
    for rank, epoch in zip(ranks, epochs, strict=True):
        assert sum(rank.sizes) == len(epoch.order)
        assert not epoch.shifts.any()
        assert not epoch.mirrors.any()


# Pixels
@pytest.mark.parametrize(("crop", "flip"), [(2, True), (3, False), (0, True), (0, False)])
@pytest.mark.parametrize("channels", [1, 3])
def test_batches_equal_a_loop_over_images(crop: int, flip: bool, channels: int) -> None:
    """Each image is mirrored, padded with black and cropped by hand."""
    data = random_set(60, channels)
    loader = loader_of(data, Shuffled(torch.arange(10, 60), 16, seed=2, crop=crop, flip=flip))
    epoch = loader.plan.epoch(7)
    batches = list(loader.batches(7))
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 2]
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.labels[epoch.order])
    moves = zip(epoch.order.tolist(), *epoch.shifts.tolist(), epoch.mirrors.tolist(), strict=True)
    expected = torch.stack([by_hand(data.pixels[image], top, left, mirrored, crop) for image, top, left, mirrored in moves])
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), (expected / 255 - 0.4) / 0.2, rtol=0, atol=2e-6)


def test_shifted_pixels_are_copied_exactly() -> None:
    data, epoch = random_set(50), Shuffled(torch.arange(50), 50, crop=3, flip=True).epoch(0)
    found = augmented(data.pixels, corners(epoch.shifts, epoch.mirrors, data.shape, 3), 3, True)
    moves = zip(*epoch.shifts.tolist(), epoch.mirrors.tolist(), strict=True)
    assert torch.equal(
        found, torch.stack([by_hand(image, *move, crop=3) for image, move in zip(data.pixels, moves, strict=True)])
    )


@pytest.mark.parametrize("plan", [InOrder(torch.arange(9), 4), Shuffled(torch.arange(9), 4, crop=1, flip=True)])
def test_batches_are_channels_last_unless_they_have_one_channel(plan: InOrder | Shuffled) -> None:
    for images, _ in loader_of(random_set(9), plan):
        assert images.is_contiguous(memory_format=torch.channels_last)
    for images, _ in loader_of(random_set(9, channels=1), plan):
        assert images.is_contiguous()
        assert images.stride() == (63, 63, 9, 1)


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_an_epoch_goes_on_at_a_batch(start: int) -> None:
    loader = loader_of(random_set(50), Shuffled(torch.arange(50), 16, crop=2, flip=True))
    assert same(loader.batches(2, start), list(loader.batches(2))[start:])


@pytest.mark.parametrize("workers", [None, 1])
def test_the_global_generator_is_neither_read_nor_changed(folder: str, workers: int | None) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    data = Digits(crop=1, flip=True) if workers is None else ImageFolder(folder, memory_limit=0, workers=workers)
    data = ready(data)
    for batches in (data.train_dataloader(), data.val_dataloader(), data.test_batches(20)):
        list(batches)
    assert torch.equal(state, torch.get_rng_state())


def test_evaluation_is_in_order_and_as_it_is() -> None:
    data = ready(Digits(batch_size=50, crop=2, flip=True))
    expected = (data.test_images.pixels.float() / 255 - data.mean) / data.std
    for loader in (data.test_dataloader(), data.predict_dataloader()):
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(labels, data.test_images.labels)
    held_out = torch.cat([labels for _, labels in data.val_dataloader()])
    assert torch.equal(held_out, data.train_images.labels[data.val_indices])


def test_no_validation_means_no_batches() -> None:
    data = ready(Digits(validation=0))
    assert len(data.val_dataloader()) == len(list(data.val_dataloader())) == 0


def test_the_test_images_without_a_trainer() -> None:
    data = ready(Digits(batch_size=100))
    whole = list(data.test_batches())
    assert [len(labels) for _, labels in whole] == [100, 100, 100, 59]
    assert torch.equal(torch.cat([labels for _, labels in whole]), data.test_images.labels)
    first = list(data.test_batches(130))
    assert [len(labels) for _, labels in first] == [100, 30]
    assert same(first, data.test_batches(130))
    chosen, everything = ({image.numpy().tobytes() for images, _ in batches for image in images} for batches in (first, whole))
    assert len(chosen) == 130
    assert chosen < everything
    assert chosen != {image.numpy().tobytes() for images, _ in data.test_batches() for image in images[:130]}


# Where images live
class Counted(TorchDispatchMode):
    """The names of the operators that compute something: all that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.found.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("channels", "most"), [(1, 9), (3, 10)])
def test_a_step_is_few_operators_and_reads_no_number(channels: int, most: int) -> None:
    batches = iter(loader_of(random_set(40, channels), Shuffled(torch.arange(40), 8, crop=2, flip=True)))
    next(batches)
    with Counted() as counted:
        next(batches)
    assert not {"_local_scalar_dense", "nonzero", "item"} & set(counted.found)
    assert len(counted.found) <= most, counted.found


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_no_number_is_read_on_the_device(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Of a set that lives there, and of one that goes there batch by batch."""
    monkeypatch.setattr("continuum.training.images.free_memory", lambda device: 2**30)
    held = random_set(20).on(META, share)
    for plan in (InOrder(torch.arange(20), 8), Shuffled(torch.arange(20), 8, crop=2, flip=True)):
        found = [(batch.shape, batch.device, labels.device) for batch, labels in loader_of(held, plan, META)]
        assert found == [((count, 3, 7, 9), META, META) for count in (8, 8, 4)]


@pytest.mark.parametrize("fits", [True, False])
def test_a_set_lives_on_the_device_where_it_fits(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, fits: bool
) -> None:
    data = random_set(1000)
    needed = data.pixels.nbytes + data.labels.nbytes
    monkeypatch.setattr("continuum.training.images.free_memory", lambda device: 4 * needed if fits else 4 * needed - 1)
    held = data.on(META, 0.25)
    assert held.labels.device == (META if fits else CPU)
    assert held is data.on(META, 0.25)
    assert (held is data) == (not fits)
    lines = {str(warning.message) for warning in recwarn}
    assert len(lines) == (not fits)
    assert all("1000 images of 0 MiB stay on the CPU and go to meta batch by batch" in line for line in lines)


def test_nothing_is_copied_where_it_is_or_should_not_go(folder: str, recwarn: pytest.WarningsRecorder) -> None:
    data = random_set(10)
    assert data.on(CPU, 0.5) is data
    assert data.on(META, 0.0) is data
    streamed = ready(ImageFolder(folder, memory_limit=0)).train_images
    assert streamed.on(META, 0.5) is streamed
    assert not list(recwarn)


def test_a_device_that_does_not_tell_has_no_free_memory() -> None:
    assert free_memory(META) == 0


# Under Lightning
class Linear(pl.LightningModule):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(features, 10)
        torch.nn.init.zeros_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        assert len(batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


def fit(data: ImageData, features: int, callbacks: list[pl.Callback], resume: Path | None = None, **limits: Any) -> Tensor:
    """The weights after a run on the CPU."""
    module = Linear(features)
    quiet_trainer(callbacks, **limits).fit(module, data, ckpt_path=resume)
    return module.layer.weight.detach()


@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_steps": 14}, {"max_epochs": 3, "limit_train_batches": 4}], ids=str)
@pytest.mark.parametrize("where", [{"every_n_train_steps": 1}, {"save_on_train_epoch_end": True}], ids=["step", "epoch"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, where: dict[str, Any], limits: dict[str, Any]) -> None:
    """To the bit, from a checkpoint after any step, the last of an epoch among them, and from the end of an epoch."""

    def data() -> Digits:
        return Digits(batch_size=8, train_size=36, validation=0.01, crop=1, flip=True)

    whole = fit(data(), 64, [], **limits)
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **where)
    with pytest.raises(InterruptedError):
        fit(data(), 64, [keep, StopAt(7)], **limits)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == (7 if "every_n_train_steps" in where else 1)
    for checkpoint in checkpoints:
        assert torch.equal(whole, fit(data(), 64, [], resume=checkpoint, **limits)), checkpoint.name


def test_a_streamed_run_resumes_although_its_workers_read_ahead(folder: str, tmp_path: Path) -> None:
    """Within an epoch of five batches, after its last step, and at its end."""

    def data() -> ImageFolder:
        return ImageFolder(folder, batch_size=4, memory_limit=0, workers=1, validation=0, crop=1)

    whole = fit(data(), 192, [], max_epochs=2)
    every = {"steps": {"every_n_train_steps": 1}, "epochs": {"save_on_train_epoch_end": True}}
    keep = [ModelCheckpoint(tmp_path / name, "{step}", save_top_k=-1, **options) for name, options in every.items()]
    with pytest.raises(InterruptedError):
        fit(data(), 192, [*keep, StopAt(7)], max_epochs=2)
    for name in ("steps/step=3.ckpt", "steps/step=5.ckpt", "epochs/step=5.ckpt"):
        assert torch.equal(whole, fit(data(), 192, [], resume=tmp_path / name, max_epochs=2)), name


def test_a_trainer_trains_on_the_batches_of_each_epoch() -> None:
    """By the number of the epoch that Lightning counts."""
    seen: list[tuple[int, list[int]]] = []

    class Watch(Linear):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            seen.append((self.current_epoch, batch[1].tolist()))
            return super().training_step(batch)

    quiet_trainer(max_epochs=3).fit(Watch(64), Digits(train_size=300))
    alone = ready(Digits(train_size=300)).train_dataloader()
    assert seen == [(number, labels.tolist()) for number in range(3) for _, labels in alone.batches(number)]


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
def test_images_have_the_type_of_the_weights(precision: Any) -> None:
    trainer = quiet_trainer(max_steps=2, precision=precision)
    module, data = Linear(64), Digits(batch_size=64, train_size=64)
    trainer.fit(module, data)
    (images, _), weight = next(iter(data.test_dataloader())), module.layer.weight
    assert images.dtype == weight.dtype
    assert weight.dtype == {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    if precision == "64-true":
        mean, std = (s.double().view(1, 1, 1, 1) for s in (data.mean, data.std))
        torch.testing.assert_close(images, (data.test_images.images(torch.arange(64)).double() / 255 - mean) / std)


def test_overfit_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="train_size"):
        fit(Digits(), 64, [], max_epochs=1, overfit_batches=2)
