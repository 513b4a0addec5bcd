"""Attention with fewer KV heads (grouped-query attention with larger groups).

Start: the K and V heads of each merged group are mean-pooled (Puzzle, section 3). Closed form: `o_proj` is fitted by
ridge regression, from what the pooled heads put out to the parent's attention output.

H = query heads, K = KV heads, C = head_dim, D = hidden_size.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blocks.errors import UnknownVariant
from blocks.families import head_dim, tokens_seen
from blocks.fit import FitContext, ridge_solve, solve_flops
from blocks.records import Subblock
from blocks.subblock import linear_of, load_parts, parts_of
from blocks.variant import Variant, VariantKind


def attention_entry(config: Any, num_key_value_heads: int) -> dict[str, Any]:
    """`block_configs` entry of an attention with this many KV heads."""
    return {
        "no_op": False,
        "replace_with_linear": False,
        "n_heads_in_group": config.num_attention_heads // num_key_value_heads,
        "num_key_value_heads": num_key_value_heads,
    }


def attention_flops(config: Any, num_key_value_heads: int, context_tokens: int) -> int:
    """FLOPs of one token through an attention: projections, scores, weighted sum."""
    width = config.num_attention_heads * head_dim(config)
    projections = config.hidden_size * (2 * width + 2 * num_key_value_heads * head_dim(config))
    return 2 * projections + 4 * width * context_tokens


class KVHeads(VariantKind):
    """`kv<N>`: N KV heads, N divides the parent's and is smaller."""

    subblock: ClassVar[Subblock] = "attention"
    name = "kv_heads"
    # nMSE of kv1 in two layers of SmolLM2 with and without it: .570 .616 and .596 .657 after 24 steps of 1,024 tokens,
    # .484 .424 after 96, .422 .347 after 160
    closed_form_may_lose = True

    def parse(self, label: str, config: Any) -> Variant | None:
        match = re.fullmatch(r"kv(\d+)", label)
        if not match:
            return None
        if label not in self.examples(config):
            raise UnknownVariant(
                f"{label}: a parent with {config.num_key_value_heads} KV heads can have "
                f"{', '.join(self.examples(config)) or 'no fewer'} (a smaller divisor)"
            )
        return self.variant(label, int(match[1]))

    def examples(self, config: Any) -> list[str]:
        heads = config.num_key_value_heads
        return [f"kv{n}" for n in range(1, heads) if heads % n == 0]

    def heads(self, variant: Variant, config: Any) -> int:
        """How many KV heads a variant has."""
        assert variant.size is not None
        return variant.size

    def own(self, variant: Variant, config: Any) -> Any:
        """The parent's config with the query heads of a variant."""
        return config

    def block_entry(self, variant: Variant, config: Any) -> dict[str, Any]:
        return attention_entry(config, self.heads(variant, config))

    def flops_per_token(self, variant: Variant, config: Any, context_tokens: int) -> int:
        seen = tokens_seen(config, context_tokens, self.kv_tokens(variant))
        return attention_flops(self.own(variant, config), self.heads(variant, config), seen)

    def kv_elements_per_token(self, variant: Variant, config: Any) -> int:
        return 2 * self.heads(variant, config) * head_dim(config)

    def initialise(self, variant: Variant, module: nn.Module, context: FitContext) -> None:
        heads, kept = context.config.num_key_value_heads, self.heads(variant, context.config)
        parts = parts_of(context.parent_layer, "attention")
        for name in parts if kept < heads else ():
            if name.startswith(("key.", "value.", "key_norm.")):
                parts[name] = mean_pool_heads(parts[name], heads, kept)
        load_parts(module, "attention", parts)  # type: ignore[arg-type]

    def closed_form(self, variant: Variant, module: nn.Module, context: FitContext) -> None:
        layer: Any = module
        output = linear_of(layer, "output")
        inputs: list[Tensor] = []
        hook = output.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        gram, cross = None, None
        parents: Any = context.parent_layer.self_attn
        try:
            with torch.no_grad():
                for hidden, weights in context.hidden_batches():
                    layer.attention(hidden, **context.context)
                    x = inputs.pop().flatten(0, -2)
                    normed = context.parent_layer.before("attention", hidden)
                    y = parents(hidden_states=normed, **context.context)[0].flatten(0, -2)
                    y = y if output.bias is None else y - output.bias
                    if weights is not None:
                        x, y = x * weights.sqrt(), y * weights.sqrt()
                    gram = x.T @ x if gram is None else gram + x.T @ x
                    cross = x.T @ y if cross is None else cross + x.T @ y
        finally:
            hook.remove()
        assert gram is not None and cross is not None
        weight = output.weight.data
        weight.copy_(ridge_solve(gram, cross, weight.T, context.ridge).T)

    def fit_flops(self, variant: Variant, config: Any, tokens: int, length: int) -> tuple[int, int]:
        width = self.own(variant, config).num_attention_heads * head_dim(config)
        forward = self.flops_per_token(variant, config, length)
        forward += attention_flops(config, config.num_key_value_heads, length)
        return tokens * (forward + 2 * width * (width + config.hidden_size)), solve_flops(width, config.hidden_size)


def mean_pool_heads(tensor_KC: Tensor, heads: int, kept: int) -> Tensor:
    """Mean of the heads of each merged group. (heads * C, ...) -> (kept * C, ...), weights and biases alike."""
    grouped = tensor_KC.unflatten(0, (kept, heads // kept, -1))
    return grouped.mean(1).flatten(0, 1)
