"""Settings of the whole process that make torch fast and repeatable on a CPU.

Call `configure` before torch is imported, `configure_torch` after. Large temporary tensors cost page faults: on
SmolLM2-135M, huge pages and a heap that is not trimmed took a forward of 2,048 tokens from 3.7 to 2.8 s on 2 cores
(docs/log.md).
"""

import atexit
import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeVar

import psutil

CallableT = TypeVar("CallableT", bound=Callable[..., Any])
_RESIDENT, _CLEARLY = [0], 64 << 20  # bytes
ROUNDED = 1e-5  # relative error that float32 stays far below
_PAUSE_SOFT = 1  # omp.h: what the program has set stays
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_USUALLY, _WHILE_LOADING = gc.get_threshold(), (10_000, 10, 10)  # new objects between two looks for garbage


def configure() -> None:
    """Set the allocator, and make the libraries quiet and able to work offline. Safe to call twice.

    torch, transformers, Prefect and MLflow are 650,000 objects. To look for garbage among them takes a second while
    they load and another one when the process ends. So it is looked for seldom, and at the end not at all.
    """
    gc.set_threshold(*_WHILE_LOADING)
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc: slower, nothing else
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
            libc.mallopt(_M_TOP_PAD, 64 << 20)


def release_memory() -> None:
    """Give freed memory back to the machine; else the heap, which is not trimmed, would keep the peak of every stage.

    Call it between stages only: faulting the pages in again is what `configure` avoids.
    """
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def release_what_grew() -> None:
    """`release_memory` where this process holds clearly more than after the last time. A stage that only reads what is
    stored leaves nothing to free, and to look for it takes a fifth of a second.
    """
    import torch

    resident = psutil.Process().memory_info().rss
    if resident > _RESIDENT[0] + _CLEARLY or torch.accelerator.is_available():  # what that holds is not seen here
        release_memory()
        _RESIDENT[0] = psutil.Process().memory_info().rss


@contextlib.contextmanager
def imports_left_alone() -> Iterator[None]:
    """Within the block, garbage is looked for as often as Python usually does, so that the memory of what is dropped
    comes back soon, and not among what is there by now: that is half a million objects of imported modules, and a third
    of a second at the end of every stage.
    """
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    gc.freeze()
    gc.set_threshold(*_USUALLY)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        if not frozen:
            gc.unfreeze()


def usable_cores() -> int:
    """Processors that this process may use; two of them may be threads of one physical core."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """Physical cores among the processors that this process may use: a second thread on one core only waits."""
    if hasattr(os, "sched_getaffinity"):
        folders = [Path(f"/sys/devices/system/cpu/cpu{number}/topology") for number in os.sched_getaffinity(0)]
        with contextlib.suppress(OSError):
            return len({(folder / "thread_siblings_list").read_text() for folder in folders})
    return min(usable_cores(), psutil.cpu_count(logical=False) or usable_cores())


def configure_torch(threads: int | None) -> int:
    """Fix the number of torch's intra-op threads and return it; None asks for `default_threads`. Products of float32 on
    the CPU are made by oneDNN from here on.

    The last bit of a sum depends on both.
    """
    import torch

    count = threads or default_threads()
    torch.set_num_threads(count)
    _products_by_onednn(_onednn_keeps_float32())
    return count


def _products_by_onednn(yes: bool) -> None:
    """torch makes float32 products by MKL, whose kernels for processors that are not Intel's reach less than half of
    what oneDNN's do where there is AVX-512, and as much where there is not (docs/log.md). And where oneDNN makes them,
    a row's bits do not depend on the rows beside it, from a dozen on. It is asked for by allowing it to round to
    bfloat16, which it does only where a processor has units for that.
    """
    import torch

    torch.set_float32_matmul_precision("medium" if yes else "highest")
    torch.backends.cuda.matmul.fp32_precision = "ieee"  # "medium" would let a GPU round


@lru_cache(maxsize=1)
def _onednn_keeps_float32() -> bool:
    """Whether this processor computes in float32 what may be rounded to bfloat16, an error of 2e-3."""
    import torch

    noise = torch.Generator().manual_seed(0)
    _products_by_onednn(True)
    for rows, inner, columns in ((8, 64, 64), (256, 512, 512)):
        x = torch.randn(rows, inner, generator=noise)
        weight = torch.randn(columns, inner, generator=noise)
        exact = x.double() @ weight.double().T
        if (torch.nn.functional.linear(x, weight) - exact).norm() > ROUNDED * exact.norm():
            return False
    return True


@contextlib.contextmanager
def products_as_served() -> Iterator[None]:
    """Within the block, float32 products are made as in a process that never called `configure_torch`: whoever serves
    a child in torch.
    """
    import torch

    before = torch.get_float32_matmul_precision()
    _products_by_onednn(False)
    try:
        yield
    finally:
        _products_by_onednn(before == "medium")


def give_threads_back() -> None:
    """End the OpenMP threads that stand ready for products of the calling thread; its next product starts them again.

    libgomp counts those of all threads of the process. Where they are more than the processors, no thread spins at a
    barrier any more, in no thread's products: 800 switches of threads in a decode step of SmolLM2 in llama.cpp, which
    has torch's libgomp, and 5 ms.
    """
    with contextlib.suppress(OSError, AttributeError):  # another system, or an older libgomp
        maps = Path("/proc/self/maps").read_text().splitlines()
        for library in {line.split()[-1] for line in maps if "libgomp" in line}:
            ctypes.CDLL(library).omp_pause_resource_all(_PAUSE_SOFT)


def free_bytes(device: str) -> int:
    """Memory that is free on a torch device. On a GPU torch keeps that of tensors that are gone, and uses it again."""
    if not device.startswith("cuda"):
        return psutil.virtual_memory().available
    from torch import cuda

    return cuda.mem_get_info(device)[0] + cuda.memory_reserved(device) - cuda.memory_allocated(device)


def kept_per_device(count: int) -> Callable[[CallableT], CallableT]:
    """A decorator that keeps the last `count` results for each `Compute`, the function's last argument.

    In one common cache, threads that work on different devices would push out each other's results.
    """

    def decorate(function: CallableT) -> CallableT:
        caches: dict[object, Any] = {}

        @wraps(function)
        def call(*arguments: Any) -> Any:
            return caches.setdefault(arguments[-1], lru_cache(maxsize=count)(function))(*arguments)

        call.cache_clear = caches.clear  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate
