"""How much of SmolLM2's quality a child keeps at 1.5, 1.8 and 2.17 times its speed in llama.cpp, on five benchmarks.

    .venv/bin/python -m benchmarks.headline --workspace /tmp/headline     # about two hours of two cores

The paper's case is 2.17 times the parent's throughput at 98.4 % of its quality. Here `puzzle optimize` runs on the
shipped profile `smollm2-llama-cpp` at each speed, in one workspace, with more GKD than the profile asks. Everything on
the page is from the reports of these runs: speeds were measured in turns with the parent in bfloat16, and every model
answered the same benchmark items, which were drawn once.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.common import child_of, kl, last_report, optimize, table, write_page
from blocks import estimates
from blocks.estimates import Estimate, rounded
from blocks.records import Candidate, ChildReport, Metric
from tasks.evaluate.standing import difference, is_typed_parent

CHANCE = {"hellaswag": 0.25, "arc_easy": 0.25, "arc_challenge": 0.25, "piqa": 0.5, "winogrande": 0.5}
PAPER = "2.17 times the throughput at 98.4 % of the quality"


def accuracy(model: Candidate, tasks: Sequence[str], above: bool) -> Estimate:
    """Mean of the tasks' accuracies; above what guessing gives."""
    found = estimates.pooled_accuracy({name: model.correct[name] for name in tasks}, model.item_groups, by_task=True)
    guessed = sum(CHANCE[name] for name in tasks) / len(tasks)
    return replace(found, value=found.value - guessed) if above else found


def kept(model: Candidate, parent: Candidate, tasks: Sequence[str], above: bool = False) -> str:
    """Retention in percent with its 95 % interval, from paired items."""
    found = estimates.ratio(accuracy(model, tasks, above), accuracy(parent, tasks, above))
    assert found is not None
    low, high = estimates.interval(found)
    return f"{100 * found.value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def told_apart(parent: Candidate) -> list[str]:
    """The tasks on which the parent is two errors above guessing."""
    return [name for name, one in parent.benchmarks.items() if one.value > CHANCE[name] + 2 * one.se]


def models_of(report: ChildReport) -> Iterator[tuple[str, Candidate]]:
    """Whom the page shows: the whole parents in one type, the child before and after GKD."""
    for one in report.candidates:
        if is_typed_parent(one.name):
            yield f"the {one.name}", one
    yield from (
        (f"child, {'after' if one.stage == 'distilled' else 'before'} GKD", one)
        for one in sorted(report.candidates, key=lambda one: one.stage)
        if one.name == "child"
    )


def request(model: Candidate) -> Metric:
    """Its speed of a request over the parent's, measured in turns."""
    assert model.gains is not None and model.gains.request is not None
    return model.gains.request


def beside_one_type(child: Candidate, report: ChildReport) -> str:
    """How fast the child is over the fastest whole parent that is at least as near to the parent, in a sentence."""
    near = []
    for one in report.candidates:
        if is_typed_parent(one.name):
            more = difference(kl(one), kl(child))
            if more.value <= 0 or not estimates.is_clear(more):
                near.append(one)
    if not near:
        return "No whole parent in one type is as near to the parent as the child is."
    best = max(near, key=lambda one: request(one).value)
    found = estimates.independent_ratio(request(child), request(best))
    assert found is not None
    return (
        f"The fastest whole parent whose KL is not clearly above the child's is {best.name}; the child is "
        f"{rounded(found)} times as fast as it."
    )


def answered(model: Candidate, parent: Candidate, tasks: Sequence[str]) -> list[str]:
    """Accuracies in percent, and what is kept of the parent's."""
    each = [f"{100 * model.benchmarks[task].value:.1f}" for task in CHANCE]
    return [*each, kept(model, parent, list(CHANCE)), kept(model, parent, tasks, above=True)]


def part(asked: float, report: ChildReport) -> list[str]:
    """What the page says of one speed."""
    parent, tasks = report.candidates[0], told_apart(report.candidates[0])
    rows = [
        [
            name,
            f"{one.weight_bytes / 1e6:.1f}",
            rounded(request(one)),
            rounded(kl(one).metric),
            *(answered(one, parent, tasks) if one.benchmarks else ["–"] * (len(CHANCE) + 2)),
        ]
        for name, one in models_of(report)
    ]
    whole = [f"{100 * parent.benchmarks[task].value:.1f}" for task in CHANCE]
    first = ["the parent, bfloat16", f"{parent.weight_bytes / 1e6:.1f}", "1", "0", *whole, "100 %", "100 %"]
    header = ["model", "file, MB", "request", "KL", *(f"{task}, %" for task in CHANCE), "kept", "kept above chance"]
    child = child_of(report)
    predicted = report.architecture.parent_totals[0].runtime_seconds / report.architecture.totals[0].runtime_seconds
    return [
        f"## {asked} times the parent's speed asked",
        f"Predicted {predicted:.2f}; "
        f"{child.gkd_tokens:,} tokens of GKD in float and as many with the weights rounded as the file holds them. "
        + beside_one_type(child, report),
        table(header, [first, *rows]),
    ]


def answers(asked: float, report: ChildReport) -> list[str]:
    """Greedy answers of the parent and of the child."""
    parent, child = report.candidates[0], child_of(report)
    rows = [
        [mine.prompt.replace("\n", " "), theirs.text.replace("\n", " "), mine.text.replace("\n", " ")]
        for theirs, mine in zip(parent.answers, child.answers, strict=True)
    ]
    loops = [sum(answer.loops for answer in one.answers) for one in (parent, child)]
    return [
        f"## Answers at {asked} times",
        f"Greedy, no penalty on repeats. Answers that loop: parent {loops[0]}, child {loops[1]} of {len(rows)}.",
        table(["prompt", "parent", "child"], [[word.replace("|", "\\|") for word in row] for row in rows]),
    ]


def run(workspace: Path, asked: float, steps: int, items: int) -> ChildReport:
    """A child at one speed."""
    settings = [
        f"budget.speedup={asked}",
        f"gkd.steps={steps}",
        f"gkd.rounded_steps={steps}",
        f"evaluate.benchmarks=[{','.join(CHANCE)}]",
        f"evaluate.benchmark_limit={items}",
        "evaluate.baselines=[]",
    ]
    if optimize("smollm2-llama-cpp", workspace, settings):
        raise SystemExit(2)
    return last_report(workspace)


def main() -> None:
    """Print and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workspace", type=Path, required=True, help="finished stages are reused")
    parser.add_argument("--speedups", type=float, nargs="+", default=[2.17, 1.8, 1.5])
    parser.add_argument("--items", type=int, default=500, help="of each benchmark")
    parser.add_argument("--steps", type=int, default=96, help="of GKD in float, and of GKD with rounded weights")
    asked = parser.parse_args()
    found = {one: run(asked.workspace.resolve(), one, asked.steps, asked.items) for one in asked.speedups}
    parent = next(iter(found.values())).candidates[0]
    tasks = told_apart(parent)
    intro = (
        f"SmolLM2-135M-Instruct, a request of 256 + 64 tokens in llama.cpp on two cores, over the parent in bfloat16. "
        f"The paper's case is {PAPER}. *kept*: mean accuracy over the five benchmarks, over the parent's, with its "
        f"95 % interval (paired items; {asked.items} drawn items each). *above chance*: the same, less what guessing "
        f"gives, over {', '.join(tasks)}, where the parent is two errors above guessing. A child is asked after GKD. "
        f"KL in nats per token on {len(set(parent.sample_documents))} test documents. A section was timed in one "
        "sitting; sittings differ."
    )
    sections = [text for one, report in found.items() for text in part(one, report)]
    first = next(iter(found))
    write_page("headline", "The headline: speed and quality kept", [intro, *sections, *answers(first, found[first])])


if __name__ == "__main__":
    main()
