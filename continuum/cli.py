"""The `continuum` command: fit, validate, test and predict on Lightning's command line, and compare."""

import json
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse.typing import PositiveInt, lazy_instance
from pytorch_lightning.callbacks import ModelCheckpoint, RichProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import continuum.training
from continuum.analysis.compare import Row, compare, write_csv, write_json
from continuum.analysis.plots import draw_comparison, draw_steps
from continuum.models.checkpoint import KEY, CheckpointError, read, restore
from continuum.models.zoo import BUILDERS
from continuum.solvers import SolveError, parse
from continuum.training import Classifier, Digits, ImageData, LogCost, WritePredictions
from continuum.training.images import DataError

EVALUATIONS = ("validate", "test", "predict")


class Parser(LightningArgumentParser):
    """A parser whose errors are the message alone, with the line of an unknown key in a config file."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse is trying out the types of a union
            super().error(message, ex)
        text = " ".join(str(message).split())
        unknown = re.findall(r"(?<!Parser )(?:key|option) ['\"]([\w.]+)['\"]", text, re.IGNORECASE)
        for key in unknown if re.search("accept|expected", text) else ():
            text += "".join(f"; {key!r} stands in {where}" for where in _lines(key.split(".")[-1], sys.argv))
        self.exit(2, f"continuum: {text}\n")


def _lines(key: str, arguments: Iterable[str]) -> list[str]:
    """Where `key` is used in the YAML files among the arguments, as file:line."""
    found = []
    for argument in arguments:
        path = Path(argument.partition("=")[2] or argument)
        if path.suffix in (".yaml", ".yml") and path.is_file():
            found += [f"{path}:{line}" for line in _key_lines(yaml.compose(path.read_text()), key)]
    return found


def _key_lines(node: yaml.Node | None, key: str) -> list[int]:
    if isinstance(node, yaml.MappingNode):
        here = [name.start_mark.line + 1 for name, _ in node.value if name.value == key]
        return here + [line for _, value in node.value for line in _key_lines(value, key)]
    if isinstance(node, yaml.SequenceNode):
        return [line for item in node.value for line in _key_lines(item, key)]
    return []


class SaveConfig(SaveConfigCallback):
    """Saves the resolved config beside the checkpoints; a resumed run finds its own and replaces it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "overwrite": True})


class CommandLine(LightningCLI):
    """Lightning's command line over `Classifier` and the data modules; one seed for weights, batches and augmentation."""

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        # Listed here for --help; `main` runs it without Lightning.
        listed, action = compare_parser(), parser._subcommands_action
        assert action is not None
        action.add_subcommand("compare", listed, help=listed.description)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # Safe as a default although jsonargparse carries arguments over to another class: all data modules share them.
        parser.set_defaults({"data": lazy_instance(Digits)})
        parser.set_defaults({"model.schedule": {"class_path": "continuum.training.OneCycle"}})
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:  # arguments that a network, solver or data set refuses
            self.parser.error(str(error))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; problems a user can mend end in one line and exit status 2, a failed solve in status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["compare"]:
            compare_command(arguments[1:])
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
Networks are built by {", ".join(f"continuum.{name}" for name in BUILDERS)}, or a function of your own decorated with
continuum.models.builder."""


def _with_network(arguments: list[str]) -> list[str]:
    """The arguments with the network they leave open: a small ODE-Net to fit, or what the checkpoint to evaluate describes.

    Not a default of the parser, because jsonargparse would carry its arguments over to whatever network is chosen instead.
    """
    stated = any(a.split("=")[0].startswith(("-c", "--config", "--model.network", "--print_")) for a in arguments)
    if not arguments or stated or "--help" in arguments or "-h" in arguments:
        return arguments
    path = _value(arguments, "--ckpt_path")
    if arguments[0] == "fit" and path is None:
        small = {"model.network": _class("continuum.odenet", {"width": 16, "downsample": False}), "model.learning_rate": 0.3}
        if not any(a.startswith("--data") for a in arguments):
            small["data"] = _class("continuum.training.Digits", {"batch_size": 32})
        return _insert(arguments, small)
    if arguments[0] not in EVALUATIONS or path is None or not Path(path).is_file():
        return arguments
    description = read(path)[KEY]
    network = {**description["arguments"], "solver": description["solvers"][0]}
    found = {"model.network": _class(f"continuum.{description['builder']}", network)}
    if "data" in description and _value(arguments, "--data") is None:
        data = dict(description["data"]["arguments"])
        found["seed_everything"] = data.pop("seed", 0)
        found["data"] = _class(f"continuum.training.{description['data']['class']}", data)
    return _insert(arguments, found)


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


DEFAULT_SOLVERS = (
    "euler:h=1",
    "euler:h=0.5",
    "euler:h=0.25",
    "midpoint:h=0.5",
    "rk4:h=1",
    "rk4:h=0.25",
    "dopri5:rtol=1e-3,atol=1e-3",
    "dopri5:rtol=1e-5,atol=1e-5",
)


def compare_parser() -> Parser:
    parser = Parser(
        prog="continuum compare",
        description="Table one set of weights under many solvers: cost, accuracy, and distance from the solver of training.",
    )
    parser.add_argument("checkpoint", help="a file of continuum.save, or a checkpoint of `continuum fit`")
    parser.add_argument(
        "--solver",
        action="append",
        metavar="NAME:KEY=VALUE,...",
        help="a solver to run, such as rk4:h=0.5 or dopri5:rtol=1e-3,atol=1e-3; may be repeated "
        f"(default: {', '.join(DEFAULT_SOLVERS)})",
    )
    parser.add_subclass_arguments(
        ImageData, "data", required=False, help="the images to compare on (default: the test set of the training's data)"
    )
    parser.add_argument("--images", type=PositiveInt, help="use so many test images, chosen by the data's seed (default: all)")
    parser.add_argument("--batch_size", type=PositiveInt, help="images a batch; an adaptive solver shares its steps within one")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--out", help="folder for the table and pictures (default: compare/ beside the checkpoint)")
    return parser


def compare_command(arguments: list[str]) -> None:
    """`continuum compare`: rows are printed as they come, then written as CSV, JSON and pictures."""
    parser = compare_parser()
    options = parser.parse_args(arguments)
    try:
        solvers = [parse(text) for text in options.solver or DEFAULT_SOLVERS]
    except ValueError as error:
        parser.error(str(error))
    content = read(options.checkpoint)
    network = restore(content, options.checkpoint)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here: leave --device out, or give cpu")
    for solver in solvers:
        try:
            network.with_solver(solver)
        except (TypeError, ValueError) as error:
            parser.error(f"--solver {solver} does not fit this network: {error}")
    data = parser.instantiate_classes(options)["data"] or _described_data(content, options.checkpoint)
    if options.batch_size:
        data.batch_size = options.batch_size
    data.prepare_data()
    data.setup("test")
    batches = list(data.test_batches(options.images))
    rows = []
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), transient=True) as progress:
        task = progress.add_task("solvers", total=len(solvers) + 1)
        for row in compare(network, batches, solvers, device):
            rows.append(row)
            progress.advance(task)
    Console(width=None if sys.stdout.isatty() else 160).print(_table(rows))
    for row in rows:
        if row.error:
            print(f"{row.solver} failed: {row.error}")
    facts = {
        "checkpoint": str(options.checkpoint),
        "data": type(data).__name__,
        "images": sum(len(labels) for _, labels in batches),
        "batch_size": data.batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    out = Path(options.out) if options.out else Path(options.checkpoint).parent / "compare"
    write_csv(rows, out / "compare.csv")
    write_json(rows, facts, out / "compare.json")
    draw_comparison(rows, out / "compare.png")
    steps = draw_steps(rows, out / "steps.png")
    print(f"table:    {out / 'compare.csv'}, {out / 'compare.json'}")
    print(f"pictures: {out / 'compare.png'}" + (f", {out / 'steps.png'}" if steps else ""))


def _described_data(content: dict[str, Any], path: str) -> ImageData:
    stated = content[KEY].get("data")
    if stated is None:
        raise CheckpointError(f"{path} does not say which data it was trained on: name them, for example --data Digits")
    try:
        return getattr(continuum.training, stated["class"])(**stated["arguments"])
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} names data that cannot be built ({error}): give --data") from None


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="one set of weights, many solvers (the first row is the solver of training)")
    headings = (
        "solver",
        "evaluations",
        "accepted",
        "rejected",
        "accuracy %",
        "loss",
        "agreement %",
        "logit diff.",
        "ms/image",
        "MiB",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "solver" else "right", no_wrap=heading == "solver")
    for row in rows:
        if row.error:
            table.add_row(row.solver, "failed")
            continue
        table.add_row(
            row.solver,
            f"{row.evaluations:.1f}",
            f"{row.accepted:.1f}",
            f"{row.rejected:.1f}",
            f"{100 * row.accuracy:.2f}",
            f"{row.loss:.4f}",
            f"{100 * row.agreement:.2f}",
            f"{row.logit_difference:.2e}",
            f"{row.milliseconds:.3f}",
            f"{row.memory:.1f}",
        )
    return table


if __name__ == "__main__":
    main()
