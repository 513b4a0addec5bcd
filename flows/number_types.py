"""The stages that a search over types of number adds: scores in types before the choice, files and references after."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blocks.errors import ParentError
from blocks.library import digest_of
from blocks.records import Architecture, BlockRecord, CorpusInfo, CostTable, LayerRecord, ParentInfo, Score
from flows import stages
from flows.run import Run, task_of
from flows.tracked_run import TrackedRun
from flows.whole_models import made_of, watch_of
from profiles.schema import GgufParent, PackageParent, Profile
from tasks.distill.gkd_targets import TeacherRecord
from tasks.distill.rounded import RoundedTraining
from tasks.evaluate.compare import SHIPPED, Contender, contender
from tasks.evaluate.standing import typed_parent
from tasks.evaluate.typed_file import as_served, is_typed, needs_file, with_file
from tasks.export.quantise import Recipe
from tasks.inputs.installed_packages import installed_file
from tasks.running.progress import Progress
from tasks.running.sharing import TaskKey, exclusive
from tasks.running.workers import compute_of
from tasks.score import typed_scores
from tasks.score.scoring import ScoringSet, scoring_sets
from tasks.search.one_type import whole_parent
from tasks.search.totals import Problem


def _whole_key(_: Any, given: dict[str, Any]) -> str:
    return digest_of(texts=[typed_scores.whole_key(text, given["parent"], given["recipe"]) for text in given["texts"]])


@task_of("score the parent", "score the parent: {label}", _whole_key)
def whole_task(label: str, recipe: Recipe, texts: Sequence[ScoringSet], parent: ParentInfo, workspace: Path) -> Any:
    """See tasks.score.typed_scores.score_whole."""
    key = typed_scores.whole_key(texts[0], parent, recipe)
    with exclusive(workspace, TaskKey(key=f"score-{key}", what=f"the score of the parent, {label}")):
        return typed_scores.score_whole(texts, parent, recipe, workspace)


@task_of("write file", "write {which.name} ({which.stage}) in its types")
def file_task(
    which: Contender,
    parent: ParentInfo,
    corpus: CorpusInfo,
    profile: Profile,
    workspace: Path,
    training: RoundedTraining | None,
) -> Any:
    """See tasks.evaluate.typed_file.with_file."""
    with exclusive(workspace, TaskKey(key=f"typed-{which.key}", what=f"the file of {which.name}")):
        return with_file(which, parent, corpus, profile.hardware.precision, workspace, training=training)


def score_types(
    run: Run,
    source: tuple[ParentInfo, CorpusInfo],
    records: Sequence[LayerRecord],
    blocks: Sequence[BlockRecord],
    scores: Sequence[Score],
    costs: CostTable,
    capabilities: Sequence[CorpusInfo] = (),
) -> list[Score]:
    """The scores, and those of every variant in every type of `search_space.precision`, where there are any; on the
    corpus, and on the text of every capability.
    """
    profile, kinds = run.profile, run.profile.search_space.precision
    if not kinds:
        return list(scores)
    (parent, corpus), depth = source, costs.num_hidden_layers

    def measure(wanted: list[BlockRecord]) -> list[Score]:
        return stages.score_all(run, *source, records, wanted, capabilities, name="score types")

    texts = scoring_sets(profile, corpus, capabilities, records[-1])
    whole: dict[str, dict[str, typed_scores.WholeScore]] = {text.capability: {} for text in texts}
    recipes = typed_scores.recipes(depth, kinds, profile.search_space.head_types)
    with run.stage("score whole parents") as progress:
        for done, (label, recipe) in enumerate(recipes.items(), start=1):
            known = all(typed_scores.stored_whole(text, parent, recipe, run.workspace) for text in texts)
            values = (label, recipe, texts, parent, run.workspace)
            made = run.call(whole_task, f"score {label}", *values, after=["corpus"], refresh=not known)
            for text, score in zip(texts, made, strict=True):
                stored = typed_scores.stored_whole(text, parent, recipe, run.workspace)
                whole[text.capability][label] = stored or score
            progress(done, len(recipes), label)
    fine = typed_scores.fine_types(whole)
    coarse = [kind for kind in kinds if kind not in fine]
    parents = measure(typed_scores.parents_in_types(parent, corpus, records, coarse))
    return typed_scores.settled(profile, scores, parents, whole, costs, blocks, measure)


def with_files(
    run: TrackedRun,
    contenders: Sequence[Contender],
    parent: ParentInfo,
    corpus: CorpusInfo,
    teacher: TeacherRecord | None = None,
) -> list[Contender]:
    """The contenders, each with its GGUF file where it is served from one.

    teacher: of those that are trained as their files hold them, where the profile asks for that.
    """
    contenders = [as_served(which, run.profile.hardware) for which in contenders]
    if not any(map(needs_file, contenders)):
        return list(contenders)
    found: list[Contender] = []
    with run.stage("write files") as progress:
        for which in contenders:
            if needs_file(which):
                training = _training(run, which, teacher, progress) if is_typed(which) else None
                values = (which, parent, corpus, run.profile, run.workspace, training)
                makes = f"file {which.name} {which.stage}"
                which = run.call(file_task, makes, *values, after=[made_of(which)], limited=False)
            found.append(which)
            progress(len(found), len(contenders), which.name)
    return found


def _training(
    run: TrackedRun, which: Contender, teacher: TeacherRecord | None, progress: Progress
) -> RoundedTraining | None:
    if teacher is None or not run.profile.gkd.rounded_steps:
        return None
    return RoundedTraining(
        teacher=teacher,
        settings=run.profile.gkd,
        workspace=run.workspace,
        compute=compute_of(run.profile),
        watch=watch_of(run, f"{which.name}_rounded", progress),
    )


def references(run: Run, problem: Problem, child: Architecture, own: Contender) -> list[Contender]:
    """What a user has without a search: the parent in each type, and the file that the parent came in."""
    space = run.profile.search_space
    found = [contender(typed_parent(kind), whole_parent(problem, kind, child.batches), []) for kind in space.precision]
    file = _shipped(run.profile) if space.precision else None
    if file is not None:
        found.append(own.model_copy(update={"name": SHIPPED, "file": str(file.resolve())}))
    return found


def _shipped(profile: Profile) -> Path | None:
    """The one GGUF file that the parent was read from."""
    source = profile.parent
    if isinstance(source, PackageParent):
        return installed_file(source.package, source.file, ParentError)
    if isinstance(source, GgufParent) and "-of-" not in Path(source.path).name:
        return Path(source.path)
    return None
