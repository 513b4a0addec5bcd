"""A matrix in the place of an FFN. It starts as W_down W_up, as if there were no gate; with experts, as the sum of
their products, each times what the router gives the expert of a token on average.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from blocks.families import experts_of, has_experts
from blocks.fit import FitContext
from blocks.linear import LinearKind
from blocks.records import Subblock
from blocks.subblock import parts_of
from blocks.variant import Variant


class LinearFFNKind(LinearKind):
    """`linear`"""

    subblock: ClassVar[Subblock] = "ffn"

    def initial_flops(self, variant: Variant, config: Any) -> int:
        own = experts_of(config)
        return 2 * config.hidden_size**2 * own.count * own.width

    def product(self, context: FitContext) -> Tensor:
        parts = parts_of(context.parent_layer, "ffn")
        down, up = parts["down.weight"], parts["up.weight"]
        if has_experts(context.config):
            gates = context.statistics["expert_gates"].to(down)[:, None, None]
            down, up = (down * gates).transpose(0, 1).flatten(1), up.flatten(0, 1)
        matrix: Tensor = down @ up
        return matrix
