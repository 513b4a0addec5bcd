"""Which tensor of a child goes where in a GGUF file of the architecture `deci`.

A deci layer is a front (an attention, or one matrix, or nothing) and then a SwiGLU. llama.cpp leaves out the front of a
layer that has no SwiGLU, computes the head size from layer 0's number of heads, and has no linear FFN. So the child's
attentions and FFNs are put in a row and packed into layers anew:

* a linear FFN becomes the front of a layer,
* a front that no SwiGLU follows gets a SwiGLU whose weights are all 0,
* a first layer without a front gets a matrix of zeros as its front.

The packed model computes exactly what the child does. Writer and reader both follow this plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

FILLER_WIDTH = 32  # the narrowest SwiGLU that every quantisation can hold


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One GGUF tensor, and the child's tensor that it holds. Without a `source` it is filled with `fill`.

    heads: rows are reordered within each of so many heads, from rotate-half to interleaved rotary embedding. optional:
    a bias, which the child may not have.
    """

    name: str
    source: str | None = None
    fill: float = 0.0
    shape: tuple[int, ...] = ()
    heads: int | None = None
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One GGUF layer: its values in the three metadata arrays, and its tensors, named without `blk.N.`."""

    head_count: int
    head_count_kv: int
    feed_forward_length: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True, kw_only=True)
class _Sublayer:
    """One attention or FFN of the child. size: its KV heads or its intermediate size."""

    kind: Literal["attention", "linear", "swiglu"]
    layer: int
    subblock: str
    size: int = 0


def packed(config: Any) -> list[Layer]:
    """The GGUF layers of a child with this DeciLMConfig."""
    layers: list[Layer] = []
    front: _Sublayer | None = None
    for sublayer in _sublayers(config):
        if sublayer.kind == "swiglu":
            layers.append(_layer(config, front, sublayer, first=not layers))
            front = None
            continue
        if front is not None:
            layers.append(_layer(config, front, None, first=not layers))
        front = sublayer
    if front is not None or not layers:
        layers.append(_layer(config, front, None, first=not layers))
    return layers


def _sublayers(config: Any) -> Sequence[_Sublayer]:
    found = []
    sizes = {
        "attention": ("attention", "num_key_value_heads", config.num_key_value_heads),
        "ffn": ("swiglu", "intermediate_size", config.intermediate_size),
    }
    for index, block in enumerate(config.block_configs):
        for subblock, (kind, key, default) in sizes.items():
            entry: Any = block[subblock]
            if entry["no_op"]:
                continue
            if entry["replace_with_linear"]:
                found.append(_Sublayer(kind="linear", layer=index, subblock=subblock))
            else:
                size = entry.get(key) or default
                found.append(_Sublayer(kind=kind, layer=index, subblock=subblock, size=size))  # type: ignore[arg-type]
    return found


def _layer(config: Any, front: _Sublayer | None, back: _Sublayer | None, first: bool) -> Layer:
    hidden, heads = config.hidden_size, config.num_attention_heads
    entries: list[Entry] = []
    if front is not None:
        entries += _attention(config, front) if front.kind == "attention" else _linear(front)
    elif first:  # the head size is read off layer 0
        entries += [Entry(name="attn_norm.weight", fill=1.0, shape=(hidden,))]
        entries += [Entry(name="attn_output.weight", shape=(hidden, hidden))]
    width = FILLER_WIDTH if back is None else back.size
    entries += _no_swiglu(hidden) if back is None else _swiglu(back)
    return Layer(
        head_count=heads if front is not None or first else 0,
        head_count_kv=front.size if front is not None else 0,
        feed_forward_length=width,
        entries=tuple(entries),
    )


def _norm(sublayer: _Sublayer) -> str:
    """The child's norm before a sub-layer."""
    name = "input_layernorm" if sublayer.subblock == "attention" else "post_attention_layernorm"
    return f"model.layers.{sublayer.layer}.{name}.weight"


def _matrix(name: str, source: str, heads: int | None = None) -> list[Entry]:
    return [
        Entry(name=f"{name}.weight", source=f"{source}.weight", heads=heads),
        Entry(name=f"{name}.bias", source=f"{source}.bias", heads=heads, optional=True),
    ]


def _attention(config: Any, front: _Sublayer) -> list[Entry]:
    at = f"model.layers.{front.layer}.self_attn"
    return [
        Entry(name="attn_norm.weight", source=_norm(front)),
        *_matrix("attn_q", f"{at}.q_proj", config.num_attention_heads),
        *_matrix("attn_k", f"{at}.k_proj", front.size),
        *_matrix("attn_v", f"{at}.v_proj"),
        *_matrix("attn_output", f"{at}.o_proj"),
    ]


def _linear(front: _Sublayer) -> list[Entry]:
    name = "self_attn.linear_attn" if front.subblock == "attention" else "mlp.linear_mlp"
    return [
        Entry(name="attn_norm.weight", source=_norm(front)),
        Entry(name="attn_output.weight", source=f"model.layers.{front.layer}.{name}.weight"),
    ]


def _swiglu(back: _Sublayer) -> list[Entry]:
    at = f"model.layers.{back.layer}.mlp"
    return [
        Entry(name="ffn_norm.weight", source=_norm(back)),
        *_matrix("ffn_gate", f"{at}.gate_proj"),
        *_matrix("ffn_up", f"{at}.up_proj"),
        *_matrix("ffn_down", f"{at}.down_proj"),
    ]


def _no_swiglu(hidden: int) -> list[Entry]:
    return [
        Entry(name="ffn_norm.weight", fill=1.0, shape=(hidden,)),
        Entry(name="ffn_gate.weight", shape=(FILLER_WIDTH, hidden)),
        Entry(name="ffn_up.weight", shape=(FILLER_WIDTH, hidden)),
        Entry(name="ffn_down.weight", shape=(hidden, FILLER_WIDTH)),
    ]


def outer_entries() -> list[Entry]:
    """Embedding, final norm and, unless tied, head."""
    return [
        Entry(name="token_embd.weight", source="model.embed_tokens.weight"),
        Entry(name="output_norm.weight", source="model.norm.weight"),
        Entry(name="output.weight", source="lm_head.weight", optional=True),
    ]
