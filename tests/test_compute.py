"""Every stage computes where its Compute says, and gives what it gives on the CPU; what cannot be is refused."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blocks.compute import HOST
from blocks.library import read_tensors
from blocks.parent import Parent
from blocks.records import LayerChoice
from blocks.runtime import free_bytes
from profiles.load import load_profile
from profiles.schema import GKD, Evaluate
from tasks.distill.bld import distill
from tasks.distill.gkd_job import distill_globally, job_of
from tasks.distill.gkd_targets import record_teacher
from tasks.distill.record import record_layer
from tasks.evaluate import compare
from tasks.evaluate.compare import contender, evaluate_contender
from tasks.running.workers import compute_of, worker_slot
from tasks.score.scoring import ScoringSet, score_sequences
from tests.chain import Chain, chosen, recording
from tests.elsewhere import DEVICE, OnDevice
from tests.test_gkd import CHILD, SETTINGS, distilled

THERE = replace(HOST, device=DEVICE)


@pytest.fixture
def workspace(chain: Chain, tmp_path: Path) -> Iterator[Path]:
    """The chain's parent and corpus alone, on a machine that has the device."""
    for part in ("parent", "corpus"):
        (tmp_path / part).symlink_to(chain.workspace / part)
    with OnDevice():
        yield tmp_path


def test_a_tensor_that_was_left_on_the_host_is_found() -> None:
    with OnDevice():
        there = torch.ones(2, device=DEVICE)
        assert (there + 1).sum().item() == 4 and (there * torch.tensor(2.0)).device == torch.device(DEVICE)
        with pytest.raises(RuntimeError, match="on the CPU"):
            there + torch.ones(2)
    assert torch.ones(2).device.type == "cpu"


def test_record_bld_and_scores_compute_there(chain: Chain, workspace: Path) -> None:
    wanted = recording(chain.parent, chain.corpus)
    records = [record_layer(layer, wanted, workspace, THERE) for layer in range(3)]
    for found, whole in zip(records, chain.records, strict=True):
        for mine, other in ((found.boundary, whole.boundary), (found.statistics, whole.statistics)):
            assert mine is not None and other is not None
            theirs = read_tensors(chain.workspace, other)
            for name, tensor in read_tensors(workspace, mine).items():  # products are packed on the CPU alone
                torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-3)
    jobs = [chain.job(1, "attention", "kv1"), chain.job(1, "ffn", "ffn32"), chain.job(1, "ffn", "linear")]
    blocks = [distill(job.model_copy(update={"record": records[1]}), workspace, THERE) for job in jobs]
    known = {block.key: block for block in chain.blocks}
    for block in blocks:  # AdamW has another code there
        assert block.nmse_after == pytest.approx(known[block.key].nmse_after, rel=1e-3)
    scored = ScoringSet(corpus=chain.corpus, last=records[-1], count=6, length=32)
    work = [(block, tuple(range(6))) for block in blocks]
    for score in score_sequences(work, records[1], scored, chain.parent, workspace, THERE):
        same = next(s for s in chain.scores if (s.layer, s.subblock, s.variant) == (1, score.subblock, score.variant))
        assert score.kl == pytest.approx(same.kl, rel=1e-3, abs=1e-6)


def test_bfloat16_products_give_nearly_the_same(chain: Chain, tmp_path: Path) -> None:
    for part in ("parent", "corpus"):
        (tmp_path / part).symlink_to(chain.workspace / part)
    half = replace(HOST, dtype=torch.bfloat16)
    wanted = recording(chain.parent, chain.corpus).model_copy(update={"dtype": "bfloat16"})
    assert wanted.key != recording(chain.parent, chain.corpus).key
    records = [record_layer(layer, wanted, tmp_path, half) for layer in range(3)]
    more = {"recording": wanted, "record": records[1]}
    jobs = [chain.job(1, "attention", "kv1"), chain.job(1, "ffn", "linear"), chain.job(1, "ffn", "parent")]
    blocks = [distill(job.model_copy(update=more), tmp_path, half) for job in jobs]
    for block in blocks[:2]:
        assert block.weights is not None
        assert {tensor.dtype for tensor in read_tensors(tmp_path, block.weights).values()} == {torch.float32}
    scored = ScoringSet(corpus=chain.corpus, last=records[-1], count=6, length=32)
    work = [(block, scored.sequences) for block in blocks]
    *found, own = score_sequences(work, records[1], scored, chain.parent, tmp_path, half)
    assert own.kl == 0
    for score in found:
        same = next(s for s in chain.scores if (s.layer, s.subblock, s.variant) == (1, score.subblock, score.variant))
        assert score.kl == pytest.approx(same.kl, rel=0.2)


def test_evaluation_computes_there(chain: Chain, workspace: Path) -> None:
    layers = (LayerChoice(), LayerChoice(ffn="no_op"), LayerChoice(attention="linear", ffn="ffn32"))
    (workspace / "library").symlink_to(chain.workspace / "library")
    which, settings = contender("child", chosen(layers), chain.blocks), Evaluate(sequences=4, benchmarks=())
    places = ((workspace, THERE), (chain.workspace, HOST))
    found, own = (evaluate_contender(which, (chain.parent, chain.corpus), settings, *place) for place in places)
    assert found.quality.kl.value == pytest.approx(own.quality.kl.value, rel=1e-5)


@pytest.mark.parametrize("recorded_gib", [8, 0])
def test_gkd_trains_there(chain: Chain, workspace: Path, recorded_gib: float) -> None:
    (workspace / "library").symlink_to(chain.workspace / "library")
    settings = GKD(**(SETTINGS | {"recorded_gib": recorded_gib}))
    teacher = record_teacher(chain.parent, chain.corpus, settings, workspace, THERE)
    job = job_of(CHILD, chain.blocks, teacher, settings, THERE)
    found, own = distill_globally(job, workspace, THERE), distilled(chain)
    assert found.best_kl == pytest.approx(own.best_kl, rel=1e-3)  # AdamW has another code there


def test_what_is_not_told_where_to_compute_does_not_compute(chain: Chain) -> None:
    parent = Parent(chain.workspace / chain.parent.folder)
    assert parent.depth == 3
    with pytest.raises(ValueError, match="config alone"):
        parent.embedding()


def test_the_profiles_device_is_every_stages() -> None:
    profile = load_profile("tiny", ["hardware.device=cuda:1"])
    assert compute_of(profile).device == "cuda:1" and compute_of(profile).dtype == torch.bfloat16
    assert worker_slot(profile).devices == ("cuda:1",)
    several = ["hardware.device=cuda:0", "orchestration.devices=[cuda:2,cuda:3]", "hardware.compute_precision=float32"]
    profile = load_profile("tiny", several)
    assert compute_of(profile).device == "cuda:2" and compute_of(profile).dtype == torch.float32
    assert worker_slot(profile).devices == ("cuda:2", "cuda:3")
    assert compute_of(load_profile("tiny", ["orchestration.devices=[cpu:0,cpu:1]"])).device == "cpu"


@pytest.mark.parametrize("setting", ["hardware.device=mps", "orchestration.devices=[mps]"])
def test_a_device_without_float64_is_refused(setting: str) -> None:
    with pytest.raises(Exception, match="which mps does not have: set orchestration.devices"):
        load_profile("tiny", [setting])
    load_profile("tiny", ["hardware.device=mps", "orchestration.devices=[cpu]"])


def test_what_torch_keeps_of_a_model_that_is_gone_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the second of two models would not fit where the first one did."""
    for name, value in {"mem_get_info": (10, 100), "memory_reserved": 80, "memory_allocated": 30}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert free_bytes("cuda:0") == 60


def test_a_model_without_room_on_its_device_comes_layer_by_layer(
    chain: Chain, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation and the targets of GKD give what they give with the whole model there."""
    settings, which = Evaluate(sequences=4), contender("child", chosen(CHILD), chain.blocks)
    (workspace / "library").symlink_to(chain.workspace / "library")
    asked = (which, (chain.parent, chain.corpus), settings)
    whole = evaluate_contender(*asked, workspace, THERE)
    shutil.rmtree(workspace / "evaluations")
    compare.targets_on.cache_clear()
    monkeypatch.setattr("blocks.child.free_bytes", lambda _: 0)
    seen: list[str] = []
    own = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda m, *to: seen.append(str(to[0])) or own(m, *to))  # type: ignore[func-returns-value]
    apart = evaluate_contender(*asked, workspace, THERE)
    assert apart.quality == whole.quality and seen.count("cpu") >= 2 * 3 and DEVICE in seen
