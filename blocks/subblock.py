"""The two subblocks of a decoder layer: which weights are theirs, how they are set, what they put out.

A subblock is an attention or an FFN with its norms. B = batch, T = tokens, D = hidden_size.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from blocks.records import Subblock

if TYPE_CHECKING:
    from blocks.export_code.modeling_decilm import DeciLMDecoderLayer


def subblock_prefixes(layer: "DeciLMDecoderLayer", subblock: Subblock) -> tuple[str, ...]:
    """Names of the modules of a layer that belong to a subblock: its core and its norms."""
    norms = layer.attention_norms if subblock == "attention" else layer.ffn_norms
    return ("self_attn" if subblock == "attention" else "mlp", *(name for name in norms if name))


def subblock_state(layer: "DeciLMDecoderLayer", subblock: Subblock) -> dict[str, Tensor]:
    """Weights of one subblock, norms included, named as in the layer."""
    prefixes = subblock_prefixes(layer, subblock)
    return {name: tensor for name, tensor in layer.state_dict().items() if name.split(".")[0] in prefixes}


def load_subblock(layer: "DeciLMDecoderLayer", subblock: Subblock, state: dict[str, Tensor]) -> None:
    """Set the weights of one subblock; ValueError when a name is missing, left over or of another shape."""
    wanted = subblock_state(layer, subblock)
    if set(wanted) != set(state):
        raise ValueError(f"{subblock} weights differ in names: {sorted(set(wanted) ^ set(state))}")
    for name, tensor in wanted.items():
        if tensor.shape != state[name].shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, the subblock needs {tuple(tensor.shape)}")
        tensor.copy_(state[name])


def run_subblock(
    layer: "DeciLMDecoderLayer", subblock: Subblock, hidden: Tensor, context: dict[str, Any]
) -> Tensor | None:
    """Output of one subblock before the residual add, None for a no-op. (B, T, D) -> (B, T, D)"""
    return layer.attention(hidden, **context) if subblock == "attention" else layer.ffn(hidden)
