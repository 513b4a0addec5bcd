"""Capabilities beside types of number: scores on each text, limits on the KL of typed architectures, races, files."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from blocks.compute import HOST
from blocks.errors import InfeasibleBudget
from blocks.library import read_rows, read_tensors
from blocks.records import LayerChoice, Ref, Score
from profiles.load import load_profile
from profiles.schema import Evaluate, Profile
from tasks.distill import gkd_job
from tasks.distill.gkd_targets import Mixed, record_teacher
from tasks.evaluate.compare import bare_layers, contender, evaluate_contender, on_capability
from tasks.evaluate.typed_file import with_file
from tasks.evaluate.typed_race import kl_as_file
from tasks.export.quantise import Recipe, divergences, log_probabilities, quantise_layers, token_divergences
from tasks.inputs.corpus import weights_of
from tasks.planning.effort import scored_texts
from tasks.score import scoring, typed_scores
from tasks.score.rounding import in_type
from tasks.score.scoring import ScoringSet, score_sequences, scores_of
from tasks.score.typed_scores import (
    WholeScore,
    parents_in_types,
    score_whole,
    scores_in_types,
)
from tasks.search.capabilities import Capabilities
from tasks.search.choose import choose
from tasks.search.one_type import candidates, corners
from tasks.search.totals import Problem, broken_kl, broken_limits, kl_on, make_problem, score_of
from tests.chain import Chain, chosen
from tests.test_capabilities import needles_of, on
from tests.test_number_types import everything, needs_llama_cpp, problem_with, quarter, score
from tests.test_typed_race import LAYERS, SETTINGS

TYPES = ("q8_0", "iq4_nl")
WEIGHTS = {"general": 0.5, "retrieval": 0.5}


def typed_problem(most: dict[str, float] | None = None, speedup: float = 1.3, layers: int = 1) -> Problem:
    """Every variant in every type, and the head, with scores on a capability beside the corpus."""
    plain, draw = problem_with(speedup, layers), np.random.default_rng(5)
    scores = [one.model_copy(update={"capabilities": (on("retrieval", one, draw, 5, 0.3),)}) for one in plain.scores]
    kept = Capabilities(weights=WEIGHTS, most=most or {})
    return make_problem(scores, plain.costs, plain.budget, plain.scenarios, capabilities=kept)


# --- the search


@pytest.mark.parametrize(("speedup", "share"), itertools.product((1.05, 1.3, 1.6), (0.9, 0.6, 0.2)))
def test_with_a_highest_kl_the_best_is_that_of_all_types_and_heads(speedup: float, share: float) -> None:
    free = choose(typed_problem(speedup=speedup))
    most = {"retrieval": share * kl_on(typed_problem(), free.layers, "retrieval", free.head)}
    asked = typed_problem(most, speedup)
    fits = [one for one in everything(asked) if kl_on(asked, one[1], "retrieval", one[2]) <= most["retrieval"]]
    if not fits:
        with pytest.raises(InfeasibleBudget, match="max_kl of retrieval"):
            choose(asked)
        return
    best, found = min(fits, key=lambda one: one[0]), choose(asked)
    assert found.score == pytest.approx(best[0], abs=1e-9) and found.status == "optimal"
    assert not broken_kl(asked, found.layers, found.head)


def test_the_head_counts_in_the_kl_on_a_capability() -> None:
    asked = typed_problem()
    layers = (LayerChoice(),)
    own = {one.name: one.kl for one in asked.heads["iq4_nl"].capabilities}  # type: ignore[union-attr]
    assert kl_on(asked, layers, "retrieval", "iq4_nl") == pytest.approx(own["retrieval"]) and own["retrieval"] > 0
    assert score_of(asked, layers, "iq4_nl")[0] == pytest.approx(0.5 * own["general"] + 0.5 * own["retrieval"])
    broken = replace(asked, capabilities=Capabilities(weights=WEIGHTS, most={"retrieval": 0.9 * own["retrieval"]}))
    assert broken_kl(broken, layers, "iq4_nl") == ["retrieval"] and not broken_kl(broken, layers)


def test_who_races_keeps_the_highest_kl_with_its_head() -> None:
    free = typed_problem(layers=2)
    without = [kl_on(free, one.layers, "retrieval", one.head) for one in corners(free)]
    most = {"retrieval": 0.9 * max(without)}
    asked = typed_problem(most, layers=2)
    found = [*corners(asked), *candidates(asked, 4, 1)]
    assert len(found) > 4
    for one in found:
        assert not broken_kl(asked, one.layers, one.head)
        assert not broken_limits(asked, one.layers, (1,), one.head)
    assert [one.layers for one in corners(free)] != [one.layers for one in corners(asked)]


# --- scores


def test_products_have_the_factor_of_their_own_text() -> None:
    base = quarter()
    draw = np.random.default_rng(0)

    def both(one: Score) -> Score:
        return one.model_copy(update={"capabilities": (on("retrieval", one, draw, 3, 0.1),)})

    narrow, parent = both(score(0, "ffn", "ffn32", 0.1, 0.3)), both(score(0, "ffn", "parent@iq4_nl", 0.04, 0.08))
    seen = {one: {part.name: part for part in one.capabilities}["retrieval"] for one in (narrow, parent)}
    whole = {
        "": {"whole@iq4_nl": whole_of(0.02, 0.04), "head@iq4_nl": whole_of(0.01, 0.03)},
        "retrieval": {"whole@iq4_nl": whole_of(*[seen[parent].kl / 4] * 3), "head@iq4_nl": whole_of(0.1, 0.2, 0.3)},
    }
    found = {one.variant: one for one in scores_in_types([narrow], [parent], whole, base)}
    assert found["ffn32@iq4_nl"].kl == pytest.approx(0.2 + 0.5 * 0.25 * 0.06)  # as without capabilities
    (own,) = found["ffn32@iq4_nl"].capabilities
    wanted = np.array(seen[narrow].kl_per_sequence) + 0.25 * 0.25 * np.array(seen[parent].kl_per_sequence)
    assert own.kl_per_sequence == pytest.approx(wanted.tolist()) and own.documents == seen[narrow].documents
    assert found["head@iq4_nl"].capabilities[0].kl == pytest.approx(0.2)
    assert found["parent@iq4_nl"].capabilities[0].kl == pytest.approx(seen[parent].kl / 4)
    assert found["ffn32"] == narrow


def whole_of(*kl: float) -> WholeScore:
    return WholeScore(kl=kl, lm_loss=(0.0,) * len(kl))


def twins(chain: Chain) -> tuple[ScoringSet, ScoringSet]:
    """The corpus, and the corpus again as a capability: its states are computed, and not read."""
    same = chain.corpus.model_copy(update={"capability": "twin"})
    return chain.scored, replace(chain.scored, corpus=same, general=chain.corpus)


@needs_llama_cpp
def test_a_capabilitys_scores_in_types_are_those_of_its_text_and_no_token_more(chain: Chain) -> None:
    corpus, twin = twins(chain)
    blocks = [one for one in parents_in_types(chain.parent, chain.corpus, chain.records, TYPES) if one.layer == 1]
    blocks += [in_type(one, "iq4_nl") for one in chain.blocks if (one.layer, one.variant) == (1, "ffn32")]
    made = [
        score_sequences(
            [(one, text.sequences) for one in blocks], chain.records[1], text, chain.parent, chain.workspace, HOST
        )
        for text in (corpus, twin)
    ]
    assert sum(one.tokens for own in made for one in own) == 2 * len(blocks) * 6 * 32
    for one in scores_of(blocks, [corpus, twin], chain.workspace):
        (own,) = one.capabilities
        assert own.kl_per_sequence == pytest.approx(one.kl_per_sequence, rel=1e-3, abs=1e-6)


@needs_llama_cpp
@pytest.mark.parametrize("kept", [True, False])
def test_what_is_scored_on_a_capability_is_fitted_to_the_corpus(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """Whether the states of the corpus are kept or computed from its tokens."""
    scored = ScoringSet(corpus=needles_of(chain), last=chain.records[-1], count=4, length=64, general=chain.corpus)
    (block, *_) = parents_in_types(chain.parent, chain.corpus, chain.records[:1], ("iq4_nl",))
    layer = chain.records[0] if kept else chain.records[0].model_copy(update={"boundary": None})
    seen = []

    def spied(workspace: Path, ref: Ref, split: str, *rows: int) -> torch.Tensor:
        seen.append((ref, split))
        return read_rows(workspace, ref, split, *rows)

    monkeypatch.setattr(scoring, "read_rows", spied)
    work = [(block.model_copy(update={"key": f"{block.key}-{kept}"}), scored.sequences)]
    assert score_sequences(work, layer, scored, chain.parent, chain.workspace, HOST)
    assert [ref for ref, split in seen if split == "train"] == [layer.boundary if kept else chain.corpus.tokens]


@needs_llama_cpp
def test_the_whole_parent_is_rounded_once_and_scored_on_every_text(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    needles = needles_of(chain)
    texts = [chain.scored, ScoringSet(corpus=needles, last=chain.records[-1], count=4, length=64, general=chain.corpus)]
    recipe = Recipe.uniform("iq4_nl", 3).with_head("q8_0")
    found = score_whole(texts, chain.parent, recipe, chain.workspace)
    model, tokens = chain.reader.model(), [one.validation(one.corpus.tokens, chain.workspace).long() for one in texts]
    before = [log_probabilities(model, own) for own in tokens]
    train = read_tensors(chain.workspace, chain.corpus.tokens, ["train"])["train"][:24].long()
    quantise_layers(model, train, recipe)
    after = [log_probabilities(model, own) for own in tokens]
    assert found[0].kl == pytest.approx(divergences(before[0], after[0]), rel=1e-6)
    weights = weights_of(needles, "validation", chain.workspace)
    assert weights is not None
    each = token_divergences(before[1], after[1])
    assert found[1].kl == pytest.approx([float((kl * w).mean()) for kl, w in zip(each, weights, strict=True)], rel=1e-6)
    monkeypatch.setattr(typed_scores, "quantise_layers", lambda *_: pytest.fail("it was measured before"))
    assert score_whole(texts, chain.parent, recipe, chain.workspace) == found


def test_a_plan_counts_the_tokens_of_every_text() -> None:
    profile = load_profile("rag")
    assert scored_texts(profile, 256) == [(8, 128), (2, 1024), (8, 256)]


# --- the race, the judgement


@needs_llama_cpp
def test_a_racer_in_types_is_judged_on_all_capabilities_by_their_shares(chain: Chain) -> None:
    text = needles_of(chain)

    def raced(*shares: float) -> float:
        mixed = Mixed(capabilities=(text,), shares=shares)
        teacher = record_teacher(chain.parent, chain.corpus, SETTINGS, chain.workspace, HOST, mixed=mixed)
        job = gkd_job.job_of(bare_layers(which), which.blocks, teacher, SETTINGS, HOST)
        return kl_as_file(which, 0, job, "bfloat16", chain.workspace)

    which = contender("candidate-1", chosen(LAYERS).model_copy(update={"head": "q8_0"}), chain.blocks)
    general, needles, both = raced(1.0, 0.0), raced(0.0, 1.0), raced(0.25, 0.75)
    assert both == pytest.approx(0.25 * general + 0.75 * needles) and abs(general - needles) > 0.01 * general


@needs_llama_cpp
def test_a_child_in_types_is_judged_on_a_capability_by_its_file(chain: Chain) -> None:
    text = needles_of(chain)
    which = contender("child", chosen(LAYERS), chain.blocks)
    written = with_file(which, chain.parent, chain.corpus, "bfloat16", chain.workspace)
    asked = on_capability(Evaluate(), text)
    rounded, plain = (
        evaluate_contender(one, (chain.parent, text), asked, chain.workspace, HOST).quality.kl.value
        for one in (written, which.model_copy(update={"architecture": chosen(bare_layers(which))}))
    )
    assert rounded != plain


def test_a_profile_may_have_both() -> None:
    tree = load_profile("smollm2-llama-cpp").model_dump(mode="json", exclude_unset=True)
    needles = {"sources": [{"kind": "needles"}], "max_kl": 0.3}
    found = Profile.model_validate(tree | {"capabilities": {"needles": needles}})
    assert found.capability_limits == {"needles": 0.3} and found.search_space.precision
