"""Runs take turns on a device of this machine, one stage at a time. A stage that measures has the device to itself.

blocks/devices.py makes the locks and says how they work. Here is only which stages take one, and how a run waits. The
locks are files of the machine and not entries of a server: a run that was started by hand has no server in common with
the other runs.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock

from blocks.devices import alone_on, device_name, enter
from profiles.schema import Profile
from tasks.running.progress import say

WITHOUT_A_DEVICE = ("parent", "read images", "corpus", "choose", "look for items")  # these stages read files, or solve
MEASURING = ("measure", "hold speed", "throughput")  # whatever else computes on the device would be in the figures
WAIT_SECONDS = 0.2


@contextmanager
def device_turn(stage: str, profile: Profile) -> Iterator[None]:
    """The profile's device, for the length of a stage of the run. Waits for other runs, and says so once."""
    if stage in WITHOUT_A_DEVICE:
        yield
        return
    wanted = profile.hardware.device if stage in MEASURING else profile.devices[0]
    device = device_name(wanted) or wanted.replace(":", "-")
    if stage in MEASURING:
        with alone(stage, device):
            yield
        return
    lock = _lock_of_run(device, profile.orchestration.runs_per_device, _SaysOnce(device, stage))
    try:
        yield
    finally:
        lock.release()


@contextmanager
def alone(what: str, device: str = "cpu") -> Iterator[None]:
    """A device of this machine for one measurement. Waits for the runs there, and says so once."""
    with alone_on(device, _SaysOnce(device, what).say_it):
        yield


def _lock_of_run(device: str, runs: int, waiting: "_SaysOnce") -> FileLock:
    """One of the locks that so many runs at a time may hold on a device."""
    while (lock := enter(device, "run", map(str, range(runs)))) is None:
        waiting.say_it()
        time.sleep(WAIT_SECONDS)
    return lock


class _SaysOnce:
    """Says once that a stage waits, and for what."""

    def __init__(self, device: str, stage: str) -> None:
        self.line: str | None = f"{stage}: waiting for {device}, which another run on this machine uses"

    def say_it(self) -> None:
        if self.line:
            say(self.line)
        self.line = None
