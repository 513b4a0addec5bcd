"""Prefect's Dask runner, for values in `quote`. Imported only where a profile asks for Dask."""

from typing import Any

from prefect.utilities.annotations import quote
from prefect_dask.task_runners import DaskTaskRunner


class DaskRunner(DaskTaskRunner):
    """A `quote` is a tuple to Dask, which makes every tuple anew and wraps the value once more. By the time that a task
    is handed on, Prefect has looked for edges, so the values go without it.
    """

    def submit(self, task: Any, parameters: dict[str, Any], *rest: Any, **named: Any) -> Any:
        """See DaskTaskRunner.submit."""
        plain = {name: value.unwrap() if isinstance(value, quote) else value for name, value in parameters.items()}
        return super().submit(task, plain, *rest, **named)
