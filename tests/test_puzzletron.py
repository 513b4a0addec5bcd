"""puzzletron's files: sums as its own code takes them, chosen like brute force."""

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tasks.libraries.options import crossed
from tasks.libraries.puzzletron import BLOCK_SCORES, STATS, options_from_puzzletron
from tasks.search.joint import LibraryFileError
from tests import puzzletron
from tests.puzzletron import ATTENTION, FFN, LAYERS, PARENT, Block
from tests.test_nvlabs import answers, puzzle

BATCH_16 = ("--batch-size", 16)


def share(name: str) -> str:
    return {"8 kv heads": 100, "2 kv heads": 25, "intermediate size 14336": 100, "intermediate size 7168": 50}.get(
        name, 0
    ).__format__("d") + "%"


def label(block: Block) -> str:
    return f"attention = {block[0]} (parent * {share(block[0])}) && ffn = {block[1]} (parent * {share(block[1])})"


def cost(stats: list[Any], layer: int, block: Block, name: str) -> float:
    """The sum over the subblocks of the entry at batch size 16, as run_puzzle.py's _get_block_stats takes it."""
    configs = (ATTENTION[block[0]], FFN[block[1]])
    found = [
        item[name]
        for item in stats[1]["subblocks"]
        for config in configs
        if item["subblock_config"] == config and item["parent_layer_index"] == layer
    ]
    assert len(found) == 2
    return float(sum(found))


def rise(solutions: dict[str, Any], layer: int, block: Block, metric: str) -> float:
    """Average of the solution minus the teacher's; of a block that was not scored the sum of its subblocks'."""
    if block == PARENT:
        return 0.0
    teacher = solutions["teacher.json"].get(metric, {"avg": 0.0})["avg"]
    for one in solutions.values():
        replaced = one.get("puzzle_solution", {}).get("single_sequence_replacement")
        if replaced == puzzletron.replacement(layer, block):
            return float(one[metric]["avg"] - teacher)
    return sum(rise(solutions, layer, own, metric) for own in ((block[0], PARENT[1]), (PARENT[0], block[1])))


@pytest.mark.parametrize("one_subblock", [False, True])
@pytest.mark.parametrize("metric", ["kl_div", "lm_loss"])
def test_like_brute_force(tmp_path: Path, metric: str, one_subblock: bool) -> None:
    stats, scores = puzzletron.statistics(3), puzzletron.solutions(3, one_subblock=one_subblock)
    puzzletron.write(tmp_path, stats, scores, one_subblock)
    blocks = list(itertools.product(ATTENTION, FFN))
    table = {
        (layer, block): (
            cost(stats, layer, block, "memory_mib"),
            cost(stats, layer, block, "runtime_ms"),
            rise(scores, layer, block, metric),
        )
        for layer in range(LAYERS)
        for block in blocks
    }
    parent = [math.fsum(table[layer, PARENT][i] for layer in range(LAYERS)) for i in range(2)]
    memory, runtime = 0.7 * parent[0] + 50, 0.8 * parent[1] + 10
    fitting = []
    for choice in itertools.product(blocks, repeat=LAYERS):
        sums = [math.fsum(table[layer, block][i] for layer, block in enumerate(choice)) for i in range(3)]
        if sums[0] + 50 <= memory and sums[1] + 10 <= runtime:
            fitting.append((sums[2], sums[0] + 50, sums[1] + 10, choice))
    best = min(fitting)
    words = (
        "--memory-gib",
        memory / 1024,
        "--latency-seconds",
        runtime / 1000,
        "--metric",
        metric.removesuffix("_div"),
        *BATCH_16,
    )
    for library in (tmp_path, tmp_path / STATS):
        answer = answers("choose", "--library", library, *words)
        assert answer["objective"] == pytest.approx(best[0], rel=1e-9)
        assert (1024 * answer["memory_gib"], 1000 * answer["latency_seconds"]) == pytest.approx(best[1:3], rel=1e-9)
        assert list(answer["layers"].values()) == [label(block) for block in best[3]]


def test_a_block_that_was_scored_takes_the_place_of_the_sum(tmp_path: Path) -> None:
    stats = puzzletron.statistics()
    puzzletron.write(tmp_path, stats, puzzletron.solutions(1, one_subblock=True), one_subblock=True)
    block = ("2 kv heads", "no_op")
    exact = puzzletron.solutions(7)
    wanted = {
        name: one
        for name, one in exact.items()
        if name == "teacher.json"
        or one["puzzle_solution"]["single_sequence_replacement"] == puzzletron.replacement(1, block)
    }
    assert len(wanted) == 2
    puzzletron.write(tmp_path, stats, wanted)
    found = {(own.layer, own.label): own for own in crossed(options_from_puzzletron(tmp_path))}
    assert len(found) == LAYERS * len(ATTENTION) * len(FFN)
    assert found["layer_1", label(block)].metrics["kl_div"] == pytest.approx(rise(exact, 1, block, "kl_div"))
    summed = rise(puzzletron.solutions(1, one_subblock=True), 0, block, "kl_div")
    assert found["layer_0", label(block)].metrics["kl_div"] == pytest.approx(summed)


def test_scores_per_sample_tell_how_sure_a_choice_is(tmp_path: Path) -> None:
    puzzletron.write(tmp_path, puzzletron.statistics(), puzzletron.solutions())
    found = answers("confidence", "--library", tmp_path, "--parameters", "70%", "--draws", 20)
    assert found["sequences"] == puzzletron.SAMPLES
    accuracy = ("--metric", "one_minus_token_accuracy_top_1")
    assert answers("choose", "--library", tmp_path, "--parameters", "70%", *accuracy)["score_se"] > 0


def test_what_was_not_measured_cannot_be_budgeted(tmp_path: Path) -> None:
    puzzletron.write(tmp_path, puzzletron.statistics(), puzzletron.solutions())
    code, _, err = puzzle("choose", "--library", tmp_path, "--latency-seconds", "80%", "--batch-size", 1)
    assert code == 2 and "latency_seconds" in err
    shown = answers("library", "show", tmp_path)
    assert set(shown["costs"]) == {"2048+512 tokens, bfloat16, batch 1", "2048+512 tokens, bfloat16, batch 16"}
    assert any("latency_seconds" in text for text in shown["missing"])
    assert shown["parent"] == "/models/teacher" and shown["hardware"] == {"gpu": "NVIDIA H100 80GB HBM3"}


def test_later_versions_list_subblocks_by_kind(tmp_path: Path) -> None:
    """{"subblock_configs": [{"kind", "name", ...}]} instead of {"attention", "ffn"}: the same library."""
    stats, scores = puzzletron.statistics(), puzzletron.solutions()

    def named(kind: str, config: dict[str, Any]) -> dict[str, Any]:
        return {"kind": kind, "name": {"attention": "mixer", "ffn": "mlp"}[kind], **config}

    def turned(block: dict[str, Any]) -> dict[str, Any]:
        return {"subblock_configs": [named(kind, block[kind]) for kind in ("attention", "ffn")]}

    old = options_from_puzzletron(puzzletron.write(tmp_path / "old", stats, scores))
    new_stats, new_scores = copy.deepcopy(stats), copy.deepcopy(scores)
    for entry in new_stats:
        for item in entry["subblocks"]:
            kind = "attention" if item["subblock_config_class"] == "AttentionConfig" else "ffn"
            item["subblock_config"] = named(kind, item["subblock_config"])
    for one in new_scores.values():
        for item in one.get("puzzle_solution", {}).get("chosen_replacements", []):
            item["child_block_configs"] = [turned(block) for block in item["child_block_configs"]]
        if "puzzle_solution" in one:
            layer = one["puzzle_solution"]["single_sequence_replacement"]["parent_layer_indices"][0]
            one["puzzle_solution"]["single_sequence_replacement"] = one["puzzle_solution"]["chosen_replacements"][layer]
    new = options_from_puzzletron(puzzletron.write(tmp_path / "new", new_stats, new_scores))
    assert new == old


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda d: (d / BLOCK_SCORES / "teacher.json").unlink(), "teacher.json"),
        (lambda d: (d / BLOCK_SCORES).rename(d / "elsewhere"), "has costs but no scores"),
        (lambda d: [f.unlink() for f in (d / BLOCK_SCORES).glob("solution*")], "no solution_"),
        (lambda d: (d / STATS).write_text("[]"), "JSON list with entries"),
        (lambda d: (d / STATS).write_text("{}"), "JSON list with entries"),
        (lambda d: (d / STATS).write_text("[{]"), "is not the JSON of a block library"),
        (lambda d: cut(d / STATS), "has no statistics of its ffn"),
        (lambda d: both(d / BLOCK_SCORES / "solution_0.json"), "replaces 2 layers by 1"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, spoil: Any, told: str) -> None:
    puzzletron.write(tmp_path, puzzletron.statistics(), puzzletron.solutions())
    spoil(tmp_path)
    code, out, err = puzzle("choose", "--library", tmp_path, "--parameters", "70%")
    assert (code, out) == (2, "") and told in err


def cut(path: Path) -> None:
    data = json.loads(path.read_text())
    for entry in data:
        entry["subblocks"].pop()
    path.write_text(json.dumps(data))


def both(path: Path) -> None:
    data = json.loads(path.read_text())
    data["puzzle_solution"]["single_sequence_replacement"]["parent_layer_indices"] = [0, 1]
    path.write_text(json.dumps(data))


def test_two_precisions_are_two_scenarios(tmp_path: Path) -> None:
    stats = puzzletron.statistics()
    twice = copy.deepcopy(stats[1])
    twice["args"] |= {"weights_dtype": "torch.int8"}
    puzzletron.write(tmp_path, [*stats, twice], puzzletron.solutions())
    places = options_from_puzzletron(tmp_path).description.places
    assert [str(place) for place in places][-1] == "2048+512 tokens, int8 with KV in bfloat16, batch 16"
    puzzletron.write(tmp_path, [*stats, stats[1]], puzzletron.solutions())
    with pytest.raises(LibraryFileError, match="two entries for 2048"):
        options_from_puzzletron(tmp_path)
