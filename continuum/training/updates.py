"""Training steps that wait for nothing: forward pass, backward pass and update are given to the device, and read once a second.

Lightning's loop is as it was: its hooks, callbacks, precision, clipping, accumulation and schedules keep their meaning.
"""

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.strategies import ParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from continuum.models import Network
from continuum.models.archive import CheckpointError
from continuum.models.failure import cause_of
from continuum.solvers import SolveError
from continuum.training.optimizers import leaves_out
from continuum.training.tally import Batch, Tally


class Updates(pl.LightningModule):
    """Trains `network` by its own steps, whose losses, statistics and gradients are looked at on the device.

    What steps find is read about once a second, where the trainer logs, at the end of an epoch and before a checkpoint. Under
    several ranks it is read where all of them do: every `log_every_n_steps` and at the end of an epoch. Where the optimiser
    cannot look itself (it is not fused, or a gradient scaler looks for it), it is read before every update.
    """

    network: Network
    INTERVAL = 1.0
    """Seconds between two readings, at least."""

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def forget(self) -> None:
        """Begin with nothing found."""
        self.tally: Tally | None = None
        self.launch: Callable[[Batch], Tensor] | None = None
        """Training steps as one, where `Compile` puts it."""
        self.unread, self.read_at = 0, -float("inf")
        self.means: dict[str, float] = {}
        self.epoch_sums: dict[str, float] = {}
        self.epoch_images = 0

    @abstractmethod
    def objective(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """What is minimised, and what else is found: means over the images, without gradients."""

    @property
    @abstractmethod
    def found(self) -> Sequence[str]:
        """The names of what else is found."""

    @abstractmethod
    def step_context(self, batch_idx: int) -> AbstractContextManager[None]:
        """What holds during a step, and when it is done again."""

    # Lightning

    @property
    def automatic_optimization(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Whether Lightning does backward pass and update: not while a batch is under way, for `training_step` does. Everywhere
        else it does, so that clipping, accumulation, schedules and callbacks are as in any of its trainings.
        """
        if self._trainer is None or not self._trainer.training:
            return True
        batches: Any = self._trainer.fit_loop.epoch_loop.batch_progress.current
        return batches.started <= batches.processed

    def on_fit_start(self) -> None:
        self.forget()

    def on_train_start(self) -> None:
        """Give momenta the strides of their weights: a fused update reads both as they lie in memory.

        Raises:
            CheckpointError: a checkpoint has brought the options of another optimiser.
        """
        for optimizer in self.trainer.optimizers:
            # Of torch itself, when it loads, is the default differentiable.
            missing = optimizer.defaults.keys() - optimizer.param_groups[0].keys() - {"differentiable"}
            if missing:
                raise CheckpointError(
                    f"the checkpoint is of another optimiser than {type(optimizer).__name__}, without its "
                    f"{', '.join(sorted(missing))}: go on with that one, or begin anew from the weights, by continuum.load"
                )
            for weight, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                        state[name] = torch.empty_like(weight).copy_(value)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Have numbers of an earlier step logged once: Lightning would fetch them again after every step to come."""
        for logged in self.trainer._results.result_metrics if self.trainer._results else ():
            logged.has_reset = logged.has_reset or not logged.meta.on_epoch

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor] | None:
        """Forward pass, backward pass and update.

        Raises:
            SolveError: a solve failed, or a step since the last reading was not finite.
        """
        if self.trainer.fit_loop._skip_backward:  # StochasticWeightAveraging takes the statistics of its average
            self.network(batch[0])
            return None
        tally = self._tally_of(batch)
        if not self.unread:
            self.first_unread = batch_idx
        self.unread += 1
        steps = self.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
        if self.launch is None:
            loss = self._step(tally, batch, batch_idx, steps)
        else:
            steps.increment_ready()
            with self.step_context(batch_idx):
                loss = self.launch(batch)
            steps.increment_completed()
        if self.trainer.is_last_batch:
            self.on_train_epoch_end()  # before the hooks of callbacks at the end of the epoch, which ask for its means
        elif self._due(steps.total.completed):
            self.read()
            self.log_dict(self.means, prog_bar=True)
        return {"loss": loss}

    def _step(self, tally: Tally, batch: Batch, batch_idx: int, steps: Any) -> Tensor:
        """A training step with all of Lightning's hooks; `steps` counts the updates."""
        accumulated = self.trainer.accumulate_grad_batches
        updates = self.trainer.is_last_batch or (batch_idx + 1) % accumulated == 0
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        if batch_idx % accumulated == 0:
            self._zero_grad(optimizer.optimizer)
        try:
            with self.step_context(batch_idx), nullcontext() if updates else self._apart():
                loss, found = self.objective(batch)
                self.manual_backward(loss / accumulated if accumulated > 1 else loss)
        except SolveError:
            tally.restore()
            raise
        # Those of float16 are scaled, and may overflow: their scaler looks at them.
        tally.judge(batch, loss, found, tally.gradients() if self.scaler is None else [])
        if not self.looks_itself(optimizer.optimizer):
            self.read()
        if updates:
            steps.increment_ready()
            optimizer.step()
            steps.increment_completed()
        return loss.detach()

    def whole_step(self, batch: Batch) -> Tensor:
        """A training step without any hook, to be captured; the loss."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, Optimizer)
        assert self.tally is not None
        optimizer.zero_grad()
        loss, found = self.objective(batch)
        loss.backward()
        self.tally.judge(batch, loss, found, self.tally.gradients())
        optimizer.found_inf = self.tally.found_inf  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
        return loss.detach()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if clip := self.trainer.gradient_clip_val:
            self.configure_gradient_clipping(optimizer, clip, self.trainer.gradient_clip_algorithm)
        if self.tally is not None and self.looks_itself(optimizer):
            optimizer.found_inf = self.tally.found_inf  # pyright: ignore[reportAttributeAccessIssue]

    def on_train_epoch_start(self) -> None:
        self.epoch_sums, self.epoch_images, self.read_at = {}, 0, -float("inf")
        self._others_may_write()

    def on_validation_start(self) -> None:
        self.read()

    def on_validation_end(self) -> None:
        self._others_may_write()

    def on_train_epoch_end(self) -> None:
        """Log the means of the epoch; again for one that ends before its last batch."""
        self.read()
        values = [self.epoch_images, *self.epoch_sums.values()]
        images, *sums = self.trainer.strategy.reduce(torch.tensor(values, device=self.device), reduce_op="sum").tolist()
        self.log_dict({name: total / max(images, 1) for name, total in zip(self.epoch_sums, sums, strict=True)}, prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See to it that what is saved is good."""
        self.read()

    # Readings

    def read(self) -> None:
        """Take what the steps since the last reading found into `means` and those of the epoch; waits for the device.

        Raises:
            SolveError: one of them was not finite; weights and statistics are those from before it.
        """
        if not self.unread or self.tally is None:
            return
        good, self.means, broken = self.tally.read()
        self.unread, self.read_at = 0, time.monotonic()
        images = good * len(self.tally.suspect[0])
        self.epoch_images += images
        for name, mean in self.means.items():
            self.epoch_sums[name] = self.epoch_sums.get(name, 0.0) + images * mean
        if broken:
            raise self._failure(self.tally, self.first_unread + good)

    def _failure(self, tally: Tally, batch_idx: int) -> SolveError:
        """What was not finite in a step, by doing it again."""
        with self.trainer.precision_plugin.train_step_context(), self.step_context(batch_idx):
            failure = cause_of(self.network, tally.suspect[0], lambda: self.objective(tally.suspect)[0])
        tally.restore()
        if failure is None:
            failure = elsewhere()
        failure.batch = self.current_epoch, batch_idx
        return failure

    def _tally_of(self, batch: Batch) -> Tally:
        """The tally of this network; steps on batches of another size are read apart."""
        if self.tally is None or self.tally.network is not self.network:
            if self.tally is not None:  # a network that was changed goes on uncompiled
                self.launch = None
            self.tally, self.unread = Tally(self.network, batch, self.found), 0
        if batch[0].shape != self.tally.suspect[0].shape:
            self.read()
            self.tally.take(batch)
        return self.tally

    def _others_may_write(self) -> None:
        """Take the buffers for good as they are: between steps, callbacks may have changed them."""
        if self.tally is not None:
            self.tally.begin()

    def _due(self, steps: int) -> bool:
        every: int = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        logs = every > 0 and steps % every == 0
        if self.trainer.world_size > 1:
            return logs
        return (logs and len(self.trainer.loggers) > 0) or time.monotonic() - self.read_at > self.INTERVAL

    # What Lightning does for its own updates

    @property
    def scaler(self) -> object | None:
        """What scales gradients of float16, and leaves out the updates that it spoils."""
        return getattr(self._trainer.precision_plugin, "scaler", None) if self._trainer is not None else None

    def looks_itself(self, optimizer: Optimizer) -> bool:
        """Whether the optimiser leaves out an update by `found_inf`."""
        return self.scaler is None and leaves_out(optimizer)

    def _zero_grad(self, optimizer: Optimizer) -> None:
        for callback in self.trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            callback.on_before_zero_grad(self.trainer, self, optimizer)
        self.on_before_zero_grad(optimizer)
        optimizer.zero_grad()

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Gradients of this rank alone, to be reduced with those of a later batch."""
        strategy = self.trainer.strategy
        with strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext():
            yield


def elsewhere() -> SolveError:
    return SolveError("a solve failed on another rank", depth=0.0, step=0.0, evaluations=0, advice="See that rank's message")


@contextmanager
def drawing(device: torch.device, seed: int) -> Iterator[None]:
    """Torch's generators of the CPU and of `device`, seeded inside the block and as before behind it; nothing waits."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index])
    states = [generator.get_state() for generator in generators]
    for generator in generators:  # torch.manual_seed would also look for every other kind of device
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
