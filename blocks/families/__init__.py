"""Model families: what must be known of a parent beyond its config. One small class each.

To add one see docs/how-to/add-a-family.md.
"""

from typing import Any

from blocks.errors import ParentError
from blocks.families.base import Family
from blocks.families.gemma3 import Gemma3
from blocks.families.llama import Llama
from blocks.families.mistral import Mistral
from blocks.families.qwen import Qwen2, Qwen3

FAMILIES: dict[str, Family] = {family.model_type: family for family in (Llama(), Mistral(), Qwen2(), Qwen3(), Gemma3())}


__all__ = ["FAMILIES", "Family", "family_of", "tokens_seen", "windows_of"]


def family_of(config: Any) -> Family:
    """The family of a parent's config; ParentError for one that is unknown or has a feature that a child would lose."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ParentError(
            f"model_type {config.model_type!r} is not known here; allowed: {', '.join(FAMILIES)}. "
            "To add a family see docs/how-to/add-a-family.md."
        )
    family.check(config)
    return family


def windows_of(config: Any) -> tuple[int | None, ...]:
    """How many tokens a token sees in each layer of a parent; None for all before it. Empty where no layer slides."""
    windows = family_of(config).windows(config)
    return tuple(windows) if any(windows) else ()


def tokens_seen(config: Any, context_tokens: int, most: int | None = None) -> int:
    """How many of `context_tokens` a token sees: `most`, or the mean of what the parent's layers see."""
    seen = [min(context_tokens, most or window or context_tokens) for window in windows_of(config) or (None,)]
    return round(sum(seen) / len(seen))
