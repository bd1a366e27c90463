"""Every network of the zoo: any solver that its fields allow, a training step, copies, files, compilation, bad arguments."""

import copy
import inspect
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from networks import SMALL, WITH_FLOWS, build
from problems import FLOAT64
from torch import nn

import continuum
from continuum import FixedStep, Momentum, PostActivation
from continuum.fields import SqueezeExcite
from continuum.models.failure import _end_looking
from continuum.models.fractal import join
from continuum.noise import StochasticDepth
from continuum.zoo import BUILDERS


def undropped(network):
    """Survival 1, so that a training pass uses every weight."""
    for field in network.modules():
        if isinstance(field, StochasticDepth):
            field.survival = 1.0
    return network


def test_every_builder_has_its_name():
    assert all(getattr(continuum.zoo, name) is builder for name, builder in BUILDERS.items())


def test_every_argument_is_explained():
    for name, builder in BUILDERS.items():
        explained = inspect.getdoc(builder).partition("Args:\n")[2].partition("\n\n")[0]
        assert re.findall(r"(?m)^    (\w+): ", explained) == list(inspect.signature(builder).parameters), name


@pytest.mark.parametrize("solver", ["euler", "rk4", "dopri5:rtol=1e-2,atol=1e-2"])
@pytest.mark.parametrize("name", WITH_FLOWS)
def test_every_network_runs_under_other_solvers(name, solver):
    network, x = build(name)
    network = (network.drift() if network.stochastic else network).eval()
    other = network.with_solver(solver)
    assert other(x).isfinite().all()
    before, after = network.state_dict(), other.state_dict()
    assert list(before) == list(after)
    assert all(before[name].data_ptr() == after[name].data_ptr() for name in before)
    assert not any(module.training for module in other.modules())
    assert {str(flow.solver) for flow in other.flows} == {str(other.solver)}
    assert [type(stage) for stage in other.stages] == [type(stage) for stage in network.stages]
    smaller = network.with_solver("euler:h=0.5")(x)
    assert (smaller != network(x)).any(), "the solver makes a difference"


@pytest.mark.parametrize("name", SMALL)
def test_a_training_step_moves_every_weight(name):
    network, x = build(name)
    if name.startswith("fractalnet"):  # a single column in half of the batches: all paths here
        network.stages[0].drop_path = 0.0
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    logits = undropped(network).train()(x)
    F.cross_entropy(logits, torch.arange(len(x)) % logits.shape[1]).backward()
    optimizer.step()
    still = [n for n, p in network.named_parameters() if torch.equal(p, before[n])]
    # FractalNet's convolutions have a bias, which the BatchNorm behind them takes away again.
    assert not [n for n in still if not (name.startswith("fractalnet") and n.endswith("conv.bias"))]
    assert all(value.isfinite().all() for value in network.state_dict().values())


@pytest.mark.parametrize("name", SMALL)
def test_copies_and_files_hold_the_same_network(name, tmp_path):
    network, x = build(name)
    network.train()(x)
    network.eval()
    clone = copy.deepcopy(network)
    continuum.save(network, tmp_path / "network.pt")
    loaded = continuum.load(tmp_path / "network.pt")
    with torch.no_grad():
        expected = network(x)
        assert torch.equal(clone(x), expected)
        assert torch.equal(loaded(x), expected)
        for parameter in clone.parameters():
            parameter.add_(1)
        assert not torch.equal(clone(x), expected)
        assert torch.equal(network(x), expected)
        torch.save(network.state_dict(), tmp_path / "weights.pt")
        clone.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        assert torch.equal(clone(x), expected)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in network.parameters()]


@pytest.mark.parametrize("name", SMALL)
def test_every_network_compiles(name):
    """Fixed steps as one graph; the tracing is what can fail, so the graph is run eagerly."""
    network, x = build(name)
    network.eval()
    if name.startswith("odenet"):  # tracing adaptive steps takes long, and mlp has them
        network = network.with_solver("rk4")
    fixed = all(isinstance(flow.solver, FixedStep) for flow in network.flows)
    with torch.no_grad():
        expected = network(x)
        compiled = torch.compile(network, backend="eager", fullgraph=fixed)
        with torch._dynamo.config.patch(recompile_limit=64):  # torch counts the graphs of all networks together
            found = compiled(x)
    # The sums of adaptive steps are machine code all the same.
    torch.testing.assert_close(found, expected, rtol=0 if fixed else 1e-5, atol=0 if fixed else 1e-5)


@pytest.mark.parametrize("name", [name for name in WITH_FLOWS if name.split()[0] not in ("odenet", "mlp", "neural_sde")])
def test_refinement_keeps_the_network_trainable(name):
    network, x = build(name)
    finer = undropped(network).refine(2)
    finer(x).square().sum().backward()
    assert all(p.grad is not None for p in finer.parameters() if p.requires_grad)


def test_a_replay_of_a_refined_flow_goes_the_same_way():
    """What looks for the step at which a state stops being finite must not take other steps."""
    flow = continuum.zoo.lm_resnet(14, width=4).refine(2).eval().flows[1]
    x, previous = torch.randn(2, 2, 8, 4, 4)
    with torch.no_grad():
        assert torch.equal(_end_looking(flow, x, previous), flow(x, previous))


# What networks are made of
def test_post_activation_is_the_block_bit_for_bit():
    torch.manual_seed(0)
    for dtype in (torch.float32, FLOAT64, torch.bfloat16):
        x, branch = torch.randn(100, 1000, dtype=dtype).relu() * 10, nn.Linear(1000, 1000, dtype=dtype)
        assert torch.equal(x + PostActivation(branch)(0.0, x), torch.relu(x + branch(x)))


def test_squeeze_and_excitation_weights_the_channels_of_any_branch():
    torch.manual_seed(0)
    branch = nn.Conv2d(4, 6, 3, padding=1)
    module, x = SqueezeExcite(branch, 6, reduction=3), torch.randn(2, 4, 5, 5)
    y = branch(x)
    for image in range(2):
        z = y[image].mean(dim=(1, 2))
        s = torch.sigmoid(module.excite.weight @ (module.squeeze.weight @ z + module.squeeze.bias).relu() + module.excite.bias)
        torch.testing.assert_close(module(x)[image], s[:, None, None] * y[image])


def test_antisymmetric_fields_do_no_work():
    """x . (K - K^T) x = 0, so that only gamma changes the length of a state."""
    field = continuum.fields.Antisymmetric(3, gamma=0.5).double()
    field.bias.data.normal_()
    x = torch.randn(2, 3, 6, 6, dtype=FLOAT64)
    weight = field.weight - field.weight.transpose(0, 1).flip(2, 3)
    torch.testing.assert_close((x * F.conv2d(x, weight, padding=1)).sum(), torch.zeros((), dtype=FLOAT64), atol=1e-10, rtol=0)
    skew = F.conv2d(x, field.weight, field.bias, padding=1) - F.conv_transpose2d(x, field.weight, padding=1)
    torch.testing.assert_close(field(x), torch.relu(skew - 0.5 * x))


def test_a_double_layer_is_a_gradient():
    """K^T relu(K x + b) + c = grad of (relu(K x + b)^2 / 2 + c x), so that a Coupled pair of them is Hamiltonian."""
    layer = continuum.fields.DoubleLayer(3).double()
    layer.inner_bias.data.normal_()
    layer.outer_bias.data.normal_()
    x = torch.randn(2, 3, 5, 5, dtype=FLOAT64, requires_grad=True)
    energy = F.conv2d(x, layer.weight, layer.inner_bias, padding=1).relu().square().sum() / 2
    energy = energy + (layer.outer_bias[:, None, None] * x).sum()
    torch.testing.assert_close(layer(x), torch.autograd.grad(energy, x)[0])


@pytest.mark.parametrize("h", [0.1, 1.0])
def test_verlet_keeps_the_energy_of_a_hamiltonian_field(h):
    """No drift: the energy of a linear Hamiltonian swings within bounds over a thousand steps, where Euler's grows."""
    identity = continuum.Autonomous(nn.Identity())
    field, x = continuum.Coupled(identity, identity.scaled(-1.0)), torch.tensor([[1.0, 0.0]], dtype=FLOAT64)
    depth = 1000 * h
    end = continuum.Flow(field, f"verlet:h={h}", depth)(x)
    assert 0.5 < float(end.square().sum()) < 2
    assert float(continuum.Flow(field, f"euler:h={h}", depth)(x).square().sum()) > 100


def test_momentum_and_leapfrog_networks_in_the_form_of_their_papers():
    """v+ = gamma v + (1 - gamma) f(x), x+ = x + v+ from rest; Y+ = 2 Y - Y_before - h^2 K^T relu(K Y + b) from zero."""
    network, x = build("momentum_resnet")
    x, network = x.double(), network.double().eval()
    y = network.stem(x)
    for stage in network.stages:
        if isinstance(stage, continuum.Flow):
            v = torch.zeros_like(y)
            for layer in stage.field.layers:
                v = 0.9 * v + (1 - 0.9) * layer.field.field(0.0, y)
                y = y + v
        elif not isinstance(stage, continuum.models.parts.AtRest):
            y, _ = stage(y)
    torch.testing.assert_close(network(x), network.head(y), rtol=1e-12, atol=1e-12)

    network = build("leapfrog")[0].double().eval()
    y = network.stem(x)
    for stage in network.stages:
        if isinstance(stage, continuum.Flow):
            before = torch.zeros_like(y)
            for layer in stage.field.layers:
                y, before = 2 * y - before - 0.1**2 * layer.second.field.module(y), y
        elif isinstance(stage, continuum.models.parts.PoolPad):
            y = stage(y)
    torch.testing.assert_close(network(x), network.head(y), rtol=1e-10, atol=1e-10)


# Bad input
@pytest.mark.parametrize(
    ("make", "message"),
    [
        *((partial(continuum.zoo.resnet, depth), rf"6 n \+ 2.*not {depth}") for depth in (2, 8, 18, 21)),
        *((partial(continuum.zoo.preresnet, depth), rf"6 n \+ 2.*not {depth}") for depth in (2, 8, 18, 21)),
        *((partial(continuum.zoo.lm_resnet, depth), rf"6 n \+ 2.*not {depth}") for depth in (2, 8, 18, 21)),
        (lambda: continuum.zoo.resnet(20, shortcut="C"), "'A' .* or 'B' .*not 'C'"),
        (lambda: continuum.zoo.resnext(30), r"9 n \+ 2.*not 30"),
        (lambda: continuum.zoo.resnext(29, cardinality=2, group_width=4, width=8), "group_width=4 .* width of 8"),
        (lambda: continuum.zoo.lm_resnext(29, cardinality=2, group_width=4, width=8), "group_width=4 .* width of 8"),
        (lambda: continuum.zoo.resnext(29, cardinality=0), "cardinality.* not 0"),
        (lambda: continuum.zoo.se_resnet(20, width=8), "reduction .*8 channels.*got 16"),
        (lambda: continuum.zoo.imagenet_resnet(20), "18, 34, 50, 101, 152.*not 20"),
        (lambda: continuum.zoo.imagenet_resnet(blocks=(2, 2, 2, 2)), "blocks and block belong together"),
        (lambda: continuum.zoo.imagenet_resnet(18, groups=2), "basic blocks have groups=1"),
        (lambda: continuum.zoo.imagenet_resnet(blocks=(2, 2), block="basic"), "four stages"),
        (lambda: continuum.zoo.preresnet(20, block="wide"), "'basic' or 'bottleneck', not 'wide'"),
        (lambda: continuum.zoo.wide_resnet(20), r"6 n \+ 4.*not 20"),
        (lambda: continuum.zoo.wide_resnet(16, 1, dropout=1.0), r"rate in \[0, 1\), not 1.0"),
        (lambda: continuum.zoo.momentum_resnet(14, gamma=1.0), "between 0 and 1, not 1.0"),
        (lambda: continuum.zoo.polynet(modules=(("3-way",),) * 3), "2-way, mpoly-2, poly-2, poly-3"),
        (lambda: continuum.zoo.polynet(blocks=(1, 1)), "2 stages"),
        (lambda: continuum.zoo.fractalnet(0), "one column or more"),
        (lambda: continuum.zoo.fractalnet(widths=(4, 4)), "a dropout rate for each width"),
        (lambda: continuum.zoo.fractalnet(drop_path=1.0), r"rates lie in \[0, 1\)"),
        (lambda: continuum.zoo.revnet(40), r"12 n \+ 2.*not 40"),
        (lambda: continuum.zoo.hamiltonian(26, widths=(4, 7, 9)), "even number of channels, not 7"),
        (lambda: continuum.zoo.midpoint(14, start="rest"), "euler, zero, not 'rest'"),
        (lambda: continuum.zoo.midpoint(14, gamma=-1.0), "gamma .*not negative"),
        (lambda: continuum.zoo.leapfrog(14, widths=(8, 4, 2)), "not decreasing"),
        (lambda: continuum.zoo.continuous_resnet(4, "spline"), "unknown basis 'spline'; there are hat"),
        (lambda: continuum.zoo.continuous_resnet(1, "hat"), "2 or more"),
        (lambda: continuum.zoo.stochastic_depth_resnet(14, last=0.0), r"in \(0, 1\], not 0.0"),
        (lambda: continuum.zoo.stochastic_depth_resnet(14, per="layer"), "'image' .* or 'batch' .*not 'layer'"),
        (lambda: continuum.zoo.stochastic_lm_resnet(20, last=1.5), r"in \(0, 1\], not 1.5"),
        (lambda: continuum.zoo.shake_shake(24), r"6 n \+ 2.*not 24"),
        (lambda: continuum.zoo.shake_shake(14, width=5), "even number .*not 5"),
        (lambda: continuum.zoo.shake_shake(14, 4, forward_mode="keep"), "forward_mode is 'shake' or 'even'"),
        (lambda: continuum.zoo.dropout_resnet(14, rate=1.0), r"in \[0, 1\), not 1.0"),
        (lambda: continuum.zoo.neural_sde(sigma=-1.0), "at least 0, not -1.0"),
        (lambda: continuum.zoo.neural_sde(kind="jump"), "'additive' .* or 'multiplicative' .*not 'jump'"),
    ],
)
def test_arguments_that_no_network_has(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_drop_path_draws_a_column_or_thins_out_joins():
    """Half of the mini-batches go through one column; the others lose inputs of joins, never all of one."""
    torch.manual_seed(0)
    ones = [torch.ones(1)] * 3
    counts = torch.zeros(4)
    for _ in range(4000):
        paths = [torch.tensor([float(2**i)]) for i in range(3)]
        kept = {1: 1, 2: 1, 4: 1, 1.5: 2, 2.5: 2, 3: 2}.get(float(join(paths, 0.15)), 3)
        counts[kept] += 1
    p = 0.85
    expected = torch.tensor([0, 3 * p * 0.15**2 + 0.15**3, 3 * p**2 * 0.15, p**3])
    torch.testing.assert_close(counts / 4000, expected, atol=0.02, rtol=0)
    assert float(join(ones, 0.0)) == 1

    network, x = build("fractalnet")
    network.train()
    used = torch.zeros(3)
    for _ in range(200):
        network.zero_grad()
        network(x).sum().backward()
        columns = network.stages[0].blocks[0].columns
        live = [any(p.grad is not None for p in column.parameters()) for column in columns]
        if sum(live) == 1:
            used[live.index(True)] += 1
    assert 60 < used.sum() < 140
    assert (used > 15).all()


def test_a_constant_k_is_exact_whatever_its_network_goes_through(tmp_path):
    """A k that is not learnt is no tensor: nothing rounds it, and it stands in no file; older files, which held it, load."""
    network = continuum.zoo.momentum_resnet(14, width=4, gamma=0.9)
    continuum.save(network.double(), tmp_path / "network.pt")
    older = network.state_dict() | {f"{flow}.field.layers.0.k": torch.tensor(-0.9) for flow in ("stages.1", "stages.4")}
    again = continuum.zoo.momentum_resnet(14, width=4, gamma=0.9)
    again.load_state_dict(older)
    changed = [network.float().double(), copy.deepcopy(network), network.refine(2), network.with_solver("rk4"), again]
    for other in [*changed, continuum.load(tmp_path / "network.pt")]:
        layers = [module for module in other.modules() if isinstance(module, Momentum)]
        assert {layer.k for layer in layers} == {-0.9}
    assert not any(name.endswith(".k") for name in network.state_dict())
    with pytest.raises(ValueError, match="has to be given"):
        Momentum(continuum.MLP(2, hidden=4), learnt=False)


@pytest.mark.parametrize(
    ("build", "smallest"),
    [
        (lambda: continuum.zoo.odenet(width=8, in_channels=3, solver="euler"), 10),
        (lambda: continuum.zoo.odenet(3, width=8, in_channels=3, solver="euler"), 8),
        (lambda: continuum.zoo.neural_sde(width=8), 10),
        (lambda: continuum.zoo.continuous_resnet(2, "legendre", width=8), 5),
    ],
)
def test_images_that_would_shrink_to_one_pixel_are_refused(build, smallest):
    """GroupNorm would leave signs of its channels: the network would train to chance, and say nothing."""
    network = build().eval()
    assert network(torch.randn(2, 3, smallest, smallest)).shape == (2, 10)
    with pytest.raises(ValueError, match=f"{smallest - 1} x {smallest} pixels .* {smallest} x {smallest} are needed"):
        network(torch.randn(2, 3, smallest - 1, smallest))
