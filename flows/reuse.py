"""What a stage found finished, shown in Prefect without a task for each: one `Cached` run a layer.

The library is asked before any task is made. A task run costs 10 ms on a thread and some 300 on a cluster; a thousand
finished variants cost a file each.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from prefect import task
from prefect.states import Completed

from tasks.operating.artifacts import inside_a_run


def _found(stage: str, layer: int, count: int) -> Any:
    """A task run that says what was not done again."""
    return Completed(name="Cached", message=f"{stage}: {count} of layer {layer} were finished before", data=count)


found_task: Any = task(name="finished", task_run_name="{stage} layer {layer:02d}: {count} finished before")(_found)


def show_finished(stage: str, layers: Iterable[int]) -> None:
    """`layers`: the layer of every piece of work of a stage that was finished before. Outside a flow run, nothing."""
    if inside_a_run():
        for layer, count in sorted(Counter(layers).items()):
            found_task(stage, layer, count)
