"""Blockwise local distillation (Puzzle, section 3): one variant is trained to do what the parent's subblock does.

First a closed-form ridge fit, then AdamW steps on loss = MSE(o_parent, o_variant) / MSE(o_parent, 0), on the parent's
recorded activations. Decoupled BLD trains one subblock at a time. Coupled BLD trains attention and FFN of one
layer together; the output is then what the whole layer adds to the residual.

Activations come in shards (tasks/distill/record.py). A variant goes on from its state after the shard before: weights,
AdamW's moments, step. That state is stored, so a killed run loses one shard of one variant at most.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from blocks.compute import Compute
from blocks.errors import DamagedBlock
from blocks.export_code.modeling_decilm import DeciLMDecoderLayer
from blocks.fit import FitContext
from blocks.kinds import kind_of, parse_label
from blocks.library import BlockLibrary, digest_of, keep, read_tensors, remember, write_tensors
from blocks.parent import Parent
from blocks.records import SUBBLOCKS, BlockRecord, CorpusInfo, LayerChoice, LayerRecord, Ref, Subblock, Value
from blocks.runtime import kept_per_device
from blocks.subblock import load_subblock, run_subblock, subblock_state
from profiles.schema import BLD
from tasks.distill.record import Part, Recording, Shard, StatesInUse, enter, entered, open_parent, read_states
from tasks.inputs.corpus import fit_weights_of
from tasks.running.memory import Parts

VERSION = 2
RISE = 1.05  # the loss rises when the held-out loss after the steps exceeds this multiple of the one before them
# fields of BLD that every key has; those of the second stage are told by the jobs that there are
KEYED = ("steps", "batch_sequences", "learning_rate", "ridge", "closed_form", "max_attempts")
SECOND_STAGE = ("coupled", "coupled_attention", "coupled_ffn")


class Job(Value):
    """One distillation: everything that its result depends on, and nothing else, such as paths or the budget."""

    recording: Recording
    record: LayerRecord
    layer: int
    subblock: Subblock | Literal["block"]
    variant: str
    settings: BLD
    seed: int
    warm_start: tuple[BlockRecord, ...] = ()

    @property
    def key(self) -> str:
        """Content address of the result in the block library."""
        settings = self.settings.keyed(KEYED)
        return digest_of(
            parent=self.recording.parent.fingerprint,
            record=self.recording.key,
            layer=self.layer,
            subblock=self.subblock,
            variant=self.variant,
            settings={name: value for name, value in settings.items() if name not in SECOND_STAGE},
            seed=self.seed,
            warm_start=[record.key for record in self.warm_start],
            version=VERSION,
            **({"closed_form": "weighted"} if self.recording.corpus.weighted else {}),  # older blocks' was not
        )

    @property
    def choice(self) -> LayerChoice:
        """The variant as a layer. In decoupled BLD the other subblock is left out."""
        return LayerChoice.only(self.subblock, self.variant)

    @property
    def parts(self) -> tuple[Subblock, ...]:
        """The subblocks that are trained."""
        return SUBBLOCKS if self.subblock == "block" else (self.subblock,)

    def steps_of(self, number: int) -> range:
        """The training steps that belong to a shard."""
        whole, (first, last) = self.recording.trained, self.recording.shards[number].train
        return range(self.settings.steps * first // whole, self.settings.steps * last // whole)


class State(Value):
    """A variant between two shards. weights: of the variant, and AdamW's moments. losses: held-out, on the way.

    rate: the learning rate, which attempts that failed have lowered.
    """

    shards: int
    weights: Ref
    rate: float
    attempts: int
    losses: dict[str, float]
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, kw_only=True)
class LayerData:
    """A shard of one layer's activations (S, T, D) on the host: what enters the layer, and what the parent's attention
    and FFN put out. The keys of `states` are (split, name). weights: of tokens (S, T), by split, where they have some.
    """

    module: DeciLMDecoderLayer
    context: dict[str, Any]
    statistics: dict[str, Tensor]
    states: dict[tuple[str, str], Tensor]
    weights: dict[str, Tensor]
    compute: Compute

    def pairs(self, job: Job, split: str, rows: Sequence[int] | slice) -> tuple[Tensor, Tensor]:
        """What enters the job's subblock, and what the parent's puts out, of some sequences, on the device."""
        hidden = self._rows(split, "hidden", rows)
        if job.subblock == "ffn":
            hidden = hidden + self._rows(split, "mixed", rows)
        return hidden, self.target(job, split, rows)

    def target(self, job: Job, split: str, rows: Sequence[int] | slice) -> Tensor:
        """What the parent's subblock puts out, of some sequences, on the device."""
        if job.subblock == "ffn":
            return self._rows(split, "out", rows)
        mixed = self._rows(split, "mixed", rows)
        return mixed if job.subblock == "attention" else mixed + self._rows(split, "out", rows)

    def squares(self, values: Tensor, split: str, rows: Sequence[int] | slice) -> Tensor:
        """The sum of the squares of values (S, T, D) of some sequences, each token by its weight."""
        if split not in self.weights:
            return values.float().square().sum()
        return (values.float().square().sum(-1) * self.weights[split][rows].to(values.device)).sum()

    def _rows(self, split: str, name: str, rows: Sequence[int] | slice) -> Tensor:
        return self.states[split, name][rows].to(self.compute.device)

    def micro_batches(self, split: str) -> Iterator[slice]:
        """Slices of the sequences of a split."""
        count, length, _ = self.states[split, "hidden"].shape
        size = self.compute.sequences(length)
        yield from (slice(first, first + size) for first in range(0, count, size))


def layer_data(job: Job, shard: Shard, workspace: Path, compute: Compute) -> LayerData:
    """Load a recorded layer, once for all its variants."""
    boundary = job.record.boundary
    states = (boundary,) if boundary else entered(job.layer, shard, job.recording, workspace)
    assert states, f"shard {shard} of layer {job.layer} is not recorded"
    return _loaded(job.recording, job.record, shard, states, workspace, compute)


@kept_per_device(1)
def _loaded(
    recording: Recording,
    record: LayerRecord,
    shard: Shard,
    states: tuple[Ref, ...],
    workspace: Path,
    compute: Compute,
) -> LayerData:
    reader = open_parent(workspace / recording.parent.folder, compute.with_weights(torch.float32))
    module = reader.layer(record.layer)
    if record.boundary is not None:
        there = read_tensors(workspace, record.boundary)
    else:
        hidden = read_states(states, workspace)
        there = {"train": hidden[: shard.trained], "validation": hidden[shard.trained :]}
    context = reader.contexts(there["train"][:1].to(compute.device, torch.float32))[record.layer]
    found: dict[tuple[str, str], Tensor] = {(split, "hidden"): hidden for split, hidden in there.items()}
    data = LayerData(
        module=module,
        context=context,
        statistics=read_tensors(workspace, record.statistics, device=compute.device),
        states=found,
        weights=_weights(recording.corpus, shard, there, workspace),
        compute=compute,
    )
    for split in there:
        with torch.no_grad(), compute.products():
            parts = [_through(data, part.to(compute.device)) for part in _split(data, split)]
        found[split, "mixed"], found[split, "out"] = (torch.cat(column) for column in zip(*parts, strict=True))
    return data


def _weights(corpus: CorpusInfo, shard: Shard, there: dict[str, Tensor], workspace: Path) -> dict[str, Tensor]:
    first = {"train": shard.train[0], "validation": shard.validation[0]}
    rows = {split: (first[split], first[split] + len(states)) for split, states in there.items()}
    found = {split: fit_weights_of(corpus, split, workspace, rows[split]) for split in rows}
    return {split: weights for split, weights in found.items() if weights is not None}


def _split(data: LayerData, split: str) -> Iterator[Tensor]:
    return (data.states[split, "hidden"][rows] for rows in data.micro_batches(split))


def _through(data: LayerData, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What the parent's attention and FFN put out, on the host, in the precision of the states."""
    module: Any = data.module
    mixed = module.attention(hidden, **data.context).to(hidden.dtype)
    return mixed.cpu(), module.ffn(hidden + mixed).to(hidden.dtype).cpu()


def distill(job: Job, workspace: Path, compute: Compute) -> BlockRecord:
    """Distil one variant, or return the library's finished record. States that are not kept are recorded for it."""
    with StatesInUse(job.recording, workspace) as states:
        for number, shard in enumerate(job.recording.shards):
            if job.record.boundary is None and progress_of(job, number, workspace) is None:
                states.take([job.layer])
                enter([job.layer], Part(shard=shard), job.recording, workspace, compute)
            found = distill_shard(job, workspace, compute, number)
            states.keep_only([])
            if isinstance(found, BlockRecord):
                break
    assert isinstance(found, BlockRecord)
    return found


def distill_shard(job: Job, workspace: Path, compute: Compute, number: int) -> BlockRecord | State:
    """Distil one variant on shard `number`, whose states must lie on the disk.

    Returns the library's record after the last shard, before that the variant's state. What is finished is not made
    again. A variant that fails is finished early.
    """
    found = progress_of(job, number, workspace)
    if found is not None:
        return found
    started, cpu = time.perf_counter(), time.process_time()
    reader = open_parent(workspace / job.recording.parent.folder, compute.with_weights(torch.float32))
    data = layer_data(job, job.recording.shards[number], workspace, compute)
    module = reader.empty_layer(job.layer, job.choice).eval()  # evaluation mode, as it is scored later: no dropout
    variants = [parse_label(part, getattr(job.choice, part), reader.config) for part in job.parts]
    trainable = any(kind_of(variant).trainable for variant in variants)
    course = _Course(job=job, data=data, module=module, number=number)
    before = _state(job, number, workspace) if number else None
    if number and before is None:
        raise DamagedBlock(f"{_state_path(job, workspace)} is missing or damaged: run again, and it is made anew")
    if before is None:
        fitted = _start(job, reader, data, module, workspace)
        loss = fitted.get("closed_form", math.nan)
        attempt = _Attempt(loss=loss, best=loss, rate=job.settings.learning_rate)
    else:
        fitted = before.losses
        attempt = _Attempt(loss=fitted["after"], best=fitted["best"], rate=before.rate, number=before.attempts)
        course.load(read_tensors(workspace, before.weights, device=compute.device))
    if trainable:
        attempt = _train_until_it_falls(course, attempt)
    spent = (time.perf_counter() - started, time.process_time() - cpu)
    if before is not None:
        spent = (spent[0] + before.seconds, spent[1] + before.cpu_seconds)
    if trainable and not attempt.failed and number + 1 < len(job.recording.shards):
        return _keep_state(course, attempt, fitted, spent, workspace)
    return _finish(course, attempt if trainable else None, fitted, spent, workspace)


def progress_of(job: Job, number: int, workspace: Path) -> BlockRecord | State | None:
    """What a variant became by shard `number`: the library's record, else its state after that shard or a later one."""
    state = None
    if number + 1 < len(job.recording.shards):
        state = _state(job, number + 1, workspace)
    return state or BlockLibrary(workspace).find(job.key)


def _state_path(job: Job, workspace: Path) -> Path:
    return workspace / "distill" / f"{job.key}.json"


def _state(job: Job, shards: int, workspace: Path) -> State | None:
    found = remember(_state_path(job, workspace), State, lambda state: [state.weights], workspace, "never")
    return found if found is not None and found.shards >= shards else None


def _keep_state(
    course: "_Course", attempt: "_Attempt", fitted: dict[str, float], spent: tuple[float, float], workspace: Path
) -> State:
    path = _state_path(course.job, workspace)
    old = remember(path, State, lambda _: [], workspace, "never")
    name = f"distill/{course.job.key}-{course.number + 1}.safetensors"
    state = State(
        shards=course.number + 1,
        weights=write_tensors(workspace, name, course.state()),
        rate=attempt.rate,
        attempts=attempt.number,
        losses=fitted | {"after": attempt.loss, "best": attempt.best},
        seconds=spent[0],
        cpu_seconds=spent[1],
    )
    keep(path, state, [], workspace, "never")
    if old is not None and old.weights != state.weights:
        (workspace / old.weights.path).unlink(missing_ok=True)
    return state


def _finish(
    course: "_Course",
    attempt: "_Attempt | None",
    fitted: dict[str, float],
    spent: tuple[float, float],
    workspace: Path,
) -> BlockRecord:
    job, library = course.job, BlockLibrary(workspace)
    failed = attempt is not None and attempt.failed
    steps = course.steps.stop if attempt is not None else 0
    length = course.data.states["train", "hidden"].shape[1]
    weights = None
    if attempt is not None and not failed:
        weights = write_tensors(workspace, library.weights_path(job.key), course.module.state_dict())
    record = library.add(
        BlockRecord(
            key=job.key,
            layer=job.layer,
            subblock=job.subblock,
            variant=job.variant,
            status="free" if attempt is None else "failed" if failed else "trained",
            reason=attempt.reason if attempt else "",
            weights=weights,
            nmse_start=fitted.get("start"),
            nmse_closed_form=fitted.get("closed_form") if attempt else None,
            nmse_after=attempt.loss if attempt and not failed else None,
            tokens=steps * job.settings.batch_sequences * length,
            steps=steps,
            learning_rate=attempt.rate if attempt else 0.0,
            attempts=attempt.number if attempt else 0,
            seconds=spent[0],
            cpu_seconds=spent[1],
            seed=job.seed,
        )
    )
    for leftover in (workspace / "distill").glob(f"{job.key}*"):
        leftover.unlink(missing_ok=True)
    return record


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """How the training stands: the held-out loss, the best one so far, the rate, and the most attempts at a shard."""

    loss: float
    best: float
    rate: float
    number: int = 0
    failed: bool = False
    reason: str = ""


class _Course:
    """A variant on a shard: its module, AdamW's moments by the name of the weight, and the best weights so far, where
    they are others.
    """

    def __init__(self, job: Job, data: LayerData, module: DeciLMDecoderLayer, number: int) -> None:
        self.job, self.data, self.module, self.number = job, data, module, number
        self.steps = job.steps_of(number)
        self.moments: dict[str, Tensor] = {}
        self.best: dict[str, Tensor] = {}

    def state(self) -> dict[str, Tensor]:
        """Weights, moments and the best weights, to be stored, or to be gone back to."""
        weights = {f"weights.{name}": tensor for name, tensor in self.module.state_dict().items()}
        return {name: tensor.clone() for name, tensor in (weights | self.moments | self.best).items()}

    def load(self, state: dict[str, Tensor], kind: str = "weights.") -> None:
        """Set what `state` gave; kind `best.`: go back to the best weights."""
        self.module.load_state_dict({n.removeprefix(kind): value for n, value in state.items() if n.startswith(kind)})
        self.best = {name: value for name, value in state.items() if name.startswith("best.")}
        self.moments = {n: value.clone() for n, value in state.items() if not n.startswith(("weights.", "best."))}

    def optimizer(self, rate: float) -> torch.optim.AdamW:
        """AdamW that goes on from the moments that `keep` remembered, or starts afresh where there are none."""
        settings, on_cpu = self.job.settings, self.data.compute.device == "cpu"
        betas = (settings.beta1, settings.beta2)
        named = dict(self.module.named_parameters())
        optimizer = torch.optim.AdamW(
            named.values(), lr=rate, weight_decay=settings.weight_decay, betas=betas, fused=on_cpu
        )
        for name, parameter in named.items() if self.moments else ():
            moments = {each: self.moments[f"{each}.{name}"] for each in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": self.moments[f"step.{name}"].cpu(), **moments}
        return optimizer

    def keep(self, optimizer: torch.optim.AdamW) -> None:
        """Remember the moments of an optimiser, for the next shard."""
        for name, parameter in self.module.named_parameters():
            for each, value in optimizer.state[parameter].items():
                self.moments[f"{each}.{name}"] = value


def _start(job: Job, reader: Parent, data: LayerData, module: DeciLMDecoderLayer, workspace: Path) -> dict[str, float]:
    """Initialise from the parent, then fit in closed form. Returns the held-out loss after each, where it is finite."""
    context = FitContext(
        config=reader.config,
        layer=job.layer,
        parent_layer=data.module,
        statistics=data.statistics,
        hidden=data.states["train", "hidden"],
        context=data.context,
        ridge=job.settings.ridge,
        batch_sequences=data.compute.sequences(data.states["train", "hidden"].shape[1]),
        weights=data.weights.get("train"),
    )
    for part in job.parts:
        variant = parse_label(part, getattr(job.choice, part), reader.config)
        if variant.kind == "parent":
            load_subblock(module, part, subblock_state(data.module, part))
        elif variant.kind != "no_op":
            kind_of(variant).initialise(variant, module, context)
    losses = {"start": held_out_loss(job, data, module)}
    pruned = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for part in job.parts:
        variant = parse_label(part, getattr(job.choice, part), reader.config)
        warm = next((record for record in job.warm_start if record.subblock == part and record.weights), None)
        if warm is not None and warm.weights is not None:
            load_subblock(module, part, read_tensors(workspace, warm.weights, device=reader.compute.device))
        elif job.settings.closed_form and kind_of(variant).trainable:
            kind_of(variant).closed_form(variant, module, context)
    losses["closed_form"] = held_out_loss(job, data, module)
    if math.isfinite(losses["start"]) and not losses["closed_form"] <= losses["start"]:
        module.load_state_dict(pruned)  # the fit made held-out tokens worse: the steps begin before it
        losses["closed_form"] = losses["start"]
    return {name: loss for name, loss in losses.items() if math.isfinite(loss)}


def _output(job: Job, data: LayerData, module: DeciLMDecoderLayer, hidden: Tensor) -> Tensor:
    """What the variant adds to the residual. (B, T, D) -> (B, T, D)"""
    if job.subblock != "block":
        out = run_subblock(module, job.subblock, hidden, data.context)
        return torch.zeros_like(hidden) if out is None else out
    return module(hidden, **data.context) - hidden


@torch.no_grad()
def held_out_loss(job: Job, data: LayerData, module: DeciLMDecoderLayer) -> float:
    """Normalised MSE on the recorded validation sequences: MSE(o_p, o_c) / MSE(o_p, 0)."""
    error = scale = torch.zeros((), device=data.compute.device)
    for rows in data.micro_batches("validation"):
        hidden, target = data.pairs(job, "validation", rows)
        with data.compute.products():
            out = _output(job, data, module, hidden)
        error = error + data.squares(out.float() - target.float(), "validation", rows)
        scale = scale + data.squares(target, "validation", rows)
    return float(error / scale)


def _train_until_it_falls(course: _Course, before: _Attempt) -> _Attempt:
    """Train; while the held-out loss is NaN or rises, train again from the same start at a third of the learning rate.

    When it falls in no attempt, the variant stays as it was before the shard, and the reason says so. After the last
    shard the best weights count; those before the first shard are the closed form's. Without a closed form, or with one
    whose loss is not finite, a variant that never fell has failed.
    """
    settings, start, rate, number = course.job.settings, course.state(), before.rate, 0
    while True:
        number += 1
        course.load(start)
        _train(course, rate)
        after = held_out_loss(course.job, course.data, course.module)
        fell = math.isfinite(after) and not (math.isfinite(before.best) and after > RISE * before.best)
        if fell or number == settings.max_attempts:
            break
        rate /= 3
    made: dict[str, Any] = {"rate": rate, "number": max(number, before.number)}
    losses = f"held-out loss {after:.4g} after {number} attempts, {before.loss:.4g} before the steps"
    if not math.isfinite(before.loss) and not fell or not (fell or settings.closed_form or course.number):
        return _Attempt(loss=after, best=after, failed=True, reason=losses, **made)
    reason, loss, best = "", after, min(after, before.best)
    if not fell:
        course.load(start)
        kept = "closed form kept" if course.number == 0 else f"shard {course.number} of the tokens left out"
        reason, loss, best = f"{kept}: {losses}", before.loss, before.best
    elif not after > before.best:
        course.best, best = {}, after
    elif not course.best:
        course.best = {name.replace("weights.", "best.", 1): start[name] for name in start if name[0] == "w"}
    if course.best and course.number + 1 == len(course.job.recording.shards):
        course.load(course.best, "best.")
        loss = best
    return _Attempt(loss=loss, best=best, reason=reason, **made)


def _train(course: _Course, rate: float) -> None:
    """AdamW over seeded batches of the recorded sequences: the steps that belong to the shard."""
    job, module, size = course.job, course.module, course.job.settings.batch_sequences
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not course.steps or not parameters:
        return
    hidden = course.data.states["train", "hidden"]
    micro = -(-size // course.data.compute.sequences(hidden.shape[1]))
    parts = Parts(f"distill layer {job.layer} {job.subblock} {job.variant}", size, micro)
    shard = {"shard": course.number} if course.number else {}
    order = torch.Generator().manual_seed(int(digest_of(seed=job.seed, key=job.key, **shard)[:15], 16))
    optimizer, rates = course.optimizer(rate), rates_of(job.settings, rate)
    queue: list[int] = []
    for step in course.steps:
        if len(queue) < size:
            queue += torch.randperm(len(hidden), generator=order).tolist()
        batch, queue = queue[:size], queue[size:]
        parts.run(lambda count, batch=batch: _gradients(course, batch, count))  # type: ignore[misc]
        if job.settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, job.settings.clip_norm)
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.step()
    course.keep(optimizer)


def rates_of(settings: BLD, rate: float) -> list[float]:
    """The learning rate of every step: warm-up, then the schedule."""
    unused = torch.optim.SGD([torch.zeros(1)], lr=rate)
    steps = settings.steps
    falling = max(1, steps - settings.warmup_steps)
    schedules: dict[str, Any] = {
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(
            unused, falling, eta_min=rate * settings.final_rate_fraction
        ),
        "linear": lambda: torch.optim.lr_scheduler.LinearLR(unused, 1.0, settings.final_rate_fraction, falling),
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(unused, 1.0, 0),
    }
    schedule = schedules[settings.schedule]()
    rates = [rate * (step + 1) / (settings.warmup_steps + 1) for step in range(min(settings.warmup_steps, steps))]
    while len(rates) < steps:
        rates.append(unused.param_groups[0]["lr"])
        unused.step()
        schedule.step()
    return rates


def _gradients(course: _Course, batch: Sequence[int], parts: int) -> None:
    """Set the gradients of the loss on some train sequences, computed in so many parts to save memory."""
    job, data = course.job, course.data
    course.module.zero_grad(set_to_none=True)
    micro = [part.tolist() for part in torch.tensor(batch).chunk(parts)]
    scale = sum(data.squares(data.target(job, "train", part), "train", part) for part in micro)
    if data.weights and not scale:
        return  # no token of the batch counts
    for part in micro:
        hidden, target = data.pairs(job, "train", part)
        with data.compute.products():
            out = _output(job, data, course.module, hidden)
        loss = data.squares(out.float() - target.float(), "train", part) / scale
        loss.backward()
