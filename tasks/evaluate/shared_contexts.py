"""lm-eval's model for Hugging Face models, reading a question once for all the answers that it offers.

lm-eval reads the question again with every answer: of the five benchmarks here half of all tokens are read for nothing.
This module imports lm-eval, which is optional: import it only where benchmarks run.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blocks.export_code.families_decilm import FAMILIES
from tasks.running.progress import Progress, no_progress

ANSWERS = 2  # times as many answers as questions go through the model together: they are shorter
Request = tuple[Any, list[int], list[int]]  # whatever lm-eval notes, tokens of the question, tokens of the answer


class SharedContexts(HFLM):
    """Sums of log-probabilities as lm-eval's own model gives them with a softmax in float32, up to rounding.

    A question with one answer, one that is too long to be read whole or for its keys to be read again, and all
    questions of a model that keeps no cache are left to lm-eval.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, progress: Progress = no_progress) -> None:
        self.progress = progress
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype=torch.float32)
        field = FAMILIES[model.config.base_model_type].restarts_at  # longer texts rotate all their keys otherwise
        self.longest = min(self.max_length, getattr(model.config, field) if field else self.max_length)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        for batch in self._batches(requests):
            answered = self._answered([[requests[place][1:] for place in places] for places in batch])
            if answered is None:
                break
            found |= dict(zip((place for places in batch for place in places), answered, strict=True))
            self.progress(len(found), len(requests), f"{len(found)} of {len(requests)} answers read")
        left = [place for place in range(len(requests)) if place not in found]
        others = super()._loglikelihood_tokens([requests[place] for place in left], disable_tqdm, override_bs)
        found |= dict(zip(left, others, strict=True))
        return [found[place] for place in range(len(requests))]

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[list[int]]]:
        """Places of the requests of each question, for `batch_size` questions at a time.

        The longest with their longest answer come first: those of a batch are about as long, so little is padded, and
        what memory does not hold fails at the start.
        """
        questions: dict[tuple[int, ...], list[int]] = {}
        for place, (_, context, _) in enumerate(requests):
            questions.setdefault(tuple(context), []).append(place)
        lengths = [
            (len(question) + max(len(requests[place][2]) for place in places), places)
            for question, places in questions.items()
            if len(places) > 1
        ]
        shared = [one for one in lengths if one[0] <= self.longest]
        longest_first = [places for _, places in sorted(shared, key=lambda one: -one[0])]
        for start in range(0, len(longest_first), self.batch_size):
            yield longest_first[start : start + self.batch_size]

    def _answered(self, questions: Sequence[Sequence[tuple[list[int], list[int]]]]) -> list[tuple[float, bool]] | None:
        """Each answer's log-probability and whether it is the greedy one; None when the model keeps no cache.

        questions: the pairs of a question and an answer, by question.
        """
        texts = [torch.tensor(pairs[0][0], device=self.device) for pairs in questions]
        read = pad_sequence(texts, batch_first=True, padding_side="left")  # so that the answers follow at once
        valid = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True, padding_side="left")
        out = self.model(read, use_cache=True, logits_to_keep=1, **_places(valid, read))
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            return None
        answers = [torch.tensor(answer, device=self.device) for pairs in questions for _, answer in pairs]
        asked = [row for row, pairs in enumerate(questions) for _ in pairs]
        found: dict[int, tuple[float, bool]] = {}
        by_length = sorted(range(len(answers)), key=lambda place: len(answers[place]))
        for start in range(0, len(by_length), ANSWERS * self.batch_size):
            places = by_length[start : start + ANSWERS * self.batch_size]
            rows = torch.tensor([asked[place] for place in places], device=self.device)
            told = pad_sequence([answers[place] for place in places], batch_first=True)
            logits = out.logits[rows, -1:]
            if told.shape[1] > 1:
                given, held = told[:, :-1], deepcopy(cache)  # what is padded here comes last: nothing is read of it
                held.reorder_cache(rows)
                now = torch.cat([valid[rows], torch.ones_like(given)], 1)
                more = self.model(given, past_key_values=held, use_cache=True, **_places(now, given))
                logits = torch.cat([logits, more.logits], 1)
            for place, row in zip(places, logits, strict=True):
                answer = answers[place]
                logs = row[: len(answer)].float().log_softmax(-1)
                picked = logs.gather(1, answer[:, None]).sum()
                found[place] = float(picked), bool((logs.argmax(-1) == answer).all())
        return [found[place] for place in range(len(answers))]


def _places(valid: Tensor, read: Tensor) -> dict[str, Tensor]:
    """What a model is told of the tokens (B, T) that it reads now. valid: (B, all tokens until the last of them), 0
    for padding.
    """
    return {"attention_mask": valid, "position_ids": (valid.cumsum(1) - 1).clamp(min=0)[:, -read.shape[1] :]}
