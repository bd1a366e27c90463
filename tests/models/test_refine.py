"""Refinement: one step becomes k, the network computes nearly the same, and training, files and resumed runs go on with it."""

import copy
import itertools
import math
from pathlib import Path

import pytest
import pytorch_lightning as pl
import runs
import torch
from networks import build
from problems import states, tanh_layers
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from runs import StopAt, same_state
from torch import nn

import continuum
from continuum import RK4, Adaptive, CheckpointError, Euler, FixedStep, Flow, Network, PiecewiseConstant, load, save
from continuum.bases import Hat
from continuum.fields import MLP, Autonomous, Scaled
from continuum.models import Augment, builder
from continuum.training import Classifier, Digits, OneCycle, Refine, Schedule, Steps
from continuum.training.callbacks import network_of
from continuum.weights import Expansion
from continuum.zoo import lm_resnet, mlp, preresnet

FINER = [(FixedStep(Euler(), h=0.5), 3, FixedStep(Euler(), h=0.5 / 3)), (FixedStep(RK4(), h=2), 2, FixedStep(RK4(), h=1))]
FINER += [(FixedStep(RK4(), h=2), 4, FixedStep(RK4(), h=0.5)), (Adaptive("bosh3"), 2, Adaptive("bosh3"))]


def images(channels=3):
    return states(2, channels, 8, 8, dtype=torch.float32)


# Flows
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("rk4", 4)])
def test_layers_that_do_not_vary_converge_with_the_order_of_the_scheme(solver, order):
    layer, x = tanh_layers(1).layers[0], states(3, 4)
    flow = Flow(PiecewiseConstant([layer] * 3), solver, 3)
    with torch.no_grad():
        limit = Flow(layer, "dopri8:rtol=1e-13,atol=1e-13", 3)(x)
        errors = [(flow.refine(k)(x) - limit).abs().max().item() for k in (2, 4, 8)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("solver", ["euler", "rk4:h=0.5", "dopri5"])
def test_layers_become_copies_of_themselves_divided(solver):
    flow, x = Flow(tanh_layers(3), solver, 3), states(3, 4)
    finer = flow.refine(2)
    assert finer.depth == 6
    assert finer.solver == flow.solver
    assert len(finer.field.layers) == 6
    for index, layer in enumerate(finer.field.layers):
        torch.testing.assert_close(layer(0.0, x), flow.field.layers[index // 2](0.0, x) / 2)
    assert not {p.data_ptr() for p in flow.parameters()} & {p.data_ptr() for p in finer.parameters()}
    assert len({p.data_ptr() for p in finer.parameters()}) == 2 * len(list(flow.parameters()))


def test_a_scaled_layer_is_not_wrapped_again():
    flow, x = Flow(PiecewiseConstant([Scaled(layer, 0.5) for layer in tanh_layers(2).layers]), "euler", 2), states(3, 4)
    finer = flow.refine(4)
    assert {layer.scale for layer in finer.field.layers} == {0.125}
    assert not any(isinstance(layer.field, Scaled) for layer in finer.field.layers)
    assert torch.equal(flow.refine(2).refine(2)(x), finer(x))


@pytest.mark.parametrize(("solver", "k", "finer"), FINER, ids=str)
def test_other_fields_keep_their_depth_and_take_smaller_steps(solver, k, finer):
    for field in (MLP(2, 3), Expansion(MLP(2, 3), Hat(3, 2.0))):
        flow, x = Flow(field, solver, 2).eval(), states(3, 2).float()
        refined = flow.refine(k)
        assert (refined.solver, refined.depth, refined.training) == (finer, 2, False)
        assert not {p.data_ptr() for p in flow.parameters()} & {p.data_ptr() for p in refined.parameters()}
        assert torch.equal(refined(x), flow.with_solver(finer)(x))


# Networks
CASES = {
    "preresnet": ("preresnet", {}),
    "rk4": ("preresnet", {"solver": "rk4:h=0.5"}),
    "odenet": ("odenet", {"downsample": False, "solver": "rk4"}),
    "mlp": ("mlp", {"solver": "euler:h=0.25"}),
    "adaptive mlp": ("mlp", {}),
}


@pytest.fixture(params=CASES)
def inhabitant(request):
    name, options = CASES[request.param]
    return build(name, **options)


@pytest.mark.parametrize("change", ["refine", "refine twice", "refine and project"])
def test_changed_networks_come_back_from_their_files(inhabitant, change, tmp_path):
    network, x = inhabitant
    changed = network.refine(2)
    if change == "refine twice":
        changed = changed.refine(3)
    elif change == "refine and project" and isinstance(network.flows[0].field, PiecewiseConstant):
        changed = changed.project("hat", 3).project("hat", 2)
    changed.train()(x)  # so that the running statistics are not those of the file it came from
    save(changed, tmp_path / "network.pt")
    loaded = load(tmp_path / "network.pt")
    assert loaded.blueprint == changed.blueprint
    assert [flow.solver for flow in loaded.flows] == [flow.solver for flow in changed.flows]
    with torch.no_grad():
        assert torch.equal(loaded(x), changed.eval()(x))


def test_refining_twice_by_two_is_refining_by_four(inhabitant):
    network, x = inhabitant
    with torch.no_grad():
        assert torch.equal(network.eval().refine(2).refine(2)(x), network.refine(4)(x))


CONVERGENT = {
    "smaller steps": (preresnet, False, lambda network, k: network.with_solver(f"euler:h={1 / k!r}"), (8, 16, 32)),
    "more layers that do not vary": (preresnet, True, Network.refine, (8, 16, 32)),
    "more layers with momentum": (lm_resnet, False, Network.refine, (16, 32, 64)),
}


@pytest.mark.parametrize("case", CONVERGENT)
@torch.no_grad()
def test_logits_converge_with_order_one_to_those_of_the_equation(case):
    """With weak branches, so that the asymptotic regime begins early. The state before a flow with momentum lies one of the
    original layers back: refined layers start from the same velocity."""
    make, equal, finer, counts = CONVERGENT[case]
    torch.manual_seed(0)
    network, x = make(14, width=4).double().eval(), images().double()
    for flow in network.flows:
        for layer in flow.field.layers:
            layer.load_state_dict((flow.field.layers[0] if equal else layer).state_dict())
        for name, parameter in flow.named_parameters():
            parameter.mul_(0.2 if "conv2" in name else 1)
    limit = network.with_solver("dopri5:rtol=1e-10,atol=1e-10")(x)
    errors = [float((finer(network, k)(x) - limit).abs().max()) for k in counts]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.15)


def test_copies_are_independent(inhabitant):
    network, x = inhabitant
    piecewise = isinstance(network.flows[0].field, PiecewiseConstant)
    before = copy.deepcopy(network)
    others = [network.refine(2)] + ([network.project("hat", 2)] if piecewise else [])
    for other in others:
        other.train()(x).square().sum().backward()
        torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert same_state(network, before)
    assert all(p.grad is None for p in network.parameters())


def test_modes_are_kept():
    network = preresnet(14, width=2).eval()
    network.flows[0].field.layers[0].module.norm1.train()
    for other in (network.refine(2), network.project("hat", 2)):
        names = [name for name, module in other.named_modules() if module.training]
        assert names, "the norm that trains"
        assert all(name.startswith("stages.0.field") and name.endswith("norm1") for name in names)


def test_projected_networks_have_fewer_weights():
    network, x = preresnet(20, width=2), images()
    projected = network.project("hat", 2)
    assert [flow.field.basis for flow in projected.flows] == [Hat(2, 3.0), Hat(2, 2.0), Hat(2, 2.0)]
    assert sum(p.numel() for p in projected.parameters()) < sum(p.numel() for p in network.parameters())
    assert projected(x).isfinite().all()
    network.blueprint = None
    assert network.refine(2).blueprint is None, "which needs none"


@builder
def without_flows() -> Network:
    return Network(Augment(1), [], nn.Linear(3, 2))


def test_a_frozen_network_repeats_the_adaptive_steps(tmp_path):
    torch.manual_seed(0)
    network, x = preresnet(14, width=2, solver="dopri5:rtol=1e-2,atol=1e-2").double(), images().double()
    network.stages[2] = network.stages[2].with_solver("euler")
    modes, before = [m.training for m in network.modules()], copy.deepcopy(network)
    frozen = network.frozen(x)
    assert [m.training for m in network.modules()] == modes
    assert same_state(network, before)
    assert all(a is b for a, b in zip(network.parameters(), frozen.parameters(), strict=True))
    with torch.no_grad():
        torch.testing.assert_close(frozen.eval()(x), network.eval()(x), rtol=1e-10, atol=1e-10)
    for flow, adaptive in zip(frozen.flows, network.flows, strict=True):
        assert isinstance(flow.solver, FixedStep)
        assert flow.cost.grid == adaptive.cost.grid
    assert not any(flow._forward_pre_hooks for flow in (*network.flows, *frozen.flows))
    save(frozen, tmp_path / "frozen.pt")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "frozen.pt").double()(x), frozen.float().double()(x))
    with pytest.raises(TypeError, match="no flow of this network has an adaptive solver"):
        frozen.frozen(x)


# Files
@pytest.mark.parametrize(
    "changes",
    [[["shrink", 2]], [["refine"]], [["refine", 1]], [["refine", "2"]], [["project", "hat"]], [2], 3, [["project", "hat", 2]]],
)
def test_changes_that_a_file_cannot_have(tmp_path, changes):
    path = tmp_path / "network.pt"
    save(mlp(hidden=4).refine(2), path)
    content = torch.load(path)
    content["continuum"]["changes"] = changes
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="does not describe a mlp network") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_file_from_before_there_were_changes(tmp_path):
    save(mlp(hidden=4), tmp_path / "network.pt")
    content = torch.load(tmp_path / "network.pt")
    del content["continuum"]["changes"]
    torch.save(content, tmp_path / "network.pt")
    assert load(tmp_path / "network.pt").blueprint.changes == ()


def test_changes_are_replayed_whatever_the_solver_was(tmp_path):
    """A grid cannot be refined, but the network that was built with one was under another solver when it was."""
    network = mlp(hidden=4, solver="euler:grid=0/0.25/1").with_solver("rk4").refine(2)
    save(network, tmp_path / "network.pt")
    assert load(tmp_path / "network.pt").solver == FixedStep(RK4(), h=0.5)


# Training
class Recorded(pl.Callback):
    """The optimiser's numbers before and after each epoch's start; placed around Refine."""

    def __init__(self) -> None:
        self.seen: list[dict[str, object]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (optimizer,), network = trainer.optimizers, pl_module.network
        held = [(name, optimizer.state[p]) for name, p in network.named_parameters() if p in optimizer.state]
        seen = {"momentum": {name: state["momentum_buffer"].clone() for name, state in held}}
        seen["options"] = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        seen["schedules"] = [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs]
        seen["optimised"] = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.seen.append({**seen, "parameters": {id(p) for p in network.parameters()}, "network": network})


def fit(
    folder: Path,
    callbacks: list[pl.Callback],
    schedule: Schedule | None = None,
    resume: Path | None = None,
    network: Network | None = None,
) -> Classifier:
    """Four epochs of three batches."""
    torch.manual_seed(0)
    network, data = network or preresnet(14, width=2, in_channels=1), Digits(batch_size=20, train_size=60, crop=1, seed=0)
    return runs.fit(
        network, data, callbacks, resume, {"schedule": schedule or OneCycle()}, max_epochs=4, default_root_dir=folder
    )


def layer_of(name: str) -> str:
    """The parameter of preresnet(14) that a parameter of its refinement by 3 was copied from."""
    parts = name.split(".")
    if parts[2:4] == ["field", "layers"]:
        return ".".join([*parts[:4], str(int(parts[4]) // 3), *parts[6:]])
    return name


@pytest.mark.parametrize("schedule", [OneCycle(), Steps([1, 3])])
def test_the_optimiser_goes_on_where_it_was(tmp_path: Path, schedule: Schedule) -> None:
    before, after = Recorded(), Recorded()
    model = fit(tmp_path, [before, Refine([2], factor=3), after], schedule)
    old, new = before.seen[2], after.seen[2]
    assert new["options"] == old["options"]
    assert new["schedules"] == old["schedules"]
    assert new["optimised"] == new["parameters"]
    assert new["network"] is model.network is not old["network"]
    assert new["momentum"].keys() == {name for name, _ in model.network.named_parameters()}
    for name, momentum in new["momentum"].items():
        assert torch.equal(momentum, old["momentum"][layer_of(name)]), name
    assert any(value.any() for value in new["momentum"].values())
    last = model.trainer.optimizers[0].state
    assert len({last[p]["momentum_buffer"].data_ptr() for p in last}) == len(last), "no two parameters share a buffer"
    rates = [seen["options"][0]["lr"] for seen in after.seen]
    plain = Recorded()
    fit(tmp_path, [plain], schedule)
    assert rates == [seen["options"][0]["lr"] for seen in plain.seen]


def test_training_goes_on_with_the_refined_network(tmp_path: Path) -> None:
    refine = Refine([1, 3])
    fit(tmp_path, [refine])
    model = fit(tmp_path, [refine])  # a callback that has served before serves again
    assert [flow.depth for flow in model.network.flows] == [8, 4, 4]
    assert model.network.blueprint.changes == (("refine", 2), ("refine", 2))
    first, *copies = [layer.field.module.conv1.weight for layer in model.network.flows[0].field.layers][:4]
    assert not any(torch.equal(first, other) for other in copies), "copies learn apart"
    assert all(module.training for module in model.network.modules())


def test_other_fields_are_trained_with_smaller_steps(tmp_path: Path) -> None:
    network = continuum.zoo.odenet(width=2, in_channels=1, downsample=False, solver="euler")
    model = fit(tmp_path, [Refine([0, 1, 3])], network=network)
    assert str(model.network.solver) == "euler:h=0.125"


@pytest.mark.parametrize("schedule", [OneCycle(), Steps([1, 3])])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, schedule: Schedule) -> None:
    """Cut at any place: before, at, within and after the epochs that begin with a refinement."""
    whole = fit(tmp_path, [Refine([1, 2])], schedule).network
    every = ModelCheckpoint(tmp_path / "kept", "{step}", save_top_k=-1, every_n_train_steps=1)
    fit(tmp_path, [Refine([1, 2]), every, StopAt(11)], schedule)
    for step, changes in ((2, 0), (3, 0), (4, 1), (6, 1), (8, 2), (10, 2)):
        path = tmp_path / "kept" / f"step={step}.ckpt"
        assert same_state(fit(tmp_path, [Refine([1, 2])], schedule, resume=path).network, whole), f"after step {step}"
        loaded = load(path)
        assert loaded.blueprint.changes == (("refine", 2),) * changes
        with torch.no_grad():
            assert loaded(images(channels=1)).isfinite().all()


def test_a_checkpoint_is_evaluated_with_the_network_as_it_was_built(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "last", enable_version_counter=False, save_on_train_epoch_end=True)
    trained = fit(tmp_path, [Refine([1]), keep]).eval()
    for changed in (False, True):
        network = preresnet(14, width=2, in_channels=1)
        model = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", network=network.refine(2) if changed else network)
        with torch.no_grad():
            assert torch.equal(model.eval()(images(channels=1)), trained(images(channels=1)))
    with pytest.raises(CheckpointError, match=r"\[\['refine', 2\]\], this one through \[\['refine', 3\]\]"):
        Classifier.load_from_checkpoint(tmp_path / "last.ckpt", network=network.refine(3))


@builder
def six_layers_a_step() -> Network:
    flow = Flow(Autonomous(nn.Tanh()), "euler:h=6", depth=6)
    return Network(nn.Flatten(), [flow], nn.Linear(64, 10))


def test_several_processes_are_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    with pytest.raises(RuntimeError, match=r"DistributedDataParallel.*devices=1"):
        fit(tmp_path, [Refine([3])])


def unknown() -> Network:
    network = preresnet(14, width=2, in_channels=1)
    network.blueprint = None
    return network


EPOCHS = Recorded()


def begun(network: Network | nn.Module, factor: int = 2) -> None:
    try:
        fit(Path(), [EPOCHS, Refine([3], factor)], network=network)
    finally:
        assert not EPOCHS.seen


SHORT, NETWORK = Flow(MLP(2, 3), "euler", 2), preresnet(20, width=2)
GRID = r"grid cannot be refined.*with_solver\('euler'\)"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        *((lambda k=k: SHORT.refine(k), ValueError, "integer of at least 2") for k in (1, 0, -2, 2.0, "2")),
        (lambda: SHORT.with_solver("euler:h=2").refine(3), ValueError, r"h = 2 to 0.666667, which is neither"),
        (lambda: Flow(MLP(4, 3).double(), "euler:grid=0/1.5/2", 2).refine(2), ValueError, GRID),
        (lambda: Flow(tanh_layers(2), "euler:grid=0/1.5/2", 2).refine(2), ValueError, GRID),
        (lambda: NETWORK.project("legendre", 2), TypeError, r"flow stages\.0: .*BatchNorm2d.*GroupNorm"),
        (lambda: NETWORK.project("spline", 2), ValueError, "unknown basis 'spline'"),
        (lambda: mlp().project("hat", 2), TypeError, r"flow stages\.0: the weights of a MLP"),
        (lambda: without_flows().refine(2), TypeError, "no flow"),
        (lambda: without_flows().project("hat", 2), TypeError, "no flow"),
        (lambda: without_flows().with_solver("euler"), TypeError, "no flow"),
        (lambda: without_flows().frozen(images()), TypeError, "no flow of this network has an adaptive solver"),
        *((lambda e=e: Refine(e), ValueError, "increasing numbers") for e in ([], [2, 1], [1, 1], [-1])),
        *((lambda factor=factor: Refine([1], factor), ValueError, "at least 2") for factor in (1, 0, 2.0)),
        (lambda: begun(six_layers_a_step(), 4), ValueError, r"h = 6 to 1\.5"),
        (lambda: begun(unknown()), ValueError, "knows its builder"),
        (lambda: begun(nn.Linear(2, 2)), ValueError, "knows its builder"),
    ],
)
def test_what_cannot_be_refined_is_refused_before_training(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_module_of_another_kind_is_refused() -> None:
    module = pl.LightningModule()
    module.network = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="`network` is a Network"):
        network_of(module, Refine([1]))


@pytest.mark.parametrize("average", [EMAWeightAveraging(), WeightAveraging(), StochasticWeightAveraging(0.01)])
def test_callbacks_that_average_weights_are_refused_before_training(tmp_path: Path, average: pl.Callback) -> None:
    """By number and order, so that weights which appear later have no place; also those that a checkpoint brings."""
    with pytest.raises(RuntimeError, match=f"Refine .* {type(average).__name__}"):
        fit(tmp_path, [average, Refine([1])])
    keep = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
    fit(tmp_path, [Refine([1]), keep])
    with pytest.raises(CheckpointError, match=type(average).__name__):
        fit(tmp_path, [average], resume=tmp_path / "last.ckpt")


def test_the_command_line_builds_it() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=pl.Callback)
    config = {"class_path": "continuum.training.Refine", "init_args": {"epochs": [2, 4], "factor": 3}}
    callback = parser.instantiate_classes(parser.parse_object({"callback": config})).callback
    assert (callback.epochs, callback.factor) == ([2, 4], 3)
