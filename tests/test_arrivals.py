"""Requests that arrive at a rate: their times, what a queue makes of them, against a server of known service times."""

import asyncio
import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from blocks.errors import PuzzleError
from tasks.engines.openai_server import Served
from tasks.loadtest.arrivals import NO_LIMITS, Limits, Traffic, rates_of, traffic_of
from tasks.loadtest.load_client import Request, send
from tasks.loadtest.load_table import load_table
from tasks.loadtest.serving_load import LoadPlan, LoadTurn, good_share, load_test, one_turn, prompts_of
from tasks.measure.bench import Point
from tests.test_engines import run

POINT = Point(batch_size=1, prompt_tokens=4, generated_tokens=3)
PREFILL, STEP = 0.04, 0.01  # seconds of the server below
SERVICE = PREFILL + 2 * STEP


class FakeServer:
    """Takes `slots` requests at a time in the order they come, each for PREFILL + 2 STEP seconds. Keeps the prompts."""

    def __init__(self, slots: int, speed: float) -> None:
        self.free, self.speed = asyncio.Semaphore(slots), speed
        self.prompts: list[list[int]] = []
        self.most = self.waiting = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length: ")[1].split()[0]) if "content-length" in head else 0
        body = json.loads(await reader.readexactly(length)) if length else None
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/event-stream\r\n\r\n")
        if body is None:
            writer.write(b'{"data": [{"id": "fake"}]}')
        else:
            await self.complete(body, writer)
        await writer.drain()
        writer.close()

    async def complete(self, body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        prompt, tokens = body["prompt"], body["max_tokens"]
        assert isinstance(prompt, list) and isinstance(tokens, int)
        self.prompts.append(prompt)
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        async with self.free:
            for seconds in (PREFILL, *[STEP] * (tokens - 1)):
                await asyncio.sleep(seconds / self.speed)
                writer.write(b'data: {"choices": [{"text": "x"}]}\n\n')
                await writer.drain()
        self.waiting -= 1
        usage = {"completion_tokens": tokens, "prompt_tokens": len(prompt)}
        writer.write(f"data: {json.dumps({'usage': usage, 'choices': []})}\n\ndata: [DONE]\n\n".encode())


@contextmanager
def fake(slots: int = 1, speed: float = 1.0) -> Iterator[tuple[Served, FakeServer]]:
    """A server of known speed in a thread of its own."""
    ready, loop, own = threading.Event(), asyncio.new_event_loop(), FakeServer(slots, speed)
    ports: list[int] = []

    async def start() -> asyncio.Server:
        server = await asyncio.start_server(own.answer, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        ready.set()
        return server

    def serve() -> None:
        server = loop.run_until_complete(start())
        loop.run_forever()
        server.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield Served(url=f"http://127.0.0.1:{ports[0]}"), own
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def queued(arrivals: list[float]) -> list[float]:
    """Seconds to the first token behind one slot, first come first served (Lindley)."""
    free, waits = 0.0, []
    for at in arrivals:
        start = max(at, free)
        waits.append(start + PREFILL - at)
        free = start + SERVICE
    return waits


def test_arrivals_are_the_same_for_all_new_in_every_round_and_as_many_as_the_rate_says() -> None:
    traffic = Traffic(point=POINT, rate=4)
    times = traffic.arrivals(2000, 0)
    assert times == traffic.arrivals(2000, 0) != traffic.arrivals(2000, 1)
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= 500
    gaps = [later - first for first, later in zip(times, times[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 4, rel=0.02)
    # exponential gaps: their spread is their mean, and exp(-1) of them are longer; even ones have no spread at all
    assert (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 == pytest.approx(mean, rel=0.1)
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.04)
    assert Traffic(point=POINT).arrivals(3, 0) == [0, 0, 0]


def test_rates_are_read() -> None:
    assert rates_of("2,0.5,2") == (0.5, 2)
    for wrong in ("", "0", "-1", "a,1", "inf", "nan", "1,,2"):
        with pytest.raises(PuzzleError, match=r"0\.5,1,2"):
            rates_of(wrong)
    labels = [traffic.label for traffic in traffic_of((POINT,), (0.5, 2))]
    assert labels == ["1x4x3", "1x4x3 at 0.5/s", "1x4x3 at 2/s"]
    done = run("loadtest", "child", "--url", "http://127.0.0.1:1", "--rate", "fast")
    assert done.exit_code != 0 and "requests per second" in str(done.exception)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "--server starts servers, --url names some"),
        (("--server", "llama.cpp", "--url", "http://127.0.0.1:1"), "one of the two"),
        (("--url", "http://127.0.0.1:1", "--threads", "2"), "--threads is for servers that --server starts"),
        (("--url", "http://127.0.0.1:1", "--precision", "q8_0"), "--precision is for servers that --server starts"),
        (("--url", "http://127.0.0.1:1", "--parent", "x"), "--parent is for servers that --server starts"),
    ],
)
def test_what_is_put_under_load_is_named_once(words: tuple[str, ...], reason: str) -> None:
    done = run("loadtest", "child", *words)
    assert done.exit_code != 0 and reason in str(done.exception)


@pytest.mark.parametrize("flag", ["--rate", "--requests", "--url", "--server", "--max-time-to-first-token-seconds"])
def test_the_bench_in_one_engine_has_no_flag_of_the_load_test(flag: str) -> None:
    assert run("bench", "child", flag, "1").exit_code == 2


def test_in_an_open_loop_nobody_waits_for_the_answers_before() -> None:
    traffic = Traffic(point=POINT, rate=30)  # the server does 17 a second
    with fake() as (server, own):
        turn = one_turn(server, traffic, prompts_of(traffic, 50, 8, 0), 0)
    expected = queued(traffic.arrivals(8, 0))
    assert own.most > 3  # sent while others waited
    assert max(expected) > 3 * PREFILL
    for request, least in zip(turn.requests, expected, strict=True):
        assert not request.error
        # sleeps are never shorter than asked: less than the queue's law would be time that was not counted
        assert least - 0.005 <= request.first <= 1.5 * least + 1
        # from the request's own time: a busy client may read the first token late, and the next is then no later
        assert request.last >= least + 2 * STEP - 0.005


def test_a_client_that_is_late_does_not_hide_the_wait() -> None:
    traffic = Traffic(point=POINT, rate=1)
    with fake() as (server, _):
        ((request,), _) = asyncio.run(send(server.url, traffic, [[1, 2]], [-0.5], lambda: None))
    assert 0.5 + PREFILL <= request.first < 0.5 + PREFILL + 1


def test_in_a_closed_loop_so_many_are_under_way() -> None:
    with fake() as (server, own):
        turn = one_turn(server, Traffic(point=POINT), prompts_of(Traffic(point=POINT), 50, 3, 0), 0)
    assert own.most == 1 and turn.seconds >= 3 * SERVICE - 0.005
    assert all(request.first < 2 * PREFILL + 1 for request in turn.requests)


def test_parent_and_child_meet_the_same_arrivals_in_turns() -> None:
    told: list[tuple[int, int]] = []
    plan = LoadPlan(points=(POINT,), rates=(12.0,), limits=Limits(first_token_seconds=10), rounds=2, requests=4)
    assert plan.seconds(models=2) == pytest.approx(2 * 2 * 4 / 12)
    with fake() as (parent, seen), fake(speed=4.0) as (child, other):
        rows = load_test({"parent": parent, "child": child}, plan, 50, lambda *done: told.append(done))
    assert seen.prompts == other.prompts and len(seen.prompts) == 1 + 2 * 8
    assert len({tuple(prompt) for prompt in seen.prompts}) == 17  # no round, and no rate, repeats another's
    assert told == [(done, 32) for done in range(1, 33)]
    assert [(row.model, row.rate) for row in rows] == [
        ("parent", None), ("child", None), ("parent", 12), ("child", 12)
    ]  # fmt: skip
    assert all((row.requests, row.failed) == (8, 0) and row.good and row.good.value == 1 for row in rows)
    gains = rows[3].gains
    assert gains is not None and gains.first_token.value > 1.2
    table = load_table(rows, plan.limits)
    assert "TTFT <= 10 s" in str(table.title) and "good" in [column.header for column in table.columns]
    assert "good" not in [column.header for column in load_table(rows[:1], NO_LIMITS).columns]


def test_a_request_is_good_within_every_limit_and_never_when_it_failed() -> None:
    fast = Request(first=0.1, last=0.3, output_tokens=3)  # 100 ms, then 100 ms a token
    bad = Request(error="status 500: no")
    turns = [
        LoadTurn(requests=(fast, bad), seconds=1, cpu_seconds=None),
        LoadTurn(requests=(fast, fast), seconds=1, cpu_seconds=None),
    ]
    share = good_share(turns, Limits(first_token_seconds=0.15))
    assert share is not None and (share.value, share.n) == (0.75, 2)
    assert share.se == pytest.approx(0.25)  # of the two rounds' shares, 1/2 and 1
    for limits in (
        Limits(first_token_seconds=0.099),
        Limits(output_token_seconds=0.099),
        Limits(first_token_seconds=0.15, output_token_seconds=0.009),
    ):
        none = good_share(turns, limits)
        assert none is not None and none.value == 0
    assert good_share(turns, NO_LIMITS) is None
