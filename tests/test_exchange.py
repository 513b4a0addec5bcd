"""Libraries between formats: whichever way they go, the same choices; `show` counts what is there."""

import json
from pathlib import Path
from typing import Any

import pytest

from profiles.schema import Budget
from tasks.libraries.exchange import as_options, export_library, import_library, summarise
from tasks.libraries.interchange import StoredLibrary, open_library, read_library, write_library
from tasks.libraries.labels import intermediate_size, kv_heads, needs_exact, run_labels, share
from tasks.libraries.nvlabs import options_from_nvlabs
from tasks.libraries.option_tables import read_options, write_options
from tasks.libraries.options import joint_of, options_of
from tasks.search.joint import JointLibrary
from tasks.search.request import Request, limits
from tasks.search.solve import choose_joint
from tests import puzzletron, test_nvlabs
from tests.test_choose import CHAT, LONG, random_problem
from tests.test_interchange import stored
from tests.test_nvlabs import LAYERS, answers, puzzle

SIZES = {"num_key_value_heads": 4, "intermediate_size": 128}


@pytest.fixture
def nvlabs(tmp_path: Path) -> Path:
    folder = tmp_path / "nvlabs"
    folder.mkdir()
    (folder / "block_library.json").write_text(json.dumps(test_nvlabs.library()))
    info = {"batch_size": 256, "sequence_length": 1200, "gpu": "H100", "dtype": "fp8"}
    (folder / "measurement_info.json").write_text(json.dumps(info))
    return folder / "block_library.json"


def run(coupled: bool = False) -> StoredLibrary:
    library = stored(random_problem(0, Budget(speedup=1.2), scenarios=(CHAT, LONG), coupled=coupled))
    return library.model_copy(update={"description": library.description.model_copy(update={"parent_sizes": SIZES})})


def same_choices(one: JointLibrary, other: JointLibrary) -> None:
    """At three budgets each: the same objective and sums."""
    for name in ("memory_mib", "runtime_ms", "num_params"):
        for part in (0.5, 0.7, 0.9):
            limit = part * one.of_parent(name)
            request = Request(limits=limits(**{name: limit}))
            first, second = (choose_joint(library, request)[0] for library in (one, other))
            assert first.objective == pytest.approx(second.objective, rel=1e-12)
            for field in ("memory_mib", "runtime_ms", "num_params"):
                assert getattr(first, field) == pytest.approx(getattr(second, field), rel=1e-12)


def test_nvlabs_there_and_back(tmp_path: Path, nvlabs: Path) -> None:
    """import -> export: the very figures and labels of the file that was read."""
    assert puzzle("library", "import", nvlabs, tmp_path / "open")[0] == 0
    assert puzzle("library", "export", tmp_path / "open", tmp_path / "again" / "block_library.json")[0] == 0
    again = tmp_path / "again" / "block_library.json"
    assert json.loads(again.read_text()) == json.loads(nvlabs.read_text())
    for beside in ("measurement_info.json", "parent_block_stats.json"):
        written = json.loads(again.with_name(beside).read_text())
        if beside == "measurement_info.json":
            assert written == json.loads(nvlabs.with_name(beside).read_text())
        else:
            assert written["metrics"]["kl_div"] == 0 and written["stats"]["num_kv_heads"] == 8
    words = ("--memory-mib", 4000, "--runtime-ms", 1800, "--diverse", 2, "--min-different", 2)
    expected = answers("choose", "--library", nvlabs, *words)
    for library in (tmp_path / "open", again):
        assert answers("choose", "--library", library, *words) == expected


@pytest.mark.parametrize("coupled", [False, True])
def test_a_run_to_nvlabs_and_to_the_open_format(tmp_path: Path, coupled: bool) -> None:
    library = run(coupled)
    write_library(tmp_path / "run" / "tables" / "p", library)
    for scenario, size in (("chat", 1), ("long", 2)):
        size = next(s.batch_sizes[-1] for s in library.description.scenarios if s.name == scenario) if size > 1 else 1
        target = tmp_path / scenario / "block_library.json"
        export_library(tmp_path / "run", target, scenario, size)
        same_choices(open_library(tmp_path / "run", scenario, size), joint_of(options_from_nvlabs(target)))
        import_library(target, tmp_path / f"open-{scenario}")
        same_choices(joint_of(options_from_nvlabs(target)), open_library(tmp_path / f"open-{scenario}"))
    export_library(tmp_path / "run", tmp_path / "copy")
    assert read_library(tmp_path / "copy").scores == library.scores
    assert read_library(tmp_path / "copy").description.parent_sizes == SIZES


def test_options_keep_what_they_hold(tmp_path: Path) -> None:
    """Scores per sequence, errors, every scenario, subblocks as such."""
    puzzletron.write(
        tmp_path / "dir", puzzletron.statistics(), puzzletron.solutions(one_subblock=True), one_subblock=True
    )
    import_library(tmp_path / "dir", tmp_path / "open")
    first = read_options(tmp_path / "open")
    write_options(tmp_path / "open", first)
    assert read_options(tmp_path / "open") == first
    assert {variant.part for variant in first.variants} == {"attention", "ffn"}
    assert len(first.description.places) == 2 and len(first.outside) == 2
    assert summarise(tmp_path / "open").scores["kl_div"].sequences == puzzletron.SAMPLES


def test_labels_in_nvlabs_manner() -> None:
    assert kv_heads(2, 8) == "2 kv heads (parent * 25%)" and kv_heads(2, 0) == "2 kv heads"
    assert intermediate_size(14336, 28672, exact=False) == "intermediate size 14e3 (parent * 50%)"
    assert share(1001, 1000) == " (parent * 101%)" and share(0, 8) == " (parent * 0%)"
    assert "100%" not in share(999, 1000) + share(9999, 10000), "only the parent's own is 100 %"
    assert needs_exact([1536, 1434]) is False and needs_exact([1536, 1600]) is True
    named = run_labels(["parent", "kv1", "linear"], ["parent", "ffn64", "no_op"], SIZES)
    assert named["attention", "parent"] == "4 kv heads (parent * 100%)"
    assert named["ffn", "ffn64"] == "intermediate size 64 (parent * 50%)"
    assert (named["attention", "linear"], named["ffn", "no_op"]) == ("linear", "no_op (parent * 0%)")
    labels = [variant.label for variant in as_options(run()).variants]
    assert len(set(labels)) * run().description.num_hidden_layers == len(labels)


def test_show(tmp_path: Path, nvlabs: Path) -> None:
    found = answers("library", "show", nvlabs)
    stats = [v["stats"] for layer in test_nvlabs.library().values() for v in layer.values()]
    kl = [v["metrics"]["kl_div"] for layer in test_nvlabs.library().values() for v in layer.values()]
    assert (found["layers"], found["options"], found["options_per_layer"]) == (LAYERS, 9 * LAYERS, [9, 9])
    assert found["scores"]["kl_div"]["least"] == 0 and found["scores"]["kl_div"]["largest"] == max(kl)
    costs = found["costs"]["1200 tokens, batch 256"]
    parents = [own for own in stats if own["num_kv_heads"] == 8 and own["ffn_intermediate_size"] == 28672]
    assert costs["memory_mib"]["parent"] == pytest.approx(sum(own["memory_mib"] for own in parents))
    assert costs["memory_mib"]["cheapest_child"] == 0 and costs["memory_mib"]["outside_blocks"] is None
    assert found["hardware"] == {"gpu": "H100", "dtype": "fp8"}
    assert any("per sequence" in what for what in found["missing"])
    code, out, _ = puzzle("library", "show", nvlabs)
    assert code == 0 and "1200 tokens, batch 256" in out and "H100" in out
    write_library(tmp_path / "tables" / "p", run())
    shown = answers("library", "show", tmp_path)
    assert set(shown["costs"]) == {
        f"{s.name}, batch {size}" for s in run().description.scenarios for size in s.batch_sizes
    }
    assert not any("per sequence" in what for what in shown["missing"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("import", "{nv}", "{tmp}/x.json"), "`puzzle library export` writes NVlabs' file"),
        (("export", "{nv}", "{tmp}/open", "--scenario", "chat"), "holds every scenario"),
        (("export", "{tmp}/nothing", "{tmp}/open"), "is no block library"),
        (("show", "{tmp}/nothing.json"), "is no block library"),
        (("export", "{nv}", "{nv}/below/block_library.json"), "cannot write"),
        (("export", "{tmp}", "{tmp}/a/block_library.json"), "is no block library"),
    ],
)
def test_what_cannot_be_done(tmp_path: Path, nvlabs: Path, words: Any, told: str) -> None:
    code, out, err = puzzle("library", *(word.format(nv=nvlabs, tmp=tmp_path) for word in words))
    assert (code, out) == (2, "") and told in err


def test_nvlabs_needs_a_runtime(tmp_path: Path) -> None:
    puzzletron.write(tmp_path, puzzletron.statistics(), puzzletron.solutions())
    code, _, err = puzzle("library", "export", tmp_path, tmp_path / "nv" / "block_library.json")
    assert code == 2 and "needs runtime_ms of every variant" in err
    target = tmp_path / "nv" / "block_library.json"
    assert puzzle("library", "export", tmp_path, target, "--batch-size", 16)[0] == 0
    same_choices(open_library(tmp_path, batch_size=16), joint_of(options_from_nvlabs(target)))
    assert {own.is_parent for own in options_of(joint_of(options_from_nvlabs(target)))} == {True, False}
