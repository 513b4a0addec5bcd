"""Where the child of a finished run breaks, beside its parent and its best baseline: what `puzzle probe` finds.

    .venv/bin/python -m benchmarks.robustness --workspace workspace/smollm2-llama-cpp

Options behind these are those of `puzzle probe`, such as `--text news=news.jsonl` or `--finetune-steps 64`.
"""

import argparse
import subprocess
from pathlib import Path

from benchmarks.common import PUZZLE, ROOT, last_report, table, write_page
from tasks.probe.records import ProbeReport
from tasks.probe.words import MEANS, sentences, tables


def main() -> None:
    """Probe the last run of a workspace, then write benchmarks/robustness.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", type=Path, default=Path("workspace/smollm2-llama-cpp"))
    options, more = parser.parse_known_args()
    last_report(options.workspace)
    words = [*PUZZLE, "probe", str(options.workspace), "--json", *more]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    report = ProbeReport.model_validate_json(done.stdout)
    parts = [f"## {title}\n\n" + table(header, rows) for title, header, rows in tables(report)]
    found = "\n".join(f"* {line}" for line in sentences(report))
    write_page("robustness", "Where a child breaks", [_intro(report), found, *parts, MEANS])


def _intro(report: ProbeReport) -> str:
    texts = ", ".join(f"{domain.name} is {domain.about}" for domain in report.domains)
    return (
        f"Parent: {report.parent.name}; its child is {Path(report.child_folder).parent.name}. The models are "
        f"{', '.join(report.models)}: the last is the best baseline where there are three. All have the weights that "
        f"they are served with, and compute in float32. Texts: {texts}. No stage saw any of them."
    )


if __name__ == "__main__":
    main()
