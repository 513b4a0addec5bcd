"""The files that travel with every exported child. They import transformers and torch, never puzzle.

puzzle itself runs children through these same files, so what is trained and measured is what is shipped.
"""

AUTO_MAP = {
    "AutoConfig": "configuration_decilm.DeciLMConfig",
    "AutoModel": "modeling_decilm.DeciLMModel",
    "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
}
VISION_CODE = "vision_decilm.py"  # travels with children that see
VISION_AUTO_MAP = {
    "AutoConfig": "vision_decilm.DeciLMLlavaConfig",
    "AutoModelForImageTextToText": "vision_decilm.DeciLMLlavaForConditionalGeneration",
}
PLUGIN = "vllm_plugin"  # the folder of the package that vLLM needs; it imports vllm, and travels where it is asked for
CODE_FILES = tuple(f"{name}_decilm.py" for name in ("configuration", "families", "modeling", "recurrent", "windows"))
