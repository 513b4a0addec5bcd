"""What a run will take and can give, from the profile and the parent's config alone: no weights, no Prefect, and of
data only how many images are named.

Work per stage is counted in tasks/planning/effort.py; costs of children come from the roofline, of the hardware target
or of this machine as it was measured. What the budget allows at best is a MIP of its own: the child that keeps most
parameters, and the fastest of the space. Which of them is *good* only the search can tell.
"""

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from blocks.errors import InfeasibleBudget
from blocks.kinds import kind_of
from blocks.parent import Parent
from blocks.records import SUBBLOCKS, Architecture, LayerChoice, Score, Subblock, Totals, Value
from blocks.resources import weight_bytes
from blocks.typed_labels import bare, typed
from profiles.hardware import ARCHITECTURES, HardwareTarget, load_target
from profiles.schema import MINITRON, ParentAnswersSource, ParentSource, Profile
from tasks.inputs.parent import write_config
from tasks.inputs.space import check_search_space, layers_of, left_out
from tasks.measure.roofline import Setting, setting_of
from tasks.planning import effort, number_types
from tasks.planning.effort import Shape, Work, shape_of
from tasks.planning.engines import UNKNOWN, measure_work, throughput_work
from tasks.planning.machine import Rates, rates_of, target_of
from tasks.planning.memory import Need, layers_held, needs_of, no_room, whole_types_need
from tasks.search.choose import choose
from tasks.search.totals import Batches, Problem, batch_choices, make_problem, totals_of

PROCESS_BYTES = 1 << 30  # this program with torch, transformers, MLflow and Prefect, before any tensor
LIKE = {
    "shards": "record",
    "coupled": "distill",
    "GKD best baseline": "GKD child",
    "answers": "evaluate",
    "hold": "evaluate",
    "hold speed": "throughput",
    "questions": "evaluate",
}
STATE_BYTES = 40 << 20  # Prefect's and MLflow's databases, logs, reports


class StagePlan(Value):
    """One stage: tasks, tokens through layers or head, FLOPs, seconds on an idle machine; None where they are unknown.

    devices: that share it. device_bytes: on each of them at the peak; None where the stage uses none.
    """

    name: str
    tasks: int
    tokens: int
    flops: float | None
    devices: int
    device_bytes: int | None
    seconds: float | None


class ChildPlan(Value):
    """A child that is possible: what it was asked for, its totals and the parent's at the same batch sizes."""

    name: str
    parameters: int
    layers: tuple[LayerChoice, ...]
    totals: tuple[Totals, ...]
    parent_totals: tuple[Totals, ...]


class Plan(Value):
    """All of it. seconds: of the stages whose time is known; unknown: why it is not for the others, "" when it is.

    disk_bytes, memory_bytes: what the workspace holds at the end, the process at its peak. shards: that variants are
    trained on one after another; shard_bytes: of hidden states on the disk meanwhile, 0 where they are kept (and in
    disk_bytes). utilisation: of the peak, where it is assumed and not measured. device_bytes: what a device has, where
    that is known. infeasible, no_room: why the budget, or a stage, asks too much; "" where it does not. left_out:
    variants that are not tried, and why.
    """

    profile: str
    machine: str
    machine_measured: bool
    machine_loaded: bool
    machine_at: str
    threads: int
    devices: int
    device_bytes: int | None
    utilisation: str
    costs_of: dict[str, str]
    parent_parameters: int
    active_parameters: int
    layers: int
    layers_searched: int
    attention_variants: int
    ffn_variants: int
    architectures_log10: float
    blocks: int
    tasks: int
    tokens: int
    stages: tuple[StagePlan, ...]
    seconds: float
    core_hours: float
    disk_bytes: int
    shards: int
    shard_bytes: int
    memory_bytes: int
    money: float | None
    unknown: str
    children: tuple[ChildPlan, ...]
    infeasible: str = ""
    no_room: str = ""
    left_out: tuple[str, ...] = ()


def config_parent(source: ParentSource) -> Parent:
    """A parent known by its config; asking it for weights fails. Raises ParentError.

    The configs in profiles/architectures are those of parents on the hub that are not free to be read by anybody.
    """
    with tempfile.TemporaryDirectory() as folder:
        shipped = ARCHITECTURES / f"{getattr(source, 'hub_id', '').replace('/', '--')}.json"
        if shipped.is_file():
            shutil.copyfile(shipped, Path(folder) / "config.json")
        else:
            write_config(source, Path(folder))
        return Parent(Path(folder))


def plan_of(profile: Profile, parent: Parent, rates: Rates, price_per_hour: float | None = None) -> Plan:
    """The plan of a profile on a machine with these rates. Raises what the search space or hardware make invalid."""
    check_search_space(profile, parent)
    shape = shape_of(profile, parent)
    searched = layers_of(profile, parent)
    modelled = profile.hardware.engine == "roofline"
    setting = setting_of(profile.hardware, _serving(profile, rates), parent)
    problem = bounds_problem(shape, setting, searched)
    children, infeasible = children_of(problem)
    share = share_of(children, shape)
    needs = needs_of(shape, share, rates.memory)
    stages = stages_of(shape, searched, children[0], share, rates, None if modelled else setting, needs)
    seconds = sum(stage.seconds or 0.0 for stage in stages)
    options = [len(shape.variants[part]) for part in SUBBLOCKS]
    counts, coupled = effort.counts_of(shape, searched), effort.coupled_work(shape, len(searched))[1]
    pairs = [(counts[layer, "attention"] + 1) * (counts[layer, "ffn"] + 1) for layer in searched]
    return Plan(
        profile=profile.name,
        machine=rates.name,
        machine_measured=rates.measured,
        machine_loaded=rates.loaded,
        machine_at=rates.at,
        threads=rates.threads,
        devices=shape.processes,
        device_bytes=None if rates.memory is None else int(rates.memory),
        utilisation=rates.utilisation,
        costs_of=problem.costs.hardware,
        parent_parameters=parent.depth * shape.layer_parameters + shape.outside_parameters,
        active_parameters=parent.depth * shape.active_parameters + shape.outside_parameters,
        layers=parent.depth,
        layers_searched=len(searched),
        left_out=left_out(profile, parent),
        attention_variants=options[0],
        ffn_variants=options[1],
        architectures_log10=sum(math.log10(pair + coupled // len(searched)) for pair in pairs),
        blocks=sum(counts.values()) + coupled,
        tasks=sum(stage.tasks for stage in stages),
        tokens=sum(stage.tokens for stage in stages),
        stages=tuple(stages),
        seconds=seconds,
        core_hours=seconds * rates.threads * shape.devices / 3600,
        disk_bytes=disk_bytes(shape, len(searched), share),
        shards=len(shape.shards),
        shard_bytes=shard_bytes(shape),
        memory_bytes=memory_bytes(shape, share, needs),
        money=None if price_per_hour is None else seconds / 3600 * price_per_hour,
        unknown=unknown_of(stages, profile.hardware.engine),
        children=tuple(children),
        infeasible=infeasible,
        no_room=no_room(needs, rates.memory),
    )


def unknown_of(stages: Sequence[StagePlan], engine: str) -> str:
    """Why the time of some stages is not known, "" where it is of all."""
    lacking = {stage.name for stage in stages if stage.seconds is None}
    reasons = ["the images are not here to be counted"] if "images" in lacking else []
    reasons += [UNKNOWN[engine]] if lacking - {"images"} else []
    return "; ".join(reasons)


def machine_rates(profile: Profile, on: str | None) -> Rates | None:
    """Rates of the device that the run is planned on; None: it is this machine, to be measured.

    on: name of a hardware target, or "this-machine"; the target the profile names with engine roofline when None.
    """
    name = on or (profile.hardware.name if profile.hardware.engine == "roofline" else "this-machine")
    if name == "this-machine":
        return None
    target: HardwareTarget = load_target(name)
    precision = profile.hardware.precision
    computed, machines = profile.compute_precision, profile.orchestration.machines
    rates = rates_of(target, precision if precision in target.peak_tflops else "float32", computed, machines)
    return replace(rates, name=name)  # by which it is found again: a target of one's own is found by its file


def _serving(profile: Profile, rates: Rates) -> HardwareTarget:
    """What the children are served on: the profile's target, or, where costs will be measured, the run's machine."""
    if profile.hardware.engine == "roofline":
        return load_target(profile.hardware.name)
    return target_of(rates, profile.hardware.precision) if rates.measured else load_target(rates.name)


def bounds_problem(shape: Shape, setting: Setting, searched: Sequence[int]) -> Problem:
    """The profile's problem with modelled costs, and in the place of scores the share of parameters a variant drops.

    A type of number drops none.
    """
    profile, space = shape.profile, shape.profile.search_space
    table = number_types.costs_with_types(shape, setting)
    first = (profile.scenarios[0].name, profile.scenarios[0].batch_sizes[0])
    sizes = {(c.subblock, c.variant): c.parameters for c in table.costs if (c.scenario, c.batch_size) == first}
    whole = table.num_hidden_layers * sum(sizes[part, "parent"] for part in SUBBLOCKS)
    scores = [
        _score(layer, part, label, (sizes[part, "parent"] - sizes[part, variant.label]) / whole)
        for layer in searched
        for part in SUBBLOCKS
        for variant in shape.variants[part]
        if variant.label == "parent" or shape.runs(layer, variant)
        for label in dict.fromkeys(typed(variant.label, kind) for kind in ("", *space.precision))
    ]
    scores += [_score(0, "head", typed("head", kind), 0.0) for kind in space.head_types]
    return make_problem(scores, table, profile.budget, profile.scenarios, profile.search)


def _score(layer: int, part: Subblock | Literal["head"], label: str, dropped: float) -> Score:
    return Score(
        layer=layer,
        subblock=part,
        variant=label,
        kl=dropped,
        kl_se=0.0,
        lm_loss=dropped,
        lm_loss_se=0.0,
        tokens=0,
        kl_per_sequence=(dropped,),
        lm_loss_per_sequence=(dropped,),
    )


def children_of(problem: Problem) -> tuple[list[ChildPlan], str]:
    """The child with most parameters within the budget and the fastest of the space; why there is none, else "".

    Parameters and memory are exact; times are the model's. Layers are alike here, so very many choices come close to
    filling a budget, and the search for the largest child stops early: a child that drops 0.5 % less may exist.
    """
    # no score is known yet, so nobody can tell which child is the fastest within one
    quick = problem.search.model_copy(update={"gap": max(problem.search.gap, 5e-3), "fastest_within_score": None})
    batches = tuple(max(scenario.batch_sizes) for scenario in problem.scenarios)
    found = [_child("fastest of the space", problem, fastest_of(problem), batches, fastest_head(problem))]
    try:
        best: Architecture = choose(replace(problem, search=quick))
    except InfeasibleBudget as error:
        return found, str(error)
    at = best.batches
    return [_child("largest within the budget", problem, best.layers, at, best.head), *found], ""


def fastest_of(problem: Problem) -> tuple[LayerChoice, ...]:
    """Every searched subblock by the variant with the least runtime, summed over the scenarios."""
    at = batch_choices(problem)[0]
    seconds: dict[tuple[str, str], float] = {}
    for scenario, batch in zip(problem.scenarios, at, strict=True):
        for cost in problem.costs.costs:
            if (cost.scenario, cost.batch_size) == (scenario.name, batch):
                runtime = cost.prefill_seconds + scenario.generated_tokens * cost.decode_seconds_per_token
                seconds[cost.subblock, cost.variant] = seconds.get((cost.subblock, cost.variant), 0.0) + runtime
    layers = []
    for layer in range(problem.costs.num_hidden_layers):
        parts: dict[Subblock, str] = dict.fromkeys(SUBBLOCKS, "parent")
        for part in SUBBLOCKS:
            options = {label: seconds[part, label] for label in problem.score_table.get((layer, part), {})}
            parts[part] = min(options, key=options.__getitem__, default="parent")
        layers.append(LayerChoice(attention=parts["attention"], ffn=parts["ffn"]))
    return tuple(layers)


def fastest_head(problem: Problem) -> str:
    """The type of embedding and head with the least time in a decode step, summed over the scenarios."""
    steps = dict.fromkeys(problem.heads, 0.0)
    for part in problem.costs.non_block:
        steps[part.head] += part.decode_seconds_per_token
    return min(steps, key=steps.__getitem__)


def _child(name: str, problem: Problem, layers: Sequence[LayerChoice], at: Batches, head: str) -> ChildPlan:
    totals = totals_of(problem, layers, at, head)
    return ChildPlan(
        name=name,
        parameters=totals[0].parameters,
        layers=tuple(layers),
        totals=totals,
        parent_totals=totals_of(problem, problem.parent, at),
    )


def share_of(children: Sequence[ChildPlan], shape: Shape) -> float:
    """Share of the layers' parameters that a child of this budget keeps at most."""
    layers = shape.depth * shape.layer_parameters
    return max(child.parameters - shape.outside_parameters for child in children) / layers


def stages_of(
    shape: Shape,
    searched: list[int],
    child: ChildPlan,
    share: float,
    rates: Rates,
    serving: Setting | None,
    needs: Sequence[Need],
) -> list[StagePlan]:
    """Every stage that prints itself, in order. serving: where costs and speed are measured; None when modelled.

    A device records a layer, and its part of each shard. All devices train and score variants, and share GKD.
    """
    profile, length = shape.profile, shape.length
    jobs = sum(effort.counts_of(shape, searched).values())
    coupled, pairs = effort.coupled_work(shape, len(searched))
    layers = child_layers(child, shape)
    rivals = len(profile.evaluate.baselines)
    distilled, files = distilled_models(profile), files_written(profile)
    judged = number_types.file_work(shape, number_types.types_of_child(profile)) * effort.race_looks(profile)
    others = max(distilled - 1, 0)
    record, corpus, gkd = profile.record, profile.corpus, profile.gkd
    sequences = record.statistics_sequences + record.validation_sequences
    own = {split: effort.capability_tokens(shape, split) for split in ("train", "validation", "test")}
    tested, items = profile.evaluate.sequences * length + own["test"], effort.benchmark_tokens(shape)[0]
    packed = (corpus.train_sequences + corpus.validation_sequences + corpus.test_sequences) * length + sum(own.values())
    scored = sum(sequences * tokens for sequences, tokens in effort.scored_texts(profile, length))
    stepped = effort.stepped_tokens(shape, gkd.steps)
    types, wholes = len(profile.search_space.precision), len(number_types.whole_types(profile))
    shares = [1.0, *[share] * (1 + rivals), *[1.0] * types]
    small = number_types.types_of_child(profile)[0]
    served = list(zip(shares, ["", *[small] * (1 + rivals), *profile.search_space.precision], strict=True))
    raced, rest = effort.race_shares(profile)
    alone = effort.gkd_work(shape, share, layers)
    spoken = len(profile.evaluate.prompts) * profile.evaluate.answer_tokens
    continued = profile.evaluate.loop_prompts * profile.evaluate.answer_tokens
    heard = effort.all_heard(shape, share)
    questions = effort.questions_tokens(profile) if profile.evaluate.answered_questions else []
    found = len(questions) * profile.evaluate.answered_questions * effort.QUESTION_TOKENS
    asked = sum(isinstance(source, ParentAnswersSource) for source in effort.asked_sources(profile))
    asked_tokens = effort.prompt_tokens(shape)
    entering, waves = effort.entering_work(shape), math.ceil(shape.depth / shape.workers)
    used = dict.fromkeys(("distill", "coupled", "score", "race", "GKD child", "GKD best baseline"), shape.devices)
    used |= {"record": shape.layers_at_once, "shards": shape.parts}
    bytes_of = {need.stage: need.bytes for need in needs}
    looks = effort.looked_at(profile) * profile.race.candidates if serving and profile.limits_time else 0
    rows = [
        ("parent", 1, 0, effort.parent_work(shape)),
        ("prompts", asked, asked_tokens, effort.prompts_work(shape)),
        (
            "corpus",
            1 + len(profile.own_capabilities),
            packed,
            Work(fixed=packed / effort.CORPUS_TOKENS_PER_SECOND + effort.TASK_SECONDS),
        ),
        ("images", 1 if shape.tower else 0, 0, effort.images_work(shape)),
        ("record", shape.depth, sequences * length * shape.depth, effort.record_work(shape)),
        ("shards", waves * shape.parts * len(shape.shards) if entering.flops else 0, 0, entering),
        ("distill", jobs, _bld_tokens(shape, len(searched)), effort.distill_work(shape, len(searched))),
        ("coupled", pairs, pairs * profile.trained_steps * profile.bld.batch_sequences * length, coupled),
        ("score", len(searched), scored * (jobs + pairs), effort.score_work(shape, searched)),
        ("measure", 1, 0, measure_work(shape, serving)),
        ("score whole parents", wholes, 2 * scored * wholes, number_types.whole_types_work(shape)),
        (
            "score types",
            len(searched) if types else 0,
            scored * len(SUBBLOCKS) * len(number_types.by_blocks(profile.search_space.precision)) * len(searched),
            number_types.block_types_work(shape, searched),
        ),
        ("choose", 1, 0, Work(fixed=2.0)),
        ("hold speed", looks, 0, throughput_work(shape, serving, served[:2] * looks)),
        ("hold", *effort.floors_work(shape, share)),
        ("GKD parent", min(distilled, 1), stepped + effort.watched_tokens(shape), effort.teacher_work(shape)),
        (
            "race",
            profile.race.candidates if raced else 0,
            round(raced * stepped),
            alone * raced + (judged if files else Work()),
        ),
        ("write files", files, 0, number_types.files_work(shape, share, layers, distilled)),
        (
            "evaluate",
            len(shares),
            tested * len(shares) + items * len(effort.asked_benchmarks(shape, shares, first=True)),
            effort.evaluate_work(shape, shares, first=True),
        ),
        ("GKD child", min(distilled, 1), round(rest * stepped), alone * rest),
        ("GKD best baseline", others, stepped * others, effort.gkd_work(shape, share) * others),
        (
            "evaluate",
            distilled,
            (tested + items) * distilled,
            effort.evaluate_work(shape, [share] * distilled, first=False),
        ),
        ("throughput", 1 if serving else 0, 0, throughput_work(shape, serving, served)),
        ("answers", 2 if spoken else 0, 2 * spoken, effort.answers_work(shape, share)),
        ("loops", len(heard) if continued else 0, len(heard) * continued, effort.loops_work(shape, share)),
        (
            "questions",
            len(heard) * len(questions),
            len(heard) * (sum(questions) + found),
            effort.questions_work(shape, share),
        ),
    ]
    said = {
        "answers": (spoken, [1.0, share]),
        "questions": (found, heard),
        "loops": (effort.looping_steps(profile), heard),
    }
    visits = visiting_seconds(shape, shares, tested + items, said, rates.memory)
    return [
        StagePlan(
            name=name,
            tasks=tasks,
            tokens=tokens,
            flops=None if work is None else work.flops,
            devices=used.get(name, 1),
            device_bytes=bytes_of.get(LIKE.get(name, name)),
            seconds=None if work is None else work.over(used.get(name, 1)).seconds(rates) + visits.get(name, 0.0),
        )
        for name, tasks, tokens, work in rows
        if tasks
    ]


def visiting_seconds(
    shape: Shape, shares: Sequence[float], tested: int, spoken: dict[str, tuple[int, list[float]]], room: float | None
) -> dict[str, float]:
    """Where whole models have no room on a device, their layers come to it for each pass, and go again."""
    if shape.on_cpu or room is None or layers_held(shape, None) < room / 2:
        return {}
    one = 2 * shape.size * shape.depth * shape.layer_parameters / effort.VISIT_BYTES_PER_SECOND
    passes = math.ceil(tested / shape.at_once)
    watched = math.ceil(effort.watched_tokens(shape) / shape.at_once)
    return {
        "evaluate": one * passes * sum(shares),
        **{name: one * tokens * sum(heard) for name, (tokens, heard) in spoken.items()},
        "GKD parent": one * watched,
    }


def child_layers(child: ChildPlan, shape: Shape) -> float:
    """The parent's layers that have as many FLOPs as a child's."""
    flops = {(part, v.label): shape.flops(v) for part in SUBBLOCKS for v in shape.variants[part]}
    return (
        sum(flops[part, bare(getattr(choice, part))] for choice in child.layers for part in SUBBLOCKS) / shape.layer()
    )


def _bld_tokens(shape: Shape, layers: int) -> int:
    """Train tokens of all variants that are trained, each once: what the block records add up to."""
    trained = [one for variants in shape.variants.values() for one in variants if kind_of(one).trainable]
    steps = sum(shape.profile.bld_of(one.label).steps for one in trained)
    return layers * steps * shape.profile.bld.batch_sequences * shape.length


def disk_bytes(shape: Shape, layers: int, share: float) -> int:
    """What the workspace holds at the end."""
    record, profile = shape.profile.record, shape.profile
    kept = profile.trained_sequences + record.validation_sequences if effort.states_are_kept(shape) else 0
    total = effort.model_bytes(shape) + effort.table_bytes(shape)
    total += shape.depth * (shape.states(kept) + effort.statistics_bytes(shape))
    total += (
        layers
        * effort.FLOAT
        * sum(shape.parameters(v) for part in SUBBLOCKS for v in shape.variants[part][1:] if v.kind != "no_op")
    )
    if distilled := distilled_models(profile):
        total += effort.teacher_bytes(shape)
        total += distilled * share * shape.depth * shape.layer_parameters * effort.FLOAT
        total += (
            distilled * (profile.gkd.rounded_steps > 0) * share * shape.depth * shape.layer_parameters * effort.FLOAT
        )
    return int(
        total + number_types.files_bytes(shape, share, distilled) + effort.model_bytes(shape, share) + STATE_BYTES
    )


def distilled_models(profile: Profile) -> int:
    """How many models have a GKD, at most: the child, the best baseline, and minitron."""
    named = profile.evaluate.baselines
    rivals = (1 if named and profile.evaluate.distill_best_baseline else 0) + (MINITRON in named)
    return 1 + rivals if profile.gkd.steps else 0


def files_written(profile: Profile) -> int:
    """How many GGUF files models are judged by: child, baselines and parents in types, and what was distilled anew."""
    before = len(number_types.types_of_files(profile))
    return before + distilled_models(profile) if before else 0


def shard_bytes(shape: Shape) -> int:
    """Hidden states of a shard, on the disk for as many layers as are trained at a time and the one behind them."""
    if effort.states_are_kept(shape):
        return 0
    layers = min(shape.depth, shape.workers + 1)
    return layers * shape.states(max(shape.shards) + shape.held_out)


def memory_bytes(shape: Shape, share: float, needs: Sequence[Need]) -> int:
    """The most memory that a machine needs at one time, without the program itself.

    It holds shards of activations and whole models that are being made; on a CPU, what the stages compute with too.
    share: how much of the layers' parameters a child keeps.
    """
    profile, models = shape.profile, 2 + len(shape.profile.evaluate.baselines)
    served = weight_bytes(profile.hardware.precision) / effort.FLOAT
    throughput = served * (effort.model_bytes(shape) + (models - 1) * effort.model_bytes(shape, share))
    recorded = profile.record.statistics_sequences + profile.record.validation_sequences
    recorded = min(recorded, max(1, profile.record.shard_tokens // shape.length))
    workers = 1 if shape.on_cpu else len(profile.devices)
    shard = max(shape.shards) + shape.held_out
    at_once = {need.stage: need.bytes * shape.on_cpu for need in needs}
    if profile.search_space.precision:
        at_once["score whole parents"] = whole_types_need(shape).bytes
    if shape.tower:
        at_once["images"] += effort.table_bytes(shape)  # whole before it is written
    at_once["record"] += 2 * shape.states(recorded) * workers
    at_once["distill"] += 3 * shape.states(shard) * workers  # what enters a layer, its attention's and its FFN's output
    at_once["throughput"] = int(throughput) if profile.hardware.engine != "roofline" else 0
    # what the parent says of the test text, and its head, wait for the models after GKD
    waiting = effort.FLOAT * shape.hidden * (shape.vocabulary + profile.evaluate.sequences * shape.length)
    for name in {"GKD child", "write files"} & set(at_once):  # the first process writes the trained weights whole
        at_once[name] += int(waiting + share * shape.depth * shape.layer_parameters * effort.FLOAT)
    return int(PROCESS_BYTES * workers + max(at_once.values()))
