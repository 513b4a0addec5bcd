"""The trial behind docs/adr/0002-openvino.md: parent and child as OpenVINO programs, in turns with llama.cpp.

    python3.11 -m venv /somewhere && /somewhere/bin/pip install openvino nncf
    .venv/bin/python -m benchmarks.openvino_trial --workspace workspace/smollm2-cpu \
        --packages /somewhere/lib/python3.11/site-packages

One thread, CPU time; a prefill of 256 tokens and 32 decode steps in the middle of 64. OpenVINO is no dependency: its
packages are looked for after all others. Prints, writes no page. A few minutes on a quiet machine (an estimate).
"""

# T = tokens, S = tokens in the cache, K = KV heads, D = head size

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from benchmarks.common import table
from benchmarks.served_load import last_report
from blocks.records import Metric
from blocks.runtime import set_threads
from tasks.engines.base import LoadOptions
from tasks.engines.llama_cpp import LlamaCpp
from tasks.engines.timing_in_turns import PARENT, median_metric
from tasks.export.logits_check import difference
from tasks.gguf.tokenizer_writer import NO_TOKENIZER
from tasks.gguf.writer import write_gguf
from tasks.inputs.children import open_child

PROMPT, GROW, STEPS, SEEN = 256, 16, 32, 3
Times = tuple[float, float]  # CPU seconds of the prefill and of a decode step


class Forward(nn.Module):
    """ids (1, T), positions (1, T), a key and a value cache (1, K, S, D) per attention -> last logits, caches."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.body, self.head = model.model, model.lm_head
        self.heads = model.config.num_attention_heads
        self.size = getattr(model.config, "head_dim", None) or model.config.hidden_size // self.heads
        self.kv_heads = [
            layer.self_attn.k_proj.out_features // self.size if hasattr(layer.self_attn, "k_proj") else 0
            for layer in self.body.layers
        ]

    def forward(self, ids: Tensor, positions: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        hidden = self.body.embed_tokens(ids)
        angles = positions[..., None].float() * self.body.rotary_emb.inv_freq
        angles = torch.cat([angles, angles], -1)[:, None]
        places = torch.arange(caches[0].shape[2] + ids.shape[1])
        mask = (places[None, :] <= positions[0][:, None])[None, None]
        after: list[Tensor] = []
        for layer, kv_heads in zip(self.body.layers, self.kv_heads, strict=True):
            if kv_heads:
                before = caches[len(after)], caches[len(after) + 1]
                out, *new = self.attend(layer, hidden, kv_heads, before, angles, mask)
                hidden, after = hidden + out, after + new
            elif layer.self_attn is not None:
                hidden = hidden + layer.self_attn.linear_attn(layer.input_layernorm(hidden))
            if layer.mlp is not None:
                hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return (self.head(self.body.norm(hidden[:, -1:])), *after)

    def attend(
        self, layer: Any, hidden: Tensor, kv_heads: int, before: tuple[Tensor, Tensor], angles: Tensor, mask: Tensor
    ) -> tuple[Tensor, ...]:
        """Output of an attention subblock, its key and value cache with the new tokens."""
        own, normed = layer.self_attn, layer.input_layernorm(hidden)
        query, key, value = (
            project(normed).view(1, -1, heads, self.size).transpose(1, 2)
            for project, heads in ((own.q_proj, self.heads), (own.k_proj, kv_heads), (own.v_proj, kv_heads))
        )
        key = torch.cat([before[0], self.turned(key, angles)], 2)
        value = torch.cat([before[1], value], 2)
        wide = [
            one[:, :, None].expand(1, kv_heads, self.heads // kv_heads, one.shape[2], self.size).flatten(1, 2)
            for one in (key, value)
        ]
        out = nn.functional.scaled_dot_product_attention(self.turned(query, angles), *wide, attn_mask=mask)
        return own.o_proj(out.transpose(1, 2).reshape(1, -1, self.heads * self.size)), key, value

    def turned(self, heads: Tensor, angles: Tensor) -> Tensor:
        """Rotary positions on (1, heads, T, D)."""
        first, second = heads[..., : self.size // 2], heads[..., self.size // 2 :]
        return heads * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


class Program:
    """One model in OpenVINO, its cache inside."""

    def __init__(self, model: Any, precision: str) -> None:
        import openvino
        from openvino._offline_transformations import apply_make_stateful_transformation

        forward = Forward(model).eval()
        kv_heads = [heads for heads in forward.kv_heads if heads for _ in ("key", "value")]
        caches = [torch.zeros(1, heads, 3, forward.size) for heads in kv_heads]
        with torch.inference_mode():
            example = (torch.ones(1, 4, dtype=torch.long), torch.arange(3, 7)[None], *caches)
            program = openvino.convert_model(forward, example_input=example)
        for place, port in enumerate(program.inputs):
            port.get_tensor().set_names({("ids", "positions")[place] if place < 2 else f"before{place - 2}"})
            shape = [1, -1] if place < 2 else [1, kv_heads[place - 2], -1, forward.size]
            port.get_node().set_partial_shape(openvino.PartialShape(shape))
        for place, port in enumerate(program.outputs):
            port.get_tensor().set_names({f"after{place - 1}" if place else "logits"})
        program.validate_nodes_and_infer_types()
        apply_make_stateful_transformation(program, {f"before{place}": f"after{place}" for place in range(len(caches))})
        if precision == "int8":
            import nncf

            program = nncf.compress_weights(program, mode=nncf.CompressWeightsMode.INT8_SYM)
        hint = "f32" if precision == "f32" else "bf16"
        settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
        self.request = openvino.Core().compile_model(program, "CPU", settings).create_infer_request()

    def feed(self, tokens: list[int], start: int) -> Tensor:
        """(V) logits after these tokens at these positions; `start` 0 forgets what was before."""
        if start == 0:
            self.request.reset_state()
        positions = numpy.arange(start, start + len(tokens), dtype=numpy.int64)[None]
        found = self.request.infer({"ids": numpy.array([tokens], dtype=numpy.int64), "positions": positions})
        return torch.from_numpy(found[self.request.model_outputs[0]][0, 0].copy())

    def times(self, prompt: list[int]) -> Times:
        """CPU seconds of the prefill and of a decode step."""
        begun = time.process_time()
        self.feed(prompt, 0)
        prefill = time.process_time() - begun
        for place in range(GROW):
            self.feed([5], len(prompt) + place)
        begun = time.process_time()
        for place in range(STEPS):
            self.feed([5], len(prompt) + GROW + place)
        return prefill, (time.process_time() - begun) / STEPS


class Llama:
    """One model in llama.cpp, from a GGUF file that does not stay."""

    def __init__(self, model: Any, precision: str) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="puzzle-trial-")
        file = write_gguf(model, Path(self.folder.name) / "model.gguf", precision, NO_TOKENIZER, "trial")
        self.session = LlamaCpp().load(file, LoadOptions(precision=precision, threads=1, context_tokens=PROMPT + 64))

    def times(self, prompt: list[int]) -> Times:
        """CPU seconds of the prefill and of a decode step."""
        turn = self.session.request(torch.tensor([prompt]), STEPS, GROW)
        return turn.prefill_cpu, turn.step_cpu


def main() -> None:
    """Convert, compare logits, time in turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", type=Path, default=Path("workspace/smollm2-cpu"))
    parser.add_argument("--packages", required=True, help="site-packages that hold openvino and nncf")
    parser.add_argument("--openvino", nargs="*", default=["f32", "bf16", "int8"])
    parser.add_argument("--llama", nargs="*", default=["float32", "bfloat16", "q8_0"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sys.path.append(options.packages)
    set_threads(1)
    report = last_report(options.workspace)
    folders = {PARENT: report.parent.folder, "child": report.child_folder}
    models = {name: open_child(options.workspace / folder, torch.float32) for name, folder in folders.items()}
    prompt = torch.randint(49152, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    runs: dict[tuple[str, str], Program | Llama] = {}
    for name, model in models.items():
        for precision in options.openvino:
            program = runs[f"OpenVINO {precision}", name] = Program(model, precision)
            print(f"OpenVINO {precision}, {name}: {_logits(program, model, prompt)}", flush=True)
        for precision in options.llama:
            runs[f"llama.cpp {precision}", name] = Llama(model, precision)
    found: dict[tuple[str, str], list[Times]] = {key: [] for key in runs}
    for number in range(options.rounds + 1):  # the first warms up
        for key in reversed(runs) if number % 2 else runs:
            times = runs[key].times(prompt)
            found[key] += [times] if number else []
        print(f"round {number} of {options.rounds}, load average {os.getloadavg()[0]:.1f}", flush=True)
    header = ["engine", "model", "prefill tok/CPU s", "decode tok/CPU s", "prefill gain", "decode gain"]
    print(table(header, [_cells(key, found) for key in runs]))


def _logits(program: Program, model: Any, prompt: list[int]) -> str:
    """Logits beside torch's after the prefill and after SEEN tokens more, one by one."""
    more = list(range(7, 7 + SEEN))
    first = program.feed(prompt, 0)
    last = [program.feed([token], PROMPT + place) for place, token in enumerate(more)][-1]
    with torch.inference_mode():
        own = model(torch.tensor([prompt + more]), use_cache=False).logits[0, [PROMPT - 1, PROMPT + SEEN - 1]]
    found = difference(own, torch.stack([first, last]))
    return f"logits off by at most {found.most:.2g}, KL {found.kl:.2g}"


def _cells(key: tuple[str, str], found: dict[tuple[str, str], list[Times]]) -> list[str]:
    own, parents = found[key], found[key[0], PARENT]
    speeds = [tokens / statistics.median(times[phase] for times in own) for phase, tokens in ((0, PROMPT), (1, 1))]
    gains: list[Metric] = [
        median_metric([theirs[phase] / ours[phase] for theirs, ours in zip(parents, own, strict=True)])
        for phase in (0, 1)
    ]
    told = ["", ""] if key[1] == PARENT else [f"{gain.value:.2f} ±{gain.se:.2f}" for gain in gains]
    return [*key, f"{speeds[0]:.0f}", f"{speeds[1]:.1f}", *told]


if __name__ == "__main__":
    main()
