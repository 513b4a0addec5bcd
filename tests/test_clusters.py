"""Where tasks run: places on devices, what travels to a worker, what is told when a cluster is not there.

Whole runs on real clusters, with workers killed, are in benchmarks/faults.py: each takes a minute.
"""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import cloudpickle
import pytest
import torch
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.context import serialize_context
from prefect.exceptions import ObjectNotFound
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_TASKS_REFRESH_CACHE,
    temporary_settings,
)
from prefect.task_engine import SyncTaskRunEngine
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.utilities.annotations import quote

from blocks import devices, runtime
from blocks.devices import on_device
from blocks.errors import PuzzleError
from blocks.library import BlockLibrary
from blocks.records import BlockRecord, ParentInfo
from flows import stages
from flows.run import Run, task_of
from profiles.errors import ProfileError
from profiles.load import load_profile
from profiles.schema import Orchestration
from tasks.running import devices as turns
from tasks.running import workers
from tasks.running.retries import TookTooLong
from tests.chain import Chain

PLACES = ("cpu:0", "cpu:1")


def at_work(devices: tuple[str, ...], count: int) -> list[tuple[str, float, float]]:
    """`count` threads that hold a device for a moment each: device, from, to."""
    seen: list[tuple[str, float, float]] = []

    def work() -> None:
        with on_device(devices) as device:
            started = time.monotonic()
            time.sleep(0.05)
            seen.append((device, started, time.monotonic()))

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def test_a_numbered_device_is_one_tasks_alone_and_all_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUZZLE_DEVICE_LOCKS", str(tmp_path))
    seen = at_work(PLACES, 6)
    assert {device for device, _, _ in seen} == set(PLACES)
    for place in PLACES:
        spans = sorted((start, end) for device, start, end in seen if device == place)
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False)), place
    spans = sorted((start, end) for _, start, end in seen)
    assert any(start < end for (_, end), (start, _) in zip(spans, spans[1:], strict=False))  # two at a time


def test_the_plain_cpu_is_shared() -> None:
    together, met = threading.Barrier(3, timeout=10), list[int]()

    def work() -> None:
        with on_device(["cpu"]):
            met.append(together.wait())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(met) == [0, 1, 2]


def test_results_are_kept_for_each_device() -> None:
    calls: list[str] = []

    @runtime.kept_per_device(1)
    def load(name: str, device: str) -> str:
        calls.append(f"{name} on {device}")
        return calls[-1]

    for device in ("cpu", "cuda:0", "cpu"):
        assert load("a", device) == f"a on {device}"
    assert calls == ["a on cpu", "a on cuda:0"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_worker_without_the_device_says_so() -> None:
    with (
        pytest.raises(PuzzleError, match=r"none of the devices cuda:0, cuda:1"),
        on_device(["cuda:0", "cuda:1"]),
    ):
        pass


GPUS = [f"{number}aaaaaaa-1111-2222-3333-444444444444" for number in range(4)]
SLICES = [f"{number}bbbbbbb-1111-2222-3333-444444444444" for number in range(2)]


def sees(monkeypatch: pytest.MonkeyPatch, variable: str | None, uuids: list[str]) -> list[str | None]:
    """Names of cuda, cuda:0, cuda:1, cuda:2 in a process that CUDA shows GPUs of these UUIDs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=uuids[index]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    return [devices.device_name(device) for device in ("cuda", "cuda:0", "cuda:1", "cuda:2")]


def test_a_gpu_has_one_name_whatever_a_process_is_let_see(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"cuda-{uuid}" for uuid in GPUS]
    assert sees(monkeypatch, None, GPUS) == [names[0], *names[:3]]
    assert sees(monkeypatch, "3", GPUS[3:]) == [names[3], names[3], None, None]
    assert sees(monkeypatch, "3,1", [GPUS[3], GPUS[1]])[1:3] == [names[3], names[1]]
    assert sees(monkeypatch, f"GPU-{GPUS[2]}", GPUS[2:3])[0] == names[2]
    assert sees(monkeypatch, "GPU-2aaa", GPUS[2:3])[0] == names[2]  # CUDA takes a beginning too
    for told in (GPUS[0], SLICES[1]):  # older CUDA tells the GPU of a slice
        assert sees(monkeypatch, f"MIG-{SLICES[1]}", [told])[0] == f"cuda-{SLICES[1]}"
    assert sees(monkeypatch, f"MIG-GPU-{GPUS[0]}/1/0", GPUS[:1])[0] == f"cuda-GPU-{GPUS[0]}-1-0"  # before CUDA 11.4
    assert [devices.device_name(device) for device in ("cpu", "cpu:3")] == ["cpu", "cpu"]


def test_runs_and_tasks_name_a_gpu_alike_and_keep_each_other_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUZZLE_DEVICE_LOCKS", str(tmp_path))
    sees(monkeypatch, "3,1", [GPUS[3], GPUS[1]])
    with on_device(["cuda:0"]), on_device(["cuda:0", "cuda:1"]) as second:
        assert second == "cuda:1"
    with turns.device_turn("measure", profile_with("hardware.device=cuda:0")):
        sees(monkeypatch, None, GPUS)
        busy = [device for device in ("cuda:1", "cuda:3") if not is_free(device)]
    assert busy == ["cuda:3"] and is_free("cuda:3")


def is_free(device: str) -> bool:
    name = devices.device_name(device)
    assert name is not None
    place = devices.enter(name, "task", devices.slots_of_task(device))
    if place is not None:
        place.release()
    return place is not None


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"address": "127.0.0.1:1"}, "threads are of this process"),
        ({"runner": "ray", "address": "127.0.0.1:1", "max_workers": 2}, "leave it out"),
        ({"devices": ["cuda:0", "cpu"]}, "of one kind"),
        ({"devices": ["cuda:0", "cuda:0"]}, "each named once"),
        ({"devices": ["gpu"]}, "is not a device"),
    ],
)
def test_an_orchestration_that_contradicts_itself_is_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Orchestration(**fields)


def test_workers_are_one_per_device() -> None:
    assert Orchestration().workers == 1
    assert Orchestration(devices=PLACES).workers == 2
    assert Orchestration(devices=("cpu",), max_workers=3).workers == 3


def profile_with(*settings: str) -> Any:
    return load_profile("tiny", list(settings))


def refused(*settings: str) -> str:
    with pytest.raises(PuzzleError) as error, workers.task_runner(profile_with(*settings)):
        pass
    return str(error.value)


def test_one_line_in_the_profile_chooses_the_runner() -> None:
    with workers.task_runner(profile_with("orchestration.max_workers=3")) as runner:
        assert type(runner).__name__ == "ThreadPoolTaskRunner"
    with pytest.raises(ProfileError, match="threads"):
        profile_with("orchestration.runner=spark")


@pytest.mark.parametrize("runner", ["dask", "ray"])
def test_a_missing_extra_is_told_in_a_sentence(runner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("tasks.running.workers.importlib.import_module", missing)
    assert f"pip install -e '.[{runner}]'" in refused(f"orchestration.runner={runner}")


@pytest.mark.parametrize(("runner", "what"), [("dask", "dask scheduler"), ("ray", "Ray node")])
def test_nobody_at_the_address_is_told_in_a_sentence(runner: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(f"prefect_{runner}")
    monkeypatch.setattr(workers, "CONNECT_SECONDS", 0.5)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        told = refused(f"orchestration.runner={runner}", "orchestration.address=127.0.0.1:9")
    assert f"no {what} answers at 127.0.0.1:9" in told


@pytest.mark.parametrize("runner", ["dask", "ray"])
def test_workers_elsewhere_need_a_server_that_they_can_reach(runner: str) -> None:
    pytest.importorskip(f"prefect_{runner}")
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert "PREFECT_API_URL" in refused(f"orchestration.runner={runner}", "orchestration.address=10.0.0.5:8786")


def sent(value: Any) -> int:
    return len(cloudpickle.dumps(value))


def test_what_travels_to_a_worker_is_values_and_paths(chain: Chain) -> None:
    """A submission is its task, parameters and context: some kB, whatever the size of parent and corpus."""
    profile = profile_with()
    slot, job = workers.worker_slot(profile), chain.job(0, "ffn", "no_op")
    submissions = {
        stages.record_task: (0, job.recording, 0, slot, str(chain.workspace)),
        stages.distill_task: (job, slot, str(chain.workspace)),
        stages.score_task: (
            [(chain.blocks[0], (0, 1))],
            *(chain.records[0], chain.scored, chain.parent, slot, str(chain.workspace)),
        ),
    }
    for task, parameters in submissions.items():
        assert sent(parameters) < 8_000, task.name
        assert sent(task) < 20_000, task.name


@task_of("broken", "broken")
def broken() -> None:
    raise PuzzleError("no such parent")


@task_of("slow", "slow")
def slow() -> None:
    time.sleep(5)


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    """A Prefect server for the tests of this file that need one."""
    from prefect.testing.utilities import prefect_test_harness  # loads all of Prefect's server

    with prefect_test_harness(server_startup_timeout=180):
        yield


def test_the_context_of_a_submission_is_small_and_a_failure_keeps_its_kind(
    chain: Chain, server: None, tmp_path: Path
) -> None:
    @flow
    def looking(parent: ParentInfo) -> int:
        run = Run(profile=profile_with("orchestration.task_timeout=1"), workspace=tmp_path)
        for which in (run.call, lambda *words: run.submit(*words).result()):
            with pytest.raises(PuzzleError, match="no such parent"):
                which(broken, "what is broken")
        with pytest.raises(TookTooLong, match=r"'choose' took longer .* \(1.0 s\)"), run.stage("choose"):
            run.call(slow, "what is slow")
        return sent(serialize_context())

    assert looking(chain.parent) < 40_000


@task_of("doubled", "doubled {number:02}")
def doubled(number: int, names: tuple[str, ...]) -> tuple[int, tuple[str, ...]]:
    return 2 * number, names


def test_values_reach_a_worker_as_they_were_sent(server: None, tmp_path: Path) -> None:
    from distributed import LocalCluster
    from prefect_dask.task_runners import DaskTaskRunner

    @flow
    def sent_there() -> list[Any]:
        run = Run(profile=profile_with(), workspace=tmp_path)
        return [run.submit(doubled, "doubled", number, ("a", "b")).result() for number in (1, 2)]

    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        runner: Any = DaskTaskRunner(address=cluster.scheduler_address)
        found = sent_there.with_options(task_runner=runner)()
    assert found == [(2, ("a", "b")), (4, ("a", "b"))]
    assert cloudpickle.loads(cloudpickle.dumps(quote(("a",)))).unwrap() == ("a",)  # what Ray does


@pytest.fixture
def end_states(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The last state of every task run, in order."""
    names: list[str] = []
    ended = SyncTaskRunEngine.handle_success

    def noted(engine: Any, result: Any, transaction: Any) -> Any:
        ended(engine, result, transaction)
        names.append(str(engine.state.name))

    monkeypatch.setattr(SyncTaskRunEngine, "handle_success", noted)
    return names


def test_every_finished_variant_is_a_cached_task_run_and_what_is_not_whole_is_made_again(
    chain: Chain, server: None, tmp_path: Path, end_states: list[str]
) -> None:
    """Prefect's record is asked only where the files are whole, and one that cannot be read does not stop the run."""
    workspace = tmp_path / "w"
    shutil.copytree(chain.workspace, workspace)
    jobs = [chain.job(layer, "ffn", variant) for layer in range(2) for variant in ("ffn32", "no_op")]
    storage = workspace / "prefect" / "storage"

    runner: Any = ThreadPoolTaskRunner(max_workers=1)

    @flow(task_runner=runner)
    def distil() -> tuple[list[BlockRecord], dict[str, UUID]]:
        run = Run(profile=profile_with("hardware.threads=1"), workspace=workspace)
        run.task_runs["record 0"] = run.task_runs["record 1"] = uuid4()
        return stages._distill(run, jobs, "distill"), run.task_runs

    with temporary_settings({PREFECT_TASKS_REFRESH_CACHE: False}):
        first, _ = distil()  # the library was there before Prefect had a record
        assert end_states == ["Completed"] * 4
        again, runs = distil()
        assert end_states[4:] == ["Cached"] * 4 and again == first
        (storage / jobs[1].key).write_text("")  # a run was killed while it wrote
        (workspace / "library" / f"{jobs[0].key}.safetensors").write_bytes(b"damaged")
        healed, _ = distil()
        assert end_states[8:] == ["Completed", "Cached", "Cached", "Completed"]  # the last was submitted
        assert [block.key for block in healed] == [block.key for block in first]
        assert healed[1:] == first[1:] and healed[0].weights == first[0].weights
        assert BlockLibrary(workspace).find(jobs[0].key) == healed[0] != first[0]  # made again, in other seconds
        distil()
        assert end_states[12:] == ["Cached"] * 4
        made = inputs_of(runs[jobs[0].key])
    assert made == {"wait_for": {runs["record 0"]}}


def inputs_of(task_run: UUID) -> dict[str, set[UUID]]:
    """The edges that lead to a task run, as Prefect's server has them; it writes them some moments later."""
    with get_client(sync_client=True) as client:
        for _ in range(100):
            with suppress(ObjectNotFound):
                inputs = client.read_task_run(task_run).task_inputs
                return {name: {one.id for one in ones} for name, ones in inputs.items() if ones}  # type: ignore[union-attr]
            time.sleep(0.1)
    raise AssertionError("the server never had the task run")


def test_a_ray_cluster_of_a_run_has_a_token_of_its_own_and_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = pytest.importorskip("ray._raylet").AuthenticationTokenLoader.instance()
    setup = pytest.importorskip("ray._private.authentication.authentication_token_setup")
    monkeypatch.setattr(setup, "_get_default_token_path", lambda: tmp_path / ".ray" / "auth_token")
    for name in workers.RAY_TOKENS:
        monkeypatch.delenv(name, raising=False)
    with workers._own_token():
        kept = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert loader.get_raw_token(ignore_auth_mode=True) == kept.read_text() and len(kept.read_text()) == 64
        assert kept.parent.stat().st_mode & 0o077 == 0
        setup.ensure_token_if_auth_enabled()  # what ray.init calls
    assert not kept.exists() and not any(name in os.environ for name in workers.RAY_TOKENS)
    assert not (tmp_path / ".ray").exists()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "my own")
    with workers._own_token():
        assert "RAY_AUTH_TOKEN_PATH" not in os.environ
