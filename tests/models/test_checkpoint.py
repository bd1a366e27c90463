"""Networks in files: what is read is what was written, or one line says why not."""

import contextlib
import random
import subprocess
import sys
import zipfile

import pytest
import torch
from files import DiskFullError, Malicious, failing
from problems import FLOAT64
from torch import nn

from continuum import MLP, RK4, Adaptive, CheckpointError, Euler, FixedStep, Flow, Network, load, save
from continuum.convert import from_checkpoint, to_checkpoint
from continuum.models import Augment, builder
from continuum.schemes import AdamsBashforth
from continuum.zoo import lm_resnet, mlp, odenet, preresnet, resnet

NETWORKS = {
    "preresnet": (lambda: preresnet(14, width=4, num_classes=3), (2, 3, 8, 8)),
    "preresnet of text": (lambda: preresnet(depth=20, width=4, solver="rk4:h=0.5"), (2, 3, 8, 8)),
    "preresnet of objects": (lambda: preresnet(14, width=4, solver=FixedStep(RK4(), h=1 / 3)), (2, 3, 8, 8)),
    "lm_resnet": (lambda: lm_resnet(14, width=4), (2, 3, 8, 8)),
    "odenet": (lambda: odenet(width=4, solver=Adaptive("bosh3", rtol=1 / 3, atol=1e-2, first_step=0.1)), (2, 1, 28, 28)),
    "three stages": (lambda: odenet(3, width=4, in_channels=3, downsample=False), (2, 3, 16, 16)),
    "mlp": (lambda: mlp(hidden=8, augment=1, solver=FixedStep(AdamsBashforth(3), h=1 / 7)), (5, 2)),
    "another solver": (lambda: preresnet(14, width=4).with_solver("dopri5:rtol=1e-2,atol=1e-2"), (2, 3, 8, 8)),
}
EITHER = pytest.mark.parametrize("read", [load, from_checkpoint])
"""A file of ours, or one of published weights."""
BYTES = [b"", b"hello", b"\x80\x02}q\x00.", b"PK\x03\x04", random.Random(0).randbytes(500)]
CONTENTS = [{}, [1], torch.zeros(2), {"state_dict": {}}, {"continuum": 3}, {"continuum": {}}]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "network.pt"


def assert_same(network, loaded, x):
    assert list(network.state_dict()) == list(loaded.state_dict())
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in network.state_dict().items())
    assert [flow.solver for flow in loaded.flows] == [flow.solver for flow in network.flows]
    assert [flow.depth for flow in loaded.flows] == [flow.depth for flow in network.flows]
    assert not any(module.training for module in loaded.modules())
    with torch.no_grad():
        assert torch.equal(network.eval()(x), loaded(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_comes_back_from_its_file(name, path):
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    network, x = build(), torch.randn(shape)
    network.train()(x)  # so that the running statistics are not those of a new network
    save(network, path)
    loaded = load(path)
    assert_same(network, loaded, x)
    save(loaded, path)
    assert_same(network, load(str(path)), x)


@pytest.mark.parametrize("make", [lambda: preresnet(14, width=4), lambda: lm_resnet(14, width=4).refine(2), lambda: mlp()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_keep_their_type(path, make, dtype):
    network = make()
    for tensor in network.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = torch.rand_like(tensor.data, dtype=torch.float64)
    network.to(dtype)
    network.head.float()  # parts may differ
    save(network, path)
    loaded = load(path)
    found, expected = loaded.state_dict(), network.state_dict()
    assert all(found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_flows_keep_solvers_of_their_own(path):
    torch.manual_seed(0)
    network, x = odenet(3, width=4, in_channels=3), torch.randn(2, 3, 16, 16)
    network.stages[2] = network.stages[2].with_solver("rk4:h=0.25")
    network.stages[4] = network.stages[4].with_solver(FixedStep(Euler(), grid=(0.0, 1 / 3, 1.0)))
    save(network, path)
    assert_same(network, load(path), x)


def test_frozen_flows_come_back(path):
    torch.manual_seed(0)
    network, x = mlp(hidden=8), torch.randn(5, 2)
    network.stages[0] = network.stages[0].frozen(x)
    save(network, path)
    assert isinstance(load(path).flows[0].solver, FixedStep)
    assert_same(network, load(path), x)


def test_the_file_is_plain_data(path):
    save(mlp(), path)
    content = torch.load(path, weights_only=True)
    assert content["continuum"]["builder"] == "mlp"
    assert content["state_dict"].keys() == mlp().state_dict().keys()


def test_a_folder_is_made_and_nothing_else_left_behind(tmp_path):
    save(mlp(), tmp_path / "new" / "deep" / "network.pt")
    assert [p.name for p in (tmp_path / "new" / "deep").iterdir()] == ["network.pt"]


@pytest.mark.parametrize("error", [DiskFullError, KeyboardInterrupt])
@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize(("write", "network"), [(save, mlp()), (to_checkpoint, resnet(14, width=4))])
def test_a_failure_while_writing_leaves_the_old_file(path, monkeypatch, existed, error, write, network):
    if existed:
        path.write_bytes(b"before")
    monkeypatch.setattr(torch, "save", failing(error))
    with pytest.raises(error):
        write(network, path)
    assert [p.name for p in path.parent.iterdir()] == (["network.pt"] if existed else [])
    assert not existed or path.read_bytes() == b"before"


# What cannot be read


def refusal(path, read=load, **options):
    with pytest.raises(CheckpointError) as caught:
        read(path, **options)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < 600
    return text


@EITHER
def test_a_missing_file(tmp_path, read):
    for missing in (tmp_path / "nothing.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match="no checkpoint at") as caught:
            read(missing)
        assert "\n" not in str(caught.value)


@EITHER
@pytest.mark.parametrize("content", BYTES, ids=range(5))
def test_files_of_something_else(path, content, read):
    path.write_bytes(content)
    refusal(path, read)


@pytest.mark.parametrize("content", CONTENTS, ids=range(6))
def test_torch_files_that_are_not_ours(path, content):
    torch.save(content, path)
    refusal(path)


@EITHER
def test_an_archive_that_torch_did_not_write(path, read):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refusal(path, read)


@pytest.mark.parametrize("kind", ["ours", "published", "published, legacy"])
def test_a_file_cut_anywhere(path, kind):
    if kind == "ours":
        save(mlp(hidden=8), path)
    else:
        torch.save(resnet(14, width=4).state_dict(), path, _use_new_zipfile_serialization="legacy" not in kind)
    whole = path.read_bytes()
    for end in sorted({*range(0, len(whole), len(whole) // 60), *range(len(whole) - 30, len(whole))}):
        path.write_bytes(whole[:end])
        refusal(path, load if kind == "ours" else from_checkpoint)


@pytest.mark.parametrize("position", [k / 10 for k in range(10)])
def test_a_file_with_a_hole(path, position):
    save(mlp(hidden=8), path)
    whole = path.read_bytes()
    start = int(position * len(whole))
    path.write_bytes(whole[:start] + bytes(64) + whole[start + 64 :])
    with contextlib.suppress(CheckpointError):  # no error where the hole falls on padding or on numbers, which nothing guards
        load(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["alone", "beside", "inside"])
def test_pickled_code_is_not_executed(path, tmp_path, place, zipped):
    save(mlp(), path)
    content = torch.load(path)
    code = Malicious(tmp_path / "executed")
    if place == "inside":
        content["continuum"]["arguments"]["hidden"] = code
    torch.save(code if place == "alone" else {**content, "more": code}, path, _use_new_zipfile_serialization=zipped)
    refusal(path)
    assert not (tmp_path / "executed").exists()


def changed(path, **changes):
    content = torch.load(path)
    content["continuum"].update(changes)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"builder": "densenet"}, ["'densenet'", "not in the zoo", "--builder MODULE.densenet"]),
        ({"builder": None}, ["builder"]),
        ({"builder": ["mlp"]}, ["builder"]),
        ({"arguments": {"layers": 3}}, ["layers"]),
        ({"arguments": {"hidden": "wide"}}, ["mlp"]),
        ({"arguments": None}, ["mlp"]),
        ({"arguments": {"hidden": -3}}, ["mlp"]),
        ({"solvers": ["dopri6"]}, ["dopri6", "dopri5"]),
        ({"solvers": []}, ["0 solvers", "1 flow"]),
        ({"solvers": ["linear_two_step"]}, ["Momentum"]),
        ({"solvers": ["euler:h=2"]}, ["does not divide"]),
        ({"solvers": [None]}, ["mlp"]),
        ({"format": 99}, ["99"]),
    ],
    ids=str,
)
def test_descriptions_that_do_not_fit(path, changes, words):
    save(mlp(), path)
    changed(path, **changes)
    text = refusal(path)
    for word in words:
        assert word in text


def test_a_description_that_lacks_something(path):
    for key in ("builder", "arguments", "solvers"):
        save(mlp(), path)
        content = torch.load(path)
        del content["continuum"][key]
        torch.save(content, path)
        refusal(path)


def test_weights_of_another_network(path):
    save(mlp(hidden=8), path)
    changed(path, arguments={"hidden": 16})
    assert "weights" in refusal(path)
    content = torch.load(path)
    for wrong in ({"continuum": content["continuum"]}, {**content, "state_dict": [1, 2]}):
        torch.save(wrong, path)
        refusal(path)


# Networks of one's own
@builder
def own(hidden: int = 4, scales: tuple[float, ...] = (1.0, 2.0), field: object = None) -> Network:
    field = field or MLP(3, hidden).to(FLOAT64)
    return Network(Augment(1), [Flow(field, "euler", depth=1)], nn.Linear(3, len(scales)).to(FLOAT64))


@builder
def other_own(hidden: int = 4) -> Network:
    return own(hidden)


def test_a_network_of_ones_own_needs_its_builder(path):
    torch.manual_seed(0)
    network, x = own(6), torch.randn(2, 2, dtype=FLOAT64)
    save(network, path)
    name = f"{__name__}.own"
    text = refusal(path)
    assert all(words in text for words in (repr(name), f"--builder {name}", "pass its builder", "builder=own"))
    assert_same(network, load(path, builder=own), x)
    assert "weights" in refusal(path, builder=lambda **arguments: mlp())
    for other in (mlp, other_own):  # the first of them is the zoo's, whose name has no module
        text = refusal(path, builder=other)
        assert all(repr(words) in text for words in (name, other.__builder__))
    for moved in ("own", "__main__.own"):  # a file of before, or of a script, does not say the module
        changed(path, builder=moved)
        assert "--builder MODULE.own" in refusal(path)
        assert_same(network, load(path, builder=own), x)
    changed(path, builder="elsewhere.own")
    assert "lambda" in refusal(path, builder=own)
    changed(path, builder="elsewhere.mlp")
    assert "'elsewhere.mlp', not by 'mlp'" in refusal(path, builder=mlp)
    changed(path, builder="elsewhere.own")
    assert_same(network, load(path, builder=lambda **arguments: own(**arguments)), x)
    changed(path, builder="own\n\x1b[2J" * 1000)
    for stand_in in (None, lambda **arguments: mlp()):  # the text of a file is shown as one line, whoever builds
        assert "\x1b" not in refusal(path, builder=stand_in)


def test_networks_that_a_file_cannot_describe(path):
    class Mine(Euler):
        pass

    flow = Flow(MLP(3, 4), "euler", depth=1)
    kinds = [(x, TypeError, f"holds a Network, .* not a {type(x).__name__}") for x in (flow, nn.Linear(2, 2), {}, None)]
    for network, error, message in [
        *kinds,
        (Network(Augment(1), [flow], nn.Linear(3, 2)), ValueError, "builder"),
        (own(field=MLP(3, 4)), TypeError, "argument field is a MLP"),
        (mlp(solver=FixedStep(Mine())), TypeError, "no textual form"),
    ]:
        with pytest.raises(error, match=message):
            save(network, path)
    assert not list(path.parent.iterdir())


WITHOUT_EXTRAS = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {extras}:
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import torch, continuum
network = continuum.zoo.odenet(width=4)
continuum.save(network, {path!r})
print(tuple(continuum.load({path!r})(torch.zeros(1, 1, 28, 28)).shape))
"""


def test_the_library_needs_torch_only(path):
    """And torchdiffeq and torchsde for the solvers that are theirs."""
    extras = {"pytorch_lightning", "lightning", "torchvision", "torchmetrics", "matplotlib", "sklearn", "rich", "jsonargparse"}
    extras |= {"torchdiffeq", "torchsde"}
    code = WITHOUT_EXTRAS.format(extras=extras, path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(1, 10)", done.stderr
