"""GKD as a trainer: in one process and in two, killed and taken up again, beside its parent, with a rate that fits."""

import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch

from blocks.compute import HOST, Compute
from blocks.errors import PuzzleError, PuzzleFailure
from blocks.library import read_tensors
from blocks.records import LayerChoice
from profiles.errors import ProfileError
from profiles.load import load_profile
from profiles.schema import GKD
from tasks.distill import gkd_checkpoint, gkd_job
from tasks.distill.gkd import GKDResult, Seen
from tasks.distill.gkd_settings import LAUNCHER, share_of_rate
from tasks.distill.gkd_student import load_trained
from tasks.distill.gkd_targets import record_teacher
from tasks.distill.sharding import ALONE
from tests.chain import Chain

CHILD = (
    LayerChoice(attention="linear", ffn="ffn32"),
    LayerChoice(attention="kv1", ffn="linear"),
    LayerChoice(attention="no_op", ffn="no_op"),
)
SETTINGS: dict[str, Any] = {
    "steps": 10,
    "batch_sequences": 4,
    "learning_rate": 3e-3,
    "cosine_every": 1,
    "evaluate_every": 5,
    "validation_sequences": 5,
}


def job_of(chain: Chain, compute: Compute = HOST, **changes: Any) -> gkd_job.Job:
    """A GKD of the tiny chain's child whose folder is empty."""
    settings = GKD(**(SETTINGS | changes))
    teacher = record_teacher(chain.parent, chain.corpus, settings, chain.workspace, compute)
    job = gkd_job.job_of(CHILD, chain.blocks, teacher, settings, compute)
    shutil.rmtree(chain.workspace / job.folder, ignore_errors=True)
    return job


def distilled(chain: Chain, **changes: Any) -> GKDResult:
    return gkd_job.distill_globally(job_of(chain, **changes), chain.workspace, HOST)


class Killed(BaseException):
    pass


def test_the_parent_beside_the_child_gives_the_child_of_recorded_targets_bit_for_bit(chain: Chain) -> None:
    recorded, beside = job_of(chain), job_of(chain, recorded_gib=0)
    assert len(recorded.record.steps) == 10 and not beside.record.steps
    results = [gkd_job.distill_globally(job, chain.workspace, HOST) for job in (recorded, beside)]
    assert results[0].weights.sha256 == results[1].weights.sha256
    assert distilled(chain, recorded_gib=0, gradient_checkpointing=True).weights.sha256 == results[0].weights.sha256


@pytest.mark.parametrize("rate", [3e-3, None])
def test_a_child_that_is_its_parent_takes_no_step(chain: Chain, rate: float | None) -> None:
    settings = GKD(**(SETTINGS | {"learning_rate": rate}))
    teacher = record_teacher(chain.parent, chain.corpus, settings, chain.workspace, HOST)
    job = gkd_job.job_of((LayerChoice(),) * 3, chain.blocks, teacher, settings, HOST)
    found = gkd_job.distill_globally(job, chain.workspace, HOST)
    assert not found.losses and found.best_step == 0 and found.tokens == 0 and not found.tried
    assert found.best_kl < 1e-7 and "nothing to distil" in found.stopped


def test_parts_of_a_batch_add_up_to_it(chain: Chain) -> None:
    whole, job = distilled(chain), job_of(chain)
    compute = replace(HOST, micro_batch_tokens=64)
    in_parts = gkd_job.distill_globally(job, chain.workspace, compute)
    assert in_parts.losses == pytest.approx(whole.losses, rel=1e-4)
    assert in_parts.best_kl == pytest.approx(whole.best_kl, rel=1e-3)


def test_products_in_bfloat16_train_float32_weights(chain: Chain) -> None:
    compute = replace(HOST, dtype=torch.bfloat16)
    job = job_of(chain, compute)
    rough, exact = gkd_job.distill_globally(job, chain.workspace, compute), distilled(chain)
    assert rough.best_kl == pytest.approx(exact.best_kl, rel=0.05) and rough.losses != exact.losses
    assert {w.dtype for w in read_tensors(chain.workspace, rough.weights).values()} == {torch.float32}
    assert rough.held_bytes == exact.held_bytes


@pytest.mark.parametrize("killed_at", [1, 5, 9])
def test_a_killed_training_goes_on_to_the_same_bits(chain: Chain, killed_at: int) -> None:
    whole, job, done = distilled(chain), job_of(chain, checkpoint_minutes=0), []

    def watch(seen: Seen) -> None:
        done.append(seen.step)
        if seen.step == killed_at and done.count(killed_at) == 1:
            raise Killed

    with pytest.raises(Killed):
        gkd_job.distill_globally(job, chain.workspace, HOST, watch=watch)
    again = gkd_job.distill_globally(job, chain.workspace, HOST, watch=watch)
    assert again.weights.sha256 == whole.weights.sha256
    assert (again.losses, again.curve) == (whole.losses, whole.curve)
    assert sorted(done) == sorted([*range(1, 11), killed_at])  # the step that was cut off, and no other, twice
    assert gkd_checkpoint.last(chain.workspace / job.folder) is None


def killed_after(chain: Chain, step: int, **changes: Any) -> gkd_job.Job:
    """A job that was killed in the step after this one."""
    job = job_of(chain, checkpoint_minutes=0, **changes)

    def watch(seen: Seen) -> None:
        if seen.step > step:
            raise Killed

    with pytest.raises(Killed):
        gkd_job.distill_globally(job, chain.workspace, HOST, watch=watch)
    return job


@pytest.mark.parametrize("rounds", [(0, 5), (5,)])
def test_a_training_that_waits_ends_in_the_same_bits(chain: Chain, rounds: tuple[int, ...]) -> None:
    whole, job, done = distilled(chain), job_of(chain), []

    def watch(seen: Seen) -> None:
        done.append(seen.step)

    found = {steps: gkd_job.kl_after(steps, job, chain.workspace, HOST, watch=watch) for steps in rounds}
    assert found == {steps: min(kl for step, kl in whole.curve if step <= steps) for steps in rounds}
    assert gkd_job.kl_after(5, job, chain.workspace, HOST, watch=watch) == found[5]  # from what was written down
    again = gkd_job.distill_globally(job, chain.workspace, HOST, watch=watch)
    assert again.weights.sha256 == whole.weights.sha256 and done == list(range(1, 11))
    assert gkd_job.kl_after(5, job, chain.workspace, HOST) == found[5]  # from the curve of a finished one


def test_who_gives_up_keeps_its_figure_and_no_checkpoint(chain: Chain) -> None:
    job = job_of(chain)
    kl = gkd_job.kl_after(5, job, chain.workspace, HOST)
    gkd_job.give_up(job, chain.workspace)
    assert gkd_checkpoint.last(chain.workspace / job.folder) is None
    assert gkd_job.kl_after(5, job, chain.workspace, HOST) == kl


def test_a_damaged_checkpoint_is_not_used(chain: Chain) -> None:
    job = killed_after(chain, 3)
    folder = gkd_checkpoint.last(chain.workspace / job.folder)
    assert folder is not None
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert gkd_checkpoint.checked(folder, ALONE) is None
    with pytest.raises(PuzzleError, match="is damaged"):
        gkd_job.open_checkpoint(folder)
    steps: list[int] = []
    again = gkd_job.distill_globally(job, chain.workspace, HOST, watch=lambda seen: steps.append(seen.step))
    assert steps[0] == 1 and again.weights.sha256 == distilled(chain).weights.sha256


def test_a_checkpoint_is_a_child(chain: Chain) -> None:
    job = killed_after(chain, 6, also_train=("norm",))
    found = gkd_job.open_checkpoint(chain.workspace / job.folder)
    assert found is not None and found.course.step == 6 and found.course.best_step == 5
    best = found.model()
    settings = job.settings.model_copy(update={"steps": 0})
    same = chain.training(best, job.record, settings, "same")
    assert same.validation_kl() == pytest.approx(found.course.best_kl, rel=1e-6)
    assert gkd_job.open_checkpoint(chain.workspace / chain.parent.folder) is None


def test_norm_and_head_are_trained_on_request(chain: Chain) -> None:
    results = {also: distilled(chain, also_train=also) for also in ((), ("norm",), ("norm", "head"))}
    assert results["norm", "head"].losses[0] == pytest.approx(results[()].losses[0], rel=1e-5)  # the KL is exact
    assert len({result.weights.sha256 for result in results.values()}) == 3
    job = job_of(chain, also_train=("norm", "head"))
    child = gkd_job.built(job, chain.workspace, HOST)
    before = child.lm_head.weight.clone(), child.model.norm.weight.clone()
    weights = read_tensors(chain.workspace, gkd_job.distill_globally(job, chain.workspace, HOST).weights)
    load_trained(child, weights)
    assert not torch.equal(child.lm_head.weight, before[0]) and not torch.equal(child.model.norm.weight, before[1])


def test_without_a_rate_the_one_that_fits_is_taken(chain: Chain) -> None:
    job = job_of(chain, learning_rate=None, steps=24)
    result = gkd_job.distill_globally(job, chain.workspace, HOST)
    kls = dict(result.tried)
    assert len(kls) > 1 and result.learning_rate == min(kls, key=lambda rate: kls[rate])
    named = distilled(chain, learning_rate=result.learning_rate, steps=24)
    assert result.weights.sha256 == named.weights.sha256  # the trials left nothing behind


def test_the_schedule() -> None:
    rates = [share_of_rate(step, 100, GKD(warmup_fraction=0.1)) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert share_of_rate(99, 100, GKD(schedule="constant")) == 1.0


# --- several processes


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one_hold_half_each_and_go_on_when_one_is_killed(chain: Chain) -> None:
    asked: dict[str, Any] = {"steps": 50, "evaluate_every": 25, "recorded_gib": 0, "also_train": ("norm", "head")}
    one, job = distilled(chain, **asked), job_of(chain, checkpoint_minutes=0, **asked)
    steps: list[int] = []
    killed: list[int] = []

    def watch(seen: Seen) -> None:
        steps.append(seen.step)
        for below in [] if killed else psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # it has ended
                if "tasks.distill.gkd_worker" in below.cmdline() and below.environ().get("RANK") == "1":
                    below.kill()
                    killed.append(below.pid)

    two = gkd_job.distill_globally(job, chain.workspace, HOST, ("cpu:0", "cpu:1"), watch)
    off = max(abs(a - b) / a for a, b in zip(one.losses, two.losses, strict=True))
    sys.stdout.write(f"losses off by {off:.1e}; bytes {one.held_bytes} and {two.held_bytes}\n")
    assert off < 1e-4 and two.best_kl == pytest.approx(one.best_kl, rel=1e-4)
    assert sum(two.held_bytes) == one.held_bytes[0]
    assert two.held_bytes == pytest.approx([one.held_bytes[0] / 2] * 2, rel=0.02)
    assert killed and set(steps) == set(range(1, 51)) and len(steps) <= 51


def test_why_a_process_failed_is_said_in_its_own_words(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(chain, steps=2)
    said = f"import sys; print('noise'); print('{gkd_job.FAILED}OSError: the disk is full'); sys.exit(1)"
    monkeypatch.setenv(LAUNCHER, f'{sys.executable} -c "{said}"')
    with pytest.raises(PuzzleFailure, match="restarted: OSError: the disk is full$"):
        gkd_job.distill_globally(job, chain.workspace, HOST)


def test_sequences_that_cannot_be_shared_out_are_refused(chain: Chain) -> None:
    with pytest.raises(ProfileError, match="to a multiple of 3"):
        load_profile("tiny", ["orchestration.devices=[cpu:0, cpu:1, cpu:2]"])
    job = job_of(chain)
    with pytest.raises(PuzzleError, match="gkd.batch_sequences that 3 divides"):
        gkd_job.distill_globally(job, chain.workspace, HOST, ("cpu:0", "cpu:1", "cpu:2"))
