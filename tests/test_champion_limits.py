"""Limits of the champion's rule: non-inferiority by hand, its error, what is looked at and what is refused before."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from blocks.errors import PuzzleError
from blocks.estimates import confidence_of_look, mean
from blocks.library import digest_of
from blocks.records import CorpusInfo, LayerChoice, Looping, Metric
from profiles.errors import ProfileError
from profiles.load import load_profile
from profiles.schema import Champion, ProbeLimits, Profile
from tasks.evaluate.compare import Contender, Lineage, contender, evaluate_contender, on_capability
from tasks.inputs.corpus import documents_of
from tasks.operating import champion, champion_limits
from tasks.operating.champion import basis, decide
from tasks.operating.champion_limits import Limit, judged_texts, limit, loops_limit
from tasks.probe.texts import CODE, NOISE
from tasks.running.workers import compute_of
from tests.chain import Chain, chosen
from tests.test_capabilities import needles_of
from tests.test_champion import profile_with, table

WIDE = 1e9
GOOD = (LayerChoice(), LayerChoice(ffn="ffn32"), LayerChoice())
BAD = (LayerChoice(), LayerChoice(ffn="ffn32"), LayerChoice(attention="no_op", ffn="no_op"))


def drawn(seed: int, shift: float, count: int = 24) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How much worse a challenger is on each of some sequences."""
    return np.random.default_rng(seed).normal(shift, 0.1, count)


def test_a_limit_is_a_one_sided_t_test_over_documents() -> None:
    worse = drawn(0, 0.05)
    documents = np.repeat(range(8), 3).tolist()
    each = worse.reshape(8, 3).mean(1)
    bound = stats.ttest_1samp(each, 0, alternative="less").confidence_interval(0.975).high

    def under(most: float) -> Limit:
        return limit("kl on code", mean(worse, documents).metric, most, 0.975, "nats")

    assert under(1).bound == pytest.approx(bound) and under(1).worse.value == pytest.approx(each.mean())
    between = (bound + each.mean()) / 2
    assert [under(most).state for most in (bound + 1e-9, between, each.mean() / 2)] == ["kept", "not shown", "broken"]
    assert [under(most).kept for most in (bound + 1e-9, between, 0)] == [True, False, False]
    alone = limit("kl on code", Metric(value=0, se=0, n=1), WIDE, 0.975, "nats")
    assert not alone.kept and alone.bound is None and "no error known" in str(alone)


@pytest.mark.parametrize("metric", ["kl", "top1_agreement"])
def test_without_limits_and_with_wide_ones_the_rule_decides_as_ever(metric: Any) -> None:
    """And a limit that is broken, or that too little text shows, keeps a champion that else would go."""
    outcomes = set()
    for seed in range(12):
        better, rule = torch.from_numpy(-drawn(seed, -0.05 if seed % 2 else 0.02)), Champion(metric=metric)
        pair = (better, better * 0) if metric == "top1_agreement" else (better * 0, better)
        wide = limit("kl on code", mean(drawn(seed, 5.0)).metric, WIDE, 0.975, "nats")
        plain, limited = decide(*pair, rule), decide(*pair, rule, limits=(wide,))
        assert limited.model_copy(update={"limits": (), "reason": plain.reason}) == plain
        assert plain.improvement and plain.improvement.value == pytest.approx(float(better.mean()))
        outcomes.add(plain.outcome)
        for most in (4.0, wide.worse.value):
            tight = decide(*pair, rule, limits=(wide, wide.model_copy(update={"most": most})))
            assert tight.outcome == "kept" and tight.improvement == plain.improvement
    assert outcomes == {"moved", "kept"}


def test_several_limits_do_not_add_their_errors() -> None:
    """On one of four the challenger is exactly as much worse as must be shown not to be: it passes as rarely as under
    that one alone. Where it is on all four, still more rarely.
    """
    cases, level = 2000, 1 - confidence_of_look(0.95, 1)
    draws = np.random.default_rng(0).normal(0.0, 0.1, (cases, 4, 12))

    def passed(*truths: float) -> float:
        all_kept = [
            all(
                limit("", mean(one + truth).metric, 0.1, 1 - level, "").kept
                for one, truth in zip(case, truths, strict=True)
            )
            for case in draws
        ]
        return float(np.mean(all_kept))

    one = passed(0.1, -1, -1, -1)
    assert 0.5 * level < one < 1.5 * level and passed(0.1, 0.1, 0.1, 0.1) < one


def counted(loops: list[int], size: int = 1) -> Looping:
    return Looping(loops=tuple(loops), documents=tuple(place // size for place in range(len(loops))))


def test_loops_are_compared_in_pairs() -> None:
    draw = np.random.default_rng(1)
    theirs = (draw.random(60) < 0.3).astype(int)
    ours = np.where(draw.random(60) < 0.2, 1 - theirs, theirs)
    found = loops_limit(counted(ours.tolist(), 2), counted(theirs.tolist(), 2), 0.3, 0.975)
    each = (ours - theirs).reshape(30, 2).mean(1)
    bound = stats.ttest_1samp(each, 0, alternative="less").confidence_interval(0.975).high
    assert found.worse.value == pytest.approx(each.mean()) and found.bound == pytest.approx(bound) and found.kept


@pytest.mark.parametrize("count", [40, 200])
@pytest.mark.parametrize("look", [1, 20])
def test_loops_that_nobody_saw_are_not_impossible(count: int, look: int) -> None:
    none, confidence = counted([0] * count), confidence_of_look(0.95, look)
    found = loops_limit(none, none, 0.05, confidence)
    exact = stats.binomtest(0, count, alternative="less").proportion_ci(confidence).high
    assert found.bound == pytest.approx(exact) and found.kept == (count == 200)
    few = counted([1] * 5 + [0] * (count - 5))
    exact = stats.binomtest(5, count, alternative="less").proportion_ci(confidence).high
    assert loops_limit(few, none, 0.05, confidence).bound >= exact - 1e-12 > 0.05
    whole = counted([0] * count, size=count // 2)  # all are of two documents
    assert loops_limit(whole, whole, 0.05, confidence).bound == pytest.approx(1 - (1 - confidence) ** 0.5)


# --- what is looked at


def sides(chain: Chain, *capabilities: CorpusInfo) -> tuple[Lineage, Lineage]:
    good, bad = (contender("child", chosen(layers), chain.blocks) for layers in (GOOD, BAD))
    first, second = (
        Lineage(parent=chain.parent, corpus=chain.corpus, child=one, capabilities=capabilities) for one in (good, bad)
    )
    return first, second


NEEDLES = "capabilities={retrieval: {sources: [{kind: needles}]}}"


def limited(*overrides: str) -> Profile:
    return profile_with("evaluate.sequences=8", NEEDLES, *overrides)


def test_capabilities_and_texts_of_the_probe_are_judged_as_the_report_judges_them(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    needles = needles_of(chain)
    good, bad = sides(chain, needles)
    monkeypatch.setattr(champion, "broken_budget", lambda *_: "")
    pairs = (0, 0, 1, 1, 2, 2, 3, 3)  # documents of two sequences
    monkeypatch.setattr(champion_limits, "documents_of", lambda corpus, *_: pairs[: corpus.test_sequences])
    wide = limited("champion.not_worse={general: 1000, retrieval: 1000}", "champion.not_worse_probed.typos=1000")
    found = champion.judge_against(bad, good, wide, chain.workspace, (), look=2)
    assert found.outcome == "moved" and found.improvement
    general, retrieval, typos = found.limits
    assert [one.name for one in found.limits] == ["kl on general", "kl on retrieval", "kl on probe-typos"]
    assert general.worse.value == -found.improvement.value and general.bound == -(found.lower_bound or 0)

    compute = compute_of(wide)
    asked, reader = on_capability(wide.evaluate, needles), chain.reader
    ours, theirs = (
        evaluate_contender(one.child, (chain.parent, needles), asked, chain.workspace, compute, reader.dtype).samples[
            "kl"
        ]
        for one in (good, bad)
    )
    by_hand = mean(np.subtract(ours, theirs), pairs[: needles.test_sequences]).metric
    assert retrieval.worse == by_hand and needles.weighted
    assert typos.worse.value < 0 and typos.worse != general.worse

    page = champion.judgement_markdown(found, "version 1", "runs/x")
    assert "| kl on retrieval | " in page and page.count("| kept |") == 3 and "kl on probe-typos kept (" in found.reason
    figures = champion.figures(found)
    assert figures["champion/kl_on_retrieval_worse"] == by_hand.value
    assert {name.rpartition("typos_")[2] for name in figures if "typos" in name} == {
        "worse",
        "worse_se",
        "worse_bound",
    }
    # the same pair under a limit that the better child breaks: none is so much better there
    strict = wide.model_copy(update={"champion": Champion(not_worse={"retrieval": 0.0})})
    back = champion.judge_against(good, bad, strict, chain.workspace, ())
    assert back.outcome == "kept" and back.limits[0].state == "broken" and "kl on retrieval broken" in back.reason


def test_loops_of_both_are_counted_on_the_text_of_now(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = sides(chain)
    loops = {good.child.key: 1, bad.child.key: 0}
    asked = []

    def looping(which: Contender, source: Any, settings: Any, *_: Any) -> Looping:
        asked.append((source[1].fingerprint, settings.loop_prompts))
        return counted([loops[which.key]] * 10 + [0] * 20)

    monkeypatch.setattr(champion_limits, "looping_of", looping)
    monkeypatch.setattr(champion, "broken_budget", lambda *_: "")
    old = bad.model_copy(update={"corpus": chain.corpus.model_copy(update={"fingerprint": "before"})})
    profile = limited("evaluate.loop_prompts=30", "champion.max_more_loops=20%")
    found = champion.judge_against(old, good, profile, chain.workspace, ())
    assert found.outcome == "kept" and found.lower_bound and found.lower_bound > 0, "it is better, and loops"
    (loops_of_both,) = found.limits
    assert loops_of_both.worse.value == pytest.approx(1 / 3) and loops_of_both.state == "broken"
    assert "looping answers broken (worse by 0.333 ±0.088 of the answers" in found.reason
    assert asked == [(chain.corpus.fingerprint, 30)] * 2
    loops[good.child.key] = 0
    assert champion.judge_against(old, good, profile, chain.workspace, ()).outcome == "moved"


def test_a_champion_that_goes_without_a_comparison_takes_the_limits_with_it(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = sides(chain)
    monkeypatch.setattr(champion, "lineage_of", lambda *_: good)
    monkeypatch.setattr(champion, "broken_budget", lambda *_: "speedup 1.5")
    said = {
        name: champion.judge("runs/x", bad, profile, chain.workspace, ())
        for name, profile in (("plain", limited()), ("limited", limited("champion.not_worse.retrieval=0.1")))
    }
    assert {one.outcome for one in said.values()} == {"moved"}
    assert "limits" not in said["plain"].reason and "limits were not looked at" in said["limited"].reason


# --- what is refused, and what stays as it was


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["champion.not_worse.retreival=0.1"],
            r"retreival is no capability .* Did you mean `retrieval`\? .*general, r",
        ),
        (["champion.max_more_loops=0.1"], r"nobody counts them: set evaluate\.loop_prompts"),
        (["champion.not_worse_probed.typo=0.1"], r"champion\.not_worse_probed\.typo: unknown key.*mean `typos`"),
        (["champion.not_worse.retrieval=-0.1"], r"champion\.not_worse\.retrieval: is -0\.1, must be greater than or"),
    ],
)
def test_limits_that_cannot_be_judged_are_refused_when_the_profile_is_read(overrides: list[str], told: str) -> None:
    with pytest.raises(ProfileError, match=told):
        load_profile("tiny", [NEEDLES, *overrides])


def test_limits_on_text_of_one_document_are_refused_before_a_challenger_is_made(chain: Chain, tmp_path: Path) -> None:
    needles = needles_of(chain)

    def texts(*overrides: str) -> Any:
        return judged_texts(limited(*overrides), chain.parent, chain.corpus, (needles,), chain.workspace)

    count = len(set(texts("champion.not_worse.retrieval=0.1")["retrieval"].documents))
    assert count == len(set(documents_of(needles, "test", chain.workspace))) > 1
    assert list(texts()) == ["general"]
    with pytest.raises(PuzzleError, match=r"champion\.not_worse\.general: the test text is of a single document"):
        texts("evaluate.sequences=1", "champion.not_worse.general=0.1")
    assert texts("evaluate.sequences=1"), "without a limit nothing is refused"


def test_the_names_of_the_probe_s_texts_are_the_probe_s() -> None:
    assert set(ProbeLimits.model_fields) == {CODE, *NOISE}


def test_a_rule_without_limits_has_the_digest_that_it_always_had(chain: Chain) -> None:
    before = {"metric": "kl", "min_improvement": 0.0, "confidence": 0.95}

    def rule(*overrides: str) -> str:
        return basis(profile_with(*overrides), chain.parent, chain.corpus, table())["rule"]

    assert rule() == digest_of(part=before)[: champion.DIGITS]
    changed = {
        rule("champion.not_worse.general=0.1"),
        rule("champion.not_worse_probed.typos=0.1"),
        rule("evaluate.loop_prompts=9", "champion.max_more_loops=0.1"),
    }
    assert len({rule(), *changed}) == 4
