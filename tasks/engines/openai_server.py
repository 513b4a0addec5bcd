"""OpenAI-style servers in processes of their own, on loopback ports: that of llama.cpp (from xllamacpp) and that of
vLLM.

`serving` starts and ends them. `python -m tasks.engines.openai_server FILE PORT THREADS SLOTS TOKENS CACHE` is
llama.cpp's server (CACHE: the ggml_type of its KV cache), vllm_server.py is vLLM's. Both serve until their standard
input ends. It ends with the run that started them, also when that is killed, so no server is left behind.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tasks.engines.base import LoadOptions, python_path
from tasks.engines.errors import EngineMissing
from tasks.engines.vllm_process import kv_bytes
from tasks.inputs.companions import has_tokenizer
from tasks.running.servers import LOOPBACK, ServerFailure, free_port, running
from tasks.running.usage import resident_of

PACKAGE = "xllamacpp"
START_SECONDS = 300.0  # vLLM needs a minute or two on a busy machine


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server under load.

    pid: None for a server that was not started here, whose memory and CPU time are unknown. key: of its API; it is sent
    to this server only.
    """

    url: str
    pid: int | None = None
    key: str | None = field(default=None, repr=False)

    def cpu_seconds(self) -> float | None:
        """CPU seconds so far of the process and of all processes that it started, also of those that have ended."""
        if self.pid is None:
            return None
        times = [process.cpu_times() for process in _family(self.pid)]
        return float(sum(own.user + own.system + own.children_user + own.children_system for own in times))

    def peak_bytes(self) -> int | None:
        """The highest resident sizes so far of the process and of those that it started, added up.

        Pages that processes share count for each of them. Where the system keeps no highest size, the present one
        counts.
        """
        return None if self.pid is None else sum(map(_peak_bytes, _family(self.pid)))


def _family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def _peak_bytes(process: psutil.Process) -> int:
    highest = resident_of(process.pid, "VmHWM")
    return int(process.memory_info().rss) if highest is None else highest


@contextmanager
def serving(server: str, model: Path, how: LoadOptions, log: Path) -> Iterator[Served]:
    """Serve a model while the block runs: `how.batch_size` requests at a time, of `how.context_tokens` tokens each.

    Raises EngineMissing where the server is not installed, EngineLimit for a model that vLLM cannot or should not run,
    and ServerFailure, with the end of the log, when the server does not start.
    """
    port = free_port()
    command, environment = SERVERS[server](model, how, port)
    url = f"http://{LOOPBACK}:{port}"
    up = False
    try:
        with running(command, f"{url}/health", log, environment, START_SECONDS, stdin=subprocess.PIPE) as process:
            up = True
            yield Served(url=url, pid=process.pid)
    except ServerFailure as error:
        if up:
            raise
        raise ServerFailure(f"{error} It ends with: {log.read_text(errors='replace').strip()[-600:]}") from error


def _llama_cpp(model: Path, how: LoadOptions, port: int) -> tuple[list[str], dict[str, str]]:
    """Command and environment of llama.cpp's server, for a GGUF file."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise EngineMissing(f"llama.cpp's server comes with {PACKAGE}: pip install {PACKAGE} (or puzzle[llama-cpp]).")
    command = [sys.executable, "-m", "tasks.engines.openai_server", str(model.resolve())]
    from tasks.engines.llama_cpp import CACHE_TYPES  # brings torch, which the server has no use for

    values = (port, how.threads, how.batch_size, how.context_tokens, int(CACHE_TYPES[how.kv_precision]))
    command += [str(value) for value in values]
    return command, python_path()


def _vllm(model: Path, how: LoadOptions, port: int, name: str = "vllm") -> tuple[list[str], dict[str, str]]:
    """Command and environment of vLLM's server, for an exported folder. It caches nothing between requests."""
    from tasks.engines.registry import engine_of  # brings torch, which llama.cpp's server has no use for

    process = engine_of(name).process(model, how)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    tokens = min(how.context_tokens, config["max_position_embeddings"])
    room = kv_bytes(config, how.precision, how.batch_size, tokens)
    command = [
        process.command[0],
        "-P",
        str(Path(__file__).with_name("vllm_server.py")),
        "--model",
        process.load["path"],
    ]
    command += ["--host", LOOPBACK, "--port", str(port), "--dtype", how.precision, "--load-format", "safetensors"]
    command += ["--max-num-seqs", str(how.batch_size), "--max-model-len", str(tokens)]
    command += ["--kv-cache-memory-bytes", str(room), "--enforce-eager", "--no-enable-prefix-caching"]
    command += ["--generation-config", "vllm"]  # the folder's own defaults would change what is measured
    command += ["--trust-remote-code"] if process.load["trust"] else []
    command += [] if has_tokenizer(model) else ["--skip-tokenizer-init"]
    if process.load["architecture"]:
        command += ["--hf-overrides", json.dumps({"architectures": [process.load["architecture"]]})]
    return command, dict(process.environment)


SERVERS: dict[str, Callable[[Path, LoadOptions, int], tuple[list[str], dict[str, str]]]] = {
    "llama.cpp": _llama_cpp,
    "vllm": _vllm,
    "vllm-plugin": partial(_vllm, name="vllm-plugin"),
}


def main() -> None:
    """Serve until standard input ends. Prompts are not cached, so every request computes its own."""
    import xllamacpp

    file, port, threads, slots, tokens, kept = sys.argv[1:]
    parameters: Any = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.hostnames, parameters.port = [LOOPBACK], int(port)
    parameters.n_parallel, parameters.n_ctx = int(slots), int(slots) * int(tokens)
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = int(threads)
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type(int(kept))
    parameters.cache_prompt = False
    parameters.ctx_shift = False
    server = xllamacpp.Server(parameters)  # held: it serves for as long as it lives
    assert server.listening_address
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)  # its own clean-up may wait for a request under way


if __name__ == "__main__":
    main()
