"""A matrix in the place of an attention; starts as W_O W_V: each token attends to itself."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from blocks.attention.kv_heads import head_dim
from blocks.fit import FitContext
from blocks.linear import ENTRY, fit_matrix, set_matrix
from blocks.records import Subblock
from blocks.variant import Variant, VariantKind, register


@register
class LinearAttentionKind(VariantKind):
    """`linear`"""

    subblock: ClassVar[Subblock] = "attention"
    name = "linear"

    def parse(self, label: str, config: Any) -> Variant | None:
        return Variant(subblock="attention", kind=self.name) if label == "linear" else None

    def label(self, variant: Variant) -> str:
        return "linear"

    def examples(self, config: Any) -> list[str]:
        return ["linear"]

    def block_entry(self, variant: Variant, config: Any) -> dict[str, Any]:
        return dict(ENTRY)

    def flops_per_token(self, variant: Variant, config: Any, context_tokens: int) -> int:
        return 2 * config.hidden_size**2

    def initialise(self, variant: Variant, module: nn.Module, context: FitContext) -> None:
        attention: Any = context.parent_layer.self_attn
        group = context.config.num_attention_heads // context.config.num_key_value_heads
        values = attention.v_proj.weight.unflatten(0, (-1, head_dim(context.config)))
        matrix = attention.o_proj.weight @ values.repeat_interleave(group, dim=0).flatten(0, 1)
        set_matrix(module, "attention", matrix, context)

    def closed_form(self, variant: Variant, module: nn.Module, context: FitContext) -> None:
        fit_matrix(module, "attention", context)  # type: ignore[arg-type]
