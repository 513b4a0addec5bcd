"""The search alone: seconds and memory of the mixed-integer program, and its objectives against a second solver.

    .venv/bin/python -m benchmarks.search

No model: libraries are drawn. `shared costs`: a variant costs the same in every layer, as in a library measured on one
machine, and memory, runtime and parameters go together. `independent rows`: every layer and every budget is drawn for
itself and all three bind; a cheaper variant scores worse, or (`uncorrelated`) costs say nothing about scores.
"""

import argparse
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from benchmarks.common import table, write_page
from profiles.schema import Search
from tasks.search.joint import JointLibrary, JointOption
from tasks.search.mip import minimise, solved_by
from tasks.search.program import Floats, Program
from tasks.search.request import Request, limits
from tasks.search.solve import front
from tests.test_mip import instance, scip

THREE = ("memory_gib", "latency_seconds", "parameters")


def main() -> None:
    """Time, compare, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=9)
    parser.add_argument("--against-scip", type=int, default=20, help="instances of 80 x 16")
    options = parser.parse_args()
    minimise(instance(4, 4, 0, 2), Search())  # the first call imports cvxpy and HiGHS
    before = peak_mib()
    rows = [
        timed("shared costs", 80, 54, options.seeds, lambda seed: shared(80, 6, 9, seed), "up to 1 s"),
        timed("shared costs", 126, 200, options.seeds, lambda seed: shared(126, 10, 20, seed), "-"),
        timed("shared costs, KL on 4 capabilities", 80, 54, options.seeds, capped, "under .5 s"),
        timed("independent rows", 80, 54, options.seeds, lambda seed: instance(80, 54, seed, 3), "up to 1 s"),
        timed("independent rows", 126, 200, options.seeds, lambda seed: instance(126, 200, seed, 3), "-"),
        timed("uncorrelated", 80, 54, options.seeds, lambda seed: uncorrelated(80, 54, seed), "up to 1 s"),
        timed("uncorrelated", 126, 200, options.seeds, lambda seed: uncorrelated(126, 200, seed), "-"),
    ]
    after = peak_mib()
    typed = few_types(20.0)
    seconds, found = timed_sweep(50)
    parts = [
        "Three budgets each (and four limits on KL where that is said), solved and proved by CVXPY with HiGHS to a gap "
        "of 1e-6; the LP, the first choice that "
        "shrinks the program and building the model included; one thread. Seconds of wall time, CPU seconds beside "
        f"them. {solved_by()}. "
        f"Load average of the last five minutes {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores.",
        table(["library", "layers x variants", "median", "least", "most", "median CPU", "most CPU", "asked"], rows),
        f"Peak memory of the process {after / 1024:.3f} GiB, {(after - before) / 1024:.3f} GiB more than with "
        "cvxpy, HiGHS and the libraries' imports alone.",
        f"Pareto sweep, 80 x 54 with shared costs, 50 limits of the runtime under one of the memory: {seconds:.1f} s, "
        f"{found} limits with an answer (asked: under 30 s).",
        "## At most 6 of 54 block types",
        "80 x 54, 20 s of wall time each. `time_limit`: not proved by then, the gap is certified by HiGHS's bound.",
        table(["library", "objective", "gap", "status", "seconds", "CPU"], typed),
        "## Against SCIP",
        against_scip(options.against_scip),
    ]
    write_page("search", "The search alone", parts)


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(name: str, layers: int, variants: int, seeds: int, make: Callable[[int], Program], asked: str) -> list[str]:
    """One row: `seeds` instances, each solved once."""
    seconds, cpu = [], []
    for seed in range(seeds):
        program = make(seed)
        started, spent = time.perf_counter(), time.process_time()
        answer = minimise(program, Search())
        seconds.append(time.perf_counter() - started)
        cpu.append(time.process_time() - spent)
        assert answer is not None and answer.status == "optimal", "proved by HiGHS within the time limit"
        print(
            f"{name} {layers} x {variants} seed {seed}: {seconds[-1]:.2f} s, objective {answer.objective:.9f}",
            file=sys.stderr,
        )
    figures = (statistics.median(seconds), min(seconds), max(seconds), statistics.median(cpu), max(cpu))
    return [name, f"{layers} x {variants}", *(f"{figure:.2f}" for figure in figures), asked]


def few_types(limit: float) -> list[list[str]]:
    """Two instances of each kind with at most 6 types."""
    made = {
        "shared costs": lambda seed: shared(80, 6, 9, seed),
        "independent rows": lambda seed: instance(80, 54, seed, 3),
    }
    made["uncorrelated"] = lambda seed: uncorrelated(80, 54, seed)
    rows = []
    for name, make in made.items():
        for seed in range(2):
            program = replace(make(seed), types=np.tile(np.arange(54), 80), max_types=6)
            started, spent = time.perf_counter(), time.process_time()
            answer = minimise(program, Search(time_limit_seconds=limit))
            seconds, cpu = time.perf_counter() - started, time.process_time() - spent
            assert answer is not None
            gap = (answer.objective - answer.bound) / abs(answer.objective)
            rows.append([name, f"{answer.objective:.6f}", f"{gap:.1e}", answer.status, f"{seconds:.1f}", f"{cpu:.1f}"])
            print("at most 6 types:", *rows[-1], file=sys.stderr)
    return rows


def against_scip(count: int) -> str:
    """The largest difference of the optimal objectives."""
    worst, ours, theirs = 0.0, 0.0, 0.0
    exact = Search(gap=1e-9, time_limit_seconds=600)
    for seed in range(count):
        program = instance(80, 16, 100 + seed, 3)
        started = time.perf_counter()
        answer = minimise(program, exact)
        halfway = time.perf_counter()
        other = scip(program)
        ours, theirs = ours + halfway - started, theirs + time.perf_counter() - halfway
        assert answer is not None
        worst = max(worst, abs(answer.objective - other))
        print(f"scip {seed}: {answer.objective:.9f} {other:.9f}", file=sys.stderr)
    return (
        f"{count} instances of 80 x 16, independent rows, three budgets that bind: largest difference of the "
        f"objectives {worst:.1e} (asked: 1e-6). {ours:.1f} s here, {theirs:.1f} s in SCIP, both to a gap of 1e-9."
    )


def timed_sweep(points: int) -> tuple[float, int]:
    """Seconds of a sweep over the runtime, and how many limits had an answer."""
    library = joint(shared(80, 6, 9, 0), 80)
    runtimes = [[o.costs["latency_seconds"] for o in library.options if o.layer == layer] for layer in library.layers]
    low, high = sum(map(min, runtimes)), sum(map(max, runtimes))
    values = list(np.linspace(low + 0.02 * (high - low), high, points))
    started = time.perf_counter()
    choices = front(library, Request(limits=limits(memory_gib=1.0)), "latency_seconds", values)
    return time.perf_counter() - started, sum(choice is not None for choice in choices)


def joint(program: Program, layers: int) -> JointLibrary:
    """The same numbers as a library: memory and runtime as shares of their limits."""
    variants = len(program.scores) // layers
    options = [
        JointOption(
            layer=f"layer_{index // variants}",
            label=f"variant {index % variants}",
            metrics={"kl": float(program.scores[index])},
            costs={name: float(program.usage[row, index]) for row, name in enumerate(THREE[:2])},
        )
        for index in range(len(program.scores))
    ]
    return JointLibrary(layers=tuple(f"layer_{i}" for i in range(layers)), options=tuple(options))


def uncorrelated(slots: int, options: int, seed: int) -> Program:
    """Scores and costs drawn apart; the limits are half of an option's mean cost per slot."""
    generator = np.random.default_rng(seed)
    scores = generator.uniform(0.2, 3, (slots, 1)) * generator.uniform(0, 1, (slots, options))
    usage = generator.uniform(0, 1, (3, slots * options)) / (0.25 * slots)
    return Program(scores=scores.ravel(), starts=np.arange(slots) * options, usage=usage, room=np.ones(3))


def shared(layers: int, attentions: int, ffns: int, seed: int) -> Program:
    """Every pair of an attention and an ffn; scores rise with what is taken away, early layers hurt more."""
    generator = np.random.default_rng(seed)

    def kept(count: int) -> Floats:
        """Shares of the parent's subblock, from all to nothing."""
        between = -np.sort(-generator.uniform(0.05, 1, count - 2))
        return np.concatenate([[1.0], between, [0.0]])

    def noisy(values: Floats, width: float) -> Floats:
        return values * generator.uniform(1 - width, 1 + width, len(values))

    a, f = kept(attentions), kept(ffns)
    weights_a, cache, time_a = noisy(0.2 * a, 0.1), noisy(0.5 * a, 0.1), noisy(0.5 * a**0.7, 0.2)
    weights_f, time_f = noisy(0.8 * f, 0.02), noisy(0.5 * f**0.8, 0.2)
    rows = [(weights_a + cache, weights_f, 0.6), (time_a, time_f, 0.57), (weights_a, weights_f, 0.66)]
    usage = [np.tile((x[:, None] + y).ravel(), layers) / ((x[0] + y[0]) * layers * room) for x, y, room in rows]
    weight = generator.uniform(0.2, 3, (layers, 1, 1)) * np.linspace(2, 0.5, layers)[:, None, None]
    hurt_a = (1 - a) ** 2 * generator.lognormal(0, 0.4, (layers, attentions))
    hurt_f = (1 - f) ** 2 * generator.lognormal(0, 0.4, (layers, ffns))
    scores = weight * (0.8 * hurt_a[:, :, None] + hurt_f[:, None, :])
    scores *= generator.lognormal(0, 0.05, scores.shape)
    scores[:, 0, 0] = 0
    starts = np.arange(layers) * attentions * ffns
    return Program(scores=scores.ravel(), starts=starts, usage=np.stack(usage), room=np.ones(3))


def capped(seed: int) -> Program:
    """Shared costs, and four capabilities whose KL may be 1 to 8 % less than that of the best choice without limits.

    What hurts all is the larger part of every score; each capability has an attention and an FFN that it needs.
    """
    program, generator = shared(80, 6, 9, seed), np.random.default_rng(1000 + seed)
    free = minimise(program, Search())
    assert free is not None
    for share in (0.99, 0.97, 0.95, 0.92):
        own = program.scores * generator.lognormal(0, 0.5, (80, 54)).ravel()
        program = program.with_row(own / own[free.selection].sum() / share, 1.0)
    return program


if __name__ == "__main__":
    main()
