"""The tokenizer that an export gets.

A GGUF file gets a copy of another GGUF file's tokenizer: of one that a person named, of the child if the child is a
GGUF file, or of the parent if the parent came as a GGUF file in an installed package. Otherwise the tokenizer of the
child's folder is converted. A folder that is made of a GGUF file gets that file's tokenizer, made readable for
transformers.
"""

import json
from pathlib import Path
from typing import Any

from blocks.errors import PuzzleError, first_line
from blocks.parent import config_of
from tasks.export.tokenizer_check import check_tokenizer
from tasks.gguf.tokenizer_reader import tokenizer_of
from tasks.gguf.tokenizer_writer import (
    NO_TOKENIZER,
    WAY_OUT,
    TokenizerLimit,
    copied_tokenizer,
    fields_of,
    left_out,
    with_stops,
)
from tasks.inputs.children import Origin
from tasks.inputs.companions import has_tokenizer
from tasks.inputs.installed_packages import installed_file

NONE = "none"  # for --tokenizer-from


def write_tokenizer(path: Path, folder: Path) -> str:
    """Write the tokenizer of a GGUF file to a folder, for transformers, and compare the two.

    Returns a sentence for people. Raises TokenizerLimit.
    """
    tokenizer = open_tokenizer(path)
    if tokenizer is None:
        return f"tokenizer: none, because {path.name} has none"
    tokenizer.save_pretrained(folder)
    said = check_tokenizer(path, tokenizer)
    return f"tokenizer: read from {path.name}; {'; '.join(said)}"


def find_tokenizer(child: Path, vocab_size: int, origin: Origin, named: Path | None) -> tuple[dict[str, Any], str]:
    """The tokenizer's fields for a GGUF file and a sentence on where they come from. Raises TokenizerLimit."""
    if named is not None and str(named) == NONE:
        return NO_TOKENIZER, "tokenizer: none, as asked, so the file takes token ids only"
    source = named or (child if child.is_file() else _parents_gguf(origin))
    if source is not None:
        fields = copied_tokenizer(source)
        size = len(fields.get("tokenizer.ggml.tokens", ()))
        if size and size != vocab_size:
            raise PuzzleError(f"{source.name} has {size} tokens, the child {vocab_size}: it is not the parent's GGUF.")
        return fields, f"tokenizer: copied from {source.name}"
    tokenizer = open_tokenizer(child)
    if tokenizer is None:
        return NO_TOKENIZER, (
            f"tokenizer: none, because {child} has none, so the file takes token ids only; name a GGUF of the parent "
            "with --tokenizer-from to have its tokenizer copied"
        )
    fields = with_stops(fields_of(tokenizer, vocab_size), stops_of(child))
    note = "tokenizer: converted from the folder's, as transformers opens it"
    gone = left_out(tokenizer, vocab_size)
    if gone:
        note += f"; left out, because the model has no rows for them: {', '.join(map(repr, gone))}"
    if "tokenizer.ggml.eos_token_id" not in fields:
        note += "; neither it nor the config names a token that ends a text, so llama.cpp takes its own default, 11"
    return fields, note


def _parents_gguf(origin: Origin) -> Path | None:
    """The GGUF file of a package parent, where its package is installed."""
    words = origin.parent_source.removeprefix("package ").split(", ", 1)
    if not origin.parent_source.startswith("package ") or len(words) != 2:
        return None
    try:
        return installed_file(words[0], words[1], PuzzleError)
    except PuzzleError:
        return None


def _tokenizer_in(path: Path) -> Any:
    """The tokenizer of a GGUF file, None where it has none. Raises TokenizerLimit."""
    fields = copied_tokenizer(path)
    if fields.get("tokenizer.ggml.model", "no_vocab") == "no_vocab":
        return None
    try:
        return tokenizer_of(fields)
    except (ValueError, KeyError, IndexError) as error:
        raise TokenizerLimit(f"the tokenizer of {path.name} cannot be given to transformers: {error}") from error


def open_tokenizer(folder: Path) -> Any:
    """What transformers makes of the tokenizer of a child's or parent's folder, or of a GGUF file; None where there is
    none. Raises TokenizerLimit.
    """
    if folder.is_file():
        return _tokenizer_in(folder)
    if not has_tokenizer(folder):
        return None
    from transformers import AutoTokenizer, PreTrainedConfig

    config = config_of(folder) if (folder / "config.json").is_file() else PreTrainedConfig()
    try:
        return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing more precise
        reason = f"the tokenizer of {folder} cannot be opened by transformers: {first_line(error)}"
        raise TokenizerLimit(f"{reason} {WAY_OUT}") from error


def stops_of(folder: Path) -> list[int]:
    """The ids at which generation ends, as a folder's generation config says, else its config."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []
