"""vLLM's OpenAI server, run by the interpreter of vLLM's own environment, so it imports nothing of puzzle.

    .venv-vllm/bin/python -P tasks/engines/vllm_server.py --model FOLDER --port PORT ...

It takes the server's own options and serves until its standard input ends. That ends with the run that started it, also
when the run is killed, so neither the server nor the engine core that it starts is left behind.
"""

import importlib
import os
import runpy
import signal
import tempfile
import threading

MODULE = "vllm.entrypoints.openai.api_server"


def watch() -> None:
    """End the whole process group, which is this server's own, when standard input ends."""
    while os.read(0, 4096):  # not sys.stdin: its lock would be held when the interpreter ends
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Serve. The model's own code, where it is trusted, is copied to a temporary folder."""
    assert os.getpgid(0) == os.getpid(), "it ends its whole process group, so it must be the leader of one"
    threading.Thread(target=watch, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="puzzle-vllm-") as folder:
        os.environ.setdefault("HF_MODULES_CACHE", folder)
        importlib.import_module("puzzle_vllm").register()  # the engine core, a fork of this process, knows it too
        runpy.run_module(MODULE, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
