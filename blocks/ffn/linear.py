"""A matrix in the place of an FFN; starts as W_down W_up: the gate is ignored."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from blocks.fit import FitContext
from blocks.linear import LinearKind
from blocks.records import Subblock
from blocks.variant import register


@register
class LinearFFNKind(LinearKind):
    """`linear`"""

    subblock: ClassVar[Subblock] = "ffn"

    def product(self, context: FitContext) -> Tensor:
        mlp: Any = context.parent_layer.mlp
        matrix: Tensor = mlp.down_proj.weight @ mlp.up_proj.weight
        return matrix
