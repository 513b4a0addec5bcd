"""Process-wide settings that make torch fast and repeatable on a CPU. Call `configure` before torch is imported.

Large temporaries cost page faults: on SmolLM2-135M, huge pages and a heap that is not trimmed took a forward of 2,048
tokens from 3.7 to 2.8 s on 2 cores (docs/log.md).
"""

import contextlib
import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeVar

import psutil

from blocks.devices import device_name, enter, places_of_task
from blocks.errors import PuzzleError

CallableT = TypeVar("CallableT", bound=Callable[..., Any])
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def configure() -> None:
    """Set the allocator and quiet, offline-friendly defaults of the libraries. Safe to call twice."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
            libc.mallopt(_M_TOP_PAD, 64 << 20)
        except (OSError, AttributeError):  # not glibc: slower, nothing else
            pass


def release_memory() -> None:
    """Give what was freed back to the machine: a heap that is not trimmed keeps every stage's peak.

    Between stages only: faulting the pages in again is what `configure` avoids.
    """
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def usable_cores() -> int:
    """Processors that this process may use; two of them may be threads of one physical core."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """Physical cores among the processors that this process may use: a second thread on one only waits."""
    if hasattr(os, "sched_getaffinity"):
        folders = [Path(f"/sys/devices/system/cpu/cpu{number}/topology") for number in os.sched_getaffinity(0)]
        with contextlib.suppress(OSError):
            return len({(folder / "thread_siblings_list").read_text() for folder in folders})
    return min(usable_cores(), psutil.cpu_count(logical=False) or usable_cores())


def set_threads(threads: int | None) -> int:
    """Fix torch's intra-op threads (`default_threads` when None); sums depend on it in the last bit. Returns the
    number.
    """
    import torch

    count = threads or default_threads()
    torch.set_num_threads(count)
    return count


def kept_per_device(count: int) -> Callable[[CallableT], CallableT]:
    """Keep the last `count` results for each device; the device is the function's last argument.

    Threads that work on different devices would push each other's results out of one common cache.
    """

    def decorate(function: CallableT) -> CallableT:
        caches: dict[str, Any] = {}

        @wraps(function)
        def call(*arguments: Any) -> Any:
            return caches.setdefault(arguments[-1], lru_cache(maxsize=count)(function))(*arguments)

        call.cache_clear = caches.clear  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


@contextmanager
def on_device(devices: Sequence[str]) -> Iterator[str]:
    """Take the first of `devices` that is free on this machine; wait while all are taken.

    A numbered device (cuda:1) is one task's alone, whatever thread, process or run asks: a file lock that the system
    gives back when its holder is killed. `cpu` is shared; cpu:0, cpu:1 are places on it, to try a profile without GPUs.
    Nobody is let in where a run measures (blocks/devices.py).
    PuzzleError when this machine has none of them.
    """
    with ExitStack() as held:
        device = _taken(devices, held)
        yield device


def _taken(devices: Sequence[str], held: ExitStack) -> str:
    """The device that was free first; its place there stays taken until `held` closes."""
    names = {device: name for device in devices if (name := device_name(device)) is not None}
    if not names:
        raise PuzzleError(
            f"this worker has none of the devices {', '.join(devices)} (orchestration.devices): name those that "
            "torch sees on the machines of the workers, or cpu"
        )
    pause = 0.01
    while True:
        for device, name in names.items():
            place = enter(name, "task", places_of_task(device))
            if place is not None:
                held.callback(place.release)
                return device
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
