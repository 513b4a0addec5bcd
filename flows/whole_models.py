"""The Prefect tasks of whole models, after the choice: GKD, evaluation, speed. See flows/stages.py for those before."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blocks.library import digest_of
from blocks.records import Answer, CorpusInfo, CostTable, ParentInfo, SpeedReport
from flows.stages import stage, task_of
from profiles.schema import Profile
from tasks.distill import gkd
from tasks.distill.record import open_parent
from tasks.evaluate import answers, compare
from tasks.evaluate.compare import Contender, Evaluation
from tasks.inputs.precision import child_dtype
from tasks.measure import end_to_end
from tasks.running.retries import limits_of
from tasks.running.sharing import Piece, made_once


@task_of("record the parent for GKD", "record the parent for GKD", None)
def teacher_task(parent: ParentInfo, corpus: CorpusInfo, profile: Profile, workspace: str, tell: Any) -> Any:
    """See tasks.distill.gkd.record_teacher."""
    key = f"teacher-{gkd.teacher_key(parent, corpus, profile.gkd)}"
    with made_once(Path(workspace), Piece(key=key, what="the recording of the parent for GKD")):
        return gkd.record_teacher(parent, corpus, profile.gkd, Path(workspace), "cpu", tell)


@task_of("GKD", "GKD of {which.name}", None)
def gkd_task(
    which: Contender, teacher: gkd.TeacherRecord, parent: ParentInfo, profile: Profile, workspace: str, tell: Any
) -> Any:
    """See tasks.evaluate.compare.distill_contender."""
    piece = Piece(key=f"gkd-{which.key}-{digest_of(gkd=profile.gkd)}", what=f"GKD of {which.name}")
    with made_once(Path(workspace), piece):
        return compare.distill_contender(which, teacher, parent, profile.gkd, Path(workspace), tell)


@task_of("evaluate", "evaluate {which.name} ({which.stage})", None)
def evaluate_task(which: Contender, parent: ParentInfo, corpus: CorpusInfo, profile: Profile, workspace: str) -> Any:
    """See tasks.evaluate.compare.evaluate_contender."""
    dtype = child_dtype(profile.hardware, open_parent(Path(workspace) / parent.folder))
    key = digest_of(path=compare.evaluation_path(which, parent, corpus, profile.evaluate, dtype))
    with made_once(Path(workspace), Piece(key=f"evaluate-{key}", what=f"the evaluation of {which.name}")):
        return compare.evaluate_contender(which, parent, corpus, profile.evaluate, Path(workspace), dtype)


@task_of("answers", "answers of {which.name}", None)
def answers_task(which: Contender, parent: ParentInfo, profile: Profile, workspace: str) -> Any:
    """See tasks.evaluate.answers.answers_of."""
    key = digest_of(path=answers.answers_path(which, parent, profile.evaluate))
    with made_once(Path(workspace), Piece(key=f"answers-{key}", what=f"the answers of {which.name}")):
        return answers.answers_of(which, parent, profile.evaluate, Path(workspace))


@task_of("throughput", "throughput of {count} models", None)
def throughput_task(
    contenders: list[Contender],
    count: int,
    parent: ParentInfo,
    table: CostTable,
    profile: Profile,
    workspace: str,
    tell: Any,
) -> Any:
    """See tasks.measure.end_to_end.measure_speed."""
    return end_to_end.measure_speed(contenders, parent, table, profile, Path(workspace), tell)


def evaluate_all(
    contenders: Sequence[Contender], parent: ParentInfo, corpus: CorpusInfo, profile: Profile, workspace: Path
) -> list[Evaluation]:
    """Evaluations in order, with progress."""
    found = []
    with stage("evaluate") as tell:
        for done, which in enumerate(contenders, start=1):
            found.append(
                evaluate_task.with_options(**limits_of(profile))(which, parent, corpus, profile, str(workspace))
            )
            tell(done, len(contenders), f"{which.name} KL {found[-1].quality.kl.value:.3f}")
    return found


def distill_globally(
    contenders: Sequence[Contender], parent: ParentInfo, corpus: CorpusInfo, profile: Profile, workspace: Path
) -> list[Contender]:
    """GKD of each contender on the same tokens; the parent is recorded once for all."""
    if not profile.gkd.steps:
        return []
    with stage("GKD parent") as tell:
        teacher = teacher_task.with_options(**limits_of(profile))(parent, corpus, profile, str(workspace), tell)
    distilled = []
    for which in contenders:
        with stage(f"GKD {which.name}") as tell:
            own = gkd_task.with_options(**limits_of(profile))
            distilled.append(own(which, teacher, parent, profile, str(workspace), tell))
    return distilled


def let_answer(
    contenders: Sequence[Contender], parent: ParentInfo, profile: Profile, workspace: Path
) -> dict[tuple[str, str], tuple[Answer, ...]]:
    """What each says to the profile's prompts, by name and stage; nobody is asked where there are none."""
    if not profile.evaluate.prompts:
        return {}
    found: dict[tuple[str, str], tuple[Answer, ...]] = {}
    with stage("answers") as tell:
        for done, which in enumerate(contenders, start=1):
            said = answers_task.with_options(**limits_of(profile))(which, parent, profile, str(workspace)).answers
            found[which.name, which.stage] = said
            tell(done, len(contenders), f"{which.name}, {sum(answer.loops for answer in said)} of {len(said)} loop")
    return found


def measure_speed(
    contenders: Sequence[Contender], parent: ParentInfo, table: CostTable, profile: Profile, workspace: Path
) -> SpeedReport:
    """All models end to end in the engine of the costs, in turns; nothing on a target that is not here."""
    if table.modelled:
        return SpeedReport()
    with stage("throughput") as tell:
        found: SpeedReport = throughput_task(
            list(contenders), len(contenders), parent, table, profile, str(workspace), tell
        )
    return found
