"""Attention with fewer query heads: some groups of them are left out, each with the KV head that they share.

Start: the groups that add most to a token stay, by the mean size of what `o_proj` makes of them. Closed form: `o_proj`
is fitted by ridge regression to the parent's attention output, as for fewer KV heads.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.attention.kv_heads import KVHeads, attention_entry
from blocks.errors import UnknownVariant
from blocks.export_code.families_decilm import FAMILIES
from blocks.families import head_dim
from blocks.fit import FitContext
from blocks.subblock import linear_of, load_parts, parts_of
from blocks.variant import Variant


class QueryHeads(KVHeads):
    """`q<N>`: N query heads, whole groups of them with the KV head of each."""

    name = "query_heads"
    closed_form_may_lose = False

    def parse(self, label: str, config: Any) -> Variant | None:
        match = re.fullmatch(r"q(\d+)", label)
        if not match:
            return None
        if label not in self.examples(config):
            raise UnknownVariant(
                f"{label}: a parent with {config.num_attention_heads} query heads in {config.num_key_value_heads} "
                f"groups can have {', '.join(self.examples(config)) or 'no fewer'}"
                f"{', since the norm of its queries is of all heads together' if _normed_together(config) else ''}"
            )
        return self.variant(label, int(match[1]))

    def examples(self, config: Any) -> list[str]:
        group = config.num_attention_heads // config.num_key_value_heads
        sizes = range(group, config.num_attention_heads, group)
        return [] if _normed_together(config) else [f"q{size}" for size in sizes]

    def heads(self, variant: Variant, config: Any) -> int:
        assert variant.size is not None
        return variant.size * int(config.num_key_value_heads) // int(config.num_attention_heads)

    def own(self, variant: Variant, config: Any) -> Any:
        narrower = copy.copy(config)
        narrower.head_dim, narrower.num_attention_heads = head_dim(config), variant.size
        return narrower

    def block_entry(self, variant: Variant, config: Any) -> dict[str, Any]:
        entry = attention_entry(self.own(variant, config), self.heads(variant, config))
        return entry | {"num_attention_heads": variant.size}

    def initialise(self, variant: Variant, module: nn.Module, context: FitContext) -> None:
        groups, channels = context.config.num_key_value_heads, head_dim(context.config)
        kept = added_by_groups(context, groups).argsort(descending=True, stable=True)
        kept = kept[: self.heads(variant, context.config)].sort().values
        parts = parts_of(context.parent_layer, "attention")
        width = context.config.num_attention_heads // groups * channels
        for name, part in parts.items():
            if name.startswith(("query.", "key.", "value.")):
                rows = width if name.startswith("query.") else channels
                parts[name] = part.unflatten(0, (groups, rows))[kept].flatten(0, 1)
        parts["output.weight"] = parts["output.weight"].unflatten(1, (groups, width))[:, kept].flatten(1, 2)
        load_parts(module, "attention", parts)  # type: ignore[arg-type]


def _normed_together(config: Any) -> bool:
    return FAMILIES[config.model_type].head_norms == "all"


@torch.no_grad()
def added_by_groups(context: FitContext, groups: int) -> Tensor:
    """(groups,) mean size of what each group of query heads adds to a token, behind `o_proj`."""
    layer: Any = context.parent_layer
    output, found, seen = linear_of(layer, "output"), [], list[Tensor]()
    hook = output.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        for hidden, weights in context.hidden_batches():
            layer.attention(hidden, **context.context)
            mixed = seen.pop().flatten(0, -2).chunk(groups, dim=1)
            sizes = [
                F.linear(*pair).norm(dim=1) for pair in zip(mixed, output.weight.chunk(groups, dim=1), strict=True)
            ]
            each = torch.stack(sizes)  # (groups, N)
            found.append(each.sum(1) if weights is None else each @ weights[:, 0])
    finally:
        hook.remove()
    return torch.stack(found).sum(0)
