"""Where tasks run: places on devices, what travels to a worker, what is told when a cluster is not there.

Whole runs on real clusters, with workers killed, are in benchmarks/clusters.py: each takes a minute.
"""

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
import torch
from prefect import flow
from prefect.context import serialize_context
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from blocks import devices, runtime
from blocks.devices import on_device
from blocks.errors import PuzzleError
from blocks.records import ParentInfo
from flows import reuse, stages
from profiles.errors import ProfileError
from profiles.load import load_profile
from profiles.schema import Orchestration
from tasks.running import devices as turns
from tasks.running import workers
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
    with turns.sharing(profile_with("hardware.device=cuda:0")), turns.device_of("measure"):
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
    seat, job = workers.seat_of(profile), chain.job(0, "ffn", "no_op")
    submissions = {
        stages.record_task: (0, job.record_key, chain.parent, chain.corpus, profile, str(chain.workspace)),
        stages.distill_task: (job, seat, str(chain.workspace)),
        stages.score_task: (
            [(chain.blocks[0], (0, 1))],
            *(chain.records[0], chain.scored, chain.parent, seat, str(chain.workspace)),
        ),
    }
    for task, parameters in submissions.items():
        assert sent(parameters) < 8_000, task.name
        assert sent(task) < 20_000, task.name


def test_the_context_of_a_submission_is_small_and_finished_work_is_one_cached_run_a_layer(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[tuple[Any, str]] = []
    shown = reuse.found_task

    def noted(*asked: Any) -> None:
        states.append((asked, shown(*asked, return_state=True).name))

    monkeypatch.setattr(reuse, "found_task", noted)

    @flow
    def looking(parent: ParentInfo) -> int:
        reuse.show_finished("distill", [0, 1, 1, 1])
        return sent(serialize_context())

    with prefect_test_harness(server_startup_timeout=180):
        assert looking(chain.parent) < 40_000
    assert states == [(("distill", 0, 1), "Cached"), (("distill", 1, 3), "Cached")]


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
