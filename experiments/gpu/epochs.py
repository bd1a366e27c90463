"""Images a second in training: `fit`, eager and as one launch, beside the plain loop; and three seeds at once on one card.

All take the same random images, normalised, and neither shifted nor mirrored. In the loop they lie on the device. Captured, it
is a CUDA graph of one step over a batch that stays in its place: the least that a step can cost.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch.nn.functional import cross_entropy

import continuum
from continuum import Network, zoo
from continuum.analysis.memory import wait
from continuum.bench.fit import RandomImages, plain_steps
from continuum.training import Classifier, Nesterov
from experiments.common import Row, seeded, table
from experiments.gpu.jobs import Job, Part, Rows, Settings
from experiments.gpu.trainings import one_launch, quiet

DOPRI5 = "dopri5:rtol=1e-2,atol=1e-2"
NETWORKS: dict[str, Callable[[], Network]] = {
    "resnet(20)": partial(zoo.resnet, 20),
    "preresnet(20)": partial(zoo.preresnet, 20),
    "lm_resnet(20)": partial(zoo.lm_resnet, 20),
    "lm_resnet(56)": partial(zoo.lm_resnet, 56),
    "odenet": partial(zoo.odenet, stages=3, width=16, in_channels=3, solver=DOPRI5),
    "continuous_resnet": partial(zoo.continuous_resnet, solver=DOPRI5),
    "shake_shake(26, 32)": partial(zoo.shake_shake, 26, 32),
}
SMALL: dict[str, Callable[[], Network]] = {
    "preresnet(14)": partial(zoo.preresnet, 14, width=8),
    "odenet": partial(zoo.odenet, width=8, in_channels=3, solver=DOPRI5),
}
PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed"}
EPOCH = 50_000
WARM_UP = 10
SEEDS_SECONDS = 90.0


def epochs(settings: Settings) -> Part:
    device, seconds = settings.chosen_device(), 0.5 if settings.quick else 1.5
    batch, networks = (8, SMALL) if settings.quick else (128, NETWORKS)
    jobs = []
    for name, build in networks.items():
        measure = partial(_rates, build, batch, seconds, device)
        jobs.append(Job(f"epoch of {name}", 40.0, measure, f"epoch of {name}"))
    several = partial(three_seeds, batch, 2.0 if settings.quick else 8.0, device)
    return Part("epochs", [*jobs, Job("three seeds", SEEDS_SECONDS, several, "three seeds")], show)


# Ways to train
Steps = Iterator[None]
Way = Callable[[Network, RandomImages, str, torch.device], Steps | None]


def plain(network: Network, data: RandomImages, precision: str, device: torch.device) -> Steps:
    def run(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            return network(images)

    network.to(device)
    return plain_steps(network, run, data, device)


def plain_captured(network: Network, data: RandomImages, precision: str, device: torch.device) -> Steps:
    """A step of the loop, captured once and replayed."""
    network.to(device).train()
    images = torch.randn(data.batch_size, *data.shape, device=device)
    labels = torch.randint(10, (data.batch_size,), device=device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False):
            loss = cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()

    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # what is allocated and chosen once
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        step()
    while True:
        graph.replay()
        yield


class Watch(pl.Callback):
    """Counts images between the end of the warm-up and that of the time, at which it ends the training."""

    def __init__(self, seconds: float, device: torch.device, begin: Callable[[], object] = lambda: None) -> None:
        self.seconds, self.device, self.begin = seconds, device, begin
        self.steps = self.images = 0
        self.start = self.end = 0.0

    def step(self, images: int) -> bool:
        """A step has ended; whether it was the last."""
        self.steps += 1
        if self.steps == WARM_UP:
            wait(self.device)
            self.begin()
            self.start = time.perf_counter()
        elif self.steps > WARM_UP:
            self.images += images
            if self.steps % 10 == 0 or self.device.type == "cpu":
                wait(self.device)
                self.end = time.perf_counter()
        return self.end - self.start > self.seconds

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.step(len(batch[0])):
            trainer.should_stop = True

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / (self.end - self.start)


def fitted(
    network: Network, data: RandomImages, precision: str, device: torch.device, callbacks: list[pl.Callback], watch: Watch
) -> None:
    trainer = quiet(device, [*callbacks, watch], PRECISIONS[precision], max_epochs=-1)
    trainer.fit(Classifier(network, partial(Nesterov, lr=0.01)), data)


def looped(steps: Steps, batch: int, watch: Watch) -> None:
    for _ in steps:
        if watch.step(batch):
            return


def _rates(build: Callable[[], Network], batch: int, seconds: float, device: torch.device, limit: float) -> Row:
    """Images a second in every way and precision; a way that fails has its error."""
    data = RandomImages(200 * batch, 32, batch)
    data.setup()
    found: Row = {"batch": batch, "ways": []}
    for precision in PRECISIONS:
        for way in ("plain loop", "plain loop, captured", "fit", "fit, one launch"):
            if ("captured" in way and device.type != "cuda") or ("launch" in way and not one_launch(device)):
                continue
            torch.compiler.reset()
            watch, network, start = Watch(seconds, device), seeded(build, 0), time.perf_counter()
            row: Row = {"precision": precision, "way": way}
            try:
                if way.startswith("fit"):
                    fitted(network, data, precision, device, one_launch(device) if "launch" in way else [], watch)
                else:
                    loop = plain_captured if "captured" in way else plain
                    looped(loop(network, data, precision, device), batch, watch)
                row |= {"images_per_second": watch.rate, "first_steps": watch.start - start}
            except Exception as error:  # a network that cannot be captured, say; the other ways can still be measured
                row["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            found["ways"].append(row)
    return found


# Several seeds
def three_seeds(batch: int, seconds: float, device: torch.device, limit: float) -> Row:
    """Images a second of one training, and of three at once in a process each, which share the card."""
    alone, together = (sum(at_once(count, batch, seconds, device)) for count in (1, 3))
    return {"one_alone": alone, "three_at_once": together}


def at_once(count: int, batch: int, seconds: float, device: torch.device) -> list[float]:
    """Images a second of each of so many processes, all of which begin to count when all are warm."""
    code = f"from experiments.gpu.epochs import one_of_them; one_of_them({batch}, {seconds}, {device.type!r})"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            while (line := process.stdout.readline()) != "warm\n":
                if not line:
                    raise RuntimeError(f"a training ended with status {process.wait()} before it was warm")
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def one_of_them(batch: int, seconds: float, device: str) -> None:
    """Trains preresnet(20), says when it is warm, and after the answer prints images a second."""

    def begin() -> None:
        print("warm", flush=True)
        sys.stdin.readline()

    chosen = torch.device(device)
    watch = Watch(seconds, chosen, begin)
    data = RandomImages(200 * batch, 32, batch)
    fitted(seeded(partial(continuum.zoo.preresnet, 20), 0), data, "float32", chosen, one_launch(chosen), watch)
    print(json.dumps(watch.rate), flush=True)


def show(rows: Rows) -> str:
    lines, more = [], ""
    for name, row in rows.items():
        if name == "three seeds":
            more = (
                f"\n\nThree trainings at once: {row['three_at_once']:.0f} images a second; one alone: {row['one_alone']:.0f}."
            )
            continue
        for way in row["ways"]:
            rate = way.get("images_per_second")
            numbers = [f"{rate:.0f}", f"{EPOCH / rate:.2f}"] if rate else [way["error"], "-"]
            lines.append([name.removeprefix("epoch of "), way["precision"], way["way"], *numbers])
    return table(["network", "precision", "way", "images a second", "seconds an epoch of 50,000"], lines) + more
