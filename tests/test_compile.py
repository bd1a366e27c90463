"""Compiled flows: as many graphs as there are to be, with the numbers of the eager flow, whatever was compiled before."""

import copy
import inspect
from pathlib import Path

import pytest
import torch
from problems import FLOAT64, STEPPED, halves, mlp_layers, small_mlp, solved, states, tanh_layers
from runs import CONFIG

import continuum
from continuum import RK4, Autonomous, Euler, EulerMaruyama, Expansion, FixedStep, Flow, Momentum, PiecewiseConstant, SolveError
from continuum.bases import Hat
from continuum.cli import main
from continuum.schemes import AdamsBashforth, Coupling, LinearTwoStep

POINTS = states(5, 4)


def in_place(module):
    compiled = copy.deepcopy(module)
    compiled.compile()
    return compiled


def mlp():
    return small_mlp(4, 5)


def numbers(flow, x, seed):
    """The end and all gradients, of zero where a branch is dropped."""
    found = solved(flow, x, seed=seed)
    return [found["end"], found["start"], *(torch.zeros_like(p) if p.grad is None else p.grad for p in flow.parameters())]


def assert_same(compiled, flow, x=POINTS, seed=3):
    torch.testing.assert_close(numbers(compiled, x, seed), numbers(flow, x, seed), rtol=1e-12, atol=1e-12)


# One graph
FLOWS = [
    (scheme, STEPPED[scheme]) for scheme in (Euler(), RK4(), LinearTwoStep(), AdamsBashforth(3), Coupling(), EulerMaruyama())
]
FLOWS += [(Euler(), lambda _: mlp()), (RK4(), lambda _: mlp()), (LinearTwoStep(), lambda _: Momentum(mlp(), -0.3))]
FLOWS += [(AdamsBashforth(3), mlp_layers)]


def test_four_euler_steps_are_one_graph():
    """Counted as torch explains it, without our own counter."""
    flow = Flow(tanh_layers(4), "euler", 4)
    report = torch._dynamo.explain(flow)(states(5, 4))
    assert (report.graph_count, report.graph_break_count) == (1, 0)


@pytest.mark.parametrize(("scheme", "field"), FLOWS)
def test_fixed_steps_are_one_graph(graphs, scheme, field):
    flow = Flow(field(2), FixedStep(scheme), 2)
    compiled = in_place(flow)
    for seed in range(4):  # a branch that is dropped is multiplied by zero
        assert_same(compiled, flow, seed=seed)
    assert graphs.frame_count == 1
    assert compiled.cost == flow.cost


@pytest.mark.parametrize("scheme", [RK4(), LinearTwoStep(), EulerMaruyama()], ids=str)
def test_steps_that_are_recomputed_are_in_it(graphs, scheme):
    flow = Flow(STEPPED[scheme](2), FixedStep(scheme, gradient="checkpoint"), 2)
    assert_same(in_place(flow), flow)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("graphs", ["aot_eager"], indirect=True)  # which decides, as inductor does, what is recomputed
@pytest.mark.parametrize("solver", ["euler", "euler:gradient=checkpoint,every=2"])
def test_statistics_and_masks_are_those_of_eager_mode(graphs, solver):
    torch.manual_seed(0)
    module = continuum.fields.PreActivation(3, 3, dropout=0.3)
    flow = Flow(PiecewiseConstant([Autonomous(module).scaled(0.3)] * 2).double(), solver, 2)
    compiled = in_place(flow)
    assert_same(compiled, flow, torch.randn(4, 3, 5, 5, dtype=FLOAT64))
    torch.testing.assert_close(compiled.state_dict(), flow.state_dict(), rtol=1e-12, atol=1e-12)
    assert graphs.frame_count == 1


# One after another
SEQUENCE = {
    "two layers": (lambda: tanh_layers(2), "euler", 2),
    "three layers": (lambda: tanh_layers(3), "euler", 3),
    "half steps": (lambda: tanh_layers(2), "euler:h=0.5", 2),
    "another scheme": (lambda: tanh_layers(1), "rk4:h=0.5", 1),
    "long steps": (mlp, "euler:h=3", 6),
    "a grid": (mlp, "euler:grid=0.0/0.5/2.0", 2),
    "another grid": (mlp, "euler:grid=0.0/0.7/2.0", 2),
    "a basis": (lambda: Expansion(mlp(), Hat(3, 1.0)), "euler", 1),
    "another basis": (lambda: Expansion(mlp(), Hat(4, 2.0)), "euler:h=2", 2),
}


def wrapped(flow):
    return torch.compile(copy.deepcopy(flow), fullgraph=True)


@pytest.mark.parametrize(("compiled", "order"), [(in_place, 1), (wrapped, -1)])
def test_depths_and_steps_are_constants_of_the_graph(graphs, compiled, order):
    """In one process, without reset: none is made a symbol, and no graph is used for another depth or step."""
    flows = {name: Flow(field(), solver, depth) for name, (field, solver, depth) in list(SEQUENCE.items())[::order]}
    with torch._dynamo.config.patch(recompile_limit=64):  # torch.compile counts the graphs of all flows together
        others = {name: compiled(flow) for name, flow in flows.items()}
        for _ in range(2):
            for name, flow in flows.items():
                assert_same(others[name], flow)
    assert graphs.frame_count == len(SEQUENCE)


def test_a_flow_that_changes_is_compiled_again(graphs):
    flow = Flow(tanh_layers(1).layers[0], "euler", 2)
    flow.compile()
    for solver, depth in [("euler", 2.0), ("euler:h=0.5", 2.0), ("euler:h=0.5", 1.0), ("euler", 2.0)]:
        flow.solver, flow.end = continuum.solvers.parse(solver), depth
        assert_same(flow, Flow(flow.field, solver, depth))
    assert graphs.frame_count == 3


def test_more_than_eight_flows_are_compiled(graphs):
    """torch's limit counts the graphs of one flow; an older torch counts those of all, and runs the ninth flow eagerly."""
    flows = [Flow(tanh_layers(1, features), "euler", 1) for features in range(1, 10)]
    for flow in flows:
        x = torch.ones(2, flow.field.layers[0].module[0].in_features, dtype=FLOAT64)
        assert_same(in_place(flow), flow, x)
    isolated = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    assert graphs.frame_count == (len(flows) if isolated else 8)


# Networks
def images(batch=4):
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def assert_same_training(compiled, network):
    """Two steps of training and an evaluation, of another batch size."""
    for model in (compiled, network):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        torch.manual_seed(3)
        for _ in range(2):
            optimizer.zero_grad()
            model(images()).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(compiled.state_dict(), network.state_dict(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(images(3)), network.eval()(images(3)), rtol=1e-4, atol=1e-5)


def test_a_network_of_fixed_steps_is_one_graph_in_each_mode(graphs):
    torch.manual_seed(0)
    network = continuum.zoo.lm_resnet(14, width=4)
    compiled = in_place(network)
    assert_same_training(compiled, network)
    assert graphs.frame_count >= 2  # in training and in validation


@pytest.mark.parametrize("solver", ["bosh3:rtol=1e-2,atol=1e-2", "two_step_midpoint:gradient=reversible"])
def test_a_network_of_other_steps_is_compiled_part_by_part(graphs, solver):
    torch.manual_seed(0)
    network = continuum.zoo.odenet(width=4, in_channels=3, downsample=False, solver=solver)
    compiled = in_place(network)
    assert_same_training(compiled, network)
    assert graphs.frame_count > 2


def test_a_compiled_network_is_the_network(graphs, tmp_path):
    torch.manual_seed(0)
    network = continuum.zoo.odenet(width=4, in_channels=3, downsample=False, solver="euler").eval()
    expected = network(images())
    keys = list(network.state_dict())
    network.compile()
    assert type(network) is continuum.models.Network
    assert list(network.state_dict()) == keys
    torch.testing.assert_close(network(images()), expected, rtol=1e-5, atol=1e-5)
    continuum.save(network, tmp_path / "network.pt")
    for other in (copy.deepcopy(network), continuum.load(tmp_path / "network.pt"), network.with_solver("euler")):
        before = graphs.frame_count
        assert torch.equal(other(images()), expected), "not compiled"
        assert graphs.frame_count == before


@pytest.mark.parametrize("compiled", [in_place, lambda flow: torch.compile(copy.deepcopy(flow))], ids=["in place", "around it"])
def test_what_cannot_be_one_graph_still_solves(graphs, compiled):
    for field, solver in [
        (halves(2), "coupling:gradient=reversible"),
        (STEPPED[EulerMaruyama()](2), "milstein"),
        (STEPPED[EulerMaruyama()](2), "brownian:method=milstein,h=0.5"),
        (mlp_layers(2), "bosh3:rtol=1e-2,atol=1e-2"),
    ]:
        flow = Flow(field, solver, 2)
        assert_same(compiled(flow), flow)


def test_a_failing_solve_says_so_in_a_compiled_network(graphs):
    network = continuum.zoo.odenet(width=4, in_channels=3, downsample=False, solver="dopri5:max_evaluations=4").train()
    network.compile()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(SolveError, match=r"budget is spent.* in flow stages\.0"):
        network(images())
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_machine_code():
    flow = Flow(tanh_layers(1), "euler", 1)
    assert_same(in_place(flow), flow)


# The command line
@pytest.mark.usefixtures("command_line")
def test_a_compiled_run_and_its_checkpoints(graphs, capsys):
    """Trained as an eager run is, and continued by one; the reverse too."""
    config = CONFIG.replace("bosh3:rtol=1e-2,atol=1e-2", "euler:h=0.5\n  schedule: null")
    Path("config.yaml").write_text(config.replace("max_epochs: 2", "max_epochs: 1"))

    def fit(name, *arguments):
        main(["fit", "--config", "config.yaml", "--trainer.logger.init_args.name", name, *arguments])
        return torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True)["state_dict"]

    eager = fit("eager")
    assert graphs.frame_count == 0
    compiled = fit("compiled", "--compile", "true")
    assert graphs.frame_count >= 2  # in training and in validation
    assert list(eager) == list(compiled)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)

    more = ("--trainer.max_epochs", "2", "--ckpt_path")
    eagerly = fit("eagerly", *more, "runs/compiled/checkpoints/last.ckpt")
    then = fit("then", "--compile", "true", *more, "runs/eager/checkpoints/last.ckpt")
    torch.testing.assert_close(then, eagerly, rtol=1e-4, atol=1e-5)
    before = graphs.frame_count
    main(["test", "--config", "config.yaml", "--compile", "true", "--ckpt_path", "runs/compiled/checkpoints/last.ckpt"])
    assert graphs.frame_count > before
    assert "test/accuracy" in capsys.readouterr().out
