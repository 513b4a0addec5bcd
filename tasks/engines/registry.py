"""The engines by name. An engine is imported when it is asked for: a process that runs one does not load others."""

import importlib

from blocks.engine_limits import UnknownEngine, known_engine
from tasks.engines.base import Engine
from tasks.engines.errors import EngineMissing

ENGINES = {
    "torch": ("tasks.engines.torch_engine", "Torch"),
    "llama.cpp": ("tasks.engines.llama_cpp", "LlamaCpp"),
    "vllm": ("tasks.engines.vllm_engine", "Vllm"),
    "vllm-plugin": ("tasks.engines.vllm_engine", "VllmPlugin"),
}


def engine_of(name: str) -> Engine:
    """An engine that puzzle can run, whether it is installed or not. Raises UnknownEngine."""
    known = known_engine(name)
    if name not in ENGINES:
        raise UnknownEngine(
            f"{known.title} is known by its limits only, and puzzle cannot run it: export to {known.format} and "
            f"run it there. Engines that run here: {', '.join(ENGINES)}."
        )
    module, cls = ENGINES[name]
    engine: Engine = getattr(importlib.import_module(module), cls)()
    return engine


def installed_engine(name: str) -> Engine:
    """An engine that is installed. Raises UnknownEngine; EngineMissing says what to install."""
    engine = engine_of(name)
    missing = engine.missing()
    if missing:
        raise EngineMissing(f"{missing}.")
    return engine
