"""The engine `torch`: runs an exported folder (or a GGUF file) in eager torch. Other engines are compared with it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor

from blocks.records import Turn
from tasks.engines.base import Engine, LoadOptions, Session
from tasks.engines.timing_in_turns import request_of
from tasks.inputs.children import open_child


class Torch(Engine):
    """torch, which is always installed."""

    name: ClassVar[str] = "torch"
    format: ClassVar[str] = "transformers"
    precisions: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")

    def missing(self) -> str | None:
        return None

    def version(self) -> str:
        return f"torch {torch.__version__}, transformers {transformers.__version__}"

    def load(self, path: Path, how: LoadOptions) -> "TorchSession":
        torch.set_num_threads(how.threads)
        return TorchSession(open_child(path, getattr(torch, how.precision)))


class TorchSession(Session):
    """One model in memory."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.vocab_size = model.config.vocab_size

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        return self.model(torch.tensor([tokens]), use_cache=False).logits[0].float()

    def request(self, prompt: Tensor, steps: int, grow: int = 0) -> Turn:
        return request_of(self.model, prompt, steps, grow)

    def generate(self, tokens: Sequence[int], steps: int) -> list[int]:
        made: Tensor = self.model.generate(
            torch.tensor([tokens]), max_new_tokens=steps, min_new_tokens=steps, do_sample=False
        )
        return made[0, len(tokens) :].tolist()

    def close(self) -> None:
        del self.model
