"""End-to-end speed of whole models in torch: prefill and decode tokens per second, models in turns.

What the search predicted from the costs of single subblocks is measured here on the assembled model. On a machine that
others use too, only an interleaved order is fair: in every round each model has its turn, every other round backwards.
"""

# B = batch, P = prompt tokens

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blocks.export_code.modeling_decilm import CACHE
from blocks.records import Metric, Turn, Value
from profiles.schema import Scenario

MAX_DECODE_STEPS = 32  # decoding is measured over at most so many tokens, then extrapolated to the whole request
SE_OF_MEDIAN = 1.2533  # sqrt(pi / 2): standard error of a median over that of a mean, normal samples


class Throughput(Value):
    """Medians over the rounds of one scenario and batch size, standard errors from the rounds.

    runtime_seconds: one whole request, prompt and all generated tokens. cpu_seconds: the same in CPU time of the
    process, all threads (load of other processes does not count).
    """

    scenario: str
    batch_size: int
    prefill_tokens_per_second: Metric
    decode_tokens_per_second: Metric
    runtime_seconds: Metric
    cpu_seconds: Metric


def median_metric(values: Sequence[float]) -> Metric:
    """Median with its standard error, 1.2533 std / sqrt(n); 0 for a single value."""
    count = len(values)
    se = SE_OF_MEDIAN * statistics.stdev(values) / count**0.5 if count > 1 else 0.0
    return Metric(value=statistics.median(values), se=se, n=count)


def measure_throughput(
    models: Mapping[str, Any], scenario: Scenario, batch_size: int, rounds: int, seed: int = 0
) -> dict[str, Throughput]:
    """Speed of every model on random prompts of the scenario. Weights stay on the device where they are.

    The first, untimed request of each model warms caches up. ValueError for less than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    generator = torch.Generator().manual_seed(seed)
    vocabulary = min(model.config.vocab_size for model in models.values())
    prompt = torch.randint(vocabulary, (batch_size, scenario.prompt_tokens), generator=generator)
    steps = min(scenario.generated_tokens, MAX_DECODE_STEPS)
    for model in models.values():
        request_of(model, prompt, min(steps, 2))
    turns = in_turns({name: partial(request_of, model, prompt, steps) for name, model in models.items()}, rounds)
    return {name: summary_of(own, scenario, batch_size) for name, own in turns.items()}


def in_turns(
    requests: Mapping[str, Callable[[], Turn]], rounds: int, tell: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, list[Turn]]:
    """So many turns of every request, in rounds: each once a round, every other round backwards."""
    order = list(requests)
    turns: dict[str, list[Turn]] = {name: [] for name in order}
    for number in range(rounds):
        for place, name in enumerate(reversed(order) if number % 2 else order, start=1):
            turns[name].append(requests[name]())
            tell(number * len(order) + place, rounds * len(order))
    return turns


def summary_of(turns: Sequence[Turn], scenario: Scenario, batch_size: int) -> Throughput:
    """Medians of one model's turns."""
    prompt_tokens, generated = scenario.prompt_tokens * batch_size, scenario.generated_tokens
    return Throughput(
        scenario=scenario.name,
        batch_size=batch_size,
        prefill_tokens_per_second=median_metric([prompt_tokens / turn.prefill for turn in turns]),
        decode_tokens_per_second=median_metric([batch_size / turn.step for turn in turns]),
        runtime_seconds=median_metric([turn.prefill + generated * turn.step for turn in turns]),
        cpu_seconds=median_metric([turn.prefill_cpu + generated * turn.step_cpu for turn in turns]),
    )


def request_of(model: Any, prompt: Tensor, steps: int) -> Turn:
    """One prefill of `prompt` (B, P) with cache, then `steps` greedy decode steps."""
    device = next(model.parameters()).device
    ids = prompt.to(device)
    training = model.training
    model.eval()
    with torch.inference_mode():
        out, prefill, prefill_cpu = _timed(lambda: model(ids, use_cache=True, logits_to_keep=1), device)

        def decode() -> None:
            step = out
            for _ in range(steps):
                token = step.logits[:, -1:].argmax(dim=-1)
                step = model(token, **{CACHE: getattr(step, CACHE)}, use_cache=True, logits_to_keep=1)

        _, whole, whole_cpu = _timed(decode, device)
    model.train(training)
    return Turn(prefill=prefill, step=whole / steps, prefill_cpu=prefill_cpu, step_cpu=whole_cpu / steps)


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float, float]:
    """Result, wall seconds, CPU seconds."""
    _wait_for(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    _wait_for(device)
    return result, time.perf_counter() - wall, time.process_time() - cpu


def _wait_for(device: torch.device) -> None:
    """An accelerator works on after the call returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
