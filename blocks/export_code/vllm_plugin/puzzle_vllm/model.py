"""A child in vLLM: each layer has its own attention and FFN, a linear or recurrent one in its place, or none.

The parts are those of vLLM's Llama. The loop over layers, embedding, head and the loading of weights are those of its
DeciLM, which knows no linear subblocks and needs an attention in layer 0.
"""

# T = tokens of all requests together, D = hidden size

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.llama import LlamaAttention, LlamaMLP
from vllm.model_executor.models.nemotron_nas import DeciLMForCausalLM, DeciModel
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from .recurrent import RecurrentAttention
from .windows import WindowAttention

# families -> whether queries, keys and values have biases; None: as the config's `attention_bias` says
FAMILIES: dict[str, bool | None] = {"llama": None, "mistral": False, "ministral": False, "qwen2": True, "qwen3": None}
HEAD_NORMS = ("qwen3",)
# of the rotary frequencies; vLLM computes others, such as longrope, otherwise than transformers
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def biases_of(config: Any) -> tuple[bool, bool]:
    """Whether queries, keys and values have biases, and whether the output has."""
    said, own = bool(getattr(config, "attention_bias", False)), FAMILIES[config.base_model_type]
    return (said, said) if own is None else (own, False)


class PuzzleAttention(LlamaAttention):
    """Llama's attention with heads of its own, and with head norms, biases and a window where the child has them."""

    def __init__(self, config: Any, layer: int, cache_config: Any, quant_config: Any, prefix: str) -> None:
        entry, biases = config.block_configs[layer].attention, biases_of(config)
        super().__init__(
            config=config,
            hidden_size=config.hidden_size,
            num_heads=entry.get("num_attention_heads") or config.num_attention_heads,
            num_kv_heads=entry.get("num_key_value_heads") or config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            quant_config=quant_config,
            bias=biases[0],
            bias_o_proj=biases[1],
            cache_config=cache_config,
            prefix=prefix,
        )
        self.q_norm = self.k_norm = None
        if config.base_model_type in HEAD_NORMS:
            self.q_norm, self.k_norm = (RMSNorm(self.head_dim, eps=config.rms_norm_eps) for _ in range(2))
        if entry.get("window_length"):
            # Llama's has entered itself under this name
            del get_current_vllm_config().compilation_config.static_forward_context[f"{prefix}.attn"]
            self.attn = WindowAttention(
                self.num_heads,
                self.head_dim,
                self.scaling,
                num_kv_heads=self.num_kv_heads,
                cache_config=cache_config,
                quant_config=quant_config,
                per_layer_sliding_window=entry.window_length,
                num_sink_tokens=entry.get("num_sink_tokens") or 0,
                prefix=f"{prefix}.attn",
            )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (T, D)"""
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        if self.q_norm is not None:
            query, key = _by_head(self.q_norm, query, self.head_dim), _by_head(self.k_norm, key, self.head_dim)
        query, key = self.rotary_emb(positions, query, key)
        out, _ = self.o_proj(self.attn(query, key, value))
        return out


def _by_head(norm: Any, states: torch.Tensor, head_dim: int) -> torch.Tensor:
    return norm(states.unflatten(-1, (-1, head_dim)).contiguous()).flatten(-2)


class LinearBlock(nn.Module):
    """One matrix in the place of an attention (`linear_attn`) or an FFN (`linear_mlp`)."""

    def __init__(self, name: str, hidden_size: int, quant_config: Any, prefix: str) -> None:
        super().__init__()
        self.name = name
        matrix = ReplicatedLinear(
            hidden_size, hidden_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.{name}"
        )
        setattr(self, name, matrix)

    def forward(self, hidden_states: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """(T, D) -> (T, D)"""
        return getattr(self, self.name)(hidden_states)[0]


class PuzzleLayer(nn.Module):
    """`h + attention(norm(h))`, then `h + ffn(norm(h))`; a no-op subblock is absent, with its norm."""

    def __init__(
        self, config: Any, layer: int, cache_config: Any = None, quant_config: Any = None, prefix: str = ""
    ) -> None:
        super().__init__()
        attention, ffn = config.block_configs[layer].attention, config.block_configs[layer].ffn
        self.self_attn = self.mlp = None
        self._is_no_op_attention = attention.no_op  # DeciModel reads it
        if attention.replace_with_linear:
            self.self_attn = LinearBlock("linear_attn", config.hidden_size, quant_config, f"{prefix}.self_attn")
        elif attention.get("recurrent"):
            self.self_attn = RecurrentAttention(config, layer, biases_of(config), quant_config, f"{prefix}.self_attn")
        elif not attention.no_op:
            self.self_attn = PuzzleAttention(config, layer, cache_config, quant_config, f"{prefix}.self_attn")
        if ffn.replace_with_linear:
            self.mlp = LinearBlock("linear_mlp", config.hidden_size, quant_config, f"{prefix}.mlp")
        elif not ffn.no_op:
            self.mlp = LlamaMLP(
                hidden_size=config.hidden_size,
                intermediate_size=ffn.get("intermediate_size") or config.intermediate_size,
                hidden_act=config.hidden_act,
                quant_config=quant_config,
                bias=getattr(config, "mlp_bias", False),
                prefix=f"{prefix}.mlp",
            )
        if self.self_attn is not None:
            self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if self.mlp is not None:
            self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is to be added to the residual, and the residual; None where nothing was added to the embedding yet."""
        if self.self_attn is not None:
            hidden_states, residual = _normed(self.input_layernorm, hidden_states, residual)
            hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        if self.mlp is not None:
            hidden_states, residual = _normed(self.post_attention_layernorm, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


def _normed(norm: Any, hidden_states: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return (norm(hidden_states), hidden_states) if residual is None else norm(hidden_states, residual)


class PuzzleForCausalLM(DeciLMForCausalLM):
    """A child of puzzle."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        reason = refused(config, vllm_config)
        if reason is not None:
            raise ValueError(f"puzzle's plugin for vLLM cannot run {reason}.")
        # a layer with fewer heads would divide by its own
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "") -> DeciModel:
        return DeciModel(vllm_config=vllm_config, prefix=prefix, layer_type=PuzzleLayer)


def _shared(config: Any, block: Any, devices: int) -> bool:
    """Whether each device gets as much of a layer as the others: of query heads, KV heads (or as many devices share
    one), and channels of the FFN. What is no attention with heads of keys, or no FFN, is whole on each.
    """
    attention, ffn = block.attention, block.ffn
    rest = 0
    if not (attention.no_op or attention.replace_with_linear):
        heads = attention.get("num_attention_heads") or config.num_attention_heads
        kv_heads = attention.get("num_key_value_heads") or config.num_key_value_heads
        rest += heads % devices + max(kv_heads, devices) % min(kv_heads, devices)
    if not (ffn.no_op or ffn.replace_with_linear):
        rest += (ffn.get("intermediate_size") or config.intermediate_size) % devices
    return rest == 0


def refused(config: Any, vllm_config: VllmConfig) -> str | None:
    """What of a child, or of what is asked of vLLM, would be left out without a word; None where nothing would."""
    blocks = getattr(config, "block_configs", None)
    if not blocks or config.base_model_type not in FAMILIES:
        return f"a model that is no child of one of the families {', '.join(FAMILIES)}"
    attentions = [block.attention for block in blocks]
    sinks = [entry for entry in attentions if entry.get("window_length")]
    states = any(entry.get("recurrent") for entry in attentions)
    slides = "sliding_attention" in config.layer_types
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    devices, stored = vllm_config.parallel_config.tensor_parallel_size, vllm_config.cache_config.cache_dtype
    reasons = {
        "recurrent attention without --trust-remote-code, since its rule is code of the child's folder": states
        and not vllm_config.model_config.trust_remote_code,
        "recurrent attention on several devices, which share out its heads": states and devices > 1,
        "recurrent attention beside speculative decoding, which takes tokens back": states
        and vllm_config.speculative_config is not None,
        "recurrent attention with asynchronous scheduling, which takes tokens back: --no-async-scheduling": states
        and vllm_config.scheduler_config.async_scheduling,
        f"recurrent attention beside a KV cache of {stored}: leave --kv-cache-dtype out": states
        and is_quantized_kv_cache(stored),
        f"layers whose heads or FFN cannot be shared out evenly among {devices} devices": not all(
            _shared(config, block, devices) for block in blocks
        ),
        "an FFN with experts": any(block.ffn.get("moe") for block in blocks),
        f"rotary frequencies of the type {rope}": rope not in ROPE_TYPES,
        # vLLM would free one layer's blocks as if they were the other's
        "a window with sink tokens as long as the parent's own": slides
        and any(entry.window_length == config.sliding_window for entry in sinks),
        "a window or recurrent attention beside a KV connector, which would not carry sink tokens or states": bool(
            sinks or states
        )
        and vllm_config.kv_transfer_config is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
