"""The fields of a GGUF file for a tokenizer: copied from another GGUF file, or converted from a transformers tokenizer.

A GGUF file only names how a byte-level BPE splits text, so only ways of splitting whose name is known are converted:
with a wrong name, llama.cpp would silently give other tokens. What GGUF has no fields for is refused in a sentence. The
rest is compared in llama.cpp itself by tasks/export/tokenizer_check.py.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blocks.errors import PuzzleError
from tasks.gguf.header import read_header
from tasks.gguf.pre_tokenizers import PRES, is_byte_level, names_of

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama_token_type
NO_TOKENIZER: dict[str, Any] = {"tokenizer.ggml.model": "no_vocab"}
NO_MERGE = "[none] [none]"  # llama.cpp wants a merge; this one never comes
WAY_OUT = (
    "Export with --format transformers, or with --tokenizer-from none (the file then takes token ids only), or with "
    "--tokenizer-from and a GGUF of the parent (differences are then reported)."
)

_ENDS_BY_NAME = (  # llama.cpp ends a text at these, whatever the file says
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>"),
    *("<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>"),
)


class TokenizerLimit(PuzzleError):
    """A tokenizer that llama.cpp would not follow, whatever the file says."""


def copied_tokenizer(path: Path) -> dict[str, Any]:
    """Every `tokenizer.*` field of a GGUF file."""
    return {key: value for key, value in read_header(path).fields.items() if key.startswith("tokenizer.")}


def fields_of(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """Fields for a transformers tokenizer and a model with this many embedding rows.

    Raises TokenizerLimit for what GGUF has no fields for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _limit(f"it is a {type(tokenizer).__name__}, which keeps no tokenizer.json")
    whole = json.loads(backend.to_str())
    model = whole["model"]
    if model["type"] != "BPE":
        raise _limit(f"it is of the kind {model['type']}; the kind BPE is converted")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _limit(f"it uses {name}")
    refuse_rows(tokenizer, vocab_size)
    spm = bool(model.get("byte_fallback"))
    fields = _sentencepiece(tokenizer, whole, vocab_size) if spm else _byte_level(tokenizer, whole)
    return fields | _vocabulary(tokenizer, model, vocab_size, spm) | _special_tokens(tokenizer, vocab_size)


def with_stops(fields: dict[str, Any], stops: Sequence[int]) -> dict[str, Any]:
    """The fields, changed so that llama.cpp ends a text at all of these ids. Without any it would end at token 11."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    known = [stop for stop in stops if stop < len(tokens)]
    if UNUSED in kinds:
        known.append(kinds.index(UNUSED))  # never comes, so it ends nothing
    eos = fields.get("tokenizer.ggml.eos_token_id", known[0] if known else None)
    if eos is None:
        return fields
    others = [stop for stop in known if stop != eos and kinds[stop] != UNUSED and tokens[stop] not in _ENDS_BY_NAME]
    more = {f"tokenizer.ggml.{name}_token_id": stop for name, stop in zip(("eot", "eom"), others, strict=False)}
    return fields | {"tokenizer.ggml.eos_token_id": eos} | more


def _limit(what: str) -> TokenizerLimit:
    return TokenizerLimit(f"the tokenizer cannot be carried into GGUF exactly: {what}. {WAY_OUT}")


def left_out(tokenizer: Any, vocab_size: int) -> list[str]:
    """Added tokens of a tokenizer for which a model with this many embedding rows has no row."""
    return [token.content for index, token in tokenizer.added_tokens_decoder.items() if index >= vocab_size]


def refuse_rows(tokenizer: Any, vocab_size: int) -> None:
    """Raise TokenizerLimit when a token that texts need has no embedding row in the model."""
    added = tokenizer.added_tokens_decoder
    ordinary = [token for token, index in tokenizer.get_vocab().items() if index >= vocab_size and index not in added]
    if ordinary:
        raise _limit(f"{len(ordinary)} of its tokens, {ordinary[0]!r} for one, have no row among the {vocab_size} here")
    templates = "".join(chat_templates(tokenizer).values())
    used = [
        tokenizer.bos_token,
        tokenizer.eos_token,
        *tokenizer.convert_ids_to_tokens([i for e in ends(tokenizer) for i in e]),
    ]
    for token in left_out(tokenizer, vocab_size):
        if token in used or token in templates:
            raise _limit(
                f"its special token {token!r}, which a text or the chat template needs, has the id "
                f"{tokenizer.convert_tokens_to_ids(token)}, and the model has rows for ids below {vocab_size}"
            )


def chat_templates(tokenizer: Any) -> dict[str, str]:
    """Chat templates by name; the one without a name is `default`."""
    found = tokenizer.chat_template or {}
    return {"default": found} if isinstance(found, str) else dict(found)


def ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that transformers puts before and after a text."""
    plain = tokenizer("a 1", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a 1")["input_ids"]
    for place in range(len(whole) - len(plain) + 1):
        if whole[place : place + len(plain)] == plain:
            return whole[:place], whole[place + len(plain) :]
    raise _limit("with special tokens it gives other tokens for the text itself")


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
    return [(first, second) for first, second in pairs]


def _unreached(tokenizer: Any, model: Mapping[str, Any]) -> list[str]:
    """Tokens of more than one letter that the tokenizer's own merges never give."""
    from tokenizers.models import BPE

    bpe: Any = BPE(vocab=model["vocab"], merges=_merges(model))
    added = tokenizer.added_tokens_decoder
    return [
        token
        for token, index in model["vocab"].items()
        if len(token) > 1
        and index not in added
        and not _byte(token)
        and [piece.id for piece in bpe.tokenize(token)] != [index]
    ]


def _byte(token: str) -> bool:
    return re.fullmatch(r"<0x[0-9A-F]{2}>", token) is not None


def _byte_level(tokenizer: Any, whole: Mapping[str, Any]) -> dict[str, Any]:
    model = whole["model"]
    if any(step["type"] != "NFC" for step in _steps(whole.get("normalizer"), "normalizers")):
        kinds = ", ".join(step["type"] for step in _steps(whole["normalizer"], "normalizers"))
        raise _limit(f"it changes the text before it splits it ({kinds}), which llama.cpp does not do here")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer(tokenizer, whole),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(model)] or [NO_MERGE],
    }


def _steps(part: Mapping[str, Any] | None, inside: str) -> list[Any]:
    """The steps of a normalizer or pre-tokenizer of tokenizer.json."""
    if part is None:
        return []
    return list(part[inside]) if part["type"] == "Sequence" else [part]


def _pre_tokenizer(tokenizer: Any, whole: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json splits text."""
    steps = _steps(whole.get("pre_tokenizer"), "pretokenizers")
    names = names_of(steps)
    if not names and not whole["model"]["merges"] and is_byte_level(steps):
        names = ["gpt-2"]  # where nothing is merged, it is the same however text is split
    if not names:
        raise _limit(f"it splits text as none of those do that have a certain name in llama.cpp ({', '.join(PRES)})")
    whole_words = bool(whole["model"].get("ignore_merges"))
    for name in names:
        if PRES[name].whole_words == whole_words:
            return name
    unreached = _unreached(tokenizer, whole["model"])
    if unreached:
        raise _limit(
            f"under the name {names[0]} llama.cpp {'does not take' if whole_words else 'takes'} a word that is a token "
            f"as it is, and this has {len(unreached)} tokens that its merges do not give, {unreached[0]!r} for one"
        )
    return names[0]


def _sentencepiece(tokenizer: Any, whole: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """A BPE on letters with a space as an underline and bytes for what it does not know: llama.cpp's model `llama`."""
    model = whole["model"]
    missing = [byte for byte in (f"<0x{value:02X}>" for value in range(256)) if byte not in model["vocab"]]
    if missing:
        raise _limit(f"it falls back to bytes and has no token for {len(missing)} of them, {missing[0]} for one")
    unreached = _unreached(tokenizer, model)
    if unreached or model.get("ignore_merges"):
        one = f", {unreached[0]!r} for one" if unreached else ""
        raise _limit(f"{len(unreached)} of its tokens are not what its merges give{one}; llama.cpp would use them")
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(_merges(model)):
        ranks.setdefault("".join(pair), rank)
    by_id = {index: token for token, index in model["vocab"].items()}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [-float(ranks.get(by_id.get(index, ""), len(ranks))) for index in range(vocab_size)],
        "tokenizer.ggml.add_space_prefix": _space_prefix(whole),
    }


def _space_prefix(whole: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece-like tokenizer puts a space before a text."""
    normal = _steps(whole.get("normalizer"), "normalizers")
    before = _steps(whole.get("pre_tokenizer"), "pretokenizers")
    spaces = [step for step in normal if step["type"] == "Replace" and step["pattern"] == {"String": " "}]
    prepends = [step for step in normal if step["type"] == "Prepend"]
    metaspace = [step for step in before if step["type"] == "Metaspace" and not step.get("split")]
    merged = [step for step in before if step["type"] == "Split" and step["pattern"] == {"String": " "}]
    known = len(spaces) + len(prepends) == len(normal) and len(metaspace) + len(merged) == len(before)
    if not known or len(spaces) + len(metaspace) != 1:
        kinds = ", ".join(step["type"] for step in [*normal, *before]) or "nothing"
        raise _limit(f"it treats spaces in a way that llama.cpp does not ({kinds})")
    return bool(prepends) or any(step["prepend_scheme"] != "never" for step in metaspace)


def _vocabulary(tokenizer: Any, model: Mapping[str, Any], vocab_size: int, spm: bool) -> dict[str, Any]:
    """Tokens by id, and their types. Ids that only the model has get a placeholder."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added, taken = tokenizer.added_tokens_decoder, set(by_id.values())
    tokens, kinds = [], []
    for index in range(vocab_size):
        token = by_id.get(index)
        if token is None:
            token, kind = _free(f"[PAD{index}]", taken), UNUSED
        elif spm and token == model.get("unk_token"):
            kind = UNKNOWN
        elif index in added:
            kind = CONTROL if added[index].special else USER_DEFINED
        else:
            kind = BYTE if spm and _byte(token) else NORMAL
        tokens.append(token)
        kinds.append(kind)
    return {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}


def _free(name: str, taken: Iterable[str]) -> str:
    """A name that is not yet a token: llama.cpp aborts when two tokens have the same name."""
    while name in taken:
        name += "_"
    return name


def _special_tokens(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    before, after = ends(tokenizer)
    fields: dict[str, Any] = {
        "tokenizer.ggml.add_bos_token": bool(before),
        "tokenizer.ggml.add_eos_token": bool(after),
    }
    for name, ids in (("bos", before), ("eos", after)):
        own = getattr(tokenizer, f"{name}_token_id")
        if len(ids) > 1 or (ids and own not in (None, ids[0])):
            spelled = " ".join(tokenizer.convert_ids_to_tokens(ids))
            raise _limit(
                f"it puts {spelled} {'before' if name == 'bos' else 'after'} a text; llama.cpp can put its {name} there"
            )
        if ids or own is not None:
            fields[f"tokenizer.ggml.{name}_token_id"] = ids[0] if ids else own
    for ours, theirs in {"unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}.items():
        own = getattr(tokenizer, f"{ours}_token_id")
        if own is not None and own < vocab_size:
            fields[f"tokenizer.ggml.{theirs}_token_id"] = own
    templates = chat_templates(tokenizer)
    others = sorted(name for name in templates if name != "default")
    fields |= {f"tokenizer.chat_template.{name}": templates[name] for name in others}
    fields |= {"tokenizer.chat_templates": others} if others else {}
    return fields | ({"tokenizer.chat_template": templates["default"]} if "default" in templates else {})
