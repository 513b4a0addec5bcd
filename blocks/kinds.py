"""The table of all kinds of block variants, and the way from a label to its variant.

To add a kind, import its class here and add it to KINDS. The order of the table is the order of messages and docs.
"""

from collections.abc import Iterable
from typing import Any

from blocks.attention.gdn import GDN
from blocks.attention.kv_heads import KVHeads
from blocks.attention.linear import LinearAttentionKind
from blocks.attention.no_op import NoOpAttention
from blocks.attention.parent import ParentAttention
from blocks.attention.query_heads import QueryHeads
from blocks.attention.ssd import SSD
from blocks.attention.window import WindowAttention
from blocks.errors import UnknownVariant, did_you_mean
from blocks.ffn.ewidth import ExpertWidth
from blocks.ffn.experts import FewerExperts
from blocks.ffn.linear import LinearFFNKind
from blocks.ffn.no_op import NoOpFFN
from blocks.ffn.parent import ParentFFN
from blocks.ffn.topk import TopK
from blocks.ffn.width import Width
from blocks.records import Subblock
from blocks.typed_labels import bare
from blocks.variant import Variant, VariantKind

KINDS: tuple[VariantKind, ...] = (
    ParentAttention(),
    KVHeads(),
    QueryHeads(),
    WindowAttention(),
    SSD(),
    GDN(),
    LinearAttentionKind(),
    NoOpAttention(),
    ParentFFN(),
    Width(),
    FewerExperts(),
    TopK(),
    ExpertWidth(),
    LinearFFNKind(),
    NoOpFFN(),
)


def kinds(subblock: Subblock) -> list[VariantKind]:
    """All kinds of a subblock, the parent's own first."""
    return [kind for kind in KINDS if kind.subblock == subblock]


def kind_of(variant: Variant) -> VariantKind:
    """The kind a variant belongs to."""
    return next(kind for kind in kinds(variant.subblock) if kind.name == variant.kind)


def parse_label(subblock: Subblock, label: str, config: Any) -> Variant:
    """The variant a label names, whatever its type; UnknownVariant names what this parent can have."""
    for kind in kinds(subblock):
        variant = kind.parse(bare(label), config)
        if variant is not None:
            return variant
    allowed = [example for kind in kinds(subblock) for example in kind.examples(config)]
    hint = did_you_mean(label, allowed)
    raise UnknownVariant(f"unknown {subblock} variant {label!r}; this parent can have {', '.join(allowed)}.{hint}")


def parse_labels(subblock: Subblock, labels: Iterable[str], config: Any) -> list[Variant]:
    """The search space of one subblock: the parent's own variant first, then those of `labels`, each once."""
    variants = [parse_label(subblock, label, config) for label in ("parent", *labels)]
    return list(dict.fromkeys(variants))
