"""The champion: what counts as changed, the paired rule, the budget, the registry's aliases, a rollback."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from pydantic import ValidationError
from scipy import stats

from blocks.errors import DamagedBlock
from blocks.estimates import confidence_of_look
from blocks.library import digest_of, read_value, write_value
from blocks.records import ChildReport, Cost, CostTable, Floor, LayerChoice, Metric, NonBlockCost, SpeedReport
from profiles.load import load_profile
from profiles.schema import Budget, Champion, HubParent, Profile, Scenario, TinyParent
from tasks.distill import bld, record
from tasks.evaluate import floors
from tasks.evaluate.compare import LINEAGE, Lineage, contender
from tasks.inputs.parent import at_its_commit
from tasks.measure.calibration import drift
from tasks.measure.costs import costs_of
from tasks.operating import champion, registry
from tasks.operating.champion import Judgement, basis, changes, decide
from tasks.operating.tracking import Tracking, client_of, open_tracking
from tasks.search.totals import make_problem
from tests.chain import Chain, chosen
from tests.test_report import report_of


def profile_with(*overrides: str) -> Profile:
    return load_profile("tiny", list(overrides))


def table(scale: float = 1.0, spread: float = 0.01, measured_at: str = "now") -> CostTable:
    def cost(variant: str, seconds: float) -> Cost:
        return Cost(
            subblock="ffn",
            variant=variant,
            scenario="chat",
            batch_size=1,
            prefill_seconds=seconds,
            decode_seconds_per_token=seconds / 10,
            prefill_spread=spread,
            decode_spread=spread,
            parameters=10,
            weight_bytes=40,
            kv_bytes_per_token=0,
        )

    outside = NonBlockCost(
        scenario="chat",
        batch_size=1,
        prefill_seconds=1.0,
        decode_seconds_per_token=0.1,
        parameters=5,
        weight_bytes=20,
    )
    return CostTable(
        hardware={"name": "here"},
        costs=(cost("parent", 1.0), cost("no_op", 0.5 * scale)),
        non_block=(outside,),
        num_hidden_layers=3,
        measured_at=measured_at,
    )


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("budget.layer_parameters_fraction=0.5", "budget"),
        ("scenarios.0.prompt_tokens=48", "traffic"),
        ("search_space.ffn=[ffn96, no_op]", "search_space"),
        ("bld.steps=9", "distillation"),
        ("bld.otherwise=[{variants: [ffn96], steps: 9}]", "distillation"),
        ("gkd.steps=9", "gkd"),
        ("champion.confidence=0.9", "rule"),
        ("scoring.metric=lm_loss", "scoring"),
        ("hardware.name=elsewhere", "hardware"),
        ("search.gap=0.1", "search"),
        ("search.fastest_within_score=0.1", "search"),
        ("capabilities.general.max_kl=0.5", "capabilities"),
        ("capabilities.retrieval.sources=[{kind: needles}]", "capabilities"),
    ],
)
def test_a_changed_field_is_named_and_nothing_else(override: str, part: str, chain: Chain) -> None:
    before = basis(profile_with(), chain.parent, chain.corpus, table())
    after = basis(profile_with(override), chain.parent, chain.corpus, table())
    assert changes(before, after) == (part,)
    assert changes(before, json.loads(json.dumps(before))) == ()


def test_another_way_to_hold_a_limit_makes_a_challenger_where_there_is_one(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = "capabilities.general.max_kl=0.5"
    fast, off = "budget.speedup=1.2", "search.floor_rounds=0"
    asked = (profile_with(limit), profile_with(fast), profile_with(), profile_with(limit, fast, off))
    before = [basis(one, chain.parent, chain.corpus, table()) for one in asked]
    monkeypatch.setattr(floors, "VERSION", floors.VERSION + 1)
    after = [basis(one, chain.parent, chain.corpus, table()) for one in asked]
    assert [changes(*pair) for pair in zip(before, after, strict=True)] == [("capabilities",), ("budget",), (), ()]


def test_modelled_costs_are_those_of_the_target_on_any_machine(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(target: str) -> dict[str, str]:
        space = ["search_space.attention=[no_op]", "search_space.ffn=[no_op]"]
        profile = profile_with("hardware.engine=roofline", f"hardware.name={target}", *space)
        return basis(profile, chain.parent, chain.corpus, costs_of(profile, chain.parent, chain.workspace))

    before = found("h100")
    monkeypatch.setattr("tasks.measure.hardware_description.processor", lambda: "another")
    assert changes(before, found("h100")) == ()
    assert changes(before, found("a100")) == ("hardware", "costs")


def test_parent_corpus_and_costs_count_and_the_hour_does_not(chain: Chain) -> None:
    before = basis(profile_with(), chain.parent, chain.corpus, table())
    other = chain.parent.model_copy(update={"fingerprint": "f" * 64})
    text = chain.corpus.model_copy(update={"fingerprint": "e" * 64})
    assert changes(before, basis(profile_with(), other, chain.corpus, table())) == ("parent",)
    assert changes(before, basis(profile_with(), chain.parent, text, table())) == ("corpus",)
    assert changes(before, basis(profile_with(), chain.parent, chain.corpus, table(2.0))) == ("costs",)
    assert changes(before, basis(profile_with(), chain.parent, chain.corpus, None)) == ("costs",)
    again = table(measured_at="an hour later")
    later = basis(profile_with("name=other", "evaluate.throughput_rounds=9"), chain.parent, chain.corpus, again)
    assert changes(before, later) == ()
    assert changes({}, before) == tuple(name for name in champion.NAMES if name != "capabilities")  # there are none


def test_fields_of_later_versions_change_nothing_where_nobody_sets_them(chain: Chain) -> None:
    profile, costs = profile_with(), table().model_dump(mode="json", exclude={"measured_at", "load"})
    found = basis(profile, chain.parent, chain.corpus, table())
    trained = profile.bld.model_dump(mode="json", exclude={"otherwise"})
    before = {
        "distillation": [profile.record, trained, profile.seed, record.VERSION, bld.VERSION],
        "search": profile.search.model_dump(mode="json", exclude={"fastest_within_score", "floor_rounds"}),
        "costs": costs
        | {"costs": [{name: one[name] for name in one if name != "state_bytes"} for one in costs["costs"]]},
    }
    assert {name: found[name] for name in before} == {name: digest_of(part=before[name])[:8] for name in before}
    stateful = table().costs[1].model_copy(update={"state_bytes": 9})
    more = table().model_copy(update={"costs": (table().costs[0], stateful)})
    assert changes(found, basis(profile_with(), chain.parent, chain.corpus, more)) == ("costs",)


def test_costs_drift_beyond_their_spread_only() -> None:
    assert drift(table(), table(1.05)) == []
    assert drift(table(spread=0.2), table(1.5, spread=0.2)) == []
    moved = drift(table(), table(1.5))
    assert len(moved) == 2 and "no_op prefill" in moved[0] and "+50%" in moved[0]


def test_the_rule_is_a_paired_one_sided_t_test() -> None:
    generator = torch.Generator().manual_seed(3)
    hard = torch.rand(12, generator=generator, dtype=torch.float64)  # sequences differ much, models little
    theirs, ours = hard + 0.02, hard + 0.005 * torch.randn(12, generator=generator, dtype=torch.float64)
    found = decide(ours, theirs, Champion())
    gains = (theirs - ours).numpy()
    expected = (
        stats.ttest_1samp(gains, 0, alternative="greater").confidence_interval(0.975).low
    )  # half of the error is the first's
    assert found.outcome == "moved" and found.lower_bound == pytest.approx(expected)
    assert stats.ttest_ind(theirs.numpy(), ours.numpy()).pvalue > 0.5  # unpaired, nobody would see it
    assert decide(theirs, ours, Champion()).outcome == "kept"
    assert decide(ours, theirs, Champion(min_improvement=0.05)).outcome == "kept"
    assert found.lower_bound is not None
    edge = decide(ours, theirs, Champion(min_improvement=found.lower_bound))
    assert edge.outcome == "kept"  # more than, not as much as


def test_sequences_of_one_document_do_not_prove_it_several_times() -> None:
    gains = torch.tensor([0.1, 0.02, 0.05, -0.01], dtype=torch.float64)
    ours, theirs = torch.ones(16, dtype=torch.float64) - gains.repeat_interleave(4), torch.ones(16, dtype=torch.float64)
    documents = [document for document in range(4) for _ in range(4)]
    alone, together = decide(ours, theirs, Champion()), decide(ours, theirs, Champion(), documents=documents)
    assert alone.outcome == "moved" and together.outcome == "kept"
    assert together.lower_bound == pytest.approx(decide(-gains, gains * 0, Champion()).lower_bound)
    assert "16 paired sequences of 4 documents" in together.reason


def test_more_confidence_keeps_a_champion_that_less_would_move() -> None:
    theirs = torch.tensor([1.0, 1.2, 0.9, 1.1], dtype=torch.float64)
    ours = theirs - torch.tensor([0.1, 0.02, 0.05, 0.0], dtype=torch.float64)
    assert decide(ours, theirs, Champion(confidence=0.8)).outcome == "moved"
    assert decide(ours, theirs, Champion(confidence=0.99)).outcome == "kept"
    up = Champion(metric="top1_agreement", confidence=0.8)
    assert decide(ours, theirs, up).outcome == "kept" and decide(theirs, ours, up).outcome == "moved"
    assert decide(ours[:1], theirs[:1], Champion()).outcome == "kept"  # one sequence proves nothing


def test_many_looks_err_no_more_often_than_one() -> None:
    """A champion and challengers of equal quality, one a week for two years. Without the correction, luck would crown
    one of them in a third of the cases or more.
    """
    looks, cases, rule = 104, 400, Champion()
    gains = np.random.default_rng(0).standard_normal((cases, looks, 16))
    scores = gains.mean(-1) / (gains.std(-1, ddof=1) / 4)

    def crowned(confidences: list[float]) -> float:
        return float((scores > stats.t.ppf(confidences, 15)).any(axis=1).mean())

    assert crowned([rule.confidence] * looks) > 0.33
    assert crowned([confidence_of_look(rule.confidence, look) for look in range(1, looks + 1)]) <= 0.06
    spent = sum(1 - confidence_of_look(0.95, look) for look in range(1, 10_000))
    assert confidence_of_look(0.95, 1) == 0.975 and spent == pytest.approx(0.05, abs=1e-4) and spent < 0.05


def test_a_later_challenger_needs_more(chain: Chain) -> None:
    theirs = torch.tensor([1.0, 1.2, 0.9, 1.1, 1.0, 1.3], dtype=torch.float64)
    ours = theirs - torch.tensor([0.1, 0.02, 0.05, 0.04, 0.03, 0.06], dtype=torch.float64)
    first, later = decide(ours, theirs, Champion()), decide(ours, theirs, Champion(), look=9)
    assert (first.outcome, later.outcome) == ("moved", "kept") and "challenger 9 of this champion" in later.reason


def test_a_child_that_was_rolled_back_is_not_crowned_again() -> None:
    better = Judgement(outcome="moved", reason="kl better")
    found = champion.rolled_back(better)
    assert found.outcome == "kept" and "was rolled back" in found.reason and "kl better" in found.reason
    for outcome in ("kept", "first"):
        same = better.model_copy(update={"outcome": outcome})
        assert champion.rolled_back(same) == same


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        ("unchanged", "Version 3 stays the champion, and no challenger was made."),
        ("kept", "Version 3 stays the champion: why."),
        ("moved", "Version 5 is the champion now, in place of version 3: why."),
        ("first", "The child of this run is the first champion, version 5."),
    ],
)
def test_a_re_optimisation_ends_with_two_sentences(outcome: Any, said: str) -> None:
    assert champion.decided(Judgement(outcome=outcome, reason="why"), 3, 5) == said
    looked = champion.looked_at(("costs", "budget"), first=False)
    assert looked.startswith("Looked at the parent, the corpus, ") and looked.endswith(
        ": the measured costs and the budget changed since the last judgement."
    )
    assert "nothing changed" in champion.looked_at((), first=False)


def test_a_branch_of_the_hub_is_looked_up_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    commits = iter(["a" * 40, "b" * 40])
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(sha=next(commits)))
    source = HubParent(hub_id="a/b")
    first, second = at_its_commit(source), at_its_commit(source)
    assert [one.revision for one in (first, second) if isinstance(one, HubParent)] == ["a" * 40, "b" * 40]
    assert at_its_commit(first) == first, "a commit does not move, so nobody is asked"

    def away(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", away)
    assert at_its_commit(source) == source and at_its_commit(TinyParent()) == TinyParent()


def lineage(chain: Chain, *layers: LayerChoice) -> Lineage:
    child = contender("child", chosen(layers), chain.blocks)
    return Lineage(parent=chain.parent, corpus=chain.corpus, child=child)


def test_a_judgement_on_real_children(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a layer's attention a child is worse than with a narrower FFN, and the figures say so."""
    profile = profile_with("evaluate.sequences=8")
    good = lineage(chain, LayerChoice(), LayerChoice(ffn="ffn32"), LayerChoice())
    bad = lineage(chain, LayerChoice(), LayerChoice(ffn="ffn32"), LayerChoice(attention="no_op", ffn="no_op"))
    monkeypatch.setattr(champion, "broken_budget", lambda *_: "")
    better = champion.judge_against(bad, good, profile, chain.workspace, ("budget",))
    worse = champion.judge_against(good, bad, profile, chain.workspace, ("budget",))
    assert (better.outcome, worse.outcome) == ("moved", "kept") and better.changed == ("budget",)
    assert better.improvement and worse.improvement
    assert better.improvement.value == -worse.improvement.value > 0
    assert champion.judge_against(good, good, profile, chain.workspace, ()).same_child
    parent = lineage(chain, *[LayerChoice()] * 3)
    against_itself = champion.judge_against(good, parent, profile, chain.workspace, ())
    assert against_itself.challenger and against_itself.challenger.value == 0  # KL of the parent to itself
    page = champion.judgement_markdown(better.model_copy(update={"summary": "Two sentences."}), "version 1", "runs/x")
    assert "Two sentences." in page and "version 1" in page and "±" in page
    monkeypatch.setattr(champion, "broken_budget", lambda *_: "speedup 1.5")
    assert champion.judge_against(good, bad, profile, chain.workspace, ()).outcome == "moved"


def test_a_champion_that_is_gone_is_followed_and_said(chain: Chain) -> None:
    good = lineage(chain, LayerChoice(), LayerChoice(ffn="ffn32"), LayerChoice())
    assert champion.judge(None, good, profile_with(), chain.workspace, ()).outcome == "first"
    gone = champion.judge("runs/gone", good, profile_with(), chain.workspace, ())
    assert gone.outcome == "moved" and "cannot be compared" in gone.reason


def test_only_the_champions_own_damage_is_held_against_it(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = profile_with("evaluate.sequences=8")
    whole = lineage(chain, LayerChoice(), LayerChoice(ffn="ffn32"), LayerChoice())
    broken = lineage(chain, LayerChoice(), LayerChoice(ffn="ffn32"), LayerChoice(ffn="no_op"))
    (narrow,) = (block for block in broken.child.blocks if block.weights is not None)
    assert narrow.weights is not None
    changed = narrow.model_copy(update={"weights": narrow.weights.model_copy(update={"sha256": "0" * 64})})
    blocks = tuple(changed if block is narrow else block for block in broken.child.blocks)
    broken = broken.model_copy(update={"child": broken.child.model_copy(update={"blocks": blocks})})
    monkeypatch.setattr(champion, "broken_budget", lambda *_: "")
    reigning = [broken]
    monkeypatch.setattr(champion, "lineage_of", lambda *_: reigning[0])
    followed = champion.judge("runs/0", whole, profile, chain.workspace, ())
    assert followed.outcome == "moved" and "the champion cannot be compared" in followed.reason
    reigning[0] = whole
    with pytest.raises(DamagedBlock, match="differs from its digest"):
        champion.judge("runs/0", broken, profile, chain.workspace, ())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    return open_tracking(tmp_path_factory.mktemp("registry"), "puzzle")


def versions(store: Tracking, name: str, count: int) -> list[registry.Version]:
    """Registered versions without models behind them: the aliases are what is tested."""
    client = client_of(store)
    client.create_registered_model(name)
    made = []
    for number in range(count):
        run = client.create_run(store.experiment_id).info.run_id
        tags = {registry.FOLDER: f"runs/{number}"}
        version = client.create_model_version(name, f"{store.workspace}/none", run, tags=tags)
        made.append(
            registry.Version(name=name, version=int(version.version), run_folder=f"runs/{number}", mlflow_run_id=run)
        )
    return made


def test_a_registry_that_does_not_answer_is_no_empty_one(store: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a challenger would be crowned as the first champion while MLflow is down for a minute."""

    def refused(*_: object) -> None:
        raise MlflowException("connection refused")  # INTERNAL_ERROR, as the REST client raises it

    deaf = SimpleNamespace(get_model_version_by_alias=refused, get_registered_model=refused)
    monkeypatch.setattr(registry, "client_of", lambda _: deaf)
    for ask in (registry.champion_of, registry.judged):
        with pytest.raises(MlflowException, match="connection refused"):
            ask(store, "puzzle-x")


def test_reigns_and_rollbacks(store: Tracking) -> None:
    assert registry.champion_of(store, "puzzle-x") is None and registry.judged(store, "puzzle-x") == {}
    with pytest.raises(registry.NoChampion, match="no champion yet"):
        registry.rollback(store, "puzzle-x")
    first, second, third = versions(store, "puzzle-x", 3)
    for version in (first, second, second, third):
        registry.crown(store, version)
    assert registry.champion_of(store, "puzzle-x") == third
    assert registry.rollback(store, "puzzle-x") == (third, second)
    assert registry.champion_of(store, "puzzle-x") == second
    assert registry.rolled_back(store, "puzzle-x") == {"runs/2"}
    assert [registry.challenges_of(store, version) for version in (first, second, third)] == [2, 1, 0]
    registry.crown(store, third)
    assert registry.rollback(store, "puzzle-x") == (third, second)
    assert registry.rollback(store, "puzzle-x") == (second, first)
    with pytest.raises(registry.NoChampion, match="first champion"):
        registry.rollback(store, "puzzle-x")
    registry.remember_judged(store, "puzzle-x", second.mlflow_run_id, {"parent": "a", "search_space": "b"})
    assert registry.judged(store, "puzzle-x") == {"parent": "a", "search_space": "b"}
    client = client_of(store)
    assert client.get_registered_model("puzzle-x").tags[registry.JUDGED] == second.mlflow_run_id
    client.set_registered_model_tag("puzzle-x", registry.JUDGED, json.dumps({"parent": "0123456789abcdef"}))
    assert registry.judged(store, "puzzle-x") == {"parent": "01234567"}  # as an earlier version wrote it
    said = [client.get_model_version("puzzle-x", str(version)).description for version in (1, 2, 3)]
    assert said[0].splitlines() == [
        "Champion until version 2 replaced it.",
        "",
        "Champion again: version 2 was rolled back.",
    ]
    assert said[2].endswith("Rolled back: version 2 is champion again.")


def test_a_version_says_what_it_is_and_why_it_reigns() -> None:
    limits = [{"name": "memory_gib of chat", "asked": 0.5}, {"name": "max_kl of code", "asked": 0.2}]
    kl = Metric(value=0.2, se=0.0, n=2)
    floor = Floor(capability="code", asked=0.3, limit=0.2, predicted=0.2, measured=kl, at_most=0.2)
    report = report_of().model_copy(update={"request": {"limits": limits}, "floors": (floor,)})
    before = registry.Version(name="puzzle-x", version=1, run_folder="", mlflow_run_id="")
    broken = champion.Judgement(outcome="moved", reason="the champion no longer keeps the budget: speedup 1.5")
    why = registry.standing(broken, before)
    assert why == "Champion: it replaced version 1. Why: version 1 no longer keeps the budget: speedup 1.5."
    kept = champion.Judgement(outcome="kept", reason="kl worse by 0.1 nats")
    assert registry.standing(kept, before) == "Not champion: version 1 stayed. Why: kl worse by 0.1 nats."
    assert registry.standing(kept, None).startswith("Champion: the first")
    what, figures, end = registry.description(report, why).split("\n\n")
    assert "for memory_gib of chat 0.5, max_kl of code 0.3" in what and end == why, "what was asked"
    assert "KL from the parent: 0.4 nats per token." in figures and "80% of its memory" in figures
    busy = report.model_copy(update={"speed": SpeedReport(busy="others took 2.0")})
    assert (
        "not reliable" not in figures
        and registry.description(busy, why).count("the machine was busy: not reliable") == 2
    )


def test_a_registered_child_loads_from_the_registry_alone(
    store: Tracking, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    run_id = client_of(store).create_run(store.experiment_id).info.run_id
    report = ChildReport(
        profile="z",
        parent=chain.parent,
        corpus=chain.corpus,
        architecture=chosen((LayerChoice(),) * 3),
        candidates=(),
        child_folder=chain.parent.folder,  # any folder that transformers loads
        mlflow_run_id=run_id,
    )
    own = Lineage(parent=chain.parent, corpus=chain.corpus, child=contender("child", report.architecture, chain.blocks))
    write_value(chain.workspace / "runs" / "z" / LINEAGE, own)
    made = registry.register(store, report, "runs/z", chain.workspace, "the first champion")
    registry.crown(store, made)
    assert "MLFLOW_TRACKING_URI" not in os.environ
    found = client_of(store).get_model_version_by_alias("puzzle-z", "champion")
    assert (found.run_id, found.tags[registry.FOLDER]) == (run_id, "runs/z")
    assert found.description.endswith("the first champion") and chain.parent.name in found.description
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    folder = Path(mlflow.artifacts.download_artifacts("models:/puzzle-z@champion"))
    assert not list(folder.rglob("*.pkl"))  # code and safetensors, no pickle
    assert read_value(folder / "artifacts" / LINEAGE, Lineage) == own
    (text,) = mlflow.pyfunc.load_model(str(folder)).predict([{"prompt": "import", "max_new_tokens": 3}])
    assert isinstance(text, str)


def test_a_kill_between_reign_and_alias_loses_nothing(store: Tracking) -> None:
    first, second = versions(store, "puzzle-y", 2)
    registry.crown(store, first)
    client_of(store).set_registered_model_tag("puzzle-y", registry.REIGNS, json.dumps([first.version, second.version]))
    with pytest.raises(registry.NoChampion):  # the second never reigned
        registry.rollback(store, "puzzle-y")
    registry.crown(store, second)
    assert registry.rollback(store, "puzzle-y") == (second, first)


def test_a_tighter_budget_or_dearer_costs_break_the_champion(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = (LayerChoice(), LayerChoice(ffn="no_op"), LayerChoice())
    attention = [cost.model_copy(update={"subblock": "attention"}) for cost in table().costs]

    def under(budget: Budget, scale: float = 1.0, layers: tuple[LayerChoice, ...] = layers) -> str:
        measured = table(scale)
        measured = measured.model_copy(update={"costs": (*measured.costs, *attention)})
        scenario = Scenario(name="chat", batch_sizes=(1,), prompt_tokens=4, generated_tokens=2)
        problem = make_problem([], measured, budget, [scenario])
        monkeypatch.setattr(champion, "last_problem", lambda *_: problem)
        return champion.broken_budget(chosen(layers), profile_with(), chain.workspace)

    # layers hold 6 subblocks of 10 parameters; the child 5, no_op costs half a subblock's time
    assert under(Budget(layer_parameters_fraction=1.0)) == ""
    assert under(Budget(layer_parameters_fraction=0.9)) == "layer_parameters_fraction 0.9"
    assert under(Budget(speedup=1.05)) == "" and under(Budget(speedup=1.1)) == "speedup 1.1"
    assert under(Budget(speedup=1.05), scale=1.8) == "speedup 1.05"  # the same child on hardware that changed
    assert under(Budget(speedup=9), layers=(LayerChoice(ffn="ffn7"),) * 3) == ""  # measured no more: nobody can tell


def test_the_served_child_completes_as_its_logits_say(chain: Chain) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tasks.operating.pyfunc_child import Child, Completion

    folder = chain.workspace / chain.parent.folder
    child = Child()
    child.load_context(SimpleNamespace(artifacts={"checkpoint": str(folder)}))
    said = child.predict([Completion(prompt="import", max_new_tokens=5), Completion(prompt="x", max_new_tokens=1)])
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("import", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(5):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert said[0] == tokenizer.decode(ids[0, start:], skip_special_tokens=True) and len(said) == 2
    with pytest.raises(ValidationError):
        Completion(prompt="x", max_new_tokens=0)
