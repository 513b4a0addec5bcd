"""Types of number as a second axis: labels, the MIP against all combinations, scores from products, one mixed file."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from blocks.compute import HOST
from blocks.error_correction import InputGrams
from blocks.library import digest_of, read_tensors
from blocks.records import BlockRecord, Cost, CostTable, LayerChoice, Metric, NonBlockCost, Score
from blocks.typed_labels import bare, type_in, typed
from profiles.load import load_profile
from profiles.schema import Budget, Profile, Scenario
from tasks.engines.llama_cpp import LlamaCpp
from tasks.evaluate import typed_file
from tasks.evaluate.compare import contender, served
from tasks.evaluate.typed_file import hand_over, with_file
from tasks.export.logits_check import compare_logits
from tasks.export.quantise import divergences, log_probabilities, round_linear
from tasks.gguf.reader import read_gguf
from tasks.inputs.space import misfits
from tasks.measure.typed_costs import TypeRatio, joined
from tasks.measure.variant_timing import Load
from tasks.score.rounding import in_type
from tasks.score.scoring import score_sequences
from tasks.score.typed_scores import WholeScore, fine_types, parents_in_types, scores_in_types, to_measure
from tasks.search.choose import choose
from tasks.search.one_type import back, in_one_type
from tasks.search.totals import Problem, broken_limits, make_problem, predicted
from tasks.studies.peers import find
from tests.chain import Chain, chosen

needs_llama_cpp = pytest.mark.skipif(LlamaCpp().missing() is not None, reason="llama.cpp is not installed")
CHAT = Scenario(name="chat", batch_sizes=(1,), prompt_tokens=8, generated_tokens=4)
TYPES = ("q8_0", "iq4_nl")
LABELS = {"attention": ("parent", "kv1", "no_op"), "ffn": ("parent", "ffn32", "no_op")}
TYPED = ["engine: llama.cpp", "precision: bfloat16"]


def profile_with(*more: str) -> Profile:
    return load_profile(Path("profiles/tiny.yaml"), [f"hardware={{{', '.join(TYPED)}}}", *more])


def test_labels_come_back() -> None:
    for label, kind in itertools.product(("parent", "kv1", "ffn768", "linear"), ("", *TYPES)):
        assert (bare(typed(label, kind)), type_in(typed(label, kind))) == (label, kind)
    assert typed("no_op", "q8_0") == "no_op" and typed("kv1@q8_0", "iq4_nl") == "kv1@iq4_nl"
    choice = LayerChoice(attention="kv1@q8_0", ffn="no_op")
    assert choice.bare == LayerChoice(attention="kv1", ffn="no_op")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["hardware={engine: torch}"], "set hardware.engine: llama.cpp"),
        (["hardware={engine: llama.cpp}"], "name another one there"),
        (["search_space.head=[q5_0]"], "name it in precision too"),
        (["bld.coupled=true", "bld.coupled_attention=[kv1]", "bld.coupled_ffn=[ffn96]"], "neither with bld.coupled"),
        (["search_space.precision=[q4_k]"], "q8_0"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_sentence(more: list[str], said: str) -> None:
    with pytest.raises(Exception, match=said):
        profile_with("search_space.precision=[q8_0, iq4_nl]", *more)


def test_rows_of_broken_blocks_are_refused(chain: Chain) -> None:
    wide = profile_with("search_space.precision=[iq4_nl]", "search_space.ffn=[ffn32, ffn48]")
    found = misfits(wide, chain.reader)
    assert len(found) == 1 and "ffn ffn48 of this parent" in found[0]
    assert not misfits(profile_with("search_space.ffn=[ffn32, ffn48]"), chain.reader)


def score(layer: int, subblock: str, variant: str, *kl: float) -> Score:
    return Score(
        layer=layer,
        subblock=subblock,  # type: ignore[arg-type]
        variant=variant,
        tokens=8,
        kl_per_sequence=kl,
        lm_loss_per_sequence=(0.0,) * len(kl),
        kl=sum(kl) / len(kl),
        lm_loss=0.0,
        kl_se=0.0,
        lm_loss_se=0.0,
    )


def problem_with(speedup: float, layers: int = 2) -> Problem:
    """Every variant in every type, with random scores and costs; the head too."""
    draw = torch.Generator().manual_seed(3)

    def number(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=draw))

    names = {part: dict.fromkeys(typed(v, t) for t in ("", *TYPES) for v in own) for part, own in LABELS.items()}
    scores, costs = [], []
    for part, labels in names.items():
        for label in labels:
            seconds = 0.0 if label == "no_op" else number(0.5, 2.0)
            costs.append(cost(part, label, seconds))
            for layer in range(layers):
                if label != "parent":
                    scores.append(score(layer, part, label, number(0.01, 1), number(0.01, 1)))
    scores += [score(0, "head", f"head@{kind}", number(0.01, 0.5), number(0.01, 0.5)) for kind in TYPES]
    table = CostTable(
        hardware={},
        costs=tuple(costs),
        non_block=tuple(outside(kind, number(1.0, 3.0)) for kind in ("", *TYPES)),
        num_hidden_layers=layers,
        measured_at="2026-01-01T00:00:00+00:00",
    )
    return make_problem(scores, table, Budget(speedup=speedup), [CHAT])


def cost(subblock: str, variant: str, seconds: float, parameters: int = 100) -> Cost:
    return Cost(
        subblock=subblock,  # type: ignore[arg-type]
        variant=variant,
        scenario="chat",
        batch_size=1,
        prefill_seconds=seconds,
        decode_seconds_per_token=seconds / 10,
        prefill_spread=0.0,
        decode_spread=0.0,
        parameters=parameters,
        weight_bytes=parameters,
        kv_bytes_per_token=0,
    )


def outside(head: str, seconds: float) -> NonBlockCost:
    return NonBlockCost(
        scenario="chat",
        batch_size=1,
        prefill_seconds=seconds,
        decode_seconds_per_token=seconds / 10,
        parameters=50,
        weight_bytes=50,
        head=head,
    )


def quarter(layers: int = 1) -> CostTable:
    """Costs of an FFN and of one with a quarter of its parameters."""
    return CostTable(
        hardware={},
        costs=(cost("ffn", "parent", 1.0, 200), cost("ffn", "ffn32", 0.5, 50)),
        non_block=(outside("", 1.0),),
        num_hidden_layers=layers,
        measured_at="2026-01-01T00:00:00+00:00",
    )


def everything(problem: Problem) -> list[tuple[float, Sequence[LayerChoice], str]]:
    """Score, layers and head of every architecture within the budget, by trying all."""
    options = {part: dict.fromkeys(["parent", *problem.score_table[0, part]]) for part in ("attention", "ffn")}
    pairs = [LayerChoice(attention=a, ffn=f) for a in options["attention"] for f in options["ffn"]]
    found: list[tuple[float, Sequence[LayerChoice], str]] = []
    for layers in itertools.product(pairs, repeat=problem.costs.num_hidden_layers):
        for head in problem.heads:
            if not broken_limits(problem, layers, (1,), head):
                found.append((predicted(problem, layers, "all", (1,), head).score, layers, head))
    return found


@pytest.mark.parametrize("speedup", [1.05, 1.6])
def test_the_mip_finds_the_best_of_all_types_and_heads(speedup: float) -> None:
    problem = problem_with(speedup, layers=1)
    best = min(everything(problem), key=lambda one: one[0])
    architecture = choose(problem)
    assert math.isclose(architecture.score, best[0], rel_tol=1e-6)
    assert (architecture.layers, architecture.head) == (tuple(best[1]), best[2])
    assert architecture.totals[0].runtime_seconds <= architecture.parent_totals[0].runtime_seconds / speedup * (
        1 + 1e-6
    )


def test_a_baseline_is_the_best_in_one_type_and_keeps_the_budget() -> None:
    problem = problem_with(1.4)
    found = find("uniform", problem)
    kinds = {type_in(label) for one in found.layers for label in (one.attention, one.ffn) if label != "no_op"}
    assert len(kinds) <= 1 and len(set(found.layers)) == 1
    assert not broken_limits(problem, found.layers, (1,), found.head)
    alike = [one for one in everything(problem) if len(set(one[1])) == 1 and one_type(one[1])]
    assert math.isclose(found.score, min(alike, key=lambda one: one[0])[0], rel_tol=1e-9)


def one_type(layers: Sequence[LayerChoice]) -> bool:
    return len({type_in(label) for one in layers for label in (one.attention, one.ffn) if label != "no_op"}) <= 1


def test_one_type_is_the_same_library_seen_through_it() -> None:
    problem = problem_with(1.4)
    for kind, head, alone in in_one_type(problem):
        whole = (LayerChoice(ffn="ffn32"),) * 2
        again = back(problem, predicted(alone, whole, "x", (1,)), kind, head)
        assert again.layers[0] == LayerChoice(attention=typed("parent", kind), ffn=typed("ffn32", kind))
        seen = predicted(alone, whole, "x", (1,))
        assert again.totals == seen.totals and again.parent_totals == seen.parent_totals


def test_scores_are_products_until_they_are_measured() -> None:
    base = quarter()
    narrow, parents = score(0, "ffn", "ffn32", 0.1, 0.3), [score(0, "ffn", "parent@iq4_nl", 0.04, 0.08)]
    on_corpus = {
        "whole@iq4_nl": WholeScore(kl=(0.02, 0.04), lm_loss=(0.0, 0.0)),  # half of the sum: the factor
        "head@iq4_nl": WholeScore(kl=(0.01, 0.03), lm_loss=(0.0, 0.0)),
    }
    whole = {"": on_corpus}
    found = {one.variant: one for one in scores_in_types([narrow], parents, whole, base)}
    assert set(found) == {"ffn32", "ffn32@iq4_nl", "parent@iq4_nl", "head@iq4_nl"}
    assert found["ffn32@iq4_nl"].kl_per_sequence == pytest.approx((0.1 + 0.5 * 0.25 * 0.04, 0.3 + 0.5 * 0.25 * 0.08))
    assert found["parent@iq4_nl"].kl == pytest.approx(0.03) and found["head@iq4_nl"].kl == pytest.approx(0.02)
    own = [*parents, score(0, "ffn", "ffn32@iq4_nl", 0.2, 0.3)]
    again = {one.variant: one for one in scores_in_types([narrow], own, whole, base)}
    assert again["ffn32@iq4_nl"].kl_per_sequence == pytest.approx((0.15, 0.3))


def test_a_fine_type_has_the_coarsest_types_scores_in_its_own_measure() -> None:
    """One that hurts the whole parent 25 times less on every text is not scored by blocks; its sum is its whole KL."""
    base = quarter(layers=2)

    def whole_of(**kl: float) -> dict[str, WholeScore]:
        return {f"whole@{kind}": WholeScore(kl=(each, each), lm_loss=(0.0, 0.0)) for kind, each in kl.items()}

    general = whole_of(q8_0=0.004, q5_1=0.02, iq4_nl=0.1)
    assert fine_types({"": general}) == {"q8_0"}
    assert not fine_types({"": general, "code": whole_of(q8_0=0.1, q5_1=0.02, iq4_nl=0.1)})
    assert not fine_types({"": whole_of(q8_0=0.004)})
    assert fine_types({"": whole_of(q8_0=0.004, q4_1=0.0, iq4_nl=0.1)}) == {"q8_0"}, "a parent may lie on a grid"
    parents = [score(layer, "ffn", "parent@iq4_nl", 0.1 * layer, 0.3) for layer in (0, 1)]
    parents += [score(layer, "ffn", "parent@q5_1", 0.01, 0.03) for layer in (0, 1)]
    found = scores_in_types([score(1, "ffn", "ffn32", 0.1, 0.3)], parents, {"": general}, base)
    sums = {
        kind: sum(one.kl for one in found if one.variant == f"parent@{kind}") for kind in ("q8_0", "q5_1", "iq4_nl")
    }
    assert sums == pytest.approx({"q8_0": 0.004, "q5_1": 0.02, "iq4_nl": 0.1})
    by_name = {(one.layer, one.variant): one.kl_per_sequence for one in found}
    share = 0.004 / 0.35  # of the sum of iq4_nl's
    assert by_name[0, "parent@q8_0"] == pytest.approx((0.0, 0.3 * share))
    assert by_name[1, "ffn32@q8_0"] == pytest.approx((0.1 + share * 0.25 * 0.1, 0.3 + share * 0.25 * 0.3))


def test_nothing_of_a_fine_type_is_scored_by_blocks(chain: Chain) -> None:
    layers, blocks = [LayerChoice(), LayerChoice(ffn="ffn32@q8_0")], by_place(chain.blocks)
    assert [one.variant for one in to_measure(layers, blocks, [])] == ["ffn32@q8_0"]
    assert not to_measure(layers, blocks, [], {"q8_0"})


def test_tables_of_types_are_scaled_to_the_parents_ratio() -> None:
    def table(seconds: float) -> CostTable:
        return CostTable(
            hardware={"engine": "x"},
            costs=(cost("ffn", "parent", seconds), cost("ffn", "no_op", 0.0)),
            non_block=(outside("", seconds),),
            num_hidden_layers=1,
            measured_at="2026-01-01T00:00:00+00:00",
            parent_measured=(outside("", 2 * seconds),),
        )

    share = Metric(value=0.5, se=0.0, n=3)
    loads = [Load(scenario=CHAT, batch=1)]
    # the type was measured on a day on which the machine was three times as fast
    both = joined(table(1.0), {"iq4_nl": (table(0.2), TypeRatio(shares=((share, share),)))}, loads, tied=True)
    found = {one.variant: one.prefill_seconds for one in both.costs}
    assert found == pytest.approx({"parent": 1.0, "no_op": 0.0, "parent@iq4_nl": 0.5})
    heads = {one.head: (one.prefill_seconds, one.weight_bytes) for one in both.non_block}
    assert heads == {"": (1.0, 50), "iq4_nl": (pytest.approx(0.5), 100)}  # rearranged and as embedding


def test_training_keys_know_no_types_and_scores_do(chain: Chain) -> None:
    record = chain.blocks[0]
    rounded = in_type(record, "q8_0")
    assert rounded.key != record.key and in_type(record, "iq4_nl").key != rounded.key
    assert rounded.weights == record.weights and bare(rounded.variant) == record.variant
    plain = contender("child", chosen((LayerChoice(ffn="ffn32"),) * 3), chain.blocks)
    mixed = contender("child", chosen((LayerChoice(ffn="ffn32@q8_0"),) * 3), chain.blocks)
    assert plain.blocks == mixed.blocks and plain.key != mixed.key
    assert plain.key == digest_of(
        layers=plain.architecture.layers, blocks=[b.key for b in plain.blocks], gkd="", version=1
    )


@needs_llama_cpp
def test_a_rounded_block_scores_as_the_whole_model_with_it(chain: Chain) -> None:
    records = [r for r in parents_in_types(chain.parent, chain.corpus, chain.records, TYPES) if r.layer == 1]
    blocks = [block for block in chain.blocks if (block.layer, block.variant) == (1, "ffn32")]
    work = [(one, tuple(range(6))) for one in [*records, *(in_type(block, "iq4_nl") for block in blocks)]]
    found = {
        (one.subblock, one.variant): one
        for one in score_sequences(work, chain.records[1], chain.scored, chain.parent, chain.workspace, HOST)
    }
    for part in ("attention", "ffn"):
        assert 0 < found[part, "parent@q8_0"].kl < found[part, "parent@iq4_nl"].kl / 10
    tokens = read_tensors(chain.workspace, chain.corpus.tokens, ["train", "validation"])
    model, texts = chain.reader.model(), tokens["validation"][:6].long()
    before, mlp = log_probabilities(model, texts), model.model.layers[1].mlp
    with torch.no_grad(), InputGrams(mlp) as grams:
        model(tokens["train"][:16].long(), use_cache=False)
    for name, linear in grams.linears.items():
        round_linear(linear, "iq4_nl", grams.sums[name])
    own = divergences(before, log_probabilities(model, texts))
    assert found["ffn", "parent@iq4_nl"].kl_per_sequence == pytest.approx(own, rel=0.01)
    missing = to_measure([LayerChoice(), LayerChoice(ffn="ffn32@iq4_nl"), LayerChoice()], by_place(blocks), [])
    assert [one.key for one in missing] == [work[-1][0].key]
    assert not to_measure([LayerChoice(), LayerChoice(ffn="ffn32@iq4_nl")], by_place(blocks), list(found.values()))


def by_place(blocks: Sequence[BlockRecord]) -> dict[tuple[int, str, str], BlockRecord]:
    return {(one.layer, one.subblock, one.variant): one for one in blocks}


@needs_llama_cpp
def test_a_child_of_mixed_types_is_what_llama_cpp_runs(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = (
        LayerChoice(attention="parent@q8_0", ffn="parent@iq4_nl"),
        LayerChoice(attention="kv1@iq4_nl", ffn="ffn32"),
        LayerChoice(attention="no_op", ffn="ffn32@q5_1"),
    )
    architecture = chosen(layers).model_copy(update={"head": "q8_0"})
    which = with_file(
        contender("child", architecture, chain.blocks), chain.parent, chain.corpus, "bfloat16", chain.workspace
    )
    file = chain.workspace / which.file
    kinds = {info.name: info.tensor_type for info in gguf.GGUFReader(file).tensors if info.data.ndim > 1}
    wanted = {
        ("blk.0", "attn"): Type.Q8_0,
        ("blk.0", "ffn"): Type.IQ4_NL,
        ("blk.1", "attn"): Type.IQ4_NL,
        ("blk.1", "ffn"): Type.BF16,
        ("blk.2", "ffn"): Type.Q5_1,
    }
    for (layer, part), kind in wanted.items():
        assert {k for name, k in kinds.items() if name.startswith(f"{layer}.{part}")} == {kind}, (layer, part)
    assert kinds["token_embd.weight"] == Type.Q8_0
    found = compare_logits(read_gguf(file), file)
    assert found.kl < 1e-3 and found.agreement > 0.9
    ids = torch.randint(64, (1, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(served(which, chain.parent, chain.workspace, HOST)(ids).logits, read_gguf(file)(ids).logits)
    given = tmp_path / "child.gguf"
    said = hand_over(file, given)
    assert "top-1 agreement" in said and given.read_bytes() == file.read_bytes()
    monkeypatch.setattr(typed_file, "check_logits", lambda *_: "compared again")
    given.unlink()
    assert hand_over(file, given) == said and given.read_bytes() == file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(LlamaCpp, "version", lambda _: "another")
        assert "compared again" in hand_over(file, given)
    other = tmp_path / "other.gguf"
    other.write_bytes(file.read_bytes() + b"0")
    assert "compared again" in hand_over(other, given)
