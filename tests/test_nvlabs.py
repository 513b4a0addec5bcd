"""Libraries in NVlabs' format: the command against brute force, what it says, and 200 broken files and budgets."""

import copy
import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from flows import cli
from tasks.running import at_work

ATTENTION = {"8 kv heads": 1.0, "2 kv heads": 0.55, "no_op": 0.0}
FFN = {"intermediate size 29e3": 1.0, "intermediate size 14e3": 0.5, "no_op": 0.0}
LAYERS = 4


def label(attention: str, ffn: str) -> str:
    """As NVlabs writes it, tabs included."""
    return f"attention = {attention} (parent * {ATTENTION[attention]:.0%})\t&&\tffn = {ffn} (parent * {FFN[ffn]:.0%})"


def library(seed: int = 0, layers: int = LAYERS) -> dict[str, Any]:
    draw = random.Random(seed)
    found: dict[str, Any] = {}
    for layer in range(layers):
        weight = draw.uniform(0.5, 2)
        variants = {}
        for (attention, a), (ffn, f) in itertools.product(ATTENTION.items(), FFN.items()):
            hurt = weight * ((1 - a) ** 2 * draw.uniform(0.5, 1.5) + (1 - f) ** 2 * draw.uniform(0.5, 1.5))
            stats = {
                "num_kv_heads": round(8 * a),
                "ffn_intermediate_size": round(28672 * f),
                "memory_mib": 600 * a * draw.uniform(0.9, 1.1) + 1000 * f,
                "runtime_ms": 300 * a + 500 * f * draw.uniform(0.9, 1.1),
                "num_params": round(1e8 * (a + 4 * f)),
            }
            variants[label(attention, ffn)] = {"stats": stats, "metrics": {"kl_div": hurt, "lm_loss": 2 + hurt**2}}
        found[f"layer_{layer}"] = variants
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "block_library.json"
    path.write_text(json.dumps(library()))
    return path


def puzzle(*words: Any) -> tuple[int, str, str]:
    """Exit code, output and errors as main() gives them; a traceback would be an exception here. What a command sets
    for its process (variables, threads, its number in a workspace) is taken back.
    """
    runner, threads, entered = CliRunner(), torch.get_num_threads(), set(at_work._HELD)
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):
        patch.setattr("sys.argv", ["puzzle", *map(str, words)])
        with runner.isolation() as (out, err, _):
            try:
                cli.main()
                code: Any = 0
            except SystemExit as end:
                code = end.code or 0
            torch.set_num_threads(threads)
            for workspace in set(at_work._HELD) - entered:
                at_work.leave(workspace)
            return code, out.getvalue().decode(), err.getvalue().decode()


def answers(*words: Any) -> Any:
    code, out, err = puzzle(*words, "--json")
    assert code == 0, err
    return json.loads(out)


def selections(data: dict[str, Any]) -> list[list[tuple[str, Any]]]:
    return [list(one) for one in itertools.product(*(variants.items() for variants in data.values()))]


def total(selection: list[tuple[str, Any]], part: str, name: str) -> float:
    return math.fsum(variant[part][name] for _, variant in selection)


# the file's name of a figure -> puzzle's, and how many of the file's units one of puzzle's is
OURS = {"memory_mib": ("memory_gib", 1024), "runtime_ms": ("latency_seconds", 1000), "kl_div": ("kl", 1)}


def ours(name: str, value: float) -> float:
    return value / OURS.get(name, (name, 1))[1]


@pytest.mark.parametrize("metric", ["kl_div", "lm_loss"])
@pytest.mark.parametrize(
    ("memory", "runtime", "types", "forbid"),
    [
        (4000, None, None, None),
        (None, 1800, None, None),
        (4000, 1700, None, None),
        (4000, 1700, 2, None),
        (4000, 1700, None, "no_op"),
        (4000, 2000, None, "attention=no_op"),
        (4000, 2000, 3, label("2 kv heads", "intermediate size 14e3")),
    ],
)
def test_like_brute_force(
    file: Path, metric: str, memory: int | None, runtime: int | None, types: int | None, forbid: str | None
) -> None:
    words: list[Any] = ["choose", "--library", file, "--metric", OURS.get(metric, (metric,))[0]]
    words += ["--memory-gib", memory / 1024] if memory is not None else []
    words += ["--latency-seconds", runtime / 1000] if runtime is not None else []
    words += ["--max-block-types", types] * (types is not None) + ["--forbid", forbid] * (forbid is not None)
    fitting = [
        total(one, "metrics", metric)
        for one in selections(library())
        if total(one, "stats", "memory_mib") <= (memory or math.inf)
        and total(one, "stats", "runtime_ms") <= (runtime or math.inf)
        and len({name for name, _ in one}) <= (types or LAYERS)
        and not (forbid == "no_op" and any("no_op" in name for name, _ in one))
        and not (forbid == "attention=no_op" and any("attention = no_op" in name for name, _ in one))
        and not any(name == forbid for name, _ in one)
    ]
    answer = answers(*words)
    assert answer["objective"] == pytest.approx(min(fitting), abs=1e-6)
    assert answer["status"] == "optimal" and answer["objective"] - 1e-5 <= answer["bound"] <= answer["objective"]
    assert answer["gap"] <= 1e-6 and answer["solved_by"].startswith("cvxpy/highs")
    chosen = [(name, library()[layer][name]) for layer, name in answer["layers"].items()]
    assert len(chosen) == LAYERS
    assert answer["objective"] == pytest.approx(total(chosen, "metrics", metric), rel=1e-12)
    for name in ("memory_mib", "runtime_ms"):
        assert answer[OURS[name][0]] == pytest.approx(ours(name, total(chosen, "stats", name)), rel=1e-12)


def test_diverse_answers_are_the_best_that_differ(file: Path) -> None:
    words = ("--memory-gib", 4000 / 1024, "--latency-seconds", 1.8, "--diverse", 3, "--min-different", 2)
    found = answers("choose", "--library", file, *words)
    assert len(found) == 3
    chosen = [tuple(one["layers"].values()) for one in found]
    for one, other in itertools.combinations(chosen, 2):
        assert sum(a != b for a, b in zip(one, other, strict=True)) >= 2
    for place in range(3):
        left = [
            total(one, "metrics", "kl_div")
            for one in selections(library())
            if total(one, "stats", "memory_mib") <= 4000
            and total(one, "stats", "runtime_ms") <= 1800
            and all(sum(a != b for (a, _), b in zip(one, c, strict=True)) >= 2 for c in chosen[:place])
        ]
        assert found[place]["objective"] == pytest.approx(min(left), abs=1e-6)


def test_one_of_one_is_a_list_only_when_several_were_asked_for(file: Path) -> None:
    found = answers("choose", "--library", file, "--memory-gib", 1e6 / 1024, "--diverse", 2, "--min-different", LAYERS)
    assert isinstance(found, list) and found[0]["objective"] == 0
    assert isinstance(answers("choose", "--library", file, "--memory-gib", 1e6 / 1024), dict)


def test_the_output_is_the_answer_alone(file: Path) -> None:
    """In a process of its own: what a solver's library writes by itself would be seen here."""
    main = "from flows.cli import main; main()"
    words = [sys.executable, "-c", main, "choose", "--library", str(file), "--memory-gib", "3.90625", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(cli.__file__).parent.parent)
    assert json.loads(done.stdout)["status"] == "optimal" and not done.stderr


def test_told_to_a_person(file: Path) -> None:
    code, out, _ = puzzle("choose", "--library", file, "--memory-gib", 4000 / 1024)
    answer = answers("choose", "--library", file, "--memory-gib", 4000 / 1024)
    assert code == 0
    assert f"objective  {answer['objective']:.6f} (kl, sum over 4 layers)" in out
    assert "optimal" in out and "gap" in out and "asked: at most 3.90625 GiB" in out
    assert all(f"layer_{layer}" in out for layer in range(LAYERS))


def test_layers_come_in_the_order_of_the_model(file: Path) -> None:
    names = {f"layer_{i}": variants for i, variants in enumerate(library(layers=11).values())}
    file.write_text(json.dumps(dict(sorted(names.items()))))
    assert list(names) != sorted(names)
    assert list(answers("choose", "--library", file, "--memory-gib", 9000 / 1024)["layers"]) == list(names)


# --- libraries with a hole: what is missing would cost nothing and hurt nothing


def renamed(data: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(name, name): variants for name, variants in data.items()}


def without_parent(data: dict[str, Any], layer: str) -> dict[str, Any]:
    kept = {name: variant for name, variant in data[layer].items() if name.count("parent * 100%") < 2}
    return {**data, layer: kept}


def with_figure(data: dict[str, Any], part: str, name: str, value: float) -> dict[str, Any]:
    next(iter(data["layer_2"].values()))[part][name] = value
    return data


HOLES: dict[str, tuple[Any, str]] = {
    "a layer between": (lambda d: {n: v for n, v in d.items() if n != "layer_2"}, "there is no layer 2"),
    "two layers between": (lambda d: {n: d[n] for n in ("layer_0", "layer_3")}, "there is no layer 1"),
    "the first layer": (lambda d: {n: v for n, v in d.items() if n != "layer_0"}, "there is no layer 0"),
    "one late layer alone": (lambda d: {"layer_3": d["layer_3"]}, "there is no layer 0"),
    "from 1 on": (lambda d: {f"layer_{i}": v for i, v in enumerate(d.values(), 1)}, "there is no layer 0"),
    "a layer twice": (lambda d: renamed(d, {"layer_3": "block_2"}), "stands there twice"),
    "a layer twice, by another spelling": (lambda d: d | {"layer_03": d["layer_3"]}, "stands there twice"),
    "a name without a number": (lambda d: renamed(d, {"layer_1": "embedding"}), "'embedding' has no number"),
    "an empty layer": (lambda d: d | {"layer_1": {}}, "layer_1 must be a JSON object with entries"),
    "a layer that is none": (lambda d: d | {"layer_1": None}, "layer_1 must be a JSON object with entries"),
    "no parent's block": (lambda d: without_parent(d, "layer_1"), "layer_1 lacks the parent's own block"),
    "a cost that is not finite": (
        lambda d: with_figure(d, "stats", "runtime_ms", math.inf),
        "runtime_ms must be a num",
    ),
    "a cost that is no number": (lambda d: with_figure(d, "stats", "memory_mib", math.nan), "memory_mib must be a num"),
    "a score that is not finite": (lambda d: with_figure(d, "metrics", "kl_div", math.nan), "kl_div must be a number"),
    "a negative cost": (lambda d: with_figure(d, "stats", "num_params", -1.0), "num_params is -1.0"),
}


@pytest.mark.parametrize("hole", HOLES)
def test_a_library_with_a_hole_is_refused(file: Path, hole: str) -> None:
    change, told = HOLES[hole]
    file.write_text(json.dumps(change(library())))
    for words in (
        ("choose", "--memory-gib", 5000 / 1024),
        ("sweep", "--over", "memory_gib"),
        ("library", "show", file),
    ):
        library_is = () if "show" in words else ("--library", file)
        code, out, err = puzzle(*words, *library_is)
        assert (code, out) == (2, "") and told in " ".join(err.split()), err


def test_a_library_that_marks_no_parent_and_one_that_numbers_no_layer_are_whole(file: Path) -> None:
    bare = {layer: {n.replace("100%", "99%"): v for n, v in own.items()} for layer, own in library().items()}
    for data in (bare, renamed(library(), {f"layer_{i}": name for i, name in enumerate("abcd")})):
        file.write_text(json.dumps(data))
        assert len(answers("choose", "--library", file, "--memory-gib", 5000 / 1024)["layers"]) == LAYERS


# --- when nothing fits


def reachable(file: Path, **budgets: float) -> bool:
    words = [word for name, limit in budgets.items() for word in (f"--{name.replace('_', '-')}", limit)]
    code, _, err = puzzle("choose", "--library", file, *words)
    assert code == 0 or "No architecture" in err
    return code == 0


def named_value(err: str, budget: str) -> float:
    return float(err.partition(f"{budget}: ")[2].partition("at least ")[2].split()[0])


def test_a_budget_out_of_reach_names_the_cheapest_child(file: Path) -> None:
    """With every no-op forbidden; the value that is named works, a hair less does not."""
    words = ("choose", "--library", file, "--forbid", "no_op")
    code, out, err = puzzle(*words, "--memory-gib", 100 / 1024)
    assert (code, out) == (2, "") and "by the cheapest child" in err
    named = named_value(err, "memory_gib")
    assert puzzle(*words, "--memory-gib", named)[0] == 0
    assert puzzle(*words, "--memory-gib", named * (1 - 1e-4))[0] == 2


def test_a_conflict_names_what_easing_one_alone_takes(file: Path) -> None:
    """Heavy variants are quick and light ones slow: each budget is reachable, both are not."""
    data = library()
    for variants in data.values():
        for variant in variants.values():
            variant["stats"]["runtime_ms"] = 1000 - variant["stats"]["memory_mib"] / 2
    file.write_text(json.dumps(data))
    assert reachable(file, memory_gib=1000 / 1024) and reachable(file, latency_seconds=2.5)
    code, _, err = puzzle("choose", "--library", file, "--memory-gib", 1000 / 1024, "--latency-seconds", 2500 / 1000)
    assert code == 2 and "together" in err
    memory, runtime = named_value(err, "memory_gib"), named_value(err, "latency_seconds")
    assert reachable(file, memory_gib=memory, latency_seconds=2.5)
    assert not reachable(file, memory_gib=memory * (1 - 1e-4), latency_seconds=2.5)
    assert reachable(file, memory_gib=1000 / 1024, latency_seconds=runtime)
    assert not reachable(file, memory_gib=1000 / 1024, latency_seconds=runtime * (1 - 1e-4))


def test_too_few_block_types_are_counted(file: Path) -> None:
    data = library()
    for layer in ("layer_0", "layer_1"):  # these two share no label with the rest
        data[layer] = {f"{layer} {name}": variant for name, variant in data[layer].items()}
    file.write_text(json.dumps(data))
    code, _, err = puzzle("choose", "--library", file, "--memory-gib", 5000 / 1024, "--max-block-types", 2)
    assert code == 2 and "at least 3 are needed" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--memory-gib", 4000 / 1024, "--forbid", "mamba"], "nothing in the library is called 'mamba'; kinds there:"),
        (["--memory-gib", 4000 / 1024, "--metric", "mmlu"], "has no metric 'mmlu'"),
        ([], "a budget is needed"),
        (["--memory-gib", 0], "--memory-gib: a finite number greater than 0, not 0"),
        (["--memory-gib", "nan"], "--memory-gib:"),
        (["--memory-gib", 4000 / 1024, "--min-different", 5, "--diverse", 2], "there are 4 layers to differ in"),
        (
            [
                "--memory-gib",
                4000 / 1024,
                "--forbid",
                "no_op",
                "--forbid",
                "attention=8 kv heads",
                "--forbid",
                "2 kv heads",
            ],
            "forbids every variant of layer_0",
        ),
    ],
)
def test_what_cannot_be_asked(file: Path, words: list[Any], told: str) -> None:
    code, out, err = puzzle("choose", "--library", file, *words)
    assert (code, out) == (2, "")
    assert told in err and "Traceback" not in err


# --- explain and sweep


def test_prices_are_what_the_next_unit_buys(file: Path) -> None:
    words = ("--library", file, "--memory-gib", 4000 / 1024, "--latency-seconds", 2600 / 1000)
    best = answers("choose", *words)
    for price in answers("explain", *words)["prices"]:
        moved = dict(zip(words[2::2], words[3::2], strict=True))
        for step, objective in price["resolved"].items():
            limit = price["limit"] * (1 + float(step.rstrip("%")) / 100)
            at = {**moved, f"--{price['budget'].replace('_', '-')}": limit}
            again = answers("choose", "--library", file, *itertools.chain(*at.items()))
            assert objective == pytest.approx(again["objective"], abs=1e-6)
        assert price["per_unit"] <= 0 and price["used"] <= price["limit"]
        assert price["resolved"]["-5%"] >= best["objective"] - 1e-9 >= price["resolved"]["+5%"] - 2e-9
    assert "one GiB larger" in puzzle("explain", *words)[1]


def test_sweep_falls_and_ends_at_the_parent(file: Path) -> None:
    points = answers("sweep", "--library", file, "--over", "memory-gib", "--points", 9, "--latency-seconds", 3)
    assert [point["status"] for point in points].count("infeasible") < 9
    found = [point["objective"] for point in points if "objective" in point]
    assert found == sorted(found, reverse=True) and found[0] > found[-1]
    for point in points:
        if "objective" in point:
            alone = answers("choose", "--library", file, "--memory-gib", point["limit"], "--latency-seconds", 3)
            assert point["objective"] == pytest.approx(alone["objective"], abs=1e-6)
    assert "objective" in puzzle("sweep", "--library", file, "--points", 3)[1]


# --- 200 broken files and budgets

JUNK: list[Any] = [None, "", "x", -1, -1e-9, 0, 1e308, 1e-308, True, [], {}, {"a": 1}, [1], math.nan, math.inf, 10**400]


def broken(seed: int) -> tuple[str, list[Any]]:
    """A library file with up to three things wrong (or merely odd) and budgets from sensible to absurd."""
    draw = random.Random(seed)
    data: Any = copy.deepcopy(library(seed, layers=3))
    for _ in range(draw.choice([0, 0, 1, 1, 2, 3])):
        spoil(data, draw)
    text = json.dumps(data)
    if draw.random() < 0.08:
        text = text[: draw.randrange(len(text))]
    if draw.random() < 0.1:
        text = text.replace('"layer_1"', '"layer_0"')
    return text, odd_request(draw)


def spoil(data: Any, draw: random.Random) -> None:
    """One change somewhere; where an earlier one left no such place, none."""
    layer = draw.choice(list(data))
    if not isinstance(data[layer], dict) or not data[layer]:
        return
    name = draw.choice(list(data[layer]))
    variant = data[layer][name]
    kind = draw.choice(["layer", "drop variant", "variant", "part", "value", "drop value", "rename"])
    if kind == "layer":
        data[layer] = draw.choice(JUNK)
    elif kind == "drop variant":
        del data[layer][name]
    elif kind == "variant":
        data[layer][name] = draw.choice(JUNK)
    elif kind == "rename":
        data[draw.choice(["", "layer_7", "x"])] = data.pop(layer)
    elif isinstance(variant, dict):
        spoil_variant(variant, kind, draw)


def spoil_variant(variant: Any, kind: str, draw: random.Random) -> None:
    part = draw.choice(["stats", "metrics"])
    if kind == "part":
        variant[part] = draw.choice(JUNK)
    elif isinstance(variant.get(part), dict) and variant[part]:
        value = draw.choice(list(variant[part]))
        if kind == "value":
            variant[part][value] = draw.choice(JUNK)
        else:
            del variant[part][value]


def odd_request(draw: random.Random) -> list[Any]:
    words: list[Any] = []
    for budget, unit in (("--memory-gib", 1024), ("--latency-seconds", 1000)):
        if draw.random() < 0.8:
            odd = draw.random() < 0.12
            words += [budget, draw.choice([1e-9, 1e12, -1, 0, "x"]) if odd else draw.uniform(500, 4500) / unit]
    if draw.random() < 0.3:
        words += ["--max-block-types", draw.choice([1, 2, 2, 3, 0, 10**9])]
    if draw.random() < 0.3:
        words += ["--forbid", draw.choice(["no_op", "ffn=no_op", "linear", ""])]
    if draw.random() < 0.3:
        words += ["--diverse", 2, "--min-different", draw.choice([1, 2, 3, 4])]
    return words


@pytest.mark.parametrize("tens", range(20))
def test_broken_files_and_budgets(tmp_path: Path, tens: int) -> None:
    """Each: a clear error (2, a sentence, no traceback), or the right answer within its budget."""
    file = tmp_path / "block_library.json"
    for seed in range(10 * tens, 10 * tens + 10):
        text, words = broken(seed)
        file.write_text(text)
        code, out, err = puzzle("choose", "--library", file, *words, "--json")
        assert code in (0, 2), (seed, err)
        assert "Traceback" not in err and "a bug of puzzle" not in err, (seed, err)
        if code == 2:
            assert out == "" and len(err.strip()) > 20, (seed, err)
        else:
            check_answer(json.loads(text), json.loads(out), dict(zip(words[::2], words[1::2], strict=True)), seed)


def check_answer(data: Any, answer: Any, asked: dict[str, Any], seed: int) -> None:
    best = answer[0] if isinstance(answer, list) else answer
    memory, runtime = asked.get("--memory-gib", math.inf), asked.get("--latency-seconds", math.inf)
    assert best["memory_gib"] <= memory * (1 + 1e-9) and best["latency_seconds"] <= runtime * (1 + 1e-9), seed
    fitting = [
        total(one, "metrics", "kl_div")
        for one in selections(data)
        if total(one, "stats", "memory_mib") / 1024 <= memory
        and total(one, "stats", "runtime_ms") / 1000 <= runtime
        and len({name for name, _ in one}) <= asked.get("--max-block-types", math.inf)
        and not ("--forbid" in asked and any(asked["--forbid"].replace("=", " = ") in name for name, _ in one))
    ]
    assert best["objective"] == pytest.approx(min(fitting), rel=1e-6, abs=1e-9), seed


def test_the_broken_files_are_of_both_kinds(tmp_path: Path) -> None:
    file = tmp_path / "block_library.json"
    codes = []
    for seed in range(60):
        text, words = broken(seed)
        file.write_text(text)
        codes.append(puzzle("choose", "--library", file, *words)[0])
    assert codes.count(0) >= 8 and codes.count(2) >= 8
