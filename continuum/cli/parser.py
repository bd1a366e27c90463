"""The parser of every subcommand: its errors are one line."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import yaml
from pytorch_lightning.cli import LightningArgumentParser


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
