"""The client of a load: streams from an OpenAI-style server, timed, held to the tokens that were asked for.

A request asks for an exact number of tokens (`ignore_eos`), and the answer's own usage has to say so: a child that
stops early would look faster. In an open loop time runs from the moment a request was to arrive, not from when it was
sent: a client that is late would else hide what people wait.
"""

import asyncio
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import httpx

from blocks.errors import PuzzleFailure
from blocks.records import Value
from tasks.loadtest.arrivals import Traffic

TIMEOUT_SECONDS = 300.0


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


async def send(
    url: str,
    traffic: Traffic,
    prompts: Sequence[Sequence[int]],
    arrivals: Sequence[float],
    answered: Callable[[], None],
    key: str | None = None,
) -> tuple[list[Request], float]:
    """Send each prompt when it arrives; a closed loop has `batch_size` under way. `answered` is called after each.
    `key` goes to this server alone, in a header: no redirect is followed.

    Returns the requests and the wall seconds from the first arrival's clock to the last answer. Raises PuzzleFailure
    when no server answers.
    """
    free = asyncio.Semaphore(traffic.point.batch_size) if traffic.rate is None else nullcontext()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # a connection each: llama.cpp's server closes idle ones, and a request that meets that fails
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    base = url.rstrip("/").removesuffix("/v1")
    async with httpx.AsyncClient(
        base_url=base, headers=headers, timeout=TIMEOUT_SECONDS, limits=limits, follow_redirects=False
    ) as client:
        model = await _model_of(client)
        begin = time.perf_counter()

        async def one(prompt: Sequence[int], at: float) -> Request:
            async with free:
                await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
                started = time.perf_counter() if traffic.rate is None else begin + at
                done = await _one(client, model, prompt, traffic.point.generated_tokens, started)
            answered()
            return done

        found = list(await asyncio.gather(*map(one, prompts, arrivals)))
        return found, time.perf_counter() - begin


async def _model_of(client: httpx.AsyncClient) -> str:
    """The first model that a server names."""
    try:
        answer = await client.get("/v1/models")
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise PuzzleFailure(
            f"no OpenAI-style server answers at {client.base_url}v1/models ({error or type(error).__name__}): "
            "start one there, or name another --url. A key of its API goes into PUZZLE_BENCH_API_KEY."
        ) from error


async def _one(client: httpx.AsyncClient, model: str, prompt: Sequence[int], tokens: int, started: float) -> Request:
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
    times = list[float]()
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
