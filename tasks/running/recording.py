"""Which Prefect records a run: the user's own where one is set up, else one in the root of `puzzle serve`, else one in
the workspace.

The user's own is a server, a home or a database that the environment, the active Prefect profile (`prefect cloud login`
makes one) or a prefect.toml names. Nothing of it is changed. Without any, the state lies in the workspace, so that the
folder is complete. Where `puzzle serve` has worked in the folder above, runs of the command line are recorded beside
its own: through its server while that is up, else in its database.
"""

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from uuid import UUID

import httpx
from filelock import FileLock, Timeout

from blocks.errors import PuzzleError
from tasks.running.at_work import prefect_home
from tasks.running.servers import PREFECT_DATABASE, is_up, prefect_database, stop_left_behind, stop_orphaned_servers

API, HOME = "PREFECT_API_URL", "PREFECT_HOME"
SERVED = ".prefect"  # in the root of `puzzle serve`
SERVER, ADDRESS = "prefect-server.pid", "prefect-server.url"  # beside it, while its server is up
# what a run is quiet with, unless the user says otherwise
DEFAULTS = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "240",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
    # one transaction for many task runs, not one for each state of each
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "50",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_HELD: list[FileLock] = []  # until the process ends
_STARTING: list[Thread] = []
_OURS: dict[str, str] = {}  # what this process has put into its environment: none of it is the user's wish


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Where a run is recorded: the variables that say so to Prefect, and the place in words."""

    place: str
    settings: Mapping[str, str] = field(default_factory=dict)


def recorded_by(told: Mapping[str, str], workspace: Path, number: int, server: str | None, free: bool) -> Recorded:
    """Decide where a run of the command line is recorded.

    told: Prefect's settings that the user made, as variables. number: of this process in the workspace. server: the
    address of the `puzzle serve` of the folder above, while it is up. free: nobody else records in its database.
    """
    quiet = {name: value for name, value in DEFAULTS.items() if name not in told}
    if told.get(API):
        return Recorded(place=told[API], settings=quiet | {API: told[API]})
    # a profile that is no server's may forbid the server that a run starts for itself
    quiet |= {"PREFECT_SERVER_EPHEMERAL_ENABLED": "true"}
    if own_prefect(told):
        return Recorded(place="your own Prefect", settings=quiet)
    served = workspace.parent / SERVED
    if server:
        return Recorded(place=server, settings=quiet | {API: server, HOME: str(served)})
    home = served if free and (served / "prefect.db").is_file() else prefect_home(workspace, number)
    return Recorded(place=str(home), settings=quiet | {HOME: str(home), **prefect_database(home)})


def own_prefect(told: Mapping[str, str]) -> bool:
    """Whether the user has set up a Prefect of his own: a server, a home or a database."""
    return any(told.get(name) for name in (API, HOME, PREFECT_DATABASE))


def record(workspace: Path, number: int) -> str:
    """Put the settings of `recorded_by` in force in this process. Returns a sentence where earlier runs lie elsewhere,
    else "".
    """
    for name, value in _OURS.items():  # of another workspace before
        if os.environ.get(name) == value:
            del os.environ[name]
    _OURS.clear()
    in_force({})
    root, told = workspace.parent, users_settings()
    server = served_address(root)
    free = server is None and not own_prefect(told) and _alone_in(root / SERVED)
    if free:
        stop_left_behind(root / SERVER)  # of a `puzzle serve` that was killed
    found = recorded_by(told, workspace, number, server, free)
    _OURS.update({name: value for name, value in found.settings.items() if name not in os.environ})
    in_force(_OURS)
    return where_earlier_runs_are(workspace, found.place)


def where_earlier_runs_are(workspace: Path, place: str) -> str:
    """A sentence for a workspace that holds a history, while its runs are recorded in another place; else ""."""
    before = prefect_home(workspace, 1)
    if place == str(before) or not (before / "prefect.db").is_file():
        return ""
    return (
        f"this run is recorded in {place}; earlier ones of this workspace are in {before} "
        f"(look at them with PREFECT_HOME={before} prefect server start)"
    )


def in_force(settings: Mapping[str, str]) -> None:
    """Put settings into the environment, and let Prefect, which reads it when it is imported, read it again."""
    from prefect.context import refresh_global_settings_context

    os.environ.update(settings)
    refresh_global_settings_context()


def users_settings() -> dict[str, str]:
    """Prefect's settings that somebody made: in the environment, in the active profile, in a prefect.toml or .env."""
    from prefect.settings import get_current_settings

    found = get_current_settings().to_environment_variables(exclude_unset=True, include_aliases=True)
    return {name: os.environ[name] for name in DEFAULTS if name in os.environ} | found


def served_address(root: Path) -> str | None:
    """The API of the Prefect server that a `puzzle serve` with this root has started, while it is up."""
    try:
        return (root / ADDRESS).read_text() if is_up(root / SERVER) else None
    except OSError:
        return None


def _alone_in(home: Path) -> bool:
    """Whether nobody else records in the database of a home; from then on, until it ends, this process does."""
    if not home.is_dir():
        return False
    lock = FileLock(home / ".recording", thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return any(held.lock_file == lock.lock_file for held in _HELD)
    _HELD.append(lock)
    return True


def begin_own_server() -> None:
    """Begin to start the server that Prefect starts for itself where none is named, so that it comes up while this
    process still imports. Those that killed runs have left behind end first.
    """
    if os.environ.get(API):
        return
    if home := os.environ.get(HOME):
        stop_orphaned_servers(Path(home))
    from prefect.server.api.server import SubprocessASGIServer

    def start() -> None:
        with suppress(Exception):  # Prefect tries again when the flow starts, and says why
            SubprocessASGIServer().start()

    _STARTING.append(Thread(target=copy_context().run, args=(start,), daemon=True))
    _STARTING[-1].start()


def own_server_is_up() -> None:
    """Wait for what `begin_own_server` began: Prefect takes a server that is starting for one that is up."""
    while _STARTING:
        _STARTING.pop().join()


def all_are_recorded(flow_run_id: str, task_runs: int, seconds: float = 60) -> bool:
    """Wait until the server that Prefect has started for this process has recorded how so many task runs of a flow run
    ended: it records a while after, and what it has not recorded when the process ends is lost.
    """
    if os.environ.get(API) or not flow_run_id or not task_runs:
        return True
    from prefect.client.orchestration import get_client
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import TERMINAL_STATES

    ended = filters.TaskRunFilterStateType(any_=[*TERMINAL_STATES])
    wanted = filters.TaskRunFilter(state=filters.TaskRunFilterState(type=ended))
    flow = filters.FlowRunFilter(id=filters.FlowRunFilterId(any_=[UUID(flow_run_id)]))
    deadline = time.monotonic() + seconds
    with get_client(sync_client=True) as client, suppress(httpx.HTTPError):  # the run has all its results by now
        while not client.read_task_runs(flow_run_filter=flow, task_run_filter=wanted, limit=1, offset=task_runs - 1):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True
    return False


def take_for_server(home: Path) -> None:
    """PuzzleError while a run of the command line records in the database of a home; else it is this process's."""
    home.mkdir(parents=True, exist_ok=True)
    if not _alone_in(home):
        raise PuzzleError(
            f"a run of the command line records in {home} at this moment, and two servers would disturb each other "
            f"there: start again when it has ended, or name a Prefect server in {API}."
        )
