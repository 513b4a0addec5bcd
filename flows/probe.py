"""`puzzle probe`: where the child of a finished run breaks, though its average looks fine."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from blocks.devices import on_device
from blocks.errors import PuzzleError
from blocks.runtime import configure, imports_left_alone, release_what_grew
from flows.in_workspace import kept_in_mlflow, run_logged
from flows.options import Device, Threads, compute_on, takes
from flows.page import finished_run
from tasks.running.progress import Progress, shown, wide_console

if TYPE_CHECKING:
    from blocks.compute import Compute
    from tasks.probe.records import Asked, ProbeReport
    from tasks.probe.sides import ProbedRun


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """What is probed, and how much."""

    where: Annotated[
        Path,
        typer.Argument(metavar="WORKSPACE_OR_CHILD", help="the folder of a run, or a child in its runs/"),
    ]
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="NAME=FILE",
            help="text, jsonl or parquet that no stage saw [the test text made noisy, Python's standard library]",
        ),
    ] = None
    sequences: Annotated[int, typer.Option("--sequences", min=4, help="of each text, at most")] = 32
    length: Annotated[
        int | None,
        typer.Option("--length", min=0, help="tokens of the long rows; 0: none [1024, or twice the run's sequences]"),
    ] = None
    finetune_steps: Annotated[
        int, typer.Option("--finetune-steps", min=0, help="on the first text; 0: no fine-tuning")
    ] = 16
    learning_rate: Annotated[float, typer.Option("--learning-rate", min=1e-9, max=1.0, help="of the fine-tuning")] = (
        1e-4
    )
    prompts: Annotated[int, typer.Option("--prompts", min=0, help="beginnings that are answered; 0: none")] = 40
    answer_tokens: Annotated[int, typer.Option("--answer-tokens", min=1, max=4096, help="of each answer, at most")] = 64
    seed: Annotated[int, typer.Option("--seed", min=0, help="of the noise")] = 0
    device: Device = "cpu"
    threads: Threads = None

    def asked(self, run: "ProbedRun") -> "Asked":
        """How much is probed of a run."""
        from tasks.probe.probe import usual_length
        from tasks.probe.records import Asked

        return Asked(
            sequences=self.sequences,
            length=usual_length(run) if self.length is None else self.length,
            finetune_steps=self.finetune_steps,
            learning_rate=self.learning_rate,
            prompts=self.prompts,
            answer_tokens=self.answer_tokens,
            seed=self.seed,
        )

    def compute(self) -> "Compute":
        """Where it is computed, in float32."""
        return compute_on(self.device, self.threads)


@takes(ProbeOptions)
def probe_command(
    given: ProbeOptions,
    as_json: Annotated[bool, typer.Option("--json", help="one object instead of the tables")] = False,
) -> None:
    """Parent, child and best baseline on other text, by length, in confidence, fine-tuned, and in what they answer."""
    configure()
    from transformers.utils.logging import disable_progress_bar

    from tasks.probe.probe import prepare, probe
    from tasks.probe.sides import open_run
    from tasks.probe.texts import named_files

    disable_progress_bar()
    files, run, compute = named_files(given.text or ()), open_run(_child(given.where)), given.compute()

    def work() -> str:
        # remarks of those who prepare texts go there: what is printed is an answer
        with redirect_stdout(sys.stderr), imports_left_alone():
            prepared = prepare(run, files, given.asked(run), compute)
            report = probe(prepared, compute, partial(_stage, given.device))
        _show(report, as_json)
        _keep(run, report)
        return ""

    run_logged(run.workspace, work)


def _child(where: Path) -> Path:
    """The child that a path names: its own folder, or that of the last finished run of a workspace."""
    if not where.is_dir():
        raise PuzzleError(f"{where} is no folder: name a workspace with a finished run, or the child in its runs/.")
    if (where / "config.json").is_file():
        return where
    report = finished_run(where)
    if report is None:
        raise PuzzleError(
            f"{where} holds no finished run, and so no child: start one with `puzzle optimize PROFILE --workspace "
            f"{where}`."
        )
    return where / report.child_folder


@contextmanager
def _stage(device: str, name: str) -> Iterator[Progress]:
    """A part of a probe, shown. It waits while a run measures on its device; what it freed is given back at its end."""
    try:
        with shown(name, beside=True) as progress, on_device((device,)):
            yield progress
    finally:
        release_what_grew()


def _show(report: "ProbeReport", as_json: bool) -> None:
    """The report as JSON, or its tables and sentences."""
    from tasks.pages.report import TABLE_STYLE
    from tasks.probe.words import MEANS, sentences, tables

    if as_json:
        typer.echo(report.model_dump_json(indent=1))
        return
    console = wide_console()
    for title, header, rows in tables(report):
        table = Table(title=title, **TABLE_STYLE)
        for place, name in enumerate(header):
            table.add_column(name, justify="right" if place else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(MEANS, highlight=False)
    for line in sentences(report):
        console.print(line, highlight=False, markup=False)


def _keep(run: "ProbedRun", report: "ProbeReport") -> None:
    """The part of the run's page, and the figures in MLflow. What was found is printed and stored already."""
    from tasks.operating.study_runs import log_probe
    from tasks.pages.run_page import write_run_page

    try:
        write_run_page(run.workspace, run.report, run.folder / "report.html")
    except PuzzleError as error:
        typer.echo(f"no report.html: {error}", err=True)
    kept_in_mlflow(lambda: log_probe(run.folder / "child", report))


def commands() -> Sequence[tuple[str, Any]]:
    """Name and function of every command here."""
    return (("probe", probe_command),)
