"""How whole models are timed: in turns, so that whatever else a machine does falls on all of them alike.

In every round each model answers one request, and every other round goes backwards. A speed is the median over the
rounds, a gain the median of the parent's time over the model's in the same round. Where a gain is unsure, of a child
(tasks/measure/end_to_end.py) or of the parent in a type (tasks/measure/typed_costs.py), there are more rounds, up to
five times as many. Requests to models in torch are made here too.
"""

# B = batch, P = prompt tokens

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blocks.errors import PuzzleFailure
from blocks.estimates import lower_bound
from blocks.records import PARENT, Gains, Metric, Throughput, Turn
from blocks.runtime import products_as_served, release_memory
from profiles.schema import Scenario
from tasks.running.progress import Progress, no_progress
from tasks.running.usage import resident_bytes, restart_peak

MAX_DECODE_STEPS = 32  # at most this many decode steps are timed; a whole request is extrapolated from them
SURE = 0.02  # how far the one-sided 95 % bound of a request's gain may be off, relative, that no more rounds are made
LONGEST = 5  # times as many rounds as were asked, at most
SE_OF_MEDIAN = 1.2533  # sqrt(pi / 2): standard error of a median over that of a mean, normal samples


Unsure = Callable[[Mapping[str, Sequence[Turn]]], bool]


class ClockTooCoarse(PuzzleFailure):
    """Requests took less time than the machine's clock can show."""


def median_metric(values: Sequence[float]) -> Metric:
    """Median with its standard error, 1.2533 std / sqrt(n); 0 for a single value."""
    count = len(values)
    se = SE_OF_MEDIAN * statistics.stdev(values) / count**0.5 if count > 1 else 0.0
    return Metric(value=statistics.median(values), se=se, n=count)


def relative_error(metric: Metric) -> float:
    """Standard error over value; 0 for what took no time that the clock shows."""
    return metric.se / metric.value if metric.value else 0.0


@products_as_served()
def measure_throughput(
    models: Mapping[str, Any], scenario: Scenario, batch_size: int, rounds: int, seed: int = 0
) -> dict[str, Throughput]:
    """Speed of every model in torch, on random prompts of the scenario. Weights stay on the device where they are.

    The first request of each model is not timed: it warms caches up, and the model's memory is measured in it. Raises
    ValueError for less than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    generator = torch.Generator().manual_seed(seed)
    vocabulary = min(model.config.vocab_size for model in models.values())
    prompt = torch.randint(vocabulary, (batch_size, scenario.prompt_tokens), generator=generator)
    steps = timed_steps(scenario.generated_tokens)
    memory = {name: _peak_bytes(model, prompt, scenario.generated_tokens) for name, model in models.items()}
    grow = tokens_before(scenario.generated_tokens, steps)
    requests = {name: partial(request_of, model, prompt, steps, grow) for name, model in models.items()}
    turns = in_turns(requests, rounds, unsure=is_unsure(scenario.generated_tokens))
    return summaries(turns, scenario, batch_size, memory)


def is_unsure(generated_tokens: int) -> Unsure:
    """Tells whether a gain of a request is not known well enough yet."""

    def unsure(turns: Mapping[str, Sequence[Turn]]) -> bool:
        if PARENT not in turns:
            return False
        gains = [gains_of(turns[PARENT], own, generated_tokens).request for own in turns.values()]
        return any(lower_bound(gain, 0.95) < (1 - SURE) * gain.value for gain in gains)

    return unsure


def timed_steps(generated_tokens: int) -> int:
    """How many decode steps of a generation are timed."""
    return min(generated_tokens, MAX_DECODE_STEPS)


def tokens_before(generated_tokens: int, steps: int) -> int:
    """How many tokens are run between the prompt and the timed steps.

    The steps in the middle of a generation are timed, because they take as long as its average step.
    """
    return max(0, (generated_tokens - steps) // 2)


def _peak_bytes(model: Any, prompt: Tensor, generated_tokens: int) -> int | None:
    """Bytes of the weights and of what a request needs beside them at most; None where the system does not say."""
    device = next(model.parameters()).device
    weights = sum(parameter.nbytes for parameter in model.parameters())
    steps = min(generated_tokens, 2)
    work = partial(request_of, model, prompt, steps, generated_tokens - steps)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return weights + int(torch.cuda.max_memory_allocated(device)) - before
    if device.type != "cpu":
        return None
    release_memory()
    before = resident_bytes("VmRSS")
    is_restarted = restart_peak()
    work()
    return weights + max(0, resident_bytes("VmHWM") - before) if is_restarted else None


def in_turns(
    requests: Mapping[str, Callable[[], Turn]],
    rounds: int,
    progress: Progress = no_progress,
    unsure: Unsure | None = None,
) -> dict[str, list[Turn]]:
    """Make every request once in each round, every other round in reverse order; returns the turns of each.

    unsure: whether more rounds are needed, up to `LONGEST` times as many.
    """
    order = list(requests)
    turns: dict[str, list[Turn]] = {name: [] for name in order}
    for number in range(rounds * LONGEST):
        if number >= rounds and (unsure is None or not unsure(turns)):
            break
        for place, name in enumerate(reversed(order) if number % 2 else order, start=1):
            turns[name].append(_seen(requests[name](), name))
            progress(number * len(order) + place, max(rounds, number + 1) * len(order))
    return turns


def _seen(turn: Turn, name: str) -> Turn:
    unseen = [field for field, seconds in turn if seconds <= 0]
    if unseen:
        raise ClockTooCoarse(
            f"the clock shows no time for {' and '.join(unseen)} of a request of {name}: it is too coarse for so "
            "little work. Give the scenario more prompt_tokens and generated_tokens, or `measure` more decode_steps."
        )
    return turn


def summaries(
    turns: Mapping[str, Sequence[Turn]], scenario: Scenario, batch_size: int, memory: Mapping[str, int | None]
) -> dict[str, Throughput]:
    """Speeds from every model's turns. Gains are over the model named `parent`, where there is one."""
    parents = turns.get(PARENT)
    return {
        name: _summary(own, scenario, batch_size).model_copy(
            update={
                "memory_bytes": memory[name],
                "gains": gains_of(parents, own, scenario.generated_tokens) if parents and name != PARENT else None,
            }
        )
        for name, own in turns.items()
    }


def _summary(turns: Sequence[Turn], scenario: Scenario, batch_size: int) -> Throughput:
    """The medians of one model's turns."""
    prompt_tokens, generated = scenario.prompt_tokens * batch_size, scenario.generated_tokens
    requests = [turn.prefill + generated * turn.step for turn in turns]
    return Throughput(
        scenario=scenario.name,
        batch_size=batch_size,
        prefill_tokens_per_second=median_metric([prompt_tokens / turn.prefill for turn in turns]),
        decode_tokens_per_second=median_metric([batch_size / turn.step for turn in turns]),
        first_token_seconds=median_metric([turn.prefill for turn in turns]),
        output_token_seconds=median_metric([turn.step for turn in turns]),
        prefill_cpu_seconds=median_metric([turn.prefill_cpu for turn in turns]),
        step_cpu_seconds=median_metric([turn.step_cpu for turn in turns]),
        runtime_seconds=median_metric(requests),
        cpu_seconds=median_metric([turn.prefill_cpu + generated * turn.step_cpu for turn in turns]),
        generated_tokens_per_second=median_metric([batch_size * generated / seconds for seconds in requests]),
        requests_per_second=median_metric([batch_size / seconds for seconds in requests]),
    )


def gains_of(parents: Sequence[Turn], own: Sequence[Turn], generated: int) -> Gains:
    """Gains of a model over the parent: medians of the ratios of times in the same round."""
    pairs = list(zip(parents, own, strict=True))

    def gain(seconds: Callable[[Turn], float]) -> Metric:
        return median_metric([seconds(theirs) / seconds(ours) for theirs, ours in pairs])

    return Gains(
        prefill=gain(lambda turn: turn.prefill),
        decode=gain(lambda turn: turn.step),
        request=gain(lambda turn: turn.prefill + generated * turn.step),
        prefill_cpu=gain(lambda turn: turn.prefill_cpu),
        decode_cpu=gain(lambda turn: turn.step_cpu),
    )


def request_of(model: Any, prompt: Tensor, steps: int, grow: int = 0) -> Turn:
    """One request to a model in torch; see tasks.engines.base.Session.request."""
    from blocks.export_code.modeling_decilm import CACHE

    device = next(model.parameters()).device
    ids = prompt.to(device)
    training = model.training
    model.eval()
    with torch.inference_mode():
        out, prefill, prefill_cpu = _timed(lambda: model(ids, use_cache=True, logits_to_keep=1), device)
        if grow:
            more = ids[:, :1].expand(-1, grow)
            out = model(more, **{CACHE: getattr(out, CACHE)}, use_cache=True, logits_to_keep=1)

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
    wait_for(device)
    clock = cpu_clock(torch.get_num_threads())
    wall, cpu = time.perf_counter(), clock()
    result = work()
    wait_for(device)
    return result, time.perf_counter() - wall, clock() - cpu


def cpu_clock(threads: int) -> Callable[[], float]:
    """A clock of CPU seconds: of the calling thread where one thread does all the work, else of the process.

    With one thread, the threads of a flow that runs in the same process do not count.
    """
    return time.thread_time if threads == 1 else time.process_time


def wait_for(device: torch.device) -> None:
    """Wait until an accelerator has finished: it still computes when a call has returned."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
