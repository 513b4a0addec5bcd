"""A child that sees: LLaVA's own vision tower and projector before a text model whose layers differ."""

from typing import Any

from torch import nn
from transformers import AutoModel, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaModel, LlavaMultiModalProjector, LlavaPreTrainedModel

from .configuration_decilm import DeciLMConfig
from .modeling_decilm import DeciLMModel


class DeciLMLlavaConfig(LlavaConfig):
    """LLaVA's config with a DeciLMConfig as `text_config`."""

    model_type = "nemotron-nas-llava"

    def __init__(self, text_config: dict[str, Any] | DeciLMConfig | None = None, **kwargs: Any) -> None:
        text = text_config if isinstance(text_config, DeciLMConfig) else DeciLMConfig(**(text_config or {}))
        super().__init__(text_config=text, **kwargs)


class DeciLMLlavaModel(LlavaModel):
    config_class = DeciLMLlavaConfig

    def __init__(self, config: Any) -> None:
        LlavaPreTrainedModel.__init__(self, config)  # not LlavaModel's, which asks a table for the text model
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = DeciLMModel(config.text_config)
        self.post_init()


class DeciLMLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = DeciLMLlavaConfig

    def __init__(self, config: Any) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = DeciLMLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """See GenerationMixin.generate; without any attention there is nothing to cache, whatever was asked."""
        config: Any = self.config
        cached = config.text_config.has_attention
        return super().generate(*args, **kwargs if cached else kwargs | {"use_cache": False})
