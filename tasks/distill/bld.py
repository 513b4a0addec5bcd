"""Blockwise local distillation (Puzzle, section 3): one variant is trained to do what the parent's subblock does.

First a closed-form ridge fit, then AdamW steps on loss = MSE(o_parent, o_variant) / MSE(o_parent, 0), on the parent's
recorded activations. Decoupled BLD trains one subblock at a time. Coupled BLD trains attention and FFN of one
layer together; the output is then what the whole layer adds to the residual.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from blocks.compute import Compute
from blocks.export_code.modeling_decilm import DeciLMDecoderLayer
from blocks.fit import FitContext
from blocks.kinds import kind_of, parse_label
from blocks.library import BlockLibrary, digest_of, read_tensors, write_tensors
from blocks.parent import Parent
from blocks.records import SUBBLOCKS, BlockRecord, LayerChoice, LayerRecord, ParentInfo, Ref, Subblock, Value
from blocks.runtime import kept_per_device
from blocks.subblock import load_subblock, run_subblock, subblock_state
from profiles.schema import BLD
from tasks.distill.record import open_parent
from tasks.running.memory import Parts

VERSION = 2
RISE = 1.05  # the loss rises when the held-out loss after the steps exceeds this multiple of the one before them


class Job(Value):
    """One distillation: everything that its result depends on, and nothing else, such as paths or the budget."""

    parent: ParentInfo
    record: LayerRecord
    record_key: str
    layer: int
    subblock: Subblock | Literal["block"]
    variant: str
    settings: BLD
    seed: int
    warm_start: tuple[BlockRecord, ...] = ()

    @property
    def key(self) -> str:
        """Content address of the result in the block library."""
        settings = self.settings.model_dump(exclude={"coupled", "coupled_attention", "coupled_ffn"})
        return digest_of(
            parent=self.parent.fingerprint,
            record=self.record_key,
            layer=self.layer,
            subblock=self.subblock,
            variant=self.variant,
            settings=settings,
            seed=self.seed,
            warm_start=[record.key for record in self.warm_start],
            version=VERSION,
        )

    @property
    def choice(self) -> LayerChoice:
        """The variant as a layer. In decoupled BLD the other subblock is left out."""
        return LayerChoice.only(self.subblock, self.variant)

    @property
    def parts(self) -> tuple[Subblock, ...]:
        """The subblocks that are trained."""
        return SUBBLOCKS if self.subblock == "block" else (self.subblock,)


@dataclass(frozen=True, kw_only=True)
class LayerData:
    """One layer's activations (S, T, D): the states that enter each subblock, and what the parent's subblock puts out.

    The keys of inputs and targets are (subblock, split).
    """

    module: DeciLMDecoderLayer
    context: dict[str, Any]
    statistics: dict[str, Tensor]
    inputs: dict[tuple[str, str], Tensor]
    targets: dict[tuple[str, str], Tensor]


@kept_per_device(1)
def layer_data(folder: Path, workspace: Path, record: LayerRecord, compute: Compute) -> LayerData:
    """Load a recorded layer to a device, once for all its variants."""
    reader = open_parent(folder, compute)
    module = reader.layer(record.layer)
    boundary = read_tensors(workspace, record.boundary, device=compute.device)
    context = reader.contexts(boundary["train"][:1])[record.layer]
    inputs: dict[tuple[str, str], Tensor] = {}
    targets: dict[tuple[str, str], Tensor] = {}
    with torch.no_grad():
        for split, hidden in boundary.items():
            mixed = _in_batches(lambda h: module.attention(h, **context), hidden)
            middle = hidden + mixed
            out = _in_batches(module.ffn, middle)
            inputs |= {("attention", split): hidden, ("ffn", split): middle, ("block", split): hidden}
            targets |= {("attention", split): mixed, ("ffn", split): out, ("block", split): mixed + out}
    return LayerData(
        module=module,
        context=context,
        statistics=read_tensors(workspace, record.statistics, device=compute.device),
        inputs=inputs,
        targets=targets,
    )


def _in_batches(function: Any, hidden: Tensor, batch: int = 8) -> Tensor:
    return torch.cat([function(part) for part in hidden.split(batch)])


def distill(job: Job, workspace: Path, compute: Compute) -> BlockRecord:
    """Distil one variant, or return the finished record of the library."""
    library = BlockLibrary(workspace)
    found = library.find(job.key)
    if found is not None:
        return found
    started, cpu = time.perf_counter(), time.process_time()
    reader = open_parent(workspace / job.parent.folder, compute)
    data = layer_data(workspace / job.parent.folder, workspace, job.record, compute)
    variants = [parse_label(part, getattr(job.choice, part), reader.config) for part in job.parts]
    trainable = any(kind_of(variant).trainable for variant in variants)
    module = reader.empty_layer(job.layer, job.choice).eval()  # evaluation mode, as it is scored later: no dropout
    fitted = _start(job, reader, data, module, workspace)
    attempt = _Attempt(loss=fitted.get("closed_form", math.nan))
    if trainable:
        attempt = _train_until_it_falls(job, data, module, attempt.loss)
    record = BlockRecord(
        key=job.key,
        layer=job.layer,
        subblock=job.subblock,
        variant=job.variant,
        status="free" if not trainable else "failed" if attempt.failed else "trained",
        reason=attempt.reason,
        weights=None if not trainable or attempt.failed else _save(job, module, library, workspace),
        nmse_start=fitted.get("start"),
        nmse_closed_form=fitted.get("closed_form") if trainable else None,
        nmse_after=None if attempt.failed or not trainable else attempt.loss,
        tokens=attempt.steps * job.settings.batch_sequences * data.inputs["attention", "train"].shape[1],
        steps=attempt.steps,
        learning_rate=attempt.learning_rate,
        attempts=attempt.number,
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu,
        seed=job.seed,
    )
    return library.add(record)


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    loss: float
    failed: bool = False
    reason: str = ""
    number: int = 0
    steps: int = 0
    learning_rate: float = 0.0


def _start(job: Job, reader: Parent, data: LayerData, module: DeciLMDecoderLayer, workspace: Path) -> dict[str, float]:
    """Initialise from the parent, then fit in closed form. Returns the held-out loss after each, where it is finite."""
    context = FitContext(
        config=reader.config,
        layer=job.layer,
        parent_layer=data.module,
        statistics=data.statistics,
        hidden=data.inputs["attention", "train"],
        context=data.context,
        ridge=job.settings.ridge,
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
    hidden, target = data.inputs[job.subblock, "validation"], data.targets[job.subblock, "validation"]
    return ((_output(job, data, module, hidden) - target).square().sum() / target.square().sum()).item()


def _train_until_it_falls(job: Job, data: LayerData, module: DeciLMDecoderLayer, before: float) -> _Attempt:
    """Train; while the held-out loss is NaN or rises, train again from the same start at a third of the learning rate.

    When the loss falls in no attempt, the closed-form fit is kept if its loss was finite, and the reason says so.
    Without a closed form the variant has failed.
    """
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    rate, number = job.settings.learning_rate, 0
    while True:
        number += 1
        module.load_state_dict(start)
        _train(job, data, module, rate)
        after = held_out_loss(job, data, module)
        fell = math.isfinite(after) and not (math.isfinite(before) and after > RISE * before)
        if fell or number == job.settings.max_attempts:
            break
        rate /= 3
    made: dict[str, Any] = {"number": number, "steps": job.settings.steps, "learning_rate": rate}
    if fell and not after > before:
        return _Attempt(loss=after, **made)
    losses = f"held-out loss {after:.4g} after {number} attempts, {before:.4g} before the steps"
    if not math.isfinite(before) or not (fell or job.settings.closed_form):
        return _Attempt(loss=after, failed=True, reason=losses, **made)
    module.load_state_dict(start)
    return _Attempt(loss=before, reason="" if fell else f"closed form kept: {losses}", **made)


def _train(job: Job, data: LayerData, module: DeciLMDecoderLayer, rate: float) -> None:
    """AdamW with a cosine decay over seeded batches of the recorded sequences."""
    steps, size = job.settings.steps, job.settings.batch_sequences
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not steps or not parameters:
        return
    hidden = data.inputs[job.subblock, "train"]
    parts = Parts(f"distill layer {job.layer} {job.subblock} {job.variant}", size)
    order = torch.Generator().manual_seed(int(digest_of(seed=job.seed, key=job.key)[:15], 16))
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=hidden.device.type == "cpu")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=rate / 10)
    queue: list[int] = []
    for _ in range(steps):
        if len(queue) < size:
            queue += torch.randperm(len(hidden), generator=order).tolist()
        batch, queue = queue[:size], queue[size:]
        parts.run(lambda count, batch=batch: _gradients(job, data, module, batch, count))  # type: ignore[misc]
        optimizer.step()
        schedule.step()


def _gradients(job: Job, data: LayerData, module: DeciLMDecoderLayer, batch: Sequence[int], parts: int) -> None:
    """Set the gradients of the loss on some train sequences, computed in so many parts to save memory."""
    hidden, target = data.inputs[job.subblock, "train"], data.targets[job.subblock, "train"]
    module.zero_grad(set_to_none=True)
    scale = target[batch].square().sum()
    for part in torch.tensor(batch).chunk(parts):
        loss = (_output(job, data, module, hidden[part]) - target[part]).square().sum() / scale
        loss.backward()


def _save(job: Job, module: DeciLMDecoderLayer, library: BlockLibrary, workspace: Path) -> Ref:
    return write_tensors(workspace, library.weights_path(job.key), module.state_dict())
