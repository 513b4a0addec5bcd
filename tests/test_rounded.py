"""GKD that knows the rounding: grids against gguf's own reading, the start against the correction, what it gains."""

from typing import Any

import gguf
import pytest
import torch

from blocks.compute import HOST
from blocks.library import read_rows, read_tensors
from profiles.errors import ProfileError
from profiles.load import load_profile
from profiles.schema import GKD
from tasks.distill.gkd_student import Student
from tasks.distill.gkd_targets import record_teacher
from tasks.distill.record import open_parent
from tasks.distill.rounded import RoundedTraining
from tasks.engines.ggml import GgmlRounding
from tasks.engines.llama_cpp import LlamaCpp
from tasks.export.quantise import Recipe, quantise_layers
from tasks.gguf.grids import BITS, Grid
from tasks.measure.llama_cpp_costs import rounded_noise
from tests.chain import Chain

needs_llama_cpp = pytest.mark.skipif(LlamaCpp().missing() is not None, reason="llama.cpp is not installed")
SETTINGS: dict[str, Any] = {
    "steps": 12,
    "batch_sequences": 4,
    "learning_rate": 1e-3,
    "rounded_learning_rate": 1e-3,
    "cosine_every": 1,
    "evaluate_every": 4,
    "validation_sequences": 5,
    "rounded_steps": 12,
}


def dequantised(rows: torch.Tensor, kind: Any) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(rows.numpy(), kind).copy())


@needs_llama_cpp
@pytest.mark.parametrize("kind", BITS, ids=lambda kind: kind.name)
def test_a_grid_holds_what_gguf_reads(kind: Any) -> None:
    """ggml's bytes: their numbers are codes of the grid, packed again they are the same; any codes are read as said."""
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 96, generator=draw)
    matrix[0, :32] = 0.0
    rows = torch.from_numpy(GgmlRounding(kind=kind)(matrix, None)[0])
    grid, values = Grid.of(kind, rows), dequantised(rows, kind)
    assert torch.equal(grid.values(grid.nearest(values)), values)
    codes = torch.randint(2 ** BITS[kind], (6, 3, 32), generator=draw, dtype=torch.uint8)
    assert torch.equal(dequantised(grid.packed(codes), kind), grid.values(codes))
    near = grid.values(grid.nearest(matrix))
    for other in range(2 ** BITS[kind]):
        away = grid.values(torch.full_like(codes, other))
        assert ((near - matrix).abs() <= (away - matrix).abs() + 1e-6).all()


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["iq4_nl", "q4_0"])
def test_it_starts_from_the_correction_and_ends_nearer_to_the_parent(kind: str, chain: Chain) -> None:
    settings = GKD(**SETTINGS)
    teacher = record_teacher(chain.parent, chain.corpus, settings, chain.workspace, HOST)
    model = open_parent(chain.workspace / chain.parent.folder, HOST).model()
    tokens = read_rows(chain.workspace, chain.corpus.tokens, "train", 0, 16).long()
    recipe = Recipe(layers=((kind, kind), ("", "q8_0"), ("q8_0", kind)))
    before = quantise_layers(model, tokens, recipe)
    corrected = {name: parameter.clone() for name, parameter in model.named_parameters()}
    start = chain.training(model, teacher, settings.model_copy(update={"steps": 0}), "start").validation_kl()

    training = RoundedTraining(teacher=teacher, settings=settings, workspace=chain.workspace, compute=HOST)
    held = training.run(model, before, f"test-{kind}")
    result = training.result(f"test-{kind}")
    assert result is not None and result.curve[0][1] == pytest.approx(start, rel=1e-5)
    assert result.best_kl < 0.8 * start and result.best_step > 0
    trained = read_tensors(chain.workspace, result.weights)
    for name, stored in held.items():
        weight = model.get_parameter(name)
        torch.testing.assert_close(dequantised(stored.rows, stored.kind), weight.detach(), rtol=0, atol=0)
        if before[name].before is None:  # trained in float, and in q8_0 again: half a step off at most
            plain = trained[name.removeprefix("model.layers.")]
            lost = (weight.detach() - plain).abs().reshape(-1, 32)
            assert (lost <= plain.reshape(-1, 32).abs().amax(1, keepdim=True) * (0.5 / 127 + 2**-11)).all()
            weight.data.copy_(plain)  # for what follows, as it was trained
    after = chain.training(model, teacher, settings.model_copy(update={"steps": 0}), "after").validation_kl()
    assert after == pytest.approx(result.best_kl, rel=1e-5)
    assert not torch.equal(model.get_parameter("model.layers.0.mlp.up_proj.weight"), corrected[
        "model.layers.0.mlp.up_proj.weight"
    ])  # fmt: skip

    again = open_parent(chain.workspace / chain.parent.folder, HOST).model()
    second = training.run(again, quantise_layers(again, tokens, recipe), f"test-{kind}")
    assert all(torch.equal(second[name].rows, held[name].rows) for name in held)  # read, not trained again
    assert isinstance(Student(again, settings, HOST), Student)


@needs_llama_cpp
def test_the_parent_runs_beside_it_where_its_targets_are_not_recorded(chain: Chain) -> None:
    tokens, made = read_rows(chain.workspace, chain.corpus.tokens, "train", 0, 16).long(), []
    for gib in (1.0, 0.0):
        settings = GKD(**SETTINGS | {"rounded_steps": 2, "recorded_gib": gib})
        teacher = record_teacher(chain.parent, chain.corpus, settings, chain.workspace, HOST)
        assert bool(teacher.steps) == bool(gib)
        model = open_parent(chain.workspace / chain.parent.folder, HOST).model()
        before = quantise_layers(model, tokens, Recipe(layers=(("q4_0", "q4_0"),) * 3))
        training = RoundedTraining(teacher=teacher, settings=settings, workspace=chain.workspace, compute=HOST)
        training.run(model, before, f"beside-{gib}")
        result = training.result(f"beside-{gib}")
        assert result is not None and len(result.losses) == 2
        made.append(result.weights.sha256)
    assert made[0] == made[1]


def test_a_training_of_what_is_not_rounded_is_refused() -> None:
    with pytest.raises(ProfileError, match="gkd.rounded_steps"):
        load_profile("tiny", ["gkd.rounded_steps=8"])
    typed = ["hardware.engine=llama.cpp", "hardware.precision=bfloat16", "search_space.precision=[iq4_nl]"]
    assert load_profile("tiny", [*typed, "gkd.rounded_steps=8"]).gkd.rounded_steps == 8
    with pytest.raises(ProfileError, match="at most gkd.steps"):
        load_profile("tiny", [*typed, "gkd.rounded_steps=80"])


@needs_llama_cpp
def test_what_is_timed_has_the_types_and_shapes_of_what_is_served(chain: Chain) -> None:
    recipe = Recipe(layers=(("iq4_nl", "q8_0"), ("", "q4_0"), ("q8_0", ""))).with_head("iq4_nl")
    tokens = read_rows(chain.workspace, chain.corpus.tokens, "train", 0, 4).long()
    stored, timed = (
        make(open_parent(chain.workspace / chain.parent.folder, HOST).model())
        for make in (lambda model: quantise_layers(model, tokens, recipe), lambda model: rounded_noise(model, recipe))
    )
    tied = set(timed) - set(stored)  # embedding and head of a tied model are one matrix with two names
    assert tied <= {"lm_head.weight"} and set(stored) <= set(timed)
    for name, one in stored.items():
        assert (one.kind, one.rows.shape, one.rows.dtype) == (
            timed[name].kind,
            timed[name].rows.shape,
            timed[name].rows.dtype,
        )
