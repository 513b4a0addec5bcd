"""Libraries between formats: whichever way they go, the same choices; `show` counts what is there."""

import json
from pathlib import Path
from typing import Any

import pytest

from profiles.schema import Budget
from tasks.libraries.exchange import import_library, summarise
from tasks.libraries.interchange import StoredLibrary, open_library, read_library, write_library
from tasks.libraries.labels import intermediate_size, kv_heads, needs_exact, share
from tasks.libraries.nvlabs import options_from_nvlabs
from tasks.libraries.option_tables import read_options, write_options
from tasks.libraries.options import joint_of
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


def test_nvlabs_into_the_open_format(tmp_path: Path, nvlabs: Path) -> None:
    """The same answer from NVlabs' file, from what it was imported into, and from that imported again."""
    assert puzzle("library", "import", nvlabs, tmp_path / "open")[0] == 0
    assert puzzle("library", "import", tmp_path / "open", tmp_path / "again")[0] == 0
    words = ("--memory-mib", 4000, "--runtime-ms", 1800, "--diverse", 2, "--min-different", 2)
    expected = answers("choose", "--library", nvlabs, *words)
    for library in (tmp_path / "open", tmp_path / "again"):
        assert answers("choose", "--library", library, *words) == expected
    same_choices(joint_of(options_from_nvlabs(nvlabs)), open_library(tmp_path / "again"))


def test_costs_outside_the_blocks_that_stand_beside_nvlabs_file_count(tmp_path: Path, nvlabs: Path) -> None:
    """puzzle itself wrote `non_block` until November 2026."""
    info = nvlabs.with_name("measurement_info.json")
    info.write_text(json.dumps({**json.loads(info.read_text()), "non_block": {"memory_mib": 50.0, "runtime_ms": 10.0}}))
    bare, whole = (answers("choose", "--library", nvlabs, "--memory-mib", most) for most in (3950, 4000))
    assert whole["memory_mib"] <= 4000 and open_library(nvlabs).outside("memory_mib", 0) == 50
    assert bare["objective"] >= whole["objective"]


@pytest.mark.parametrize("coupled", [False, True])
def test_a_run_is_copied_as_it_is(tmp_path: Path, coupled: bool) -> None:
    library = run(coupled)
    write_library(tmp_path / "run" / "tables" / "p", library)
    import_library(tmp_path / "run", tmp_path / "copy")
    assert read_library(tmp_path / "copy").scores == library.scores
    assert read_library(tmp_path / "copy").description.parent_sizes == SIZES
    for scenario, size in (("chat", 1), ("long", None)):
        same_choices(open_library(tmp_path / "run", scenario, size), open_library(tmp_path / "copy", scenario, size))


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
        (("import", "{nv}", "{tmp}/x.json"), "NVlabs' format are read, not written"),
        (("import", "{tmp}/nothing", "{tmp}/open"), "is no block library"),
        (("show", "{tmp}/nothing.json"), "is no block library"),
        (("import", "{nv}", "{nv}/below"), "cannot write"),
        (("import", "{tmp}", "{tmp}/a"), "is no block library"),
    ],
)
def test_what_cannot_be_done(tmp_path: Path, nvlabs: Path, words: Any, told: str) -> None:
    code, out, err = puzzle("library", *(word.format(nv=nvlabs, tmp=tmp_path) for word in words))
    assert (code, out) == (2, "") and told in err
