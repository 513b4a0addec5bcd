"""What the two linear kinds share: one (D, D) matrix in the place of a subblock's core.

Start: the product of the parent's matrices that ignores what is not linear (puzzle.md). Closed form: ridge regression
from the normed input to the core's output over the calibration tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from blocks.export_code.modeling_decilm import DeciLMDecoderLayer
from blocks.fit import FitContext, ridge_solve
from blocks.parent import load_subblock, subblock_prefixes, subblock_state
from blocks.records import Subblock

ENTRY: dict[str, Any] = {"no_op": False, "replace_with_linear": True}


def set_matrix(module: Any, subblock: Subblock, matrix_DD: Tensor, context: FitContext) -> None:
    """Give a linear subblock its matrix and the parent's norms."""
    core = subblock_prefixes(context.parent_layer, subblock)[0]
    state = subblock_state(context.parent_layer, subblock)
    norms = {name: tensor for name, tensor in state.items() if not name.startswith(core)}
    weight = "self_attn.linear_attn.weight" if subblock == "attention" else "mlp.linear_mlp.weight"
    load_subblock(module, subblock, norms | {weight: matrix_DD})


def fit_matrix(module: DeciLMDecoderLayer, subblock: Subblock, context: FitContext) -> None:
    """Replace the matrix by the ridge solution, shrunk towards what it is now."""
    core: Any = module.self_attn if subblock == "attention" else module.mlp
    weight = (core.linear_attn if subblock == "attention" else core.linear_mlp).weight.data
    gram, cross = (context.statistics[f"{subblock}_in_{part}"] for part in ("gram", "cross"))
    weight.copy_(ridge_solve(gram, cross, weight.T, context.ridge).T)
