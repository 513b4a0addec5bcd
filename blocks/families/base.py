"""The seam between puzzle and a model family: attention types per layer, and what a child cannot carry."""

from abc import ABC
from typing import Any, ClassVar

from blocks.errors import ParentError


class Family(ABC):
    """One family of decoder-only models whose layer is attention, then FFN, each with residual add.

    Where subblocks and norms lie is read off the family's own decoder layer by
    blocks/export_code/modeling_decilm.py; a family only says what cannot be read off.
    """

    model_type: ClassVar[str]

    def attention_types(self, config: Any) -> list[str]:
        """`full_attention` or `sliding_attention` for each layer of the parent."""
        types = getattr(config, "layer_types", None)
        return list(types) if types else ["full_attention"] * config.num_hidden_layers

    def check(self, config: Any) -> None:
        """ParentError when the config asks for something that a child would silently lose."""
        unknown = set(self.attention_types(config)) - {"full_attention", "sliding_attention"}
        if unknown:
            raise ParentError(f"{self.model_type} with {', '.join(sorted(unknown))} layers is not supported")
        if getattr(config, "final_logit_softcapping", None):
            raise ParentError(f"{self.model_type} with final_logit_softcapping is not supported: set it to null")
