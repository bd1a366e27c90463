"""Residual networks as flows: to the bit in both modes, there and back, and what is refused."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from runs import quiet_trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import (
    ConvNeXt,
    EfficientNet,
    MaxVit,
    MNASNet,
    MobileNetV2,
    RegNet,
    ResNet,
    SwinTransformer,
    VisionTransformer,
    mobilenet_v3_small,
)
from torchvision.models.convnext import CNBlock, CNBlockConfig
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

from continuum import Autonomous, CheckpointError, Network, PiecewiseConstant, SolveError, StochasticDepth, load, save
from continuum.analysis.compare import compare_solvers
from continuum.analysis.report import Sample, report
from continuum.convert import Difference, Run, continuous, discrete, survey, with_noise
from continuum.models import builder
from continuum.models.flows import compile_parts, drift, flows, frozen, project, refine, sample, solver_of, with_solver
from continuum.noise.base import has_noise
from continuum.solvers import parse
from continuum.training import Classifier


def regnet(**options: float) -> RegNet:
    return RegNet(BlockParams.from_init_params(depth=6, w_0=8, w_a=8.0, w_m=2.2, group_width=8, **options), num_classes=5)


def efficientnet(*settings: MBConvConfig | FusedMBConvConfig) -> EfficientNet:
    return EfficientNet(settings, dropout=0.2, stochastic_depth_prob=0.5, last_channel=16, num_classes=5)


def swin(**options: object) -> SwinTransformer:
    sizes = {"patch_size": [2, 2], "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": [3, 3]}
    return SwinTransformer(**sizes, stochastic_depth_prob=0.5, num_classes=5, **options)  # type: ignore[arg-type]


def vit(size: int = 32) -> VisionTransformer:
    return VisionTransformer(size, 8, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=16, dropout=0.1, num_classes=5)


def convnext(drop: float = 0.5) -> ConvNeXt:
    return ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 3)], drop, layer_scale=0.5, num_classes=5)


def maxvit() -> MaxVit:
    return MaxVit((32, 32), 8, 4, [8, 16], [2, 1], head_dim=4, stochastic_depth_prob=0.5, num_classes=5)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    "ResNet": (partial(ResNet, BasicBlock, [2, 1, 1, 2], num_classes=5), [2, 1]),
    "ResNet, bottlenecks": (partial(ResNet, Bottleneck, [2, 2, 1, 1], num_classes=5), [1, 1]),
    "ResNeXt": (partial(ResNet, Bottleneck, [2, 2, 1, 1], num_classes=5, groups=4, width_per_group=2), [1, 1]),
    "Wide-ResNet": (partial(ResNet, Bottleneck, [2, 1, 1, 1], num_classes=5, width_per_group=128), [1]),
    "RegNet x": (regnet, [1, 2]),
    "RegNet y": (partial(regnet, se_ratio=0.25), [1, 2]),
    "ConvNeXt": (convnext, [2, 3]),
    "EfficientNet": (partial(efficientnet, MBConvConfig(1, 3, 1, 8, 8, 2), MBConvConfig(4, 5, 2, 8, 16, 3)), [2, 2]),
    "EfficientNet v2": (
        partial(efficientnet, FusedMBConvConfig(2, 3, 1, 8, 8, 2), MBConvConfig(4, 3, 2, 8, 16, 2)),
        [2, 1],
    ),
    "MobileNet v2": (partial(MobileNetV2, 5, 0.5), [1, 2, 3, 2, 2]),
    "MobileNet v3": (partial(mobilenet_v3_small, num_classes=5), [1, 2, 1, 2]),
    "MNASNet": (partial(MNASNet, 0.5, 5), [2, 2, 2, 1, 3]),
    "ViT": (vit, [3]),
    "Swin": (swin, [2, 2]),
    "Swin v2": (partial(swin, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2), [2, 2]),
    "MaxViT": (maxvit, [2, 1, 2, 2]),
}


def timm_families() -> dict[str, tuple[Callable[[], nn.Module], list[int]]]:
    """Those of timm, where it is installed."""
    try:
        from timm.layers import BatchNormAct2d
        from timm.models import convnext, deit, resnet, resnetv2, swin_transformer, swin_transformer_v2
        from timm.models import vision_transformer as vit
    except ImportError:
        return {}
    sizes = {"img_size": 32, "num_classes": 5, "drop_path_rate": 0.5}
    tokens = {**sizes, "patch_size": 8, "embed_dim": 8, "depth": 3, "num_heads": 2, "init_values": 0.5}
    windows = {**sizes, "patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}
    layers = {"layers": [2, 1, 1, 2], "num_classes": 5, "drop_path_rate": 0.5}
    kinds = ("Block", "ResPostBlock", "ParallelScalingBlock", "ParallelThingsBlock")
    transformers = {f"timm ViT, {k}": (partial(vit.VisionTransformer, **tokens, block_fn=getattr(vit, k)), [3]) for k in kinds}
    v2 = partial(resnetv2.ResNetV2, **layers, channels=(16, 16, 32, 32), stem_chs=8, norm_layer=BatchNormAct2d)
    stages = {"depths": (1, 2, 1, 1), "dims": (8, 16, 16, 16), "num_classes": 5, "drop_path_rate": 0.5, "ls_init_value": 0.5}
    return {
        **transformers,
        "timm DeiT": (partial(deit.VisionTransformerDistilled, **tokens), [3]),
        "timm ConvNeXt": (partial(convnext.ConvNeXt, **stages), [1, 2, 1, 1]),
        "timm Swin": (partial(swin_transformer.SwinTransformer, **windows), [2, 2]),
        "timm Swin v2": (partial(swin_transformer_v2.SwinTransformerV2, **windows), [2, 2]),
        "timm ResNet": (partial(resnet.ResNet, resnet.BasicBlock, **layers), [2, 1]),
        "timm ResNet, bottlenecks": (partial(resnet.ResNet, resnet.Bottleneck, **layers), [1, 1]),
        "timm ResNetV2": (v2, [1, 1]),
        "timm ResNetV2, basic": (partial(v2, basic=True), [1, 1]),
        "timm ResNetV2, post-activation": (partial(v2, preact=False), [1, 1]),
    }


FAMILIES |= timm_families()


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[name][0]()
    for parameter in model.parameters():  # some begin with zeros, behind which nothing shows
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, x: Tensor) -> Tensor:
    """The logits of a training step, whose draws are seeded; it leaves gradients."""
    torch.manual_seed(2)
    logits = model.train()(x)
    cross_entropy(logits, torch.arange(len(x)) % 5).backward()
    return logits


def by_their_names(equation: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """The parameters of an equation by the names that they have in the model."""
    named = dict(equation.named_parameters())
    runs = [module for module in equation.modules() if isinstance(module, Run)]
    for found, run in zip(survey(model).runs, runs, strict=True):
        owner = found.name.removesuffix(found.places[0])
        for place, block in zip(found.places, run.blocks, strict=True):
            named |= {f"{owner}{place}.{name}": parameter for name, parameter in block.named_parameters()}
    return {name: named[name] for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_itself_to_the_bit(name: str) -> None:
    model = made(name)
    x, equation = images(), continuous(model)
    assert [len(flow.field.pieces()) for flow in flows(equation)] == FAMILIES[name][1]
    assert torch.equal(equation.eval()(x), model.eval()(x))
    assert torch.equal(trained(equation, x), trained(model, x))
    ours = by_their_names(equation, model)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(ours[key].grad, parameter.grad), key  # type: ignore[arg-type]
    back = discrete(equation)
    assert [type(module) for module in back.modules()] == [type(module) for module in model.modules()]
    assert [module.training for module in back.modules()] == [module.training for module in model.modules()]
    same(back, model)
    assert torch.equal(back.eval()(x), model.eval()(x))


def same(one: nn.Module, other: nn.Module) -> None:
    assert list(one.state_dict()) == list(other.state_dict())
    for (key, tensor), mine in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, mine), key


@pytest.mark.parametrize("name", ["ResNet", "ConvNeXt", "ViT", "Swin v2"])
@pytest.mark.parametrize("solver", ["rk4:h=0.5", "dopri5:rtol=1e-4,atol=1e-4"])
def test_every_other_solver_takes_its_weights(name: str, solver: str) -> None:
    model = made(name)
    equation = continuous(model.eval())
    solved = with_solver(equation, solver)
    assert {str(flow.solver) for flow in flows(solved)} == {str(with_solver(flow, solver).solver) for flow in flows(solved)}
    assert not torch.equal(solved(images()), equation(images()))
    assert all(one is other for one, other in zip(solved.parameters(), equation.parameters(), strict=True))
    same(discrete(solved), model)


def test_functions_of_flows_work_on_any_model() -> None:
    equation, x = continuous(made("ViT").eval()), images()
    dense = with_solver(equation, "dopri5:rtol=1e-6,atol=1e-6")
    torch.testing.assert_close(frozen(dense, x)(x), dense(x), rtol=1e-4, atol=1e-5)
    finer = refine(equation, 2)
    assert [flow.depth for flow in flows(finer)] == [6]
    assert not {id(p) for p in finer.parameters()} & {id(p) for p in equation.parameters()}
    smooth = project(with_solver(continuous(convnext(0.0)).eval(), "rk4"), "hat", 2)
    assert smooth(x).shape == (3, 5)
    compile_parts(dense)
    assert dense(x).shape == (3, 5)


NOISY = [name for name in FAMILIES if any(word in name for word in ("ConvNeXt", "EfficientNet", "Swin", "MaxViT", "DeiT"))]
NOISY += [name for name in FAMILIES if "ViT, " in name or name == "timm ResNetV2"]
NOISY.remove("timm ViT, ParallelThingsBlock") if "timm ViT, ParallelThingsBlock" in NOISY else None


@pytest.mark.parametrize("name", NOISY)
def test_dropped_paths_are_noise_draw_for_draw(name: str) -> None:
    model, x = made(name), images(6)
    noisy = with_noise(continuous(model))
    assert has_noise(noisy)
    assert torch.equal(trained(noisy, x), trained(model, x))
    plain, calm = model.eval()(x), drift(noisy.eval())
    assert torch.equal(noisy(x), plain)
    assert torch.equal(calm(x), plain)
    assert with_solver(calm, "rk4")(x).shape == plain.shape
    assert sample(noisy, x, 2).shape == (2, *plain.shape)
    same(discrete(noisy), model)


def test_a_model_that_drops_nothing_has_no_noise() -> None:
    with pytest.raises(TypeError, match="no flow of this VisionTransformer drops a path"):
        with_noise(continuous(made("ViT")))


# Blocks of one's own


class Block(nn.Module):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(size, size), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Weighed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.body(x)


def stack(count: int = 3, kind: type[nn.Module] = Block) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), *(kind() for _ in range(count)), nn.Linear(4, 2))


OWN = {Block: lambda block: Autonomous(block.body)}


def test_a_block_of_ones_own_takes_one_line() -> None:
    model, x = stack(), torch.randn(5, 4)
    equation = continuous(model, OWN)
    assert torch.equal(equation(x), model(x))
    assert list(equation.state_dict()) != list(model.state_dict())
    assert str(survey(model, OWN)) == "1: 3 Block, euler:h=1\nleft alone: no block"
    with torch.no_grad():
        equation[1].flow.field.layers[0].module[0].weight.zero_()  # type: ignore[union-attr,index]
    back = discrete(equation)
    assert type(back[1]) is Block
    assert back[1].body[0].weight.abs().sum() == 0, "trained weights go back"
    close = continuous(model, {Block: Difference})
    torch.testing.assert_close(close(x), model(x))


def test_a_run_ends_where_a_block_is_none() -> None:
    model = nn.Sequential(Block(), Block(), nn.ReLU(), Block(), nn.ModuleDict({"inner": nn.ModuleList([Block()])}))
    assert [found.name for found in survey(model, OWN).runs] == ["0", "3", "4.inner.0"]
    assert [len(found.blocks) for found in survey(model, OWN).runs] == [2, 1, 1]


def test_noise_of_a_block_is_a_stochastic_field() -> None:
    model = stack()
    equation = continuous(model, {Block: lambda block: StochasticDepth(Autonomous(block.body), 0.5)})
    assert str(flows(equation)[0].solver) == "euler_maruyama:increments=own,h=1"


def test_tied_blocks_stay_tied() -> None:
    block = Block()
    model, x = nn.Sequential(block, block), torch.randn(5, 4)
    equation = continuous(model, OWN)
    for network in (model, equation):
        network(x).sum().backward()
    assert torch.equal(equation[0].flow.field.layers[1].module[0].weight.grad, block.body[0].weight.grad)  # type: ignore
    back = discrete(equation)
    assert back[0] is back[1]


def test_copies_and_moves_keep_the_blocks() -> None:
    equation = copy.deepcopy(continuous(stack(), OWN)).double().eval()
    back = discrete(equation)
    assert {p.dtype for p in back.parameters()} == {torch.float64}
    assert not any(module.training for module in back.modules())
    assert torch.equal(back(torch.ones(1, 4).double()), equation(torch.ones(1, 4).double()))


def hooked() -> nn.Module:
    model = stack()
    model[2].register_forward_hook(lambda module, given, found: None)
    return model


def parametrized() -> nn.Module:
    model = stack()
    parametrizations.weight_norm(model[1].body[0])
    return model


REFUSED = [
    (lambda: continuous(nn.Sequential(nn.Linear(2, 2))), "no residual block .* blocks seen there: none"),
    (lambda: continuous(stack()), "blocks seen there: Block. .*blocks=.MyBlock: Difference"),
    (lambda: continuous(stack(), {Block: lambda block: block.body}), "it returned a Sequential"),
    (lambda: continuous(stack(kind=Weighed), {Weighed: lambda block: Autonomous(block.body)}), "leaves out: gamma"),
    (lambda: continuous(hooked(), OWN), "block 2 of the run 1, a Block, has hooks"),
    (lambda: discrete(stack()), "no flow of this Sequential was made of blocks"),
    (lambda: discrete(refine(continuous(stack(), OWN), 2)), "flow 1: its 6 layers are no longer the 3 blocks of Block"),
    (lambda: discrete(project(continuous(stack(), OWN), "hat", 2)), "flow 1: its 1 layers are no longer the 3 blocks"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_cannot_go_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def test_a_compiled_block_is_converted_uncompiled() -> None:
    model, x = stack(), torch.randn(5, 4)
    model[1].compile()
    equation = continuous(model, OWN)
    assert all(module._compiled_call_impl is None for module in equation.modules())
    same(discrete(equation), model)
    assert torch.equal(equation(x), stack()(x))


def test_parametrized_weights_are_kept() -> None:
    model, x = parametrized(), torch.randn(5, 4)
    equation = continuous(model, OWN)
    assert torch.equal(equation(x), model(x))
    same(discrete(equation), model)


def test_only_the_class_itself_is_known() -> None:
    class Other(CNBlock):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(Other(8, 1.0, 0.0))
    assert not survey(model).runs
    assert survey(model).left == {Other.__qualname__: 1}
    assert isinstance(continuous(nn.Sequential(CNBlock(8, 1.0, 0.0)))[0].flow.field, PiecewiseConstant)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["ConvNeXt", "ViT"])
def test_it_is_analysed_and_compared_as_any_network(name: str) -> None:
    model, x, labels = made(name), images(4), torch.tensor([0, 1, 2, 3])
    equation = continuous(model.eval())
    sections = {section.title: section for section in report(equation, Sample(x, labels), {})}
    for title in ("Flows", "Order of convergence", "Dynamics", "Cost of a tolerance", "Gradients"):
        assert sections[title].rows, sections[title].summary
    first, *others = compare_solvers(equation, [(x, labels)], [parse("rk4"), parse("dopri5")], torch.device("cpu"))
    assert first.solver == str(solver_of(equation))
    assert first.logit_difference == 0
    assert all(row.logit_difference > 0 for row in others)


@builder
def small(width: int = 8, solver: str = "euler") -> nn.Module:
    settings = [CNBlockConfig(width, 2 * width, 2), CNBlockConfig(2 * width, None, 2)]
    return with_solver(continuous(ConvNeXt(settings, layer_scale=0.5, num_classes=5)), solver)


def test_a_builder_of_any_module_makes_a_network(tmp_path: Path) -> None:
    """It is saved, loaded by its builder, refined, and trained."""
    torch.manual_seed(0)
    network, x = small(8, solver="rk4"), images()
    assert list(network.named_flows) == ["stages.0.features.1.0.flow", "stages.0.features.3.0.flow"]
    model = Classifier(network.refine(2))
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(model, DataLoader(TensorDataset(x, torch.arange(3)), batch_size=3))
    save(model.network, tmp_path / "small.pt")
    again = load(tmp_path / "small.pt", builder=small)
    torch.testing.assert_close(again(x), model.network.eval()(x))  # whose weights lie in channels_last
    assert [flow.depth for flow in again.flows] == [4, 4]
    with pytest.raises(TypeError, match="lies inside a stage, which carries no integral"):
        again.integral(x, lambda t, x, slope: slope.flatten(1).sum(1))
    with pytest.raises(CheckpointError, match="nothing is imported"):
        load(tmp_path / "small.pt")
    with pytest.raises(SolveError) as caught:
        again.with_solver("dopri5:max_evaluations=2")(x)
    assert caught.value.flow == "stages.0"


def test_a_classifier_trains_any_module() -> None:
    model = Classifier(convnext())
    quiet_trainer(max_steps=1).fit(model, DataLoader(TensorDataset(images(), torch.arange(3)), batch_size=3))
    assert type(model.network) is Network
