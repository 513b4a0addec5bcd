"""`puzzle loadtest`: an OpenAI-style load on servers of parent and child, in turns.

Prompts are random token ids, new in every round, the same for every model; so are the times at which they arrive
(arrivals.py). A request that failed, or was short, stays in every denominator: it counts as no token, and as infinitely
late in the percentiles.
"""

import asyncio
import itertools
import math
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from blocks.engine_limits import known_engine
from blocks.errors import PuzzleError, PuzzleFailure
from blocks.estimates import mean
from blocks.parent import config_of
from blocks.records import PARENT, Metric, Value
from tasks.engines.base import LoadOptions
from tasks.engines.openai_server import SERVERS, Served, serving
from tasks.engines.timing_in_turns import median_metric
from tasks.export.formats import timed_precision
from tasks.inputs.children import open_child
from tasks.loadtest.arrivals import NO_LIMITS, Limits, Traffic, traffic_of
from tasks.loadtest.load_client import Request, send
from tasks.measure.bench import CHILD, Point, check_cache, ready
from tasks.running.progress import Progress, no_progress
from tasks.running.usage import Others

API_KEY = "PUZZLE_BENCH_API_KEY"  # ours: a key that is in the environment for somebody else's API goes nowhere
SPARE_TOKENS = 16  # a server may add tokens of its own to a prompt


class LoadTurn(Value):
    """One model's turn: all its requests, wall seconds, CPU seconds of the server where it is ours."""

    requests: tuple[Request, ...]
    seconds: float
    cpu_seconds: float | None

    def failed(self) -> int:
        """Requests that do not count."""
        return sum(bool(request.error) for request in self.requests)

    def generated_tokens_per_second(self) -> float:
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
    """One model's server under one load. Milliseconds are None where failed requests stand at that percentile.

    rate: arrivals per second, None in a closed loop. good: share of requests within the limits (goodput), mean of the
    rounds; None without limits. busy: which other programs computed meanwhile, "" for none.
    """

    model: str
    load: str
    rate: float | None
    requests: int
    failed: int
    errors: tuple[str, ...]
    good: Metric | None
    requests_per_second: Metric
    generated_tokens_per_second: Metric
    first_token_seconds: tuple[float | None, float | None]
    output_token_seconds: tuple[float | None, float | None]
    memory_bytes: int | None
    gains: LoadGains | None
    busy: str = ""


def quantile(values: Sequence[float], share: float) -> float:
    """Nearest-rank quantile."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """What is put under load: servers that are started here (`server`), or else those that run already (`urls`)."""

    server: str | None = None
    urls: tuple[str, ...] = ()
    points: tuple[Point, ...]
    rates: tuple[float, ...] = ()
    limits: Limits = NO_LIMITS
    precision: str = "float32"
    kv_precision: str = LoadOptions.kv_precision
    rounds: int = 5
    threads: int = 1
    requests: int = 8

    def __post_init__(self) -> None:
        if self.server is not None and self.urls:
            raise PuzzleError("--server starts servers, --url names running ones: give one of the two.")

    @property
    def how(self) -> LoadOptions:
        """Precisions and threads of servers that are started here."""
        return LoadOptions(precision=self.precision, threads=self.threads, kv_precision=self.kv_precision)

    @property
    def traffic(self) -> tuple[Traffic, ...]:
        """Every point in a closed loop, then at every rate."""
        return traffic_of(self.points, self.rates)

    def seconds(self, models: int) -> float:
        """Least seconds of the open loops: the machine's speed does not shorten them."""
        return models * self.rounds * sum(self.requests / load.rate for load in self.traffic if load.rate)


def bench_servers(sources: Mapping[str, Path], plan: LoadPlan, progress: Progress = no_progress) -> list[LoadRow]:
    """Parent and child under the same loads, in turns. `sources` has the child, for its vocabulary, and what is served.

    Raises PuzzleError for a server that cannot be started, PuzzleFailure for one that does not answer.
    """
    most = max(point.batch_size for point in plan.points)
    if most > plan.requests:
        raise PuzzleError(f"{plan.requests} requests are never {most} at a time: give --requests {most} or more.")
    child = sources[CHILD]
    config: Any = config_of(child) if child.is_dir() else open_child(child).config
    with ExitStack() as stack:
        servers = (
            named_servers(plan.urls)
            if plan.server is None
            else stack.enter_context(served_models(sources, plan.server, plan.points, plan.how))
        )
        others = Others()
        rows = load_test(servers, plan, config.vocab_size, progress)
        busy = "" if plan.urls else others.crowd(plan.threads)  # servers of others may compute on this machine
        return [row.model_copy(update={"busy": busy}) for row in rows]


@contextmanager
def served_models(
    sources: Mapping[str, Path], server: str, points: Sequence[Point], how: LoadOptions
) -> Iterator[dict[str, Served]]:
    """Every model on a server of its own for the length of the block, exported first where that is needed.

    how: precisions and threads.
    """
    if server not in SERVERS:
        raise PuzzleError(
            f"no server {server!r} can be started from here, only {', '.join(SERVERS)}: start another one yourself "
            "and name it with --url."
        )
    precision = timed_precision(how.precision, known_engine(server).format)
    check_cache(how.kv_precision, server, sources)
    how = replace(
        how,
        precision=precision,
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
    """Servers that run already: the child's alone, or parent's then child's. One key is for one host."""
    if len(urls) not in (1, 2) or not all(map(_is_address, urls)):
        raise PuzzleError(
            "--url is http://HOST:PORT of the child's server, or given twice: the parent's, then the child's."
        )
    key = os.environ.get(API_KEY) or None
    hosts = sorted({httpx.URL(url).host for url in urls})
    if key and len(hosts) > 1:
        raise PuzzleError(
            f"{API_KEY} is a key for one host, and --url names {' and '.join(hosts)}: bench one at a time, or unset it."
        )
    return dict(zip((PARENT, CHILD)[-len(urls) :], (Served(url=url, key=key) for url in urls), strict=True))


def _is_address(url: str) -> bool:
    try:
        found = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return found.scheme in ("http", "https") and bool(found.host)


def load_test(
    servers: Mapping[str, Served], plan: LoadPlan, vocab_size: int, progress: Progress = no_progress
) -> list[LoadRow]:
    """Every server under every load, in turns; the one named `parent` is what gains are counted from.

    PuzzleFailure when none of a server's requests succeeds.
    """
    order, rows = list(servers), list[LoadRow]()
    total, done = len(plan.traffic) * plan.rounds * len(order) * plan.requests, itertools.count(1)

    def answered() -> None:
        progress(next(done), total)

    for traffic in plan.traffic:
        turns: dict[str, list[LoadTurn]] = {name: [] for name in order}
        if traffic.rate is None:
            for name in order:
                _warm(name, servers[name], traffic, vocab_size)
        for number in range(plan.rounds):
            prompts = prompts_of(traffic, vocab_size, plan.requests, number)
            for name in reversed(order) if number % 2 else order:
                turns[name].append(one_turn(servers[name], traffic, prompts, number, answered))
        rows += [row_of(name, traffic, turns, servers[name].peak_bytes(), plan.limits) for name in order]
    return rows


def _warm(name: str, server: Served, traffic: Traffic, vocab_size: int) -> None:
    """One untimed turn. PuzzleFailure for a server that answers nothing."""
    turn = one_turn(server, traffic, prompts_of(traffic, vocab_size, traffic.point.batch_size, -1), -1)
    if turn.failed() == len(turn.requests):
        raise PuzzleFailure(
            f"the {name}'s server at {server.url} answered no request as asked: {turn.requests[0].error}."
        )


def prompts_of(traffic: Traffic, vocab_size: int, requests: int, number: int) -> list[list[int]]:
    """Random prompts of one round: the same for every model, no two alike."""
    source = random.Random(f"{traffic.label} {number}")
    return [[source.randrange(vocab_size) for _ in range(traffic.point.prompt_tokens)] for _ in range(requests)]


def one_turn(
    server: Served,
    traffic: Traffic,
    prompts: Sequence[Sequence[int]],
    number: int,
    answered: Callable[[], None] = lambda: None,
) -> LoadTurn:
    """Send all prompts of round `number` as the traffic has it. A turn ends with its last answer, in an open loop not
    before the time in which its requests arrive is over.
    """
    cpu = server.cpu_seconds()
    arrivals = traffic.arrivals(len(prompts), number)
    found, seconds = asyncio.run(send(server.url, traffic, prompts, arrivals, answered, server.key))
    seconds = max(seconds, len(prompts) / traffic.rate if traffic.rate else 0.0)
    after = server.cpu_seconds()
    used = None if cpu is None or after is None else after - cpu
    return LoadTurn(requests=tuple(found), seconds=seconds, cpu_seconds=used)


def row_of(
    name: str, traffic: Traffic, turns: Mapping[str, Sequence[LoadTurn]], memory: int | None, limits: Limits
) -> LoadRow:
    """One model's turns, summed up: medians over the rounds, percentiles over all requests of all rounds."""
    own = turns[name]
    everything = [request for turn in own for request in turn.requests]
    return LoadRow(
        model=name,
        load=traffic.label,
        rate=traffic.rate,
        requests=len(everything),
        failed=sum(turn.failed() for turn in own),
        errors=tuple(sorted({request.error for request in everything if request.error}))[:5],
        good=good_share(own, limits),
        requests_per_second=median_metric([(len(turn.requests) - turn.failed()) / turn.seconds for turn in own]),
        generated_tokens_per_second=median_metric([turn.generated_tokens_per_second() for turn in own]),
        first_token_seconds=_percentiles([request.first for request in everything]),
        output_token_seconds=_percentiles([request.per_token() for request in everything]),
        memory_bytes=memory,
        gains=load_gains(turns[PARENT], own) if PARENT in turns and name != PARENT else None,
    )


def good_share(turns: Sequence[LoadTurn], limits: Limits) -> Metric | None:
    """Share of requests within the limits: mean of the rounds and its standard error; None without limits."""
    if not limits.given():
        return None
    held = [[limits.hold(request.first, request.per_token()) for request in turn.requests] for turn in turns]
    return mean([statistics.mean(each) for each in held]).metric


def _percentiles(values: Sequence[float]) -> tuple[float | None, float | None]:
    """p50 and p95."""
    first, second = (quantile(values, share) for share in (0.5, 0.95))
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
        throughput=gain(lambda turn: 1 / turn.generated_tokens_per_second()),
        first_token=gain(lambda turn: turn.quantile(lambda request: request.first, 0.5)),
        output_token=gain(between) if spaced else None,
        cpu=gain(lambda turn: turn.cpu_seconds or 0.0) if known else None,
    )
