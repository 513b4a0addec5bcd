"""Narrower experts: some of the channels of each, their `down_proj` refitted.

Start: the channels with the highest contribution, C_i = mean |X_i| * ||W_down[:, i]||, gate included, over the tokens
that the expert is sent. Closed form: `down_proj` of each expert by ridge regression to what the parent's put out.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from blocks.experts import ExpertsKind, channels_of, check_size, ffn_batches, keep_experts
from blocks.families import ExpertSizes, experts_of, has_experts
from blocks.fit import FitContext, ridge_solve, solve_flops
from blocks.subblock import parts_of
from blocks.variant import Variant


class ExpertWidth(ExpertsKind):
    """`ewidth<F>`: F channels of each expert; `ewidth<P>pct`: P % of the parent's, rounded to a multiple of 8."""

    name = "expert_width"

    def parse(self, label: str, config: Any) -> Variant | None:
        match = re.fullmatch(r"ewidth(\d+)(pct)?", label)
        if not match:
            return None
        size, own = int(match[1]), experts_of(config).width
        if match[2]:
            size = max(8, round(size / 100 * own / 8) * 8)
        check_size(config, label, size, 1, own - 1, "channels of an expert")
        return self.variant(f"ewidth{size}", size)

    def examples(self, config: Any) -> list[str]:
        parts = (3, 2, 1) if has_experts(config) else ()
        return [f"ewidth{experts_of(config).width * part // 4}" for part in parts]

    def sizes(self, variant: Variant, config: Any) -> ExpertSizes:
        assert variant.size is not None
        return replace(experts_of(config), width=variant.size)

    def initialise(self, variant: Variant, module: nn.Module, context: FitContext) -> None:
        every = torch.arange(experts_of(context.config).count, device=context.statistics["expert_tokens"].device)
        keep_experts(module, context, every, self._channels(variant, context))

    def closed_form(self, variant: Variant, module: nn.Module, context: FitContext) -> None:
        channels, parent = self._channels(variant, context), parts_of(context.parent_layer, "ffn")["down.weight"]
        count, whole = channels.shape[0], parent.shape[2]
        grams = parent.new_zeros(count, whole, whole)
        with torch.no_grad():
            for states, weights in ffn_batches(context):
                for expert, token, gate, inner in channels_of(context.parent_layer, states):
                    weigh = gate[:, None] if weights is None else gate[:, None] * weights[token].sqrt()
                    grams[expert] += (inner * weigh).T @ (inner * weigh)
        down = parts_of(module, "ffn")["down.weight"]  # type: ignore[arg-type]
        for expert, kept in enumerate(channels):
            gram = grams[expert][kept]
            fitted = ridge_solve(gram[:, kept], gram @ parent[expert].T, parent[expert][:, kept].T, context.ridge)
            down[expert].copy_(fitted.T)

    def _channels(self, variant: Variant, context: FitContext) -> Tensor:
        """Which channels of each expert are kept, in their order. (E, F) of the narrower experts."""
        down: Tensor = parts_of(context.parent_layer, "ffn")["down.weight"]
        contribution = context.statistics["expert_channels"] * down.norm(dim=1)
        order = contribution.argsort(dim=1, descending=True, stable=True)
        return order[:, : variant.size].sort(dim=1).values

    def fit_flops(self, variant: Variant, config: Any, tokens: int, length: int) -> tuple[int, int]:
        assert variant.size is not None
        own = experts_of(config)
        grams = 2 * own.per_token * own.width**2 * tokens
        cross = 2 * own.count * variant.size * own.width * config.hidden_size
        return grams + cross, own.count * solve_flops(variant.size, config.hidden_size)
