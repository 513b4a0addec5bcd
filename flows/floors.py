"""The stage after the choice: the chosen child keeps every `max_kl` itself (tasks/evaluate/floors.py)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID

from blocks.errors import PuzzleError
from blocks.library import digest_of
from blocks.records import BlockRecord, CorpusInfo, CostTable, Floor, LayerRecord, Metric, ParentInfo, Score
from flows.number_types import score_types, with_files
from flows.run import task_of
from flows.stages import choose_child, runnable
from flows.tracked_run import TrackedRun
from profiles.schema import GENERAL, Profile
from tasks.distill.record import open_parent
from tasks.evaluate.compare import Contender, contender
from tasks.evaluate.floors import Chosen, Held, check, floors_of, hold, in_words, tighter
from tasks.inputs.precision import child_dtype
from tasks.running.progress import say
from tasks.running.sharing import TaskKey, exclusive
from tasks.running.workers import compute_of
from tasks.search.totals import problem_of

tighter_task = task_of("choose", "choose, with tighter limits")(tighter)


@dataclass(frozen=True, kw_only=True)
class Library:
    """What children are chosen from. scores: before those in types of number."""

    records: Sequence[LayerRecord]
    blocks: Sequence[BlockRecord]
    scores: Sequence[Score]
    costs: CostTable


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
    library: Library,
) -> Held:
    """The choice with every `max_kl` kept by each of its children, and how they keep them."""
    profile, (parent, corpus) = run.profile, source
    asked, rounds = profile.capability_limits, profile.search.floor_rounds
    if not asked or not rounds:
        return Held(chosen=first, floors=((),) * len(first.near))
    texts = {one.capability or GENERAL: one for one in (corpus, *capabilities)}
    choices: list[tuple[Chosen, UUID | None]] = [(first, run.task_runs.get("choice"))]

    def measure(chosen: Chosen, look: int) -> list[tuple[Floor, ...]]:
        children = [contender("child", one, library.blocks) for one in chosen.near]
        children = with_files(run, children, parent, corpus)
        found: list[dict[str, Metric]] = [{} for _ in children]
        with run.stage("hold") as progress:
            for name, most in asked.items():  # the parent's side of a text is there for all children
                for place, child in enumerate(children):
                    values = (child, parent, texts[name], profile, run.workspace)
                    kl: Metric = run.call(floor_task, f"floor {name}", *values, after=["choice"])
                    found[place][name] = kl
                    done, said = sum(map(len, found)), f"KL on {name} {kl.value:.3g}, asked {most:.3g}"
                    progress(done, len(asked) * len(children), said)
        pairs = zip(chosen.near, found, strict=True)
        return [floors_of(asked, chosen.problem, one, measured, look) for one, measured in pairs]

    def again(floors: Sequence[Floor]) -> Chosen | None:
        try:
            found = _again(run, source, capabilities, floors, library, choices[-1][0].scores)
        except PuzzleError as error:  # there is a child already
            say(f"no child under a tighter limit: {error}")
            return None
        if found is not None:
            choices.append((found, run.task_runs.get("choice")))
        return found

    held = hold(first, rounds, measure, again)
    made_by = next(one for chosen, one in choices if chosen.problem is held.chosen.problem)
    if made_by is not None:
        run.task_runs["choice"] = made_by
    for floor in held.floors[0]:
        say(in_words(floor))
    return held


def _again(
    run: TrackedRun,
    source: tuple[ParentInfo, CorpusInfo],
    capabilities: Sequence[CorpusInfo],
    floors: Sequence[Floor],
    library: Library,
    scores: Sequence[Score],
) -> Chosen | None:
    """The choice under lower limits. What it takes in a type of number is scored in that type, like the first choice.

    scores: those that the last choice was made by.
    """
    profile, (parent, _), race = run.profile, source, run.profile.race
    whole = problem_of(profile, scores, library.costs)
    values, needs = (whole, floors, race.candidates, race.min_different), [f"floor {one.capability}" for one in floors]
    with run.stage("choose"):
        found: Chosen | None = run.call(tighter_task, "tighter choice", *values, after=needs, limited=False)
    if found is None:
        return None
    if "tighter choice" in run.task_runs:
        run.task_runs["choice"] = run.task_runs["tighter choice"]
    if not profile.search_space.precision:
        return runnable(run, parent, replace(found, scores=tuple(scores)))
    tight = replace(run, profile=_under(profile, found.problem.capabilities.most))
    scores = score_types(tight, source, library.records, library.blocks, library.scores, library.costs, capabilities)
    return choose_child(tight, parent, scores, library.costs)


def _under(profile: Profile, most: Mapping[str, float]) -> Profile:
    """The profile with these limits on its capabilities."""
    lowered = {name: profile.capabilities[name].model_copy(update={"max_kl": kl}) for name, kl in most.items()}
    return profile.model_copy(update={"capabilities": {**profile.capabilities, **lowered}})
