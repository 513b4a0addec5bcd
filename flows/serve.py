"""`puzzle serve`: the deployments behind Prefect's UI, with a Prefect and an MLflow server where none is given."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blocks.errors import PuzzleError
from blocks.runtime import configure
from profiles.load import load_profile, runnable_profiles
from tasks.operating.admission import Roots, served_profile
from tasks.operating.reach import check_servers
from tasks.running.recording import ADDRESS, API, HOME, SERVED, in_force, own_prefect, take_for_server, users_settings
from tasks.running.servers import (
    QUIET,
    is_free,
    mlflow_server,
    prefect_database,
    prefect_guards,
    prefect_server,
    running,
    sqlite_url,
    stop_left_behind,
)

if TYPE_CHECKING:
    from prefect import Flow

Data = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="NAME=FOLDER", help="served profiles may read NAME/...; repeat for more"),
]
Stores = Annotated[
    list[str] | None, typer.Option("--store", metavar="NAME=URL", help="served profiles may use it; repeat for more")
]
Packages = Annotated[
    list[str] | None,
    typer.Option("--package", metavar="NAME", help="served profiles may read its files, beside the shipped ones'"),
]
Trusted = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-remote-code",
        metavar="OWNER/NAME@COMMIT",
        help="a parent that brings code of its own and may be used (transformers' own class computes it), or "
        "NAME/folder of --data; repeat for more",
    ),
]


def serve_command(
    profiles: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROFILE ...]", help="deployments of these [all for this machine]"),
    ] = None,
    root: Annotated[Path, typer.Option("--root", metavar="DIR", help="workspaces lie below it")] = Path("workspace"),
    data: Data = None,
    port: Annotated[int, typer.Option(help="of Prefect's UI, unless PREFECT_API_URL is set")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="of MLflow's UI, unless MLFLOW_TRACKING_URI is set")] = 5000,
    runs: Annotated[int, typer.Option(min=1, help="runs at a time on this machine; the others wait")] = 1,
    reoptimize_at: Annotated[
        str | None, typer.Option("--reoptimize-at", metavar="CRON", help="schedule of `reoptimize`, e.g. '0 3 * * 1'")
    ] = None,
    allow_remote_code: Trusted = None,
    store: Stores = None,
    package: Packages = None,
) -> None:
    """Offer optimize, reoptimize, sweep and measure-hardware in Prefect's UI, on this machine only, until ctrl-c."""
    if reoptimize_at is not None:
        check_cron(reoptimize_at)
    offered = named(profiles or runnable_profiles())
    roots = Roots.declared(root, data or (), store or (), package or (), allow_remote_code or (), offered)
    described = {name: served_profile(load_profile(file), roots).description for name, file in roots.profiles.items()}
    root = roots.workspaces
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PuzzleError(f"cannot write to {root}: {error.strerror}. Choose another with --root.") from error
    configure()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # while servers start; later Prefect's runner takes it
    in_force(served_environment(roots, users_settings()))
    with servers(root, port, mlflow_port):
        in_force({})
        check_servers()
        typer.echo(f"Prefect: {os.environ['PREFECT_API_URL'].removesuffix('/api')}")
        typer.echo(f"MLflow:  {os.environ['MLFLOW_TRACKING_URI']}")
        offer(described, runs, reoptimize_at)


def check_cron(text: str) -> None:
    """PuzzleError for a schedule that Prefect could not keep."""
    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    try:
        CronSchedule(cron=text)
    except ValidationError as error:
        raise PuzzleError(
            f"--reoptimize-at {text!r} is no cron expression: give minute, hour, day, month and weekday, such as "
            "'0 3 * * 1' (Mondays at 3:00), or @hourly, @daily, @weekly, @monthly."
        ) from error


def named(files: Iterable[str]) -> list[str]:
    """NAME=FILE of every profile, as served runs are told. The name is the one that the profile gives itself."""
    found = []
    for file in files:
        path = Path(file).expanduser()
        found.append(f"{load_profile(file).name}={path.resolve() if path.is_file() else file}")
    return found


def served_environment(roots: Roots, told: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """What the runs of a serving process inherit. `told`: Prefect's settings that the user made, which stand."""
    home = roots.workspaces / SERVED
    own = {HOME: str(home), **prefect_database(home)}
    return {
        **{name: value for name, value in QUIET.items() if name not in told},
        **({API: told[API]} if told.get(API) else {} if own_prefect(told) else own),
        **roots.environment(),
        "PREFECT_LOGGING_EXTRA_LOGGERS": "puzzle",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # tasks/operating/watch.py waits for more than two of them
    }


@contextmanager
def servers(root: Path, port: int, mlflow_port: int) -> Iterator[None]:
    """Both servers for the length of the block; one that the environment names already is left alone."""
    with ExitStack() as stack:
        for name in ("prefect-server", "mlflow-server"):  # of a `puzzle serve` that was killed: before ports are judged
            if stop_left_behind(root / f"{name}.pid"):
                typer.echo(f"stopped the {name} that a killed `puzzle serve` left behind")
        if not os.environ.get("PREFECT_API_URL"):
            command, url = prefect_server(_free(port, "--port"))
            guards = prefect_guards(port)
            if os.environ.get(HOME) == str(root / SERVED):
                take_for_server(root / SERVED)
            stack.enter_context(running(command, f"{url}/health", root / "prefect-server.log", guards))
            os.environ["PREFECT_API_URL"] = url
            if os.environ.get(HOME) == str(root / SERVED):  # runs of the command line are to find it
                stack.callback((root / ADDRESS).unlink, missing_ok=True)
                (root / ADDRESS).write_text(url)
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            store = sqlite_url(root / "mlflow.db")
            command, url = mlflow_server(_free(mlflow_port, "--mlflow-port"), store, str(root / "mlartifacts"))
            stack.enter_context(running(command, f"{url}/health", root / "mlflow-server.log", {}))
            os.environ["MLFLOW_TRACKING_URI"] = url
        yield


def _free(port: int, option: str) -> int:
    if not is_free(port):
        raise PuzzleError(f"port {port} is taken: name another with {option}, or the server there in the environment")
    return port


def offer(profiles: Mapping[str, str], runs: int, reoptimize_at: str | None) -> None:
    """Register the deployments and wait for runs; each runs in a process of its own, a crashed one again.

    As `prefect.serve` does, but for two things. The watch is begun before runs are taken. And the runner is given the
    flows themselves: with deployments it would run whatever code the server says that they consist of by then.
    """
    from prefect.exceptions import TerminationSignal
    from prefect.runner import Runner

    from tasks.operating.watch import keep_watch

    runner: Any = Runner(pause_on_shutdown=True, limit=runs)
    for flow, options in deployments(profiles, reoptimize_at):
        runner.add_flow(flow, **options)
    keep_watch()
    with contextlib.suppress(KeyboardInterrupt, TerminationSignal):
        asyncio.run(runner.start())


def deployments(
    profiles: Mapping[str, str], reoptimize_at: str | None = None
) -> list[tuple["Flow[..., Any]", dict[str, Any]]]:
    """Every flow for every profile, named after it; the form starts from it. profiles: names and descriptions."""
    from prefect.types.entrypoint import EntrypointType

    from flows import served

    made: list[tuple[Flow[..., Any], dict[str, Any]]] = []
    for profile, about in profiles.items():
        for flow in (served.optimize, served.reoptimize, served.measure_hardware, served.sweep):
            given = "workspace" if flow is served.sweep else "profile"
            options = {
                "name": profile,
                "parameters": {given: profile},
                "description": f"{about}\n\n{flow.description}".strip(),
                "tags": ["puzzle"],
                "paused": False,  # stopping `puzzle serve` pauses them
                "cron": reoptimize_at if flow is served.reoptimize else None,
                "entrypoint_type": EntrypointType.MODULE_PATH,
            }
            made.append((flow, options))
    return made
