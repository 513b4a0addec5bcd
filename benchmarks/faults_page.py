"""The page of benchmarks/faults.py."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import table, write_page


def write(lines: Sequence[dict[str, Any]], missing: Mapping[str, Sequence[str]]) -> None:
    """benchmarks/faults.md from the results of all calls; `missing`: cases by runner that have none."""
    kills, others = [], []
    for runner in missing:
        own = [line for line in lines if line["runner"] == runner and line["case"].startswith("kill-")]
        if own:
            what = "flow process" if runner == "threads" else "a worker"
            finished = [line["finished"] for line in own]
            kills.append(
                [
                    *(f"{what}, {runner}", len(own), sum(line["same_child"] for line in own)),
                    *(f"{min(finished)} to {max(finished)}", sum(line["made_again"] for line in own)),
                ]
            )
    for line in lines:
        if not line["case"].startswith(("kill-", "uninterrupted")):
            same = "same child" if line["same_child"] else "ANOTHER CHILD"
            made = f"{line['made_again']} of {line['finished']}"
            others.append([f"{line['case'].replace('_', ' ')} ({line['runner']})", same, made, line.get("told", "")])
    commits = ", ".join(sorted({line["commit"] for line in lines}))
    write_page(
        "faults",
        "What a run survives",
        [
            "The tiny profile (search space without two FFN widths), killed at a random moment between 5 and 95 % of "
            "the uninterrupted run's time, and started again; for a worker of a cluster nothing is started again. "
            "Children are compared by sha256 of weights, config and tokenizer with the uninterrupted run's. A variant "
            "was finished when its record lay in the library at the kill; it was made again if its files changed. "
            f"Cases were run at commits {commits}.",
            table(["killed", "runs", "same child", "finished at the kill", "made again"], kills),
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
