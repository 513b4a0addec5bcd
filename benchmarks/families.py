"""Every family with every kind of variant and every export that its children have, on tiny random parents.

    .venv/bin/python -m benchmarks.families [FAMILY ...]

Whatever fails is printed in its cell, and the command ends with exit code 1.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import table, write_page
from blocks.compute import HOST
from blocks.errors import first_line
from blocks.export_code.families_decilm import FAMILIES
from blocks.kinds import kinds
from blocks.records import SUBBLOCKS, LayerRecord, Subblock
from blocks.runtime import configure_torch
from tasks.distill.record import Recording, record_layer
from tasks.export.folder import export_folder
from tests.families import (
    LAYERS,
    SETTINGS,
    by_whole_models,
    child_of,
    learned,
    parent_of,
    recording_of,
    token_ids,
    whole,
)
from tests.test_families import mixed

# an example of each kind that a parent of tests/families.py can have
LABELS = {"kv_heads": "kv1", "window": "window4", "width": "ffn24"}
NEAR = 1e-3  # how far a score may be from the KL of whole models, as a share


def main() -> None:
    """Run the matrix, write the page; exit code 1 when a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=[*FAMILIES])
    names = parser.parse_args().families
    configure_torch(1)
    started = time.process_time()
    columns = [
        (part, LABELS.get(kind.name, kind.name)) for part in SUBBLOCKS for kind in kinds(part) if kind.name != "parent"
    ]
    columns.insert(2, ("attention", "window4kv1"))
    rows = [row(name, columns) for name in names]
    header = ["family", "logits", "cache", *(f"{part}: {label}" for part, label in columns), "export", "native"]
    failed = any("FAILED" in cell for cells in rows for cell in cells)
    parts = [
        "Tiny random parents of transformers' own classes, biases, gains and multipliers away from their defaults. "
        "logits: of a child of the parent's own blocks against transformers' own, padded rows too; the greatest "
        "difference. cache: greedy tokens of a child of all kinds with and without a cache. Each kind: nMSE of the "
        f"start, and after {SETTINGS.steps} steps; the score (KL, nats), which is that of whole models within {NEAR:g} "
        "of it. export, native: the folder, loaded as anybody would, gives the same logits bit for bit.",
        table(header, rows),
        f"{time.process_time() - started:.0f} CPU-seconds.",
    ]
    if names == [*FAMILIES]:
        write_page("families", "Families and kinds of variants", parts)
    else:
        print("\n\n".join(parts))
    sys.exit(1 if failed else 0)


def row(family: str, columns: list[tuple[Subblock, str]]) -> list[str]:
    """All cells of a family."""
    with tempfile.TemporaryDirectory(prefix="puzzle-families-") as folder:
        workspace = Path(folder)
        recording = recording_of(workspace, family)
        records = [record_layer(layer, recording, workspace, HOST) for layer in range(LAYERS)]
        cells = [told(lambda: logits(family)), told(lambda: cached(family))]
        for part, label in columns:
            cells.append(told(lambda part=part, label=label: trained(recording, records, part, label, workspace)))
        for blocks in (mixed(), whole(parent_of(family).config)):
            cells.append(told(lambda blocks=blocks: exported(family, blocks, workspace)))
        print(family, *cells, sep=" | ", flush=True)
        return [f"`{family}`", *cells]


def told(cell: Callable[[], str]) -> str:
    """A cell, or why it failed."""
    try:
        return cell()
    except Exception as error:
        return f"FAILED: {first_line(error, 60)}"


@torch.no_grad()
def logits(family: str) -> str:
    """The greatest difference of a child of the parent's own blocks to transformers' own model."""
    parent, ids = parent_of(family), token_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    both = [model(ids, attention_mask=mask).logits for model in (child_of(parent), parent)]
    most = float((both[0] - both[1]).abs().max())
    assert most <= 1e-5, f"differs by {most:.2g}"
    return f"{most:.2g}"


def cached(family: str) -> str:
    """Whether a child of all kinds generates the same with and without a cache."""
    child: Any = child_of(parent_of(family), mixed())
    how: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": 64}
    found, plain = (child.generate(token_ids(2, 9), use_cache=use, **how) for use in (True, False))
    assert torch.equal(found, plain), "other tokens with a cache"
    return "same"


def trained(recording: Recording, records: list[LayerRecord], subblock: Subblock, label: str, workspace: Path) -> str:
    """nMSE before and after training, and the score, checked on whole models."""
    block, score = learned(recording, records, subblock, label, workspace)
    assert score is not None, block.reason
    kl, _ = by_whole_models(recording, records, block, workspace)
    assert abs(score.kl - kl) <= NEAR * kl, f"score {score.kl:.4g}, whole models {kl:.4g}"
    if block.status == "free":
        return f"KL {score.kl:.3g}"
    assert block.nmse_start is not None and block.nmse_after is not None
    assert block.nmse_after < max(1, block.nmse_start), f"nMSE {block.nmse_start:.3g} -> {block.nmse_after:.3g}"
    return f"{block.nmse_start:.3g} -> {block.nmse_after:.3g}, KL {score.kl:.3g}"


def exported(family: str, blocks: list[dict[str, Any]], workspace: Path) -> str:
    """The export loads the folder again and compares logits."""
    export_folder(child_of(parent_of(family), blocks), workspace, workspace / "child", "# x\n")
    return "same"


if __name__ == "__main__":
    main()
