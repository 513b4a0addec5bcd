"""Open a finished child, or any parent, from a Hugging Face folder or a GGUF file."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from blocks.compute import HOST
from blocks.errors import ChildError, first_line
from blocks.export_code.modeling_decilm import DeciLMForCausalLM
from blocks.families import has_experts
from blocks.library import read_value
from blocks.parent import Parent, config_of, in_dtype
from blocks.records import ChildReport
from tasks.gguf.reader import read_gguf
from tasks.inputs.parent_weights import place_weights, weights_of


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a child's parent lies, as far as the run's report beside the child says."""

    parent_folder: Path | None = None
    parent_source: str = ""
    name: str = ""


def open_child(path: Path, dtype: torch.dtype | None = None) -> DeciLMForCausalLM:
    """The model of a child's folder, a parent's folder or a GGUF file, in evaluation mode. Raises ChildError."""
    if path.is_file():
        return in_precision(read_gguf(path), dtype)
    if config_of(path).model_type != "nemotron-nas":
        return in_precision(_plain_model(path), dtype)
    try:
        loaded: Any = DeciLMForCausalLM.from_pretrained(path, dtype=dtype or "auto", attn_implementation="sdpa")
    except (OSError, RuntimeError, ValueError) as error:
        raise ChildError(f"{path} cannot be loaded: {first_line(error)}") from error
    return loaded.eval()


def _plain_model(path: Path) -> DeciLMForCausalLM:
    """The model of a folder of the family's own architecture. Raises ChildError."""
    weights = weights_of(path)
    experts = has_experts(config_of(path))
    if (weights.extra and not experts) or "tie_word_embeddings" in weights.settings:
        raise ChildError(
            f"{path} is not a plain folder (renamed or left-over tensors, or a tied head that is its own): "
            "load it with transformers and save it with save_pretrained."
        )
    if not weights.extra:
        return Parent(path, HOST).model()
    # save_pretrained writes experts one by one, or under other names
    with tempfile.TemporaryDirectory(prefix="puzzle-experts-") as folder:
        place_weights(path, Path(folder), weights, shutil.copyfile)
        shutil.copyfile(path / "config.json", Path(folder) / "config.json")
        return Parent(Path(folder), HOST).model()


def in_precision(model: DeciLMForCausalLM, dtype: torch.dtype | None) -> DeciLMForCausalLM:
    """Convert the weights in place, and say so in the config."""
    in_dtype(model, dtype or torch.float32)
    if dtype is not None:
        model.config.dtype = dtype
    return model


def origin_of(child: Path) -> Origin:
    """The parent of a child, from `report.json` beside the child's folder. An empty Origin where there is none."""
    report = child.resolve().parent / "report.json"
    if not report.is_file():
        return Origin(name=child.stem)
    try:
        parent = read_value(report, ChildReport).parent
    except ValidationError:
        return Origin(name=child.stem)
    workspace = report.parents[2] if len(report.parents) > 2 else report.parent
    folder = workspace / parent.folder
    return Origin(
        parent_folder=folder if folder.is_dir() else None,
        parent_source=parent.source,
        name=f"{report.parent.name} of {parent.name}",
    )
