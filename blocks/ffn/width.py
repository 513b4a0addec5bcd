"""A narrower FFN: some of the parent's intermediate channels, `down_proj` refitted.

Start: the channels with the highest contribution C_i = mean |X_i| * ||W_down[:, i]|| (Puzzle, section 3).
Closed form: the channels are chosen again by backward elimination with refit (blocks/fit.py), which gives a lower error
than contribution (docs/log.md). Then down_proj is the ridge solution from the layer's Gram matrix, of which every
width uses a sub-matrix.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from torch import Tensor, nn

from blocks.errors import UnknownVariant
from blocks.families import ffn_matrices, has_experts
from blocks.fit import FitContext, contribution_order, ridge_solve, solve_flops
from blocks.records import Subblock
from blocks.subblock import linear_of, load_parts, parts_of
from blocks.variant import Variant, VariantKind


def ffn_entry(config: Any, intermediate_size: int) -> dict[str, Any]:
    """`block_configs` entry of an FFN of this width.

    DeciLM engines prefer ffn_mult (width = 2/3 * ffn_mult * D, rounded up to a multiple of 256) to intermediate_size,
    so it stands only where it gives the width back.
    """
    entry = {"no_op": False, "replace_with_linear": False, "intermediate_size": intermediate_size}
    mult = intermediate_size * 3 / (2 * config.hidden_size)
    return entry if intermediate_size % 256 else entry | {"ffn_mult": mult}


def ffn_flops(config: Any, intermediate_size: int) -> int:
    """FLOPs of one token through an FFN of this width."""
    return 2 * ffn_matrices(config) * config.hidden_size * intermediate_size


class Width(VariantKind):
    """`ffn<N>`: N intermediate channels; `ffn<P>pct`: P % of the parent's, rounded to a multiple of 8."""

    subblock: ClassVar[Subblock] = "ffn"
    name = "width"

    def parse(self, label: str, config: Any) -> Variant | None:
        match = re.fullmatch(r"ffn(\d+)(pct)?", label)
        if not match:
            return None
        if has_experts(config):
            raise UnknownVariant(
                f"{label}: the FFNs of this parent are mixtures of experts, which have no one width. Keep fewer "
                "experts (experts<N>), send a token to fewer (topk<K>), or narrow each of them (ewidth<F>)"
            )
        size = int(match[1])
        if match[2]:
            size = max(8, round(size / 100 * config.intermediate_size / 8) * 8)
        if not 0 < size < config.intermediate_size:
            raise UnknownVariant(
                f"{label}: a narrower FFN needs 1 to {config.intermediate_size - 1} channels "
                f"(the parent has {config.intermediate_size}), or ffn1pct to ffn99pct"
            )
        return self.variant(f"ffn{size}", size)

    def examples(self, config: Any) -> list[str]:
        parts = () if has_experts(config) else (3, 2, 1)
        return [f"ffn{config.intermediate_size * part // 4}" for part in parts]

    def block_entry(self, variant: Variant, config: Any) -> dict[str, Any]:
        assert variant.size is not None
        return ffn_entry(config, variant.size)

    def flops_per_token(self, variant: Variant, config: Any, context_tokens: int) -> int:
        assert variant.size is not None
        return ffn_flops(config, variant.size)

    def initialise(self, variant: Variant, module: nn.Module, context: FitContext) -> None:
        self._keep(module, context, contribution_order(context.statistics["ffn_contribution"])[: variant.size])

    def closed_form(self, variant: Variant, module: nn.Module, context: FitContext) -> None:
        channels = context.statistics["ffn_order"][: variant.size].sort().values
        self._keep(module, context, channels)
        gram = context.statistics["ffn_gram"]
        whole: Tensor = linear_of(context.parent_layer, "down").weight
        prior = whole[:, channels].T
        fitted = ridge_solve(gram[channels][:, channels], gram[channels] @ whole.T, prior, context.ridge)
        linear_of(module, "down").weight.data.copy_(fitted.T)  # type: ignore[arg-type]

    def fit_flops(self, variant: Variant, config: Any, tokens: int, length: int) -> tuple[int, int]:
        assert variant.size is not None
        cross = 2 * variant.size * config.intermediate_size * config.hidden_size
        return cross, solve_flops(variant.size, config.hidden_size)

    @staticmethod
    def _keep(module: nn.Module, context: FitContext, channels: Tensor) -> None:
        """Copy the parent's FFN with these channels only."""
        parts = parts_of(context.parent_layer, "ffn")
        channels = channels.sort().values
        for name in parts:
            if name.startswith(("gate.", "up.")):
                parts[name] = parts[name][channels]
            elif name == "down.weight":
                parts[name] = parts[name][:, channels]
        load_parts(module, "ffn", parts)  # type: ignore[arg-type]
