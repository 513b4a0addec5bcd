"""What `puzzle doctor` looks at: the machine, the packages, the workspace, the servers. Each check says what to do.

ok: nothing to do. warn: puzzle runs, something is missing, slow or untidy. wrong: a run would fail.
"""

import os
import platform
import shutil
import socket
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import psutil
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

from blocks.records import Value
from blocks.runtime import usable_cores
from profiles.schema import DRIVEN
from tasks.operating.requirements import EXTRAS, devices_here, engine_missing, is_there, nvidia_gpus
from tasks.running.at_work import others_at_work
from tasks.running.recording import users_settings
from tasks.running.servers import answer, orphaned_servers, sqlite_file

GIB = 2**30
# what `make demo` took at commit 314efa6; a test holds both to what `puzzle plan` says of its profile
DEMO_DISK_GIB, DEMO_MEMORY_GIB = 4.0, 6.5
DISK_WRONG, DISK_WARN = 1 * GIB, 10 * GIB
MEMORY_WRONG, MEMORY_WARN = 1 * GIB, int(DEMO_MEMORY_GIB * GIB)
CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


class Finding(Value):
    """One line of the doctor. `todo` is empty when all is well."""

    name: str
    status: Literal["ok", "warn", "wrong"]
    detail: str
    todo: str = ""


def ok(name: str, detail: str) -> Finding:
    """A finding where there is nothing to do."""
    return Finding(name=name, status="ok", detail=detail)


def warn(name: str, detail: str, todo: str) -> Finding:
    """A finding with which puzzle runs, though not as well as it could."""
    return Finding(name=name, status="warn", detail=detail, todo=todo)


def wrong(name: str, detail: str, todo: str) -> Finding:
    """A finding with which puzzle does not run."""
    return Finding(name=name, status="wrong", detail=detail, todo=todo)


def examine(workspace: Path) -> list[Finding]:
    """Every check, in the order in which one would mend things."""
    checks: tuple[Callable[[], Iterable[Finding]], ...] = (
        lambda: python_version(),
        lambda: packages(_required()),
        lambda: caps(CONSTRAINTS.read_text() if CONSTRAINTS.exists() else ""),
        lambda: extras(),
        lambda: engines(),
        lambda: disk(shutil.disk_usage(_existing(workspace)).free, workspace),
        lambda: memory(psutil.virtual_memory().available, psutil.virtual_memory().total),
        lambda: threads(usable_cores(), psutil.getloadavg()[0], os.environ),
        lambda: write_access(workspace),
        lambda: prefect_server(users_settings()),
        lambda: prefect_state(workspace / "prefect"),
        lambda: mlflow_store(workspace, os.environ),
        lambda: accelerator(),
        lambda: orphans(),
    )
    return [finding for check in checks for finding in check()]


def python_version() -> Iterator[Finding]:
    """Whether this Python is one that puzzle's pyproject.toml allows."""
    own, allowed = platform.python_version(), _distribution_metadata("Requires-Python", ">=3.11,<3.12")
    if own in SpecifierSet(allowed):
        yield ok("python", own)
    else:
        yield wrong("python", f"{own}, puzzle needs {allowed}", "make setup PYTHON=/path/to/python3.11")


def _distribution_metadata(field: str, otherwise: str) -> str:
    try:
        found = metadata.metadata("puzzle")
    except metadata.PackageNotFoundError:
        return otherwise
    return (found.get_all(field) or [otherwise])[0]


def _required() -> list[Requirement]:
    try:
        return [Requirement(line) for line in metadata.requires("puzzle") or []]
    except metadata.PackageNotFoundError:
        return []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def packages(required: Iterable[Requirement]) -> Iterator[Finding]:
    """What pyproject.toml asks for; one line when all is right, a line for each that is not."""
    needed = [each for each in required if each.marker is None or each.marker.evaluate({"extra": ""})]
    faults = list(_unfit(needed))
    if not needed:
        yield wrong("packages", "puzzle itself is not installed", "pip install -c constraints.txt -e .")
    elif not faults:
        told = ", ".join(f"{name} {_version(name)}" for name in ("prefect", "mlflow", "torch", "transformers"))
        yield ok("packages", f"{len(needed)} as asked for: {told}")
    yield from faults


def _unfit(needed: Iterable[Requirement]) -> Iterator[Finding]:
    for each in needed:
        own = _version(each.name)
        if own is None:
            yield wrong(each.name, "not installed", f"pip install -c constraints.txt '{each.name}{each.specifier}'")
        elif not each.specifier.contains(own, prereleases=True):
            what = " (Prefect's API breaks with others)" if each.name == "fastapi" else ""
            todo = f"pip install -c constraints.txt '{each.name}{each.specifier}'"
            yield wrong(each.name, f"{own}, puzzle needs {each.specifier}{what}", todo)


def caps(constraints: str) -> Iterator[Finding]:
    """Whether a package is newer than the tests were run with. constraints.txt lists those versions."""
    listed = [line.split("#")[0].strip() for line in constraints.splitlines()]
    faults = []
    for line in filter(None, listed):
        try:
            each = Requirement(line)
        except InvalidRequirement:
            continue
        own = _version(each.name)
        if own is not None and not each.specifier.contains(own, prereleases=True):
            faults.append(f"{each.name} {own} (tested: {each.specifier})")
    if faults:
        yield warn("caps", ", ".join(faults), "pip install -c constraints.txt -e .")
    elif any(listed):
        yield ok("caps", "every version within constraints.txt")


def extras(there: Callable[[str], bool] = is_there) -> Iterator[Finding]:
    """Which optional packages are missing. Nothing is imported to find out."""
    missing = [name for name in EXTRAS if not there(name)]
    if not missing:
        yield ok("extras", "every optional package is installed")
    for todo in dict.fromkeys(EXTRAS[name][1] for name in missing):
        lacking = [f"{name} ({EXTRAS[name][0]})" for name in missing if EXTRAS[name][1] == todo]
        yield warn("extras", f"not installed: {', '.join(lacking)}", f"{todo}   (only if you want these)")


def engines(missing: Callable[[str], str | None] = engine_missing) -> Iterator[Finding]:
    """Engines that a profile may measure in (hardware.engine), and why the others cannot."""
    reasons = {name: missing(name) for name in DRIVEN}
    there = [f"{name} on {' and '.join(DRIVEN[name][0])}" for name in DRIVEN if not reasons[name]]
    yield ok("engines", ", ".join(there))
    for told in dict.fromkeys(filter(None, reasons.values())):
        names = " and ".join(name for name in DRIVEN if reasons[name] == told)
        yield warn(
            "engines", f"not {names}: {told}", f"only for hardware.engine: {names} and exports that are tried in it"
        )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def disk(free: int, workspace: Path) -> Iterator[Finding]:
    """Whether the disk has room for a block library and recorded activations."""
    told = f"{free / GIB:.1f} GiB free at {workspace}"
    todo = "free space, or name another --workspace; "
    todo += f"the demo takes {DEMO_DISK_GIB} GiB, `puzzle plan` says what a profile does"
    yield from _room("disk", free, (DISK_WRONG, DISK_WARN), told, todo)


def memory(available: int, total: int) -> Iterator[Finding]:
    """Whether memory has room for a layer, its activations and the parent's logits."""
    told = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    todo = "stop something, or use a smaller parent, fewer record.hidden_sequences; "
    todo += f"the demo takes {DEMO_MEMORY_GIB} GiB, `puzzle plan` says what a profile does"
    yield from _room("memory", available, (MEMORY_WRONG, MEMORY_WARN), told, todo)


def _room(check: str, there: int, least: tuple[int, int], told: str, todo: str) -> Iterator[Finding]:
    """Bytes that are there, beside those below which a run fails and those below which it may."""
    if there < least[0]:
        yield wrong(check, told, todo)
    elif there < least[1]:
        yield warn(check, told, todo)
    else:
        yield ok(check, told)


def threads(cores: int, load: float, environment: Mapping[str, str]) -> Iterator[Finding]:
    """How many cores there are, what limits their use, and whether others use them now.

    Costs that are measured while others compute would be wrong.
    """
    limits = [f"{name}={environment[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if environment.get(name)]
    if cores < (os.cpu_count() or 1):
        limits.append(f"{os.cpu_count()} cores exist, this process may use {cores}")
    told = f"{cores} cores, load {load:.1f}" + (f", {', '.join(limits)}" if limits else "")
    if load > cores:
        yield warn("threads", told, "others use these cores: measured costs and speeds will spread; wait for quiet")
    elif limits and cores < (os.cpu_count() or 1):
        yield warn("threads", told, "set hardware.threads in the profile to the cores it may use")
    else:
        yield ok("threads", told)


def write_access(workspace: Path) -> Iterator[Finding]:
    """Whether a file can be made where the workspace is or will be, and whether a run is at work in it."""
    place = _existing(workspace)
    if not place.is_dir():
        yield wrong("workspace", f"{place} is a file", "name a folder with --workspace")
        return
    probe = place / f".doctor-{os.getpid()}-{socket.gethostname()}"
    try:
        probe.write_bytes(b"puzzle")
        probe.unlink()
    except OSError as error:
        yield wrong("workspace", f"cannot write to {place}: {error.strerror}", "name another --workspace, or chown it")
        return
    if others_at_work(workspace):
        yield ok("workspace", f"a run is at work in {workspace}; another one may join, they share what both need")
    else:
        yield ok("workspace", f"{workspace} can be written" if workspace.exists() else f"{workspace} can be made")


def prefect_server(environment: Mapping[str, str]) -> Iterator[Finding]:
    """The server of PREFECT_API_URL: does it answer, is its version ours, may strangers reach it."""
    url = environment.get("PREFECT_API_URL", "").rstrip("/")
    if not url:
        yield ok("prefect server", "none set (PREFECT_API_URL): a run starts its own for as long as it lasts")
        return
    if answer(f"{url}/health") is None:
        todo = "start it (prefect server start), or unset PREFECT_API_URL to let a run start its own"
        yield wrong("prefect server", f"no answer at {url}", todo)
        return
    theirs = (answer(f"{url}/admin/version") or "").strip('"')
    if theirs and theirs.split(".")[:2] != (_version("prefect") or "").split(".")[:2]:
        yield warn("prefect server", f"{url} runs Prefect {theirs}, here is {_version('prefect')}", "use one version")
    elif urlsplit(url).hostname not in LOOPBACK_HOSTS and not environment.get("PREFECT_API_AUTH_STRING"):
        todo = "put authentication before it, see docs/how-to/protect-the-servers.md"
        yield warn("prefect server", f"{url} answers without authentication, and not only on this machine", todo)
    else:
        yield ok("prefect server", f"{url} answers, Prefect {theirs or 'of unknown version'}")


def prefect_state(home: Path) -> Iterator[Finding]:
    """The database that runs of this workspace keep with a server of their own."""
    database = home / "prefect.db"
    if not database.exists():
        yield ok("prefect state", f"none yet in {home}")
        return
    fault = _damage(database)
    if fault:
        todo = f"move {database} away: the block library does not depend on it, only the history of runs is lost"
        yield wrong("prefect state", f"{database}: {fault}", todo)
        return
    unfinished = _count(database, "select count(*) from flow_run where state_type = 'RUNNING'")
    told = f"{database.stat().st_size / 2**20:.0f} MiB, whole"
    if unfinished and not others_at_work(home.parent):
        todo = "start the same profile again: finished work is kept"
        yield warn("prefect state", f"{told}; {unfinished} killed run{'s' if unfinished > 1 else ''}", todo)
    else:
        yield ok("prefect state", told)


def _damage(database: Path) -> str:
    """What is wrong with an SQLite file; "" when nothing is."""
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=2)) as connection:
            found = connection.execute("pragma quick_check(1)").fetchone()[0]
    except sqlite3.Error as error:
        return str(error)
    return "" if found == "ok" else str(found)


def _count(database: Path, query: str) -> int:
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=2)) as connection:
            return int(connection.execute(query).fetchone()[0])
    except sqlite3.Error:  # a database of another version: nothing to say about it
        return 0


def mlflow_store(workspace: Path, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Where runs are logged: the server of MLFLOW_TRACKING_URI, else SQLite in the workspace."""
    uri = environment.get("MLFLOW_TRACKING_URI", "").rstrip("/")
    if uri.startswith(("http://", "https://")):
        if answer(f"{uri}/health") is None:
            todo = "start it (mlflow server), or unset MLFLOW_TRACKING_URI to log into the workspace"
            yield wrong("mlflow", f"no answer at {uri}", todo)
        else:
            yield ok("mlflow", f"{uri} answers, version {answer(f'{uri}/version') or 'unknown'}")
        return
    database = sqlite_file(uri) or workspace / "mlflow.db"
    if not database.exists():
        yield ok("mlflow", f"no store yet; a run makes {database}")
        return
    fault = _damage(database)
    if fault:
        yield wrong("mlflow", f"{database}: {fault}", f"move {database} away: only the history of runs is lost")
    else:
        runs = _count(database, "select count(*) from runs where lifecycle_stage = 'active'")
        yield ok("mlflow", f"{database}, {runs} runs, whole")


def accelerator() -> Iterator[Finding]:
    """GPUs that torch can use, and one that it cannot."""
    import torch

    gpus = [device for device in devices_here() if device != "cpu"]
    if gpus:
        yield ok("gpu", ", ".join(map(_gpu, gpus)))
    elif nvidia_gpus():
        todo = "pip install torch with CUDA (leave constraints.txt out, or name PyTorch's CUDA index)"
        yield warn("gpu", f"{nvidia_gpus()}, but torch {torch.__version__} has no CUDA", todo)
    else:
        yield ok("gpu", f"none: hardware.device: cpu (torch {torch.__version__})")


def _gpu(device: str) -> str:
    import torch

    if not device.startswith("cuda"):
        return device
    return f"{device} {torch.cuda.get_device_name(device)} ({torch.cuda.mem_get_info(device)[0] / GIB:.0f} GiB free)"


def orphans() -> Iterator[Finding]:
    """Servers that killed runs left; each keeps 300 MB."""
    left = orphaned_servers()
    if left:
        todo = f"kill {' '.join(str(process.pid) for process in left)}   (the next run of their workspace does it too)"
        yield warn("orphans", f"{len(left)} ephemeral Prefect server(s) of killed runs", todo)
    else:
        yield ok("orphans", f"no server of a killed run ({sys.platform})")
