"""Each token is sent to fewer experts.

Start: the parent's weights. Closed form: how much each expert counts, by ridge regression (blocks/experts.py).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from blocks.experts import ExpertsKind, check_size
from blocks.families import ExpertSizes, experts_of
from blocks.variant import Variant


class TopK(ExpertsKind):
    """`topk<K>`: each token is sent to K experts."""

    name = "topk"

    def parse(self, label: str, config: Any) -> Variant | None:
        match = re.fullmatch(r"topk(\d+)", label)
        if not match:
            return None
        check_size(config, label, int(match[1]), 1, experts_of(config).per_token - 1, "experts of a token")
        return self.variant(f"topk{int(match[1])}", int(match[1]))

    def examples(self, config: Any) -> list[str]:
        own = experts_of(config).per_token
        return [f"topk{size}" for size in dict.fromkeys((own * 3 // 4, own // 2, own // 4)) if 0 < size < own]

    def sizes(self, variant: Variant, config: Any) -> ExpertSizes:
        assert variant.size is not None
        return replace(experts_of(config), per_token=variant.size)
