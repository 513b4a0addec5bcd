"""A parent in another basis of its residual stream, so that types of few bits lose less.

The hidden states are multiplied by a random orthogonal matrix Q, and every matrix that reads or writes them by its
inverse. First the gain of each norm goes into the matrices that read what it has normed, since an RMSNorm without a
gain commutes with Q. No logit changes but by rounding (QuaRot, arXiv 2404.00456, section 4). What changes is how values
spread over channels: there are no outliers, and one scale fits a block of weights better. The head takes the final
norm's gain, so it is no longer the embedding's matrix: a parent whose two were one has that many parameters more.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from blocks.compute import HOST
from blocks.errors import ParentError
from blocks.export_code.families_decilm import FAMILIES, Family
from blocks.files import write_text
from blocks.parent import Parent
from tasks.inputs.parent_weights import INDEX, weight_files


def _rotatable(family: Family) -> bool:
    """Whether it reads the residual stream through RMSNorms with a plain gain, and adds to it without a norm."""
    return family.norm == "RMSNorm" and all(before and not after for before, after in family.norms.values())


ROTATABLE = tuple(name for name, family in FAMILIES.items() if _rotatable(family))
WRITERS = ("output", "down")  # add to the residual stream


def rotated_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the rotated parent. Raises ParentError for a family that cannot be rotated."""
    if values.get("model_type") not in ROTATABLE:
        raise ParentError(
            f"parent.rotate: {values.get('model_type')} has norms whose gains no matrix can take. Leave parent.rotate "
            f"out, or take a parent of {', '.join(ROTATABLE)}."
        )
    return {**values, "tie_word_embeddings": False}


def rotate(folder: Path) -> str:
    """Rotate the parent of a folder in place, layer by layer. Its weights are float32 afterwards, in a file a layer;
    config.json goes on to name the dtype that a child follows. Returns a sentence on it.
    """
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parent, before = Parent(folder, HOST), weight_files(folder)
    size = parent.config.hidden_size
    basis = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0)).double())[0]
    files = {}

    def written(name: str, tensors: dict[str, Tensor]) -> None:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, {"format": "pt"})
        files.update(dict.fromkeys(tensors, name))

    for index in range(parent.depth):
        prefix = f"model.layers.{index}."
        turned = _layer(parent.tensors(prefix), parent.family, basis)
        written(f"rotated-{index:05d}.safetensors", {prefix + name: tensor for name, tensor in turned.items()})
    gain = parent.tensors("model.norm.")["weight"]
    embedding, head = parent.tensors("model.embed_tokens.")["weight"], parent.head_weight()
    written(
        "rotated-head.safetensors",
        {
            "model.embed_tokens.weight": _read(embedding, torch.ones(size), basis),
            "model.norm.weight": torch.ones(size),
            "lm_head.weight": _read(head, gain, basis),
        },
    )
    for name in before:
        (folder / name).unlink()
    write_text(folder / INDEX, json.dumps({"metadata": {}, "weight_map": files}, indent=2, sort_keys=True) + "\n")
    write_text(folder / "config.json", json.dumps(rotated_config(values), ensure_ascii=False))
    more = f"; its head is no longer the embedding: {head.numel() / 1e6:.1f} M parameters more"
    return (
        "its residual stream is rotated: the same logits, but for rounding" + more * parent.config.tie_word_embeddings
    )


def _read(weight: Tensor, gain: Tensor, basis: Tensor) -> Tensor:
    """(K, D) or (E, K, D) matrix that reads what a norm with this gain (D,) lets through, in the new basis (D, D)."""
    return ((weight.double() * gain.double()) @ basis).float()


def _layer(tensors: Mapping[str, Tensor], family: Family, basis: Tensor) -> dict[str, Tensor]:
    """The tensors of a layer in the new basis, by the same names."""
    found = dict(tensors)  # biases of what reads and norms of heads stay: they act on channels of their own
    for subblock, (norm, _) in family.norms.items():
        gain = tensors[f"{norm}.weight"]
        found[f"{norm}.weight"] = torch.ones_like(gain)
        for name, tensor in tensors.items():
            parts = family.parts(subblock)
            roles = parts.get(name) or parts.get(name.rpartition(".")[0], ())
            if set(roles) & set(WRITERS):  # (D, K), or a bias (D,), or of all experts (E, D, K)
                found[name] = (basis.T @ tensor.double()).float()
            elif roles and tensor.dim() >= 2:
                found[name] = _read(tensor, gain, basis)
    return found
