"""Paths of any name: what is written into a URL is read back as the same file; what no system takes is a sentence."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy
import yaml

from blocks.errors import PuzzleError
from flows import in_workspace
from flows.serve import served_environment
from tasks.operating import admission
from tasks.operating.doctor import mlflow_store
from tasks.running.servers import PREFECT_DATABASE, prefect_database, sqlite_file, sqlite_url
from tests.test_nvlabs import puzzle
from tests.test_profiles import GOOD

STRANGE = ["plain", "a b", "50%", "%41", "what?", "#1", "[x]*", "-x", "é ü 漢", "a&b=c;d", "@home:1", "q'u\"o", "x\\y"]
LONG = "x" * 300


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("driver", ["pysqlite", "aiosqlite"])
def test_a_database_lies_where_its_url_says(tmp_path: Path, name: str, driver: str) -> None:
    file = tmp_path / name / "some.db"
    file.parent.mkdir()
    url = sqlite_url(file, driver)
    assert sqlite_file(url) == file and url.startswith(f"sqlite+{driver}:////")
    with closing(sqlalchemy.create_engine(url.replace("aiosqlite", "pysqlite")).connect()) as connection:
        connection.execute(sqlalchemy.text("create table runs (lifecycle_stage text)"))
        connection.commit()
    assert [path.name for path in tmp_path.rglob("*")] == [name, "some.db"]
    (finding,) = mlflow_store(tmp_path, {"MLFLOW_TRACKING_URI": url})
    assert finding.status == "ok" and str(file) in finding.detail


@pytest.mark.parametrize("url", ["", "postgresql://user:x@db/mlflow", "http://127.0.0.1:5000", "sqlite://", "s:a:b"])
def test_other_addresses_are_no_file(url: str) -> None:
    assert sqlite_file(url) is None


@pytest.mark.parametrize("name", STRANGE)
def test_prefect_finds_its_database_in_a_home_of_any_name(tmp_path: Path, name: str) -> None:
    """By its own default, which writes the path as it is, or by ours."""
    home = tmp_path / name
    url = prefect_database(home).get(PREFECT_DATABASE, f"sqlite+aiosqlite:///{home}/prefect.db")
    assert sqlite_file(url) == home / "prefect.db"
    if name in ("plain", "a b", "-x"):
        assert prefect_database(home) == {}
    environment = served_environment(admission.Roots(workspaces=home))
    assert environment.get(PREFECT_DATABASE) == prefect_database(home / ".prefect").get(PREFECT_DATABASE)


def test_each_workspace_has_its_own_database_and_a_users_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in ("PREFECT_HOME", PREFECT_DATABASE):
        os.environ.pop(name, None)
    for name in ("a?", "b%", "plain", "c#"):
        in_workspace.prepare_workspace(tmp_path / name)
        assert os.environ.get(PREFECT_DATABASE) == prefect_database(tmp_path / name / "prefect").get(PREFECT_DATABASE)
    os.environ[PREFECT_DATABASE] = "postgresql+asyncpg://db/prefect"
    in_workspace.prepare_workspace(tmp_path / "d?")
    assert os.environ[PREFECT_DATABASE] == "postgresql+asyncpg://db/prefect"


@pytest.mark.parametrize(
    "words",
    [
        ("validate", LONG),
        ("validate", f"{LONG}.yaml"),
        ("plan", "tiny", "--on", LONG),
        ("plan", "tiny", "--set", f"parent={{kind: folder, path: {LONG}}}"),
        ("show", LONG),
        ("report", LONG),
        ("choose", "--library", LONG, "--num-params", "80%"),
        ("library", "show", LONG),
        ("export", LONG, "--format", "gguf", "--out", "x.gguf"),
        ("doctor", "--workspace", LONG),
        ("optimize", "tiny", "--workspace", LONG),
        ("validate", "~no-such-user/x.yaml"),
        ("validate", "./-x [1]?.yaml"),
        ("optimize", "tiny", "--workspace", "/proc/x"),
        ("optimize", "tiny", "--workspace", os.fsdecode(b"a\xff")),
        ("show", "/dev/null/x"),
    ],
)
def test_a_path_that_cannot_be_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = puzzle(*words)
    assert code == 2 and err.splitlines()[-1].startswith("puzzle: ") and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["-x [1]?.yaml", "50%#.yaml", "é 漢.yaml"])
def test_a_profile_file_of_any_name_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(yaml.safe_dump(GOOD))
    assert puzzle("validate", tmp_path / name)[0] == 0


def test_a_folder_with_brackets_in_its_name_is_looked_into_before_it_is_served(tmp_path: Path) -> None:
    data, secret = tmp_path / "data", tmp_path / "secret"
    (data / "a[1]").mkdir(parents=True)
    secret.mkdir()
    roots = admission.Roots(workspaces=tmp_path, data={"own": data})
    assert admission._path("parent.path", "own/a[1]", roots) == data / "a[1]"
    (data / "a[1]" / "link").symlink_to(secret)
    (data / "b[2]").symlink_to(secret)
    for name in ("a[1]", "b[2]"):
        with pytest.raises(admission.Refused, match="leads out"):
            admission._path("parent.path", f"own/{name}", roots)


@pytest.mark.parametrize("name", ["a:b", "a[1]", "a*"])
def test_a_served_folder_whose_name_would_be_read_otherwise_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(PuzzleError, match="is not served"):
        admission.Roots.declared(tmp_path, [f"own={tmp_path / name}"])


def test_sqlite_is_asked_for_the_same_file(tmp_path: Path) -> None:
    """As `puzzle doctor` opens it, read-only."""
    for name in STRANGE:
        file = tmp_path / f"{name}.db"
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("create table t (x)")
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as connection:
            assert connection.execute("select count(*) from t").fetchone() == (0,)
