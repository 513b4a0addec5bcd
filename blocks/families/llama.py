"""Llama 2 and 3, SmolLM2 and all that share the architecture."""

from blocks.families.base import Family


class Llama(Family):
    """Pre-norm, full attention in every layer, optional biases."""

    model_type = "llama"
