"""Gemma 3 text models: norms before and after each subblock, two rotary bases, scaled embedding, tied head."""

from typing import Any

from blocks.errors import ParentError
from blocks.families.base import Family


class Gemma3(Family):
    """Sliding and full attention layers alternate."""

    model_type = "gemma3_text"
    norms = 2
    head_norms = True

    def biases(self, config: Any) -> tuple[bool, bool, bool]:
        return config.attention_bias, config.attention_bias, False

    def check(self, config: Any) -> None:
        super().check(config)
        if config.use_bidirectional_attention or config.attn_logit_softcapping:
            raise ParentError("gemma3_text with bidirectional attention or attention soft-capping is not supported")
