"""Certificates of networks, orders and inverses of schemes, published parameter counts, and the commands that print them."""

import ast
import copy
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torchvision
from runs import same_state
from torch import Tensor, nn

import continuum
import continuum.verify.plain
from continuum import Network
from continuum.cli import main
from continuum.cli.models import CONFIGURATIONS, build, documented, size_of, size_of_class, statistics_of
from continuum.schemes import SCHEMES as KNOWN
from continuum.schemes import ReversibleScheme
from continuum.verify.accuracy import REVERSIBLE, SCHEMES, Order, Undone, scheme_orders, undo_errors
from continuum.verify.certificate import GRADIENTS, SMALL, certify, small, some_images
from continuum.verify.plain import PLAIN, bare
from continuum.zoo import BUILDERS

REFINED = ["resnet", "preresnet scaled", "lm_resnet", "momentum_resnet", "fractal_resnet", "revnet", "midpoint from zero"]
REFINED += ["leapfrog", "continuous_resnet", "continuous_resnet constant", "odenet three stages"]
REFINED += ["stochastic_depth_resnet", "shake_shake", "stochastic_lm_resnet", "dropout_resnet", "neural_sde"]
TORCHVISION = {f"ResNet-{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)}
TORCHVISION |= {"ResNeXt-50 32x4d": "resnext50_32x4d", "wide ResNet-50-2": "wide_resnet50_2"}


# Networks and their plain loops
def test_every_builder_has_a_plain_loop_and_a_small_network() -> None:
    assert list(PLAIN) == list(BUILDERS)
    assert {name.split()[0] for name in SMALL} == set(BUILDERS)


def test_plain_loops_use_nothing_of_the_library() -> None:
    for path in Path(continuum.verify.plain.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                module = str(node.module)
                assert not module.startswith("continuum") or module.startswith("continuum.verify.plain"), path.name
                assert not module.startswith("torch.nn"), path.name
            elif isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= {"math", "torch", "torch.nn.functional"}, path.name


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_are_certified(name: str) -> None:
    network = small(name)
    before = copy.deepcopy(network)
    solvers = [str(flow.solver) for flow in network.flows]
    certificate = certify(network, some_images(network))
    assert certificate.passed, certificate
    assert certificate.network == name.split()[0]
    assert certificate.parameters == size_of(network)
    assert not certificate.place
    assert same_state(network, before), "the network itself is as it was"
    assert all(module.training for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert [str(flow.solver) for flow in network.flows] == solvers


@pytest.mark.parametrize("name", SMALL)
def test_plain_loops_name_modules_of_the_network(name: str) -> None:
    network = small(name).eval()
    tensors = {bare(key): value for key, value in network.state_dict(keep_vars=True).items()}
    assert len(tensors) == len(network.state_dict())
    arguments = {**network.blueprint.arguments, "solver": "euler:h=1"}
    layers = PLAIN[name.split()[0]](continuum.verify.plain.Weights(tensors, False), arguments, some_images(network))
    names = [layer.partition(" ")[0] for layer, _ in layers]
    assert (names[0], names[-1]) == ("stem", "head")
    assert all(network.get_submodule(layer) for layer in names)
    inside = {layer.split(".")[1] for layer in names if layer.startswith("stages.")}
    assert inside == {str(index) for index in range(len(network.stages))}


@pytest.mark.parametrize(("name", "k"), [*((name, (3,)) for name in REFINED), ("lm_resnet", (2, 2))])
def test_refined_networks_are_certified(name: str, k: tuple[int, ...]) -> None:
    network = small(name)
    for number in k:
        network = network.refine(number)
    certificate = certify(network, some_images(network))
    assert certificate.passed, certificate


SCHEMES_OF = [("resnet", "rk4:h=0.5", "euler:h=1"), ("revnet", "coupling:gradient=reversible", "coupling:h=1")]
SCHEMES_OF += [("continuous_resnet", "dopri5", "rk4:h=1"), ("continuous_resnet", "rk4:h=0.5", "rk4:h=0.5")]
SCHEMES_OF += [("odenet", "dopri5", "euler:h=1"), ("odenet", "rk4:h=0.25", "rk4:h=0.25")]
SCHEMES_OF += [("mlp", "euler:h=0.25", "euler:h=0.25")]


@pytest.mark.parametrize(("name", "solver", "certified"), SCHEMES_OF)
def test_the_certified_scheme_is_the_published_one(name: str, solver: str, certified: str) -> None:
    certificate = certify(small(name).with_solver(solver), some_images(small(name)))
    assert certificate.passed, certificate
    assert certificate.solver == certified


class Altered(nn.Module):
    """A module whose weights are a millionth larger; the name `module` of what it wraps is no part of a weight's name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs) * (1 + 2**-20)


def alter(network: Network, name: str) -> Network:
    network.set_submodule(name, Altered(network.get_submodule(name)))
    return network


@pytest.mark.parametrize(
    ("name", "module", "place"),
    [
        ("resnet", "stages.0.field.layers.1.branch.conv2", "stages.0.field.layers.1"),
        ("resnet", "stages.3.branch.conv1", "stages.3"),
        ("se_resnet", "stages.2.field.layers.0.branch.excite", "stages.2.field.layers.0"),
        ("preresnet", "stem", "stem"),
        ("wide_resnet", "stages.0.field.layers.0.module.conv2", "stages.0.field.layers.0"),
        ("lm_resnet", "stages.2.field.layers.1.field.module.conv2", "stages.2.field.layers.1"),
        ("revnet", "stages.0.field.layers.1.second.module.conv2", "stages.0.field.layers.1"),
        ("fractalnet", "stages.0.blocks.1.columns.0.0.norm", "stages.0.blocks.1"),
        ("continuous_resnet", "head.linear", "head"),
        ("odenet", "stages.0.field.conv2", "stages.0 at depth 1"),
        ("mlp in quarters", "stages.0.field.inner", "stages.0 at depth 0.25"),
    ],
)
def test_a_layer_with_other_weights_is_named(name: str, module: str, place: str) -> None:
    network = alter(small(name), module)
    certificate = certify(network, some_images(network))
    assert (certificate.passed, certificate.training, certificate.evaluation) == (False, False, False)
    assert certificate.place == place
    assert 0 < certificate.difference < 1e-3


def test_a_scheme_that_steps_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = continuum.schemes.LinearTwoStep.forth
    monkeypatch.setattr(continuum.schemes.LinearTwoStep, "forth", lambda *arguments: step(*arguments[:-1], ()))
    network = small("lm_resnet")
    certificate = certify(network, some_images(network))
    assert not certificate.training
    assert certificate.place == "stages.0.field.layers.1"


@pytest.mark.parametrize(("buffers", "place"), [(False, "norm2.running_mean"), (True, "norm1.bias")])
def test_what_only_training_shows_is_named(buffers: bool, place: str) -> None:
    """Another momentum of a norm shows in its buffers, a gradient that is cut off in the norm before."""
    network = small("resnet")
    branch = network.stages[2].field.layers[0].branch
    if buffers:
        branch.conv2.register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(),))
    else:
        branch.norm2.momentum = 0.2
    certificate = certify(network, some_images(network))
    assert (certificate.passed, certificate.training, certificate.evaluation) == (False, True, True)
    assert certificate.buffers is buffers
    assert (certificate.gradient <= GRADIENTS) is not buffers
    assert certificate.place == f"stages.2.field.layers.0.branch.{place}"
    assert certificate.difference > 1e-4


def test_numbers_that_are_none_are_no_equality() -> None:
    network = small("resnet")
    with torch.no_grad():
        network.stem.conv.weight.fill_(math.nan)
    assert not certify(network, some_images(network)).passed


def test_frozen_weights_have_no_gradient_to_compare() -> None:
    network = small("resnet").requires_grad_(False)
    certificate = certify(network, some_images(network))
    assert certificate.passed
    assert certificate.gradient == 0


def test_networks_without_a_plain_loop() -> None:
    network = small("preresnet")
    images = some_images(network)
    with pytest.raises(ValueError, match=r"changed by project: no plain loop"):
        certify(small("continuous_resnet constant").project("hat", 2), images)
    network.blueprint = None
    with pytest.raises(ValueError, match="not from the zoo"):
        certify(network, images)


# Schemes
def test_every_scheme_has_its_order() -> None:
    assert {type(scheme) for scheme in SCHEMES} == {type(scheme) for scheme in KNOWN}
    orders = list(scheme_orders())
    assert [order.scheme for order in orders] == list(SCHEMES)
    assert all(order.passed for order in orders), orders
    assert not Order(continuum.RK4(), 3.7).passed


def test_every_reversible_scheme_is_undone() -> None:
    assert {type(scheme) for scheme in REVERSIBLE} == {type(s) for s in KNOWN if isinstance(s, ReversibleScheme)}
    errors = list(undo_errors())
    assert len(errors) == 14
    assert all(undone.passed for undone in errors), errors
    assert not Undone(continuum.schemes.Coupling(), 1, torch.float32, math.nan, 1e-6).passed


# Parameters
COUNTS = {
    # Counted layer by layer, and equal to the published roundings.
    "ResNet-20": {10: 269_722, 100: 275_572},
    "ResNet-32": {10: 464_154, 100: 470_004},
    "ResNet-44": {10: 658_586, 100: 664_436},
    "ResNet-56": {10: 853_018, 100: 858_868},
    "ResNet-110": {10: 1_727_962, 100: 1_733_812},
    "ODE-Net": {10: 208_266},
}
WITHOUT_K = {
    "LM-ResNet-20": {10: 272_378},
    "LM-ResNet-32": {10: 466_810},
    "LM-ResNet-44": {10: 661_242},
    "LM-ResNet-56": {10: 855_674},
    "LM-ResNet-110": {10: 1_730_618},
    "LM-ResNet-164": {10: 1_703_674, 100: 1_726_804},
}
ROUNDED = {
    # Millions, to as many digits as are given.
    "pre-activation ResNet-110": {10: "1.7"},
    "pre-activation ResNet-164": {10: "1.7", 100: "1.73"},
    "WRN-16-8": {10: "10.96"},
    "WRN-28-10": {10: "36.48", 100: "36.54"},
    "WRN-40-4": {10: "8.95"},
    "WRN-22-8": {10: "17.16"},
    "WRN-40-10": {10: "55.84"},
    "ResNeXt-29 8x64d": {10: "34.43", 100: "34.52"},
    "ResNeXt-29 16x64d": {10: "68.16", 100: "68.25"},
    "RevNet-38": {10: "0.465", 100: "0.475"},
    "RevNet-110": {10: "1.729", 100: "1.741"},
    "Hamiltonian-74": {10: "0.430", 100: "0.440"},
    "Hamiltonian-218": {10: "1.683", 100: "1.695"},
    "MidPoint-26": {10: "0.535"},
    "MidPoint-62": {10: "1.80"},
    "ContinuousNet 2-2-2": {10: "0.27"},
    "ContinuousNet 8-8-8": {10: "0.86"},
}


def each(counts: dict) -> pytest.MarkDecorator:
    """For every name and number of classes, what is counted."""
    cases = [(name, classes, count) for name, of_classes in counts.items() for classes, count in of_classes.items()]
    return pytest.mark.parametrize(("name", "classes", "count"), cases)


BUILT = {(name, number): (builder, chosen) for name, builder, chosen, classes in CONFIGURATIONS for number in classes}


@cache
def built(name: str, classes: int) -> Network:
    builder, chosen = BUILT[name, classes]
    return build(builder, {**chosen, "num_classes": classes})


@each(COUNTS)
def test_exact_counts(name: str, classes: int, count: int) -> None:
    assert size_of(built(name, classes)) == count


@each(WITHOUT_K)
def test_counts_without_the_scalars_of_lm_networks(name: str, classes: int, count: int) -> None:
    network = built(name, classes)
    scalars = [parameter for key, parameter in network.named_parameters() if key.endswith(".k")]
    depth = int(name.split("-")[-1])
    blocks = (depth - 2) // (9 if depth == 164 else 6)
    assert len(scalars) == 3 * blocks - 3
    assert size_of(network) - len(scalars) == count
    if depth != 164:
        with torch.device("meta"):
            assert size_of(continuum.zoo.preresnet(depth, num_classes=classes)) == count


@each(ROUNDED)
def test_counts_in_millions(name: str, classes: int, count: str) -> None:
    assert f"{size_of(built(name, classes)) / 1e6:.{len(count.partition('.')[2])}f}" == count


def test_counts_that_leave_out_or_include_norms() -> None:
    """The published 10.2 M of the ResNet with 1001 layers are convolutions and the linear map; a FractalNet's, all numbers."""
    network = built("pre-activation ResNet-1001", 10)
    norms = sum(2 * module.num_features for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    assert size_of(network) == 10_328_122
    assert f"{(size_of(network) - norms) / 1e6:.1f}" == "10.2"
    network = built("FractalNet", 10)
    assert size_of(network) == 33_734_922
    assert f"{(size_of(network) + statistics_of(network)) / 1e6:.2f}" == "33.76"


@pytest.mark.parametrize("name", ["ResNet-20", "LM-ResNet-20", "FractalNet", "ContinuousNet 2-2-2", "Leapfrog-26"])
def test_a_class_adds_one_row(name: str) -> None:
    few, many = built(name, 10), built(name, 100)
    assert size_of(many) == size_of(few) + 90 * size_of_class(few)


@pytest.mark.parametrize("name", TORCHVISION)
def test_counts_of_networks_for_imagenet(name: str) -> None:
    with torch.device("meta"):
        model = getattr(torchvision.models, TORCHVISION[name])()
    ours = built(name, 1000)
    assert size_of(ours) == sum(parameter.numel() for parameter in model.parameters())
    assert len(list(ours.buffers())) == len(list(model.buffers()))


# Commands
def test_models_lists_the_zoo_and_the_counts(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models"])
    out = capsys.readouterr().out
    headings, *rows = documented()
    assert headings == ["function", "arXiv", "field", "weights", "scheme or solver", "noise"]
    assert [row[0] for row in rows] == list(BUILDERS)
    assert all(f" {row[0]} " in out and row[1] in out for row in rows)
    for name, counts in {**COUNTS, "pre-activation ResNet-1001": {10: 10_328_122}, "FractalNet": {10: 33_734_922}}.items():
        line = next(line for line in out.splitlines() if line.startswith(f"│ {name} "))
        assert all(f" {count:,} " in line for count in counts.values())
    assert all(f" {name} " in out for name, *_ in CONFIGURATIONS)


def test_verify_passes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With three of the small networks: all of them are certified above."""
    names = ["resnet B", "fractalnet", "mlp"]
    monkeypatch.setattr("continuum.cli.verify.SMALL", dict.fromkeys(names))
    main(["verify"])
    out = capsys.readouterr().out
    assert f"all {4 * len(names) + len(SCHEMES) + 14} checks passed" in out
    assert all(f" {name} " in out for name in names)
    assert all(f" {scheme} " in out for scheme in SCHEMES)
    assert "failed" not in out


def test_verify_names_what_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("continuum.cli.verify.SMALL", {"resnet": {}, "mlp": {}})
    altered = {"resnet": alter(small("resnet"), "stages.2.field.layers.1.branch.norm2"), "mlp": small("mlp")}
    monkeypatch.setattr("continuum.cli.verify.small", altered.__getitem__)
    wrong = [Order(continuum.Euler(), 1.001), Order(continuum.RK4(), 2.5)]
    monkeypatch.setattr("continuum.cli.verify.scheme_orders", lambda: iter(wrong))
    lossy = Undone(continuum.schemes.Verlet(), 100, torch.float32, 0.5, 1e-5)
    monkeypatch.setattr("continuum.cli.verify.undo_errors", lambda: iter([lossy]))
    with pytest.raises(SystemExit) as stop:
        main(["verify"])
    assert stop.value.code == 1
    *_, training, evaluation, buffers, gradients, order, undone, last = capsys.readouterr().out.splitlines()
    assert training.startswith("resnet: logits in training differ; the first difference is at stages.2.field.layers.1, of ")
    assert evaluation.startswith("resnet: logits in evaluation differ; the first difference is at stages.2.field.layers.1, of ")
    assert buffers.startswith("resnet: buffers differ; ")
    assert gradients.startswith("resnet: gradients differ by ")
    assert order == "rk4: order 2.500, not 4"
    assert undone == "verlet: 100 layers in float32 are undone with an error of 5.0e-01"
    assert last == "6 of 11 checks failed"


@pytest.mark.parametrize(("name", "scheme"), [("lm_resnet", "linear_two_step:h=1"), ("odenet", "euler:h=1")])
def test_verify_certifies_a_checkpoint(
    name: str, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    continuum.save(small(name).refine(2) if name == "lm_resnet" else small(name), "network.pt")
    main(["verify", "network.pt"])
    out = capsys.readouterr().out
    assert f" {scheme} " in out
    assert out.endswith("all 4 checks passed\n")
    altered = alter(small(name), "stem" if name == "lm_resnet" else "stem.0")
    monkeypatch.setattr("continuum.cli.verify.opened", lambda path, builder: ({}, altered))
    with pytest.raises(SystemExit) as stop:
        main(["verify", "network.pt"])
    assert stop.value.code == 1
    assert "network.pt: logits in training differ; the first difference is at stem, of " in capsys.readouterr().out


def test_verify_says_which_files_it_cannot_certify(tmp_path: Path, refused: Callable[..., str]) -> None:
    continuum.save(small("continuous_resnet constant").project("hat", 2), tmp_path / "projected.pt")
    assert "was changed by project" in refused("verify", tmp_path / "projected.pt")
    assert "no checkpoint at" in refused("verify", tmp_path / "missing.pt")
