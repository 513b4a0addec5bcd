"""Round the matrices of a child's layers to a type of 4 or 5 bits, fitted to text.

Within a matrix, later columns make up for what earlier ones lost (blocks/error_correction.py). The layers are rounded
in order, and the text runs through those that are rounded already, so that a layer is fitted to the inputs that it will
have. Embedding and head become q8_0 (tasks/gguf/writer.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from blocks.error_correction import InputGrams, correct
from blocks.errors import PuzzleError
from blocks.estimates import Estimate, mean
from blocks.export_code.modeling_decilm import layer_contexts
from tasks.engines.ggml import GgmlRounding
from tasks.gguf.writer import PRECISIONS, Stored
from tasks.running.progress import Progress, no_progress

BLOCK = 32  # values that a block of these types holds
DAMPING = 0.01
T = TypeVar("T")
BATCH = 8  # calibration sequences that run through a layer at a time


def judged(model: Any, tokens: Tensor, precision: str, rounding: Callable[[Tensor], T]) -> tuple[str, T]:
    """Round a model's layers in place, fitted to all but the last eighth of the tokens (S, T), S >= 2.

    Returns a sentence with the KL on that last eighth, from the model before, and what `rounding` gave.
    """
    held_out = tokens[-max(1, len(tokens) // 8) :]
    before = log_probabilities(model, held_out)
    stored = rounding(tokens[: -len(held_out)])
    kl = divergence(before, log_probabilities(model, held_out))
    error = f" ±{kl.error:.2g}" if len(held_out) > 1 else ""
    fitted = f"fitted to {tokens.shape[1] * (len(tokens) - len(held_out)):,} tokens"
    return (
        f"{precision} {fitted}: KL {kl.value:.3g}{error} nats from the child, on {held_out.numel():,} others",
        stored,
    )


@torch.no_grad()
def log_probabilities(model: Any, tokens: Tensor) -> list[Tensor]:
    """A (T, V) tensor for each sequence of (S, T) tokens."""
    return [model(one.unsqueeze(0), use_cache=False).logits[0].log_softmax(-1) for one in tokens]


def divergence(before: Sequence[Tensor], after: Sequence[Tensor]) -> Estimate:
    """Mean KL(before || after) over sequences, of whose tokens these are the log-probabilities, in nats per token."""
    return mean([float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(before, after, strict=True)])


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
    for index, linears, grams in fitted_layers(model, tokens):
        for name, linear in linears.items():
            parts, linear.weight.data = correct(linear.weight, grams[name], rounding, BLOCK, DAMPING)
            rows = torch.cat([torch.from_numpy(part) for part in parts], dim=1)
            stored[f"model.layers.{index}.{name}.weight"] = Stored(kind=kind, rows=rows)
        progress(index + 1, len(model.model.layers), f"layer {index}")
    return stored


@torch.no_grad()
def fitted_layers(model: Any, tokens: Tensor) -> Iterator[tuple[int, dict[str, nn.Linear], dict[str, Tensor]]]:
    """Each layer's number, its matrices by name, and X^T X of what enters them, of (S, T) tokens that ran through the
    layers before it as the caller has left them.
    """
    hidden = model.model.embed_tokens(tokens)
    for index, layer in enumerate(model.model.layers):
        with InputGrams(layer) as grams:
            through(model, index, hidden)
        yield index, grams.linears, grams.sums
        hidden = through(model, index, hidden)


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
