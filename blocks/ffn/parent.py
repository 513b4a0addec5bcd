"""The parent's own FFN: always a choice, needs no training, scores 0."""

from __future__ import annotations

from typing import Any, ClassVar

from blocks.experts import experts_entry, experts_flops
from blocks.families import experts_of, has_experts
from blocks.ffn.width import ffn_entry, ffn_flops
from blocks.records import Subblock
from blocks.variant import SizelessKind, Variant


class ParentFFN(SizelessKind):
    """`parent`: as wide as the parent's, with as many experts where it has some."""

    subblock: ClassVar[Subblock] = "ffn"
    name = "parent"
    trainable = False

    def parse(self, label: str, config: Any) -> Variant | None:
        own = experts_of(config)
        sizes = [f"ffn{own.width}", "ffn100pct"]
        if has_experts(config):
            sizes = [f"experts{own.count}", f"topk{own.per_token}", f"ewidth{own.width}", "ewidth100pct"]
        return self.variant("parent") if label in ("parent", *sizes) else None

    def block_entry(self, variant: Variant, config: Any) -> dict[str, Any]:
        own = experts_of(config)
        return experts_entry(own) if has_experts(config) else ffn_entry(config, own.width)

    def flops_per_token(self, variant: Variant, config: Any, context_tokens: int) -> int:
        own = experts_of(config)
        return experts_flops(config, own) if has_experts(config) else ffn_flops(config, own.width)
