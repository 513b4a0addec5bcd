"""Recurrent attention: a state of one size for each request, in the place of keys and values of every token.

A state is one block of vLLM's cache, as of its own Mamba layers: vLLM gives a request that block when it begins, and
takes it back at its end. Two tensors lie in it, the heads' states in float32 and what the mixing of neighbouring tokens
still needs in the model's own numbers. The rule itself, `ssd` or `gdn`, is run by the child's own code, which lies
beside its weights. So the products are torch's.

Legend: R = requests of a part, T = tokens of each, K = tokens that are mixed, M = channels of queries, keys and values,
H = query heads, C = channels of a head, G = gates.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase

# its op is not compiled and cut out of recorded graphs; it calls `_forward` of the layer that is named to it
from vllm.model_executor.layers.mamba.linear import minimax_linear_attn  # noqa: F401
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, MambaSpec
from vllm.v1.worker import cpu_model_runner

from .steps import Part, parts_of

# A layer with keys and values may get a block that held a state, whose float32 bits can read as NaN in 16 bits. So vLLM
# fills new blocks with zeros; on a CPU only those of layers of this class, and layers that slide are not of it.
cpu_model_runner.FullAttentionSpec = AttentionSpec


@dataclass(frozen=True)
class StateMetadata:
    """One step. blocks: (requests,) where the state of each is in the cache."""

    blocks: torch.Tensor
    parts: list[Part]


class StateBuilder(AttentionMetadataBuilder[StateMetadata]):
    """Finds the states of a step's requests."""

    def __init__(self, *what: Any) -> None:
        super().__init__(*what)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> StateMetadata:
        """See AttentionMetadataBuilder."""
        step = common_attn_metadata
        blocks = step.block_table_tensor[: step.num_reqs, 0].long()
        return StateMetadata(blocks=blocks, parts=parts_of(step, self.device))


class StateBackend(AttentionBackend):
    """Any device."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("the layer makes its products itself")

    @staticmethod
    def get_builder_cls() -> type[StateBuilder]:
        return StateBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


class RecurrentAttention(MambaBase, nn.Module):
    """A recurrent attention. biases: whether queries, keys and values have them, and whether the output has."""

    kv_cache: tuple[torch.Tensor, ...]  # the states, and what is mixed with the next tokens
    mamba_type = MambaAttentionBackendEnum.LINEAR  # vLLM starts nothing of its own for it

    def __init__(self, config: Any, layer: int, biases: tuple[bool, bool], quant_config: Any, prefix: str) -> None:
        nn.Module.__init__(self)
        entry, vllm_config = config.block_configs[layer].attention, get_current_vllm_config()
        model, rule = vllm_config.model_config, entry.recurrent
        self.prefix, self.dtype = prefix, model.dtype
        revisions = {"revision": model.revision, "code_revision": model.code_revision}
        code: Any = get_class_from_dynamic_module("recurrent_decilm.RecurrentAttention", model.model, **revisions)
        self.heads_out = code.heads_out.__get__(self)  # it reads what is set below, as of the child's own module
        self.delta, self.eps = rule.rule == "gdn", config.rms_norm_eps
        self.kernel, self.chunk = rule.conv_kernel, rule.chunk_size
        self.head_dim, self.heads = config.head_dim, config.num_attention_heads
        kv_heads = entry.get("num_key_value_heads") or config.num_key_value_heads
        self.widths = [count * self.head_dim for count in (self.heads, kv_heads, kv_heads)]
        self.conv = nn.Parameter(torch.zeros(sum(self.widths), self.kernel))
        self.log_rate, self.skip = (nn.Parameter(torch.zeros(self.heads)) for _ in range(2))
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            self.heads,
            kv_heads,
            bias=biases[0],
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.gates = ReplicatedLinear(
            config.hidden_size, rule.gates * self.heads, quant_config=quant_config, prefix=f"{prefix}.gates"
        )
        self.o_proj = RowParallelLinear(
            self.widths[0], config.hidden_size, bias=biases[1], quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """(tokens, D) -> (tokens, D)"""
        mixed = torch.cat([self.qkv_proj(hidden_states)[0], self.gates(hidden_states)[0]], -1)
        out = mixed.new_zeros(len(mixed), self.widths[0])
        torch.ops.vllm.linear_attention(mixed, out, positions, self.prefix)
        return self.o_proj(out)[0]

    def _forward(self, hidden_states: torch.Tensor, output: torch.Tensor, positions: torch.Tensor) -> None:
        """What the heads put out, into output (tokens, H C). hidden_states: q, k, v and gates (tokens, M + G H)."""
        steps: Any = get_forward_context().attn_metadata
        if steps is None:  # vLLM measures memory
            return
        step, (states, tails) = steps[self.prefix], self.kv_cache
        mixed, gates = hidden_states.split([sum(self.widths), hidden_states.shape[-1] - sum(self.widths)], -1)
        for part in step.parts:
            blocks = step.blocks[part.requests]
            begun = (part.first > 0)[:, None, None]  # of a new request the block holds what another left
            state = states[blocks].where(begun[..., None], 0)  # (R, H, C, C)
            now = torch.cat([tails[blocks].where(begun, 0), mixed[part.where]], 1)  # (R, K - 1 + T, M)
            out, states[blocks] = self.heads_out(now.float(), gates[part.where].float(), state)
            tails[blocks] = now[:, part.where.shape[1] :]
            output[part.where] = out.transpose(1, 2).flatten(2).to(output.dtype)

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """See MambaBase."""
        return (self.heads, self.head_dim, self.head_dim), (self.kernel - 1, sum(self.widths))

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """See MambaBase. A state is a sum over the text."""
        return torch.float32, self.dtype

    def get_attn_backend(self) -> type[AttentionBackend]:
        """See MambaBase."""
        return StateBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> KVCacheSpec:
        """See MambaBase. A block is for a whole text, and as large as some blocks of keys and values: all layers take
        theirs from the same memory, so vLLM makes the latter as large as this one.
        """
        spec = MambaSpec(
            block_size=vllm_config.model_config.max_model_len,
            shapes=self.get_state_shape(),
            dtypes=self.get_state_dtype(),
            mamba_type=self.mamba_type,
        )
        layers = vllm_config.compilation_config.static_forward_context.values()
        pages = [one.get_kv_cache_spec(vllm_config).page_size_bytes for one in layers if isinstance(one, Attention)]
        whole = math.lcm(*pages)
        return replace(spec, page_size_padded=-(-spec.page_size_bytes // whole) * whole)
