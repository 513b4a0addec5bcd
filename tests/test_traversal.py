"""Ways out of a workspace or a library, tried one by one: profile fields, served runs, imports and exports, a registry.

Stores and their names are tried in tests/test_store.py, folders of served runs in tests/test_served.py.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pydantic import ValidationError

from blocks.errors import CorpusError, DamagedBlock
from blocks.files import sha256_of
from blocks.records import BlockRecord, ChildReport
from profiles.schema import Corpus, HubSource
from tasks.inputs.corpus_sources import iterate_documents
from tasks.libraries.interchange import read_library, write_library
from tasks.libraries.summary import summarise
from tasks.operating.admission import Refused, Roots, admitted
from tasks.operating.champion import lineage_of
from tasks.operating.served_profile import ServedProfile
from tasks.search.joint import LibraryFileError
from tests import test_nvlabs
from tests.test_library_summary import run
from tests.test_served import asked, asking

OUT = ["../evil", "/tmp/evil", "a/../../evil", "..", "a\\..\\evil", "~/evil", "a\n", ""]


def files(folder: Path) -> dict[str, str]:
    """Everything below a folder, by content."""
    return {str(path.relative_to(folder)): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("path", OUT)
def test_a_profile_field_that_becomes_a_path_is_plain(path: str) -> None:
    """The profile's name becomes folders; a variant's label, a scenario's name become rows and file names."""
    for field in ("name", "store"):
        with pytest.raises(ValidationError):
            asking(**{field: path})
    with pytest.raises(ValidationError):
        asking(search_space__ffn=[path])
    for kind in ("parent", "corpus__sources"):
        hub = {"kind": "hub", "hub_id": path}
        with pytest.raises(ValidationError):
            asking(**{kind: hub if kind == "parent" else [hub]})


def test_a_hub_data_set_is_never_a_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` reads a folder of that name, where there is one, without asking the hub."""
    (tmp_path / "owner" / "secret").mkdir(parents=True)
    (tmp_path / "owner" / "secret" / "data.txt").write_text("a secret of this machine\n" * 100)
    monkeypatch.chdir(tmp_path)
    source = HubSource(kind="hub", hub_id="owner/secret", revision="0" * 40)
    with pytest.raises(CorpusError, match="is a file or folder here"):
        next(iterate_documents(Corpus(sources=(source,))))


@pytest.mark.parametrize("name", ["/etc/target.yaml", "../hardware/h100", "../../profiles/tiny.yaml", "~/own.yaml"])
def test_a_served_run_models_shipped_hardware_only(name: str, tmp_path: Path) -> None:
    roots = Roots(workspaces=tmp_path)
    with pytest.raises(ValidationError, match="name"):
        asked(hardware={"engine": "roofline", "name": name})
    with pytest.raises(Refused, match=r"hardware\.name"):
        admitted(asked(hardware={"engine": "roofline", "name": "own.yaml"}), roots)
    admitted(asked(hardware={"engine": "roofline", "name": "h100"}), roots)
    admitted(asked(hardware={"name": "a machine of mine"}), roots)


@pytest.mark.parametrize("path", [*OUT, "s3://bucket/x", "file:///etc", "x\0"])
def test_no_field_of_a_served_run_takes_a_way_out(path: str, tmp_path: Path) -> None:
    """Each field that names a place, a version or a package, with every way out."""
    ways = {
        "store": path,
        "hardware__name": path,
        "evaluate__benchmark_package": path,
        "orchestration__address": path,
        "parent": {"kind": "folder", "path": path},
    }
    hub = {"kind": "hub", "hub_id": "owner/name"}
    sources = [
        {"kind": "text", "path": path},
        {**hub, "revision": path},
        {**hub, "configuration": path},
        {**hub, "split": path},
        {"kind": "wikipedia_dump", "package": path},
        {"kind": "wikipedia_dump", "file": path},
    ]
    parents = [
        {**hub, "revision": path},
        {"kind": "package", "package": path, "file": "x"},
        {"kind": "package", "package": "gensim", "file": path},
    ]
    for changes in [{key: ways[key]} for key in ways] + [{"parent": each} for each in parents]:
        with pytest.raises(ValidationError):
            served(changes)
    for source in sources:
        with pytest.raises(ValidationError):
            served({"corpus__sources": [source]})


def served(changes: dict[str, Any]) -> ServedProfile:
    """What the API is sent, judged by the served profile alone."""
    tree: dict[str, Any] = asked().model_dump(mode="json")
    for place, value in changes.items():
        node = tree
        *above, last = place.split("__")
        for key in above:
            node = node[key]
        node[last] = value
    return ServedProfile.model_validate(tree)


@pytest.mark.parametrize("path", ["../../evil.safetensors", "/tmp/evil.safetensors", "library/../../evil.safetensors"])
def test_an_imported_variant_cannot_point_out(path: str, tmp_path: Path) -> None:
    """A table with a right digest whose rows name weights elsewhere."""
    folder = tmp_path / "library"
    write_library(folder, run())
    table = pd.read_parquet(folder / "variants.parquet")
    table["weights"] = pd.Series([{"path": path, "sha256": "0" * 64}] * len(table))
    table.to_parquet(folder / "variants.parquet", index=False)
    described = json.loads((folder / "library.json").read_text())
    described["tables"]["variants"] = sha256_of(folder / "variants.parquet")
    (folder / "library.json").write_text(json.dumps(described))
    with pytest.raises(LibraryFileError, match="leaves the workspace"):
        read_library(folder)
    with pytest.raises(ValidationError, match="leaves the workspace"):
        BlockRecord.model_validate(
            {
                **{"key": "k", "layer": 0, "subblock": "ffn", "variant": "f", "status": "trained"},
                "weights": {"path": path, "sha256": "0" * 64},
            }
        )


@pytest.mark.parametrize("path", ["../evil", "/tmp/evil", "..\\evil"])
def test_names_in_an_imported_library_stay_names(path: str, tmp_path: Path) -> None:
    """Profile, parent, hardware and tables of a foreign library.json; labels of NVlabs' file: nothing is written."""
    folder = tmp_path / "library"
    write_library(folder, run())
    described = json.loads((folder / "library.json").read_text())
    described |= {"profile": path, "parent": path, "corpus": path, "hardware": {"name": path}}
    described["tables"][path] = "0" * 64
    (folder / "library.json").write_text(json.dumps(described))
    foreign: Any = test_nvlabs.library()
    (tmp_path / "block_library.json").write_text(json.dumps(foreign).replace("kv", path.replace("\\", "/")))
    before = files(tmp_path)
    for source in (folder, tmp_path / "block_library.json"):
        with suppress(LibraryFileError):  # refused is fine as well
            summarise(source)
    assert files(tmp_path) == before
    assert not Path("/tmp/evil").exists()


@pytest.mark.parametrize("run_folder", ["../other/runs/x", "/etc", "runs/../../other", "runs/out"])
def test_a_registry_cannot_name_a_run_elsewhere(run_folder: str, tmp_path: Path) -> None:
    workspace, other = tmp_path / "w", tmp_path / "other"
    (workspace / "runs").mkdir(parents=True)
    for folder in (other, other / "runs" / "x"):
        folder.mkdir(exist_ok=True, parents=True)
        (folder / "lineage.json").write_text("{}")
    (workspace / "runs" / "out").symlink_to(other)
    with pytest.raises(DamagedBlock, match="not there"):
        lineage_of(workspace, run_folder)


def test_a_report_cannot_name_a_child_elsewhere() -> None:
    assert "child_folder" in ChildReport.model_fields
    with pytest.raises(ValidationError, match="leaves the workspace"):
        ChildReport.model_validate({"child_folder": "../../other/child"})
