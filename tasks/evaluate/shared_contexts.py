"""lm-eval's model for Hugging Face models, reading a question once for all the answers that it offers.

lm-eval reads the question again with every answer: of the five benchmarks here half of all tokens are read for nothing.
This module imports lm-eval, which is optional: import it only where benchmarks run.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch.nn.utils.rnn import pad_sequence

Request = tuple[Any, list[int], list[int]]  # whatever lm-eval notes, tokens of the question, tokens of the answer


class SharedContexts(HFLM):
    """Sums of log-probabilities as lm-eval's own model gives them, up to the order of the sums.

    A question with one answer, one that is too long to be read whole, and all questions of a model that keeps no cache
    are left to lm-eval.
    """

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        for batch in self._batches(requests):
            answered = self._answered([[requests[place][1:] for place in places] for places in batch])
            if answered is None:
                break
            found |= dict(zip((place for places in batch for place in places), answered, strict=True))
        left = [place for place in range(len(requests)) if place not in found]
        others = super()._loglikelihood_tokens([requests[place] for place in left], disable_tqdm, override_bs)
        found |= dict(zip(left, others, strict=True))
        return [found[place] for place in range(len(requests))]

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[list[int]]]:
        """Places of the requests of each question, for a few questions of one length at a time: they need no padding.

        As many questions as have `batch_size` answers in all, longest first, so that what memory does not hold fails
        at the start.
        """
        questions: dict[tuple[int, ...], list[int]] = {}
        for place, (_, context, _) in enumerate(requests):
            questions.setdefault(tuple(context), []).append(place)
        shared = [
            (question, places)
            for question, places in questions.items()
            if len(places) > 1 and len(question) + max(len(requests[place][2]) for place in places) <= self.max_length
        ]
        batch: list[list[int]] = []
        length = 0
        for question, places in sorted(shared, key=lambda one: -len(one[0])):
            if batch and (len(question) != length or sum(map(len, batch)) + len(places) > self.batch_size):
                yield batch
                batch = []
            batch.append(places)
            length = len(question)
        if batch:
            yield batch

    def _answered(self, questions: Sequence[Sequence[tuple[list[int], list[int]]]]) -> list[tuple[float, bool]] | None:
        """Each answer's log-probability and whether it is the greedy one; None when the model keeps no cache.

        questions: the pairs of a question and an answer, by question; all questions have one length.
        """
        read = torch.tensor([pairs[0][0] for pairs in questions], device=self.device)
        out = self.model(read, use_cache=True, logits_to_keep=1)
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            return None
        answers = [torch.tensor(answer, device=self.device) for pairs in questions for _, answer in pairs]
        counts = torch.tensor([len(pairs) for pairs in questions], device=self.device)
        rows = torch.arange(len(questions), device=self.device).repeat_interleave(counts)
        logits = out.logits[rows, -1:]
        told = pad_sequence(answers, batch_first=True)
        if told.shape[1] > 1:
            cache.reorder_cache(rows)
            more = self.model(told[:, :-1], past_key_values=cache, use_cache=True)  # what is padded comes last
            logits = torch.cat([logits, more.logits], 1)
        found = []
        for answer, row in zip(answers, logits, strict=True):
            logs = row[: len(answer)].float().log_softmax(-1)
            picked = logs.gather(1, answer[:, None]).sum()
            found.append((float(picked), bool((logs.argmax(-1) == answer).all())))
        return found
