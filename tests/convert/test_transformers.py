"""Networks of transformers as flows: masks, positions and caches go on reaching their layers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from continuum.convert import continuous, discrete, survey
from continuum.models.flows import flows, frozen, with_solver

transformers = pytest.importorskip("transformers")

TEXT = torch.tensor([[1, 5, 2, 7, 3, 4], [6, 2, 2, 9, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
WORDS: dict[str, Any] = {"vocab_size": 20, "max_position_embeddings": 16, "pad_token_id": 0}


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, **WORDS, num_key_value_heads=1, bos_token_id=1, eos_token_id=2)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=3, n_head=2, n_positions=16, vocab_size=20, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **WORDS))


def vit() -> nn.Module:
    sizes = {**SIZES, "image_size": 16, "patch_size": 4, "hidden_dropout_prob": 0.1, "num_labels": 5}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))


WRITERS = {"Llama": llama, "GPT-2": gpt2}
EXACT = {**WRITERS, "ViT": vit}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return {**EXACT, "BERT": bert}[name]()


def inputs(name: str) -> dict[str, Tensor]:
    if name == "ViT":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), "labels": MASK[:, -1]}
    return {"input_ids": TEXT, "attention_mask": MASK, "labels": TEXT}


def trained(model: nn.Module, name: str) -> Any:
    torch.manual_seed(2)
    found = model.train()(**inputs(name))
    found.loss.backward()
    return found


@pytest.mark.parametrize("name", [*EXACT, "BERT"])
def test_it_is_itself(name: str) -> None:
    """To the bit, but BERT's, whose norm is behind the sum."""
    model = made(name)
    equation = continuous(model)
    assert [flow.depth for flow in flows(equation)] == [3]
    tolerance = 1e-4 if name == "BERT" else 0.0
    same = lambda one, other: torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance / 10)  # noqa: E731
    same(equation.eval()(**inputs(name)).logits, model.eval()(**inputs(name)).logits)
    same(trained(equation, name).logits, trained(model, name).logits)
    back, theirs = discrete(equation), dict(model.named_parameters())
    assert [type(module) for module in back.modules()] == [type(module) for module in model.modules()]
    assert list(back.state_dict()) == list(model.state_dict())
    ours = sorted((p.grad for p in equation.parameters() if p.grad is not None), key=_size)
    for one, other in zip(ours, sorted((p.grad for p in theirs.values() if p.grad is not None), key=_size), strict=True):
        same(one, other)


def _size(tensor: Tensor) -> tuple[Any, ...]:
    return (*tensor.shape, float(tensor.double().abs().sum()))


@pytest.mark.parametrize("name", WRITERS)
def test_the_mask_counts_under_every_solver(name: str) -> None:
    equation = with_solver(continuous(made(name).eval()), "rk4:h=0.5")
    plain = equation(input_ids=TEXT[1:, :4], use_cache=False).logits
    padded = equation(input_ids=TEXT[1:], attention_mask=MASK[1:], use_cache=False).logits
    torch.testing.assert_close(padded[:, :4], plain)
    still = equation(input_ids=TEXT[1:], use_cache=False).logits
    torch.testing.assert_close(still[:, :4], plain)  # what comes later is not seen


@pytest.mark.parametrize("name", WRITERS)
def test_a_cache_works_where_each_layer_is_evaluated_once(name: str) -> None:
    model = made(name).eval()
    equation = continuous(model)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(equation.generate(TEXT[:1], **options), model.generate(TEXT[:1], **options))
    assert torch.equal(equation.generate(TEXT[:1], **options), equation.generate(TEXT[:1], **options, use_cache=False))
    for solver in ("rk4", "lie_trotter:h=0.5", "strang", "dopri5"):
        solved = with_solver(equation, solver)
        with pytest.raises(ValueError, match=r"a key-value cache holds one key and value a layer.*use_cache=False"):
            solved(input_ids=TEXT, use_cache=True)
        assert solved(input_ids=TEXT, use_cache=False).logits.shape == (2, 6, 20)


def test_frozen_steps_keep_the_mask() -> None:
    equation = with_solver(continuous(made("Llama").eval()), "dopri5:rtol=1e-5,atol=1e-5")
    still = frozen(equation, input_ids=TEXT, attention_mask=MASK, use_cache=False)
    ours = still(input_ids=TEXT, attention_mask=MASK, use_cache=False).logits
    torch.testing.assert_close(
        ours, equation(input_ids=TEXT, attention_mask=MASK, use_cache=False).logits, rtol=1e-3, atol=1e-4
    )


def test_gradients_reach_what_is_upstream_of_the_layers() -> None:
    """Stored and recomputed: embeddings, and the tensors that layers share."""
    found = []
    for gradient in ("direct", "checkpoint"):
        equation = with_solver(continuous(made("Llama")), f"rk4:h=1,gradient={gradient}")
        equation(**inputs("Llama"), use_cache=False).loss.backward()
        found.append([p.grad for p in equation.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_layers_that_look_at_an_encoder_are_left_alone() -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, add_cross_attention=True)
    assert survey(transformers.GPT2LMHeadModel(config)).left == {"GPT2Block": 2}
