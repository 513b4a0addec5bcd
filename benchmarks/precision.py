"""SmolLM2 rounded to the types of 4 and 5 bits that `puzzle export` writes: plain, with importance, corrected.

    .venv/bin/python -m benchmarks.precision [TYPE ...]     # about 3 CPU-minutes a type

The package ships weights that lie on a 4-bit grid already. So the parent is rotated first (`parent.rotate`), which
takes them off the grid. KL is from the rotated model; embedding and head stay float32. Errors are over sequences.
"""

import copy
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import table, write_page
from blocks.error_correction import InputGrams
from blocks.library import read_tensors
from profiles.load import load_profile
from tasks.engines.ggml import GgmlRounding
from tasks.export.quantise import Recipe, divergence, log_probabilities, quantise_layers, through
from tasks.gguf.writer import CORRECTED, PRECISIONS
from tasks.inputs.children import open_child
from tasks.inputs.corpus import prepare_corpus
from tasks.inputs.parent import prepare_parent

TEXTS = 64  # calibration sequences
TESTS = 24


@torch.no_grad()
def uncorrected(model: Any, tokens: Tensor, precision: str, important: bool) -> None:
    """Round every matrix of the layers in place as llama.cpp does, with or without the Gram's diagonal."""
    rounding = GgmlRounding(kind=PRECISIONS[precision][0])
    hidden = model.model.embed_tokens(tokens)
    for index, layer in enumerate(model.model.layers):
        with InputGrams(layer) as grams:
            hidden = through(model, index, hidden)
        for name, linear in grams.linears.items():
            linear.weight.data = rounding(linear.weight, grams.sums[name].diagonal() if important else None)[1]


def kl_text(own: Sequence[Tensor], other: Sequence[Tensor]) -> str:
    """Mean KL and its standard error over sequences, nats a token."""
    kl = divergence(own, other)
    return f"{kl.value:.4f} ±{kl.error:.4f}"


def main() -> None:
    """Print and write the page."""
    wanted = sys.argv[1:] or CORRECTED
    profile = load_profile("smollm2-cpu")
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        plain = prepare_parent(profile.parent, workspace, None)
        parent = prepare_parent(profile.parent.model_copy(update={"rotate": True}), workspace, None)
        corpus = prepare_corpus(profile.corpus, workspace / parent.folder, parent.fingerprint, workspace)
        splits = read_tensors(workspace, corpus.tokens)
        texts, tests = splits["train"][:TEXTS].long(), splits["test"][:TESTS].long()
        shipped = log_probabilities(open_child(workspace / plain.folder, torch.float32), tests)
        own = open_child(workspace / parent.folder, torch.float32)
    before = log_probabilities(own, tests)
    rows = []
    for precision in wanted:
        rounded = partial(uncorrected, tokens=texts, precision=precision)
        ways: tuple[Callable[[Any], Any], ...] = (
            partial(rounded, important=False),
            partial(rounded, important=True),
            partial(quantise_layers, tokens=texts, recipe=Recipe.uniform(precision, len(own.model.layers))),
        )
        row = [precision]
        for way in ways:
            model, started = copy.deepcopy(own), time.process_time()
            way(model)
            seconds = time.process_time() - started
            row.append(kl_text(before, log_probabilities(model, tests)))
        rows.append([*row, f"{seconds:.0f}"])
        print(" | ".join(rows[-1]), flush=True)
    head = ["type", "plain", "with importance", "corrected", "CPU-s of the correction"]
    sizes = f"{TEXTS} x {texts.shape[1]} tokens to fit to, KL in nats on {TESTS} x {tests.shape[1]} test tokens"
    note = f"SmolLM2-135M-Instruct, rotated; {sizes}. Rotating alone: KL {kl_text(shipped, before)}."
    write_page("precision", "Types of 4 and 5 bits", [note, table(head, rows)])


if __name__ == "__main__":
    main()
