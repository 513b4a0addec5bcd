"""The devices of this machine: what each is called, and locks that say who may compute on it.

The locks are files that the operating system locks (filelock), in a folder of the machine and not of a workspace. A
process that is killed holds none. There are four kinds for each device, always taken in this order:

    <device>.run-door.lock      held by a run for a moment, while it takes its own lock to begin a stage
    <device>.run-<slot>.lock    held by a run for the length of a stage; each run says itself how many slots there are
    <device>.task-door.lock     held by a task for a moment, while it takes its own lock to begin
    <device>.task-<slot>.lock   held by a task for its length

A measurement takes all of them, and so waits for everything that computes there, in whatever slots. It keeps each door
lock once it has it, so nothing new begins while it waits. It takes the runs' locks before it closes the door of the
tasks: a run that it waits for can still start the tasks that it needs to finish.
"""

import getpass
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from blocks.errors import PuzzleError

DEVICE_LOCKS = "PUZZLE_DEVICE_LOCKS"
POLL_SECONDS, DOOR_POLL_SECONDS = 0.05, 0.005
DOOR_SECONDS = 0.1  # a door is held for less than this, unless a measurement has it
Kind = Literal["run", "task"]


def device_locks() -> Path:
    """The folder of the locks of this machine's devices."""
    given = os.environ.get(DEVICE_LOCKS)
    folder = Path(given) if given else Path(tempfile.gettempdir()) / f"puzzle-devices-{_user()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the user of a container need not have a name
        return str(os.getuid())


def device_name(device: str) -> str | None:
    """The name of a torch device that is the same in every process of this machine; None for a device it lacks.

    A GPU or a MIG slice is named by its UUID, because a process that is shown only the second GPU calls it cuda:0.
    cpu:0 and cpu:1 are two slots of one device.
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
    """UUID of a GPU or MIG slice. Older CUDA gives a slice its GPU's UUID; CUDA_VISIBLE_DEVICES names the slice."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if index < len(visible) and visible[index].startswith("MIG-"):
        return visible[index].removeprefix("MIG-").replace("/", "-")
    return str(torch.cuda.get_device_properties(index).uuid).removeprefix("GPU-").removeprefix("MIG-")


@contextmanager
def on_device(devices: Sequence[str]) -> Iterator[str]:
    """The first of `devices` that is free on this machine, for one task; waits while all are taken.

    A numbered device (cuda:1) is used by one task at a time, whichever thread, process or run asks. `cpu` is shared by
    all; cpu:0 and cpu:1 are slots on it, to try a profile without GPUs. No task begins on a device while a run measures
    there. PuzzleError when this machine has none of the devices.
    """
    names = {device: name for device in devices if (name := device_name(device)) is not None}
    if not names:
        raise PuzzleError(
            f"this worker has none of the devices {', '.join(devices)} (orchestration.devices): name those that "
            "torch sees on the machines of the workers, or cpu"
        )
    device, lock = _first_free(names)
    try:
        yield device
    finally:
        lock.release()


def _first_free(names: dict[str, str]) -> tuple[str, FileLock]:
    pause = 0.01
    while True:
        for device, name in names.items():
            lock = enter(name, "task", slots_of_task(device))
            if lock is not None:
                return device, lock
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def slots_of_task(device: str) -> Iterable[str]:
    """A numbered device has one slot for tasks, a plain one as many as are asked for."""
    number = device.partition(":")[2]
    return (number if device.startswith("cpu") else "alone",) if number else (f"shared{slot}" for slot in count())


def enter(name: str, kind: Kind, slots: Iterable[str]) -> FileLock | None:
    """The lock of a free slot; None while all are taken, or while a measurement has the device or waits for it."""
    door = _door(name, kind)
    if not _acquired(door, DOOR_SECONDS):
        return None
    try:
        return next((lock for slot in slots if _acquired(lock := _lock(name, f"{kind}-{slot}"))), None)
    finally:
        door.release()


@contextmanager
def alone_on(name: str, wait: Callable[[], None]) -> Iterator[None]:
    """Nobody else on a device for the length of the block; `wait` is called before each time this has to wait."""
    with ExitStack() as held:
        for kind in ("run", "task"):
            _wait_for(_door(name, kind), held, wait)
            # while this holds the door, nobody can add a lock file to the folder
            for path in sorted(device_locks().glob(f"{name}.{kind}-*.lock")):
                if path.name != f"{name}.{kind}-door.lock":
                    _wait_for(FileLock(path, poll_interval=POLL_SECONDS), held, wait)
        yield


def _wait_for(lock: FileLock, held: ExitStack, wait: Callable[[], None]) -> None:
    if not _acquired(lock, DOOR_SECONDS):
        wait()
        lock.acquire(poll_interval=POLL_SECONDS)  # not more often: every look disturbs whoever measures there
    held.callback(lock.release)


def _acquired(lock: FileLock, seconds: float = 0) -> bool:
    with suppress(Timeout):
        lock.acquire(timeout=seconds)
        return True
    return False


def _door(name: str, kind: Kind) -> FileLock:
    return FileLock(device_locks() / f"{name}.{kind}-door.lock", poll_interval=DOOR_POLL_SECONDS)


def _lock(name: str, part: str) -> FileLock:
    return FileLock(device_locks() / f"{name}.{part}.lock", poll_interval=POLL_SECONDS)
