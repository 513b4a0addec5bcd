"""Every search side by side at two budgets, with true KL; predicted against true; what swaps bring.

    .venv/bin/python -m benchmarks.peers

Works on a workspace whose run is finished (`puzzle optimize` with the same profile). What was measured once is stored.
"""

import argparse
import math
import time
from pathlib import Path

import torch

from benchmarks.common import ROOT, arguments, table, write_page
from blocks.files import atomic_path
from blocks.runtime import configure_torch
from profiles.load import load_profile
from tasks.pages.library_pictures import draw_truth
from tasks.search.choose import choose
from tasks.search.confidence import Draws, bootstrap
from tasks.search.totals import Problem
from tasks.search.view import library_of, request_of
from tasks.studies.additivity import Check, CheckSize, check_additivity
from tasks.studies.contest import ContestSize, contest
from tasks.studies.finished import Finished, open_finished
from tasks.studies.truth import measured_truth
from tasks.studies.verdicts import check_rows, check_verdict, contest_rows, contest_verdict, truth_points

DRAWS = 200  # of the bootstrap


def main() -> None:
    """Both studies at every budget."""
    parser = arguments(__doc__)
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.7, 0.5])
    parser.add_argument("--top", type=int, default=8)
    parser.add_argument("--swaps", type=int, nargs="*", default=[24, 16], help="per budget")
    parser.add_argument("--min-different", type=int, default=6)
    parser.add_argument("--threads", type=int, help="of the measuring; the costs' own when absent")
    options = parser.parse_args()
    parts: list[str] = []
    started = time.perf_counter(), time.process_time()
    for fraction, swaps in zip(options.budgets, options.swaps, strict=True):
        budget = f"budget={{layer_parameters_fraction: {fraction}}}"
        profile = load_profile(options.profile, [*options.set, budget])
        configure_torch(profile.hardware.threads)  # the costs are found by it
        finished = open_finished(profile, (options.workspace or ROOT / "workspace" / profile.name).resolve())
        if options.threads:
            torch.set_num_threads(options.threads)
        parts += [f"## {fraction:.0%} of the layers' parameters", *section(finished, fraction, options, swaps)]
    wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
    intro = (
        f"{finished.parent.name}; corpus: {finished.corpus.description}. One library, one seed of every search that "
        f"draws. The last run of this page took {wall:.0f} s of wall time and {cpu:.0f} CPU-s; KLs that were stored "
        "before took none of it. Errors are one standard error over sequences."
    )
    write_page("peers", "Searches side by side, and what additive scores are worth", [intro, *parts])


def section(finished: Finished, fraction: float, options: argparse.Namespace, swaps: int) -> list[str]:
    """One budget."""
    top, different = options.top, options.min_different
    (scored, others), truth = measured_truth(finished, 8)
    problem = finished.problem
    found = contest(
        problem, scored, others, ContestSize(), lambda done, total, text="": print(f"{done}/{total} {text}", flush=True)
    )
    best = choose(problem)
    checked = check_additivity(
        problem,
        truth,
        best,
        CheckSize(top=top, min_different=different, swaps=swaps),
        lambda text: print(text, flush=True),
        (scored.documents, others.documents),
    )
    return [
        table(*contest_rows(found)),
        "\n".join(f"* {line}" for line in contest_verdict(found)),
        f"The {checked.top} best sums that differ in {different} subblocks or more, other searches, and repair:",
        table(*check_rows(checked)),
        "\n".join(f"* {line}" for line in check_verdict(checked)),
        f"![predicted against true]({picture(checked, fraction).name})",
        how_sure(problem),
    ]


def how_sure(problem: Problem) -> str:
    """The bootstrap of the whole choice over the scored sequences, plain and robust."""
    library, rows = library_of(problem), []
    for robust in (0.0, 1.0):
        request = request_of(problem, search=problem.search.model_copy(update={"robust": robust}))
        found = bootstrap(library, request, Draws(most=DRAWS, least=DRAWS, seconds=math.inf))
        least = sorted(found.chosen, key=lambda layer: found.recurrence[layer].get(found.chosen[layer], 0.0))[:3]
        doubtful = ", ".join(f"{layer} {found.recurrence[layer].get(found.chosen[layer], 0.0):.0%}" for layer in least)
        interval = f"{found.low:.4f} to {found.high:.4f}"
        shares = [f"{value:.1%}" for value in (found.regret, found.within_1_percent, found.optimism, found.agreement)]
        rows.append([f"mean + {robust:g} se", f"{found.objective:.4f}", interval, *shares, doubtful])
    header = ["objective", "value", "90 % of draws", "regret", "within 1 %", "optimism", "agreement", "least sure"]
    return (
        f"How sure the MIP's choice is, {DRAWS} draws of {found.sequences} sequences (`puzzle confidence` explains the "
        f"columns):\n\n{table(header, rows)}"
    )


def picture(checked: Check, fraction: float) -> Path:
    """Predicted against true, beside the page."""
    path = ROOT / "benchmarks" / f"peers-{round(100 * fraction)}.png"
    with atomic_path(path) as temporary:
        draw_truth(truth_points(checked)).savefig(temporary, format="png")
    return path


if __name__ == "__main__":
    main()
