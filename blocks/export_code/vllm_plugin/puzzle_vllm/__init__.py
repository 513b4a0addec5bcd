"""A plugin for vLLM that runs children of puzzle: pip install its folder, then vllm serve CHILD --trust-remote-code.

It knows one architecture, PuzzleForCausalLM, which `puzzle export --format vllm-plugin` writes into a child's config.
"""

from typing import Any

ARCHITECTURE = "PuzzleForCausalLM"


def register() -> None:
    """Make the architecture known. vLLM calls this in each of its processes, maybe more than once."""
    from vllm import ModelRegistry
    from vllm.model_executor.models import config as hooks
    from vllm.transformers_utils import model_arch_config_convertor as convertors

    # by its name: vLLM imports it when a model needs it, since importing it starts CUDA
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    plain, stock = convertors.ModelArchConfigConvertorBase, convertors.NemotronNasModelArchConfigConvertor

    class Convertor(convertors.NemotronNasModelArchConfigConvertor):
        """vLLM's own reads the number of KV heads off the first attention that is no no-op. It may be linear."""

        def get_total_num_kv_heads(self) -> int:
            return (plain if ARCHITECTURE in self.get_architectures() else stock).get_total_num_kv_heads(self)

    convertors.MODEL_ARCH_CONFIG_CONVERTORS["nemotron-nas"] = Convertor

    class Hook(hooks.VerifyAndUpdateConfig):
        """A state is not kept for the beginnings of texts, so nothing is to be found in the cache. It gives no tokens
        back, which vLLM may ask for where it plans a step before it has the last one's tokens.
        """

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            blocks = getattr(vllm_config.model_config.hf_config, "block_configs", None) or []
            if any(block["attention"].get("recurrent") for block in blocks):
                if vllm_config.cache_config.enable_prefix_caching:
                    hooks.logger.info("No prefix caching: recurrent attention keeps no state behind a beginning.")
                vllm_config.cache_config.enable_prefix_caching = False
                if vllm_config.scheduler_config.async_scheduling is None:  # where it was asked for, it is refused
                    vllm_config.scheduler_config.async_scheduling = False
                hooks.MambaModelConfig.verify_and_update_config(vllm_config)

    hooks.MODELS_CONFIG_MAP[ARCHITECTURE] = Hook
