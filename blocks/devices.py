"""Devices of this machine: one name for each, whatever a process calls it, and who computes on it at a time.

Locks of the operating system, in a folder of the machine and not of a workspace: a killed process holds none. For each
device, and in this order:

    <device>.run-door.lock       passed by a run that begins a stage
    <device>.run-<place>.lock    a run in a stage; how many places there are is each run's own affair
    <device>.task-door.lock      passed by a task that begins
    <device>.task-<place>.lock   a task

A measurement takes all of them, and so waits for all that is at work, in whatever places. It keeps a door that it
has: nobody begins while it waits. Tasks find their door open until no run is left that could wait for them.
"""

import getpass
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

DEVICE_LOCKS = "PUZZLE_DEVICE_LOCKS"
POLL_SECONDS, DOOR_POLL_SECONDS = 0.05, 0.005
DOOR_SECONDS = 0.1  # who passes a door is through in less
Kind = Literal["run", "task"]


def device_locks() -> Path:
    """Where the locks of this machine's devices lie."""
    given = os.environ.get(DEVICE_LOCKS)
    folder = Path(given) if given else Path(tempfile.gettempdir()) / f"puzzle-devices-{_user()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return str(os.getuid())


def device_name(device: str) -> str | None:
    """What a torch device is on this machine: a GPU or a MIG slice by its UUID, since a process may be let see the
    second GPU as cuda:0. cpu:0, cpu:1 are places on one device. None for what is not there.
    """
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return "cpu"
    import torch

    index, module = int(number or 0), getattr(torch, kind)
    if not module.is_available() or index >= module.device_count():
        return None
    return f"cuda-{_uuid(torch, index)}" if kind == "cuda" else f"{kind}-{index}"


def _uuid(torch: Any, index: int) -> str:
    """Older CUDA tells a MIG slice's GPU, which other slices share; the variable that let us see it names the slice."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if index < len(visible) and visible[index].startswith("MIG-"):
        return visible[index].removeprefix("MIG-").replace("/", "-")
    return str(torch.cuda.get_device_properties(index).uuid).removeprefix("GPU-").removeprefix("MIG-")


def places_of_task(device: str) -> Iterable[str]:
    """A numbered device is one task's alone, a plain one is shared by as many as come."""
    number = device.partition(":")[2]
    return (number if device.startswith("cpu") else "alone",) if number else (f"shared{place}" for place in count())


def enter(name: str, kind: Kind, places: Iterable[str]) -> FileLock | None:
    """A place on a device; None while all are taken, or a measurement has the device or waits for it."""
    door = _door(name, kind)
    if not _taken(door, DOOR_SECONDS):
        return None
    try:
        return next((lock for place in places if _taken(lock := _lock(name, f"{kind}-{place}"))), None)
    finally:
        door.release()


@contextmanager
def alone_on(name: str, wait: Callable[[], None]) -> Iterator[None]:
    """Nobody else on a device for the length of the block; `wait` is called before it has to be waited for."""
    with ExitStack() as held:
        for kind in ("run", "task"):
            _wait_for(_door(name, kind), held, wait)
            # no file is added behind a closed door
            for path in sorted(device_locks().glob(f"{name}.{kind}-*.lock")):
                if path.name != f"{name}.{kind}-door.lock":
                    _wait_for(FileLock(path, poll_interval=POLL_SECONDS), held, wait)
        yield


def _wait_for(lock: FileLock, held: ExitStack, wait: Callable[[], None]) -> None:
    if not _taken(lock, DOOR_SECONDS):
        wait()
        lock.acquire(poll_interval=POLL_SECONDS)  # whoever measures meanwhile is disturbed by every look
    held.callback(lock.release)


def _taken(lock: FileLock, seconds: float = 0) -> bool:
    with suppress(Timeout):
        lock.acquire(timeout=seconds)
        return True
    return False


def _door(name: str, kind: Kind) -> FileLock:
    return FileLock(device_locks() / f"{name}.{kind}-door.lock", poll_interval=DOOR_POLL_SECONDS)


def _lock(name: str, part: str) -> FileLock:
    return FileLock(device_locks() / f"{name}.{part}.lock", poll_interval=POLL_SECONDS)
