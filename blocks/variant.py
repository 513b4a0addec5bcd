"""Block variants: what may stand in a subblock's place, known from the parent's config alone.

A variant is its subblock and a short label (`kv1`, `ffn768`, `linear`, `no_op`, `parent`). This file holds the base
classes. Each kind of variant is one class in a file of its own under blocks/attention/ or blocks/ffn/, and
blocks/kinds.py lists them all. To add a kind see docs/how-to/add-a-variant-kind.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from blocks.records import Subblock

if TYPE_CHECKING:
    from torch import nn

    from blocks.fit import FitContext


@dataclass(frozen=True, kw_only=True, order=True)
class Variant:
    """One alternative for one subblock.

    kind: the name of its VariantKind. size: KV heads or intermediate size, where the kind has one. label: a short name,
    unique within the subblock; it stands in profiles, tables and cache keys.
    """

    subblock: Subblock
    kind: str
    size: int | None = None
    label: str


class VariantKind(ABC):
    """Everything the pipeline must know about one kind of variant."""

    subblock: ClassVar[Subblock]
    name: ClassVar[str]
    trainable: ClassVar[bool] = True

    def variant(self, label: str, size: int | None = None) -> Variant:
        """A variant of this kind."""
        return Variant(subblock=self.subblock, kind=self.name, size=size, label=label)

    @abstractmethod
    def parse(self, label: str, config: Any) -> Variant | None:
        """The variant that `label` names for a parent with this config, None when it is not of this kind.

        Several labels may name one variant (`ffn50pct`, `ffn768`); the variant's own label, parsed again, gives the
        same variant. Raises UnknownVariant when the label is of this kind but this parent cannot have it.
        """

    @abstractmethod
    def examples(self, config: Any) -> list[str]:
        """Labels this parent can have, for error messages and plans."""

    @abstractmethod
    def block_entry(self, variant: Variant, config: Any) -> dict[str, Any]:
        """The entry of `block_configs` (nemotron-nas schema) that builds the subblock."""

    @abstractmethod
    def flops_per_token(self, variant: Variant, config: Any, context_tokens: int) -> int:
        """Floating point operations of one token that sees `context_tokens` (2 per multiply-add)."""

    def kv_elements_per_token(self, variant: Variant, config: Any) -> int:
        """KV cache elements that one token leaves behind: 2 * KV heads * head_dim for an attention, else 0."""
        return 0

    def kv_tokens(self, variant: Variant) -> int | None:
        """How many tokens of a text stay in the KV cache at most; None for all that the parent's layer keeps."""
        return None

    def state_bytes(self, variant: Variant, config: Any, bytes_per_element: float) -> int:
        """Bytes that each sequence keeps of its text, however long it is; beside what tokens leave in a KV cache."""
        return 0

    def trained_elements_per_token(self, variant: Variant, config: Any) -> int:
        """Numbers in float32 that training keeps of each token for its gradients, beside queries, keys and values."""
        return 0

    def initialise(self, variant: Variant, module: nn.Module, context: FitContext) -> None:
        """Copy what the parent has into `module` (Puzzle, section 3). Every trainable kind must implement it."""
        raise NotImplementedError(f"{self.subblock} {self.name} has nothing to initialise")

    # whether a long training may end better without the closed form: then profiles can ask to compare the two
    closed_form_may_lose: ClassVar[bool] = False

    def closed_form(self, variant: Variant, module: nn.Module, context: FitContext) -> None:
        """Fit `module` by ridge regression to the parent's recorded activations. Every trainable kind must have it.

        It may replace what `initialise` chose, for instance the channels that are kept.
        """
        raise NotImplementedError(f"{self.subblock} {self.name} has nothing to fit")

    def initial_flops(self, variant: Variant, config: Any) -> int:
        """FLOPs of `initialise`, for plans."""
        return 0

    def fit_flops(self, variant: Variant, config: Any, tokens: int, length: int) -> tuple[int, int]:
        """FLOPs of `closed_form`, for plans: first those of float32 products, then those of float64 solves.

        tokens: how many recorded tokens are fitted to. length: tokens of a sequence.
        """
        return 0, 0


class SizelessKind(VariantKind):
    """A kind whose only label is its name."""

    def parse(self, label: str, config: Any) -> Variant | None:
        return self.variant(label) if label == self.name else None

    def examples(self, config: Any) -> list[str]:
        return [self.name]


class NoOpKind(SizelessKind):
    """`no_op`: nothing in the subblock's place, the residual passes through. Needs no training, costs nothing."""

    name = "no_op"
    trainable = False

    def block_entry(self, variant: Variant, config: Any) -> dict[str, Any]:
        return {"no_op": True, "replace_with_linear": False}

    def flops_per_token(self, variant: Variant, config: Any, context_tokens: int) -> int:
        return 0
