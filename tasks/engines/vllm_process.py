"""The process in which vLLM runs. It has the interpreter of vLLM's own environment, so it imports nothing of puzzle.

    .venv-vllm/bin/python tasks/engines/vllm_process.py

It reads one JSON object a line and answers each with one, as tasks/engines/worker.py does. The questions are {"load":
...} first (and again for another model), {"request": ...}, {"memory": {}}, {"logits": ...}, {"generate": ...},
{"threads": {}}. vLLM's engine core runs in this process, so CPU seconds and memory of the process are those of the
model. Its steps are made one by one: the first step, which gives every sequence a token, is the prefill, and each later
one a decode step.
"""

# B = batch, P = prompt tokens, T = tokens, V = vocabulary

import base64
import gc
import importlib
import itertools
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

BLOCK_TOKENS = 128  # of vLLM's KV cache on a CPU
LEAST_KV_BYTES = 32 << 20


class Server:
    """Answers questions: each is a method."""

    def __init__(self) -> None:
        self.engine: Any = None
        self.before = 0
        self.vocab_size = 0
        self.numbers: Iterator[int] = itertools.count()

    def load(
        self, path: str, how: dict[str, Any], trust: bool, dummy: bool = False, architecture: str | None = None
    ) -> dict[str, Any]:
        """Load an exported folder.

        trust: run the folder's own config class. dummy: the folder has no weights, fill in noise. architecture: of
        vLLM or of puzzle's plugin, in the place of the one that the config names.
        """
        import torch
        import vllm
        from vllm import EngineArgs, LLMEngine

        plugin = importlib.import_module("puzzle_vllm")
        if architecture == plugin.ARCHITECTURE:
            plugin.register()
        self.engine = None
        gc.collect()
        self.before = resident_bytes("VmRSS")
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        tokens = min(how["context_tokens"] + 1, config["max_position_embeddings"])  # the last token is not fed again
        arguments = EngineArgs(
            model=path,
            dtype=how["precision"],
            load_format="dummy" if dummy else "safetensors",
            trust_remote_code=trust,
            hf_overrides={"architectures": [architecture]} if architecture else {},
            skip_tokenizer_init=True,
            enforce_eager=True,  # compilation takes minutes a model
            max_model_len=tokens,
            max_num_seqs=how["batch_size"],
            max_num_batched_tokens=max(2048, how["batch_size"] * tokens),  # all prompts in one step
            enable_prefix_caching=False,  # the same prompt comes again every round
            kv_cache_memory_bytes=kv_bytes(config, how["precision"], how["batch_size"], tokens),
            logprobs_mode="raw_logits",
            max_logprobs=-1,
            disable_log_stats=True,
            seed=0,
        )
        self.engine = LLMEngine.from_engine_args(arguments)
        self.vocab_size = config["vocab_size"]
        version = f"vLLM {vllm.__version__} on CPU, eager, torch {torch.__version__}"
        return {"version": version, "vocab_size": self.vocab_size}

    def request(self, batch_size: int, prompt_tokens: int, steps: int, seed: int, grow: int = 0) -> dict[str, Any]:
        """Seconds of one prefill and of one decode step. The decode steps come after `grow` further tokens."""
        rows = self._rows(batch_size, prompt_tokens + grow, seed)
        prefill = self._prefill([row[:prompt_tokens] for row in rows], 1 if grow else steps + 1)
        if grow:
            self._drain()
            self._prefill(rows, steps + 1)
        decode = self._timed(steps)
        self._drain()
        return {
            "prefill": prefill[0],
            "step": decode[0] / steps,
            "prefill_cpu": prefill[1],
            "step_cpu": decode[1] / steps,
        }

    def logits(self, tokens: list[int]) -> dict[str, Any]:
        """(T, V) float32 logits of one sequence, little-endian, in base 64."""
        import numpy
        import torch

        # vLLM compiles how it ranks log-probabilities, even when eager: a C++ compiler for half a minute, for one sum
        with torch.compiler.set_stance("force_eager"):
            (output,) = self._run([tokens], 1, prompt_logprobs=-1, logprobs=-1, flat_logprobs=True)
        rows = numpy.full((len(tokens), self.vocab_size), numpy.nan, dtype="<f4")
        for first, row, found in [
            *((place, place - 1, output.prompt_logprobs) for place in range(1, len(tokens))),
            (0, len(tokens) - 1, output.outputs[0].logprobs),
        ]:
            own = slice(found.start_indices[first], found.end_indices[first])
            rows[row, numpy.array(found.token_ids[own])] = found.logprobs[own]
        return {"shape": rows.shape, "values": base64.b64encode(rows.tobytes()).decode()}

    def generate(self, tokens: list[int], steps: int) -> dict[str, Any]:
        """The next tokens of one sequence, greedy."""
        (output,) = self._run([tokens], steps)
        return {"tokens": list(output.outputs[0].token_ids)}

    def threads(self) -> dict[str, Any]:
        """Threads of torch's (and so vLLM's) matrix products."""
        import torch

        return {"threads": torch.get_num_threads()}

    def memory(self) -> dict[str, Any]:
        """The highest resident size so far, less what the process held before the model was loaded."""
        return {"bytes": max(0, resident_bytes("VmHWM") - self.before)}

    def _rows(self, batch_size: int, tokens: int, seed: int) -> list[list[int]]:
        import torch

        generator = torch.Generator().manual_seed(seed)
        rows: list[list[int]] = torch.randint(self.vocab_size, (batch_size, tokens), generator=generator).tolist()
        return rows

    def _add(self, rows: list[list[int]], steps: int, **options: Any) -> None:
        from vllm import SamplingParams

        for row in rows:
            chosen = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, detokenize=False, **options)
            self.engine.add_request(str(next(self.numbers)), {"prompt_token_ids": row}, chosen)

    def _run(self, rows: list[list[int]], steps: int, **options: Any) -> list[Any]:
        self._add(rows, steps, **options)
        return self._drain()

    def _drain(self) -> list[Any]:
        done: list[Any] = []
        while self.engine.has_unfinished_requests():
            done += [output for output in self.engine.step() if output.finished]
        return done

    def _prefill(self, rows: list[list[int]], steps: int) -> tuple[float, float]:
        """Wall and CPU seconds until every sequence has its first token."""
        self._add(rows, steps)
        wall, cpu = time.perf_counter(), time.process_time()
        outputs = self.engine.step()
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        _expect(outputs, len(rows), 1)
        return seconds

    def _timed(self, steps: int) -> tuple[float, float]:
        """Wall and CPU seconds of `steps` steps of the sequences that are being generated."""
        count = self.engine.get_num_unfinished_requests()
        outputs: list[Any] = []
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            outputs = self.engine.step()
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        _expect(outputs, count, steps + 1)
        return seconds


def _expect(outputs: list[Any], sequences: int, tokens: int) -> None:
    """Make sure that what was timed gave one token to every sequence in every step."""
    found = [len(output.outputs[0].token_ids) for output in outputs]
    if found != [tokens] * sequences:
        raise RuntimeError(f"vLLM gave {found} tokens where {sequences} sequences should have {tokens} each")


def kv_bytes(config: dict[str, Any], precision: str, batch_size: int, tokens: int) -> int:
    """Bytes for the sequences' KV cache, times two, because vLLM holds some blocks back.

    A block holds a state of recurrent attention whole, in all layers, and a sequence fills its last block in part.
    """
    heads, size = config["num_attention_heads"], 4 if precision == "float32" else 2
    head, kv_heads = (
        config.get("head_dim") or config["hidden_size"] // heads,
        config.get("num_key_value_heads") or heads,
    )
    rules = [block["attention"].get("recurrent") for block in config.get("block_configs", ())]
    mixed = max((rule["conv_kernel"] - 1 for rule in rules if rule), default=0) * (heads + 2 * kv_heads) * head
    state = (4 * heads * head**2 if any(rules) else 0) + mixed * size
    keys = (-(-tokens // BLOCK_TOKENS) + 1) * BLOCK_TOKENS * 2 * kv_heads * head * size
    return max(LEAST_KV_BYTES, 2 * batch_size * config["num_hidden_layers"] * (keys + state))


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def _reason(error: BaseException) -> str:
    """The error at the root of a chain of errors, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[:600]


def main() -> None:
    """Answer until standard input ends. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="puzzle-vllm-") as folder:
        os.environ["HF_MODULES_CACHE"] = folder  # a folder's own code stays nowhere
        importlib.import_module("vllm")  # takes seconds: several processes can do it at the same time
        answer_all(Server(), answers)


def answer_all(server: Server, answers: TextIO) -> None:
    """One answer a line for every question."""
    for line in sys.stdin:
        ((name, arguments),) = json.loads(line).items()
        try:
            answer = getattr(server, name)(**arguments)
        except Exception as error:
            if os.environ.get("PUZZLE_VLLM_TRACE"):
                traceback.print_exc()
            answer = {"error": _reason(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
