"""Answers offered to a question are judged as lm-eval judges them, with the question read once."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from blocks.export_code.families_decilm import FAMILIES
from tests.test_evaluate import byte_tokenizer
from tests.test_training import cases, child_of

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install -e '.[demo]'")

Asked = list[tuple[Any, list[int], list[int]]]


def requests(answers: list[tuple[int, ...]], vocabulary: int, longer: tuple[int, ...] = (0, 2, 4, 6, 8)) -> Asked:
    """For each question the answers of so many tokens, in any order. longer: the questions of 14 tokens; others: 9."""
    drawn = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [drawn.randrange(vocabulary) for _ in range(count)]

    asked: Asked = []
    for question, counts in enumerate(answers):
        context = tokens(14 if question in longer else 9)
        asked += [((str(question), str(place)), context, tokens(count)) for place, count in enumerate(counts)]
    drawn.shuffle(asked)
    return asked


def asked_of(kind: str, child: Any, folder: Path, asked: Asked) -> tuple[list[tuple[float, bool]], list[Any]]:
    """What one of the two models says, and the shapes of what it read."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from tasks.evaluate.shared_contexts import SharedContexts

    byte_tokenizer(folder)
    tokenizer, read = AutoTokenizer.from_pretrained(folder), list[Any]()
    hook = child.register_forward_pre_hook(
        lambda _, given, named: read.append(tuple((given[0] if given else named["input_ids"]).shape)), with_kwargs=True
    )
    if kind == "ours":
        model: Any = SharedContexts(child, tokenizer, 4)
    else:
        model = HFLM(pretrained=child, tokenizer=tokenizer, batch_size=4, softmax_dtype=torch.float32)
    found = model._loglikelihood_tokens(asked, True)
    hook.remove()
    return found, read


@cases
@torch.inference_mode()
def test_sums_are_those_of_lm_eval_in_the_order_asked(family: str, shape: str, tmp_path: Path) -> None:
    """Of questions of two lengths, one with a single answer, and one that is too long with its second answer."""
    child = child_of(family, shape)
    longest = child.config.max_position_embeddings
    answers = [(5, 1), (3, 2, 7, 4), (6, 6), (1, 1, 1), (2, 9), (4, 1, 3), (5,), (3, longest), (8, 2)]
    asked = requests(answers, child.config.vocab_size)
    (ours, _), (theirs, _) = (asked_of(kind, child, tmp_path, asked) for kind in ("ours", "lm-eval"))
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    torch.testing.assert_close(torch.tensor([one for one, _ in ours]), torch.tensor([one for one, _ in theirs]))


@torch.inference_mode()
def test_a_question_is_read_once_and_answers_by_length(tmp_path: Path) -> None:
    child = child_of("llama", "mixed")
    asked = requests([(5, 1, 3), (2, 4), (6, 6, 7), (3, 2), (1, 1)], child.config.vocab_size, longer=(0, 1, 2, 3))
    _, read = asked_of("ours", child, tmp_path, asked)
    # four questions, eight of their answers less the last token, the two longest; then the last question alone: answers
    # of one token are read off what it says
    assert read == [(4, 14), (8, 5), (2, 6), (1, 9)]


@torch.inference_mode()
def test_a_model_without_a_cache_is_left_to_lm_eval(tmp_path: Path) -> None:
    child = child_of("llama", "no attention")
    asked = requests([(5, 1, 3), (2, 4)], child.config.vocab_size)
    (ours, read), (theirs, known) = (asked_of(kind, child, tmp_path, asked) for kind in ("ours", "lm-eval"))
    assert ours == theirs and read == [(2, 14), *known]


@torch.inference_mode()
def test_a_text_whose_keys_are_rotated_anew_is_left_to_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = child_of("llama", "mixed")
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], restarts_at="rotated_anew_at"))
    child.config.rotated_anew_at = 20
    asked = requests([(5, 12), (2, 4)], child.config.vocab_size)  # 14 + 12 tokens, 9 + 4
    _, read = asked_of("ours", child, tmp_path, asked)
    assert read == [(1, 9), (2, 3), (2, 25)]
