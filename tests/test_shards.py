"""More tokens than a shard holds: the same statistics, states and scores as at once, and a training that goes on."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blocks.compute import HOST
from blocks.errors import DamagedBlock
from blocks.library import read_tensors
from blocks.records import BlockRecord, LayerRecord
from flows import stages
from profiles.load import load_profile
from profiles.schema import BLD, Record
from tasks.distill import bld
from tasks.distill import record as recording_module
from tasks.distill.bld import Job, State, distill, distill_shard, rates_of
from tasks.distill.jobs import better_of, jobs_of
from tasks.distill.record import (
    Part,
    Recording,
    drop,
    enter,
    entered,
    parts_of,
    read_states,
    record_layer,
    recorded,
    slices,
)
from tasks.score.scoring import ScoringSet, score_sequences
from tests.chain import RECORD, SETTINGS, Chain, recording

COMPUTE = replace(HOST, micro_batch_tokens=96)  # three sequences
TRAINED = 24  # sequences, in two shards; the 32 that are counted are in two as well


def in_shards(chain: Chain) -> Recording:
    settings = Record(**{**RECORD.model_dump(), "shard_tokens": 512})
    return recording(chain.parent, chain.corpus, settings, TRAINED)


def record_all(wanted: Recording, depth: int, workspace: Path) -> list[LayerRecord]:
    for number in range(len(wanted.counted)):
        records = [record_layer(layer, wanted, workspace, COMPUTE, number) for layer in range(depth)]
    return records


@pytest.fixture(scope="module")
def place(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain's parent and corpus, recorded in shards."""
    workspace = tmp_path_factory.mktemp("shards")
    for part in ("parent", "corpus"):
        shutil.copytree(chain.workspace / part, workspace / part)
    record_all(in_shards(chain), chain.reader.depth, workspace)
    return workspace


def job_of(chain: Chain, place: Path, layer: int, variant: str, settings: BLD = SETTINGS) -> Job:
    wanted = in_shards(chain)
    record = recorded(layer, wanted, place)
    assert record is not None
    return Job(recording=wanted, record=record, layer=layer, subblock="ffn", variant=variant, settings=settings, seed=0)


def test_slices_are_equal_and_no_larger_than_asked() -> None:
    assert slices(10, 4) == [(0, 3), (3, 6), (6, 10)] and slices(4, 4) == [(0, 4)]


def test_statistics_in_shards_are_those_of_all_tokens_at_once(chain: Chain, place: Path) -> None:
    assert len(in_shards(chain).counted) == 2 and not in_shards(chain).kept
    for layer, whole in enumerate(chain.records):
        found = recorded(layer, in_shards(chain), place)
        assert found is not None and found.boundary is None
        one, other = (read_tensors(w, r.statistics) for w, r in ((place, found), (chain.workspace, whole)))
        for name in one.keys() - {"ffn_order"}:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-3)
    folder = place / "record" / in_shards(chain).key
    assert sorted(path.name for path in folder.glob("layer_*")) == [f"layer_{i:03d}.json" for i in range(3)]


def test_a_killed_first_pass_sums_no_shard_twice(chain: Chain, tmp_path: Path, place: Path) -> None:
    for part in ("parent", "corpus"):
        (tmp_path / part).symlink_to(place / part)
    wanted = in_shards(chain)
    for layer in range(3):
        record_layer(layer, wanted, tmp_path, COMPUTE, 0)
    record_layer(0, wanted, tmp_path, COMPUTE, 1)  # and killed: the run starts from the first shard again
    for layer, found in enumerate(record_all(wanted, 3, tmp_path)):
        whole = recorded(layer, wanted, place)
        assert whole is not None and found.statistics.sha256 == whole.statistics.sha256


def test_a_lost_shard_of_the_first_pass_is_not_passed_over(chain: Chain, tmp_path: Path, place: Path) -> None:
    for part in ("parent", "corpus"):
        (tmp_path / part).symlink_to(place / part)
    with pytest.raises(DamagedBlock, match="shard 1 of layer 0.*run again"):
        record_layer(0, in_shards(chain), tmp_path, COMPUTE, 1)


def test_states_of_a_shard_are_the_parents(chain: Chain, place: Path) -> None:
    wanted, tokens = in_shards(chain), read_tensors(chain.workspace, chain.corpus.tokens)
    for shard in wanted.shards:
        ids = torch.cat([tokens["train"][slice(*shard.train)], tokens["validation"][slice(*shard.validation)]]).long()
        with torch.no_grad():
            states = chain.reader.model().model(ids, output_hidden_states=True).hidden_states
        for layer in (0, 2, 1):
            enter([layer], Part(shard=shard), wanted, place, COMPUTE)
            hidden = read_states(entered(layer, shard, wanted, place), place)
            torch.testing.assert_close(hidden, states[layer], rtol=1e-4, atol=1e-5)
        drop(range(3), wanted, place)
    assert not list((place / "record" / wanted.key).glob("entering/*"))


def test_parts_of_a_shard_are_its_states_bit_for_bit(chain: Chain, place: Path, tmp_path: Path) -> None:
    """However many devices take it through the parent, each in whole micro-batches; a damaged part does not count."""
    for folder in ("parent", "corpus", "record"):
        shutil.copytree(place / folder, tmp_path / folder, ignore=shutil.ignore_patterns("entering"))
    wanted, shard = in_shards(chain), in_shards(chain).shards[0]
    enter([0, 1, 2], Part(shard=shard), wanted, tmp_path, COMPUTE)
    whole = [read_states(entered(layer, shard, wanted, tmp_path), tmp_path) for layer in range(3)]
    drop(range(3), wanted, tmp_path)
    parts = parts_of(shard, 3, COMPUTE.sequences(32))
    rows = [part.rows(3) for part in parts]
    assert len(whole[0]) == shard.sequences == 18 and rows == [(0, 6), (6, 12), (12, 18)]
    assert len(parts_of(shard, 128, 3)) == 6 and parts_of(shard, 4, 3)[1].rows(3) == (3, 9)
    for part in parts:
        assert not entered(1, shard, wanted, tmp_path)
        enter([1, 2] if part.number else [0, 1, 2], part, wanted, tmp_path, COMPUTE)
    for layer in (1, 2):
        assert torch.equal(read_states(entered(layer, shard, wanted, tmp_path), tmp_path), whole[layer])
    assert not entered(0, shard, wanted, tmp_path)
    (tmp_path / entered(1, shard, wanted, tmp_path)[1].path).write_bytes(b"damaged")
    assert not entered(1, shard, wanted, tmp_path)


def test_a_variant_goes_on_where_the_shard_before_left_it(chain: Chain, place: Path, tmp_path: Path) -> None:
    """Killed between two shards it ends in the same bits; it was trained on both, and the whole schedule."""
    for part in ("parent", "corpus", "record"):
        shutil.copytree(place / part, tmp_path / part, ignore=shutil.ignore_patterns("entering"))
    steps = BLD(steps=12, batch_sequences=4, learning_rate=2e-3, warmup_steps=2, clip_norm=1.0)
    job = job_of(chain, place, 1, "ffn32", steps)
    assert [job.steps_of(number) for number in range(2)] == [range(6), range(6, 12)]
    whole = distill(job, place, COMPUTE)
    for number, shard in enumerate(job.recording.shards):
        enter([1], Part(shard=shard), job.recording, tmp_path, COMPUTE)
        found = distill_shard(job, tmp_path, COMPUTE, number)
        if number == 0:
            assert isinstance(found, State) and distill_shard(job, tmp_path, COMPUTE, 0) == found
            assert "exp_avg.mlp.up_proj.weight" in read_tensors(tmp_path, found.weights)
    assert isinstance(found, BlockRecord) and found.weights == whole.weights and found.status == "trained"
    assert found.steps == 12 and found.tokens == 12 * 4 * 32
    assert found.nmse_after is not None and found.nmse_closed_form is not None
    assert found.nmse_after < found.nmse_closed_form
    assert not list((tmp_path / "distill").iterdir())


def test_a_lost_state_is_not_passed_over(chain: Chain, place: Path) -> None:
    job = job_of(chain, place, 0, "ffn32")
    enter([0], Part(shard=job.recording.shards[1]), job.recording, place, COMPUTE)
    with pytest.raises(DamagedBlock, match="run again"):
        distill_shard(job, place, COMPUTE, 1)


def test_scores_without_recorded_states_are_those_with(chain: Chain, place: Path) -> None:
    """In shards of four sequences, and with a parent that has no room in memory."""
    last = recorded(2, in_shards(chain), place)
    assert last is not None
    scored = ScoringSet(corpus=chain.corpus, last=last, count=6, length=32)
    shards = scored.shards(4 * 32)
    assert [(shard.first, shard.count) for shard in shards] == [(0, 3), (3, 3)]
    shutil.copytree(chain.workspace / "library", place / "library", dirs_exist_ok=True)
    for layer in (1, 0, 2):
        record = recorded(layer, in_shards(chain), place)
        members = [block for block in chain.blocks if block.layer == layer]
        assert record is not None
        for shard in shards:
            work = [(member, shard.sequences) for member in members]
            score_sequences(work, record, shard, chain.parent, place, COMPUTE)
        found = score_sequences([(m, tuple(range(6))) for m in members], record, scored, chain.parent, place, COMPUTE)
        for one, other in zip(found, [s for s in chain.scores if s.layer == layer], strict=True):
            assert one.kl_per_sequence == pytest.approx(other.kl_per_sequence, rel=1e-4, abs=1e-7)
            assert one.lm_loss_per_sequence == pytest.approx(other.lm_loss_per_sequence, rel=1e-4, abs=1e-6)


class Done:
    """A task that has ended."""

    def __init__(self, result: Callable[[], Any]) -> None:
        self.result = result


def plain_run(workspace: Path, submit: Callable[..., Done], devices: str = "[]") -> Any:
    """What a stage needs of a run, without Prefect."""
    settings = [f"hardware.micro_batch_tokens={COMPUTE.micro_batch_tokens}", "hardware.threads=1"]
    settings += [f"orchestration.devices={devices}"]

    @contextmanager
    def stage(name: str) -> Iterator[Any]:
        yield lambda *_: None

    profile, call = load_profile("tiny", settings), lambda *_, after: None
    return SimpleNamespace(profile=profile, workspace=workspace, submit=submit, stage=stage, call=call)


def test_a_run_holds_the_states_of_few_layers_and_leaves_none(
    chain: Chain, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage of the flow, its tasks called as plain functions: killed in the second shard, and run again."""
    for part in ("parent", "corpus", "record"):
        shutil.copytree(place / part, tmp_path / part, ignore=shutil.ignore_patterns("entering"))
    seen: list[int] = []

    def submit(which: Any, makes: str, *values: Any, after: Any = ()) -> Any:
        made = which.fn(*values)
        seen.append(len(list((tmp_path / "record").glob("*/entering/*.safetensors"))))
        if len(seen) == killed_after:
            raise KeyboardInterrupt
        return Done(lambda: made)

    monkeypatch.setattr(stages, "as_completed", list)
    run = plain_run(tmp_path, submit)
    jobs = [job_of(chain, place, layer, variant) for layer in range(3) for variant in ("ffn32", "linear")]
    trained: list[tuple[str, int]] = []

    def counted(job: Job, *more: Any) -> Any:
        trained.append((job.key, more[-1]))
        return bld.distill_shard(job, *more)

    monkeypatch.setattr(stages, "distill_shard", counted)
    killed_after = 13
    with pytest.raises(KeyboardInterrupt):
        stages._distill(run, jobs, "distill")
    killed_after = -1
    blocks = stages._distill(run, jobs, "distill")
    assert sorted(trained) == sorted((job.key, number) for job in jobs for number in (0, 1))  # none of them twice
    assert [block.status for block in blocks] == ["trained"] * 6 and max(seen) == 2
    assert not list((tmp_path / "record").glob("*/entering/*"))
    plain = distill(jobs[0], place, COMPUTE)
    assert blocks[0].weights == plain.weights


def test_no_run_takes_states_away_that_another_one_uses(
    chain: Chain, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a run trains on the first shard, another one finds everything recorded, and then trains its own variants on
    both shards; the states that the first run has then are its own to the end, and it leaves none.
    """
    for part in ("parent", "corpus", "record"):
        shutil.copytree(place / part, tmp_path / part, ignore=shutil.ignore_patterns("entering"))
    monkeypatch.setattr(stages, "as_completed", list)
    monkeypatch.setattr(stages, "recording", lambda *_: in_shards(chain))
    first, second = ([job_of(chain, place, layer, v) for layer in range(2)] for v in ("ffn32", "ffn48"))

    def alone(which: Any, makes: str, *values: Any, after: Any = ()) -> Any:
        made = which.fn(*values)
        return Done(lambda: made)

    def recorded_by_another() -> None:
        stages.record(plain_run(tmp_path, alone), chain.parent, chain.corpus)

    def trained_by_another() -> None:
        assert len(stages._distill(plain_run(tmp_path, alone), second, "distill")) == 2

    meanwhile = {first[0].key: recorded_by_another, first[1].key: trained_by_another}

    def submit(which: Any, makes: str, *values: Any, after: Any = ()) -> Any:
        meanwhile.pop(makes, lambda: None)()
        return alone(which, makes, *values)

    blocks = stages._distill(plain_run(tmp_path, submit), first, "distill")
    assert not meanwhile and [block.weights for block in blocks] == [distill(j, place, COMPUTE).weights for j in first]
    assert not list((tmp_path / "record").glob("*/entering/*"))


def test_states_that_are_away_by_the_time_they_are_read_are_made_again(
    chain: Chain, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run has done with them between the look and the reading."""
    wanted, part = in_shards(chain), Part(shard=in_shards(chain).shards[0])
    enter([1], part, wanted, place, COMPUTE)
    look, looks = recording_module._entered, list[int]()

    def looked(layer: int, *more: Any) -> Any:
        found = look(layer, *more)
        looks.append(layer)
        if found and looks.count(layer) == 1:
            drop([layer], wanted, place)
        return found

    monkeypatch.setattr(recording_module, "_entered", looked)
    enter([2], part, wanted, place, COMPUTE)
    assert looks.count(1) == 2 and entered(2, part.shard, wanted, place) and not entered(1, part.shard, wanted, place)
    drop(range(3), wanted, place)


def test_two_devices_take_their_part_of_each_shard_and_a_layer_each(
    chain: Chain, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recording and training end in the bits of one device; no more layers' states lie there than devices and one."""
    for part in ("parent", "corpus"):
        (tmp_path / part).symlink_to(place / part)
    seen, trained_on = [0], dict[tuple[int, str], tuple[str, ...]]()

    def looked() -> None:
        there = {path.name[:3] for path in (tmp_path / "record").glob("*/entering/*.safetensors")}
        seen.append(len(there))

    def submit(which: Any, makes: str, *values: Any, after: Any = ()) -> Any:
        made = which.fn(*values)
        looked()
        if which is stages.distill_task:
            trained_on[values[0].layer, values[0].variant] = values[1].devices
        return Done(lambda: made)

    monkeypatch.setattr(stages, "as_completed", list)
    run = plain_run(tmp_path, submit, "[cpu:0, cpu:1]")
    monkeypatch.setattr(stages, "recording", lambda *_: in_shards(chain))
    records = stages.record(run, chain.parent, chain.corpus)
    assert max(seen) == 3 and not list((tmp_path / "record").glob("*/entering/*"))
    for layer, record in enumerate(records):
        alone = recorded(layer, in_shards(chain), place)
        assert alone is not None and record.statistics.sha256 == alone.statistics.sha256
    jobs = [job_of(chain, place, layer, variant) for layer in range(3) for variant in ("ffn32", "linear")]
    blocks = stages._distill(run, jobs, "distill")
    assert max(seen) == 3 and not list((tmp_path / "record").glob("*/entering/*"))
    assert [block.weights for block in blocks] == [distill(job, place, COMPUTE).weights for job in jobs]
    assert trained_on == {
        **{(layer, variant): (f"cpu:{layer}",) for layer in (0, 1) for variant in ("ffn32", "linear")},
        **{(2, variant): ("cpu:0", "cpu:1") for variant in ("ffn32", "linear")},
    }


def test_why_a_variant_failed_in_an_early_shard_is_said(
    chain: Chain, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not that its state is missing, in the shard after that."""

    def fails() -> None:
        raise OSError("the disk is full")

    job, submitted = job_of(chain, place, 0, "ffn48"), []

    def submit(which: Any, makes: str, *values: Any, after: Any = ()) -> Done:
        submitted.append(makes)
        return Done(fails if which is stages.distill_task else lambda: None)

    monkeypatch.setattr(stages, "as_completed", list)
    with pytest.raises(OSError, match="the disk is full"):
        stages._distill(plain_run(place, submit), [job], "distill")
    assert submitted == ["states 0 0", job.key]


def test_keys_that_others_have_stand(chain: Chain) -> None:
    """A field that was added later changes the key of nobody who leaves it alone; the split into shards does."""
    own = recording(chain.parent, chain.corpus)
    more = Record(**{**RECORD.model_dump(), "shard_tokens": 1 << 20})
    assert own.kept and recording(chain.parent, chain.corpus, more).key == own.key != in_shards(chain).key
    job = chain.job(0, "ffn", "ffn32")
    fields: dict[str, dict[str, Any]] = {
        "warm": {"warmup_steps": 1},
        "clipped": {"clip_norm": 1.0},
        "coupled": {"coupled": True, "coupled_attention": ("kv1",), "coupled_ffn": ("ffn32",)},
    }
    changed = {
        name: chain.job(0, "ffn", "ffn32", SETTINGS.model_copy(update=more)).key for name, more in fields.items()
    }
    assert changed["coupled"] == job.key and len({job.key, *changed.values()}) == 3
    assert recording_module.VERSION == 2 and bld.VERSION == 2


def test_two_starts_are_compared_where_the_closed_form_may_lose(chain: Chain) -> None:
    space = ["search_space.layers=[1]", "search_space.ffn=[ffn32,no_op]"]
    profile = load_profile("tiny", ["bld.closed_form=compare", *space])
    wanted = recording(chain.parent, chain.corpus)
    jobs = jobs_of(profile, wanted, chain.records, chain.reader)
    starts = {(job.variant, job.settings.closed_form) for job in jobs if job.subblock == "attention"}
    assert starts == {("kv1", True), ("kv1", False), ("linear", True), ("no_op", True)}
    assert all(job.settings.closed_form is True for job in jobs if job.subblock == "ffn")
    plain = load_profile("tiny", space)
    assert {job.key for job in jobs_of(plain, wanted, chain.records, chain.reader)} < {job.key for job in jobs}
    block = next(block for block in chain.blocks if block.variant == "kv1")
    other = block.model_copy(update={"key": "other", "nmse_after": 1e-9})
    failed = block.model_copy(update={"status": "failed", "nmse_after": None})
    assert better_of([block, other]) == better_of([failed, other, block]) == [other] and better_of([failed]) == [failed]


def test_rates_rise_in_the_warm_up_and_fall_to_the_last() -> None:
    settings = BLD(steps=10, warmup_steps=3, schedule="linear", final_rate_fraction=0.2)
    rates = rates_of(settings, 1.0)
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and len(rates) == 10
    falls = [one - other for one, other in zip(rates[3:], rates[4:], strict=False)]
    assert falls == pytest.approx([0.8 / 7] * 6)
    assert set(rates_of(BLD(steps=4, schedule="constant"), 0.5)) == {0.5}
    cosine = rates_of(BLD(steps=4), 1.0)
    assert cosine[0] == 1 and cosine[2] == pytest.approx(0.55)
