"""A load on servers: what a stream says, what a failure costs, pairs; one round trip through llama.cpp's own server."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from blocks.errors import PuzzleError, PuzzleFailure
from tasks.engines.openai_server import Served
from tasks.gguf.writer import write_gguf
from tasks.loadtest import serving_load
from tasks.loadtest.arrivals import NO_LIMITS, Traffic
from tasks.loadtest.load_client import Request, event_of, request_of
from tasks.loadtest.load_table import doubts_of, failures_of, load_table
from tasks.loadtest.serving_load import (
    API_KEY,
    LoadPlan,
    LoadTurn,
    bench_servers,
    load_gains,
    named_servers,
    one_turn,
    prompts_of,
    row_of,
)
from tasks.measure.bench import Point
from tests.test_engines import folders, run
from tests.test_gguf import DIGITS, bpe_folder, child_of, converted_tokenizer

__all__ = ["folders"]  # a fixture
needs_server = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
POINT = Point(batch_size=2, prompt_tokens=4, generated_tokens=3)
CLOSED = Traffic(point=POINT)


def turn(seconds: float, *requests: Request, cpu: float | None = 1.0) -> LoadTurn:
    return LoadTurn(requests=requests, seconds=seconds, cpu_seconds=cpu)


def good(first: float, last: float) -> Request:
    return Request(first=first, last=last, prompt_tokens=4, output_tokens=3)


BAD = Request(error="status 500: no")


def test_a_stream_is_read_line_by_line() -> None:
    assert event_of("") == event_of(": ping") == event_of("data: [DONE]") == {}
    assert event_of('data: {"usage": {"completion_tokens": 3}}') == {"usage": {"completion_tokens": 3}}
    for wrong in ("data: {", 'data: {"error": {"message": "out of memory"}}'):
        with pytest.raises(ValueError):
            event_of(wrong)


def test_an_answer_counts_only_with_the_tokens_that_were_asked_for() -> None:
    whole = request_of([0.5, 0.7, 0.9], {"completion_tokens": 3, "prompt_tokens": 4}, 3)
    assert (whole.first, whole.output_tokens, whole.error) == (0.5, 3, "")
    assert whole.per_token() == pytest.approx(0.2)
    assert "2 tokens instead of 3: it stopped early" in request_of([0.5, 0.7], {"completion_tokens": 2}, 3).error
    assert "no usage" in request_of([0.5, 0.7, 0.9], {}, 3).error
    assert "no usage" in request_of([], {"completion_tokens": 3}, 3).error  # tokens that nobody saw


def test_a_failed_request_stays_in_every_denominator() -> None:
    turns = {"parent": [turn(2, good(0.1, 0.3), good(0.1, 0.3))], "child": [turn(2, good(0.1, 0.3), BAD)]}
    row = row_of("child", CLOSED, turns, None, NO_LIMITS)
    assert (row.requests, row.failed, row.requests_per_second.value) == (2, 1, 0.5)
    assert row.generated_tokens_per_second.value == 1.5
    assert (row.first_token_seconds[0], row.output_token_seconds[0]) == pytest.approx((0.1, 0.1))
    assert row.first_token_seconds[1] is None  # p95 is the failed one: infinitely late
    assert row.output_token_seconds[1] is None
    assert row.gains is None and "1 of 2 requests failed (status 500: no)" in failures_of([row])[0]
    assert row_of("parent", CLOSED, turns, None, NO_LIMITS).gains is None


def test_a_load_on_a_busy_machine_is_not_reliable() -> None:
    row = row_of("child", CLOSED, {"child": [turn(2, good(0.1, 0.3)), turn(2, good(0.1, 0.3))]}, None, NO_LIMITS)
    assert doubts_of([row]) == []
    assert "not reliable (others took" in doubts_of([row.model_copy(update={"busy": "others took 2.0"})])[0]


def test_gains_are_of_pairs() -> None:
    parents = [turn(2, good(1, 3), cpu=4), turn(40, good(20, 60), cpu=80)]
    own = [turn(1, good(0.5, 2.5), cpu=1), turn(20, good(10, 50), cpu=20)]
    gains = load_gains(parents, own)
    assert gains is not None and gains.cpu is not None
    assert gains.throughput.value == pytest.approx(2)
    assert (gains.throughput.se, gains.first_token.value) == (0, 2)
    assert gains.output_token is not None and (gains.output_token.value, gains.cpu.value) == (1, 4)
    far = load_gains(parents, [turn(1, good(1, 3), cpu=None), turn(1, good(1, 3), cpu=None)])
    assert far is not None and far.cpu is None
    one_piece = load_gains(parents, [turn(1, good(1, 1)), turn(1, good(1, 1))])
    assert one_piece is not None and one_piece.output_token is None and one_piece.first_token.value == 10.5


def test_prompts_are_the_same_for_all_and_new_in_every_round() -> None:
    assert prompts_of(CLOSED, 50, 3, 0) == prompts_of(CLOSED, 50, 3, 0) != prompts_of(CLOSED, 50, 3, 1)
    assert [len(prompt) for prompt in prompts_of(CLOSED, 50, 3, 0)] == [4, 4, 4]


def test_what_cannot_be_served_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(PuzzleError, match="one of the two"):
        LoadPlan(server="llama.cpp", urls=("http://127.0.0.1:1",), points=(POINT,))
    with pytest.raises(PuzzleError, match="only llama.cpp, vllm"):
        bench_servers(folders, LoadPlan(server="sglang", points=(POINT,)))
    for wrong in ("nonsense", "http://HOST:PORT", "http://"):
        with pytest.raises(PuzzleError, match="--url is"):
            bench_servers(folders, LoadPlan(urls=(wrong,), points=(POINT,)))
    with pytest.raises(PuzzleError, match="1 requests are never 2 at a time"):
        bench_servers(folders, LoadPlan(urls=("http://127.0.0.1:1",), points=(POINT,), requests=1))
    with pytest.raises(PuzzleFailure, match="no OpenAI-style server answers"):
        bench_servers(folders, LoadPlan(urls=("http://127.0.0.1:1",), points=(POINT,)))


class Stub(BaseHTTPRequestHandler):
    """An OpenAI-style server that notes what it is asked, and answers as `answers` says."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[dict[str, Any]]] = []
    under_way: ClassVar[list[int]] = [0, 0]  # now, most
    answers: ClassVar[dict[str, Any]] = {}

    def do_GET(self) -> None:
        self._say(200, self.answers["models"] if self.path == "/v1/models" else b"{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        own = {"path": self.path, "key": self.headers.get("Authorization"), "from": self.client_address[1]}
        self.asked.append(body | own)
        self.under_way[0] += 1
        self.under_way[1] = max(self.under_way)
        time.sleep(0.03)
        self.under_way[0] -= 1
        if self.answers["status"] != 200:
            self._say(self.answers["status"], b"no room")
            return
        pieces = [{"choices": [{"text": "x"}]}] * self.answers["tokens"]
        usage = [{"choices": [], "usage": {"completion_tokens": self.answers["tokens"], "prompt_tokens": 4}}, {}]
        lines = [f"data: {json.dumps(event)}" for event in (*pieces, *usage)]
        self._say(200, "\n\n".join([": ping", *lines, "data: [DONE]", ""]).encode())

    def _say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def stub() -> Iterator[str]:
    Stub.asked.clear()
    Stub.under_way[:] = [0, 0]
    Stub.answers.update(status=200, tokens=3, models=b'{"data": [{"id": "first"}, {"id": "second"}]}')
    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as server:
        threading.Thread(target=partial(server.serve_forever, poll_interval=0.02), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_what_a_server_is_asked(stub: str) -> None:
    prompts = prompts_of(CLOSED, 50, 6, 0)
    found = one_turn(Served(url=f"{stub}/v1/", key="a-key"), CLOSED, prompts, 0)
    assert (found.failed(), len(found.requests), found.cpu_seconds) == (0, 6, None) and found.seconds > 0.08
    assert sorted(one["prompt"] for one in Stub.asked) == sorted(map(list, prompts))
    for one in Stub.asked:
        assert (one["path"], one["model"], one["key"]) == ("/v1/completions", "first", "Bearer a-key")
        assert (one["max_tokens"], one["ignore_eos"], one["temperature"]) == (3, True, 0)
        assert one["stream"] and one["stream_options"] == {"include_usage": True}
    assert len({one["from"] for one in Stub.asked}) == 6  # a connection each
    assert Stub.under_way[1] == POINT.batch_size
    one_turn(Served(url=stub), CLOSED, prompts[:1], 0)
    assert Stub.asked[-1]["key"] is None


class Elsewhere(BaseHTTPRequestHandler):
    """A server that sends whoever asks on to `there`."""

    there = ""

    def do_GET(self) -> None:
        self.send_response(307)
        self.send_header("Location", f"{self.there}{self.path}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def test_a_key_goes_to_the_host_that_it_was_given_for(stub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of somebody else")
    monkeypatch.delenv(API_KEY, raising=False)
    assert [server.key for server in named_servers([stub, stub]).values()] == [None, None]
    monkeypatch.setenv(API_KEY, "a-key")
    found = named_servers(["http://127.0.0.1:1", "http://127.0.0.1:2/v1"])
    assert [server.key for server in found.values()] == ["a-key", "a-key"] and "a-key" not in repr(found)
    with pytest.raises(PuzzleError, match="a key for one host"):
        named_servers(["http://127.0.0.1:1", "http://localhost:1"])
    Elsewhere.there = stub.replace("127.0.0.1", "localhost")
    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=partial(server.serve_forever, poll_interval=0.02), daemon=True).start()
        with pytest.raises(PuzzleFailure, match="307") as refused:
            one_turn(Served(url=f"http://127.0.0.1:{server.server_port}", key="a-key"), CLOSED, [[1]], 0)
        server.shutdown()
    assert not Stub.asked and "a-key" not in str(refused.value)


def test_what_a_server_answers_wrongly_is_kept_with_its_reason(stub: str) -> None:
    for answers, said in (({"status": 503}, "status 503: no room"), ({"tokens": 4}, "4 tokens instead of 3")):
        Stub.answers.update(answers)
        (request,) = one_turn(Served(url=stub), CLOSED, prompts_of(CLOSED, 50, 1, 0), 0).requests
        assert said in request.error and request.per_token() == math.inf
        Stub.answers.update(status=200)


def test_what_is_no_openai_style_server_is_told(stub: str) -> None:
    for models in (b"hello", b"[]", b"{}", b'{"data": null}', b'{"data": []}'):
        Stub.answers.update(models=models)
        with pytest.raises(PuzzleFailure, match="no OpenAI-style server answers"):
            one_turn(Served(url=stub), CLOSED, prompts_of(CLOSED, 50, 1, 0), 0)


def test_servers_that_run_are_measured_in_turns_the_parent_first_then_backwards(
    stub: str, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]
) -> None:
    order: list[str] = []

    def noted(server: Served, *_: Any) -> LoadTurn:
        order.append(server.url)
        return turn(1, good(0.1, 0.3))

    monkeypatch.setattr(serving_load, "one_turn", noted)
    plan = LoadPlan(urls=("http://parent", "http://child"), points=(POINT,), rounds=2, requests=2)
    rows = bench_servers(folders, plan)
    assert [url.rpartition("/")[2] for url in order] == ["parent", "child", "parent", "child", "child", "parent"]
    assert [(row.model, row.gains is None) for row in rows] == [("parent", True), ("child", False)]
    assert [row.model for row in bench_servers(folders, replace(plan, urls=("http://child",)))] == ["child"]
    with pytest.raises(PuzzleError, match="given twice"):
        bench_servers(folders, replace(plan, urls=("http://a", "http://b", "http://c")))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A child with a tokenizer, as a GGUF file."""
    folder = tmp_path_factory.mktemp("served")
    model = child_of(vocab_size=259)
    tokenizer = converted_tokenizer(bpe_folder(folder / "tokenizer", DIGITS), model.config.vocab_size)
    assert tokenizer is not None
    return write_gguf(model, folder / "child.gguf", "float32", tokenizer, "child")


@needs_server
def test_a_round_trip_through_llama_cpps_server(file: Path) -> None:
    told: list[tuple[int, int]] = []
    plan = LoadPlan(server="llama.cpp", points=(POINT,), rounds=2, requests=3)
    rows = bench_servers({"parent": file, "child": file}, plan, lambda *done: told.append(done))
    assert told == [(done, 12) for done in range(1, 13)]
    assert [(row.model, row.requests, row.failed) for row in rows] == [("parent", 6, 0), ("child", 6, 0)]
    for row in rows:
        assert row.memory_bytes and row.memory_bytes > 2**20
        assert (
            row.first_token_seconds[1] and row.first_token_seconds[1] > 0 and row.generated_tokens_per_second.value > 0
        )
    kept = LoadPlan(server="llama.cpp", points=(POINT,), rounds=1, requests=2, kv_precision="bfloat16")
    assert [row.failed for row in bench_servers({"child": file}, kept)] == [0]
    assert rows[1].gains is not None  # no CPU gain: so little is below the tick of the CPU clock
    assert load_table(rows).row_count == 2
    assert not [one for one in psutil.Process().children(recursive=True) if "openai_server" in " ".join(one.cmdline())]


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < deadline, "the server is still there"
        time.sleep(0.1)


OWNER = """
import signal, sys, time
from pathlib import Path
# a worker of the suite, or a job in the background, ignores it
signal.signal(signal.SIGINT, signal.default_int_handler)
from tasks.engines.base import LoadOptions
from tasks.engines.openai_server import serving
server, model, log = sys.argv[1:]
with serving(server, Path(model), LoadOptions(batch_size=2, context_tokens=64), Path(log)) as served:
    print(served.pid, served.url, flush=True)
    time.sleep(60)
"""


@needs_server
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_server_outlives_its_owner(number: int, file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, "llama.cpp", str(file), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ}, cwd=Path.cwd()) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline().split()[0])
        assert psutil.pid_exists(pid)
        owner.send_signal(number)
        owner.wait(20)
        wait_until_gone([pid])


@needs_server
def test_the_command_prints_rows(file: Path) -> None:
    wanted = ["--server", "llama.cpp", "--load", "1x4x3", "--rounds", "1", "--requests", "2", "--json"]
    done = run("loadtest", str(file), "--parent", str(file), *wanted)
    assert done.exit_code == 0, done.output
    assert [row["failed"] for row in json.loads(done.stdout)] == [0, 0]
