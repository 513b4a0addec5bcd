"""The parent's own attention: always a choice, needs no training, scores 0."""

from __future__ import annotations

from typing import Any, ClassVar

from blocks.attention.kv_heads import attention_entry, attention_flops
from blocks.families import head_dim, tokens_seen
from blocks.records import Subblock
from blocks.variant import SizelessKind, Variant


class ParentAttention(SizelessKind):
    """`parent`: as many KV heads as the parent has."""

    subblock: ClassVar[Subblock] = "attention"
    name = "parent"
    trainable = False

    def parse(self, label: str, config: Any) -> Variant | None:
        is_parent = label in ("parent", f"kv{config.num_key_value_heads}")
        return self.variant("parent") if is_parent else None

    def block_entry(self, variant: Variant, config: Any) -> dict[str, Any]:
        return attention_entry(config, config.num_key_value_heads)

    def flops_per_token(self, variant: Variant, config: Any, context_tokens: int) -> int:
        return attention_flops(config, config.num_key_value_heads, tokens_seen(config, context_tokens))

    def kv_elements_per_token(self, variant: Variant, config: Any) -> int:
        return 2 * config.num_key_value_heads * head_dim(config)
