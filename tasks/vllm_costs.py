"""Costs of variants in vLLM: the method of tasks/engine_costs.py, each model in a process of vLLM's own.

A model is a folder with a config and no weights: vLLM fills in noise (`load_format: dummy`).
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from blocks.records import LayerChoice
from profiles.schema import Scenario
from tasks.engine_costs import EngineBench
from tasks.engines.base import Load
from tasks.engines.vllm_engine import CODE, Vllm, VllmSession
from tasks.export import AUTO_MAP, CODE_FILES


class VllmBench(EngineBench):
    """Times models in vLLM."""

    def _open(self, folder: Path, layers: Sequence[LayerChoice], scenario: Scenario, batch: int) -> VllmSession:
        """A model of these layers with noise for weights: time does not depend on them."""
        path = folder / "model"
        write_config(self.reader.child_config(layers), path)
        tokens = scenario.prompt_tokens + self._grow(scenario) + self.measure.decode_steps
        how = Load(precision=self.hardware.precision, threads=self.threads, batch_size=batch, context_tokens=tokens)
        try:
            return VllmSession(Vllm().process(path, how, noise=True))
        finally:
            shutil.rmtree(path)


def write_config(config: object, folder: Path) -> None:
    """A nemotron-nas folder without weights."""
    fields = json.loads(config.to_json_string(use_diff=False))  # type: ignore[attr-defined]
    folder.mkdir()
    text = json.dumps(fields | {"architectures": ["DeciLMForCausalLM"], "auto_map": AUTO_MAP})
    (folder / "config.json").write_text(text, encoding="utf-8")
    for name in CODE_FILES:
        shutil.copyfile(CODE / name, folder / name)
