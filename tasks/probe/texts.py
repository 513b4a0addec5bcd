"""The texts of a probe, none of which a stage saw: files that the user names, or what is at hand; long rows of one
document.

Every text goes through the reader of the corpus. What the run's corpus and its capabilities hold is left out of it, by
runs of tokens. What is at hand is the run's own test text made noisy, and Python's standard library.
"""

import hashlib
import random
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blocks.errors import PuzzleError, TooLittleText
from blocks.library import digest_of, keep, read_rows, remember, write_tensors
from blocks.records import CorpusInfo, Value
from profiles.schema import Corpus, PythonStdlibSource, TextSource
from tasks.inputs.corpus import documents_of, main_documents, prepare_corpus, refuse_images
from tasks.inputs.corpus_sources import source_of_file
from tasks.probe.records import Asked
from tasks.probe.sides import SeenText

VERSION = 1
TEST = "test"  # the run's own test text, with which the others are compared
CODE = "python"
TYPOS, CUT = 0.05, 0.3  # share of letters, and of words
LEAST_DOCUMENTS = 3
LEAST_ROWS = 8  # of long rows; a document gives one of them
NAME = re.compile(r"[A-Za-z0-9_.-]{1,40}")


class Text(Value):
    """A text: sequences of the test split of a corpus, the first of them.

    content: a digest of them and of their length. documents: of each sequence, by a name that tells documents of all
    texts apart.
    """

    name: str
    about: str
    corpus: CorpusInfo
    content: str
    documents: tuple[str, ...]

    @property
    def sequences(self) -> int:
        """How many are read."""
        return len(self.documents)

    def tokens(self, workspace: Path) -> torch.Tensor:
        """(S, T)"""
        return read_rows(workspace, self.corpus.tokens, "test", 0, self.sequences)


def text_of(name: str, about: str, corpus: CorpusInfo, sequences: int, workspace: Path) -> Text:
    """The first test sequences of a corpus."""
    count = min(sequences, corpus.test_sequences)
    numbers = documents_of(corpus, "test", workspace) or range(count)
    content = _digest(read_rows(workspace, corpus.tokens, "test", 0, count))
    documents = tuple(f"{name} {one}" for one in numbers[:count])
    return Text(name=name, about=about, corpus=corpus, content=content, documents=documents)


def _digest(tokens: torch.Tensor) -> str:
    """Of the shape too: rows of another length may be of the very same documents, one token after another."""
    return hashlib.sha256(str(tuple(tokens.shape)).encode() + tokens.contiguous().numpy().tobytes()).hexdigest()


def named_files(given: Sequence[str]) -> dict[str, Path]:
    """`news=path.jsonl` by name. PuzzleError for another form, a name that is given twice, a file that is not there."""
    found: dict[str, Path] = {}
    for text in given:
        name, _, path = text.partition("=")
        if not path or not NAME.fullmatch(name):
            raise PuzzleError(f"--text: a name and a file, such as news=path.jsonl, not {text!r}.")
        if name in {TEST, CODE, *NOISE, *found}:
            raise PuzzleError(f"--text: the name {name} is taken, choose another for {path}.")
        if not Path(path).expanduser().exists():
            raise PuzzleError(f"--text {name}: there is no file {path} (current folder: {Path.cwd()}).")
        found[name] = Path(path).expanduser()
    return found


def own_text(seen: SeenText, asked: Asked) -> Text:
    """The run's own test text. PuzzleError where it is hardly any, or asks about images."""
    refuse_images(seen.corpus, "a probe compares every text with the run's own test text, read as words")
    found = text_of(TEST, "the run's own test text", seen.corpus, asked.sequences, seen.workspace)
    if len(set(found.documents)) < LEAST_DOCUMENTS:
        raise PuzzleError(
            f"the run's own test text is of {len(set(found.documents))} documents, and a probe needs "
            f"{LEAST_DOCUMENTS} to tell an error: raise corpus.test_sequences and give `puzzle optimize` again."
        )
    return found


def texts_of(seen: SeenText, files: Mapping[str, Path], asked: Asked) -> tuple[Text, ...]:
    """The run's own test text, and the texts that it is compared with. TooLittleText where a file has too little.

    The second one has train sequences for a fine-tuning.
    """
    own, found = own_text(seen, asked), list[Text]()
    for name, source in _sources(files).items():
        train = asked.trained_sequences if not found else 0
        try:
            found.append(_like(own, seen, name, source, train))
        except TooLittleText as error:
            needed = f"{own.sequences} test sequences of {own.corpus.sequence_length} tokens"
            needed += f" and {train} for the fine-tuning" if train else ""
            raise TooLittleText(
                f"the text {name} ({_about(source)}) is too little: {needed} are needed, of which one document gives "
                "at most an eighth, and what the run has seen is left out. Name a longer --text, or ask for fewer "
                f"--sequences or --finetune-steps. What was found: {str(error).partition('. ')[0]}."
            ) from error
    return (own, *found, *(() if files else noisy_texts(seen, own, asked.seed)))


def texts_at_hand(seen: SeenText, names: Collection[str], asked: Asked) -> tuple[Text, ...]:
    """Those of these names that a probe makes where no file is named. TooLittleText where the run saw most of one."""
    own = own_text(seen, asked)
    code = [_like(own, seen, name, source, 0) for name, source in _sources({}).items() if name in names]
    return (*code, *noisy_texts(seen, own, asked.seed, [name for name in NOISE if name in names]))


def _like(own: Text, seen: SeenText, name: str, source: TextSource | PythonStdlibSource, train: int) -> Text:
    """As many sequences as the run's own text, of the same length."""
    corpus = _prepared(seen, source, own.sequences, train, own.corpus.sequence_length)
    return text_of(name, _about(source), corpus, own.sequences, seen.workspace)


def long_text(seen: SeenText, files: Mapping[str, Path], asked: Asked) -> Text:
    """Rows of one document each, of the first text that has enough documents of that length; as many tokens as of any
    other text, and LEAST_ROWS at least. PuzzleError where no text has.
    """
    rows = max(LEAST_ROWS, asked.sequences * seen.corpus.sequence_length // asked.length)
    for name, source in {**_sources(files), **_sources({})}.items():
        try:
            corpus = _prepared(seen, source, rows, 0, asked.length, one_document_rows=True)
        except TooLittleText:
            continue
        return text_of(name, _about(source), corpus, rows, seen.workspace)
    raise PuzzleError(
        f"no text gives {rows} rows of {asked.length} tokens, each of one document: ask for a shorter --length, or "
        "name a --text with longer documents."
    )


def _sources(files: Mapping[str, Path]) -> dict[str, TextSource | PythonStdlibSource]:
    if not files:
        return {CODE: PythonStdlibSource(kind="python_stdlib")}
    return {name: source_of_file(str(path)) for name, path in files.items()}


def _about(source: TextSource | PythonStdlibSource) -> str:
    return "Python's standard library" if isinstance(source, PythonStdlibSource) else Path(source.path).name


def _prepared(
    seen: SeenText, source: TextSource | PythonStdlibSource, test: int, train: int, length: int, **more: Any
) -> CorpusInfo:
    asked = Corpus(
        sources=(source,),
        sequence_length=length,
        test_sequences=test,
        validation_sequences=1,
        train_sequences=max(1, train),
        **more,
    )
    return prepare_corpus(asked, seen.parent_folder, seen.parent.fingerprint, seen.workspace, seen.texts)


# --- the run's own test text, made noisy


def typos(text: str, chance: random.Random) -> str:
    """One letter in twenty is lost, doubled, or changes places with the next one."""
    letters, place = list(text), 0
    while place < len(letters) - 1:
        if letters[place].isalpha() and chance.random() < TYPOS:
            one, other = letters[place : place + 2]
            letters[place : place + 2] = chance.choice([[other], [one, one, other], [other, one]])
            place += 1
        place += 1
    return "".join(letters)


def upper_case(text: str, chance: random.Random) -> str:
    """All letters large."""
    return text.upper()


def cut_words(text: str, chance: random.Random) -> str:
    """Three in ten words of four letters and more lose their second half."""

    def cut(word: re.Match[str]) -> str:
        return word[0][: (len(word[0]) + 1) // 2] if chance.random() < CUT else word[0]

    return re.sub(r"\w{4,}", cut, text)


NOISE: dict[str, tuple[str, Callable[[str, random.Random], str]]] = {
    "typos": ("the test text, one letter in twenty wrong", typos),
    "upper_case": ("the test text in upper case", upper_case),
    "cut_words": ("the test text, three in ten words cut", cut_words),
}


def noisy_texts(seen: SeenText, own: Text, seed: int, names: Sequence[str] = tuple(NOISE)) -> tuple[Text, ...]:
    """The run's own test text with each kind of noise. A document keeps its name, so that texts compare in pairs."""
    from transformers import AutoTokenizer

    tokenizer, found = AutoTokenizer.from_pretrained(seen.parent_folder), list[Text]()
    for name in names:
        key = digest_of(corpus=own.corpus.fingerprint, rows=own.sequences, noise=name, seed=seed, v=VERSION)
        path = seen.workspace / "probes" / "texts" / f"{key}.json"
        text = remember(path, Text, lambda one: [one.corpus.tokens], seen.workspace)
        if text is None:
            text = _noisy(own, name, seed, tokenizer, path)
            keep(path, text, [text.corpus.tokens], seen.workspace)
        found.append(text)
    return tuple(found)


def _noisy(own: Text, name: str, seed: int, tokenizer: Any, path: Path) -> Text:
    """Every sequence as text, changed, read again, and cut into sequences of the same length."""
    workspace, length = path.parents[2], own.corpus.sequence_length
    (about, change), chance = NOISE[name], random.Random(seed)
    rows = [with_noise(row, tokenizer, lambda text: change(text, chance)) for row in own.tokens(workspace).tolist()]
    flat = np.concatenate([np.array(row, dtype=np.int32) for row in rows])
    count = min(own.sequences, len(flat) // length)
    starts = np.cumsum([0, *map(len, rows[:-1])])
    origin = main_documents(starts, count * length, length, length)
    tokens = torch.from_numpy(flat[: count * length]).view(count, length)
    target = str(path.with_suffix(".safetensors").relative_to(workspace))
    corpus = CorpusInfo(
        tokens=write_tensors(workspace, target, {"test": tokens}),
        fingerprint=path.stem,
        sequence_length=length,
        train_sequences=0,
        validation_sequences=0,
        test_sequences=count,
        documents=len(set(own.documents)),
    )
    documents = tuple(own.documents[row] for row in origin)
    return Text(name=name, about=about, corpus=corpus, content=_digest(tokens), documents=documents)


def with_noise(ids: Sequence[int], tokenizer: Any, change: Callable[[str], str]) -> list[int]:
    """Token ids of a text after a change of all that stands between its special tokens."""
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).strip("\ufffd")
    special = "|".join(map(re.escape, tokenizer.all_special_tokens)) or "(?!)"
    parts = re.split(f"({special})", text)  # every second part is a special token
    changed = "".join(part if place % 2 else change(part) for place, part in enumerate(parts))
    found: list[int] = tokenizer(changed, add_special_tokens=False, verbose=False)["input_ids"]
    return found
