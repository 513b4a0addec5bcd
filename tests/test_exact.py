"""Answers of a model's own against the known ones: what counts, what is asked, how two models are compared."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from blocks.compute import HOST
from blocks.estimates import rounded
from blocks.library import write_tensors
from blocks.records import ChildReport, CorpusInfo, LayerChoice, Metric, ParentInfo, RightAnswers
from profiles.load import load_profile
from profiles.schema import Corpus, Evaluate, NeedlesSource, Profile
from tasks.evaluate import exact
from tasks.evaluate.compare import Contender, contender, parent_contender
from tasks.inputs.corpus import prepare_corpus
from tasks.inputs.questions import needles
from tasks.operating.run_figures import report_metrics
from tasks.pages.report import comparison_rows
from tasks.pages.verdict import evidence, title, verdict
from tasks.planning.effort import QUESTION_TOKENS
from tests.chain import CORPUS, chosen, prepare
from tests.test_plan import chain_profile, planned, stage
from tests.test_report import report_of

SOURCE = NeedlesSource(kind="needles", documents=60, facts=6, distance=3)
LENGTH = 200
NEEDLES = {"sources": [SOURCE], "prompt_weight": 0, "sequence_length": LENGTH}
ASKED = Evaluate(answered_questions=8)
PARENT = parent_contender(chosen((LayerChoice(),) * 3))


@pytest.mark.parametrize(
    ("said", "known", "right"),
    [
        (" Chlorophyll.", "chlorophyll", True),
        (" the Pacific Ocean\nQuestion:", "Pacific ocean", True),
        (" a well-known (green) pigment", "well known green", True),
        (" A. Chlorophyll", "A", True),
        (" B. Chlorophyll", "A", False),
        (" -5 degrees", "5", False),
        (" 35", "3.5", False),
        (" 3.5, or so", "3.5", True),
        (" \u201cParis\u201d", "Paris", True),
        (" \u5317\u4eac\u3002", "\u5317\u4eac", True),
        (" Yes, it does", "yes", True),
        (" yesterday", "yes", False),
        (" not", "no", False),
        (" 12345\nThe code", "12345", True),
        (" 123456", "12345", False),
        (" 1234", "12345", False),
        (" green chlorophyll", "chlorophyll", False),
        (" chlorophyll", "green chlorophyll", False),
        ("", "no", False),
    ],
)
def test_an_answer_is_right_when_it_begins_with_the_known_words(said: str, known: str, right: bool) -> None:
    assert exact.is_right(said, known) == right


class Planted(torch.nn.Module):
    """It answers with what `say` makes of the prompt's text, and then goes on talking."""

    def __init__(self, tokenizer: Any, say: Callable[[str], str]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer, self.say, self.asked = tokenizer, say, list[str]()
        self.config = SimpleNamespace(eos_token_id=None)

    def generate(self, batch: torch.Tensor, generation_config: Any, **_: Any) -> torch.Tensor:
        rows = []
        for prompt in batch.tolist():
            self.asked.append(self.tokenizer.decode(prompt))
            said = self.tokenizer(self.say(self.asked[-1]) + "\nThe code of the", add_special_tokens=False)["input_ids"]
            rows.append([*prompt, *(said * 9)[: generation_config.max_new_tokens]])
        return torch.tensor(rows)


def told(prompt: str) -> str:
    """The code that is asked for at the end of a prompt, by the document that the prompt is cut from."""
    (document,) = [document for document in needles(SOURCE) if prompt in document]
    name = prompt.rpartition("code of the ")[2].partition("?")[0]
    code = re.findall(rf"The code of the {name} is (\d+)\.", document)[0]
    assert code in prompt  # nobody is asked for what is not told
    return f" {code}"


Text = tuple[Path, ParentInfo, CorpusInfo, Any]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    from transformers import AutoTokenizer

    workspace = tmp_path_factory.mktemp("exact")
    parent, _ = prepare(workspace)
    asked = Corpus.model_validate(NEEDLES | {"train_sequences": 4, "validation_sequences": 2, "test_sequences": 12})
    corpus = prepare_corpus(asked, workspace / parent.folder, parent.fingerprint, workspace)
    tokenizer = AutoTokenizer.from_pretrained(workspace / parent.folder)
    return workspace, parent, corpus.model_copy(update={"capability": "retrieval"}), tokenizer


def answered(text: Text, which: Contender, say: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> RightAnswers:
    workspace, parent, corpus, tokenizer = text
    monkeypatch.setattr(exact, "served", lambda *_: Planted(tokenizer, say))
    return exact.right_answers_of(which, (parent, corpus), ASKED, workspace, HOST)


def test_who_reads_the_code_is_always_right_and_is_asked_once(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    found = answered(text, PARENT, told, monkeypatch)
    assert len(found.right) == 8 and all(found.right)

    def nobody(*_: Any) -> None:
        raise AssertionError("the stored result was not read")

    monkeypatch.setattr(exact, "served", nobody)
    workspace, parent, corpus, _ = text
    assert exact.right_answers_of(PARENT, (parent, corpus), ASKED, workspace, HOST) == found


def test_who_makes_codes_up_is_never_right(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    child = contender("child", chosen((LayerChoice(ffn="no_op"),) * 3), [])
    found = answered(text, child, lambda prompt: told(prompt) + "0", monkeypatch)
    assert len(found.right) == 8 and not any(found.right)


def test_prompts_are_the_documents_until_whole_answers(text: Text) -> None:
    workspace, _, corpus, tokenizer = text
    documents = list(needles(SOURCE))
    found = exact.questions_of(corpus, tokenizer, workspace, 1000)
    for one in found:
        prompt = tokenizer.decode(list(one.prompt), skip_special_tokens=True)
        (whole,) = [document for document in documents if prompt in document]
        behind = whole.partition(prompt)[2]
        assert prompt.endswith("?\nAnswer:") and behind.startswith(f" {one.answer}\n"), (prompt[-60:], behind[:20])
        assert len(one.answer) == 5 and len(one.prompt) <= LENGTH
    distance = exact.distances_of(found, tokenizer)
    for one, far in zip(found, distance, strict=True):
        before, behind = (tokenizer.decode(list(part)) for part in (one.prompt[:-far], one.prompt[-far:]))
        assert one.answer in behind and one.answer not in behind[1:] and far > 2, before[-20:]
    few = exact.questions_of(corpus, tokenizer, workspace, 5)
    assert [found.index(one) for one in few] == [place * len(found) // 5 for place in range(5)]
    for batch in exact._batches(found):
        assert len({len(found[number].prompt) for number in batch}) == 1
    assert sorted(sum(exact._batches(found), [])) == list(range(len(found)))


def test_as_many_whole_documents_stand_before_as_there_is_room_for(text: Text) -> None:
    workspace, parent, _, tokenizer = text
    source = SOURCE.model_copy(update={"facts": 1})
    splits = {"train_sequences": 2, "validation_sequences": 1, "test_sequences": 8}
    asked = Corpus.model_validate(NEEDLES | splits | {"sources": [source]})
    corpus = prepare_corpus(asked, workspace / parent.folder, parent.fingerprint, workspace)
    found, documents = exact.questions_of(corpus, tokenizer, workspace, 1000), list(needles(source))
    assert [one.document for one in found] == list(range(len(found)))  # one of each; the last one may be cut
    assert len({len(one.prompt) for one in found}) > 2
    for number, one in enumerate(found):
        *others, own = tokenizer.decode(list(one.prompt)).split(tokenizer.eos_token)
        assert all(other in documents for other in others)
        assert f"{own} {one.answer}" in documents
        if number > len(others):
            left = found[number - len(others) - 1]
            whole = tokenizer(tokenizer.decode(list(left.prompt)).split(tokenizer.eos_token)[-1] + f" {left.answer}")
            assert len(one.prompt) + len(whole["input_ids"]) + 1 > LENGTH >= len(one.prompt)


def test_numbers_that_are_no_codes_are_all_asked(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, _, corpus, tokenizer = text
    codes = exact.questions_of(corpus, tokenizer, workspace, 1000)
    assert codes and all(one.is_code for one in codes)
    monkeypatch.setattr(exact, "DIGITS", 6)
    found = exact.questions_of(corpus, tokenizer, workspace, 1000)
    assert len(found) >= len(codes) and exact.distances_of(found, tokenizer) == ()


def test_what_is_no_question_is_not_asked(text: Text) -> None:
    """Documents made by hand, as (part, whether it is an answer)."""
    workspace, _, corpus, tokenizer = text
    documents = [
        [("45", True), ("\nQuestion: is it?\nAnswer:", False), (" yes", True)],
        [("45", True), ("\nIs it so?", False), (" No\n", True)],  # 45 is what was left of an answer
        [("What?", False), (" ...!", True)],  # no words
        [("What?", False), (" word" * 20, True)],  # prose
        [("What?", False), (" 17", True)],  # ends where the text ends, so it may be cut
    ]
    tokens, marks, starts = list[int](), list[float](), list[int]()
    for document in documents:
        starts.append(len(tokens))
        for part, answer in [*document, (tokenizer.eos_token, True)]:
            ids = tokenizer(part, add_special_tokens=False)["input_ids"]
            tokens, marks = tokens + ids, marks + [float(answer)] * len(ids)
    made = {"test": torch.tensor([tokens]), "test_weights": torch.tensor([[*marks[1:], 0.0]])}
    where = write_tensors(workspace, "by-hand.safetensors", made | {"test_starts": torch.tensor(starts)})
    changes = {"tokens": where, "test_sequences": 1, "sequence_length": len(tokens)}
    found = exact.questions_of(corpus.model_copy(update=changes), tokenizer, workspace, 9)
    assert [(one.answer, one.document) for one in found] == [("yes", 0), ("No", 1)]
    assert (
        tokenizer.decode(list(found[1].prompt))
        == f"45\nQuestion: is it?\nAnswer: yes{tokenizer.eos_token}45\nIs it so?"
    )
    assert exact.distances_of(found, tokenizer) == ()


def report_with(answers: dict[str, RightAnswers]) -> ChildReport:
    base = report_of()
    told_of = {"parent": "parent", "distilled": "child"}
    rows = (
        one.model_copy(update={"right_answers": {"retrieval": answers[told_of[one.stage]]}})
        if one.name in ("parent", "child") and one.stage in told_of
        else one
        for one in base.candidates
    )
    return base.model_copy(update={"candidates": tuple(rows)})


def clustered(parts: NDArray[np.float64]) -> float:
    """The standard error of a sum of parts that are 0 on average."""
    return float(np.sqrt(np.sum(np.square(parts)) * len(parts) / (len(parts) - 1)))


@pytest.mark.parametrize(("lost", "clear"), [((1, 1, 1, 1, 1, 0), True), ((0, 4, 0, 0, 0, 0), False)])
def test_parent_and_child_are_compared_question_by_question(lost: tuple[int, ...], clear: bool) -> None:
    documents = np.arange(24) // 4
    theirs = (np.arange(24) % 4 < np.array([4, 4, 2, 3, 4, 1])[documents]).astype(int)
    ours = theirs * (np.arange(24) % 4 >= np.array(lost)[documents])
    far = tuple([100, 200] * 11 + [128, 129])
    told_of = {
        name: RightAnswers(right=tuple(right.tolist()), documents=tuple(documents.tolist()), distances=far)
        for name, right in (("parent", theirs), ("child", ours))
    }
    report = report_with(told_of)
    by_document = ours.reshape(6, 4).sum(1) / 24, theirs.reshape(6, 4).sum(1) / 24
    share, theirs_share = ours.mean(), theirs.mean()
    lead = Metric(
        value=share - theirs_share, se=clustered(by_document[0] - by_document[1] - (share - theirs_share) / 6), n=6
    )
    kept = share / theirs_share
    line = next(line for line in evidence(report) if line.startswith("Answers on retrieval"))
    assert f"{100 * share:.1f} % of 24 questions right, the parent {100 * theirs_share:.1f} %: " in line
    assert f"{rounded(lead, 100)} points, question by question" in line
    assert ("within the error" in line) != clear
    assert ("answers fewer questions on retrieval right than its parent" in verdict(report)) == clear
    figures = report_metrics(report)
    assert figures["child_gkd/right_on_retrieval"] == pytest.approx(share)
    assert figures["parent/right_on_retrieval_se"] == pytest.approx(clustered(by_document[1] - theirs_share / 6))
    assert figures["child_gkd/right_on_retrieval_of_parent"] == pytest.approx(kept)
    error = clustered(by_document[0] - kept * by_document[1]) / theirs_share
    assert figures["child_gkd/right_on_retrieval_of_parent_se"] == pytest.approx(error)
    assert "parent/right_on_retrieval_of_parent" not in figures
    cells = {row.label: row.cells for row in comparison_rows(report)}
    both = (cells["right on retrieval, 1–128 back, %"], cells["right on retrieval, 129–256 back, %"])
    near = np.array(far) <= 128
    for row, group in zip(both, (near, ~near), strict=True):
        shown = [float(cell.split()[0]) for cell in (row[0], row[2])]
        assert shown == pytest.approx([100 * theirs[group].mean(), 100 * ours[group].mean()], abs=1)
        assert row[1] == "–"


@pytest.mark.parametrize(("right", "said"), [(9, "75.0 %, the child -50 "), (3, "25.0 %, the child ")])
def test_the_best_baseline_answers_too(right: int, said: str) -> None:
    of = {
        count: RightAnswers(right=(1,) * count + (0,) * (12 - count), documents=tuple(range(12)))
        for count in (3, right)
    }
    report = report_with({"parent": of[3], "child": of[3]})
    rival = next(one for one in report.candidates if one.name not in ("parent", "child"))
    heard = rival.model_copy(update={"right_answers": {"retrieval": of[right]}})
    rows = tuple(heard if one is rival else one for one in report.candidates)
    report = report.model_copy(update={"candidates": rows})
    line = next(line for line in evidence(report) if line.startswith("Answers on retrieval"))
    assert f"{title(rival)}: {said}" in line
    assert line.endswith("within the error.") == (right == 3)
    behind = f"answers fewer questions on retrieval right than {title(rival)}" in verdict(report)
    assert behind == (right == 9)


def test_a_text_without_short_answers_is_told() -> None:
    nothing = RightAnswers(right=(), documents=())
    report = report_with({"parent": nothing, "child": nothing})
    assert any("marks no short answer, so nobody was asked" in line for line in evidence(report))
    assert not any("right on" in row.label for row in comparison_rows(report))
    wrong = RightAnswers(right=(0, 0), documents=(0, 1))
    lines = evidence(report_with({"parent": wrong, "child": wrong}))
    assert any("nobody answers any of 2 questions right" in line for line in lines)


def test_the_profile_asks_only_where_answers_are_marked() -> None:
    tree = load_profile("tiny").model_dump(mode="json") | {"evaluate": {"answered_questions": 5}}
    text = {"sources": [{"kind": "python_stdlib"}]}
    written = {"sources": [{"kind": "parent_answers", "prompts": {"kind": "passages"}}], "prompt_weight": 0}
    for capabilities in ({}, {"code": text}, {"own": written}):
        with pytest.raises(ValidationError, match="no capability marks known answers"):
            Profile.model_validate(tree | {"capabilities": capabilities})
    both = Profile.model_validate(tree | {"capabilities": {"code": text, "retrieval": NEEDLES}})
    assert list(both.answered) == ["retrieval"]


def test_the_plan_counts_what_is_read_and_said() -> None:
    own = {"code": {"sources": CORPUS.sources}, "retrieval": NEEDLES}
    asked = planned(chain_profile(capabilities=own, evaluate=Evaluate(sequences=8, answered_questions=10)))
    silent = planned(chain_profile(capabilities=own))
    found = stage(asked, "questions")
    assert found.tasks == 3 and found.tokens == 3 * 10 * (LENGTH * 3 // 4 + QUESTION_TOKENS) and found.seconds > 0
    assert "questions" not in [one.name for one in silent.stages]
