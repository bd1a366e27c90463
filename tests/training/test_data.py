"""Data: every image in its part, batches that depend on keys alone, and resumed runs that see the same ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint
from runs import StopAt, quiet_trainer
from torch import Tensor
from torchvision import datasets

from continuum.training import CIFAR10, MNIST, Digits, ImageData, ImageFolder
from continuum.training.batches import KeyedBatches
from continuum.training.images import DataError, InMemory, augmented, decoded, keyed_generator

RAMP = torch.linspace(0, 65535, 64).reshape(8, 8).round().to(torch.int32).numpy()


def ready(data: ImageData) -> Any:
    data.prepare_data()
    data.setup()
    return data


def write_images(root: Path, counts: dict[str, int], height: int = 8, width: int = 8) -> None:
    """Random images `<root>/<folder>/<number>.png`, so many in each folder."""
    generator = torch.Generator().manual_seed(len(str(root)))
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for number in range(count):
            pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / folder / f"{number}.png")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Twenty training images and six test images of two classes."""
    write_images(tmp_path / "images", {"train/cat": 11, "train/dog": 9, "test/cat": 4, "test/dog": 2})
    return str(tmp_path / "images")


def rows(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def epoch(data: Any, number: int) -> list[Any]:
    """The uint8 batches of a training epoch, with their keys."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(loader)


def same(first: list[Any], second: list[Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]

    return len(first) == len(second) and all(map(equal, first, second))


# What a set holds
def test_digits_have_their_classes_shape_and_types() -> None:
    data = ready(Digits(batch_size=100))
    assert (data.classes, data.num_classes) == (list("0123456789"), 10)
    assert (data.shape, len(data.train_images), len(data.test_images)) == ((1, 8, 8), 1438, 359)
    assert (data.train_images.pixels.dtype, data.train_images.pixels.max()) == (torch.uint8, 255)
    images, labels = data.on_after_batch_transfer(epoch(data, 0)[0], 0)
    assert (images.shape, images.dtype) == ((100, 1, 8, 8), torch.float32)
    assert (labels.shape, labels.dtype) == ((100,), torch.int64)


def test_statistics_are_those_of_all_training_images() -> None:
    """Also of those held out, so that they do not depend on the seed."""
    data = ready(Digits(seed=1))
    pixels = data.train_images.pixels.double() / 255
    torch.testing.assert_close(data.mean.double(), pixels.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(data.std.double(), pixels.std((0, 2, 3), correction=0), rtol=1e-6, atol=0)
    everything = data.on_after_batch_transfer((data.train_images.pixels, data.train_images.labels, -1), 0)[0]
    assert abs(float(everything.mean())) < 1e-5
    assert abs(float(everything.std()) - 1) < 1e-4


def test_every_image_is_in_one_part() -> None:
    data = ready(Digits(validation=0.2))
    train, held_out = set(data.train_indices.tolist()), set(data.val_indices.tolist())
    assert not train & held_out
    assert train | held_out == set(range(1438))
    assert len(held_out) == round(0.2 * 1438)
    test = rows(torch.cat([images for images, *_ in data.test_dataloader()]))
    assert len(test) == 359
    assert not test & rows(data.train_images.pixels)


def test_the_split_follows_the_seed() -> None:
    first, again, other = (ready(Digits(seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first.val_indices, again.val_indices)
    assert not torch.equal(first.val_indices, other.val_indices)
    assert torch.equal(first.test_images.pixels, other.test_images.pixels)


def test_train_size_takes_the_first_of_the_split() -> None:
    whole, part = ready(Digits()), ready(Digits(train_size=50))
    assert torch.equal(part.train_indices, whole.train_indices[:50])
    assert torch.equal(part.val_indices, whole.val_indices)


@pytest.mark.parametrize("data", [Digits(batch_size=7, seed=3, crop=1), MNIST("elsewhere"), ImageFolder("there", size=4)])
def test_arguments_rebuild_the_data(data: ImageData) -> None:
    arguments = data.arguments
    assert all(isinstance(value, (int, float, str, bool, type(None))) for value in arguments.values())
    assert type(data)(**arguments).arguments == arguments
    assert arguments["batch_size"] == data.batch_size


# Batches and their keys
def test_an_epoch_shows_each_training_image_once() -> None:
    data = ready(Digits(batch_size=100, train_size=250))
    sampler = data.train_dataloader().sampler
    seen = torch.cat([indices for indices, _ in sampler])
    assert sorted(seen.tolist()) == sorted(data.train_indices.tolist())
    assert [len(indices) for indices, _ in sampler] == [100, 100, 50]
    assert len(data.train_dataloader()) == 3


def test_a_last_batch_of_one_image_joins_the_one_before() -> None:
    data = ready(Digits(batch_size=100, train_size=201))
    assert [len(labels) for _, labels, _ in epoch(data, 0)] == [100, 101]
    assert len(data.train_dataloader()) == 2


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    data = ready(Digits(train_size=300))
    first = epoch(data, 4)
    torch.manual_seed(123)
    assert same(first, epoch(ready(Digits(train_size=300)), 4))
    other = epoch(data, 5)
    assert not same(first, other)
    assert not {key for *_, key in first} & {key for *_, key in other}
    assert len({key for *_, key in first}) == len(first)


@pytest.mark.parametrize("workers", [None, 1])
def test_the_global_generator_is_neither_read_nor_changed(folder: str, workers: int | None) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    data = Digits(crop=1, flip=True) if workers is None else ImageFolder(folder, memory_limit=0, workers=workers)
    data = ready(data)
    for batch in epoch(data, 0):
        data.on_after_batch_transfer(batch, 0)
    list(data.val_dataloader())
    list(data.test_batches(20))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("count", [64, 65, 66, 67])
def test_two_ranks_share_an_epoch(count: int) -> None:
    """Disjoint but for one image of an odd count, equally many batches, other augmentation."""
    ranks = [KeyedBatches(torch.arange(100, 100 + count), 16, seed=0, shuffle=True, trainer=None) for _ in range(2)]
    for rank, sampler in enumerate(ranks):
        sampler.rank, sampler.num_replicas = rank, 2
    first, second = (list(sampler) for sampler in ranks)
    assert [len(indices) for indices, _ in first] == [len(indices) for indices, _ in second]
    assert len(first) == len(ranks[0]) == len(ranks[1])
    a, b = ({i for indices, _ in batches for i in indices.tolist()} for batches in (first, second))
    assert len(a & b) == count % 2
    assert a | b == set(range(100, 100 + count))
    assert not {key for _, key in first} & {key for _, key in second}


def test_evaluation_is_in_order_and_without_augmentation() -> None:
    data = ready(Digits(batch_size=50, crop=2, flip=True))
    for loader in (data.test_dataloader(), data.predict_dataloader()):
        batches = list(loader)
        assert torch.equal(torch.cat([images for images, *_ in batches]), data.test_images.pixels)
        assert torch.equal(torch.cat([labels for _, labels, _ in batches]), data.test_images.labels)
    images, _ = data.on_after_batch_transfer(batches[0], 0)
    pixels = data.test_images.pixels[:50].float() / 255
    torch.testing.assert_close(images, (pixels - data.mean) / data.std, rtol=1e-5, atol=1e-5)
    held_out = torch.cat([labels for _, labels, _ in data.val_dataloader()])
    assert torch.equal(held_out, data.train_images.labels[data.val_indices])


def test_no_validation_means_no_batches() -> None:
    data = ready(Digits(validation=0))
    assert len(data.val_dataloader()) == len(list(data.val_dataloader())) == 0


def test_the_test_images_without_a_trainer() -> None:
    data = ready(Digits(batch_size=100))
    whole = list(data.test_batches())
    assert [len(labels) for _, labels in whole] == [100, 100, 100, 59]
    assert torch.equal(torch.cat([labels for _, labels in whole]), data.test_images.labels)
    first, again = list(data.test_batches(130)), list(data.test_batches(130))
    assert [len(labels) for _, labels in first] == [100, 30]
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    chosen, everything = rows(torch.cat([images for images, _ in first])), torch.cat([images for images, _ in whole])
    assert len(chosen) == 130
    assert chosen < rows(everything)
    assert chosen != rows(everything[:130])


# Augmentation
@pytest.mark.parametrize(("crop", "flip"), [(2, True), (3, False), (0, True), (0, False)])
def test_augmentation_equals_a_loop_over_images(crop: int, flip: bool) -> None:
    """Each image is padded with black, cropped and mirrored by hand; the key's numbers are drawn in the same order."""
    images = torch.randint(256, (40, 3, 7, 9), generator=keyed_generator("images"), dtype=torch.uint8)
    found = augmented(images, crop, flip, keyed_generator(5))
    numbers = keyed_generator(5)
    offsets = torch.randint(2 * crop + 1, (2, 40, 1), generator=numbers).squeeze(2).tolist() if crop else [[0] * 40] * 2
    mirrored = (torch.rand(40, generator=numbers) < 0.5).tolist() if flip else [False] * 40
    for i, image in enumerate(images):
        padded = torch.zeros(3, 7 + 2 * crop, 9 + 2 * crop, dtype=torch.uint8)
        padded[:, crop : crop + 7, crop : crop + 9] = image
        top, left = offsets[0][i], offsets[1][i]
        expected = padded[:, top : top + 7, left : left + 9]
        if mirrored[i]:
            expected = expected[:, :, list(range(8, -1, -1))]
        assert torch.equal(found[i], expected), i
    if crop:
        assert set(offsets[0]) == set(offsets[1]) == set(range(2 * crop + 1))
    if flip:
        assert 5 < sum(mirrored) < 35


def test_training_batches_are_augmented_by_their_key() -> None:
    data = ready(Digits(crop=2, flip=True, train_size=64))
    images, labels, key = epoch(data, 0)[0]
    keys = (key, key, key + 1, -1)
    found, again, other, plain = (data.on_after_batch_transfer((images, labels, one), 0)[0] for one in keys)
    expected = (augmented(images, 2, True, keyed_generator(key)).float() / 255 - data.mean) / data.std
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert [torch.equal(found, one) for one in (again, other, plain)] == [True, False, False]


# Folders of images
@pytest.mark.parametrize("workers", [0, 2])
def test_images_in_memory_and_from_disk_are_the_same(folder: str, workers: int) -> None:
    options = {"batch_size": 4, "workers": workers, "validation": 0.2}
    held, streamed = (ready(ImageFolder(folder, memory_limit=limit, **options)) for limit in (2**31, 0))
    assert [hasattr(data.train_images, "pixels") for data in (held, streamed)] == [True, False]
    assert held.classes == streamed.classes == ["cat", "dog"]
    assert held.shape == streamed.shape == (3, 8, 8)
    assert same(epoch(held, 2), epoch(streamed, 2))
    assert same(list(held.val_dataloader()), list(streamed.val_dataloader()))
    assert same(list(held.test_dataloader()), list(streamed.test_dataloader()))


@pytest.mark.parametrize("limit", [2**31, 0])
def test_networks_from_elsewhere_get_the_normalisation_that_they_expect(folder: str, limit: int) -> None:
    data = ready(ImageFolder(folder, memory_limit=limit, normalisation="imagenet"))
    ((images, _),) = data.test_batches()
    pixels = ready(ImageFolder(folder)).test_images.pixels.float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(images, (pixels - mean) / std)


def test_images_and_labels_are_those_of_the_files(folder: str) -> None:
    data = ready(ImageFolder(folder))
    assert data.test_images.labels.tolist() == [0, 0, 0, 0, 1, 1]
    with Image.open(f"{folder}/test/dog/1.png") as image:
        expected = [[list(image.getpixel((x, y))) for x in range(8)] for y in range(8)]  # type: ignore[arg-type]
    assert data.test_images.pixels[5].permute(1, 2, 0).tolist() == expected


def test_size_scales_the_shorter_side_and_crops_the_centre(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        wide = Image.new("RGB", (24, 8), (255, 0, 0))
        wide.paste((0, 255, 0), (8, 0, 16, 8))  # the centre is green
        wide.save(tmp_path / part / "a" / "wide.png")
        Image.new("RGB", (6, 30), (0, 255, 0)).save(tmp_path / part / "a" / "tall.png")
    data = ready(ImageFolder(str(tmp_path), size=8))
    assert data.shape == (3, 8, 8)
    assert data.train_images.pixels.float().mean((0, 2, 3)).tolist() == [0, 255, 0]


def test_images_of_several_sizes_need_a_size(folder: str) -> None:
    Image.new("RGB", (10, 9)).save(f"{folder}/train/dog/odd.png")
    with pytest.raises(ValueError, match=r"dog/odd\.png is 10 x 9 .* need the argument size"):
        ready(ImageFolder(folder))


def test_test_images_have_the_size_of_training_images(tmp_path: Path) -> None:
    write_images(tmp_path, {"train/cat": 2, "train/dog": 2})
    write_images(tmp_path, {"test/cat": 2, "test/dog": 2}, height=9)
    with pytest.raises(DataError, match=r"\(3, 8, 8\), test images \(3, 9, 8\)"):
        ready(ImageFolder(str(tmp_path)))


def test_classes_must_agree(folder: str) -> None:
    (Path(folder) / "train" / "emu").mkdir()
    (Path(folder) / "test" / "fox").mkdir()
    with pytest.raises(ValueError, match=r"only in train/: \['emu'\], only in test/: \['fox'\]"):
        ImageFolder(folder).prepare_data()


@pytest.mark.parametrize("missing", ["", "test"])
def test_a_missing_folder_is_named_with_the_expected_layout(tmp_path: Path, missing: str) -> None:
    root = tmp_path / "images"
    if missing == "test":
        write_images(root, {"train/a": 1})
    with pytest.raises(FileNotFoundError, match="<root>/train/<class>/") as caught:
        ImageFolder(str(root)).prepare_data()
    assert str(root / (missing or "train")) in str(caught.value)


@pytest.mark.parametrize("limit", [2**31, 0])
@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:90]), lambda path: path.write_text("no")])
def test_a_damaged_image_is_named(folder: str, damage: Callable[[Path], object], limit: int) -> None:
    damage(Path(folder) / "train" / "dog" / "3.png")
    with pytest.raises(ValueError, match=r"dog/3\.png is not a readable image"):
        epoch(ready(ImageFolder(folder, memory_limit=limit, workers=0, validation=0)), 0)


@pytest.mark.parametrize("limit", [2**31, 0])
def test_all_damaged_images_are_named_at_once(folder: str, limit: int) -> None:
    """Of both parts where they are read into memory, and in one line also out of a worker process."""
    damaged = ["train/cat/2.png", "train/dog/0.png"] + (["test/dog/0.png"] if limit else [])
    for name in damaged:
        (Path(folder) / name).write_text("no")
    with pytest.raises(DataError) as caught:
        epoch(ready(ImageFolder(folder, memory_limit=limit, workers=1, validation=0)), 0)
    assert all(f"{name} is not a readable image" in str(caught.value) for name in damaged)
    assert len(str(caught.value).splitlines()) == 1


def test_files_that_are_no_images_by_name_are_left_out_and_counted(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = len(ready(ImageFolder(folder)).train_images)
    for name in ("train/cat/notes.txt", "train/dog/Thumbs.db", "train/dog/.DS_Store"):
        (Path(folder) / name).write_text("no image")
    (Path(folder) / "train" / "dog" / "more").mkdir()
    (Path(folder) / "train" / ".cache").mkdir()
    with caplog.at_level("INFO", "pytorch_lightning"):
        data = ready(ImageFolder(folder))
    assert len(data.train_images) == expected
    assert data.classes == ["cat", "dog"]
    (line,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert "3 left out" in line
    assert "cat/notes.txt" in line


@pytest.mark.parametrize("kind", ["png", "tif", "big-endian tif", "pgm", "jp2"])
def test_images_of_16_bits_keep_their_levels(tmp_path: Path, kind: str) -> None:
    """Pillow's own conversion makes white of all but the darkest 255 levels."""
    numbers = {"big-endian tif": ">u2", "pgm": "i4"}.get(kind, "<u2")
    path = tmp_path / f"ramp.{kind[-3:]}"
    Image.fromarray(RAMP.astype(numbers)).save(path)
    expected = (torch.from_numpy(RAMP) / 257).round().to(torch.uint8).expand(3, 8, 8)
    assert torch.equal(decoded(path, None), expected)


@pytest.mark.parametrize("numbers", ["i4", "f4"])
def test_numbers_without_a_range_are_refused(tmp_path: Path, numbers: str) -> None:
    Image.fromarray(RAMP.astype(numbers)).save(tmp_path / "ramp.tif")
    with pytest.raises(DataError, match=r"ramp\.tif .* save them in 8 bits"):
        decoded(tmp_path / "ramp.tif", None)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_the_colours_that_it_shows(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray((RAMP >> 8).astype("u1"))
    image = Image.merge("RGB", [grey, grey.transpose(Image.Transpose.ROTATE_90), grey]).convert(mode)
    image.save(tmp_path / "image.tif")
    expected = torch.tensor([image.convert("RGB").getpixel((x, y)) for y in range(8) for x in range(8)])
    assert torch.equal(decoded(tmp_path / "image.tif", None).flatten(1).T, expected.to(torch.uint8))


def test_transparent_pixels_show_black_whatever_colour_they_hide(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (200, 100, 50, 255))
    image.putpixel((1, 0), (255, 255, 255, 0))
    image.save(tmp_path / "image.png")
    Image.new("L", (1, 1), 7).save(tmp_path / "hole.png", transparency=7)
    assert decoded(tmp_path / "image.png", None)[:, 0].T.tolist() == [[200, 100, 50], [0, 0, 0]]
    assert decoded(tmp_path / "hole.png", None).flatten().tolist() == [0, 0, 0]


# Downloads and arguments
@pytest.mark.parametrize("kind", [MNIST, CIFAR10])
def test_a_failed_download_says_where_the_data_belong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", no_network)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no network.*network access") as caught:
        kind("mine").prepare_data()
    assert str(tmp_path / "mine") in str(caught.value)
    with pytest.raises(FileNotFoundError):
        kind("mine").setup()


@pytest.mark.parametrize(("kind", "pixel_shape"), [(MNIST, (28, 28)), (CIFAR10, (32, 32, 3))])
def test_torchvision_sets_are_channels_first(monkeypatch: pytest.MonkeyPatch, kind: Any, pixel_shape: tuple[int, ...]) -> None:
    class Stored:
        classes = ("first", "second")

        def __init__(self, root: str, train: bool, download: bool) -> None:
            generator = keyed_generator(train)
            self.data = torch.randint(256, (10, *pixel_shape), generator=generator, dtype=torch.uint8).numpy()
            self.targets = [0, 1] * 5

    monkeypatch.setattr(datasets, kind.__name__, Stored)
    data = ready(kind())
    stored = torch.from_numpy(Stored("", True, False).data)
    channels = pixel_shape[2] if len(pixel_shape) == 3 else 1
    assert data.shape == (channels, *pixel_shape[:2])
    assert torch.equal(data.train_images.pixels[:, -1], stored if channels == 1 else stored[..., -1])
    assert data.train_images.labels.tolist() == [0, 1] * 5
    assert data.classes == ["first", "second"]


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Digits(batch_size=0), "batch_size .* not 0"),
        (lambda: Digits(validation=1.0), "validation .* not 1"),
        (lambda: Digits(validation=-0.1), "validation .* not -0.1"),
        (lambda: Digits(crop=-1), "crop .* not -1"),
        (lambda: Digits(train_size=0), "train_size .* not 0"),
        (lambda: Digits(normalisation="cifar"), "normalisation .* training, imagenet, not 'cifar'"),  # type: ignore[arg-type]
        (lambda: ready(Digits(normalisation="imagenet")), "three channels, these images have 1"),
        (lambda: ImageFolder("images", size=0), "size .* not 0"),
        (lambda: ImageFolder("images", workers=-1), "workers .* not -1"),
        (lambda: ready(Digits(validation=0.9999)), "leaves none of 1438 images"),
        (lambda: list(ready(Digits()).test_batches(0)), "limit .* not 0"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()


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
    """Lightning leaves the sampler in place and counts its epochs."""
    seen: list[tuple[int, list[int]]] = []

    class Watch(Linear):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            seen.append((self.current_epoch, batch[1].tolist()))
            return super().training_step(batch)

    quiet_trainer(max_epochs=3).fit(Watch(64), Digits(train_size=300))
    alone = ready(Digits(train_size=300))
    assert seen == [(number, labels.tolist()) for number in range(3) for _, labels, _ in epoch(alone, number)]


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
def test_images_have_the_type_of_the_weights(precision: Any) -> None:
    trainer = quiet_trainer(max_steps=2, precision=precision)
    module, data = Linear(64), Digits(train_size=64)
    trainer.fit(module, data)
    (images, _), weight = next(data.test_batches(8)), module.layer.weight
    assert images.dtype == weight.dtype
    assert weight.dtype == {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    if precision == "64-true":
        mean, std = (s.double().view(1, 1, 1, 1) for s in (data.mean, data.std))
        pixels = next(iter(data.test_dataloader()))[0]
        expected = (pixels.double() / 255 - mean) / std
        torch.testing.assert_close(data.on_after_batch_transfer((pixels, torch.zeros(1), -1), 0)[0], expected)


def test_overfit_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="train_size"):
        fit(Digits(), 64, [], max_epochs=1, overfit_batches=2)


class Labelled(ImageData):
    """Four grey images with the labels that it is given, of two classes."""

    def __init__(self, labels: torch.Tensor) -> None:
        super().__init__(validation=0.0)
        self.given = labels

    def load(self, train: bool) -> InMemory:
        self.classes = ["no", "yes"]
        return InMemory(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), self.given)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2, 0]), "from 0 to 1; these go from 0 to 2"),
        (torch.tensor([0, 1, -1, 0]), "these go from -1 to 1"),
        (torch.tensor([0.0, 1.0, 0.0, 1.0]), "integers from 0 on; these are torch.float32"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Labelled(labels).setup()
    Labelled(torch.tensor([0, 1, 1, 0])).setup()
