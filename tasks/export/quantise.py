"""Round the matrices of a child to types of few bits, fitted to text.

In a type of 4 or 5 bits, later columns of a matrix make up for what earlier ones lost (blocks/error_correction.py). The
layers are rounded in order, and the text runs through those that are rounded already, so that a layer is fitted to the
inputs that it will have. A recipe says which type each subblock has: all matrices of one have the same. Where a recipe
names none for the head, embedding and head become q8_0 beside types of 4 or 5 bits (tasks/gguf/writer.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from blocks.error_correction import InputGrams, correct
from blocks.errors import PuzzleError
from blocks.estimates import mean
from blocks.export_code.modeling_decilm import layer_contexts
from blocks.records import LayerChoice
from blocks.resources import BLOCK
from blocks.typed_labels import type_in
from tasks.engines.ggml import GgmlRounding
from tasks.gguf.writer import CORRECTED, PRECISIONS, Stored

DAMPING = 0.01
# a tied head is the embedding as well, whose rows count as they are: half of the fit is to the entries themselves
TIED_DAMPING = 1.0
T = TypeVar("T")
BATCH = 8  # calibration sequences that run through a layer at a time
PARTS = {"self_attn": 0, "mlp": 1}  # a layer's modules with matrices, and their place in a recipe


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Types of a model: (attention, ffn) of every layer, and of embedding and head; "" leaves the weights."""

    layers: tuple[tuple[str, str], ...]
    head: str = ""

    @classmethod
    def uniform(cls, precision: str, depth: int) -> "Recipe":
        """One type in every layer."""
        return cls(layers=((precision, precision),) * depth)

    @property
    def head_alone(self) -> "Recipe":
        """The type of embedding and head, for layers that are rounded already."""
        return Recipe.uniform("", len(self.layers)).with_head(self.head)

    def with_head(self, head: str) -> "Recipe":
        """The same types of the layers, and another of embedding and head."""
        return replace(self, head=head)

    def type_of(self, name: str) -> str:
        """The type of a matrix, by the name of its module."""
        index, _, within = name.partition("layers.")[2].partition(".")
        return self.layers[int(index)][PARTS[within.partition(".")[0]]] if index else self.head

    @classmethod
    def of(cls, layers: Sequence[LayerChoice], head: str) -> "Recipe":
        """The types of an architecture."""
        return cls(layers=tuple((type_in(one.attention), type_in(one.ffn)) for one in layers), head=head)


def judged(model: Any, tokens: Tensor, precision: str, rounding: Callable[[Tensor], T]) -> tuple[str, T]:
    """Round a model's layers in place, fitted to all but the last eighth of the tokens (S, T), S >= 2.

    Returns a sentence with the KL on that last eighth, from the model before, and what `rounding` gave.
    """
    held_out = tokens[-max(1, len(tokens) // 8) :]
    before = log_probabilities(model, held_out)
    stored = rounding(tokens[: -len(held_out)])
    kl = mean(divergences(before, log_probabilities(model, held_out)))
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


def divergences(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[float]:
    """KL(before || after) of every sequence, of whose tokens these are the log-probabilities, in nats per token."""
    return [float(kl.mean()) for kl in token_divergences(before, after)]


def token_divergences(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[Tensor]:
    """KL(before || after) at every token of every sequence: (T,) each, in nats."""
    return [(p.exp() * (p - q)).sum(-1) for p, q in zip(before, after, strict=True)]


@torch.no_grad()
def quantise_layers(model: Any, tokens: Tensor, recipe: Recipe) -> Mapping[str, Stored]:
    """Round the matrices of the model in place to what the types of a recipe can hold.

    tokens: (S, T) calibration text. Returns what the file holds of each rounded matrix, by the weight's name.
    Raises PuzzleError where a matrix has rows that the type's blocks do not divide.
    """
    for kind in {*(kind for pair in recipe.layers for kind in pair), recipe.head} - {""}:
        refuse_rows(model, kind)
    stored: dict[str, Stored] = {}
    fitted = any(kind in CORRECTED for pair in recipe.layers for kind in pair) or recipe.head in CORRECTED
    hidden = model.model.entering(tokens) if fitted else tokens
    for index, (layer, kinds) in enumerate(zip(model.model.layers, recipe.layers, strict=True)):
        grams = InputGrams(layer)
        if any(kind in CORRECTED for kind in kinds):
            with grams:
                through(model, index, hidden)
        for name, linear in grams.linears.items():
            kind = kinds[PARTS[name.partition(".")[0]]]
            if kind:
                stored[f"model.layers.{index}.{name}.weight"] = round_linear(linear, kind, grams.sums.get(name))
        hidden = through(model, index, hidden) if fitted else hidden
    return stored | _head(model, recipe.head, hidden)


def round_linear(linear: Any, kind: str, gram: Tensor | None, damping: float = DAMPING) -> Stored:
    """Round the weight of a linear layer in place; types of 4 and 5 bits are fitted to its inputs' Gram matrix."""
    rounding = GgmlRounding(kind=PRECISIONS[kind][0])
    if kind in CORRECTED:
        assert gram is not None, "a type of 4 or 5 bits is fitted to text"
        parts, values, before = correct(linear.weight.detach(), gram, rounding, BLOCK, damping)
        rows = torch.cat([torch.from_numpy(part) for part in parts], dim=1)
    else:
        before = None
        part, values = rounding(linear.weight.detach().float(), None)
        rows = torch.from_numpy(part)
    linear.weight.data = values.to(linear.weight.dtype)
    return Stored(kind=rounding.kind, rows=rows, before=before)


def _head(model: Any, kind: str, hidden: Tensor) -> dict[str, Stored]:
    """Round embedding and head in place; the head on the states (S, T, D) that leave the last layer."""
    if not kind:
        return {}
    gram = None
    if kind in CORRECTED:
        states = model.model.norm(hidden).flatten(0, 1).float()
        gram = states.T @ states
    embedding = model.model.embed_tokens
    if model.config.tie_word_embeddings:
        stored = round_linear(embedding, kind, gram, TIED_DAMPING)
        model.lm_head.weight = embedding.weight
        return {"model.embed_tokens.weight": stored}
    entries = None if gram is None else torch.eye(len(gram))
    return {
        "model.embed_tokens.weight": round_linear(embedding, kind, entries),
        "lm_head.weight": round_linear(model.lm_head, kind, gram),
    }


@torch.no_grad()
def fitted_layers(model: Any, tokens: Tensor) -> Iterator[tuple[int, dict[str, nn.Linear], dict[str, Tensor]]]:
    """Each layer's number, its matrices by name, and X^T X of what enters them, of (S, T) tokens that ran through the
    layers before it as the caller has left them.
    """
    hidden = model.model.entering(tokens)
    for index, layer in enumerate(model.model.layers):
        with InputGrams(layer) as grams:
            through(model, index, hidden)
        yield index, grams.linears, grams.sums
        hidden = through(model, index, hidden)


def refuse_rows(model: Any, precision: str) -> None:
    """Raise PuzzleError where rows of a layer's matrix are no whole number of blocks, and for experts."""
    if any(weight.dim() > 2 for weight in model.model.layers.parameters()):
        raise PuzzleError(
            f"{precision} is fitted matrix by matrix, and the experts of this child lie in one tensor for all: take "
            "bfloat16."
        )
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
        contexts = layer_contexts(model.config, inner.rotary_emb, batch, positions, None, None)
        kind = model.config.parent_layer_types[index]
        out.append(inner.layers[index](batch, position_ids=positions, **contexts[kind]))
    return torch.cat(out)
