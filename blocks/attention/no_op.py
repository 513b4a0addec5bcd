"""No attention at all: the residual passes through. Needs no training, costs nothing."""

from __future__ import annotations

from typing import Any, ClassVar

from blocks.records import Subblock
from blocks.variant import Variant, VariantKind, register


@register
class NoOpAttention(VariantKind):
    """`no_op`"""

    subblock: ClassVar[Subblock] = "attention"
    name = "no_op"
    trainable = False

    def parse(self, label: str, config: Any) -> Variant | None:
        return Variant(subblock="attention", kind=self.name) if label == "no_op" else None

    def label(self, variant: Variant) -> str:
        return "no_op"

    def examples(self, config: Any) -> list[str]:
        return ["no_op"]

    def block_entry(self, variant: Variant, config: Any) -> dict[str, Any]:
        return {"no_op": True, "replace_with_linear": False}

    def flops_per_token(self, variant: Variant, config: Any, context_tokens: int) -> int:
        return 0
