"""Two runs at once: what is made once, who waits for what, who has a device; a killed process holds nothing."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from blocks import runtime
from profiles.load import load_profile
from tasks.failures import devices, presence, sharing
from tasks.failures.devices import device_of
from tasks.failures.sharing import Piece, being_made, in_turn, made_once

ROOT = Path(__file__).resolve().parent.parent
PIECES = [Piece(key=f"k{number}", what=f"variant {number}") for number in range(4)]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the person at the console is told."""
    lines: list[str] = []
    for module in (sharing, devices):
        monkeypatch.setattr(module, "say", lines.append)
    return lines


@contextmanager
def another_process(code: str) -> Iterator[subprocess.Popen[str]]:
    """A process that is inside the locks of `code` when it has printed a line; killed at the end."""
    script = f"{code}\n    print('in', flush=True)\n    import time; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "in\n"
        yield process
    finally:
        process.kill()
        process.wait()


def maker_of(workspace: Path, key: str) -> str:
    return (
        "from pathlib import Path\nfrom tasks.failures.sharing import Piece, made_once\n"
        f"with made_once(Path({str(workspace)!r}), Piece(key={key!r}, what='it')):"
    )


def test_kill_9_lets_go_of_a_variant_at_once(tmp_path: Path, said: list[str]) -> None:
    with another_process(maker_of(tmp_path, "k0")) as process:
        assert being_made(tmp_path, PIECES[0]) and not being_made(tmp_path, PIECES[1])
        threading.Timer(0.5, process.send_signal, [signal.SIGKILL]).start()
        started = time.monotonic()
        with made_once(tmp_path, PIECES[0]):
            assert 0.3 < time.monotonic() - started < 5
    waited, died = said
    assert waited == "waiting for variant 0: another process is at work on it"
    assert died.startswith(f"process {process.pid} on ") and died.endswith(
        " died at work on variant 0: it is taken up again"
    )
    assert not being_made(tmp_path, PIECES[0])
    with made_once(tmp_path, PIECES[0]):
        pass
    assert len(said) == 2  # told once


def test_one_who_fails_has_not_died(tmp_path: Path, said: list[str]) -> None:
    with pytest.raises(ValueError, match="bad"), made_once(tmp_path, PIECES[0]):
        raise ValueError("bad")
    with made_once(tmp_path, PIECES[0]):
        assert not said


@pytest.mark.parametrize("at_a_time", [1, 2, 9])
def test_what_another_run_makes_comes_last(tmp_path: Path, said: list[str], at_a_time: int) -> None:
    order: list[int] = []
    with ThreadPoolExecutor(max_workers=4) as pool, another_process(maker_of(tmp_path, "k0")) as process:

        def submit(index: int) -> Future[int]:
            order.append(index)
            return pool.submit(lambda: index * 10)

        found = []
        for index, future in in_turn(PIECES, submit, tmp_path, at_a_time):
            found.append((index, future.result()))
            if len(found) == 3:
                assert sorted(order) == [1, 2, 3]
                threading.Timer(0.4, process.kill).start()
    assert order[-1] == 0 and sorted(found) == [(index, index * 10) for index in range(4)]
    assert said == ["waiting for variant 0: another process is at work on it"]


def test_never_more_than_so_many_at_a_time(tmp_path: Path) -> None:
    at_work, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.02)
        with lock:
            at_work -= 1

    with ThreadPoolExecutor(max_workers=4) as pool:
        done = [index for index, _ in in_turn(PIECES, lambda _: pool.submit(work), tmp_path, 2)]
    assert sorted(done) == [0, 1, 2, 3] and most == 2


def test_every_run_has_a_place_and_only_the_first_clears_leftovers(tmp_path: Path) -> None:
    left = tmp_path / "library" / ".x.part"
    left.parent.mkdir()
    left.touch()
    assert presence.place_in(tmp_path) == 1 and not left.exists()
    assert presence.place_in(tmp_path) == 1  # asked again: the same
    left.touch()  # now it is somebody's who is at work
    code = (
        "from pathlib import Path\nfrom tasks.failures.presence import at_work_in\n"
        f"with at_work_in(Path({str(tmp_path)!r})) as"
    )
    with another_process(f"{code} number:\n    assert number == 2"):
        assert left.exists() and presence.others_at_work(tmp_path)
        presence.leave(tmp_path)
        assert presence.others_at_work(tmp_path)
    assert not presence.others_at_work(tmp_path)
    with presence.at_work_in(tmp_path) as number:
        assert number == 1 and not left.exists()
    assert presence.prefect_home(tmp_path, 1).name == "prefect"
    assert presence.prefect_home(tmp_path, 2).name == "prefect-2"


HOLDER = """
from profiles.load import load_profile
from tasks.failures.devices import device_of, sharing
profile = load_profile("tiny", ["orchestration.runs_per_device={runs}"])
with sharing(profile), device_of({stage!r}):"""


@pytest.mark.parametrize(
    ("runs", "theirs", "ours", "waits"),
    [
        (1, "distill", "distill", True),
        (1, "distill", "choose", False),  # needs no device
        (1, "choose", "distill", False),
        (2, "distill", "score", False),
        (2, "distill", "measure", True),  # measures alone
        (2, "throughput", "score", True),
    ],
)
def test_turns_on_a_device(
    runs: int, theirs: str, ours: str, waits: bool, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUZZLE_DEVICE_LOCKS", str(tmp_path))
    profile = load_profile("tiny", [f"orchestration.runs_per_device={runs}"])
    with another_process(HOLDER.format(runs=runs, stage=theirs)) as process, devices.sharing(profile):
        threading.Timer(0.6, process.kill).start()
        started = time.monotonic()
        with device_of(ours), device_of(ours):  # a stage within a stage does not wait for itself
            assert (time.monotonic() - started > 0.4) == waits
    told = [f"{ours}: waiting for cpu, which another run on this machine uses"]
    assert said == (told if waits else [])


def test_both_kinds_of_device_locks_lie_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUZZLE_DEVICE_LOCKS", str(tmp_path / "devices"))
    with runtime.on_device(["cpu:7"]):
        assert list((tmp_path / "devices").iterdir())
