"""What the benchmarks share: a prepared workspace of a profile, and a header that says how a table was made."""

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from blocks.compute import HOST
from blocks.runtime import configure

configure()

from benchmarks.pages import with_header  # noqa: E402
from blocks.errors import PuzzleError  # noqa: E402
from blocks.files import write_text  # noqa: E402
from blocks.parent import Parent  # noqa: E402
from blocks.records import Candidate, ChildReport, CorpusInfo, LayerRecord, ParentInfo  # noqa: E402
from blocks.runtime import configure_torch  # noqa: E402
from flows.page import finished_run  # noqa: E402
from profiles.load import load_profile  # noqa: E402
from profiles.schema import Profile  # noqa: E402
from tasks.distill.record import Recording, open_parent, record_layer, recording_of  # noqa: E402
from tasks.evaluate.standing import Reading, final_of, of_sequences  # noqa: E402
from tasks.inputs.corpus import prepare_corpus  # noqa: E402
from tasks.inputs.corpus_sources import iterate_documents  # noqa: E402
from tasks.inputs.image_questions import by_digest  # noqa: E402
from tasks.inputs.parent import prepare_parent  # noqa: E402
from tasks.inputs.vision import with_images  # noqa: E402
from tasks.measure.hardware_description import processor  # noqa: E402
from tasks.score.scoring import ScoringSet  # noqa: E402

LOAD = round(os.getloadavg()[0], 1)  # the machine's load before the benchmark itself computes
ROOT = Path(__file__).resolve().parent.parent
PUZZLE = [sys.executable, "-c", "from flows.cli import main; main()"]  # the code of this folder, whatever is installed


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A profile with its parent, corpus and recording, made or found in a workspace."""

    profile: Profile
    workspace: Path
    parent: ParentInfo
    corpus: CorpusInfo
    reader: Parent
    records: list[LayerRecord]
    recording: Recording

    @property
    def scored(self) -> ScoringSet:
        """The validation tokens that variants are scored on."""
        scoring = self.profile.scoring
        length = scoring.tokens_per_sequence or self.corpus.sequence_length
        return ScoringSet(corpus=self.corpus, last=self.records[-1], count=scoring.sequences, length=length)


def arguments(description: str) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--profile", default="profiles/smollm2-cpu.yaml")
    parser.add_argument("--workspace", type=Path, help="[workspace/<profile name>]; finished stages are reused")
    parser.add_argument("--set", action="append", default=[], metavar="PATH.TO.KEY=VALUE")
    return parser


def open_bench(options: argparse.Namespace) -> Bench:
    """Prepare parent, corpus and recording by the plain functions; what is stored is reused."""
    profile = load_profile(options.profile, options.set)
    workspace = (options.workspace or ROOT / "workspace" / profile.name).resolve()
    workspace.mkdir(parents=True, exist_ok=True)
    configure_torch(profile.hardware.threads)
    parent = prepare_parent(profile.parent, workspace, lambda: iterate_documents(profile.corpus))
    parent = with_images(parent, by_digest(profile.images), workspace, HOST)
    corpus = prepare_corpus(profile.corpus, workspace / parent.folder, parent.fingerprint, workspace)
    reader = open_parent(workspace / parent.folder, HOST)
    recording = recording_of(profile, parent, corpus, HOST)
    assert recording.kept, "this benchmark reads recorded states: raise record.shard_tokens"
    records = [record_layer(layer, recording, workspace, HOST) for layer in range(reader.depth)]
    return Bench(
        profile=profile,
        workspace=workspace,
        parent=parent,
        corpus=corpus,
        reader=reader,
        records=records,
        recording=recording,
    )


def optimize(profile: str, workspace: Path, settings: Iterable[str]) -> int:
    """Run `puzzle optimize` in a process of its own: 0, or 2 where it refused, and said why. CalledProcessError where
    it failed.
    """
    given = [word for one in settings for word in ("--set", one)]
    command = [*PUZZLE, "optimize", profile, "--workspace", str(workspace), *given]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    if done.returncode != 2:
        done.check_returncode()
    return done.returncode


def last_report(workspace: Path) -> ChildReport:
    """Report of the run that ended last. PuzzleError where none has."""
    report = finished_run(workspace)
    if report is None:
        raise PuzzleError(f"{workspace} holds no finished run: run `puzzle optimize` there first")
    return report


def child_of(report: ChildReport) -> Candidate:
    """The child after GKD."""
    found = final_of(report.candidates, "child")
    assert found is not None
    return found


def kl(model: Candidate) -> Reading:
    """KL from the parent, by document of test text."""
    found = of_sequences(model, "kl")
    assert found is not None
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, figures right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def commit() -> tuple[str, bool]:
    """The commit that runs, and whether the product was changed since."""
    short = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    product = ["git", "status", "--porcelain", "--", "blocks", "tasks", "flows", "profiles"]
    return short.strip(), bool(subprocess.run(product, cwd=ROOT, capture_output=True, text=True).stdout)


def write_page(name: str, title: str, parts: Sequence[str]) -> None:
    """Write benchmarks/<name>.md with a header that benchmarks/pages.py can read, and print it."""
    module = Path(sys.argv[0]).stem
    command = " ".join([".venv/bin/python -m", f"benchmarks.{module}", *_without_places(sys.argv[1:])])
    short, changed = commit()
    machine, date = f"{processor()} ({platform.machine()})", f"{datetime.now(UTC):%Y-%m-%d}"
    header = {"command": command, "commit": short, "changed": changed, "machine": machine, "date": date, "load": LOAD}
    local = " with local changes" if changed else ""
    made = f"`{command}`, commit {short}{local}, {machine}, {date}, load at the start {LOAD}"
    text = with_header(header, "\n\n".join([f"# {title}", made, *parts]) + "\n")
    write_text(ROOT / "benchmarks" / f"{name}.md", text)
    print(text)


def _without_places(words: Sequence[str]) -> list[str]:
    """A command's words without options that name an absolute path, which means nothing on another machine."""

    def place(word: str) -> bool:
        return word.startswith("/") or "=/" in word

    pairs = zip(words, [*words, ""][1:], strict=True)
    return [word for word, after in pairs if not (place(word) or (word.startswith("--") and place(after)))]
