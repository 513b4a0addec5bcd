"""The page of benchmarks/faults.py."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import ROOT, table, write_page


def write(lines: Sequence[dict[str, Any]], missing: Mapping[str, Sequence[str]]) -> None:
    """benchmarks/faults.md from the results of all calls; `missing`: cases by runner that have none."""
    kills, stages, others = [], [], []
    for runner in missing:
        own = [line for line in lines if line["runner"] == runner and line["case"].startswith("kill-")]
        if own:
            what = f"{'flow process' if runner == 'threads' else 'a worker'}, {runner}"
            finished, told = [line["finished"] for line in own], [line["told"] for line in own if line["told"]]
            whole = next(line for line in lines if line["runner"] == runner and line["case"] == "uninterrupted")
            kills.append(
                [
                    *(what, len(own), sum(line["same_child"] for line in own)),
                    *(f"{min(finished)} to {max(finished)}", sum(line["made_again"] for line in own)),
                    *(sum(line["cut"] > 0 for line in own), f"{len(told)}: {told[-1]}" if told else "0"),
                ]
            )
            order = list(dict.fromkeys(["start", *whole["stages"], "report"]))
            counts = Counter(line["stage"] for line in own)
            stages.append(
                [
                    f"{what} ({whole['seconds']:.0f} s)",
                    ", ".join(f"{name} {counts[name]}" for name in order if counts[name]),
                ]
            )
    for line in lines:
        if not line["case"].startswith(("kill-", "uninterrupted")):
            same = "same child" if line["same_child"] else "ANOTHER CHILD"
            made = f"{line['made_again']} of {line['finished']}"
            told = line.get("told", "").replace(f"{ROOT}/", "")  # where it ran means nothing elsewhere
            others.append([f"{line['case'].replace('_', ' ')} ({line['runner']})", same, made, told])
    commits = ", ".join(sorted({line["commit"] for line in lines}))
    write_page(
        "faults",
        "What a run survives",
        [
            "The tiny profile (other steps, see benchmarks/faults_runs.py), killed with `kill -9` at a random moment "
            "between 5 and 95 % of the uninterrupted run's time, and started again; for a worker of a cluster, one "
            "that has a task where any has, nothing is started again. "
            "Children are compared by sha256 of weights, config and tokenizer with the uninterrupted run's, which is "
            "the same on every runner. A variant "
            "was finished when its record lay in the library at the kill; it was made again if its files changed. "
            "*Cut short*: the process was at work on a variant, a layer's recording or scores, GKD or an evaluation; "
            "whoever takes that up says so. "
            f"Cases were run at commits {commits}.",
            table(["killed", "runs", "same child", "finished at the kill", "made again", "cut short", "told"], kills),
            "The stage that the run was in when the kill came (in brackets: the uninterrupted run).",
            table(["killed", "kills in stage"], stages),
            "And the rest, with what the person was told.",
            table(["fault", "child", "finished variants made again", "told"], others),
            _not_run(missing),
        ],
    )


def _not_run(missing: Mapping[str, Sequence[str]]) -> str:
    words = []
    for runner, names in missing.items():
        kills = sum(name.startswith("kill-") for name in names)
        rest = [name.replace("_", " ") for name in names if not name.startswith("kill-")]
        words += [f"{runner}: {', '.join([f'{kills} kills', *rest] if kills else rest)}"] if names else []
    return f"Not run yet: {'; '.join(words)}." if words else "Every case was run."
