"""Data: every image in its part, and files that are read as they are or refused by name."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import ready, write_images
from PIL import Image
from torch import Tensor
from torchvision import datasets

from continuum.training import CIFAR10, MNIST, Digits, FashionMNIST, ImageData, ImageFolder
from continuum.training.images import DataError, InMemory, decoded, keyed_generator

FASHION = Path(__file__).parents[2].parent / "shared/data/fashion-mnist"
RAMP = torch.linspace(0, 65535, 64).reshape(8, 8).round().to(torch.int32).numpy()


def rows(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def same(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


# What a set holds
def test_digits_have_their_classes_shape_and_types() -> None:
    data = ready(Digits(batch_size=100))
    assert (data.classes, data.num_classes) == (list("0123456789"), 10)
    assert (data.shape, len(data.train_images), len(data.test_images)) == ((1, 8, 8), 1438, 359)
    assert (data.train_images.pixels.dtype, data.train_images.pixels.max()) == (torch.uint8, 255)
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, images.dtype) == ((100, 1, 8, 8), torch.float32)
    assert (labels.shape, labels.dtype) == ((100,), torch.int64)


def test_statistics_are_those_of_all_training_images() -> None:
    """Also of those held out, so that they do not depend on the seed."""
    data = ready(Digits(seed=1))
    pixels = data.train_images.pixels.double() / 255
    torch.testing.assert_close(data.mean.double(), pixels.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(data.std.double(), pixels.std((0, 2, 3), correction=0), rtol=1e-6, atol=0)
    everything = torch.cat([images for images, _ in data.plain_batches(data.train_images, torch.arange(1438))])
    assert abs(float(everything.mean())) < 1e-5
    assert abs(float(everything.std()) - 1) < 1e-4


def test_every_image_is_in_one_part() -> None:
    data = ready(Digits(validation=0.2))
    train, held_out = set(data.train_indices.tolist()), set(data.val_indices.tolist())
    assert not train & held_out
    assert train | held_out == set(range(1438))
    assert len(held_out) == round(0.2 * 1438)
    test = rows(data.test_images.pixels)
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


# Folders of images
@pytest.mark.parametrize("workers", [0, 2])
def test_images_in_memory_and_from_disk_are_the_same(folder: str, workers: int) -> None:
    options = {"batch_size": 4, "workers": workers, "validation": 0.2}
    held, streamed = (ready(ImageFolder(folder, memory_limit=limit, **options)) for limit in (2**31, 0))
    assert [hasattr(data.train_images, "pixels") for data in (held, streamed)] == [True, False]
    assert held.classes == streamed.classes == ["cat", "dog"]
    assert held.shape == streamed.shape == (3, 8, 8)
    assert torch.equal(held.mean, held.train_images.statistics()[0])
    assert streamed.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    held.mean, held.std = streamed.mean, streamed.std
    assert same(held.train_dataloader().batches(2), streamed.train_dataloader().batches(2))
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
        list(ready(ImageFolder(folder, memory_limit=limit, workers=0, validation=0)).train_dataloader())


@pytest.mark.parametrize("limit", [2**31, 0])
def test_all_damaged_images_are_named_at_once(folder: str, limit: int) -> None:
    """Of both parts where they are read into memory, and in one line also out of a worker process."""
    damaged = ["train/cat/2.png", "train/dog/0.png"] + (["test/dog/0.png"] if limit else [])
    for name in damaged:
        (Path(folder) / name).write_text("no")
    with pytest.raises(DataError) as caught:
        list(ready(ImageFolder(folder, memory_limit=limit, workers=1, validation=0)).train_dataloader())
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


# Downloads
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


def test_torchvision_sets_are_channels_first(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stored:
        classes = ("first", "second")

        def __init__(self, root: str, train: bool, download: bool) -> None:
            self.data = torch.randint(256, (10, 32, 32, 3), generator=keyed_generator(train), dtype=torch.uint8).numpy()
            self.targets = [0, 1] * 5

    monkeypatch.setattr(datasets, "CIFAR10", Stored)
    data = ready(CIFAR10())
    assert data.shape == (3, 32, 32)
    assert torch.equal(data.train_images.pixels[:, -1], torch.from_numpy(Stored("", True, False).data)[..., -1])
    assert data.train_images.labels.tolist() == [0, 1] * 5
    assert data.classes == ["first", "second"]


# Files in the idx format
def idx(numbers: Tensor) -> bytes:
    return struct.pack(f">{1 + numbers.ndim}I", 0x800 + numbers.ndim, *numbers.shape) + bytes(numbers.flatten().tolist())


def write_idx(folder: Path, suffix: str = "", count: int = 6) -> dict[str, Tensor]:
    """Random images of 5 x 4 pixels and their labels, in the four files of MNIST."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for part in ("train", "t10k"):
        draws = keyed_generator(part)
        written[part] = torch.randint(256, (count, 5, 4), generator=draws, dtype=torch.uint8)
        for name, numbers in (("images-idx3", written[part]), ("labels-idx1", torch.arange(count))):
            content = idx(numbers)
            (folder / f"{part}-{name}-ubyte{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    return written


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", refused)


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("place", ["", "{name}/raw"])
@pytest.mark.parametrize("kind", [MNIST, FashionMNIST])
def test_idx_files_are_read_and_never_downloaded(tmp_path: Path, kind: type[MNIST], place: str, suffix: str) -> None:
    written = write_idx(tmp_path / place.format(name=kind.__name__), suffix)
    data = ready(kind(str(tmp_path), validation=0))
    assert data.shape == (1, 5, 4)
    assert data.num_classes == 10
    assert torch.equal(data.train_images.pixels[:, 0], written["train"])
    assert torch.equal(data.test_images.pixels[:, 0], written["t10k"])
    assert torch.equal(data.test_images.labels, torch.arange(6))


@pytest.mark.usefixtures("no_download")
@pytest.mark.skipif(not FASHION.is_dir(), reason=f"the files of Fashion-MNIST are not in {FASHION}")
def test_fashion_mnist_is_that_of_its_authors() -> None:
    data = ready(FashionMNIST(str(FASHION)))
    assert (len(data.train_images), len(data.test_images), data.shape) == (60_000, 10_000, (1, 28, 28))
    assert data.classes[9] == "Ankle boot"
    assert data.train_images.labels.bincount().tolist() == [6000] * 10
    assert data.test_images.labels.bincount().tolist() == [1000] * 10
    assert data.train_images.labels[:5].tolist() == [9, 0, 0, 3, 0]
    assert float(data.mean) == pytest.approx(0.2860, abs=5e-5)
    assert float(data.std) == pytest.approx(0.3530, abs=5e-5)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:10],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"\0\0\x0d" + content[3:],
        lambda content: b"<html>no such file</html>",
        lambda content: content[:4] + b"\xff" * 12,
    ],
    ids=["empty", "no sizes", "short", "long", "floats", "a page", "sizes"],
)
def test_a_damaged_idx_file_is_named_in_one_line(tmp_path: Path, damage: Callable[[bytes], bytes], suffix: str) -> None:
    """Damaged in itself, and where it was compressed."""
    for inside in (True, False) if suffix else (True,):
        write_idx(tmp_path, suffix)
        path = tmp_path / f"t10k-images-idx3-ubyte{suffix}"
        content = gzip.decompress(path.read_bytes()) if inside and suffix else path.read_bytes()
        damaged = damage(content)
        path.write_bytes(gzip.compress(damaged) if inside and suffix else damaged)
        if not inside and damaged.startswith(content):
            continue  # zeros behind a compressed file are allowed
        with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte.*replace it") as caught:
            ready(MNIST(str(tmp_path)))
        assert len(str(caught.value).splitlines()) == 1


def test_as_many_labels_as_images_are_needed(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(torch.arange(5)))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte holds 6 images and .*train-labels-idx1-ubyte 5 labels"):
        ready(MNIST(str(tmp_path)))


# Arguments
@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Digits(batch_size=0), "batch_size .* not 0"),
        (lambda: Digits(validation=1.0), "validation .* not 1"),
        (lambda: Digits(validation=-0.1), "validation .* not -0.1"),
        (lambda: Digits(crop=-1), "crop .* not -1"),
        (lambda: Digits(train_size=0), "train_size .* not 0"),
        (lambda: Digits(normalisation="cifar"), "normalisation .* training, imagenet, not 'cifar'"),  # type: ignore[arg-type]
        (lambda: Digits(device_share=1.5), "device_share .* not 1.5"),
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
