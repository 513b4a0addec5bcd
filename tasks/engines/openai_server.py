"""llama.cpp's own OpenAI-style server, as xllamacpp brings it, in a process of its own on a loopback port.

`python -m tasks.engines.openai_server FILE PORT THREADS SLOTS TOKENS` serves until its standard input ends: that end
is held by whoever started it, so a server does not outlive a run that is killed. `serving` is the other side.
"""

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tasks.engines.llama_library import EngineMissing
from tasks.operating.servers import LOOPBACK, free_port, running

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "xllamacpp"


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server under load. pid: None where it runs elsewhere, and its memory and CPU time are not known."""

    url: str
    pid: int | None = None

    def cpu_seconds(self) -> float | None:
        """CPU seconds of the process so far, all threads."""
        if self.pid is None:
            return None
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def peak_bytes(self) -> int | None:
        """Highest resident size so far; where the system keeps none, the present one."""
        if self.pid is None:
            return None
        status = Path(f"/proc/{self.pid}/status")
        for line in status.read_text().splitlines() if status.is_file() else ():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return int(psutil.Process(self.pid).memory_info().rss)


@contextmanager
def serving(model: Path, threads: int, slots: int, tokens: int, log: Path) -> Iterator[Served]:
    """Serve a GGUF file for the length of the block: `slots` requests at a time, of `tokens` tokens each.

    Raises EngineMissing without xllamacpp, ServerFailure when the server does not come up.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise EngineMissing(f"llama.cpp's server comes with {PACKAGE}: pip install {PACKAGE} (or puzzle[llama-cpp]).")
    port = free_port()
    command = [sys.executable, "-m", "tasks.engines.openai_server", str(model.resolve())]
    command += [str(value) for value in (port, threads, slots, tokens)]
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    url = f"http://{LOOPBACK}:{port}"
    with running(command, f"{url}/health", log, paths, stdin=subprocess.PIPE) as process:
        yield Served(url=url, pid=process.pid)


def main() -> None:
    """Serve until standard input ends. Prompts are not cached: every request computes its own."""
    import xllamacpp

    file, port, threads, slots, tokens = sys.argv[1:]
    parameters: Any = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.hostnames, parameters.port = [LOOPBACK], int(port)
    parameters.n_parallel, parameters.n_ctx = int(slots), int(slots) * int(tokens)
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = int(threads)
    parameters.cache_prompt = False
    parameters.ctx_shift = False
    server = xllamacpp.Server(parameters)  # held: it serves for as long as it lives
    assert server.listening_address
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)  # its own clean-up may wait for a request under way


if __name__ == "__main__":
    main()
