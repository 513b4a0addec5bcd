"""What a run took: wall time, CPU seconds, peak memory."""

import resource
import sys
import time
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Clock readings at the start of a run."""

    wall: float
    cpu: float

    @classmethod
    def start(cls) -> Self:
        """Now, counted from the start of the process for CPU time."""
        return cls(wall=time.monotonic(), cpu=time.process_time())

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
        return peak if sys.platform == "darwin" else peak * 1024
