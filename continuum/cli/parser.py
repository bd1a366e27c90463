"""The parser of every subcommand, whose errors are one line; what the subcommands are; devices."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import torch
import yaml

from continuum.models.archive import CheckpointError, one_line

LIGHTNING = {
    "fit": "Train a network: by default a small ODE-Net on the digits.",
    "validate": "Loss and accuracy on the images that were held out.",
    "test": "Loss and accuracy on the test images.",
    "predict": "Write the class and all probabilities of each test image to predictions.csv.",
}
"""The subcommands that Lightning runs, and what each does."""

COMMANDS = {
    "analyse": "Report on a trained network as a differential equation: convergence, momentum, dynamics, cost, gradients.",
    "bench": "Measure what a solve costs beyond its evaluations, here and in other libraries.",
    "compare": "Table one set of weights under many solvers: cost, accuracy, and distance from the solver of training.",
    "convert": "Turn a published ResNet checkpoint into a continuum checkpoint; or that into a state dict or a program.",
    "models": "List the networks of the zoo, and published configurations with their numbers of parameters.",
    "verify": "Certify that networks are the published discrete ones, to the bit, and that schemes have their orders.",
    "weak": "Measure how far a network with noise is from its SDE: the noise of its layers, and weak errors.",
}
"""The subcommands that run without Lightning, each the function NAME_command of its module."""


OPTIONAL = re.compile(
    r"(?:- Expected a path but \S+ either not accessible or invalid - )?Does not validate against any of the Union subtypes "
    r"Subtypes: .*? Errors: - (.*?) - Expected a <class 'NoneType'> Given value type: .*"
)
"""What jsonargparse says of a value that may be left out, around what is wrong with it."""


class Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are the message alone, with the line of an unknown key in a config file."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse is trying out the types of a union
            super().error(message, ex)
        text = OPTIONAL.sub(r"\1", " ".join(str(message).split()))
        if "class_path='torch.optim.Optimizer'" in text:  # in the place of a class that is not named
            text += "; name the class before its arguments, as --model.optimizer Nesterov"
        unknown = re.findall(r"(?<!Parser )(?:key|option) ['\"]([\w.]+)['\"]", text, re.IGNORECASE)
        for key in unknown if re.search("accept|expected", text) else ():
            text += "".join(f"; {key!r} stands in {where}" for where in _lines(key.split(".")[-1], sys.argv))
        self.exit(2, f"continuum: {text}\n")


def parser_of(name: str) -> Parser:
    """The parser of a subcommand that runs without Lightning."""
    return Parser(prog=f"continuum {name}", description=COMMANDS[name])


def chosen_device(parser: Parser, choice: str | None) -> torch.device:
    """The device that `--device` names, by default a GPU where there is one; without the one it names, the command ends."""
    device = torch.device(choice or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here: leave --device out, or give cpu")
    return device


def device_name(device: torch.device) -> str:
    """The device as a table's facts state it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _lines(key: str, arguments: Iterable[str]) -> list[str]:
    """Where `key` is used in the YAML files among the arguments, as file:line."""
    found = []
    for argument in arguments:
        path = Path(argument.partition("=")[2] or argument)
        if path.suffix in (".yaml", ".yml") and path.is_file():
            found += [f"{path}:{line}" for line in _key_lines(_nodes(path.read_text(encoding="utf-8")), key)]
    return found


def _key_lines(node: yaml.Node | None, key: str) -> list[int]:
    if isinstance(node, yaml.MappingNode):
        here = [name.start_mark.line + 1 for name, _ in node.value if name.value == key]
        return here + [line for _, value in node.value for line in _key_lines(value, key)]
    if isinstance(node, yaml.SequenceNode):
        return [line for item in node.value for line in _key_lines(item, key)]
    return []


MOST_NODES = 100_000
"""More values than any configuration has; aliases of aliases reach as many in ten lines."""


def bounded_yaml(text: str) -> Any:
    """What a configuration says, as jsonargparse reads it, wherever it comes from.

    Raises:
        yaml.YAMLError: no YAML, values of no meaning, an alias inside of what it stands for, or for too much.
    """
    try:
        _nodes(text)
        return read_yaml(text)
    except yaml.YAMLError:
        raise
    except Exception as error:  # values of no meaning fail anywhere in the reader
        raise yaml.YAMLError(one_line(error)) from None


read_yaml = jsonargparse.get_loader("yaml")
jsonargparse.set_loader("yaml", bounded_yaml, (yaml.YAMLError,))


def check_yaml(path: str) -> None:
    """Look at a configuration before jsonargparse does, whose errors do not name it.

    Raises:
        CheckpointError: it is none.
    """
    try:
        bounded_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} is no configuration: {one_line(error)}") from None


def _nodes(text: str) -> yaml.Node | None:
    """What YAML consists of, if it is not too much."""
    node = yaml.compose(text)
    _count(node, 0, ())
    return node


def _count(node: yaml.Node | None, before: int, above: tuple[int, ...]) -> int:
    """How many nodes there are with this one and all that it stands for, aliases as often as they are used."""
    if id(node) in above:
        raise ValueError("an alias stands inside of what it is an alias of")
    if before > MOST_NODES:
        raise ValueError(f"its aliases stand for more than {MOST_NODES:,} values")
    count = before + 1
    match node:
        case yaml.MappingNode():
            below = [part for pair in node.value for part in pair]
        case yaml.SequenceNode():
            below = node.value
        case yaml.ScalarNode() if "*" in node.value:  # a text, in which jsonargparse looks for values once more
            below = [_composed(node.value)]
        case _:
            below = []
    for part in below:
        count = _count(part, count, (*above, id(node)))
    return count


def _composed(text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text)
    except yaml.YAMLError:
        return None
