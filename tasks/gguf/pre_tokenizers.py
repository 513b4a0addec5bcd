"""How a byte-level BPE splits text before it merges tokens, by llama.cpp's names (`tokenizer.ggml.pre`).

The regular expressions are part of llama.cpp's code (src/llama-vocab.cpp), so a GGUF file can only name them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CONTRACTIONS = _SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + "{1,3}" + _REST
# llama.cpp knows upper and lower case of ASCII alone here, so what Mistral and OpenAI split by is not the same
_UPPER, _LOWER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = f"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*" + r"|\p{N}" + _SLASHES
_GPT4O = f"{_WORD}{_UPPER}*{_LOWER}+{_SUFFIXES}?|{_WORD}{_UPPER}+{_LOWER}*{_SUFFIXES}?" + r"|\p{N}{1,3}" + _SLASHES
_QWEN35 = (
    _SUFFIXES + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}" + r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
).replace('\\"', '"')
_SEED = _CONTRACTIONS + r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPELLINGS = {  # of the same expression
    "\r": r"\r",
    "\n": r"\n",
    "?+": "?",
    "++": "+",
    r"\p{N}{1}": r"\p{N}",
    "'(?i:[sdmt]|ll|ve|re)": _SUFFIXES,
    "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])": _SUFFIXES,
}


@dataclass(frozen=True, kw_only=True)
class Pre:
    """What llama.cpp does under a name.

    patterns: expressions that split a text, one after another. whole_words: a part that is a token is not split further
    (`ignore_merges`). adds_bos: a BOS is put before a text, unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False


PRES = {
    "gpt-2": Pre(patterns=(_GPT2,)),
    "smollm": Pre(patterns=(r"\p{N}", _GPT2)),
    "qwen2": Pre(patterns=(_CONTRACTIONS + _REST,)),
    "qwen35": Pre(patterns=(_QWEN35,)),
    "llama-bpe": Pre(patterns=(_LLAMA3,), whole_words=True, adds_bos=True),
    "smaug-bpe": Pre(patterns=(_LLAMA3,)),
    "tekken": Pre(patterns=(_TEKKEN,), whole_words=True, adds_bos=True),
    "gpt-4o": Pre(patterns=(_GPT4O,)),
    "deepseek-v3": Pre(patterns=(r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK3)),
    "deepseek-coder": Pre(patterns=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")),
    "seed-coder": Pre(patterns=(_SEED,)),
    "default": Pre(
        patterns=(
            r"[\p{P}\$\+<=>\^~\|]+",
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
            r"\p{N}+",
            "[0-9][0-9][0-9]",
        )
    ),
}
_SAME = {  # other names of llama.cpp for the same
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "smaug-bpe": ("dbrx", "chatglm-bpe", "glm4"),
    "gpt-2": (
        "phi-2",
        "gigachat",
        "olmo",
        "mpt",
        "jais",
        "trillion",
        "granite-docling",
        "exaone4",
        "a.x-4.0",
        "mellum",
    ),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "qwen2": ("deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"),
    "gpt-4o": ("llama4", "kanana2"),
}
_ALIASES = {other: name for name, others in _SAME.items() for other in others}


def pre_of(name: str) -> Pre:
    """What a `tokenizer.ggml.pre` means. Raises ValueError for an unknown one."""
    found = PRES.get(_ALIASES.get(name, name))
    if found is None:
        raise ValueError(f"its tokenizer splits text as {name!r}, which is not known here")
    return found


def split_of(name: str) -> Any:
    """The pre-tokenizer of the package `tokenizers` that does what `tokenizer.ggml.pre` names. Raises ValueError.

    transformers ignores that field of a GGUF file, so that digits which SmolLM takes one by one would be merged.
    """
    from tokenizers import Regex, pre_tokenizers

    patterns = pre_of(name).patterns
    own = patterns[-1] == _GPT2
    steps: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True)
        if pattern == r"\p{N}"
        else pre_tokenizers.Split(Regex(pattern), "isolated")
        for pattern in (patterns[:-1] if own else patterns)
    ]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)])


def is_byte_level(steps: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a pre-tokenizer of tokenizer.json ends in bytes, without a space of its own before them."""
    return bool(steps) and steps[-1]["type"] == "ByteLevel" and not steps[-1].get("add_prefix_space")


def names_of(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """llama.cpp's names for a pre-tokenizer of tokenizer.json; none where it does something that llama.cpp does not."""
    patterns = _patterns(steps)
    return [name for name, pre in PRES.items() if pre.patterns == patterns]


def _patterns(steps: Sequence[Mapping[str, Any]]) -> tuple[str, ...] | None:
    """The expressions that a byte-level pre-tokenizer splits by; None when it does something else too."""
    if not is_byte_level(steps):
        return None
    found = [_pattern(step) for step in steps[:-1]] + ([_GPT2] if steps[-1].get("use_regex", True) else [])
    return tuple(pattern for pattern in found if pattern is not None) if None not in found else None


def _pattern(step: Mapping[str, Any]) -> str | None:
    if step["type"] == "Digits":
        return r"\p{N}" if step["individual_digits"] else r"\p{N}+"
    kept = (step.get("behavior"), step.get("invert", False)) in (("Isolated", False), ("Removed", True))
    if step["type"] != "Split" or not kept or "Regex" not in step["pattern"]:
        return None
    pattern: str = step["pattern"]["Regex"]
    for spelled, same in _SPELLINGS.items():
        pattern = pattern.replace(spelled, same)
    return pattern
