"""Block variants: what may stand in a subblock's place, known from the parent's config alone.

A variant is its subblock and a short label (`kv1`, `ffn768`, `linear`, `no_op`, `parent`). Each kind lives in a file
of its own under blocks/attention/ or blocks/ffn/ and registers itself here; the lists of names are derived from the
registry. To add a kind see docs/how-to/add-a-variant-kind.md.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from blocks.errors import UnknownVariant
from blocks.records import Subblock

if TYPE_CHECKING:
    from torch import nn

    from blocks.fit import FitContext


@dataclass(frozen=True, kw_only=True, order=True)
class Variant:
    """One alternative for one subblock. `size` is KV heads or intermediate size where the kind has one."""

    subblock: Subblock
    kind: str
    size: int | None = None

    @property
    def label(self) -> str:
        """Short name, unique within the subblock."""
        return kind_of(self).label(self)


class VariantKind(ABC):
    """Everything the pipeline must know about one kind of variant."""

    subblock: ClassVar[Subblock]
    name: ClassVar[str]
    trainable: ClassVar[bool] = True

    @abstractmethod
    def parse(self, label: str, config: Any) -> Variant | None:
        """The variant that `label` names for a parent with this config, None when it is not of this kind.

        Raises UnknownVariant when it is, but this parent cannot have it.
        """

    @abstractmethod
    def label(self, variant: Variant) -> str:
        """Inverse of `parse`."""

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
        """KV cache elements one token leaves behind: 2 * KV heads * head_dim for an attention, else 0."""
        return 0

    def initialise(self, variant: Variant, module: nn.Module, context: FitContext) -> None:
        """Copy what the parent has into `module` (puzzle.md, initialisation). Kinds that train must have it."""
        raise NotImplementedError(f"{self.subblock} {self.name} has nothing to initialise")

    def closed_form(self, variant: Variant, module: nn.Module, context: FitContext) -> None:
        """Ridge regression on the parent's activations, where the kind has one; may replace `initialise`'s choice."""
        raise NotImplementedError(f"{self.subblock} {self.name} has nothing to fit")

    def fit_flops(self, variant: Variant, config: Any, tokens: int) -> tuple[int, int]:
        """FLOPs of `closed_form` over so many recorded tokens, for plans: float32 products, float64 solves."""
        return 0, 0


class SizelessKind(VariantKind):
    """A kind whose only label is its name."""

    def parse(self, label: str, config: Any) -> Variant | None:
        return Variant(subblock=self.subblock, kind=self.name) if label == self.name else None

    def label(self, variant: Variant) -> str:
        return self.name

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


_KINDS: dict[tuple[Subblock, str], VariantKind] = {}


def register(kind: type[VariantKind]) -> type[VariantKind]:
    """Class decorator: make a kind known."""
    key = (kind.subblock, kind.name)
    if key in _KINDS:
        raise ValueError(f"two variant kinds are named {key}")
    _KINDS[key] = kind()
    return kind


def kinds(subblock: Subblock) -> list[VariantKind]:
    """All kinds of a subblock, in the order of registration."""
    import blocks.attention
    import blocks.ffn  # noqa: F401  registration is a side effect of the import

    return [kind for (where, _), kind in _KINDS.items() if where == subblock]


def kind_of(variant: Variant) -> VariantKind:
    """The kind a variant belongs to."""
    return next(kind for kind in kinds(variant.subblock) if kind.name == variant.kind)


def parse_label(subblock: Subblock, label: str, config: Any) -> Variant:
    """The variant a label names; UnknownVariant names what this parent can have."""
    for kind in kinds(subblock):
        variant = kind.parse(label, config)
        if variant is not None:
            return variant
    allowed = [example for kind in kinds(subblock) for example in kind.examples(config)]
    near = difflib.get_close_matches(label, allowed, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UnknownVariant(f"unknown {subblock} variant {label!r}; this parent can have {', '.join(allowed)}.{hint}")


def parse_labels(subblock: Subblock, labels: Iterable[str], config: Any) -> list[Variant]:
    """The search space of one subblock: the parent's own first, then `labels`, each once."""
    variants = [parse_label(subblock, label, config) for label in ("parent", *labels)]
    return list(dict.fromkeys(variants))
