"""The child's own modeling code on tiny random parents of five families. Against transformers' own models, and of all
families: test_families.py.
"""

from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from blocks.export_code.configuration_decilm import DeciLMConfig
from blocks.export_code.modeling_decilm import CACHE, DeciLMForCausalLM
from blocks.families import attention_types

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
}
# family -> config class, model class, what makes the family special
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 8}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM, {"sliding_window": 8, "sliding_window_pattern": 2}),
}
FULL = {"no_op": False, "replace_with_linear": False}
NO_OP = {"no_op": True, "replace_with_linear": False}
LINEAR = {"no_op": False, "replace_with_linear": True}


def tiny_parent(family: str, **changes: Any) -> Any:
    """A random parent whose norms and biases are not the trivial ones and zeros."""
    config_class, model_class, special = FAMILIES[family]
    torch.manual_seed(0)
    parent = model_class(config_class(**{**SIZES, **special, **changes})).eval()
    for name, parameter in parent.named_parameters():
        if "norm" in name or "bias" in name:
            centre = 0.0 if family == "gemma3_text" or "bias" in name else 1.0
            torch.nn.init.normal_(parameter, centre, 0.2)
    return parent


def attention(kv_heads: int) -> dict[str, Any]:
    return FULL | {"n_heads_in_group": 4 // kv_heads, "num_key_value_heads": kv_heads}


def ffn(width: int) -> dict[str, Any]:
    return FULL | {"ffn_mult": width * 3 / 64, "intermediate_size": width}


def parent_blocks() -> list[dict[str, Any]]:
    return [{"attention": attention(2), "ffn": ffn(48)} for _ in range(6)]


def mixed_blocks() -> list[dict[str, Any]]:
    """Every kind of subblock; no attention in layer 0, no FFN in the last."""
    pairs = [
        (NO_OP, ffn(48)),
        (LINEAR, ffn(16)),
        (attention(1), LINEAR),
        (attention(2), ffn(24)),
        (attention(1), ffn(48)),
        (attention(2), NO_OP),
    ]
    return [{"attention": dict(first), "ffn": dict(second)} for first, second in pairs]


def tiny_child(parent: Any, blocks: list[dict[str, Any]]) -> DeciLMForCausalLM:
    """A child with random weights, its config made from the parent's."""
    config = parent.config
    left_out = ("architectures", "model_type", "layer_types", "transformers_version")
    fields = {key: value for key, value in config.to_dict().items() if key not in left_out}
    types = attention_types(config)
    torch.manual_seed(1)
    model = DeciLMForCausalLM(
        DeciLMConfig(block_configs=blocks, base_model_type=config.model_type, parent_layer_types=types, **fields)
    )
    for name, parameter in model.named_parameters():
        if "norm" not in name:  # large weights: no two logits are near each other
            torch.nn.init.normal_(parameter, 0.0, 0.15)
    return model.eval()


def parents_twin(parent: Any) -> DeciLMForCausalLM:
    """A child that consists of the parent's own blocks."""
    child = tiny_child(parent, parent_blocks())
    child.load_state_dict(parent.state_dict())
    return child


def token_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_generation_with_cache_equals_generation_without(family: str) -> None:
    child: Any = tiny_child(tiny_parent(family), mixed_blocks())
    ids = token_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    settings: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 10,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": 64,  # outside of the vocabulary: never stops early
    }
    cached, whole = (child.generate(ids, use_cache=use, **settings) for use in (True, False))
    assert cached.shape == (2, 22)
    assert torch.equal(cached, whole)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])  # transformers 5.24 and later, and before
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_cached_step_gives_the_logits_of_the_whole_forward(family: str, name: str) -> None:
    child, ids = tiny_child(tiny_parent(family), mixed_blocks()), token_ids(1, 14)
    first = child(ids[:, :13], use_cache=True)
    step = child(ids[:, 13:], use_cache=True, **{name: getattr(first, CACHE)}).logits[:, -1]
    # one token at a time sums in another order than all at once: float32 rounding only
    torch.testing.assert_close(step, child(ids).logits[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_weight(family: str) -> None:
    child, ids = tiny_child(tiny_parent(family), mixed_blocks()), token_ids(2, 10)
    child(ids, labels=ids).loss.backward()
    # a key bias adds the same to all scores of a query: its true gradient is zero
    still = [
        name
        for name, parameter in child.named_parameters()
        if parameter.grad is None or not (parameter.grad.abs().max() > 0 or name.endswith("k_proj.bias"))
    ]
    assert still == []


@pytest.mark.parametrize("family", FAMILIES)
def test_no_op_and_linear_subblocks_hold_only_their_own_weights(family: str) -> None:
    names = set(tiny_child(tiny_parent(family), mixed_blocks()).state_dict())
    assert not any(name.startswith(("model.layers.0.self_attn", "model.layers.0.input_layernorm")) for name in names)
    assert not any(name.startswith("model.layers.5.mlp") for name in names)
    assert {name for name in names if "layers.1.self_attn" in name} == {"model.layers.1.self_attn.linear_attn.weight"}
    assert {name for name in names if "layers.2.mlp" in name} == {"model.layers.2.mlp.linear_mlp.weight"}


def test_a_child_without_any_attention_generates_alike_with_and_without_a_cache() -> None:
    nothing = {"no_op": True, "replace_with_linear": False}
    ffn = {"no_op": False, "replace_with_linear": False, "intermediate_size": 16}
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    config = DeciLMConfig(block_configs=[{"attention": nothing, "ffn": ffn}] * 2, intermediate_size=48, **sizes)
    model: Any = DeciLMForCausalLM(config).eval()
    ids = torch.arange(5).unsqueeze(0)
    assert not config.use_cache
    cached, plain = (
        model.generate(ids, max_new_tokens=5, do_sample=False, **more) for more in ({}, {"use_cache": False})
    )
    assert torch.equal(cached, plain)
