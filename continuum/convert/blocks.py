"""Which field a published residual block is: x + f(x), relu(x + f(x)), or part by part, y = x + f1(x), x+ = y + f2(y).

A block is known by the name of its class, so that no library is imported for it. What a block computes is written down once
more here, as a function of a `View`, which has the submodules and weights of the block under the same names.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from continuum.fields import Autonomous, Field, PostActivation, Split
from continuum.types import State, Time


class View(nn.Module):
    """A part of a block: `function` of its submodules and weights `names`, which are the block's own."""

    def __init__(self, function: Callable[..., Tensor], block: nn.Module, names: str) -> None:
        super().__init__()
        self.function = function
        for name in names.split():
            setattr(self, name, getattr(block, name))

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        return self.function(self, x, *context)

    def extra_repr(self) -> str:
        return self.function.__name__.strip("_")


class Difference(Field):
    """The field of any block that keeps the shape of its input, f(t, x) = block(x) - x.

    Exact to rounding only, since x + (block(x) - x) is block(x) only if nothing is lost in the difference. A block that
    normalises its sum, as BERT's, is no step of an equation: its differences do not get smaller with the step.
    """

    takes_number = True

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, t: Time, x: State, *context: Any) -> State:
        return self.block(x, *context) - x


def field_of(block: nn.Module) -> Field | None:
    """The field of a block of a known class; None for any other, and for one that changes the size."""
    kind = type(block)
    known = BLOCKS.get(f"{kind.__module__}.{kind.__qualname__}")
    return known(block) if known is not None else None


def _one(function: Callable[..., Tensor], names: str, residual: Callable[[Any], bool] = lambda block: True) -> Any:
    """Blocks x + f(x), those that are `residual`."""
    return lambda block: Autonomous(View(function, block, names)) if residual(block) else None


def _post(function: Callable[..., Tensor], names: str, residual: Callable[[Any], bool]) -> Any:
    """Blocks relu(x + f(x))."""
    return lambda block: PostActivation(View(function, block, names)) if residual(block) else None


def _parts(first: Callable[..., Tensor], names: str, second: Callable[..., Tensor], others: str) -> Any:
    """Blocks y = x + f1(x), x+ = y + f2(y)."""
    return lambda block: Split(Autonomous(View(first, block, names)), Autonomous(View(second, block, others)))


# torchvision


def _convnext(v: Any, x: Tensor) -> Tensor:
    return v.stochastic_depth(v.layer_scale * v.block(x))


def _inverted(v: Any, x: Tensor) -> Tensor:
    return v.stochastic_depth(v.block(x))


def _block(v: Any, x: Tensor) -> Tensor:
    return v.block(x)


def _conv(v: Any, x: Tensor) -> Tensor:
    return v.conv(x)


def _layers(v: Any, x: Tensor) -> Tensor:
    return v.layers(x)


def _regnet(v: Any, x: Tensor) -> Tensor:
    return v.f(x)


def _basic(v: Any, x: Tensor) -> Tensor:
    return v.bn2(v.conv2(v.relu(v.bn1(v.conv1(x)))))


def _bottleneck(v: Any, x: Tensor) -> Tensor:
    return v.bn3(v.conv3(v.relu(v.bn2(v.conv2(v.relu(v.bn1(v.conv1(x))))))))


def _attention(v: Any, x: Tensor) -> Tensor:
    x = v.ln_1(x)
    return v.dropout(v.self_attention(x, x, x, need_weights=False)[0])


def _feed_forward(v: Any, x: Tensor) -> Tensor:
    return v.mlp(v.ln_2(x))


def _swin_attention(v: Any, x: Tensor) -> Tensor:
    return v.stochastic_depth(v.attn(v.norm1(x)))


def _swin_mlp(v: Any, x: Tensor) -> Tensor:
    return v.stochastic_depth(v.mlp(v.norm2(x)))


def _swin2_attention(v: Any, x: Tensor) -> Tensor:
    return v.stochastic_depth(v.norm1(v.attn(x)))


def _swin2_mlp(v: Any, x: Tensor) -> Tensor:
    return v.stochastic_depth(v.norm2(v.mlp(x)))


def _mbconv(v: Any, x: Tensor) -> Tensor:
    return v.stochastic_depth(v.layers(x))


def _window_attention(v: Any, x: Tensor) -> Tensor:
    return _windowed(v, x, lambda x: v.stochastic_dropout(v.attn_layer(x)))


def _window_mlp(v: Any, x: Tensor) -> Tensor:
    return _windowed(v, x, lambda x: v.stochastic_dropout(v.mlp_layer(x)))


def _windowed(v: Any, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
    """A branch on the windows or the grid of MaxViT; the sum, entry by entry, does not see how the entries are laid out."""
    rows, columns = v.grid_size[0] // v.p, v.grid_size[1] // v.p
    x = branch(v.partition_swap(v.partition_op(x, v.p)))
    return v.departition_op(v.departition_swap(x), v.p, rows, columns)


_WINDOWS = "grid_size p partition_op partition_swap departition_op departition_swap stochastic_dropout"

BLOCKS: dict[str, Callable[[nn.Module], Field | None]] = {
    f"torchvision.models.{name}": field
    for name, field in {
        "resnet.BasicBlock": _post(_basic, "conv1 bn1 relu conv2 bn2", lambda b: b.downsample is None),
        "resnet.Bottleneck": _post(_bottleneck, "conv1 bn1 relu conv2 bn2 conv3 bn3", lambda b: b.downsample is None),
        "regnet.ResBottleneckBlock": _post(_regnet, "f", lambda b: b.proj is None and type(b.activation) is nn.ReLU),
        "convnext.CNBlock": _one(_convnext, "block layer_scale stochastic_depth"),
        "efficientnet.MBConv": _one(_inverted, "block stochastic_depth", lambda b: b.use_res_connect),
        "efficientnet.FusedMBConv": _one(_inverted, "block stochastic_depth", lambda b: b.use_res_connect),
        "mobilenetv2.InvertedResidual": _one(_conv, "conv", lambda b: b.use_res_connect),
        "mobilenetv3.InvertedResidual": _one(_block, "block", lambda b: b.use_res_connect),
        "mnasnet._InvertedResidual": _one(_layers, "layers", lambda b: b.apply_residual),
        "vision_transformer.EncoderBlock": _parts(_attention, "ln_1 self_attention dropout", _feed_forward, "ln_2 mlp"),
        "swin_transformer.SwinTransformerBlock": _parts(
            _swin_attention, "norm1 attn stochastic_depth", _swin_mlp, "norm2 mlp stochastic_depth"
        ),
        "swin_transformer.SwinTransformerBlockV2": _parts(
            _swin2_attention, "norm1 attn stochastic_depth", _swin2_mlp, "norm2 mlp stochastic_depth"
        ),
        "maxvit.MBConv": _one(_mbconv, "layers stochastic_depth", lambda b: type(b.proj) is nn.Identity),
        "maxvit.PartitionAttentionLayer": _parts(
            _window_attention, f"attn_layer {_WINDOWS}", _window_mlp, f"mlp_layer {_WINDOWS}"
        ),
    }.items()
}
"""The field of each known class of blocks, or None where a block changes the size of its state."""
