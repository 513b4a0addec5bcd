"""Children in MLflow's model registry: versions that `mlflow models serve` answers with, and who reigns among them.

The alias `champion` names the version in use; `challenger` the one that was compared with it last. The order of reigns
is kept as a tag, so that a rollback knows where to go back to.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from blocks.errors import PuzzleError
from blocks.records import ChildReport, Value
from tasks.evaluate.compare import LINEAGE
from tasks.operating.champion import DIGITS, Judgement
from tasks.operating.experiment import log_model_metrics
from tasks.operating.run_figures import headlines, report_metrics
from tasks.operating.tracking import Tracking, client_of, log_metrics, set_tags

CHAMPION, CHALLENGER = "champion", "challenger"
REIGNS, JUDGED, BASIS, FOLDER = "puzzle.reigns", "puzzle.judged", "puzzle.basis", "puzzle.run_folder"
ROLLED_BACK = "puzzle.rolled_back"
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # no such model, no such alias
CODE = Path(__file__).with_name("pyfunc_child.py")


class NoChampion(PuzzleError):
    """Nothing to roll back to, or nothing registered."""


class Version(Value):
    """One registered child. run_folder: `runs/...` of the workspace, where its child and its lineage lie."""

    name: str
    version: int
    run_folder: str
    mlflow_run_id: str


def model_name(profile: str) -> str:
    """The registered model of a profile."""
    return f"puzzle-{profile}"


def champion_of(tracking: Tracking, name: str) -> Version | None:
    """The version in use, or None before the first."""
    from mlflow.exceptions import MlflowException

    try:
        found = client_of(tracking).get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code not in ABSENT:  # a server that does not answer is no empty registry
            raise
        return None
    return _version(found)


def _version(found: Any) -> Version:
    return Version(
        name=found.name,
        version=int(found.version),
        run_folder=found.tags.get(FOLDER, ""),
        mlflow_run_id=found.run_id,
    )


def description(report: ChildReport, why: str) -> str:
    """What a version says of itself: what it is, its figures, and why it became champion or did not."""
    found = {name.partition("/")[2]: value for name, value in headlines(report).items()}
    told = {f"max_kl of {one.capability}": one.asked for one in report.floors}  # the search was asked something else
    told |= {one.field: one.asked for one in report.held_times}
    limits = ", ".join(
        f"{one['name']} {told.get(one['name'], one['asked']):g}" for one in report.request.get("limits", ())
    )
    engine = f", measured in {report.speed.engine}" if report.speed.engine else ""
    doubt = " (the machine was busy: not reliable)" if report.speed.disturbed else ""
    words = {
        "decode_speedup": f"Decodes {{:.2f}} times as fast as its parent{doubt}.",
        "prefill_speedup": f"Reads a prompt {{:.2f}} times as fast{doubt}.",
        "parameters_fraction": "Has {:.0%} of its parent's parameters",
        "memory_fraction": "and takes {:.0%} of its memory.",
        "kl": "KL from the parent: {:.4g} nats per token.",
        "top1_agreement": "The likeliest next token is the parent's in {:.0%} of all places.",
    }
    figures = " ".join(text.format(found[name]) for name, text in words.items() if name in found)
    made = f"A child of {report.parent.name}, made by the profile {report.profile}"
    return "\n\n".join(filter(None, [f"{made} for {limits or 'its budget'}{engine}.", figures, why]))


def standing(found: Judgement, before: Version | None) -> str:
    """Why a version is champion, or is not. `before`: who was champion when it was judged."""
    if before is None:
        return "Champion: the first one."
    reason = found.reason.replace("the champion", f"version {before.version}")
    if found.outcome == "moved":
        return f"Champion: it replaced version {before.version}. Why: {reason}."
    return f"Not champion: version {before.version} stayed. Why: {reason}."


def register(tracking: Tracking, report: ChildReport, run_folder: str, workspace: Path, why: str) -> Version:
    """Log a run's child as a pyfunc model of its MLflow run, and make it the `challenger` of the registered model."""
    import mlflow

    packages = ("torch", "transformers", "safetensors", "accelerate")
    requirements = [f"{package}=={metadata.version(package).split('+')[0]}" for package in packages]
    name, run_id = model_name(report.profile), report.mlflow_run_id
    tags = {
        FOLDER: run_folder,
        "puzzle.parent": report.parent.name,
        "puzzle.parent_fingerprint": report.parent.fingerprint,
        "puzzle.corpus_fingerprint": report.corpus.fingerprint,
        "prefect.flow_run_id": report.prefect_run_id,
    }
    with _fluent(tracking, run_id):
        logged = mlflow.pyfunc.log_model(
            name="child",
            python_model=str(CODE),
            artifacts={
                "checkpoint": str(workspace / report.child_folder),
                "lineage": str(workspace / run_folder / LINEAGE),
            },
            pip_requirements=requirements,
            tags=tags,
        )
        client = client_of(tracking)
        _known(client, report)
        # in here too: a registry without a server looks a logged model up where MLflow's global URI points
        made = client.create_model_version(
            name, logged.model_uri, run_id, tags=tags, description=description(report, why), model_id=logged.model_id
        )
    log_model_metrics(tracking, run_id, logged.model_id, report_metrics(report), report.corpus)
    client.set_registered_model_alias(name, CHALLENGER, made.version)
    return _version(client.get_model_version(name, made.version))


def _known(client: Any, report: ChildReport) -> None:
    from mlflow.exceptions import MlflowException

    name = model_name(report.profile)
    try:
        client.get_registered_model(name)
    except MlflowException:
        what = (
            f"Children of {report.parent.name}, made by the profile {report.profile}. The alias `champion` names the "
            "one in use, `challenger` the last that was compared with it. `puzzle rollback` goes back."
        )
        client.create_registered_model(name, description=what)


@contextmanager
def _fluent(tracking: Tracking, run_id: str) -> Iterator[None]:
    """log_model knows no client: a run that is active in this thread, and what was set before comes back."""
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(tracking.uri)
    try:
        with mlflow.start_run(run_id=run_id):
            yield
    finally:
        mlflow.set_tracking_uri(before)  # type: ignore[arg-type]


def crown(tracking: Tracking, version: Version) -> None:
    """Move the alias `champion`; the reign is remembered first, so that a kill between the two loses nothing."""
    client = client_of(tracking)
    reigns = _reigns(client, version.name)
    if not reigns or reigns[-1] != version.version:
        client.set_registered_model_tag(version.name, REIGNS, json.dumps([*reigns, version.version]))
        if reigns:
            _add(client, version.name, reigns[-1], f"Champion until version {version.version} replaced it.")
    client.set_registered_model_alias(version.name, CHAMPION, str(version.version))


def _add(client: Any, name: str, version: int, sentence: str) -> None:
    """What became of a version, at the end of its description."""
    said = client.get_model_version(name, str(version)).description or ""
    client.update_model_version(name, str(version), f"{said}\n\n{sentence}".strip())


def _reigns(client: Any, name: str) -> list[int]:
    """Versions in the order in which they reigned; what the alias says has the last word."""
    kept: list[int] = json.loads(client.get_registered_model(name).tags.get(REIGNS, "[]"))
    alias = client.get_registered_model(name).aliases.get(CHAMPION)
    while kept and alias is not None and kept[-1] != int(alias):
        kept.pop()
    return kept


def rollback(tracking: Tracking, name: str) -> tuple[Version, Version]:
    """Give the alias back to the champion before. Returns (dethroned, champion). NoChampion when there is none."""
    client, now = client_of(tracking), champion_of(tracking, name)
    if now is None:
        raise NoChampion(f"{name} has no champion yet: `puzzle reoptimize` makes the first")
    reigns = _reigns(client, name)
    if len(reigns) < 2:
        raise NoChampion(f"version {now.version} of {name} is its first champion: there is none to go back to")
    before = _version(client.get_model_version(name, str(reigns[-2])))
    client.set_registered_model_alias(name, CHAMPION, str(before.version))
    client.set_registered_model_tag(name, REIGNS, json.dumps(reigns[:-1]))
    client.set_model_version_tag(name, str(now.version), ROLLED_BACK, "true")
    _add(client, name, now.version, f"Rolled back: version {before.version} is champion again.")
    _add(client, name, before.version, f"Champion again: version {now.version} was rolled back.")
    return now, before


def rolled_back(tracking: Tracking, name: str) -> set[str]:
    """The run folders, named by their child, of those that were champion until somebody rolled them back."""
    return {version.tags.get(FOLDER, "") for version in _versions(tracking, name) if version.tags.get(ROLLED_BACK)}


def challenges_of(tracking: Tracking, reigning: Version) -> int:
    """How many challengers were compared with a champion: the versions since. After a rollback some of them were
    compared with another champion; they count too, which is on the safe side.
    """
    return sum(int(version.version) > reigning.version for version in _versions(tracking, reigning.name))


def _versions(tracking: Tracking, name: str) -> list[Any]:
    return list(client_of(tracking).search_model_versions(f"name='{name}'", max_results=10_000))


def log_judgement(tracking: Tracking, run_id: str, outcome: str, figures: Mapping[str, float]) -> None:
    """What a challenger's run came to: a tag `puzzle.outcome`, and the paired comparison as metrics."""
    set_tags(tracking, run_id, {"puzzle.outcome": outcome})
    log_metrics(tracking, run_id, figures)


def judged(tracking: Tracking, name: str) -> dict[str, str]:
    """What the last comparison was made for: digests by part; empty before the first."""
    from mlflow.exceptions import MlflowException

    client = client_of(tracking)
    try:
        text: str = client.get_registered_model(name).tags.get(JUDGED, "")
        if text.startswith("{"):  # of a version before 0.3: the digests themselves
            return {part: digest[:DIGITS] for part, digest in json.loads(text).items()}
        text = client.get_run(text).data.tags.get(BASIS, "") if text else ""
    except MlflowException as error:
        if error.error_code not in ABSENT:
            raise
        return {}
    return dict(part.rpartition(" ")[::2] for part in text.split(", ") if part)


def remember_judged(tracking: Tracking, name: str, run_id: str, basis: Mapping[str, str]) -> None:
    """Keep what a comparison was made for, whoever won it, on the challenger's run: `parent 1f0c2ab3, corpus ...`. The
    registered model names the run, so that its page is no screen of digests.
    """
    set_tags(tracking, run_id, {BASIS: ", ".join(f"{part} {digest}" for part, digest in basis.items())})
    client_of(tracking).set_registered_model_tag(name, JUDGED, run_id)
