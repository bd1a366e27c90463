"""What only a GPU can say: the measurements of `continuum bench` there, and an epoch of CIFAR-10 by two networks.

    python -m experiments.gpu --data data --out experiments/gpu/results/h100.json

ResNet-20 and the three-stage ODE-Net train for an epoch in float32 and bfloat16, eager and compiled. The whole ends within
nine minutes: an epoch that would take long is cut and says so, what is compiled has a process of its own that can be stopped,
and the last parts are left out if no time remains. The file is written after every part; one that fails is recorded with its
error, and the others go on. `--data` is the folder that holds torchvision's CIFAR-10, or one with train/ and test/; without it
the digits of scikit-learn are taken. `--quick --device cpu` tries the script out anywhere, in a few minutes.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

import continuum
from continuum.bench.report import SEED, Part, Report, Row, new_report, parts, plan, summary
from continuum.files import write_json
from continuum.training import CIFAR10, Classifier, Digits, ImageData, ImageFolder
from experiments.common import publish, table

Networks = dict[str, Callable[..., continuum.Network]]

NETWORKS: Networks = {
    "preresnet(20)": partial(continuum.zoo.preresnet, 20),
    "odenet, 3 stages": partial(continuum.zoo.odenet, stages=3, width=8, solver="dopri5:rtol=1e-2,atol=1e-2"),
}
SMALL: Networks = {
    "preresnet(14)": partial(continuum.zoo.preresnet, 14),
    "odenet, 1 stage": partial(continuum.zoo.odenet, width=16, downsample=False, solver="dopri5:rtol=1e-2,atol=1e-2"),
}
"""No narrower: with four channels what torch 2.14 compiles for a CPU corrupts memory."""
PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed"}
FOLDER = Path(__file__).resolve().parent
EPOCH = 40.0
"""An epoch is cut after so many seconds, those of its first step, which compiles, not counted."""
PART = 100.0
"""A process that compiles is stopped after so many seconds."""


class Watch(pl.Callback):
    """Notes the images and the time of every step, and ends the epoch when its time is over."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.images: list[int] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.images.append(len(batch[0]))
        self.ends.append(time.perf_counter())
        if self.ends[-1] - self.ends[0] > EPOCH:
            trainer.should_stop = True


@dataclass(frozen=True)
class Data:
    """The images to train on."""

    folder: str | None
    quick: bool

    @lru_cache  # noqa: B019
    def load(self) -> ImageData:
        size = 256 if self.quick else None
        if self.folder is None:
            data: ImageData = Digits(batch_size=32, train_size=size, seed=SEED)
        elif (Path(self.folder) / "train").is_dir():
            data = ImageFolder(self.folder, train_size=size, validation=0, seed=SEED)
        else:
            data = CIFAR10(self.folder, train_size=size, validation=0, seed=SEED)
        data.prepare_data()
        data.setup()
        return data


def epoch(name: str, networks: Networks, precision: str, compiled: bool, source: Data, device: torch.device) -> Row:
    """One epoch of training: images a second behind its first tenth, and how it went."""
    data = source.load()
    torch.manual_seed(SEED)
    torch.compiler.reset()
    network = networks[name](in_channels=data.shape[0], num_classes=data.num_classes)
    if compiled:
        network.compile()
    watch = Watch()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=PRECISIONS[precision],  # pyright: ignore[reportArgumentType]
        limit_val_batches=0,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(network, learning_rate=0.1), datamodule=data)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - watch.start
    warm = max(1, len(watch.ends) // 10)
    rate = sum(watch.images[warm:]) / (watch.ends[-1] - watch.ends[warm - 1])
    return {
        "network": name,
        "data": type(data).__name__,
        "precision": precision,
        "compiled": compiled,
        "images_per_second": rate,
        "epoch_seconds": len(data.train_indices) / rate,
        "first_step_seconds": watch.ends[0] - watch.start,
        "seconds": seconds,
        "images": sum(watch.images),
        "complete": sum(watch.images) == len(data.train_indices),
        "evaluations": sum(flow.cost.evaluations for flow in network.flows if flow.cost),
        "loss": float(trainer.callback_metrics["train/loss"]),
        "accuracy": float(trainer.callback_metrics["train/accuracy"]),
    }


def all_parts(quick: bool, source: Data, device: torch.device) -> tuple[list[Part], list[Part]]:
    """The epochs and the bench; and those of their parts that compile, which takes long before it takes its time."""
    bench = list(parts(replace(plan(quick), seconds=5.0), device))
    networks = SMALL if quick else NETWORKS

    def epochs(compiled: bool) -> Iterator[Part]:
        for name in networks:
            for precision in PRECISIONS:
                title = f"{name}, {precision}, {'compiled' if compiled else 'eager'}"
                yield Part("training", title, partial(epoch, name, networks, precision, compiled, source, device))

    eager = [*epochs(compiled=False), *(part for part in bench if part.section != "compiled")]
    return eager, [*epochs(compiled=True), *(part for part in bench if part.section == "compiled")]


def measured_apart(part: Part, seconds: float) -> Row:
    """The row of a part by a process of its own, which is stopped after so many seconds: a compiler cannot be, safely.

    Raises:
        RuntimeError: it failed, or was stopped.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, "-m", "experiments.gpu", *sys.argv[1:], "--only", part.title, "--out", str(out)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            _, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and the processes that compile for it
            process.communicate()
            raise RuntimeError(f"stopped after {seconds:.0f} s") from None
        if process.returncode or not out.exists():
            raise RuntimeError(f"exit status {process.returncode}: {' '.join(errors.splitlines()[-1:])}")
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="the folder of CIFAR-10 (default: train on the digits of scikit-learn)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=500.0, help="no part begins later (default: 500)")
    parser.add_argument("--quick", action="store_true", help="small fields, networks and data: whether it runs")
    parser.add_argument("--only", metavar="TITLE", help="measure one part, and write its row")
    options = parser.parse_args()
    device = torch.device(options.device)
    eager, compiled = all_parts(options.quick, Data(options.data, options.quick), device)
    if options.only:
        (part,) = (part for part in [*eager, *compiled] if part.title == options.only)
        write_json(part.measure(), options.out)
        return
    report = new_report(plan(options.quick), device) | {"training": [], "errors": []}
    end = time.perf_counter() + options.seconds
    for part in [*eager, *compiled]:
        left = end - time.perf_counter()
        try:
            if left <= 0:
                raise RuntimeError("left out, because no time remained")
            if part in compiled:
                part = replace(part, measure=partial(measured_apart, part, min(PART, left)))
            part.add_to(report)
            print(f"{part.title}: done, {left:.0f} s were left", flush=True)
        except Exception as error:  # whatever it is, the other parts can still be measured
            report["errors"].append({"part": part.title, "error": f"{type(error).__name__}: {error}"})
            print(f"{part.title}: {error}", flush=True)
        write_json(report, options.out)
    print(tables(report))
    if options.out.resolve().parent == FOLDER / "results":
        publish(FOLDER / "README.md", options.out.stem, tables(report))


def tables(report: Report) -> str:
    """The summary of the bench, and the epochs."""
    rows = []
    for row in report["training"]:
        way = "compiled" if row["compiled"] else "eager"
        numbers = [f"{row['images_per_second']:.0f}", f"{row['epoch_seconds']:.1f}"]
        rows.append([row["network"], row["precision"], way, *numbers])
    machine = f"{report['machine']['device']}, torch {report['machine']['torch']}"
    epochs = table(["network", "precision", "way", "images/s", "seconds an epoch"], rows)
    return f"{summary(report)}\n\n{epochs}\n\n{machine}"


if __name__ == "__main__":
    main()
