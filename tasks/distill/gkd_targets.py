"""What GKD learns from: the parent's hidden states at the layers of the cosine terms, and the moment of its
distribution on every token (blocks/divergence.py), with which the KL is exact over the whole vocabulary.

A small run records them once, for every child, baseline and seed. A large one would fill the disk: there the parent
runs beside the child, on the batch that the child is trained on, and gives the same numbers.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from blocks.child import for_passes
from blocks.compute import Compute
from blocks.divergence import Head, Targets, head_of, targets_of
from blocks.export_code.families_decilm import FAMILIES
from blocks.export_code.modeling_decilm import DeciLMForCausalLM
from blocks.library import digest_of, keep, pick_rows, remember, write_tensors
from blocks.records import CorpusInfo, ParentInfo, Ref, Value
from profiles.schema import GKD
from tasks.distill.gkd_settings import (
    HOW,
    NOT_OF_THE_PARENT,
    cosine_layers,
    is_recorded,
    rows_of_step,
    texts_of_steps,
)
from tasks.distill.record import open_parent
from tasks.inputs.corpus import WEIGHTS
from tasks.running.progress import Progress, no_progress

VERSION = 4  # of the targets


class Mixed(Value):
    """Texts of capabilities that GKD trains on beside the corpus, and shares of the steps, that of the corpus first.

    Empty: it trains on the corpus alone.
    """

    capabilities: tuple[CorpusInfo, ...] = ()
    shares: tuple[float, ...] = (1.0,)

    @property
    def key(self) -> dict[str, object]:
        """What keys of stored work need to know; nothing where the corpus is alone."""
        told = [self.shares, [one.fingerprint for one in self.capabilities]]
        return {"mixed": told} if self.capabilities else {}


UNMIXED = Mixed()


class TeacherRecord(Value):
    """The parent's targets on validation sequences, and on those that GKD trains on: one file per step.

    steps: empty where the parent runs beside the child. tokens: of all steps. watched: the targets on the validation
    sequences of each capability.
    """

    parent: ParentInfo
    corpus: CorpusInfo
    steps: tuple[Ref, ...]
    validation: Ref
    layers: tuple[int, ...]
    tokens: int
    seconds: float
    mixed: Mixed = UNMIXED
    watched: tuple[Ref, ...] = ()

    @property
    def texts(self) -> tuple[CorpusInfo, ...]:
        """The corpus, and the texts of capabilities."""
        return (self.corpus, *self.mixed.capabilities)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequences."""
        return longest(self.texts)


def longest(texts: Sequence[CorpusInfo]) -> int:
    """Tokens of a sequence, in the text where it has most."""
    return max(text.sequence_length for text in texts)


def teacher_key(parent: ParentInfo, corpus: CorpusInfo, settings: GKD, compute: Compute, mixed: Mixed = UNMIXED) -> str:
    """Digest of what the parent's targets of a step depend on. More steps or another learning rate reuse them."""
    fields = settings.model_dump(exclude=HOW | NOT_OF_THE_PARENT) | {"products": str(compute.dtype)}
    told = {"parent": parent.fingerprint, "corpus": corpus.fingerprint, "settings": fields, **mixed.key}
    return digest_of(**told, version=VERSION)


@contextmanager
def head_products(compute: Compute) -> Iterator[None]:
    """The head's products are float32. Where all others are bfloat16, a GPU's tensor cores may do them (TF32)."""
    before = torch.backends.cuda.matmul.fp32_precision
    if compute.dtype != torch.float32:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def model_head(model: DeciLMForCausalLM) -> Head:
    """The head of a whole model as it is now, with what its family does to the logits."""
    return head_of(model.lm_head.weight, model.config, FAMILIES[model.config.base_model_type])


class Teacher(nn.Module):
    """The parent, which says what the child should."""

    def __init__(self, model: DeciLMForCausalLM, compute: Compute, sharded: bool = False) -> None:
        super().__init__()
        self.model, self.compute = model, compute
        self.head = None if sharded else model_head(model)

    @torch.no_grad()
    def forward(self, tokens: Tensor, layers: tuple[int, ...]) -> dict[str, Tensor]:
        """Targets of a batch (B, T), with its tokens: hidden states in bfloat16, which is enough for a cosine."""
        states = self.model.model(tokens.long(), output_hidden_states=bool(layers), use_cache=False)
        # hidden_states[i] enters layer i, so layer i's output is [i + 1]; the last one is taken after the final norm
        tensors = {f"layer_{i}": states.hidden_states[i + 1].flatten(0, 1).bfloat16() for i in layers}
        last = states.last_hidden_state.flatten(0, 1).float()
        with head_products(self.compute):
            targets = targets_of(last, self.head or model_head(self.model))
        return tensors | {"hidden": targets.hidden, "moment": targets.moment, "lse": targets.lse, "tokens": tokens}


def targets_in(batch: dict[str, Tensor]) -> Targets:
    """Those targets of a batch that the KL needs."""
    return Targets(hidden=batch["hidden"], moment=batch["moment"], lse=batch["lse"])


def record_teacher(
    parent: ParentInfo,
    corpus: CorpusInfo,
    settings: GKD,
    workspace: Path,
    compute: Compute,
    progress: Progress = no_progress,
    mixed: Mixed = UNMIXED,
) -> TeacherRecord:
    """Run the parent over the validation sequences, and where its targets fit `gkd.recorded_gib` over all batches.

    The steps that a killed run finished are not done again.
    """
    started = time.perf_counter()
    source = workspace / parent.folder
    reader = open_parent(source, compute)
    texts = (corpus, *mixed.capabilities)
    recorded = is_recorded(settings, longest(texts), reader.depth, reader.config.hidden_size)
    steps = settings.steps if recorded else 0
    folder = f"gkd/teacher-{teacher_key(parent, corpus, settings, compute, mixed)}"
    manifest = workspace / folder / f"teacher-{settings.steps}{'' if steps else '-beside'}.json"
    stored = remember(manifest, TeacherRecord, _files_of, workspace, "when read")
    if stored is not None:
        return stored.model_copy(update={"mixed": mixed})  # a capability may have another name by now
    model = for_passes(lambda on: open_parent(source, on).model(), compute, reader.weight_bytes)
    teacher, layers = Teacher(model, compute), cosine_layers(reader.depth, settings.cosine_every)
    references = []
    order = texts_of_steps(settings.steps, mixed.shares)
    for step, (place, before) in enumerate(order[:steps]):
        text = texts[place]
        batch = batch_of(text, "train", rows_of_step(before, settings, text.train_sequences), workspace)
        parts = _in_parts(teacher, batch, layers, compute)
        references.append(_record_batch(parts, workspace, f"{folder}/step_{step:05d}"))
        progress(step + 1, steps, "parent")
    first = range(min(settings.validation_sequences, corpus.validation_sequences))
    watched = _in_parts(teacher, batch_of(corpus, "validation", first, workspace), (), compute)
    others = [
        _in_parts(teacher, batch_of(text, "validation", range(text.validation_sequences), workspace), (), compute)
        for text in mixed.capabilities
    ]
    record = TeacherRecord(
        parent=parent,
        corpus=corpus,
        steps=tuple(references),
        validation=_record_batch(watched, workspace, f"{folder}/validation"),
        layers=layers,
        tokens=sum(texts[place].sequence_length for place, _ in order) * settings.batch_sequences,
        seconds=time.perf_counter() - started,
        mixed=mixed,
        watched=tuple(
            _record_batch(each, workspace, f"{folder}/validation-{text.capability}")
            for text, each in zip(mixed.capabilities, others, strict=True)
        ),
    )
    keep(manifest, record, _files_of(record), workspace)
    return record


def _files_of(record: TeacherRecord) -> list[Ref]:
    return [*record.steps, record.validation, *record.watched]


def batch_of(corpus: CorpusInfo, split: str, rows: Sequence[int], workspace: Path) -> dict[str, Tensor]:
    """Some sequences, and the weights of their tokens one after another, where there are weights."""
    batch = {"tokens": pick_rows(workspace, corpus.tokens, split, rows)}
    if corpus.weighted:
        batch["weights"] = pick_rows(workspace, corpus.tokens, f"{split}{WEIGHTS}", rows).flatten()
    return batch


def _in_parts(
    teacher: Teacher, batch: dict[str, Tensor], layers: tuple[int, ...], compute: Compute
) -> Iterator[dict[str, Tensor]]:
    size, length = compute.sequences(batch["tokens"].shape[1]), batch["tokens"].shape[1]
    split = {name: tensor.split(size if name == "tokens" else size * length) for name, tensor in batch.items()}
    for parts in zip(*split.values(), strict=True):
        part = dict(zip(split, parts, strict=True))
        yield part | teacher(part["tokens"].to(compute.device), layers)


def _record_batch(parts: Iterator[dict[str, Tensor]], workspace: Path, stem: str) -> Ref:
    """Targets of one batch on disk. Where they are there, its parts are not computed."""
    manifest = workspace / f"{stem}.json"
    stored = remember(manifest, Ref, lambda ref: [ref], workspace, "when read")
    if stored is not None:
        return stored
    found = list(parts)
    tensors = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    reference = write_tensors(workspace, f"{stem}.safetensors", tensors)
    keep(manifest, reference, [reference], workspace)
    return reference
