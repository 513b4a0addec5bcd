"""Adaptive scoring replayed on fully scored sequences.

.venv/bin/python -m benchmarks.adaptive
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import arguments
from blocks.library import read_tensors, read_value, write_text
from blocks.packed import pack_linears
from blocks.parent import Parent
from blocks.records import BlockRecord, CorpusInfo, ParentInfo
from blocks.runtime import set_threads
from profiles.load import load_profile
from tasks.corpus import iterate_documents, prepare_corpus
from tasks.interchange import read_library
from tasks.parent import prepare_parent
from tasks.progress import shown
from tasks.record import open_parent
from tasks.scoring import ParentSuffix, Sequences, batches_of, make_suffix, score_batch

PART = 8  # windows scored at a time
WINDOW = 128  # tokens: a validation sequence gives several windows


def main() -> None:
    options = arguments(__doc__).parse_args()
    profile = load_profile(options.profile, options.set)
    workspace: Path = options.workspace
    set_threads(profile.hardware.threads)
    parent = prepare_parent(profile.parent, workspace, lambda: iterate_documents(profile.corpus))
    corpus = prepare_corpus(profile.corpus, workspace / parent.folder, parent.fingerprint, workspace)
    library = read_library(workspace / "tables" / profile.name)
    blocks = [read_value(workspace / "library" / f"{block.key}.json", BlockRecord) for block in library.variants]
    full_values(parent, corpus, blocks, 32, workspace)


@torch.inference_mode()
def entering(reader: Parent, tokens: Tensor) -> Iterator[Tensor]:
    """States (S, T, D) that enter each layer, one after the other."""
    hidden = reader.embedding()(tokens)
    for layer in range(reader.depth):
        yield hidden.clone()
        module = reader.layer(layer)
        pack_linears(module)
        hidden = module(hidden, **reader.contexts(hidden)[layer])


def full_values(
    parent: ParentInfo, corpus: CorpusInfo, blocks: list[BlockRecord], length: int, workspace: Path
) -> dict[str, list[float]]:
    """KL of every block on every window, by key; what was scored before is read."""
    reader = open_parent(workspace / parent.folder)
    tokens = read_tensors(workspace, corpus.tokens, ["validation"])["validation"].long()
    tokens = tokens.unflatten(1, (-1, WINDOW)).flatten(0, 1)[:, :length]
    states = list(entering(reader, tokens))
    suffix = make_suffix(reader, tokens, states[-1])
    parts = [tuple(range(len(tokens)))[first : first + PART] for first in range(0, len(tokens), PART)]
    found: dict[str, list[float]] = {block.key: [] for block in blocks}
    with shown("full scores") as tell:
        for index, part in enumerate(parts):
            for layer, hidden in enumerate(states):
                path = (
                    workspace / "benchmark-adaptive" / f"{corpus.fingerprint}-{length}-{part[0]:03d}-{layer:03d}.json"
                )
                if not path.exists():
                    write_text(
                        path,
                        json.dumps(scored(suffix, [b for b in blocks if b.layer == layer], hidden, part, workspace)),
                    )
                for key, values in json.loads(path.read_text()).items():
                    found[key] += values
                tell(index * len(states) + layer + 1, len(parts) * len(states))
    return found


def scored(
    suffix: ParentSuffix, blocks: list[BlockRecord], hidden: Tensor, part: Sequences, workspace: Path
) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for batch, sequences in batches_of([(block, part) for block in blocks], hidden.shape[1]):
        for block, scores in zip(batch, score_batch(suffix, batch, hidden, sequences, workspace), strict=True):
            assert scores is not None
            values.setdefault(block.key, []).extend(scores.kl)
    return values


if __name__ == "__main__":
    main()
