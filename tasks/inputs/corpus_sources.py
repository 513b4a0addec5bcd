"""The documents of a corpus: files, data sets of the hub, a Wikipedia dump, Python's standard library, questions.

Memory and time follow how much text the profile asks for, not how much the sources hold: see `iterate_documents`.
"""

import importlib.util
import os
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from blocks.errors import CorpusError, first_line
from blocks.files import sha256_of
from profiles.schema import (
    Corpus,
    CorpusSource,
    HubSource,
    ImageQuestionsSource,
    ImagesSource,
    NeedlesSource,
    ParentAnswersSource,
    PassagesSource,
    PythonStdlibSource,
    TextSource,
    WikipediaDumpSource,
)
from tasks.inputs import image_questions
from tasks.inputs.chats import Chat, Conversation, contents_alone, normalise
from tasks.inputs.installed_packages import installed_file
from tasks.inputs.questions import folder_of, needles, passages
from tasks.inputs.text_files import (
    CHUNK,
    Document,
    FileKind,
    Tally,
    field_of,
    files_of,
    kind_of,
    read_file,
    skipped,
    texts,
    value_of,
)
from tasks.inputs.wikipedia import articles_of

MADE = 1  # raise it when the same settings make other needles
READER = 2  # the same for text files and data sets of the hub alone
MINIMUM_CHARACTERS = 20_000_000
CHARACTERS_PER_TOKEN_ASKED = 24
LONGEST = 4  # one document is at most 1 / this of what is read of a source
SHUFFLE_SEED = 0
HUB_PATIENCE = 100  # rows over the network


def check_sources(corpus: Corpus) -> None:
    """Raise CorpusError for sources that do not exist, cannot be read, or begin without usable text.

    This takes a fraction of a second: files are read up to their first text, and the hub is not asked. Questions about
    images are read whole, once for all who ask for them after.
    """
    for given in corpus.sources:
        source = given.prompts if isinstance(given, ParentAnswersSource) else given
        if isinstance(source, PythonStdlibSource):
            _stdlib_files(source)
        elif isinstance(source, WikipediaDumpSource):
            _dump_file(source)
        elif isinstance(source, PassagesSource):
            folder_of(source)
        elif isinstance(source, ImagesSource):
            next(image_questions.questions(source, []), None)
        elif isinstance(source, TextSource):
            for path in files_of(source):
                next(read_file(path, source, contents_alone, Tally(str(path), "line"), CHUNK), None)


def iterate_documents(corpus: Corpus, chat: Chat = contents_alone, notes: list[str] | None = None) -> Iterator[str]:
    """The documents of `iterate_batches` alone. CorpusError for token ids, which are no text."""
    for _, document in iterate_batches(corpus, chat, notes):
        if not isinstance(document, str):
            raise CorpusError(
                "the corpus holds token ids. A tiny parent and `puzzle init` need text: name a text_field with text."
            )
        yield document


def iterate_batches(
    corpus: Corpus, chat: Chat = contents_alone, notes: list[str] | None = None, alone: CorpusSource | None = None
) -> Iterator[tuple[int, Document]]:
    """Normalised, non-empty documents of all sources, in the order of the sources. Duplicates are not yet dropped.
    alone: the one of them that is read.

    Each has the number of its batch: 0 for the first 20 million characters of a source, 1 for as many more, 2 for twice
    as many, and so on. A corpus that asks for more text has the same first batches.

    Of every source only the first 20 million characters are read, or 24 for each token that is needed if that is more,
    so that reading a data set of terabytes ends. A single document counts up to a quarter of that. `chat` writes lists
    of messages as text. Sentences on what was left out are added to `notes`. Raises CorpusError.
    """
    sequences = corpus.train_sequences + corpus.validation_sequences + corpus.test_sequences
    limit = max(MINIMUM_CHARACTERS, CHARACTERS_PER_TOKEN_ASKED * sequences * corpus.sequence_length)
    notes = [] if notes is None else notes
    for source in corpus.sources if alone is None else (alone,):
        read, long, tallies = 0, 0, list[Tally]()
        for text in documents_of_source(source, chat, tallies, limit // LONGEST + 1, corpus.sources):
            long += len(text) > limit // LONGEST
            document = (
                normalise(text[: limit // LONGEST]) if isinstance(text, str) else text[: limit // LONGEST // 4 * 4]
            )
            if isinstance(text, Conversation):  # which is normalised already
                document = Conversation(str(document), text.answers, text.singly)
            if document:
                yield (read // MINIMUM_CHARACTERS).bit_length(), document
                read += len(document)
            if read >= limit:
                break
        for tally in tallies:
            tally.judge()
        if not read:
            raise CorpusError(
                f"the corpus source {name_of(source)} holds no text, all of it is empty: take it out, or name another."
            )
        notes += skipped(tallies, name_of(source))
        if long:
            notes.append(f"documents of {name_of(source)} cut after {limit // LONGEST:,} characters: {long}")


def source_of_file(text: str) -> TextSource:
    """A file, folder or glob as a source: its kind by its ending, or that of most files in it, plain text where that
    tells none; its field by its first row. Raises CorpusError.
    """
    path = Path(text).expanduser()
    found = [kind_of(file.name, named=False) for file in path.iterdir()] if path.is_dir() else [kind_of(text)]
    kinds = [kind for kind in found if kind]
    # of as many files of two kinds the data: jsonl and parquet come before text
    kind: FileKind = max(sorted(set(kinds)), key=kinds.count, default="text")
    source = TextSource(kind=kind, path=text)
    return source if kind == "text" else source.model_copy(update={"text_field": field_of(files_of(source)[0], source)})


def name_of(source: CorpusSource) -> str:
    """The name of a source in sentences that are published with the child: without folders of this machine."""
    if isinstance(source, ParentAnswersSource):
        return f"the parent's answers to {name_of(source.prompts)}"
    if isinstance(source, HubSource):
        return source.hub_id
    if isinstance(source, PassagesSource):
        return source.data_set
    return Path(source.path).name if isinstance(source, TextSource | ImageQuestionsSource) else source.kind


def pinned(source: CorpusSource) -> CorpusSource:
    """A data set of the hub with its commit as revision, so that text and fingerprint belong together; other sources as
    they are.
    """
    if not isinstance(source, HubSource) or re.fullmatch(r"[0-9a-f]{40}", source.revision):
        return source
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(source.hub_id, revision=source.revision).sha
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"the data set {source.hub_id} at `{source.revision}` cannot be found on the hub ({first_line(error)}). "
            "Check id and network; with a full commit id as revision no look-up is needed."
        ) from error
    return source.model_copy(update={"revision": commit})


def content_of(source: CorpusSource) -> list[str]:
    """Digests of the content of a source. A data set of the hub is known by its commit."""
    if isinstance(source, TextSource):
        return [f"reader {READER}", *(sha256_of(path) for path in files_of(source))]
    if isinstance(source, WikipediaDumpSource):
        return [sha256_of(_dump_file(source))]
    if isinstance(source, PythonStdlibSource):
        return [sha256_of(path) for path in _stdlib_files(source)]
    if isinstance(source, PassagesSource):
        return [sha256_of(path) for path in sorted(Path(folder_of(source)).glob("*.arrow"))]
    if isinstance(source, NeedlesSource):
        return [f"needles {MADE}"]
    if isinstance(source, ImagesSource):
        return image_questions.content_of(source)
    return [f"reader {READER}"]


def documents_of_source(
    source: CorpusSource, chat: Chat, tallies: list[Tally], longest: int, beside: Sequence[CorpusSource] = ()
) -> Iterator[Document]:
    """The documents of a source as they are. A tally is added to `tallies` for every file that is opened. beside: all
    sources of its corpus.
    """
    if isinstance(source, WikipediaDumpSource):
        yield from articles_of(_dump_file(source))
    elif isinstance(source, PythonStdlibSource):
        yield from (path.read_text(encoding="utf-8", errors="replace") for path in _stdlib_files(source))
    elif isinstance(source, NeedlesSource):
        yield from needles(source)
    elif isinstance(source, ImagesSource):
        yield from image_questions.documents(source, chat, tallies, beside)
    elif isinstance(source, PassagesSource):
        tallies.append(Tally(source.data_set, "passage"))
        yield from texts(enumerate(passages(source), 1), lambda text: text, tallies[-1])
    elif isinstance(source, HubSource):
        tallies.append(Tally(source.hub_id, "row", HUB_PATIENCE))
        yield from texts(_hub_rows(source), lambda row: value_of(row, source.text_field, chat), tallies[-1])
    elif isinstance(source, ParentAnswersSource):  # tasks/inputs/parent_answers.py puts a file in its place
        raise CorpusError(
            "the corpus asks for the parent's own answers before there is a parent: a tiny parent, which is trained on "
            "the corpus, has none, and `puzzle init` needs text."
        )
    else:
        for path in files_of(source):
            tallies.append(Tally(str(path), "line"))
            yield from read_file(path, source, chat, tallies[-1], longest)


def _hub_rows(source: HubSource) -> Iterator[tuple[int, Mapping[str, object]]]:
    """The rows of a data set of the hub, streamed by the package `datasets`, without filling its cache."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    origin = source.hub_id
    if Path(origin).exists():  # `datasets` would read it, whoever asked for a data set of the hub
        raise CorpusError(f"{origin} is a file or folder here, not read as a data set of the hub: start elsewhere.")
    chosen = {"name": source.configuration, "revision": source.revision}
    try:
        rows = load_dataset(origin, split=source.split, streaming=True, **chosen)
        if source.shuffle_buffer:  # of a large data set only the beginning is read, and many are sorted
            rows = rows.shuffle(seed=SHUFFLE_SEED, buffer_size=source.shuffle_buffer)
        yield from enumerate(rows, 1)
    except (DatasetsError, OSError, ValueError, TypeError) as error:  # TypeError: a column that changes its type
        raise CorpusError(
            f"{origin} cannot be read ({first_line(error)}). Check id, configuration, split and network; files that "
            "were downloaded are read as kind jsonl or parquet, the text alone."
        ) from error


def _stdlib_files(source: PythonStdlibSource) -> list[Path]:
    """The first `max_files` modules of the standard library, by path, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped]
        files += [Path(folder) / name for name in names if name.endswith(".py")]
    found = sorted(files, key=lambda path: path.relative_to(root).as_posix())[: source.max_files]
    if not found:
        raise CorpusError(f"Python's standard library has no source files in {root}: choose another corpus source.")
    return found


def _dump_file(source: WikipediaDumpSource) -> Path:
    if importlib.util.find_spec("mwparserfromhell") is None:
        raise CorpusError("a wikipedia_dump needs the package mwparserfromhell: pip install mwparserfromhell")
    return installed_file(source.package, source.file, CorpusError)
