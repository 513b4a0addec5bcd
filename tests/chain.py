"""A tiny chain for tests: parent, corpus, recording, distilled blocks, scores; made once per session."""

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from blocks.compute import HOST
from blocks.export_code.modeling_decilm import DeciLMForCausalLM
from blocks.parent import Parent
from blocks.records import (
    Architecture,
    BlockRecord,
    CorpusInfo,
    LayerChoice,
    LayerRecord,
    ParentInfo,
    Score,
    Subblock,
    Totals,
)
from profiles.schema import BLD, GKD, Corpus, PythonStdlibSource, Record, SearchSpace, TinyParent
from tasks.distill.bld import Job, distill
from tasks.distill.gkd import Training
from tasks.distill.gkd_student import Student
from tasks.distill.gkd_targets import TeacherRecord
from tasks.distill.record import Recording, open_parent, record_layer
from tasks.inputs.corpus import prepare_corpus
from tasks.inputs.corpus_sources import iterate_documents
from tasks.inputs.parent import prepare_parent
from tasks.score.scoring import ScoringSet, score_sequences

SPACE = SearchSpace(attention=("kv1", "linear", "no_op"), ffn=("ffn32", "linear", "no_op"))
CORPUS = Corpus(
    sources=(PythonStdlibSource(kind="python_stdlib", max_files=40),),
    sequence_length=32,
    train_sequences=48,
    validation_sequences=8,
    test_sequences=8,
)
RECORD = Record(statistics_sequences=32, hidden_sequences=16, validation_sequences=6)
SETTINGS = BLD(steps=6, batch_sequences=4, learning_rate=2e-3)


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Everything up to the scores."""

    workspace: Path
    parent: ParentInfo
    corpus: CorpusInfo
    reader: Parent
    records: list[LayerRecord]
    blocks: list[BlockRecord]
    scores: list[Score]

    @property
    def scored(self) -> ScoringSet:
        """The validation tokens that are scored."""
        return ScoringSet(corpus=self.corpus, last=self.records[-1], count=6, length=32)

    def training(self, model: DeciLMForCausalLM, record: TeacherRecord, settings: GKD, name: str) -> Training:
        """GKD of any model, in place; it leaves the model at its best weights."""
        return Training(
            student=Student(model, settings, HOST),
            record=record,
            settings=settings,
            workspace=self.workspace,
            folder=f"gkd/{name}",
            compute=HOST,
        )

    def job(self, layer: int, subblock: Subblock, variant: str, settings: BLD = SETTINGS) -> Job:
        """One distillation of this chain."""
        return Job(
            recording=recording(self.parent, self.corpus),
            record=self.records[layer],
            layer=layer,
            subblock=subblock,
            variant=variant,
            settings=settings,
            seed=0,
        )


def recording(parent: ParentInfo, corpus: CorpusInfo, settings: Record = RECORD, trained: int = 16) -> Recording:
    """What is recorded of the tiny parent."""
    return Recording(parent=parent, corpus=corpus, settings=settings, ridge=SETTINGS.ridge, trained=trained)


def prepare(workspace: Path, family: str = "llama", train_steps: int = 40) -> tuple[ParentInfo, CorpusInfo]:
    """A briefly trained tiny parent and its corpus: made once per process, then copied."""
    made, parent, corpus = _prepared(family, train_steps)
    shutil.copytree(made, workspace, dirs_exist_ok=True)
    return parent, corpus


@cache
def _prepared(family: str, train_steps: int) -> tuple[Path, ParentInfo, CorpusInfo]:
    workspace = Path(tempfile.mkdtemp(prefix="puzzle-test-parent-"))
    atexit.register(shutil.rmtree, workspace, ignore_errors=True)
    source = TinyParent(
        family=family,  # type: ignore[arg-type]
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        train_steps=train_steps,
    )
    parent = prepare_parent(source, workspace, lambda: iterate_documents(CORPUS))
    return workspace, parent, prepare_corpus(CORPUS, workspace / parent.folder, parent.fingerprint, workspace)


def make_chain(workspace: Path) -> Chain:
    """Record, distil and score the whole space of the tiny parent."""
    parent, corpus = prepare(workspace)
    reader = open_parent(workspace / parent.folder, HOST)
    records = [record_layer(i, recording(parent, corpus), workspace, HOST) for i in range(reader.depth)]
    chain = Chain(
        workspace=workspace, parent=parent, corpus=corpus, reader=reader, records=records, blocks=[], scores=[]
    )
    for layer in range(reader.depth):
        members = []
        for subblock, labels in (("attention", SPACE.attention), ("ffn", SPACE.ffn)):
            members += [distill(chain.job(layer, subblock, label), workspace, HOST) for label in labels]  # type: ignore[arg-type]
        chain.blocks.extend(members)
        work = [(member, tuple(range(6))) for member in members]
        chain.scores.extend(score_sequences(work, records[layer], chain.scored, parent, workspace, HOST))
    return chain


def chosen(layers: tuple[LayerChoice, ...], score: float = 0) -> Architecture:
    """A choice at one scenario, its totals all ones."""
    totals = Totals(
        scenario="chat",
        batch_size=1,
        prefill_seconds=1,
        decode_seconds_per_token=1,
        runtime_seconds=1,
        tokens_per_second=1,
        memory_bytes=1,
        parameters=1,
    )
    return Architecture(
        method="mip",
        layers=layers,
        score=score,
        score_se=0,
        totals=(totals,),
        parent_totals=(totals,),
        status="optimal",
        bound=0,
        gap=0,
    )
