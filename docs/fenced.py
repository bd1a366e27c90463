"""For the reference pages: examples and tables in docstrings as Markdown knows them, >>> lines in a fence of code."""

import ast
import re

import griffe


class Fenced(griffe.Extension):
    """Rewrites each docstring before mkdocstrings parses it; the source stays as it is."""

    def on_instance(
        self,
        *,
        node: ast.AST | griffe.ObjectNode,
        obj: griffe.Object,
        agent: griffe.Visitor | griffe.Inspector,
        **kwargs: object,
    ) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ruled(escaped(fenced(obj.docstring.value)))


def fenced(text: str) -> str:
    """Put every example, from its first >>> to the next empty line, into a fence.

    >>> fenced("An example:" + chr(10) + chr(62) * 3 + " 1 + 1" + chr(10) + "2").count("```")
    2
    """
    return re.sub(r"(?m)^(>>> .*(?:\n(?!\s*$).+)*)", r"\n```pycon\n\1\n```\n", text)


def escaped(text: str) -> str:
    """Keep neighbouring brackets, as in a table of a table, from being read as a link.

    >>> print(escaped("a[i][j]"))
    a[i]\\[j]
    """
    return re.sub(r"(?<=[\w)])\[(\w+)\]\[", r"[\1]\\[", text)


def ruled(text: str) -> str:
    """Give tables without a rule under their first row one, which Markdown needs.

    >>> ruled("| a | b |" + chr(10) + "| c | d |").splitlines()[2]
    '| --- | --- |'
    """
    lines, inside = [""], False
    for line in text.splitlines():
        opens = line.startswith("|") and not inside
        second = line.startswith("|") and inside and len(lines) > 1 and lines[-2] == ""
        if second and not re.fullmatch(r"[|\s:-]+", line):
            lines.append("| " + " | ".join(["---"] * (line.count("|") - 1)) + " |")
        lines += ["", line] if opens else [line]
        inside = line.startswith("|")
    return "\n".join(lines[1:])
