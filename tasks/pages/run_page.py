"""The page of a finished run: the choice that the run made, with the certificate of that very search."""

import math
import shlex
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from blocks.files import sha256_of
from blocks.library import digest_of, remember
from blocks.records import Architecture, ChildReport, TruthPoint
from tasks.libraries.interchange import open_library
from tasks.libraries.summary import Summary, summarise
from tasks.pages.page import Extent, Study, study_choice, truth_of, write_page
from tasks.probe.records import PROBE, ProbeReport
from tasks.search.confidence import Draws
from tasks.search.joint import HEAD, JointLibrary, LibraryFileError, Option
from tasks.search.request import Request, objective_of
from tasks.search.solve import Certificate, JointChoice, described, totals

IN_A_RUN = Extent(points=12, draws=Draws(most=40, least=20, seconds=30))  # seconds, not minutes, at 30 layers
VERSION = 1  # of what is solved for a page: a higher one makes it again
_SAME = 1e-6  # relative; sums of the same figures in another order


def write_run_page(workspace: Path, report: ChildReport, target: Path) -> list[Path]:
    """Write the page at the end of a run; its library is the one of the report's profile."""
    return write_page(study_of_run(workspace, report, IN_A_RUN, truth_of(workspace)), target)


def study_of_run(workspace: Path, report: ChildReport, extent: Extent, truth: tuple[TruthPoint, ...]) -> Study:
    """A run's own choice, in its own library, under what the run was asked for.

    LibraryFileError when the library is no longer the one that the run chose from.
    """
    tables = workspace / "tables" / report.profile
    library = open_library(tables)
    request = _asked(report)
    choice = stored_choice(library, request, report.architecture)
    folder = (workspace / report.child_folder).resolve()
    made = (("finished", clock(report.finished_at)), ("command", report.command), ("folder", str(folder.parent)))
    parts: dict[str, Any] = {"truth": truth, "report": report, "following": following(report, folder)}
    probed = folder.parent / PROBE
    parts["probe"] = remember(probed, ProbeReport, lambda _: [], workspace, fetch="never")
    parts["made"] = tuple((name, value) for name, value in made if value)
    asked = {"request": request, "choice": choice, "extent": asdict(extent), "v": VERSION}
    key = digest_of(library=sha256_of(tables / "library.json"), **asked)  # it holds the digest of every table
    parts["kept"] = workspace / "pages" / f"{key}.json"
    return study_of(tables, library, request, extent, choice=choice, **parts)


def clock(moment: str) -> str:
    """An ISO 8601 moment for people."""
    return f"{datetime.fromisoformat(moment):%Y-%m-%d %H:%M} UTC" if moment else ""


def following(report: ChildReport, child: Path) -> tuple[tuple[str, str], ...]:
    """What to do with a child, and the command for each."""
    words = shlex.split(report.command)
    by_hand = words[:2] == ["puzzle", "optimize"]
    again = shlex.join(["puzzle", "reoptimize", *words[2:]]) if by_hand else "puzzle reoptimize PROFILE"
    profile = next((word for word in words[2:] if word.endswith((".yaml", ".yml"))), "PROFILE")
    there = report.speed.engine.lower()
    engine = next((name for name in ("llama.cpp", "vllm") if there.startswith(name)), "torch")
    engine += "-plugin" if engine == "vllm" and "plugin" in there else ""
    where = shlex.quote(str(child))
    return (
        ("export it", f"puzzle export {where} --format gguf --out {report.profile}.gguf"),
        ("measure it beside its parent", f"puzzle bench {where} --engine {engine}"),
        ("see where it breaks", f"puzzle probe {where}"),
        ("make it anew when something changed", again),
        ("forms, runs and schedules in a browser", f"puzzle serve {shlex.quote(profile)}"),
    )


def _asked(report: ChildReport) -> Request:
    """What the run was asked for, in the library's words."""
    try:
        request = Request.model_validate(report.request)
    except ValidationError:
        request = Request()
    if not request.limits:
        raise _another("an earlier version of puzzle made it, which named budgets differently")
    named = tuple(limit.model_copy(update={"name": limit.label}) for limit in request.limits)
    return request.model_copy(update={"limits": named})


def stored_choice(library: JointLibrary, request: Request, architecture: Architecture) -> JointChoice:
    """An architecture that was chosen before, with its own certificate; nothing is solved."""
    by_own = {option.own: option for option in library.options}
    wanted = [
        Option(layer=index, attention=layer.attention, ffn=layer.ffn, coupled=layer.coupled)
        for index, layer in enumerate(architecture.layers)
    ]
    if HEAD in library.layers:
        wanted.append(Option(layer=len(wanted), head=architecture.head))
    try:
        chosen = [by_own[own] for own in wanted]
        places = [library.place_at(total.scenario, total.batch_size) for total in architecture.totals]
    except (KeyError, ValueError):
        raise _another("it lacks a variant or a batch size of the choice") from None
    scenarios = tuple(totals(library, chosen, place) for place in places)
    for found, total in zip(scenarios, architecture.totals, strict=True):
        if not math.isclose(found.latency_seconds or 0.0, total.runtime_seconds, rel_tol=_SAME, abs_tol=1e-9):
            raise _another("its costs were measured again")
    objective = math.fsum(objective_of(option, request, library.documents) for option in chosen)
    if not request.search.robust and not math.isclose(objective, architecture.score, rel_tol=_SAME, abs_tol=1e-9):
        raise _another("its scores were measured again")
    certificate = Certificate(
        status=architecture.status,
        bound=min(architecture.bound, objective),
        gap=architecture.gap,
        solved_by=architecture.solved_by,
    )
    return described(library, request, chosen, scenarios, objective, certificate)


def _another(why: str) -> LibraryFileError:
    return LibraryFileError(
        f"the workspace's library is not the one that its last run chose from: {why}. Run `puzzle optimize` again, or "
        "give a budget, and the page is about a new choice."
    )


def study_of(source: Path, opened: JointLibrary, request: Request, extent: Extent, **parts: Any) -> Study:
    """A choice from the library at `source`, which is open at one place, with what the page says of the library."""
    described = summarise(source)
    report: ChildReport | None = parts.get("report")
    title = f"{report.profile}: a child of {report.parent.name}" if report else f"A choice from {source.name}"
    facts = facts_of(described, opened)
    return study_choice(title, opened, request, extent, facts=facts, missing=described.missing, **parts)


def facts_of(described: Summary, opened: JointLibrary) -> tuple[tuple[str, str], ...]:
    """What the page says of the library, by name."""
    places = [f"{place.scenario or 'one scenario'}, batch {place.batch_size}" for place in opened.places]
    return (
        ("source", described.source),
        ("parent", described.parent or "not named"),
        ("layers", f"{described.layers}, each with {described.per_layer} variants of its block"),
        ("costs at", "; ".join(places)),
        ("hardware", described.measured_on),
    )
