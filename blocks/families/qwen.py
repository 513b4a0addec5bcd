"""Qwen2 (biases on q, k, v) and Qwen3 (norms on q and k, explicit head_dim)."""

from typing import Any

from blocks.families.base import Family


class Qwen2(Family):
    """Biases on the query, key and value projections."""

    model_type = "qwen2"

    def biases(self, config: Any) -> tuple[bool, bool, bool]:
        return True, False, False


class Qwen3(Family):
    """RMSNorm on every query and key head; head_dim stands in the config."""

    model_type = "qwen3"
    head_norms = True

    def biases(self, config: Any) -> tuple[bool, bool, bool]:
        return config.attention_bias, config.attention_bias, False
