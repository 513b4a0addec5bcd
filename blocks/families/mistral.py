"""Mistral: Llama with one sliding window for all layers, or none."""

from typing import Any

from blocks.families.base import Family


class Mistral(Family):
    """`sliding_window` in the config means every layer slides."""

    model_type = "mistral"

    def attention_types(self, config: Any) -> list[str]:
        kind = "full_attention" if config.sliding_window is None else "sliding_attention"
        return [kind] * config.num_hidden_layers
