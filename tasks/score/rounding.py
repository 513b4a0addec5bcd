"""Blocks of one layer, rounded to a type of number where they stand in the parent: what replace-1-block scores of types
are taken of. A type of 4 or 5 bits is fitted to what enters the block in the parent (tasks/export/quantise.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blocks.error_correction import linears_of
from blocks.library import digest_of
from blocks.records import BlockRecord
from blocks.typed_labels import FITTED_TO, bare, type_in, typed
from tasks.export.quantise import round_linear
from tasks.gguf.writer import CORRECTED

if TYPE_CHECKING:
    from blocks.export_code.modeling_decilm import DeciLMDecoderLayer

VERSION = 1


def in_type(record: BlockRecord, kind: str) -> BlockRecord:
    """The record of a block whose numbers shall be of a type."""
    key = digest_of(block=record.key, type=kind, fitted=FITTED_TO, v=VERSION)
    return record.model_copy(update={"key": key, "variant": typed(record.variant, kind)})


# the Gram matrices of what enters the matrices of a block, by the names that they have in `module`
Inputs = Callable[[BlockRecord, "DeciLMDecoderLayer"], dict[str, Tensor]]


@dataclass(kw_only=True)
class Rounding:
    """Rounds the blocks of one layer; types of a block share what `inputs` found."""

    inputs: Inputs
    grams: dict[tuple[str, str], dict[str, Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, record: BlockRecord, module: "DeciLMDecoderLayer") -> None:
        """Round the block of a record, which `module` holds, in place, to the type that its label names."""
        kind, at = type_in(record.variant), (record.subblock, bare(record.variant))
        if kind in CORRECTED and at not in self.grams:
            self.grams[at] = self.inputs(record, module)
        for name, linear in linears_of(module).items():
            device = linear.weight.device
            round_linear(linear.cpu(), kind, self.grams.get(at, {}).get(name))
            linear.to(device)
