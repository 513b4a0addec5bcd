"""Configuration of a child model in the nemotron-nas schema: a parent's config plus `block_configs`.

`block_configs[i]` says what stands in layer i:

    {"attention": {"no_op": false, "replace_with_linear": false, "n_heads_in_group": 3, "num_key_value_heads": 3},
     "ffn":       {"no_op": false, "replace_with_linear": false, "ffn_mult": 1.0, "intermediate_size": 1536}}

An attention with fewer query heads than the parent's has "num_attention_heads" as well. An FFN with experts has, in the
place of a width,

    "moe": {"num_local_experts": 64, "num_experts_per_tok": 8, "expert_intermediate_dim": 1024}

vLLM, SGLang and TensorRT-LLM read the entries as attributes, JSON wants dicts: `AttributeDict` is both.
"""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig


class AttributeDict(dict[str, Any]):
    """A JSON-serialisable dict whose keys are also attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for key, value in self.items():
            if isinstance(value, dict) and not isinstance(value, AttributeDict):
                self[key] = AttributeDict(value)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttributeDict":
        return AttributeDict({key: value for key, value in self.items()})


class DeciLMConfig(PreTrainedConfig):
    """The parent's fields stay flat at the top (Hugging Face spelling), so engines find them where they look.

    `base_model_type` names the parent's family; `parent_layer_types` keeps the parent's own attention types, since
    `layer_types` marks layers without attention as "moe", the value for which transformers allots no KV cache.
    """

    model_type = "nemotron-nas"

    def __init__(
        self,
        block_configs: list[dict[str, Any]] | None = None,
        base_model_type: str = "llama",
        parent_layer_types: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        blocks = [AttributeDict(block) for block in block_configs or []]
        types = parent_layer_types or ["full_attention"] * len(blocks)
        kwargs["num_hidden_layers"] = len(blocks)
        kwargs["layer_types"] = [
            "moe" if block.attention.no_op or block.attention.replace_with_linear else types[layer]
            for layer, block in enumerate(blocks)
        ]
        self.block_configs = blocks
        self.base_model_type = base_model_type
        self.parent_layer_types = types
        super().__init__(**kwargs)
        self.use_cache = kwargs.get("use_cache", True) and self.has_attention

    @property
    def has_attention(self) -> bool:
        """True when at least one layer has a KV cache."""
        return any(kind != "moe" for kind in self.layer_types)

    def base_config(self) -> PreTrainedConfig:
        """The parent's own config, as its family's class."""
        fields = {key: value for key, value in self.to_dict().items() if key not in _NOT_THE_PARENTS}
        if self.base_model_type != "llama":  # LlamaConfig has no layer_types
            fields["layer_types"] = list(self.parent_layer_types)
        return CONFIG_MAPPING[self.base_model_type](**fields)


_NOT_THE_PARENTS = {
    "architectures",
    "auto_map",
    "base_model_type",
    "block_configs",
    "layer_types",
    "model_type",
    "parent_layer_types",
    "transformers_version",
}
