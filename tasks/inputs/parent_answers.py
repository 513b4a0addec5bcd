"""The parent's own answers as a source of a corpus: it answers the prompts of another source, once.

An instruct parent is distilled best on text as it writes it. The answers lie in the workspace as chats, a line for each
prompt, and are read like any other jsonl file. Prompts are answered in batches, and each batch has its own seed: so a
killed run goes on behind the last whole batch, and ends in the same file.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blocks.compute import Compute
from blocks.errors import CorpusError
from blocks.library import digest_of
from blocks.records import ParentInfo
from profiles.schema import Corpus, ParentAnswersSource, TextSource
from tasks.inputs.chats import Conversation, Message, Unusable, template_of
from tasks.inputs.corpus_sources import content_of, documents_of_source, name_of, pinned
from tasks.inputs.text_files import CHUNK, Tally, skipped
from tasks.running.progress import Progress, no_progress, say

VERSION = 1
ANSWERED = "answers-"
PIECE = 32  # tokens, after which answers that have ended leave the batch


def with_answers(
    corpus: Corpus, parent: ParentInfo, workspace: Path, compute: Compute, progress: Progress = no_progress
) -> Corpus:
    """The corpus with files in the place of sources of kind parent_answers. What is not there yet is answered now.

    Raises CorpusError.
    """
    found = []
    for source in corpus.sources:
        if isinstance(source, ParentAnswersSource):
            path = _written(source, parent, workspace, compute, progress)
            source = TextSource(kind="jsonl", path=str(path), text_field="messages", weight=source.weight)
        found.append(source)
    return corpus.model_copy(update={"sources": tuple(found)})


def prompts_of(
    source: ParentAnswersSource, check: Callable[[Sequence[Message]], object], tallies: list[Tally]
) -> Iterator[list[Message]]:
    """What is said before the assistant says something, chat by chat; a text is what a user says, up to its answer.

    check: raises Unusable for a prompt that cannot be asked. Those are counted in `tallies`, with what cannot be read.
    """

    def prompt(messages: Sequence[Message]) -> str:
        first = next((n for n, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
        if not first:
            raise Unusable("begins with the assistant, so nothing is asked")
        check(messages[:first])
        return _Prompt(json.dumps([dict(message) for message in messages[:first]]))

    for asked in documents_of_source(source.prompts, prompt, tallies, CHUNK):
        if isinstance(asked, _Prompt):
            yield json.loads(asked)
        elif isinstance(asked, str):
            text = asked[: asked.answers[0][0]].strip() if isinstance(asked, Conversation) else asked
            said: list[Message] = [{"role": "user", "content": text}]
            try:
                check(said)
            except Unusable as reason:
                tallies[-1].skip(tallies[-1].read, str(reason))
            else:
                yield said
        else:
            raise CorpusError(f"{name_of(source.prompts)} holds token ids: prompts are text or chats.")


class _Prompt(str):
    """Messages as JSON."""


def _written(
    source: ParentAnswersSource, parent: ParentInfo, workspace: Path, compute: Compute, progress: Progress
) -> Path:
    asked = source.model_copy(update={"prompts": pinned(source.prompts)})
    settings = asked.model_dump(mode="json", exclude={"weight": True, "batch_prompts": True, "prompts": {"path"}})
    content, products, size = content_of(asked.prompts), str(compute.dtype), asked.batch_prompts
    key = digest_of(
        settings=settings, content=content, parent=parent.fingerprint, products=products, batch=size, version=VERSION
    )
    path = workspace / "corpus" / f"{ANSWERED}{key}.jsonl"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = _opened(workspace / parent.folder, compute)
    tallies: list[Tally] = []
    prompts = list(islice(prompts_of(asked, _asker(model, tokenizer, asked), tallies), asked.answers))
    for note in skipped(tallies, name_of(asked.prompts)):
        say(f"corpus: {note}")
    if not prompts:
        raise CorpusError(f"{name_of(asked.prompts)} holds no prompt that can be answered: name another source.")
    if len(prompts) < asked.answers:
        say(f"corpus: {name_of(asked.prompts)} holds {len(prompts):,} prompts, {asked.answers:,} were to be answered")
    part = path.with_suffix(".part")
    done = _whole_batches(part, size)
    with part.open("a", encoding="utf-8") as file:
        for first in range(done * size, len(prompts), size):
            batch = prompts[first : first + size]
            answers = answer_batch(model, tokenizer, batch, asked, first // size)
            chats = [
                None if answer is None else [*prompt, {"role": "assistant", "content": answer}]
                for prompt, answer in zip(batch, answers, strict=True)
            ]
            file.write("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
            file.flush()
            progress(first + len(batch), len(prompts), "prompts answered")
    _check(part, len(prompts), asked)
    part.rename(path)
    return path


def _whole_batches(part: Path, size: int) -> int:
    """How many batches a killed run has answered; what is behind them is cut off."""
    lines = part.read_bytes().split(b"\n")[:-1] if part.exists() else []
    whole = len(lines) // size
    if part.exists():
        part.write_bytes(b"".join(line + b"\n" for line in lines[: whole * size]))
    return whole


def _check(part: Path, count: int, asked: ParentAnswersSource) -> None:
    left_out = sum(json.loads(line)["messages"] is None for line in part.read_text(encoding="utf-8").splitlines())
    if left_out:
        say(
            f"corpus: {left_out:,} of {count:,} answers are left out: without an end after "
            f"{asked.answer_tokens} tokens, or without words"
        )
    if left_out == count:
        part.unlink()
        raise CorpusError(
            f"no answer of the parent ended within {asked.answer_tokens} tokens: raise answer_tokens, or take a parent "
            "that was tuned on chats."
        )


def _opened(folder: Path, compute: Compute) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), padding_side="left")
    if not tokenizer.chat_template:
        raise CorpusError(
            "the corpus asks for the parent's own answers, but its tokenizer has no chat template: take a parent that "
            "was tuned on chats, or leave the source out."
        )
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=compute.dtype, attn_implementation=compute.attention
    )
    return model.eval().to(compute.device), tokenizer


def _asker(model: Any, tokenizer: Any, asked: ParentAnswersSource) -> Callable[[Sequence[Message]], object]:
    """What raises Unusable for a prompt that the chat template refuses, or behind which the context ends too early."""
    write, room = template_of(tokenizer), max(0, model.config.max_position_embeddings - asked.answer_tokens)

    def check(prompt: Sequence[Message]) -> None:
        tokens = len(tokenizer(write(prompt, True), add_special_tokens=False, verbose=False)["input_ids"])
        if tokens > room:
            raise Unusable(
                f"asks in {tokens:,} tokens, and the parent's context has {room:,} before {asked.answer_tokens:,} of "
                "an answer"
            )

    return check


def asked_in_chat(tokenizer: Any, text: str) -> str | None:
    """A user's message as the chat template writes it, up to the answer; None for a template that needs more."""
    with suppress(Unusable):
        return str(template_of(tokenizer)([{"role": "user", "content": text}], True))
    return None


def answer_batch(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[Message]], asked: ParentAnswersSource, number: int
) -> list[str | None]:
    """The answers to some prompts; None for one that has no end, or no words."""
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id
    stops = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    sampled = {"temperature": asked.temperature, "top_p": asked.top_p, "top_k": 0} if asked.temperature else {}
    how = GenerationConfig(
        max_new_tokens=asked.answer_tokens,
        do_sample=bool(sampled),
        eos_token_id=sorted(stops),
        pad_token_id=min(stops),
        return_dict_in_generate=True,
        use_cache=True,
        **sampled,
    )
    write = template_of(tokenizer)  # as the corpus writes chats: always on the same day
    texts = [write(prompt, True) for prompt in prompts]
    tokenizer.pad_token_id = min(stops)
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(model.device)
    own = [model.device] if model.device.type == "cuda" else []
    found: list[str | None] = [None] * len(prompts)
    with torch.random.fork_rng(devices=own), torch.inference_mode():
        torch.manual_seed(asked.seed + number)
        for place, said in _said(model, batch["input_ids"], batch["attention_mask"], how, stops):
            found[place] = tokenizer.decode(said, skip_special_tokens=True).strip() or None
    return found


def _said(model: Any, ids: Tensor, mask: Tensor, how: Any, stops: set[int]) -> Iterator[tuple[int, list[int]]]:
    """What the model says behind ids (P, T), by row: the tokens before the first of `stops`. A row without one by
    `how.max_new_tokens` is left out.

    Every few tokens, rows that have ended leave the batch, so that the others go on alone.
    """
    rows, start, cache, limit = torch.arange(len(ids)), ids.shape[1], None, how.max_new_tokens
    for done in range(0, limit, PIECE):
        how.max_new_tokens = min(PIECE, limit - done)
        with warnings.catch_warnings():  # late versions of transformers 5 call it `cache`, and know this name too
            warnings.simplefilter("ignore", FutureWarning)
            out = model.generate(ids, attention_mask=mask, generation_config=how, past_key_values=cache)
        answers = out.sequences[:, start:].tolist()
        ends = [_end(said, stops) for said in answers]
        for row, end, said in zip(rows.tolist(), ends, answers, strict=True):
            if end is not None:
                yield row, said[:end]
        left = torch.tensor([place for place, end in enumerate(ends) if end is None], dtype=torch.long)
        if not len(left):
            return
        rows, left, cache = rows[left], left.to(ids.device), out.past_key_values
        cache.batch_select_indices(left)
        ids = out.sequences[left]
        mask = torch.nn.functional.pad(mask[left], (0, ids.shape[1] - mask.shape[1]), value=1)


def _end(said: Sequence[int], stops: set[int]) -> int | None:
    """The place of the first of `stops`."""
    return next((place for place, token in enumerate(said) if token in stops), None)
