"""A first profile for a parent and a text of one's own, as commented YAML: what `puzzle init` writes.

The search space is what this parent can have and the engines can run. The sizes of the corpus are the largest of a
ladder that the text fills, tried with the parent's own tokenizer.
"""

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from blocks.engine_limits import refusal
from blocks.errors import CorpusError, ParentError, PuzzleError
from blocks.experts import ExpertsKind
from blocks.kinds import kinds, parse_label
from blocks.parent import Parent
from blocks.variant import Variant
from profiles.schema import (
    Budget,
    Corpus,
    CorpusSource,
    EngineName,
    FolderParent,
    GgufParent,
    HubParent,
    HubSource,
    PackageParent,
    ParentSource,
    PythonStdlibSource,
    TextSource,
    TinyParent,
    WikipediaDumpSource,
)
from tasks.inputs.corpus import DocumentTokenizer, load_tokenizer, ordered_documents, pack_splits, splits_of
from tasks.inputs.corpus_sources import check_sources, iterate_documents, source_of_file
from tasks.inputs.installed_packages import installed_file
from tasks.inputs.near_duplicates import NearDuplicates
from tasks.inputs.parent import write_config, write_tokenizer
from tasks.inputs.text_files import kind_of

LENGTHS, TRAIN = (256, 128, 64, 32), (512, 256, 128, 64, 32)  # the ladder: tokens of a sequence, train sequences
SEPARATORS = ("\n\n\n", "\n\n", "\n")
BYTES_PER_TOKEN = 5  # of a parent whose tokenizer is not here: rather too few tokens than too many
WIDTH_BLOCK = 32
FFN_SHARES = ("ffn75pct", "ffn50pct", "ffn25pct")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a person says to start with."""

    name: str
    parent: ParentSource
    source: CorpusSource
    budget: tuple[str, str]
    engine: EngineName


def read_parent(text: str) -> ParentSource:
    """A folder, a .gguf file, PACKAGE:FILE, `tiny`, or an id on the hub. Raises ParentError where its config says that
    it cannot be a parent.
    """
    source = named_parent(text)
    with tempfile.TemporaryDirectory() as folder:
        write_config(source, Path(folder), download=False)
    return source


def named_parent(text: str) -> ParentSource:
    """What a person may call a parent; nothing is read but names. Raises ParentError."""
    path = Path(text).expanduser()
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        return (
            GgufParent(path=str(ggufs[0]))
            if ggufs and not (path / "config.json").is_file()
            else FolderParent(path=text)
        )
    if path.is_file() or text.endswith(".gguf") and ":" not in text:
        return GgufParent(path=text)
    if text == "tiny":
        return TinyParent()
    package, colon, file = text.partition(":")
    if colon:
        installed_file(package, file, ParentError)
        return PackageParent(package=package, file=file)
    try:
        return HubParent(hub_id=text if "/" in text else "")
    except ValidationError:
        raise ParentError(
            f"{text!r} is no parent: give a folder with config.json and *.safetensors, a .gguf file, PACKAGE:FILE, "
            f"owner/name on the hub, or tiny for a small one that is made (current folder: {Path.cwd()})."
        ) from None


def read_text(text: str) -> CorpusSource:
    """A file, a folder, a glob, owner/name of a data set on the hub, wikipedia_dump or python_stdlib. Raises
    CorpusError.
    """
    if text == "python_stdlib":
        return PythonStdlibSource(kind="python_stdlib")
    if text == "wikipedia_dump":
        return WikipediaDumpSource(kind="wikipedia_dump")
    path = Path(text).expanduser()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not path.exists() and kind_of(text) is None:
        return HubSource(kind="hub", hub_id=text)
    source = source_of_file(text)
    check_sources(Corpus(sources=(source,)))
    return source


def read_budget(text: str) -> tuple[str, str]:
    """`70%` of the layers' parameters, or FIELD=VALUE of a profile's budget. Raises PuzzleError."""
    field, equals, value = text.rpartition("=")
    field = field.strip() if equals else "layer_parameters_fraction"
    try:
        Budget.model_validate({field: value.strip()})
    except ValidationError as error:
        fields = ", ".join(Budget.model_fields)
        raise PuzzleError(
            f"{text!r} is no budget ({error.errors()[0]['msg']}): give a share of the layers' parameters, such as 70%, "
            f"or FIELD=VALUE, such as speedup=1.3. Fields: {fields}."
        ) from None
    return field, value.strip()


def read_engine(text: str) -> EngineName:
    """An engine's name. Raises PuzzleError."""
    engine: Any = text
    if text not in get_args(EngineName):
        raise PuzzleError(f"{text!r} is no engine that puzzle knows: {', '.join(get_args(EngineName))}.")
    return engine


def read_name(text: str) -> str:
    """A profile's name out of any words."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "mine"


def first_profile(wish: Wish) -> str:
    """The profile as YAML. Raises ParentError, CorpusError."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = Parent(folder).config if write_config(wish.parent, folder, download=False) else None
        context = int(getattr(config, "max_position_embeddings", None) or 1024)
        known = config is not None and write_tokenizer(wish.parent, folder)
        corpus = _fitting(wish.source, load_tokenizer(folder) if known else _STAND_IN, context)
    return _yaml(wish, corpus, _space(config, wish.engine), context)


_STAND_IN = DocumentTokenizer(lambda text: [0] * (len(text.encode()) // BYTES_PER_TOKEN), (0,), (0,))


def _fitting(source: CorpusSource, tokenizer: DocumentTokenizer, context: int) -> Corpus:
    """The largest corpus of the ladder that the source fills. Sources that are not the user's files are large."""
    ladder = [_sized(source, length, train) for length in LENGTHS if length <= context for train in TRAIN]
    ladder.sort(key=lambda corpus: -corpus.sequence_length * corpus.train_sequences)
    if not ladder:
        raise ParentError(
            f"the parent's context is {context} tokens; sequences of {LENGTHS[-1]} are the shortest here."
        )
    if not isinstance(source, TextSource):
        return ladder[0]
    cuts = [source.model_copy(update={"separator": one}) for one in SEPARATORS] if source.kind == "text" else [source]
    documents = {cut: ordered_documents(iterate_documents(_sized(cut, 8, 1), tokenizer.chat)) for cut in cuts}
    near = NearDuplicates(ladder[0].near_duplicates)
    for corpus in ladder:
        for cut, there in documents.items():
            try:
                pack_splits(there, tokenizer, splits_of(corpus), corpus.sequence_length, near)
            except CorpusError as error:
                told = error
            else:
                return corpus.model_copy(update={"sources": (cut,)})
    raise told


def _sized(source: CorpusSource, length: int, train: int) -> Corpus:
    rest = max(8, train // 32)
    return Corpus(
        sources=(source,), sequence_length=length, train_sequences=train, validation_sequences=rest, test_sequences=rest
    )


def _space(config: Any, engine: EngineName) -> tuple[list[str], list[str]]:
    """Attention and FFN variants that a parent can have, and that the engine can run, at the parent's own size."""
    if config is None:
        return ["no_op"], [*FFN_SHARES[1:], "no_op"]
    heads = int(config.num_key_value_heads)
    fewer = [f"kv{heads // 2}"] if heads > 2 and heads % 2 == 0 else []
    attention = [*fewer, *(["kv1"] if heads > 1 else []), "linear", "no_op"]
    ffn = [example for kind in kinds("ffn") if isinstance(kind, ExpertsKind) for example in kind.examples(config)]
    shares = () if ffn else FFN_SHARES
    ffn += dict.fromkeys(_in_whole_blocks(parse_label("ffn", share, config), config) for share in shares)
    runs = [each for each in attention if refusal((engine,), config, 0, each, "parent", "float32") is None]
    return runs, [each for each in [*ffn, "no_op"] if refusal((engine,), config, 0, "parent", each, "float32") is None]


def _in_whole_blocks(ffn: Variant, config: Any) -> str:
    """An FFN's label, its width down to a multiple of 32 where the parent's is one: an export in q8_0 or fewer bits
    rounds rows in such blocks.
    """
    whole = (ffn.size or 0) // WIDTH_BLOCK * WIDTH_BLOCK
    return f"ffn{whole}" if whole and config.intermediate_size % WIDTH_BLOCK == 0 else ffn.label


def _yaml(wish: Wish, corpus: Corpus, space: tuple[Sequence[str], Sequence[str]], context: int) -> str:
    train, held = corpus.train_sequences, corpus.test_sequences
    prompt, generated = min(256, context * 3 // 4), min(64, context // 4)
    field, value = wish.budget
    statistics = min(128, train)
    return f"""\
# Written by `puzzle init`. All fields: docs/reference/profile.md, or in the editor with `puzzle schema`.
name: {wish.name}

# The model that a faster child is made of. A relative path starts at the folder in which puzzle is started.
parent: {_flow(wish.parent)}

# The text for training, scores and comparison. The sizes are the largest, up to a quick first run, that it fills.
corpus:
  sources: [{_flow(corpus.sources[0])}]
  sequence_length: {corpus.sequence_length}
  train_sequences: {train}
  validation_sequences: {held}
  test_sequences: {held}

# What may stand in the place of every attention and FFN; the parent's own always may.
search_space:
  attention: [{", ".join(space[0])}]
  ffn: [{", ".join(space[1])}]

# The child has to keep this. Several limits may stand side by side, such as speedup: 1.3 or memory_fraction: 70%.
budget:
  {field}: {value}

# Nothing is chosen that these engines cannot run. Costs are measured in torch on this machine; `engine: llama.cpp` or
# `engine: vllm` measures them there.
hardware: {{must_run: [{wish.engine}]}}

# The traffic that the child will serve.
scenarios: [{{name: chat, batch_sizes: [1], prompt_tokens: {prompt}, generated_tokens: {generated}}}]

# How thorough the run is. More sequences and steps make a better child, and take longer: see `puzzle plan`.
record: {{statistics_sequences: {statistics}, hidden_sequences: {min(48, train)}, validation_sequences: 8}}
bld: {{steps: 8}}
scoring: {{sequences: 8}}
gkd: {{steps: 48, validation_sequences: 8}}
evaluate: {{sequences: {min(16, held)}, answer_tokens: {min(60, context // 4)}}}
"""


def _flow(section: ParentSource | CorpusSource) -> str:
    """A section on one line of YAML: its kind, and what is not its default."""
    values = {"kind": section.kind, **section.model_dump(mode="json", exclude_defaults=True)}
    return "{" + ", ".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()) + "}"
