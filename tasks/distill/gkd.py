"""Global knowledge distillation of an assembled child: L = sum over layers (1 - cos(h_child, h_parent)) + KL(p || q),
no LM loss (Puzzle, section 5: the best of the published combinations).

The parent is recorded once for every child, baseline and seed of a run: per token its hidden states at the layers of
the cosine terms, and the moment of its distribution (blocks/divergence.py). With the moment the KL is exact over the
whole vocabulary, while embedding and head stay frozen. The KL on validation sequences is measured every few steps. The
best step is kept, and training stops when the KL has not improved for some time.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from blocks.compute import Compute
from blocks.divergence import Head, Targets, kl_loss, kl_per_token, targets_of
from blocks.export_code.modeling_decilm import DeciLMForCausalLM
from blocks.library import digest_of, keep, read_tensors, remember, write_tensors
from blocks.records import CorpusInfo, ParentInfo, Ref, Value
from profiles.schema import GKD
from tasks.distill.record import open_parent
from tasks.running.memory import Parts
from tasks.running.progress import Progress, no_progress

VERSION = 3


class TeacherRecord(Value):
    """The parent's targets on the sequences that GKD trains on, one file per step, and on validation sequences."""

    steps: tuple[Ref, ...]
    validation: Ref
    layers: tuple[int, ...]
    tokens: int
    seconds: float


class GKDResult(Value):
    """What GKD left: the trained weights, and the curve of (step, validation KL). stopped: why training ended."""

    weights: Ref
    best_step: int
    best_kl: float
    curve: tuple[tuple[int, float], ...]
    losses: tuple[float, ...]
    tokens: int
    seconds: float
    cpu_seconds: float
    stopped: str


def cosine_layers(depth: int, every: int) -> tuple[int, ...]:
    """Layers whose output states are compared: every `every`-th, counted back from the last."""
    return tuple(range(depth - 1, -1, -every))[::-1]


def teacher_key(parent: ParentInfo, corpus: CorpusInfo, settings: GKD) -> str:
    """Digest of what the parent's targets of a step depend on. More steps or another learning rate reuse them."""
    fields = settings.model_dump(exclude={"learning_rate", "evaluate_every", "patience", "steps"})
    return digest_of(parent=parent.fingerprint, corpus=corpus.fingerprint, settings=fields, version=VERSION)


def record_teacher(
    parent: ParentInfo,
    corpus: CorpusInfo,
    settings: GKD,
    workspace: Path,
    compute: Compute,
    progress: Progress = no_progress,
) -> TeacherRecord:
    """Run the parent once over all GKD batches. The steps that a killed run finished are not done again."""
    started = time.perf_counter()
    folder = f"gkd/teacher-{teacher_key(parent, corpus, settings)}"
    manifest = workspace / folder / f"teacher-{settings.steps}.json"
    stored = remember(manifest, TeacherRecord, _files_of, workspace, "when read")
    if stored is not None:
        return stored
    reader = open_parent(workspace / parent.folder, compute)
    model = reader.model()
    head = Head(model.lm_head.weight)
    layers = cosine_layers(reader.depth, settings.cosine_every)
    tokens = read_tensors(workspace, corpus.tokens, device=compute.device)
    references = []
    for step in range(settings.steps):
        batch = tokens["train"][rows_of_step(step, settings, len(tokens["train"]))]
        references.append(_record_batch(model, head, batch, layers, workspace, f"{folder}/step_{step:05d}"))
        progress(step + 1, settings.steps, "parent")
    validation = tokens["validation"][: settings.validation_sequences]
    record = TeacherRecord(
        steps=tuple(references),
        validation=_record_batch(model, head, validation, (), workspace, f"{folder}/validation"),
        layers=layers,
        tokens=settings.steps * settings.batch_sequences * corpus.sequence_length,
        seconds=time.perf_counter() - started,
    )
    keep(manifest, record, _files_of(record), workspace)
    return record


def _files_of(record: TeacherRecord) -> list[Ref]:
    return [*record.steps, record.validation]


def rows_of_step(step: int, settings: GKD, available: int) -> list[int]:
    """The train sequences of a step: the corpus in a seeded order, from its start again when it ends."""
    order = torch.randperm(available, generator=torch.Generator().manual_seed(settings.seed)).tolist()
    first = step * settings.batch_sequences
    return [order[(first + row) % available] for row in range(settings.batch_sequences)]


def _record_batch(
    model: DeciLMForCausalLM, head: Head, tokens: Tensor, layers: tuple[int, ...], workspace: Path, stem: str
) -> Ref:
    """Targets of one batch: hidden states in bfloat16, which is enough for a cosine, the rest in float32."""
    manifest = workspace / f"{stem}.json"
    stored = remember(manifest, Ref, lambda ref: [ref], workspace, "when read")
    if stored is not None:
        return stored
    with torch.inference_mode():
        states = model.model(tokens.long(), output_hidden_states=True, use_cache=False).hidden_states
        targets = targets_of(states[-1].flatten(0, 1), head)
    # hidden_states[i] enters layer i, so layer i's output is [i + 1]; the last one is taken after the final norm
    tensors = {f"layer_{layer}": states[layer + 1].flatten(0, 1).bfloat16() for layer in layers}
    tensors |= {"hidden": targets.hidden, "moment": targets.moment, "lse": targets.lse, "tokens": tokens}
    reference = write_tensors(workspace, f"{stem}.safetensors", tensors)
    keep(manifest, reference, [reference], workspace)
    return reference


@dataclass(kw_only=True)
class _Best:
    """The best weights so far. waited: how many measurements ago that was. curve: (step, validation KL)."""

    kl: float = math.inf
    step: int = 0
    state: dict[str, Tensor] | None = None
    waited: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)

    def see(self, kl: float, step: int, model: DeciLMForCausalLM) -> None:
        """A measurement. A KL that is not a number is worse than any other, and is left out of the curve."""
        if math.isfinite(kl):
            self.curve.append((step, kl))
        if self.state is not None and not kl < self.kl:
            self.waited += 1
            return
        self.kl, self.step, self.waited = (kl if math.isfinite(kl) else math.inf), step, 0
        self.state = {name: tensor.clone() for name, tensor in model.model.layers.state_dict().items()}


def distill_child(
    model: DeciLMForCausalLM,
    teacher: TeacherRecord,
    settings: GKD,
    workspace: Path,
    key: str,
    progress: Progress = no_progress,
) -> GKDResult:
    """Train the layers of `model` in place, leave it at its best step, and store the weights under `key`.

    The untrained model takes part as step 0, so the result is never worse on the validation sequences than that.
    """
    folder = f"gkd/child-{key}"
    manifest = workspace / folder / "result.json"
    stored = remember(manifest, GKDResult, lambda result: [result.weights], workspace)
    if stored is not None:
        model.model.layers.load_state_dict(read_tensors(workspace, stored.weights))
        return stored
    started, cpu = time.perf_counter(), time.process_time()
    best, head = _Best(), Head(model.lm_head.weight)
    best.see(validation_kl(model, head, teacher, workspace), 0, model)
    losses: list[float] = []
    stopped = "all steps done"
    for step, loss in _steps(model, head, teacher, settings, workspace):
        losses.append(loss)
        progress(step, settings.steps, f"loss {loss:.3f}, best validation KL {best.kl:.3f}")
        if step % settings.evaluate_every == 0 or step == settings.steps:
            best.see(validation_kl(model, head, teacher, workspace), step, model)
        if not math.isfinite(loss) or best.waited >= settings.patience:
            stopped = f"no better validation KL since step {best.step}" if math.isfinite(loss) else f"loss is {loss}"
            break
    model.requires_grad_(False)
    assert best.state is not None
    model.model.layers.load_state_dict(best.state)
    if not math.isfinite(best.kl):
        raise RuntimeError("the child's validation KL is not a number before any GKD step: its blocks are damaged")
    result = GKDResult(
        weights=write_tensors(workspace, f"{folder}/layers.safetensors", best.state),
        best_step=best.step,
        best_kl=best.kl,
        curve=tuple(best.curve),
        losses=tuple(loss for loss in losses if math.isfinite(loss)),
        tokens=len(losses) * settings.batch_sequences * (teacher.tokens // settings.steps // settings.batch_sequences)
        if settings.steps
        else 0,
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu,
        stopped=stopped,
    )
    keep(manifest, result, [result.weights], workspace)
    return result


def _steps(
    model: DeciLMForCausalLM, head: Head, teacher: TeacherRecord, settings: GKD, workspace: Path
) -> Iterator[tuple[int, float]]:
    """AdamW with a short warm-up and a cosine decay; yields (step, loss)."""
    model.requires_grad_(False)
    parameters = list(model.model.layers.requires_grad_(True).parameters())
    if not parameters or not settings.steps:
        return
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings.steps))
    parts = Parts("GKD", settings.batch_sequences)
    for step, reference in enumerate(teacher.steps, start=1):
        batch = read_tensors(workspace, reference, device=str(head.weight.device))
        loss = parts.run(lambda count, batch=batch: _gradients(model, head, batch, teacher.layers, count))  # type: ignore[misc]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        yield step, loss


def _gradients(
    model: DeciLMForCausalLM, head: Head, batch: dict[str, Tensor], layers: tuple[int, ...], parts: int
) -> float:
    """Set the gradients of the loss on a batch, which is computed in so many parts to save memory; return the loss."""
    model.zero_grad(set_to_none=True)
    sequences, length = batch["tokens"].shape
    total = 0.0
    for part in torch.arange(sequences).chunk(parts):
        rows, first, after = slice(int(part[0]), int(part[-1]) + 1), int(part[0]) * length, (int(part[-1]) + 1) * length
        piece = {name: tensor[rows] if name == "tokens" else tensor[first:after] for name, tensor in batch.items()}
        loss = gkd_loss(model, head, piece, layers) * (len(part) / sequences)
        loss.backward()
        total += loss.item()
    return total


def _rate(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def gkd_loss(model: DeciLMForCausalLM, head: Head, batch: dict[str, Tensor], layers: tuple[int, ...]) -> Tensor:
    """Sum over the compared layers of (1 - cosine), mean over tokens, plus the exact KL. Scalar."""
    states = model.model(batch["tokens"].long(), output_hidden_states=True, use_cache=False).hidden_states
    total = kl_loss(states[-1].flatten(0, 1), _targets(batch), head)
    for layer in layers:
        cosine = F.cosine_similarity(states[layer + 1].flatten(0, 1), batch[f"layer_{layer}"].float(), dim=-1)
        total = total + (1 - cosine).mean()
    return total


def _targets(batch: dict[str, Tensor]) -> Targets:
    return Targets(hidden=batch["hidden"], moment=batch["moment"], lse=batch["lse"])


@torch.no_grad()
def validation_kl(model: DeciLMForCausalLM, head: Head, teacher: TeacherRecord, workspace: Path) -> float:
    """KL(parent || child) in nats per token on the recorded validation sequences."""
    batch = read_tensors(workspace, teacher.validation, device=str(head.weight.device))
    hidden = model.model(batch["tokens"].long(), use_cache=False).last_hidden_state.flatten(0, 1)
    return kl_per_token(hidden, _targets(batch), head)[0].mean().item()
