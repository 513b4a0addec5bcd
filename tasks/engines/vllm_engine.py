"""The engine `vllm`: runs exported folders in vLLM on a CPU. vLLM is installed in a virtual environment of its own.

vLLM needs other versions of transformers and fastapi than puzzle, so they cannot share an environment. `make vllm`
makes `.venv-vllm`. This file finds the interpreter there, starts tasks/engines/vllm_process.py with it, and talks to it
through pipes.
"""

import base64
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from blocks import export_code
from blocks.engine_limits import EngineLimit, gaps, known_engine
from blocks.export_code import AUTO_MAP, CODE_FILES, PLUGIN
from blocks.export_code.vllm_plugin.puzzle_vllm import ARCHITECTURE
from blocks.files import sha256_of
from blocks.parent import config_of
from blocks.records import Turn
from tasks.engines.base import ROOT, Engine, EngineProcess, LoadOptions, Session
from tasks.engines.errors import EngineFailed, EngineMissing
from tasks.engines.worker import Worker

PYTHON_VARIABLE = "PUZZLE_VLLM_PYTHON"  # the interpreter of an environment that holds vLLM
FOLDER = ".venv-vllm"
INSTALL = (
    f"vLLM is not installed: run `make vllm` in puzzle's repository (it makes {FOLDER}: 2.5 GB, about 5 minutes), or "
    f"name the interpreter of another environment that holds vLLM in {PYTHON_VARIABLE}"
)
HEAD_SIZES = frozenset({32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512})  # that vLLM 0.32 has CPU kernels for
CODE = Path(export_code.__path__[0])
# vLLM works offline, reports nothing to its maker, leaves the placing of threads to the system, uses one process
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_HOST_IP": "127.0.0.1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(CODE / PLUGIN),
}


def interpreter() -> Path | None:
    """The interpreter that has vLLM; None where there is none. Raises EngineMissing for a wrong name."""
    named = os.environ.get(PYTHON_VARIABLE)
    if named:
        if _holds_vllm(Path(named)):
            return Path(named)
        raise EngineMissing(
            f"{PYTHON_VARIABLE} names {named}, which is not the interpreter of an environment with vLLM."
        )
    found = [folder / FOLDER / "bin" / "python" for folder in (Path.cwd(), ROOT)]
    return next((path for path in found if _holds_vllm(path)), None)


def _holds_vllm(python: Path) -> bool:
    """The path is not resolved, because a virtual environment's interpreter is a link, and the link's folder counts."""
    return python.is_file() and any(python.parent.parent.glob("lib/python3*/site-packages/vllm/__init__.py"))


@lru_cache(maxsize=4)
def _version(python: Path) -> str:
    code = (
        "from importlib.metadata import distributions as d;"
        "print({x.name.lower(): x.version for x in d() if x.name.lower() in ('vllm', 'vllm-cpu', 'torch')})"
    )
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    if found.returncode:
        raise EngineFailed(f"{python} does not run: {found.stderr.strip()[-300:]}")
    versions: dict[str, str] = json.loads(found.stdout.replace("'", '"'))
    vllm = versions.get("vllm-cpu") or versions.get("vllm", "?")
    if "vllm-cpu" not in versions and "cpu" not in vllm and sys.platform == "linux":
        raise EngineFailed(
            f"{python} has vLLM {vllm}, which is not built for CPUs, and puzzle runs vLLM on the CPU: make vllm, or "
            f"name the interpreter of another environment in {PYTHON_VARIABLE}"
        )
    return f"vLLM {vllm} on CPU, eager, torch {versions.get('torch', '?')}"


class Vllm(Engine):
    """vLLM, from an environment of its own."""

    name: ClassVar[str] = "vllm"
    format: ClassVar[str] = "nemotron-nas"
    precisions: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    architecture: ClassVar[str] = "DeciLMForCausalLM"  # of a child, whatever its config names
    plugin: ClassVar[str] = ""

    def missing(self) -> str | None:
        return None if interpreter() else INSTALL

    def version(self) -> str:
        return _version(_installed())

    def process(self, path: Path, how: LoadOptions, noise: bool = False) -> EngineProcess:
        """How to run vllm_process.py. noise: the folder has a config and no weights, and vLLM fills in noise.

        Raises EngineMissing; EngineLimit for a folder or a precision that vLLM cannot or should not run.
        """
        if how.precision not in self.precisions:
            raise EngineLimit(f"puzzle runs vLLM in {' and '.join(self.precisions)}, not in {how.precision}.")
        trust = _trusted(path, self.name)
        return EngineProcess(
            # -P: the script's folder, full of short names, does not become a place to import from
            command=(str(_installed()), "-P", str(Path(__file__).with_name("vllm_process.py"))),
            # a server loads the plugins of this name, so stock vLLM none
            environment=SETTINGS | {"OMP_NUM_THREADS": str(how.threads), "VLLM_PLUGINS": self.plugin},
            load={
                "path": str(path.resolve()),
                "how": dataclasses.asdict(how),
                "trust": trust,
                "dummy": noise,
                "architecture": self.architecture if trust else None,
            },
        )

    def load(self, path: Path, how: LoadOptions) -> "VllmSession":
        return VllmSession(self.process(path, how))


class VllmPlugin(Vllm):
    """vLLM with puzzle's plugin, blocks/export_code/vllm_plugin, which need not be installed there."""

    name: ClassVar[str] = "vllm-plugin"
    format: ClassVar[str] = "vllm-plugin"
    architecture: ClassVar[str] = ARCHITECTURE
    plugin: ClassVar[str] = "puzzle"

    def version(self) -> str:
        return f"{super().version()}, with puzzle's plugin"


def _installed() -> Path:
    python = interpreter()
    if python is None:
        raise EngineMissing(f"{INSTALL}.")
    return python


def _trusted(folder: Path, engine: str = "vllm") -> bool:
    """Whether vLLM has to run the folder's own config class (`trust_remote_code`), which it needs for nemotron-nas.

    Only code that puzzle wrote is run, compared byte for byte. Raises EngineLimit for other code.
    """
    reason = _refused(folder, engine)
    if reason is not None:
        raise EngineLimit(f"{reason}.")
    if config_of(folder).model_type != "nemotron-nas":
        return False
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    foreign = [name for name in CODE_FILES if _digest(folder / name) != _digest(CODE / name)]
    if foreign or fields.get("auto_map") != AUTO_MAP:
        raise EngineLimit(
            f"{folder} holds other code ({', '.join(foreign) or 'auto_map in config.json'}) than this puzzle writes, "
            "and vLLM would run it: write the child anew with puzzle export --format transformers."
        )
    return True


def _digest(path: Path) -> str | None:
    return sha256_of(path) if path.is_file() else None


def _refused(folder: Path, engine: str) -> str | None:
    """Why vLLM on a CPU cannot run what lies in this folder; None when it can."""
    if not folder.is_dir():
        return f"{folder} is not a folder: vLLM loads what puzzle export --format transformers (or nemotron-nas) writes"
    return cannot(config_of(folder), engine)


def cannot(config: Any, engine: str = "vllm") -> str | None:
    """Why vLLM on a CPU cannot run a model with this config; None when it can."""
    missing = gaps(engine, config) if config.model_type == "nemotron-nas" else []
    if missing:
        return f"{known_engine(engine).title} cannot run {'; '.join(missing)}"
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head not in HEAD_SIZES:
        sizes = ", ".join(map(str, sorted(HEAD_SIZES)))
        return f"vLLM has no CPU kernel for attention heads of {head}, only for {sizes}"
    return _without_products((getattr(config, "quantization_config", None) or {}).get("format"))


def _without_products(form: str | None) -> str | None:
    """Why vLLM cannot multiply integers stored in this form on this processor; None when it can.

    vLLM's AVX2 build has no 4-bit product. 8-bit ones are oneDNN's: an x86 processor without VNNI adds pairs of them
    in 16 bits, which overflow: products were up to 15 % off (oneDNN's guide, "Nuances of int8 computations").
    """
    if form is None or not hasattr(torch.cpu, "get_capabilities"):  # older torch does not know
        return None
    has = torch.cpu.get_capabilities()
    if has.get("architecture") != "x86_64":
        return None
    if form == "pack-quantized" and not has.get("avx512_f"):
        return "vLLM multiplies 4-bit integers on x86 processors with AVX-512 only, and this one has none"
    if form == "int-quantized" and not (has.get("avx512_vnni") or has.get("avx_vnni")):
        return "vLLM's products of 8-bit integers are wrong on x86 processors without VNNI, and this one has none"
    return None


class VllmSession(Session):
    """One model in a process of vLLM's own."""

    def __init__(self, what: EngineProcess) -> None:
        self.worker = Worker(what)
        try:
            self.load(what)
        except BaseException:
            self.worker.close()
            raise

    def load(self, what: EngineProcess) -> None:
        """Load another model in the place of this one. The process stays, because starting it takes long."""
        self.vocab_size = int(self.worker.ask({"load": what.load})["vocab_size"])

    def logits(self, tokens: Sequence[int]) -> Tensor:
        answer = self.worker.ask({"logits": {"tokens": list(tokens)}})
        values = torch.frombuffer(bytearray(base64.b64decode(answer["values"])), dtype=torch.float32)
        return values.reshape(answer["shape"])

    def generate(self, tokens: Sequence[int], steps: int) -> list[int]:
        return list(self.worker.ask({"generate": {"tokens": list(tokens), "steps": steps}})["tokens"])

    def request(self, prompt: Tensor, steps: int, grow: int = 0) -> Turn:
        """See Session. Only the prompt's shape matters: vLLM's process draws tokens of its own."""
        batch, tokens = prompt.shape
        return self.worker.request(batch, tokens, steps, 0, grow)

    def close(self) -> None:
        self.worker.close()
