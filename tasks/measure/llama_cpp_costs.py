"""Costs of variants in llama.cpp, from whole models that are written as GGUF files. What packing into GGUF's layers
adds to a variant (tasks/gguf/layout.py) is part of its cost.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from blocks.export_code.modeling_decilm import DeciLMForCausalLM
from blocks.records import LayerChoice
from tasks.engines.base import Session
from tasks.engines.ggml import GgmlRounding
from tasks.engines.llama_cpp import LlamaCpp
from tasks.export.quantise import Recipe
from tasks.gguf.tokenizer_writer import NO_TOKENIZER
from tasks.gguf.writer import CORRECTED, PRECISIONS, Stored, write_gguf
from tasks.measure.variant_timing import Load
from tasks.measure.whole_model_costs import WholeModelTimer

ROWS = 64  # of noise that is rounded


class LlamaCppTimer(WholeModelTimer):
    """Times models in llama.cpp, in this process."""

    def _open(self, folder: Path, layers: Sequence[LayerChoice], load: Load) -> Session:
        with no_init_weights():
            model: Any = DeciLMForCausalLM(self.reader.child_config(layers))
        model.tie_weights()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.02, generator=generator)
        precision = self.hardware.precision
        recipe = Recipe.uniform(precision, len(layers)).with_head(precision)
        stored = rounded_noise(model, recipe) if precision in CORRECTED else {}
        path = write_gguf(model, folder / "model.gguf", precision, NO_TOKENIZER, "noise", stored)
        del model
        session = LlamaCpp().load(path, self._how(load))
        path.unlink()  # an open file stays readable, its name is free for the next
        return session


def rounded_noise(model: Any, recipe: Recipe) -> Mapping[str, Stored]:
    """Every matrix of a model for which a recipe has a type, embedding and head among them, as good as noise.

    A few rows are rounded and repeated: rounding takes long, and time does not depend on the weights.
    """
    stored = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and (precision := recipe.type_of(name)):
            rounding = GgmlRounding(kind=PRECISIONS[precision][0])
            part, _ = rounding(module.weight.detach()[:ROWS].float(), None)
            rows = torch.from_numpy(part).repeat(-(-len(module.weight) // len(part)), 1)[: len(module.weight)]
            stored[f"{name}.weight"] = Stored(kind=rounding.kind, rows=rows)
    return stored
