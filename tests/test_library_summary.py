"""NVlabs' files beside ours: their labels, costs outside the blocks; `puzzle library show` counts what is there."""

import json
from pathlib import Path

import pytest

from profiles.schema import Budget
from tasks.libraries.interchange import StoredLibrary, open_library, write_library
from tasks.libraries.labels import share
from tests import test_nvlabs
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


def test_costs_outside_the_blocks_that_stand_beside_nvlabs_file_count(tmp_path: Path, nvlabs: Path) -> None:
    """puzzle itself wrote `non_block` until November 2026."""
    info = nvlabs.with_name("measurement_info.json")
    info.write_text(json.dumps({**json.loads(info.read_text()), "non_block": {"memory_mib": 50.0, "runtime_ms": 10.0}}))
    bare, whole = (answers("choose", "--library", nvlabs, "--memory-gib", most / 1024) for most in (3950, 4000))
    assert whole["memory_gib"] <= 4000 / 1024 and open_library(nvlabs).outside("memory_gib", 0) == 50 / 1024
    assert bare["objective"] >= whole["objective"]


def test_only_the_parents_own_is_100_percent() -> None:
    assert share(1001, 1000) == " (parent * 101%)" and share(0, 8) == " (parent * 0%)" and share(2, 0) == ""
    assert "100%" not in share(999, 1000) + share(9999, 10000)


def test_show(tmp_path: Path, nvlabs: Path) -> None:
    found = answers("library", "show", nvlabs)
    stats = [v["stats"] for layer in test_nvlabs.library().values() for v in layer.values()]
    kl = [v["metrics"]["kl_div"] for layer in test_nvlabs.library().values() for v in layer.values()]
    assert (found["layers"], found["options"], found["options_per_layer"]) == (LAYERS, 9 * LAYERS, [9, 9])
    assert found["scores"]["kl"]["least"] == 0 and found["scores"]["kl"]["largest"] == max(kl)
    costs = found["costs"]["1200 tokens, batch 256"]
    parents = [own for own in stats if own["num_kv_heads"] == 8 and own["ffn_intermediate_size"] == 28672]
    assert costs["memory_gib"]["parent"] == pytest.approx(sum(own["memory_mib"] for own in parents) / 1024)
    assert costs["memory_gib"]["cheapest_child"] == 0 and costs["memory_gib"]["outside_blocks"] is None
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


@pytest.mark.parametrize("name", ["nothing", "nothing.json"])
def test_what_is_no_library_is_told(tmp_path: Path, name: str) -> None:
    code, out, err = puzzle("library", "show", tmp_path / name)
    assert (code, out) == (2, "") and "is no block library" in err
