"""Runs take turns on a device of this machine: stage by stage, told while they wait; a stage that measures is alone.

The locks are in blocks/devices.py. A server is not asked: a run by hand has none that others know.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from filelock import FileLock

from blocks.devices import alone_on, device_name, enter
from profiles.schema import Profile
from tasks.running.progress import say

WITHOUT = ("parent", "corpus", "choose")  # stages that wait for files or solve: no device
WAIT_SECONDS = 0.2
ALONE = ("measure", "throughput")  # others on the device would be in the figures


@dataclass(frozen=True, kw_only=True)
class Share:
    """A device of this machine, and how many runs this one would share it with, itself included."""

    device: str
    runs: int


_SHARE: ContextVar[Share | None] = ContextVar("the device of this run", default=None)
_HELD: ContextVar[bool] = ContextVar("this run is in a stage that has its device", default=False)


@contextmanager
def sharing(profile: Profile) -> Iterator[None]:
    """Stages within the block take the profile's device."""
    device = profile.hardware.device
    name = device_name(device) or device.replace(":", "-")
    token = _SHARE.set(Share(device=name, runs=profile.orchestration.runs_per_device))
    try:
        yield
    finally:
        _SHARE.reset(token)


@contextmanager
def device_of(stage: str) -> Iterator[None]:
    """The device of this run for the length of a stage; a stage within another one has it already."""
    share = _SHARE.get()
    if share is None or stage in WITHOUT or _HELD.get():
        yield
        return
    waiting = _Waiting(share.device, stage)
    with ExitStack() as stack:
        if stage in ALONE:
            stack.enter_context(alone_on(share.device, waiting.tell))
        else:
            stack.callback(_place(share, waiting).release)
        token = _HELD.set(True)
        stack.callback(_HELD.reset, token)
        yield


@contextmanager
def alone(what: str, device: str = "cpu") -> Iterator[None]:
    """A device of this machine for one measurement outside of any run: waits for runs there, and says so."""
    with alone_on(device, _Waiting(device, what).tell):
        yield


def _place(share: Share, waiting: "_Waiting") -> FileLock:
    while (lock := enter(share.device, "run", map(str, range(share.runs)))) is None:
        waiting.tell()
        time.sleep(WAIT_SECONDS)
    return lock


class _Waiting:
    """Says once that a stage waits, and for what."""

    def __init__(self, device: str, stage: str) -> None:
        self.line: str | None = f"{stage}: waiting for {device}, which another run on this machine uses"

    def tell(self) -> None:
        if self.line:
            say(self.line)
        self.line = None
