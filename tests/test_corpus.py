"""Corpus: split by document, deterministic, cached by content; sources read as they are."""

import importlib.util
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from blocks.errors import CorpusError
from blocks.library import read_tensors
from blocks.records import CorpusInfo
from profiles.schema import Corpus, HubSource, PythonStdlibSource, TextSource, WikipediaDumpSource
from tasks import corpus as module
from tasks.corpus import (
    DocumentTokenizer,
    installed_file,
    iterate_documents,
    normalise,
    ordered_documents,
    pack_splits,
    plain_text,
    prepare_corpus,
)
from tasks.tiny import byte_tokenizer

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
    return info, {name: tensor.clone() for name, tensor in read_tensors(workspace, info.tokens).items()}


def test_splits_have_their_shapes_and_share_no_document(tmp_path: Path, tokenizer_folder: Path) -> None:
    info, splits = prepared(small(write_texts(tmp_path, make_documents(60))), tokenizer_folder, tmp_path)
    shapes = {name: (tuple(tokens.shape), tokens.dtype) for name, tokens in splits.items()}
    assert shapes == {name: ((count, 32), torch.int32) for name, count in WANTED.items()}
    words = {name: words_of(tokens) for name, tokens in splits.items()}
    assert all(len(found) >= 2 for found in words.values())
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not words[one] & words[other]
    assert info.documents == 60


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


def test_one_long_document_cannot_be_the_test_set() -> None:
    documents = ["x" * 100_000, *make_documents(40)]
    packed, used = pack_splits(documents, LETTERS, WANTED, 32)
    assert int((packed["test"] == ord("x")).sum()) == 31  # an eighth of 8 sequences, with eos
    assert used["test"] >= 8


def test_train_may_take_more_of_a_document_when_it_must() -> None:
    documents = [f"{index:03d}" * 40 for index in range(16)] + ["y" * 10_000]
    packed, _ = pack_splits(documents, LETTERS, WANTED, 32)
    assert packed["train"].shape == (16, 32)
    assert int((packed["train"] == ord("y")).sum()) > 32  # the share train begins with


@pytest.mark.parametrize("count", [0, 1, 12])
def test_too_small_is_told_with_numbers(tmp_path: Path, tokenizer_folder: Path, count: int) -> None:
    corpus = small(write_texts(tmp_path, make_documents(count, 30) or [" "]))
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
    assert "in UTF-8" in refused(TextSource(kind="text", path=str(tmp_path / "latin.txt")))
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

    def load(path: str, **arguments: object) -> list[dict[str, str]]:
        calls.append((path, arguments["revision"]))
        return [{"text": document} for document in make_documents(60)]

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


def test_a_tokenizer_of_another_model_is_told(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tokenizer_folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 100}')
    with pytest.raises(CorpusError, match="the parent knows 100 tokens"):
        prepare_corpus(small(write_texts(tmp_path, make_documents(60))), tokenizer_folder, "f" * 64, tmp_path)


def test_normalise() -> None:
    assert normalise("  a\r\nb\rc \n") == "a\nb\nc"
    assert normalise("e\u0301") == "\u00e9"
    assert normalise("x\ud800y") == "x?y"


def test_endless_sources_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(source: object) -> object:
        while True:
            yield "y" * 1000

    monkeypatch.setattr(module, "_documents_of", endless)
    monkeypatch.setattr(module, "MINIMUM_CHARACTERS", 5000)
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
    files = module._stdlib_files(source)
    parts = {part for path in files for part in path.parts[:-1]}
    assert len(files) > 300
    assert not parts & {"site-packages", "test", "tests"}
    assert len(module._stdlib_files(PythonStdlibSource(kind="python_stdlib", max_files=7))) == 7


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
