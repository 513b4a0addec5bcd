"""`puzzle export`: a child in the format an engine loads, refused with a sentence where the format cannot express it.

Every export is checked after it was written. A folder is loaded again as a stranger would and must give the very
logits. A GGUF file is read back and must hold the very weights that its precision leaves; where llama.cpp is
installed, its logits are compared with torch on the weights that the file holds, and its tokens with transformers'
(tasks/export/tokenizer_check.py). The logits of a folder are compared where vLLM is installed and can run the child,
and there the greedy tokens too.
"""

import copy
import difflib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blocks.engine_limits import EngineLimit, gaps, is_whole, limits_of
from blocks.errors import PuzzleError, PuzzleFailure
from blocks.parent import config_of
from tasks.engines.base import Engine, Load, Session
from tasks.engines.llama_cpp import LlamaCpp
from tasks.engines.llama_library import EngineFailed
from tasks.engines.vllm_engine import Vllm, cannot
from tasks.export.folder import ExportError, export_folder, native_config
from tasks.export.tokenizer_check import check_tokenizer
from tasks.gguf.reader import read_gguf
from tasks.gguf.tokenizer import (
    NO_TOKENIZER,
    TokenizerLimit,
    copied_tokenizer,
    fields_of,
    left_out,
    open_tokenizer,
    stops_of,
    with_stops,
)
from tasks.gguf.tokenizer_reader import tokenizer_of
from tasks.gguf.writer import PRECISIONS, UnknownPrecision, write_gguf
from tasks.inputs.children import Origin, in_precision, open_child, origin_of
from tasks.inputs.corpus import installed_file

NONE = "none"  # for --tokenizer-from
FORMATS = ("gguf", "nemotron-nas", "transformers", "native")
ALIASES = {"f32": "float32", "fp32": "float32", "f16": "float16", "fp16": "float16", "bf16": "bfloat16"}
CHECK_TOKENS, CHECK_STEPS = 32, 8
LOGITS_TOLERANCE = 1e-3  # float32 inside the engines too: sums in another order
# mean KL in nats: engines round the activations of a matrix product to the precision of its weights as well
KL_TOLERANCE = {"float16": 1e-4, "bfloat16": 5e-3, "q8_0": 2e-2}
OWN_KL = 2.0  # beyond that, what torch itself loses in that precision, so many times: some models stand less of it
Step = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Logits of an engine beside torch's on the same weights: largest difference, mean KL in nats, top-1 agreement."""

    most: float
    kl: float
    agreement: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and what a person should know of it."""

    path: Path
    notes: tuple[str, ...]


def precision_of(text: str, form: str) -> str:
    """The precision a person named, e.g. bf16. UnknownPrecision for one that the format does not have."""
    name = ALIASES.get(text.lower(), text.lower())
    allowed = list(PRECISIONS) if form == "gguf" else ["float32", "float16", "bfloat16"]
    if name not in allowed:
        short = {long: short for short, long in ALIASES.items() if not short.startswith("fp")}
        offered = ", ".join(short.get(one, one) for one in allowed)
        raise UnknownPrecision(f"{form} has no precision {text!r} here: it is one of {offered}.")
    return name


def format_of(text: str) -> str:
    """One of FORMATS. PuzzleError, with a guess, for another."""
    if text not in FORMATS:
        near = difflib.get_close_matches(text.lower(), FORMATS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise PuzzleError(f"unknown format {text!r}: it is one of {', '.join(FORMATS)}.{hint}")
    return text


def export_as(
    child: Path,
    form: str,
    precision: str | None,
    target: Path,
    tokenizer_from: Path | None = None,
    step: Step = lambda text: None,
) -> Exported:
    """Write a child (a folder or a GGUF file) in another format; check it. `step` hears what is done next.

    precision: None is the child's own, by its config; float32 for a GGUF file.
    Raises EngineLimit when the format cannot express the child, ExportError when the check fails.
    """
    form = format_of(form)
    precision = precision_of(precision or _own_precision(child), form)
    dtype = torch.float32 if form == "gguf" else getattr(torch, precision)
    step("loading the child")
    model = open_child(child, dtype)
    refuse(model.config, form)
    _refuse_target(child, form, target)
    step("writing, then reading back to compare logits")
    if form == "gguf":
        return export_gguf(model, child, precision, target, tokenizer_from)
    card = child / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {origin_of(child).name}\n"
    notes = ["checked: loaded as a stranger would, it gives the very logits"]
    with tempfile.TemporaryDirectory(prefix="puzzle-tokenizer-") as folder:
        if child.is_file():
            notes.insert(0, _tokenizer_read(child, Path(folder)))
        files_from = child if child.is_dir() else Path(folder)
        export_folder(model, files_from, target, text, heterogeneous=form == "nemotron-nas")
    if form != "native":
        notes.append(check_in_vllm(model, target, precision, step))
    return Exported(path=target, notes=tuple(notes))


def _own_precision(child: Path) -> str:
    """What the weights of a child are, by its config."""
    dtype = torch.float32 if child.is_file() else getattr(config_of(child), "dtype", None) or torch.float32
    return str(dtype).removeprefix("torch.")


def _refuse_target(child: Path, form: str, target: Path) -> None:
    """PuzzleError, before anything is computed, where nothing can be written."""
    if target.resolve() == child.resolve():
        raise PuzzleError(f"{target} is the child itself: name another --out.")
    if target.exists() and target.is_dir() == (form == "gguf"):
        kind = "a folder, and gguf is a file" if form == "gguf" else f"a file, and {form} is a folder"
        raise PuzzleError(f"{target} is {kind}: name another --out.")
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PuzzleError(f"cannot write to {target.parent}: {error.strerror}. Name another --out.") from error


def _tokenizer_read(path: Path, folder: Path) -> str:
    """Write the tokenizer of a GGUF file as transformers has it; a sentence. Raises TokenizerLimit."""
    fields = copied_tokenizer(path)
    if fields.get("tokenizer.ggml.model", "no_vocab") == "no_vocab":
        return f"tokenizer: none, because {path.name} has none"
    try:
        tokenizer = tokenizer_of(fields)
    except (ValueError, KeyError, IndexError) as error:
        raise TokenizerLimit(f"the tokenizer of {path.name} cannot be given to transformers: {error}") from error
    tokenizer.save_pretrained(folder)
    said = check_tokenizer(path, tokenizer)
    return f"tokenizer: read from {path.name}; {'; '.join(said)}"


def refuse(config: Any, form: str) -> None:
    """EngineLimit when a format cannot express a child with this DeciLMConfig."""
    if form == "gguf":
        missing = gaps("llama.cpp", config)
        if missing:
            raise EngineLimit(f"GGUF (architecture deci) cannot express {'; '.join(missing)}: take transformers.")
    if form == "nemotron-nas":
        _refuse_widths(config)
    if form == "native" and native_config(config) is None:
        raise EngineLimit("native needs layers that are all alike and whole, these differ: take transformers or gguf.")


def _refuse_widths(config: Any) -> None:
    """Engines that read `ffn_mult` round every width up to a multiple of 256."""
    widths = {
        layer: block["ffn"].get("intermediate_size", config.intermediate_size)
        for layer, block in enumerate(config.block_configs)
        if is_whole(block["ffn"])
    }
    wrong = {layer: width for layer, width in widths.items() if width % 256}
    if wrong:
        layer, width = next(iter(wrong.items()))
        raise EngineLimit(
            f"nemotron-nas needs FFN widths that are multiples of 256; layer {layer} has {width}"
            f"{f', {len(wrong) - 1} more are wrong' if len(wrong) > 1 else ''}: take transformers, which vLLM reads "
            "too, or search over widths that are multiples of 256."
        )


def export_gguf(model: Any, child: Path, precision: str, target: Path, tokenizer_from: Path | None = None) -> Exported:
    """Write and check a GGUF file; see export_as. It comes to `target` when every check was passed."""
    origin = origin_of(child)
    tokenizer, note = find_tokenizer(child, model.config.vocab_size, origin, tokenizer_from)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        part = write_gguf(model, Path(folder) / target.name, precision, tokenizer, origin.name or child.name)
        back = read_gguf(part)
        notes = [note, check_weights(model, back, part, precision), *_tokenizer_checked(part, child, tokenizer_from)]
        missing = LlamaCpp().missing()
        if missing:
            notes.append(f"not compared with llama.cpp's logits: {missing}")
        else:
            notes.append(check_logits(back, part, precision))
        part.replace(target)
    return Exported(path=target, notes=tuple(notes))


def _tokenizer_checked(path: Path, child: Path, tokenizer_from: Path | None) -> list[str]:
    """What the comparison of a GGUF file's tokenizer with the child's own found; nothing where one has none."""
    own = open_tokenizer(child) if child.is_dir() and copied_tokenizer(path) != NO_TOKENIZER else None
    if own is None:
        return []
    return check_tokenizer(path, own, named=tokenizer_from is not None)


def find_tokenizer(child: Path, vocab_size: int, origin: Origin, named: Path | None) -> tuple[dict[str, Any], str]:
    """The tokenizer's fields for a GGUF file and a sentence on where they come from. Raises TokenizerLimit."""
    if named is not None and str(named) == NONE:
        return NO_TOKENIZER, "tokenizer: none, as asked, so the file takes token ids only"
    source = named or (child if child.is_file() else _parents_gguf(origin))
    if source is not None:
        fields = copied_tokenizer(source)
        size = len(fields.get("tokenizer.ggml.tokens", ()))
        if size and size != vocab_size:
            raise PuzzleError(f"{source.name} has {size} tokens, the child {vocab_size}: it is not the parent's GGUF.")
        return fields, f"tokenizer: copied from {source.name}"
    tokenizer = open_tokenizer(child)
    if tokenizer is None:
        return NO_TOKENIZER, (
            f"tokenizer: none, because {child} has none, so the file takes token ids only; name a GGUF of the parent "
            "with --tokenizer-from to have its tokenizer copied"
        )
    fields = with_stops(fields_of(tokenizer, vocab_size), stops_of(child))
    note = "tokenizer: converted from the folder's, as transformers opens it"
    gone = left_out(tokenizer, vocab_size)
    if gone:
        note += f"; left out, because the model has no rows for them: {', '.join(map(repr, gone))}"
    if "tokenizer.ggml.eos_token_id" not in fields:
        note += "; neither it nor the config names a token that ends a text, so llama.cpp takes its own default, 11"
    return fields, note


def _parents_gguf(origin: Origin) -> Path | None:
    """The GGUF file of a package parent, where its package is installed."""
    words = origin.parent_source.removeprefix("package ").split(", ", 1)
    if not origin.parent_source.startswith("package ") or len(words) != 2:
        return None
    try:
        return installed_file(words[0], words[1], PuzzleError)
    except PuzzleError:
        return None


def check_weights(model: Any, back: Any, path: Path, precision: str) -> str:
    """`back`, read from the file, is of the same architecture and has weights as near as the precision lets them be."""
    if back.config.block_configs != model.config.block_configs:
        raise ExportError(f"{path.name}, read back, has another architecture: it was not written right")
    own = model.state_dict()
    worst = max(_relative(own[name], tensor) for name, tensor in back.state_dict().items())
    limit = {"float32": 0.0, "float16": 2e-3, "bfloat16": 8e-3, "q8_0": 2e-2}[precision]
    if worst > limit:
        raise ExportError(
            f"{path.name}, read back, differs by {worst:.2g} of a tensor's size; {precision} allows {limit}"
        )
    return f"checked: read back, the same architecture, weights within {worst:.2g} of a tensor's size"


def _relative(own: Tensor, other: Tensor) -> float:
    """Norm of the difference over the norm."""
    size = own.float().norm()
    return float((own.float() - other).norm() / size) if size else float(other.norm())


def check_logits(back: Any, path: Path, precision: str) -> str:
    """llama.cpp beside torch on `back`, the weights of the file. Raises ExportError beyond the tolerance."""
    return verdict(compare_logits(back, path), LlamaCpp(), path, precision)


def check_in_vllm(model: Any, folder: Path, precision: str, step: Step = lambda text: None) -> str:
    """vLLM beside torch on an exported folder's weights, or why there is nothing to compare.

    Raises ExportError beyond the tolerance, EngineFailed when vLLM cannot load what it should be able to.
    """
    engine = Vllm()
    reason = engine.missing() or cannot(config_of(folder))
    if reason is None and precision not in engine.precisions:
        reason = f"it is driven in {' and '.join(engine.precisions)} only"
    if reason:
        return f"not compared with vLLM's logits: {reason}"
    tokens = min(CHECK_TOKENS, model.config.max_position_embeddings - CHECK_STEPS)
    step("starting vLLM with what was written (about half a minute on an idle machine)")
    try:
        session = engine.load(folder, Load(precision=precision, context_tokens=tokens + CHECK_STEPS))
    except EngineFailed as error:
        raise EngineFailed(
            f"{folder} was written and gives torch's logits, but vLLM does not load it: {error}"
        ) from error
    try:
        step(f"comparing the logits of {tokens} tokens in vLLM and in torch")
        ids = _check_ids(model, tokens)
        exact = model if model.dtype == torch.float32 else in_precision(copy.deepcopy(model), torch.float32)
        text = verdict(compare(session, exact, ids), engine, folder, precision, own_kl(model, exact, ids))
        return text + (_greedy(session, exact, ids, folder) if precision == "float32" else "")
    finally:
        session.close()


@torch.inference_mode()
def _greedy(session: Session, model: Any, ids: Tensor, path: Path) -> str:
    """An engine's greedy tokens after `ids` (1, T) are torch's, or tie with them within the tolerance."""
    made = session.generate(ids[0].tolist(), CHECK_STEPS)
    whole = torch.cat([ids, torch.tensor([made])], dim=1)
    rows = model(whole, use_cache=False).logits[0, ids.shape[1] - 1 : -1]
    behind = rows.max(-1).values - rows[torch.arange(len(made)), made]
    if not float(behind.max()) <= LOGITS_TOLERANCE:
        raise ExportError(
            f"the engine's greedy tokens on {path.name} are not torch's: logits {behind.max():.3g} below the largest"
        )
    return f", {len(made)} greedy tokens equal"


@torch.inference_mode()
def own_kl(model: Any, exact: Any, ids: Tensor) -> float:
    """Mean KL in nats of torch in the model's precision from torch in float32, on the same weights."""
    if model is exact:
        return 0.0
    logits = [one(ids, use_cache=False).logits[0].float() for one in (exact, model)]
    return difference(*logits).kl


def verdict(found: Difference, engine: Engine, path: Path, precision: str, own_kl: float = 0.0) -> str:
    """A sentence, or ExportError beyond the tolerance; `own_kl` is what torch itself loses in this precision."""
    limit = LOGITS_TOLERANCE if precision == "float32" else max(KL_TOLERANCE[precision], OWN_KL * own_kl)
    value, what = (found.most, "largest difference of logits") if precision == "float32" else (found.kl, "KL, nats")
    if not value <= limit:
        raise ExportError(
            f"{limits_of(engine.name).title} does not give torch's logits on {path.name}: {what} {value:.3g}, allowed "
            f"{limit:.3g}"
        )
    return (
        f"checked: {engine.version()} against torch on the same weights, {found.tokens} tokens: {what} {value:.2g} "
        f"(allowed {limit:.3g}), top-1 agreement {found.agreement:.0%}"
    )


def compare_logits(model: Any, path: Path, tokens: int = CHECK_TOKENS, exact: bool = True) -> Difference:
    """llama.cpp's logits of a GGUF file beside those of a model in torch, random tokens."""
    ids = _check_ids(model, tokens)
    session = LlamaCpp().load(path, Load(exact=exact, context_tokens=ids.shape[1]))
    try:
        return compare(session, model, ids)
    finally:
        session.close()


def _check_ids(model: Any, tokens: int) -> Tensor:
    """(1, T) random tokens."""
    length = min(tokens, model.config.max_position_embeddings)
    return torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def compare(session: Session, model: Any, ids: Tensor) -> Difference:
    """An engine's logits beside torch's on the same (1, T) tokens."""
    return difference(model(ids, use_cache=False).logits[0], session.logits(ids[0].tolist()))


def difference(own: Tensor, other: Tensor) -> Difference:
    """Two (T, V) logits compared."""
    if other.shape != own.shape:
        raise PuzzleFailure(f"the engine gives logits of shape {tuple(other.shape)}, torch {tuple(own.shape)}")
    log_own, log_other = own.double().log_softmax(-1), other.double().log_softmax(-1)
    return Difference(
        most=float((own - other).abs().max()),
        kl=float((log_own.exp() * (log_own - log_other)).sum(-1).mean()),
        agreement=float((own.argmax(-1) == other.argmax(-1)).double().mean()),
        tokens=len(own),
    )
