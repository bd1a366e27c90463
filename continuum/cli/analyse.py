"""`continuum analyse`: what a trained network is as a differential equation, as a page and its numbers."""

from pathlib import Path

from jsonargparse.typing import PositiveInt

from continuum.analysis.page import write_html, write_json
from continuum.analysis.report import Sample, report
from continuum.cli.checkpoints import opened, reading_parser
from continuum.cli.inputs import images_of
from continuum.cli.parser import Parser, chosen_device, device_name
from continuum.training import ImageData


def analyse_parser() -> Parser:
    parser = reading_parser("analyse")
    parser.add_argument("checkpoint", help="a file of continuum.save, or a checkpoint of `continuum fit`")
    parser.add_subclass_arguments(
        ImageData, "data", required=False, help="the images to analyse on (default: the test set of the training's data)"
    )
    parser.add_argument("--images", type=PositiveInt, default=64, help="use so many test images (default: 64)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--out", help="folder for the report (default: analyse/ beside the checkpoint)")
    return parser


def analyse_command(arguments: list[str]) -> None:
    """`continuum analyse`: sections are named as they are done or left out, then written as report.html and report.json."""
    parser = analyse_parser()
    options = parser.parse_args(arguments)
    content, network = opened(options.checkpoint, options.builder)
    if not network.flows:
        parser.error(f"{options.checkpoint} holds a network without a flow: there is no equation to analyse")
    device = chosen_device(parser, options.device)
    found = images_of(parser, options, content, network, options.images, batch_size=options.images)
    images, labels = found.batches[0]
    facts = {
        "checkpoint": str(options.checkpoint),
        "network": content["continuum"]["builder"],
        "solvers": ", ".join(sorted({str(flow.solver) for flow in network.flows})),
        "data": found.name,
        "images": len(images),
        "device": device_name(device),
    }
    sections = []
    for section in report(network.to(device), Sample(images.to(device), labels.to(device)), content):
        print(f"{section.title}: {'done' if section.rows else section.summary}", flush=True)
        sections.append(section)
    out = Path(options.out) if options.out else Path(options.checkpoint).parent / "analyse"
    write_html(facts, sections, out / "report.html")
    write_json(facts, sections, out / "report.json")
    print(f"report:  {out / 'report.html'}\nnumbers: {out / 'report.json'}")
