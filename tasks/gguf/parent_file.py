"""A GGUF file as a parent: its parts where llama.cpp split it, whether it is complete, and its precision.

llama-gguf-split names parts `name-00001-of-0000N.gguf`. Each part holds some of the tensors, and says its number and
how many parts there are. The first part holds the metadata.
"""

import math
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import torch

from blocks.errors import first_names
from blocks.resources import precision_name
from tasks.gguf.header import GgufError, Header, TensorInfo, named_parts, read_header

_Type = gguf.GGMLQuantizationType
_FLOATS = {_Type.F32: torch.float32, _Type.F16: torch.float16, _Type.BF16: torch.bfloat16}
# keys for which transformers fills in a value of its own where a file lacks them
_NEEDED = ("attention.layer_norm_rms_epsilon", "context_length")
# families that were seen to be read whole, with their names in gguf's tables. transformers reads some others and leaves
# multipliers, windows or soft caps out
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}


def parts_of(path: Path) -> list[Path]:
    """All parts of the model whose first part (or only file) this is, in their order.

    Raises GgufError where a part is missing, cut off, or another model's.
    """
    header = read_header(path)
    count, number = (int(header.fields.get(f"split.{key}", default)) for key, default in (("count", 1), ("no", 0)))
    parts = named_parts(path)
    if count <= 1 and len(parts) > 1:
        parts = [path]  # a whole file that is only called a part
    if number:
        first = parts[0].name if len(parts) == count else "the first"
        raise GgufError(f"{path.name} is part {number + 1} of {count} of a split model: name {first}, all are read.")
    if len(parts) != count or parts[0] != path:
        raise GgufError(
            f"{path.name} is part 1 of {count} of a split model, and its name does not say where the others are: call "
            f"them NAME-00001-of-{count:05d}.gguf and so on, as llama.cpp does, or merge them with llama-gguf-split."
        )
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more parts" if len(missing) > 1 else ""
        raise GgufError(
            f"{path.name} is part 1 of {count}: {missing[0]}{more} must lie beside it. Fetch what is missing."
        )
    headers = [header, *(read_header(part) for part in parts[1:])]
    for index, (part, own) in enumerate(zip(parts, headers, strict=True)):
        if count > 1 and (own.fields.get("split.no"), own.fields.get("split.count")) != (index, count):
            raise GgufError(f"{part.name} does not say that it is part {index + 1} of {count}: fetch the parts again.")
        _check_length(part, own)
    total, found = header.fields.get("split.tensors.count"), sum(len(own.tensors) for own in headers)
    if count > 1 and total is not None and total != found:
        raise GgufError(f"the parts of {path.name} hold {found} tensors of {total}: fetch them again.")
    return parts


def _check_length(path: Path, header: Header) -> None:
    """Raise GgufError for a file that ends before its last weight."""
    ends = [header.weights_at + info.offset + _bytes_of(path, name, info) for name, info in header.tensors.items()]
    size = path.stat().st_size
    if ends and max(ends) > size:
        raise GgufError(f"{path.name} is cut off: it has {size} bytes of {max(ends)}. Fetch it again.")


def _bytes_of(path: Path, name: str, info: TensorInfo) -> int:
    try:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(info.type_id)]
    except (ValueError, KeyError):
        raise GgufError(
            f"{path.name} holds {name} in the type {info.type_id}, which gguf {version('gguf')} does not know: take a "
            "file of another quantisation."
        ) from None
    return math.prod(info.shape) // block * size


def dtype_of(header: Header) -> torch.dtype:
    """The precision that a child of this file gets: the file's short float format if it has one, else float32. bfloat16
    where weights are quantised.
    """
    kinds = _kinds(header)
    if any(kind not in _FLOATS for kind in kinds):
        return torch.bfloat16
    # norms are float32 in files of any precision
    return next((_FLOATS[kind] for kind in _FLOATS if kind != _Type.F32 and kind in kinds), torch.float32)


def describe(header: Header) -> str:
    """A sentence on how a file is read as a parent."""
    dtype = precision_name(dtype_of(header))
    kinds = _kinds(header)
    stored = ", ".join(precision_name(_FLOATS[kind]) if kind in _FLOATS else kind.name for kind in kinds)
    verb = "de-quantised from" if any(kind not in _FLOATS for kind in kinds) else "read from"
    return f"{verb} GGUF ({stored}) to float32; its own dtype, which a child follows, is taken to be {dtype}"


def _kinds(header: Header) -> list[gguf.GGMLQuantizationType]:
    """Types of the tensors, the most common first."""
    counted = Counter(info.type_id for info in header.tensors.values())
    return [_Type(type_id) for type_id, _ in counted.most_common()]


def check_model(header: Header, config: Any, name: str) -> None:
    """Raise GgufError unless the file holds exactly the tensors of a model of this config.

    transformers would fill in what is missing, and leave out what it does not know.
    """
    if config.model_type not in _ARCHITECTURES:
        raise GgufError(
            f"{name} is a {config.model_type}, and only {', '.join(_ARCHITECTURES)} are read from GGUF: take the "
            "safetensors folder it was made from."
        )
    silent = [key for key in _NEEDED if not any(field.endswith(f".{key}") for field in header.fields)]
    if silent:
        raise GgufError(
            f"{name} lacks {first_names(silent)} in its metadata, which llama.cpp needs too. Fetch it again."
        )
    _check_rotary(header, name)
    wanted = _wanted(config)
    missing = [key for key in wanted if key not in header.tensors]
    if config.tie_word_embeddings:
        missing = [key for key in missing if key != "output.weight"]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise GgufError(f"{name} is not whole: {first_names(missing)} {verb} missing. Fetch it again.")
    left = [key for key in header.tensors if key not in wanted]
    if left:
        raise GgufError(
            f"{name} holds {first_names(left)}, for which {config.model_type} has no place as transformers reads it: "
            "the parent would not be the model of the file. Take the safetensors folder it was made from."
        )
    for key, shape in wanted.items():
        if key in header.tensors and header.tensors[key].shape[::-1] != shape:
            found = list(header.tensors[key].shape[::-1])
            raise GgufError(
                f"{name} does not fit its metadata as transformers reads it: {key} has shape {found}, expected "
                f"{list(shape)}. Take the safetensors folder it was made from."
            )


def _check_rotary(header: Header, name: str) -> None:
    """Raise GgufError for scaled rotary frequencies: transformers reads only their base from a GGUF file."""
    fields = {key.partition(".")[2]: value for key, value in header.fields.items()}
    # llama.cpp scales linearly by a factor without a type, and takes a factor of 0 for none
    kind, factor = fields.get("rope.scaling.type", "linear"), fields.get("rope.scaling.factor", 1.0)
    scaled = (kind != "none" and factor not in (0.0, 1.0)) or any(
        fields.get(f"rope.{key}", 1.0) != 1.0 for key in ("scale_linear", "scaling.attn_factor")
    )
    if scaled or "rope_freqs.weight" in header.tensors:
        raise GgufError(
            f"{name} scales its rotary frequencies (as Llama 3.1 does), which transformers does not read from GGUF: "
            "the parent would be another model. Take the safetensors folder it was made from."
        )


def _wanted(config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's tensors, by their names in a GGUF file."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    own = _ARCHITECTURES[config.model_type]
    architecture = next(arch for arch, title in gguf.MODEL_ARCH_NAMES.items() if title == own)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    wanted = {}
    for key, tensor in model.state_dict().items():
        stem, _, suffix = key.rpartition(".")
        wanted[f"{names.get_name(stem)}.{suffix}"] = tuple(tensor.shape)
    return wanted
