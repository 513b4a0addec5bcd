"""A child: how it is assembled from an architecture and the block library."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from blocks.compute import Compute
from blocks.errors import DamagedBlock
from blocks.export_code.modeling_decilm import DeciLMDecoderLayer, DeciLMForCausalLM
from blocks.library import read_tensors
from blocks.parent import Parent
from blocks.records import SUBBLOCKS, Architecture, BlockRecord, LayerChoice
from blocks.runtime import free_bytes
from blocks.subblock import load_subblock

Library = Mapping[tuple[int, str, str], BlockRecord]


def library_of(records: list[BlockRecord]) -> dict[tuple[int, str, str], BlockRecord]:
    """Records by (layer, subblock, variant)."""
    return {(record.layer, record.subblock, record.variant): record for record in records}


def assemble(parent: Parent, library: Library, architecture: Architecture, workspace: Path) -> DeciLMForCausalLM:
    """The child: the parent's non-block weights, its subblocks where they were chosen, trained variants elsewhere.

    With every choice "parent" the logits are the parent's bit for bit. Raises DamagedBlock when a block is missing or
    does not match its digest.
    """
    return assemble_layers(parent, library, architecture.layers, workspace)


def assemble_layers(
    parent: Parent,
    library: Library,
    layers: Sequence[LayerChoice],
    workspace: Path,
    each: Callable[[nn.Module], object] = lambda layer: None,
) -> DeciLMForCausalLM:
    """The child with these layers, whatever their types of number. each: called with every layer, before the next."""
    model = parent.frame(layers)
    for layer, choice in enumerate(choice.bare for choice in layers):
        module = _assembled_layer(parent, library, choice, layer, workspace)
        each(module)
        model.model.layers.append(module)
    return model


def for_passes(build: Callable[[Compute], DeciLMForCausalLM], compute: Compute, size: int) -> DeciLMForCausalLM:
    """A whole model of `size` bytes for forward passes. Where that is more than half of what its device has free, the
    layers wait on the host, and each comes to the device while it computes.
    """
    device = compute.device
    if device == "cpu" or size < free_bytes(device) / 2:
        return build(compute)
    model: Any = build(compute.on("cpu"))

    def comes(layer: nn.Module, _: object) -> None:
        layer.to(device)

    def goes(layer: nn.Module, *_: object) -> None:
        layer.to("cpu")

    for layer in model.model.layers:
        layer.register_forward_pre_hook(comes)
        layer.register_forward_hook(goes)
    for part in (*(part for name, part in model.model.named_children() if name != "layers"), model.lm_head):
        part.to(device)
    model.tie_weights()
    return model


def _assembled_layer(
    parent: Parent, library: Library, choice: LayerChoice, layer: int, workspace: Path
) -> DeciLMDecoderLayer:
    module, device = parent.own_part(layer, choice), parent.compute.device
    if choice.coupled:
        module.load_state_dict(_weights(library, layer, "block", choice.block_label, workspace, device))
        return module
    for subblock in SUBBLOCKS:
        variant = getattr(choice, subblock)
        if variant not in ("parent", "no_op"):
            load_subblock(module, subblock, _weights(library, layer, subblock, variant, workspace, device))
    return module


def _weights(
    library: Library, layer: int, subblock: str, variant: str, workspace: Path, device: str
) -> dict[str, Tensor]:
    record = library.get((layer, subblock, variant))
    if record is None or record.weights is None:
        raise DamagedBlock(f"the library has no trained block for layer {layer} {subblock} {variant}: run again")
    return read_tensors(workspace, record.weights, device=device)
