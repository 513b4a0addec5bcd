"""`puzzle export`: write a child in the format that an engine loads. A format that cannot express the child is refused.

Every export is checked after it was written. A folder is loaded again, as anyone would load it, and must give exactly
the same logits; where vLLM is installed and can run the child, vLLM's logits and greedy tokens are compared too. A GGUF
file is read back and must hold the child's weights as its precision rounds them; where llama.cpp is installed, its
logits (logits_check.py) and its tokens (tokenizer_check.py) are compared too.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blocks.engine_limits import EngineLimit, gaps, lost
from blocks.errors import PuzzleError, did_you_mean
from blocks.images import VISION
from blocks.parent import config_of
from blocks.resources import precision_name
from profiles.schema import PRECISION_ALIASES
from tasks.engines.llama_cpp import LlamaCpp
from tasks.engines.vllm_engine import Vllm, VllmPlugin
from tasks.export.child_tokenizer import find_tokenizer, open_tokenizer, write_tokenizer
from tasks.export.compressed import INTEGERS, compress
from tasks.export.folder import ExportError, export_folder, layer_sizes, native_config
from tasks.export.logits_check import Step, check_in_vllm, check_logits, no_step
from tasks.export.quantise import Recipe, judged, quantise_layers, refuse_rows
from tasks.export.tokenizer_check import check_tokenizer
from tasks.export.whole import export_whole
from tasks.gguf.reader import read_gguf
from tasks.gguf.tokenizer_writer import NO_TOKENIZER, copied_tokenizer
from tasks.gguf.writer import CORRECTED, PRECISIONS, Stored, UnknownPrecision, write_gguf
from tasks.inputs.children import in_precision, open_child, origin_of
from tasks.inputs.precision import FOLDER_PRECISIONS
from tasks.inputs.vision import sees

FORMATS = ("gguf", "nemotron-nas", "vllm-plugin", "transformers", "native")
FITTED = (*CORRECTED, *INTEGERS)  # to text
# what the card of a folder for vLLM says besides
SERVED = """
## Serving in vLLM

In this folder, with vLLM 0.32:

    pip install ./vllm_plugin
    vllm serve . --trust-remote-code
"""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and what a person should know of it."""

    path: Path
    notes: tuple[str, ...]


def precision_of(text: str, form: str) -> str:
    """The full name of the precision that a person named, e.g. `bfloat16` for `bf16`.

    Raises UnknownPrecision when the export format `form` does not have it.
    """
    name = PRECISION_ALIASES.get(text.lower(), text.lower())
    allowed = tuple(PRECISIONS) if form == "gguf" else (*FOLDER_PRECISIONS, *INTEGERS)
    if name not in allowed:
        raise UnknownPrecision(f"{form} has no precision {text!r} here: it is one of {', '.join(allowed)}.")
    return name


def timed_precision(text: str, form: str) -> str:
    """A precision in which a model is written to be timed. Raises UnknownPrecision."""
    precision = precision_of(text, form)
    if precision in FITTED:
        raise UnknownPrecision(
            f"{precision} is written by `puzzle export` alone, which fits it to text: speeds are measured in float32, "
            "float16, bfloat16 or q8_0."
        )
    return precision


def format_of(text: str) -> str:
    """One of FORMATS. Raises PuzzleError, with a guess, for another."""
    if text not in FORMATS:
        raise PuzzleError(f"unknown format {text!r}: it is one of {', '.join(FORMATS)}.{did_you_mean(text, FORMATS)}")
    return text


def export_as(
    child: Path,
    form: str,
    precision: str | None,
    target: Path,
    tokenizer_from: Path | None = None,
    step: Step = no_step,
    calibration: Callable[[], Tensor | None] = lambda: None,
) -> Exported:
    """Write a child (a folder or a GGUF file) in another format, then check what was written.

    precision: None stands for the precision that the child's config names, and for float32 where the child is a GGUF
    file. step: called with a sentence before each part of the work that takes long. calibration: gives tokens (S, T) of
    a text, which the types of 4 and 5 bits are fitted to (tasks/export/quantise.py).
    Raises EngineLimit when the format cannot express the child, ExportError when the check fails.
    """
    form = format_of(form)
    precision = precision_of(precision or own_precision(child), form)
    refuse_blind(child, form, precision)
    fit_to = calibration() if precision in FITTED else None
    if precision in FITTED and fit_to is None:
        raise PuzzleError(
            f"{precision} is fitted to text, and beside {child} lies no run to take it from: name a text with "
            f"--calibrate FILE, or take {'q8_0' if form == 'gguf' else 'bfloat16'}, which needs none."
        )
    step("loading the child")
    model = open_child(child, torch.float32 if form == "gguf" or fit_to is not None else getattr(torch, precision))
    refuse(model.config, form)
    refuse_target(child, form, target)
    if fit_to is not None:
        refuse_rows(model, precision)
        step(f"rounding to {precision}, layer after layer")
    else:
        step("writing, then reading back to compare logits")
    if form == "gguf":
        return _with_projector(export_gguf(model, child, precision, target, tokenizer_from, fit_to), child)
    notes, compressed = ["checked: loaded again with transformers, it gives exactly the same logits"], None
    if fit_to is not None:
        dtype = getattr(torch, own_precision(child))
        sentence, compressed = judged(model, fit_to, precision, lambda part: compress(model, part, precision, dtype))
        notes.insert(0, sentence)
        model = in_precision(model, dtype)
    card = child / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {origin_of(child).name}\n"
    text = text.replace(SERVED, "") + (SERVED if form == "vllm-plugin" else "")
    if sees(child):
        return Exported(path=target, notes=tuple(export_whole(model, child, target, text)))
    with tempfile.TemporaryDirectory(prefix="puzzle-tokenizer-") as folder:
        if child.is_file():
            notes.insert(0, write_tokenizer(child, Path(folder)))
        files_from = child if child.is_dir() else Path(folder)
        export_folder(model, files_from, target, text, form, compressed)
    if form != "native":
        engine = VllmPlugin() if form == "vllm-plugin" else Vllm()
        notes.append(check_in_vllm(model, target, precision, step, engine))
    return Exported(path=target, notes=tuple(notes))


def own_precision(child: Path) -> str:
    """The precision of a child's weights, as its config names it."""
    dtype = None if child.is_file() else getattr(config_of(child), "dtype", None)
    return precision_name(dtype or torch.float32)


def refuse_target(child: Path, form: str, target: Path) -> None:
    """Raise PuzzleError, before anything is computed, when the target cannot be written."""
    if target.resolve() == child.resolve():
        raise PuzzleError(f"{target} is the child itself: name another --out.")
    if target.exists() and target.is_dir() == (form == "gguf"):
        kind = "a folder, and gguf is a file" if form == "gguf" else f"a file, and {form} is a folder"
        raise PuzzleError(f"{target} is {kind}: name another --out.")
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PuzzleError(f"cannot write to {target.parent}: {error.strerror}. Name another --out.") from error


def refuse(config: Any, form: str) -> None:
    """Raise EngineLimit when a format cannot express a child with this DeciLMConfig."""
    if form == "gguf":
        missing = gaps("llama.cpp", config)
        if missing:
            raise EngineLimit(f"GGUF (architecture deci) cannot express {'; '.join(missing)}: take transformers.")
    if form == "nemotron-nas":
        _refuse_widths(config)
    if form in ("nemotron-nas", "vllm-plugin"):
        missing = lost(form, config)
        if missing:
            raise EngineLimit(f"no engine that loads {form} runs {'; '.join(missing)}: take transformers.")
    if form == "native" and native_config(config) is None:
        raise EngineLimit("native needs layers that are all alike and whole, these differ: take transformers or gguf.")


def refuse_blind(child: Path, form: str, precision: str) -> None:
    """Raise EngineLimit for a format in which a child that sees would lose its sight without a word."""
    if sees(child) and (form in ("nemotron-nas", "vllm-plugin") or precision in INTEGERS):
        raise EngineLimit(
            f"{child} sees, and no engine that loads {form if precision not in INTEGERS else precision} runs a vision "
            "tower before layers that differ: take transformers; or gguf, beside which llama.cpp loads the parent's "
            f"mmproj. For its text alone, take the folder {VISION} out of a copy of it."
        )


def _with_projector(made: Exported, child: Path) -> Exported:
    """What llama.cpp needs besides the GGUF file of a child that sees."""
    if not sees(child):
        return made
    told = (
        "this is the text model: give llama.cpp the parent's own mmproj file too (--mmproj), which fits the child as "
        "it is, since vision tower and projector are the parent's"
    )
    return replace(made, notes=(*made.notes, told))


def _refuse_widths(config: Any) -> None:
    """Raise EngineLimit for FFN widths that engines would change: they round up to a multiple of 256."""
    sizes = {layer: layer_sizes(config, layer)[1] or () for layer in range(len(config.block_configs))}
    wrong = {layer: width[0] for layer, width in sizes.items() if len(width) == 1 and width[0] % 256}
    if wrong:
        layer, width = next(iter(wrong.items()))
        raise EngineLimit(
            f"nemotron-nas needs FFN widths that are multiples of 256; layer {layer} has {width}"
            f"{f', {len(wrong) - 1} more are wrong' if len(wrong) > 1 else ''}: take transformers, which vLLM reads "
            "too, or search over widths that are multiples of 256."
        )


def export_gguf(
    model: Any,
    child: Path,
    precision: str,
    target: Path,
    tokenizer_from: Path | None = None,
    fit_to: Tensor | None = None,
) -> Exported:
    """Write and check a GGUF file; see export_as. It is moved to `target` when it has passed every check."""
    origin = origin_of(child)
    tokenizer, note = find_tokenizer(child, model.config.vocab_size, origin, tokenizer_from)
    target.parent.mkdir(parents=True, exist_ok=True)
    stored: Mapping[str, Stored] = {}
    notes = [note]
    if fit_to is not None:
        recipe = Recipe.uniform(precision, len(model.model.layers))
        sentence, stored = judged(model, fit_to, precision, lambda part: quantise_layers(model, part, recipe))
        notes.append(sentence)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        part = write_gguf(model, Path(folder) / target.name, precision, tokenizer, origin.name or child.name, stored)
        back = read_gguf(part)
        notes += [check_weights(model, back, part, precision), *_tokenizer_checked(part, child, tokenizer_from)]
        missing = LlamaCpp().missing()
        if missing:
            notes.append(f"not compared with llama.cpp's logits: {missing}")
        else:
            notes.append(check_logits(back, part, precision))
        part.replace(target)
    return Exported(path=target, notes=tuple(notes))


def _tokenizer_checked(path: Path, child: Path, tokenizer_from: Path | None) -> list[str]:
    """Sentences on how a GGUF file's tokenizer compares with the child's; none where one of them has no tokenizer."""
    own = open_tokenizer(child) if child.is_dir() and copied_tokenizer(path) != NO_TOKENIZER else None
    if own is None:
        return []
    return check_tokenizer(path, own, named=tokenizer_from is not None)


def check_weights(model: Any, back: Any, path: Path, precision: str) -> str:
    """Raise ExportError unless the model `back`, which was read from the file, has the architecture of `model`, and its
    weights up to the rounding of the precision. Returns a sentence.
    """
    if back.config.block_configs != model.config.block_configs:
        raise ExportError(f"{path.name}, read back, has another architecture: it was not written right")
    own = model.state_dict()
    worst = max(_relative(own[name], tensor) for name, tensor in back.state_dict().items())
    limit = {"float32": 0.0, "float16": 2e-3, "bfloat16": 8e-3}.get(precision, 2e-2)  # q8_0
    if worst > limit:
        raise ExportError(
            f"{path.name}, read back, differs by {worst:.2g} of a tensor's size; {precision} allows {limit}"
        )
    return f"checked: read back, the same architecture, weights within {worst:.2g} of a tensor's size"


def _relative(own: Tensor, other: Tensor) -> float:
    """Norm of the difference over the norm."""
    size = own.float().norm()
    return float((own.float() - other).norm() / size) if size else float(other.norm())
