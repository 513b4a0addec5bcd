"""Scheduled re-optimisation: what changed since the last judgement, and whether the challenger is better for certain.

A child depends on its parent, corpus, search space, distillation, scores, costs, traffic and budget. Each is a digest
in the basis; when none differs from what was judged last, there is nothing to do. Otherwise a challenger is made, and
both stand the same held-out sequences: the improvement is the mean of paired differences, its lower bound a one-sided
t interval. Where the rule has limits, the challenger must keep them too (champion_limits.py). A schedule makes many
challengers, and one of them would look better by luck. So each further one that is compared with the same champion
needs more confidence. A champion that no longer keeps the budget loses without a comparison. A child that somebody has
rolled back does not become champion again.
"""

# S = test sequences

from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from blocks.errors import DamagedBlock, PuzzleError
from blocks.estimates import confidence_of_look, lower_bound, plain, rounded
from blocks.files import sha256_of
from blocks.library import digest_of, remember
from blocks.records import Architecture, CorpusInfo, CostTable, Metric, ParentInfo, Value
from profiles.schema import GENERAL, Champion, Profile, Section
from tasks.distill import bld, gkd, gkd_settings, record
from tasks.evaluate import floors
from tasks.evaluate.compare import LINEAGE, Lineage
from tasks.evaluate.quality import mean_metric
from tasks.inputs.companions import TOKENIZER_FILES
from tasks.libraries.interchange import read_library
from tasks.measure import costs
from tasks.measure.hardware_description import hardware_description
from tasks.operating.champion_limits import (
    CHAMPION,
    UNITS,
    Limit,
    LostChampion,
    figures_of_both,
    gains,
    has_limits,
    judged_texts,
    limits_of,
    missed,
)
from tasks.score import scoring
from tasks.search.totals import Problem, broken_kl, broken_limits, fitting_batches, problem_of

DIGITS = 8  # of each digest: a person sees them in the registry, and looks for the one that differs
# part of the basis -> what a person calls it
NAMES = {
    "parent": "the parent",
    "corpus": "the corpus",
    "capabilities": "the capabilities",
    "search_space": "the search space",
    "distillation": "how blocks are distilled",
    "scoring": "how blocks are scored",
    "hardware": "the hardware target",
    "costs": "the measured costs",
    "traffic": "the traffic scenarios",
    "budget": "the budget",
    "search": "the solver's limits",
    "gkd": "global distillation",
    "rule": "the champion's rule",
}
# fields that sections got after their first digests: where nobody sets them, digests stay as they were without them
LATER = ("otherwise", "fastest_within_score", "not_worse", "not_worse_probed", "max_more_loops", "floor_rounds")


class Judgement(Value):
    """What a re-optimisation came to. improvement: paired, positive when the challenger is better."""

    outcome: Literal["unchanged", "first", "kept", "moved"]
    reason: str
    summary: str = ""  # two sentences: what was looked at, what was decided
    changed: tuple[str, ...] = ()
    same_child: bool = False
    metric: str = ""
    champion: Metric | None = None
    challenger: Metric | None = None
    improvement: Metric | None = None
    lower_bound: float | None = None
    limits: tuple[Limit, ...] = ()


def basis(
    profile: Profile,
    parent: ParentInfo,
    corpus: CorpusInfo,
    table: CostTable | None,
    capabilities: Sequence[CorpusInfo] = (),
) -> dict[str, str]:
    """Digest of everything the child depends on, by part. `table`: the costs, None before they are measured."""
    modelled = profile.hardware.engine == "roofline"  # the same costs on any machine
    hardware = profile.hardware if modelled else hardware_description(profile.hardware)
    without: dict[str, Any] = {"measured_at": True, "load": True}
    if table and not any(cost.state_bytes for cost in table.costs):  # a later field, see LATER
        without["costs"] = {"__all__": {"state_bytes"}}
    parts = {
        "parent": parent.fingerprint,
        "corpus": corpus.fingerprint,
        "search_space": profile.search_space,
        "distillation": [profile.record, _told(profile.bld), profile.seed, record.VERSION, bld.VERSION],
        "scoring": [profile.scoring, scoring.VERSION],
        "hardware": [hardware, profile.measure, costs.VERSION],
        "costs": table.model_dump(mode="json", exclude=without) if table else "not measured",
        "traffic": profile.scenarios,
        "budget": profile.budget,
        "search": _told(profile.search),
        "gkd": [gkd_settings.asked(profile.gkd), gkd.VERSION],
        "rule": _told(profile.champion),
    }
    if has_limits(profile.champion):  # what they are judged on
        on = profile.evaluate.model_dump(include={"sequences", "loop_prompts", "answer_tokens"})
        parts["rule"] = [parts["rule"], on]
    if floors.times_are_held(profile, table):
        parts["budget"] = [parts["budget"], floors.VERSION]
    if profile.capabilities:  # a later part, see LATER
        texts = {one.capability: one.fingerprint for one in capabilities}
        each = profile.capabilities.items()
        parts["capabilities"] = {name: [one.weight, one.max_kl, texts.get(name)] for name, one in each}
        if profile.capability_limits and profile.search.floor_rounds:
            parts["capabilities"] = [parts["capabilities"], floors.VERSION]
    return {name: digest_of(part=part)[:DIGITS] for name, part in parts.items()}


def _told(section: Section) -> dict[str, Any]:
    return section.keyed(tuple(name for name in type(section).model_fields if name not in LATER))


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, ...]:
    """Parts that differ, in the order of NAMES; a part that was not known before counts as changed."""
    return tuple(name for name in NAMES if before.get(name) != now.get(name))


def told(changed: tuple[str, ...]) -> str:
    """The changed parts of the basis as people call them, in one phrase: "the parent, the corpus and the budget"."""
    *names, last = (NAMES[name] for name in changed)
    return f"{', '.join(names)} and {last}" if names else last


def lineage_of(workspace: Path, run_folder: str) -> Lineage:
    """The lineage of a finished run, from the store where the run was another machine's; DamagedBlock if it is gone."""
    path = workspace / run_folder / LINEAGE
    inside = path.resolve().is_relative_to(workspace.resolve())  # the name comes from a registry that others write to
    found = remember(path, Lineage, lambda _: [], workspace) if inside else None
    if found is None:
        raise DamagedBlock(f"{path} is not there, or damaged: run again, and the child is made anew.")
    return found


def nothing_changed(version: int) -> Judgement:
    """The judgement when there is nothing to do."""
    reason = f"nothing changed since the last judgement; version {version} stays the champion"
    return Judgement(outcome="unchanged", reason=reason)


def rolled_back(found: Judgement) -> Judgement:
    """The judgement on a challenger that was champion until somebody rolled it back, whatever the comparison says."""
    if found.outcome != "moved":
        return found
    reason = f"this very child was champion and was rolled back, so it is not crowned again; else: {found.reason}"
    return found.model_copy(update={"outcome": "kept", "reason": reason})


def looked_at(changed: tuple[str, ...], first: bool) -> str:
    """The first sentence at the end of a re-optimisation: what was compared, and what had changed."""
    if first:
        return "Looked for a champion of this profile: there was none yet."
    what = f"{told(changed)} changed" if changed else "nothing changed"
    return f"Looked at {told(tuple(NAMES))}: {what} since the last judgement."


def decided(found: Judgement, champion: int | None, version: int | None) -> str:
    """The second sentence. champion: the version that reigned until now; version: that of the challenger."""
    if found.outcome == "unchanged":
        return f"Version {champion} stays the champion, and no challenger was made."
    if found.outcome == "kept":
        return f"Version {champion} stays the champion: {found.reason}."
    if found.outcome == "first":
        return f"The child of this run is the first champion, version {version}."
    return f"Version {version} is the champion now, in place of version {champion}: {found.reason}."


def judge(
    run_folder: str | None,
    challenger: Lineage,
    profile: Profile,
    workspace: Path,
    changed: tuple[str, ...],
    look: int = 1,
) -> Judgement:
    """Whether a challenger takes over from the champion whose run lies in `run_folder`; None: there is none.

    look: its number among the challengers of this champion, from 1.
    """
    if run_folder is None:
        return Judgement(outcome="first", reason="the first champion", changed=changed)
    try:
        with missed(CHAMPION):
            reigning = lineage_of(workspace, run_folder)
        found = judge_against(reigning, challenger, profile, workspace, changed, look)
    except LostChampion as error:
        found = Judgement(outcome="moved", reason=f"the champion cannot be compared: {error}", changed=changed)
    if found.outcome == "moved" and not found.improvement and has_limits(profile.champion):
        return found.model_copy(update={"reason": f"{found.reason}; so the rule's limits were not looked at"})
    return found


def judge_against(
    reigning: Lineage,
    challenger: Lineage,
    profile: Profile,
    workspace: Path,
    changed: tuple[str, ...],
    look: int = 1,
) -> Judgement:
    """Whether the challenger takes over: `kept` or `moved`, and why."""
    if reigning.child.key == challenger.child.key:
        reason = "what was made is the champion itself"
        return Judgement(outcome="kept", reason=reason, changed=changed, same_child=True)
    seeing = any(text.first_image for text in (challenger.corpus, *challenger.capabilities))
    if seeing and reigning.parent.fingerprint != challenger.parent.fingerprint:
        reason = "the parent changed, which sees images otherwise: the champion cannot be compared on them"
        return Judgement(outcome="moved", reason=reason, changed=changed)
    if not same_tokenizer(reigning.parent, challenger.parent, workspace):
        reason = "the parent's tokenizer changed: the champion reads other tokens"
        return Judgement(outcome="moved", reason=reason, changed=changed)
    looks: tuple[floors.Look, ...] = (*reigning.held_times, *reigning.floors)
    broken = broken_budget(reigning.child.architecture, profile, workspace, looks)
    if broken:
        return Judgement(outcome="moved", reason=f"the champion no longer keeps the budget: {broken}", changed=changed)
    sides, rule = (challenger, reigning), profile.champion
    texts = judged_texts(profile, challenger.parent, challenger.corpus, challenger.capabilities, workspace)
    figures = figures_of_both(sides, texts, challenger, profile, workspace)
    limits = limits_of(sides, figures, texts, profile, workspace, confidence_of_look(rule.confidence, look))
    ours, theirs = (each[GENERAL] for each in figures)
    return decide(ours, theirs, rule, changed, look, texts[GENERAL].documents, limits)


def same_tokenizer(first: ParentInfo, second: ParentInfo, workspace: Path) -> bool:
    """True when both parents' folders hold the same tokenizer files."""
    folders = [workspace / parent.folder for parent in (first, second)]
    digests = [
        {name: sha256_of(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()} for folder in folders
    ]
    return digests[0] == digests[1]


def broken_budget(choice: Architecture, profile: Profile, workspace: Path, looks: Sequence[floors.Look] = ()) -> str:
    """Which limits a choice breaks under the costs, scores and budget of now; "" when none, or when nobody can tell.

    looks: where it was measured to take less of a limit than its sum, it is allowed as much more in the sum.
    """
    asked, found = last_problem(profile, workspace), list[str]()
    problem = floors.as_measured(asked, looks)
    # a variant that is measured or scored no more, another number of layers
    with suppress(PuzzleError, KeyError):
        if fitting_batches(problem, choice.layers, choice.head) is None:
            batches = tuple(min(scenario.batch_sizes) for scenario in problem.scenarios)
            limits = broken_limits(problem, choice.layers, batches, choice.head)
            found += [_as_asked(asked, limit.field) for limit in limits]
        most = asked.capabilities.most
        found += [f"max_kl of {name} {most[name]:g}" for name in broken_kl(problem, choice.layers, choice.head)]
    return ", ".join(found)


def _as_asked(problem: Problem, field: str) -> str:
    """`speedup 1.5`, or `speedup of chat 1.5` where one scenario has a budget of its own."""
    name, _, own = field.partition(" of ")
    budgets = {scenario.name: scenario.budget for scenario in problem.scenarios}
    return f"{field} {getattr(budgets[own] if own else problem.budget, name):g}"


def last_problem(profile: Profile, workspace: Path) -> Problem:
    """The search as the last run of a profile left it in the workspace's tables."""
    library = read_library(workspace / "tables" / profile.name)
    return problem_of(profile, library.scores, library.costs)


def decide(
    ours: Tensor,
    theirs: Tensor,
    rule: Champion,
    changed: tuple[str, ...] = (),
    look: int = 1,
    documents: Sequence[Hashable] = (),
    limits: tuple[Limit, ...] = (),
) -> Judgement:
    """The rule on paired figures, (S,) each: moved when the improvement's lower bound passes `min_improvement` and all
    limits are kept.

    The rule's confidence is that of all challengers of a champion together; look: the number of this one, from 1.
    documents: that of each sequence; sequences of one document are not independent of each other.
    """
    gain = mean_metric(gains(ours, theirs, rule.metric), documents)
    confidence = confidence_of_look(rule.confidence, look)
    lower = lower_bound(gain, confidence)
    moved = lower > rule.min_improvement and all(limit.kept for limit in limits)
    sample = f"{len(ours)} paired sequences{f' of {gain.n} documents' if documents else ''}"
    size = rounded(gain.model_copy(update={"value": abs(gain.value)}))
    reason = (
        f"{rule.metric} {'better' if gain.value >= 0 else 'worse'} by {size} {UNITS[rule.metric]} over {sample}, "
        f"lower bound of the gain {lower:.3g} at {confidence:.4g} (challenger {look} of this champion; "
        f"{rule.confidence:.0%} for all of them together); the rule asks for more than {rule.min_improvement:g}"
        + "".join(f"; {limit}" for limit in limits)
    )
    return Judgement(
        outcome="moved" if moved else "kept",
        reason=reason,
        changed=changed,
        metric=rule.metric,
        champion=mean_metric(theirs, documents),
        challenger=mean_metric(ours, documents),
        improvement=gain,
        lower_bound=lower if gain.n > 1 else None,
        limits=limits,
    )


def figures(found: Judgement) -> dict[str, float]:
    """A judgement as metrics, where there was a comparison."""
    if found.improvement is None or found.lower_bound is None:
        return {}
    return {
        "champion/improvement": found.improvement.value,
        "champion/improvement_se": found.improvement.se,
        "champion/lower_bound": found.lower_bound,
        **{name: value for limit in found.limits for name, value in limit.figures.items()},
    }


def judgement_markdown(found: Judgement, champion: str, challenger: str) -> str:
    """A page on one judgement."""
    lines = [f"# {found.outcome}", "", found.summary, ""]
    if found.champion and found.challenger and found.improvement:
        lines += [
            f"| {found.metric} | mean ± standard error | independent parts |",
            "| --- | ---: | ---: |",
            f"| champion ({champion}) | {rounded(found.champion)} | {found.champion.n} |",
            f"| challenger ({challenger}) | {rounded(found.challenger)} | {found.challenger.n} |",
            f"| better by, paired | {rounded(found.improvement)} | {found.improvement.n} |",
        ]
    if found.limits:
        lines += [
            "",
            "| limit | worse by, paired | at most, for certain | allowed | |",
            "| --- | ---: | ---: | ---: | --- |",
            *(
                f"| {one.name} | {rounded(one.worse)} | {'–' if one.bound is None else plain(one.bound)} | "
                f"{one.most:g} | {one.state} |"
                for one in found.limits
            ),
        ]
    return "\n".join(lines)
