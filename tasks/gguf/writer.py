"""Write a child as a GGUF file of the architecture `deci`, for llama.cpp and programs that are built on it.

llama.cpp's own converter maps layers one to one, and llama.cpp then runs some children wrongly or not at all, so this
writer packs them anew (tasks/gguf/layout.py). The field `puzzle.config` keeps the child's config, so that the file can
be read back as the same architecture (tasks/gguf/reader.py).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import gguf.quants
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from blocks.engine_limits import rope_type
from blocks.errors import PuzzleError
from blocks.families import head_dim
from blocks.files import atomic_path
from tasks.gguf.layout import Entry, Layer, outer_entries, packed

ARCHITECTURE = "deci"
CONFIG_KEY = "puzzle.config"
PRECISIONS: dict[str, tuple[Type, gguf.LlamaFileType]] = {
    "float32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (Type.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (Type.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (Type.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (Type.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "iq4_nl": (Type.IQ4_NL, gguf.LlamaFileType.MOSTLY_IQ4_NL),
}
CORRECTED = ("q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")  # so coarse that tasks/export/quantise.py has to round them


class UnknownPrecision(PuzzleError):
    """A precision that the writer does not have."""


def precision_of(kind: Type) -> str:
    """The precision whose matrices have a type."""
    return next(name for name, (type_, _) in PRECISIONS.items() if type_ == kind)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A matrix that is rounded already: its type and its bytes, (rows, bytes of a row) uint8.

    before: the matrix that was rounded, where a correction had moved it.
    """

    kind: Type
    rows: Tensor
    before: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class NamedTensor:
    """A tensor of the file: GGUF name, type, and what it is made from. stored: its values, if they are rounded."""

    name: str
    kind: Type
    entry: Entry
    shape: tuple[int, ...]
    stored: Stored | None

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // block * size


def write_gguf(
    model: Any,
    path: Path,
    precision: str,
    tokenizer: dict[str, Any],
    name: str,
    stored: Mapping[str, Stored] = MappingProxyType({}),
) -> Path:
    """Write a DeciLMForCausalLM to one GGUF file, atomically; `tokenizer` is from tasks/gguf/tokenizer_writer.py.

    Matrices get `precision`; norms and biases stay float32, and a matrix whose rows the quantisation does not divide
    stays float16. `stored` holds, by the weight's name, matrices that are rounded already; beside them the embedding
    and the head are q8_0. Whether deci can express the child is asked before (blocks/engine_limits.py).
    """
    if precision not in PRECISIONS:
        raise UnknownPrecision(f"GGUF has no precision {precision!r} here: it is one of {', '.join(PRECISIONS)}.")
    if precision in CORRECTED and not stored:
        raise UnknownPrecision(f"{precision} is fitted to text: write it with `puzzle export`, or take q8_0.")
    config, state = model.config, model.state_dict()
    layers = packed(config)
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        _add_metadata(writer, config, layers, precision, name)
        for key, value in tokenizer.items():
            add_field(writer, key, value)
        tensors = [_named(entry, layer, state, precision, stored) for entry, layer in _entries(config, layers, state)]
        factors = rope_factors(config)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for tensor in tensors:  # one at a time: the file may be larger than what memory has left
            writer.write_tensor_data(_values(tensor, state))
        writer.close()
    return path


def _entries(config: Any, layers: list[Layer], state: dict[str, Tensor]) -> Iterator[tuple[Entry, int | None]]:
    """Every tensor of the file with its GGUF layer; optional tensors only where the model has them."""
    for entry in outer_entries():
        tied = entry.source == "lm_head.weight" and config.tie_word_embeddings
        if not tied:
            yield entry, None
    for index, layer in enumerate(layers):
        for entry in layer.entries:
            if not entry.optional or entry.source in state:
                yield entry, index


def _named(
    entry: Entry, layer: int | None, state: dict[str, Tensor], precision: str, stored: Mapping[str, Stored]
) -> NamedTensor:
    shape, ready = _shape(entry, state), stored.get(entry.source or "")
    kind = PRECISIONS["q8_0" if precision in CORRECTED else precision][0] if len(shape) > 1 else Type.F32
    kind = kind if ready is None else ready.kind
    if kind == Type.Q8_0 and shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = Type.F16
    name = entry.name if layer is None else f"blk.{layer}.{entry.name}"
    return NamedTensor(name=name, kind=kind, entry=entry, shape=shape, stored=ready)


def _shape(entry: Entry, state: dict[str, Tensor]) -> tuple[int, ...]:
    return entry.shape if entry.source is None else tuple(state[entry.source].shape)


def _values(tensor: NamedTensor, state: dict[str, Tensor]) -> Any:
    entry = tensor.entry
    if tensor.stored is not None:
        values = tensor.stored.rows
    elif entry.source is None:
        values = torch.full(entry.shape, entry.fill)
    else:
        values = state[entry.source].detach().to("cpu", torch.float32)
    if entry.heads is not None:
        values = interleaved(values, entry.heads)
    ready = values.contiguous().numpy()
    return ready if tensor.stored is not None else gguf.quants.quantize(ready, tensor.kind)


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k, from rotate-half order (first halves, then second) to interleaved pairs, per head."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def rotate_half(rows: Tensor, heads: int) -> Tensor:
    """Inverse of `interleaved`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)


def rope_factors(config: Any) -> Any:
    """Divisors of the rotary frequencies, (head_dim / 2,) float32, of a llama3 scaling; None for other scalings."""
    if rope_type(config) != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    base = config.base_config()
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](base, torch.device("cpu"))
    dim = head_dim(config)
    plain = rope_theta(config) ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return (plain / scaled).numpy().astype(np.float32)


def rope_theta(config: Any) -> float:
    """Base of the rotary frequencies."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)


def _add_metadata(writer: gguf.GGUFWriter, config: Any, layers: list[Layer], precision: str, name: str) -> None:
    head = head_dim(config)
    writer.add_name(name)
    writer.add_file_type(PRECISIONS[precision][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(len(layers))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count([layer.head_count for layer in layers])
    writer.add_head_count_kv([layer.head_count_kv for layer in layers])
    writer.add_feed_forward_length([layer.feed_forward_length for layer in layers])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope_theta(config))
    if rope_type(config) == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(config.rope_parameters["factor"]))
    writer.add_string(CONFIG_KEY, json.dumps(config.to_dict(), sort_keys=True, default=str))


def add_field(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """One metadata field by the Python type of its value."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))
