"""Record the parent's activations, with one layer in memory at a time.

For each layer the first pass writes the statistics that initialisation and closed-form fits need, and the hidden states
that enter it, where all of them fit in one shard. Else the states are recorded again when variants are trained, shard
by shard: so neither disk nor memory depends on the number of tokens. A layer is recorded once; a killed pass goes on
where it stopped.

Where several devices are, each takes a part of a shard's sequences through the layers (`enter`). The micro-batches are
the same however many parts there are, and so are the states, bit for bit.

Legend: S = sequences, T = tokens, D = hidden_size, F = intermediate_size.
"""

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from blocks.compute import Compute
from blocks.errors import DamagedBlock
from blocks.experts import expert_sums
from blocks.families import has_experts
from blocks.fit import elimination_order
from blocks.library import (
    digest_of,
    is_whole,
    keep,
    read_rows,
    read_tensors,
    read_value,
    remember,
    write_tensors,
    write_value,
)
from blocks.parent import Parent
from blocks.records import CorpusInfo, LayerRecord, ParentInfo, Ref, Value
from blocks.resources import precision_name
from blocks.runtime import kept_per_device
from blocks.subblock import linear_of
from profiles.schema import Profile, Record
from tasks.inputs.corpus import fit_weights_of
from tasks.running.memory import Parts
from tasks.running.sharing import in_use, unused

if TYPE_CHECKING:
    from blocks.export_code.modeling_decilm import DeciLMDecoderLayer

VERSION = 2
CHUNK = 32  # channels that the elimination takes out at a time


class Shard(Value):
    """Sequences that go through the parent together: some of the train split, and behind them some of validation."""

    train: tuple[int, int] = (0, 0)
    validation: tuple[int, int] = (0, 0)

    @property
    def trained(self) -> int:
        """Number of train sequences."""
        return self.train[1] - self.train[0]

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return self.trained + self.validation[1] - self.validation[0]

    def __str__(self) -> str:
        return "-".join(map(str, self.train + self.validation))


class Part(Value):
    """Part `number` of `count` of a shard's sequences: what one device takes through the parent."""

    shard: Shard
    number: int = 0
    count: int = 1

    def rows(self, step: int) -> tuple[int, int]:
        """(first, last) of its sequences, in whole micro-batches of `step`."""
        batches = -(-self.shard.sequences // step)
        first, last = (batches * number // self.count * step for number in (self.number, self.number + 1))
        return first, min(last, self.shard.sequences)

    def __str__(self) -> str:
        return f"{self.shard}_{self.number}of{self.count}"


def parts_of(shard: Shard, most: int, step: int) -> tuple[Part, ...]:
    """A shard in as many parts as there are workers, where each has a micro-batch of `step` sequences to do."""
    count = min(most, -(-shard.sequences // step))
    return tuple(Part(shard=shard, number=number, count=count) for number in range(count))


class Recording(Value):
    """What is recorded of a parent, and on how much text. trained: train sequences that variants are trained on."""

    parent: ParentInfo
    corpus: CorpusInfo
    settings: Record
    ridge: float
    trained: int
    dtype: str = "float32"

    @property
    def key(self) -> str:
        """Digest of everything a recording depends on."""
        settings = self.settings.keyed(("statistics_sequences", "hidden_sequences", "validation_sequences"))
        settings.pop("shard_tokens", None)
        more = {"trained": self.trained} if self.trained != self.settings.hidden_sequences else {}
        more |= {} if self.kept else {"shard": self._sequences}
        return digest_of(
            parent=self.parent.fingerprint,
            corpus=self.corpus.fingerprint,
            settings=settings,
            ridge=self.ridge,
            version=VERSION,
            **({} if self.dtype == "float32" else {"dtype": self.dtype}),
            **more,
        )

    @property
    def kept(self) -> bool:
        """True where all states fit in one shard: they are recorded once, and kept for later runs."""
        return fits_in_a_shard(self.settings, self.trained, self.corpus.sequence_length)

    @property
    def counted(self) -> tuple[Shard, ...]:
        """The shards of the first pass, which sums the statistics."""
        if self.kept:
            last = max(self.settings.statistics_sequences, self.trained)
            return (Shard(train=(0, last), validation=(0, self._held_out)),)
        return tuple(Shard(train=part) for part in slices(self.settings.statistics_sequences, self._sequences))

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards that variants are trained on, one after another, each with the sequences that are held out."""
        parts = [(0, self.trained)] if self.kept else slices(self.trained, self._sequences)
        return tuple(Shard(train=part, validation=(0, min(self._held_out, self._sequences))) for part in parts)

    @property
    def _sequences(self) -> int:
        return max(1, self.settings.shard_tokens // self.corpus.sequence_length)

    @property
    def _held_out(self) -> int:
        return self.settings.validation_sequences


def fits_in_a_shard(settings: Record, trained: int, length: int) -> bool:
    """Whether all sequences that are recorded and trained on have no more tokens than a shard."""
    whole = max(settings.statistics_sequences, trained) + settings.validation_sequences
    return whole <= max(1, settings.shard_tokens // length)


def slices(total: int, most: int) -> list[tuple[int, int]]:
    """(first, last) of as few equal parts as have at most `most` each."""
    count = -(-total // most)
    return [(total * part // count, total * (part + 1) // count) for part in range(count)]


def recording_of(profile: Profile, parent: ParentInfo, corpus: CorpusInfo, compute: Compute) -> Recording:
    """The recording that a profile asks for."""
    return Recording(
        parent=parent,
        corpus=corpus,
        settings=profile.record,
        ridge=profile.bld.ridge,
        trained=profile.trained_sequences,
        dtype=precision_name(compute.dtype),
    )


@kept_per_device(2)
def _open(folder: Path, compute: Compute | None) -> Parent:
    return Parent(folder, compute)


def open_parent(folder: Path, compute: Compute | None = None) -> Parent:
    """The parent, kept open for later calls. Its tensors need a `compute`, its config does not."""
    return _open(folder, compute)


def _folder(recording: Recording) -> str:
    return f"record/{recording.key}"


def recorded(layer: int, recording: Recording, workspace: Path, number: int | None = None) -> LayerRecord | None:
    """The stored record of a layer when its files are whole, else None; `number`: after that shard, or a later one."""
    # its files are large, and needed only where a block or a score is missing
    found = remember(_manifest(layer, recording, workspace), LayerRecord, _files_of, workspace, "when read")
    if found is not None or number is None:
        return found
    later = (_manifest(layer, recording, workspace, other) for other in range(number, len(recording.counted) - 1))
    stored = (remember(path, LayerRecord, _files_of, workspace, "never") for path in later)
    return next((record for record in stored if record is not None), None)


def _manifest(layer: int, recording: Recording, workspace: Path, number: int | None = None) -> Path:
    """Where the record of a layer lies; `number`: the one after that shard, which the next shard replaces."""
    return workspace / _folder(recording) / f"layer_{layer:03d}{'' if number is None else f'_{number}'}.json"


def _files_of(record: LayerRecord) -> list[Ref]:
    return [record.statistics] if record.boundary is None else [record.boundary, record.statistics]


def record_layer(
    layer: int, recording: Recording, workspace: Path, compute: Compute, number: int = 0, hand_on: bool = True
) -> LayerRecord:
    """Add shard `number` of the first pass to a layer's statistics, which the last shard completes.

    A stored record whose files are whole is returned. A layer of the shard before it must be recorded first.
    hand_on: leave the states to the next layer, and take away those that entered this one.
    """
    stored = recorded(layer, recording, workspace, number)
    if stored is not None:
        return stored
    before = recorded(layer, recording, workspace, number - 1) if number else None
    if number and before is None:
        raise DamagedBlock(f"shard {number} of layer {layer} is missing or damaged: run again, and it is made anew")
    started, shard = time.perf_counter(), recording.counted[number]
    reader = open_parent(workspace / recording.parent.folder, compute)
    there = entered(layer, shard, recording, workspace)
    hidden = (
        read_states(there, workspace) if there else _entering(reader, layer, Part(shard=shard), recording, workspace)
    )
    module = reader.layer(layer)
    down = None if has_experts(reader.config) else linear_of(module, "down").weight.data.float()
    last = shard == recording.counted[-1]
    manifest = _manifest(layer, recording, workspace, None if last else number)
    name = f"{_folder(recording)}/%s_{manifest.stem.removeprefix('layer_')}.safetensors"
    kept = {"train": hidden[: recording.trained], "validation": hidden[shard.trained :]}
    boundary = write_tensors(workspace, name % "boundary", kept) if recording.kept else None
    counted = min(shard.trained, recording.settings.statistics_sequences)
    rows = (shard.train[0], shard.train[0] + counted)
    statistics = _pass(
        reader, module, layer, hidden, counted, fit_weights_of(recording.corpus, "train", workspace, rows)
    )
    if before is not None:
        for each, value in read_tensors(workspace, before.statistics, device=compute.device).items():
            _add(statistics, each, value)
    if last:
        tokens = recording.settings.statistics_sequences * hidden.shape[1]
        if down is None:
            statistics["expert_gates"] = statistics["expert_gates"] / tokens
        else:
            statistics["ffn_contribution"] = statistics["ffn_contribution"] / tokens * down.norm(dim=0)
            statistics["ffn_order"] = elimination_order(statistics["ffn_gram"], down, recording.ridge, chunk=CHUNK)
    reference = write_tensors(workspace, name % "statistics", statistics)
    if hand_on and layer + 1 < reader.depth:
        _write_entering(workspace, recording, layer + 1, Part(shard=shard), hidden)
    record = LayerRecord(layer=layer, boundary=boundary, statistics=reference, seconds=time.perf_counter() - started)
    keep(manifest, record, _files_of(record), workspace, "ahead" if last else "never")
    if hand_on:
        drop([layer], recording, workspace)
    if before is not None:
        (workspace / before.statistics.path).unlink(missing_ok=True)
        _manifest(layer, recording, workspace, number - 1).unlink(missing_ok=True)
    return record


def enter(layers: Sequence[int], part: Part, recording: Recording, workspace: Path, compute: Compute) -> None:
    """Write the states of a part of a shard that enter some layers (`hidden`, S x T x D), until `drop` takes them away.

    They are made from those of the nearest layer before that lie there, else from the embedding.
    """
    missing = [layer for layer in layers if _entered(layer, part, recording, workspace) is None]
    if not missing:
        return
    reader = open_parent(workspace / recording.parent.folder, compute)
    hidden = _entering(reader, missing[0], part, recording, workspace)
    for before, layer in zip([missing[0], *missing], missing, strict=False):
        _through(reader, range(before, layer), hidden)
        _write_entering(workspace, recording, layer, part, hidden)


def entered(layer: int, shard: Shard, recording: Recording, workspace: Path) -> tuple[Ref, ...]:
    """The files with the states of a shard that enter a layer; none unless all of them lie on the disk, whole."""
    manifests = _rolling(workspace, recording).glob(f"{layer:03d}_{shard}_*.json")
    for count in sorted({int(path.stem.rpartition("of")[2]) for path in manifests}):
        parts = (Part(shard=shard, number=number, count=count) for number in range(count))
        found = [_entered(layer, part, recording, workspace) for part in parts]
        if None not in found:
            return tuple(reference for reference in found if reference is not None)
    return ()


def read_states(references: Sequence[Ref], workspace: Path) -> Tensor:
    """States (S, T, D) of a shard, on the host, from the files of its parts."""
    parts = [read_tensors(workspace, reference)["hidden"] for reference in references]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def drop(layers: Iterable[int], recording: Recording, workspace: Path) -> None:
    """Take away the states that enter some layers, unless a run uses them (`StatesInUse`)."""
    for layer in layers:
        with unused(workspace, _states(layer, recording)) as free:
            for leftover in _rolling(workspace, recording).glob(f"{layer:03d}_*") if free else ():
                leftover.unlink(missing_ok=True)


def clear(recording: Recording, workspace: Path) -> None:
    """Take away all states that enter layers and that no run uses: those that a killed run left as well."""
    there = {path.name.partition("_")[0] for path in _rolling(workspace, recording).glob("[0-9]*_*")}
    drop(sorted(map(int, there)), recording, workspace)


class StatesInUse:
    """The layers whose states (those that enter them) a run uses: no other run takes them away, until this one has done
    with them, or dies. The other may be ahead on the same shard, or train other variants on the same recording.
    """

    def __init__(self, recording: Recording, workspace: Path) -> None:
        self.recording, self.workspace = recording, workspace
        self._held: dict[int, ExitStack] = {}

    def take(self, layers: Iterable[int]) -> None:
        """From here on these too. Call it before the states are looked for."""
        for layer in set(layers) - self._held.keys():
            self._held[layer] = ExitStack()
            self._held[layer].enter_context(in_use(self.workspace, _states(layer, self.recording)))

    def keep_only(self, layers: Iterable[int]) -> None:
        """This run has done with the others: their states are taken away, unless another run uses them."""
        done = sorted(self._held.keys() - set(layers))
        for layer in done:
            self._held.pop(layer).close()
        drop(done, self.recording, self.workspace)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for held in self._held.values():
            held.close()  # the states stay: whoever goes on from here finds them


def _states(layer: int, recording: Recording) -> str:
    return f"states-{recording.key}-{layer}"


def _entered(layer: int, part: Part, recording: Recording, workspace: Path) -> Ref | None:
    manifest = _rolling(workspace, recording) / f"{layer:03d}_{part}.json"
    if not manifest.exists():
        return None
    reference = read_value(manifest, Ref)
    return reference if is_whole(workspace, reference) else None


def _rolling(workspace: Path, recording: Recording) -> Path:
    """A folder of its own: it is looked through often, and what stays of a recording grows with the layers."""
    return workspace / _folder(recording) / "entering"


def _write_entering(workspace: Path, recording: Recording, layer: int, part: Part, hidden: Tensor) -> None:
    stem = (_rolling(workspace, recording) / f"{layer:03d}_{part}").relative_to(workspace).as_posix()
    write_value(workspace / f"{stem}.json", write_tensors(workspace, f"{stem}.safetensors", {"hidden": hidden}))


def _entering(reader: Parent, layer: int, part: Part, recording: Recording, workspace: Path) -> Tensor:
    """States (S, T, D) of a part, on the host, that enter a layer."""
    there = ((first, _read(first, part, recording, workspace)) for first in range(layer, -1, -1))
    first, hidden = next(((first, found) for first, found in there if found is not None), (0, None))
    if hidden is None:
        hidden = _embedded(reader, part, recording, workspace)
    _through(reader, range(first, layer), hidden)
    return hidden


def _read(layer: int, part: Part, recording: Recording, workspace: Path) -> Tensor | None:
    if _entered(layer, part, recording, workspace) is None:
        return None
    with in_use(workspace, _states(layer, recording)):  # they may be another run's, which has done with them by now
        found = _entered(layer, part, recording, workspace)
        return read_states([found], workspace) if found else None


def _through(reader: Parent, layers: Sequence[int], hidden: Tensor) -> None:
    """Take states through some layers, in place."""
    for layer in layers:
        module = reader.layer(layer)
        _pass(reader, module, layer, hidden, 0)


@torch.no_grad()
def _embedded(reader: Parent, part: Part, recording: Recording, workspace: Path) -> Tensor:
    place, shard = (workspace, recording.corpus.tokens), part.shard
    chosen = torch.cat([read_rows(*place, "train", *shard.train), read_rows(*place, "validation", *shard.validation)])
    size = reader.compute.sequences(chosen.shape[1])
    embedding, parts = reader.embedding(), chosen[slice(*part.rows(size))].split(size)
    return torch.cat([embedding(batch.to(reader.compute.device).long()).cpu() for batch in parts])


@torch.no_grad()
def _pass(
    reader: Parent,
    module: "DeciLMDecoderLayer",
    layer: int,
    hidden: Tensor,
    counted: int,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Run a layer over states (S, T, D) on the host, in place; returns statistics over the first `counted` sequences,
    whose tokens have `weights` (S, T).

    Only micro-batches lie on the device.
    """
    sums: dict[str, Tensor] = {}
    size = reader.compute.sequences(hidden.shape[1])
    parts = Parts(f"record layer {layer}", size)
    core: Any = module.core("ffn")
    with_experts = has_experts(module.config)
    seen: list[Tensor] = []
    watched = core if with_experts else linear_of(module, "down")
    hook = watched.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))

    def run(part: Tensor, counts: bool, weight: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        batch = part.to(reader.compute.device)
        seen.clear()
        context = reader.contexts(batch)[layer]
        normed = module.before("attention", batch)
        mixed = module.self_attn(hidden_states=normed, **context)[0]  # type: ignore[misc]
        middle = batch + module.after("attention", mixed)
        ffn_in = module.before("ffn", middle)
        ffn_out = core(ffn_in)
        out = middle + module.after("ffn", ffn_out)
        if not counts:
            return out, {}
        root = None if weight is None else weight.to(batch.device, torch.float32).flatten()[:, None].sqrt()
        own = (expert_sums if with_experts else _channel_sums)(module, seen.pop().flatten(0, 1), root)
        if root is not None:
            normed, mixed, ffn_in, ffn_out = (one.flatten(0, 1) * root for one in (normed, mixed, ffn_in, ffn_out))
        products = _products("attention_in", normed, mixed) | _products("ffn_in", ffn_in, ffn_out)
        return out, products | own

    def run_in_parts(
        batch: Tensor, counts: bool, weight: Tensor | None, count: int
    ) -> list[tuple[Tensor, dict[str, Tensor]]]:
        chunks = batch.chunk(count)
        of_chunks = [None] * len(chunks) if weight is None else weight.chunk(count)
        return [run(part, counts, own) for part, own in zip(chunks, of_chunks, strict=True)]

    for segment, counts in ((hidden[:counted], True), (hidden[counted:], False)):
        for number, batch in enumerate(segment.split(size) if len(segment) else ()):
            weight = weights[number * size : (number + 1) * size] if counts and weights is not None else None
            made = parts.run(partial(run_in_parts, batch, counts, weight))
            batch.copy_(torch.cat([out for out, _ in made]))
            for _, products in made:
                for name, value in products.items():
                    _add(sums, name, value)
    hook.remove()
    return sums


def _channel_sums(_: object, entering: Tensor, root: Tensor | None) -> dict[str, Tensor]:
    """Sums over tokens (N, F) that enter the last matrix of an FFN; root: of their weights (N, 1)."""
    channels = entering.float()
    sizes = channels.abs()
    if root is not None:
        sizes, channels = sizes * root.square(), channels * root
    return {"ffn_gram": channels.T @ channels, "ffn_contribution": sizes.sum(0)}


def _products(name: str, inputs: Tensor, outputs: Tensor) -> dict[str, Tensor]:
    x, y = (states.flatten(0, -2).float() for states in (inputs, outputs))
    return {f"{name}_gram": x.T @ x, f"{name}_cross": x.T @ y}


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
