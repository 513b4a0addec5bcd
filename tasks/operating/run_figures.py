"""The name of an MLflow run, and its parameters and metrics by name. Each means one thing in every run, so that runs
compare.

MLflow lists metrics by alphabet and groups them by what stands before the last slash. So the ten figures that matter
most are `at_a_glance/...`, before all others. docs/how-to/read-runs-in-mlflow.md lists the names.
"""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from blocks.library import digest_of
from blocks.records import (
    Architecture,
    Candidate,
    ChildReport,
    CorpusInfo,
    Cost,
    CostTable,
    HeldTime,
    Metric,
    NonBlockCost,
    ParentInfo,
)
from profiles.schema import Hardware, Profile
from tasks.evaluate.budget import budget_state
from tasks.evaluate.standing import final_of, gain_of, of_loops, of_right, parent_of, right_beside

if TYPE_CHECKING:
    from tasks.measure.bench import BenchRow

GLANCE = "at_a_glance"
HEADLINES = (
    *("decode_speedup", "keeps_budget", "kl", "looping_answers", "memory_fraction"),
    *("parameters_fraction", "prefill_speedup", "request_speedup", "retention", "top1_agreement"),
)
CHILDS_FIGURES = (GLANCE, "child", "child_gkd", "parent")  # what a registered child carries too
SPEED_FIELDS = (
    "first_token_seconds",
    "output_token_seconds",
    "generated_tokens_per_second",
    "requests_per_second",
)


def run_name(profile: Profile) -> str:
    """What tells a run from others: profile, budget, engine and precision where they are not the default, and a short
    id. Two runs have the same id if exactly the same was asked of them.
    """
    hardware, plain = profile.hardware, Hardware()
    limits = [f"{name.removeprefix('budget.')}={value}" for name, value in _budget(profile)]
    setting = [
        *([hardware.engine] if hardware.engine != plain.engine else []),
        *([hardware.precision] if hardware.precision != plain.precision else []),
    ]
    return " ".join([profile.name, *limits, *setting, digest_of(profile=profile)[:6]])


def _budget(profile: Profile) -> Iterator[tuple[str, str]]:
    for name, value in flattened(profile).items():
        if name.startswith("budget."):
            yield name, value
        elif name.startswith("scenarios.") and ".budget." in name:
            yield name.removeprefix("scenarios.").replace(".budget.", "."), value


def flattened(profile: Profile) -> dict[str, str]:
    """Every field of a profile that is not null, by the path that `--set` takes; scenarios by their names."""
    tree = profile.model_dump(mode="json", exclude={"name", "description"}, exclude_none=True)
    tree["hardware"]["precision"] = profile.hardware.precision  # not dumped where nobody named it
    tree["scenarios"] = {scenario.pop("name"): scenario for scenario in tree["scenarios"]}
    return dict(_leaves(tree, ""))


def _leaves(tree: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else key)
    elif isinstance(tree, list) and tree and all(isinstance(one, dict) for one in tree):
        for place, value in enumerate(tree):
            yield from _leaves(value, f"{path}.{place}")
    else:
        yield path, tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False)


def asked_params(profile: Profile) -> dict[str, str]:
    """What a run is asked for: the whole profile, flattened; its name as `profile`."""
    return {"profile": profile.name, **flattened(profile)}


def input_params(parent: ParentInfo, corpus: CorpusInfo, hardware: str) -> dict[str, str]:
    """What a run finds: parent and corpus, and the hardware as runs call it."""
    return {
        "parent": parent.name,
        "parent_fingerprint": parent.fingerprint,
        "corpus_fingerprint": corpus.fingerprint,
        "hardware": hardware,
    }


def report_metrics(report: ChildReport) -> dict[str, float]:
    """Figures of a report by name: `child/kl`, `parent/loss`, `baseline_greedy_gkd/kl`, `run/seconds`, ...

    One rule for every model: `child` and `baseline_<name>` are as assembled from the library; `_gkd` at the end means
    after global distillation. The headlines are of the child after its last stage.
    """
    parent, items = parent_of(report), report.seen_items.seen if report.seen_items else {}
    figures = {
        **headlines(report),
        "run/seconds": report.seconds,
        "run/cpu_seconds": report.cpu_seconds,
        "run/peak_memory_gib": report.peak_memory_bytes / 2**30,
        **{f"run/seen_items_{name}": float(sum(seen)) for name, seen in items.items()},
        **search_metrics(report.architecture),
    }
    held = {one.capability: one for one in report.floors} | {_named(one): one for one in report.held_times}
    for limit, one in held.items():
        figures |= {f"floor/{limit}_{name}": getattr(one, name) for name in ("asked", "limit", "predicted")}
        figures[f"floor/{limit}_measured"] = one.measured.value
    for stage in report.stages:
        name = f"stage/{stage.name.replace(' ', '_')}_seconds"
        figures[name] = figures.get(name, 0.0) + stage.seconds
    for candidate in report.candidates:
        prefix = candidate.name if candidate.name in ("parent", "child") else f"baseline_{candidate.name}"
        prefix += "_gkd" if candidate.stage == "distilled" else ""
        figures |= {f"{prefix}/{key}": value for key, value in _candidate_figures(candidate, parent).items()}
    return figures | speed_figures(report)


def _named(one: HeldTime) -> str:
    """`speedup`; `speedup_of_chat` for one of that scenario; `speedup_in_chat` for one of the whole budget there."""
    name = one.field if one.field == one.name else f"{one.field} in {one.name.rpartition(' of ')[2]}"
    return name.replace(" ", "_")


def headlines(report: ChildReport) -> dict[str, float]:
    """Speed, quality, size and kept budget of the finished child, what was measured of them.

    The alphabet puts the speed first: MLflow's page that compares runs opens on the first metric.
    """
    child, parent = final_of(report.candidates, "child"), parent_of(report)
    if child is None or parent is None:
        return {}
    measured: dict[str, Metric | None] = {
        "decode_speedup": gain_of(child, parent, "decode"),
        "kl": child.kl,
        "prefill_speedup": gain_of(child, parent, "prefill"),
        "request_speedup": gain_of(child, parent, "request"),
        "retention": child.retention,
        "top1_agreement": child.top1_agreement,
    }
    found = {name: metric.value for name, metric in measured.items() if metric is not None}
    found["memory_fraction"] = child.memory_bytes / parent.memory_bytes
    found["parameters_fraction"] = child.parameters / parent.parameters
    state = budget_state(child, report.speed.disturbed)
    if state in ("kept", "not kept"):
        found["keeps_budget"] = float(state == "kept")
    if child.answers:
        found["looping_answers"] = sum(answer.loops for answer in child.answers) / len(child.answers)
    return {f"{GLANCE}/{name}": value for name, value in found.items()}


def speed_figures(report: ChildReport) -> dict[str, float]:
    """Speed and sums of every model per scenario: `speed_chat/child_first_token_seconds`, `sum_chat/child_decode_off`
    (predicted / measured - 1), with `_se` beside each.
    """
    measured: dict[str, Metric] = {}
    figures: dict[str, float] = {}
    for name, every in report.speed.models.items():
        for own in every:
            prefix = f"speed_{own.scenario}/{name}"
            for field in SPEED_FIELDS:
                measured[f"{prefix}_{field}"] = getattr(own, field)
            if own.memory_bytes is not None:
                figures[f"{prefix}_peak_memory_gib"] = own.memory_bytes / 2**30
    for check in report.speed.sums:
        prefix = f"sum_{check.scenario}/{check.model}_{check.phase}"
        measured[f"{prefix}_off"] = check.off
        if check.gain_off is not None:
            measured[f"{prefix}_gain_off"] = check.gain_off
    for name, metric in measured.items():
        figures |= {name: metric.value, f"{name}_se": metric.se}
    return figures


def search_metrics(architecture: Architecture) -> dict[str, float]:
    """The solver's answer in figures."""
    return {f"search/{name}": getattr(architecture, name) for name in ("score", "score_se", "gap")}


def _candidate_figures(candidate: Candidate, parent: Candidate | None) -> dict[str, float]:
    figures = {
        "parameters": float(candidate.parameters),
        "weight_bytes": float(candidate.weight_bytes),
        "memory_gib": candidate.memory_bytes / 2**30,
        "gkd_tokens": float(candidate.gkd_tokens),
    }
    if candidate.predicted_kl is not None:
        figures["predicted_kl"] = candidate.predicted_kl
    if candidate.answers:
        figures["answers"] = float(len(candidate.answers))
        figures["looping_answers"] = float(sum(answer.loops for answer in candidate.answers))
    measured: dict[str, Metric | None] = {
        name: getattr(candidate, name)
        for name in (
            "prefill_tokens_per_second",
            "decode_tokens_per_second",
            "runtime_seconds",
            "loss",
            "kl",
            "top1_agreement",
            "retention",
        )
    }
    measured |= {f"benchmark_{name}": metric for name, metric in candidate.benchmarks.items()}
    measured |= {f"benchmark_{name}_unseen": metric for name, metric in candidate.unseen.items()}
    measured["retention_unseen"] = candidate.unseen_retention
    measured["looping"] = loops.metric if (loops := of_loops(candidate)) else None
    for name in candidate.right_answers:
        found = {f"right_on_{name}": of_right(candidate, name)}
        found[f"right_on_{name}_of_parent"] = right_beside(candidate, parent, name)
        measured |= {figure: reading.metric for figure, reading in found.items() if reading}
    for name, one in candidate.capabilities.items():
        measured |= {f"{figure}_on_{name}": getattr(one, figure) for figure in ("kl", "loss", "top1_agreement")}
    if parent is not None:
        figures["parameters_fraction"] = candidate.parameters / parent.parameters
        figures["memory_fraction"] = candidate.memory_bytes / parent.memory_bytes
        if candidate is not parent:
            for kind in ("prefill", "decode"):
                measured[f"speedup_{kind}"] = gain_of(candidate, parent, kind)
    for name, metric in measured.items():
        if metric is not None:
            figures |= {name: metric.value, f"{name}_se": metric.se}
    return figures


def cost_metrics(table: CostTable) -> dict[str, float]:
    """Every cost by the variant's name: `cost/ffn768/decode_ms`, `cost/kv1/prefill_ms`, `cost/kv1/weight_bytes`.

    decode_ms: one decode step of the batch; prefill_ms: the batch's prompt. Batch sizes above 1 and, where there are
    several, scenarios stand at the end: `cost/ffn768/decode_ms_b4`, `cost/ffn768/decode_ms_rag_b4`.
    """
    several = len({cost.scenario for cost in table.costs}) > 1
    figures: dict[str, float] = {}
    parts: list[tuple[str, Cost | NonBlockCost]] = [(_variant_name(cost), cost) for cost in table.costs]
    parts += [(".".join(filter(None, ["outside_blocks", cost.head])), cost) for cost in table.non_block]
    parts += [("whole_parent", cost) for cost in table.parent_measured]
    for name, cost in parts:
        scenario = f"_{cost.scenario}" if several else ""
        batch = f"_b{cost.batch_size}" if cost.batch_size > 1 else ""
        figures[f"cost/{name}/prefill_ms{scenario}{batch}"] = 1e3 * cost.prefill_seconds
        figures[f"cost/{name}/decode_ms{scenario}{batch}"] = 1e3 * cost.decode_seconds_per_token
        figures[f"cost/{name}/weight_bytes"] = cost.weight_bytes
        figures[f"cost/{name}/parameters"] = cost.parameters
        if isinstance(cost, Cost) and cost.subblock == "attention":
            figures[f"cost/{name}/kv_bytes_per_token{scenario}"] = cost.kv_bytes_per_token
            figures |= {f"cost/{name}/state_bytes": cost.state_bytes} if cost.state_bytes else {}
    return figures


def bench_metrics(rows: "Sequence[BenchRow]") -> dict[str, float]:
    """Speeds of a bench by load and model: `bench_1x256x64/child_decode_tokens_per_second`, with `_se` beside each."""
    figures: dict[str, float] = {}
    for row in rows:
        speed, prefix = row.throughput, f"bench_{row.load}/{row.model}"
        measured = {
            "prefill_tokens_per_second": speed.prefill_tokens_per_second,
            "decode_tokens_per_second": speed.decode_tokens_per_second,
            "first_token_seconds": speed.first_token_seconds,
        }
        if row.gains is not None:
            gains = {kind: getattr(row.gains, kind) for kind in ("prefill", "decode", "request")}
            measured |= {f"{kind}_speedup": gain for kind, gain in gains.items()}
        for name, metric in measured.items():
            figures |= {f"{prefix}_{name}": metric.value, f"{prefix}_{name}_se": metric.se}
        if speed.memory_bytes is not None:
            figures[f"{prefix}_peak_memory_gib"] = speed.memory_bytes / 2**30
    return figures


def _variant_name(cost: Cost) -> str:
    """`ffn768` and `kv1` say themselves what they are; `linear`, `no_op` and `parent` exist in both subblocks."""
    own = {"attention": "kv", "ffn": "ffn"}[cost.subblock]
    label = cost.variant.replace("@", ".")  # MLflow's names have no @
    return label if label.startswith(own) else f"{cost.subblock}_{label}"


def doubt_tags(doubts: Sequence[str]) -> dict[str, str]:
    """Why the times of a run are not reliable, where there is a reason."""
    return {"puzzle.not_reliable": "; ".join(doubts)} if any(doubts) else {}


def engine_tags(engine: str, precision: str, threads: int, device: str = "cpu") -> dict[str, str]:
    """What speeds were measured in: figures of runs that differ here are of different things."""
    values = {"engine": engine, "precision": precision, "threads": threads, "device": device}
    return {f"puzzle.{name}": str(value) for name, value in values.items()}
