"""Greedy answers of the finished child and its parent to the profile's prompts, and whether the answers loop.

KL and accuracy are measured on given text. They do not show what a model says when it reads its own words: a child with
a good KL may repeat one sentence for ever. An answer loops when the same five words occur in it three times, or the
same run of tokens in a text without spaces, or when it ends in one run of tokens three times in a row.
tasks/pages/report.py says how answers are shown, and how many of their characters on a terminal.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blocks.compute import Compute
from blocks.library import digest_of, made_once
from blocks.records import Answer, ParentInfo, Value
from profiles.schema import Chat, Evaluate
from tasks.evaluate.compare import Contender, served
from tasks.inputs.parent_answers import asked_in_chat

VERSION = 1
RUN = 5  # a run is so many words, or tokens
TIMES = 3  # an answer loops when a run occurs so many times
GRAM = 4  # length in tokens of the runs whose share of repeats is reported
SPACED = 16  # a text is written with spaces when its words have at most so many characters on average
RUN_CHARACTERS = 8  # a run of tokens has at least so many characters: a token may be a third of a Chinese character


class Answers(Value):
    """The answers of one model, in the order of the prompts."""

    answers: tuple[Answer, ...]


def repetition(tokens: Sequence[int]) -> float:
    """Share of the runs of four tokens that occurred earlier in the answer; 0 for fewer than four tokens."""
    runs = _runs(tokens, GRAM)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def loops(text: str, tokens: Sequence[int]) -> bool:
    """Whether an answer repeats itself three times or more. A refrain that occurs twice is no loop."""
    words = text.split()
    if _recurs(words, RUN) or _ends_in_a_loop(tokens):
        return True
    spaced = len(words) * SPACED >= len(text)
    return not spaced and _recurs(tokens, max(RUN, ceil(RUN_CHARACTERS * len(tokens) / len(text))))


def _runs(units: Sequence[Hashable], length: int) -> list[tuple[Hashable, ...]]:
    return [tuple(units[i : i + length]) for i in range(len(units) - length + 1)]


def _recurs(units: Sequence[Hashable], length: int) -> bool:
    return max(Counter(_runs(units, length)).values(), default=0) >= TIMES


def _ends_in_a_loop(tokens: Sequence[int]) -> bool:
    """Whether the last tokens are one run, three times in a row, of RUN x TIMES tokens or more."""
    for period in range(1, len(tokens) // TIMES + 1):
        last = tokens[-max(TIMES * period, RUN * TIMES) :]
        if len(last) >= RUN * TIMES and last[period:] == last[:-period]:
            return True
    return False


def answer_all(model: Any, tokenizer: Any, settings: Evaluate, stops: frozenset[int]) -> tuple[Answer, ...]:
    """Greedy answers to every prompt of the profile, each on its own. `stops`: tokens that end an answer."""
    found = []
    for prompt in settings.prompts:
        ids, chat = prompt_ids(tokenizer, prompt)
        tokens, ended = greedy(model, ids, settings.answer_tokens, stops)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        found.append(
            Answer(
                prompt=prompt.chat if isinstance(prompt, Chat) else prompt,
                chat=chat,
                text=text,
                tokens=len(tokens),
                ended=ended,
                repetition=repetition(tokens),
                loops=loops(text, tokens),
            )
        )
    return tuple(found)


def prompt_ids(tokenizer: Any, prompt: Chat | str) -> tuple[list[int], bool]:
    """Token ids of a prompt, and whether they are a chat. A tokenizer without a chat template reads a plain text."""
    text = prompt.chat if isinstance(prompt, Chat) else prompt
    if isinstance(prompt, Chat) and tokenizer.chat_template:
        written = asked_in_chat(tokenizer, text)
        if written is not None:
            return tokenizer(written, add_special_tokens=False)["input_ids"], True
    return tokenizer(text)["input_ids"], False


def greedy(model: Any, ids: Sequence[int], limit: int, stops: frozenset[int]) -> tuple[list[int], bool]:
    """The new tokens of `continued` for one prompt, and whether one of `stops` ended them."""
    (tokens,) = continued(model, torch.tensor([list(ids)]), limit, stops)
    return tokens, len(tokens) < limit


def continued(model: Any, prompts: Tensor, limit: int, stops: frozenset[int]) -> list[list[int]]:
    """The most likely token each time, for every prompt (P, T), until a token of `stops` or the limit.

    There is no penalty on repeats and no sampling, whatever the parent's generation config asks for: they would hide a
    loop. The model runs in the code that is exported with a child.
    """
    from transformers import GenerationConfig

    asked = GenerationConfig(
        max_new_tokens=limit, do_sample=False, eos_token_id=sorted(stops) or None, pad_token_id=min(stops, default=0)
    )
    model.generation_config = asked  # `generate` takes what its argument leaves open from here
    batch = prompts.to(next(model.parameters()).device)
    with torch.inference_mode():
        out = model.eval().generate(batch, attention_mask=torch.ones_like(batch), generation_config=asked)
    found = []
    for tokens in out[:, prompts.shape[1] :].tolist():
        end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
        found.append(tokens[:end])
    return found


def stop_tokens(folder: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: those of generation_config.json, or of the config where there is no such file, and the
    tokenizer's end of text.
    """
    from transformers import GenerationConfig

    written = (folder / "generation_config.json").is_file()
    asked = GenerationConfig.from_pretrained(folder).eos_token_id if written else None
    ends = config.eos_token_id if asked is None else asked
    named = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    return frozenset(token for token in named if token is not None)


def answers_path(which: Contender, parent: ParentInfo, settings: Evaluate) -> str:
    """The file of a contender's answers, relative to the workspace."""
    asked = settings.model_dump(mode="json", include={"prompts", "answer_tokens"})
    return f"answers/{digest_of(model=which.served_key, parent=parent.fingerprint, asked=asked, v=VERSION)}.json"


def answers_of(which: Contender, parent: ParentInfo, settings: Evaluate, workspace: Path, compute: Compute) -> Answers:
    """The answers of the parent or of a child; stored ones are read."""
    from transformers import AutoTokenizer

    def made() -> Answers:
        folder = workspace / parent.folder
        model, tokenizer = served(which, parent, workspace, compute), AutoTokenizer.from_pretrained(folder)
        stops = stop_tokens(folder, model.config, tokenizer)
        return Answers(answers=answer_all(model, tokenizer, settings, stops))

    return made_once(workspace / answers_path(which, parent, settings), Answers, workspace, made)
