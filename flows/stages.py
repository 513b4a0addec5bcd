"""The Prefect tasks: each wraps one plain function of this package, adds a name, a cache key, retries.

The cache key of a task is the content address of what it makes. Prefect's own record of a result is not trusted: the
files are asked first, and only what they lack becomes a task (`refresh_cache`); the rest is shown as `Cached`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE, CacheKeyFnPolicy
from prefect.futures import PrefectFuture
from prefect.tasks import exponential_backoff
from transformers.utils.logging import disable_progress_bar

from blocks.errors import PuzzleError
from blocks.library import BlockLibrary, digest_of
from blocks.records import (
    Architecture,
    BlockRecord,
    CorpusInfo,
    CostTable,
    LayerRecord,
    ParentInfo,
    Score,
)
from blocks.runtime import release_memory, set_threads
from flows.reuse import show_finished
from profiles.hardware import load_target
from profiles.schema import Profile
from tasks.distill.bld import Job, distill
from tasks.distill.jobs import coupled_jobs, jobs_of
from tasks.distill.record import open_parent, record_key, record_layer, recorded
from tasks.inputs.corpus import prepare_corpus
from tasks.inputs.corpus_sources import iterate_documents
from tasks.inputs.parent import prepare_parent
from tasks.inputs.space import check_search_space, measured_space
from tasks.measure import costs
from tasks.measure.roofline import modelled_costs, setting_of
from tasks.operating.artifacts import stage_bar
from tasks.operating.reach import check_servers
from tasks.operating.requirements import advice, check_machine
from tasks.operating.shared import store_used
from tasks.running.devices import device_of, sharing
from tasks.running.presence import at_work_in, prefect_home
from tasks.running.progress import say, shown
from tasks.running.retries import limits_of, told_in_time, told_when_prefect_is_away, worth_retrying
from tasks.running.servers import stop_orphaned_servers
from tasks.running.sharing import Piece, in_turn, made_once
from tasks.running.usage import noted
from tasks.running.workers import Seat, at_a_time, seat_of, seated
from tasks.score import scoring
from tasks.search.adaptive import Key, score_adaptively, told
from tasks.search.choose import choose
from tasks.search.totals import Problem, predicted, problem_of
from tasks.studies.peers import find


class Tell(Protocol):
    """How far a stage is."""

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """So many of so many, and what was done last."""


@contextmanager
def stage(name: str) -> Iterator[Tell]:
    """A stage on the console and in Prefect's UI, its time noted. What it freed is given back at its end, or the peaks
    of all stages would add up.
    """
    try:
        with device_of(name), noted(name), told_in_time(name), shown(name) as console, stage_bar(name) as bar:

            def tell(done: int, total: int, text: str = "") -> None:
                console(done, total, text)
                bar(done, total, text)

            yield tell
    finally:
        release_memory()


def task_of(name: str, run_name: str, key: Callable[[Any, dict[str, Any]], str] | None) -> Callable[[Any], Any]:
    """A task that is retried with back-off, and stored by `key` where there is one. It is made only when the files are
    not there, so what Prefect has stored of it is not taken.
    """
    return task(
        name=name,
        task_run_name=run_name,
        cache_policy=CacheKeyFnPolicy(cache_key_fn=key) if key else NO_CACHE,
        refresh_cache=key is not None,
        persist_result=key is not None,
        result_serializer="json",
        retries=2,
        retry_delay_seconds=exponential_backoff(backoff_factor=5),
        retry_jitter_factor=0.2,
        retry_condition_fn=worth_retrying,
    )


@task_of("record layer", "record layer {layer:02d}", lambda _, p: f"{p['key']}-{p['layer']}")
def record_task(layer: int, key: str, parent: ParentInfo, corpus: CorpusInfo, profile: Profile, workspace: str) -> Any:
    """See tasks.distill.record.record_layer."""
    piece = Piece(key=f"record-{key}-{layer}", what=f"the recording of layer {layer}")
    with seated(seat_of(profile), Path(workspace), piece) as device:
        return record_layer(layer, parent, corpus, profile.record, profile.bld.ridge, Path(workspace), device)


@task_of("distill", "distill layer {job.layer:02d} {job.subblock} {job.variant}", lambda _, p: p["job"].key)
def distill_task(job: Job, seat: Seat, workspace: str) -> Any:
    """See tasks.distill.bld.distill."""
    with seated(seat, Path(workspace), piece_of(job)) as device:
        return distill(job, Path(workspace), device)


@task_of("score layer", "score layer {layer.layer:02d}", lambda _, p: _scores_key(p["work"], p["scored"].length))
def score_task(
    work: list[scoring.Work],
    layer: LayerRecord,
    scored: scoring.ScoringSet,
    parent: ParentInfo,
    seat: Seat,
    workspace: str,
) -> Any:
    """See tasks.score.scoring.score_sequences."""
    piece = Piece(key=f"scores-{layer.boundary.sha256[:32]}", what=f"the scores of layer {layer.layer}")
    with seated(seat, Path(workspace), piece) as device:
        return scoring.score_sequences(work, layer, scored, parent, Path(workspace), device)


def _scores_key(work: Sequence[scoring.Work], length: int) -> str:
    return digest_of(scores=[(scoring.score_key(record, length), sequences) for record, sequences in work])


def prepare(profile: Profile, workspace: Path) -> tuple[ParentInfo, CorpusInfo]:
    """Parent and corpus, normalised and fingerprinted; both are remembered by content."""
    with made_once(workspace, Piece(key="parent", what="the parent")), stage("parent"):
        parent: ParentInfo = task_of("prepare parent", "prepare parent", None)(prepare_parent)(
            profile.parent, workspace, lambda: iterate_documents(profile.corpus)
        )
    check_search_space(profile, open_parent(workspace / parent.folder))
    with made_once(workspace, Piece(key="corpus", what="the corpus")), stage("corpus"):
        corpus: CorpusInfo = task_of("prepare corpus", "prepare corpus", None)(prepare_corpus)(
            profile.corpus, workspace / parent.folder, parent.fingerprint, workspace
        )
    return parent, corpus


def record(profile: Profile, parent: ParentInfo, corpus: CorpusInfo, workspace: Path) -> list[LayerRecord]:
    """Record every layer, one after the other: each starts from what the one before it left."""
    reader = open_parent(workspace / parent.folder)
    key = record_key(parent, corpus, profile.record, profile.bld.ridge)
    again = record_task.with_options(**limits_of(profile))
    records, there = [], []
    with stage("record") as tell:
        for layer in range(reader.depth):
            found = recorded(layer, key, workspace)
            there += [] if found is None else [layer]
            records.append(found or again.submit(layer, key, parent, corpus, profile, str(workspace)).result())
            tell(layer + 1, reader.depth)
        show_finished("record", there)
    for leftover in (workspace / "record" / key).glob("entering_*"):
        leftover.unlink(missing_ok=True)
    return records


def distill_all(
    profile: Profile, parent: ParentInfo, corpus: CorpusInfo, records: Sequence[LayerRecord], workspace: Path
) -> list[BlockRecord]:
    """BLD of the whole search space; a variant that fails is left out and named, the run goes on."""
    reader = open_parent(workspace / parent.folder)
    key = record_key(parent, corpus, profile.record, profile.bld.ridge)
    jobs = jobs_of(profile, parent, records, key, reader)
    blocks = _distill(jobs, "distill", profile, workspace)
    if profile.bld.coupled:
        blocks += _distill(coupled_jobs(profile, jobs, blocks, reader), "coupled", profile, workspace)
    return blocks


def piece_of(job: Job) -> Piece:
    """A variant, as what one run makes for all."""
    return Piece(key=f"block-{job.key}", what=f"layer {job.layer} {job.subblock} {job.variant}")


def _distill(jobs: Sequence[Job], name: str, profile: Profile, workspace: Path) -> list[BlockRecord]:
    """The library, not Prefect, knows which blocks are whole: it is asked before any task is made, and has the last
    word after, since another run may have made a block meanwhile.
    """
    library = BlockLibrary(workspace)
    found = {job.key: library.find(job.key) for job in jobs}
    show_finished(name, (block.layer for block in found.values() if block))
    missing = [job for job in jobs if found[job.key] is None]
    pieces = [piece_of(job) for job in missing]
    for job, piece in zip(missing, pieces, strict=True):
        if (library.folder / f"{job.key}.json").exists():
            say(f"{piece.what}: the stored block is damaged or not whole, it is made again")
    again = distill_task.with_options(**limits_of(profile))

    def submit(index: int) -> PrefectFuture[Any]:
        return again.submit(missing[index], seat_of(profile), str(workspace))

    with stage(name) as tell:
        made = in_turn(pieces, submit, workspace, at_a_time(profile))
        for done, (index, future) in enumerate(made, start=1):
            key = missing[index].key
            found[key] = library.find(key) or future.result()
            tell(done, len(missing), pieces[index].what)
    return [block for job in jobs if (block := found[job.key])]


def score_all(
    profile: Profile,
    parent: ParentInfo,
    corpus: CorpusInfo,
    records: Sequence[LayerRecord],
    blocks: Iterable[BlockRecord],
    costs: CostTable,
    workspace: Path,
) -> list[Score]:
    """Replace-1-block scores of every block that did not fail; `costs` matter to adaptive scoring alone."""
    settings, again = profile.scoring, score_task.with_options(**limits_of(profile))
    length = settings.tokens_per_sequence or corpus.sequence_length
    scored = scoring.ScoringSet(corpus=corpus, last=records[-1], count=settings.sequences, length=length)
    usable: dict[Key, BlockRecord] = {
        (block.layer, block.subblock, block.variant): block for block in blocks if block.status != "failed"
    }

    def score(wanted: Mapping[Key, scoring.Sequences]) -> dict[Key, Score]:
        stored = {key: scoring.stored_score(usable[key], wanted[key], length, workspace) for key in wanted}
        show_finished("score", (score.layer for score in stored.values() if score))
        by_layer: dict[int, list[scoring.Work]] = {}
        for key, sequences in wanted.items():
            if stored[key] is None:
                by_layer.setdefault(key[0], []).append((usable[key], sequences))
        with stage("score") as tell:  # entered first: what is submitted computes at once
            futures = [
                again.submit(work, records[layer], scored, parent, seat_of(profile), str(workspace))
                for layer, work in by_layer.items()
            ]
            for done, (layer, future) in enumerate(zip(by_layer, futures, strict=True), start=1):
                stored |= {(one.layer, one.subblock, one.variant): one for one in future.result()}
                tell(done, len(futures), f"layer {layer}")
        return {key: score for key, score in stored.items() if score}

    if settings.adaptive is None:
        return list(score(dict.fromkeys(usable, tuple(range(scored.count)))).values())
    order = tuple(np.random.default_rng(profile.seed).permutation(scored.count).tolist())
    found = score_adaptively(
        list(usable),
        lambda scores: problem_of(profile, scores, costs),
        settings.adaptive,
        scored.count,
        lambda depths: score({key: order[:depth] for key, depth in depths.items()}),
        lambda look: say(told(look)),
    )
    return list(found.scores)


def measure(profile: Profile, parent: ParentInfo, workspace: Path) -> CostTable:
    """Costs of every variant on the hardware target: measured, or modelled where the profile says so."""
    if profile.hardware.engine == "roofline":
        reader = open_parent(workspace / parent.folder)
        setting = setting_of(profile.hardware, load_target(profile.hardware.name), reader)
        return modelled_costs(reader, measured_space(profile), profile.scenarios, setting)
    stored = costs.costs_of(profile, parent, workspace)  # asked first: nobody waits for a device to read a table
    table: CostTable = stored or _timed(costs.measure_costs, profile, parent, workspace)
    return table


def measure_again(profile: Profile, parent: ParentInfo, workspace: Path) -> list[str]:
    """See tasks.measure.costs.measure_again; modelled costs do not move."""
    modelled = profile.hardware.engine == "roofline"
    return [] if modelled else _timed(costs.measure_again, profile, parent, workspace)


def _timed(function: Callable[..., Any], profile: Profile, parent: ParentInfo, workspace: Path) -> Any:
    with stage("measure") as tell:
        return task_of("measure costs", "measure costs", None)(function)(
            parent,
            measured_space(profile),
            profile.scenarios,
            profile.hardware,
            profile.measure,
            workspace,
            lambda done, total: tell(done, total),
        )


def choose_child(profile: Profile, scores: Sequence[Score], table: CostTable) -> tuple[Problem, Architecture]:
    """The MIP under the profile's budget."""
    with stage("choose"):
        problem = problem_of(profile, scores, table)
        architecture: Architecture = task_of("choose", "choose", None)(choose)(problem)
    return problem, architecture


def choose_baselines(profile: Profile, problem: Problem, child: Architecture) -> dict[str, Architecture]:
    """The simple searches under the same budget, their totals at the child's batch sizes; one that cannot keep the
    budget is left out and named.
    """
    batches = tuple(totals.batch_size for totals in child.totals)
    found: dict[str, Architecture] = {}
    for name in profile.evaluate.baselines:
        try:
            layers = find(name, problem, profile.seed).layers
            found[name] = predicted(problem, layers, name, batches)
        except PuzzleError as error:
            say(f"baseline {name} left out: {error}")
    return found


@contextmanager
def process_of(profile: Profile, workspace: Path) -> Iterator[None]:
    """This process at work in a workspace, beside others: threads set, leftovers of killed runs cleared, its stages in
    turn with those of other runs on the device.
    """
    check_machine(profile)
    check_servers()
    for line in advice(profile):
        say(line)
    with at_work_in(workspace) as number, sharing(profile), told_when_prefect_is_away():
        set_threads(profile.hardware.threads)
        disable_progress_bar()  # transformers' own bars: ours tell the stage
        stop_orphaned_servers(prefect_home(workspace, number))
        if number > 1:
            say(f"another run is at work in {workspace}: what both need is made once")
        with store_used(workspace, profile.store):
            yield
