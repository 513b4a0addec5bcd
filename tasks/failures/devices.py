"""Runs take turns on a device of this machine: stage by stage, told while they wait; a stage that measures is alone.

One lock file per device and place on it in a folder of the machine, not of a workspace: a lock of the operating system,
so a killed run gives its device back. A server is not asked: a run by hand has none that others know.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass

from filelock import FileLock, Timeout

from blocks.runtime import device_locks
from profiles.schema import Profile
from tasks.progress import say

WITHOUT = ("parent", "corpus", "choose")  # stages that wait for files or solve: no device
WAIT_SECONDS = 0.2
ALONE = ("measure", "throughput")  # others on the device would be in the figures


@dataclass(frozen=True, kw_only=True)
class Share:
    """A device of this machine, and how many runs may use it at a time."""

    device: str
    runs: int


_SHARE: ContextVar[Share | None] = ContextVar("the device of this run", default=None)
_HELD: ContextVar[bool] = ContextVar("this run is in a stage that has its device", default=False)


@contextmanager
def sharing(profile: Profile) -> Iterator[None]:
    """Stages within the block take the profile's device."""
    share = Share(device=real_name(profile.hardware.device), runs=profile.orchestration.runs_per_device)
    token = _SHARE.set(share)
    try:
        yield
    finally:
        _SHARE.reset(token)


def real_name(device: str) -> str:
    """What the device is on this machine, whatever a process calls it: a GPU by its UUID."""
    if not device.startswith("cuda"):
        return device
    import torch

    index = torch.device(device).index or 0
    if index >= torch.cuda.device_count():
        return device
    return f"cuda-{torch.cuda.get_device_properties(index).uuid}"


def _places(share: Share) -> list[FileLock]:
    folder = device_locks()
    name = share.device.replace(":", "-")
    return [FileLock(folder / f"runs-on-{name}-{place}.lock", poll_interval=0.1) for place in range(share.runs)]


@contextmanager
def device_of(stage: str) -> Iterator[None]:
    """The device of this run for the length of a stage; a stage within another one has it already."""
    share = _SHARE.get()
    if share is None or stage in WITHOUT or _HELD.get():
        yield
        return
    with ExitStack() as stack:
        places = _places(share)
        for lock in _taken(places, share, stage) if stage not in ALONE else _all_taken(places, share, stage):
            stack.callback(lock.release)
        token = _HELD.set(True)
        stack.callback(_HELD.reset, token)
        yield


def _taken(places: Sequence[FileLock], share: Share, stage: str) -> list[FileLock]:
    told = False
    while True:
        for lock in places:
            with suppress(Timeout):
                lock.acquire(timeout=WAIT_SECONDS if told else 0)
                return [lock]
        if not told:
            _tell(share, stage)
        told = True


def _all_taken(places: Sequence[FileLock], share: Share, stage: str) -> list[FileLock]:
    """One after the other and always in this order, so that two who want all do not wait for each other."""
    told = False
    for lock in places:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not told:
                _tell(share, stage)
                told = True
            lock.acquire()
    return list(places)


def _tell(share: Share, stage: str) -> None:
    say(f"{stage}: waiting for {share.device}, which another run on this machine uses")
