"""Attention over the last N tokens and the first 4 of the text, the sinks, which every token sees.

Start: the parent's weights; with fewer KV heads, its heads mean-pooled. Closed form: `o_proj` is fitted by ridge
regression, as for fewer KV heads, because what the window leaves out was worth something to the parent.

Why sinks: many heads rest on the first tokens, and a window alone takes them away. In three layers of SmolLM2 the KL of
a window of 128 was .003 .002 .0002 with the first 4 tokens and .004 .006 .005 without them.
"""

from __future__ import annotations

import re
from typing import Any

from blocks.attention.kv_heads import KVHeads, attention_entry
from blocks.errors import UnknownVariant
from blocks.families import windows_of
from blocks.variant import Variant

SINKS = 4


class WindowAttention(KVHeads):
    """`window<N>`: every token sees the last N tokens and the first 4; `window<N>kv<K>`: with K KV heads as well."""

    name = "window"
    closed_form_may_lose = False

    def parse(self, label: str, config: Any) -> Variant | None:
        match = re.fullmatch(r"window(\d+)(?:kv(\d+))?", label)
        if not match:
            return None
        most = self._longest(config)
        if not 1 <= int(match[1]) <= most:
            raise UnknownVariant(f"{label}: a window in this parent has 1 to {most} tokens, fewer than it sees itself")
        if not match[2] or int(match[2]) == config.num_key_value_heads:
            return self.variant(f"window{int(match[1])}", int(match[1]))
        KVHeads().parse(f"kv{match[2]}", config)
        return self.variant(f"window{int(match[1])}kv{int(match[2])}", int(match[1]))

    def _longest(self, config: Any) -> int:
        """Tokens of the longest window that leaves a token of the parent's context, or own window, out."""
        context: int = config.max_position_embeddings
        return min([context - SINKS - 1, *(window - 1 for window in windows_of(config) if window)])

    def examples(self, config: Any) -> list[str]:
        most = self._longest(config)
        sizes = [size for size in (64, 128, 256) if size <= most] or [max(1, most // 2)]
        return [f"window{size}{heads}" for heads in ("", *KVHeads().examples(config)[:1]) for size in sizes]

    def heads(self, variant: Variant, config: Any) -> int:
        _, _, heads = variant.label.partition("kv")
        return int(heads or config.num_key_value_heads)

    def block_entry(self, variant: Variant, config: Any) -> dict[str, Any]:
        # as NVIDIA's schema names them: keys keep the rotation of their true places
        window = {"window_length": variant.size, "num_sink_tokens": SINKS, "unshifted_sink": True}
        return attention_entry(config, self.heads(variant, config)) | window

    def kv_tokens(self, variant: Variant) -> int | None:
        assert variant.size is not None
        return variant.size + SINKS
