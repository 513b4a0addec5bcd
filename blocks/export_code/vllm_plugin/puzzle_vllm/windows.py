"""Attention over a window of the last tokens and a few sink tokens, the first of the text, which every token sees.

A token at place q sees the tokens at places k <= q with q - k < size, and the first `sinks` tokens. vLLM's kernels
know no such tokens, so the products are torch's: decode steps of all requests at once, prompts in blocks of queries.

In the KV cache such a layer keeps the first block, which holds the sinks, and those that hold the window. All between
are freed.

Legend: R = requests, T = tokens of each, N = keys that may be seen, H = heads, C = channels of a head, S = tokens of a
block of the cache.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    SlidingWindowSpec,
    is_quantized_kv_cache,
    replace_as,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from .steps import Part, parts_of


class SinkWindowManager(SingleTypeKVCacheManager):
    """Keeps the first block and the last ones of a request; what lies between is freed."""

    @classmethod
    def find_longest_cache_hit(cls, *arguments: Any, kv_cache_spec: KVCacheSpec, **named: Any) -> Any:
        """As for whole attention: a hit begins at the first token, so it has the sinks."""
        whole = replace_as(kv_cache_spec, FullAttentionSpec, drop=("extra_retained_tokens",))
        return FullAttentionManager.find_longest_cache_hit(*arguments, kv_cache_spec=whole, **named)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the blocks that no token from now on sees."""
        spec: Any = self.kv_cache_spec
        unseen = max(0, processed_computed_tokens - spec.sliding_window + 1)
        self._remove_blocks_in_range(request_id, 1, unseen // self.block_size)


KVCacheSpecRegistry._ensure_registered()  # vLLM's own kinds; it registers them only while there are no others


@register_kv_cache_spec(manager_class=SinkWindowManager)
@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(SlidingWindowSpec):
    """What one layer keeps in the KV cache."""

    def max_admission_blocks_per_request(self, *arguments: Any, **named: Any) -> int:
        """The most blocks that a request holds."""
        return super().max_admission_blocks_per_request(*arguments, **named) + 1

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all these layers keep the same tokens."""
        return all(
            isinstance(spec, SinkWindowSpec) and spec.sliding_window == self.sliding_window
            for spec in kv_cache_specs.values()
        )


@dataclass(frozen=True)
class Seen:
    """What the queries `where` (R, T) see: blocks and offsets (R, N) in the cache, and which see which (R, 1, T, N)."""

    where: torch.Tensor
    blocks: torch.Tensor
    offsets: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class SinkWindowMetadata:
    """One step. tokens: of all requests. longest: tokens of the longest text. slots: (tokens,) where each token goes in
    the cache. table: (requests, blocks).
    """

    tokens: int
    longest: int
    slots: torch.Tensor
    table: torch.Tensor
    parts: list[Part]
    known: dict[Any, list[Seen]] = field(default_factory=dict)

    def seen(self, size: int, sinks: int, room: int) -> list[Seen]:
        """What is seen through a window, made once for all layers that have it. room: tokens of a block."""
        key = (size, sinks, room)
        if key not in self.known:
            self.known[key] = [self._seen(part, *key) for part in self.parts]
        return self.known[key]

    def _seen(self, part: Part, size: int, sinks: int, room: int) -> Seen:
        (requests, tokens), device = part.where.shape, part.where.device
        width = min(size + tokens - 1, self.longest)
        least = part.first[:, None] + tokens - width  # the first place in these windows; below 0 there is no token
        first = torch.arange(sinks, device=device).expand(requests, -1)
        recent = least + torch.arange(width, device=device)
        places = torch.cat([first, recent], 1)
        there = torch.cat([first < least, recent >= 0], 1)  # no place twice
        behind = (part.first[:, None] + torch.arange(tokens, device=device))[..., None] - places[:, None]  # (R, T, N)
        mask = there[:, None] & (behind >= 0) & ((behind < size) | (places < sinks)[:, None])
        places = places.where(there, 0)  # the first is written; in others may be what reads as NaN
        blocks = self.table[part.requests].gather(1, places // room)
        return Seen(where=part.where, blocks=blocks, offsets=places % room, mask=mask[:, None])


class SinkWindowBuilder(AttentionMetadataBuilder[SinkWindowMetadata]):
    """Finds what a step's requests hold in the cache."""

    def __init__(self, *what: Any) -> None:
        super().__init__(*what)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> SinkWindowMetadata:
        """See AttentionMetadataBuilder."""
        step = common_attn_metadata
        return SinkWindowMetadata(
            tokens=int(step.query_start_loc_cpu[step.num_reqs]),
            longest=step.max_seq_len,
            slots=step.slot_mapping,
            table=step.block_table_tensor.long(),
            parts=parts_of(step, self.device),
        )


class SinkWindowImpl(AttentionImpl[SinkWindowMetadata]):
    """The products, for one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: Any,
        sliding_window: int,
        kv_cache_dtype: str,
        *others: Any,
        num_sink_tokens: int,
    ) -> None:
        if is_quantized_kv_cache(kv_cache_dtype):
            raise ValueError(f"puzzle's windows cannot be kept in a KV cache of {kv_cache_dtype}: leave it out.")
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, scale, num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.size, self.sinks = sliding_window, num_sink_tokens

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SinkWindowMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Queries (tokens, H, C), keys and values (tokens, KV heads, C), cache (blocks, KV heads, S, 2 C)."""
        if attn_metadata is None:  # vLLM measures memory
            return output.zero_()
        step = attn_metadata
        slots, room = step.slots[: step.tokens], kv_cache.shape[2]
        new = torch.cat([key[: step.tokens], value[: step.tokens]], -1).to(kv_cache.dtype)
        kv_cache[slots // room, :, slots % room] = new
        for seen in step.seen(self.size, self.sinks, room):
            held = kv_cache[seen.blocks, :, seen.offsets].to(query.dtype)  # (R, N, KV heads, 2 C)
            keys, values = held.transpose(1, 2).chunk(2, -1)
            out = F.scaled_dot_product_attention(
                query[seen.where].transpose(1, 2), keys, values, attn_mask=seen.mask, scale=self.scale, enable_gqa=True
            )
            output[seen.where] = out.transpose(1, 2)
        return output


class SinkWindowBackend(AttentionBackend):
    """Any device, any layout of the cache."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[SinkWindowImpl]:
        return SinkWindowImpl

    @staticmethod
    def get_builder_cls() -> type[SinkWindowBuilder]:
        return SinkWindowBuilder


class WindowAttention(Attention):
    """vLLM's attention layer, for a window with sinks."""

    def __init__(self, *what: Any, num_sink_tokens: int, **named: Any) -> None:
        super().__init__(*what, attn_backend=SinkWindowBackend, num_sink_tokens=num_sink_tokens, **named)
        self.num_sink_tokens = num_sink_tokens

    def get_kv_cache_spec(self, vllm_config: Any) -> KVCacheSpec:
        """See Attention."""
        spec: Any = super().get_kv_cache_spec(vllm_config)
        if spec.block_size < self.num_sink_tokens:
            raise ValueError(f"{self.num_sink_tokens} sink tokens need KV cache blocks of as many: set --block-size.")
        return replace_as(spec, SinkWindowSpec)
