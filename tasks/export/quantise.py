"""Round the matrices of a child's layers to a type of 4 or 5 bits, fitted to text.

Within a matrix, later columns make up for what earlier ones lost (blocks/error_correction.py). The layers are rounded
in order, and the text runs through those that are rounded already, so that a layer is fitted to the inputs that it will
have. Embedding and head become q8_0 (tasks/gguf/writer.py).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blocks.divergence import Head, kl_per_token, targets_of
from blocks.error_correction import InputGrams, correct
from blocks.errors import PuzzleError
from blocks.estimates import mean
from blocks.export_code.modeling_decilm import layer_contexts
from tasks.engines.ggml import GgmlRounding
from tasks.gguf.writer import PRECISIONS, Stored
from tasks.running.progress import Progress, no_progress

BLOCK = 32  # values that a block of these types holds
DAMPING = 0.01
BATCH = 8  # calibration sequences that run through a layer at a time


def quantise(model: Any, tokens: Tensor, precision: str) -> tuple[str, Mapping[str, Stored]]:
    """Round a model's layers in place on all but the last eighth of the tokens (S, T), S >= 2.

    Returns a sentence with the KL on that last eighth, from the model before, and what the file holds.
    """
    held_out, head = tokens[-max(1, len(tokens) // 8) :], Head(model.lm_head.weight)
    before = targets_of(_final_states(model, held_out), head)
    stored = quantise_layers(model, tokens[: -len(held_out)], precision)
    each, _ = kl_per_token(_final_states(model, held_out), before, head)
    kl = mean(each.view(held_out.shape).mean(1))
    error = f" ±{kl.error:.2g}" if len(held_out) > 1 else ""
    fitted = f"fitted to {tokens.shape[1] * (len(tokens) - len(held_out)):,} tokens"
    return (
        f"{precision} {fitted}: KL {kl.value:.3g}{error} nats from the child, on {held_out.numel():,} others",
        stored,
    )


@torch.no_grad()
def _final_states(model: Any, tokens: Tensor) -> Tensor:
    """States (S * T, D) after the final norm, of (S, T) tokens."""
    states = [model.model(batch, use_cache=False).last_hidden_state for batch in tokens.split(BATCH)]
    return torch.cat(states).flatten(0, 1)


@torch.no_grad()
def quantise_layers(
    model: Any, tokens: Tensor, precision: str, progress: Progress = no_progress
) -> Mapping[str, Stored]:
    """Round every matrix of the model's layers, in place, to what `precision` can hold.

    tokens: (S, T) calibration text. Returns what the file holds of each matrix, by the weight's name.
    Raises PuzzleError where a matrix has rows that the type's blocks do not divide.
    """
    refuse_rows(model, precision)
    kind = PRECISIONS[precision][0]
    rounding, stored = GgmlRounding(kind=kind), {}
    hidden = model.model.embed_tokens(tokens)
    depth = len(model.model.layers)
    for index, layer in enumerate(model.model.layers):
        with InputGrams(layer) as grams:
            through(model, index, hidden)
        for name, linear in grams.linears.items():
            parts, linear.weight.data = correct(linear.weight, grams.sums[name], rounding, BLOCK, DAMPING)
            rows = torch.cat([torch.from_numpy(part) for part in parts], dim=1)
            stored[f"model.layers.{index}.{name}.weight"] = Stored(kind=kind, rows=rows)
        hidden = through(model, index, hidden)
        progress(index + 1, depth, f"layer {index}")
    return stored


def refuse_rows(model: Any, precision: str) -> None:
    """Raise PuzzleError where rows of a layer's matrix are no whole number of blocks."""
    for name, linear in model.model.layers.named_modules():
        if isinstance(linear, nn.Linear) and linear.in_features % BLOCK:
            raise PuzzleError(
                f"{precision} rounds blocks of {BLOCK} values, and the rows of layer {name} have {linear.in_features}: "
                "take q8_0, which leaves such a matrix in float16, or bfloat16."
            )


def through(model: Any, index: int, hidden: Tensor) -> Tensor:
    """States (S, T, D) after a layer of the model."""
    inner, out = model.model, []
    for batch in hidden.split(BATCH):
        positions = torch.arange(batch.shape[1]).unsqueeze(0)
        contexts = layer_contexts(model.config, inner.rotary_emb, batch, positions, None, None, inner.family)
        kind = model.config.parent_layer_types[index]
        out.append(inner.layers[index](batch, position_ids=positions, **contexts[kind]))
    return torch.cat(out)
