"""Two runs at once: what is made once, who waits for what, who has a device; a killed process holds nothing."""

import getpass
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from blocks import devices as locks
from blocks.devices import enter, on_device
from flows import stages
from flows.run import Run
from profiles.load import load_profile
from tasks.running import at_work, devices, sharing
from tasks.running.devices import device_turn
from tasks.running.sharing import TaskKey, exclusive, in_use, try_exclusive, unused
from tasks.score import scoring

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = [TaskKey(key=f"k{number}", what=f"variant {number}") for number in range(2)]


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
        "from pathlib import Path\nfrom tasks.running.sharing import TaskKey, exclusive\n"
        f"with exclusive(Path({str(workspace)!r}), TaskKey(key={key!r}, what='it')):"
    )


def is_free(workspace: Path, task: TaskKey) -> bool:
    with try_exclusive(workspace, task.key) as free:
        return free


def test_kill_9_lets_go_of_a_variant_at_once(tmp_path: Path, said: list[str]) -> None:
    with another_process(maker_of(tmp_path, "k0")) as process:
        assert not is_free(tmp_path, VARIANTS[0]) and is_free(tmp_path, VARIANTS[1])
        started = time.monotonic()
        threading.Timer(0.5, process.send_signal, [signal.SIGKILL]).start()
        with exclusive(tmp_path, VARIANTS[0]):
            assert 0.45 < time.monotonic() - started < 20
    waited, died = said
    assert waited == "waiting for variant 0: another process is at work on it"
    assert died.startswith(f"process {process.pid} on ") and died.endswith(
        " died at work on variant 0: it is taken up again"
    )
    assert is_free(tmp_path, VARIANTS[0])
    with exclusive(tmp_path, VARIANTS[0]):
        pass
    assert len(said) == 2  # told once


def test_one_who_fails_has_not_died(tmp_path: Path, said: list[str]) -> None:
    with pytest.raises(ValueError, match="bad"), exclusive(tmp_path, VARIANTS[0]):
        raise ValueError("bad")
    with exclusive(tmp_path, VARIANTS[0]):
        assert not said


def test_the_first_is_told_that_it_is_alone_and_the_others_that_they_are_not(tmp_path: Path) -> None:
    one, two, other = (try_exclusive(tmp_path, key) for key in ("run", "run", "another run"))
    with one as first, two as second, other as third:
        assert (first, second, third) == (True, False, True)
    with try_exclusive(tmp_path, "run") as again:
        assert again


def test_what_a_run_uses_is_not_taken_away_until_it_ends_or_dies(tmp_path: Path) -> None:
    imports = "from pathlib import Path\nfrom tasks.running.sharing import in_use"
    code = f"{imports}\nwith in_use(Path({str(tmp_path)!r}), 'k'):"
    with another_process(code):
        with in_use(tmp_path, "k"), unused(tmp_path, "k") as free, unused(tmp_path, "other") as other:
            assert not free and other
        with unused(tmp_path, "k") as free:
            assert not free
    with unused(tmp_path, "k") as free, unused(tmp_path, "k") as again:
        assert free and not again


def test_every_run_has_a_number_and_only_the_first_clears_leftovers(tmp_path: Path) -> None:
    left = tmp_path / "library" / ".x.part"
    unfinished = tmp_path / "parent" / ".making-x"
    left.parent.mkdir()
    unfinished.mkdir(parents=True)
    left.touch()
    assert at_work.enter(tmp_path) == 1 and not left.exists() and not unfinished.exists()
    assert at_work.enter(tmp_path) == 1  # asked again: the same
    left.touch()  # now it is somebody's who is at work
    code = (
        "from pathlib import Path\nfrom tasks.running.at_work import at_work_in\n"
        f"with at_work_in(Path({str(tmp_path)!r})) as"
    )
    with another_process(f"{code} number:\n    assert number == 2"):
        assert left.exists() and at_work.others_at_work(tmp_path)
        at_work.leave(tmp_path)
        assert at_work.others_at_work(tmp_path)
    assert not at_work.others_at_work(tmp_path)
    with at_work.at_work_in(tmp_path) as number:
        assert number == 1 and not left.exists()
    assert at_work.prefect_home(tmp_path, 1).name == "prefect"
    assert at_work.prefect_home(tmp_path, 2).name == "prefect-2"


def test_a_number_is_kept_until_the_last_block_that_asked_for_it_ends(tmp_path: Path) -> None:
    with at_work.at_work_in(tmp_path) as number:
        with at_work.at_work_in(tmp_path / ".") as again:
            assert again == number == 1
        assert at_work.others_at_work(tmp_path)
        at_work.leave(tmp_path)  # of a number that nobody asked to keep
        assert at_work.others_at_work(tmp_path)
    assert not at_work.others_at_work(tmp_path)
    assert at_work.enter(tmp_path) == 1
    with at_work.at_work_in(tmp_path):
        pass
    assert at_work.others_at_work(tmp_path)  # kept for the process, as the command line asked
    with at_work.at_work_in(tmp_path):
        at_work.leave(tmp_path)
        assert at_work.others_at_work(tmp_path)
    assert not at_work.others_at_work(tmp_path)


class AnotherRun:
    """A run in a thread: in its stage once `inside` is set, until `leave` is."""

    def __init__(self, stage: str, runs: int) -> None:
        self.inside, self.leave = threading.Event(), threading.Event()
        self.profile, self.stage = load_profile("tiny", [f"orchestration.runs_per_device={runs}"]), stage
        self.thread = threading.Thread(target=self._work)
        self.thread.start()

    def _work(self) -> None:
        with device_turn(self.stage, self.profile):
            self.inside.set()
            self.leave.wait(20)

    def waits(self) -> bool:
        """Whether it is still kept out after a moment."""
        return not self.inside.wait(0.3)

    def ends(self) -> None:
        self.leave.set()
        self.thread.join()


@pytest.fixture
def another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], AnotherRun]]:
    """Runs on a machine that nobody else uses; all end with the test."""
    monkeypatch.setenv("PUZZLE_DEVICE_LOCKS", str(tmp_path))
    monkeypatch.setattr(devices, "WAIT_SECONDS", 0.02)
    runs: list[AnotherRun] = []

    def start(stage: str, at_a_time: int) -> AnotherRun:
        runs.append(AnotherRun(stage, at_a_time))
        return runs[-1]

    yield start
    for run in runs:
        run.leave.set()
    for run in runs:
        run.thread.join()


@pytest.mark.parametrize(
    ("theirs", "ours", "waits"),
    [
        (("distill", 1), ("distill", 1), True),
        (("distill", 1), ("choose", 1), False),  # needs no device
        (("choose", 1), ("distill", 1), False),
        (("distill", 2), ("score", 2), False),
        (("distill", 2), ("measure", 2), True),  # measures alone
        (("throughput", 2), ("score", 2), True),
        (("throughput", 1), ("score", 2), True),  # whatever the other run would allow
        (("measure", 1), ("throughput", 3), True),
    ],
)
def test_turns_on_a_device(
    theirs: tuple[str, int],
    ours: tuple[str, int],
    waits: bool,
    said: list[str],
    another_run: Callable[[str, int], AnotherRun],
) -> None:
    first = another_run(*theirs)
    assert first.inside.wait(5)
    second = another_run(*ours)
    assert second.waits() == waits
    assert said == ([f"{ours[0]}: waiting for cpu, which another run on this machine uses"] if waits else [])
    first.ends()
    assert second.inside.wait(5)


def test_a_measurement_waits_for_runs_in_places_that_it_does_not_have(
    said: list[str], another_run: Callable[[str, int], AnotherRun]
) -> None:
    first, second = another_run("distill", 2), another_run("score", 2)
    assert first.inside.wait(5) and second.inside.wait(5)
    measuring = another_run("measure", 1)
    for other in (first, second):
        assert measuring.waits()
        other.ends()
    assert measuring.inside.wait(5)


def test_nobody_begins_while_a_measurement_waits(
    said: list[str], another_run: Callable[[str, int], AnotherRun]
) -> None:
    first = another_run("distill", 3)
    assert first.inside.wait(5)
    measuring = another_run("measure", 3)
    assert measuring.waits()
    late = another_run("score", 3)
    assert late.waits()
    first.ends()
    assert measuring.inside.wait(5) and late.waits()
    measuring.ends()
    assert late.inside.wait(5)


@pytest.mark.parametrize("device", ["cpu", "cpu:1"])
def test_a_measurement_and_a_task_of_another_run_keep_each_other_out(
    device: str, said: list[str], another_run: Callable[[str, int], AnotherRun]
) -> None:
    with on_device([device]):
        measuring = another_run("measure", 1)
        assert measuring.waits()
    assert measuring.inside.wait(5)
    started = time.monotonic()
    threading.Timer(0.3, measuring.ends).start()
    with on_device([device]):
        assert time.monotonic() - started > 0.2


def test_tasks_of_a_run_that_a_measurement_waits_for_go_on(
    said: list[str], another_run: Callable[[str, int], AnotherRun]
) -> None:
    working = another_run("distill", 1)
    assert working.inside.wait(5)
    measuring = another_run("measure", 1)
    assert measuring.waits()
    started = time.monotonic()
    with on_device(["cpu:0"]):  # one of that run's tasks
        assert time.monotonic() - started < 4
    working.ends()
    assert measuring.inside.wait(5)


def test_a_killed_measurement_lets_go_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUZZLE_DEVICE_LOCKS", str(tmp_path))
    code = "from blocks.devices import alone_on, enter\nwith alone_on('cpu', print):"
    with another_process(code) as process:
        assert enter("cpu", "run", ["0"]) is None and enter("cuda-1", "run", ["0"]) is not None
        process.kill()
        process.wait()
        place = enter("cpu", "run", ["0"])
        assert place is not None
        place.release()


def test_a_bench_waits_for_a_run_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    monkeypatch.setenv("PUZZLE_DEVICE_LOCKS", str(tmp_path))
    code = "from blocks.devices import enter\nplace = enter('cpu', 'run', ['0'])\nif place:"
    with another_process(code) as run:
        started = time.monotonic()
        threading.Timer(0.3, run.kill).start()
        with devices.alone("bench"):
            assert time.monotonic() - started > 0.25
    assert said == ["bench: waiting for cpu, which another run on this machine uses"]


def test_one_who_waits_for_a_measurement_looks_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look takes CPU time from the measurement."""
    monkeypatch.setenv("PUZZLE_DEVICE_LOCKS", str(tmp_path))
    inside, leave, looks, waiting = threading.Event(), threading.Event(), [0], [False]
    flock = FileLock._acquire

    def counted(self: Any) -> None:
        looks[0] += waiting[0] and threading.current_thread() is threading.main_thread()
        flock(self)

    def measure() -> None:
        with locks.alone_on("cpu", lambda: None):
            inside.set()
            leave.wait(20)

    def wait() -> None:
        waiting[0] = True
        threading.Timer(0.6, leave.set).start()

    monkeypatch.setattr(FileLock, "_acquire", counted)
    first = threading.Thread(target=measure)
    first.start()
    assert inside.wait(5)
    with locks.alone_on("cpu", wait):
        waiting[0] = False
    first.join()
    assert 0 < looks[0] < 30


def test_scores_are_computed_in_their_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is submitted computes at once: before the stage has the device it would do so beside another run."""
    inside: list[str] = []
    submitted: list[bool] = []

    @contextmanager
    def stage(_: Run, name: str) -> Iterator[Any]:
        inside.append(name)
        yield lambda done, total, text="": None
        inside.remove(name)

    def submit(*_: Any, **__: Any) -> Any:
        submitted.append(inside == ["score"])
        return SimpleNamespace(result=list)

    monkeypatch.setattr(Run, "stage", stage)
    monkeypatch.setattr(Run, "submit", submit)
    monkeypatch.setattr(scoring, "stored_score", lambda *_: None)
    monkeypatch.setattr(scoring, "documents_of", lambda *_: ())
    blocks: list[Any] = [
        SimpleNamespace(layer=layer, subblock="ffn", variant="no_op", status="trained", key=f"k{layer}")
        for layer in range(2)
    ]
    given: Any = SimpleNamespace(sequence_length=8, boundary="there", capability="", where="")
    run = Run(profile=load_profile("tiny"), workspace=tmp_path)
    assert stages.score_all(run, given, given, [given] * 2, blocks) == []
    assert submitted == [True, True]


def test_a_user_without_a_name_has_locks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1000")

    monkeypatch.delenv("PUZZLE_DEVICE_LOCKS", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(getpass, "getuser", nobody)
    assert locks.device_locks() == tmp_path / f"puzzle-devices-{os.getuid()}" and locks.device_locks().is_dir()
