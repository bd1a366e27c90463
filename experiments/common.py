"""What the experiments share: a config, a file of runs that an interrupted call goes on from, training, tables in READMEs.

An experiment is a folder with `__main__.py`, `cpu.yaml`, `full.yaml` (the published recipe, for a GPU) and `README.md`:

    python -m experiments.momentum --config cpu --data data/cifar10

runs what its results do not hold yet, draws the figure, and writes the table into the README between two marks.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from torch import Tensor

import continuum
from continuum import Flow
from continuum.analysis.figures import Panel
from continuum.analysis.plots import plot
from continuum.files import write_json, write_text
from continuum.models.parts import MNISTStem, PooledHead
from continuum.training import CIFAR10, Classifier, ImageData, ImageFolder, Nesterov, OneCycle
from continuum.training.classifier import Schedule

Row = dict[str, Any]


class Experiment:
    """The config of one call, and the runs that its results hold: results/<config>.json beside the script."""

    def __init__(self, script: str, description: str | None) -> None:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--config", default="cpu", help="cpu, full, or the path of a YAML file")
        parser.add_argument("--data", default="data/cifar10", help="folder of CIFAR-10: train/ and test/, or torchvision's")
        parser.add_argument("--out", type=Path, help="folder for the results instead of results/ beside the script")
        options = parser.parse_args()
        self.folder = Path(script).parent
        config = Path(options.config)
        if config.suffix != ".yaml":
            config = self.folder / f"{options.config}.yaml"
        self.settings: dict[str, Any] = yaml.safe_load(config.read_text())
        self.name, self.data = config.stem, options.data
        self.results = options.out or self.folder / "results"
        self.path = self.results / f"{self.name}.json"
        self.published = options.out is None
        self.content: dict[str, Any] = {"settings": self.settings, "machine": machine(), "runs": []}
        if self.path.exists():
            self.content = json.loads(self.path.read_text())
            if self.content["settings"] != self.settings:
                raise SystemExit(f"{self.path} holds runs with other settings than {config}: delete it, or give another --out")

    @property
    def runs(self) -> list[Row]:
        return self.content["runs"]

    def run(self, key: Row, measure: Callable[[], Row]) -> None:
        """Measure and keep what is not there yet; `seconds` is processor time, of all threads."""
        if any(all(row[name] == value for name, value in key.items()) for row in self.runs):
            return
        start, clock = time.process_time(), time.perf_counter()
        found = measure()
        spent = {"seconds": round(time.process_time() - start, 1), "elapsed": round(time.perf_counter() - clock, 1)}
        self.runs.append({**key, **found, **spent})
        write_json(self.content, self.path)
        print(json.dumps({**key, **{k: v for k, v in found.items() if isinstance(v, int | float | str)}, **spent}), flush=True)

    def chosen(self, **key: object) -> list[Row]:
        """The runs with these values."""
        return [row for row in self.runs if all(row[name] == value for name, value in key.items())]

    def plot(self, panels: Sequence[Panel]) -> None:
        """The figure, for the README and docs/claims.md if the results are the repository's; else beside them."""
        plot(panels, self.figure if self.published else self.results / f"{self.name}.png")

    @property
    def figure(self) -> Path:
        config = "" if self.name == "cpu" else f"_{self.name}"
        return self.folder.parent.parent / "docs" / "claims" / f"{self.folder.name}{config}.png"

    def publish(self, table: str) -> None:
        """Print the table; into the README too, between the marks of this config, if the results are the repository's."""
        text = self.signed(table)
        print(text)
        if self.published:
            publish(self.folder / "README.md", self.name, text)

    def signed(self, table: str) -> str:
        """The table, and below it what it took on which machine."""
        minutes = sum(row["seconds"] for row in self.runs) / 60
        return f"{table}\n\n{len(self.runs)} runs, {minutes:.0f} minutes of processor time; {facts(self.content['machine'])}.\n"


def publish(readme: Path, mark: str, text: str) -> None:
    """Put the text into a README, between two marks."""
    before, _, after = parts(readme, mark)
    write_text(f"{before}{text.rstrip()}\n{after}", readme)


def parts(readme: Path, mark: str) -> tuple[str, str, str]:
    """The text up to and with <!-- mark -->, what is between it and <!-- end of mark -->, and the rest."""
    before, start, rest = readme.read_text().partition(f"<!-- {mark} -->\n")
    between, end, after = rest.partition(f"<!-- end of {mark} -->")
    if not start or not end:
        raise SystemExit(f"{readme} has no marks <!-- {mark} --> and <!-- end of {mark} --> to put the table between")
    return before + start, between, end + after


def machine() -> dict[str, Any]:
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def facts(machine: Mapping[str, Any]) -> str:
    return f"{machine['device']} with {machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}"


def cifar10(root: str, images: int | None, seed: int, batch_size: int = 128, validation: float = 0.0) -> ImageData:
    """CIFAR-10 with crops and mirrored images: as JPEG files in class folders, or torchvision's. Files are read once."""
    whole = _read(root)
    data = type(whole)(root, batch_size=batch_size, validation=validation, train_size=images, seed=seed)
    data.classes = whole.classes
    data.load = lambda train: whole.train_images if train else whole.test_images
    data.setup()
    return data


@lru_cache
def _read(root: str) -> ImageData:
    data = ImageFolder(root) if (Path(root) / "train").is_dir() else CIFAR10(root)
    data.prepare_data()
    data.setup()
    return data


class History(pl.Callback):
    """What a callback gathers by epoch. Checkpoints hold it, so that a training that goes on from one has all of it."""

    def __init__(self) -> None:
        self.epochs: list[Any] = []

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": list(self.epochs)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = list(state_dict["epochs"])


def train(
    network: continuum.Network,
    data: ImageData,
    epochs: int,
    seed: int,
    learning_rate: float = 0.2,
    weight_decay: float = 5e-4,
    schedule: Schedule | None = None,
    callbacks: Sequence[pl.Callback] = (),
) -> continuum.Network:
    """Train `network` as `Classifier` does, with one cycle of the learning rate unless another schedule is given.

    Returns:
        The trained network, in evaluation mode: `network` itself, unless a callback put another in its place.
    """
    classifier = Classifier(
        network, partial(Nesterov, lr=learning_rate, weight_decay=weight_decay), schedule=schedule or OneCycle()
    )
    torch.manual_seed(seed)  # of the noise; networks are built under seeds of their own
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=list(callbacks),
    )
    trainer.fit(classifier, data)
    return classifier.network.eval()


def evaluated(network: continuum.Network, data: ImageData, limit: int | None = None) -> tuple[float, float]:
    """Accuracy in % and loss on the test images."""
    return scored(network, data.test_batches(limit))


@torch.no_grad()
def scored(network: continuum.Network, batches: Iterable[Sequence[Tensor]]) -> tuple[float, float]:
    """Accuracy in % and loss over batches of (images, labels)."""
    right, loss, count = 0, 0.0, 0
    device = next(network.parameters()).device
    for images, labels in batches:
        logits, labels = network(images.to(device)), labels.to(device)
        right += int((logits.argmax(1) == labels).sum())
        loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += len(labels)
    return 100 * right / count, loss / count


def seeded(build: Callable[[], continuum.Network], seed: int) -> continuum.Network:
    torch.manual_seed(seed)
    return build()


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "| --- |" + " ---: |" * (len(headings) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The mean and the standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def single_flow(flow: Flow, width: int, num_classes: int = 10) -> continuum.Network:
    """A network of one flow between a stem, which takes images of three colours to a quarter of their size, and a head."""
    return continuum.Network(MNISTStem(3, width), [flow], PooledHead(width, num_classes))
