"""How long one variant takes, what a timer of variants does, and what is kept of a measuring that is not finished.

Each engine has a timer of its own.
"""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TextIO

from blocks.records import Metric, Value
from blocks.variant import Variant
from profiles.schema import Scenario
from tasks.engines.timing_in_turns import relative_error
from tasks.running.progress import Progress

# what is timed beside the variants: embedding, final norm and head; the whole model
NON_BLOCK, PARENT = "non_block", "parent"


def name_of(variant: Variant) -> str:
    """`ffn ffn768`: a variant among all that is timed."""
    return f"{variant.subblock} {variant.label}"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of a prefill and of one decode step: medians over rounds, and their relative standard errors."""

    prefill: float
    decode: float
    prefill_spread: float = 0.0
    decode_spread: float = 0.0

    @classmethod
    def of(cls, prefill: Metric, decode: Metric) -> Self:
        """The times as numbers; their standard errors become shares of them."""
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


class Load(Value):
    """A scenario at one of its batch sizes."""

    scenario: Scenario
    batch: int

    @property
    def label(self) -> str:
        """`chat x4`."""
        return f"{self.scenario.name} x{self.batch}"


KEPT_SECONDS = 24 * 3600.0  # figures of other days are not mixed: the machine may have become another


class KeptFigures:
    """What a measuring has measured so far, in a file of one JSON object a line.

    Whoever measures after a process that was killed goes on from there. sitting: the number of this process among
    those that measured.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and time.time() - path.stat().st_mtime > KEPT_SECONDS:
            path.unlink()
        self.rows = list(_rows(path))
        self.file: TextIO | None = None
        self.sitting = 1 + max((row["sitting"] for row in self.rows), default=-1)

    def add(self, load: Load, what: str, **figures: Any) -> None:
        """Keep what was measured of a part. A process that is killed right after this has not measured in vain."""
        row = {"load": load.label, "what": what, "sitting": self.sitting, **figures}
        self.rows.append(row)
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a", encoding="utf-8", buffering=1)
        self.file.write(json.dumps(row) + "\n")

    def of(self, load: Load, what: str | None = None) -> list[dict[str, Any]]:
        """What is kept of a load: of one part, or of all."""
        return [row for row in self.rows if row["load"] == load.label and what in (None, row["what"])]

    def discard(self) -> None:
        """Delete the file: the measuring is finished, or has to start anew."""
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file. What was added stays in it."""
        if self.file is not None:
            self.file.close()


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that were written whole."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):  # killed while it wrote: the next line must not be joined to this one
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    for line in text.splitlines():
        with suppress(ValueError):
            yield json.loads(line)


class VariantTimer(Protocol):
    """Times the parts of a parent and its variants in one engine."""

    def time(self, what: str, load: Load, kept: KeptFigures, progress: Progress) -> None:
        """Measure a part until all that is needed of it is kept. `progress` is that of all parts under this load."""

    def timings(self, load: Load, kept: KeptFigures) -> dict[str, Timing]:
        """Seconds of one copy of every variant, of NON_BLOCK and of PARENT, from what was kept of all parts."""

    def close(self) -> None:
        """Free what the timer holds."""
