"""The stages of whole models, after the choice: GKD, evaluation, answers, speed. flows/stages.py has those before."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blocks.devices import on_device
from blocks.library import digest_of
from blocks.records import (
    Answer,
    CorpusInfo,
    CostTable,
    Looping,
    ParentInfo,
    Racer,
    RightAnswers,
    SeenItems,
    SpeedReport,
)
from flows.run import Run, task_of
from flows.stages import cost_tasks
from flows.tracked_run import TrackedRun
from profiles.schema import GENERAL, Profile
from tasks.distill import gkd_job, gkd_targets
from tasks.distill.gkd import Seen, Watch
from tasks.distill.record import open_parent
from tasks.evaluate import answers, compare, exact, loops, seen
from tasks.evaluate.compare import Contender, Evaluation
from tasks.evaluate.race import race as race_of
from tasks.evaluate.typed_file import as_served
from tasks.evaluate.typed_race import kl_as_file
from tasks.inputs.precision import child_dtype
from tasks.measure import end_to_end
from tasks.running.progress import Progress, in_percent, no_progress, part_of, say
from tasks.running.sharing import TaskKey, exclusive
from tasks.running.workers import compute_of


@task_of("record the parent for GKD", "record the parent for GKD")
def teacher_task(
    parent: ParentInfo, corpus: CorpusInfo, mixed: gkd_targets.Mixed, profile: Profile, workspace: Path, progress: Any
) -> Any:
    """See tasks.distill.gkd_targets.record_teacher."""
    compute = compute_of(profile)
    key = f"teacher-{gkd_targets.teacher_key(parent, corpus, profile.gkd, compute, mixed)}"
    with exclusive(workspace, TaskKey(key=key, what="the recording of the parent for GKD")):
        return gkd_targets.record_teacher(parent, corpus, profile.gkd, workspace, compute, progress, mixed)


@task_of("GKD", "GKD of {which.name}")
def gkd_task(
    which: Contender, teacher: gkd_targets.TeacherRecord, profile: Profile, workspace: Path, watch: Watch
) -> Any:
    """See tasks.distill.gkd_job.distill_globally."""
    with _training(which, teacher, profile, workspace):
        compute, devices = compute_of(profile), profile.devices
        return compare.distill_contender(which, teacher, profile.gkd, workspace, compute, devices, watch)


@task_of("race", "{steps} steps of GKD of {which.name}")
def race_task(
    which: Contender,
    steps: int,
    teacher: gkd_targets.TeacherRecord,
    profile: Profile,
    workspace: Path,
    watch: Watch,
) -> Any:
    """See tasks.distill.gkd_job.kl_after; tasks.evaluate.typed_race.kl_as_file where children are judged by a file."""
    with _training(which, teacher, profile, workspace) as job:
        if not (profile.search_space.precision or which.cache):
            return gkd_job.kl_after(steps, job, workspace, compute_of(profile), profile.devices, watch)
        if steps:
            gkd_job.kl_after(steps, job, workspace, compute_of(profile), profile.devices, watch)
        return kl_as_file(which, steps, job, profile.hardware.precision, workspace, profile.devices)


@contextmanager
def _training(
    which: Contender, teacher: gkd_targets.TeacherRecord, profile: Profile, workspace: Path
) -> Iterator[gkd_job.Job]:
    """The job of a contender's GKD, which nobody else does meanwhile, with all devices of this run."""
    job = gkd_job.job_of(compare.bare_layers(which), which.blocks, teacher, profile.gkd, compute_of(profile))
    task = TaskKey(key=job.folder.replace("/", "-"), what=f"GKD of {which.name}")
    with exclusive(workspace, task), _all_of(profile.devices):
        yield job


@contextmanager
def _all_of(devices: Sequence[str]) -> Iterator[None]:
    """Several devices of this machine for one task. In one order, so that two runs do not wait for each other."""
    with ExitStack() as held:
        for device in sorted(devices) if len(devices) > 1 else ():
            held.enter_context(on_device((device,)))
        yield


def _made_alone(workspace: Path, kind: str, path: str, what: str) -> AbstractContextManager[None]:
    """Nobody else makes the file meanwhile. kind, what: for those who wait."""
    return exclusive(workspace, TaskKey(key=f"{kind}-{digest_of(path=path)}", what=what))


@task_of("evaluate", "evaluate {which.name} ({which.stage}){corpus.where}")
def evaluate_task(
    which: Contender, parent: ParentInfo, corpus: CorpusInfo, profile: Profile, workspace: Path, progress: Any
) -> Any:
    """See tasks.evaluate.compare.evaluate_contender."""
    dtype = child_dtype(profile.hardware, open_parent(workspace / parent.folder))
    compute = compute_of(profile)
    asked = compare.on_capability(profile.evaluate, corpus) if corpus.capability else profile.evaluate
    path = compare.evaluation_path(which, parent, corpus, asked, compute, dtype)
    with _made_alone(workspace, "evaluate", path, f"the evaluation of {which.name}"):
        return compare.evaluate_contender(which, (parent, corpus), asked, workspace, compute, dtype, progress)


@task_of("answers", "answers of {which.name}")
def answers_task(which: Contender, parent: ParentInfo, profile: Profile, workspace: Path) -> Any:
    """See tasks.evaluate.answers.answers_of."""
    path = answers.answers_path(which, parent, profile.evaluate)
    with _made_alone(workspace, "answers", path, f"the answers of {which.name}"):
        return answers.answers_of(which, parent, profile.evaluate, workspace, compute_of(profile))


@task_of("count loops", "count loops of {which.name}")
def looping_task(
    which: Contender, parent: ParentInfo, corpus: CorpusInfo, profile: Profile, workspace: Path, progress: Any
) -> Any:
    """See tasks.evaluate.loops.looping_of."""
    path = loops.looping_path(which, parent, corpus, profile.evaluate)
    with _made_alone(workspace, "loops", path, f"the loops of {which.name}"):
        source = (parent, corpus)
        return loops.looping_of(which, source, profile.evaluate, workspace, compute_of(profile), progress)


@task_of("answer questions", "{which.name} answers questions{corpus.where}")
def questions_task(
    which: Contender, parent: ParentInfo, corpus: CorpusInfo, profile: Profile, workspace: Path, progress: Any
) -> Any:
    """See tasks.evaluate.exact.right_answers_of."""
    path = exact.right_path(which, parent, corpus, profile.evaluate)
    with _made_alone(workspace, "questions", path, f"the right answers of {which.name}"):
        source = (parent, corpus)
        return exact.right_answers_of(which, source, profile.evaluate, workspace, compute_of(profile), progress)


@task_of("look for items", "look for the benchmarks' items in the text")
def seen_task(parent: ParentInfo, texts: Sequence[CorpusInfo], profile: Profile, workspace: Path) -> Any:
    """See tasks.evaluate.seen.look_for_items."""
    path = seen.seen_path(texts, profile.evaluate)
    with _made_alone(workspace, "items", path, "the search for the benchmarks' items"):
        return seen.look_for_items(parent, texts, profile.evaluate, workspace)


def _speed_key(_: Any, given: dict[str, Any]) -> str:
    return end_to_end.speed_key(given["contenders"], given["source"][0], given["profile"])


@task_of("throughput", "throughput of {count} models", _speed_key)
def throughput_task(
    contenders: list[Contender],
    count: int,
    source: tuple[ParentInfo, CostTable],
    profile: Profile,
    workspace: Path,
    progress: Any,
    since: str,
) -> Any:
    """See tasks.measure.end_to_end.measure_speed."""
    return end_to_end.measure_speed(contenders, *source, profile, workspace, progress, since)


def made_of(which: Contender) -> str:
    """What made a contender, by the name of its task run: it is the parent, a choice from the library, or distilled."""
    return {"parent": "corpus", "assembled": "choice", "distilled": f"GKD {which.name}"}[which.stage]


def record_teacher(
    run: Run, parent: ParentInfo, corpus: CorpusInfo, capabilities: Sequence[CorpusInfo] = ()
) -> gkd_targets.TeacherRecord | None:
    """The parent's targets of GKD, once for all that are distilled; None where nobody is."""
    mixed, weights = gkd_targets.Mixed(), run.profile.capability_weights
    if capabilities:
        shares = (weights[GENERAL], *(weights[one.capability] for one in capabilities))
        mixed = gkd_targets.Mixed(capabilities=tuple(capabilities), shares=shares)
    if not run.profile.gkd.steps:
        return None
    with run.stage("GKD parent") as progress:
        values: tuple[Any, ...] = (parent, corpus, mixed, run.profile, run.workspace, progress)
        teacher: gkd_targets.TeacherRecord = run.call(teacher_task, "GKD parent", *values, after=["corpus"])
    return teacher


def race(
    run: TrackedRun, near: Sequence[Contender], teacher: gkd_targets.TeacherRecord | None
) -> tuple[Contender, tuple[Racer, ...]]:
    """The child among those near the optimum, and how they fared; the optimum where it is alone."""
    if teacher is None or len(near) == 1:
        return near[0], ()
    profile, workspace = run.profile, run.workspace
    with run.stage("race") as progress:

        def kl_after(which: Contender, steps: int) -> float:
            values = (which, steps, teacher, profile, workspace, watch_of(run, which.name, progress))
            found: float = run.call(race_task, f"race {which.name}", *values, after=["GKD parent", "choice"])
            say(f"race: {which.name} after {steps} steps of GKD: KL {found:.4f} on validation text")
            return found

        near = [as_served(which, profile.hardware) for which in near]
        left = {which.name: compare.bare_layers(which) for which in near}

        def give_up(which: Contender) -> None:
            layers = left.pop(which.name)
            if layers not in left.values():  # racers that differ in types alone are one training
                with _training(which, teacher, profile, workspace) as job:
                    gkd_job.give_up(job, workspace)

        winner, racers = race_of(near, profile.race.rounds, kl_after, give_up)
    return winner.model_copy(update={"name": "child"}), racers


def without_benchmarks(profile: Profile) -> Profile:
    """It asks no benchmarks."""
    return profile.model_copy(update={"evaluate": profile.evaluate.model_copy(update={"benchmarks": ()})})


def evaluate_all(
    run: Run,
    contenders: Sequence[Contender],
    parent: ParentInfo,
    corpus: CorpusInfo,
    capabilities: Sequence[CorpusInfo] = (),
    unfinished: str = "",
) -> list[Evaluation]:
    """Evaluations in order, with progress; on the corpus, and on the text of every capability.

    unfinished: the model that has its GKD yet to come, and is asked the benchmarks' items only then.
    """
    found: list[dict[str, Evaluation]] = [{} for _ in contenders]
    texts, done = (corpus, *capabilities), 0
    models = len(texts) * len(contenders)
    with run.stage("evaluate") as progress:
        for text in texts:  # the parent's side of a text is there for all models
            for which, own in zip(contenders, found, strict=True):
                makes = f"evaluation {which.name} {which.stage} {text.capability}".strip()
                of_this = part_of(progress, done, models)
                profile = without_benchmarks(run.profile) if which.name == unfinished else run.profile
                values = (which, parent, text, profile, run.workspace, in_percent(of_this, which.name))
                one: Evaluation = run.call(evaluate_task, makes, *values, after=[made_of(which)])
                own[text.capability], done = one, done + 1
                said = f"{which.name}{text.where} KL {one.quality.kl.value:.3f}"
                of_this(100, 100, said)
    return [own.pop("").model_copy(update={"capabilities": own}) for own in found]


def distill_globally(
    run: TrackedRun, contenders: Sequence[Contender], teacher: gkd_targets.TeacherRecord | None
) -> list[Contender]:
    """GKD of each contender on the same tokens."""
    if teacher is None:
        return []
    profile, workspace = run.profile, run.workspace
    distilled = []
    for which in contenders:
        with run.stage(f"GKD {which.name}") as progress:
            values = (which, teacher, profile, workspace, watch_of(run, which.name, progress))
            distilled.append(run.call(gkd_task, f"GKD {which.name}", *values, after=["GKD parent", made_of(which)]))
    return distilled


def watch_of(run: TrackedRun, name: str, progress: Progress) -> Watch:
    """What is called after each step of GKD: the console, Prefect's bar and MLflow's curves."""

    def watch(seen: Seen) -> None:
        progress(seen.step, seen.steps, seen.text)
        run.log_curves(f"gkd_{name}", seen.step, seen.figures)

    return watch


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """What models said by themselves, by name and stage: to the profile's prompts, and whether they loop on the test
    text, and what they answer right of each capability.
    """

    answers: Mapping[tuple[str, str], tuple[Answer, ...]]
    looping: Mapping[tuple[str, str], Looping]
    right_answers: Mapping[tuple[str, str], dict[str, RightAnswers]]


def let_speak(
    run: Run,
    contenders: Sequence[Contender],
    rival: Contender | None,
    source: tuple[ParentInfo, CorpusInfo],
    capabilities: Sequence[CorpusInfo] = (),
) -> Spoken:
    """Everything that the profile wants to hear of each; of the rival what is counted, not its answers to prompts."""
    parent, corpus = source
    counted = [*contenders, *([rival] if rival else [])]
    return Spoken(
        answers=let_answer(run, contenders, parent),
        looping=count_loops(run, counted, parent, corpus),
        right_answers=answer_questions(run, counted, parent, capabilities),
    )


def let_answer(
    run: Run, contenders: Sequence[Contender], parent: ParentInfo
) -> dict[tuple[str, str], tuple[Answer, ...]]:
    """What each says to the profile's prompts, by name and stage; nobody is asked where there are none."""
    if not run.profile.evaluate.prompts:
        return {}
    found: dict[tuple[str, str], tuple[Answer, ...]] = {}
    with run.stage("answers") as progress:
        for done, which in enumerate(contenders, start=1):
            values = (which, parent, run.profile, run.workspace)
            said = run.call(answers_task, f"answers {which.name}", *values, after=[made_of(which)]).answers
            found[which.name, which.stage] = said
            progress(done, len(contenders), f"{which.name}, {sum(answer.loops for answer in said)} of {len(said)} loop")
    return found


def count_loops(
    run: Run, contenders: Sequence[Contender], parent: ParentInfo, corpus: CorpusInfo
) -> dict[tuple[str, str], Looping]:
    """How often each loops on beginnings of test text, by name and stage; nothing where the profile asks for none."""
    if not run.profile.evaluate.loop_prompts:
        return {}
    found: dict[tuple[str, str], Looping] = {}
    with run.stage("loops") as progress:
        for which in contenders:
            values = (which, parent, corpus, run.profile, run.workspace, progress)
            found[which.name, which.stage] = run.call(
                looping_task, f"answers loops {which.name}", *values, after=[made_of(which)]
            )
    return found


def answer_questions(
    run: Run, contenders: Sequence[Contender], parent: ParentInfo, capabilities: Sequence[CorpusInfo]
) -> dict[tuple[str, str], dict[str, RightAnswers]]:
    """What each answers right by itself of every capability with known answers, by name and stage; nothing where the
    profile asks for none.
    """
    if not run.profile.evaluate.answered_questions:
        return {}
    found: dict[tuple[str, str], dict[str, RightAnswers]] = {(one.name, one.stage): {} for one in contenders}
    with run.stage("questions") as progress:
        for text in (one for one in capabilities if one.capability in run.profile.answered):
            for which in contenders:
                values = (which, parent, text, run.profile, run.workspace, progress)
                makes = f"answers questions {which.name} {text.capability}"
                found[which.name, which.stage][text.capability] = run.call(
                    questions_task, makes, *values, after=[made_of(which)]
                )
    return found


def look_for_items(
    run: Run, parent: ParentInfo, corpus: CorpusInfo, capabilities: Sequence[CorpusInfo]
) -> SeenItems | None:
    """The benchmarks' items in the text that stages trained on; None where the profile asks for no benchmarks."""
    if not run.profile.evaluate.benchmarks:
        return None
    texts = (corpus, *capabilities)
    with run.stage("look for items"):
        after = [f"corpus {text.capability}".strip() for text in texts]
        values = (parent, texts, run.profile, run.workspace)
        found: SeenItems = run.call(seen_task, "evaluation items", *values, after=after)
    return found


def measure_speed(
    run: Run,
    contenders: Sequence[Contender],
    parent: ParentInfo,
    table: CostTable,
    stage: str = "throughput",
    makes: str = "speed",
    since: str = "",
) -> SpeedReport:
    """Models end to end in the engine of the costs, in turns; nothing on a target that is not here. makes: the name of
    the task run. since: see tasks.measure.end_to_end.stored_speed.
    """
    if table.modelled:
        return SpeedReport()
    profile, workspace = run.profile, run.workspace
    stored = end_to_end.stored_speed(contenders, parent, table, profile, workspace, since)

    def call(progress: Any) -> Any:
        values = (list(contenders), len(contenders), (parent, table), profile, workspace, progress, since)
        needs = [*cost_tasks(run), *map(made_of, contenders)]
        return run.call(throughput_task, makes, *values, after=needs, limited=False, refresh=stored is None)

    if stored is not None:  # asked first: nobody waits for a device to read what is known
        call(no_progress)
        return stored
    with run.stage(stage) as progress:
        found: SpeedReport = call(progress)
    return found
