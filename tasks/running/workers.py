"""Where submitted tasks run: threads of this process, or workers of a Dask or Ray cluster, as the profile says.

Workers get values and paths, never tensors. Each sets its threads and takes its device itself (blocks/runtime.py), so
the schedulers need to know only how many tasks a machine may run at a time.
"""

import importlib
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ThreadPoolTaskRunner

from blocks.compute import Compute
from blocks.devices import on_device
from blocks.errors import PuzzleError
from blocks.runtime import configure, configure_torch, give_threads_back, imports_left_alone
from profiles.schema import Orchestration, Profile
from tasks.running.sharing import TaskKey, exclusive

CONNECT_SECONDS = 20
LOCAL_OBJECT_STORE_BYTES = 80 << 20  # Ray's least: what travels is small
RAY_TOKENS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
log = logging.getLogger("puzzle")


@dataclass(frozen=True, kw_only=True)
class WorkerSlot:
    """What a worker computes a task with: one of these devices of its machine, and so many threads."""

    devices: tuple[str, ...]
    threads: int | None
    compute: Compute


def compute_of(profile: Profile) -> Compute:
    """How the stages of a profile compute: whole models on the first of its devices, a task on the one it takes."""
    hardware, device = profile.hardware, profile.devices[0]
    tokens, dtype = hardware.micro_batch_tokens, getattr(torch, profile.compute_precision)
    return Compute(device="", dtype=dtype, attention="sdpa", micro_batch_tokens=tokens).on(device)


def worker_slot(profile: Profile) -> WorkerSlot:
    """The slot of every submitted task of a profile."""
    return WorkerSlot(devices=profile.devices, threads=profile.hardware.threads, compute=compute_of(profile))


@contextmanager
def in_slot(slot: WorkerSlot, workspace: Path, task: TaskKey) -> Iterator[Compute]:
    """A submitted task at work, in whatever process: it logs to Prefect, no other process makes the same thing, the
    threads are set, and a device is taken, which the block computes on.
    """
    context = FlowRunContext.get()
    with ExitStack() as stack:
        if context is not None and context.detached:
            configure()
            _log_to_prefect()
            stack.enter_context(imports_left_alone())
        stack.enter_context(exclusive(workspace, task))
        yield stack.enter_context(_at_a_device(slot, task))


@contextmanager
def _at_a_device(slot: WorkerSlot, task: TaskKey) -> Iterator[Compute]:
    threads = configure_torch(slot.threads)
    with on_device(slot.devices) as device:
        where = f"{device} of {socket.gethostname()}, process {os.getpid()}"
        log.info("at work on %s, on %s, with %d thread%s", task.what, where, threads, "s" if threads > 1 else "")
        try:
            yield slot.compute.on(device)
        finally:
            give_threads_back()  # this worker may be idle until the run's end, while others measure


def _log_to_prefect() -> None:
    """In a worker's process: our log lines belong to the task run, as those of the flow's process do."""
    log.setLevel(logging.INFO)
    log.propagate = False  # a local worker shares the console of the flow
    for handler in logging.getLogger("prefect.extra").handlers:
        if handler not in log.handlers:
            log.addHandler(handler)


@contextmanager
def task_runner(profile: Profile) -> Iterator[Any]:
    """The task runner that a profile asks for; a cluster and a Prefect server that were started for it end with it.

    PuzzleError when the extra is not installed, nobody answers at the address, or no worker has what tasks need.
    """
    wanted = profile.orchestration.model_copy(update={"devices": profile.devices})
    if wanted.runner == "threads":
        yield ThreadPoolTaskRunner(max_workers=wanted.workers)
        return
    with ExitStack() as stack:
        prefect = _extra(f"prefect_{wanted.runner}", wanted.runner)
        stack.enter_context(_shared_server(wanted))
        if wanted.runner == "dask":
            yield prefect.DaskTaskRunner(address=_dask(wanted, stack))
        else:
            _ray(wanted, stack)
            yield prefect.RayTaskRunner()


def _extra(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PuzzleError(
            f"orchestration.runner: {extra} needs a package that is not installed ({error}): "
            f"pip install -e '.[{extra}]', here and on the workers"
        ) from error


@contextmanager
def _shared_server(wanted: Orchestration) -> Iterator[None]:
    """One Prefect server for the flow and its workers: each would start one of its own otherwise."""
    if PREFECT_API_URL.value():
        yield
        return
    if wanted.address and _host_and_port(wanted.address)[0] not in ("127.0.0.1", "localhost"):
        raise PuzzleError(
            f"the workers at {wanted.address} have to reach Prefect: start a server that they see "
            "(prefect server start --host ...) and name it in PREFECT_API_URL"
        )
    from prefect.server.api.server import SubprocessASGIServer

    server = SubprocessASGIServer()
    server.start()
    try:
        with temporary_settings({PREFECT_API_URL: server.api_url}):
            yield
    finally:
        server.stop()


def _dask(wanted: Orchestration, stack: ExitStack) -> str:
    """Address of a Dask scheduler whose workers can do the tasks; they are annotated with what they need."""
    dask, distributed = importlib.import_module("dask"), importlib.import_module("distributed")
    needs = {"GPU": 1} if _on_gpu(wanted) else {}
    address = wanted.address
    if address is None:
        cluster = distributed.LocalCluster(
            n_workers=wanted.workers,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address=None,
            memory_limit=0,  # puzzle bounds its memory itself; Dask would pause and kill workers by its own estimate
            resources=needs or None,
            silence_logs=logging.ERROR,
        )
        address = str(stack.enter_context(cluster).scheduler_address)
    try:
        with distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False) as client:
            workers = client.scheduler_info(n_workers=-1)["workers"].values()
    except (OSError, ValueError) as error:
        raise _nobody(address, "dask scheduler") from error
    if needs and not any(worker["resources"].get("GPU") for worker in workers):
        raise PuzzleError(
            f"no worker of the Dask cluster at {address} offers a GPU: start them with --nthreads 1 --resources GPU=1"
        )
    if not workers:
        log.warning("the Dask cluster at %s has no workers yet: tasks wait for one", address)
    if needs:
        stack.enter_context(dask.annotate(resources=needs))
    return address


def _ray(wanted: Orchestration, stack: ExitStack) -> None:
    """Connect to a Ray cluster, or start one; Prefect's runner uses the connection that is there."""
    if wanted.address is None:
        stack.enter_context(_own_token())  # before Ray is imported: it reads then whether tokens are asked for
    ray, context = importlib.import_module("ray"), importlib.import_module("prefect_ray.context")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "puzzle"}
    own = {
        "num_cpus": wanted.workers,
        "num_gpus": len(wanted.devices) if _on_gpu(wanted) else 0,
        "include_dashboard": False,
        "object_store_memory": LOCAL_OBJECT_STORE_BYTES,
    }
    if wanted.address is not None:
        check_address("ray", wanted.address)
    try:
        ray.init(address=wanted.address or "local", **quiet, **({} if wanted.address else own))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _nobody(wanted.address or "this machine", "Ray node") from error
    stack.callback(ray.shutdown)
    if _on_gpu(wanted):
        if not ray.cluster_resources().get("GPU"):
            raise PuzzleError("no node of the Ray cluster has a GPU: start them with ray start --num-gpus N")
        stack.enter_context(context.remote_options(num_gpus=1))


@contextmanager
def _own_token() -> Iterator[None]:
    """The token of a Ray cluster that ends with the run, where only this user may read it, and gone with the cluster.

    Ray would leave one in ~/.ray/auth_token, readable by every user of the machine. Settings of the user's own stand.
    """
    if any(name in os.environ for name in RAY_TOKENS):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="puzzle-ray-") as folder:  # mode 0700
        path = Path(folder) / "auth_token"
        path.write_text(secrets.token_hex(32))
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
        loader = importlib.import_module("ray._raylet").AuthenticationTokenLoader.instance()
        loader.reset_cache()
        try:
            yield
        finally:
            for name in RAY_TOKENS:
                os.environ.pop(name, None)
            loader.reset_cache()


def _on_gpu(wanted: Orchestration) -> bool:
    return wanted.devices[0].startswith("cuda")


def _host_and_port(address: str) -> tuple[str, int]:
    """`127.0.0.1:6379`, `tcp://...`, `ray://...`."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    return host, int(port) if port.isdecimal() else 0


def check_address(runner: str, address: str, seconds: float = CONNECT_SECONDS) -> None:
    """PuzzleError where nobody listens at a cluster's address. Ray itself waits for minutes."""
    try:
        socket.create_connection(_host_and_port(address), timeout=seconds).close()
    except (OSError, ValueError) as error:
        raise _nobody(address, "Ray node" if runner == "ray" else "dask scheduler") from error


def _nobody(address: str, what: str) -> PuzzleError:
    return PuzzleError(
        f"no {what} answers at {address} (orchestration.address): start the cluster as "
        "docs/how-to/run-on-a-cluster.md says, or leave the address out"
    )
