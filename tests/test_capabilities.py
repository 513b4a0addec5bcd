"""Capabilities: text apart from the corpus, scores on each, their sum, limits in the MIP, GKD and the judgement."""

import itertools
import math
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from blocks.compute import HOST
from blocks.errors import CorpusError, InfeasibleBudget
from blocks.library import read_tensors
from blocks.records import (
    Candidate,
    CapabilityScore,
    ChildReport,
    CorpusInfo,
    LayerChoice,
    LimitKept,
    Looping,
    Metric,
    OnCapability,
    Score,
)
from profiles.load import load_profile
from profiles.schema import (
    GKD,
    Budget,
    Corpus,
    Evaluate,
    NeedlesSource,
    ParentAnswersSource,
    PassagesSource,
    Profile,
    PythonStdlibSource,
)
from tasks.distill import gkd_job
from tasks.distill.gkd import GKDResult, Seen
from tasks.distill.gkd_settings import texts_of_steps
from tasks.distill.gkd_targets import Mixed, record_teacher
from tasks.evaluate import compare
from tasks.evaluate.answers import continued, greedy
from tasks.evaluate.budget import capability_limits, figure_words, state_of
from tasks.evaluate.loops import beginnings, looping_of
from tasks.inputs.chats import Unusable
from tasks.inputs.corpus import prepare_corpus, weights_of
from tasks.inputs.corpus_sources import iterate_documents
from tasks.inputs.near_duplicates import KnownRuns
from tasks.inputs.parent_answers import prompts_of
from tasks.inputs.questions import needles, passages
from tasks.inputs.text_files import Tally
from tasks.libraries.tables import read_table, write_tables
from tasks.operating import champion
from tasks.operating.run_figures import report_metrics
from tasks.pages.report import comparison_rows, write_report
from tasks.pages.verdict import budget_rows, evidence, warnings
from tasks.score.scoring import ScoringSet, score_key, score_sequences, scores_of
from tasks.search.capabilities import Capabilities, weighed
from tasks.search.choose import choose
from tasks.search.joint import KL_OF
from tasks.search.solve import choose_joint, front, front_values, prices
from tasks.search.totals import Problem, kl_on, make_problem, score_of, within_budget
from tasks.search.view import library_of, request_of
from tasks.studies.peers import find
from tests.chain import CORPUS, Chain, chosen
from tests.test_choose import ATTENTIONS, CHAT, EXACT, FFNS, costs_of, score
from tests.test_gkd import CHILD, SETTINGS
from tests.test_report import report_of

LABELS = {"attention": ATTENTIONS, "ffn": FFNS}
SPLITS = ["train", "validation", "test"]


def on(name: str, like: Score, draw: np.random.Generator, count: int, size: float) -> CapabilityScore:
    """A random score on a capability, with as many sequences."""
    kl = draw.gamma(2.0, size, count)
    return CapabilityScore(
        name=name,
        kl=float(kl.mean()),
        kl_se=float(kl.std(ddof=1) / math.sqrt(count)),
        lm_loss=float(kl.mean()),
        lm_loss_se=0.0,
        tokens=count * 8,
        kl_per_sequence=tuple(kl.tolist()),
        lm_loss_per_sequence=tuple(kl.tolist()),
        documents=tuple(index // 2 for index in range(count)),
    )


def problem(weights: dict[str, float], most: dict[str, float] | None = None, layers: int = 3, seed: int = 0) -> Problem:
    """A library with scores on two capabilities beside the corpus; half of the parent's parameters are allowed."""
    draw = np.random.default_rng(seed)
    scores = []
    for layer in range(layers):
        for part, labels in LABELS.items():
            for label in labels[1:]:
                own = score(layer, part, label, draw)
                # what hurts retrieval hurts the corpus little: attention
                size = 0.05 if part == "attention" else 0.005
                others = (on("retrieval", own, draw, 7, size), on("code", own, draw, 4, 0.01))
                scores.append(own.model_copy(update={"capabilities": others}))
    costs = costs_of(LABELS, [CHAT], layers, seed)
    total = sum(weights.values())
    kept = Capabilities(weights={name: one / total for name, one in weights.items()}, most=most or {})
    return make_problem(scores, costs, Budget(layer_parameters_fraction=0.5), [CHAT], EXACT, capabilities=kept)


def every(asked: Problem) -> list[tuple[LayerChoice, ...]]:
    pairs = [LayerChoice(attention=a, ffn=f) for a in ATTENTIONS for f in FFNS]
    return [one for one in itertools.product(pairs, repeat=asked.costs.num_hidden_layers) if within_budget(asked, one)]


# --- the text


def test_needles_ask_for_what_they_told() -> None:
    source = NeedlesSource(kind="needles", documents=3, facts=20, distance=4)
    documents = list(needles(source))
    assert documents == list(needles(source)) and len(set(documents)) == 3
    for text in documents:
        assert len(text.answers) == 20
        for start, end in text.answers:
            name = text[:start].rpartition("what is the code of the ")[2].partition("?")[0]
            told = text[:start].rpartition(f"The code of the {name} is ")[2].partition(".")[0]
            assert text[start:end].strip() == told and len(told) == 5


def test_passages_end_with_their_answer() -> None:
    found = list(itertools.islice(passages(PassagesSource(kind="passages")), 20))
    assert all(text[slice(*text.answers[0])].strip() and "Question:" in text for text in found)
    assert all(text.answers[0][1] == len(text) for text in found)


def test_the_parent_is_asked_what_stands_before_an_answer() -> None:
    for data_set, begins in (("nq_open", ""), ("sciq", "Question:")):
        asked = PassagesSource(kind="passages", data_set=data_set)  # type: ignore[arg-type]
        source = ParentAnswersSource(kind="parent_answers", prompts=asked)
        tallies: list[Tally] = []
        prompts = list(itertools.islice(prompts_of(source, len, tallies), 20))
        for (message,), text in zip(prompts, passages(asked), strict=False):
            said = message["content"]
            assert message["role"] == "user" and text.startswith(said) and begins in said
            assert text[slice(*text.answers[0])].strip() == text.removeprefix(said).strip()

    def check(_: object) -> None:
        raise Unusable("asks too much")

    with pytest.raises(CorpusError, match="sciq cannot be read: .* passages are of no use, the first: passage 1 asks"):
        list(prompts_of(source, check, tallies))


def test_the_text_of_a_capability_is_not_in_the_corpus(chain: Chain, tmp_path: Path) -> None:
    """All its sources' first 40 modules are the corpus's; nothing of them that the corpus uses is used again."""
    sources = (PythonStdlibSource(kind="python_stdlib", max_files=90),)
    asked = CORPUS.model_copy(update={"sources": sources, "train_sequences": 16})
    folder = chain.workspace / chain.parent.folder

    def shared(*others: Any) -> float:
        own = prepare_corpus(asked, folder, chain.parent.fingerprint, chain.workspace, others)
        known = KnownRuns([each.flatten().numpy() for each in tokens_of(chain, chain.corpus)], 0.5)
        rows = torch.cat(tokens_of(chain, own))
        return float(np.mean([known.holds(row.numpy(), index) for index, row in enumerate(rows)]))

    assert shared() > 0.4 and shared(chain.corpus) < 0.1  # thirteen bytes of code may occur in any module


def test_a_long_document_is_known_by_the_middle_that_another_corpus_took() -> None:
    draw = np.random.default_rng(0)
    whole, other = draw.integers(0, 1000, (2, 4000), dtype=np.int32)
    known = KnownRuns([np.concatenate([other[1950:2050], whole[1616:2384]])], 0.7, middle=256)
    assert known.holds(whole, "whole") and known.holds(whole[1000:3001], "half")
    assert not known.holds(whole[:1700], "before")
    assert not known.holds(other, "other")  # a hundred tokens of it are no middle


def test_features_of_images_that_are_known_take_no_more_than_their_ids() -> None:
    """A corpus of images may have ten million of them."""
    ids = np.arange(1000, 500_000, 2, dtype=np.int32)
    tracemalloc.start()
    try:
        known = KnownRuns((), 1.0, images=ids)
        assert tracemalloc.get_traced_memory()[1] <= ids.nbytes
    finally:
        tracemalloc.stop()
    assert known.shows(1000, "first") and known.shows(499_998, "last") and known.shows(499_998, "again")
    assert not any(known.shows(other, "none") for other in (0, 999, 1001, 499_999, 500_000))
    assert known.found == 3 and not KnownRuns((), 1.0).shows(1000, "nothing is known")


def tokens_of(chain: Chain, corpus: Any) -> list[torch.Tensor]:
    return list(read_tensors(chain.workspace, corpus.tokens, SPLITS).values())


def needles_of(chain: Chain) -> CorpusInfo:
    """A capability of 64 tokens a sequence, twice those of the corpus, where answers count alone."""
    sources = (NeedlesSource(kind="needles", documents=80, facts=8, distance=3),)
    asked = Corpus(
        sources=sources,
        sequence_length=64,
        prompt_weight=0,
        train_sequences=8,
        validation_sequences=4,
        test_sequences=4,
    )
    folder = chain.workspace / chain.parent.folder
    found = prepare_corpus(asked, folder, chain.parent.fingerprint, chain.workspace, (chain.corpus,))
    return found.model_copy(update={"capability": "retrieval"})


def test_only_answers_count_where_the_prompt_weighs_nothing(chain: Chain) -> None:
    folder, corpus = chain.workspace / chain.parent.folder, needles_of(chain)
    weights, (_, validation, _) = weights_of(corpus, "validation", chain.workspace), tokens_of(chain, corpus)
    assert weights is not None and weights.mean() == pytest.approx(1)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.decode(validation.flatten()[1:][weights.flatten()[:-1] > 0].tolist(), skip_special_tokens=True)
    assert set(text) <= set("0123456789 \n") and any(sign.isdigit() for sign in text)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"general": {"sources": [{"kind": "needles"}]}}, "set corpus.sources"),
        ({"general": {"sequence_length": 64}}, "set corpus.sequence_length"),
        ({"rag": {"weight": 2}}, "capabilities.rag needs sources"),
        ({"general": {"weight": 0}, "rag": {"sources": [{"kind": "needles"}], "weight": 0}}, "all weights are 0"),
        ({"rag": {"sources": [{"kind": "needles"}], "train_sequences": 2}}, "raise the first"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], told: str) -> None:
    tree = load_profile("tiny").model_dump(mode="json") | {"capabilities": given}
    with pytest.raises(ValidationError, match=told):
        Profile.model_validate(tree)


# --- scores


def test_scores_from_tokens_are_those_from_recorded_states(chain: Chain) -> None:
    """The corpus itself as a capability: its states were recorded, a capability's are computed."""
    same = chain.corpus.model_copy(update={"capability": "twin"})
    twin = ScoringSet(corpus=same, last=chain.records[-1], count=6, length=32)
    blocks = [block for block in chain.blocks if block.layer == 1 and block.status != "failed"]
    work = [(block, twin.sequences) for block in blocks]
    made = score_sequences(work, chain.records[1], twin, chain.parent, chain.workspace, HOST)
    assert sum(one.tokens for one in made) == len(blocks) * 6 * 32  # what was asked, and no more
    assert score_key(blocks[0], twin.text) != score_key(blocks[0], chain.scored.text)
    for one in scores_of(blocks, [chain.scored, twin], chain.workspace):
        (own,) = one.capabilities
        assert own.name == "twin" and own.kl_per_sequence == pytest.approx(one.kl_per_sequence, rel=1e-3, abs=1e-6)
        assert own.documents == one.documents


# --- GKD and the judgement


def test_steps_are_shared_out_by_the_weights() -> None:
    order = texts_of_steps(40, (0.5, 0.3, 0.0, 0.2))
    for count in range(1, 41):
        done = [sum(text == place for text, _ in order[:count]) for place in range(4)]
        assert all(abs(one - share * count) <= 1 for one, share in zip(done, (0.5, 0.3, 0.0, 0.2), strict=True))
    assert [before for text, before in order if text == 1] == list(range(12))
    assert texts_of_steps(5, (1.0,)) == [(0, step) for step in range(5)]


def trained(chain: Chain, shares: tuple[float, ...], seen: list[Seen], **changes: Any) -> GKDResult:
    texts = (needles_of(chain),) if len(shares) > 1 else ()
    settings = GKD(**(SETTINGS | changes))
    mixed = Mixed(capabilities=texts, shares=shares)
    teacher = record_teacher(chain.parent, chain.corpus, settings, chain.workspace, HOST, mixed=mixed)
    job = gkd_job.job_of(CHILD, chain.blocks, teacher, settings, HOST)
    shutil.rmtree(chain.workspace / job.folder, ignore_errors=True)
    return gkd_job.distill_globally(job, chain.workspace, HOST, watch=seen.append)


def test_a_capability_without_weight_changes_nothing_in_gkd(chain: Chain) -> None:
    """It is watched alone."""
    seen: list[Seen] = []
    alone, watched = trained(chain, (1.0,), []), trained(chain, (1.0, 0.0), seen)
    assert watched.weights.sha256 == alone.weights.sha256 and watched.curve == alone.curve
    assert {name for one in seen for name in one.on_each} == {"general", "retrieval"}


def test_gkd_on_a_mixture_brings_the_child_nearer_on_both_and_keeps_the_best_of_the_sum(chain: Chain) -> None:
    seen: list[Seen] = []
    only: list[Seen] = []
    found, alone = trained(chain, (0.5, 0.5), seen, steps=20), trained(chain, (1.0, 0.0), only, steps=20)
    measured = [one for one in seen if one.on_each]
    for one in measured:
        assert one.validation_kl == pytest.approx((one.on_each["general"] + one.on_each["retrieval"]) / 2)
    assert found.best_kl == min(kl for _, kl in found.curve) < found.curve[0][1]
    assert found.tokens == 10 * 4 * 32 + 10 * 4 * 64 and alone.tokens == 20 * 4 * 32
    assert measured[-1].on_each["retrieval"] < [one for one in only if one.on_each][-1].on_each["retrieval"]


def test_recorded_targets_of_a_mixture_are_those_of_the_parent_beside(chain: Chain) -> None:
    recorded, beside = trained(chain, (0.5, 0.5), []), trained(chain, (0.5, 0.5), [], recorded_gib=0)
    assert recorded.weights.sha256 == beside.weights.sha256


def test_a_child_is_judged_by_the_tokens_that_show_the_capability(chain: Chain) -> None:
    text = needles_of(chain)
    asked = compare.on_capability(Evaluate(sequences=6, benchmarks=("piqa",)), text)
    assert asked.sequences == 4 and not asked.benchmarks
    which = compare.contender("child", chosen(CHILD), chain.blocks)
    found = compare.evaluate_contender(which, (chain.parent, text), asked, chain.workspace, HOST)
    plain = text.model_copy(update={"capability": ""})
    alike = compare.evaluate_contender(which, (chain.parent, plain), asked, chain.workspace, HOST)
    assert found.quality.kl != alike.quality.kl
    tokens = read_tensors(chain.workspace, text.tokens, ["test"])["test"]
    weights = weights_of(text, "test", chain.workspace)
    assert weights is not None
    model = compare.build(which, chain.parent, chain.workspace, HOST)
    with torch.no_grad():
        ours, theirs = (one(tokens.long()).logits.log_softmax(-1) for one in (model, chain.reader.model()))
    by_hand = ((theirs.exp() * (theirs - ours)).sum(-1) * weights).mean(1)
    assert found.samples["kl"] == pytest.approx(by_hand.tolist(), rel=1e-3)
    assert len(set(found.documents)) > 1


def test_beginnings_are_spread_over_the_split_and_end_at_what_ends_an_answer(chain: Chain) -> None:
    tokens = torch.arange(4 * 128).view(4, 128)
    pieces, rows = beginnings(tokens, 8)
    assert rows == [0, 0, 1, 1, 2, 2, 3, 3] and pieces[:, 0].tolist() == [64 * piece for piece in range(8)]
    assert len(beginnings(tokens, 100)[1]) == 16
    parent = compare.parent_contender(chosen(CHILD))
    asked = Evaluate(loop_prompts=6, answer_tokens=30)
    found = looping_of(parent, (chain.parent, chain.corpus), asked, chain.workspace, HOST)
    prompts, _ = beginnings(read_tensors(chain.workspace, chain.corpus.tokens, ["test"])["test"], 6)
    model = chain.reader.model()
    for prompt, together in zip(prompts, continued(model, prompts, 30, frozenset((7,))), strict=True):
        assert together == greedy(model, prompt.tolist(), 30, frozenset((7,)))[0]
    assert len(found.loops) == len(found.documents) == 6
    assert looping_of(parent, (chain.parent, chain.corpus), asked, chain.workspace, HOST) == found


def reported(rows: tuple[Candidate, ...]) -> ChildReport:
    return report_of().model_copy(update={"candidates": rows})


def test_a_child_that_loops_more_than_its_parent_heads_the_report() -> None:
    documents = tuple(range(20))
    theirs, ours = (Looping(loops=(1,) * count + (0,) * (20 - count), documents=documents) for count in (4, 7))
    rows = report_of().candidates
    theirs_too = {"parent": theirs, "child": theirs}

    def told(counted: dict[str, Looping]) -> list[str]:
        return warnings(reported(tuple(one.model_copy(update={"looping": counted.get(one.name)}) for one in rows)))

    first = told({"parent": theirs, "child": ours})[0]
    assert "loops when it goes on from 35 % of 20 beginnings" in first and "its parent from 20 %: +15.0 " in first
    assert not any("goes on from" in line for line in told(theirs_too))


def test_the_report_shows_every_capability(tmp_path: Path) -> None:
    each = OnCapability(
        loss=Metric(value=1.0, se=0.1, n=3),
        kl=Metric(value=0.25, se=0.02, n=3),
        top1_agreement=Metric(value=0.8, se=0.02, n=3),
        predicted_kl=0.2,
        samples={"kl": (0.2, 0.25, 0.3)},
    )
    limit = LimitKept(name="max_kl of retrieval", asked=0.5, floor=False, got=0.2, measured=each.kl)
    rows = [
        one.model_copy(update={"capabilities": {"retrieval": each}, "limits": (limit,)})
        for one in report_of().candidates
    ]
    whole = reported(tuple(rows))
    assert {"KL on retrieval", "predicted KL on retrieval"} <= {row.label for row in comparison_rows(whole)}
    assert budget_rows(whole)[0][1:] == (
        "at most 0.5 nats per token",
        "0.2 nats per token, predicted",
        "0.250 ±0.020 nats per token",
        "kept",
    )
    assert any("retrieval 0.250 ±0.020" in line for line in evidence(whole))
    assert report_metrics(whole)["child_gkd/kl_on_retrieval"] == 0.25
    assert (tmp_path / "capabilities.png") in write_report(whole, tmp_path)


def test_a_limit_is_asked_predicted_measured_and_judged() -> None:
    asked = problem({"general": 1.0, "retrieval": 1.0}, {"retrieval": 0.3, "general": 0.2})
    architecture = choose(asked)
    kl = {"general": Metric(value=0.5, se=0.01, n=9), "retrieval": Metric(value=0.1, se=0.01, n=9)}
    limits = {one.name: one for one in capability_limits(asked, architecture, kl)}
    assert limits["max_kl of retrieval"].got == kl_on(asked, architecture.layers, "retrieval")
    assert state_of(limits["max_kl of retrieval"], "") == state_of(limits["max_kl of retrieval"], "busy") == "kept"
    assert state_of(limits["max_kl of general"], "") == "not kept"
    assert figure_words(limits["max_kl of general"], 0.2) == "0.2 nats per token"


# --- the weighed sum


def test_a_weight_of_one_is_the_corpus_alone() -> None:
    alone = problem({"general": 1.0})
    ignored = problem({"general": 1.0, "retrieval": 0.0})
    plain = [one.model_copy(update={"capabilities": ()}) for one in alone.scores]
    assert [one.model_copy(update={"capabilities": ()}) for one in ignored.scores] == plain
    assert choose(ignored).model_copy(update={"solve_seconds": 0.0}) == choose(alone).model_copy(
        update={"solve_seconds": 0.0}
    )
    bare = make_problem(plain, alone.costs, alone.budget, alone.scenarios, alone.search)
    assert choose(bare).layers == choose(alone).layers


def test_the_sum_is_weighed_and_its_error_is_that_of_a_stratified_sample() -> None:
    asked = problem({"general": 1.0, "retrieval": 2.0, "code": 1.0})
    first = asked.scores[0]
    parts = {one.name: one for one in first.capabilities}
    assert first.kl == pytest.approx(0.25 * parts["general"].kl + 0.5 * parts["retrieval"].kl + 0.25 * parts["code"].kl)
    assert np.mean(first.kl_per_sequence) == pytest.approx(first.kl)
    assert len(first.documents) == len(first.kl_per_sequence) == 5 + 7 + 4 and len(set(first.documents)) == 5 + 4 + 2
    layers = choose(asked).layers
    value, error = score_of(asked, layers)
    each = {name: kl_on(asked, layers, name) for name in parts}
    assert value == pytest.approx(0.25 * each["general"] + 0.5 * each["retrieval"] + 0.25 * each["code"])
    assert 0 < error < value


def test_a_score_that_lacks_a_capability_is_told() -> None:
    with pytest.raises(Exception, match="has no score on the capability memory"):
        weighed(problem({"general": 1.0}).scores, Capabilities(weights={"general": 0.5, "memory": 0.5}))


def test_scores_on_capabilities_come_back_from_a_table(tmp_path: Path) -> None:
    scores = problem({"general": 1.0, "code": 1.0}).scores
    digests = write_tables(
        tmp_path, {"scores": scores, "bare": [one.model_copy(update={"capabilities": ()}) for one in scores]}
    )
    assert read_table(tmp_path, digests, "scores", Score) == scores
    assert all(not one.capabilities for one in read_table(tmp_path, digests, "bare", Score))


# --- limits


@pytest.mark.parametrize("seed", range(4))
def test_with_limits_the_best_is_that_of_trying_everything(seed: int) -> None:
    weights = {"general": 1.0, "retrieval": 0.5, "code": 0.0}
    free = choose(problem(weights, seed=seed))
    most = {name: 0.8 * kl_on(problem(weights, seed=seed), free.layers, name) for name in ("retrieval", "code")}
    asked = problem(weights, most, seed=seed)
    fits = [one for one in every(asked) if all(kl_on(asked, one, name) <= most[name] for name in most)]
    if not fits:
        with pytest.raises(InfeasibleBudget):
            choose(asked)
        return
    found = choose(asked)
    assert found.score == pytest.approx(min(score_of(asked, one)[0] for one in fits), abs=1e-9)
    assert found.status == "optimal"


def test_the_optimum_breaks_a_limit_that_it_keeps_when_asked_and_pays_for() -> None:
    weights = {"general": 1.0, "retrieval": 0.0}
    free = choose(problem(weights))
    before = kl_on(problem(weights), free.layers, "retrieval")
    asked = problem(weights, {"retrieval": 0.7 * before})
    held = choose(asked)
    assert kl_on(asked, held.layers, "retrieval") <= 0.7 * before < before
    assert held.score > free.score
    library, request = library_of(asked), request_of(asked)
    (choice,) = choose_joint(library, request)
    price = next(one for one in prices(library, request, choice) if one.budget == "max_kl of retrieval")
    assert price.without == pytest.approx(free.score) and price.per_unit < 0
    assert price.used <= price.limit == 0.7 * before
    assert price.speed is not None and price.speed >= 0


def test_a_limit_out_of_reach_is_named_with_what_would_have_to_give() -> None:
    asked = problem({"general": 1.0, "retrieval": 1.0}, {"retrieval": 1e-6})
    with pytest.raises(InfeasibleBudget) as told:
        choose(asked)
    said = str(told.value)
    assert "layer_parameters_fraction and max_kl of retrieval together" in said
    least = min(kl_on(asked, one, "retrieval") for one in every(asked))
    needed = float(said.partition("max_kl of retrieval: 1e-06 asked, at least ")[2].partition(" needed")[0])
    assert needed == pytest.approx(least, rel=1e-4) and needed >= least
    assert "layer_parameters_fraction: 0.5 asked, at least" in said
    kept = problem({"general": 1.0, "retrieval": 1.0}, {"retrieval": needed})
    assert kl_on(kept, choose(kept).layers, "retrieval") <= needed * (1 + 1e-6)


def test_a_front_runs_over_the_kl_on_a_capability() -> None:
    library = library_of(problem({"general": 1.0, "retrieval": 0.0}))
    request = request_of(problem({"general": 1.0, "retrieval": 0.0}))
    over = f"{KL_OF}retrieval"
    assert over in library.quantities
    values = front_values(library, request, over, 6)
    found = [one.objective for one in front(library, request, over, values) if one is not None]
    assert found == sorted(found, reverse=True) and found[0] > found[-1]


def test_a_champion_that_breaks_the_highest_kl_on_a_capability_is_told(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = problem({"general": 1.0, "retrieval": 1.0})
    free = choose(asked)
    reached = kl_on(asked, free.layers, "retrieval")

    def under(most: float) -> str:
        limited = replace(asked, capabilities=replace(asked.capabilities, most={"retrieval": most}))
        monkeypatch.setattr(champion, "last_problem", lambda *_: limited)
        return champion.broken_budget(free, load_profile("tiny"), chain.workspace)

    assert under(reached) == "" and under(0.5 * reached) == f"max_kl of retrieval {0.5 * reached:g}"


def test_other_searches_know_no_limits_on_capabilities() -> None:
    asked = problem({"general": 1.0, "retrieval": 0.0}, {"retrieval": 1e-6})
    assert kl_on(asked, find("greedy", asked, 0).layers, "retrieval") > 1e-6


def test_the_documents_of_a_needle_source_are_text_for_every_reader() -> None:
    corpus = Corpus(sources=(NeedlesSource(kind="needles", documents=2),))
    assert all("The code of the" in text for text in iterate_documents(corpus))
