"""Contests and checks in words and tables, and what a workspace keeps of them."""

from collections.abc import Sequence

from blocks.records import Metric, TruthPoint
from tasks.studies.additivity import Check, Difference
from tasks.studies.contest import Contest, Entry

Rows = Sequence[Sequence[str]]


def contest_rows(contest: Contest) -> tuple[list[str], Rows]:
    """Header and rows, the winner first."""
    header = ["search", "summed scores", "true KL", "evaluations", "seconds"]
    return header, [_entry_row(entry) for entry in contest.entries]


def _entry_row(entry: Entry) -> list[str]:
    return [
        entry.name,
        f"{entry.score:.4f}",
        with_error(entry.kl),
        f"{entry.evaluations:,}" if entry.evaluations else "-",
        f"{entry.seconds:.1f}",
    ]


def contest_verdict(contest: Contest) -> list[str]:
    """Who won, and how surely."""
    level = f"; level with it within the noise: {', '.join(contest.level)}" if contest.level else ""
    lines = [f"lowest true KL: {contest.winner}{level}"]
    if not contest.prune:
        untouched = contest.winner == "parent"
        what = "the untouched parent keeps this budget" if untouched else f"{contest.winner} is closer to the parent"
        lines.append(f"do not prune: {what}")
    lines.append(f"searched on {contest.scored}; true KL on {contest.others}")
    lines += [f"{name} left out: {why}" for name, why in contest.left_out.items()]
    return lines


def check_rows(check: Check) -> tuple[list[str], Rows]:
    """Header and rows in the order of measuring."""
    header = ["architecture", "predicted", "true, same sequences", "true, other sequences", "against the MIP's choice"]
    against = {difference.name: _against(difference) for difference in check.differences}
    return header, [
        [
            measured.name,
            *(with_error(measured.figure(field)) for field in ("predicted", "true_scored", "true_others")),
            against.get(measured.name, ""),
        ]
        for measured in check.measured
    ]


def _against(difference: Difference) -> str:
    return f"{difference.value:+.4f} ± {difference.se:.4f}{'' if difference.clear else ' (noise)'}"


def check_verdict(check: Check) -> list[str]:
    """What the sums are worth."""
    forecast = "misleads" if check.forecast_misleads else "holds"
    chosen = "misleads" if check.choice_misleads else "stands"
    lines = [
        f"forecast {forecast}: true / predicted over the top {check.top} is {with_error(check.ratio, 3)}, same "
        "sequences",
        f"ranking: rank correlation {with_error(check.rank, 2)} within the top {check.top}, "
        f"{with_error(check.rank_all, 2)} over all {check.rank_all.n} measured, other sequences",
        f"swaps: {len(check.steps)} kept beyond noise"
        + "".join(f"; true KL {step.true_change:+.4f} ± {step.se:.4f}" for step in check.steps),
    ]
    best = next((difference for difference in check.differences if difference.name == check.final), None)
    by = f" {_against(best)}" if best else ""
    return [*lines, f"choice {chosen}: the best that is known beyond noise is {check.final}{by}"]


def with_error(metric: Metric, digits: int = 4) -> str:
    """Value and standard error."""
    return f"{metric.value:.{digits}f} ± {metric.se:.{digits}f}"


def aligned(header: Sequence[str], rows: Rows) -> str:
    """A table for the console, first column left, figures right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    cells = [zip(line, widths, strict=True) for line in lines]
    sides = [[cell.rjust(w) if n else cell.ljust(w) for n, (cell, w) in enumerate(line)] for line in cells]
    return "\n".join("  ".join(line).rstrip() for line in sides)


def check_figures(check: Check) -> dict[str, float]:
    """A check as metrics."""
    return {
        "check/ratio": check.ratio.value,
        "check/rank": check.rank.value,
        "check/choice_misleads": float(check.choice_misleads),
        "check/forecast_misleads": float(check.forecast_misleads),
        **{f"check/{m.name.replace(' ', '_')}_kl": m.figure("true_others").value for m in check.measured},
    }


def contest_figures(contest: Contest) -> dict[str, float]:
    """A contest as metrics."""
    return {
        f"peers/{entry.name}_{key}": value
        for entry in contest.entries
        for key, value in (("kl", entry.kl.value), ("kl_se", entry.kl.se), ("score", entry.score))
    }


def truth_points(check: Check) -> list[TruthPoint]:
    """Predicted and true on the scored sequences, where they are of the same tokens; for `puzzle report`."""
    return [
        TruthPoint(
            name=one.name,
            predicted=one.figure("predicted").value,
            true=one.figure("true_scored").value,
            true_se=one.figure("true_scored").se,
        )
        for one in check.measured
    ]
