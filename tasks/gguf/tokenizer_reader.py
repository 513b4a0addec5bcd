"""The transformers tokenizer that does what llama.cpp does with the tokenizer of a GGUF file.

transformers reads such a file too, and loses how text is split, what is put before it and which tokens are special.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.gguf.pre_tokenizers import pre_of, split_of
from tasks.gguf.tokenizer_writer import CONTROL, NO_MERGE, NORMAL, UNKNOWN, USER_DEFINED


def tokenizer_of(fields: Mapping[str, Any]) -> Any:
    """The transformers tokenizer that gives what llama.cpp gives with the fields of a GGUF file. ValueError for a kind
    that is not known here.
    """
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    kind = fields.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"its tokenizer is of the kind {kind!r}; gpt2 and llama can be read")
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    backend: Any = Tokenizer(_byte_level_model(fields) if kind == "gpt2" else _sentencepiece_model(fields, types))
    backend.normalizer, backend.pre_tokenizer, backend.decoder = _around(fields, kind)
    names = _names(fields, tokens, kind)
    for token, type_ in zip(tokens, types, strict=True):
        if type_ == USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])
        elif type_ in (CONTROL, UNKNOWN):
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    backend.post_processor = _written_ends(fields, kind, names, tokens)
    templates = {"default": fields["tokenizer.chat_template"]} if "tokenizer.chat_template" in fields else {}
    for name in fields.get("tokenizer.chat_templates", ()):
        templates[name] = fields[f"tokenizer.chat_template.{name}"]
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = templates if len(templates) > 1 else templates.get("default")
    return tokenizer


def _names(fields: Mapping[str, Any], tokens: Sequence[str], kind: str) -> dict[str, str]:
    """Special tokens as transformers names them; llama.cpp's own defaults where the file is silent."""
    places = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
    silent = {"bos": 1, "eos": 2, "unk": 0} if kind == "llama" else {}
    ids = {ours: fields.get(f"tokenizer.ggml.{theirs}_token_id", silent.get(ours)) for ours, theirs in places.items()}
    return {f"{ours}_token": tokens[index] for ours, index in ids.items() if index is not None and index < len(tokens)}


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    """Tokens without what fills rows that the tokenizer has no token for."""
    return {token: index for index, token in enumerate(tokens) if token.rstrip("_") != f"[PAD{index}]"}


def _byte_level_model(fields: Mapping[str, Any]) -> Any:
    from tokenizers.models import BPE

    vocabulary = _vocabulary(fields["tokenizer.ggml.tokens"])
    merges = [tuple(pair.split(" ", 1)) for pair in fields["tokenizer.ggml.merges"] if pair != NO_MERGE]
    whole_words = pre_of(fields.get("tokenizer.ggml.pre", "default")).whole_words
    return BPE(vocab=vocabulary, merges=merges, ignore_merges=whole_words)


def _sentencepiece_model(fields: Mapping[str, Any], types: Sequence[int]) -> Any:
    """Every pair whose whole is a token is merged, the highest score first, as llama.cpp does it."""
    from tokenizers.models import BPE

    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    vocabulary = _vocabulary(tokens)
    unknown = next((token for token, type_ in zip(tokens, types, strict=True) if type_ == UNKNOWN), None)
    whole = [
        (scores[index], token)
        for index, (token, type_) in enumerate(zip(tokens, types, strict=True))
        if type_ == NORMAL
    ]
    merges = [
        (token[:cut], token[cut:])
        for _, token in sorted(whole, key=lambda pair: -pair[0])
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    return BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token=unknown)


def _around(fields: Mapping[str, Any], kind: str) -> tuple[Any, Any, Any]:
    """Normalizer, pre-tokenizer, decoder."""
    from tokenizers import decoders, normalizers

    if kind == "gpt2":
        return None, split_of(fields.get("tokenizer.ggml.pre", "default")), decoders.ByteLevel()
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", "▁")
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if not prefix:
        return spaces, None, decoders.Sequence(steps)
    return (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]),
        None,
        decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)]),
    )


def _written_ends(fields: Mapping[str, Any], kind: str, names: Mapping[str, str], tokens: Sequence[str]) -> Any:
    """The post-processor that puts BOS and EOS where llama.cpp puts them."""
    from tokenizers import processors

    adds = kind == "llama" or pre_of(fields.get("tokenizer.ggml.pre", "default")).adds_bos
    before = names.get("bos_token") if fields.get("tokenizer.ggml.add_bos_token", adds) else None
    after = names.get("eos_token") if fields.get("tokenizer.ggml.add_eos_token", False) else None
    if before is None and after is None:
        return None
    single = [part for part in (before, "$A", after) if part]
    pair = [part for part in (before, "$A", after, before and f"{before}:1", "$B:1", after and f"{after}:1") if part]
    used = {token for token in (before, after) if token}
    return processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, tokens.index(token)) for token in sorted(used)]
    )
