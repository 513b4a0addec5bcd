"""A run that Prefect's UI, API or schedule started: admitted first, then the same process as `puzzle optimize`'s."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect.context import FlowRunContext
from prefect.settings import PREFECT_API_URL
from pydantic import BaseModel

from flows.run import process_of
from profiles.schema import Profile
from tasks.operating.admission import Roots, admitted, admitted_workspace
from tasks.operating.form import profile_asked_for
from tasks.operating.watch import flow_run_id, key_of_run, refuse_to_crash_for_ever
from tasks.running.progress import logged, say
from tasks.running.recording import where_earlier_runs_are
from tasks.running.sharing import exclusive
from tasks.running.workers import task_runner


@contextmanager
def at_work(
    name: str, budget: BaseModel, hardware: BaseModel, more: BaseModel | None, workspace: str
) -> Iterator[tuple[Profile, Path]]:
    """Profile and folder of an admitted run, at work in it, threads and workers as the profile says, a log file in it.
    See tasks/operating/form.py for the values.

    Raises Refused for a profile that a served run may not have, PuzzleFailure for a run that crashed too often.
    """
    refuse_to_crash_for_ever()
    roots = Roots.from_environment()
    folder = admitted_workspace(workspace or name, roots)
    profile = admitted(profile_asked_for(name, budget, hardware, more, roots), roots)
    folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("puzzle").setLevel(logging.INFO)  # Prefect hands on what passes, and leaves the level as it is
    # its first process may live: a server that was down for minutes has heard no heartbeat
    once = exclusive(folder, key_of_run(flow_run_id()))
    with once, process_of(profile, folder), logged(folder), workers(profile):
        if elsewhere := where_earlier_runs_are(folder, PREFECT_API_URL.value() or "Prefect's database"):
            say(elsewhere)
        yield profile, folder


@contextmanager
def workers(profile: Profile) -> Iterator[None]:
    """Tasks submitted in this flow run go where the profile says: a deployment is made before its profile is known."""
    context = FlowRunContext.get()
    if context is None:
        raise RuntimeError("workers() is for the inside of a flow run")
    with task_runner(profile) as pool, pool as runner, context.model_copy(update={"task_runner": runner}):
        yield
