"""What a plan says of devices: FLOPs are those that torch counts, bytes those that the stages hold, no room is told."""

import itertools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import profiler
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from blocks.compute import HOST
from blocks.error_correction import correct
from blocks.families import has_experts
from blocks.fit import elimination_order
from blocks.records import SUBBLOCKS, LayerChoice
from profiles.load import load_profile
from profiles.schema import GKD, Orchestration, Profile
from tasks.distill import bld, gkd, record
from tasks.distill.gkd_job import distill_globally, job_of
from tasks.distill.gkd_targets import record_teacher
from tasks.distill.jobs import jobs_of
from tasks.distill.rounded import RoundedTraining
from tasks.engines.llama_cpp import LlamaCpp
from tasks.evaluate.typed_file import fitted_to
from tasks.export import quantise
from tasks.inputs.corpus import prepare_corpus
from tasks.inputs.corpus_sources import iterate_documents
from tasks.inputs.parent import prepare_parent
from tasks.operating import requirements
from tasks.planning import effort, memory, number_types
from tasks.planning.effort import Shape, shape_of
from tasks.planning.plan import config_parent, machine_rates, plan_of
from tasks.score.scoring import score_sequences
from tests.chain import CORPUS, SETTINGS, Chain, prepare, recording
from tests.test_gkd import CHILD
from tests.test_nvlabs import puzzle
from tests.test_plan import RATES, chain_profile

needs_llama_cpp = pytest.mark.skipif(LlamaCpp().missing() is not None, reason="llama.cpp is not installed")
EAGER = replace(HOST, attention="eager")  # scores as products, of which a backward pass has twice as many


def not_counted(function: Any) -> Any:
    """The function, unseen by the counter."""

    def run(*arguments: Any, **named: Any) -> Any:
        with _disable_current_modes():
            return function(*arguments, **named)

    return run


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """FLOPs of products, also of those in place; not of the rotary table."""

    def added(_: Any, a: Any, b: Any, **__: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    added_in_place = {torch.ops.aten.addmm_: added}
    with (
        pytest.MonkeyPatch.context() as patch,
        FlopCounterMode(display=False, custom_mapping=added_in_place) as counter,
    ):
        patch.setattr(LlamaRotaryEmbedding, "forward", not_counted(LlamaRotaryEmbedding.forward))
        yield counter


@pytest.fixture
def shape(chain: Chain) -> Shape:
    return shape_of(chain_profile(), chain.reader)


def test_flops_of_recording(shape: Shape, tmp_path: Path) -> None:
    parent, corpus = prepare(tmp_path)
    with counted() as counter, pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "elimination_order", not_counted(elimination_order))
        for layer in range(shape.depth):
            record.record_layer(layer, recording(parent, corpus), tmp_path, EAGER)
    assert counter.get_total_flops() == effort.record_work(shape).product


@pytest.mark.parametrize("closed_form", [True, False])
def test_flops_of_distilling(shape: Shape, chain: Chain, closed_form: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effort, "ATTEMPTS", 1)
    for part in SUBBLOCKS:
        for variant in shape.variants[part][1:]:
            settings = SETTINGS.model_copy(update={"closed_form": closed_form, "learning_rate": 1e-5})
            job = chain.job(1, part, variant.label, settings)
            bld.layer_data(job, job.recording.shards[0], chain.workspace, EAGER)  # once for all variants
            profile = chain_profile(bld=settings)
            with counted() as counter:
                block = bld.distill(job, chain.workspace, EAGER)
            assert block.attempts <= 1
            assert counter.get_total_flops() == effort.variant_work(replace(shape, profile=profile), variant).product


def test_flops_of_scoring(shape: Shape, chain: Chain) -> None:
    scored = replace(chain.scored, count=5)
    with counted() as counter:
        for layer, there in enumerate(chain.records):
            fresh = [
                block.model_copy(update={"key": f"{block.key}x"}) for block in chain.blocks if block.layer == layer
            ]
            work = [(block, scored.sequences) for block in fresh]
            score_sequences(work, there, scored, chain.parent, chain.workspace, EAGER)
    profile = chain_profile(scoring={"sequences": 5})
    planned = effort.score_work(replace(shape, profile=profile), range(shape.depth))
    assert counter.get_total_flops() == planned.product


@pytest.mark.parametrize("recorded_gib", [8.0, 0.0])
def test_flops_of_gkd(shape: Shape, chain: Chain, recorded_gib: float) -> None:
    settings = GKD(
        steps=4,
        batch_sequences=4,
        learning_rate=1e-3,
        evaluate_every=2,
        validation_sequences=5,
        recorded_gib=recorded_gib,
    )
    shutil.rmtree(chain.workspace / "gkd", ignore_errors=True)
    own = replace(shape, profile=chain_profile(gkd=settings))
    with counted() as counter:
        teacher = record_teacher(chain.parent, chain.corpus, settings, chain.workspace, EAGER)
    assert counter.get_total_flops() == effort.teacher_work(own).product
    job = job_of(CHILD, chain.blocks, teacher, settings, EAGER)
    with counted() as counter:
        result = distill_globally(job, chain.workspace, EAGER)
    sizes = {(part, v.label): (own.flops(v), own.parameters(v)) for part in SUBBLOCKS for v in own.variants[part]}
    chosen = [sizes[part, getattr(choice, part)] for choice in CHILD for part in SUBBLOCKS]
    layers, parameters = sum(flops for flops, _ in chosen) / own.layer(), sum(size for _, size in chosen)
    share = parameters / own.depth / own.layer_parameters
    assert counter.get_total_flops() == pytest.approx(effort.gkd_work(own, share, layers).product, rel=1e-12)
    assert result.held_bytes == (round(memory.trained_in_gkd(own, share)),)


def peak_of(work: Any) -> tuple[Any, int]:
    """What a function gives, and the most bytes of tensors that torch had allocated for it at a time."""
    with profiler.profile(activities=[profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        found = work()
    events = seen.profiler.kineto_results.events()
    sizes = [size for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")]
    return found, max(itertools.accumulate(sizes))


WIDE = {"llama": "ffn512", "mixtral": "ewidth256"}


@pytest.fixture(scope="module", params=WIDE)
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Profile, Path, Any, Any]:
    """A parent whose tensors are larger than what surrounds them."""
    asked = {
        "parent": {
            "kind": "tiny",
            "family": request.param,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "train_steps": 0,
        },
        "corpus": {**CORPUS.model_dump(), "sequence_length": 64},
        "hardware": {"micro_batch_tokens": 256, "compute_precision": "float32"},
        "record": {"statistics_sequences": 16, "hidden_sequences": 16, "validation_sequences": 4},
        "search_space": {"attention": ["kv1"], "ffn": [WIDE[request.param]]},
        "bld": {"steps": 2},
        "scoring": {"sequences": 4},
        "orchestration": {"devices": ["cuda:0"]},
    }
    profile, workspace = chain_profile(**asked), tmp_path_factory.mktemp("wide")
    parent = prepare_parent(profile.parent, workspace, lambda: iterate_documents(profile.corpus))
    corpus = prepare_corpus(profile.corpus, workspace / parent.folder, parent.fingerprint, workspace)
    return profile, workspace, parent, corpus


NARROW = replace(HOST, micro_batch_tokens=256)


def test_bytes_of_recording_and_bld(wide: tuple[Profile, Path, Any, Any]) -> None:
    profile, workspace, parent, corpus = wide
    asked = record.recording_of(profile, parent, corpus, NARROW)
    reader = record.open_parent(workspace / parent.folder, NARROW)
    shape = shape_of(profile, reader)
    made, most = peak_of(lambda: record.record_layer(0, asked, workspace, NARROW))
    states = shape.states(20)  # on the host, which is the device here
    if not has_experts(reader.config):  # nearly all of its layer is weights, which lie there twice while it is loaded
        assert memory.record_need(shape).bytes + 2 * states == pytest.approx(most, rel=0.1)
    job = next(j for j in jobs_of(profile, asked, [made] * 4, reader) if j.subblock == "ffn" and j.layer == 0)
    _, most = peak_of(lambda: bld.distill(job, workspace, NARROW))
    assert memory.distill_need(shape).bytes + 3 * states == pytest.approx(most, rel=0.1)


@pytest.mark.parametrize(("checkpointing", "batch"), [(False, 8), (True, 4)])
def test_bytes_of_gkd(
    wide: tuple[Profile, Path, Any, Any], checkpointing: bool, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gkd, "SAME", 0.0)  # a child that is its parent takes as much as any of its size
    profile, workspace, parent, corpus = wide
    settings = GKD(
        steps=1,
        batch_sequences=batch,
        learning_rate=1e-4,
        recorded_gib=0,
        validation_sequences=4,
        gradient_checkpointing=checkpointing,
    )
    teacher = record_teacher(parent, corpus, settings, workspace, NARROW)
    job = job_of((LayerChoice(),) * 4, (), teacher, settings, NARROW)
    _, most = peak_of(lambda: distill_globally(job, workspace, NARROW))
    changes = {"gkd": settings, "orchestration": Orchestration()}  # AdamW's temporaries are a CPU's
    shape = shape_of(profile.model_copy(update=changes), record.open_parent(workspace / parent.folder))
    assert memory.gkd_need(shape, 1.0).bytes == pytest.approx(most, rel=0.1)


@needs_llama_cpp
@pytest.mark.parametrize("wide", ["llama"], indirect=True)  # experts are not rounded
def test_bytes_of_training_the_rounding(wide: tuple[Profile, Path, Any, Any]) -> None:
    profile, workspace, parent, corpus = wide
    settings = GKD(
        steps=1, rounded_steps=1, batch_sequences=4, learning_rate=1e-4, recorded_gib=0, validation_sequences=4
    )
    teacher = record_teacher(parent, corpus, settings, workspace, NARROW)
    training = RoundedTraining(teacher=teacher, settings=settings, workspace=workspace, compute=NARROW)
    text = fitted_to(corpus, workspace)

    def work() -> None:
        model: Any = record.open_parent(workspace / parent.folder, NARROW).model()
        training.run(model, quantise.quantise_layers(model, text, quantise.Recipe.uniform("iq4_nl", 4)), "a model")

    _, most = peak_of(work)
    space = profile.search_space.model_copy(update={"precision": ("iq4_nl",)})
    changes = {"gkd": settings, "search_space": space, "orchestration": Orchestration()}
    shape = shape_of(profile.model_copy(update=changes), record.open_parent(workspace / parent.folder))
    assert memory.rounded_need(shape, 1.0).bytes == pytest.approx(most, rel=0.1)


@needs_llama_cpp
@pytest.mark.parametrize("wide", ["llama"], indirect=True)
@pytest.mark.parametrize("types", [("iq4_nl", "iq4_nl"), ("q8_0", "iq4_nl"), ("q5_0", "q8_0"), ("q8_0", "q8_0")])
def test_flops_of_rounding(types: tuple[str, str], wide: tuple[Profile, Path, Any, Any]) -> None:
    profile, workspace, parent, corpus = wide
    reader = record.open_parent(workspace / parent.folder, EAGER)
    model: Any = reader.model()
    recipe = quantise.Recipe.uniform(types[0], reader.depth).with_head(types[1])
    with counted() as counter, pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantise, "correct", not_counted(correct))
        quantise.quantise_layers(model, fitted_to(corpus, workspace), recipe)
    planned = number_types.rounding_work(shape_of(profile, reader), types)
    assert counter.get_total_flops() == planned.product and (planned.solve > 0) == (types != ("q8_0", "q8_0"))


LARGE = {"llama-3.1-8b-8xh100": (8_030_261_248, 8), "llama-3.3-70b-16-nodes": (70_553_706_496, 128)}


@pytest.mark.parametrize("name", LARGE)
def test_the_large_profiles_are_planned_without_a_download(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.inputs.parent._download", lambda *_, **__: pytest.fail("a plan asked the hub"))
    profile = load_profile(name)
    rates = machine_rates(profile, None)
    assert rates is not None
    plan = plan_of(profile, config_parent(profile.parent), rates)
    parameters, devices = LARGE[name]
    assert (plan.parent_parameters, plan.devices) == (parameters, devices)
    assert "40% of bfloat16 peak" in plan.utilisation and not plan.no_room
    assert all(s.device_bytes < 79.1 * 2**30 for s in plan.stages if s.device_bytes is not None)
    gkd = next(s for s in plan.stages if s.name == "GKD child")
    assert gkd.tokens >= 2e9 and gkd.flops is not None and gkd.seconds is not None
    assert gkd.flops / gkd.devices / (989.4e12 * gkd.seconds) == pytest.approx(0.4, rel=0.35)


def test_twice_the_devices_hold_half_and_take_half_the_time() -> None:
    profile = load_profile("llama-3.1-8b-8xh100", ["gkd.recorded_gib=0"])
    four = load_profile("llama-3.1-8b-8xh100", [f"orchestration.devices={[f'cuda:{n}' for n in range(4)]}"])
    shapes = [shape_of(each, config_parent(each.parent)) for each in (profile, four)]
    whole = [memory.trained_in_gkd(shape, 0.7) for shape in shapes]
    assert whole[1] == 2 * whole[0]
    work = effort.Work(product=8.0, exchange=3.0, fixed=1.0)
    assert work.over(4) == effort.Work(product=2.0, exchange=3.0, fixed=1.0)
    eight, half = ({s.name: s for s in plan_of(s.profile, s.parent, RATES).stages} for s in shapes)
    for name in ("record", "shards", "distill"):
        assert (eight[name].devices, half[name].devices) == (8, 4)
        assert 2 * (eight[name].seconds or 0) == pytest.approx(
            half[name].seconds, rel=0.12
        )  # reading weights is not shared


def test_what_does_not_fit_is_refused_with_its_stage_and_a_cure() -> None:
    code, out, err = puzzle("plan", "llama-3.1-8b-8xh100", "--set", "orchestration.devices=[cuda:0]")
    assert code == 2 and "GKD child needs" in err and "of a device that has 79.1 GiB" in err and "too much" in err
    assert "share it among more than 1 devices" in err and "GKD child" in out
    more = ("--set", "gkd.gradient_checkpointing=false", "--set", "hardware.micro_batch_tokens=32768")
    code, out, _ = puzzle("plan", "llama-3.1-8b-8xh100", "--json", *more)
    assert code == 2 and "gkd.gradient_checkpointing: true" in json.loads(out)["no_room"]


def test_shards_in_flight_are_told_and_machines_have_workers() -> None:
    small, large = (load_profile(n) for n in ("tiny", "llama-3.3-70b-16-nodes"))
    assert large.orchestration.workers == 128 and small.orchestration.workers == 1
    code, out, _ = puzzle("plan", "llama-3.1-8b-8xh100", "--json")
    told = json.loads(out)
    assert code == 0 and told["shards"] == 239
    length, most = 4096, -(-(1_000_000_000 // 4096) // 239)
    assert told["shard_bytes"] == 9 * (most + 16) * length * 4096 * 2  # 8 layers and one behind, bfloat16


def test_the_script_for_a_gpu_runs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from benchmarks import gpu

    words = ["gpu", str(tmp_path), "--prepare", str(tmp_path), "--device", "cpu", "--tiny"]
    monkeypatch.setattr("sys.argv", words)
    gpu.main()
    text = capsys.readouterr().out
    assert (tmp_path / "gpu.md").read_text() in text and "nothing here says anything of a GPU" in text
    assert "float32: equal" in text and "NOT equal" not in text
    assert all(f"| {stage} | " in text for stage in ("record", "distill", "score", "GKD parent", "GKD child"))
    with pytest.raises(SystemExit):  # what is stored would take no time
        gpu.main()


def test_a_machine_has_as_much_memory_as_it_has() -> None:
    profile = chain_profile()
    found = [plan_of(profile, config_parent(profile.parent), replace(RATES, memory=room)) for room in (1e5, 1e9)]
    assert "record needs" in found[0].no_room and found[1].no_room == ""


def test_gkd_on_several_machines_needs_what_starts_it_there(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = {"runner": "dask", "address": "tcp://127.0.0.1:1", "machines": 2}
    profile = chain_profile(orchestration=cluster)
    monkeypatch.delenv("PUZZLE_GKD_LAUNCHER", raising=False)
    assert any("orchestration.machines is 2" in told for told in requirements.lacking(profile))
    monkeypatch.setenv("PUZZLE_GKD_LAUNCHER", "srun torchrun")
    assert not any("orchestration.machines" in told for told in requirements.lacking(profile))
