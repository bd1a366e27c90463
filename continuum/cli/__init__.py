"""The `continuum` command: fit, validate, test and predict on Lightning's command line, and what runs without it."""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse.typing import lazy_instance
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, RichProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.trainer.states import TrainerFn

import continuum
from continuum.cli.analyse import analyse_command, analyse_parser
from continuum.cli.bench import bench_command, bench_parser
from continuum.cli.compare import compare_command, compare_parser
from continuum.cli.convert import convert_command, convert_parser
from continuum.cli.models import models_command, models_parser
from continuum.cli.parser import Parser
from continuum.cli.verify import verify_command, verify_parser
from continuum.cli.weak import weak_command, weak_parser
from continuum.models.checkpoint import KEY, CheckpointError, read
from continuum.solvers import SolveError
from continuum.training import Classifier, Digits, ImageData, LogCost, WritePredictions
from continuum.training.images import DataError
from continuum.zoo import BUILDERS

COMMANDS: dict[str, tuple[Callable[[], Parser], Callable[[list[str]], None]]] = {
    "analyse": (analyse_parser, analyse_command),
    "bench": (bench_parser, bench_command),
    "compare": (compare_parser, compare_command),
    "convert": (convert_parser, convert_command),
    "models": (models_parser, models_command),
    "verify": (verify_parser, verify_command),
    "weak": (weak_parser, weak_command),
}
"""What runs without Lightning: the parser and the function of each."""

EVALUATIONS = ("validate", "test", "predict")


class SaveConfig(SaveConfigCallback):
    """Saves the resolved config beside the checkpoints; a resumed run finds its own and replaces it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "overwrite": True})


class CompileNetwork(Callback):
    """Compiles the network of a `Classifier`, after a checkpoint is loaded, which may replace it by its refined one."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        pl_module.network.compile()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:  # not within a fit
            self.on_fit_start(trainer, pl_module)

    on_test_start = on_predict_start = on_fit_start


class CommandLine(LightningCLI):
    """Lightning's command line over `Classifier` and the data modules; one seed for weights, batches and augmentation."""

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        # Listed here for --help; `main` runs it without Lightning.
        action = parser._subcommands_action
        assert action is not None
        for name, (build, _) in COMMANDS.items():
            listed = build()
            action.add_subcommand(name, listed, help=listed.description)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--compile",
            type=bool,
            default=False,
            help="compile the network with torch.compile: minutes for the first batches, less time for each of the others",
        )
        # Safe as a default although jsonargparse carries arguments over to another class: all data modules share them.
        parser.set_defaults({"data": lazy_instance(Digits)})
        parser.set_defaults({"model.schedule": {"class_path": "continuum.training.OneCycle"}})
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:  # arguments that a network, solver or data set refuses
            self.parser.error(str(error))
        if self._get(self.config, "compile"):
            self.trainer.callbacks.insert(0, CompileNetwork())  # pyright: ignore[reportAttributeAccessIssue]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; problems a user can mend end in one line and exit status 2, a failed solve in status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] in COMMANDS:
            _, run = COMMANDS[arguments[0]]
            run(arguments[1:])
        elif arguments[:1] == ["--version"]:
            print(continuum.__version__)
        else:
            lightning(_with_network(arguments))
    except (CheckpointError, DataError, FileNotFoundError) as error:
        print(f"continuum: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except SolveError as error:
        print(f"continuum: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def lightning(arguments: list[str]) -> None:
    """Run Lightning's command line on `arguments`."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning against a newer torch
    sys.argv[1:] = arguments  # where Lightning wants them
    CommandLine(
        Classifier,
        ImageData,
        subclass_mode_data=True,
        save_config_callback=SaveConfig,
        seed_everything_default=0,
        parser_class=Parser,
        parser_kwargs={"description": DESCRIPTION},
        auto_configure_optimizers=False,
        trainer_defaults={
            "max_epochs": 20,
            "callbacks": [
                # Two, because one that monitors writes its `last` only when it has found a better one.
                ModelCheckpoint(filename="last", enable_version_counter=False, save_on_train_epoch_end=True),
                ModelCheckpoint(
                    filename="best",
                    monitor="val/accuracy",
                    mode="max",
                    enable_version_counter=False,
                    save_on_train_epoch_end=True,
                ),
                LogCost(),
                WritePredictions(),
                RichProgressBar(),
            ],
        },
    )


DESCRIPTION = f"""Train networks of continuous depth and run their weights under any solver.
Networks are built by {", ".join(f"continuum.zoo.{name}" for name in BUILDERS)}, or a function of your own decorated with
continuum.models.builder."""


def _with_network(arguments: list[str]) -> list[str]:
    """The arguments with the network they leave open: a small ODE-Net to fit, or what the checkpoint to evaluate describes.

    Not a default of the parser, because jsonargparse would carry its arguments over to whatever network is chosen instead.
    """
    arguments = _samples(arguments)
    stated = any(a.split("=")[0].startswith(("-c", "--config", "--model.network", "--print_")) for a in arguments)
    if not arguments or stated or "--help" in arguments or "-h" in arguments:
        return arguments
    path = _value(arguments, "--ckpt_path")
    if arguments[0] == "fit" and path is None:
        small = {
            "model.network": _class("continuum.zoo.odenet", {"width": 16, "downsample": False}),
            "model.learning_rate": 0.3,
        }
        if not any(a.startswith("--data") for a in arguments):
            small["data"] = _class("continuum.training.Digits", {"batch_size": 32})
        return _insert(arguments, small)
    if arguments[0] not in EVALUATIONS or path is None or not Path(path).is_file():
        return arguments
    description = read(path)[KEY]
    network = dict(description["arguments"])
    if ["drift"] not in description["changes"]:  # which is taken from the stochastic network that the builder makes
        network["solver"] = description["solvers"][0]
    found = {"model.network": _class(f"continuum.zoo.{description['builder']}", network)}
    if "data" in description and _value(arguments, "--data") is None:
        data = dict(description["data"]["arguments"])
        found["seed_everything"] = data.pop("seed", 0)
        found["data"] = _class(f"continuum.training.{description['data']['class']}", data)
    return _insert(arguments, found)


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
    """The value given to `option`, as `--option value` or `--option=value`."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option:
            return value if equals else (arguments[index + 1 : index + 2] or [None])[0]
    return None
