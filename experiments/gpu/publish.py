"""Tables and figures of whatever has been measured, by card: in README.md here, and in docs/claims.md beside those of a CPU."""

from collections.abc import Sequence
from pathlib import Path

from continuum.analysis.plots import plot
from experiments.common import facts, publish
from experiments.gpu.jobs import Part
from experiments.gpu.results import read

FOLDER = Path(__file__).resolve().parent
DOCS = FOLDER.parents[1] / "docs"
CLAIMS = ("momentum", "noise", "infinite depth", "fashion")
"""The parts that docs/claims.md has a place for."""


def publish_all(parts: Sequence[Part], out: Path, published: bool) -> None:
    """Print all that is in the folder of the results; where it is the repository's, write it into its pages."""
    shown = {part.name: tables(part, out, published) for part in parts}
    everything = "\n\n".join(f"### {name}\n\n{text}" for name, text in shown.items() if text)
    print(everything or "nothing has been measured yet")
    if not published or not everything:
        return
    publish(FOLDER / "README.md", "queue", everything)
    for name in CLAIMS:
        if shown[name]:
            publish(DOCS / "claims.md", f"gpu {name}", shown[name].replace("../../docs/", ""))


def tables(part: Part, out: Path, published: bool) -> str:
    """The tables of a part, a card each, with what failed; nothing where nothing is known."""
    texts = []
    for path in sorted(out.glob(f"*/{part.name}.json")):
        try:
            content = read(path)
        except ValueError as error:
            print(f"{path} is damaged ({error}), and not shown")
            continue
        rows = {job.name: content["rows"][job.name] for job in part.jobs if job.name in content["rows"]}
        rows |= {name: row for name, row in content["rows"].items() if name not in rows}
        text = [part.show(rows)] if rows else []
        text += [f"{name} failed: {error}" for name, error in content["errors"].items()]
        figure = f"gpu_{part.name.replace(' ', '_')}_{path.parent.name}.png"
        if rows and (panels := part.figure(rows)):
            plot(panels, DOCS / "claims" / figure if published else path.with_suffix(".png"))
            text += [f"![{part.name}, measured on a GPU](../../docs/claims/{figure})"] if published else []
        if text:
            texts.append("\n\n".join([*text, f"{facts(content['machine'])}."]))
    return "\n\n".join(texts)
