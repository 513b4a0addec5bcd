"""A matrix in the place of an FFN; starts as W_down W_up: the gate is ignored."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from blocks.fit import FitContext
from blocks.linear import ENTRY, fit_matrix, set_matrix
from blocks.records import Subblock
from blocks.variant import Variant, VariantKind, register


@register
class LinearFFNKind(VariantKind):
    """`linear`"""

    subblock: ClassVar[Subblock] = "ffn"
    name = "linear"

    def parse(self, label: str, config: Any) -> Variant | None:
        return Variant(subblock="ffn", kind=self.name) if label == "linear" else None

    def label(self, variant: Variant) -> str:
        return "linear"

    def examples(self, config: Any) -> list[str]:
        return ["linear"]

    def block_entry(self, variant: Variant, config: Any) -> dict[str, Any]:
        return dict(ENTRY)

    def flops_per_token(self, variant: Variant, config: Any, context_tokens: int) -> int:
        return 2 * config.hidden_size**2

    def initialise(self, variant: Variant, module: nn.Module, context: FitContext) -> None:
        mlp: Any = context.parent_layer.mlp
        set_matrix(module, "ffn", mlp.down_proj.weight @ mlp.up_proj.weight, context)

    def closed_form(self, variant: Variant, module: nn.Module, context: FitContext) -> None:
        fit_matrix(module, "ffn", context)  # type: ignore[arg-type]
