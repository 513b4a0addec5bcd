"""`puzzle peers | check`: searches and sums set against the true KL of whole architectures, on a finished library."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from blocks.errors import PuzzleError
from flows.in_workspace import prepare_workspace, run_logged
from flows.options import ProfileOptions, takes
from tasks.running.progress import Progress, shown

Others = Annotated[
    int, typer.Option("--sequences", min=1, help="validation sequences behind the scored ones that KL is reported on")
]
Different = Annotated[int, typer.Option("--min-different", min=1, help="subblocks in which two of the best differ")]
Seed = Annotated[int, typer.Option("--seed", min=0)]
Json = Annotated[bool, typer.Option("--json", help="one object instead of the table")]


@takes(ProfileOptions)
def peers_command(
    given: ProfileOptions,
    evaluations: Annotated[int, typer.Option(min=2, help="sums that the evolutionary search looks at")] = 20_000,
    smaller: Annotated[
        list[Path] | None,
        typer.Option("--smaller", metavar="FOLDER", help="a smaller model of the parent's family, as a contender"),
    ] = None,
    sequences: Others = 8,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Every search under the profile's budget: objective, true KL, evaluations, seconds; the lowest true KL wins."""

    def work(finished: Any, progress: Progress) -> tuple[Any, str, dict[str, float], Any]:
        from tasks.studies.contest import ContestSize, contest
        from tasks.studies.truth import truth_of
        from tasks.studies.verdicts import aligned, contest_figures, contest_rows, contest_verdict

        size = ContestSize(evaluations=evaluations, seed=seed, smaller=tuple(smaller or ()))
        found = contest(finished.problem, *truth_of(finished, sequences), size, progress)
        text = "\n".join([aligned(*contest_rows(found)), *contest_verdict(found)])
        return found, text, contest_figures(found), []

    _study("peers", given, as_json, work)


@takes(ProfileOptions)
def check_command(
    given: ProfileOptions,
    top: Annotated[int, typer.Option(min=2, help="best architectures by their sums that are measured")] = 8,
    swaps: Annotated[int, typer.Option(min=0, help="swaps that are measured to repair the choice")] = 24,
    min_different: Different = 4,
    sequences: Others = 8,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Are scores additive? Predicted against true KL of the best architectures, then swaps that lower the true KL."""

    def work(finished: Any, progress: Progress) -> tuple[Any, str, dict[str, float], Any]:
        from tasks.search.choose import choose
        from tasks.studies.additivity import OTHERS, CheckSize, check_additivity
        from tasks.studies.truth import measured_truth
        from tasks.studies.verdicts import aligned, check_figures, check_rows, check_verdict, truth_points

        total = top + len(OTHERS) + swaps + 1
        size = CheckSize(top=top, min_different=min_different, swaps=swaps, seed=seed)
        problem, (scored, others), truth = finished.problem, *measured_truth(finished, sequences)
        found = check_additivity(
            problem, truth, choose(problem), size, _counted(progress, total), (scored.documents, others.documents)
        )
        where = f"same sequences: {scored.sequences}; other: {others.sequences}"
        text = "\n".join([aligned(*check_rows(found)), *check_verdict(found), where])
        return found, text, check_figures(found), truth_points(found)

    _study("check", given, as_json, work)


def _counted(progress: Progress, total: int) -> Callable[[str], None]:
    """One more is done at every call; no more than `total`, so that a search that found more does not pass the end."""
    done = 0

    def tell(text: str) -> None:
        nonlocal done
        done = min(done + 1, total)
        progress(done, total, text)

    return tell


def _study(
    name: str,
    given: ProfileOptions,
    as_json: bool,
    work: Callable[[Any, Progress], tuple[Any, str, dict[str, float], Any]],
) -> None:
    """Open the finished library, do the work, print it and keep it."""
    wanted, folder = given.load()
    if not folder.is_dir():
        raise PuzzleError(
            f"{folder} is no workspace: run `puzzle optimize {given.profile} --workspace {folder}` first."
        )
    prepare_workspace(folder)

    def run() -> str:
        with _opened(wanted, folder) as finished:
            from tasks.operating.experiment import open_experiment
            from tasks.operating.study_runs import keep

            with shown(name, beside=True) as progress:
                value, text, figures, points = work(finished, progress)
            kept = keep(open_experiment(wanted, folder), f"{name}-{wanted.name}", value, text, figures, points)
        return str(value.model_dump_json(indent=1)) if as_json else f"{text}\nkept in {kept}"

    typer.echo(run_logged(folder, run))


@contextmanager
def _opened(profile: Any, folder: Path) -> Iterator[Any]:
    from flows.run import process_of
    from tasks.studies.finished import open_finished

    with process_of(profile, folder):
        yield open_finished(profile, folder)


def commands() -> Sequence[tuple[str, Any]]:
    """Name and function of every command here."""
    return (("peers", peers_command), ("check", check_command))
