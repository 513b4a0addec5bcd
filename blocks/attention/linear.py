"""A matrix in the place of an attention. It starts as W_O W_V, as if each token attended only to itself."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from blocks.families import head_dim
from blocks.fit import FitContext
from blocks.linear import LinearKind
from blocks.records import Subblock
from blocks.subblock import parts_of
from blocks.variant import Variant


class LinearAttentionKind(LinearKind):
    """`linear`"""

    subblock: ClassVar[Subblock] = "attention"

    def initial_flops(self, variant: Variant, config: Any) -> int:
        return 2 * config.hidden_size**2 * config.num_attention_heads * head_dim(config)

    def product(self, context: FitContext) -> Tensor:
        parts = parts_of(context.parent_layer, "attention")
        group = context.config.num_attention_heads // context.config.num_key_value_heads
        values = parts["value.weight"].unflatten(0, (-1, head_dim(context.config)))
        matrix: Tensor = parts["output.weight"] @ values.repeat_interleave(group, dim=0).flatten(0, 1)
        return matrix
