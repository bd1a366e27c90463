"""The report as one self-contained HTML page, and as JSON: it refers to nothing outside itself and runs no scripts."""

import html
import os
from collections.abc import Mapping, Sequence
from typing import Any

from continuum import files
from continuum.analysis.plots import svg
from continuum.analysis.report import Section

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid #d0d7de; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid #e4e8ec; }
th:first-child, td:first-child { text-align: left; } th { vertical-align: bottom; }
dt { font-weight: 600; float: left; clear: left; width: 8rem; } dd { margin-left: 8.5rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; } .left-out { color: #57606a; }
"""


def write_html(facts: Mapping[str, Any], sections: Sequence[Section], path: str | os.PathLike[str]) -> None:
    """The page, whole; tables scroll on narrow screens, figures are inside it."""
    body = "\n".join([_facts(facts), *map(_section, sections)])
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(str(facts['network']))} as a differential equation</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
    files.write_text(page, path)


def write_json(facts: Mapping[str, Any], sections: Sequence[Section], path: str | os.PathLike[str]) -> None:
    """All numbers behind the page; those that do not exist are null."""
    content = {**facts, "sections": [{"title": s.title, "summary": s.summary, "numbers": list(s.numbers)} for s in sections]}
    files.write_json(content, path)


def _facts(facts: Mapping[str, Any]) -> str:
    items = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in facts.items())
    return f"<h1>{html.escape(str(facts['network']))} as a differential equation</h1>\n<dl>{items}</dl>"


def _section(section: Section) -> str:
    left_out = ' class="left-out"' if section.summary.startswith("Left out") else ""
    parts = [f"<h2>{html.escape(section.title)}</h2>", f"<p{left_out}>{html.escape(section.summary)}</p>"]
    if section.rows:
        head = "".join(f'<th scope="col">{html.escape(heading)}</th>' for heading in section.headings)
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>\n" for row in section.rows)
        parts.append(f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>')
    # Three panels side by side are as many as can be read.
    for first in range(0, len(section.panels), 3):
        panels = section.panels[first : first + 3]
        names = ", ".join(panel.title for panel in panels)
        parts.append(f'<figure role="img" aria-label="{html.escape(names)}">{svg(panels)}</figure>')
    return "\n".join(parts)
