"""The true KL: that of the scores where one subblock differs, that of the assembled model everywhere, measured once."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from blocks.compute import HOST
from blocks.errors import PuzzleError
from blocks.estimates import mean
from blocks.library import read_tensors
from blocks.records import CostTable, LayerChoice
from profiles.schema import GKD, Budget, Evaluate, Profile, Scoring, TinyParent
from tasks.distill.record import record_layer
from tasks.evaluate.compare import build, contender
from tasks.evaluate.quality import mean_metric, parent_targets, sequence_figures
from tasks.inputs.corpus import documents_of
from tasks.score.scoring import ScoringSet, score_sequences, scores_of
from tasks.search.totals import predicted
from tasks.studies.contest import ContestSize, contest
from tasks.studies.finished import Finished, UnfinishedLibrary, open_finished
from tasks.studies.truth import Meter, Modules, measured_truth, other_model, other_sequences, scored_sequences, truth_of
from tests.chain import CORPUS, RECORD, Chain, recording
from tests.test_choose import CHAT, costs_of
from tests.test_weights import HALVES, weighted

PARENT = LayerChoice()
MIXED = (
    LayerChoice(attention="kv1", ffn="no_op"),
    LayerChoice(attention="linear", ffn="ffn32"),
    LayerChoice(attention="no_op", ffn="linear"),
)


@pytest.fixture(scope="module")
def finished(chain: Chain) -> Finished:
    """Six of eight validation sequences of 32 tokens are scored."""
    profile = Profile(
        name="chain",
        parent=TinyParent(),
        corpus=CORPUS,
        record=RECORD,
        gkd=GKD(validation_sequences=8),
        evaluate=Evaluate(sequences=8),
        scoring=Scoring(sequences=6),
        budget=Budget(layer_parameters_fraction=0.6),
    )
    labels = {"attention": ("parent", "kv1", "linear", "no_op"), "ffn": ("parent", "ffn32", "linear", "no_op")}
    costs: CostTable = costs_of(labels, [CHAT], 3, 0)
    return Finished(
        profile=profile.model_copy(update={"scenarios": (CHAT,)}),
        workspace=chain.workspace,
        parent=chain.parent,
        corpus=chain.corpus,
        blocks=tuple(chain.blocks),
        scores=tuple(chain.scores),
        costs=costs,
    )


def test_one_subblock_replaced_is_its_score_bit_for_bit(finished: Finished) -> None:
    scored, _ = truth_of(finished, 2)
    assert scored((PARENT,) * 3).per_sequence == (0.0,) * 6
    for score in finished.scores:
        layers = [PARENT] * 3
        layers[score.layer] = LayerChoice(**{score.subblock: score.variant})  # type: ignore[arg-type]
        assert scored(layers).per_sequence == score.kl_per_sequence


def test_tokens_weigh_as_in_the_scores(finished: Finished, chain: Chain, tmp_path: Path) -> None:
    corpus = weighted(chain, tmp_path, HALVES)
    shutil.copytree(chain.workspace / "library", tmp_path / "library")
    records = [record_layer(layer, recording(chain.parent, corpus), tmp_path, HOST) for layer in range(3)]
    block = next(block for block in chain.blocks if (block.layer, block.variant) == (1, "kv1"))
    asked = ScoringSet(corpus=corpus, last=records[-1], count=6, length=32)
    scores = score_sequences([(block, tuple(range(6)))], records[1], asked, chain.parent, tmp_path, HOST)
    weighs = replace(finished, workspace=tmp_path, corpus=corpus, scores=tuple(scores))
    scored, others = truth_of(weighs, 2)
    assert scored((PARENT, LayerChoice(attention="kv1"), PARENT)).per_sequence == scores[0].kl_per_sequence
    with pytest.raises(PuzzleError, match="leave out --smaller"):
        contest(finished.problem, scored, others, ContestSize(smaller=(tmp_path,)))


def test_like_the_assembled_model(finished: Finished, chain: Chain) -> None:
    """On the sequences behind the scored ones, against the vocabulary-sized KL of tasks/evaluate/quality.py."""
    _, others = truth_of(finished, 2)
    assert (others.sequences.first, others.sequences.last) == (6, 8)
    tokens = read_tensors(chain.workspace, chain.corpus.tokens, ["validation"])["validation"][6:8, :32]
    which = contender("child", predicted(finished.problem, MIXED, "test"), finished.blocks)
    targets = parent_targets(chain.reader.model(), tokens, HOST)
    model = build(which, chain.parent, chain.workspace, HOST)
    kl = mean_metric(sequence_figures(model, targets, tokens, HOST)["kl"])
    found = others(MIXED)
    assert np.mean(found.per_sequence) == pytest.approx(kl.value, rel=1e-4)
    assert found.tokens == 64 and kl.value > 0.01


def test_states_that_were_kept_change_nothing(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    """Architectures that begin alike, in any order, with hardly any memory, or each by a fresh meter."""
    late = (*MIXED[:2], LayerChoice(attention="kv1", ffn="ffn32"))
    orders = [(MIXED, late, (PARENT, *MIXED[1:])), (late, MIXED, (PARENT, *MIXED[1:]))]
    found = []
    for order in orders:
        modules = Modules(finished=finished)
        meter = Meter(finished=finished, sequences=scored_sequences(finished), modules=modules)
        found.append({layers: meter._measure(layers).per_sequence for layers in order})
    monkeypatch.setattr("tasks.studies.truth.STATES_BYTES", 1)
    monkeypatch.setattr("tasks.studies.truth.LAYERS_KEPT", 1)
    meter = Meter(finished=finished, sequences=scored_sequences(finished), modules=Modules(finished=finished))
    found.append({layers: meter._measure(layers).per_sequence for layers in orders[0]})
    assert found[0] == found[1] == found[2]
    assert len(set(found[0].values())) == 3


def test_what_was_measured_is_stored_by_content(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    scored, others = truth_of(finished, 2)
    first = scored(MIXED), others(MIXED)
    assert first[0] != first[1]

    def broken(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Meter, "_measure", broken)
    scored, others = truth_of(finished, 2)
    assert (scored(MIXED), others(MIXED)) == first
    pair, truth = measured_truth(finished, 2)
    assert truth(MIXED, only_scored=True)[1].size == 0
    assert tuple(truth(MIXED)[1].tolist()) == first[1].per_sequence
    other_block = tuple(
        block.model_copy(update={"key": "other"}) if (block.layer, block.variant) == (0, "kv1") else block
        for block in finished.blocks
    )
    with pytest.raises(AssertionError, match="measured again"):
        truth_of(replace(finished, blocks=other_block), 2)[0](MIXED)
    unused = (PARENT, *MIXED[1:])
    assert scored._key(unused) == truth_of(replace(finished, blocks=other_block), 2)[0]._key(unused)


def test_scores_and_meters_know_the_documents_of_their_sequences(finished: Finished, chain: Chain) -> None:
    whole = documents_of(finished.corpus, "validation", finished.workspace, 32)
    assert len(whole) == 8 and len(set(whole)) > 1
    scores = tuple(scores_of(finished.blocks, [chain.scored], finished.workspace))
    assert scores and {score.documents for score in scores} == {whole[:6]} == {
        replace(finished, scores=scores).problem.documents
    }
    scored, others = truth_of(finished, 2)
    assert (scored.documents, others.documents) == (whole[:6], whole[6:8])
    assert (some := scores[0]).kl_se == mean(some.kl_per_sequence, some.documents).error


def test_where_all_sequences_were_scored_they_are_used_again(finished: Finished) -> None:
    every = finished.profile.model_copy(update={"scoring": Scoring(sequences=8)})
    assert other_sequences(replace(finished, profile=every), 4) == scored_sequences(replace(finished, profile=every))
    scored, others = truth_of(replace(finished, profile=every), 4)
    assert scored is others
    assert str(scored_sequences(finished)) == "validation sequences 0 to 5, 32 tokens each"
    assert torch.equal(scored._embedded, truth_of(replace(finished, profile=every), 4)[0]._embedded)


def test_an_empty_workspace_is_refused(finished: Finished, tmp_path: Any) -> None:
    with pytest.raises(UnfinishedLibrary, match="no block library.*run `puzzle optimize`"):
        open_finished(finished.profile, tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_model_of_the_family_is_measured_as_whole_models_are(finished: Finished, tmp_path: Path) -> None:
    """The parent's own folder is 0 away; other weights are not; another vocabulary is refused."""
    _, others = truth_of(finished, 2)
    own = finished.workspace / finished.parent.folder
    same = other_model(own, others)
    assert same.per_sequence == pytest.approx((0.0, 0.0), abs=1e-5)
    assert same.parameters == sum(
        parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(own).parameters()
    )
    other = tmp_path / "noisy"
    shutil.copytree(own, other)
    model = AutoModelForCausalLM.from_pretrained(own)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(other)
    assert np.mean(other_model(other, others).per_sequence) > 0.001
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    swapped = dict(zip(tokenizer["model"]["vocab"], reversed(tokenizer["model"]["vocab"].values()), strict=True))
    tokenizer["model"]["vocab"] = swapped
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(PuzzleError, match="reads other tokens"):
        other_model(other, others)
    with pytest.raises(PuzzleError, match="no model that can be compared"):
        other_model(tmp_path, others)


def test_a_smaller_model_that_is_closer_wins(finished: Finished) -> None:
    """The parent's own weights under another name: a contender while the child has as many parameters, else not."""
    scored, others = truth_of(finished, 2)
    own = finished.workspace / finished.parent.folder
    size = ContestSize(evaluations=50, smaller=(own,))
    found = contest(finished.problem, scored, others, size)
    assert (found.winner, found.prune, found.entries[0].layers) == (own.name, False, ())
    fewer = [cost.model_copy(update={"parameters": cost.parameters // 1000}) for cost in finished.costs.costs]
    costs = finished.costs.model_copy(update={"costs": tuple(fewer)})
    found = contest(replace(finished.problem, costs=costs), scored, others, size)
    assert "more than the child's" in found.left_out[own.name] and found.prune
