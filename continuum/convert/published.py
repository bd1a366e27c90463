"""Published networks made continuous, and back: torchvision's ResNets, and checkpoints of ResNets as people share them.

A block relu(x + F(x)) of theirs is an Euler step of ours, so what is converted computes the same to the bit:

| theirs          | ours                                                                   |
| --------------- | ---------------------------------------------------------------------- |
| conv1, bn1      | `stem`                                                                 |
| layerN.0        | a `Transition` if its shortcut changes the size, else the first layer  |
| layerN.1, ...   | the layers of a `Flow`                                                 |
| fc or linear    | `head.linear`                                                          |
"""

import copy
import os
import re
import zipfile
from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from continuum.flow import Flow
from continuum.models.archive import CheckpointError, existing, one_line, pack, unpacked
from continuum.models.checkpoint import KEY
from continuum.models.network import Network
from continuum.models.parts import ConvNorm, Transition
from continuum.schemes import Euler
from continuum.solvers import FixedStep
from continuum.zoo import BUILDERS, imagenet_resnet, resnet


class Spelling(NamedTuple):
    """What a network calls its last layer and the shortcuts of its blocks."""

    linear: str
    shortcut: str


TORCHVISION = Spelling("fc", "downsample")
CIFAR = Spelling("linear", "shortcut")

WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")
"""What DataParallel, torch.compile and training scripts put before every name of a state dict."""

PLACES = ("state_dict", "model", "net", "model_state_dict")
"""Where a checkpoint keeps its state dict beside facts of the training."""


def from_torchvision(model: ResNet) -> Network:
    """The `imagenet_resnet` with the weights of a torchvision ResNet (arXiv 1512.03385), and its relatives.

    ResNeXt (arXiv 1611.05431), wide (arXiv 1605.07146) and dilated ones, any number of blocks, classes and input channels;
    also with the usual stem for CIFAR, a 3x3 convolution and `Identity` in the place of the pooling. Weights are copied;
    their types, devices and `requires_grad`, and the modes of the norms, stay as they are. Under Euler with h = 1 logits,
    running statistics and gradients are those of `model`.

    >>> from torchvision.models import resnet18
    >>> model = resnet18().eval()
    >>> network = from_torchvision(model)
    >>> images = torch.randn(2, 3, 64, 64)
    >>> torch.equal(network(images), model(images))
    True

    Raises:
        TypeError: not a ResNet of torchvision, or changed in a way that the message names: modules of other kinds, hooks,
            parametrizations, shared weights.
    """
    if type(model) is not ResNet:
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        raise TypeError(
            f"from_torchvision takes torchvision.models.resnet.ResNet itself, not a {kind}, which may compute something else. "
            "If it does not, from_checkpoint takes its state dict, where what has no weights cannot be seen: strides, "
            "activations, pooling and blurs"
        )
    arguments = _imagenet_arguments(model.state_dict(), TORCHVISION)
    modules = dict(model.named_modules())
    if arguments["block"] == "bottleneck":
        convs = [modules.get(f"layer{layer}.0.conv2") for layer in (2, 3, 4)]
        arguments["dilated"] = [isinstance(conv, nn.Conv2d) and conv.stride == (1, 1) for conv in convs]
    with torch.device("meta"):
        _refuse_differences(model, _new_torchvision(arguments), "this ResNet cannot be converted")
        network = imagenet_resnet(**arguments).train(model.training)
    for ours, theirs in _names(network, TORCHVISION).items():
        network.set_submodule(ours, copy.deepcopy(modules[theirs]))
    return network


def to_torchvision(network: Network) -> ResNet:
    """The torchvision ResNet with the weights of an `imagenet_resnet`: what `from_torchvision` came from, key by key.

    Raises:
        TypeError: another network, one that was refined, projected or changed by hand, or a solver other than "euler".
    """
    _check(network, (imagenet_resnet.__name__,))
    assert network.blueprint is not None
    names = _names(network, TORCHVISION)
    arguments = _imagenet_arguments(_weights(network, names), TORCHVISION)
    with torch.device("meta"):
        model = _new_torchvision({**arguments, "dilated": network.blueprint.arguments["dilated"]})
    model.train(network.training)
    for ours, theirs in names.items():
        model.set_submodule(theirs, copy.deepcopy(network.get_submodule(ours)))
    return model


def from_checkpoint(path: str | os.PathLike[str]) -> Network:
    """The network of a published state dict of post-activation blocks, on the CPU and in evaluation mode.

    Three stages of basic blocks give a `resnet`, with shortcuts A where they have no weights, four stages an
    `imagenet_resnet`. The last layer is called linear or fc, the shortcuts shortcut or downsample; names may begin with
    module., and the state dict may lie under state_dict, model or net. Sizes and numbers are read off the shapes. What has no
    weights cannot be seen and is taken to be as published: strides, activations, pooling, no dilation. A variant that differs
    in these alone, as one that blurs where it strides, gives a network with other logits; compare them on a few images.

    Raises:
        FileNotFoundError: nothing at `path`.
        CheckpointError: not readable as plain tensors (no pickled code is executed), or not the weights of such a network:
            all names that are missing, too many or of another shape.
    """
    weights = _state_dict(path)
    deep = any(name.startswith("layer4.") for name in weights)
    spelling = Spelling(
        linear="linear" if any(name.startswith("linear.") for name in weights) else "fc",
        shortcut="shortcut" if any(".shortcut." in name for name in weights) else "downsample",
    )
    try:
        with torch.device("meta"):
            if deep:
                network = imagenet_resnet(**_imagenet_arguments(weights, spelling))
            else:
                network = resnet(**_cifar_arguments(weights, spelling))
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no ResNet that can be built: {error}") from None
    names = _names(network, spelling)
    expected = _weights(network, names)
    for name in expected.keys() - weights.keys():
        if name.endswith(".num_batches_tracked"):  # older than torch 0.4.1, which began to count
            weights[name] = torch.tensor(0)
    if faults := _faults(weights, expected):
        assert network.blueprint is not None
        raise CheckpointError(f"{path} does not fit the {network.blueprint.builder} of its shapes: {'; '.join(faults)}")
    for ours, theirs in names.items():
        module = network.get_submodule(ours)
        module.load_state_dict({leaf: weights[f"{theirs}.{leaf}"].clone() for leaf in module.state_dict()}, assign=True)
    return network.eval()


def to_checkpoint(network: Network, path: str | os.PathLike[str]) -> None:
    """Write the state dict of a `resnet` or `imagenet_resnet` under the names of published ones; `from_checkpoint` reads it.

    A `resnet` has linear and shortcut, an `imagenet_resnet` torchvision's names. Dilation is not in a state dict.

    Raises:
        TypeError: another network, one that was refined, projected or changed by hand, or a solver other than "euler".
    """
    _check(network, (resnet.__name__, imagenet_resnet.__name__))
    assert network.blueprint is not None
    spelling = CIFAR if network.blueprint.builder == resnet.__name__ else TORCHVISION
    weights = _weights(network, _names(network, spelling))
    pack(weights, path)


def _names(network: Network, spelling: Spelling) -> dict[str, str]:
    """Their name of each of our modules with weights, in the order of their state dict."""
    names = {"stem.conv": "conv1", "stem.norm": "bn1"}
    layer = 1
    for index, stage in enumerate(network.stages):
        if isinstance(stage, Transition):
            layer += index > 0  # a transition opens each stage but, where the size stays, the first
            names |= _branch_names(stage.branch, f"stages.{index}.branch", f"layer{layer}.0")
            if isinstance(stage.shortcut, ConvNorm):
                names[f"stages.{index}.shortcut.conv"] = f"layer{layer}.0.{spelling.shortcut}.0"
                names[f"stages.{index}.shortcut.norm"] = f"layer{layer}.0.{spelling.shortcut}.1"
        elif isinstance(stage, Flow):
            for k, field in enumerate(stage.field.pieces()):
                ours, theirs = f"stages.{index}.field.layers.{k}.branch", f"layer{layer}.{k + (index > 0)}"
                names |= _branch_names(field.get_submodule("branch"), ours, theirs)
    return {**names, "head.linear": spelling.linear}


def _branch_names(branch: nn.Module, ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{name}": f"{theirs}.{name.replace('norm', 'bn')}" for name, _ in branch.named_children()}


def _weights(network: Network, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The network's state dict under their names."""
    return {
        f"{theirs}.{leaf}": tensor
        for ours, theirs in names.items()
        for leaf, tensor in network.get_submodule(ours).state_dict().items()
    }


def _size(weights: Mapping[str, Tensor], name: str, axis: int, default: int) -> int:
    """The size of an axis; the default where there is no such tensor, for the comparison that follows to say so."""
    tensor = weights.get(name)
    return tensor.shape[axis] if tensor is not None and tensor.ndim > axis else default


def _blocks(weights: Mapping[str, Tensor], layer: int) -> int:
    found = [re.match(rf"layer{layer}\.(\d{{1,3}})\.", name) for name in weights]
    return max((1 + int(match[1]) for match in found if match), default=0)


def _imagenet_arguments(weights: Mapping[str, Tensor], spelling: Spelling) -> dict[str, Any]:
    """The arguments of `imagenet_resnet` that a state dict shows: all but the dilation."""
    bottleneck = any(name.startswith("layer1.0.conv3.") for name in weights)
    inner = _size(weights, "layer1.0.conv1.weight", 0, 64)
    groups = max(1, inner // max(1, _size(weights, "layer1.0.conv2.weight", 1, inner)))
    return {
        "blocks": [_blocks(weights, layer) or 1 for layer in (1, 2, 3, 4)],
        "block": "bottleneck" if bottleneck else "basic",
        "groups": groups if bottleneck else 1,
        "group_width": inner // groups if bottleneck else 64,
        "dilated": [False, False, False],
        "num_classes": _size(weights, f"{spelling.linear}.weight", 0, 1000),
        "stem": "cifar" if _size(weights, "conv1.weight", 3, 7) == 3 else "imagenet",
        "in_channels": _size(weights, "conv1.weight", 1, 3),
    }


def _cifar_arguments(weights: Mapping[str, Tensor], spelling: Spelling) -> dict[str, Any]:
    """The arguments of `resnet` that a state dict shows."""
    return {
        "depth": 6 * (max(_blocks(weights, layer) for layer in (1, 2, 3)) or 3) + 2,
        "num_classes": _size(weights, f"{spelling.linear}.weight", 0, 10),
        "width": _size(weights, "conv1.weight", 0, 16),
        "in_channels": _size(weights, "conv1.weight", 1, 3),
        "shortcut": "B" if any(f".{spelling.shortcut}." in name for name in weights) else "A",
    }


def _new_torchvision(arguments: Mapping[str, Any]) -> ResNet:
    """The torchvision ResNet that the arguments of `imagenet_resnet` describe."""
    model = ResNet(
        BasicBlock if arguments["block"] == "basic" else Bottleneck,
        list(arguments["blocks"]),
        arguments["num_classes"],
        groups=arguments["groups"],
        width_per_group=arguments["group_width"],
        replace_stride_with_dilation=list(arguments["dilated"]),
    )
    if arguments["stem"] == "cifar":
        model.conv1 = nn.Conv2d(arguments["in_channels"], 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    else:
        model.conv1 = nn.Conv2d(arguments["in_channels"], 64, 7, stride=2, padding=3, bias=False)
    return model


def _check(network: Network, builders: tuple[str, ...]) -> None:
    """Refuse a network that is not a discrete one of these builders, as they left it."""
    blueprint = network.blueprint
    if blueprint is None or blueprint.builder not in builders:
        built = "an unknown builder" if blueprint is None else blueprint.builder
        raise TypeError(f"only networks of {' or '.join(builders)} have such a form; this one is of {built}")
    if blueprint.changes:
        changes = ", ".join(f"{name}({', '.join(map(repr, rest))})" for name, *rest in blueprint.changes)
        raise TypeError(f"after {changes} the flows of this network are no longer the blocks of a {blueprint.builder}")
    for index, stage in enumerate(network.stages):
        if isinstance(stage, Flow) and stage.solver != FixedStep(Euler()):
            raise TypeError(
                f"the blocks of a {blueprint.builder} are Euler's steps with h = 1, but flow stages.{index} is solved by "
                f"{stage.solver}: put the network under the solver 'euler' first"
            )
    with torch.device("meta"):
        reference = BUILDERS[blueprint.builder](**{**blueprint.arguments, "solver": "euler"})
    _refuse_differences(network, reference, f"this network is no longer the {blueprint.builder} it was built as")


def _refuse_differences(model: nn.Module, reference: nn.Module, fault: str) -> None:
    """Raise TypeError with `fault` and the modules and tensors of `model` that are not as in `reference`."""
    described, expected = _described(model), _described(reference)
    found: dict[str, str] = {}
    for name in {**described, **expected}:
        inside = any(name.startswith(f"{other}.") for other in found)
        if not inside and described.get(name) != expected.get(name):
            found[name] = described[name][1] if name in described else "missing, or shared with another"
    if found:
        listed = [f"{name}: {what}" if name else what for name, what in found.items()]
        more = f", and {len(listed) - 4} more" if len(listed) > 4 else ""
        raise TypeError(f"{fault}: {', '.join(listed[:4])}{more}")


def _described(model: nn.Module) -> dict[str, tuple[type, str]]:
    """All that a model computes with but the numbers: its modules, parameters and buffers by name."""
    modules = {name: (type(module), _shown(module)) for name, module in model.named_modules()}
    tensors = chain(model.named_parameters(), model.named_buffers())
    return {**modules, **{name: (type(t), f"{type(t).__name__} of shape {tuple(t.shape)}") for name, t in tensors}}


def _shown(module: nn.Module) -> str:
    inner = [module.extra_repr()] if module.extra_repr() and not isinstance(module, nn.ReLU) else []  # in place or not
    outer = ["..."] if next(module.children(), None) is not None else []
    hooks = any(value for name, value in vars(module).items() if name.endswith("_hooks"))
    hooks = hooks or any(parameter._backward_hooks for parameter in module.parameters(recurse=False))
    replaced = any(callable(getattr(type(module), name, None)) for name in vars(module))
    changed = " with hooks" if hooks else " with a method of its own" if replaced else ""
    return f"{type(module).__name__}({', '.join(inner + outer)}){changed}"


def _faults(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with a state dict, every name of it."""
    missing = [name for name in expected if name not in weights]
    extra = [name for name in weights if name not in expected]
    misshaped = [
        f"{name} {_form(weights[name])} in the place of {_form(tensor)}"
        for name, tensor in expected.items()
        if name in weights and _form(weights[name]) != _form(tensor)
    ]
    kinds = {"missing": missing, "not part of it": extra, "of another shape": misshaped}
    return [f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names]


def _form(tensor: Tensor) -> str:
    """Shape and kind of numbers; of floating-point ones any will do."""
    return f"{tuple(tensor.shape)}" if tensor.is_floating_point() else f"{tuple(tensor.shape)} {tensor.dtype}"


def _state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a file of torch.save, old or new, without wrappers."""
    path = existing(path)
    if zipfile.is_zipfile(path):
        content = unpacked(path)
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # the old format has no checksum: a broken file fails anywhere in the reader
            code = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = f"pickled code ({code[1]}), which is never executed" if code else one_line(error)
            raise CheckpointError(f"{path} is not a file of torch.save, or it is truncated: {reason}") from None
    if isinstance(content, Mapping) and KEY in content:
        raise CheckpointError(f"{path} is a continuum checkpoint already: continuum.load reads it")
    for place in [content, *(content.get(name) for name in PLACES)] if isinstance(content, Mapping) else []:
        if isinstance(place, Mapping) and place and all(isinstance(value, Tensor) for value in place.values()):
            return _unwrapped({str(name): tensor for name, tensor in place.items()})
    raise CheckpointError(f"{path} holds no state dict: tensors by name, alone or under {', '.join(PLACES)}")


def _unwrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in weights):
            return _unwrapped({name.removeprefix(wrapper): tensor for name, tensor in weights.items()})
    return weights
