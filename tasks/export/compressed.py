"""Round the matrices of a child's layers to integers that vLLM reads: compressed-tensors in a Hugging Face folder.

    w4a16    weights of 4 bits, a scale for every 32 columns of a row; activations stay as they are
    w8a8     weights of 8 bits, a scale for every row; activations of 8 bits too, rounded per token while it runs

Both are fitted to text, layer after layer, as types of GGUF are (tasks/export/quantise.py). Embedding and head stay. So
do the gates of recurrent attention: they are few, and vLLM multiplies 4-bit matrices of 32, 64 ... rows only. In both
precisions, so that there is one rule.
Legend: D = outputs (rows), K = inputs (columns), s = columns of a block, G = groups of columns, C = scales tried.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blocks.error_correction import correct
from blocks.resources import BLOCK
from tasks.export.quantise import DAMPING, fitted_layers, refuse_rows

INTEGERS = ("w4a16", "w8a8")
GATES = "self_attn.gates"
SHRINKS = torch.linspace(0.7, 1.0, 13)  # of the scale that just holds the largest value; smaller ones clip it


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What a folder holds of a rounded model: tensors by name in place of the weights, and config.json's part on it."""

    tensors: Mapping[str, Tensor]
    config: dict[str, Any]


def scales_of(columns_Ds: Tensor, importance_s: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """(D, 1) the scale of each row with the least squared error, weighted by importance, among SHRINKS."""
    most = 2 ** (bits - 1) - 1
    whole_D1 = columns_Ds.abs().amax(1, keepdim=True).clamp_min(1e-10) / most
    tried_CD1 = (SHRINKS[:, None, None] * whole_D1).to(dtype)
    lost_CD = torch.stack(
        [((_values(_integers(columns_Ds, s, bits), s) - columns_Ds).square() * importance_s).sum(1) for s in tried_CD1]
    )
    return tried_CD1.gather(0, lost_CD.argmin(0)[None, :, None])[0]


def _integers(columns: Tensor, scale: Tensor, bits: int) -> Tensor:
    most = 2 ** (bits - 1)
    return (columns / scale.float()).round().clamp(-most, most - 1).to(torch.int8)


def _values(integers: Tensor, scale: Tensor) -> Tensor:
    """What integers stand for, float32: the product as engines take it, in the scale's own dtype."""
    return (integers.to(scale.dtype) * scale).float()


def compress(model: Any, tokens: Tensor, precision: str, dtype: torch.dtype) -> Compressed:
    """Round the layers of a float32 model in place, and give what its folder holds. tokens: (S, T) calibration text.

    dtype: of the scales, which is that of the folder's other weights.
    Raises PuzzleError where rows of a matrix are no whole number of groups.
    """
    refuse_rows(model, precision)
    found: dict[str, Tensor] = {}
    whole = ["lm_head"]
    for index, linears, grams in fitted_layers(model, tokens):
        for name, linear in linears.items():
            if name == GATES:
                whole.append(f"model.layers.{index}.{name}")
                continue
            tensors, linear.weight.data = _rounded(linear.weight.detach(), grams[name], precision, dtype)
            found |= {f"model.layers.{index}.{name}.{key}": tensor for key, tensor in tensors.items()}
    return Compressed(tensors=found, config=_config(precision, whole))


def _rounded(
    weight_DK: Tensor, gram_KK: Tensor, precision: str, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    """What a folder holds of a matrix, and the matrix that it stands for."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32  # see _config

    if precision == "w8a8":
        scale_D1 = scales_of(weight_DK, gram_KK.diagonal(), 8, dtype)

        def by_row(columns: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            integers = _integers(columns, scale_D1, 8)
            return integers, _values(integers, scale_D1)

        parts, rounded, _ = correct(weight_DK, gram_KK, by_row, BLOCK, DAMPING)
        return {"weight": torch.cat(parts, dim=1), "weight_scale": scale_D1}, rounded

    def by_group(columns: Tensor, importance: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        scale = scales_of(columns, importance, 4, dtype)
        integers = _integers(columns, scale, 4)
        return (integers, scale), _values(integers, scale)

    parts, rounded, _ = correct(weight_DK, gram_KK, by_group, BLOCK, DAMPING)
    integers_DK, scales_DG = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    packed = pack_to_int32(integers_DK, 4).contiguous()
    return {"weight_packed": packed, "weight_scale": scales_DG, "weight_shape": torch.tensor(weight_DK.shape)}, rounded


def _config(precision: str, whole: list[str]) -> dict[str, Any]:
    """config.json's `quantization_config`. whole: matrices that stay as they are."""
    # loads torch's compiler, which takes a second: every command that measures an engine knows the names of precisions
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    scheme: dict[str, Any]
    if precision == "w8a8":
        form = "int-quantized"
        scheme = {
            "weights": QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel"),
            "input_activations": QuantizationArgs(
                num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True, observer=None
            ),
        }
    else:
        form = "pack-quantized"
        scheme = {
            "weights": QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=BLOCK)
        }
    groups = {"layers": QuantizationScheme(targets=["Linear"], format=form, **scheme)}
    found = QuantizationConfig(config_groups=groups, format=form, ignore=whole, quantization_status="compressed")
    return dict(found.model_dump(mode="json"))
