"""The two subblocks of a decoder layer: which weights are theirs, how they are set, what they put out.

A subblock is an attention or an FFN with its norms. B = batch, T = tokens, D = hidden_size.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from blocks.families import own_sizes
from blocks.records import Subblock

if TYPE_CHECKING:
    from blocks.export_code.modeling_decilm import DeciLMDecoderLayer


def subblock_prefixes(layer: "DeciLMDecoderLayer", subblock: Subblock) -> tuple[str, ...]:
    """Names of the modules of a layer that belong to a subblock: its core and its norms."""
    norms = layer.family.norms[subblock]
    return (layer.family.cores[subblock], *(name for name in norms if name))


def subblock_state(layer: "DeciLMDecoderLayer", subblock: Subblock) -> dict[str, Tensor]:
    """Weights of one subblock, norms included, named as in the layer."""
    prefixes = subblock_prefixes(layer, subblock)
    return {name: tensor for name, tensor in layer.state_dict().items() if name.split(".")[0] in prefixes}


def parts_of(layer: "DeciLMDecoderLayer", subblock: Subblock) -> dict[str, Tensor]:
    """The same by what they are, whatever the family calls them: `key.weight`, `down.bias` ...; norms keep their names.

    A matrix that lies in one tensor with others is a view of its rows. Those of all experts are one tensor (E, ...).
    """
    parts, found = layer.family.parts(subblock), dict[str, Tensor]()
    sizes = own_sizes(layer.config)
    for name, tensor in subblock_state(layer, subblock).items():
        module, _, kind = (name, "", "weight") if name in parts else name.rpartition(".")
        if module in parts:
            rows = tensor.split([sizes[role] for role in parts[module]], dim=max(0, tensor.dim() - 2))
            found |= {f"{role}.{kind}": part for role, part in zip(parts[module], rows, strict=True)}
        else:
            found[name] = tensor
    return found


def rows_of(layer: "DeciLMDecoderLayer", role: str) -> slice:
    """Which rows of its module's weight a matrix of the attention is."""
    sizes = own_sizes(layer.config)
    roles = next(roles for roles in layer.family.parts("attention").values() if role in roles)
    first = sum(sizes[other] for other in roles[: roles.index(role)])
    return slice(first, first + sizes[role])


def linear_of(layer: "DeciLMDecoderLayer", role: str) -> Any:
    """The module of a layer that multiplies with a matrix, such as `down`."""
    parts = layer.family.parts("attention") | layer.family.parts("ffn")
    return layer.get_submodule(next(name for name, roles in parts.items() if role in roles))


def load_subblock(layer: "DeciLMDecoderLayer", subblock: Subblock, state: dict[str, Tensor]) -> None:
    """Set the weights of one subblock; ValueError when a name is missing, left over or of another shape."""
    _copy(subblock_state(layer, subblock), state, subblock)


def load_parts(layer: "DeciLMDecoderLayer", subblock: Subblock, parts: dict[str, Tensor]) -> None:
    """The same with the names of `parts_of`."""
    _copy(parts_of(layer, subblock), parts, subblock)


def _copy(wanted: dict[str, Tensor], state: dict[str, Tensor], subblock: Subblock) -> None:
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
