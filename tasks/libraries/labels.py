"""Labels of variants in NVlabs' manner: what stands there, its size, and its share of the parent's.

    attention = 2 kv heads (parent * 25%) && ffn = intermediate size 14e3 (parent * 50%)

"(parent * 100%)" in every part marks the parent's own block; nothing else may round to it.
"""

from collections.abc import Iterable, Mapping

KV_HEADS, INTERMEDIATE = "num_key_value_heads", "intermediate_size"


def share(size: float, parent_size: float) -> str:
    """` (parent * 50%)`; only the parent's own size is 100 %. Nothing where the parent's is not known."""
    if not parent_size:
        return ""
    percent = round(100 * size / parent_size)
    if percent == 100 and size != parent_size:
        percent = 99 if size < parent_size else 101
    return f" (parent * {percent}%)"


def kv_heads(heads: int, parent_heads: int) -> str:
    """`2 kv heads (parent * 25%)`."""
    return f"{heads} kv heads{share(heads, parent_heads)}"


def intermediate_size(size: int, parent_size: int, exact: bool) -> str:
    """`intermediate size 14e3 (parent * 50%)`; `exact`: 14336 instead of 14e3."""
    return f"intermediate size {size if exact else thousands(size)}{share(size, parent_size)}"


def thousands(size: int) -> str:
    """28672 -> 29e3, as NVlabs rounds; below 1000 as it is."""
    return f"{round(size / 1000)}e3" if size >= 1000 else str(size)


def needs_exact(sizes: Iterable[int]) -> bool:
    """True when two sizes would read the same after rounding to thousands."""
    different = set(sizes)
    return len({thousands(size) for size in different}) < len(different)


def run_labels(attentions: Iterable[str], ffns: Iterable[str], sizes: Mapping[str, int]) -> dict[tuple[str, str], str]:
    """Labels of a run of ours (`kv1`, `ffn768`, `no_op`, `parent` ...) by subblock and label.

    sizes: the parent's num_key_value_heads and intermediate_size, where known.
    """
    heads, width = sizes.get(KV_HEADS, 0), sizes.get(INTERMEDIATE, 0)
    ffns = list(ffns)
    widths = [int(label[3:]) for label in ffns if label.startswith("ffn") and label[3:].isdigit()]
    exact = needs_exact([*widths, width])
    found: dict[tuple[str, str], str] = {}
    for label in attentions:
        if label == "parent" and heads:
            found["attention", label] = kv_heads(heads, heads)
        elif label.startswith("kv") and label[2:].isdigit():
            found["attention", label] = kv_heads(int(label[2:]), heads)
        else:
            found["attention", label] = _unsized(label)
    for label in ffns:
        if label == "parent" and width:
            found["ffn", label] = intermediate_size(width, width, exact)
        elif label.startswith("ffn") and label[3:].isdigit():
            found["ffn", label] = intermediate_size(int(label[3:]), width, exact)
        else:
            found["ffn", label] = _unsized(label)
    return found


def _unsized(label: str) -> str:
    return label + {"parent": " (parent * 100%)", "no_op": " (parent * 0%)"}.get(label, "")
