"""Measured costs on tiny parents: every family, nothing missing, stored once; the sum of blocks beside the whole."""

from pathlib import Path

import pytest

from profiles.schema import Hardware, Measure, Scenario
from tasks import costs
from tasks.costs import measure_costs, non_block_parameters
from tasks.finish import sum_beside_whole
from tasks.record import open_parent
from tests.chain import SPACE, prepare

SCENARIOS = (Scenario(name="chat", batch_sizes=(1, 3), prompt_tokens=8, generated_tokens=6),)
MEASURE = Measure(rounds=3, stack=2, decode_steps=2)  # a stack below the depth of 3


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
def test_every_variant_of_every_family_has_a_cost_at_every_batch(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, _ = prepare(tmp_path, family, train_steps=0)
    table = measure_costs(parent, SPACE, SCENARIOS, Hardware(threads=1), MEASURE, tmp_path)
    found = {(cost.subblock, cost.variant, cost.batch_size) for cost in table.costs}
    labels = {("attention", label) for label in ("parent", *SPACE.attention)}
    labels |= {("ffn", label) for label in ("parent", *SPACE.ffn)}
    assert found == {(subblock, label, batch) for subblock, label in labels for batch in (1, 3)}
    for cost in table.costs:
        assert (cost.prefill_seconds > 0) == (cost.variant != "no_op")
        assert (cost.kv_bytes_per_token > 0) == (cost.variant in ("parent", "kv1") and cost.subblock == "attention")
    assert table.num_hidden_layers == 3 and len(table.parent_measured) == 2
    assert "prefill" in sum_beside_whole(table, table.parent_measured[0])
    monkeypatch.setattr(costs, "_Bench", lambda *_: pytest.fail("measured twice"))
    assert measure_costs(parent, SPACE, SCENARIOS, Hardware(threads=1), MEASURE, tmp_path) == table


def test_non_block_parameters_are_what_is_outside_the_layers(tmp_path: Path) -> None:
    parent, _ = prepare(tmp_path, train_steps=0)
    reader = open_parent(tmp_path / parent.folder)
    outside = sum(p.numel() for name, p in reader.model().named_parameters() if ".layers." not in name)
    assert non_block_parameters(reader.config) == outside
