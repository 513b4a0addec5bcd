"""The stage after the choice: the chosen child keeps every `max_kl` itself (tasks/evaluate/floors.py)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blocks.library import digest_of
from blocks.records import BlockRecord, CorpusInfo, CostTable, Floor, Metric, ParentInfo, Score
from flows.number_types import with_files
from flows.run import task_of
from flows.stages import that_run
from flows.tracked_run import TrackedRun
from profiles.schema import GENERAL, Profile
from tasks.distill.record import open_parent
from tasks.evaluate.compare import Contender, contender
from tasks.evaluate.floors import Chosen, check, floors_of, hold, in_words, tighter
from tasks.inputs.precision import child_dtype
from tasks.running.progress import say
from tasks.running.sharing import TaskKey, exclusive
from tasks.running.workers import compute_of
from tasks.search.totals import problem_of

tighter_task = task_of("choose", "choose, with tighter limits")(tighter)


@task_of("check floor", "KL of {which.name}{corpus.where} before GKD")
def floor_task(which: Contender, parent: ParentInfo, corpus: CorpusInfo, profile: Profile, workspace: Path) -> Any:
    """See tasks.evaluate.floors.check."""
    dtype = child_dtype(profile.hardware, open_parent(workspace / parent.folder))
    what = TaskKey(key=f"floor-{digest_of(model=which.served_key, text=corpus.fingerprint)}", what="a child's KL")
    with exclusive(workspace, what):
        return check(which, parent, corpus, workspace, compute_of(profile), dtype)


def hold_floors(
    run: TrackedRun,
    source: tuple[ParentInfo, CorpusInfo],
    capabilities: Sequence[CorpusInfo],
    first: Chosen,
    library: tuple[Sequence[BlockRecord], Sequence[Score], CostTable],
) -> tuple[Chosen, tuple[Floor, ...]]:
    """The choice with every `max_kl` kept by the child itself, and how it keeps them."""
    profile, rounds, (parent, corpus), (blocks, scores, costs) = (
        run.profile,
        run.profile.search.floor_rounds,
        source,
        library,
    )
    asked, race = profile.capability_limits, profile.race
    if not asked or not rounds:
        return first, ()
    texts = {one.capability or GENERAL: one for one in (corpus, *capabilities)}
    whole = problem_of(profile, scores, costs)

    def measure(chosen: Chosen) -> tuple[Floor, ...]:
        (child,) = with_files(run, [contender("child", chosen.near[0], blocks)], parent, corpus)
        found = dict[str, Metric]()
        with run.stage("hold") as progress:
            for name, most in asked.items():
                values = (child, parent, texts[name], profile, run.workspace)
                found[name] = run.call(floor_task, f"floor {name}", *values, after=["choice"])
                said = f"KL on {name} {found[name].value:.3g}, asked {most:.3g}"
                progress(len(found), len(asked), said)
        return floors_of(asked, chosen.problem, chosen.near[0], found)

    def again(floors: Sequence[Floor]) -> Chosen | None:
        values = (whole, floors, race.candidates, race.min_different)
        needs = [f"floor {one.capability}" for one in floors]
        with run.stage("choose"):
            found: Chosen | None = run.call(tighter_task, "tighter choice", *values, after=needs, limited=False)
        if found is None:
            return None
        run.task_runs["choice"] = run.task_runs["tighter choice"]
        return that_run(run, parent, found)

    chosen, floors = hold(first, rounds, measure, again)
    for one in floors:
        say(in_words(one))
    return chosen, floors
