"""Fit, validate, test and predict: Lightning's command line over `Classifier` and the data modules."""

import inspect
import json
import os
import sys
import warnings
from argparse import RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse.typing import lazy_instance
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, ProgressBar, RichProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.trainer.states import TrainerFn

from continuum.cli.checkpoints import BUILDER_HELP, imported
from continuum.cli.inputs import described_data
from continuum.cli.parser import LIGHTNING, Parser, check_yaml
from continuum.files import write_text
from continuum.models import Network
from continuum.models.archive import CheckpointError, existing, one_line, unpacked
from continuum.models.checkpoint import KEY, read, restore
from continuum.solvers import SolveError
from continuum.training import Classifier, Compile, Digits, EndOnSignal, ImageData, LogCost, WritePredictions
from continuum.training.images import DataError
from continuum.zoo import BUILDERS

ZOO = "continuum.zoo"
"""Where a config looks up the builders of the zoo."""

LATEST = ("last", "best", "hpc")
"""What Lightning takes for a checkpoint that it is to find itself."""


class SaveConfig(SaveConfigCallback):
    """Writes the settings of a training, from which it goes on, to its log folder; an evaluation leaves them as they are."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = trainer.log_dir  # which all ranks ask for
        if stage == TrainerFn.FITTING and trainer.is_global_zero:
            write_text(self.parser.dump(self.config, skip_none=False), Path(folder or ".") / self.config_filename)


class Begun(Callback):
    """Knows whether a checkpoint has been restored, and the work begun."""

    it_has = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.it_has = True

    on_validation_start = on_test_start = on_predict_start = on_train_start


class LightningParser(Parser, LightningArgumentParser):
    """Lightning's parser with our errors."""


class CommandLine(LightningCLI):
    """Lightning's command line over `Classifier` and the data modules; one seed for weights, batches and augmentation.

    Args:
        network: the network of a checkpoint, which takes the place of the parser's; None where the user says which.
        data: the same for the data.
        **options: Lightning's.
    """

    def __init__(self, network: Network | None, data: ImageData | None, **options: Any) -> None:
        self.of_file = network, data
        super().__init__(Classifier, ImageData, **options)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except Exception as error:  # odd values fail anywhere in the reader
            parser.error(one_line(error))

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except (OverflowError, ValueError) as error:
            self.parser.error(f"--seed_everything: {one_line(error)}")

    def _parse_ckpt_path(self) -> None:
        """Leave the user's configuration as it is: Lightning would merge what a file says into it."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run, with errors on the way to the first batch that are those of a checkpoint."""
        path = self._get(self.config, "ckpt_path")
        if path is None or path in LATEST or "://" in str(path):
            return super()._run_subcommand(subcommand)
        unpacked(path)  # whose errors say what is wrong with the file
        begun = Begun()
        self.trainer.callbacks.append(begun)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            super()._run_subcommand(subcommand)
        except (CheckpointError, DataError, MisconfigurationException, OSError, SolveError):
            raise
        except Exception as error:
            if begun.it_has:
                raise
            raise CheckpointError(f"{path} cannot be gone on from: {one_line(error)}") from None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--compile",
            type=bool,
            default=False,
            help="on a GPU each training step becomes one launch; elsewhere torch.compile takes minutes for the network",
        )
        parser.add_argument(
            "--builder", type=str | None, metavar="MODULE.FUNCTION", help=f"with --ckpt_path alone: {BUILDER_HELP}"
        )
        # Safe as a default although jsonargparse carries arguments over to another class: all data modules share them.
        parser.set_defaults({"data": lazy_instance(Digits)})
        parser.set_defaults({"model.schedule": {"class_path": "continuum.training.OneCycle"}})
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except Exception as error:  # arguments that a class refuses, or a library of it that is not there
            self.parser.error(one_line(error))
        network, data = self.of_file
        if network is not None:
            self.model.network = network
        if data is not None:
            self.datamodule = data
        if self.subcommand == "predict" and self.model.samples and not self.model.network.stochastic:
            self.parser.error("--samples are draws of the noise of a network, and no field of this one is a StochasticField")
        if self._get(self.config, "compile"):
            self.trainer.callbacks.insert(0, Compile())  # pyright: ignore[reportAttributeAccessIssue]

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        return super()._instantiate_trainer(config, [*callbacks, *_ours(config, given)])


def _ours(flags: Mapping[str, Any], given: Sequence[Callback]) -> list[Callback]:
    """Our callbacks, but for those that the trainer's flags turn off, and those of a kind that is given."""
    ours: list[Callback] = []
    if flags.get("enable_checkpointing") is not False and not flags.get("barebones"):
        # Two, because one that monitors writes its `last` only when it has found a better one.
        shared: Any = {"enable_version_counter": False, "save_on_train_epoch_end": True}
        ours += [ModelCheckpoint(filename="last", **shared)]
        ours += [ModelCheckpoint(filename="best", monitor="val/accuracy", mode="max", **shared)]
    if flags.get("enable_progress_bar") is not False and not flags.get("barebones") and not _any(ProgressBar, given):
        ours += [RichProgressBar(refresh_rate=10)]
    return ours + [kind() for kind in (LogCost, WritePredictions, EndOnSignal) if not _any(kind, given)]


def _any(kind: type[Callback], callbacks: Sequence[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


def training_command(arguments: list[str]) -> None:
    """`continuum fit`, `validate`, `test` or `predict`, the first of `arguments`."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning against a newer torch
    _describe_network(arguments)
    sys.argv[1:], network, data = _with_network(arguments)  # where Lightning wants them
    try:
        CommandLine(
            network,
            data,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            parser_class=LightningParser,
            parser_kwargs={name: {"description": description} for name, description in LIGHTNING.items()},
            auto_configure_optimizers=False,
            trainer_defaults={"max_epochs": 20},
        )
    except (DataError, MisconfigurationException) as error:
        print(f"continuum: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def _describe_network(arguments: list[str]) -> None:
    """List the arguments of a network, which is a function, for `--model.network.help NAME`: Lightning knows classes only."""
    option = "--model.network.help"
    if not any(argument.partition("=")[0] == option for argument in arguments):
        return
    name = (_value(arguments, option) or "").rpartition(".")[2]
    parser = Parser(prog=f"continuum {arguments[0]} --model.network {ZOO}.{name}", formatter_class=RawDescriptionHelpFormatter)
    if name not in BUILDERS:
        parser.error(f"{option} takes the name of a network, one of {', '.join(BUILDERS)}, not {name!r}")
    parser.description = inspect.getdoc(BUILDERS[name])
    parser.add_function_arguments(BUILDERS[name], "model.network.init_args")
    parser.print_help()
    parser.exit()


Started = tuple[list[str], Network | None, ImageData | None]
"""Arguments for Lightning, and what a checkpoint stands for in their place."""


def _with_network(arguments: list[str]) -> Started:
    """The arguments, with the network and data of a checkpoint, or those of `fit` alone, where they name none."""
    arguments = _samples(arguments)
    if {"--help", "-h"} & set(arguments):
        return arguments, None, None
    for option in ("--config", "-c"):
        for config in filter(os.path.isfile, _values(arguments, option)):
            check_yaml(config)
    path = _value(arguments, "--ckpt_path")
    found = path in LATEST or (path is not None and "://" in path)
    if path is not None and not found:
        existing(path)
    own = any(a.split("=")[0] in ("-c", "--config", "--model.network") or a.startswith("--print_") for a in arguments)
    if _value(arguments, "--builder") is not None and (own or arguments[0] == "fit"):
        raise CheckpointError(
            "--builder is of the network in --ckpt_path alone: `fit`, --config and --model.network build their own, as by "
            "--model.network MODULE.FUNCTION; leave --builder out"
        )
    if own or arguments[0].split("=")[0] in ("-c", "--config"):
        return arguments, None, None
    if arguments[0] == "fit" and path is None:
        return _insert(arguments, _small(own_data=any(a.startswith("--data") for a in arguments))), None, None
    if arguments[0] == "fit":
        raise CheckpointError("a run goes on with the settings it began with: give --config, the config.yaml that it wrote")
    if path is None or found:
        raise CheckpointError(f"which network to {arguments[0]} is not said: give --ckpt_path FILE, or --model.network NAME")
    return _of_file(path, arguments)


def _small(own_data: bool) -> dict[str, Any]:
    """The network of `continuum fit` alone, by the recipe of experiments/digits/demo.yaml."""
    network = {"width": 16, "downsample": False, "solver": "dopri5:rtol=1e-2,atol=1e-2"}
    chosen = {
        "model.network": _class(f"{ZOO}.odenet", network),
        "model.schedule": _class("continuum.training.OneCycle", {"warmup": 0.1}),
    }
    return chosen if own_data else chosen | {"data": _class("continuum.training.Digits", {"batch_size": 16})}


def _of_file(path: str, arguments: list[str]) -> Started:
    """The network of the checkpoint at `path`, and its data where they are told; options override theirs by name.

    What the file says never reaches the parser, which would import what it names.

    Raises:
        CheckpointError: no checkpoint of a training, one of a network of another builder, or options that do not fit.
    """
    content = read(path)
    stated = content[KEY]
    if "pytorch-lightning_version" not in content:
        raise CheckpointError(f"{path} is no checkpoint of `continuum fit`, but a network alone: see `continuum compare`")
    builder = imported(_value(arguments, "--builder"))
    arguments, changed = _taken(arguments, "--model.network.")
    solver = changed.pop("solver", None)
    if changed and isinstance(stated.get("arguments"), Mapping):
        content = {**content, KEY: {**stated, "arguments": {**stated["arguments"], **changed}}}
    network = restore(content, path, builder)
    if solver is not None:
        try:
            network = network.with_solver(str(solver))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"--model.network.init_args.solver: {one_line(error)}") from None
    data = None
    if "data" in stated and _value(arguments, "--data") is None:
        arguments, changed = _taken(arguments, "--data.")
        data = described_data(content, path, changed)
        seed = data.seed if isinstance(data.seed, int) else 0
        arguments = _insert(arguments, {"seed_everything": seed})
    # Whichever the parser is told, for it has to be told one.
    return _insert(arguments, {"model.network": _class(f"{ZOO}.mlp", {})}), network, data


def _taken(arguments: list[str], prefix: str) -> tuple[list[str], dict[str, Any]]:
    """The arguments without those that begin with `prefix`, and these by their last word, as YAML reads them."""
    rest, taken, ahead = [], {}, iter(arguments)
    for argument in ahead:
        name, equals, value = argument.partition("=")
        if not name.startswith(prefix):
            rest.append(argument)
            continue
        text = value if equals else next(ahead, "")
        try:
            taken[name.removeprefix(prefix).removeprefix("init_args.")] = yaml.safe_load(text)
        except Exception as error:
            raise CheckpointError(f"{name} {text[:40]}: {one_line(error)}") from None
    return rest, taken


def _samples(arguments: list[str]) -> list[str]:
    """`predict --samples n` as the argument of `Classifier` that it is."""
    if arguments[:1] != ["predict"]:
        return arguments
    return [f"--model.{a[2:]}" if a.partition("=")[0] == "--samples" else a for a in arguments]


def _class(path: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"class_path": path, "init_args": arguments}


def _insert(arguments: list[str], options: dict[str, Any]) -> list[str]:
    """The options before all others, so that what a user wrote overrides them."""
    return [arguments[0], *(f"--{name}={json.dumps(value)}" for name, value in options.items()), *arguments[1:]]


def _value(arguments: list[str], option: str) -> str | None:
    """The last value given to `option`, which is the one that counts."""
    return next(reversed(_values(arguments, option)), None)


def _values(arguments: list[str], option: str) -> list[str]:
    """The values given to `option`, as `--option value` or `--option=value`."""
    found = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name == option:
            found.append(value if equals else following)
    return found
