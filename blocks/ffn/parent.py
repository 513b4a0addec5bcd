"""The parent's own FFN: always a choice, needs no training, scores 0."""

from __future__ import annotations

from typing import Any, ClassVar

from blocks.ffn.width import ffn_entry, ffn_flops
from blocks.records import Subblock
from blocks.variant import SizelessKind, Variant


class ParentFFN(SizelessKind):
    """`parent`: as wide as the parent's."""

    subblock: ClassVar[Subblock] = "ffn"
    name = "parent"
    trainable = False

    def parse(self, label: str, config: Any) -> Variant | None:
        is_parent = label in ("parent", f"ffn{config.intermediate_size}", "ffn100pct")
        return self.variant("parent") if is_parent else None

    def block_entry(self, variant: Variant, config: Any) -> dict[str, Any]:
        return ffn_entry(config, config.intermediate_size)

    def flops_per_token(self, variant: Variant, config: Any, context_tokens: int) -> int:
        return ffn_flops(config, config.intermediate_size)
