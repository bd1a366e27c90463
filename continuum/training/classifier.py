"""Classification of images by any network: cross-entropy, any optimiser, a learning-rate schedule, any metrics."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning_utilities.core.rank_zero import rank_zero_warn
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from continuum.models import whole
from continuum.models.checkpoint import KEY, CheckpointError, check_builder, description, replay, solve_as
from continuum.models.failure import not_finite
from continuum.noise.base import drops_branches, stochastic_fields
from continuum.solvers import SolveError
from continuum.training.batches import channels_last
from continuum.training.callbacks import averaging
from continuum.training.data import ImageData
from continuum.training.endings import WholeFiles
from continuum.training.fitting import check_fit, check_metrics
from continuum.training.images import keyed_generator, keyed_seed
from continuum.training.optimizers import OptimizerCallable, fuse, optimizer_of
from continuum.training.regularisers import DepthSmoothness, Transport, check_random_ends, random_ends
from continuum.training.schedules import Schedule
from continuum.training.tally import Batch
from continuum.training.updates import Updates, drawing, elsewhere

NOISE = "noise_seed"
"""Where a training checkpoint holds the seed of the noise."""


class Classifier(Updates):
    """Trains `network` to classify images.

    Args:
        network: from images to logits, any module; it is trained as a `Network`, see `continuum.models.whole`.
        optimizer: what makes the optimiser: a class of torch.optim, or a partial of one with its arguments; None is `Nesterov`.
            Weight decay spares the k of LM-ResNet, which it would pull away from ResNet.
        label_smoothing: the share of the target spread evenly over the classes.
        schedule: OneCycle, or Steps; None keeps the learning rate.
        metrics: of logits and labels, logged in validation and test as val/NAME and test/NAME, beside the accuracy, or in its
            place under that name.
        samples: how often `predict` draws the noise of a stochastic network; 0 is the drift alone.
        smoothness: a penalty on weights that change fast with depth, logged as train/smoothness.
        transport: a penalty on the energies of the paths, logged as train/transport.
        end_time: in training, every flow ends up to so many layers before or behind its depth, at random (STEER).

    The penalties and random ends are of training alone. train/loss is the cross-entropy without penalties.

    Raises:
        ValueError: a learning rate that is not positive and finite, or other arguments that the optimiser refuses; a metric
            that is none or called loss; a negative number of samples; an `end_time` that is negative or not less than a flow's
            depth; layers of several kinds under `smoothness`.
        TypeError: an `optimizer` that makes none, or one whose steps evaluate the loss several times; `smoothness` without
            weights that vary with depth, `transport` of flows whose scheme or noise does not allow an integral, `end_time`
            under fixed steps, noise or a learnt depth.
        SolveError: a solve failed, or a loss, a statistic of BatchNorm or a gradient is not finite; with weights, momentum and
            buffers as they were after the last good step (see `Updates` for when it is seen). Under several ranks all of them
            raise; an adjoint that fails on the way back raises on its rank alone.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable | None = None,
        label_smoothing: float = 0.0,
        schedule: Schedule | None = None,
        metrics: dict[str, Metric] | None = None,
        samples: int = 0,
        smoothness: DepthSmoothness | None = None,
        transport: Transport | None = None,
        end_time: float = 0.0,
    ) -> None:
        super().__init__()
        if samples < 0:
            raise ValueError(f"samples is how often a stochastic network predicts each image, not {samples}")
        self.network = network = whole(network)
        self.smoothness = smoothness
        self.transport = transport
        self.end_time = end_time
        # Look at once for what the first training step would stumble over.
        optimizer_of(network, optimizer)
        if smoothness is not None:
            with torch.no_grad():
                smoothness(network)
        if transport is not None:
            transport.check(network)
        if end_time:
            check_random_ends(network, end_time)
        self.optimizer = optimizer
        self.schedule = schedule
        self.samples = samples
        self.noise_seed: int | None = None
        self.fails_alone = False
        """Whether a solve may fail on one of several ranks, and the others have to hear of it."""
        self.broken, self.seen = torch.zeros((), dtype=torch.int64), 0
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        chosen = {"accuracy": MulticlassAccuracy(None, average="micro"), **(metrics or {})}
        for name, metric in chosen.items():
            if name == "loss" or not isinstance(metric, Metric):
                raise ValueError(f"metrics are those of torchmetrics by names other than loss, not {name}: {metric!r}")
        self.metrics = nn.ModuleDict(chosen)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def setup(self, stage: str) -> None:
        """Look at the images that a data module has made ready.

        Raises:
            DataError: the network does not take them, or has not one output a class; a metric that is not one number of them.
        """
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ImageData):
            check_fit(self.network, data)
            check_metrics(self.metrics, data.num_classes)
        strategy = self.trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = WholeFiles()
        if stage == "fit":  # before its optimiser has momenta
            channels_last(self.network)

    # Training

    @property
    def found(self) -> list[str]:
        penalties = {"train/transport": self.transport, "train/smoothness": self.smoothness}
        return ["train/loss", "train/accuracy", *(name for name, penalty in penalties.items() if penalty is not None)]

    def objective(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        images, labels = batch
        failure, penalties = None, []
        try:
            if self.transport is None:
                logits = self(images)
            else:
                logits, energies = self.network.integral(images, self.transport.integrand())
                penalties.append(energies.mean())
        except SolveError as error:
            failure = error
        if not self._all_ranks_solved(failure is None):
            raise failure or elsewhere()
        if self.smoothness is not None:
            penalties.append(self.smoothness(self.network))
        loss = self.loss(logits, labels)
        correct = (logits.detach().argmax(dim=1) == labels).to(loss.dtype).mean()
        return sum(penalties, loss), [loss.detach(), correct, *(penalty.detach() for penalty in penalties)]

    @contextmanager
    def step_context(self, batch_idx: int) -> Iterator[None]:
        """Torch's generators as they are for this step alone, by (seed, epoch, step, rank); its flows draw in their order.

        So a resumed run draws what the uninterrupted one would have, and every rank something else. The random ends of the
        flows are those of the step too, and the same on all ranks, which may choose their steps together.
        """
        step = self.noise_seed, self.current_epoch, batch_idx
        random = self.end_time and self.training
        ends = random_ends(self.network.flows, self.end_time, keyed_generator("end", *step)) if random else nullcontext()
        with drawing(self.device, keyed_seed("noise", *step, self.global_rank)), ends:
            yield

    def on_fit_start(self) -> None:
        """Take the seed of the noise from torch's generator, unless a checkpoint has brought it; tell loggers what is trained.

        Raises:
            ValueError: a network that drops branches, under DistributedDataParallel that waits for all of their gradients; or
                one in which the ranks choose their steps together in some flows only.
        """
        super().on_fit_start()
        self._take_noise_seed()
        known = (flow.solver.steps(0.0, flow.depth) is not None for flow in self.network.flows)
        self.fails_alone = self.trainer.world_size > 1 and not all(known)
        adaptive = [flow.solver for flow in self.network.flows if flow.solver.adaptive]
        if self.trainer.world_size > 1 and len({solver.alone() == solver for solver in adaptive}) > 1:
            raise ValueError(
                f"the adaptive flows of this network are solved by {' and '.join(sorted(set(map(str, adaptive))))}: where one "
                "fails on a rank, the others would wait for it in the next. Give norm='global' to all of them or to none"
            )
        strategy = self.trainer.strategy
        waits = isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters", False)
        if waits and any(map(drops_branches, stochastic_fields(self.network))):
            raise ValueError(
                "a branch that is dropped has no gradient, and DistributedDataParallel would wait for it: train with "
                "strategy='ddp_find_unused_parameters_true'"
            )
        for logger in self.loggers:
            logger.log_hyperparams(self._hyperparameters())

    def _hyperparameters(self) -> dict[str, int | float | str | None]:
        """What a run is made of, by name, as its loggers are told: network, solver, optimiser, schedule and size of a batch."""
        blueprint, data = self.network.blueprint, getattr(self.trainer, "datamodule", None)
        built = ("Network", {}) if blueprint is None else (blueprint.builder, blueprint.arguments)
        (optimizer,) = self.trainer.optimizers
        parts = {"network": built, "optimizer": (type(optimizer).__name__, optimizer.defaults)}
        if self.schedule is not None:
            parts["schedule"] = type(self.schedule).__name__, vars(self.schedule)
        found: dict[str, Any] = {
            "solver": " and ".join(sorted({str(flow.solver) for flow in self.network.flows})),
            "batch_size": getattr(data, "batch_size", None),
        }
        for part, (name, arguments) in parts.items():
            found |= {part: name, **{f"{part}/{argument}": value for argument, value in arguments.items()}}
        return {name: value if isinstance(value, int | float | None) else str(value) for name, value in found.items()}

    def _take_noise_seed(self) -> None:
        if self.noise_seed is None:
            self.noise_seed = self.trainer.strategy.broadcast(torch.initial_seed())

    def _all_ranks_solved(self, here: bool) -> bool:
        return self.trainer.strategy.reduce_boolean_decision(here, all=True) if self.fails_alone else here

    def on_validation_epoch_start(self) -> None:
        self.broken, self.seen = torch.zeros((), dtype=torch.int64, device=self.device), 0

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Say of how many images the logits are not finite."""
        if found := self._broken_images():
            rank_zero_warn(f"validation: {found} not finite, and so is the loss")

    def on_test_epoch_end(self) -> None:
        """Look at the logits of all images.

        Raises:
            SolveError: some are not finite.
        """
        if found := self._broken_images():
            raise not_finite(found)

    on_predict_epoch_end = on_test_epoch_end

    def _broken_images(self) -> str | None:
        reduce = self.trainer.strategy.reduce
        count, seen = (int(reduce(n, reduce_op="sum")) for n in (self.broken, torch.tensor(self.seen, device=self.device)))
        return f"the logits of {count} of {seen} images are" if count else None

    def _look(self, logits: Tensor) -> None:
        self.broken = self.broken + (~torch.isfinite(logits).flatten(1).all(dim=1)).sum()
        self.seen += len(logits)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Batch) -> None:
        images, labels = batch
        logits = self(images)
        self._look(logits)
        self.log(f"{stage}/loss", self.loss(logits, labels), batch_size=len(labels), prog_bar=True, sync_dist=True)
        for name, metric in self.metrics.items():
            assert isinstance(metric, Metric)
            metric.update(logits, labels)
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, prog_bar=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The probabilities of the classes, (batch, classes); with `samples`, one such table a sample of the noise, stacked
        on a third axis at the end.
        """
        if not self.samples:
            found = torch.softmax(self(batch[0]), dim=1)
        else:
            with self.step_context(batch_idx):
                found = torch.softmax(self.network.sample(batch[0], self.samples), dim=2).permute(1, 2, 0)
        self._look(found)
        return found

    def on_predict_start(self) -> None:
        """Take the seed of the noise.

        Raises:
            TypeError: samples of a network without noise.
        """
        self._take_noise_seed()
        if self.samples and not self.network.stochastic:
            raise TypeError("samples need noise, and no field of this network is a StochasticField: leave samples at 0")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = optimizer_of(self.network, self.optimizer)
        if self.device.type in ("cpu", "cuda") and self.scaler is None:
            fuse(optimizer)
        if self.schedule is None:
            return optimizer
        scheduler = self.schedule.build(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.schedule.interval}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint say how to build the network, on which data it was trained, and the seed of its noise.

        Raises:
            SolveError: a step since the last reading was not finite, so this state is not one to go on from.
        """
        super().on_save_checkpoint(checkpoint)
        checkpoint[NOISE] = self.noise_seed
        if self.network.blueprint is None:
            return
        checkpoint[KEY] = description(self.network)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ImageData):
            checkpoint[KEY]["data"] = {"class": type(data).__name__, "arguments": data.arguments}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refine and project the network as the checkpoint's was, so that its weights fit; go on with its noise.

        Raises:
            CheckpointError: this network is of another builder, was changed otherwise, or would change beside a callback that
                averages weights.
        """
        self.noise_seed = checkpoint.get(NOISE, self.noise_seed)
        if self.network.blueprint is None or KEY not in checkpoint:
            return
        check_builder(checkpoint[KEY].get("builder"), self.network.blueprint.builder, "the checkpoint")
        known = [list(change) for change in self.network.blueprint.changes]
        changes = [list(change) for change in checkpoint[KEY].get("changes", [])]
        if changes[: len(known)] != known:
            raise CheckpointError(
                f"the checkpoint's network went through the changes {changes}, this one through {known}: give the network as "
                "it was built; what the checkpoint says is done to it"
            )
        if missing := changes[len(known) :]:
            if self._trainer is not None and (name := averaging(self._trainer)):
                raise CheckpointError(
                    f"the checkpoint's network went through the changes {missing}, and {name} would go on averaging weights "
                    "from before: leave it out, or give the changed network, as continuum.load returns it"
                )
            self.network = replay(self.network, missing)
            solve_as(self.network, checkpoint[KEY]["solvers"])
