"""One of two processes that solve and train together: `python distributed_worker.py RANK FOLDER`.

Both go through all checks in step, and save what they have seen for the tests to look at, in one file a part and rank.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from continuum import Autonomous, Coupled, Field, Flow, PiecewiseConstant, SolveError
from continuum.fields import ODENetBranch
from continuum.fields.branches import group_norm

WORLD = 2
CHANNELS = 4
TIMEOUT = timedelta(seconds=30)
"""How long a rank waits for the other before it fails, where a mistake would have it wait for ever."""


def kinked() -> Field:
    """With ReLU, and the depth for a channel."""
    return ODENetBranch(CHANNELS)


def smooth(channels: int = CHANNELS) -> Field:
    return Autonomous(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), group_norm(channels), nn.Tanh()))


def layers() -> Field:
    return PiecewiseConstant([smooth(), smooth()])


def halves() -> Field:
    return Coupled(smooth(CHANNELS // 2), smooth(CHANNELS // 2))


class MapAndVector(Field):
    """A field of tuples: x' = GN(conv(x)) + y at every pixel, y' = tanh(W mean(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.norm = group_norm(CHANNELS)
        self.linear = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, t, x):
        state, vector = x
        return self.norm(self.conv(state)) + vector[..., None, None], torch.tanh(self.linear(state.mean(dim=(2, 3))))


class FlowOfTuple(Flow):
    """The flow of an image with its means for a second state, of which both go on."""

    def forward(self, x):
        state, vector = super().forward((x, x.mean(dim=(2, 3))))
        return state + vector[..., None, None]


def network(field: Callable[[], Field], solver: str, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A convolution, the flow (at place 1), pooling and a linear map to three logits."""
    torch.manual_seed(0)
    moving = field()
    flow = (FlowOfTuple if isinstance(moving, MapAndVector) else Flow)(moving, solver, 2)
    stem = nn.Conv2d(1, CHANNELS, 3, padding=1, bias=False)
    return nn.Sequential(stem, flow, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 3)).to(dtype)


@dataclass(frozen=True)
class Case:
    """A solver on both ranks, and the direct one of a single process with the whole batch."""

    field: Callable[[], Field]
    solver: str
    alone: str
    dtype: torch.dtype = torch.float64
    sizes: tuple[int, int] = (4, 4)
    contrast: float = 1.0
    """What the images of the first rank are multiplied with: where they are faint, the norm makes the equation harder."""

    def images(self) -> Tensor:
        x = torch.randn(sum(self.sizes), 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        x[: self.sizes[0]] *= self.contrast
        return x.to(self.dtype)

    def part(self, rank: int) -> Tensor:
        return self.images().split(self.sizes)[rank]


FIXED = {
    "euler": (kinked, "euler:h=0.5", "direct"),
    "euler, checkpoint": (kinked, "euler:h=0.5", "checkpoint,every=2"),
    "rk4": (layers, "rk4:h=1", "direct"),
    "rk4, checkpoint": (layers, "rk4:h=0.5", "checkpoint"),
    "coupling, reversible": (halves, "coupling:h=0.5", "reversible"),
    "two-step midpoint, reversible": (layers, "two_step_midpoint:h=0.5", "reversible"),
    "tuple, rk4": (MapAndVector, "rk4:h=1", "direct"),
    "tuple, rk4, checkpoint": (MapAndVector, "rk4:h=1", "checkpoint"),
}
FIXED_CASES = {
    f"{name}, {str(dtype)[6:]}": Case(field, f"{solver},gradient={gradient}", solver, dtype)
    for name, (field, solver, gradient) in FIXED.items()
    for dtype in (torch.float64, torch.float32)
}

DOPRI5 = "dopri5:rtol=1e-3,atol=1e-3"
SITUATIONS: dict[str, dict[str, Any]] = {
    "equal batches": {"field": kinked},
    "layers": {"field": layers},
    "tuple": {"field": MapAndVector},
    "unequal batches": {"field": kinked, "sizes": (6, 1)},
    "an empty batch": {"field": kinked, "sizes": (5, 0)},
    "harder images": {"field": kinked, "contrast": 0.05},
}
GLOBAL_CASES = {
    f"{name}, {gradient}": Case(solver=f"{DOPRI5},norm=global,gradient={gradient}", alone=DOPRI5, **situation)
    for name, situation in SITUATIONS.items()
    for gradient in ("direct", "checkpoint")
}

TIGHT = "dopri5:rtol=1e-6,atol=1e-6"
ADJOINT_CASES = {
    f"{name}, {gradient}": Case(field, f"{TIGHT},gradient={gradient}", TIGHT)
    for name, field, gradient in [
        ("smooth", smooth, "adjoint"),
        ("smooth", smooth, "full_adjoint"),
        ("layers", layers, "adjoint"),
        ("tuple", MapAndVector, "adjoint"),
    ]
}

MIXED_CASES = {
    name: Case(field, solver, solver.partition(",gradient")[0].replace(",norm=global", ""), torch.float32)
    for name, field, solver in [
        ("rk4, direct", kinked, "rk4:h=1"),
        ("rk4, checkpoint", kinked, "rk4:h=1,gradient=checkpoint"),
        ("coupling, reversible", halves, "coupling:h=0.5,gradient=reversible"),
        ("dopri5, direct", kinked, "dopri5:rtol=1e-2,atol=1e-2,norm=global"),
        ("dopri5, checkpoint", kinked, "dopri5:rtol=1e-2,atol=1e-2,norm=global,gradient=checkpoint"),
        ("dopri5, adjoint", smooth, "dopri5:rtol=1e-2,atol=1e-2,gradient=adjoint"),
        ("tuple, dopri5, checkpoint", MapAndVector, "dopri5:rtol=1e-2,atol=1e-2,norm=global,gradient=checkpoint"),
    ]
}


def gradients(model: nn.Module, images: Tensor, share: float, mixed: bool) -> dict[str, Tensor]:
    """The gradients of `share` times the sum of the squared logits."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        logits = model(images).to(images.dtype)
    (share * logits.square().sum()).backward()
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}


@cache
def alone(case: Case, mixed: bool) -> dict[str, Any]:
    """The gradients and steps of one process."""
    model = network(case.field, case.solver, case.dtype)
    found = gradients(model, case.images(), 1 / sum(case.sizes), mixed)
    return {"gradients": found, "grid": model[1].cost.grid}


def compared(rank: int, cases: dict[str, Case], mixed: bool = False) -> dict[str, Any]:
    """The gradients and steps of each case under DistributedDataParallel and, on the first rank, those of one process."""
    seen = {}
    for name, case in cases.items():
        model = network(case.field, case.solver, case.dtype)
        parallel = DistributedDataParallel(model)
        for _ in range(2):  # a second time, because DistributedDataParallel rebuilds its buckets after the first
            # It takes the mean over the ranks, so a rank's share of the sum is as many times larger.
            found = gradients(parallel, case.part(rank), WORLD / sum(case.sizes), mixed)
        seen[name] = {"gradients": found, "grid": model[1].cost.grid}
        if rank == 0:
            seen[name]["alone"] = alone(replace(case, solver=case.alone), mixed)
    return seen


def trained(rank: int) -> dict[str, Any]:
    """Some steps of gradient descent, each rank by the error of its own batch."""
    case = Case(kinked, DOPRI5, DOPRI5, contrast=0.05)
    model = network(case.field, case.solver)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses, grids = [], []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (parallel(case.part(rank)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        grids.append(model[1].cost.grid)
    return {"losses": losses, "grids": grids, "weights": {name: p.detach() for name, p in model.named_parameters()}}


class Ending(Field):
    """A field that is not finite beyond depth 0.5, on the second rank alone."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.branch = kinked()

    def forward(self, t, x):
        return self.branch(t, x) * (torch.as_tensor(0.5 - t).sqrt() if self.rank else 1.0)


@dataclass(frozen=True)
class Broken:
    """A solve that one rank, or each, has a reason to end."""

    field: Callable[[int], Field] = lambda rank: kinked()
    options: str = ""
    spoil: Callable[[Tensor], Tensor] = lambda images: images
    """What is done to the images of the second rank."""
    first: int = 4
    """How many images the first rank has."""


def with_nan(images: Tensor) -> Tensor:
    return torch.where(torch.arange(len(images))[:, None, None, None] == 2, float("nan"), images)


def with_infinity(images: Tensor) -> Tensor:
    return with_nan(images).nan_to_num(float("inf"))


ELSEWHERE = {
    "nan": Broken(spoil=with_nan),
    "nan, checkpoint": Broken(options=",gradient=checkpoint", spoil=with_nan),
    "nan, first step": Broken(options=",first_step=0.1", spoil=with_nan),
    "nan, tuple": Broken(lambda rank: MapAndVector(), spoil=with_nan),
    "infinity": Broken(spoil=with_infinity),
    "nan, an empty batch": Broken(spoil=with_nan, first=0),
}
"""Only the second rank has a state that is not finite."""

TOGETHER = {
    "the step size underflows": Broken(Ending),
    "the step size underflows, min_step": Broken(options=",min_step=0.5", spoil=lambda images: 0.05 * images),
    "the evaluation budget is spent": Broken(options=",max_evaluations=20", spoil=lambda images: 0.05 * images),
}
"""Both ranks take too many steps, or too small ones, for the images or the field of the second."""


def failed(rank: int) -> dict[str, Any]:
    """What each rank raises, and the gradients of a good batch afterwards."""
    seen = {}
    good = Case(kinked, DOPRI5, DOPRI5).part(rank)
    for name, broken in {**ELSEWHERE, **TOGETHER}.items():
        model = network(lambda field=broken.field: field(rank), f"{DOPRI5},norm=global{broken.options}")
        parallel = DistributedDataParallel(model)
        images = broken.spoil(good) if rank else good[: broken.first]
        seen[name] = {"message": None}
        try:
            parallel(images)
        except SolveError as error:
            seen[name] = {"message": str(error), "rows": error.rows, "evaluations": error.evaluations, "depth": error.depth}
        if name in ELSEWHERE:
            seen[name]["gradients"] = gradients(parallel, good, 1.0, mixed=False)
    return seen


def classified(rank: int) -> dict[str, Any]:
    """What `Classifier` raises on each rank where only one has a reason to, and whether its state has moved."""
    from pytorch_lightning.strategies import DDPStrategy
    from runs import quiet_trainer
    from torch.utils.data import DataLoader, TensorDataset

    from continuum.training import Classifier
    from continuum.zoo import odenet

    os.environ.update(WORLD_SIZE=str(WORLD), RANK=str(rank), LOCAL_RANK=str(rank), NODE_RANK="0")
    seen = {}
    good = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(rank))
    nan, unlabelled = good.clone(), torch.full((4,), -100)  # a batch without labels has a loss of 0 / 0
    nan[1] = float("nan")
    labels = torch.arange(4)
    for name, solver, images, own_labels in [
        ("good", f"{DOPRI5},norm=batch", good, labels),
        ("nan, batch", f"{DOPRI5},norm=batch", nan, labels),
        ("nan, global", f"{DOPRI5},norm=global", nan, labels),
        ("nan, fixed steps", "rk4:h=1", nan, labels),
        ("loss, batch", f"{DOPRI5},norm=batch", good, unlabelled),
        ("loss, global", f"{DOPRI5},norm=global", good, unlabelled),
    ]:
        torch.manual_seed(0)
        model = Classifier(odenet(3, width=4, num_classes=4, solver=solver))
        before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
        data = TensorDataset(images, own_labels) if rank == 1 else TensorDataset(good, labels)
        strategy = DDPStrategy(process_group_backend="gloo")
        trainer = quiet_trainer(max_steps=1, devices=WORLD, strategy=strategy, use_distributed_sampler=False)
        message = None
        try:
            trainer.fit(model, DataLoader(data, batch_size=4))
        except SolveError as error:
            message = str(error)
        moved = [part for part, tensor in model.network.state_dict().items() if not torch.equal(tensor, before[part])]
        seen[name] = {"message": message, "moved": moved}
    return seen


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD, timeout=TIMEOUT)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "fixed": lambda: compared(rank, FIXED_CASES),
        "global": lambda: compared(rank, GLOBAL_CASES),
        "adjoint": lambda: compared(rank, ADJOINT_CASES),
        "mixed": lambda: compared(rank, MIXED_CASES, mixed=True),
        "trained": lambda: trained(rank),
        "failed": lambda: failed(rank),
        "classified": lambda: classified(rank),
    }
    for name, part in parts.items():
        torch.save(part(), folder / f"{name}{rank}.pt")
    # One process must not take the group down, nor end, while the other still talks to it.
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of torch may abort the interpreter at its exit, when all is done and saved
