"""A plugin for vLLM that runs children of puzzle: pip install its folder, then vllm serve CHILD --trust-remote-code.

It knows one architecture, PuzzleForCausalLM, which `puzzle export --format vllm-plugin` writes into a child's config.
"""

ARCHITECTURE = "PuzzleForCausalLM"


def register() -> None:
    """Make the architecture known. vLLM calls this in each of its processes, maybe more than once."""
    from vllm import ModelRegistry
    from vllm.transformers_utils import model_arch_config_convertor as convertors

    # by its name: vLLM imports it when a model needs it, since importing it starts CUDA
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    plain, stock = convertors.ModelArchConfigConvertorBase, convertors.NemotronNasModelArchConfigConvertor

    class Convertor(convertors.NemotronNasModelArchConfigConvertor):
        """vLLM's own reads the number of KV heads off the first attention that is no no-op. It may be linear."""

        def get_total_num_kv_heads(self) -> int:
            return (plain if ARCHITECTURE in self.get_architectures() else stock).get_total_num_kv_heads(self)

    convertors.MODEL_ARCH_CONFIG_CONVERTORS["nemotron-nas"] = Convertor
