"""How fast a machine is, in the few rates that the time of a run is modelled from.

This machine is measured for about two seconds, on products of the parent's own sizes. On an idle machine that is wall
time, the best of several. Where others take a good part of the processors, wall time would be theirs as well: then the
CPU time that one thread takes, divided by the threads, stands for what the same work takes on the idle machine, and
`loaded` says so.

A stage is slower than its products alone, since it does not keep every thread busy: `SERIAL` is the share of its work
that one thread does while the others wait. The rates of products are those that a stage reaches.

What an idle machine gave is kept for a day in the user's cache. Another device's rates come from its hardware target;
the search itself computes in float32 there as well.
"""

import hashlib
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.nn import functional as F

from blocks.families import experts_of
from blocks.files import write_text
from blocks.library import digest_of
from blocks.parent import Parent
from blocks.runtime import configure_torch, default_threads, products_as_served
from profiles.hardware import HardwareTarget
from profiles.schema import Precision, Profile
from tasks.running.usage import busy_seconds

TOKENS = 1024  # rows of the measured products
LARGEST = 4096  # columns and inner length at most: 64 MB of noise, whatever the parent
SECONDS_EACH = 0.2  # of one measurement, repeated; the system tells in hundredths of a second who else was busy
# smollm2-cpu's eight stages that compute took 1,263 s on two threads (benchmarks/plan.md at commit 62c3789). Products,
# at the measured rates with both threads busy throughout, explain 936 s, all other terms of the plan 118 s:
# (1263 - 118) / 936 = 1.22 = 1 + SERIAL * (2 - 1).
SERIAL = 0.22
LOADED = 0.15  # share of the processors taken by others from which wall time is not trusted
HASH_BYTES = 8 << 20
WEIGHT_BYTES = 192 << 20
DISK_BYTES_PER_SECOND = 1e9  # write or read, and the digest, on a machine that is not measured
NAMES_PER_SECOND = 1.5e6  # CPython 3.11 on a server's core, for a machine that is not measured
BLOCK_NAMES = 290  # of one layer in that table, over all spellings gguf 0.19 knows
NAMES = 32 * BLOCK_NAMES
KEPT_FOR = timedelta(days=1)
TRAINING = 0.40  # of a GPU's bfloat16 peak in record, BLD, GKD: assumed. Model FLOPs, without what is computed twice
# from and to the other machines, for each of 8 devices that share 8 adapters of 400 Gbit/s, of which 70 % are reached
NETWORK = 8 * 50e9 * 0.70
EAGER_OPERATIONS = 12  # small operations' time behind one counted kernel in eager torch: Python, reshapes, rotary


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a stage reaches.

    product: float32 FLOP/s of products as the stages make them. serving: the same in the serving engine, at
    the precision that costs are measured in. solve: float64 FLOP/s of dense solves. stream: bytes/s of element-wise
    work, read and written. weights: bytes/s of matrices times one vector. disk: bytes/s written or read, and digested.
    names: tensor names per second that gguf enters in a table, Python's speed. floor: seconds of a small operation.
    float32, tf32: FLOP/s of products in these formats, where the stages' own is another. link: bytes/s from and to the
    other devices. memory: bytes of a device. utilisation: of the peak in products, in words, where it is assumed. at:
    when this machine was measured, ISO 8601.
    """

    name: str
    measured: bool
    product: float
    serving: float
    solve: float
    stream: float
    weights: float
    disk: float
    names: float
    floor: float
    float32: float | None = None
    tf32: float | None = None
    link: float = math.inf
    memory: float | None = None
    utilisation: str = ""
    threads: int = 1
    loaded: bool = False
    at: str = ""


def rates_of(target: HardwareTarget, precision: Precision, computed: Precision = "float32", machines: int = 1) -> Rates:
    """Rates of a device that is not here, by its hardware target. computed: precision of the stages' products."""
    on_gpu = target.kind == "gpu"
    computed = computed if computed in target.peak_tflops else "float32"
    share = TRAINING if on_gpu and computed != "float32" else target.achievable_compute
    product = target.peak_tflops[computed] * 1e12 * share
    solve = target.peak_tflops.get("float64", target.peak_tflops["float32"] / 2) * 1e12 * target.achievable_compute
    link = (target.interconnect_gb_per_second or 0) * 1e9 * target.achievable_interconnect
    return Rates(
        name=target.name,
        measured=False,
        product=product,
        serving=target.flops_per_second(precision),
        solve=solve,
        stream=target.bytes_per_second,
        weights=target.bytes_per_second,
        disk=DISK_BYTES_PER_SECOND,
        names=NAMES_PER_SECOND,
        floor=target.kernel_floor_microseconds * 1e-6,
        float32=target.flops_per_second("float32"),
        tf32=product / 2 if on_gpu and computed != "float32" else None,  # half of bfloat16's, by every data sheet
        link=(min(link, NETWORK) if machines > 1 and link else NETWORK if machines > 1 else link) or math.inf,
        memory=target.memory_gib * 2**30,
        utilisation=f"{share:.0%} of {computed} peak ({target.peak_tflops[computed]:g} TFLOP/s), assumed",
    )


def target_of(rates: Rates, precision: Precision) -> HardwareTarget:
    """This machine as a hardware target: what was measured is achievable, so the shares are 1. Beside q8_0 weights
    scores, embedding and head are in 16 bits (tasks/measure/roofline.py): at the same rate.
    """
    precisions: tuple[Precision, ...] = (precision, "bfloat16") if precision == "q8_0" else (precision,)
    return HardwareTarget(
        name="this-machine",
        description=f"measured, {rates.threads} threads",
        kind="cpu",
        peak_tflops={name: rates.serving / 1e12 for name in precisions},
        memory_gb_per_second=rates.weights / 1e9,
        memory_gib=psutil.virtual_memory().total / 2**30,
        kernel_floor_microseconds=EAGER_OPERATIONS * rates.floor * 1e6,
        achievable_compute=1.0,
        achievable_bandwidth=1.0,
    )


def rates_for(profile: Profile, parent: Parent, again: bool = False) -> Rates:
    """This machine's rates in the sizes of a parent, with the threads of a profile. See `rates_here`."""
    config, hardware = parent.config, profile.hardware
    precision = hardware.precision if hardware.engine == "torch" else "float32"
    threads = hardware.threads or default_threads()
    return rates_here(config.hidden_size, experts_of(config).width, precision, threads, again)


def rates_here(
    hidden_size: int, intermediate_size: int, precision: Precision, threads: int, again: bool = False
) -> Rates:
    """This machine's rates: those it had within the last day, else, or when asked `again`, measured now.

    A measurement beside others is used and not kept.
    """
    asked = [min(hidden_size, LARGEST), min(intermediate_size, LARGEST), precision, threads]
    machine = [platform.node(), platform.machine(), os.cpu_count(), torch.__version__, _code_digest()]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "puzzle"
    kept = folder / f"rates-{digest_of(asked=asked, machine=machine)}.json"
    if not again:
        with suppress(OSError, ValueError, TypeError):  # missing, damaged or of another version: measured again
            known = Rates(**json.loads(kept.read_text(encoding="utf-8")))
            if timedelta() <= datetime.now(UTC) - datetime.fromisoformat(known.at) < KEPT_FOR:
                return known
    rates = calibrate(hidden_size, intermediate_size, precision, threads)
    rates = replace(rates, at=datetime.now(UTC).isoformat(timespec="minutes"))
    if not rates.loaded:
        with suppress(OSError):  # a home that cannot be written to
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, json.dumps(asdict(rates), indent=1))
    return rates


def _code_digest() -> str:
    """Of this file: what is measured another way is another measurement."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def calibrate(hidden_size: int, intermediate_size: int, precision: Precision, threads: int) -> Rates:
    """Measure this machine with so many threads; the process keeps the number it had."""
    before = torch.get_num_threads()
    configure_torch(threads)
    try:
        with torch.no_grad():
            return _calibrate(min(hidden_size, LARGEST), min(intermediate_size, LARGEST), precision, threads)
    finally:
        torch.set_num_threads(before)


def _calibrate(width: int, inner: int, precision: Precision, threads: int) -> Rates:
    noise = torch.Generator().manual_seed(0)
    x, weight = torch.randn(TOKENS, width, generator=noise), torch.randn(inner, width, generator=noise)
    dtype = getattr(torch, precision)
    low_x, low_weight = x.to(dtype), weight.to(dtype)
    size = min(inner, 1024)
    gram = torch.eye(size, dtype=torch.float64) * 2 + 1e-3
    sides = torch.ones(size, size, dtype=torch.float64)
    states = torch.ones(32 << 18)  # 32 MB: more than the caches of a core
    count = max(2, WEIGHT_BYTES // low_weight.nbytes)  # more than the caches hold, in the sizes of a model
    matrices, one = [torch.ones_like(low_weight) for _ in range(count)], low_x[:1]
    small = torch.ones(1, 64)
    clock = _Clock(threads)
    flops = 2.0 * TOKENS * width * inner
    with products_as_served():
        serving = flops / clock.stage_seconds(lambda: F.linear(low_x, low_weight))
        weights = count * low_weight.nbytes / clock.seconds(lambda: [F.linear(one, m) for m in matrices], threads=1)
    return Rates(
        name="this machine",
        measured=True,
        product=flops / clock.stage_seconds(lambda: F.linear(x, weight)),
        serving=serving,
        solve=(2 * size**3 / 3 + 2 * size**3) / clock.stage_seconds(lambda: torch.linalg.solve(gram, sides)),
        stream=2 * states.nbytes / clock.seconds(lambda: F.silu(states), threads=1),
        weights=weights,
        disk=_disk_rate(clock),
        names=_names_rate(clock),
        floor=clock.seconds(lambda: [small + 1 for _ in range(100)], threads=1) / 100,
        memory=float(psutil.virtual_memory().total),
        threads=threads,
        loaded=clock.loaded,
    )


class _Clock:
    """Times work; remembers whether others were busy meanwhile."""

    def __init__(self, threads: int) -> None:
        self.threads, self.loaded = threads, False

    def stage_seconds(self, work: Callable[[], Any]) -> float:
        """What products take within a stage, where the threads are not all busy all the time."""
        return self.seconds(work) * with_serial_share(self.threads)

    def seconds(self, work: Callable[[], Any], threads: int | None = None) -> float:
        """Wall time; on a loaded machine one thread's CPU time, divided by `threads` [all of them].

        Memory serves one thread about as fast as all, and so does Python.
        """
        work()
        seconds, loaded = self._timed(work)
        self.loaded |= loaded
        if loaded:  # threads that wait for one another spin, beside others for long: CPU time of one thread is its own
            torch.set_num_threads(1)
            try:
                seconds = self._timed(work, cpu_time=True)[0] / (threads or self.threads)
            finally:
                torch.set_num_threads(self.threads)
        return max(seconds, 1e-9)

    def _timed(self, work: Callable[[], Any], cpu_time: bool = False) -> tuple[float, bool]:
        """The best of several, in CPU time where that is asked for or others are busy; whether they were."""
        wall: list[float] = []
        cpu: list[float] = []
        started, busy, own = time.perf_counter(), busy_seconds(), time.process_time()
        while len(wall) < 2 or time.perf_counter() - started < SECONDS_EACH:
            a, b = time.perf_counter(), time.process_time()
            work()
            wall.append(time.perf_counter() - a)
            cpu.append(time.process_time() - b)
        took = time.perf_counter() - started
        others = busy_seconds() - busy - (time.process_time() - own)
        seconds, loaded = machine_share(wall, cpu, others, took, os.cpu_count() or 1)
        return (min(cpu) if cpu_time else seconds), loaded


def with_serial_share(threads: int) -> float:
    """How much longer a stage takes than its products would with every thread busy throughout (Amdahl's law)."""
    return 1 + SERIAL * (threads - 1)


def machine_share(
    wall: list[float], cpu: list[float], others: float, took: float, processors: int
) -> tuple[float, bool]:
    """The best wall time, or, where others took too much of the processors meanwhile, the best CPU time."""
    loaded = others > LOADED * took * processors
    return (min(cpu), True) if loaded else (min(wall), False)


def _names_rate(clock: _Clock) -> float:
    """Names per second in gguf's own table of tensor names."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    return NAMES / clock.seconds(lambda: get_tensor_name_map(MODEL_ARCH.LLAMA, NAMES // BLOCK_NAMES), threads=1)


def _disk_rate(clock: _Clock) -> float:
    """Bytes per second written to a temporary file with their digest, as every stored tensor is."""
    data = os.urandom(HASH_BYTES)
    with tempfile.TemporaryDirectory() as folder:

        def store() -> None:
            (Path(folder) / "probe").write_bytes(data)
            hashlib.sha256(data).digest()

        return HASH_BYTES / clock.seconds(store, threads=1)
