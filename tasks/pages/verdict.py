"""What a run came to, in sentences: warnings first, then the budget, then what is better, what is not, what is open.

The verdict weighs whether the budget is kept, how near the child is to its parent beside every baseline, how fast it is
beside its parent, how many benchmark items it gets right, and whether its answers loop. What counts as nearer is the
profile's rule (`champion`). A difference within its error decides nothing, and neither does a disturbed measurement.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blocks.estimates import interval, is_clear, lower_bound, plain, rounded
from blocks.records import Answer, Candidate, ChildReport, Gains, Metric, Totals
from profiles.schema import Champion
from tasks.evaluate.budget import asked_words, budget_state, figure_words, state_of
from tasks.evaluate.standing import (
    Reading,
    difference,
    distances,
    final_of,
    gain_of,
    is_typed_parent,
    of_all_items,
    of_loops,
    of_right,
    of_sequences,
    over_parent,
    parent_of,
    retained,
    right_beside,
    same_architecture,
)
from tasks.measure.cost_sums import TOLERANCE, warnings_of

MORE_LOOPS = 0.1  # of the prompts: so much more than the parent loops on heads the report
ABSURD_KL = 2.0  # nats per token: the parent's next tokens get a seventh of their probability on average
BUDGET_HEADER = ("budget", "asked", "got", "measured", "kept")
GIB = 2**30
NAMES = {"kl": ("KL", 1), "loss": ("loss", 1), "top1_agreement": ("top-1 agreement", 100)}  # and the table's scale


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is known of one aspect. line: the figures. better, worse, unclear: clauses of the verdict, "" where there is
    none. unusable: nothing else counts.
    """

    line: str = ""
    better: str = ""
    worse: str = ""
    unclear: str = ""
    unusable: bool = False


def warnings(report: ChildReport) -> list[str]:
    """A child that nobody should use without looking, and speeds that nobody should believe."""
    child, parent = final_of(report.candidates, "child"), parent_of(report)
    if child is None or parent is None:
        return []
    lines = _more_loops(child, parent)
    absurd = _absurd(child)
    if absurd is not None:
        lines.append(
            f"Warning: this child is no usable model, KL {rounded(absurd)} nats per token. Give it a larger budget "
            "or more training."
        )
    lines += [f"Warning: {line}" for line in _broken_answers(child, parent)]
    if child.gkd_kept_start is not None:
        lines.append(
            "Warning: GKD kept its start: no step lowered the KL on the validation text, "
            f"{plain(child.gkd_kept_start)} before it."
            + (" This child is as it was assembled." if child.rounded_kl is None else "")
        )
    if report.speed.disturbed:
        lines.append(f"Warning: {warnings_of(report.speed)[0]}.")
        return lines
    return lines + _another_sitting(report)


def _another_sitting(report: ChildReport) -> list[str]:
    """A line where whole parents in one type are not as fast as their costs said. Nothing was searched or trained in
    them, so the machine has changed since the costs were measured, or a cost is wrong.
    """
    off = [
        (abs(limit.measured.value / limit.got - 1), model.name, limit, limit.measured)
        for model in report.candidates
        if is_typed_parent(model.name)
        for limit in model.limits
        if limit.timed and limit.measured is not None
        if is_clear(limit.measured.model_copy(update={"value": limit.measured.value - limit.got}))
    ]
    worst = max(off, key=lambda one: one[0], default=None)
    if worst is None or worst[0] <= TOLERANCE:
        return []
    _, name, limit, measured = worst
    return [
        f"Warning: costs and whole models were not measured on an equally fast machine. The {name} was to be "
        f"{figure_words(limit, limit.got)} by its costs and was {figure_words(limit, measured)}; what is predicted "
        "for the child is as unsure. Measure the costs again: `puzzle reoptimize PROFILE --remeasure`."
    ]


def _more_loops(child: Candidate, parent: Candidate) -> list[str]:
    """A line where the child loops on clearly more beginnings of test text than is forgiven."""
    ours, theirs = of_loops(child), of_loops(parent)
    if ours is None or theirs is None or ours.metric.value - theirs.metric.value <= MORE_LOOPS:
        return []
    total = len(child.looping.loops) if child.looping else 0
    return [
        f"Warning: the child loops when it goes on from {_percent(ours)} of {total} beginnings of test text, its "
        f"parent from {_percent(theirs)}: {_signed(difference(ours, theirs))} points. Do not let it write freely."
    ]


def _absurd(child: Candidate) -> Metric | None:
    """The child's KL where it is that of no usable model."""
    return child.kl if child.kl is not None and child.kl.value > ABSURD_KL else None


def _broken_answers(child: Candidate, parent: Candidate) -> list[str]:
    """A line for each fault that more of the child's answers have than of the parent's."""
    total = len(child.answers)
    return [
        f"{ours} of {total} answers {fault}; the parent's {theirs}. Read them before anything else."
        for fault, ours, theirs in _faults(child, parent)
        if ours > theirs
    ]


def _faults(child: Candidate, parent: Candidate) -> list[tuple[str, int, int]]:
    kinds: dict[str, Callable[[Answer], bool]] = {
        "loop": lambda answer: answer.loops,
        "are empty": lambda answer: not answer.text.strip(),
    }
    return [(fault, count(child, which), count(parent, which)) for fault, which in kinds.items()]


def count(model: Candidate, which: Callable[[Answer], bool]) -> int:
    """How many of a model's answers are such."""
    return sum(which(answer) for answer in model.answers)


def budget_rows(report: ChildReport) -> list[tuple[str, ...]]:
    """The budget of the finished child, in the order of BUDGET_HEADER."""
    child = final_of(report.candidates, "child")
    if child is None:
        return []
    return [
        (
            limit.name,
            asked_words(limit),
            figure_words(limit, limit.got) + (", predicted" if limit.timed or limit.measured else ""),
            "–" if limit.measured is None else figure_words(limit, limit.measured),
            state_of(limit, report.speed.disturbed),
        )
        for limit in child.limits
    ]


def verdict(report: ChildReport) -> str:
    """Better, mixed, worse, not decided or not usable, and in what."""
    found = findings(report)
    better, worse, unclear = (
        [clause for one in found if (clause := getattr(one, kind))] for kind in ("better", "worse", "unclear")
    )
    if any(one.unusable for one in found):
        word = "not usable"
    else:
        word = (
            "mixed" if better and worse else "worse" if worse else "better" if better and not unclear else "not decided"
        )
    said = [f"The child {_listed(better)}."] if better else []
    said += [f"{'But it' if better else 'The child'} {_listed(worse)}."] if worse else []
    said += [f"Not clear: {'; '.join(unclear)}."] if unclear else []
    return " ".join([f"Verdict: {word}.", *said])


def evidence(report: ChildReport) -> list[str]:
    """The figures behind the verdict, a line for each aspect."""
    return [found.line for found in findings(report) if found.line]


def _listed(clauses: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(clauses[:-1]), clauses[-1]]))


def findings(report: ChildReport) -> list[Finding]:
    """Every aspect, in the order of the report: budget, quality, benchmarks, speed, size, answers."""
    child, parent = final_of(report.candidates, "child"), parent_of(report)
    if child is None:
        return []
    found = [_budget(report, child), _quality(report, child), _capabilities(child)]
    if _absurd(child) is not None:
        found.append(Finding(worse="is no usable model", unusable=True))
    if parent is None:
        return found
    found += [*_right(report, child, parent), _benchmarks(report, child, parent), _seen(report, child)]
    found += [_speed(report, child, parent), *_served(report), _size(child, parent)]
    return found + [
        Finding(worse="gives answers that " + " or ".join(fault for fault, a, b in faults if a > b))
        for faults in [_faults(child, parent)]
        if any(a > b for _, a, b in faults)
    ]


def _budget(report: ChildReport, child: Candidate) -> Finding:
    state = budget_state(child, report.speed.disturbed)
    if state is None:
        return Finding()
    if state == "kept":
        return Finding(better="keeps its budget")
    if state == "not kept":
        broken = [limit.name for limit in child.limits if state_of(limit, report.speed.disturbed) == "not kept"]
        return Finding(worse=f"does not keep its budget ({', '.join(broken)})")
    return Finding(unclear=f"whether it keeps its budget ({state})")


def rule_of(report: ChildReport) -> Champion:
    """When one child counts as better than another."""
    return Champion.model_validate(report.rule)


def _wins(lead: Metric, rule: Champion) -> bool:
    """Whether a lead is clear, and large enough for the profile's rule."""
    return is_clear(lead) and lower_bound(lead, rule.confidence) > rule.min_improvement


def _quality(report: ChildReport, child: Candidate) -> Finding:
    """The child beside every baseline of another architecture, by the rule's metric, sequence by sequence."""
    rule = rule_of(report)
    name, scale = NAMES[rule.metric]
    ours = of_sequences(child, rule.metric)
    if ours is None:
        return Finding(line=f"Quality: the child's {name} was not measured.")
    names = dict.fromkeys(model.name for model in report.candidates if _is_rival(model, report.speed.disturbed))
    others = [model for other in names if (model := final_of(report.candidates, other)) is not None]
    twins = [model.name for model in others if same_architecture(child, model)]
    chose = f" {_listed(twins)} chose the same child." if twins else ""
    where = f" in llama.cpp with a KV cache in {child.cache}" if child.cache else ""
    figure = f"Quality: {name} {rounded(ours.metric, scale)}{where}"
    leads = [
        (_lead(ours, theirs, rule.metric), theirs, model)
        for model in others
        if model.name not in twins and (theirs := of_sequences(model, rule.metric)) is not None
    ]
    if not leads:
        return Finding(line=f"{figure}; no {'other ' if twins else ''}baseline was measured beside it.{chose}")
    lead, theirs, rival = min(leads, key=lambda one: one[0].value)
    best = f"the best baseline, {title(rival)}, {rounded(theirs.metric, scale)}"
    line = f"{figure}; {best}. {_apart(lead, rule, scale)}{chose}"
    lost = [model for lead, _, model in leads if _wins(lead.model_copy(update={"value": -lead.value}), rule)]
    open_ = [model for lead, _, model in leads if not _wins(lead, rule) and model not in lost]
    if lost:
        return Finding(line=line, worse=f"is farther from its parent than {_named(lost)}")
    if open_:
        return Finding(line=line, unclear=f"whether it is nearer to its parent than {_named(open_)}")
    return Finding(line=line, better="is nearer to its parent than every baseline")


def _capabilities(child: Candidate) -> Finding:
    """The child on every capability; whether it keeps a limit there is said with the budget."""
    each = [
        f"{name} {rounded(one.kl)} (top-1 agreement {rounded(one.top1_agreement, 100)} %)"
        for name, one in child.capabilities.items()
    ]
    return Finding(line=f"Capabilities, KL on text that no stage saw: {'; '.join(each)}." if each else "")


def _right(report: ChildReport, child: Candidate, parent: Candidate) -> list[Finding]:
    """Whether the child answers the questions of a capability as well as its parent and the best baseline, each by
    itself.
    """
    found = []
    for name, asked in child.right_answers.items():
        ours, theirs = of_right(child, name), of_right(parent, name)
        if ours is None or theirs is None:
            found.append(Finding(line=f"Answers on {name}: its test text marks no short answer, so nobody was asked."))
            continue
        others = [one for one in report.candidates if one is not child and one is not parent]
        rivals = [(one, right) for one in others if (right := of_right(one, name)) is not None]
        if not any(one.metric.value for one in (ours, theirs, *(right for _, right in rivals))):
            nobody = f"nobody answers any of {len(asked.right)} questions right"
            found.append(Finding(line=f"Answers on {name}: {nobody}, so they show nothing."))
            continue
        lead, kept = difference(ours, theirs), right_beside(child, parent, name)
        line = (
            f"Answers on {name}: {_percent(ours, 1)} of {len(asked.right)} questions right, the parent "
            f"{_percent(theirs, 1)}: {_signed(lead)} points, question by question"
            + ("." if is_clear(lead) else "; this is within the error.")
            + (f" That is {rounded(kept.metric, 100)} % of the parent's." if kept else "")
            + (" `Back`: how many tokens back an answer stands." if distances(child, name) else "")
        )
        above = ["its parent"] if lead.value < 0 and is_clear(lead) else []
        for rival, right in rivals:
            lead = difference(ours, right)
            line += f" {title(rival)}: {_percent(right, 1)}, the child {_signed(lead)} points beside it"
            line += "." if is_clear(lead) else ", within the error."
            above += [title(rival)] if lead.value < 0 and is_clear(lead) else []
        worse = f"answers fewer questions on {name} right than {' and '.join(above)}" if above else ""
        found.append(Finding(line=line, worse=worse))
    return found


def _is_rival(model: Candidate, disturbed: str) -> bool:
    """False for the child, the parent, and the parent in a type of number that does not keep the child's budget.

    Where times are not reliable, the sums of the costs decide for such a parent.
    """
    if model.stage == "parent" or model.name == "child":
        return False
    limits = [limit.model_copy(update={"measured": None}) if disturbed else limit for limit in model.limits]
    return not is_typed_parent(model.name) or "not kept" not in {state_of(limit, "") for limit in limits}


def _named(models: Sequence[Candidate]) -> str:
    return f"the baseline{'s' * (len(models) > 1)} {_listed([title(model) for model in models])}"


def _lead(ours: Reading, theirs: Reading, metric: str) -> Metric:
    """By how much the child is better."""
    return difference(ours, theirs) if metric == "top1_agreement" else difference(theirs, ours)


def _apart(lead: Metric, rule: Champion, scale: int) -> str:
    if lead.n < 2:
        return "A single document of text shows no error."
    size = rounded(lead.model_copy(update={"value": abs(lead.value)}), scale)
    who = "the child leads" if lead.value >= 0 else "the baseline leads"
    if not is_clear(lead):
        return f"They are {size} apart, which is within the error."
    least = f", and the profile asks for more than {rule.min_improvement:g}" if rule.min_improvement else ""
    return f"Sequence by sequence {who} by {size}{least}."


def title(candidate: Candidate) -> str:
    """A model by its name and stage."""
    return candidate.name if candidate.stage == "parent" else f"{candidate.name} ({candidate.stage})"


def _benchmarks(report: ChildReport, child: Candidate, parent: Candidate) -> Finding:
    """Whether the benchmarks show a difference between the child and its parent, or a baseline above it."""
    lead, ours, theirs = over_parent(child, parent), of_all_items(child), of_all_items(parent)
    if lead is None or ours is None or theirs is None:
        return Finding()
    items = sum(len(answers) for answers in child.correct.values())
    error = "" if is_clear(lead.metric) else "; this is within the error"
    line = (
        f"Benchmarks: {_percent(ours, 1)} of {items} items right, the parent {_percent(theirs, 1)}: "
        f"{_signed(lead.metric)} points, item by item{error}."
    )
    kept = retained(child, parent)
    if kept is not None and kept.estimate is not None and len(kept.estimate.moves) > 1:
        low, high = interval(kept.estimate)
        line += f" Retention {_percent(kept)}, 95 % interval {100 * low:.0f} to {100 * high:.0f} %."
    lost = " and ".join(
        [
            *(["its parent"] if is_clear(lead.metric) and lead.metric.value < 0 else []),
            *(
                title(model)
                for model in report.candidates
                if _is_rival(model, report.speed.disturbed) and _above(model, child)
            ),
        ]
    )
    return Finding(line=line, worse=f"gets fewer benchmark items right than {lost}" if lost else "")


def _seen(report: ChildReport, child: Candidate) -> Finding:
    """How many benchmark items stand in text that the child was made with, and the retention without them."""
    if report.seen_items is None:
        return Finding()
    there = [f"{sum(seen)} of {len(seen)} of {name}" for name, seen in report.seen_items.seen.items() if any(seen)]
    short = [f"{count} of {name}" for name, count in report.seen_items.short.items() if count]
    what = "a run of 13 words with text that the child was made with"
    line = f"Seen: no item of the benchmarks shares {what}."
    if there:
        line = f"Seen: of the benchmarks' items, {_listed(there)} share {what}."
    if child.unseen_retention is not None:
        line += f" Without them (rows with `unseen`) the retention is {rounded(child.unseen_retention, 100)} %."
    return Finding(line=line + (f" Too short to be looked for: {_listed(short)}." if short else ""))


def _above(model: Candidate, child: Candidate) -> bool:
    """Whether a baseline clearly gets more items right."""
    theirs, ours = of_all_items(model), of_all_items(child)
    if theirs is None or ours is None:
        return False
    lead = difference(theirs, ours)
    return lead.value > 0 and is_clear(lead)


def _percent(share: Reading, digits: int = 0) -> str:
    return f"{100 * share.metric.value:.{digits}f} %"


def _signed(points: Metric) -> str:
    return f"{'+' if points.value >= 0 else ''}{rounded(points, 100)}"


def _speed(report: ChildReport, child: Candidate, parent: Candidate) -> Finding:
    """The child's speed over its parent's at every scenario, in pairs of rounds."""
    measured = [
        (f"{speed.scenario}, batch {speed.batch_size}", speed.gains)
        for speed in report.speed.models.get("child", ())
        if speed.gains is not None
    ]
    lines = [f"{where}: {_gains(gains)}" for where, gains in measured]
    requests = [gains.request for _, gains in measured]
    if not measured:
        known = {kind: gain_of(child, parent, kind) for kind in ("request", "prefill", "decode")}
        requests = [gain for gain in known.values() if gain is not None]
        lines = [", ".join(f"{kind} {rounded(gain)}" for kind, gain in known.items() if gain is not None)]
    if not requests:
        return Finding(
            line="Speed: nothing was timed, the costs are modelled.", unclear="how fast it is (nothing was timed)"
        )
    doubt = " (not reliable)" if report.speed.disturbed else ""
    line = f"Speed over the parent's{doubt}: {'; '.join(lines)}."
    if doubt:
        return Finding(line=line, unclear="how fast it is (the measurement was disturbed)")
    moves = [gain.model_copy(update={"value": gain.value - 1}) for gain in requests]
    if any(is_clear(move) and move.value < 0 for move in moves):
        return Finding(line=line, worse="is slower than its parent")
    if all(is_clear(move) for move in moves):
        return Finding(line=line, better="is faster than its parent")
    return Finding(line=line, unclear="whether it is faster than its parent")


def _served(report: ChildReport) -> list[Finding]:
    """How many requests at a time each scenario's batch size lets in, beside the most that the parent may take."""
    found = []
    for scenario in dict.fromkeys(row.child.scenario for row in report.batch_sizes):
        rows = [row for row in report.batch_sizes if row.child.scenario == scenario]
        child = next(row.child for row in rows if row.chosen)
        parents = [row.parent for row in rows if not row.parent_broken]
        doubt = "" if rows[0].reliable else " (not reliable, costs were measured on a busy machine)"
        line = f"Served to many, predicted{doubt}: {scenario}, {_at_a_time(child)}"
        if parents:
            best = max(parents, key=lambda one: one.tokens_per_second)
            gain = child.tokens_per_second / best.tokens_per_second
            line += f"; the parent at its best within the same limits {_at_a_time(best)}: {plain(gain)} times as many"
        else:
            line += "; the parent keeps the limits at none of these batch sizes"
        found.append(Finding(line=f"{line}."))
    return found


def _at_a_time(totals: Totals) -> str:
    return (
        f"{totals.batch_size} requests at a time, {plain(totals.tokens_per_second)} tokens/s, each answered in "
        f"{plain(totals.runtime_seconds)} s, {plain(totals.memory_bytes / GIB)} GiB"
    )


def _gains(gains: Gains) -> str:
    return f"request {rounded(gains.request)}, prefill {rounded(gains.prefill)}, decode {rounded(gains.decode)}"


def _size(child: Candidate, parent: Candidate) -> Finding:
    shares = (child.parameters / parent.parameters, child.memory_bytes / parent.memory_bytes)
    return Finding(
        line=f"Size: {plain(child.parameters / 1e6)} M parameters, {100 * shares[0]:.1f} % of the parent's; memory "
        f"{plain(child.memory_bytes / GIB)} GiB, {100 * shares[1]:.1f} %."
    )
