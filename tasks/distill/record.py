"""Record the parent's activations in one pass, with one layer in memory at a time.

For each layer the pass writes the hidden states that enter it, for a bounded number of sequences, and the statistics
that initialisation and closed-form fits need. A layer is recorded once; a killed pass goes on where it stopped.

Legend: S = sequences, T = tokens, D = hidden_size, F = intermediate_size.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from blocks.compute import Compute
from blocks.fit import elimination_order
from blocks.library import digest_of, is_whole, keep, read_tensors, read_value, remember, write_tensors, write_value
from blocks.packed import pack_linears
from blocks.parent import Parent
from blocks.records import CorpusInfo, LayerRecord, ParentInfo, Ref
from blocks.runtime import kept_per_device
from profiles.schema import Record

if TYPE_CHECKING:
    from blocks.export_code.modeling_decilm import DeciLMDecoderLayer

VERSION = 2
BATCH = 8
CHUNK = 32  # channels that the elimination takes out at a time


def record_key(parent: ParentInfo, corpus: CorpusInfo, settings: Record, ridge: float) -> str:
    """Digest of everything a recording depends on."""
    return digest_of(
        parent=parent.fingerprint, corpus=corpus.fingerprint, settings=settings, ridge=ridge, version=VERSION
    )


@kept_per_device(2)
def _open(folder: Path, compute: Compute | None) -> Parent:
    return Parent(folder, compute)


def open_parent(folder: Path, compute: Compute | None = None) -> Parent:
    """The parent, kept open for later calls. Its tensors need a `compute`, its config does not."""
    return _open(folder, compute)


def _manifest(layer: int, key: str, workspace: Path) -> Path:
    return workspace / "record" / key / f"layer_{layer:03d}.json"


def recorded(layer: int, key: str, workspace: Path) -> LayerRecord | None:
    """The stored record of a layer when its files are whole, else None."""
    path = _manifest(layer, key, workspace)
    # its files are large, and needed only where a block or a score is missing
    return remember(path, LayerRecord, lambda record: [record.boundary, record.statistics], workspace, "when read")


def record_layer(
    layer: int,
    parent: ParentInfo,
    corpus: CorpusInfo,
    settings: Record,
    ridge: float,
    workspace: Path,
    compute: Compute,
) -> LayerRecord:
    """Record one layer; returns the stored record when its files are whole."""
    key = record_key(parent, corpus, settings, ridge)
    stored = recorded(layer, key, workspace)
    if stored is not None:
        return stored
    folder = f"record/{key}"
    started = time.perf_counter()
    reader = open_parent(workspace / parent.folder, compute)
    hidden = _entering(reader, layer, corpus, settings, workspace, folder)
    module = reader.layer(layer)
    core: Any = module.mlp
    down: Tensor = core.down_proj.weight.data
    pack_linears(module)  # as in scoring, so that the parent's own block gives these states again bit for bit
    kept = torch.cat([hidden[: settings.hidden_sequences], hidden[settings.statistics_sequences :]])
    boundary = write_tensors(
        workspace,
        f"{folder}/boundary_{layer:03d}.safetensors",
        {"train": kept[: settings.hidden_sequences], "validation": kept[settings.hidden_sequences :]},
    )
    after, statistics = _pass(reader, module, layer, hidden, settings.statistics_sequences)
    statistics["ffn_contribution"] = statistics["ffn_contribution"] * down.norm(dim=0)
    statistics["ffn_order"] = elimination_order(statistics["ffn_gram"], down, ridge, chunk=CHUNK)
    reference = write_tensors(workspace, f"{folder}/statistics_{layer:03d}.safetensors", statistics)
    if layer + 1 < reader.depth:
        _write_entering(workspace, folder, layer + 1, after)
    record = LayerRecord(layer=layer, boundary=boundary, statistics=reference, seconds=time.perf_counter() - started)
    keep(_manifest(layer, key, workspace), record, [record.boundary, record.statistics], workspace)
    for leftover in _rolling(workspace, folder, layer):
        leftover.unlink(missing_ok=True)
    return record


def _rolling(workspace: Path, folder: str, layer: int) -> tuple[Path, Path]:
    stem = workspace / folder / f"entering_{layer:03d}"
    return stem.with_suffix(".safetensors"), stem.with_suffix(".json")


def _write_entering(workspace: Path, folder: str, layer: int, hidden: Tensor) -> None:
    """Write all states that enter `layer`; they are deleted once that layer is recorded."""
    data, manifest = _rolling(workspace, folder, layer)
    write_value(manifest, write_tensors(workspace, f"{folder}/{data.name}", {"hidden": hidden}))


def _entering(reader: Parent, layer: int, corpus: CorpusInfo, settings: Record, workspace: Path, folder: str) -> Tensor:
    """States (S, T, D) that enter a layer: from the file of the pass, else computed again from the embedding."""
    _, manifest = _rolling(workspace, folder, layer)
    if manifest.exists():
        reference = read_value(manifest, Ref)
        if is_whole(workspace, reference):
            return read_tensors(workspace, reference, device=reader.compute.device)["hidden"]
    tokens = read_tensors(workspace, corpus.tokens, device=reader.compute.device)
    chosen = torch.cat(
        [tokens["train"][: settings.statistics_sequences], tokens["validation"][: settings.validation_sequences]]
    )
    with torch.inference_mode():
        hidden = reader.embedding()(chosen.long())
    for earlier in range(layer):
        module = reader.layer(earlier)
        pack_linears(module)
        hidden, _ = _pass(reader, module, earlier, hidden, 0)
    return hidden.clone()


@torch.inference_mode()
def _pass(
    reader: Parent, module: "DeciLMDecoderLayer", layer: int, hidden: Tensor, counted: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a layer over states (S, T, D); returns its output, and statistics over the first `counted` sequences."""
    sums: dict[str, Tensor] = {}
    parts = []
    core: Any = module.mlp
    attention: Any = module.self_attn
    seen: list[Tensor] = []
    hook = core.down_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    for segment, counts in ((hidden[:counted], True), (hidden[counted:], False)):
        for batch in segment.split(BATCH) if len(segment) else ():
            context = reader.contexts(batch)[layer]
            normed = getattr(module, module.attention_norms[0])(batch)
            mixed = attention(hidden_states=normed, **context)[0]
            middle = batch + _after(module, module.attention_norms[1], mixed)
            ffn_in = getattr(module, module.ffn_norms[0])(middle)
            ffn_out = core(ffn_in)
            channels = seen.pop().flatten(0, 1)
            parts.append(middle + _after(module, module.ffn_norms[1], ffn_out))
            if counts:
                _accumulate(sums, "attention_in", normed, mixed)
                _accumulate(sums, "ffn_in", ffn_in, ffn_out)
                _add(sums, "ffn_gram", channels.T @ channels)
                _add(sums, "ffn_contribution", channels.abs().sum(0))
    hook.remove()
    if "ffn_contribution" in sums:
        sums["ffn_contribution"] /= counted * hidden.shape[1]
    return torch.cat(parts), sums


def _after(module: "DeciLMDecoderLayer", norm: str | None, out: Tensor) -> Tensor:
    return out if norm is None else getattr(module, norm)(out)


def _accumulate(sums: dict[str, Tensor], name: str, inputs: Tensor, outputs: Tensor) -> None:
    x, y = inputs.flatten(0, 1), outputs.flatten(0, 1)
    _add(sums, f"{name}_gram", x.T @ x)
    _add(sums, f"{name}_cross", x.T @ y)


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
