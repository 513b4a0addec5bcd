"""Answers offered to a question are judged as lm-eval judges them, with the question read once."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_evaluate import byte_tokenizer
from tests.test_training import cases, child_of

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install -e '.[demo]'")

Asked = list[tuple[Any, list[int], list[int]]]


def requests(vocabulary: int, longest: int) -> Asked:
    """Six questions of two lengths with two to four answers of unequal lengths, one that has one answer, one that is
    too long with its second answer; in any order.
    """
    drawn = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [drawn.randrange(vocabulary) for _ in range(count)]

    asked: Asked = []
    for question, answers in enumerate(
        [(5, 1), (3, 2, 7, 4), (6, 6), (1, 1, 1), (2, 9), (4, 1, 3), (5,), (3, longest)]
    ):
        context = tokens(9 if question % 2 else 14)
        asked += [((str(question), str(place)), context, tokens(count)) for place, count in enumerate(answers)]
    drawn.shuffle(asked)
    return asked


@cases
@torch.inference_mode()
def test_sums_are_those_of_lm_eval_in_the_order_asked(family: str, shape: str, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from tasks.evaluate.shared_contexts import SharedContexts

    byte_tokenizer(tmp_path)
    child, tokenizer = child_of(family, shape), AutoTokenizer.from_pretrained(tmp_path)
    asked = requests(child.config.vocab_size, child.config.max_position_embeddings)
    found: list[tuple[float, bool]] = []
    known: list[tuple[float, bool]] = []
    tokens = []
    for sums, kind in ((known, HFLM), (found, SharedContexts)):
        read: list[int] = []
        hook = child.register_forward_pre_hook(
            lambda _, given, named, read=read: read.append((given[0] if given else named["input_ids"]).numel()),
            with_kwargs=True,
        )
        sums += kind(pretrained=child, tokenizer=tokenizer, batch_size=6)._loglikelihood_tokens(asked, True)
        hook.remove()
        tokens.append(sum(read))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in known]
    torch.testing.assert_close(torch.tensor([one for one, _ in found]), torch.tensor([one for one, _ in known]))
    if shape == "no attention":  # it keeps no cache, as the first question shows
        assert tokens[0] < tokens[1] <= 1.1 * tokens[0]
    else:
        assert tokens[1] < 0.75 * tokens[0]
