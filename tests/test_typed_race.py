"""A race in types of number: who takes part, each judged as its file would be, trainings that racers share."""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from blocks.compute import HOST
from blocks.library import read_tensors
from blocks.records import LayerChoice
from blocks.typed_labels import bare, type_in
from flows import whole_models
from profiles.load import load_profile
from profiles.schema import GKD, Evaluate
from tasks.distill import gkd_checkpoint, gkd_job
from tasks.distill.gkd_targets import TeacherRecord, record_teacher
from tasks.engines.llama_cpp import LlamaCpp
from tasks.evaluate import typed_race
from tasks.evaluate.compare import bare_layers, contender, evaluate_contender, served
from tasks.evaluate.quality import parent_targets, sequence_figures
from tasks.evaluate.typed_file import with_file
from tasks.evaluate.typed_race import kl_as_file
from tasks.planning.effort import race_looks
from tasks.running.progress import no_progress
from tasks.running.workers import compute_of
from tasks.search.choose import choose
from tasks.search.one_type import FAR, candidates, types_of
from tasks.search.totals import broken_limits
from tests.chain import Chain, chosen
from tests.test_number_types import TYPED, everything, problem_with

needs_llama_cpp = pytest.mark.skipif(LlamaCpp().missing() is not None, reason="llama.cpp is not installed")
SETTINGS = GKD(
    steps=12, batch_sequences=4, learning_rate=3e-3, cosine_every=1, evaluate_every=4, validation_sequences=5
)
LAYERS = (
    LayerChoice(attention="parent@iq4_nl", ffn="ffn32@iq4_nl"),
    LayerChoice(attention="no_op", ffn="ffn32@iq4_nl"),
    LayerChoice(attention="kv1@q8_0", ffn="no_op"),
)
FINER = tuple(LayerChoice(attention=one.attention, ffn=one.ffn.replace("iq4_nl", "q8_0")) for one in LAYERS)


def test_who_races_prunes_alone_or_takes_fewer_bits_alone_or_is_near() -> None:
    """Each corner is the best of its kind by trying all; each racer keeps the budget and differs enough."""
    problem = problem_with(1.3)
    found = candidates(problem, 6, 1)
    best = choose(problem)
    assert (found[0].layers, found[0].head) == (best.layers, best.head) and len(found) == 6
    assert [one.score for one in found] == sorted(one.score for one in found)
    for one, other in itertools.combinations(found, 2):
        assert one.layers != other.layers
    assert not [one for one in found if broken_limits(problem, one.layers, (1,), one.head)]
    scored = everything(problem)
    corners = 0
    for kind in types_of(problem):
        own = [score for score, layers, _ in scored if kinds_of(layers) <= {kind}]
        if own and min(own) <= FAR * best.score:
            corners += any(one.score == pytest.approx(min(own)) for one in found)
    whole = [score for score, layers, _ in scored if variants_of(layers) == {"parent"}]
    assert corners >= 1, "at least one that only prunes"
    if whole and min(whole) <= FAR * best.score:
        assert any(one.score == pytest.approx(min(whole)) for one in found)
    assert candidates(problem, 1, 1)[0].layers == best.layers


def kinds_of(layers: Any) -> set[str]:
    return {type_in(label) for one in layers for label in (one.attention, one.ffn) if label != "no_op"}


def variants_of(layers: Any) -> set[str]:
    return {bare(label) for one in layers for label in (one.attention, one.ffn)}


@pytest.fixture(scope="module")
def teacher(chain: Chain) -> TeacherRecord:
    return record_teacher(chain.parent, chain.corpus, SETTINGS, chain.workspace, HOST)


@needs_llama_cpp
def test_a_racer_is_judged_as_its_file_would_be(
    chain: Chain, teacher: TeacherRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    which = contender("candidate-1", chosen(LAYERS).model_copy(update={"head": "q8_0"}), chain.blocks)
    job = gkd_job.job_of(bare_layers(which), which.blocks, teacher, SETTINGS, HOST)
    first = kl_as_file(which, 0, job, "bfloat16", chain.workspace)
    file = with_file(which, chain.parent, chain.corpus, "bfloat16", chain.workspace)
    tokens = read_tensors(chain.workspace, chain.corpus.tokens, ["validation"])["validation"][:5]
    targets = parent_targets(chain.reader.model(), tokens, HOST)
    own = sequence_figures(served(file, chain.parent, chain.workspace, HOST), targets, tokens, HOST)
    assert first == pytest.approx(float(own["kl"].mean()), rel=1e-4)
    trained = kl_as_file(which, 4, job, "bfloat16", chain.workspace)
    assert trained < first and trained != gkd_job.kl_after(4, job, chain.workspace, HOST)
    plain = contender("candidate-2", chosen(tuple(one.bare for one in LAYERS)), chain.blocks)
    assert kl_as_file(plain, 0, job, "bfloat16", chain.workspace) != first  # the rounding is seen
    monkeypatch.setattr(typed_race, "model_after", lambda *_: pytest.fail("it was measured before"))
    assert kl_as_file(which, 4, job, "bfloat16", chain.workspace) == trained


@needs_llama_cpp
def test_weights_that_a_later_training_left_behind_are_named(
    chain: Chain, teacher: TeacherRecord, caplog: pytest.LogCaptureFixture
) -> None:
    layers = (LayerChoice(ffn="no_op"), LayerChoice(ffn="ffn32@q8_0"), LayerChoice())
    which = contender("candidate-1", chosen(layers), chain.blocks)
    job = gkd_job.job_of(bare_layers(which), which.blocks, teacher, SETTINGS, HOST)
    gkd_job.kl_after(4, job, chain.workspace, HOST)
    gkd_job.give_up(job, chain.workspace)  # an earlier race in float did
    model, step = gkd_job.model_after(4, job, chain.workspace, HOST)
    assert step == 4 and gkd_checkpoint.last(chain.workspace / job.folder) is not None
    again, _ = gkd_job.model_after(4, job, chain.workspace, HOST)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    ended = gkd_job.distill_globally(job, chain.workspace, HOST)
    _, late = gkd_job.model_after(4, job, chain.workspace, HOST)
    assert late == ended.best_step
    if late > 4:
        for _ in range(2):  # also where it was measured before
            caplog.clear()
            with caplog.at_level("INFO"):
                kl_as_file(which, 4, job, "bfloat16", chain.workspace)
            assert f"judged by its weights of step {late}" in caplog.text


class Running:
    """What the stage needs of a run: its tasks are called at once."""

    def __init__(self, profile: Any, workspace: Path) -> None:
        self.profile, self.workspace = profile, workspace

    @contextmanager
    def stage(self, name: str) -> Iterator[Any]:
        yield no_progress

    def call(self, which: Any, makes: str, *values: Any, **_: Any) -> Any:
        return which.fn(*values)

    def log_curves(self, *_: Any) -> None:
        pass


@needs_llama_cpp
def test_racers_that_differ_in_types_alone_share_a_training(chain: Chain, teacher: TeacherRecord) -> None:
    """The one that drops out does not take the other's checkpoint with it; the winner's GKD goes on from there."""
    told = json.dumps(SETTINGS.model_dump(mode="json"))
    profile = load_profile(
        "tiny",
        [
            f"hardware={{{', '.join(TYPED)}}}",
            "search_space.precision=[q8_0, iq4_nl]",
            "search_space.ffn=[ffn32, no_op]",
            f"gkd={told}",
            "race={candidates: 2, min_different: 1, rounds: [0, 4]}",
        ],
    )
    assert race_looks(profile) == 2
    near = [contender(f"candidate-{n}", chosen(own), chain.blocks) for n, own in enumerate((LAYERS, FINER), start=1)]
    winner, racers = whole_models.race(Running(profile, chain.workspace), near, teacher)  # type: ignore[arg-type]
    assert winner.architecture.layers == FINER and winner.name == "child"
    assert [racer.place for racer in racers] == [2, 1] and racers[0].kl[0][1] < racers[1].kl[0][1]
    job = gkd_job.job_of(bare_layers(winner), winner.blocks, teacher, profile.gkd, compute_of(profile))
    left = gkd_checkpoint.last(chain.workspace / job.folder)
    assert left is not None and left.name.endswith("4"), "it went with the one that dropped out"
    (trained,) = whole_models.distill_globally(Running(profile, chain.workspace), [winner], teacher)  # type: ignore[arg-type]
    assert trained.gkd is not None and trained.gkd.best_kl > 0
    evaluation = evaluate_contender(
        with_file(trained, chain.parent, chain.corpus, "bfloat16", chain.workspace),
        (chain.parent, chain.corpus), Evaluate(sequences=4), chain.workspace, HOST,
    )  # fmt: skip
    assert evaluation.quality.kl.value > 0
