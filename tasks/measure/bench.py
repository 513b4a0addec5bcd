"""`puzzle bench`: parent and child in turns under the same load, in one engine; a table and a picture.

Each model runs in a process of its own (tasks/engines/worker.py). A gain is the parent's time over the child's in the
same round, so that whatever else the machine does falls on both. CPU time is shown beside wall time for the same
reason. Memory is the highest that the process held, less what it held before the model was loaded.
"""

# B = batch, P = prompt tokens, G = generated tokens

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from blocks.disturbance import why_disturbed
from blocks.engine_limits import known_engine
from blocks.errors import PuzzleError
from blocks.families import head_dim
from blocks.parent import config_of
from blocks.records import Gains, Throughput, Value
from blocks.resources import BLOCK, BLOCK_BYTES
from profiles.schema import KV_PRECISIONS, Scenario
from tasks.engines.base import LoadOptions
from tasks.engines.registry import installed_engine
from tasks.engines.timing_in_turns import Unsure, in_turns, summaries, timed_steps, tokens_before
from tasks.engines.worker import Worker
from tasks.export.child_tokenizer import find_tokenizer
from tasks.export.formats import refuse, timed_precision
from tasks.gguf.header import read_header
from tasks.gguf.tokenizer_writer import NO_TOKENIZER, TokenizerLimit
from tasks.gguf.writer import write_gguf
from tasks.inputs.children import open_child, origin_of
from tasks.running.progress import Progress, no_progress, part_of
from tasks.running.usage import Others

CHILD = "child"
PLAIN = LoadOptions()
AGAIN = "Measure again when it is quiet, or with more --rounds"


class BenchRow(Value):
    """One model under one load in one engine. busy: which other programs computed meanwhile, "" for none. kv_precision:
    of the KV cache, "" where the engine keeps it as its weights.
    """

    model: str
    engine: str
    version: str
    precision: str
    threads: int
    batch_size: int
    prompt_tokens: int
    generated_tokens: int
    throughput: Throughput
    busy: str = ""
    kv_precision: str = ""

    @property
    def load(self) -> str:
        """The load as `Point.parse` reads it, such as `1x256x64`."""
        return f"{self.batch_size}x{self.prompt_tokens}x{self.generated_tokens}"

    @property
    def gains(self) -> Gains | None:
        """How many times as fast as the parent this model is; None for the parent itself."""
        return self.throughput.gains

    def cpu_speeds(self) -> tuple[float, float]:
        """Prefill and decode tokens per CPU-second."""
        prompt, speed = self.batch_size * self.prompt_tokens, self.throughput
        return prompt / speed.prefill_cpu_seconds.value, self.batch_size / speed.step_cpu_seconds.value


class Point(Value):
    """One load: batch x prompt x generated."""

    batch_size: int
    prompt_tokens: int
    generated_tokens: int

    @classmethod
    def parse(cls, text: str) -> "Point":
        """The load that a text such as `1x256x64` names. PuzzleError for a text that names none."""
        words = text.lower().split("x")
        if len(words) != 3 or not all(word.isdigit() and int(word) > 0 for word in words):
            raise PuzzleError(f"a load is batch x prompt x generated tokens, such as 1x256x64, not {text!r}.")
        batch, prompt, generated = map(int, words)
        return cls(batch_size=batch, prompt_tokens=prompt, generated_tokens=generated)

    @classmethod
    def of(cls, scenario: Scenario, batch: int) -> "Point":
        """The load of a scenario at a batch size."""
        tokens = {"prompt_tokens": scenario.prompt_tokens, "generated_tokens": scenario.generated_tokens}
        return cls(batch_size=batch, **tokens)

    @property
    def label(self) -> str:
        """The load as `parse` reads it, such as `1x256x64`."""
        return f"{self.batch_size}x{self.prompt_tokens}x{self.generated_tokens}"

    @property
    def steps(self) -> int:
        """How many decode steps are timed."""
        return timed_steps(self.generated_tokens)

    @property
    def grow(self) -> int:
        """How many tokens are generated, untimed, before the steps that are timed."""
        return tokens_before(self.generated_tokens, self.steps)

    @property
    def scenario(self) -> Scenario:
        """The load as a scenario of the profile's schema."""
        return Scenario(name="load", prompt_tokens=self.prompt_tokens, generated_tokens=self.generated_tokens)


def fitting(point: Point, sources: Iterable[Path]) -> Point:
    """The load, shortened in proportion to what the model with the shortest context can take."""
    asked = point.prompt_tokens + point.generated_tokens
    room = min([asked, *(context for context in map(_context_of, sources) if context is not None)])
    generated = max(1, point.generated_tokens * room // asked)
    return point.model_copy(update={"prompt_tokens": room - generated, "generated_tokens": generated})


def bench(
    sources: Mapping[str, Path],
    engine: str,
    points: Sequence[Point],
    how: LoadOptions = PLAIN,
    rounds: int = 5,
    progress: Progress = no_progress,
) -> list[BenchRow]:
    """Time every model under every load, in turns. Gains are over the model named `parent`.

    how: precisions and threads. Raises EngineMissing, EngineLimit for a child that the engine cannot run, PuzzleError
    for a load that is longer than the model's context, or a KV cache that the engine cannot hold.
    """
    if rounds < 1:
        raise PuzzleError(f"rounds must be at least 1, got {rounds}.")
    precision = timed_precision(how.precision, known_engine(engine).format)
    check_cache(how.kv_precision, engine, sources)
    rows, threads = [], how.threads
    with at_work(sources, engine, points, replace(how, precision=precision)) as workers:
        for index, point in enumerate(points):
            others = Others()
            found = time_in_turns(workers, point, point.scenario, rounds, part_of(progress, index, len(points)))
            base = {"engine": engine, "precision": precision, "threads": threads, **point.model_dump()}
            base |= {"kv_precision": how.kv_precision if engine in KV_PRECISIONS else "", "busy": others.crowd(threads)}
            rows += [
                BenchRow(**base, model=name, version=workers[name].version, throughput=own)
                for name, own in found.items()
            ]
    return rows


def doubts_of(rows: Sequence[BenchRow]) -> list[str]:
    """Why these speeds cannot be relied on, a sentence for each load; none where they can be."""
    loads: dict[str, list[BenchRow]] = {}
    for row in rows:
        loads.setdefault(row.load, []).append(row)
    found = {
        at: why_disturbed(own[0].busy, (e for row in own for e in row.throughput.errors)) for at, own in loads.items()
    }
    return [f"{at}: {why}. {AGAIN}" for at, why in found.items() if why]


@contextmanager
def at_work(
    sources: Mapping[str, Path], engine: str, points: Sequence[Point], how: LoadOptions
) -> Iterator[Mapping[str, Worker]]:
    """Every model loaded in a process of its own, with room for these loads. how: precisions and threads."""
    with ready(sources, engine, how.precision, points) as paths, ExitStack() as stack:
        how = replace(
            how,
            batch_size=max(point.batch_size for point in points),
            context_tokens=max(point.prompt_tokens + point.grow + point.steps for point in points),
        )
        processes = {name: installed_engine(engine).process(path, how) for name, path in paths.items()}
        workers = {name: stack.enter_context(Worker(process)) for name, process in processes.items()}
        for worker in workers.values():
            worker.load()
        yield workers


@contextmanager
def ready(
    sources: Mapping[str, Path], engine: str, precision: str, points: Sequence[Point]
) -> Iterator[dict[str, Path]]:
    """Paths of the models in the format that the engine loads. Models in another format are exported for the time
    being.
    """
    installed_engine(engine)
    form = known_engine(engine).format
    with tempfile.TemporaryDirectory(prefix="puzzle-bench-") as temporary:
        paths = {}
        for name, source in sources.items():
            _check_length(_context_of(source), name, points)
            if form != "gguf" or source.is_file():
                paths[name] = source
                continue
            model: Any = open_child(source)
            refuse(model.config, form)
            try:
                tokenizer, _ = find_tokenizer(source, model.config.vocab_size, origin_of(source), None)
            except TokenizerLimit:  # the load is token ids
                tokenizer = NO_TOKENIZER
            paths[name] = write_gguf(model, Path(temporary) / f"{name}.gguf", precision, tokenizer, name)
        yield paths


def check_cache(kv_precision: str, engine: str, sources: Mapping[str, Path]) -> None:
    """Raise PuzzleError for a type of number in which an engine cannot hold the KV cache of these models."""
    if kv_precision == LoadOptions.kv_precision:
        return
    known = KV_PRECISIONS.get(engine, ())
    if kv_precision not in known:
        held = f"one of {', '.join(known)}" if known else "for llama.cpp alone: leave it out"
        raise PuzzleError(f"--kv-precision {kv_precision}: with {engine} it is {held}.")
    for name, source in sources.items() if kv_precision in BLOCK_BYTES else ():
        channels = _head_of(source)
        if channels is not None and channels % BLOCK:
            raise PuzzleError(
                f"--kv-precision {kv_precision} holds whole blocks of {BLOCK} numbers, and a head of the {name} has "
                f"{channels} channels: name float16, bfloat16 or float32."
            )


def _head_of(source: Path) -> int | None:
    """Channels of a model's head; None for a GGUF file that does not say."""
    if source.is_dir():
        return head_dim(config_of(source))
    fields = read_header(source).fields
    return fields.get(f"{fields.get('general.architecture')}.attention.key_length")


def _context_of(source: Path) -> int | None:
    """The longest sequence that a model was made for, in tokens; None for a GGUF file that does not say."""
    if source.is_dir():
        return int(config_of(source).max_position_embeddings)
    fields = read_header(source).fields
    return fields.get(f"{fields.get('general.architecture')}.context_length")


def _check_length(context: int | None, name: str, points: Sequence[Point]) -> None:
    longest = max(point.prompt_tokens + point.generated_tokens for point in points)
    if context is not None and longest > context:
        raise PuzzleError(
            f"a load of {longest} tokens is longer than the {name}'s context of {context}: "
            "shorten prompt or generation."
        )


def time_in_turns(
    workers: Mapping[str, Worker],
    point: Point,
    scenario: Scenario,
    rounds: int,
    progress: Progress = no_progress,
    unsure: Unsure | None = None,
) -> dict[str, Throughput]:
    """Speed of every model under one load, by the name of the scenario. unsure: see `in_turns`."""
    shape = (point.batch_size, point.prompt_tokens)
    for worker in workers.values():
        worker.request(*shape, min(point.steps, 2), 0)  # warms caches up
    requests = {name: partial(worker.request, *shape, point.steps, 0, point.grow) for name, worker in workers.items()}
    turns = in_turns(requests, rounds, progress, unsure)
    memory = {name: worker.memory_bytes() for name, worker in workers.items()}
    return summaries(turns, scenario, point.batch_size, memory)
