"""Which Prefect records a run: a table of environments, the files that a `puzzle serve` leaves, the user's profile."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest
from prefect.context import refresh_global_settings_context

from blocks.errors import PuzzleError
from flows.run import process_of
from flows.serve import served_environment
from flows.tracked_run import with_mlflow_tag
from profiles.load import load_profile
from tasks.operating.admission import Roots
from tasks.operating.reach import ServerRefused
from tasks.running import recording
from tasks.running.recording import API, HOME, recorded_by
from tasks.running.servers import PREFECT_DATABASE

CLOUD = "https://api.prefect.cloud/api/accounts/a/workspaces/w"
SERVING = "http://127.0.0.1:4200/api"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root that `puzzle serve` has worked in."""
    (tmp_path / ".prefect").mkdir()
    (tmp_path / ".prefect" / "prefect.db").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("told", "number", "server", "free", "home", "api"),
    [
        ({}, 1, None, False, "w/prefect", None),
        ({}, 2, None, False, "w/prefect-2", None),
        ({}, 1, None, True, ".prefect", None),
        ({}, 1, SERVING, False, ".prefect", SERVING),
        ({API: CLOUD}, 1, None, True, None, CLOUD),
        ({API: CLOUD, HOME: "/home/me/.prefect"}, 1, SERVING, True, None, CLOUD),
        ({HOME: "/home/me/.prefect"}, 1, SERVING, True, None, None),
        ({PREFECT_DATABASE: "postgresql+asyncpg://db/prefect"}, 2, SERVING, True, None, None),
        ({"PREFECT_LOGGING_LEVEL": "DEBUG"}, 1, None, False, "w/prefect", None),
    ],
)
def test_what_the_user_has_set_up_records_the_run(
    root: Path, told: dict[str, str], number: int, server: str | None, free: bool, home: str | None, api: str | None
) -> None:
    settings = recorded_by(told, root / "w", number, server, free).settings
    assert settings.get(HOME) == (str(root / home) if home else None) and settings.get(API) == api
    assert not {name for name in told if name != API} & set(settings), "what the user says is not said again"


def test_a_root_that_nobody_has_served_keeps_no_history(tmp_path: Path) -> None:
    assert recorded_by({}, tmp_path / "w", 1, None, True).settings[HOME] == str(tmp_path / "w" / "prefect")


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The home of a user whose active Prefect profile is that of `prefect cloud login`; nothing in the environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    monkeypatch.setattr(os, "environ", kept)
    profiles = tmp_path / "profiles.toml"
    profiles.write_text(f'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "{CLOUD}"\nPREFECT_API_KEY = "key"\n')
    kept["PREFECT_PROFILES_PATH"] = str(profiles)
    recording._OURS.clear()
    yield profiles
    recording._OURS.clear()
    monkeypatch.undo()
    refresh_global_settings_context()


def test_the_active_profile_of_prefect_records_the_run(shell: Path, tmp_path: Path) -> None:
    (tmp_path / "w" / "prefect").mkdir(parents=True)
    assert recording.record(tmp_path / "w", 1) == ""
    assert os.environ[API] == CLOUD and HOME not in os.environ
    assert recording.users_settings()["PREFECT_API_KEY"] == "key", "what logs in is still read from the profile"
    (tmp_path / "w" / "prefect" / "prefect.db").touch()
    told = recording.record(tmp_path / "w", 1)
    assert f"recorded in {CLOUD}" in told and f"earlier ones of this workspace are in {tmp_path}/w/prefect" in told


def test_a_process_takes_back_what_it_set_for_the_workspace_before(shell: Path, tmp_path: Path) -> None:
    shell.write_text('active = "mine"\n[profiles.mine]\nPREFECT_LOGGING_LEVEL = "DEBUG"\n')
    for name in ("a", "b"):
        (tmp_path / name / "prefect").mkdir(parents=True)
        recording.record(tmp_path / name, 1)
        assert os.environ[HOME] == str(tmp_path / name / "prefect")
    os.environ[HOME] = str(tmp_path / "own")  # by the user, from now on
    recording.record(tmp_path / "b", 1)
    assert os.environ[HOME] == str(tmp_path / "own")


def test_a_serve_that_is_up_is_found_and_one_that_was_killed_is_not(root: Path) -> None:
    me = psutil.Process()
    alive, gone = f"{me.pid} {me.create_time()}", f"{me.pid} 1.0"
    assert recording.served_address(root) is None
    (root / recording.ADDRESS).write_text(SERVING)
    for written, found in ((f"{alive} {alive}", SERVING), (f"{alive} {gone}", None), (f"{gone} {alive}", None)):
        (root / recording.SERVER).write_text(written)
        assert recording.served_address(root) == found


def test_two_servers_never_write_one_database(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    monkeypatch.setattr(recording, "_HELD", [])
    other = FileLock(root / ".prefect" / ".recording", thread_local=False)
    with other:
        assert not recording._alone_in(root / ".prefect")
        with pytest.raises(PuzzleError, match=r"a run of the command line records in .*start again when it has ended"):
            recording.take_for_server(root / ".prefect")
    recording.take_for_server(root / ".prefect")
    assert recording._alone_in(root / ".prefect"), "this process has it already"
    recording._HELD[0].release()


def test_served_runs_go_to_the_users_own_prefect_too(tmp_path: Path) -> None:
    roots = Roots(workspaces=tmp_path)
    assert served_environment(roots)[HOME] == str(tmp_path / ".prefect")
    cloud = served_environment(roots, {API: CLOUD, "PREFECT_SERVER_LOGGING_LEVEL": "DEBUG"})
    assert cloud[API] == CLOUD and not {HOME, "PREFECT_SERVER_LOGGING_LEVEL"} & set(cloud)
    assert not {HOME, API} & set(served_environment(roots, {HOME: "/home/me/.prefect"}))


def test_a_flow_run_keeps_the_tags_of_whoever_started_it() -> None:
    """`puzzle` among them: by it the server knows whose crashes it takes care of."""
    assert with_mlflow_tag(["puzzle", "mine", "mlflow.run_id:old"], "new") == ["puzzle", "mine", "mlflow.run_id:new"]


@pytest.mark.parametrize("named", [SERVING, ""])
def test_a_server_of_its_own_comes_up_beside_the_imports(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.server.api.server import SubprocessASGIServer

    said, go_on = list[str](), threading.Event()
    monkeypatch.setenv(API, named)
    monkeypatch.setenv(HOME, "a home")
    monkeypatch.setattr(recording, "stop_orphaned_servers", lambda home: said.append(f"none left in {home}"))

    def start(_: SubprocessASGIServer) -> None:
        go_on.wait(10)
        said.append("up")

    monkeypatch.setattr(SubprocessASGIServer, "start", start)
    recording.begin_own_server()
    said.append("imports")
    go_on.set()
    recording.own_server_is_up()
    assert said == (["imports"] if named else ["none left in a home", "imports", "up"])


def test_a_run_that_is_refused_lets_its_server_come_up_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server that is ended while it starts prints a traceback behind the sentence."""
    said = list[str]()

    def start() -> None:
        time.sleep(0.3)
        said.append("up")

    starting = threading.Thread(target=start)
    monkeypatch.setattr(recording, "_STARTING", [starting])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://puzzle:secret@127.0.0.1:5000")
    starting.start()
    with pytest.raises(ServerRefused), process_of(load_profile("tiny"), tmp_path):
        pytest.fail("the run began")
    assert said == ["up"]


def test_a_run_waits_until_its_own_server_has_recorded_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for the last of so many that have ended; a server that somebody else runs goes on after the process."""
    found, asked = [[], [], ["the third"]], list[dict[str, Any]]()

    class Client:
        def read_task_runs(self, **query: Any) -> list[str]:
            asked.append(query)
            if len(asked) == 5:
                raise httpx.ConnectError("gone")
            return found.pop(0) if found else []

    monkeypatch.setattr("prefect.client.orchestration.get_client", lambda **_: nullcontext(Client()))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.delenv(API, raising=False)
    flow = str(uuid4())
    assert recording.all_are_recorded(flow, 3) and len(asked) == 3 and asked[0]["offset"] == 2
    assert [str(one) for one in asked[0]["flow_run_filter"].id.any_] == [flow]
    states = {state.value for state in asked[0]["task_run_filter"].state.type.any_}
    assert {"COMPLETED", "FAILED", "CRASHED"} <= states and not {"RUNNING", "PENDING"} & states
    assert not recording.all_are_recorded(flow, 3, seconds=0)
    assert not recording.all_are_recorded(flow, 3), "its server is gone, and the run has its results all the same"
    monkeypatch.setenv(API, SERVING)
    assert recording.all_are_recorded(flow, 3) and len(asked) == 5
