"""Costs of variants in vLLM, from whole models. Each is a folder with a config and no weights: vLLM makes noise up.

The parent stays loaded in one process of vLLM's own, the other models are loaded one after another in a second.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blocks.export_code import AUTO_MAP, CODE_FILES
from blocks.records import LayerChoice
from tasks.engines.base import Session
from tasks.engines.vllm_engine import CODE, Vllm, VllmPlugin, VllmSession
from tasks.measure.variant_timing import Load
from tasks.measure.whole_model_costs import WholeModelTimer


class VllmTimer(WholeModelTimer):
    """Times models in vLLM: the parent in one process, the others one after another in a second."""

    def __init__(self, *what: Any) -> None:
        super().__init__(*what)
        self._sessions: list[VllmSession] = []

    def close(self) -> None:
        """See VariantTimer."""
        super().close()
        while self._sessions:
            self._sessions.pop().close()

    def _release(self, model: Session) -> None:
        """The process stays for the next model: starting vLLM takes longer than loading a model."""

    def _open(self, folder: Path, layers: Sequence[LayerChoice], load: Load) -> Session:
        path = folder / "model"
        _write_config(self.reader.child_config(layers), path)
        try:
            engine = VllmPlugin() if self.hardware.engine == "vllm-plugin" else Vllm()
            process = engine.process(path, self._how(load), noise=True)
            if len(self._sessions) > 1:
                self._sessions[1].load(process)
            else:
                self._sessions.append(VllmSession(process))
        finally:
            shutil.rmtree(path)
        return self._sessions[-1]


def _write_config(config: object, folder: Path) -> None:
    """A nemotron-nas folder without weights."""
    fields = json.loads(config.to_json_string(use_diff=False))  # type: ignore[attr-defined]
    folder.mkdir()
    text = json.dumps(fields | {"architectures": ["DeciLMForCausalLM"], "auto_map": AUTO_MAP})
    (folder / "config.json").write_text(text, encoding="utf-8")
    for name in CODE_FILES:
        shutil.copyfile(CODE / name, folder / name)
