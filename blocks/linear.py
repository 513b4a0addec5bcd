"""What the two linear kinds share: one (D, D) matrix in the place of a subblock's core, which is all but its norms.

Start: the product of the parent's matrices, whatever is not linear between them left out (Puzzle, section 3). Closed
form: ridge regression from the normed input to the core's output over the calibration tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from blocks.fit import FitContext, ridge_solve, solve_flops
from blocks.subblock import load_subblock, subblock_prefixes, subblock_state
from blocks.variant import SizelessKind, Variant


class LinearKind(SizelessKind):
    """`linear`: one (D, D) matrix."""

    name = "linear"

    @abstractmethod
    def product(self, context: FitContext) -> Tensor:
        """(D, D) product of the parent's matrices that the kind starts from."""

    def block_entry(self, variant: Variant, config: Any) -> dict[str, Any]:
        return {"no_op": False, "replace_with_linear": True}

    def flops_per_token(self, variant: Variant, config: Any, context_tokens: int) -> int:
        return 2 * config.hidden_size**2

    def initialise(self, variant: Variant, module: nn.Module, context: FitContext) -> None:
        """The product, and the parent's norms."""
        core = subblock_prefixes(context.parent_layer, self.subblock)[0]
        state = subblock_state(context.parent_layer, self.subblock)
        norms = {name: tensor for name, tensor in state.items() if not name.startswith(core)}
        weight = f"{core}.linear_{'attn' if self.subblock == 'attention' else 'mlp'}.weight"
        load_subblock(module, self.subblock, norms | {weight: self.product(context)})  # type: ignore[arg-type]

    def fit_flops(self, variant: Variant, config: Any, tokens: int, length: int) -> tuple[int, int]:
        return 0, solve_flops(config.hidden_size, config.hidden_size)

    def closed_form(self, variant: Variant, module: nn.Module, context: FitContext) -> None:
        """The ridge solution, shrunk towards the product."""
        layer: Any = module
        core = layer.core(self.subblock)
        weight = (core.linear_attn if self.subblock == "attention" else core.linear_mlp).weight.data
        gram, cross = (context.statistics[f"{self.subblock}_in_{part}"] for part in ("gram", "cross"))
        weight.copy_(ridge_solve(gram, cross, weight.T, context.ridge).T)
