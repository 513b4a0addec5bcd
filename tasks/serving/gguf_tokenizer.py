"""The tokenizer of a GGUF file: copied from a GGUF of the parent, or converted from a Hugging Face folder, or none.

llama.cpp knows a byte-level BPE by the name of its pre-tokenizer, so only those whose split is known here are
converted: a wrong name would tokenize wrongly without a word.
"""

import json
from pathlib import Path
from typing import Any

from tasks.serving.gguf_header import read_header

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # llama_token_type
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {_CONTRACTIONS + _REST: "qwen2", _CONTRACTIONS + "{1,3}" + _REST: "llama-bpe"}
NO_TOKENIZER: dict[str, Any] = {"tokenizer.ggml.model": "no_vocab"}


def split_of(name: str) -> Any:
    """The `tokenizers` pre-tokenizer that llama.cpp means by `tokenizer.ggml.pre`; ValueError for one not known here.

    transformers forgets it when it reads a GGUF file: digits that SmolLM takes one by one are then merged.
    """
    from tokenizers import Regex, pre_tokenizers

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in ("gpt-2", "default"):
        return plain
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    regex = {known: pattern for pattern, known in SPLITS.items()}.get(name)
    if regex is None:
        raise ValueError(f"its tokenizer splits text as {name!r}, which is not known here")
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), bare])


def copied_tokenizer(path: Path) -> dict[str, Any]:
    """Every `tokenizer.*` field of a GGUF file."""
    return {key: value for key, value in read_header(path).fields.items() if key.startswith("tokenizer.")}


def converted_tokenizer(folder: Path, vocab_size: int) -> dict[str, Any] | None:
    """Fields for the byte-level BPE of a Hugging Face folder, None when its kind is not one that is known here."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    whole = json.loads(path.read_text(encoding="utf-8"))
    model, name = whole["model"], _pre_tokenizer(whole.get("pre_tokenizer") or {})
    if model.get("type") != "BPE" or name is None or whole.get("normalizer") or not model.get("merges"):
        return None
    tokens, kinds = _tokens(whole, vocab_size)
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
    }
    return fields | _special_tokens(folder, tokens)


def _pre_tokenizer(pre: dict[str, Any]) -> str | None:
    """llama.cpp's name for a tokenizer.json pre-tokenizer."""
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    if steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    regex, before = steps[-1].get("use_regex", True), steps[:-1]
    if not before:
        return "gpt-2" if regex else None
    if len(before) > 1:
        return None
    if before[0]["type"] == "Digits":
        return "smollm" if regex and before[0]["individual_digits"] else None
    if before[0]["type"] == "Split" and not regex and before[0]["behavior"] == "Isolated":
        return SPLITS.get(before[0]["pattern"].get("Regex", ""))
    return None


def _tokens(whole: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Tokens by id and their types; ids that the model has and the tokenizer has not are padded."""
    vocabulary = dict(whole["model"]["vocab"])
    added = {token["id"]: token for token in whole.get("added_tokens", [])}
    by_id = {index: token for token, index in vocabulary.items()} | {i: token["content"] for i, token in added.items()}
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    kinds = [NORMAL if index in by_id else USER_DEFINED for index in range(vocab_size)]
    for index, token in added.items():
        kinds[index] = CONTROL if token["special"] else USER_DEFINED
    return tokens, kinds


def _special_tokens(folder: Path, tokens: list[str]) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ids = {token: index for index, token in enumerate(tokens)}
    fields: dict[str, Any] = {"tokenizer.ggml.add_bos_token": bool(config.get("add_bos_token", False))}
    for ours, theirs in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        token = config.get(f"{ours}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text in ids:
            fields[f"tokenizer.ggml.{theirs}_token_id"] = ids[text]
    template = folder / "chat_template.jinja"
    chat = template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template")
    return fields | ({"tokenizer.chat_template": chat} if isinstance(chat, str) else {})
