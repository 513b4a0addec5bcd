"""The child against every baseline at the same budget: before GKD at three budgets, after a small equal GKD at two.

    .venv/bin/python -m benchmarks.quality

Every seed orders the GKD text differently, and so chooses other text. The child and the best baseline are trained with
several seeds. All use one block library and one set of scores: BLD is seeded too, but was run once.
"""

import math
import statistics
from collections.abc import Sequence

from benchmarks.common import Bench, arguments, open_bench, table, write_page
from blocks.compute import HOST
from blocks.errors import PuzzleError
from blocks.records import BlockRecord, Metric, Score
from profiles.schema import Budget, Evaluate
from tasks.distill import gkd_targets
from tasks.distill.bld import distill
from tasks.distill.jobs import jobs_of
from tasks.evaluate.compare import Contender, contender, distill_contender, evaluate_contender
from tasks.measure.costs import CostRequest, measure_costs
from tasks.score.scoring import score_sequences
from tasks.search.choose import choose
from tasks.search.totals import Problem, make_problem
from tasks.studies.peers import find

FRACTIONS = (0.9, 0.7, 0.5)  # budgets before GKD: fractions of the layers' parameters


def main() -> None:
    """Choose, measure, distil, measure again."""
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=12, help="GKD steps of every contender")
    parser.add_argument("--long-steps", type=int, default=80, help="GKD steps of the child at 0.7")
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.7, 0.5], help="budgets with GKD")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    bench = open_bench(options)
    blocks, scores = library(bench)
    evaluate = bench.profile.evaluate.model_copy(update={"benchmarks": ()})
    parts = [intro(bench, evaluate), "## Before GKD", before(bench, blocks, scores, evaluate)]
    for fraction in options.budgets:
        parts.append(f"## After {options.steps} GKD steps each, {fraction:.0%} of the layers' parameters")
        parts.append(after(bench, problem_of(bench, scores, fraction), blocks, evaluate, options.steps, options.seeds))
    if options.long_steps:
        parts += long_gkd(bench, problem_of(bench, scores, 0.7), blocks, evaluate, options.long_steps)
    write_page("quality", "Quality of children and baselines", parts)


def intro(bench: Bench, evaluate: Evaluate) -> str:
    """What was measured on what."""
    return (
        f"{bench.parent.name}; corpus: {bench.corpus.description}. KL(parent || child) in nats per token on "
        f"{evaluate.sequences} x {bench.corpus.sequence_length} test tokens that no stage saw, +- one standard error "
        "over sequences."
    )


def problem_of(bench: Bench, scores: Sequence[Score], fraction: float) -> Problem:
    """The MIP at a fraction of the layers' parameters."""
    profile = bench.profile
    costs = measure_costs(CostRequest.of(profile, bench.parent), bench.workspace)
    budget = Budget(layer_parameters_fraction=fraction)
    return make_problem(scores, costs, budget, profile.scenarios, profile.search, profile.scoring.metric)


def contenders(bench: Bench, problem: Problem, blocks: Sequence[BlockRecord]) -> list[Contender]:
    """The child and the baselines that can keep the budget."""
    found = [contender("child", choose(problem), blocks)]
    for name in bench.profile.evaluate.baselines:
        try:
            found.append(contender(name, find(name, problem, bench.profile.seed), blocks))
        except PuzzleError as error:
            print(f"{name} left out: {error}")
    return found


def kl_of(bench: Bench, which: Contender, evaluate: Evaluate) -> Metric:
    """Measured KL on the test split."""
    return evaluate_contender(which, (bench.parent, bench.corpus), evaluate, bench.workspace, HOST).quality.kl


def before(bench: Bench, blocks: Sequence[BlockRecord], scores: Sequence[Score], evaluate: Evaluate) -> str:
    """All contenders at three budgets."""
    names = ["child", *bench.profile.evaluate.baselines]
    rows = []
    for fraction in FRACTIONS:
        problem = problem_of(bench, scores, fraction)
        found = {which.name: which for which in contenders(bench, problem, blocks)}
        cells = [text(kl_of(bench, found[name], evaluate)) if name in found else "-" for name in names]
        predicted = f"{found['child'].architecture.score:.3f}"
        rows.append([f"{fraction:.0%}", predicted, *cells])
    header = ["budget", "child predicted", *names]
    return table(header, rows)


def text(metric: Metric) -> str:
    """Value and error."""
    return f"{metric.value:.3f} ± {metric.se:.3f}"


def after(
    bench: Bench, problem: Problem, blocks: Sequence[BlockRecord], evaluate: Evaluate, steps: int, seeds: int
) -> str:
    """Equal GKD for all; further seeds for the child and the best baseline."""
    everyone = contenders(bench, problem, blocks)
    start = {which.name: kl_of(bench, which, evaluate) for which in everyone}
    best = min((which.name for which in everyone[1:]), key=lambda name: start[name].value, default="")
    rows, ranked = [], []
    for which in everyone:
        count = seeds if which.name in ("child", best) else 1
        values = [kl_of(bench, distilled(bench, which, steps, seed), evaluate) for seed in range(count)]
        spread = f"± {statistics.stdev(v.value for v in values):.4f} (n={count})" if count > 1 else "one seed"
        mean = statistics.mean(v.value for v in values)
        each = " / ".join(f"{v.value:.3f}" for v in values)
        rows.append([which.name, text(start[which.name]), f"{mean:.3f}", f"± {values[0].se:.3f}", spread, each])
        ranked.append((mean, values[0].se, which.name))
    header = ["contender", "before GKD", "after", "over sequences", "over seeds", "each seed"]
    tokens = steps * bench.profile.gkd.batch_sequences * bench.corpus.sequence_length
    return f"{tokens:,} tokens each. {lowest(ranked)}\n\n" + table(header, rows)


def lowest(found: Sequence[tuple[float, float, str]]) -> str:
    """The lowest, and those within one standard error of the difference. found: (KL, error, name)."""
    (best, error, name), *others = sorted(found)
    level = [other for value, se, other in others if value - best < math.hypot(error, se)]
    return f"Lowest: **{name}**{', not clearly below ' + ' and '.join(level) if level else ''}."


def distilled(bench: Bench, which: Contender, steps: int, seed: int) -> Contender:
    """GKD of a contender."""
    settings = bench.profile.gkd.model_copy(update={"steps": steps, "seed": seed, "evaluate_every": max(1, steps // 4)})
    teacher = gkd_targets.record_teacher(bench.parent, bench.corpus, settings, bench.workspace, HOST)
    return distill_contender(which, teacher, settings, bench.workspace, HOST)


def long_gkd(
    bench: Bench, problem: Problem, blocks: Sequence[BlockRecord], evaluate: Evaluate, steps: int
) -> list[str]:
    """The child at 70 % after many more steps."""
    child = contender("child", choose(problem), blocks)
    done = distilled(bench, child, steps, 0)
    assert done.gkd is not None
    curve = ", ".join(f"{step}: {kl:.3f}" for step, kl in done.gkd.curve)
    return [
        f"## {steps} GKD steps at 70 %",
        f"KL {text(kl_of(bench, child, evaluate))} -> **{text(kl_of(bench, done, evaluate))}** after "
        f"{done.gkd.tokens:,} tokens ({done.gkd.cpu_seconds:.0f} CPU-s, {done.gkd.seconds:.0f} s without the parent's "
        f"recording). Validation KL by step: {curve}. Kept: step {done.gkd.best_step}.",
    ]


def library(bench: Bench) -> tuple[list[BlockRecord], list[Score]]:
    """All blocks and scores of the profile's space."""
    jobs = jobs_of(bench.profile, bench.recording, bench.records, bench.reader)
    blocks = [distill(job, bench.workspace, HOST) for job in jobs]
    scores: list[Score] = []
    for layer, record in enumerate(bench.records):
        work = [(block, tuple(range(bench.scored.count))) for block in blocks if block.layer == layer]
        if work:
            scores += score_sequences(work, record, bench.scored, bench.parent, bench.workspace, HOST)
    return blocks, scores


if __name__ == "__main__":
    main()
