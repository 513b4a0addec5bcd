"""A matrix in the place of an FFN. It starts as W_down W_up, as if there were no gate."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from blocks.fit import FitContext
from blocks.linear import LinearKind
from blocks.records import Subblock
from blocks.subblock import parts_of
from blocks.variant import Variant


class LinearFFNKind(LinearKind):
    """`linear`"""

    subblock: ClassVar[Subblock] = "ffn"

    def initial_flops(self, variant: Variant, config: Any) -> int:
        return 2 * config.hidden_size**2 * config.intermediate_size

    def product(self, context: FitContext) -> Tensor:
        parts = parts_of(context.parent_layer, "ffn")
        matrix: Tensor = parts["down.weight"] @ parts["up.weight"]
        return matrix
