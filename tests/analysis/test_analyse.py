"""`continuum analyse`: a page that needs nothing but itself, its numbers, and what it says where something does not apply."""

import copy
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from networks import build

import continuum
from continuum.analysis import convergence
from continuum.analysis.page import write_html, write_json
from continuum.analysis.report import Sample, Section, entered, momentum_section, report
from continuum.cli import main

TITLES = ["Is it an equation?", "Flows", "Layers", "Order of convergence", "Deep limit", "Modified equation and stability"]
TITLES += ["Momentum", "Dynamics", "Cost of a tolerance", "Gradients"]


def analysed(network, folder, *arguments):
    """The page and the numbers of a network that reads the digits."""
    continuum.save(network, folder / "network.pt")
    main(["analyse", str(folder / "network.pt"), "--data", "Digits", "--images", "4", "--out", str(folder / "out"), *arguments])
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    return page, json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))


class References(HTMLParser):
    """Everything in a page that a browser would fetch, and whether every element is closed."""

    VOID = ("meta", "link", "br", "hr", "img")

    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data", "action")]
        assert tag != "script"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_alone(page):
    parser = References()
    parser.feed(page)
    assert not parser.open
    outside = [value for value in parser.found if not value.startswith(("#", "data:"))]
    assert not outside
    assert not re.search(r"@import|url\((?!#)", page)


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """References that are not too dear where the fields have kinks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convergence, "TOLERANCES", (1e-4,))
        yield


@pytest.fixture(scope="module")
def lm_network():
    torch.manual_seed(0)
    return continuum.zoo.lm_resnet(20, in_channels=1, width=4).eval()


@pytest.fixture(scope="module")
def folder(lm_network, tmp_path_factory):
    """Where the report of the network with memory is."""
    folder = tmp_path_factory.mktemp("report")
    analysed(lm_network, folder)
    return folder / "out"


def test_the_report_of_a_network_with_memory(folder, lm_network):
    page = (folder / "report.html").read_text(encoding="utf-8")
    numbers = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    check_alone(page)
    assert [section["title"] for section in numbers["sections"]] == TITLES
    left_out = [section["title"] for section in numbers["sections"] if section["summary"].startswith("Left out")]
    assert left_out == ["Layers", "Deep limit"], "its steps are equal, its first layers have no k and are of another kind"
    k = [row["k"] for row in numbers["sections"][6]["numbers"]]
    assert k == [friction.k for friction in continuum.analysis.momentum.frictions(lm_network)]
    assert page.count("<svg") == 5
    assert all(f"<h2>{title}</h2>" in page for title in TITLES)


def test_what_a_network_does_not_have_is_left_out_and_said(tmp_path, capsys):
    torch.manual_seed(0)
    page, numbers = analysed(continuum.zoo.odenet(width=4, downsample=False), tmp_path)
    check_alone(page)
    summaries = {section["title"]: section["summary"] for section in numbers["sections"]}
    assert summaries["Momentum"].startswith("Left out: no layer of this network has a k")
    assert summaries["Deep limit"].startswith("Left out: no flow has weights that vary with depth")
    assert summaries["Modified equation and stability"].startswith("Left out: no flow has fixed steps")
    assert not summaries["Gradients"].startswith("Left out")
    assert page.count('class="left-out"') == 5
    printed = capsys.readouterr().out
    assert "report.html" in printed
    assert "Momentum: Left out" in printed


@pytest.mark.parametrize("name", ["stochastic_depth_resnet", "hamiltonian", "polynet"])
def test_other_networks_are_analysed_as_far_as_it_goes(name):
    network, _ = build(name)
    before = copy.deepcopy(dict(network.eval().state_dict()))
    sections = list(report(network, Sample(torch.randn(2, 3, 8, 8), torch.arange(2)), {}))
    assert [section.title for section in sections] == TITLES
    assert sections[0].rows
    torch.testing.assert_close(dict(network.state_dict()), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_the_momentum_of_training_is_shown_where_the_checkpoint_has_it(lm_network):
    history = {"flows": ["stages.0"] * 6, "layers": list(range(6)), "epochs": [0, 1], "k": [[0.0] * 6, [-0.1] * 6]}
    momentum = momentum_section(lm_network, {"callbacks": {"KeepFriction": history}})
    assert len(momentum.panels) == 2
    assert momentum.panels[1].lines[0].y == [0.0, -0.1]


def test_every_flow_is_seen_with_the_state_that_reaches_it(lm_network):
    entries = entered(lm_network, torch.randn(2, 1, 8, 8))
    assert [entry.name for entry in entries] == ["stages.0", "stages.2", "stages.4"]
    for entry in entries:
        assert entry.flow(entry.x, entry.memory).shape == entry.x.shape


def test_numbers_that_do_not_exist_are_null(tmp_path):
    section = Section("title", "a < b & c", ["x"], [["<script>"]], (), [{"x": float("nan"), "y": [float("inf"), 1.0]}])
    write_json({"network": "n"}, [section], tmp_path / "report.json")
    write_html({"network": "<n>"}, [section], tmp_path / "report.html")
    assert json.loads((tmp_path / "report.json").read_text())["sections"][0]["numbers"] == [{"x": None, "y": [None, 1.0]}]
    page = (tmp_path / "report.html").read_text()
    check_alone(page)
    assert "a &lt; b &amp; c" in page


@pytest.mark.usefixtures("command_line")
def test_a_training_that_was_cut_short():
    network = ("--model.network=continuum.zoo.odenet", "--model.network.width=4", "--model.network.downsample=false")
    main(
        [
            "fit",
            *network,
            "--trainer.max_steps=3",
            "--trainer.accelerator=cpu",
            "--trainer.logger=false",
            "--data.train_size=64",
        ]
    )
    checkpoint = next(Path().rglob("last.ckpt"))
    main(["analyse", str(checkpoint), "--images", "4"])
    assert (checkpoint.parent / "analyse" / "report.html").is_file()


def test_a_network_without_flows_is_refused(tmp_path, refused):
    continuum.save(continuum.zoo.fractalnet(columns=2, widths=(4,), dropout=(0.0,)), tmp_path / "network.pt")
    assert "without a flow" in refused("analyse", tmp_path / "network.pt")


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the PATH to open the report with")
def test_a_browser_opens_it_without_complaint(tmp_path, folder):
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom")
    command = [str(BROWSER), *options, f"--user-data-dir={tmp_path / 'profile'}", (folder / "report.html").as_uri()]
    opened = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "<h2>Momentum</h2>" in opened.stdout
    assert "CONSOLE" not in opened.stderr
