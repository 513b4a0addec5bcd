"""Read a child from a GGUF file: its architecture, and its weights in float32.

A file that tasks/gguf/writer.py wrote holds the child's own config. Another file, of the architecture `deci` or
`llama`, is read layer by layer from its metadata; a SwiGLU whose weights are all 0 counts as none.
"""

import json
import math
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers.initialization import no_init_weights

from blocks.export_code.configuration_decilm import DeciLMConfig
from blocks.export_code.modeling_decilm import DeciLMForCausalLM
from tasks.gguf.header import GgufError, read_header
from tasks.gguf.layout import Entry, Layer, outer_entries, packed
from tasks.gguf.writer import CONFIG_KEY, rotate_half

ARCHITECTURES = ("deci", "llama")


class GgufFile:
    """An opened GGUF file: its metadata by key, its tensors by name."""

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self.fields, self.tensors, self._weights_at = header.fields, header.tensors, header.weights_at
        self._data = np.memmap(path, mode="r", dtype=np.uint8)
        self.architecture = str(self.fields.get("general.architecture"))

    def value(self, key: str, default: Any = None) -> Any:
        """A field of the file's own architecture."""
        found = self.fields.get(f"{self.architecture}.{key}", default)
        if found is None:
            raise GgufError(f"the GGUF file has no {self.architecture}.{key}: is it whole?")
        return found

    def per_layer(self, key: str) -> list[int]:
        """The values for each layer of a field that may be one number for all layers, or a list."""
        found = self.value(key)
        return list(found) if isinstance(found, list) else [found] * self.value("block_count")

    def tensor(self, name: str) -> Tensor:
        """A tensor's values, float32."""
        if name not in self.tensors:
            raise GgufError(f"the GGUF file has no tensor {name}: is it whole?")
        info = self.tensors[name]
        try:
            kind = gguf.GGMLQuantizationType(info.type_id)
            shape = gguf.quants.quant_shape_to_byte_shape(info.shape[::-1], kind)
            start = self._weights_at + info.offset
            rows = self._data[start : start + math.prod(shape)].reshape(shape)
            return torch.from_numpy(np.array(gguf.quants.dequantize(rows, kind), dtype=np.float32))
        except (ValueError, NotImplementedError) as error:
            raise GgufError(f"the tensor {name} of the GGUF file cannot be read: {error}") from error


def read_gguf(path: Path) -> DeciLMForCausalLM:
    """The child of a GGUF file, float32, in evaluation mode. Raises GgufError."""
    file = GgufFile(path)
    if file.architecture not in ARCHITECTURES:
        raise GgufError(
            f"{path.name} is of the architecture {file.architecture}: only {' and '.join(ARCHITECTURES)} "
            "can be read as a child."
        )
    try:
        config, layers = _plan(file)
    except (StrictDataclassError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GgufError(f"{path.name} holds a config that cannot be read ({error}): is it whole?") from error
    with no_init_weights():
        model: Any = DeciLMForCausalLM(config)
    model.tie_weights()
    state = _state(file, layers)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # other shapes
        raise GgufError(f"{path.name} does not fit its own config: {str(error).splitlines()[-1].strip()}") from error
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise GgufError(f"{path.name} does not fit its own config: {', '.join([*missing, *unexpected][:3])}")
    whole: DeciLMForCausalLM = model.eval()
    return whole


def _plan(file: GgufFile) -> tuple[DeciLMConfig, list[Layer]]:
    """The child's config and the file's layers."""
    own = file.fields.get(CONFIG_KEY)
    config = DeciLMConfig(**_constructor_fields(json.loads(own))) if own else _foreign_config(file)
    return config, packed(config) if own else _one_to_one(file, config)


def _constructor_fields(values: dict[str, Any]) -> dict[str, Any]:
    """The fields that DeciLMConfig takes; those that it derives itself are left out."""
    return {key: value for key, value in values.items() if key not in ("layer_types", "model_type", "auto_map")}


def _state(file: GgufFile, layers: list[Layer]) -> dict[str, Tensor]:
    places: list[tuple[str, Entry]] = [(entry.name, entry) for entry in outer_entries()]
    places += [(f"blk.{index}.{entry.name}", entry) for index, layer in enumerate(layers) for entry in layer.entries]
    state: dict[str, Tensor] = {}
    for name, entry in places:
        if entry.source is None or (entry.optional and name not in file.tensors):
            continue
        rows = file.tensor(name)
        state[entry.source] = rows if entry.heads is None else rotate_half(rows, entry.heads)
    return state


def _foreign_config(file: GgufFile) -> DeciLMConfig:
    """The config of a file that another program wrote, from its metadata."""
    heads = file.per_layer("attention.head_count")
    hidden, most = file.value("embedding_length"), max(heads)
    if file.fields.get(f"{file.architecture}.rope.scaling.type") or "rope_freqs.weight" in file.tensors:
        raise GgufError("this GGUF file scales its rotary frequencies: only a file that puzzle wrote can say how.")
    head = file.value("attention.key_length", hidden // most)
    return DeciLMConfig(
        block_configs=_foreign_blocks(file, heads),
        base_model_type="llama",
        vocab_size=int(file.tensors["token_embd.weight"].shape[1]),
        hidden_size=hidden,
        intermediate_size=max(file.per_layer("feed_forward_length")),
        num_attention_heads=most,
        num_key_value_heads=max(file.per_layer("attention.head_count_kv")) or 1,
        head_dim=head,
        max_position_embeddings=file.value("context_length"),
        rms_norm_eps=file.value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": file.value("rope.freq_base", 10000.0)},
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        hidden_act="silu",
        pad_token_id=None,
    )


def _foreign_blocks(file: GgufFile, heads: list[int]) -> list[dict[str, Any]]:
    blocks = []
    widths = file.per_layer("feed_forward_length")
    for index, (query, kv, width) in enumerate(
        zip(heads, file.per_layer("attention.head_count_kv"), widths, strict=True)
    ):
        nothing = {"no_op": True, "replace_with_linear": False}
        attention: dict[str, Any] = nothing
        if width and kv:
            whole: dict[str, Any] = {"no_op": False, "replace_with_linear": False}
            attention = whole | {"num_key_value_heads": kv, "n_heads_in_group": query // kv}
        elif width and query:
            attention = {"no_op": False, "replace_with_linear": True}
        ffn: dict[str, Any] = nothing
        if width and file.tensor(f"blk.{index}.ffn_down.weight").any():
            ffn = {"no_op": False, "replace_with_linear": False, "intermediate_size": width}
        blocks.append({"attention": attention, "ffn": ffn})
    return blocks


def _one_to_one(file: GgufFile, config: DeciLMConfig) -> list[Layer]:
    """The layers of a file that another program wrote: each GGUF layer is one layer of the child."""
    layers = []
    for index, block in enumerate(config.block_configs):
        # a child of this layer alone packs into one GGUF layer, whose tensors are then named by the real one
        alone = [{"attention": _NOTHING, "ffn": _NOTHING}] * len(config.block_configs)
        alone[index] = block
        single = packed(DeciLMConfig(**_constructor_fields(config.to_dict()) | {"block_configs": alone}))
        layers.append(single[0])
    return layers


_NOTHING = {"no_op": True, "replace_with_linear": False}
