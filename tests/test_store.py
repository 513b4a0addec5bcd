"""The store of a workspace: what is in it counts only whole, once, and under names of ours; S3 by a real server."""

import hashlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
import torch
from pydantic import ValidationError

from blocks import store as stores
from blocks.errors import DamagedBlock
from blocks.library import BlockLibrary, keep, read_tensors, remember, write_tensors
from blocks.records import BlockRecord, ParentInfo, Ref
from blocks.store import MARKER, Store, StoreAway, StoreError, use_store
from tasks.distill import bld
from tasks.operating import shared
from tasks.operating.admission import Refused, Roots, admitted
from tasks.operating.served_profile import ServedProfile
from tasks.running import at_work
from tasks.running.servers import free_port, running
from tasks.score import scoring
from tests.chain import Chain, make_chain
from tests.test_served import asked, asking
from tests.test_sharing import another_process


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{uuid4()}/library" if request.param == "memory" else f"file://{tmp_path}/store"


@pytest.fixture
def place(tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    return make


def block(workspace: Path, key: str = "a", value: float = 1.0) -> BlockRecord:
    weights = write_tensors(workspace, f"library/{key}.safetensors", {"w": torch.full((3, 4), value)})
    record = BlockRecord(key=key, layer=0, subblock="ffn", variant="ffn32", status="trained", weights=weights)
    return BlockLibrary(workspace).add(record)


def objects(url: str, folder: str) -> list[str]:
    fs, root = fsspec.core.url_to_fs(url)
    return [name for name in fs.find(f"{root}/{folder}") if ".part" not in name]


def flip(url: str, folder: str, at: int = -1) -> str:
    """One bit of the only file in a folder of a store."""
    fs, _ = fsspec.core.url_to_fs(url)
    (name,) = objects(url, folder)
    body = bytearray(fs.cat_file(name))
    body[at] ^= 1
    fs.pipe_file(name, bytes(body))
    return name


def again(workspace: Path, url: str) -> list[str]:
    """As a new process opens it; returns what it tells."""
    stores._opened.cache_clear()
    told: list[str] = []
    store = use_store(workspace, url)
    assert store is not None
    store.report = told.append
    return told


def test_what_one_workspace_finished_another_finds(url: str, place: Callable[[str], Path]) -> None:
    one, other = place("one"), place("other")
    use_store(one, url)
    record = block(one)
    again(other, url)
    found = BlockLibrary(other).find("a")
    assert found == record and found.weights is not None
    assert torch.equal(read_tensors(other, found.weights)["w"], torch.ones(3, 4))
    assert BlockLibrary(place("apart")).find("a") is None
    traffic = stores.store_of(other).traffic()  # type: ignore[union-attr]
    size = (one / record.weights.path).stat().st_size + (one / "library/a.json").stat().st_size + 65  # type: ignore[union-attr]
    assert f"sent 0 B in 0 files, fetched {size} B in 2" in traffic


def test_what_was_finished_before_the_store_was_named_is_sent_later(url: str, place: Callable[[str], Path]) -> None:
    one, other = place("one"), place("other")
    record = block(one)
    again(one, url)
    assert not objects(url, "records")
    assert BlockLibrary(one).find("a") == record
    again(other, url)
    assert BlockLibrary(other).find("a") == record
    use_store(other, None)
    shutil.rmtree(other / "library")
    assert not (other / MARKER).exists() and BlockLibrary(other).find("a") is None


@pytest.mark.parametrize("folder", ["objects", "records"])
@pytest.mark.parametrize("at", [0, 70, -1])
def test_a_flipped_bit_is_told_not_used_and_made_again(
    folder: str, at: int, url: str, place: Callable[[str], Path]
) -> None:
    one, other, third = place("one"), place("other"), place("third")
    again(one, url)
    record = block(one)
    name = flip(url, folder, at)
    told = again(other, url)
    assert BlockLibrary(other).find("a") is None
    assert len(told) == 1 and "damaged" in told[0] and name.rpartition("/")[2] in told[0]
    assert not list((other / "library").glob("*")) if (other / "library").exists() else True
    assert not [one for one in objects(url, folder) if one == name], "what is damaged must not be found again"
    assert block(other) == record
    again(third, url)
    assert BlockLibrary(third).find("a") == record


def test_a_bulky_record_is_fetched_when_read_and_checked_then(url: str, place: Callable[[str], Path]) -> None:
    one, other = place("one"), place("other")
    again(one, url)
    record = block(one)
    again(other, url)

    def look() -> BlockRecord | None:
        return remember(other / "library/a.json", BlockRecord, lambda r: [r.weights], other, "when read")  # type: ignore[list-item]

    assert look() == record and not (other / "library/a.safetensors").exists()
    assert look() == record, "a second look, its data still there"
    name = flip(url, "objects")
    with pytest.raises(DamagedBlock, match="made anew"):
        read_tensors(other, record.weights)  # type: ignore[arg-type]
    assert look() is None and not objects(url, "objects"), "damaged: gone, so that it is made again"
    block(other)
    assert objects(url, "objects") == [name]


def test_two_machines_at_once_leave_one_that_is_whole(url: str, place: Callable[[str], Path]) -> None:
    """The same key trained on two machines, to other bits; every order of the two uploads' halves."""
    for number, order in enumerate(["AaBb", "ABab", "ABba", "BAab"]):
        own = f"{url}/{number}"
        workspaces = {"A": place(f"A{number}"), "B": place(f"B{number}")}
        records = {}
        for value, (name, workspace) in enumerate(workspaces.items()):
            records[name] = block(workspace, value=float(value))  # no store yet
            use_store(workspace, own)
        for step in order:
            workspace, store = workspaces[step.upper()], Store(own)
            record = records[step.upper()]
            if step.isupper():
                store.send(workspace / record.weights.path, record.weights.sha256)  # type: ignore[union-attr]
            else:
                store.keep_record("library/a.json", (workspace / "library/a.json").read_bytes())
        third = place(f"C{number}")
        again(third, own)
        last = next(step for step in reversed(order) if step.islower()).upper()
        assert BlockLibrary(third).find("a") == records[last]


def test_a_record_comes_after_its_data(url: str, place: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = place("one"), place("other")
    again(one, url)
    monkeypatch.setattr(Store, "keep_record", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        block(one)
    monkeypatch.undo()
    again(other, url)
    assert len(objects(url, "objects")) == 1 and BlockLibrary(other).find("a") is None


@pytest.mark.parametrize(
    "path", ["../evil.safetensors", "/tmp/evil.safetensors", "library/../../evil.json", "a\\..\\b", "a\0b"]
)
def test_no_contract_names_a_file_outside_its_workspace(path: str) -> None:
    with pytest.raises(ValidationError, match="leaves the workspace"):
        Ref(path=path, sha256="0" * 64)
    with pytest.raises(ValidationError, match="leaves the workspace"):
        ParentInfo(name="p", folder=path, fingerprint="f", source="s")


@pytest.mark.parametrize("path", ["puzzle.log", "record/x.safetensors", "library/code.py", "library/out/x.safetensors"])
def test_a_forged_record_cannot_place_files(path: str, url: str, place: Callable[[str], Path], tmp_path: Path) -> None:
    """Whole, with right digests, but naming what is not its own: another folder, code, a link that leads out."""
    one, other = place("one"), place("other")
    (tmp_path / "outside").mkdir()
    (other / "library").mkdir()
    (other / "library/out").symlink_to(tmp_path / "outside")
    again(one, url)
    (one / path).parent.mkdir(parents=True, exist_ok=True)
    (one / path).write_bytes(b"forged")
    ref = Ref(path=path, sha256=hashlib.sha256(b"forged").hexdigest())
    record = BlockRecord(key="a", layer=0, subblock="ffn", variant="ffn32", status="trained", weights=ref)
    keep(one / "library/a.json", record, [ref], one)
    told = again(other, url)
    assert BlockLibrary(other).find("a") is None
    assert not (other / path).exists() and not list((tmp_path / "outside").iterdir())
    assert "not its own" in told[0]


@pytest.mark.parametrize("name", ["../a.json", "/etc/passwd", "a//b", "", "a/../../b", ".hidden", "a\nb", "a?b", "a/."])
def test_no_name_leads_out_of_a_store(name: str, url: str) -> None:
    store = Store(url)
    for ask in (store.record, store.has_record, lambda path: store.keep_record(path, b"")):
        with pytest.raises(ValueError, match="cannot name"):
            ask(name)
    with pytest.raises(ValueError, match="no sha256"):
        store.has(name or "../x")


@pytest.mark.parametrize(
    "named",
    [
        "s3://key:secret@bucket/prefix",
        "s3://bucket/../other",
        "file:///data/../etc",
        "file://~/store",
        "simplecache::s3://bucket/x",
        "s3://bucket/x?key=1",
        "s3://bucket/%2e%2e/x",
        "bucket/prefix",
        "/data/store",
        "s3://",
        "s3://bucket/x\n",
    ],
)
def test_a_profile_names_a_store_plainly(named: str) -> None:
    with pytest.raises(ValidationError, match="store"):
        asking(store=named)


def test_a_served_profile_names_a_store_that_was_declared(tmp_path: Path) -> None:
    roots = Roots.declared(tmp_path, stores=["team=s3://bucket/team", f"mine=file://{tmp_path}/mine"])
    with_store = ServedProfile.model_validate({**asked().model_dump(), "store": "team"})
    assert admitted(with_store, roots).store == "s3://bucket/team"
    for other in ("s3://bucket/team", "team/sub", "team/..", "file:///etc", "/etc", "~", ""):
        with pytest.raises(ValidationError, match="store"):
            ServedProfile.model_validate({**asked().model_dump(), "store": other})
    with pytest.raises(Refused, match=r"may use \(mine\)"):
        admitted(with_store, Roots.declared(tmp_path, stores=[f"mine=file://{tmp_path}"]))
    with pytest.raises(Refused, match="puzzle serve --store NAME=URL"):
        admitted(with_store, Roots(workspaces=tmp_path))


class Away:
    """A file system of which a few calls fail before they succeed."""

    def __init__(self, fs: Any, failures: int, error: Exception) -> None:
        self.fs, self.failures, self.error = fs, failures, error

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            self.failures -= 1
            if self.failures >= 0:
                raise self.error
            return getattr(self.fs, name)(*arguments, **named)

        return call


def test_a_store_that_is_away_is_asked_again_then_told() -> None:
    told: list[str] = []
    store = Store(f"memory://{uuid4()}", delays=(0.0, 0.0))
    store.report = told.append
    store.keep_record("a.json", b"{}")
    whole = store.fs
    store.fs = Away(whole, 2, ConnectionError("refused"))
    assert store.record("a.json") == b"{}" and len(told) == 2
    store.fs = Away(whole, 3, ConnectionError("refused"))
    with pytest.raises(StoreAway, match=r"does not answer.*asked 3 times.*start again"):
        store.record("a.json")
    store.fs = Away(whole, 1, PermissionError("Access Denied"))
    with pytest.raises(StoreError, match=r"may not read from.*credentials"):
        store.record("a.json")


def test_a_store_of_another_layout_or_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "puzzle-store.json").write_text('{"layout": 2}')
    with pytest.raises(StoreError, match="layout 2"):
        Store(f"file://{tmp_path}")
    with pytest.raises(StoreError, match="is no store"):
        Store("floppy://a/b")
    (tmp_path / "file").write_text("x")
    with pytest.raises((StoreError, StoreAway)):
        Store(f"file://{tmp_path}/file/below", delays=())


# --- S3, by a server in a process of its own


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket's URL; the environment names server and keys."""
    port, log = free_port(), tmp_path_factory.mktemp("s3") / "moto.log"
    keys = {"AWS_ACCESS_KEY_ID": "puzzle-test", "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-test"}
    own = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1", **keys}
    program = Path(sys.executable).parent / "moto_server"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        with running(
            [str(program), "-H", "127.0.0.1", "-p", str(port)], f"{own['AWS_ENDPOINT_URL']}/moto-api/", log, {}
        ):
            fsspec.filesystem("s3", skip_instance_cache=True).mkdir("library")
            yield "s3://library"


def test_a_second_machine_trains_nothing_again(
    chain: Chain, s3: str, place: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = place("one"), place("other")
    for part in ("parent", "corpus", "record", "library", "scores"):
        shutil.copytree(chain.workspace / part, one / part)
    again(one, f"{s3}/chain")
    first = make_chain(one)  # everything is there: it is looked at, and sent
    for name in ("_train_until_it_falls", "_start"):
        monkeypatch.setattr(bld, name, lambda *_: pytest.fail("a block was trained again"))
    monkeypatch.setattr(scoring, "score_batch", lambda *_: pytest.fail("a block was scored again"))
    monkeypatch.setattr("tasks.distill.record._pass", lambda *_: pytest.fail("a layer was recorded again"))
    monkeypatch.setattr("tasks.inputs.corpus.pack_splits", lambda *_: pytest.fail("a corpus was made again"))
    monkeypatch.setattr("tasks.inputs.parent.make_tiny_parent", lambda *_: pytest.fail("a parent was trained again"))
    told = again(other, f"{s3}/chain")
    second = make_chain(other)
    assert second.blocks == first.blocks and second.scores == first.scores and not told
    assert not list((other / "record").rglob("*.safetensors")), "recordings are fetched when they are read"
    store = stores.store_of(other)
    assert store is not None and store.sent_files == 0 and store.fetched_files > 2 * len(first.blocks)


def test_s3_that_refuses_is_told_in_a_sentence(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match=r"cannot read from the store s3://no-such-bucket/x: .*Make the bucket"):
        Store("s3://no-such-bucket/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    started = time.monotonic()
    with pytest.raises(StoreAway, match="does not answer") as away:
        Store(s3, delays=())
    assert time.monotonic() - started < 20 and "a-secret" not in str(away.value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    with pytest.raises(StoreError, match=r"no credentials for the store s3://library"):
        Store(s3, delays=())


def test_an_object_that_goes_while_it_is_fetched_is_missing_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    store = Store(f"file://{tmp_path}/store")
    store.report = told.append
    monkeypatch.setattr(store, "_size", lambda name: 3)
    assert not store.fetch("a" * 64, tmp_path / "there.json")
    assert not told
    assert not (tmp_path / "there.json").exists()


def test_the_store_of_a_run_at_work_stays_whatever_a_second_run_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(shared, "say", said.append)
    theirs, ours = (f"file://{tmp_path}/{name}" for name in ("theirs", "ours"))
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    code = (
        "from pathlib import Path\nfrom tasks.running.at_work import at_work_in\n"
        f"from tasks.operating.shared import store_used\nworkspace = Path({str(workspace)!r})\n"
        f"with at_work_in(workspace), store_used(workspace, {theirs!r}):"
    )
    with another_process(code), at_work.at_work_in(workspace):
        with shared.store_used(workspace, None):
            assert stores.store_named(workspace) == theirs
            block(workspace)
        assert stores.store_named(workspace) == theirs and objects(theirs, "records")
        assert f"uses the store {theirs}: what both make goes there" in said[0]
        with pytest.raises(StoreError, match="a workspace has one store"), shared.store_used(workspace, ours):
            pass
        assert stores.store_named(workspace) == theirs
        with shared.store_used(workspace, theirs):
            pass
    with at_work.at_work_in(workspace):
        with shared.store_used(workspace, ours):
            assert stores.store_named(workspace) == ours
        with shared.store_used(workspace, None):  # alone: none from now on
            assert stores.store_named(workspace) is None


def test_of_two_runs_that_start_together_one_names_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have a place in the workspace before either has named its store, and an earlier run left a store's name."""
    stores.use_store(tmp_path, f"file://{tmp_path}/of-old")
    urls = [f"file://{tmp_path}/{name}" for name in ("one", "other")]
    meet, found = threading.Barrier(2, timeout=20), dict[str, str]()
    really = stores.store_named

    def slowly(workspace: Path) -> str | None:
        named = really(workspace)
        time.sleep(0.2)  # both have looked by now, unless one waits for the other
        return named

    monkeypatch.setattr(shared, "store_named", slowly)

    def run(url: str) -> None:
        meet.wait()
        try:
            with shared.store_used(tmp_path, url):
                meet.wait()  # until the other one has ended or begun
                found[url] = str(really(tmp_path))
        except StoreError as error:
            found[url] = str(error)
            meet.wait()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, urls))
    (used,) = [url for url in urls if found[url] == url]
    (refused,) = [url for url in urls if url != used]
    assert f"uses the store {used}, this one names {refused}" in found[refused]
