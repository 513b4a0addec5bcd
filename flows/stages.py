"""The stages of a run up to the choice: each stage calls its Prefect tasks, and each task wraps one plain function.

A stage asks the files first. What is whole becomes a task run at once, `Cached` by Prefect; the rest is submitted to
the workers. See flows/run.py for the how, flows/whole_models.py for the stages after the choice.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import cycle, zip_longest
from pathlib import Path
from typing import Any

from prefect.futures import as_completed

from blocks.errors import InfeasibleBudget, PuzzleError
from blocks.library import BlockLibrary, digest_of
from blocks.records import Architecture, BlockRecord, CorpusInfo, CostTable, LayerRecord, ParentInfo, Score
from flows.run import Run, task_of
from profiles.schema import MINITRON, Corpus, ParentAnswersSource, Profile
from tasks.distill.bld import Job, distill_shard, progress_of
from tasks.distill.jobs import better_of, coupled_jobs, jobs_of
from tasks.distill.record import (
    Part,
    Recording,
    Shard,
    StatesInUse,
    clear,
    enter,
    open_parent,
    parts_of,
    record_layer,
    recorded,
    recording_of,
)
from tasks.evaluate.floors import Chosen
from tasks.inputs.corpus import prepare_corpus
from tasks.inputs.corpus_sources import iterate_documents
from tasks.inputs.image_questions import by_digest, forget_questions
from tasks.inputs.parent import prepare_parent
from tasks.inputs.parent_answers import with_answers
from tasks.inputs.space import check_search_space, left_out, refused_whole
from tasks.inputs.vision import refuse_blind, sees, with_images
from tasks.measure import costs, typed_costs
from tasks.measure.calibration import drift
from tasks.running.at_work import at_work_in
from tasks.running.progress import say
from tasks.running.sharing import TaskKey, exclusive
from tasks.running.workers import WorkerSlot, compute_of, in_slot, worker_slot
from tasks.score import scoring
from tasks.search.choose import with_most_tokens
from tasks.search.one_type import candidates
from tasks.search.totals import Problem, as_asked, predicted, problem_of
from tasks.studies.peers import find

parent_task = task_of("prepare parent", "prepare parent")(prepare_parent)
corpus_task = task_of("prepare corpus", "prepare corpus")(prepare_corpus)
images_task = task_of("see images", "see images")(with_images)
prompts_task = task_of("answer prompts", "answer prompts")(with_answers)
choose_task = task_of("choose", "choose")(candidates)
ratio_task = task_of("measure type", "measure the parent in {kind}")(typed_costs.measure_ratio)


@task_of("record layer", "record layer {layer:02d}", lambda _, p: f"{p['recording'].key}-{p['layer']}-{p['number']}")
def record_task(
    layer: int, recording: Recording, number: int, slot: WorkerSlot, workspace: str, hand_on: bool = True
) -> Any:
    """See tasks.distill.record.record_layer."""
    task = TaskKey(key=f"record-{recording.key}-{layer}", what=f"the recording of layer {layer}")
    found = recorded(layer, recording, Path(workspace), number)
    if found is not None:
        return found
    with in_slot(slot, Path(workspace), task) as compute:
        return record_layer(layer, recording, Path(workspace), compute, number, hand_on)


@task_of("record shard", "record shard {part} into layers {layers}")
def enter_task(layers: Sequence[int], part: Part, recording: Recording, slot: WorkerSlot, workspace: str) -> None:
    """See tasks.distill.record.enter."""
    what = f"the recording of layers {layers[0]} to {layers[-1]}, part {part.number + 1} of {part.count}"
    with in_slot(slot, Path(workspace), TaskKey(key=f"enter-{recording.key}-{part}", what=what)) as compute:
        enter(layers, part, recording, Path(workspace), compute)


@task_of(
    "distill", "distill layer {job.layer:02d} {job.subblock} {job.variant}", lambda _, p: f"{p['job'].key}{p['part']}"
)
def distill_task(job: Job, slot: WorkerSlot, workspace: str, number: int = 0, part: str = "") -> Any:
    """See tasks.distill.bld.distill_shard. part: names a shard that is not the last one."""
    found = progress_of(job, number, Path(workspace))
    if found is not None:
        return found
    with in_slot(slot, Path(workspace), TaskKey(key=f"block-{job.key}", what=_named(job))) as compute:
        return distill_shard(job, Path(workspace), compute, number)


@task_of(
    "score layer",
    "score layer {layer.layer:02d}{scored.corpus.where}",
    lambda _, p: _scores_key(p["work"], p["scored"]),
)
def score_task(
    work: list[scoring.Work],
    layer: LayerRecord,
    scored: scoring.ScoringSet,
    parent: ParentInfo,
    slot: WorkerSlot,
    workspace: str,
) -> Any:
    """See tasks.score.scoring.score_sequences."""
    found = [scoring.stored_score(record, sequences, scored.text, Path(workspace)) for record, sequences in work]
    if all(found):
        return found
    task = TaskKey(key=f"scores-{layer.statistics.sha256[:32]}", what=f"the scores of layer {layer.layer}")
    with in_slot(slot, Path(workspace), task) as compute:
        return scoring.score_sequences(work, layer, scored, parent, Path(workspace), compute)


@task_of("measure", "measure {part.label}", lambda _, p: p["part"].key)
def measure_task(part: costs.Part, measure: Callable[[], None]) -> str:
    """See tasks.measure.costs.measure_costs, whose table says what was measured."""
    measure()
    return part.label


def _named(job: Job) -> str:
    return f"layer {job.layer} {job.subblock} {job.variant}"


def _scores_key(work: Sequence[scoring.Work], scored: scoring.ScoringSet) -> str:
    return digest_of(scores=[(scoring.score_key(record, scored.text), sequences) for record, sequences in work])


def prepare(run: Run) -> tuple[ParentInfo, CorpusInfo, list[CorpusInfo]]:
    """Parent, corpus and the text of every capability that has its own, normalised and fingerprinted; all are
    remembered by content. What stands in the corpus, or in a capability before it, is left out of a capability.

    Too little text, or too few images, is found out before the parent sees any image.
    """
    parent, images = parent_of(run), _images_of(run)
    corpus, capabilities = _packed(run, "", run.profile.corpus, parent, images), list[CorpusInfo]()
    for name, one in run.profile.own_capabilities.items():
        capabilities.append(_packed(run, name, one.corpus, parent, images, (corpus, *capabilities)))
    forget_questions()
    return _seeing(run, parent, images), corpus, capabilities


def parent_of(run: Run) -> ParentInfo:
    """The parent, as long as it has seen no image."""
    profile, workspace = run.profile, run.workspace
    with exclusive(workspace, TaskKey(key="parent", what="the parent")), run.stage("parent"):
        documents = lambda: iterate_documents(profile.corpus)  # noqa: E731
        asked = (profile.parent, workspace, documents, bool(profile.images))
        parent: ParentInfo = run.call(parent_task, "parent", *asked, limited=False)
    reader = open_parent(workspace / parent.folder)
    check_search_space(profile, reader)
    for sentence in left_out(profile, reader):
        say(f"not tried: {sentence}")
    if profile.images:
        refuse_blind(parent.name, sees(workspace / parent.folder))
    return parent


def _images_of(run: Run) -> dict[str, Path]:
    """Every image that the profile's texts ask about, see `by_digest`: many photos take long."""
    if not run.profile.images:
        return {}
    with run.stage("read images") as progress:
        return by_digest(run.profile.images, progress)


def _seeing(run: Run, parent: ParentInfo, images: Mapping[str, Path]) -> ParentInfo:
    """The parent with the features of all images that the profile's texts ask about."""
    if not images:
        return parent
    with exclusive(run.workspace, TaskKey(key="images", what="the images")), run.stage("images") as progress:
        asked = (parent, images, run.workspace, compute_of(run.profile), progress)
        found: ParentInfo = run.call(images_task, "corpus", *asked, after=["corpus"], limited=False)
    return found


def _packed(
    run: Run,
    capability: str,
    wanted: Corpus,
    parent: ParentInfo,
    images: Mapping[str, Path],
    others: tuple[CorpusInfo, ...] = (),
) -> CorpusInfo:
    """A text read and packed, with the parent's answers where it asks for them. capability: whose; "": the corpus.

    images: all that the parent is to see, by their digests.
    """
    workspace, needs = run.workspace, ["parent"]
    if any(isinstance(source, ParentAnswersSource) for source in wanted.sources):
        with (
            exclusive(workspace, TaskKey(key="prompts", what="the parent's answers")),
            run.stage("prompts") as progress,
        ):
            place = (parent, workspace, compute_of(run.profile), progress)
            needs = [f"prompts {capability}".strip()]
            wanted = run.call(prompts_task, needs[0], wanted, *place, after=["parent"], limited=False)
    with exclusive(workspace, TaskKey(key="corpus", what="the corpus")), run.stage("corpus"):
        read = (wanted, workspace / parent.folder, parent.fingerprint, workspace, others, tuple(images))
        corpus: CorpusInfo = run.call(corpus_task, f"corpus {capability}".strip(), *read, after=needs, limited=False)
    return corpus.model_copy(update={"capability": capability})


def recording(run: Run, parent: ParentInfo, corpus: CorpusInfo) -> Recording:
    """The recording of a run."""
    return recording_of(run.profile, parent, corpus, compute_of(run.profile))


def record(run: Run, parent: ParentInfo, corpus: CorpusInfo) -> list[LayerRecord]:
    """Record every layer. A single worker takes one after the other, each from what the one before it left; several
    take their parts of the text through as many layers as there are workers, and then a layer each.
    """
    wanted, depth = recording(run, parent, corpus), open_parent(run.workspace / parent.folder).depth
    workers, records = run.profile.orchestration.workers, dict[int, LayerRecord]()
    with run.stage("record") as progress, StatesInUse(wanted, run.workspace) as states:
        for number, shard in enumerate(wanted.counted):
            for there in _in_waves(range(depth), workers):
                found = {layer: recorded(layer, wanted, run.workspace, number) for layer in there}
                missing = [layer for layer in there if found[layer] is None]
                needs = [f"record {there[0] - 1}" if there[0] else "corpus"]
                if workers > 1 and missing:
                    needs = _enter(run, missing, shard, states, needs)
                made = {layer: _record(run, layer, (wanted, number), layer in missing, needs) for layer in there}
                for layer in there:
                    records[layer] = found[layer] or made[layer].result()
                    progress(number * depth + layer + 1, len(wanted.counted) * depth)
                states.keep_only(there[-1:])
    clear(wanted, run.workspace)
    return list(records.values())


def _record(run: Run, layer: int, what: tuple[Recording, int], missing: bool, needs: Sequence[str]) -> Any:
    """A layer of a recording and the number of its shard, handed to the workers where it is missing."""
    call: Callable[..., Any] = run.submit if missing else run.call
    place = (worker_slot(run.profile), str(run.workspace), run.profile.orchestration.workers == 1)
    return call(record_task, f"record {layer}", layer, *what, *place, after=needs)


def _in_waves(layers: Sequence[int], workers: int) -> Iterator[Sequence[int]]:
    return (layers[first : first + workers] for first in range(0, len(layers), workers))


def _enter(run: Run, layers: Sequence[int], shard: Shard, states: StatesInUse, after: Sequence[str]) -> list[str]:
    """Write the states of a shard that enter some layers, all workers at a time; returns the names of what was made.

    They are made from the states of layers before that the run still has, which are not needed any more then.
    """
    states.take(layers)
    wanted = states.recording
    profile, place = run.profile, (worker_slot(run.profile), str(run.workspace))
    step = compute_of(profile).sequences(wanted.corpus.sequence_length)
    parts = parts_of(shard, profile.orchestration.workers, step)
    names = [f"states {layers[0]} {part.number}" for part in parts]
    submitted = zip(names, parts, strict=True)
    futures = [run.submit(enter_task, n, list(layers), part, wanted, *place, after=after) for n, part in submitted]
    for future in futures:
        future.result()
    states.keep_only(layers)
    return names


def distill_all(run: Run, parent: ParentInfo, corpus: CorpusInfo, records: Sequence[LayerRecord]) -> list[BlockRecord]:
    """BLD of the whole search space; a variant that fails is left out and named, the run goes on."""
    profile, reader = run.profile, open_parent(run.workspace / parent.folder)
    jobs = jobs_of(profile, recording(run, parent, corpus), records, reader)
    blocks = better_of(_distill(run, jobs, "distill"))
    if profile.bld.coupled:
        blocks += _distill(run, coupled_jobs(profile, jobs, blocks, reader), "coupled")
    return blocks


def cut(
    run: Run, parent: ParentInfo, corpus: CorpusInfo, records: Sequence[LayerRecord], rivals: Mapping[str, Architecture]
) -> list[BlockRecord]:
    """The blocks of the baseline minitron, if it is there: the parent's with their least active channels cut off.

    Nothing is fitted or trained.
    """
    if MINITRON not in rivals:
        return []
    profile, reader = run.profile, open_parent(run.workspace / parent.folder)
    widths = tuple({choice.bare.ffn for choice in rivals[MINITRON].layers} - {"parent"})
    as_cut = profile.bld.model_copy(update={"steps": 0, "tokens": None, "closed_form": False, "otherwise": ()})
    space = profile.search_space.model_copy(update={"attention": (), "ffn": widths})
    asked = profile.model_copy(update={"bld": as_cut, "search_space": space})
    return _distill(run, jobs_of(asked, recording(run, parent, corpus), records, reader), "cut")


def _distill(run: Run, jobs: Sequence[Job], name: str) -> list[BlockRecord]:
    """The library, not Prefect, knows which blocks are whole. It is asked before a task runs, and it has the last word
    after, since another run may have made a block meanwhile.

    Two runs on one workspace start from opposite ends, and each finds the other's half finished.
    """
    library, profile = BlockLibrary(run.workspace), run.profile
    found = {job.key: library.find(job.key) for job in jobs}
    missing = [job for job in jobs if found[job.key] is None]

    def handed_to(call: Callable[..., Any], job: Job, slot: WorkerSlot, *part: Any) -> Any:
        needs = [f"record {job.layer}", *(start.key for start in job.warm_start)]
        return call(distill_task, job.key, job, slot, str(run.workspace), *part, after=needs)

    for job in jobs:
        if found[job.key]:
            handed_to(run.call, job, worker_slot(profile))
        elif (library.folder / f"{job.key}.json").exists():
            say(f"{_named(job)}: the stored block is damaged or not whole, it is made again")
    with (
        at_work_in(run.workspace) as number,
        run.stage(name) as progress,
        closing(_waves(run, missing if number % 2 else missing[::-1])) as waves,
    ):
        done, total = 0, sum(len(job.recording.shards) for job in missing)
        for shard, wave in waves:
            last = shard == len(wave[0].recording.shards) - 1
            part = () if last and not shard else (shard, "" if last else f"-{shard}")
            slots = _slots(profile, wave)
            futures = {handed_to(run.submit, job, slots[job.layer], *part): job for job in wave}
            for future in as_completed(list(futures)):
                job, done = futures[future], done + 1
                made = library.find(job.key) or future.result()
                found[job.key] = made if isinstance(made, BlockRecord) else None
                progress(done, total, _named(job))
    return [block for job in jobs if (block := found[job.key])]


def _slots(profile: Profile, wave: Sequence[Job]) -> dict[int, WorkerSlot]:
    """The slot of each layer's variants. Where threads of this process train a layer for each device on a shard, a
    device has a layer to itself, and reads its states once.
    """
    slot, layers = worker_slot(profile), sorted({job.layer for job in wave})
    if wave[0].recording.kept or profile.orchestration.runner != "threads" or len(layers) < len(slot.devices):
        return dict.fromkeys(layers, slot)
    own = zip(layers, cycle(slot.devices), strict=False)
    return {layer: replace(slot, devices=(device,)) for layer, device in own}


def _waves(run: Run, jobs: Sequence[Job]) -> Generator[tuple[int, Sequence[Job]]]:
    """A shard, and the variants that are trained on it together: all of them where states are kept.

    Else those of a few layers, as many as there are workers. States of a shard are recorded before its variants are
    trained, and taken away after: no more of them lie on the disk.
    """
    if not jobs or jobs[0].recording.kept:
        yield from [(0, jobs)] if jobs else []
        return
    wanted = jobs[0].recording
    with StatesInUse(wanted, run.workspace) as states:
        for number, shard in enumerate(wanted.shards):
            behind = [job for job in jobs if progress_of(job, number, run.workspace) is None]
            for there in _in_waves(sorted({job.layer for job in behind}), run.profile.orchestration.workers):
                _enter(run, there, shard, states, [f"record {layer}" for layer in there])
                of_layers = ([job for job in behind if job.layer == layer] for layer in there)
                yield (
                    number,
                    [job for turn in zip_longest(*of_layers) for job in turn if job],
                )  # no device waits for another
                states.keep_only(there[-1:])  # the states of the next layers are made from the last ones
            states.keep_only(())
            clear(wanted, run.workspace)


def score_all(
    run: Run,
    parent: ParentInfo,
    corpus: CorpusInfo,
    records: Sequence[LayerRecord],
    blocks: Iterable[BlockRecord],
    capabilities: Sequence[CorpusInfo] = (),
    name: str = "score",
) -> list[Score]:
    """Replace-1-block scores of every block that did not fail, on the corpus and on the text of every capability."""
    scored = scoring.scoring_sets(run.profile, corpus, capabilities, records[-1])
    usable = [block for block in blocks if block.status != "failed"]
    missing = [
        (each, list(dict.fromkeys(block.layer for block in usable if each.stored(block, run.workspace) is None)))
        for each in scored
    ]

    def handed_to(call: Callable[..., Any], layer: int, shard: scoring.ScoringSet) -> Any:
        work = [(block, shard.sequences) for block in usable if block.layer == layer]
        values = (work, records[layer], shard, parent, worker_slot(run.profile), str(run.workspace))
        needs = [*(block.key for block, _ in work), f"record {layer}", f"record {len(records) - 1}"]
        return call(score_task, f"score {layer} {shard.capability}".strip(), *values, after=needs)

    for each, layers in missing:
        for layer in dict.fromkeys(block.layer for block in usable if block.layer not in layers):
            handed_to(run.call, layer, each)
    with run.stage(name) as progress:  # entered first: what is submitted computes at once
        futures = [
            (layer, handed_to(run.submit, layer, shard))
            for each, layers in missing
            for shard in each.shards(run.profile.record.shard_tokens)
            for layer in layers
        ]
        for done, (layer, future) in enumerate(futures, start=1):
            future.result()
            progress(done, len(futures), f"layer {layer}")
    return scoring.scores_of(usable, scored, run.workspace)


def measure(run: Run, parent: ParentInfo) -> CostTable:
    """Costs of every variant on the hardware target: measured, or modelled where the profile says so."""
    profile = run.profile
    if profile.hardware.engine == "roofline":
        return costs.modelled_for(profile, parent, run.workspace)
    asked = costs.CostRequest.of(profile, parent)
    base = _costs(run, asked)
    tables = {kind: _costs(run, asked.in_type(kind)) for kind in profile.search_space.precision}
    if not tables:
        return base
    with run.stage("measure") as progress:
        ratios = {
            kind: run.call(ratio_task, f"cost ratio {kind}", asked, kind, base, table, run.workspace, progress)
            for kind, table in tables.items()
        }
    types: dict[str, tuple[CostTable, typed_costs.TypeRatio]] = {
        kind: (table, ratios[kind]) for kind, table in tables.items()
    }
    return typed_costs.joined(base, types, asked.loads, typed_costs.is_tied(parent, run.workspace))


def _costs(run: Run, asked: costs.CostRequest) -> CostTable:
    """A stored table, or a new one."""
    stored = asked.stored(run.workspace)  # asked first: nobody waits for a device to read a table
    if stored is None:
        return _measured(run, asked)
    for part in asked.parts(open_parent(run.workspace / asked.parent.folder)):
        run.call(measure_task, f"cost {part.label}", part, lambda: None, after=["parent"], limited=False)
    return stored


def measure_again(run: Run, parent: ParentInfo) -> list[str]:
    """Measure costs even where they are stored; returns what has changed, in words. Modelled costs do not move."""
    if run.profile.hardware.engine == "roofline":
        return []
    base, moved = costs.CostRequest.of(run.profile, parent), list[str]()
    for asked in [base, *map(base.in_type, run.profile.search_space.precision)]:
        before, now = asked.stored(run.workspace), _measured(run, asked, again=True)
        moved += drift(before, now) if before else []
    return moved


def _measured(run: Run, asked: costs.CostRequest, again: bool = False) -> CostTable:
    """Each part is a task, whatever Prefect has kept of it: it is measured because no table is whole."""

    def hand(part: costs.Part, measure: Callable[[], None]) -> None:
        how: dict[str, Any] = {"after": ["parent"], "limited": False, "refresh": True}
        run.call(measure_task, f"cost {part.label}", part, measure, **how)

    with run.stage("measure") as progress:
        return costs.measure_costs(asked, run.workspace, progress, again, hand)


def cost_tasks(run: Run) -> list[str]:
    """What measured the costs, by the names of the task runs."""
    return [name for name in run.task_runs if name.startswith("cost ")]


def choose_child(
    run: Run, parent: ParentInfo, scores: Sequence[Score], table: CostTable, after: Iterable[str] = ()
) -> Chosen:
    """The MIP under the profile's budget: its optimum, and who races with it where several are to."""
    with run.stage("choose"):
        problem = with_most_tokens(problem_of(run.profile, scores, table))
        needs = [*after, *cost_tasks(run), *(name for name in run.task_runs if name.startswith("score "))]
        asked = (problem, run.profile.race.candidates, run.profile.race.min_different)
        found: list[Architecture] = run.call(choose_task, "choice", *asked, after=needs, limited=False)
    return runnable(run, parent, Chosen(problem=problem, near=tuple(found), scores=tuple(scores)))


def runnable(run: Run, parent: ParentInfo, chosen: Chosen) -> Chosen:
    """Those that the engine of the profile runs as whole models; raises PuzzleError where none is."""
    reader, race = open_parent(run.workspace / parent.folder), run.profile.race
    refusals = [refused_whole(run.profile, reader, one.layers) for one in chosen.near]
    found = tuple(one for one, why in zip(chosen.near, refusals, strict=True) if why is None)
    if not found:
        raise PuzzleError(f"{refusals[0]}, and the best child within the budget is one: ask for less of it.")
    if len(found) < race.candidates:
        say(f"race: no more than {len(found)} architectures within the budget differ in {race.min_different} layers")
    return replace(chosen, near=found)


def _found(name: str, problem: Problem, profile: Profile) -> Architecture:
    """What a simple search finds under the limits that the child was held to, or where it finds nothing, under those of
    the profile.
    """
    try:
        return find(name, problem, profile.seed)
    except InfeasibleBudget:
        if problem.within_score is not None:
            raise
        found = find(name, as_asked(problem, profile), profile.seed)
        say(f"baseline {name}: nothing keeps the limits that the child was held to; this one keeps the profile's")
        return found


def choose_baselines(run: Run, parent: ParentInfo, problem: Problem, child: Architecture) -> dict[str, Architecture]:
    """The simple searches under the same budget, their totals at the child's batch sizes; one that cannot keep the
    budget is left out and named.
    """
    batches = child.batches
    found, reader = dict[str, Architecture](), open_parent(run.workspace / parent.folder)
    for name in run.profile.evaluate.baselines:
        if name == MINITRON and run.profile.bld.tokens is not None:
            say("baseline minitron left out: with bld.tokens the states that its cuts are checked on are not kept")
            continue
        try:
            one = _found(name, problem, run.profile)
            if why := refused_whole(run.profile, reader, one.layers):
                raise PuzzleError(why)
            found[name] = predicted(problem, one.layers, name, batches, one.head)
        except PuzzleError as error:
            say(f"baseline {name} left out: {error}")
    return found
