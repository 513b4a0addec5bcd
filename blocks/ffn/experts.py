"""Fewer experts: the router chooses among those that are left.

Start: the experts that add most, with their rows of the router. Closed form: how much each of them counts, by ridge
regression (blocks/experts.py).
"""

from __future__ import annotations

import re
from typing import Any

from blocks.experts import ExpertsKind, check_size
from blocks.families import ExpertSizes, experts_of
from blocks.variant import Variant


class FewerExperts(ExpertsKind):
    """`experts<N>`: N of the parent's experts; `experts<N>topk<K>`: each token is sent to K of them."""

    name = "experts"

    def parse(self, label: str, config: Any) -> Variant | None:
        match = re.fullmatch(r"experts(\d+)(?:topk(\d+))?", label)
        if not match:
            return None
        count, own = int(match[1]), experts_of(config)
        per_token = int(match[2] or own.per_token)
        check_size(config, label, count, per_token, own.count - 1, f"experts for {per_token} of a token")
        if per_token == own.per_token:
            return self.variant(f"experts{count}", count)
        check_size(config, label, per_token, 1, own.per_token - 1, "experts of a token")
        return self.variant(f"experts{count}topk{per_token}", count)

    def examples(self, config: Any) -> list[str]:
        own = experts_of(config)
        sizes = [size for part in (3, 2, 1) if own.per_token <= (size := own.count * part // 4) < own.count]
        return [f"experts{size}" for size in dict.fromkeys(sizes)]

    def sizes(self, variant: Variant, config: Any) -> ExpertSizes:
        own, (_, _, per_token) = experts_of(config), variant.label.partition("topk")
        assert variant.size is not None
        return ExpertSizes(count=variant.size, per_token=int(per_token or own.per_token), width=own.width)
