"""The number formats of a child's weights and KV cache: those that the profile names, else its parent's."""

from typing import TYPE_CHECKING, cast

import torch

from blocks.errors import PuzzleFailure
from blocks.parent import Parent
from blocks.resources import precision_name
from profiles.schema import Hardware, KvPrecision, Precision

if TYPE_CHECKING:
    from blocks.export_code.modeling_decilm import DeciLMForCausalLM

# precisions that a Hugging Face folder can have; an engine makes float8 and q8_0 from weights in one of these
FOLDER_PRECISIONS = ("float32", "float16", "bfloat16")


class RoundingError(PuzzleFailure):
    """Weights do not fit the format that they are to be written in."""


def is_named(hardware: Hardware) -> bool:
    """Whether the profile names a precision. The default is what costs are measured in, not the format of the child."""
    return "precision" in hardware.model_fields_set


def served_precision(hardware: Hardware, parent: Parent) -> Precision:
    """The format in which the child is served: memory and bytes are counted in it."""
    return hardware.precision if is_named(hardware) else cast(Precision, precision_name(parent.dtype))


def cache_precision(hardware: Hardware, weights: Precision) -> KvPrecision:
    """The format of the KV cache beside weights in a precision. llama.cpp has its own for any weights."""
    return hardware.kv_precision or ("float16" if hardware.engine == "llama.cpp" else weights)


def child_dtype(hardware: Hardware, parent: Parent) -> torch.dtype:
    """The dtype of the weights in the child's folder."""
    named = is_named(hardware) and hardware.precision in FOLDER_PRECISIONS
    return getattr(torch, hardware.precision) if named else parent.dtype


def why(hardware: Hardware, parent: Parent, computed: str) -> str:
    """Sentences for the model card: the format of the weights, why it is this one; and that of products, `computed`."""
    name, dtype = precision_name(child_dtype(hardware, parent)), precision_name(parent.dtype)
    if not is_named(hardware):
        reason = "as the parent's; the profile names no `hardware.precision`"
    elif hardware.precision in FOLDER_PRECISIONS:
        reason = f"as the profile's `hardware.precision` names it; the parent's are {dtype}"
    else:
        reason = f"as the parent's: the {hardware.precision} that the profile names is made of them by the engine"
    sentence = f"The weights are {name}, {reason}. Quality was measured on these very weights, products in {computed}."
    measured = hardware.engine != "roofline" and served_precision(hardware, parent) != hardware.precision
    return sentence + (f" Times were measured in {hardware.precision}." if measured else "")


def as_written(model: "DeciLMForCausalLM", dtype: torch.dtype) -> "DeciLMForCausalLM":
    """Round the weights, in place, to what a folder of this dtype holds; they stay float32. Raises RoundingError."""
    if dtype == torch.float32:
        return model
    for name, parameter in model.named_parameters():
        rounded = parameter.data.to(dtype)
        if rounded.isinf().any() > parameter.data.isinf().any():
            raise RoundingError(
                f"{name} holds weights beyond {torch.finfo(dtype).max:.3g}, the largest number of "
                f"{precision_name(dtype)}. Set hardware.precision: bfloat16 in the profile (or float32) and run again; "
                "what was trained is kept."
            )
        parameter.data = rounded.to(parameter.dtype)
    return model
