"""Costs of variants in llama.cpp, from whole models that are written as GGUF files. What packing into GGUF's layers
adds to a variant (tasks/gguf/layout.py) is part of its cost.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.initialization import no_init_weights

from blocks.export_code.modeling_decilm import DeciLMForCausalLM
from blocks.records import LayerChoice
from tasks.engines.base import Session
from tasks.engines.llama_cpp import LlamaCpp
from tasks.gguf.tokenizer_writer import NO_TOKENIZER
from tasks.gguf.writer import write_gguf
from tasks.measure.variant_timing import Load
from tasks.measure.whole_model_costs import WholeModelTimer


class LlamaCppTimer(WholeModelTimer):
    """Times models in llama.cpp, in this process."""

    def _open(self, folder: Path, layers: Sequence[LayerChoice], load: Load) -> Session:
        with no_init_weights():
            model: Any = DeciLMForCausalLM(self.reader.child_config(layers))
        model.tie_weights()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.02, generator=generator)
        path = write_gguf(model, folder / "model.gguf", self.hardware.precision, NO_TOKENIZER, "noise")
        del model
        session = LlamaCpp().load(path, self._how(load))
        path.unlink()  # an open file stays readable, its name is free for the next
        return session
