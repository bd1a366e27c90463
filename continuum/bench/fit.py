"""What a training step of `fit` costs beyond the plain loop over the same modules: t(step of fit) - t(step of the loop).

Both take uint8 images in the order of one permutation, normalise them, and update by fused SGD with Nesterov momentum and
weight decay; neither shifts or mirrors. The loop has its images on the device and does nothing else. `fit` has `Classifier`,
its data module, the callbacks that `continuum fit` sets (but for checkpoints), and no logger.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytorch_lightning as pl
import rich
import torch
from pytorch_lightning.callbacks import RichProgressBar
from torch.nn.functional import cross_entropy

from continuum.analysis.memory import wait
from continuum.bench.counts import Synchronisations
from continuum.bench.rivals import FlowMap
from continuum.bench.timing import SEED, Case, Row, ratio, textbook
from continuum.models import Network
from continuum.training import Classifier, Compile, EndOnSignal, ImageData, LogCost, Nesterov
from continuum.training.images import InMemory, LabelledImages
from continuum.zoo import preresnet

WARM_UP = 3
"""Steps that are not timed; what is compiled is compiled in them."""

WINDOW = 3
"""Steps between two looks at the clock, for which a GPU is waited for."""


class RandomImages(ImageData):
    """Noise of three channels in ten classes: one epoch of it is what is timed. Neither shifted nor mirrored."""

    def __init__(self, count: int, size: int, batch_size: int) -> None:
        super().__init__(batch_size, validation=0.0, crop=0, flip=False, seed=SEED)
        self.count, self.size = count, size

    def load(self, train: bool) -> LabelledImages:
        self.classes = [str(label) for label in range(10)]
        generator = torch.Generator().manual_seed(SEED)
        count = self.count if train else min(self.count, 64)
        pixels = torch.randint(256, (count, 3, self.size, self.size), dtype=torch.uint8, generator=generator)
        return InMemory(pixels, torch.randint(10, (count,), generator=generator))


def network_of(case: Case, device: torch.device) -> Network:
    torch.manual_seed(SEED)
    return preresnet(case.depth, width=case.width).to(device)


def data_of(case: Case) -> RandomImages:
    return RandomImages((WARM_UP + WINDOW * case.windows) * case.batch, case.size, case.batch)


class Clock:
    """Looks at the clock after the steps of the warm-up, and after every window from there on."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.steps = device, 0
        self.looks: list[float] = []

    def step(self) -> None:
        """A step has ended."""
        self.steps += 1
        if self.steps >= WARM_UP and (self.steps - WARM_UP) % WINDOW == 0:
            wait(self.device)
            self.looks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds a step, by window."""
        return [(end - start) / WINDOW for start, end in zip(self.looks, self.looks[1:], strict=False)]


class Counts:
    """Counts operators and waits from the end of one step to the end of the next, behind the warm-up."""

    def __init__(self, device: torch.device) -> None:
        self.mode, self.steps = Synchronisations(device), 0

    def step(self) -> None:
        """A step has ended."""
        self.steps += 1
        if self.steps == WARM_UP:
            self.mode.__enter__()
        elif self.steps == WARM_UP + 1:
            self.mode.__exit__(None, None, None)


class Watch(pl.Callback):
    """Tells of the end of every step."""

    def __init__(self, ended: Callable[[], None]) -> None:
        self.ended = ended

    def on_train_batch_end(self, *_: object) -> None:
        self.ended()


def plain_steps(network: Network, run: FlowMap, data: ImageData, device: torch.device) -> Iterator[None]:
    """The loop that a person would write, with `run` from images to logits: one step at each `next`."""
    data.setup()
    assert isinstance(data.train_images, InMemory)
    pixels, labels = data.train_images.pixels.to(device), data.train_images.labels.to(device)
    mean, std = (255 * part.to(device).view(1, -1, 1, 1) for part in (data.mean, data.std))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True, fused=True)
    network.train()
    for batch in torch.randperm(len(labels)).to(device).split(data.batch_size):
        optimizer.zero_grad()
        cross_entropy(run((pixels[batch].float() - mean) / std), labels[batch]).backward()
        optimizer.step()
        yield


def fit(network: Network, data: ImageData, callbacks: Sequence[pl.Callback], bar: bool, device: torch.device) -> None:
    """One epoch as `continuum fit` trains, into a terminal that nobody sees if there is a progress `bar`."""
    with _unseen(bar) as bars:
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=bar,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[*bars, LogCost(), EndOnSignal(), *callbacks],
        )
        trainer.fit(Classifier(network, partial(Nesterov, lr=0.01)), data)


@contextmanager
def _unseen(bar: bool) -> Iterator[list[pl.Callback]]:
    """The progress bar of `continuum fit`, drawn as in a terminal."""
    if not bar:
        yield []
        return
    try:
        with open(os.devnull, "w") as nowhere:
            yield [RichProgressBar(10, console_kwargs={"force_terminal": True, "file": nowhere})]
    finally:
        rich.reconfigure()  # Lightning draws on rich's own console


def fit_step(case: Case, compiled: bool, bar: bool, device: torch.device) -> Row:
    """Microseconds a step of both, the loop before `fit` and behind it; where nothing is compiled, operators and waits too."""
    torch.compiler.reset()

    def loop(ended: Callable[[], None], steps: int | None = None) -> None:
        network = network_of(case, device)
        if compiled:
            network.compile()
        run = network if compiled else textbook(network)
        for number, _ in enumerate(plain_steps(network, run, data_of(case), device), start=1):
            ended()
            if number == steps:
                break

    def ours(ended: Callable[[], None]) -> None:
        callbacks = [Compile()] if compiled else []
        fit(network_of(case, device), data_of(case), [*callbacks, Watch(ended)], bar, device)

    before, during, behind = Clock(device), Clock(device), Clock(device)
    loop(before.step)
    ours(during.step)
    loop(behind.step)
    plain = statistics.median([*before.seconds(), *behind.seconds()])
    found = ratio([seconds / plain for seconds in during.seconds()])
    row: Row = {"network": case.name, "batch": case.batch, "compiled": compiled, "bar": bar}
    row |= {"plain_microseconds": 1e6 * plain, "fit_microseconds": 1e6 * plain * found["ratio"], **found}
    if compiled:
        return row
    alone, counted = Counts(device), Counts(device)
    loop(alone.step, steps=WARM_UP + 1)
    ours(counted.step)
    counts: dict[str, Any] = {"plain_operators": alone.mode.operators, "fit_operators": counted.mode.operators}
    return {**row, **counts, "plain_waits": alone.mode.count, "fit_waits": counted.mode.count}


HEADINGS = ("network", "images", "way", "progress bar", "loop, µs", "fit, µs", "beyond, µs", "operators", "fit", "waits, fit")


def fit_table(rows: Sequence[Row]) -> list[list[str]]:
    """A line a measurement, under `HEADINGS`."""
    lines = []
    for row in rows:
        way, bar = "compiled" if row["compiled"] else "eager", "yes" if row["bar"] else "no"
        plain, ours = row["plain_microseconds"], row["fit_microseconds"]
        counts = [str(row.get(key, "")) for key in ("plain_operators", "fit_operators", "fit_waits")]
        lines.append(
            [row["network"], str(row["batch"]), way, bar, f"{plain:.0f}", f"{ours:.0f}", f"{ours - plain:.0f}", *counts]
        )
    return lines
