"""Adaptive scoring against full scoring, replayed on sequences that were all scored once.

.venv/bin/python -m benchmarks.adaptive --workspace workspace/smollm2-cpu

The workspace holds a finished library. Its validation text is cut into windows; the KL of every variant on every window
is kept there, so that a second run only replays.
"""

import argparse
import hashlib
import itertools
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import arguments, table, write_page
from blocks.compute import HOST
from blocks.files import write_text
from blocks.library import digest_of, read_tensors, read_value
from blocks.packed import pack_linears
from blocks.parent import Parent
from blocks.records import Architecture, BlockRecord, Score
from blocks.runtime import set_threads
from profiles.load import load_profile
from profiles.schema import Adaptive, Budget, Profile
from tasks.distill.record import open_parent
from tasks.evaluate.quality import mean_metric
from tasks.inputs.corpus import prepare_corpus
from tasks.inputs.corpus_sources import iterate_documents
from tasks.inputs.parent import prepare_parent
from tasks.libraries.interchange import StoredLibrary, read_library
from tasks.running.progress import shown
from tasks.score.scoring import ParentSuffix, Passes, Sequences, batches_of, make_suffix, score_batch
from tasks.search.adaptive import Key, score_adaptively
from tasks.search.choose import choose
from tasks.search.program import Floats
from tasks.search.totals import Problem, make_problem, score_of

PART = 8  # windows scored at a time


def main() -> None:
    """Score everything once, then replay adaptive scoring at several budgets and orders of the sequences."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--window", type=int, default=128, help="tokens from the start of one window to the next")
    parser.add_argument("--tokens", type=int, default=32, help="scored tokens of each window, from its start")
    parser.add_argument("--windows", type=int, default=32, help="0 leaves this table out")
    parser.add_argument("--drawn", type=int, default=32, help="sequences of the drawn table")
    parser.add_argument("--starts", type=int, nargs="+", default=[4], help="sequences before the first look")
    parser.add_argument(
        "--tolerances", type=float, nargs="+", default=[0.01, 0.02, 0.03], help="expected loss to stop at"
    )
    parser.add_argument("--orders", type=int, default=4, help="random orders of the sequences")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.7, 0.5])
    options = parser.parse_args()
    profile = load_profile(options.profile, options.set)
    set_threads(profile.hardware.threads)
    library = read_library(options.workspace / "tables" / profile.name)
    stored: dict[Key, Floats] = {(s.layer, s.subblock, s.variant): np.array(s.kl_per_sequence) for s in library.scores}
    parts = [intro(library, options)]
    if options.windows:
        values = full_values(profile, library, options)
        count = len(next(iter(values.values())))
        parts += [f"## {count} windows of {options.tokens} tokens", replays(library, values, options)]
    count = len(library.scores[0].kl_per_sequence)
    shape = f"{count} x {library.scores[0].tokens // count} tokens"
    parts += [
        f"## {options.drawn} sequences drawn like the {shape} of the profile's own scores",
        replays(library, drawn(stored, options.drawn), options),
    ]
    if options.windows:
        write_page("adaptive", "Adaptive scoring", parts)
    else:
        print("\n\n".join(parts))


def intro(library: StoredLibrary, options: argparse.Namespace) -> str:
    """What the tables say."""
    return (
        f"{len(library.scores)} variants of {library.description.parent}, all scored on all sequences once. Adaptive "
        "scoring (`tasks/search/adaptive.py`, stops at an expected loss of *tolerance*, a few sequences *first*) sees "
        f"them in {options.orders} orders. *Worse*: objective of its choice under full scores, above that of full "
        "scoring's own choice, mean and largest over the orders. *Uniform*: the same for as many tokens spread evenly "
        "over all variants, the choice made on plain means. *Expected*: what adaptive scoring itself expected to lose "
        "when it stopped. Windows are cut from held-out text; the drawn table is synthetic, lognormal with the means "
        "and the covariance (of logarithms, over sequences) of real scores. The first look alone costs *first* / "
        "sequences of full scoring, so few sequences leave little to save."
    )


def drawn(values: Mapping[Key, Floats], count: int) -> dict[Key, Floats]:
    """Sequences drawn from a lognormal with the covariance of the given ones, and 10 % of each variant's own."""
    generator = np.random.default_rng(0)
    logs = np.log(np.maximum(np.array(list(values.values())), 1e-6))
    middle = logs.mean(1, keepdims=True)
    mixing = generator.normal(size=(logs.shape[1], count)) / np.sqrt(logs.shape[1] - 1)
    found = np.exp(middle + (logs - middle) @ mixing + generator.normal(size=(len(logs), count)) * 0.1)
    return dict(zip(values, found, strict=True))


def replays(library: StoredLibrary, values: Mapping[Key, Floats], options: argparse.Namespace) -> str:
    """A table with a row per budget; a replay that was made before is read."""
    rows: list[list[str]] = []
    digest = hashlib.sha256(np.array(list(values.values())).tobytes()).hexdigest()
    cases = {budget: case_of(library, values, Budget(layer_parameters_fraction=budget)) for budget in options.budgets}
    with shown("replay") as tell:
        settled = [Adaptive(start_sequences=s, tolerance=t) for s in options.starts for t in options.tolerances]
        for settings, budget in itertools.product(settled, options.budgets):
            runs = []
            for order in range(options.orders):
                key = digest_of(values=digest, budget=budget, settings=settings, order=order, version=2)
                path = options.workspace / "benchmark-adaptive" / f"replay-{key}.json"
                if not path.exists():
                    write_text(path, json.dumps(replay(cases[budget], settings, order)))
                runs.append(json.loads(path.read_text()))
                tell(len(rows) * options.orders + order + 1, len(settled) * len(cases) * options.orders)
            asked = [str(settings.start_sequences), f"{settings.tolerance:.0%}"]
            rows.append([f"{budget:.0%}", *asked, *line(runs)])
    asked = ["layer parameters", "first", "tolerance"]
    header = [*asked, "tokens, of full", "fewer", "looks", "expected", "worse", "worst", "uniform", "worst"]
    return table(header, rows)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A budget with everything scored: the problem under full scores and its best architecture."""

    values: Mapping[Key, Floats]
    full: Problem
    best: Architecture

    def problem(self, scores: Iterable[Score]) -> Problem:
        """The same problem under other scores."""
        full = self.full
        return make_problem(scores, full.costs, full.budget, full.scenarios, full.search)

    def worse(self, scores: Iterable[Score]) -> float:
        """The objective of these scores' choice under full scores, above the best, as a share of it."""
        return score_of(self.full, choose(self.problem(scores)).layers)[0] / self.best.score - 1


def case_of(library: StoredLibrary, values: Mapping[Key, Floats], budget: Budget) -> Case:
    """Full scoring's choice at a budget."""
    scores = [score(key, row) for key, row in values.items()]
    full = make_problem(scores, library.costs, budget, library.description.scenarios)
    return Case(values=values, full=full, best=choose(full))


def score(key: Key, row: Floats) -> Score:
    """A score from its values per window; the LM loss is not looked at."""
    found: Any = mean_metric(torch.tensor(row))
    return Score(
        layer=key[0],
        subblock=key[1],  # type: ignore[arg-type]
        variant=key[2],
        kl=found.value,
        kl_se=found.se,
        lm_loss=found.value,
        lm_loss_se=found.se,
        tokens=len(row),
        kl_per_sequence=tuple(row.tolist()),
        lm_loss_per_sequence=tuple(row.tolist()),
    )


Replay = tuple[float, int, float, float, float]  # share of tokens, looks, expected, worse, uniform's worse


def replay(case: Case, settings: Adaptive, seed: int) -> Replay:
    """Adaptive scoring with the windows in one order, and as many tokens spread evenly."""
    windows = len(next(iter(case.values.values())))
    order = np.random.default_rng(seed).permutation(windows)

    def measure(depths: Mapping[Key, int]) -> dict[Key, Score]:
        return {key: score(key, case.values[key][order[:depth]]) for key, depth in depths.items()}

    found = score_adaptively(list(case.values), case.problem, settings, windows, measure)
    last = found.rounds[-1]
    evenly = measure(dict.fromkeys(case.values, max(2, round(last.spent * windows))))
    expected = last.expected_loss / last.objective
    return last.spent, len(found.rounds), expected, case.worse(found.scores), case.worse(evenly.values())


def line(runs: list[Replay]) -> list[str]:
    """Means and largest over the orders."""
    spent, looks, expected, worse, uniform = ([run[i] for run in runs] for i in range(5))
    tokens = statistics.fmean(spent)
    return [
        f"{tokens:.1%}",
        f"{1 / tokens:.1f}x",
        f"{statistics.fmean(looks):.1f}",
        f"{statistics.fmean(expected):.2%}",
        f"{statistics.fmean(worse):.2%}",
        f"{max(worse):.2%}",
        f"{statistics.fmean(uniform):.2%}",
        f"{max(uniform):.2%}",
    ]


@torch.inference_mode()
def entering(reader: Parent, tokens: Tensor) -> Iterator[Tensor]:
    """States (S, T, D) that enter each layer, one after the other."""
    hidden = reader.embedding()(tokens)
    for layer in range(reader.depth):
        yield hidden.clone()
        module = reader.layer(layer)
        pack_linears(module)
        hidden = module(hidden, **reader.contexts(hidden)[layer])


def full_values(profile: Profile, library: StoredLibrary, options: argparse.Namespace) -> dict[Key, Floats]:
    """KL of every usable variant on every window; what was scored before is read."""
    workspace: Path = options.workspace
    folder = workspace / "benchmark-adaptive"
    parent = prepare_parent(profile.parent, workspace, lambda: iterate_documents(profile.corpus))
    corpus = prepare_corpus(profile.corpus, workspace / parent.folder, parent.fingerprint, workspace)
    blocks = [read_value(workspace / "library" / f"{block.key}.json", BlockRecord) for block in library.variants]
    reader = open_parent(workspace / parent.folder, HOST)
    tokens = read_tensors(workspace, corpus.tokens, ["validation"])["validation"].long()
    tokens = tokens.unflatten(1, (-1, options.window)).flatten(0, 1)[: options.windows, : options.tokens]
    parts = [tuple(range(len(tokens)))[first : first + PART] for first in range(0, len(tokens), PART)]
    paths = {
        (part, layer): folder / f"{corpus.fingerprint}-{options.window}-{options.tokens}-{part[0]:03d}-{layer:03d}.json"
        for part in parts
        for layer in range(reader.depth)
    }
    if not all(path.exists() for path in paths.values()):
        states = list(entering(reader, tokens))
        suffix = make_suffix(Passes(reader), tokens, states[-1].clone(), reader.depth - 1)
        with shown("full scores") as tell:
            for done, ((part, layer), path) in enumerate(paths.items(), start=1):
                if not path.exists():
                    members = [block for block in blocks if block.layer == layer and block.status != "failed"]
                    write_text(path, json.dumps(scored(suffix, members, states[layer], part, workspace)))
                tell(done, len(paths))
    rows: dict[str, list[float]] = {}
    for path in paths.values():
        for key, values in json.loads(path.read_text()).items():
            rows.setdefault(key, []).extend(values)
    return {(b.layer, b.subblock, b.variant): np.array(rows[b.key]) for b in blocks if b.key in rows}


def scored(
    suffix: ParentSuffix, blocks: list[BlockRecord], hidden: Tensor, part: Sequences, workspace: Path
) -> dict[str, list[float]]:
    """KL of blocks of one layer on some windows, by the block's key."""
    values: dict[str, list[float]] = {}
    for batch, sequences in batches_of([(block, part) for block in blocks], hidden.shape[1]):
        for block, found in zip(batch, score_batch(suffix, batch, hidden, sequences, workspace), strict=True):
            if found is not None:
                values.setdefault(block.key, []).extend(found.kl)
    return values


if __name__ == "__main__":
    main()
