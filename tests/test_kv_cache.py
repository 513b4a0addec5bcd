"""The KV cache in a type of number: the engine's own bytes, what it costs the logits, who is refused, who is judged."""

import ctypes
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from blocks.compute import HOST
from blocks.kinds import parse_labels
from blocks.parent import Parent
from blocks.records import LayerChoice
from profiles.errors import ProfileError
from profiles.hardware import load_target
from profiles.load import load_profile
from profiles.schema import Evaluate, Hardware, Measure, Scenario, SearchSpace
from tasks.distill.record import open_parent
from tasks.engines.base import LoadOptions
from tasks.engines.llama_cpp import CACHE_TYPES, LlamaCpp, LlamaSession
from tasks.evaluate.answers import answers_path
from tasks.evaluate.compare import (
    Lineage,
    contender,
    evaluate_contender,
    evaluation_path,
    figures_of,
    parent_contender,
)
from tasks.evaluate.quality import parent_targets, sequence_figures, session_figures
from tasks.evaluate.typed_file import as_served, needs_file, with_file
from tasks.gguf.tokenizer_writer import NO_TOKENIZER
from tasks.gguf.writer import write_gguf
from tasks.inputs.space import misfits
from tasks.measure.costs import CostRequest, _cost
from tasks.measure.llama_cpp_costs import LlamaCppTimer
from tasks.measure.roofline import modelled_costs, setting_of
from tasks.measure.variant_timing import Load, Timing
from tasks.operating.champion_limits import figures_of_both, judged_texts
from tests.chain import Chain, chosen
from tests.tiny import tiny_model, tiny_parent, tiny_tokens

needs_llama_cpp = pytest.mark.skipif(LlamaCpp().missing() is not None, reason="llama.cpp is not installed")
SCENARIO = Scenario(name="chat", batch_sizes=(1, 3), prompt_tokens=8, generated_tokens=6)
HEAD = 32  # channels: a block of q8_0 and its like


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_parent(tmp_path_factory.mktemp("parent"), head_dim=HEAD)


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    model = open_parent(folder, HOST).model()
    return write_gguf(model, folder / "parent.gguf", "float32", NO_TOKENIZER, "parent")


def open_with(file: Path, kept: str, sequences: int = 1) -> LlamaSession:
    return LlamaCpp().load(file, LoadOptions(batch_size=sequences, context_tokens=64, kv_precision=kept))


@needs_llama_cpp
@pytest.mark.parametrize("kept", CACHE_TYPES)
def test_bytes_of_the_cache_are_those_of_the_engine(kept: str, folder: Path, file: Path) -> None:
    """llama.cpp's own state of a sequence grows by what the memory budget counts of a token."""
    reader = open_parent(folder)
    (attention,) = [v for v in parse_labels("attention", (), reader.config) if v.label == "parent"]
    hardware = Hardware(engine="llama.cpp", kv_precision=kept)  # type: ignore[arg-type]
    timing = Timing(prefill=1.0, decode=1.0, prefill_spread=0.0, decode_spread=0.0)
    counted = _cost(reader, attention, SCENARIO, 1, timing, hardware).kv_bytes_per_token * reader.depth
    with closing(open_with(file, kept)) as session:
        size = session.c.llama_state_seq_get_size
        size.restype, size.argtypes = ctypes.c_size_t, [ctypes.c_void_p, ctypes.c_int32]
        found = []
        for tokens in (8, 40):
            session._fresh()
            session._decode([tiny_tokens(1, tokens)[0].tolist()], 0)
            found.append(size(session.context, 0))
    assert 0 <= (found[1] - found[0]) / 32 - counted <= 16  # beside it, a position and a sequence's number


def test_what_is_left_unnamed_costs_what_it_did(folder: Path) -> None:
    reader = open_parent(folder)
    (attention,) = [v for v in parse_labels("attention", (), reader.config) if v.label == "parent"]
    timing = Timing(prefill=1.0, decode=1.0, prefill_spread=0.0, decode_spread=0.0)
    kept = {
        named: _cost(reader, attention, SCENARIO, 1, timing, Hardware.model_validate(asked)).kv_bytes_per_token
        for named, asked in (
            ("plain", {"engine": "llama.cpp", "precision": "float32"}),
            ("named", {"engine": "llama.cpp", "kv_precision": "f16"}),
            ("torch", {"engine": "torch"}),
        )
    }
    assert kept["plain"] == kept["named"] == kept["torch"] / 2 == 2 * 2 * HEAD * 2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kept", [None, *CACHE_TYPES])
def test_the_plan_counts_the_cache_that_costs_are_measured_with(kept: str | None, precision: str, folder: Path) -> None:
    reader = open_parent(folder)
    (attention,) = [v for v in parse_labels("attention", (), reader.config) if v.label == "parent"]
    hardware = Hardware.model_validate({"engine": "llama.cpp", "precision": precision, "kv_precision": kept})
    timing = Timing(prefill=1.0, decode=1.0, prefill_spread=0.0, decode_spread=0.0)
    setting = setting_of(hardware, load_target("cpu"), reader)
    table = modelled_costs(reader, SearchSpace(attention=(), ffn=()), [SCENARIO], setting)
    counted = {cost.kv_bytes_per_token for cost in table.costs if cost.subblock == "attention"}
    assert counted == {_cost(reader, attention, SCENARIO, 1, timing, hardware).kv_bytes_per_token}


@needs_llama_cpp
def test_the_key_of_costs_knows_the_cache_where_it_is_named(chain: Chain) -> None:
    def key(**more: object) -> str:
        hardware = Hardware.model_validate({"engine": "llama.cpp", **more})
        measured = {"scenarios": (SCENARIO,), "measure": Measure(), "space": SearchSpace()}
        return CostRequest(parent=chain.parent, hardware=hardware, **measured).key  # type: ignore[arg-type]

    assert key() == key(kv_precision=None) and len({key(), key(kv_precision="bf16"), key(kv_precision="q8_0")}) == 3


@needs_llama_cpp
def test_costs_are_measured_with_that_cache(folder: Path) -> None:
    load = Load(scenario=SCENARIO, batch=3)
    for asked, held in (({"kv_precision": "q8_0"}, "q8_0"), ({}, "float16")):
        hardware = Hardware.model_validate({"engine": "llama.cpp", **asked})
        how = LlamaCppTimer(open_parent(folder, HOST), [], hardware, Measure())._how(load)
        assert (how.kv_precision, how.batch_size) == (held, 3)


@needs_llama_cpp
def test_fewer_bits_are_farther_from_the_logits(folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = open_parent(folder, HOST).model(), tiny_tokens(3, 48)
    targets = parent_targets(model, tokens, HOST)
    own = sequence_figures(model, targets, tokens, HOST)
    kl = {}
    for kept in ("float32", "q8_0", "q5_1", "q4_0"):
        with closing(open_with(file, kept)) as session:
            found = session_figures(session, targets)
        assert {name: values.shape for name, values in found.items()} == {n: v.shape for n, v in own.items()}
        kl[kept] = float(found["kl"].mean())
        if kept == "float32":
            assert torch.allclose(found["loss"], own["loss"], atol=2e-3) and abs(kl[kept]) < 1e-3
            assert bool((found["top1_agreement"] > 0.95).all())
    assert kl["float32"] < kl["q8_0"] < kl["q5_1"] < kl["q4_0"]
    monkeypatch.setattr("tasks.evaluate.quality.CHUNK_TOKENS", 20)
    with closing(open_with(file, kept)) as session:
        parts = session_figures(session, targets)
    assert all(torch.allclose(parts[name], found[name], rtol=1e-5) for name in found)


@needs_llama_cpp
def test_a_batch_is_decoded_at_once_and_each_sequence_answers_as_alone(file: Path) -> None:
    """What a batch size of a scenario measures: parallel sequences in one call of the engine's own decode."""
    tokens = tiny_tokens(3, 16)
    calls: list[int] = []
    with closing(open_with(file, "q8_0", sequences=3)) as session:
        decode = session.c.llama_decode

        class Counting:
            def __getattr__(self, name: str) -> object:
                return counted if name == "llama_decode" else getattr(library, name)

        def counted(context: Any, batch: Any) -> int:
            calls.append(batch.n_tokens)
            return int(decode(context, batch))

        library, session.c = session.c, Counting()  # type: ignore[assignment]
        turn = session.request(tokens, 4)
        session._fresh()
        session._decode(tokens.tolist(), 0)
        together = [session._row((number + 1) * 16 - 1) for number in range(3)]
        session.c = library
        for number, row in enumerate(together):
            alone = session.logits(tokens[number].tolist())[-1]
            assert torch.allclose(row, alone, atol=2e-2)
    assert calls == [48, 3, 3, 3, 3, 48] and min(turn.prefill, turn.step) > 0


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"engine": "torch", "kv_precision": "q8_0"}, "torch is driven with a KV cache as its weights"),
        ({"engine": "vllm", "kv_precision": "bf16"}, "vllm is driven with a KV cache as its weights"),
        ({"engine": "roofline", "kv_precision": "q4_0"}, "roofline knows float32, bfloat16, float16, float8"),
        ({"engine": "llama.cpp", "kv_precision": "float8"}, "llama.cpp knows float32, bfloat16, float16, q8_0"),
    ],
)
def test_engines_that_cannot_hold_it_refuse(asked: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Hardware.model_validate(asked)


def test_heads_of_broken_blocks_are_refused(chain: Chain, folder: Path) -> None:
    def profile(kept: str):  # type: ignore[no-untyped-def]
        return load_profile("tiny", [f"hardware={{engine: llama.cpp, kv_precision: {kept}}}"])

    (found,) = [one for one in misfits(profile("q8_0"), chain.reader) if "kv_precision" in one]
    assert "blocks of 32 numbers, and a head of this parent has 8 channels" in found
    assert not [one for one in misfits(profile("bf16"), chain.reader) if "kv_precision" in one]
    assert not [one for one in misfits(profile("q4_0"), open_parent(folder)) if "kv_precision" in one]
    with pytest.raises(ProfileError, match="float8"):
        profile("float8")


def test_a_file_whose_weights_nobody_named_is_refused(tmp_path: Path) -> None:
    """Memory is counted in the parent's precision then, and the file would be in float32."""
    tiny_model("llama", head_dim=HEAD).to(torch.bfloat16).save_pretrained(tmp_path)
    reader = Parent(tmp_path)

    def said(asked: str) -> list[str]:
        profile = load_profile("tiny", [f"hardware={{engine: llama.cpp, {asked}}}"])
        return [one for one in misfits(profile, reader) if "kv_precision" in one]

    (found,) = said("kv_precision: q8_0")
    assert "Costs would be of float32, memory of bfloat16: name hardware.precision too" in found
    assert not said("kv_precision: q8_0, precision: bfloat16") and not said("threads: 1")


@needs_llama_cpp
def test_children_are_judged_in_llama_cpp_with_that_cache(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their file is written in the profile's precision, and the figures are the engine's."""
    plain = contender(
        "child", chosen((LayerChoice(ffn="ffn32"), LayerChoice(attention="kv1"), LayerChoice())), chain.blocks
    )
    assert not needs_file(plain)
    which = plain.model_copy(update={"cache": "bfloat16"})
    assert needs_file(which) and which.key == plain.key
    which = with_file(which, chain.parent, chain.corpus, "float32", chain.workspace)
    assert (chain.workspace / which.file).is_file() and not needs_file(which)
    settings = Evaluate(sequences=4)
    asked = ((chain.parent, chain.corpus), settings, chain.workspace, HOST)
    own, engines = (evaluate_contender(one, *asked) for one in (plain, which))
    paths = {evaluation_path(one, chain.parent, chain.corpus, settings, HOST) for one in (plain, which)}
    assert len(paths) == 2
    assert engines.quality.kl.value == pytest.approx(own.quality.kl.value, rel=0.02)
    assert engines.samples["kl"] != own.samples["kl"]

    coarse = with_file(which.model_copy(update={"file": ""}), chain.parent, chain.corpus, "bfloat16", chain.workspace)
    again = evaluate_contender(coarse, *asked)  # the same layers, and another file of them
    assert again.samples["kl"] != engines.samples["kl"]
    assert len({answers_path(one, chain.parent, settings) for one in (plain, which, coarse)}) == 3

    asked_for: list[LoadOptions] = []
    load = LlamaCpp.load

    def watched(self: LlamaCpp, path: Path, how: LoadOptions) -> LlamaSession:
        asked_for.append(how)
        return load(self, path, how)

    monkeypatch.setattr(LlamaCpp, "load", watched)
    targets = parent_targets(chain.reader.model(), torch.randint(64, (2, 16)), HOST)
    figures_of(which, targets, chain.workspace, HOST, lambda: pytest.fail("torch computed it"))
    assert asked_for[0].kv_precision == "bfloat16" and not asked_for[0].exact


@needs_llama_cpp
def test_champion_and_challenger_are_judged_with_one_cache(chain: Chain) -> None:
    """Whatever each was judged with when it was made: else one is held to the rounding of a cache, the other not."""
    child = contender("child", chosen((LayerChoice(), LayerChoice(ffn="ffn32"), LayerChoice())), chain.blocks)
    with_cache = with_file(
        child.model_copy(update={"cache": "bfloat16"}), chain.parent, chain.corpus, "float32", chain.workspace
    )
    sides = [Lineage(parent=chain.parent, corpus=chain.corpus, child=one) for one in (child, with_cache)]
    found = {}
    for named in ("bfloat16", "null"):
        profile = load_profile(
            "tiny",
            [f"hardware={{engine: llama.cpp, precision: float32, kv_precision: {named}}}", "evaluate.sequences=4"],
        )
        texts = judged_texts(profile, chain.parent, chain.corpus, (), chain.workspace)
        figures = figures_of_both(sides, texts, sides[0], profile, chain.workspace)
        own, other = (each["general"] for each in figures)
        assert torch.equal(own, other)
        found[named] = own
    assert not torch.equal(found["bfloat16"], found["null"])


def test_all_but_the_parent_are_judged_with_the_cache_that_the_profile_names() -> None:
    child = contender("child", chosen((LayerChoice(),)), [])
    named = Hardware(engine="llama.cpp", kv_precision="q8_0")
    assert as_served(child, named).cache == "q8_0" and as_served(child, Hardware(engine="llama.cpp")).cache == ""
    assert as_served(parent_contender(child.architecture), named).cache == ""
    modelled = Hardware(name="h100", engine="roofline", kv_precision="bfloat16")
    assert as_served(child, modelled).cache == ""
