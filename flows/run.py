"""A run at work: what its stages share, how a stage is shown and timed, and how it calls its Prefect tasks.

Every variant is a task run on every run. Prefect's cache decides on the content key of what the task makes; the files
are asked first, and a task whose files are not whole runs with `refresh_cache`. What is whole costs a call in this
process (5 to 16 ms), whatever runner the profile names: a cluster would take 300 ms for it.
"""

import copyreg
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import State, Task, task
from prefect.cache_policies import NO_CACHE, CacheKeyFnPolicy
from prefect.client.schemas.objects import StateDetails
from prefect.futures import PrefectFuture
from prefect.states import Completed
from prefect.tasks import exponential_backoff
from prefect.utilities.annotations import quote
from transformers.utils.logging import disable_progress_bar

from blocks.runtime import configure_torch, imports_left_alone, release_what_grew
from profiles.schema import Profile
from tasks.operating.artifacts import stage_bar
from tasks.operating.reach import check_servers
from tasks.operating.requirements import advice, check_machine
from tasks.operating.shared import store_used
from tasks.running.at_work import at_work_in, number_in, prefect_home
from tasks.running.devices import device_turn
from tasks.running.progress import Progress, say, shown
from tasks.running.recording import own_server_is_up
from tasks.running.retries import one_line_when_prefect_is_away, time_limit_in_words, worth_retrying
from tasks.running.usage import Usage


def task_of(name: str, run_name: str, key: Callable[[Any, dict[str, Any]], str] | None = None) -> Callable[[Any], Any]:
    """A Prefect task that is retried with back-off, and cached by `key` where there is one."""
    return task(
        name=name,
        task_run_name=run_name,
        cache_policy=CacheKeyFnPolicy(cache_key_fn=key) if key else NO_CACHE,
        persist_result=key is not None,
        result_serializer="json",
        retries=2,
        retry_delay_seconds=exponential_backoff(backoff_factor=5),
        retry_jitter_factor=0.2,
        retry_condition_fn=worth_retrying,
    )


@lru_cache(maxsize=128)
def _with_options(
    which: Task[..., Any], timeout_seconds: float | None, refresh_cache: bool, storage: Path
) -> Task[..., Any]:
    return which.with_options(timeout_seconds=timeout_seconds, refresh_cache=refresh_cache, result_storage=storage)


# Prefect's `quote` would come out of pickle, on a worker of Dask or Ray, with the value wrapped once more
copyreg.pickle(quote, lambda held: (quote, (held.unwrap(),)))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run at work on a profile in a workspace: what it took so far, and its task runs by the name of what they made.

    Values go to a task in `quote`: Prefect would look into them for results of other tasks, which takes long, and
    draws edges that are not there, because equal strings are one object in Python. The edges are those of `after`.
    """

    profile: Profile
    workspace: Path
    usage: Usage = field(default_factory=Usage.start)
    task_runs: dict[str, UUID] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        """A stage in its turn on the device, on the console and in Prefect's UI, its time noted. Where it took memory,
        what it freed is given back at its end, or the peaks of all stages would add up.
        """
        turn, limit = device_turn(name, self.profile), time_limit_in_words(name)
        try:
            with turn, self.usage.noted(name), limit, shown(name) as console, stage_bar(name) as bar:

                def progress(done: int, total: int, text: str = "") -> None:
                    console(done, total, text)
                    bar(done, total, text)

                yield progress
        finally:
            release_what_grew()

    def call(
        self,
        which: Any,
        makes: str,
        *values: Any,
        after: Iterable[str] = (),
        limited: bool = True,
        refresh: bool = False,
    ) -> Any:
        """The result of a task that runs here and now. `limited`: the profile's time limit holds for it. `refresh`: the
        files are not whole, so whatever Prefect has kept of the task is not asked for.

        Where the files are whole, that is a task run which Prefect's record of it ends as `Cached`. Prefect may have no
        record that it can read: another machine made them, or a run with another Prefect server, or one that was killed
        wrote half of it. Then the task finds the files, and Prefect has a record from then on.
        """
        wanted = self._limited(which, limited, refresh)
        state: State[Any] = wanted(*map(quote, values), wait_for=self._made_by(after), return_state=True)
        if state.state_details.task_run_id is not None:
            self.task_runs[makes] = state.state_details.task_run_id
        return state.result()

    def submit(self, which: Any, makes: str, *values: Any, after: Iterable[str] = ()) -> PrefectFuture[Any]:
        """Hand a task, whose files are not whole, to the workers that the profile names."""
        wanted = self._limited(which, refresh_cache=True)
        future = wanted.submit(*map(quote, values), wait_for=self._made_by(after))
        self.task_runs[makes] = future.task_run_id
        return future

    def _limited(self, which: Any, limited: bool = True, refresh_cache: bool = False) -> Any:
        seconds = self.profile.orchestration.task_timeout if limited else None
        storage = prefect_home(self.workspace, number_in(self.workspace)) / "storage"  # whichever server records
        return _with_options(which, seconds, refresh_cache, storage)

    def _made_by(self, names: Iterable[str]) -> list[State[Any]]:
        """The task runs that made these, as the states that Prefect draws edges from, without what they made."""
        ids = dict.fromkeys(self.task_runs[name] for name in names if name in self.task_runs)
        return [Completed(data=True, state_details=StateDetails(task_run_id=each)) for each in ids]


@contextmanager
def process_of(profile: Profile, workspace: Path) -> Iterator[None]:
    """This process at work in a workspace, beside others: machine and servers checked, threads set, the store of the
    profile in use.
    """
    check_machine(profile)
    check_servers()
    for line in advice(profile):
        say(line)
    own_server_is_up()
    with at_work_in(workspace) as number, one_line_when_prefect_is_away(), imports_left_alone():
        configure_torch(profile.hardware.threads)
        disable_progress_bar()  # transformers' own bars: ours show the stage
        if number > 1:
            say(f"another run is at work in {workspace}: what both need is made once")
        with store_used(workspace, profile.store):
            yield
