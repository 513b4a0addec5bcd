"""The open format: what is written is read, damage is told, the joint view chooses what the additive MIP chooses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from blocks.files import sha256_of
from blocks.records import BlockRecord
from profiles.schema import Budget
from tasks.libraries.interchange import (
    Description,
    StoredLibrary,
    joint_view,
    open_library,
    read_library,
    write_library,
)
from tasks.operating.sweeping import sweep_library
from tasks.search.choose import choose
from tasks.search.joint import LibraryFileError
from tasks.search.request import Request, limits
from tasks.search.solve import choose_joint
from tasks.search.totals import Problem, totals_of
from tests.test_choose import CHAT, EXACT, LONG, random_problem
from tests.test_nvlabs import answers, puzzle


def stored(problem: Problem) -> StoredLibrary:
    described = Description(
        profile="p",
        parent="random",
        parent_fingerprint="f" * 8,
        corpus="none",
        num_hidden_layers=problem.costs.num_hidden_layers,
        hardware={"name": "here"},
        measured_at="never",
        scenarios=problem.scenarios,
        windows=problem.costs.windows,
    )
    trained = BlockRecord(key="k", layer=0, subblock="ffn", variant="ffn50", status="trained", nmse_after=0.5, steps=8)
    free = BlockRecord(key="n", layer=0, subblock="ffn", variant="no_op", status="free")
    costs = problem.costs.model_copy(update={"hardware": {"name": "here"}})
    return StoredLibrary(description=described, variants=(trained, free), scores=problem.scores, costs=costs)


@pytest.fixture
def library() -> StoredLibrary:
    problem = random_problem(0, Budget(speedup=1.2), scenarios=(CHAT, LONG))
    costs = [
        cost.model_copy(update={"kv_tokens": 40 if cost.variant == "kv1" else None}) for cost in problem.costs.costs
    ]
    table = problem.costs.model_copy(update={"costs": tuple(costs), "windows": (6, None, 6)})
    return stored(replace(problem, costs=table))


def test_what_is_written_is_read(tmp_path: Path, library: StoredLibrary) -> None:
    write_library(tmp_path, library)
    write_library(tmp_path, library)  # again over itself
    again = read_library(tmp_path)
    assert again.scores == library.scores and again.costs == library.costs and again.variants == library.variants
    assert again.description.model_copy(update={"tables": {}}) == library.description
    assert all(len(digest) == 64 for digest in again.description.tables.values())


@pytest.mark.parametrize("table", ["variants", "scores", "costs", "non_block"])
def test_a_flipped_bit_or_a_lost_table_is_told(tmp_path: Path, library: StoredLibrary, table: str) -> None:
    write_library(tmp_path, library)
    path = tmp_path / f"{table}.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(LibraryFileError, match=f"{table}.parquet is not the table that library.json names"):
        read_library(tmp_path)
    path.unlink()
    with pytest.raises(LibraryFileError, match=f"{table}.parquet is missing"):
        read_library(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"version": 3}, "version 3 of the format; this puzzle reads version 1"),
        ({"format": "other"}, "format"),
        ({"surprise": 1}, "surprise"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers"),
    ],
)
def test_another_format_is_told(tmp_path: Path, library: StoredLibrary, change: dict[str, Any], told: str) -> None:
    write_library(tmp_path, library)
    path = tmp_path / "library.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    code, out, err = puzzle("choose", "--library", tmp_path, "--parameters", "80%")
    assert (code, out) == (2, "") and told in err


@pytest.mark.parametrize("busy", ["", "others took 2.0 of 2 processors"])
def test_searches_say_that_costs_were_disturbed(tmp_path: Path, library: StoredLibrary, busy: str) -> None:
    hardware = library.description.hardware | ({"busy": busy} if busy else {})
    write_library(
        tmp_path,
        library.model_copy(update={"description": library.description.model_copy(update={"hardware": hardware})}),
    )
    for command in (("choose",), ("explain",), ("sweep", "--points", 2, "--over", "memory_gib", "--scenario", "chat")):
        code, _, err = puzzle(*command, "--library", tmp_path, "--parameters", "80%")
        assert code == 0 and (f"not reliable ({busy})" in err) == bool(busy)


def test_a_wrong_column_is_told(tmp_path: Path, library: StoredLibrary) -> None:
    write_library(tmp_path, library)
    frame = pd.read_parquet(tmp_path / "scores.parquet").assign(kl="much")
    frame.to_parquet(tmp_path / "scores.parquet")
    described = json.loads((tmp_path / "library.json").read_text())
    described["tables"]["scores"] = sha256_of(tmp_path / "scores.parquet")
    (tmp_path / "library.json").write_text(json.dumps(described))
    with pytest.raises(LibraryFileError, match="scores.parquet: kl: "):
        read_library(tmp_path)


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("scenario", [CHAT, LONG])
@pytest.mark.parametrize("seed", range(3))
def test_the_joint_view_chooses_what_the_mip_chooses(seed: int, scenario: Any, coupled: bool) -> None:
    """Same budgets in other words: the same objective, the same architecture, the same totals."""
    budget = Budget(max_latency_seconds=0.16 if scenario is LONG else 0.12, memory_fraction=0.75)
    problem = random_problem(seed, budget, scenarios=(scenario,), coupled=coupled)
    architecture = choose(problem)
    totals = architecture.totals[0]
    view = joint_view(stored(problem))
    asked = limits(memory_gib=0.75 * view.of_parent("memory_gib"), latency_seconds=budget.max_latency_seconds or 0)
    request = Request(limits=asked, search=EXACT)
    (choice,) = choose_joint(view, request)
    assert 0 < choice.objective == pytest.approx(architecture.score, rel=1e-9)
    assert choice.score_se == pytest.approx(architecture.score_se, rel=1e-9)
    assert choice.memory_gib is not None and choice.latency_seconds is not None
    assert choice.memory_gib * 2**30 == pytest.approx(totals.memory_bytes, rel=1e-9)
    assert choice.latency_seconds == pytest.approx(totals.runtime_seconds, rel=1e-9)
    assert choice.parameters == pytest.approx(totals.parameters)
    for layer, chosen in enumerate(architecture.layers):
        label = f"attention = {chosen.attention} && ffn = {chosen.ffn}{' (coupled)' if chosen.coupled else ''}"
        assert choice.layers[f"layer_{layer}"] == label


def test_shares_are_of_the_parent(tmp_path: Path) -> None:
    problem = random_problem(1, Budget(speedup=1.2))
    write_library(tmp_path / "tables" / "p", stored(problem))
    parent = totals_of(problem, problem.parent, (1,))[0]
    for share in (60, 90):
        choice = answers("choose", "--library", tmp_path, "--parameters", f"{share}%")
        assert 0.5 * share / 100 * parent.parameters < choice["parameters"] <= share / 100 * parent.parameters
    same = answers("choose", "--library", tmp_path / "tables" / "p", "--latency-seconds", "100%")
    assert same["objective"] == 0 and same["latency_seconds"] == pytest.approx(parent.runtime_seconds)


def test_scenarios_and_batch_sizes(tmp_path: Path, library: StoredLibrary) -> None:
    write_library(tmp_path, library)
    runtimes = [
        answers("choose", "--library", tmp_path, "--latency-seconds", "100%", "--scenario", name)["latency_seconds"]
        for name in ("chat", "long")
    ]
    assert runtimes[0] != runtimes[1]
    assert "it has chat, long" in puzzle("choose", "--library", tmp_path, "--scenario", "x", "--latency-seconds", 1)[2]
    assert "but at 1" in puzzle("choose", "--library", tmp_path, "--batch-size", 3, "--latency-seconds", 1)[2]


def test_a_share_is_written_in_either_way(tmp_path: Path, library: StoredLibrary) -> None:
    """.7 and 70% are one: of parameters, which are whole numbers, of a mix of scenarios, of layers that are alike."""
    write_library(tmp_path, library)
    words = ("choose", "--library", tmp_path)
    assert answers(*words, "--parameters", ".8") == answers(*words, "--parameters", "80%")
    assert answers(*words, "--layer-parameters", ".8") == answers(*words, "--layer-parameters", "80 %")
    mixes = (("chat=.7", "long=30%"), ("chat=7", "long=3"), ("chat=70%", "long=.3"))
    first, *others = (
        answers(*words, "--latency-seconds", "85%", "--traffic", one, "--traffic", other) for one, other in mixes
    )
    assert all(other == first for other in others)
    alike = ("--parameters", "80%", "--diverse", 2, "--alpha")
    assert answers(*words, *alike, ".5") == answers(*words, *alike, "50%")
    for odd in ("-1", "nan", "x%", "200%"):
        assert "a share such as 0.7 or 70%" in puzzle(*words, *alike, odd)[2]


def test_a_workspace_with_two_libraries_asks_which(tmp_path: Path, library: StoredLibrary) -> None:
    for name in ("a", "b"):
        write_library(tmp_path / "tables" / name, library)
    with pytest.raises(LibraryFileError, match="several libraries, name one"):
        open_library(tmp_path)
    with pytest.raises(LibraryFileError, match="is no block library"):
        open_library(tmp_path / "tables")


@pytest.mark.parametrize(("name", "told"), [("", "it has no library.json"), ("nowhere", "there is no such folder")])
def test_a_workspace_without_a_library_says_what_to_run_first(tmp_path: Path, name: str, told: str) -> None:
    with pytest.raises(LibraryFileError, match=rf"is no block library: {told}.*`puzzle optimize`.*run that first"):
        sweep_library(tmp_path / name, "latency_seconds", 3, {})  # the deployment's
    code, out, err = puzzle("sweep", "--library", tmp_path / name)
    assert (code, out) == (2, "") and "run that first" in " ".join(err.split())
