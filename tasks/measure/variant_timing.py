"""How long one variant takes, and what a timer of variants does. Each engine has a timer of its own."""

from dataclasses import dataclass
from typing import Protocol, Self

from blocks.records import Metric
from profiles.schema import Scenario
from tasks.engines.timing_in_turns import relative_error
from tasks.running.progress import Progress

# (subblock, variant label); also ("non_block", "") for embedding, final norm and head, and ("parent", "") for the whole
Timed = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of a prefill and of one decode step: medians over rounds, and their relative standard errors."""

    prefill: float
    decode: float
    prefill_spread: float = 0.0
    decode_spread: float = 0.0

    @classmethod
    def of(cls, prefill: Metric, decode: Metric) -> Self:
        """From seconds with their standard errors."""
        return cls(
            prefill=prefill.value,
            decode=decode.value,
            prefill_spread=relative_error(prefill),
            decode_spread=relative_error(decode),
        )

    def as_cost(self) -> dict[str, float]:
        """The fields of a Cost or NonBlockCost that are times."""
        return {
            "prefill_seconds": self.prefill,
            "decode_seconds_per_token": self.decode,
            "prefill_spread": self.prefill_spread,
            "decode_spread": self.decode_spread,
        }


class VariantTimer(Protocol):
    """Times every variant in one engine."""

    def run(self, scenario: Scenario, batch: int, progress: Progress) -> dict[Timed, Timing]:
        """Seconds of one copy of every variant, of the parts outside the layers, and of the whole parent."""
