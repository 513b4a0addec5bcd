"""No attention at all: the residual passes through."""

from __future__ import annotations

from typing import ClassVar

from blocks.records import Subblock
from blocks.variant import NoOpKind


class NoOpAttention(NoOpKind):
    """`no_op`"""

    subblock: ClassVar[Subblock] = "attention"
