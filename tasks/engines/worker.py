"""One model in one engine in a process of its own, so that its memory can be measured and no other threads disturb it.

`Worker` starts the process and asks it questions. The process (`python -m tasks.engines.worker`, or vllm_process.py for
vLLM) reads one JSON object a line and answers each with one: {"load": ...} first, then {"request": ...} and {"memory":
{}} as often as wanted. Pipes and JSON are used instead of `multiprocessing`, because vLLM's process has another
interpreter, in which puzzle cannot be imported.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from blocks.errors import PuzzleError
from blocks.runtime import configure

if TYPE_CHECKING:  # at run time torch comes after `configure`
    from blocks.records import Turn
    from tasks.engines.base import EngineProcess


class Worker:
    """A process that holds one model in one engine. Use as a context manager."""

    def __init__(self, what: "EngineProcess") -> None:
        self.process = subprocess.Popen(
            what.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | what.environment,
            text=True,
        )
        self.what = what.load
        self.version = ""

    def load(self) -> dict[str, Any]:
        """Load the model. Starting is a step of its own, so that several processes can start at the same time."""
        answer = self.ask({"load": self.what})
        self.version = str(answer["version"])
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def request(self, batch_size: int, prompt_tokens: int, steps: int, seed: int, grow: int = 0) -> "Turn":
        """Time one request of random prompts; `grow` tokens are run untimed before the decode steps."""
        from blocks.records import Turn

        shape = {"batch_size": batch_size, "prompt_tokens": prompt_tokens, "steps": steps, "seed": seed, "grow": grow}
        return Turn(**self.ask({"request": shape}))

    def memory_bytes(self) -> int:
        """The highest resident size so far, less what the process held before the model was loaded."""
        return int(self.ask({"memory": {}})["bytes"])

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=30)
        if self.process.poll() is None:
            self.process.kill()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer to {name: arguments}. Raises EngineFailed when the process reports an error, or has ended."""
        from tasks.engines.errors import EngineFailed

        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended: the empty answer below says so
        line = self.process.stdout.readline()
        if not line:
            raise EngineFailed(f"the engine's process ended with status {self.process.wait()}: its error stands above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineFailed(str(answer["error"]))
        return answer


class _Server:
    """The other side, in the process: answers questions. Each question is a method."""

    def __init__(self) -> None:
        self.before = 0
        self.session: Any = None

    def load(self, engine: str, path: str, how: dict[str, Any]) -> dict[str, Any]:
        from tasks.engines.base import LoadOptions
        from tasks.engines.registry import installed_engine

        found = installed_engine(engine)
        from tasks.running.usage import resident_bytes

        version = found.version()
        self.before = resident_bytes("VmRSS")
        self.session = found.load(Path(path), LoadOptions(**how))
        return {"version": version}

    def request(self, batch_size: int, prompt_tokens: int, steps: int, seed: int, grow: int = 0) -> dict[str, Any]:
        import torch

        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(self.session.vocab_size, (batch_size, prompt_tokens), generator=generator)
        return dict(self.session.request(prompt, steps, grow).model_dump())

    def memory(self) -> dict[str, Any]:
        from tasks.running.usage import resident_bytes

        return {"bytes": max(0, resident_bytes("VmHWM") - self.before)}


def main() -> None:
    """Answer until standard input ends. What libraries print goes to standard error."""
    configure()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = _Server()
    for line in sys.stdin:
        ((name, arguments),) = json.loads(line).items()
        try:
            answer = getattr(server, name)(**arguments)
        except PuzzleError as error:
            answer = {"error": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
