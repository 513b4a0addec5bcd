"""When requests arrive: N users who wait for their answers (closed loop), or strangers at a rate (open loop).

Users who wait slow down with a slow server, so a closed loop tells what a server can do at most; how long people wait
at a given traffic only an open loop tells, where requests come whether or not the ones before are answered.
"""

import math
import random

from pydantic import Field

from blocks.errors import PuzzleError
from blocks.records import Value
from tasks.measure.bench import Point


class Traffic(Value):
    """Requests of one shape. rate: arrivals per second (open loop); None: `point.batch_size` users (closed loop).

    In an open loop `point.batch_size` is what a server that is started here takes at a time; the rest waits there.
    """

    point: Point
    rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @property
    def label(self) -> str:
        """The point, and its rate where there is one: 4x128x64 at 0.5/s."""
        return self.point.label if self.rate is None else f"{self.point.label} at {self.rate:g}/s"

    def arrivals(self, requests: int, number: int) -> list[float]:
        """Seconds from the start of round `number` at which requests arrive; all 0 in a closed loop.

        A round lasts requests / rate seconds, and each request arrives at a random moment of it, whatever the others
        do. So every round has exactly the load that it is named for. The moments are the same for every model.
        """
        if self.rate is None:
            return [0.0] * requests
        source = random.Random(f"{self.label} {number} arrivals")
        return sorted(source.uniform(0, requests / self.rate) for _ in range(requests))


class Limits(Value):
    """How long a request may take to count as good: to its first token, between output tokens."""

    first_token_seconds: float | None = Field(default=None, gt=0)
    output_token_seconds: float | None = Field(default=None, gt=0)

    def given(self) -> bool:
        """Whether there is any."""
        return self.first_token_seconds is not None or self.output_token_seconds is not None

    def hold(self, first_token: float, output_token: float) -> bool:
        """Whether a request of so many seconds is good; one that failed is infinitely late."""
        pairs = ((first_token, self.first_token_seconds), (output_token, self.output_token_seconds))
        return all(limit is None or seconds <= limit for seconds, limit in pairs)

    def words(self) -> str:
        """In words; empty without limits."""
        pairs = (("TTFT", self.first_token_seconds), ("TPOT", self.output_token_seconds))
        return ", ".join(f"{name} <= {limit:g} s" for name, limit in pairs if limit is not None)


NO_LIMITS = Limits()


def rates_of(text: str) -> tuple[float, ...]:
    """Arrivals per second from text such as `2,0.5,1`, sorted, each once. PuzzleError unless finite and above 0."""
    try:
        rates = {float(word) for word in text.split(",")}
    except ValueError:
        rates = set()
    if not rates or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise PuzzleError(f"--rate is one or more numbers of requests per second above 0, as in 0.5,1,2, not {text!r}.")
    return tuple(sorted(rates))


def traffic_of(points: tuple[Point, ...], rates: tuple[float, ...]) -> tuple[Traffic, ...]:
    """Every point in a closed loop, then at every rate."""
    return tuple(Traffic(point=point, rate=rate) for point in points for rate in (None, *rates))
