"""Which field a block of a published family is. A block is known by the name of its class: no library is imported for it.

A new family is a line in one of the tables, and what its blocks compute between their sums.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, cat, nn, stack
from torch.nn.functional import scaled_dot_product_attention

from continuum.convert.blocks import Function, Residual, Summand, post_activation
from continuum.fields import Field

Known = Callable[[Any], Field | None]

NOTHING: Mapping[str, Any] = MappingProxyType({})
"""What a block is called with by name, where that is nothing."""


def field_of(block: nn.Module) -> Field | None:
    """The field of a block of a known class; None for any other, and for one that changes the size."""
    kind = type(block)
    known = FAMILIES.get(f"{kind.__module__}.{kind.__qualname__}")
    return known(block) if known is not None else None


def _sum(*functions: Summand, unless: str = "", only: str = "") -> Known:
    """Blocks with these branches, where the attribute `unless` is None and the attribute `only` is true."""

    def field(block: nn.Module) -> Field | None:
        whole = (not unless or getattr(block, unless) is None) and (not only or getattr(block, only))
        return Residual(block, *functions) if whole else None

    return field


def _relu(function: Function, shortcut: str, activation: str) -> Known:
    """Blocks relu(x + f(x)), where the `shortcut` is None and the `activation` a ReLU."""

    def field(block: nn.Module) -> Field | None:
        whole = getattr(block, shortcut) is None and type(getattr(block, activation)) is nn.ReLU
        return post_activation(block, function) if whole else None

    return field


def _identity(shortcut: str, *functions: Summand) -> Known:
    """Blocks whose `shortcut` is a module that does nothing where the size stays."""
    return lambda block: Residual(block, *functions) if type(getattr(block, shortcut)) is nn.Identity else None


# torchvision


def _basic(b: Any, x: Tensor) -> Tensor:
    return b.bn2(b.conv2(b.relu(b.bn1(b.conv1(x)))))


def _bottleneck(b: Any, x: Tensor) -> Tensor:
    return b.bn3(b.conv3(b.relu(b.bn2(b.conv2(b.relu(b.bn1(b.conv1(x))))))))


def _regnet(b: Any, x: Tensor) -> Tensor:
    return b.f(x)


def _convnext(b: Any, x: Tensor) -> Tensor:
    return b.layer_scale * b.block(x)


def _block(b: Any, x: Tensor) -> Tensor:
    return b.block(x)


def _mobilenet2(b: Any, x: Tensor) -> Tensor:
    return b.conv(x)


def _vit_attention(b: Any, x: Tensor) -> Tensor:
    x = b.ln_1(x)
    return b.dropout(b.self_attention(x, x, x, need_weights=False)[0])


def _vit_mlp(b: Any, x: Tensor) -> Tensor:
    return b.mlp(b.ln_2(x))


def _swin_attention(b: Any, x: Tensor) -> Tensor:
    return b.attn(b.norm1(x))


def _swin_mlp(b: Any, x: Tensor) -> Tensor:
    return b.mlp(b.norm2(x))


def _swin2_attention(b: Any, x: Tensor) -> Tensor:
    return b.norm1(b.attn(x))


def _swin2_mlp(b: Any, x: Tensor) -> Tensor:
    return b.norm2(b.mlp(x))


def _layers(b: Any, x: Tensor) -> Tensor:
    return b.layers(x)


def _maxvit_attention(b: Any, x: Tensor) -> Tensor:
    return _on_windows(b, x, b.attn_layer)


def _maxvit_mlp(b: Any, x: Tensor) -> Tensor:
    return _on_windows(b, x, b.mlp_layer)


def _on_windows(b: Any, x: Tensor, branch: nn.Module) -> Tensor:
    """A branch on the windows, or the grid, of an image; its sum with x, entry by entry, does not see where entries lie."""
    rows, columns = b.grid_size[0] // b.p, b.grid_size[1] // b.p
    x = branch(b.partition_swap(b.partition_op(x, b.p)))
    return b.departition_op(b.departition_swap(x), b.p, rows, columns)


TORCHVISION: Mapping[str, Known] = {
    "resnet.BasicBlock": _relu(_basic, "downsample", "relu"),
    "resnet.Bottleneck": _relu(_bottleneck, "downsample", "relu"),
    "regnet.ResBottleneckBlock": _relu(_regnet, "proj", "activation"),
    "convnext.CNBlock": _sum(Summand(_convnext, "stochastic_depth")),
    "efficientnet.MBConv": _sum(Summand(_block, "stochastic_depth"), only="use_res_connect"),
    "efficientnet.FusedMBConv": _sum(Summand(_block, "stochastic_depth"), only="use_res_connect"),
    "mobilenetv2.InvertedResidual": _sum(Summand(_mobilenet2), only="use_res_connect"),
    "mobilenetv3.InvertedResidual": _sum(Summand(_block), only="use_res_connect"),
    "mnasnet._InvertedResidual": _sum(Summand(_layers), only="apply_residual"),
    "vision_transformer.EncoderBlock": _sum(Summand(_vit_attention), Summand(_vit_mlp)),
    "swin_transformer.SwinTransformerBlock": _sum(
        Summand(_swin_attention, "stochastic_depth"), Summand(_swin_mlp, "stochastic_depth")
    ),
    "swin_transformer.SwinTransformerBlockV2": _sum(
        Summand(_swin2_attention, "stochastic_depth"), Summand(_swin2_mlp, "stochastic_depth")
    ),
    "maxvit.MBConv": _identity("proj", Summand(_layers, "stochastic_depth")),
    "maxvit.PartitionAttentionLayer": _sum(
        Summand(_maxvit_attention, "stochastic_dropout"), Summand(_maxvit_mlp, "stochastic_dropout")
    ),
}


# timm


def _timm_attention(b: Any, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    return b.ls1(b.attn(b.norm1(x), attn_mask=mask, is_causal=causal))


def _timm_mlp(b: Any, x: Tensor, *_: object) -> Tensor:
    return b.ls2(b.mlp(b.norm2(x)))


def _timm_attention_then_norm(b: Any, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    return b.norm1(b.attn(x, attn_mask=mask, is_causal=causal))


def _timm_mlp_then_norm(b: Any, x: Tensor, *_: object) -> Tensor:
    return b.norm2(b.mlp(x))


def _timm_attentions(b: Any, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    if mask is None and not causal:
        return _stacked([attention(x) for attention in b.attns])
    heads = [part.attn(part.norm(x), attn_mask=mask, is_causal=causal) for part in b.attns]
    return _stacked([part.drop_path(part.ls(found)) for part, found in zip(b.attns, heads, strict=True)])


def _timm_mlps(b: Any, x: Tensor, *_: object) -> Tensor:
    return _stacked([mlp(x) for mlp in b.ffns])


def _stacked(terms: list[Tensor]) -> Tensor:
    return stack(terms).sum(dim=0)


def _timm_parallel(b: Any, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention and feed-forward part from one projection, of which both see the same x."""
    inner, *heads = b.in_proj(b.in_norm(x)).split(b.in_split, dim=-1)
    q, k, v = (part.unflatten(-1, (b.num_heads, b.head_dim)) for part in heads)
    q, k, v = (part.transpose(1, 2) for part in (b.q_norm(q), b.k_norm(k), v))
    drop = b.attn_drop.p if b.training else 0.0
    attended = scaled_dot_product_attention(q, k, v, mask, drop, causal).transpose(1, 2).flatten(2)
    inner = b.mlp_drop(b.mlp_act(inner if b.mlp_bias is None else inner + b.mlp_bias))
    if b.out_proj is None:
        both = b.attn_out_proj(attended) + b.mlp_out_proj(inner)
    else:
        both = b.out_proj(cat((attended, inner), dim=-1))
    return b.ls(both)


def _timm_convnext(b: Any, x: Tensor) -> Tensor:
    x = b.conv_dw(x)
    x = b.mlp(b.norm(x)) if b.use_conv_mlp else b.mlp(b.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    return x if b.gamma is None else x.mul(b.gamma.reshape(1, -1, 1, 1))


def _timm_swin_attention(b: Any, x: Tensor) -> Tensor:
    return b._attn(b.norm1(x))


def _timm_swin_mlp(b: Any, x: Tensor) -> Tensor:
    return b.mlp(b.norm2(x.flatten(1, 2))).view_as(x)


def _timm_swin2_attention(b: Any, x: Tensor) -> Tensor:
    return b.norm1(b._attn(x))


def _timm_swin2_mlp(b: Any, x: Tensor) -> Tensor:
    return b.norm2(b.mlp(x.flatten(1, 2))).view_as(x)


def _timm_basic(b: Any, x: Tensor) -> Tensor:
    x = b.aa(b.act1(b.drop_block(b.bn1(b.conv1(x)))))
    return _attended(b, b.bn2(b.conv2(x)))


def _timm_bottleneck(b: Any, x: Tensor) -> Tensor:
    x = b.act1(b.bn1(b.conv1(x)))
    x = b.aa(b.act2(b.drop_block(b.bn2(b.conv2(x)))))
    return _attended(b, b.bn3(b.conv3(x)))


def _attended(b: Any, x: Tensor) -> Tensor:
    x = x if b.se is None else b.se(x)
    return x if b.drop_path is None else b.drop_path(x)


def _timm_pre_basic(b: Any, x: Tensor) -> Tensor:
    return b.conv2(b.norm2(b.conv1(b.norm1(x))))


def _timm_pre_bottleneck(b: Any, x: Tensor) -> Tensor:
    return b.conv3(b.norm3(b.conv2(b.norm2(b.conv1(b.norm1(x))))))


def _timm_post_bottleneck(b: Any, x: Tensor) -> Tensor:
    return b.norm3(b.conv3(b.norm2(b.conv2(b.norm1(b.conv1(x))))))


def _twice(attention: Function, mlp: Function) -> Known:
    return _sum(Summand(attention, "drop_path1"), Summand(mlp, "drop_path2"))


TIMM: Mapping[str, Known] = {
    "vision_transformer.Block": _twice(_timm_attention, _timm_mlp),
    "vision_transformer.ResPostBlock": _twice(_timm_attention_then_norm, _timm_mlp_then_norm),
    "vision_transformer.ParallelScalingBlock": _sum(Summand(_timm_parallel, "drop_path"), only="fused_attn"),
    "vision_transformer.ParallelThingsBlock": _sum(Summand(_timm_attentions), Summand(_timm_mlps)),
    "convnext.ConvNeXtBlock": _identity("shortcut", Summand(_timm_convnext, "drop_path")),
    "swin_transformer.SwinTransformerBlock": _twice(_timm_swin_attention, _timm_swin_mlp),
    "swin_transformer_v2.SwinTransformerV2Block": _twice(_timm_swin2_attention, _timm_swin2_mlp),
    "resnet.BasicBlock": _relu(_timm_basic, "downsample", "act2"),
    "resnet.Bottleneck": _relu(_timm_bottleneck, "downsample", "act3"),
    "resnetv2.PreActBasic": _sum(Summand(_timm_pre_basic, "drop_path"), unless="downsample"),
    "resnetv2.PreActBottleneck": _sum(Summand(_timm_pre_bottleneck, "drop_path"), unless="downsample"),
    "resnetv2.Bottleneck": _relu(Summand(_timm_post_bottleneck, "drop_path"), "downsample", "act3"),
}


# transformers


def _llama_attention(
    b: Any,
    x: Tensor,
    mask: Any = None,
    positions: Any = None,
    cache: Any = None,
    use_cache: Any = False,
    rotary: Any = None,
    named: Mapping[str, Any] = NOTHING,
) -> Tensor:
    seen = {"attention_mask": mask, "position_ids": positions, "position_embeddings": rotary}
    return b.self_attn(hidden_states=b.input_layernorm(x), cache=cache, use_cache=use_cache, **seen, **named)[0]


def _llama_mlp(b: Any, x: Tensor, *_: object) -> Tensor:
    return b.mlp(b.post_attention_layernorm(x))


def _gpt2_attention(
    b: Any,
    x: Tensor,
    cache: Any = None,
    mask: Any = None,
    encoded: Any = None,
    encoded_mask: Any = None,
    use_cache: Any = False,
    named: Mapping[str, Any] = NOTHING,
) -> Tensor:
    return b.attn(b.ln_1(x), cache=cache, attention_mask=mask, use_cache=use_cache, **named)[0]


def _gpt2_mlp(b: Any, x: Tensor, *_: object) -> Tensor:
    return b.mlp(b.ln_2(x))


def _hf_vit_attention(b: Any, x: Tensor, mask: Any = None, named: Mapping[str, Any] = NOTHING) -> Tensor:
    return b.dropout(b.attention(b.layernorm_before(x), mask, **named)[0])


def _hf_vit_mlp(b: Any, x: Tensor, *_: object) -> Tensor:
    return b.dropout(b.mlp(b.layernorm_after(x)))


def _bert_attention(
    b: Any,
    x: Tensor,
    mask: Any = None,
    encoded: Any = None,
    encoded_mask: Any = None,
    cache: Any = None,
    named: Mapping[str, Any] = NOTHING,
) -> Tensor:
    """Its norm is behind the sum: a difference, exact to rounding, and no step of an equation."""
    return b.attention(x, mask, cache=cache, **named)[0] - x


def _bert_mlp(b: Any, x: Tensor, *_: object) -> Tensor:
    return b.feed_forward_chunk(x) - x


def _alone(*functions: Function) -> Known:
    """Blocks that do not look at an encoder's output."""

    def field(block: nn.Module) -> Field | None:
        return None if hasattr(block, "crossattention") else Residual(block, *map(Summand, functions))

    return field


TRANSFORMERS: Mapping[str, Known] = {
    "llama.modeling_llama.LlamaDecoderLayer": _alone(_llama_attention, _llama_mlp),
    "gpt2.modeling_gpt2.GPT2Block": _alone(_gpt2_attention, _gpt2_mlp),
    "vit.modeling_vit.ViTLayer": _alone(_hf_vit_attention, _hf_vit_mlp),
    "bert.modeling_bert.BertLayer": _alone(_bert_attention, _bert_mlp),
}


FAMILIES: Mapping[str, Known] = {
    **{f"torchvision.models.{name}": known for name, known in TORCHVISION.items()},
    **{f"timm.models.{name}": known for name, known in TIMM.items()},
    **{f"transformers.models.{name}": known for name, known in TRANSFORMERS.items()},
}
"""The field of a block, or None where it changes the size, by the full name of its class."""
