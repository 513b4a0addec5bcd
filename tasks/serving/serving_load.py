"""`puzzle bench --server`: an OpenAI-style load on servers of parent and child, in turns.

A request asks for an exact number of tokens (`ignore_eos`), and the answer's own usage has to say so: a child that
stops early would look faster. Prompts are random token ids, new in every round, the same for every model. A request
that failed, or was short, stays in every denominator: it counts as no token, and as infinitely late in the percentiles.
"""

import asyncio
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from blocks.errors import PuzzleError, PuzzleFailure
from blocks.records import Metric, Value
from tasks.engines.base import Load
from tasks.engines.limits import limits_of
from tasks.engines.openai_server import SERVERS, Served, serving
from tasks.serving.bench import CHILD, Point, ready
from tasks.serving.children import config_of, open_child
from tasks.serving.formats import precision_of
from tasks.throughput import PARENT, median_metric

TIMEOUT_SECONDS = 300.0
SPARE_TOKENS = 16  # a server may add tokens of its own to a prompt
Tell = Callable[[int, int], None]


class Request(Value):
    """One request. Seconds from its start to the first and the last token; `error` says why it does not count."""

    first: float = math.inf
    last: float = math.inf
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    def per_token(self) -> float:
        """Seconds between output tokens."""
        return math.inf if self.error else (self.last - self.first) / max(1, self.output_tokens - 1)


class LoadTurn(Value):
    """One model's turn: all its requests, wall seconds, CPU seconds of the server where it is ours."""

    requests: tuple[Request, ...]
    seconds: float
    cpu_seconds: float | None

    def failed(self) -> int:
        """Requests that do not count."""
        return sum(bool(request.error) for request in self.requests)

    def tokens_per_second(self) -> float:
        """Output tokens of the requests that count, over the whole turn."""
        return sum(request.output_tokens for request in self.requests if not request.error) / self.seconds

    def quantile(self, seconds: Callable[[Request], float], share: float) -> float:
        """Nearest rank over all requests; infinite where a failed one stands there."""
        return quantile([seconds(request) for request in self.requests], share)


class LoadGains(Value):
    """Parent's time over the model's, paired by round: above 1 is faster. CPU: of the servers' processes. None where
    there is nothing to divide by: answers of one token, or of one piece; CPU time below the tick of its clock.
    """

    throughput: Metric
    first_token: Metric
    output_token: Metric | None
    cpu: Metric | None


class LoadRow(Value):
    """One model's server under one load. Milliseconds are None where failed requests stand at that percentile."""

    model: str
    load: str
    requests: int
    failed: int
    errors: tuple[str, ...]
    requests_per_second: Metric
    tokens_per_second: Metric
    request_efficiency: float
    first_token_ms: tuple[float | None, float | None]
    output_token_ms: tuple[float | None, float | None]
    memory_bytes: int | None
    gains: LoadGains | None


def quantile(values: Sequence[float], share: float) -> float:
    """Nearest-rank quantile."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """What is put under load: servers that are started here (`server`), or that run already (`urls`)."""

    server: str | None = None
    urls: tuple[str, ...] = ()
    points: tuple[Point, ...]
    precision: str = "float32"
    rounds: int = 5
    threads: int = 1
    requests: int = 8


def bench_servers(sources: Mapping[str, Path], plan: LoadPlan, tell: Tell = lambda done, total: None) -> list[LoadRow]:
    """Parent and child under the same loads, in turns. `sources` has the child, for its vocabulary, and what is served.

    Raises PuzzleError for a server that cannot be started, PuzzleFailure for one that does not answer.
    """
    if plan.server is not None and plan.urls:
        raise PuzzleError("--server starts servers, --url names running ones: give one of the two.")
    child = sources[CHILD]
    config: Any = config_of(child) if child.is_dir() else open_child(child).config
    with ExitStack() as stack:
        servers = (
            named_servers(plan.urls)
            if plan.server is None
            else stack.enter_context(served_models(sources, plan.server, plan.points, plan.precision, plan.threads))
        )
        return load_test(servers, plan.points, config.vocab_size, plan.requests, plan.rounds, tell)


@contextmanager
def served_models(
    sources: Mapping[str, Path], server: str, points: Sequence[Point], precision: str, threads: int
) -> Iterator[dict[str, Served]]:
    """Every model on a server of its own for the length of the block, exported first where that is needed."""
    if server not in SERVERS:
        raise PuzzleError(
            f"no server {server!r} can be started from here, only {', '.join(SERVERS)}: start another one yourself "
            "and name it with --url."
        )
    precision = precision_of(precision, limits_of(server).format)
    how = Load(
        precision=precision,
        threads=threads,
        batch_size=max(point.batch_size for point in points),
        context_tokens=max(point.prompt_tokens + point.generated_tokens for point in points) + SPARE_TOKENS,
    )
    with (
        ready(sources, server, precision, points) as paths,
        tempfile.TemporaryDirectory(prefix="puzzle-servers-") as logs,
        ExitStack() as stack,
    ):
        yield {
            name: stack.enter_context(serving(server, path, how, Path(logs) / f"{name}.log"))
            for name, path in paths.items()
        }


def named_servers(urls: Sequence[str]) -> dict[str, Served]:
    """Servers that run already: the child's alone, or parent's then child's."""
    if len(urls) not in (1, 2) or not all(url.startswith(("http://", "https://")) for url in urls):
        raise PuzzleError(
            "--url is http://HOST:PORT of the child's server, or given twice: the parent's, then the child's."
        )
    return dict(zip((PARENT, CHILD)[-len(urls) :], (Served(url=url) for url in urls), strict=True))


def load_test(
    servers: Mapping[str, Served],
    points: Sequence[Point],
    vocab_size: int,
    requests: int,
    rounds: int,
    tell: Tell = lambda done, total: None,
) -> list[LoadRow]:
    """Every server under every load, in turns; the one named `parent` is what gains are counted from.

    A point's batch size is the number of requests under way. PuzzleFailure when none of a server's requests succeeds.
    """
    order, rows, total = list(servers), [], len(points) * rounds * len(servers)
    done = 0
    for point in points:
        turns: dict[str, list[LoadTurn]] = {name: [] for name in order}
        for name in order:
            _warm(name, servers[name], point, vocab_size)
        for number in range(rounds):
            for name in reversed(order) if number % 2 else order:
                turns[name].append(one_turn(servers[name], point, prompts_of(point, vocab_size, requests, number)))
                done += 1
                tell(done, total)
        rows += [row_of(name, point, turns, servers[name].peak_bytes()) for name in order]
    return rows


def _warm(name: str, server: Served, point: Point, vocab_size: int) -> None:
    """One untimed turn; a server that answers nothing is told here."""
    turn = one_turn(server, point, prompts_of(point, vocab_size, point.batch_size, -1))
    if turn.failed() == len(turn.requests):
        raise PuzzleFailure(
            f"the {name}'s server at {server.url} answered no request as asked: {turn.requests[0].error}."
        )


def prompts_of(point: Point, vocab_size: int, requests: int, number: int) -> list[list[int]]:
    """Random prompts of one round: the same for every model, no two alike."""
    source = random.Random(f"{point.label} {number}")
    return [[source.randrange(vocab_size) for _ in range(point.prompt_tokens)] for _ in range(requests)]


def one_turn(server: Served, point: Point, prompts: Sequence[Sequence[int]]) -> LoadTurn:
    """Send all prompts, `point.batch_size` at a time."""
    cpu, started = server.cpu_seconds(), time.perf_counter()
    found = asyncio.run(_all(server.url, point, prompts))
    seconds, after = time.perf_counter() - started, server.cpu_seconds()
    used = None if cpu is None or after is None else after - cpu
    return LoadTurn(requests=tuple(found), seconds=seconds, cpu_seconds=used)


async def _all(url: str, point: Point, prompts: Sequence[Sequence[int]]) -> list[Request]:
    free = asyncio.Semaphore(point.batch_size)
    key = os.environ.get("OPENAI_API_KEY")  # goes into the header, nowhere else
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # a connection each: llama.cpp's server closes idle ones, and a request that meets that fails
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    base = url.rstrip("/").removesuffix("/v1")
    async with httpx.AsyncClient(base_url=base, headers=headers, timeout=TIMEOUT_SECONDS, limits=limits) as client:
        model = await _model_of(client)

        async def one(prompt: Sequence[int]) -> Request:
            async with free:
                return await _one(client, model, prompt, point.generated_tokens)

        return list(await asyncio.gather(*map(one, prompts)))


async def _model_of(client: httpx.AsyncClient) -> str:
    """The first model that a server names."""
    try:
        answer = await client.get("/v1/models")
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise PuzzleFailure(
            f"no OpenAI-style server answers at {client.base_url}v1/models ({error or type(error).__name__}): "
            "start one there, or name another --url."
        ) from error


async def _one(client: httpx.AsyncClient, model: str, prompt: Sequence[int], tokens: int) -> Request:
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    usage: dict[str, Any] = {}
    started, times = time.perf_counter(), list[float]()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != httpx.codes.OK:
                text = (await answer.aread()).decode(errors="replace")
                return Request(error=f"status {answer.status_code}: {text[:200]}")
            async for line in answer.aiter_lines():
                event = event_of(line)
                if any("text" in choice for choice in event.get("choices") or ()):
                    times.append(time.perf_counter() - started)
                usage = event.get("usage") or usage
    except (httpx.HTTPError, ValueError) as error:
        return Request(error=f"{type(error).__name__}: {error}".rstrip(": "))
    return request_of(times, usage, tokens)


def event_of(line: str) -> dict[str, Any]:
    """One line of a stream; empty for a comment, a blank line and [DONE]. ValueError for an error of the server's."""
    text = line.removeprefix("data:").strip()
    if not line.startswith("data:") or text == "[DONE]":
        return {}
    event: dict[str, Any] = json.loads(text)
    if event.get("error"):
        raise ValueError(str(event["error"])[:200])
    return event


def request_of(times: Sequence[float], usage: Mapping[str, Any], tokens: int) -> Request:
    """What one answer is worth: its usage has to say that it holds the tokens that were asked for."""
    got = usage.get("completion_tokens")
    if got is None or not times:
        return Request(error="the answer has no usage, so its tokens cannot be counted")
    if got != tokens:
        return Request(output_tokens=got, error=f"{got} tokens instead of {tokens}: it stopped early")
    prompt = int(usage.get("prompt_tokens") or 0)
    return Request(first=times[0], last=times[-1], prompt_tokens=prompt, output_tokens=got)


def row_of(name: str, point: Point, turns: Mapping[str, Sequence[LoadTurn]], memory: int | None) -> LoadRow:
    """One model's turns, summed up: medians over the rounds, percentiles over all requests of all rounds."""
    own = turns[name]
    everything = [request for turn in own for request in turn.requests]
    tokens = median_metric([turn.tokens_per_second() for turn in own])
    return LoadRow(
        model=name,
        load=point.label,
        requests=len(everything),
        failed=sum(turn.failed() for turn in own),
        errors=tuple(sorted({request.error for request in everything if request.error}))[:5],
        requests_per_second=median_metric([(len(turn.requests) - turn.failed()) / turn.seconds for turn in own]),
        tokens_per_second=tokens,
        request_efficiency=tokens.value / point.generated_tokens,
        first_token_ms=_percentiles([request.first for request in everything]),
        output_token_ms=_percentiles([request.per_token() for request in everything]),
        memory_bytes=memory,
        gains=load_gains(turns[PARENT], own) if PARENT in turns and name != PARENT else None,
    )


def _percentiles(values: Sequence[float]) -> tuple[float | None, float | None]:
    """p50 and p95 in milliseconds."""
    first, second = (quantile(values, share) * 1e3 for share in (0.5, 0.95))
    return (first if math.isfinite(first) else None), (second if math.isfinite(second) else None)


def load_gains(parents: Sequence[LoadTurn], own: Sequence[LoadTurn]) -> LoadGains | None:
    """Gains round by round; None when a request of either failed: what is left would not be the same load."""
    pairs = list(zip(parents, own, strict=True))
    if any(turn.failed() for pair in pairs for turn in pair):
        return None

    def gain(seconds: Callable[[LoadTurn], float]) -> Metric:
        return median_metric([seconds(theirs) / seconds(ours) for theirs, ours in pairs])

    def between(turn: LoadTurn) -> float:
        return turn.quantile(Request.per_token, 0.5)

    known = all(turn.cpu_seconds for pair in pairs for turn in pair)
    spaced = all(between(turn) for pair in pairs for turn in pair)
    return LoadGains(
        throughput=gain(lambda turn: 1 / turn.tokens_per_second()),
        first_token=gain(lambda turn: turn.quantile(lambda request: request.first, 0.5)),
        output_token=gain(between) if spaced else None,
        cpu=gain(lambda turn: turn.cpu_seconds or 0.0) if known else None,
    )
