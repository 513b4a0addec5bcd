"""What the finished child says, beside its parent: greedy answers to the profile's prompts, and whether they loop.

KL and accuracies are means over tokens that the text gave. What a model says when each of its tokens is the next one's
context is another question: a child with a fair KL may say one sentence over and over. An answer loops when a run of
five words stands in it three times, or a run of tokens where the text is written without spaces, or when its end is one
run of tokens three times in a row.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from blocks.library import digest_of, keep, remember
from blocks.records import Answer, ParentInfo, Value
from profiles.schema import Chat, Evaluate
from tasks.evaluate.compare import Contender, build

VERSION = 1
RUN = 5  # words, or tokens, of a run
TIMES = 3  # that it stands in a looping answer
GRAM = 4  # tokens of the runs whose share of repeats is told
SPACED = 16  # characters a word, at most, of a text that is written with spaces
RUN_CHARACTERS = 8  # of a run of tokens, at least: one token of a byte is a third of a Chinese character


class Answers(Value):
    """The answers of one model, in the order of the prompts."""

    answers: tuple[Answer, ...]


def repetition(tokens: Sequence[int]) -> float:
    """Share of the runs of four tokens that were there before; 0 for fewer than four tokens."""
    runs = _runs(tokens, GRAM)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def loops(text: str, tokens: Sequence[int]) -> bool:
    """Whether an answer says the same over and over. A refrain that comes twice does not loop."""
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
        turns = [{"role": "user", "content": text}]
        try:
            rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except TemplateError:  # one that asks for more than a user's turn
            rendered = None
        if rendered is not None:
            return tokenizer(rendered, add_special_tokens=False)["input_ids"], True
    return tokenizer(text)["input_ids"], False


def greedy(model: Any, ids: Sequence[int], limit: int, stops: frozenset[int]) -> tuple[list[int], bool]:
    """The most likely token at a time, by the code that is exported: the new tokens, and whether one of `stops` came.

    No penalty on repeats and no sampling, whatever the parent's generation config asks for: they would hide a loop.
    """
    from transformers import GenerationConfig

    asked = GenerationConfig(
        max_new_tokens=limit, do_sample=False, eos_token_id=sorted(stops) or None, pad_token_id=min(stops, default=0)
    )
    model.generation_config = asked  # what `asked` leaves open, generate takes from there
    prompt = torch.tensor([list(ids)], device=next(model.parameters()).device)
    with torch.inference_mode():
        out = model.eval().generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=asked)
    tokens = out[0, len(ids) :].tolist()
    ended = bool(tokens) and tokens[-1] in stops
    return tokens[:-1] if ended else tokens, ended


def stop_tokens(folder: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: of generation_config.json, where the folder has one, else of the config; the
    tokenizer's own end of text.
    """
    from transformers import GenerationConfig

    written = (folder / "generation_config.json").is_file()
    asked = GenerationConfig.from_pretrained(folder).eos_token_id if written else None
    own = config.eos_token_id if asked is None else asked
    named = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return frozenset(token for token in named if token is not None)


def answers_path(which: Contender, parent: ParentInfo, settings: Evaluate) -> str:
    """Where a contender's answers lie, relative to the workspace."""
    asked = settings.model_dump(mode="json", include={"prompts", "answer_tokens"})
    return f"answers/{digest_of(model=which.key, parent=parent.fingerprint, asked=asked, v=VERSION)}.json"


def answers_of(which: Contender, parent: ParentInfo, settings: Evaluate, workspace: Path) -> Answers:
    """The answers of the parent or of a child, made or found."""
    from transformers import AutoTokenizer

    path = workspace / answers_path(which, parent, settings)
    stored = remember(path, Answers, lambda _: [], workspace)
    if stored is not None:
        return stored
    folder = workspace / parent.folder
    model, tokenizer = build(which, parent, workspace), AutoTokenizer.from_pretrained(folder)
    stops = stop_tokens(folder, model.config, tokenizer)
    found = Answers(answers=answer_all(model, tokenizer, settings, stops))
    keep(path, found, [], workspace)
    return found
