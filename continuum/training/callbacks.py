"""What to watch and to change while Lightning runs: the costs of solves, compiled networks, and the number of layers."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from continuum.flow import Flow
from continuum.models import Network


class LogCost(Callback):
    """Logs evaluations, accepted and rejected steps of every flow, and all evaluations in the progress bar.

    For modules that have a `network`, such as `Classifier`.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        network = getattr(pl_module, "network", None)
        if not isinstance(network, Network):
            return
        total = 0
        for index, flow in enumerate(network.flows):
            if flow.cost is None:
                continue
            total += flow.cost.evaluations
            costs = {"evaluations": flow.cost.evaluations, "accepted": flow.cost.accepted, "rejected": flow.cost.rejected}
            pl_module.log_dict({f"flow{index}/{name}": float(value) for name, value in costs.items()})
        pl_module.log("evaluations", float(total), prog_bar=True)


class CompileNetwork(Callback):
    """Compiles the network of a module such as `Classifier`, once a checkpoint is loaded, which may put another there."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        network_of(pl_module, self).compile()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:  # not within a fit
            self.on_fit_start(trainer, pl_module)

    on_test_start = on_predict_start = on_fit_start


class Refine(Callback):
    """Refines the network by `factor` at the start of each of `epochs`, counted from 0: multi-level training.

    Training begins with a network of few layers and goes on with `factor` times as many, or with smaller steps
    (arXiv 1710.10348); see `Network.refine`. The optimiser and its schedule go on where they are, a copied parameter with a
    copy of its state (momentum). Checkpoints say how often the network is refined, and resuming from one goes on from there.

    For modules that have a `network`, such as `Classifier`, trained by one process.

    Args:
        epochs: epochs before which the network is refined, increasing, the first is 0.
        factor: layers that each becomes, or steps; at least 2.

    >>> Refine(epochs=[20, 40]).factor
    2

    Raises:
        ValueError: epochs that are not increasing, or a factor below 2; on setup, a network that cannot be refined, or that a
            checkpoint could not describe.
        TypeError: on setup, a module without a `Network`.
        RuntimeError: on setup, several processes, or a callback that averages weights.
    """

    def __init__(self, epochs: Sequence[int], factor: int = 2) -> None:
        self.epochs = list(epochs)
        self.factor = factor
        self.refined: list[int] = []
        if not self.epochs or self.epochs != sorted(set(self.epochs)) or self.epochs[0] < 0:
            raise ValueError(f"epochs are one or more increasing numbers, the first epoch is 0; got {self.epochs}")
        if not isinstance(factor, int) or factor < 2:
            raise ValueError(f"factor is an integer of at least 2, not {factor!r}")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.world_size > 1:
            raise RuntimeError(
                "Refine needs a single process: DistributedDataParallel registers the parameters of the network it is given "
                "and would not reduce the gradients of new ones. Train with devices=1, or refine between two calls of fit"
            )
        if name := averaging(trainer):
            raise RuntimeError(
                f"Refine changes the number of weights, and {name} goes on averaging those it began with: leave one of them out"
            )
        network = network_of(pl_module, self)
        if network.blueprint is None:
            raise ValueError(
                "Refine needs a network that knows its builder, or no checkpoint could say what was refined: put it together "
                "in a function decorated with @continuum.models.builder"
            )
        if trainer.global_step == 0:  # a new training; if it resumes, it is told next what was refined
            self.refined = []
        trial = copy.deepcopy(network).to("meta")  # shapes only: what cannot be refined fails now, not epochs later
        for _ in self.epochs:
            trial = trial.refine(self.factor)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning leaves on_train_epoch_start out when it resumes from the last step of the epoch before.
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch
        if epoch not in self.epochs or epoch in self.refined:
            return
        network, optimizers, schedulers = network_of(pl_module, self), trainer.optimizers, trainer.lr_scheduler_configs
        refined = network.refine(self.factor)
        origins: dict[Tensor, Tensor] = dict(zip(_parameters(refined, 1), _parameters(network, self.factor), strict=True))
        pl_module.network = refined
        trainer.strategy.setup_optimizers(trainer)
        for old, new in zip(schedulers, trainer.lr_scheduler_configs, strict=True):
            new.scheduler.load_state_dict(old.scheduler.state_dict())
        for old, new in zip(optimizers, trainer.optimizers, strict=True):
            _carry_over(old, new, origins)
        self.refined.append(epoch)

    @property
    def state_key(self) -> str:
        return self._generate_state_key(epochs=self.epochs, factor=self.factor)

    def state_dict(self) -> dict[str, Any]:
        return {"refined": list(self.refined)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.refined = list(state_dict["refined"])


def averaging(trainer: pl.Trainer) -> str | None:
    """Return the name of a callback of `trainer` that keeps averages of the weights, by their number and order."""
    kinds = (WeightAveraging, StochasticWeightAveraging)
    callbacks: list[Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    return next((type(callback).__name__ for callback in callbacks if isinstance(callback, kinds)), None)


def network_of(module: pl.LightningModule, callback: Callback) -> Network:
    """The network that a module trains; TypeError if it has none."""
    network = getattr(module, "network", None)
    if not isinstance(network, Network):
        raise TypeError(
            f"{type(callback).__name__} needs a module whose attribute `network` is a Network; {type(module).__name__} has "
            f"{network!r}"
        )
    return network


def _parameters(network: Network, copies: int) -> Iterator[nn.Parameter]:
    """The parameters, those of each layer so many times in a row: in the order of the refined network."""
    for part in (network.stem, *network.stages, network.head):
        if isinstance(part, Flow) and part.field.at(0.0) is not part.field:
            yield from part.parameters(recurse=False)  # a learnt depth
            for layer in part.field.pieces():
                yield from list(layer.parameters()) * copies
        else:
            yield from part.parameters()


def _carry_over(old: Optimizer, new: Optimizer, origins: dict[Tensor, Tensor]) -> None:
    """Give `new` the options of `old`, and to each parameter a copy of the state that its origin has there."""
    for before, after in zip(old.param_groups, new.param_groups, strict=True):
        after.update({option: value for option, value in before.items() if option not in ("params", "param_names")})
        parameters: list[Tensor] = after["params"]
        for parameter in parameters:
            state = old.state.get(origins.get(parameter, parameter))
            if state is not None:
                new.state[parameter] = copy.deepcopy(state)
