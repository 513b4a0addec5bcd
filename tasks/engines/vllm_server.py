"""vLLM's OpenAI server, run by the interpreter of vLLM's own environment, so it imports nothing of puzzle.

    .venv-vllm/bin/python -P tasks/engines/vllm_server.py --model FOLDER --port PORT ...

It takes the server's own options and serves until its standard input ends. That ends with the run that started it, also
when the run is killed, so neither the server nor the engine core that it starts is left behind.
"""

import os
import runpy
import signal
import sys
import tempfile
import threading
from pathlib import Path

MODULE = "vllm.entrypoints.openai.api_server"


def watch() -> None:
    """End the whole process group, which is this server's own, when standard input ends."""
    while os.read(0, 4096):  # not sys.stdin: its lock would be held when the interpreter ends
        pass
    os.killpg(0, signal.SIGKILL)


def install_plugin(folder: Path) -> None:
    """Have vLLM find puzzle's plugin as if pip had installed it, in the processes that it starts too."""
    known = folder / "puzzle_vllm-1.1.dist-info"
    known.mkdir()
    (known / "METADATA").write_text("Metadata-Version: 2.1\nName: puzzle-vllm\nVersion: 1.1\n", encoding="utf-8")
    (known / "entry_points.txt").write_text("[vllm.general_plugins]\npuzzle = puzzle_vllm:register\n", encoding="utf-8")
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def main() -> None:
    """Serve. The model's own code, where it is trusted, is copied to a temporary folder."""
    assert os.getpgid(0) == os.getpid(), "it ends its whole process group, so it must be the leader of one"
    threading.Thread(target=watch, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="puzzle-vllm-") as folder:
        os.environ.setdefault("HF_MODULES_CACHE", folder)
        install_plugin(Path(folder))
        runpy.run_module(MODULE, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
