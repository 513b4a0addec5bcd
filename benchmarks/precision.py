"""Blocks and types of number chosen together, against everything else that makes SmolLM2 smaller or faster.

    .venv/bin/python -m benchmarks.precision --workspace /tmp/precision     # about an hour of two cores

`puzzle optimize` makes the library: it costs its variants in llama.cpp, so run it on an idle machine. Then, for each
budget in memory or in a request's speed, three children are searched in the same tables: with both free, with all
blocks in one type (the best type), and with the parent's blocks in types of their own. Each is rounded and corrected
as for its file, and judged by what the file holds. Beside them stands the whole parent in each type: rounded as
llama.cpp does it, with importance, and corrected.

The package ships weights that lie on a 4-bit grid already. So the parent is rotated first (`parent.rotate`). That takes
them off the grid, and makes head and embedding two matrices: the files are 28 M numbers larger than the parent's own.
There is no GKD, which does not help a rotated parent (docs/log.md).
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import optimize, table, write_page
from blocks.compute import HOST
from blocks.error_correction import InputGrams
from blocks.errors import InfeasibleBudget
from blocks.estimates import Estimate, mean, paired_difference
from blocks.records import Architecture, LayerChoice
from blocks.runtime import configure_torch
from blocks.typed_labels import typed
from profiles.load import load_profile
from profiles.schema import Budget, Profile
from tasks.distill.record import open_parent
from tasks.engines.ggml import GgmlRounding
from tasks.evaluate.compare import contender, evaluate_contender, targets_on
from tasks.evaluate.quality import sequence_figures
from tasks.evaluate.typed_file import fitted_to, with_file
from tasks.export.quantise import through
from tasks.gguf.writer import PRECISIONS
from tasks.inputs.corpus import documents_of
from tasks.operating.champion import last_problem
from tasks.search.choose import choose
from tasks.search.one_type import corners
from tasks.search.totals import Problem, predicted
from tasks.studies.finished import Finished, open_finished

SETTINGS = [
    "parent.rotate=true",
    "gkd.steps=0",
    "gkd.rounded_steps=0",
    "corpus.test_sequences=96",
    "evaluate.sequences=64",
    "evaluate.baselines=[]",
    "evaluate.throughput_rounds=1",
]
SPEEDUPS = (1.5, 1.8, 2.0, 2.17)
MEGABYTES = (93, 101, 109, 118, 134)  # of weights and KV cache, as llama.cpp holds them
TYPES = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
WAYS = ("plain", "with importance", "corrected")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A file: what it is, its size and predicted speed, and its KL from the parent on the test sequences."""

    name: str
    megabytes: float
    memory: float
    speedup: float
    predicted: float
    kl: Estimate

    @property
    def cells(self) -> list[str]:
        """Its part of a row of a table."""
        figures = [f"{self.megabytes:.1f}", f"{self.memory:.1f}", f"{self.speedup:.2f}"]
        return [*figures, f"{self.predicted:.3f}", f"{self.kl.value:.4f} ±{self.kl.error:.4f}"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Judge:
    """The finished library, and what is judged in it."""

    profile: Profile
    finished: Finished
    problem: Problem
    workspace: Path

    def architecture(self, name: str, found: Architecture) -> Judged:
        """Round it as for its file, and judge what the file holds."""
        parent, corpus = self.finished.parent, self.finished.corpus
        whole = contender(name, found, self.finished.blocks)
        whole = with_file(whole, parent, corpus, self.profile.hardware.precision, self.workspace)
        result = evaluate_contender(whole, (parent, corpus), self.profile.evaluate, self.workspace, HOST)
        mine, parents = found.totals[0], found.parent_totals[0]
        size = (self.workspace / whole.file).stat().st_size if whole.file else 2 * mine.parameters
        return Judged(
            name=name,
            megabytes=size / 1e6,
            memory=mine.memory_bytes / 1e6,
            speedup=parents.runtime_seconds / mine.runtime_seconds,
            predicted=found.score,
            kl=mean(result.samples["kl"], result.documents),
        )

    def uniform(self, kind: str) -> Judged:
        """The whole parent in one type, corrected. Of a type that was not measured, memory is file and cache."""
        layers = (LayerChoice(attention=typed("parent", kind), ffn=typed("parent", kind)),) * len(self.problem.parent)
        if kind in self.profile.search_space.precision:
            return self.architecture(kind, predicted(self.problem, layers, "parent", (1,), kind))
        whole = predicted(self.problem, self.problem.parent, "parent", (1,))
        found = self.architecture(kind, whole.model_copy(update={"layers": layers, "head": kind}))
        cache = (whole.totals[0].memory_bytes - 2 * whole.totals[0].parameters) / 1e6
        return replace(found, memory=found.megabytes + cache, speedup=float("nan"), predicted=float("nan"))

    @torch.no_grad()
    def uncorrected(self, kind: str, important: bool) -> Estimate:
        """KL of the parent with every matrix rounded as llama.cpp does it, with or without the Gram's diagonal."""
        sequences, corpus = self.profile.evaluate.sequences, self.finished.corpus
        targets = targets_on("test", sequences, self.finished.parent, corpus, self.workspace, HOST)
        model = open_parent(self.workspace / self.finished.parent.folder, HOST).model()
        _round(model, fitted_to(corpus, self.workspace), kind, important)
        values = sequence_figures(model, targets, targets.tokens, HOST)["kl"]
        return mean(values.numpy(), documents_of(corpus, "test", self.workspace)[:sequences])


@torch.no_grad()
def _round(model: Any, tokens: Tensor, kind: str, important: bool) -> None:
    rounding = GgmlRounding(kind=PRECISIONS[kind][0])
    hidden = model.model.embed_tokens(tokens)
    for index, layer in enumerate(model.model.layers):
        with InputGrams(layer) as grams:
            hidden = through(model, index, hidden)
        for name, linear in grams.linears.items():
            linear.weight.data = rounding(linear.weight, grams.sums[name].diagonal() if important else None)[1]
    for outside in (model.model.embed_tokens, model.lm_head):
        outside.weight.data = rounding(outside.weight, None)[1]


def budgets() -> Iterator[tuple[str, Budget]]:
    """What is asked for, in words and as a budget."""
    for megabytes in MEGABYTES:
        yield f"{megabytes} MB", Budget(memory_gib=megabytes * 1e6 / 2**30)
    for speedup in SPEEDUPS:
        yield f"{speedup} x", Budget(speedup=speedup)


def children(judge: Judge, budget: Budget) -> list[Judged]:
    """The joint optimum; the best in one type; the best whose blocks are the parent's. Those that there are."""
    problem = replace(judge.problem, budget=budget)
    try:
        found = [("joint", choose(problem))]
    except InfeasibleBudget:
        return []
    for corner in corners(problem):
        pruned = any(choice.bare != LayerChoice() for choice in corner.layers)
        name = "one type" if pruned else "the parent's blocks"
        if name not in dict(found):
            found.append((name, corner))
    return [judge.architecture(name, one) for name, one in found]


def prepared(workspace: Path) -> Judge:
    """Make the library, or find it."""
    if optimize("smollm2-llama-cpp", workspace, SETTINGS):
        raise SystemExit(2)
    profile = load_profile("smollm2-llama-cpp", SETTINGS)
    in_float = load_profile("smollm2-llama-cpp", [*SETTINGS, "search_space.precision=[]"])
    configure_torch(profile.hardware.threads)
    problem = last_problem(profile, workspace)
    return Judge(profile=profile, finished=open_finished(in_float, workspace), problem=problem, workspace=workspace)


def rows_of(judge: Judge, wholes: Sequence[Judged]) -> list[list[str]]:
    """A row for every child, and for the best whole parent, under every budget."""
    rows = []
    for asked, budget in budgets():
        found = children(judge, budget)
        keep = [
            one
            for one in wholes
            if (budget.memory_gib is None or one.memory <= budget.memory_gib * 2**30 / 1e6)
            and (budget.speedup is None or one.speedup >= budget.speedup)
        ]
        if keep:
            found.append(replace(min(keep, key=lambda one: one.kl.value), name="the whole parent"))
        for one in found:
            less = paired_difference(one.kl, found[0].kl)
            beside = "" if one is found[0] else f"{less.value:+.4f} ±{less.se:.4f}"
            rows.append([asked, one.name, *one.cells, beside])
            print(" | ".join(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Print and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workspace", type=Path, required=True, help="finished stages are reused")
    judge = prepared(parser.parse_args().workspace.resolve())
    wholes = [judge.uniform(kind) for kind in TYPES]
    ways = []
    for kind, whole in zip(TYPES, wholes, strict=True):
        plain, important = map(partial(judge.uncorrected, kind), (False, True))
        shown = [f"{one.value:.4f} ±{one.error:.4f}" for one in (plain, important, whole.kl)]
        ways.append([kind, *whole.cells[:3], *shown])
        print(" | ".join(ways[-1]), flush=True)
    rows = rows_of(judge, wholes)
    sequences, documents = judge.profile.evaluate.sequences, len(wholes[0].kl.moves)
    write_page(
        "precision",
        "Blocks and types of number, chosen together",
        [
            f"SmolLM2-135M-Instruct, rotated; a request of 256 + 64 tokens in llama.cpp, over the parent in bfloat16. "
            f"KL from the rotated parent in nats per token, on {sequences} test sequences of {documents} documents, by "
            "which errors are clustered. MB: the file; and weights with KV cache, as llama.cpp holds them, which is "
            "what a budget in MB is of. Speeds are predicted from measured costs, KL is of what the file holds. Types "
            f"of the search: {' and '.join(judge.profile.search_space.precision)}; others' speeds were not measured.",
            "## The whole parent",
            table(["type", "file, MB", "memory, MB", "speed", *WAYS], ways),
            "## Under a budget",
            "*joint*: blocks and types free. *one type*: the best with all blocks in one type, so that only pruning is "
            "searched. *the parent's blocks*: only types are searched. *the whole parent*: the best of the table, "
            "corrected. The last column is the KL less that of the joint child, paired.",
            table(
                ["budget", "child", "file, MB", "memory, MB", "speed", "KL, predicted", "KL", "more than joint"], rows
            ),
        ],
    )


if __name__ == "__main__":
    main()
