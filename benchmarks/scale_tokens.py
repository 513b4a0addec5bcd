"""Disk, memory and CPU time of recording, BLD and scoring against tokens and layers; FLOPs against the peak.

    .venv/bin/python -m benchmarks.scale_tokens

A tiny parent, shards of equal size, distinct documents. Every figure is from a process of its own: the peak of its
memory, the most that lay on the disk beside parent, corpus and library, and the CPU time of the stage alone. FLOPs are
measured on SmolLM2-135M.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch

from benchmarks.common import ROOT, table, write_page
from blocks.compute import HOST, Compute
from blocks.kinds import parse_label
from blocks.parent import Parent
from blocks.records import BlockRecord, CorpusInfo, LayerChoice, LayerRecord, ParentInfo
from blocks.resources import resources
from blocks.runtime import configure_torch
from profiles.load import load_profile
from profiles.schema import GKD, Profile
from tasks.distill.bld import Job, distill, distill_shard, progress_of
from tasks.distill.gkd_job import distill_globally, job_of
from tasks.distill.gkd_targets import record_teacher
from tasks.distill.jobs import jobs_of
from tasks.distill.record import Part, Recording, StatesInUse, enter, open_parent, record_layer, recording_of
from tasks.inputs.corpus import prepare_corpus
from tasks.inputs.corpus_sources import iterate_documents
from tasks.inputs.parent import prepare_parent
from tasks.score.scoring import ScoringSet, score_sequences

LENGTH, SHARD = 64, 2048  # tokens
COMPUTE = replace(HOST, micro_batch_tokens=512)
STAGES = ("record", "bld", "score")
SCORED = 8  # sequences, where FLOPs are counted
MadeT = TypeVar("MadeT")
FEW = 2 * SHARD  # tokens of x1: more than a shard, so that states are not kept


def profile_of(stage: str, times: int, depth: int) -> Profile:
    """So many times FEW tokens go through the stage; the others get little."""
    sequences = {name: times * FEW // LENGTH if name == stage else 2 * SHARD // LENGTH for name in STAGES}
    return Profile.model_validate(
        {
            "name": "scale-tokens",
            "parent": {"kind": "tiny", "num_hidden_layers": depth, "intermediate_size": 128, "train_steps": 0},
            "corpus": {
                "sources": [{"kind": "python_stdlib", "max_files": 1000}],
                "sequence_length": LENGTH,
                "train_sequences": max(sequences["record"], sequences["bld"]),
                "validation_sequences": sequences["score"],
                "test_sequences": 8,
            },
            "search_space": {"attention": ["kv1"], "ffn": ["ffn64"]},
            "record": {
                "statistics_sequences": sequences["record"],
                "hidden_sequences": 8,
                "validation_sequences": sequences["score"] if stage == "score" else 8,
                "shard_tokens": SHARD,
            },
            "bld": {"tokens": sequences["bld"] * LENGTH, "batch_sequences": 8},
            "scoring": {"sequences": sequences["score"] if stage == "score" else 8},
            "budget": {"parameters_fraction": 0.9},
            "gkd": {"validation_sequences": 4, "batch_sequences": 4},
            "evaluate": {"sequences": 8},
        }
    )


class Place:
    """A prepared workspace, and the stages as plain loops in the order of flows/stages.py with one worker."""

    def __init__(self, profile: Profile, workspace: Path, compute: Compute) -> None:
        self.profile, self.workspace, self.compute = profile, workspace, compute
        self.parent: ParentInfo = prepare_parent(profile.parent, workspace, lambda: iterate_documents(profile.corpus))
        self.corpus: CorpusInfo = prepare_corpus(
            profile.corpus, workspace / self.parent.folder, self.parent.fingerprint, workspace
        )
        self.reader: Parent = open_parent(workspace / self.parent.folder, compute)
        self.recording: Recording = recording_of(profile, self.parent, self.corpus, compute)

    def record(self) -> list[LayerRecord]:
        """The first pass."""
        records: dict[int, LayerRecord] = {}
        for number in range(len(self.recording.counted)):
            for layer in range(self.reader.depth):
                records[layer] = record_layer(layer, self.recording, self.workspace, self.compute, number)
        return list(records.values())

    def jobs(self, records: Sequence[LayerRecord]) -> list[Job]:
        """The search space in all layers."""
        return jobs_of(self.profile, self.recording, records, self.reader)

    def bld(self, jobs: Sequence[Job]) -> None:
        """Variants shard by shard, and in each shard layer by layer; those that are done are left out."""
        with StatesInUse(self.recording, self.workspace) as states:
            for number, shard in enumerate(self.recording.shards):
                behind = [job for job in jobs if progress_of(job, number, self.workspace) is None]
                for layer in sorted({job.layer for job in behind}):
                    states.take([layer])
                    enter([layer], Part(shard=shard), self.recording, self.workspace, self.compute)
                    states.keep_only([layer])
                    for job in behind:
                        if job.layer == layer:
                            distill_shard(job, self.workspace, self.compute, number)
                states.keep_only([])

    def score(self, records: list[LayerRecord], blocks: list[BlockRecord]) -> None:
        """The blocks on all sequences, shard by shard."""
        count = self.profile.scoring.sequences
        scored = ScoringSet(corpus=self.corpus, last=records[-1], count=count, length=self.corpus.sequence_length)
        for shard in scored.shards(self.profile.record.shard_tokens):
            for layer, record in enumerate(records):
                work = [(block, shard.sequences) for block in blocks if block.layer == layer]
                score_sequences(work, record, shard, self.parent, self.workspace, self.compute)


@contextmanager
def measured(found: dict[str, float], workspace: Path) -> Iterator[None]:
    """CPU-seconds, and the most bytes on the disk: of states, and of variants between two shards."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            for name, pattern in (("states", "record/*/entering/*"), ("variants", "distill/*")):
                with suppress(FileNotFoundError):  # the stage takes files away: look again
                    sizes = [path.stat().st_size for path in workspace.glob(pattern)]
                    found[name] = max(found.get(name, 0), sum(sizes))

    watching, cpu = threading.Thread(target=watch), time.process_time()
    watching.start()
    yield
    found |= {"cpu": time.process_time() - cpu, "states": found.get("states", 0), "variants": found.get("variants", 0)}
    over.set()
    watching.join()


def one(stage: str, times: int, depth: int, workspace: Path) -> dict[str, float]:
    """One stage in this process."""
    place = Place(profile_of(stage, times, depth), workspace, COMPUTE)
    found: dict[str, float] = {"tokens": times * FEW}
    if stage == "record":
        with measured(found, workspace):
            place.record()
    elif stage == "bld":
        records = place.record()
        with measured(found, workspace):
            place.bld(place.jobs(records))
    else:
        records = place.record()
        jobs = place.jobs(records)
        closed = [job.model_copy(update={"settings": job.settings.model_copy(update={"steps": 0})}) for job in jobs]
        blocks = [distill(job, workspace, COMPUTE) for job in closed]
        with measured(found, workspace):
            place.score(records, blocks)
    found["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def in_a_process(*words: str) -> dict[str, float]:
    """Another run of this file."""
    with tempfile.TemporaryDirectory(prefix="puzzle-scale-") as folder:
        command = [sys.executable, "-m", "benchmarks.scale_tokens", *words, "--workspace", folder]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, check=True
        )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak_flops() -> float:
    """FLOPs per CPU-second of a large square product, the best of five."""
    side, best = 2048, 0.0
    one = torch.randn(side, side)
    for _ in range(5):
        cpu = time.process_time()
        one @ one
        best = max(best, 2 * side**3 / (time.process_time() - cpu))
    return best


LAYERS = range(2)  # of SmolLM2 that are recorded, trained and scored
NARROW = LayerChoice(attention="kv1", ffn="ffn768")
HEAVY = GKD(steps=8, batch_sequences=4, evaluate_every=8, validation_sequences=4, learning_rate=1e-4)


@dataclass(frozen=True, kw_only=True)
class Counted:
    """FLOPs that SmolLM2 needs in its stages, nothing computed twice, over what the peak gives in the same CPU time."""

    place: Place
    workspace: Path
    peak: float

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.place.corpus.sequence_length

    @property
    def head(self) -> int:
        """FLOPs of the logits of a token."""
        return 2 * self.place.reader.config.vocab_size * self.place.reader.config.hidden_size

    def layer(self, choice: LayerChoice) -> int:
        """FLOPs of a token in a layer, forward."""
        return self.subblock("attention", choice.attention) + self.subblock("ffn", choice.ffn)

    def subblock(self, subblock: Any, label: str) -> int:
        """The same of a subblock."""
        variant = parse_label(subblock, label, self.place.reader.config)
        return resources(self.place.reader, variant, self.length // 2, 4).flops_per_token

    def share(self, work: Callable[[], MadeT], needed: float) -> tuple[float, MadeT]:
        """What was reached of the peak, and what was made."""
        cpu = time.process_time()
        made = work()
        return needed / (time.process_time() - cpu) / self.peak, made

    def record(self) -> tuple[float, list[LayerRecord]]:
        """Forward and Gram matrices; without the order of channels, whose inverse is no product of the model's."""
        config, settings = self.place.reader.config, self.place.profile.record
        gram = 2 * (4 * config.hidden_size**2 + config.intermediate_size**2)
        counted = settings.statistics_sequences * self.length
        through = counted + settings.validation_sequences * self.length
        needed = len(LAYERS) * (through * self.layer(LayerChoice()) + counted * gram)
        with mock.patch(
            "tasks.distill.record.elimination_order", lambda gram, down, ridge, chunk: torch.arange(len(gram))
        ):
            recording = self.place.recording
            return self.share(lambda: [record_layer(i, recording, self.workspace, HOST) for i in LAYERS], needed)

    def bld(self, records: Sequence[LayerRecord]) -> tuple[float, list[BlockRecord]]:
        """The layer's own forward; three forwards a step and three times the held-out loss."""
        jobs = [job for job in self.place.jobs(records) if job.layer in LAYERS]
        bld, settings = self.place.profile.bld, self.place.profile.record
        tokens = 3 * (bld.steps * bld.batch_sequences + settings.validation_sequences) * self.length
        held = (settings.hidden_sequences + settings.validation_sequences) * self.length
        needed = len(LAYERS) * held * self.layer(LayerChoice())
        needed += tokens * sum(self.subblock(job.subblock, job.variant) for job in jobs)
        return self.share(lambda: [distill(job, self.workspace, HOST) for job in jobs], needed)

    def score(self, records: Sequence[LayerRecord], blocks: Sequence[BlockRecord]) -> float:
        """Every variant through the layers behind its own and the head; the parent through all, with its moment."""
        depth, whole = self.place.reader.depth, self.layer(LayerChoice())
        scored = ScoringSet(
            corpus=self.place.corpus, last=replace_boundary(records[-1]), count=SCORED, length=self.length
        )
        suffix = sum(depth - block.layer for block in blocks) * whole + len(blocks) * self.head
        needed = SCORED * self.length * (suffix + (depth + sum(LAYERS)) * whole + 2 * self.head)

        def work() -> None:
            for layer in LAYERS:
                mine = [(block, tuple(range(SCORED))) for block in blocks if block.layer == layer]
                own = replace_boundary(records[layer])
                score_sequences(mine, own, scored, self.place.parent, self.workspace, HOST)

        return self.share(work, needed)[0]

    def gkd(self, blocks: Sequence[BlockRecord]) -> float:
        """Three forwards of the layers and two of the head, which is frozen, a step; validation before and after."""
        others = self.place.reader.depth - len(LAYERS)
        teacher = record_teacher(self.place.parent, self.place.corpus, HEAVY, self.workspace, HOST)
        job = job_of([NARROW] * len(LAYERS) + [LayerChoice()] * others, blocks, teacher, HEAVY, HOST)
        child = others * self.layer(LayerChoice()) + len(LAYERS) * self.layer(NARROW)
        trained, watched = HEAVY.steps * HEAVY.batch_sequences, 2 * HEAVY.validation_sequences
        needed = self.length * (trained * (3 * child + 2 * self.head) + watched * (child + self.head))
        return self.share(lambda: distill_globally(job, self.workspace, HOST), needed)[0]


def utilisation(workspace: Path) -> dict[str, float]:
    """The share of the peak that each stage reaches."""
    short = ["corpus.train_sequences=72", "record.statistics_sequences=64", "record.hidden_sequences=32"]
    spaces = ["search_space.attention=[kv1]", "search_space.ffn=[ffn768]", "bld.steps=12", "bld.closed_form=false"]
    place = Place(load_profile("smollm2-cpu", [*short, *spaces, "scoring.tokens_per_sequence=256"]), workspace, HOST)
    counted = Counted(place=place, workspace=workspace, peak=peak_flops())
    record, records = counted.record()
    records += [records[-1].model_copy(update={"layer": i}) for i in range(len(LAYERS), place.reader.depth)]
    bld, blocks = counted.bld(records)
    score, gkd = counted.score(records, blocks), counted.gkd(blocks)
    return {"peak": counted.peak, "record": record, "bld": bld, "score": score, "GKD": gkd}


def replace_boundary(record: LayerRecord) -> LayerRecord:
    """A record without states, so that they are computed from the tokens."""
    return record.model_copy(update={"boundary": None})


def row(stage: str, times: int, depth: int, found: dict[str, float]) -> list[str]:
    """A line of the table; a variant of layer i runs through the layers behind it, and the parent through all."""
    layers = depth if stage != "score" else (2 * depth * (depth + 1) / 2 + 2 * depth)
    each = found["cpu"] / found["tokens"] / layers
    disk = [f"{found[name] / 2**20:.2f}" for name in ("states", "variants")]
    figures = [*disk, f"{found['rss'] / 2**20:.0f}", f"{1e6 * each:.2f}"]
    return [stage, str(depth), f"x{times}", f"{found['tokens']:,.0f}", *figures]


def main() -> None:
    """Every stage at every size, then the FLOPs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3, metavar=("STAGE", "TIMES", "DEPTH"), help="in this process")
    parser.add_argument("--flops", action="store_true", help="the FLOPs in this process")
    parser.add_argument("--workspace", type=Path)
    parser.add_argument("--whole", action="store_true", help="x64 at 60 layers too, which takes most of an hour")
    options = parser.parse_args()
    configure_torch(1)
    if options.one or options.flops:
        stage, *sizes = options.one or ("", "0", "0")
        times, depth = map(int, sizes)
        place = options.workspace
        print(json.dumps(utilisation(place) if options.flops else one(stage, times, depth, place)))
        return
    rows = []
    for stage in STAGES:
        for depth, times in ((15, 1), (15, 8), (15, 64), (60, 1), (60, 8), *([(60, 64)] if options.whole else [])):
            rows.append(row(stage, times, depth, in_a_process("--one", stage, str(times), str(depth))))
            print(rows[-1], flush=True)
    found = in_a_process("--flops")
    shares = ", ".join(f"{stage} {100 * found[stage]:.0f} %" for stage in (*STAGES, "GKD"))
    write_page(
        "scale_tokens",
        "Tokens and layers: disk, memory, time",
        [
            f"A tiny parent (width 64), sequences of {LENGTH} tokens, shards of {SHARD:,}, two variants a layer, one "
            "thread. *States*: the most that lay on the disk of hidden states; *variants*: the same of what waits for "
            "the next shard, which is weights and AdamW's moments of every variant, and so grows with the layers as "
            "the library does; *memory*: the peak of the process, libraries included; *CPU*: microseconds per token "
            "and layer that it runs through (scoring: every variant runs through the layers behind its own).",
            table(["stage", "layers", "", "tokens", "states, MiB", "variants, MiB", "memory, MiB", "CPU, µs"], rows),
            f"FLOPs that SmolLM2-135M needs in its stage, over what a product of 2,048 x 2,048 x 2,048 gives in the "
            f"same CPU time in float32 ({found['peak'] / 1e9:.0f} GFLOP/s on one thread): {shares}. Of GKD the "
            "head's products count twice a step: it is frozen, so that its weight has no gradient.",
        ],
    )


if __name__ == "__main__":
    main()
