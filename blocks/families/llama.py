"""Llama 2 and 3, SmolLM2 and all that share the architecture."""

from typing import Any

from blocks.families.base import Family


class Llama(Family):
    """Pre-norm, full attention in every layer, optional biases."""

    model_type = "llama"

    def biases(self, config: Any) -> tuple[bool, bool, bool]:
        return config.attention_bias, config.attention_bias, config.mlp_bias

    def attention_types(self, config: Any) -> list[str]:
        """Full whatever the config says: transformers' Llama reads neither `layer_types` nor `sliding_window`."""
        return ["full_attention"] * config.num_hidden_layers
