"""The engines by name. Each is imported when it is asked for: a worker that runs one does not load the others."""

import importlib

from blocks.engine_limits import UnknownEngine, known_engine
from tasks.engines.base import Engine
from tasks.engines.errors import EngineMissing

ENGINES = {
    "torch": ("tasks.engines.torch_engine", "Torch"),
    "llama.cpp": ("tasks.engines.llama_cpp", "LlamaCpp"),
    "vllm": ("tasks.engines.vllm_engine", "Vllm"),
}


def engine_of(name: str) -> Engine:
    """An engine that can be driven from here, installed or not. Raises UnknownEngine."""
    known = known_engine(name)
    if name not in ENGINES:
        raise UnknownEngine(
            f"{known.title} is known by its limits only, it is not driven from here: export to {known.format} and "
            f"run it there. Engines that run here: {', '.join(ENGINES)}."
        )
    module, cls = ENGINES[name]
    engine: Engine = getattr(importlib.import_module(module), cls)()
    return engine


def installed_engine(name: str) -> Engine:
    """An engine that can run now. Raises UnknownEngine, EngineMissing with what to install."""
    engine = engine_of(name)
    missing = engine.missing()
    if missing:
        raise EngineMissing(f"{missing}.")
    return engine
