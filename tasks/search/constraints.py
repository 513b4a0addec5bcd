"""Which variants a search may use at all, whatever the budget: one rule, for searches with the MIP and without."""

from dataclasses import dataclass

from blocks.engine_limits import refused_label
from profiles.schema import Search


@dataclass(frozen=True, kw_only=True)
class Named:
    """What constraints ask of a variant. names: by which it may be forbidden; kinds: such as "attention=linear";
    width: of its FFN, 0 for none; other_heads: another number of KV heads than the parent's.
    """

    names: frozenset[str]
    kinds: frozenset[str]
    is_parent: bool
    width: int = 0
    other_heads: bool = False


def permitted(search: Search, layer: int, variant: Named) -> bool:
    """False for what a search's constraints forbid in every architecture."""
    if variant.names & set(search.forbid):
        return False
    if not variant.is_parent and (layer in search.keep_layers or variant.width % search.width_multiple):
        return False
    if search.engine is None:
        return True
    width, other = (0, False) if variant.is_parent else (variant.width, variant.other_heads)
    return refused_label(search.engine, layer, variant.kinds, width, other) is None
