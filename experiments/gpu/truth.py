"""Whether the device computes what the CPU does: what is equal there to the bit has to be equal here."""

import copy
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from continuum import Adaptive, Flow, Network
from continuum.bench.counts import Synchronisations
from continuum.bench.fit import RandomImages
from continuum.fields import Autonomous, PreActivation
from continuum.fields.branches import group_norm
from continuum.solvers import SolveError, parse
from continuum.training import Classifier, Nesterov
from continuum.verify.certificate import certify, small, some_images
from continuum.zoo import preresnet, revnet
from experiments.common import Row, seeded, table
from experiments.gpu.jobs import Job, Part, Rows, Settings
from experiments.gpu.trainings import Recipe, Training, nothing_more, one_launch, quiet

NETWORKS = ("resnet", "preresnet", "lm_resnet", "polynet", "revnet", "continuous_resnet Euler")
"""Certified on the device: small networks of the zoo, by their names in `continuum.verify.certificate`."""

STEPS = 12
SECONDS = 20.0


def truth(settings: Settings) -> Part:
    device = settings.chosen_device()
    checks: dict[str, Callable[[torch.device], Row]] = {
        "plain loops": plain_loops,
        "gradients": gradients,
        "captured": captured,
        "waits": waits,
        "bf16": bfloat16,
        "a NaN image": nan_image,
        "kill and resume": kill_and_resume,
    }
    jobs = [Job(name, SECONDS, partial(_measured, check, device), name) for name, check in checks.items()]
    return Part("truth", jobs, show)


def _measured(check: Callable[[torch.device], Row], device: torch.device, seconds: float) -> Row:
    return check(device)


def deterministic() -> None:
    """Kernels that give the same bits at every call; what has none raises."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without which matrix products have none
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def network_of(width: int = 8) -> Network:
    return seeded(partial(preresnet, 14, width=width), 0)


def fit(network: Network, callbacks: Sequence[pl.Callback], device: torch.device, precision: str = "32-true") -> Classifier:
    """So many steps of training on random images."""
    classifier = Classifier(network, partial(Nesterov, lr=0.05))
    torch.manual_seed(0)
    quiet(device, callbacks, precision, max_epochs=1).fit(classifier, RandomImages(STEPS * 16, 32, 16))
    return classifier


def plain_loops(device: torch.device) -> Row:
    """Fixed steps against the loops that are written without the library's parts."""
    deterministic()
    found = {}
    for name in NETWORKS:
        certificate = certify(small(name), some_images(small(name)), device=device)
        bits = certificate.training and certificate.evaluation and certificate.buffers
        found[name.split()[0]] = {
            "bits": bits,
            "gradient": certificate.gradient,
            "passed": certificate.passed,
            "place": certificate.place,
        }
    worst = max(row["gradient"] for row in found.values())
    equal = sum(row["bits"] for row in found.values())
    says = f"logits and buffers of {equal} of {len(found)} to the bit, gradients to {worst:.0e}"
    return {"passed": all(row["passed"] for row in found.values()), "says": says, "networks": found}


def gradients(device: torch.device) -> Row:
    """The gradients of all modes against direct ones."""
    deterministic()
    differences = {}
    field = seeded(lambda: Autonomous(PreActivation(8, 8, norm=group_norm)), 0).to(device)  # pyright: ignore[reportArgumentType]
    x = torch.randn(8, 8, 16, 16, generator=torch.Generator().manual_seed(0)).to(device)
    for gradient in ("checkpoint", "adjoint"):
        pair = [Flow(field, Adaptive("dopri5", 1e-5, 1e-5, gradient=mode), depth=1.0) for mode in ("direct", gradient)]
        differences[f"dopri5, {gradient}"] = _distance(*(_gradient(flow, x) for flow in pair))
    network = seeded(partial(revnet, 26, widths=(8, 16, 24)), 0).to(device)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    direct = _gradient(network, images)
    modes = {"checkpoint": "coupling:gradient=checkpoint", "reversible": "coupling:gradient=reversible"}
    for name, text in modes.items():
        differences[f"revnet, {name}"] = _distance(direct, _gradient(network.with_solver(parse(text)), images))
    limits = {"dopri5, checkpoint": 0.0, "dopri5, adjoint": 1e-2, "revnet, checkpoint": 0.0, "revnet, reversible": 1e-2}
    says = ", ".join(f"{name} {difference:.0e}" for name, difference in differences.items())
    passed = all(differences[name] <= limit for name, limit in limits.items())
    return {"passed": passed, "says": f"relative differences from direct: {says}", "differences": differences}


def _gradient(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Of a sum of squares, with respect to all parameters."""
    module = copy.deepcopy(module)
    module(x).square().sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters()])


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / one.norm())


def weights(network: Network) -> torch.Tensor:
    """All parameters and buffers, as one vector."""
    return torch.cat([tensor.detach().double().flatten() for tensor in network.state_dict().values()])


def captured(device: torch.device) -> Row:
    """Training as one launch against training part by part: the same weights."""
    deterministic()
    apart = fit(network_of(), [], device).network
    together = fit(network_of(), one_launch(device), device).network
    difference = _distance(weights(apart), weights(together))
    says = "to the bit" if difference == 0 else f"relative difference of the weights {difference:.0e}"
    how = "" if one_launch(device) else "; but nothing is captured on this device"
    return {"passed": difference <= 1e-5, "says": f"after {STEPS} steps, {says}{how}", "difference": difference}


class Waits(pl.Callback):
    """Finds the waits of the host for the device in three steps behind the first five."""

    def __init__(self, watching: AbstractContextManager[Callable[[], list[str]]]) -> None:
        self.watching = watching

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            self.so_far = self.watching.__enter__()
        elif batch_idx == 7:
            self.places = self.so_far()
            self.watching.__exit__(None, None, None)


@contextmanager
def by_torch() -> Iterator[Callable[[], list[str]]]:
    """torch warns of every wait for a GPU; its lines."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: [
                f"{Path(warning.filename).name}:{warning.lineno}" for warning in found if "synchroniz" in str(warning.message)
            ]
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def by_operators(device: torch.device) -> Iterator[Callable[[], list[str]]]:
    """The operators for which a GPU would have to be waited for."""
    with Synchronisations(device) as mode:
        yield lambda: ["an operator"] * mode.count


def waits(device: torch.device) -> Row:
    """Steps of training, eager and as one launch, in which every wait is counted."""
    found = {}
    for name, callbacks in {"eager": [], "one launch": one_launch(device)}.items():
        watch = Waits(by_torch() if device.type == "cuda" else by_operators(device))
        fit(network_of(), [*callbacks, watch], device)
        found[name] = watch.places
    says = ", ".join(f"{len(places)} {name}" for name, places in found.items())
    return {"passed": not any(found.values()), "says": f"waits in three steps: {says}", **found}


def bfloat16(device: torch.device) -> Row:
    """The loss of a training in bfloat16 beside that of float32."""
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        classifier = fit(network_of(), one_launch(device), device, precision)
        losses[precision] = float(classifier.trainer.callback_metrics["train/loss"])
    full, half = losses.values()
    says = f"loss {half:.4f}, in float32 {full:.4f}"
    return {"passed": abs(half - full) < 0.05 * abs(full), "says": f"after {STEPS} steps, {says}", "losses": losses}


class Spoil(pl.Callback):
    """Puts NaN in one image of one batch, and keeps what the network was before it."""

    step, image = 7, 3

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.step:
            self.before = weights(pl_module.network).clone()
            batch[0][self.image] = float("nan")


def nan_image(device: torch.device) -> Row:
    """An image that is no number: the error, and weights, statistics and all else as before its step."""
    spoil, network = Spoil(), network_of()
    try:
        fit(network, [*one_launch(device), spoil], device)
    except SolveError as error:
        kept = torch.equal(weights(network).to(spoil.before), spoil.before)
        said = " ".join(str(error).split())
        return {
            "passed": kept,
            "says": f"{said[:120]}; weights and buffers {'as before' if kept else 'CHANGED'}",
            "error": said,
        }
    return {"passed": False, "says": "the training went on", "error": ""}


def training(folder: str | Path, device: torch.device) -> Training:
    """Four epochs that leave a checkpoint after each."""
    recipe = Recipe(epochs=4, learning_rate=0.05, milestones=(1, 3), batch_size=16)
    return Training(network_of, lambda: RandomImages(512, 32, 16), recipe, 0, Path(folder), device)


def kill_and_resume(device: torch.device) -> Row:
    """A training that is killed after a checkpoint, and gone on with, against one that was not."""
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = (Path(folder) / name for name in ("whole", "cut"))
        code = f"from experiments.gpu.truth import alone; alone({str(cut)!r}, {device.type!r})"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.perf_counter() + 120
        while not (cut / "last.ckpt").exists() and process.poll() is None and time.perf_counter() < end:
            time.sleep(0.02)
        process.kill()
        process.wait()
        if not (cut / "last.ckpt").exists():
            return {"passed": False, "says": "the training left no checkpoint to go on from"}
        done = torch.load(cut / "last.ckpt", weights_only=True)["epoch"] + 1
        deterministic()
        ends: list[torch.Tensor] = []
        for place in (whole, cut):
            training(place, device).run(float("inf"), lambda network, data: ends.append(weights(network)) or {})
    same = torch.equal(*ends)
    difference = "the same bits" if same else f"relative difference {_distance(*ends):.0e}"
    return {"passed": same, "says": f"killed after {done} of 4 epochs and gone on with: {difference}"}


def alone(folder: str, device: str) -> None:
    """The training that is killed."""
    deterministic()
    training(folder, torch.device(device)).run(float("inf"), nothing_more)


def show(rows: Rows) -> str:
    lines = [[name, "yes" if row["passed"] else "**no**", row["says"]] for name, row in rows.items()]
    return table(["check", "holds", "what was found"], lines)
