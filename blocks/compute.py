"""How a stage computes: one frozen value, made once from the profile (tasks/running/workers.py) and passed on."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Where and in what a stage computes.

    dtype: of weights and of matrix products. Losses, Gram matrices, their solves and the softmax over the vocabulary
      are float32 or float64 whatever it is.
    attention: transformers' name of the attention code.
    micro_batch_tokens: tokens of one forward pass. Batches are counted in tokens everywhere, so that memory does not
      depend on how long a sequence is.
    """

    device: str
    dtype: torch.dtype
    attention: str
    micro_batch_tokens: int

    def on(self, device: str) -> "Compute":
        """The same on another device; `cpu:1`, a slot of this machine's CPU, is the CPU."""
        return replace(self, device="cpu" if device.startswith("cpu") else device)

    def with_weights(self, dtype: torch.dtype) -> "Compute":
        """The same with weights of another dtype: what is trained has float32 weights, and products in `dtype`."""
        return replace(self, dtype=dtype)

    def products(self) -> AbstractContextManager[object]:
        """Matrix products of float32 weights in `dtype`, for training."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.partition(":")[0], self.dtype)

    def sequences(self, length: int) -> int:
        """Sequences of so many tokens in one micro-batch."""
        return max(1, self.micro_batch_tokens // length)


# for what is read, converted and written, and not computed
HOST = Compute(device="cpu", dtype=torch.float32, attention="sdpa", micro_batch_tokens=2048)
