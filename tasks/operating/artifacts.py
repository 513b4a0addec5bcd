"""What a run shows in Prefect's UI while it goes: a progress bar with an ETA per stage, tables, pictures.

Outside a flow run all of this does nothing. A server that does not answer costs a bar, never the run.
"""

import base64
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.context import FlowRunContext

from blocks.records import Value
from tasks.running.progress import clock

UPDATE_EVERY_SECONDS = 3.0
log = logging.getLogger("puzzle")


def inside_a_run() -> bool:
    """True within a flow run, in whatever thread of it."""
    return FlowRunContext.get() is not None


def artifact_key(name: str) -> str:
    """Prefect's keys are lower case with dashes."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def _tried(call: Callable[..., Any], **arguments: Any) -> Any:
    try:
        return call(**arguments)
    except Exception as error:  # an artifact is a view of the run, not a part of it
        log.warning("an artifact was not stored: %s", error)
        return None


class StageBar:
    """The progress artifact of one stage; call with (done, total, text)."""

    def __init__(self, name: str) -> None:
        self.name, self.started = name, time.monotonic()
        self.last, self.share = self.started, 0.0
        made = _tried(create_progress_artifact, progress=0.0, key=artifact_key(f"stage {name}"), description="started")
        self.artifact: UUID | None = made

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """Tell how far the stage is; the server hears of it every few seconds."""
        now = time.monotonic()
        self.share = 100.0 * done / max(total, 1)
        if done < total and now - self.last >= UPDATE_EVERY_SECONDS:
            left = (now - self.started) / max(done, 1) * (total - done)
            self._put(self.share, f"{done} of {total}, ETA {clock(left)}. {text}".strip())
            self.last = now

    def close(self, finished: bool) -> None:
        """How long it took, or where it stopped."""
        took = clock(time.monotonic() - self.started)
        self._put(100.0 if finished else self.share, f"done in {took}" if finished else f"stopped after {took}")

    def _put(self, share: float, text: str) -> None:
        if self.artifact is not None:
            _tried(update_progress_artifact, artifact_id=self.artifact, progress=share, description=text)


@contextmanager
def stage_bar(name: str) -> Iterator[Callable[[int, int, str], None]]:
    """The progress artifact of a stage within the block; outside a flow run, nothing."""
    if not inside_a_run():
        yield lambda done, total, text: None
        return
    log.info("%s: started", name)
    bar, finished = StageBar(name), False
    try:
        yield bar
        finished = True
    finally:
        bar.close(finished)
        log.info("%s: %s", name, "done" if finished else "stopped")


def show_table(name: str, rows: Sequence[Value], columns: Sequence[str], text: str) -> None:
    """Some fields of contracts as a table artifact; floats to four digits."""
    if inside_a_run() and rows:
        table = [{column: _short(getattr(row, column)) for column in columns} for row in rows]
        _tried(create_table_artifact, table=table, key=artifact_key(name), description=text)


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def show_markdown(name: str, markdown: str, text: str) -> None:
    """A Markdown artifact."""
    if inside_a_run():
        _tried(create_markdown_artifact, markdown=markdown, key=artifact_key(name), description=text)


def show_link(name: str, url: str, text: str) -> None:
    """A link to another page."""
    if inside_a_run():
        _tried(create_link_artifact, link=url, link_text=text, key=artifact_key(name), description=text)


def show_picture(name: str, png: Path, text: str) -> None:
    """A PNG, carried inside the artifact: no other server has to be up to see it."""
    if inside_a_run():
        url = "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode()
        _tried(create_image_artifact, image_url=url, key=artifact_key(name), description=text)
