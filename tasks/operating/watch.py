"""Crashed runs are noticed and started again: two automations on Prefect's server, kept there by `puzzle serve` and by
`prefect deploy` (a step of prefect.yaml).

A served run beats every 30 s. One whose heart stops (its process and the one that would have noticed are both gone) is
marked Crashed; one that is Crashed, by that or by its runner, is scheduled again as the same flow run. It finds its
finished work and its MLflow run in the workspace. A run itself refuses to start for the sixth time.

The server forgets a silence that ended a minute ago, unless PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER says otherwise
(tasks/running/servers.py): without it, one that was down for longer never noticed who had died meanwhile.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect import runtime
from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from blocks.errors import PuzzleFailure
from blocks.library import digest_of
from tasks.running.sharing import TaskKey

HEARTBEAT_SECONDS = 30  # Prefect's least
SILENCE_SECONDS = 90  # on a busy machine beats were seen 44 s apart
RESTARTS = 5
TAG = "puzzle"  # of every deployment of ours, and so of their runs
VERSION = 3  # raise it when the automations change
RESTART = "Restarting"
FORGET = timedelta(days=30)
_BEAT = "prefect.flow-run.heartbeat"
_OUTCOMES = ("First", "Moved", "Kept", "Unchanged")  # an event has the state's name, and reoptimize names its own
_ENDS = ("Completed", *_OUTCOMES, "Failed", "Cancelled", "Crashed", "Suspended", "Paused", "Scheduled")


def automations() -> list[Automation]:
    """The two of them, for runs that are tagged as ours alone: others may share the server. A heartbeat names its tags,
    but not its deployment.
    """
    ours: dict[str, Any] = {
        "match": ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
        "match_related": ResourceSpecification(
            {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"}
        ),
        "for_each": {"prefect.resource.id"},
    }
    silent = EventTrigger(
        after={_BEAT},
        expect={_BEAT, *(f"prefect.flow-run.{end}" for end in _ENDS)},
        posture=Posture.Proactive,
        within=timedelta(seconds=SILENCE_SECONDS),
        **ours,
    )
    crashed = EventTrigger(
        after={"prefect.flow-run.Running"},  # one that never came so far would not the next time
        expect={"prefect.flow-run.Crashed"},
        posture=Posture.Reactive,
        within=FORGET,
        **ours,
    )
    told = f"no heartbeat for {SILENCE_SECONDS} s: the process of this run is gone"
    return [
        Automation(
            name="puzzle: a run without heartbeat has crashed",
            trigger=silent,
            actions=[ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message=told, force=False)],
        ),
        Automation(
            name="puzzle: a crashed run is started again",
            trigger=crashed,
            actions=[
                ChangeFlowRunState(
                    state=StateType.SCHEDULED,
                    name=RESTART,
                    message="it crashed: started again, finished work is kept",
                    force=False,
                )
            ],
        ),
    ]


def keep_watch() -> None:
    """Create the automations on the server. One that is there already stays: it remembers who was alive, and a run
    that died while nobody served is noticed now.
    """
    version = digest_of(silence=SILENCE_SECONDS, version=VERSION)
    with get_client(sync_client=True) as client:
        for automation in automations():
            automation.description = f"kept by puzzle, {version}"
            there = client.read_automations_by_name(automation.name)
            for old in there:
                if old.description != automation.description:
                    client.delete_automation(old.id)
            if all(old.description != automation.description for old in there):
                automation.create()


def key_of_run(run: str) -> TaskKey:
    """The key of a flow run: only one process works at it."""
    return TaskKey(key=f"flow-run-{run}", what="this very run")


def restarts_of(names: Sequence[str]) -> int:
    """How often a run was started again by itself since somebody started it; `names` of its states, oldest first."""
    count = 0
    for name in names:
        if name == RESTART:
            count += 1
        elif name in ("Scheduled", "AwaitingRetry", "Resuming"):
            count = 0
    return count


def flow_run_id() -> str:
    """Id of the flow run that this is inside of; "" outside."""
    return str(runtime.flow_run.id or "")


def refuse_to_crash_for_ever() -> None:
    """PuzzleFailure in a served run that was started again too often already."""
    run = flow_run_id()
    if not run:
        return
    with get_client(sync_client=True) as client:
        states = sorted(client.read_flow_run_states(UUID(run)), key=lambda state: state.timestamp)
    count = restarts_of([state.name or "" for state in states])
    if count > RESTARTS:
        raise PuzzleFailure(
            f"this run crashed {count} times and is not started again: see its log and the machine's (out of memory "
            "ends a process without a word), then retry it; finished work is kept"
        )
