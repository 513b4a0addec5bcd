"""An export's logits in the engine that loads it, beside torch's on the same weights.

float32 exports are held to a largest difference, others to a mean KL divergence. The engine is llama.cpp for a GGUF
file and vLLM for a folder; where the engine is not installed or cannot run the child, a sentence says so.
"""

import copy
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blocks.engine_limits import known_engine
from blocks.errors import PuzzleFailure
from blocks.parent import config_of
from blocks.resources import precision_name
from tasks.engines.base import Engine, LoadOptions, Session
from tasks.engines.errors import EngineFailed
from tasks.engines.llama_cpp import LlamaCpp
from tasks.engines.vllm_engine import Vllm, cannot
from tasks.export.folder import ExportError
from tasks.inputs.children import in_precision

CHECK_TOKENS, CHECK_STEPS = 32, 8
LOGITS_TOLERANCE = 1e-3  # float32 inside the engines too: sums in another order
# mean KL in nats: engines round the activations of a matrix product to the precision of its weights as well
KL_TOLERANCE = {"float16": 1e-4, "bfloat16": 5e-3, "w4a16": 5e-3, "q8_0": 2e-2, "w8a8": 2e-2}
OWN_KL = 2.0  # beyond that, what torch itself loses in that precision, so many times: some models stand less of it
Step = Callable[[str], None]  # called with a sentence before a part of the work that takes long


def no_step(text: str) -> None:
    """The `Step` of work that nobody watches."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Logits of an engine beside torch's on the same weights: largest difference, mean KL in nats, top-1 agreement."""

    most: float
    kl: float
    agreement: float
    tokens: int


def check_logits(back: Any, path: Path, precision: str) -> str:
    """Compare llama.cpp with torch on the weights that the file holds (`back`). Returns a sentence, or raises
    ExportError.
    """
    return verdict(compare_logits(back, path), LlamaCpp(), path, precision)


def check_in_vllm(model: Any, folder: Path, precision: str, step: Step = no_step, engine: Vllm | None = None) -> str:
    """Compare vLLM with torch on an exported folder's weights. Returns a sentence: the result, or why nothing was
    compared. engine: with the plugin or, as None, without.

    Raises ExportError beyond the tolerance, EngineFailed when vLLM cannot load what it should be able to.
    """
    engine, run_in = engine or Vllm(), precision_name(model.dtype)
    reason = engine.missing() or cannot(config_of(folder), engine.name)
    if reason is None and run_in not in engine.precisions:
        reason = f"puzzle runs it in {' and '.join(engine.precisions)} only"
    if reason:
        return f"not compared with vLLM's logits: {reason}"
    tokens = min(CHECK_TOKENS, model.config.max_position_embeddings - CHECK_STEPS)
    step("starting vLLM with what was written (about half a minute on an idle machine)")
    try:
        session = engine.load(folder, LoadOptions(precision=run_in, context_tokens=tokens + CHECK_STEPS))
    except EngineFailed as error:
        raise EngineFailed(
            f"{folder} was written and gives torch's logits, but vLLM does not load it: {error}"
        ) from error
    with closing(session):
        step(f"comparing the logits of {tokens} tokens in vLLM and in torch")
        ids = _check_ids(model, tokens)
        exact = model if model.dtype == torch.float32 else in_precision(copy.deepcopy(model), torch.float32)
        text = verdict(compare(session, exact, ids), engine, folder, precision, own_kl(model, exact, ids))
        text += _greedy(session, exact, ids, folder) if precision == "float32" else ""
        return text + unreached(model.config, tokens)


def unreached(config: Any, tokens: int) -> str:
    """That a text of so many tokens leaves a child's windows untried, since none of its tokens lies behind one."""
    longest = max(block["attention"].get("window_length") or 0 for block in config.block_configs)
    return f"; no text longer than its windows (up to {longest} tokens) was compared" if longest >= tokens else ""


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
    """A sentence on a comparison, or ExportError beyond the tolerance. own_kl: what torch itself loses in this
    precision.
    """
    limit = (
        LOGITS_TOLERANCE
        if precision == "float32"
        else max(KL_TOLERANCE.get(precision, KL_TOLERANCE["q8_0"]), OWN_KL * own_kl)
    )
    value, what = (found.most, "largest difference of logits") if precision == "float32" else (found.kl, "KL, nats")
    if not value <= limit:
        raise ExportError(
            f"{known_engine(engine.name).title} does not give torch's logits on {path.name}: {what} {value:.3g}, "
            f"allowed {limit:.3g}"
        )
    return (
        f"checked: {engine.version()} against torch on the same weights, {found.tokens} tokens: {what} {value:.2g} "
        f"(allowed {limit:.3g}), top-1 agreement {found.agreement:.0%}"
    )


def compare_logits(model: Any, path: Path, tokens: int = CHECK_TOKENS, exact: bool = True) -> Difference:
    """Compare llama.cpp's logits of a GGUF file with those of a model in torch, on random tokens."""
    ids = _check_ids(model, tokens)
    with closing(LlamaCpp().load(path, LoadOptions(exact=exact, context_tokens=ids.shape[1]))) as session:
        return compare(session, model, ids)


def _check_ids(model: Any, tokens: int) -> Tensor:
    """(1, T) random tokens."""
    length = min(tokens, model.config.max_position_embeddings)
    return torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def compare(session: Session, model: Any, ids: Tensor) -> Difference:
    """Compare an engine's logits with torch's on the same (1, T) tokens."""
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
