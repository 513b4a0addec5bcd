"""Process-wide settings that make torch fast and repeatable on a CPU. Call `configure` before torch is imported.

Large temporaries cost page faults: on SmolLM2-135M, huge pages and a heap that is not trimmed took a forward of 2,048
tokens from 3.7 to 2.8 s on 2 cores (docs/log.md).
"""

import contextlib
import ctypes
import gc
import os
import sys

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


def set_threads(threads: int | None) -> int:
    """Fix torch's intra-op threads (all cores when None); sums depend on it in the last bit. Returns the number."""
    import torch

    count = threads or os.cpu_count() or 1
    torch.set_num_threads(count)
    return count
