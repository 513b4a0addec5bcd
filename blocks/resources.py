"""What a variant needs, from the parent's config alone: parameters, bytes, KV cache, FLOPs. Exact; allocates nothing.

Parameters are counted on a layer built on the meta device, so a new kind or family needs no formula of its own.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from blocks.export_code.modeling_decilm import DeciLMDecoderLayer
from blocks.parent import Parent
from blocks.variant import Variant, kind_of


@dataclass(frozen=True, kw_only=True)
class Resources:
    """parameters: norms included. weight_bytes and kv_bytes_per_token at the given precision. FLOPs at a context.

    kernels: launches of one forward at least: one per norm and matrix, one for an attention's scores.
    """

    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    flops_per_token: int
    kernels: int


def resources(
    parent: Parent,
    variant: Variant,
    context_tokens: int,
    bytes_per_element: float,
    vector_bytes: float | None = None,
) -> Resources:
    """Resources of one subblock variant of this parent (same for every layer).

    vector_bytes: of an element of norms and biases, where these are kept in another precision than the matrices.
    """
    kind = kind_of(variant)
    parameters, vectors, modules = _counts(parent, variant)
    beside = bytes_per_element if vector_bytes is None else vector_bytes
    kv_elements = kind.kv_elements_per_token(variant, parent.config)
    return Resources(
        parameters=parameters,
        weight_bytes=math.ceil((parameters - vectors) * bytes_per_element + vectors * beside),
        kv_bytes_per_token=math.ceil(kv_elements * bytes_per_element),
        flops_per_token=kind.flops_per_token(variant, parent.config, context_tokens),
        kernels=modules + (1 if kv_elements else 0),
    )


def parameters_of(parent: Parent, variant: Variant) -> int:
    """Parameters of a subblock, its norms included."""
    return _counts(parent, variant)[0]


@lru_cache(maxsize=1024)
def _counts(parent: Parent, variant: Variant) -> tuple[int, int, int]:
    """Parameters of a subblock, those of them in norms and biases, and how many of its modules hold any."""
    none = {"no_op": True, "replace_with_linear": False}
    block: dict[str, Any] = {"attention": none, "ffn": none}
    block[variant.subblock] = kind_of(variant).block_entry(variant, parent.config)
    with torch.device("meta"):
        layer = DeciLMDecoderLayer(parent.config, parent.config.model_type, block, 0)
    modules = sum(1 for module in layer.modules() if next(module.parameters(recurse=False), None) is not None)
    vectors = sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() == 1)
    return sum(parameter.numel() for parameter in layer.parameters()), vectors, modules
