"""Recurrent attention in the form of Mamba-2: a state of one size per head, which fades, in the place of the KV cache.

Start: queries, keys and values are the parent's, and half of what a head's state holds is gone after 16 tokens. A
head's gate is fitted to how much of the parent's attention rests on other tokens than the first: heads that rest there
put out next to nothing. Closed form: `o_proj` is fitted by ridge regression, as for fewer KV heads.

It needs more tokens than a window, 80,000 or more and several passes over them, at a rate of 2e-3: with 16,000 it is no
better than a linear attention.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blocks.attention.kv_heads import KVHeads, attention_entry, attention_flops
from blocks.families import head_dim
from blocks.fit import FitContext, ridge_solve, solve_flops
from blocks.subblock import linear_of, load_subblock, parts_of, rows_of
from blocks.variant import SizelessKind, Variant

KERNEL = 4  # tokens that are mixed channel by channel, the token itself included
CHUNK = 64  # tokens whose products are made at once
HALF_LIFE = 16  # tokens
SKIP = 0.1
EDGE = 0.02  # gates are fitted to shares from EDGE to 1 - EDGE


class SSD(SizelessKind, KVHeads):
    """`ssd`: each query head has a state that fades, in Mamba-2's form. For many tokens of training."""

    name = "ssd"
    closed_form_may_lose = False
    # what a token's gates start from, before softplus or sigmoid; None: fitted. The rule in the child's code reads them
    # in this order
    gates: ClassVar[dict[str, float | None]] = {"step": math.log(math.expm1(math.log(2) / HALF_LIFE)), "output": None}

    def heads(self, variant: Variant, config: Any) -> int:
        return int(config.num_key_value_heads)

    def block_entry(self, variant: Variant, config: Any) -> dict[str, Any]:
        own = {"rule": self.name, "gates": len(self.gates), "conv_kernel": KERNEL, "chunk_size": CHUNK}
        return attention_entry(config, config.num_key_value_heads) | {"recurrent": own}

    def flops_per_token(self, variant: Variant, config: Any, context_tokens: int) -> int:
        width = config.num_attention_heads * head_dim(config)
        projections = attention_flops(config, config.num_key_value_heads, 0)
        projections += 2 * config.hidden_size * len(self.gates) * config.num_attention_heads
        return projections + (
            self.state_flops(width, head_dim(config), min(context_tokens, CHUNK)) if context_tokens else 0
        )

    def state_flops(self, width: int, channels: int, chunk: int) -> int:
        """Operations of one token beside the projections: within its chunk, and with the state before and after it."""
        return 4 * width * (chunk + channels)

    def kv_elements_per_token(self, variant: Variant, config: Any) -> int:
        return 0

    def state_bytes(self, variant: Variant, config: Any, bytes_per_element: float) -> int:
        channels = head_dim(config)
        state = 4 * config.num_attention_heads * channels**2  # float32 in any precision: it is a sum over the text
        mixed = (KERNEL - 1) * (config.num_attention_heads + 2 * config.num_key_value_heads) * channels
        return state + math.ceil(mixed * bytes_per_element)

    def trained_elements_per_token(self, variant: Variant, config: Any) -> int:
        return config.num_attention_heads * (3 * CHUNK + 14 * head_dim(config))

    def initialise(self, variant: Variant, module: nn.Module, context: FitContext) -> None:
        layer: Any = module
        core, parents = layer.self_attn, context.parent_layer.self_attn
        state = {_own_name(name): tensor for name, tensor in parts_of(context.parent_layer, "attention").items()}
        for name in ("q", "k"):  # what is brought to length 1 needs no norm, only its gains
            norm: Any = getattr(parents, f"{name}_norm", None)
            if norm is None:
                continue
            del state[f"self_attn.{name}_norm.weight"]
            gains = norm(torch.ones_like(norm.weight)).repeat(core.heads)
            for key in [key for key in state if key.startswith(f"self_attn.{name}_proj.")]:
                rows = state[key]
                state[key] = rows * gains[: len(rows)].view(-1, *[1] * (rows.dim() - 1))
        fitted, sizes = fitted_gates(context)
        gates = torch.zeros(len(self.gates), *fitted.shape, device=fitted.device)
        for number, start in enumerate(self.gates.values()):
            if start is None:
                gates[number] = fitted
            else:
                gates[number, :, -1] = start
        state |= {
            "self_attn.o_proj.weight": state["self_attn.o_proj.weight"] * sizes,
            "self_attn.conv": torch.zeros_like(core.conv),
            "self_attn.gates.weight": gates[..., :-1].flatten(0, 1),
            "self_attn.gates.bias": gates[..., -1].flatten(),
            "self_attn.log_rate": torch.zeros_like(core.log_rate),
            "self_attn.skip": torch.full_like(core.skip, SKIP),
        }
        state["self_attn.conv"][:, -1] = 1
        load_subblock(module, "attention", state)  # type: ignore[arg-type]

    def fit_flops(self, variant: Variant, config: Any, tokens: int, length: int) -> tuple[int, int]:
        products, solves = super().fit_flops(variant, config, tokens, length)
        width, heads = config.hidden_size + 1, config.num_attention_heads
        products += tokens * (attention_flops(config, config.num_key_value_heads, length) + 2 * width * (width + heads))
        return products, solves + solve_flops(width, heads)


def _own_name(part: str) -> str:
    """The name in a recurrent attention of a weight, from its name in `parts_of`."""
    role, _, kind = part.rpartition(".")
    if role in ("query", "key", "value", "output"):
        return f"self_attn.{role[0]}_proj.{kind}"
    return f"self_attn.k_norm.{kind}" if role == "key_norm" else part


@torch.no_grad()
def fitted_gates(context: FitContext) -> tuple[Tensor, Tensor]:
    """Rows (H, D + 1), whose sigmoid tells from a normed token how much of the parent's attention a head gives to other
    tokens than the first; and what to multiply each channel by (H x C) to get the size of the parent's.

    The parent's attention tells what it gives to the first token where a channel of the values is 1 there and else 0.
    """
    parents: Any = context.parent_layer.self_attn
    layer, rows = context.parent_layer, rows_of(context.parent_layer, "value")
    channels = head_dim(context.config)
    gram, cross = torch.zeros(()), torch.zeros(())
    mixed: list[Tensor] = []
    squares: list[Tensor] = []

    def marked(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        out = out.clone()
        values = out[..., rows].unflatten(-1, (-1, channels))
        values[..., 0] = 0
        values[:, 0, :, 0] = 1
        return out

    hooks = [
        linear_of(layer, "value").register_forward_hook(marked),
        linear_of(layer, "output").register_forward_pre_hook(lambda _module, inputs: mixed.append(inputs[0])),
    ]
    try:
        for hidden, weights in context.hidden_batches():
            normed = layer.before("attention", hidden)
            parents(hidden_states=normed, **context.context)
            heads = mixed.pop().unflatten(-1, (-1, channels))  # (B, T, H, C)
            share = (1 - heads[..., 0]).clamp(EDGE, 1 - EDGE)
            squares.append(torch.stack([heads[..., 1:].square().mean((0, 1, 3)), share.square().mean((0, 1))]))
            x, y = torch.cat([normed, torch.ones_like(normed[..., :1])], -1).flatten(0, 1), share.logit().flatten(0, 1)
            if weights is not None:
                x, y = x * weights.sqrt(), y * weights.sqrt()
            gram, cross = gram.to(x) + x.T @ x, cross.to(x) + x.T @ y
    finally:
        for hook in hooks:
            hook.remove()
    given, gate = torch.stack(squares).mean(0)
    sizes = (given / gate).sqrt().repeat_interleave(channels)
    return ridge_solve(gram, cross, torch.zeros_like(cross), context.ridge).T, sizes
