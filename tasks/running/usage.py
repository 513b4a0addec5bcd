"""What a run took: wall time, CPU seconds, peak memory; the same of every stage."""

import contextlib
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil

from blocks.records import StageTime

_PEAKS = [0]  # resident sizes before `restart_peak`


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Clock readings at the start of a run, and what its stages took since."""

    wall: float
    cpu: float
    stages: list[StageTime] = field(default_factory=list)

    @classmethod
    def start(cls) -> Self:
        """Now, counted from the start of the process for CPU time."""
        return cls(wall=time.monotonic(), cpu=time.process_time())

    @contextmanager
    def noted(self, name: str) -> Iterator[None]:
        """Note what the stage inside the block takes. One that fails is not noted."""
        wall, cpu = time.monotonic(), time.process_time()
        yield
        took = {"seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}
        self.stages.append(StageTime(name=name, **took))

    def seconds(self) -> float:
        """Wall seconds since the start."""
        return time.monotonic() - self.wall

    def cpu_seconds(self) -> float:
        """CPU seconds of this process since the start, all threads."""
        return time.process_time() - self.cpu

    @staticmethod
    def peak_memory_bytes() -> int:
        """Highest resident size of this process so far."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return max(*_PEAKS, peak if sys.platform == "darwin" else peak * 1024)


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (highest) of this process; where the system does not tell, its peak."""
    told = resident_of("self", field)
    return Usage.peak_memory_bytes() if told is None else told


def resident_of(pid: int | str, field: str) -> int | None:
    """The same of any process; None where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def restart_peak() -> bool:
    """Let VmHWM start from what the process holds now; the peak so far is kept. False where the system has no such."""
    _PEAKS.append(Usage.peak_memory_bytes())
    del _PEAKS[:-1]
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


CROWDED = 0.15  # share of the processors; what takes less is the system's own housekeeping


def busy_seconds() -> float:
    """Processor seconds that anybody took since the machine started, other virtual machines on it included."""
    times = psutil.cpu_times()
    return float(times.user + times.system + getattr(times, "nice", 0.0) + getattr(times, "steal", 0.0))


class Others:
    """Who else computes on this machine, from the moment this is made: wall times beside them are theirs as well."""

    def __init__(self) -> None:
        self.began, self.busy, self.own = time.monotonic(), busy_seconds(), _family_seconds()

    def load(self) -> float:
        """How many processors others took since then, on average."""
        took = max(time.monotonic() - self.began, 1e-9)
        return max(0.0, (busy_seconds() - self.busy - (_family_seconds() - self.own)) / took)

    def crowd(self, threads: int) -> str:
        """A clause for people when others left fewer processors than so many threads need; "" otherwise."""
        return crowd(self.load(), threads)


def crowd_now(threads: int, seconds: float = 0.5) -> str:
    """See `Others.crowd`, over the next moment."""
    others = Others()
    time.sleep(seconds)
    return others.crowd(threads)


def crowd(others: float, threads: int, processors: int = os.cpu_count() or 1) -> str:
    """See `Others.crowd`. others: processors that others took, on average."""
    if others <= CROWDED * processors or processors - others >= threads:
        return ""
    return f"others took {others:.1f} of {processors} processors while {threads} thread{'s' * (threads > 1)} were timed"


def _family_seconds() -> float:
    """CPU seconds of this process and of those that it started, also of those that have ended."""
    own, found = psutil.Process(), 0.0
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            found += times.user + times.system + times.children_user + times.children_system
    return found
