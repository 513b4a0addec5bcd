"""`puzzle plan` against what a run took, stage by stage, from a finished workspace.

    .venv/bin/python -m benchmarks.plan [--workspace DIR]

The plan is made now, on this machine; the run's times are those of its report. Both should have had the machine alone.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import ROOT, arguments, table, write_page
from blocks.errors import PuzzleError
from blocks.library import read_value
from blocks.records import ChildReport, StageTime
from blocks.runtime import default_threads
from profiles.load import load_profile
from profiles.schema import Profile
from tasks.planning.machine import Rates, calibrate
from tasks.planning.plan import Plan, StagePlan, config_parent, plan_of

ASKED = 0.30  # error per stage that the plan is held to
SHORT = 10.0  # seconds; a shorter stage is start-up more than work, and is not judged


def main() -> None:
    """Write benchmarks/plan.md."""
    options = arguments(__doc__ or "").parse_args()
    profile = load_profile(options.profile, options.set)
    workspace = (options.workspace or ROOT / "workspace" / profile.name).resolve()
    report = whole_report(workspace)
    plan, rates = plan_here(profile)
    write_page("plan", "What was planned and what it took", page(plan, rates, report, disk_of(workspace)))


def whole_report(workspace: Path) -> ChildReport:
    """The report whose stages took longest: later runs find most of theirs finished. Raises PuzzleError when there is
    none with times per stage.
    """
    reports = [read_value(path, ChildReport) for path in workspace.glob("runs/*/report.json")]
    reports = [report for report in reports if report.stages]
    if not reports:
        raise PuzzleError(f"{workspace} holds no finished run that noted its stages: run `puzzle optimize` there first")
    return max(reports, key=lambda report: sum(stage.seconds for stage in report.stages))


def plan_here(profile: Profile) -> tuple[Plan, Rates]:
    """The profile's plan on this machine, measured now."""
    parent = config_parent(profile.parent)
    threads = profile.hardware.threads or default_threads()
    config = parent.config
    rates = calibrate(config.hidden_size, config.intermediate_size, profile.hardware.precision, threads)
    return plan_of(profile, parent, rates), rates


def disk_of(workspace: Path) -> int:
    """Bytes of all files below a workspace."""
    return sum(path.stat().st_size for path in workspace.rglob("*") if path.is_file())


def pairs(planned: Sequence[StagePlan], took: Sequence[StageTime]) -> list[tuple[str, StagePlan | None, StageTime]]:
    """Each stage that ran beside its plan; the second of a name belongs to the second of that name."""
    by_name = {place: stage for place, stage in zip(_places([s.name for s in planned]), planned, strict=True)}
    names = [
        "GKD best baseline" if n.startswith("GKD ") and n[4:] not in ("parent", "child") else n for n in _names(took)
    ]
    return [(place[0], by_name.get(place), stage) for place, stage in zip(_places(names), took, strict=True)]


def _names(took: Sequence[StageTime]) -> list[str]:
    return [stage.name for stage in took]


def _places(names: Sequence[str]) -> list[tuple[str, int]]:
    seen: Counter[str] = Counter()
    places = []
    for name in names:
        places.append((name, seen[name]))
        seen[name] += 1
    return places


def page(plan: Plan, rates: Rates, report: ChildReport, disk: int) -> list[str]:
    """The parts of the page."""
    rows, outside = [], []
    for name, planned, took in pairs(plan.stages, report.stages):
        if planned is None or planned.seconds is None:  # an engine whose time is not known
            rows.append([name, "?", f"{took.seconds:.0f}", f"{took.cpu_seconds:.0f}", "not planned"])
            continue
        seconds = planned.seconds
        error = seconds / took.seconds - 1 if took.seconds else 0.0
        judged = took.seconds >= SHORT
        if judged and abs(error) > ASKED:
            outside.append(f"{name} {error:+.0%}")
        rows.append([name, f"{seconds:.0f}", f"{took.seconds:.0f}", f"{took.cpu_seconds:.0f}"])
        rows[-1] += [f"{error:+.0%}" if judged else "short"]
    total = f"{plan.seconds / report.seconds - 1:+.0%}"
    rows.append(["all", f"{plan.seconds:.0f}", f"{report.seconds:.0f}", f"{report.cpu_seconds:.0f}", total])
    gib = 2**30
    sizes = [
        ["disk, GiB", f"{plan.disk_bytes / gib:.2f}", f"{disk / gib:.2f}", f"{plan.disk_bytes / disk - 1:+.0%}"],
        ["peak memory, GiB", f"{plan.memory_bytes / gib:.2f}", f"{report.peak_memory_bytes / gib:.2f}"]
        + [f"{plan.memory_bytes / report.peak_memory_bytes - 1:+.0%}"],
    ]
    judged_words = f"outside of it: {', '.join(outside)}" if outside else "all are within"
    return [
        f"Profile {plan.profile}. Rates measured for the plan: {described(rates)}.",
        table(["stage", "planned, s", "took, s", "CPU s", "error"], rows),
        f"Asked: {ASKED:.0%} per stage, those under {SHORT:.0f} s apart; {judged_words}. `took` of all is the whole "
        "run, with what lies between stages.",
        table(["size", "planned", "took", "error"], sizes),
    ]


def described(rates: Rates) -> str:
    """The rates in a sentence."""
    return (
        f"products {rates.product / 1e9:.0f} GFLOP/s, float64 solves "
        f"{rates.solve / 1e9:.0f}, element-wise {rates.stream / 1e9:.0f} GB/s, weights {rates.weights / 1e9:.0f}, disk "
        f"{rates.disk / 1e9:.1f}, {rates.threads} threads"
        + ("; the machine was loaded meanwhile, rates are from CPU time" if rates.loaded else "")
    )


if __name__ == "__main__":
    main()
