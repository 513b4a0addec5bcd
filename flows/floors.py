"""The stage after the choice: the chosen child keeps its limits on time and capabilities (tasks/evaluate/floors.py)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

from blocks.errors import PuzzleError, PuzzleFailure
from blocks.library import digest_of
from blocks.records import (
    PARENT,
    Architecture,
    BlockRecord,
    CorpusInfo,
    CostTable,
    Floor,
    HeldTime,
    LayerRecord,
    Metric,
    ParentInfo,
    Score,
    SpeedReport,
)
from blocks.typed_labels import type_in
from flows.number_types import score_types, with_files
from flows.run import task_of
from flows.stages import choose_child, runnable
from flows.tracked_run import TrackedRun
from flows.whole_models import measure_speed
from profiles.schema import GENERAL, Profile
from tasks.distill.record import open_parent
from tasks.evaluate.compare import Contender, contender, parent_contender
from tasks.evaluate.floors import (
    TOO_UNSURE,
    Chosen,
    Held,
    Look,
    check,
    floors_of,
    hold,
    in_words,
    is_same,
    nearer_whole,
    next_answer,
    times_are_held,
    times_of,
)
from tasks.inputs.precision import child_dtype
from tasks.running.progress import say
from tasks.running.sharing import TaskKey, exclusive
from tasks.running.workers import compute_of
from tasks.search.totals import Problem, as_asked, problem_of

next_task = task_of("choose", "choose, with other limits")(next_answer)


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
    """The choice whose children keep every limit on time and every `max_kl` themselves, and how they do."""
    rounds = run.profile.search.floor_rounds
    if not rounds or not (times_are_held(run.profile, library.costs) or run.profile.capability_limits):
        return Held(chosen=first, looks=((),) * len(first.near))
    search = _Search(run=run, source=source, capabilities=capabilities, library=library)
    search.choices.append((first, run.task_runs.get("choice")))
    held = hold(first, rounds, search.measure, search.again, search.whole)
    search.went_on_with(held.chosen)
    for (name, _), looks in zip(named(held.chosen.near), held.looks, strict=True):
        for look in looks:
            say(f"{name}: {in_words(look)}")
    if held.chosen.scores != first.scores:  # more was scored in types of number
        run.keep_tables(*source, library.blocks, held.chosen.scores, library.costs)
    return held


def named(near: Sequence[Architecture]) -> list[tuple[str, Architecture]]:
    """The children of a choice with their names: candidates of a race where there are several."""
    names = ["child"] if len(near) == 1 else [f"candidate-{place}" for place in range(1, len(near) + 1)]
    return list(zip(names, near, strict=True))


@dataclass(frozen=True, kw_only=True)
class _Search:
    """The answers of one search under other limits, each with the task run that gave it. timed: which were timed."""

    run: TrackedRun
    source: tuple[ParentInfo, CorpusInfo]
    capabilities: Sequence[CorpusInfo]
    library: Library
    choices: list[tuple[Chosen, UUID | None]] = field(default_factory=list)
    timed: list[bool] = field(default_factory=list)

    def measure(self, chosen: Chosen) -> list[tuple[Look, ...]] | None:
        """Every child of an answer at every limit. None where it could not be timed and others were."""
        run, (parent, corpus) = self.run, self.source
        children = [contender(name, one, self.library.blocks) for name, one in named(chosen.near)]
        times: Sequence[tuple[HeldTime, ...]] = [()] * len(children)
        if times_are_held(run.profile, self.library.costs):
            found = self._times(chosen, children)
            if found is None:
                say("the limits on time are not looked at before GKD: the machine was busy, or too unsteady")
                if any(self.timed):
                    return None
            times = found or times  # without any, limits stay as they were asked, and the sums of costs decide
            self.timed.append(found is not None)
        floors: Sequence[tuple[Floor, ...]] = [()] * len(children)
        if run.profile.capability_limits:
            floors = self._floors(chosen, with_files(run, children, parent, corpus))
        return [(*one, *other) for one, other in zip(times, floors, strict=True)]

    def _times(self, chosen: Chosen, children: Sequence[Contender]) -> list[tuple[HeldTime, ...]] | None:
        """All children in turns with the parent, those of the same batch sizes in one sitting; None where a sitting
        tells nothing.
        """
        run, costs, asked = self.run, self.library.costs, as_asked(chosen.problem, self.run.profile)
        sittings = dict[tuple[int, ...], list[Contender]]()
        for child in children:
            sittings.setdefault(child.architecture.batches, []).append(child)
        speeds = dict[str, SpeedReport]()
        for together in sittings.values():
            models = [parent_contender(together[0].architecture), *together]
            makes = f"floor speed {together[0].name}"
            speed = measure_speed(run, models, self.source[0], costs, "hold speed", makes, costs.measured_at)
            if speed.disturbed:
                return None
            speeds |= {child.name: speed for child in together}
        found = [
            times_of(asked, chosen.problem, own, speeds[one.name].models[one.name], speeds[one.name].models[PARENT])
            for one, own in zip(children, chosen.near, strict=True)
        ]
        unsure = any(one.measured.se > TOO_UNSURE * one.measured.value for looks in found for one in looks)
        return None if unsure else found

    def _floors(self, chosen: Chosen, children: Sequence[Contender]) -> list[tuple[Floor, ...]]:
        """Each child on the text of every capability with a limit."""
        run, profile, (parent, corpus) = self.run, self.run.profile, self.source
        asked, texts = (
            profile.capability_limits,
            {one.capability or GENERAL: one for one in (corpus, *self.capabilities)},
        )
        found: list[dict[str, Metric]] = [{} for _ in children]
        with run.stage("hold") as progress:
            for name, most in asked.items():  # the parent's side of a text is there for all children
                for child, own in zip(children, found, strict=True):
                    values = (child, parent, texts[name], profile, run.workspace)
                    own[name] = run.call(floor_task, f"floor {name} {child.name}", *values, after=["choice"])
                    said = f"{child.name}'s KL on {name} {own[name].value:.3g}, asked {most:.3g}"
                    progress(sum(map(len, found)), len(asked) * len(children), said)
        measured_at_most = profile.search.floor_rounds * profile.race.candidates
        pairs = zip(chosen.near, found, strict=True)
        return [floors_of(asked, chosen.problem, one, kl, measured_at_most) for one, kl in pairs]

    def whole(self, held: Held) -> Chosen | None:
        """The parent in one type, where it might be the better child."""
        found = nearer_whole(as_asked(held.chosen.problem, self.run.profile), held)
        if found is not None:
            kind = type_in(found.near[0].layers[0].ffn)
            say(f"the parent in {kind} is as near by its scores, and by its costs a little too slow: it is timed")
            self.choices.append((found, self.run.task_runs.get("choice")))
        return found

    def again(self, looks: Sequence[Sequence[Look]]) -> Chosen | None:
        """The next answer; None where there is none, which ends no run: there is a child already."""
        try:
            found = self._again(looks)
        except PuzzleFailure:
            raise
        except PuzzleError as error:
            say(f"no child under other limits: {error}")
            return None
        if found is not None:
            self.choices.append((found, self.run.task_runs.get("choice")))
        return found

    def _again(self, looks: Sequence[Sequence[Look]]) -> Chosen | None:
        """What is chosen in a type of number is scored in that type, like the first choice."""
        run, (parent, _), library = self.run, self.source, self.library
        profile, race, scores = run.profile, run.profile.race, self.choices[-1][0].scores
        typed = bool(profile.search_space.precision)
        values = (
            problem_of(profile, scores, library.costs),
            looks,
            1 if typed else race.candidates,
            race.min_different,
        )
        needs = [one for one in run.task_runs if one.startswith("floor ")]
        with run.stage("choose"):
            found: tuple[Problem, Chosen] | None = run.call(
                next_task, "next choice", *values, after=needs, limited=False
            )
        if found is None:
            return None
        if typed and any(is_same(found[1], one) for one, _ in self.choices):
            return None  # it needs no scores of its own
        if not typed:
            if "next choice" in run.task_runs:
                run.task_runs["choice"] = run.task_runs["next choice"]
            return runnable(run, parent, replace(found[1], scores=scores))
        other = replace(run, profile=_under(profile, found[0]))
        made = (library.records, library.blocks, library.scores, library.costs)
        more = score_types(other, self.source, *made, self.capabilities)
        return choose_child(other, parent, more, library.costs, after=["next choice"])

    def went_on_with(self, chosen: Chosen) -> None:
        """What is made of an answer hangs on its task run in Prefect's graph."""
        made_by = next(one for answer, one in self.choices if is_same(answer, chosen))
        if made_by is not None:
            self.run.task_runs["choice"] = made_by


def _under(profile: Profile, asked: Problem) -> Profile:
    """The profile with the limits of a problem."""
    capabilities = {
        name: one.model_copy(update={"max_kl": asked.capabilities.most.get(name)})
        for name, one in profile.capabilities.items()
    }
    changed = {"capabilities": capabilities, "budget": asked.budget, "scenarios": asked.scenarios}
    return profile.model_copy(update=changed)
