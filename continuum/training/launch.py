"""A training step as one launch: forward pass, backward pass and update are captured once as a CUDA graph, and replayed.

A GPU gets one command a step instead of some hundreds, which take longer than their kernels where a network is small.
"""

from collections.abc import Callable

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from continuum.models import Network
from continuum.models.archive import one_line
from continuum.noise.base import drops_branches, stochastic_fields
from continuum.training.callbacks import network_of
from continuum.training.tally import Batch
from continuum.training.updates import Updates

HOOKS = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
"""What Lightning calls within a step."""


class Launch:
    """Replays `step`, a whole training step, on the images and labels it is given; on a CPU it calls it again.

    The first steps run one by one, so that whatever is made or chosen the first time has been. A batch of another size, the
    last of an epoch, runs uncaptured. A capture that fails is said once, and training goes on without.

    Args:
        step: from images and labels to the loss; it writes in place.
        optimizer: what `step` updates by; its learning rates are numbers between steps, and tensors within.
    """

    WARM_UP = 3

    def __init__(self, step: Callable[[Batch], Tensor], optimizer: Optimizer) -> None:
        self.step, self.optimizer = step, optimizer
        self.warmed = 0
        self.stream: torch.cuda.Stream | None = None
        self.static: Batch | None = None
        self.replay: Callable[[], Tensor] | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """Train on a batch; its loss, which the next call may overwrite."""
        if self.warmed < self.WARM_UP:
            self.warmed += 1
            return self._beside(batch)
        if self.static is None:
            self._capture(batch)
        if self.static is None or self.replay is None or batch[0].shape != self.static[0].shape:
            return self.step(batch)
        for kept, new in zip(self.static, batch, strict=True):
            kept.copy_(new)
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        return self.replay()

    def _beside(self, batch: Batch) -> Tensor:
        """A step on the stream that captures: autograd remembers where a weight was first used."""
        if batch[0].device.type != "cuda":
            return self.step(batch)
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            loss = self.step(batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        return loss

    def _capture(self, batch: Batch) -> None:
        self.static = batch[0].clone(), batch[1].clone()
        device = batch[0].device
        number = torch.float32 if device.type == "cuda" else torch.float64  # as the fused updates read it
        self.rates = [torch.full((), group["lr"], dtype=number, device=device) for group in self.optimizer.param_groups]
        if device.type != "cuda":
            self.replay = self._at_rates
            return
        graph = torch.cuda.CUDAGraph()
        # A weight in another precision is made within the graph, not taken from what a step before has left.
        half = {"enabled": torch.is_autocast_enabled("cuda"), "dtype": torch.get_autocast_dtype("cuda")}
        try:
            with torch.autocast("cuda", cache_enabled=False, **half), torch.cuda.graph(graph, stream=self.stream):
                loss = self._at_rates()
        except RuntimeError as error:
            rank_zero_warn(f"the training step cannot be captured, and goes on uncaptured: {one_line(error)}")
            return

        def replay() -> Tensor:
            graph.replay()
            return loss

        self.replay = replay

    def _at_rates(self) -> Tensor:
        """The step on the static batch, with learning rates that a replay reads anew."""
        assert self.static is not None
        groups = self.optimizer.param_groups
        before = [dict(group) for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate
            if "capturable" in group:  # as Adam asks to be told
                group["capturable"] = True
        try:
            return self.step(self.static)
        finally:
            for group, old in zip(groups, before, strict=True):
                group.update(old)


class Compile(Callback):
    """Compiles what a `Classifier` trains: on a GPU the training step as one launch, else the network by torch.compile.

    A step that cannot be captured is said once, with the reason; the network is compiled then, part by part.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # By now a checkpoint has been loaded, which may have replaced the network by its refined one.
        network = network_of(pl_module, self)
        if pl_module.device.type != "cuda":
            network.compile()
        elif reason := obstacle(trainer, pl_module):
            rank_zero_info(f"the training step is not captured as one launch ({reason}); the network is compiled part by part")
            network.compile()
        else:
            assert isinstance(pl_module, Updates)
            pl_module.launch = Launch(pl_module.whole_step, trainer.optimizers[0])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:  # not within a fit
            network_of(pl_module, self).compile()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network_of(pl_module, self).compile()

    on_predict_start = on_test_start


def obstacle(trainer: Trainer, module: LightningModule) -> str | None:
    """Why a training step of `module` cannot be captured; None if it can."""
    if not isinstance(module, Updates):
        return f"{type(module).__name__} has no step of its own"
    if trainer.world_size > 1:
        return "there are several ranks"
    if trainer.gradient_clip_val or trainer.accumulate_grad_batches > 1:
        return "the trainer clips or accumulates gradients"
    if not all(map(module.looks_itself, trainer.optimizers)):
        return "its optimiser cannot leave out an update itself: it is not fused, or its gradients are scaled"
    callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    for hook in HOOKS:
        for who, base in [(module, Updates), *((callback, Callback) for callback in callbacks)]:
            if getattr(type(who), hook) is not getattr(base, hook):
                return f"{type(who).__name__} takes part in it by {hook}"
    return _unsteady(module.network)


def _unsteady(network: Network) -> str | None:
    """What in a network is decided anew in every step, by numbers on the device."""
    if solvers := sorted({str(flow.solver) for flow in network.flows if not flow.solver.one_graph}):
        return f"the steps of {' and '.join(solvers)} are not known beforehand"
    return "it drops branches by a look at the coin" if any(map(drops_branches, stochastic_fields(network))) else None
