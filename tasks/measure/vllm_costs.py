"""Costs of variants in vLLM: the method of tasks/measure/llama_cpp_costs.py, in two processes of vLLM's own.

A model is a folder with a config and no weights: vLLM fills in noise (`load_format: dummy`).
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from blocks.export_code import AUTO_MAP, CODE_FILES
from blocks.records import LayerChoice
from profiles.schema import Scenario
from tasks.engines.vllm_engine import CODE, Vllm, VllmSession
from tasks.measure.llama_cpp_costs import EngineBench, Name, Timed
from tasks.measure.timing import Timing


class _Kept(VllmSession):
    """A session whose process stays for the next model."""

    def close(self) -> None:
        """Nothing yet: a start of vLLM costs more than a load."""

    def end(self) -> None:
        """End the process."""
        super().close()


class VllmBench(EngineBench):
    """Times models in vLLM: the parent in one process, the others one after another in a second."""

    _kept: list[_Kept]

    def run(self, scenario: Scenario, batch: int, tell: Callable[[int, int], None]) -> dict[Name, Timing]:
        """See EngineBench."""
        self._kept = []
        try:
            return super().run(scenario, batch, tell)
        finally:
            for session in self._kept:
                session.end()

    def _open(self, folder: Path, layers: Sequence[LayerChoice], scenario: Scenario, batch: int) -> Timed:
        """A model of these layers with noise for weights: time does not depend on them."""
        path = folder / "model"
        write_config(self.reader.child_config(layers), path)
        try:
            process = Vllm().process(path, self._how(scenario, batch), noise=True)
            if len(self._kept) > 1:
                self._kept[1].load(process)
            else:
                self._kept.append(_Kept(process))
        finally:
            shutil.rmtree(path)
        return self._kept[-1]


def write_config(config: object, folder: Path) -> None:
    """A nemotron-nas folder without weights."""
    fields = json.loads(config.to_json_string(use_diff=False))  # type: ignore[attr-defined]
    folder.mkdir()
    text = json.dumps(fields | {"architectures": ["DeciLMForCausalLM"], "auto_map": AUTO_MAP})
    (folder / "config.json").write_text(text, encoding="utf-8")
    for name in CODE_FILES:
        shutil.copyfile(CODE / name, folder / name)
