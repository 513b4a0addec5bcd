"""Library files with something wrong, or merely odd: the open format, and puzzletron's.

Each: a clear error (2, one sentence), or the right answer within its budget, summed again from the files by code of its
own; never a traceback. NVlabs' files are in test_nvlabs.py.
"""

import copy
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from blocks.files import sha256_of
from profiles.schema import Budget
from tasks.libraries.interchange import write_library
from tasks.libraries.options import OptionLibrary
from tasks.libraries.puzzletron import options_from_puzzletron
from tests import puzzletron
from tests.test_choose import CHAT, LONG, random_problem
from tests.test_interchange import stored
from tests.test_nvlabs import JUNK, puzzle

FLAGS = {"memory_gib": "--memory-gib", "latency_seconds": "--latency-seconds", "parameters": "--parameters"}
# the names in the tables of others -> the search's, and its unit in theirs
NAMES = {"memory_mib": ("memory_gib", 1024), "runtime_ms": ("latency_seconds", 1000), "num_params": ("parameters", 1)}
CELLS: list[Any] = [None, "x", "", -1, 0, 1e300, -1e-9, math.nan, math.inf, True, "parent", "no_op", [1.0], 7]
# (score, costs by budget) by label by layer
Table = dict[str, dict[str, tuple[float, dict[str, float]]]]


def request(draw: random.Random) -> list[Any]:
    """Budgets from sensible to absurd."""
    words: list[Any] = []
    for flag in FLAGS.values():
        if draw.random() < 0.5:
            odd = draw.random() < 0.1
            words += [flag, draw.choice(["x", -1, 0, "nan", 1e-9, "1e400"]) if odd else f"{draw.uniform(30, 110):.3f}%"]
    return words or ["--parameters", "70%"]


def ask(folder: Path, words: list[Any], seed: int) -> Any:
    """The answer, None for a clear error."""
    code, out, err = puzzle("choose", "--library", folder, *words, "--json")
    assert code in (0, 2), (seed, err)
    assert "Traceback" not in err and "a bug of puzzle" not in err, (seed, err)
    if code == 2:
        assert out == "" and len(err.strip()) > 20 and err.count("\n") == 1, (seed, err)
    if seed % 2:
        shown, _, told = puzzle("library", "show", folder)
        assert shown in (0, 2) and "Traceback" not in told, (seed, told)
        assert not (code == 0 and shown == 2), (seed, told)
    return json.loads(out) if code == 0 else None


def check(answer: Any, table: Table, outside: dict[str, float], words: list[Any], seed: int) -> None:
    """Within the budget and optimal, by brute force over the table."""
    parents = {
        name: outside.get(name, 0.0) + math.fsum(parent_of(rows)[1].get(name, 0.0) for rows in table.values())
        for name in FLAGS
        if any("%" in str(word) for word in words)
    }
    asked = dict(zip(words[::2], words[1::2], strict=True))
    limits = {name: limit(asked[flag], parents.get(name, 0.0)) for name, flag in FLAGS.items() if flag in asked}
    chosen = [table[layer][" ".join(label.split())] for layer, label in answer["layers"].items()]
    assert len(chosen) == len(table), seed
    for name, most in limits.items():
        used = outside.get(name, 0.0) + math.fsum(costs[name] for _, costs in chosen)
        assert used <= most * (1 + 1e-9) and answer[name] == pytest.approx(used, rel=1e-9), (seed, name)
    best = min(
        math.fsum(score for score, _ in choice)
        for choice in itertools.product(*(rows.values() for rows in table.values()))
        if all(
            outside.get(name, 0.0) + math.fsum(costs[name] for _, costs in choice) <= most
            for name, most in limits.items()
        )
    )
    assert answer["objective"] == pytest.approx(best, rel=1e-6, abs=1e-9), seed


def parent_of(rows: dict[str, Any]) -> Any:
    return next(
        row
        for label, row in rows.items()
        if label == "attention = parent && ffn = parent" or label.count("parent * 100%") == 2
    )


def limit(word: Any, parent: float) -> float:
    return float(word.rstrip("%")) / 100 * parent if "%" in str(word) else float(word)


def rows_of(table: pd.DataFrame) -> Any:
    return table.itertuples()


# --- the open format


def mutated(source: Path, target: Path, draw: random.Random) -> None:
    """A copy with up to two things changed; digests follow, most of the time."""
    described: Any = json.loads((source / "library.json").read_text())
    tables = {path.stem: pd.read_parquet(path) for path in source.glob("*.parquet")}
    for _ in range(draw.choice([0, 0, 1, 1, 1, 2])):
        if draw.random() < 0.25:
            spoil_json(described, draw)
        else:
            name = draw.choice(sorted(tables))
            tables[name] = spoil_table(tables[name], draw)
    target.mkdir(exist_ok=True)
    for name, table in tables.items():
        path = target / f"{name}.parquet"
        try:
            table.to_parquet(path, index=False)
        except (ValueError, TypeError, OverflowError):  # a column of two types is no parquet: leave it out
            path.unlink(missing_ok=True)
        if path.exists() and draw.random() < 0.03:
            path.write_bytes(path.read_bytes()[: draw.randrange(64)])
        if isinstance(described, dict) and isinstance(described.get("tables"), dict) and path.exists():
            described["tables"][name] = sha256_of(path)
    text = json.dumps(described)
    (target / "library.json").write_text(text[: draw.randrange(len(text))] if draw.random() < 0.02 else text)


def spoil_json(described: dict[str, Any], draw: random.Random) -> None:
    name = draw.choice(sorted(described))
    if draw.random() < 0.3:
        del described[name]
    elif isinstance(described[name], list) and described[name] and draw.random() < 0.5:
        place = draw.randrange(len(described[name]))
        described[name][place] = draw.choice([*JUNK, described[name][0]])
    else:
        described[name] = draw.choice(JUNK)


def spoil_table(table: pd.DataFrame, draw: random.Random) -> pd.DataFrame:
    kind = draw.choice(["cell"] * 5 + ["drop row", "double row", "drop column", "new column", "empty"])
    if kind == "empty" or table.empty or not len(table.columns):
        return table.iloc[:0]
    row, column = draw.randrange(len(table)), draw.choice(list(table.columns))
    if kind == "drop row":
        return table.drop(index=row)
    if kind == "double row":
        return pd.concat([table, table.iloc[[row]]])
    if kind == "drop column":
        return table.drop(columns=column)
    if kind == "new column":
        return table.assign(surprise=1)
    values = table[column].tolist()
    values[row] = draw.choice(CELLS)
    return table.assign(**{column: pd.Series(values, index=table.index)})


def named(costs: dict[str, float]) -> dict[str, float]:
    return {NAMES[cost][0]: value / NAMES[cost][1] for cost, value in costs.items() if cost in NAMES}


def whole_blocks(rows: dict[tuple[str, str], Any]) -> dict[str, Any]:
    parts: dict[str, list[tuple[str, Any]]] = {}
    for (part, label), row in rows.items():
        if part != "block":
            parts.setdefault(part, []).append((f"{part} = {label}", row))
    found = {}
    for choice in itertools.product(*parts.values()) if parts else ():
        names = set.intersection(*(set(row[1]) for _, row in choice))
        costs = {name: math.fsum(row[1][name] for _, row in choice) for name in names}
        found[" && ".join(label for label, _ in choice)] = (math.fsum(row[0] for _, row in choice), costs)
    return found | {" ".join(label.split()): row for (part, label), row in rows.items() if part == "block"}


def run_table(folder: Path) -> tuple[Table, dict[str, float]]:
    """Version 1, at one scenario and batch size; a variant must have been measured at all of them."""
    described = json.loads((folder / "library.json").read_text())
    scores, costs, non_block = (
        pd.read_parquet(folder / f"{name}.parquet") for name in ("scores", "costs", "non_block")
    )
    scenario = next(one for one in described["scenarios"] if one["name"] == CHAT.name)
    size = min(CHAT.batch_sizes)
    places = {(one["name"], own) for one in described["scenarios"] for own in one["batch_sizes"]}
    tokens = size * (scenario["prompt_tokens"] + scenario["generated_tokens"])

    def plain(row: Any, kv: float) -> dict[str, float]:
        runtime = row.prefill_seconds + scenario["generated_tokens"] * row.decode_seconds_per_token
        memory = (row.weight_bytes + kv * tokens) / 2**30
        return {"memory_gib": memory, "latency_seconds": runtime, "parameters": float(row.parameters)}

    def at(table: pd.DataFrame) -> Any:
        return table[(table["scenario"] == scenario["name"]) & (table["batch_size"] == size)].itertuples()

    measured: dict[tuple[str, str], set[tuple[str, int]]] = {}
    for row in rows_of(costs):
        measured.setdefault((row.subblock, row.variant), set()).add((row.scenario, row.batch_size))
    priced = {
        (row.subblock, row.variant): plain(row, row.kv_bytes_per_token)
        for row in at(costs)
        if measured[row.subblock, row.variant] >= places
    }
    (outside,) = (plain(row, 0) for row in at(non_block))
    found: Table = {}
    for layer in range(described["num_hidden_layers"]):
        own = scores[scores["layer"] == layer] if len(scores.columns) else scores
        listed = [] if own.empty else [(r.subblock, r.variant, r.kl) for r in rows_of(own)]
        parts = {name: {"parent": 0.0} | {v: kl for s, v, kl in listed if s == name} for name in ("attention", "ffn")}
        rows = {
            f"attention = {a} && ffn = {f}": (parts["attention"][a] + parts["ffn"][f], a, f)
            for a, f in itertools.product(parts["attention"], parts["ffn"])
        }
        rows |= {
            f"attention = {v.split('+')[0]} && ffn = {v.split('+')[1]} (coupled)": (kl, *v.split("+"))
            for s, v, kl in listed
            if s == "block"
        }
        found[f"layer_{layer}"] = {
            label: (score, {name: priced["attention", a][name] + priced["ffn", f][name] for name in FLAGS})
            for label, (score, a, f) in rows.items()
            if ("attention", a) in priced and ("ffn", f) in priced
        }
    return found, outside


def test_mutated_open_format(tmp_path: Path) -> None:
    problem = random_problem(0, Budget(speedup=1.2), scenarios=(CHAT, LONG), coupled=True)
    write_library(tmp_path / "run", stored(problem))
    codes = []
    for seed in range(40):
        draw = random.Random(f"run{seed}")
        folder = tmp_path / str(seed)
        mutated(tmp_path / "run", folder, draw)
        words = request(draw)
        answer = ask(folder, [*words, "--scenario", CHAT.name, "--batch-size", min(CHAT.batch_sizes)], seed)
        codes.append(answer is None)
        if answer is not None:
            check(answer, *run_table(folder), words, seed)
    assert codes.count(True) >= 10 and codes.count(False) >= 8, "the files are of both kinds"


# --- puzzletron


def options_table(library: OptionLibrary) -> tuple[Table, dict[str, float]]:
    """A library with costs at one place."""
    (place,) = library.description.places
    found: Table = {}
    for layer in library.description.layers:
        own = [variant for variant in library.variants if variant.layer == layer]
        rows = {(v.part, v.label): (v.metrics["kl_div"], named(v.costs[place])) for v in own}
        found[layer] = whole_blocks(rows)
    return found, named(library.outside[place])


def spoil(value: Any, draw: random.Random) -> Any:
    """One change somewhere below."""
    if isinstance(value, dict) and value:
        name = draw.choice(sorted(value))
        kind = draw.random()
        if kind < 0.15:
            del value[name]
        elif kind < 0.35 or not isinstance(value[name], dict | list):
            value[name] = draw.choice(JUNK)
        else:
            spoil(value[name], draw)
    elif isinstance(value, list) and value:
        place = draw.randrange(len(value))
        kind = draw.random()
        if kind < 0.15:
            del value[place]
        elif kind < 0.25:
            value.append(copy.deepcopy(value[place]))
        elif isinstance(value[place], dict | list):
            spoil(value[place], draw)
        else:
            value[place] = draw.choice(JUNK)


@pytest.mark.parametrize("one_subblock", [False, True])
def test_mutated_puzzletron(tmp_path: Path, one_subblock: bool) -> None:
    """What is answered keeps the budget and is the best, by brute force over the variants that were read."""
    codes = []
    for seed in range(40):
        draw = random.Random(f"{one_subblock}{seed}")
        stats, scores = puzzletron.statistics(seed, 2)[1:], puzzletron.solutions(seed, 2, one_subblock)
        for _ in range(draw.choice([0, 0, 1, 1, 2])):
            spoil(stats if draw.random() < 0.4 else scores, draw)
        folder = tmp_path / str(seed)
        puzzletron.write(folder, stats, scores, one_subblock)
        words = request(draw)
        answer = ask(folder, words, seed)
        codes.append(answer is None)
        if answer is not None:
            check(answer, *options_table(options_from_puzzletron(folder)), words, seed)
    assert codes.count(True) >= 10 and codes.count(False) >= 8, "the files are of both kinds"
