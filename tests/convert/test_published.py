"""Published networks and ours compute the same to the bit, and convert there and back without a loss."""

import re
import sys
import tarfile
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from files import Malicious, failing
from PIL import Image
from problems import states
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import continuum
from continuum import CheckpointError, Flow
from continuum.cli import main
from continuum.convert import from_checkpoint, from_torchvision, to_checkpoint, to_torchvision
from continuum.export import ExportError, export
from continuum.models.parts import Transition
from continuum.zoo import imagenet_resnet, mlp, odenet, preresnet, resnet

PRETRAINED = Path(__file__).parent.parent.parent / "shared/data/pretrained/cifar10-resnet20-postact-optionA.th"
TEST_SET = PRETRAINED.parent.parent / "cifar10-jpeg.tar.xz"


def images(batch=2, size=64, channels=3, dtype=torch.float32):
    return states(batch, channels, size, size, dtype=dtype)


def small(block=BasicBlock, layers=(1, 1, 1, 1), classes=7, channels=3, **options):
    model = ResNet(block, list(layers), classes, **options)
    if channels != 3:
        model.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    return model


def for_cifar(model):
    model.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


PUBLISHED = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d"]
PUBLISHED += ["resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"]
MODELS = {
    **{name: getattr(tv, name) for name in PUBLISHED},
    "one block a stage": small,
    "one bottleneck a stage": lambda: small(Bottleneck),
    "uneven stages": lambda: small(layers=(2, 1, 3, 1)),
    "uneven bottlenecks": lambda: small(Bottleneck, (2, 1, 3, 1)),
    "one dilated stage": lambda: small(Bottleneck, (1, 1, 2, 3), replace_stride_with_dilation=[False, False, True]),
    "dilated stages in groups": lambda: small(
        Bottleneck, (2, 2, 1, 2), replace_stride_with_dilation=[True, False, True], groups=4, width_per_group=24
    ),
    "zeros at the end of branches": lambda: small(Bottleneck, (2, 1, 1, 1), zero_init_residual=True),
    "one input channel": lambda: small(layers=(1, 2, 1, 1), channels=1),
    "for CIFAR": lambda: for_cifar(small(layers=(2, 2, 1, 1), classes=10)),
    "bottlenecks for CIFAR": lambda: for_cifar(small(Bottleneck, (1, 2, 1, 1), classes=10)),
}
SMALL = [name for name in MODELS if name not in PUBLISHED]


def leaves(model):
    """The modules with weights, in the order of torchvision, whether the network is theirs or ours."""
    if isinstance(model, ResNet):
        return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]
    found = [model.stem.conv, model.stem.norm]
    for stage in model.stages:
        for block in stage.field.layers if isinstance(stage, Flow) else [stage]:
            found += block.branch.children()
            found += block.shortcut.children() if isinstance(block, Transition) else []
    return [*found, model.head.linear]


def parameters(model):
    return list(chain.from_iterable(leaf.parameters() for leaf in leaves(model)))


def buffers(model):
    return list(chain.from_iterable(leaf.buffers() for leaf in leaves(model)))


def assert_equal(ones, others):
    assert len(ones) == len(others)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ones, others, strict=True))


def assert_same_weights(ones, others):
    assert list(ones) == list(others)
    assert_equal(list(ones.values()), list(others.values()))


@torch.no_grad()
def assert_same_logits(network, model, x):
    assert torch.equal(network.eval()(x), model.eval()(x))
    assert torch.equal(network.train()(x), model.train()(x))
    assert_equal(buffers(network), buffers(model))


# torchvision


def suitable(model, batch=2):
    """Images for the model: small ones where its stem keeps their size."""
    return images(batch, 64 if model.conv1.stride == (2, 2) else 16, model.conv1.in_channels)


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_computes_the_same_to_the_bit(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    network, x = from_torchvision(model), suitable(model)
    assert len(parameters(network)) == len(list(network.parameters()))
    logits = [one.train()(x) for one in (network, model)]
    assert torch.equal(*logits)
    assert_equal(buffers(network), buffers(model))
    for one in logits:
        F.cross_entropy(one, torch.tensor([0, 1])).backward()
    for ours, theirs in zip(parameters(network), parameters(model), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-6 * theirs.grad.norm()
    with torch.no_grad():
        assert torch.equal(network.eval()(x), model.eval()(x))

    torch.optim.SGD(model.parameters(), lr=0.01).step()
    trained = from_torchvision(model)
    assert not torch.equal(trained.stem.conv.weight, network.stem.conv.weight)
    assert_same_logits(trained, model, x)
    back = to_torchvision(trained.eval())
    assert not any(module.training for module in back.modules())
    assert_same_weights(back.state_dict(), model.state_dict())
    strides = ([block.stride for block in chain(one.layer3, one.layer4)] for one in (back, model))
    assert (str(back), back.dilation, next(strides)) == (str(model), model.dilation, next(strides))
    assert_same_logits(back, model, x)


def test_training_goes_on_equally():
    torch.manual_seed(0)
    model = small(layers=(2, 1, 1, 2))
    network = from_torchvision(model)
    for one in (model, network):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.02, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(one.train()(images(4)), torch.arange(4)).backward()
            optimizer.step()
    assert_same_weights(to_torchvision(network).state_dict(), model.state_dict())


def test_weights_are_copies_and_nothing_is_drawn_at_random():
    model = small()
    state = torch.get_rng_state()
    network = from_torchvision(model)
    back = to_torchvision(network)
    assert torch.equal(torch.get_rng_state(), state)
    pointers = [{p.data_ptr() for p in chain(m.parameters(), m.buffers())} for m in (model, network, back)]
    assert len(set.union(*pointers)) == sum(map(len, pointers))


def test_types_flags_modes_and_formats_stay():
    model = small(Bottleneck, (2, 1, 1, 1)).double().to(memory_format=torch.channels_last)
    model.layer2[0].bn2.eval()
    model.layer3.requires_grad_(False)
    model.fc.bias.requires_grad_(False)
    for other in (from_torchvision(model), to_torchvision(from_torchvision(model))):
        assert other.training
        assert [m.training for m in leaves(other)] == [m.training for m in leaves(model)]
        assert [p.requires_grad for p in parameters(other)] == [p.requires_grad for p in parameters(model)]
        assert [p.stride() for p in parameters(other)] == [p.stride() for p in parameters(model)]
        assert_equal(parameters(other), parameters(model))
        x = images(dtype=torch.float64).to(memory_format=torch.channels_last)
        assert torch.equal(other.eval()(x), model.eval()(x))
        model.train().layer2[0].bn2.eval()
    half = small().bfloat16()
    half.bn1.float()
    assert [p.dtype for p in parameters(from_torchvision(half))] == [p.dtype for p in parameters(half)]
    with torch.device("meta"):
        assert all(p.is_meta for p in from_torchvision(small()).parameters())


@pytest.mark.parametrize("solver", ["euler:h=0.5", "dopri5:rtol=1e-2,atol=1e-2"])
def test_converted_networks_run_under_other_solvers(solver):
    torch.manual_seed(0)
    model = small(layers=(2, 2, 1, 2)).eval()
    network = from_torchvision(model)
    other = network.with_solver(solver)
    x = images(size=32)
    logits = other(x)
    assert logits.isfinite().all()
    assert not torch.equal(logits, model(x))
    logits.sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert_same_weights(to_torchvision(other.with_solver("euler")).state_dict(), model.state_dict())


@pytest.mark.parametrize("name", SMALL)
def test_converted_networks_come_back_from_files(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]()
    x = suitable(model)
    model.train()(x)
    continuum.save(from_torchvision(model), tmp_path / "network.pt")
    network = continuum.load(tmp_path / "network.pt")
    assert_same_weights(to_torchvision(network).state_dict(), model.state_dict())
    assert_same_logits(network, model, x)


# Models that are refused
class Subclass(ResNet):
    def forward(self, x):
        return -super().forward(x)


def own_block():
    class BasicBlock(tv.resnet.BasicBlock):  # not known by its name
        def forward(self, x):
            return 2 * super().forward(x)

    return BasicBlock


def setting(name, module):
    return lambda model: model.set_submodule(name, module)


def sharing(model):
    model.layer1[1] = model.layer1[0]


def tying(model):
    model.layer1[0].conv2.weight = model.layer1[0].conv1.weight


def replacing(name, method):
    return lambda model: setattr(model.get_submodule(name), method, lambda x: x)


REFUSED = {
    "fc: Sequential(...)": setting("fc", nn.Sequential(nn.Dropout(0.1), nn.Linear(512, 7))),
    "fc: Linear(in_features=512, out_features=7, bias=False)": setting("fc", nn.Linear(512, 7, bias=False)),
    "layer2.0.bn1: GroupNorm(8, 128": setting("layer2.0.bn1", nn.GroupNorm(8, 128)),
    "bn1: SyncBatchNorm(64": setting("bn1", nn.SyncBatchNorm(64)),
    "layer3.0.bn2: BatchNorm2d(256, eps=1e-05, momentum=0.01": setting("layer3.0.bn2", nn.BatchNorm2d(256, momentum=0.01)),
    "relu: SiLU()": setting("relu", nn.SiLU()),
    "layer1.0.relu: GELU": setting("layer1.0.relu", nn.GELU()),
    "avgpool: AdaptiveMaxPool2d": setting("avgpool", nn.AdaptiveMaxPool2d(1)),
    "maxpool: Identity()": setting("maxpool", nn.Identity()),
    "maxpool: MaxPool2d": setting("conv1", nn.Conv2d(3, 64, 3, padding=1, bias=False)),
    "conv1: Conv2d(3, 64, kernel_size=(3, 3), stride=(2, 2)": setting("conv1", nn.Conv2d(3, 64, 3, 2, 1, bias=False)),
    "layer1.1.conv1: Conv2d(64, 64, kernel_size=(5, 5)": setting("layer1.1.conv1", nn.Conv2d(64, 64, 5, 1, 2, bias=False)),
    "layer4: Identity()": setting("layer4", nn.Identity()),
    "layer3.0.downsample: MaxPool2d": setting("layer3.0.downsample", nn.MaxPool2d(2)),
    "dropout: Dropout": lambda model: model.add_module("dropout", nn.Dropout()),
    "mean: Tensor of shape (3,)": lambda model: model.register_buffer("mean", torch.zeros(3)),
    "scale: Parameter": lambda model: model.register_parameter("scale", nn.Parameter(torch.ones(1))),
    "fc.weight: Parameter of shape (7, 3)": lambda model: setattr(model.fc, "weight", nn.Parameter(torch.ones(7, 3))),
    "layer1.1: missing, or shared": sharing,
    "layer1.0.conv2.weight: missing, or shared": tying,
    "layer1.0.conv1: Conv2d(64, 64": lambda m: m.layer1[0].conv1.register_forward_hook(lambda *_: None),
    "ResNet(...) with hooks": lambda model: model.register_forward_pre_hook(lambda *_: None),
    "with hooks": lambda model: model.fc.weight.register_hook(lambda gradient: 2 * gradient),
    "layer2.0.conv1: ParametrizedConv2d": lambda m: nn.utils.parametrizations.weight_norm(m.layer2[0].conv1),
    "layer1.0: BasicBlock(...) with a method of its own": replacing("layer1.0", "forward"),
    "ResNet(...) with a method of its own": replacing("", "_forward_impl"),
}


@pytest.mark.parametrize("words", REFUSED)
def test_models_that_cannot_be_converted_are_refused_by_what_stands_in_the_way(words):
    model = small(layers=(2, 1, 1, 1))
    REFUSED[words](model)
    with pytest.raises(TypeError) as caught:
        from_torchvision(model)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_models_of_another_make_are_refused():
    with pytest.raises(TypeError, match=r"layer1\.0: BasicBlock\(\.\.\.\)"):
        from_torchvision(small(own_block()))
    with pytest.raises(TypeError, match=r"bn1: BatchNorm2d\(64, eps=0\.001.*and \d+ more"):
        from_torchvision(small(norm_layer=partial(nn.BatchNorm2d, eps=1e-3)))
    others = [
        Subclass(BasicBlock, [1, 1, 1, 1]),
        tv.quantization.resnet18(),
        nn.DataParallel(small()),
        tv.vgg11(),
        preresnet(14),
    ]
    for model in others:
        words = rf"not a {re.escape(type(model).__module__)}\..*{type(model).__name__}, .*from_checkpoint takes its state dict"
        with pytest.raises(TypeError, match=words):
            from_torchvision(model)


def test_activations_out_of_place_are_no_obstacle():
    model = small()
    model.relu = model.layer1[0].relu = nn.ReLU()
    with pytest.raises(TypeError, match=r"layer1\.0\.relu: missing, or shared"):
        from_torchvision(model)
    model.relu = nn.ReLU()
    assert torch.equal(from_torchvision(model.eval())(images()), model(images()))


def test_networks_that_have_no_published_form_are_refused(tmp_path):
    network = imagenet_resnet(blocks=[2, 1, 1, 2], block="basic")
    changed = from_torchvision(small())
    changed.head.linear = nn.Linear(512, 3)
    refused = {"preresnet": preresnet(14, width=4), "head.linear: Linear(in_features=512, out_features=3": changed}
    refused["unknown builder"] = continuum.Network(network.stem, network.stages, network.head)
    refused["refine(2)"] = network.refine(2)
    refused |= {f"solved by {solver}": network.with_solver(solver) for solver in ("rk4:h=1", "euler:h=0.5")}
    for words, other in refused.items():
        for convert in (to_torchvision, partial(to_checkpoint, path=tmp_path / "weights.pth")):
            with pytest.raises(TypeError, match=re.escape(words)):
                convert(other)
    with pytest.raises(TypeError, match=r"project\('hat', 2\)"):
        to_checkpoint(resnet(14, width=4).project("hat", 2), tmp_path / "weights.th")
    with pytest.raises(TypeError, match="resnet"):
        to_torchvision(resnet(14, width=4))
    assert not list(tmp_path.iterdir())


# Checkpoints
def plain_resnet(weights, x, training):
    """The ResNet of arXiv 1512.03385 for CIFAR written out, on a state dict with its usual names."""

    def conv(name, x, stride=1):
        return F.conv2d(x, weights[f"{name}.weight"], stride=stride, padding=weights[f"{name}.weight"].shape[-1] // 2)

    def norm(name, x):
        mean, variance = (weights[f"{name}.{key}"].clone() for key in ("running_mean", "running_var"))
        return F.batch_norm(x, mean, variance, weights[f"{name}.weight"], weights[f"{name}.bias"], training)

    x = F.relu(norm("bn1", conv("conv1", x)))
    blocks = sorted({tuple(map(int, match)) for match in re.findall(r"layer(\d)\.(\d+)", " ".join(weights))})
    for layer, index in blocks:
        name, stride = f"layer{layer}.{index}", 2 if layer > 1 and not index else 1
        y = F.relu(norm(f"{name}.bn1", conv(f"{name}.conv1", x, stride)))
        y = norm(f"{name}.bn2", conv(f"{name}.conv2", y))
        if f"{name}.shortcut.0.weight" in weights:
            x = norm(f"{name}.shortcut.1", conv(f"{name}.shortcut.0", x, stride))
        elif stride == 2:
            quarter = y.shape[1] // 4
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
        x = F.relu(y + x)
    x = F.avg_pool2d(x, x.shape[3]).flatten(1)
    return F.linear(x, weights["linear.weight"], weights["linear.bias"])


def written(network, path):
    """The state dict that to_checkpoint writes."""
    to_checkpoint(network, path)
    return torch.load(path, weights_only=True)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.th"


def used(network, x):
    """The network with running statistics that are not those of a new one."""
    network.train()(x)
    return network.eval()


@torch.no_grad()
def assert_plain(network, weights, x):
    assert torch.equal(network.eval()(x), plain_resnet(weights, x, training=False))
    assert torch.equal(network.train()(x), plain_resnet(weights, x, training=True))


def published_weights():
    published = torch.load(PRETRAINED, map_location="cpu", weights_only=True)["state_dict"]
    return {name.removeprefix("module."): tensor for name, tensor in published.items()}


@pytest.mark.skipif(not PRETRAINED.is_file(), reason=f"no pretrained ResNet-20 at {PRETRAINED}")
def test_a_published_resnet_20_computes_the_same_to_the_bit(path):
    network = from_checkpoint(PRETRAINED)
    weights = published_weights()
    assert (network.training, network.blueprint.builder, network.blueprint.arguments["shortcut"]) == (False, "resnet", "A")
    assert sum(p.numel() for p in network.parameters()) == 269_722
    back = written(network, path)
    assert_same_weights({name: t for name, t in back.items() if not name.endswith("tracked")}, weights)
    assert_plain(network, weights, images(64, size=32))


@pytest.fixture(scope="module")
def test_images():
    """The 10,000 test images of JPEG CIFAR-10, normalised as the published network expects, and their labels."""
    if not (PRETRAINED.is_file() and TEST_SET.is_file()):
        pytest.skip(f"no pretrained network or no test images in {TEST_SET.parent}")
    pixels, classes = [], []
    with tarfile.open(TEST_SET) as archive:
        for member in archive:
            part, *inside = member.name.split("/")
            if part == "test" and member.isfile():
                with Image.open(archive.extractfile(member)) as image:
                    pixels.append(torch.from_numpy(np.array(image)))
                classes.append(inside[0])
    names = sorted(set(classes))
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = torch.stack(pixels).permute(0, 3, 1, 2).float().div(255).sub_(mean).div_(std)
    return x, torch.tensor([names.index(name) for name in classes])


@torch.no_grad()
def test_the_published_resnet_20_on_all_test_images(test_images):
    """8,103 of 10,000 are right (81.03 %); another decoder of JPEG files may tip the scales of a few."""
    network = from_checkpoint(PRETRAINED)
    weights = published_weights()
    right = 0
    for x, labels in zip(*(part.split(500) for part in test_images), strict=True):
        logits = network(x)
        assert torch.equal(logits, plain_resnet(weights, x, training=False))
        right += int((logits.argmax(dim=1) == labels).sum())
    assert len(test_images[1]) == 10_000
    assert abs(right - 8103) <= 5


FORMS = {
    "A": lambda: resnet(14, width=8),
    "B": lambda: resnet(14, width=8, shortcut="B"),
    "deeper": lambda: resnet(26, width=4, num_classes=3, in_channels=1),
}


NAMES = "conv1.weight bn1.weight bn1.bias bn1.running_mean bn1.running_var bn1.num_batches_tracked layer1.0.conv1.weight"


@pytest.mark.parametrize("form", FORMS)
def test_cifar_networks_go_to_a_state_dict_and_back(form, path):
    torch.manual_seed(0)
    network = FORMS[form]()
    x = images(4, size=16, channels=network.stem.conv.in_channels)
    weights = written(used(network, x), path)
    assert " ".join(list(weights)[:7]) == NAMES
    assert list(weights)[-2:] == ["linear.weight", "linear.bias"]
    back = from_checkpoint(path)
    assert_same_weights(back.state_dict(), network.state_dict())
    assert back.blueprint == network.blueprint
    assert not any(module.training for module in back.modules())
    assert_plain(back, weights, x)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", [None, "state_dict", "model", "net"])
@pytest.mark.parametrize("wrapper", ["", "module.", "module._orig_mod."])
def test_checkpoints_as_people_share_them(path, legacy, place, wrapper):
    torch.manual_seed(0)
    network = resnet(14, width=4, shortcut="B")
    weights = written(network, path)
    respelled = {
        wrapper + name.replace("linear", "fc").replace("shortcut", "downsample"): tensor
        for name, tensor in weights.items()
        if not name.endswith("num_batches_tracked")
    }
    content = {"epoch": 3, "acc": 91.5, place: respelled} if place else respelled
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert_same_weights(from_checkpoint(path).state_dict(), network.state_dict())


@pytest.mark.parametrize("name", [*SMALL, "resnext50_32x4d"])
def test_state_dicts_of_torchvision(name, path):
    torch.manual_seed(0)
    model = MODELS[name]()
    torch.save(model.state_dict(), path)
    network = from_checkpoint(path)
    if "dilated" in name:  # which a state dict does not show
        assert network.blueprint.arguments["dilated"] == [False, False, False]
        network = from_torchvision(model)
    x = suitable(model)
    assert_same_weights(written(network, path), model.state_dict())
    assert_same_logits(network, model, x)


def test_four_stages_under_the_names_of_cifar_networks(path):
    model = MODELS["for CIFAR"]()
    weights = model.state_dict()
    respelled = {name.replace("fc", "linear").replace("downsample", "shortcut"): t for name, t in weights.items()}
    torch.save({"net": respelled, "acc": 95.1, "epoch": 200}, path)
    network = from_checkpoint(path)
    assert network.blueprint.arguments["stem"] == "cifar"
    assert_same_weights(to_torchvision(network).state_dict(), weights)


def test_other_numbers_than_float32_stay(path):
    weights = {name: t.double() if t.is_floating_point() else t for name, t in resnet(14, width=4).state_dict().items()}
    assert all(t.dtype == torch.float32 for name, t in written(resnet(14, width=4), path).items() if "tracked" not in name)
    double = resnet(14, width=4).double()
    double.load_state_dict(weights)
    to_checkpoint(double, path)
    assert_same_weights(from_checkpoint(path).state_dict(), weights)


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        from_checkpoint(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


def test_all_names_that_do_not_fit_are_listed(path):
    weights = written(resnet(14, width=4), path)
    missing = ["bn1.running_mean", "layer2.0.conv2.weight", "linear.bias"]
    for name in missing:
        del weights[name]
    misshaped = {"layer1.0.bn1.weight": torch.ones(5), "layer3.1.conv1.weight": torch.zeros(16, 16, 1, 1)}
    weights |= {**misshaped, "layer1.0.conv3.weight": torch.zeros(1), "fc2.weight": torch.zeros(1)}
    weights["bn1.bias"] = weights["bn1.bias"].to(torch.int8)
    torch.save(weights, path)
    text = refusal(path)
    assert f"missing: {', '.join(missing)};" in text
    assert "not part of it: layer1.0.conv3.weight, fc2.weight;" in text
    shapes = text.partition("of another shape: ")[2]
    assert "layer1.0.bn1.weight (5,) in the place of (4,)" in shapes
    assert "layer3.1.conv1.weight (16, 16, 1, 1) in the place of (16, 16, 3, 3)" in shapes
    assert "bn1.bias (4,) torch.int8" in shapes
    assert len(shapes.split(", ")) == len(re.findall(r", ", shapes)) + 1


@pytest.mark.parametrize("words", ["missing", "not part of it", "of another shape"])
def test_a_single_wrong_name_of_torchvision_is_enough(words, path):
    weights = small(Bottleneck).state_dict()
    weights["layer4.0.conv9.weight" if words == "not part of it" else "layer4.0.bn3.weight"] = torch.zeros(3)
    if words == "missing":
        del weights["layer4.0.bn3.weight"]
    torch.save(weights, path)
    text = refusal(path)
    assert (words in text, "imagenet_resnet" in text, text.count("layer")) == (True, True, 1)


CONTENTS = {
    "no state dict": [{}, [1], torch.zeros(2), {"state_dict": 3}, {"epoch": 3}, {"model": {"conv1.weight": "text"}}],
    "missing": [{"weight": torch.zeros(2)}, {"conv1.weight": torch.zeros(())}, {"layer4.999999999999.conv1": torch.zeros(1)}],
    "continuum.load": [{"continuum": {}, "state_dict": {}}],
}


@pytest.mark.parametrize("words", CONTENTS)
def test_files_of_something_else(words, path):
    for content in CONTENTS[words]:
        torch.save(content, path)
        assert words in refusal(path)


def test_depths_that_no_network_has(path):
    weights = {name: t for name, t in written(resnet(14, width=4), path).items() if not re.match(r"layer\d\.1", name)}
    torch.save(weights, path)
    assert "depth is 6 n + 2" in refusal(path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["alone", "beside", "inside"])
def test_pickled_code_is_not_executed(path, tmp_path, place, legacy):
    code = Malicious(tmp_path / "executed")
    weights = written(resnet(14, width=4), path)
    content = {"alone": code, "beside": {"state_dict": weights, "code": code}, "inside": {**weights, "code": code}}[place]
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert "pickled code" in refusal(path)
    torch.save(small(), path, _use_new_zipfile_serialization=not legacy)  # a whole model is code too
    assert "torchvision.models.resnet.ResNet" in refusal(path)
    assert not (tmp_path / "executed").exists()


# Programs
def runner(path):
    """What is in an exported file, as a function of images."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def coarse_odenet():
    return odenet(width=4, downsample=False, solver="bosh3:rtol=1e-1,atol=1e-1")


EXPORTED = {
    "resnet": (lambda: resnet(14, width=4), images(3, size=16)),
    "a step in two": (lambda: preresnet(14, width=4, solver="midpoint:h=1"), images(1, size=8)),
    "frozen odenet": (lambda: coarse_odenet().frozen(images(4, 8, 1)), images(4, 8, 1)),
    "frozen mlp": (lambda: mlp(hidden=8).frozen(torch.ones(2, 2)), torch.ones(2, 2)),
}


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("name", EXPORTED)
def test_programs_compute_the_same_for_any_number_of_images(name, suffix, tmp_path):
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    build, x = EXPORTED[name]
    network = build()
    used(network, x.repeat_interleave(2, 0)).train()
    modes = [module.training for module in network.modules()]
    assert 0 <= export(network, tmp_path / f"program{suffix}", x) <= 1e-6
    assert [module.training for module in network.modules()] == modes
    run = runner(tmp_path / f"program{suffix}")
    for batch in (1, 2, 7):
        y = torch.randn(batch, *x.shape[1:])
        torch.testing.assert_close(run(y), network.eval()(y).detach(), rtol=1e-5, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == [f"program{suffix}"]


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    network, x = mlp(hidden=4, solver="euler"), torch.ones(2, 2)

    def refusal(error, message, suffix=".pt2", network=network, x=x):
        with pytest.raises(error, match=message):
            export(network, tmp_path / f"program{suffix}", x)

    refusal(TypeError, r"dopri5.*frozen\(images\)", network=network.with_solver("dopri5"))
    refusal(ValueError, r"\.pt2 or \.onnx", ".pth")
    refusal(ValueError, "one image", x=x[:0])
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refusal(ImportError, r"onnxscript: pip install 'continuum-ode\[export\]'", ".onnx")
    with torch.no_grad():
        network.head.bias[0] = float("nan")
    refusal(ExportError, "differs from the network by nan")
    assert not list(tmp_path.iterdir())


def test_a_program_that_computes_otherwise_is_not_written(tmp_path, monkeypatch):
    network, x = mlp(hidden=4, solver="euler"), torch.ones(2, 2)
    other = mlp(hidden=4, solver="euler")
    other.load_state_dict(network.state_dict())
    with torch.no_grad():
        other.head.bias.add_(1e-2)
    trace = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda network, *rest, **options: trace(other.eval(), *rest, **options))
    with pytest.raises(ExportError, match=r"differs from the network by 0\.0"):
        export(network, tmp_path / "program.pt2", x)
    monkeypatch.undo()
    monkeypatch.setattr(torch.export, "save", failing(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export(network, tmp_path / "program.pt2", x)
    assert not list(tmp_path.iterdir())


# The command line
def run(*arguments):
    main(["convert", *map(str, arguments)])


@pytest.mark.usefixtures("command_line")
def test_convert_there_and_back(capsys, refused):
    weights = written(resnet(14, width=4, shortcut="B"), Path("published.th"))
    run("published.th", "network.pt")
    parameters = sum(p.numel() for p in continuum.load("network.pt").parameters())
    assert capsys.readouterr().out.splitlines() == [
        f"read published.th: resnet, {parameters:,} parameters, euler:h=1; what has no weights (strides, activations, pooling) "
        "is taken to be as published",
        "wrote network.pt: a continuum checkpoint",
    ]
    run("network.pt", "new/back.pth")
    assert capsys.readouterr().out.splitlines()[-1] == "wrote new/back.pth: a state dict"
    assert_same_weights(torch.load("new/back.pth", weights_only=True), weights)

    run("published.th", "adaptive.ckpt", "--solver", "dopri5:rtol=1e-2,atol=1e-2")
    assert str(continuum.load("adaptive.ckpt").solver) == "dopri5:rtol=0.01,atol=0.01"
    assert "under the solver 'euler'" in refused("convert", "adaptive.ckpt", "back.th")
    run("adaptive.ckpt", "back.th", "--solver", "euler")
    assert_same_weights(torch.load("back.th", weights_only=True), weights)


@pytest.mark.usefixtures("command_line")
def test_convert_to_programs(capsys, refused):
    torch.manual_seed(0)
    continuum.save(coarse_odenet(), "network.pt")
    network = continuum.load("network.pt")
    x = torch.randn(3, 1, 8, 8)
    assert re.search("--solver.*--freeze|--freeze.*--solver", refused("convert", "network.pt", "program.pt2"))
    run("network.pt", "program.pt2", "--solver", "rk4:h=0.5", "--image_size", 8)
    assert "wrote program.pt2: a program for images of (batch, 1, 8, 8)" in capsys.readouterr().out
    torch.testing.assert_close(runner(Path("program.pt2"))(x), network.with_solver("rk4:h=0.5")(x), rtol=1e-5, atol=1e-5)
    run("network.pt", "frozen.pt2", "--freeze", "--image_size", 8)
    assert "steps accepted on standard normal" in capsys.readouterr().out
    torch.testing.assert_close(runner(Path("frozen.pt2"))(x), network(x), rtol=1e-1, atol=1e-1)
    continuum.save(mlp(hidden=4, solver="rk4"), "mlp.pt")
    run("mlp.pt", "mlp.pt2")
    assert "images of (batch, 2)" in capsys.readouterr().out
    assert "vectors" in refused("convert", "mlp.pt", "mlp.pt2", "--image_size", 8)


@pytest.mark.usefixtures("command_line")
def test_the_sizes_of_programs(capsys):
    pytest.importorskip("onnxscript")
    torch.save(small(classes=3).state_dict(), "model.pth")
    run("model.pth", "program.onnx")
    assert "(batch, 3, 224, 224); largest relative difference" in capsys.readouterr().out
    assert runner(Path("program.onnx"))(images(1, 224)).shape == (1, 3)
    to_checkpoint(resnet(14, width=4), "cifar.th")
    run("cifar.th", "cifar.pt2", "--solver", "euler:h=0.5")
    assert "(batch, 3, 32, 32)" in capsys.readouterr().out


MISTAKES = {
    "network.pt other.pt": "nothing to do",
    "weights.th other.pth": "nothing to do",
    "network.pt folder/../network.pt": "DEST is SOURCE",
    "nothing.pt other.pth": "no checkpoint at",
    "junk.pt other.pt": "not a file of torch.save",
    "network.pt other.pth --solver euler": "odenet",
    "network.pt other.pt2 --solver rk5": "rk5",
    "network.pt other.pt2 --solver linear_two_step": "Momentum",
    "weights.th other.pt --freeze": "export",
    "weights.th other.pt --image_size 32": "export",
    "weights.th other.pt2 --image_size 0": "image_size",
    "network.pt other.pt2 --freeze --image_size 2": "cannot take images of 2x2",
    "weights.th other.pt2 --freeze": "adaptive",
    "weights.th junk.pt/other.pt": "junk.pt",
}


@pytest.mark.usefixtures("command_line")
def test_mistakes_end_in_one_line(refused, monkeypatch):
    to_checkpoint(resnet(14, width=4), "weights.th")
    continuum.save(odenet(width=4), "network.pt")
    Path("junk.pt").write_bytes(b"junk")
    Path("folder").mkdir()
    before = sorted(Path().iterdir())
    for arguments, words in MISTAKES.items():
        assert words in refused("convert", *arguments.split()), arguments
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "pip install" in refused("convert", "weights.th", "other.onnx")
    monkeypatch.setattr(torch, "save", failing(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run("weights.th", "other.pt")
    assert sorted(Path().iterdir()) == before
