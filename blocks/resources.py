"""What a variant needs, from the parent's config alone: parameters, bytes, KV cache, FLOPs. Exact; allocates nothing.

Parameters are counted from the shapes of the weights (blocks/families.py).
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from blocks.export_code.families_decilm import FAMILIES
from blocks.families import weights
from blocks.kinds import kind_of
from blocks.parent import Parent
from blocks.variant import Variant

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}
# GGUF's types: blocks of 32 weights with one or two float16 numbers of their own
BLOCK = 32
BLOCK_BYTES = {"q8_0": 34, "q5_1": 24, "q5_0": 22, "q4_1": 20, "q4_0": 18, "iq4_nl": 18}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """parameters: norms included. weight_bytes, kv_bytes_per_token and state_bytes (of a sequence) at the given
    precision. FLOPs at a context.

    kernels: the least number of kernel launches of one forward: one per norm and matrix, one for an attention's scores.
    active_parameters: those that one token is computed with: of experts, those that it is sent to.
    expert_bytes, sent: bytes of all experts, and the share of them that a token is sent to.
    """

    parameters: int
    active_parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    state_bytes: int
    flops_per_token: int
    kernels: int
    expert_bytes: float = 0.0
    sent: float = 1.0

    def bytes_read(self, tokens: int) -> float:
        """Bytes of weights that a forward of so many tokens reads: of experts, those that a token is sent to on
        average, where the router sends tokens to all of them alike.
        """
        return self.weight_bytes - self.expert_bytes * (1 - self.sent) ** tokens


def resources(
    parent: Parent,
    variant: Variant,
    context_tokens: int,
    bytes_per_element: float,
    vector_bytes: float | None = None,
) -> Resources:
    """Resources of one subblock variant of this parent (same for every layer).

    vector_bytes: bytes of an element of norms and biases, where their precision differs from the matrices'.
    """
    kind = kind_of(variant)
    parameters, vectors, modules, in_experts = _counts(parent, variant)
    beside = bytes_per_element if vector_bytes is None else vector_bytes
    kv_elements = kind.kv_elements_per_token(variant, parent.config)
    return Resources(
        parameters=parameters,
        active_parameters=active_parameters_of(parent, variant),
        expert_bytes=in_experts * bytes_per_element,
        sent=_sent(parent, variant),
        weight_bytes=math.ceil((parameters - vectors) * bytes_per_element + vectors * beside),
        kv_bytes_per_token=math.ceil(kv_elements * bytes_per_element),
        state_bytes=(state := kind.state_bytes(variant, parent.config, bytes_per_element)),
        flops_per_token=kind.flops_per_token(variant, parent.config, context_tokens),
        kernels=modules + (1 if kv_elements or state else 0),
    )


def parameters_of(parent: Parent, variant: Variant) -> int:
    """Parameters of a subblock, its norms included."""
    return _counts(parent, variant)[0]


def active_parameters_of(parent: Parent, variant: Variant) -> int:
    """Parameters of a subblock that one token is computed with."""
    parameters, _, _, in_experts = _counts(parent, variant)
    return parameters - round(in_experts * (1 - _sent(parent, variant)))


def _sent(parent: Parent, variant: Variant) -> float:
    """The share of a variant's experts that a token is sent to; 1 where it has none."""
    moe = kind_of(variant).block_entry(variant, parent.config).get("moe")
    return float(moe["num_experts_per_tok"] / moe["num_local_experts"]) if moe else 1.0


@lru_cache(maxsize=1024)
def _counts(parent: Parent, variant: Variant) -> tuple[int, int, int, int]:
    """Parameters of a subblock, how many of them are in norms and biases, the number of modules with parameters, and
    how many parameters are in experts.
    """
    entry = kind_of(variant).block_entry(variant, parent.config)
    modules = weights(parent.config, variant.subblock, entry)
    shapes = [shape for module in modules for shape in module]
    vectors = sum(shape[0] for shape in shapes if len(shape) == 1)
    in_experts = sum(math.prod(shape) for shape in shapes if len(shape) == 3)
    return sum(math.prod(shape) for shape in shapes), vectors, len(modules), in_experts


def non_block_parameters(config: Any) -> int:
    """Parameters of embedding, final norm and head; a tied head counts once."""
    tables = 1 if config.tie_word_embeddings else 2
    return tables * config.vocab_size * config.hidden_size + norm_parameters(config)


def norm_parameters(config: Any) -> int:
    """Parameters of a norm of the hidden states."""
    return config.hidden_size * (2 if FAMILIES[config.model_type].norm_bias else 1)


def weight_bytes(precision: str) -> float:
    """Bytes of one weight of a matrix."""
    return BLOCK_BYTES[precision] / BLOCK if precision in BLOCK_BYTES else BYTES[precision]


def precision_name(dtype: object) -> str:
    """The name that profiles and tables have for a torch dtype, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")
