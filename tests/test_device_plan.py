"""What a plan says of devices: FLOPs are those that torch counts, bytes those that the stages hold, no room is told."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode, addmm_flop
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from blocks.compute import HOST
from blocks.library import read_tensors
from blocks.records import SUBBLOCKS
from profiles.load import load_profile
from profiles.schema import GKD
from tasks.distill import bld, record
from tasks.distill.gkd_job import distill_globally, job_of
from tasks.distill.gkd_targets import record_teacher
from tasks.planning import effort, memory
from tasks.planning.effort import Shape, shape_of
from tasks.planning.plan import config_parent, machine_rates, plan_of
from tasks.score.scoring import score_sequences
from tests.chain import SETTINGS, Chain, prepare, recording
from tests.test_gkd import CHILD
from tests.test_nvlabs import puzzle
from tests.test_plan import chain_profile

EAGER = replace(HOST, attention="eager")  # scores as products, of which a backward pass has twice as many


def not_counted(function: Any) -> Any:
    """The function, unseen by the counter."""

    def run(*arguments: Any, **named: Any) -> Any:
        with _disable_current_modes():
            return function(*arguments, **named)

    return run


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """FLOPs of products, also of those in place and with packed weights; not of the rotary table."""

    def packed(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * int(torch.Size(x).numel()) * int(out_shape[-1])

    more = {torch.ops.aten.addmm_: addmm_flop, torch.ops.mkldnn._linear_pointwise: packed}
    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False, custom_mapping=more) as counter:
        patch.setattr(LlamaRotaryEmbedding, "forward", not_counted(LlamaRotaryEmbedding.forward))
        yield counter


@pytest.fixture
def shape(chain: Chain) -> Shape:
    return shape_of(chain_profile(), chain.reader)


def products(work: effort.Work) -> float:
    """Planned FLOPs without the solves in float64."""
    return work.product + work.packed


def test_flops_of_recording(shape: Shape, tmp_path: Path) -> None:
    parent, corpus = prepare(tmp_path)
    with counted() as counter, pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "elimination_order", not_counted(record.elimination_order))
        for layer in range(shape.depth):
            record.record_layer(layer, recording(parent, corpus), tmp_path, EAGER)
    assert counter.get_total_flops() == products(effort.record_work(shape))


@pytest.mark.parametrize("closed_form", [True, False])
def test_flops_of_distilling(shape: Shape, chain: Chain, closed_form: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effort, "ATTEMPTS", 1)
    for part in SUBBLOCKS:
        for variant in shape.variants[part][1:]:
            settings = SETTINGS.model_copy(update={"closed_form": closed_form, "ridge": 3e-3})  # a block of its own
            job = chain.job(1, part, variant.label, settings)
            bld.layer_data(job, job.recording.shards[0], chain.workspace, EAGER)  # once for all variants
            profile = chain_profile(bld=settings)
            with counted() as counter:
                block = bld.distill(job, chain.workspace, EAGER)
            assert block.attempts <= 1
            assert counter.get_total_flops() == products(effort.variant_work(replace(shape, profile=profile), variant))


def test_flops_of_scoring(shape: Shape, chain: Chain) -> None:
    scored = replace(chain.scored, count=5)
    with counted() as counter:
        for layer, there in enumerate(chain.records):
            fresh = [
                block.model_copy(update={"key": f"{block.key}x"}) for block in chain.blocks if block.layer == layer
            ]
            work = [(block, scored.sequences) for block in fresh]
            score_sequences(work, there, scored, chain.parent, chain.workspace, EAGER)
    profile = chain_profile(scoring={"sequences": 5})
    planned = effort.score_work(replace(shape, profile=profile), range(shape.depth))
    assert counter.get_total_flops() == products(planned)


@pytest.mark.parametrize("recorded_gib", [8.0, 0.0])
def test_flops_of_gkd(shape: Shape, chain: Chain, recorded_gib: float) -> None:
    settings = GKD(
        steps=4,
        batch_sequences=4,
        learning_rate=1e-3,
        evaluate_every=2,
        validation_sequences=5,
        recorded_gib=recorded_gib,
    )
    shutil.rmtree(chain.workspace / "gkd", ignore_errors=True)
    own = replace(shape, profile=chain_profile(gkd=settings))
    with counted() as counter:
        teacher = record_teacher(chain.parent, chain.corpus, settings, chain.workspace, EAGER)
    assert counter.get_total_flops() == products(effort.teacher_work(own))
    job = job_of(CHILD, chain.blocks, teacher, settings, EAGER)
    with counted() as counter:
        result = distill_globally(job, chain.workspace, EAGER)
    sizes = {(part, v.label): (own.flops(v), own.parameters(v)) for part in SUBBLOCKS for v in own.variants[part]}
    chosen = [sizes[part, getattr(choice, part)] for choice in CHILD for part in SUBBLOCKS]
    layers, parameters = sum(flops for flops, _ in chosen) / own.layer(), sum(size for _, size in chosen)
    share = parameters / own.depth / own.layer_parameters
    assert counter.get_total_flops() == pytest.approx(products(effort.gkd_work(own, share, layers)), rel=1e-12)
    assert result.held_bytes == (round(memory.trained_in_gkd(own, share)),)
