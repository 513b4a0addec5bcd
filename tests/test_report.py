"""The report: rounding by the error, honest marks and verdicts, pictures and files that render."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.patches import Rectangle
from rich.console import Console

from blocks.estimates import independent_ratio, mean, rounded
from blocks.library import read_value
from blocks.records import (
    Answer,
    Architecture,
    Calibration,
    Candidate,
    ChildReport,
    CorpusInfo,
    Gains,
    LayerChoice,
    LimitKept,
    Metric,
    ParentInfo,
    Ref,
    SpeedReport,
    SumCheck,
    Totals,
    Turn,
)
from profiles.schema import Scenario
from tasks.engines.timing_in_turns import summaries
from tasks.evaluate.quality import BenchmarkResult, retention
from tasks.operating.run_figures import report_metrics
from tasks.pages.picture import draw_architecture, draw_comparison, variant_colours
from tasks.pages.report import (
    BEST,
    answered,
    comparison_rows,
    comparison_table,
    print_report,
    report_markdown,
    write_report,
)
from tasks.pages.verdict import budget_rows, evidence, verdict, warnings


def headlines(report: ChildReport) -> list[str]:
    """What is printed around the tables."""
    return [*warnings(report), verdict(report), *evidence(report)]


def metric(value: float, se: float = 0.0) -> Metric:
    return Metric(value=value, se=se, n=8)


def totals(share: float) -> Totals:
    return Totals(
        scenario="chat",
        batch_size=1,
        prefill_seconds=0.5 * share,
        decode_seconds_per_token=0.05 * share,
        runtime_seconds=3 * share,
        tokens_per_second=100 / share,
        memory_bytes=int(1e8 * share),
        parameters=int(2e7 * share),
    )


def candidate(name: str, stage: Any, kl: float, speed: float, **figures: Any) -> Candidate:
    return Candidate(
        name=name,
        stage=stage,
        parameters=20_000_000 if stage == "parent" else 15_000_000,
        weight_bytes=80_000_000,
        memory_bytes=100_000_000 if stage == "parent" else 80_000_000,
        prefill_tokens_per_second=metric(400 * speed, 8),
        decode_tokens_per_second=metric(20 * speed, 0.4),
        loss=metric(3 + kl, 0.05),
        kl=metric(kl, 0.02 if kl else 0),
        top1_agreement=metric(1 - kl / 5, 0.01 if kl else 0),
        **figures,
    )


def report_of(child_kl: float = 0.4, greedy_kl: float = 0.8) -> ChildReport:
    """A run with 3 layers, a parent, a child before and after GKD, and two baselines."""
    layers = (
        LayerChoice(attention="kv1", ffn="ffn512"),
        LayerChoice(attention="kv1", ffn="ffn512"),
        LayerChoice(attention="no_op", ffn="linear", coupled=True),
    )
    return ChildReport(
        profile="tiny",
        parent=ParentInfo(name="the-parent", folder="parent", fingerprint="ab" * 32, source="test"),
        corpus=CorpusInfo(
            tokens=Ref(path="tokens.safetensors", sha256="0" * 64),
            fingerprint="cd" * 32,
            sequence_length=64,
            train_sequences=8,
            validation_sequences=2,
            test_sequences=2,
            documents=3,
        ),
        architecture=Architecture(
            method="mip",
            layers=layers,
            score=0.3123,
            score_se=0.0123,
            totals=(totals(0.75),),
            parent_totals=(totals(1),),
            status="optimal",
            bound=0.3123,
            gap=0,
        ),
        candidates=(
            candidate("parent", "parent", 0, 1, benchmarks={"piqa": metric(0.7, 0.05)}, retention=metric(1)),
            candidate("child", "assembled", 1.1, 1.3),
            candidate(
                "child",
                "distilled",
                child_kl,
                1.3,
                benchmarks={"piqa": metric(0.63, 0.05)},
                retention=metric(0.9, 0.04),
            ),
            candidate("uniform", "assembled", 2.5, 1.25),
            candidate("greedy", "distilled", greedy_kl, 1.35, retention=metric(0.85, 0.04)),
        ),
        child_folder="child",
        failed_variants=("layer 1 ffn ffn512",),
        mlflow_run_id="run-1",
    )


@pytest.mark.parametrize(
    ("value", "se", "scale", "text"),
    [
        (0.123456, 0.0123, 1, "0.123 ±0.012"),
        (0.123456, 0.0123, 100, "12.3 ±1.2"),
        (1234.5678, 23.4, 1, "1,235 ±23"),
        (0.5, 0.5, 1, "0.50 ±0.50"),
        (0.0, 0.0, 1, "0"),
        (1234567.0, 0.0, 1, "1,234,567"),
    ],
)
def test_numbers_are_rounded_by_their_error(value: float, se: float, scale: float, text: str) -> None:
    assert rounded(metric(value, se), scale) == text


def test_ratio_propagates_both_errors() -> None:
    ratio = independent_ratio(metric(6, 0.3), metric(3, 0.2))
    assert ratio is not None
    assert ratio.value == 2
    assert ratio.se == pytest.approx(2 * (0.05**2 + (0.2 / 3) ** 2) ** 0.5)
    assert independent_ratio(None, metric(3)) is None


def test_rows_mark_the_best_that_is_not_the_parent() -> None:
    rows = {row.label: row for row in comparison_rows(report_of())}
    assert rows["KL, nats"].best == {2}  # not the parent's 0
    assert rows["prefill gain"].best == frozenset()  # 1.35 ±0.05 does not lead 1.3 ±0.04
    assert rows["prefill gain"].cells[0] == "1"
    assert rows["prefill gain"].cells[2].startswith("1.300 ±0.0")
    assert rows["params/parent"].best == frozenset()  # all children tie
    assert rows["params/parent"].cells == ("1", "0.75", "0.75", "0.75", "0.75")
    assert rows["piqa, %"].cells == ("70.0 ±5.0", "–", "63.0 ±5.0", "–", "–")
    assert "predicted KL" not in rows  # nobody gave one


@pytest.mark.parametrize(
    ("child_kl", "greedy_kl", "start"),
    [
        (0.4, 0.8, "better. The child is nearer to its parent than every baseline and is faster than its parent."),
        (
            0.8,
            0.4,
            "mixed. The child is faster than its parent. But it is farther from its parent than the baseline greedy",
        ),
        (
            0.42,
            0.4,
            "not decided. The child is faster than its parent. Not clear: whether it is nearer to its parent than",
        ),
    ],
)
def test_verdict_names_the_winner_whoever_it_is(child_kl: float, greedy_kl: float, start: str) -> None:
    report = report_of(child_kl, greedy_kl)
    assert verdict(report).startswith(f"Verdict: {start}")
    line = next(line for line in headlines(report) if line.startswith("Quality"))
    assert f"KL {child_kl:.3f} ±0.020; the best baseline, greedy (distilled), {greedy_kl:.3f} ±0.020." in line


def test_the_table_shows_all_candidates() -> None:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(comparison_table(report_of()))
    text = captured.get()
    for words in ("parent", "child +GKD", "uniform", "greedy +GKD", "retention, %", f"{BEST}0.400 ±0.020"):
        assert words in text
    assert text.count(BEST) == 4  # loss, KL, agreement, and what the mark means


def test_markdown_has_rows_of_one_width_and_the_facts() -> None:
    text = report_markdown(report_of())
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "| 0–1 | kv1 | ffn512 |\n| 2 | no_op | linear (coupled) |" in text
    assert "| chat, batch 1 | 2.25 | 1.333 | 26.67 | 0.06985 |" in text
    assert "prefill 1.300 ±0.0" in text
    assert "layer 1 ffn ffn512" in text
    assert "run-1" in text
    assert "Prefect" not in text  # no id, no line


def spread(mean: float, offsets: list[float]) -> tuple[float, ...]:
    """Figures of sequences: what is hard in all of them, and the mean of one model."""
    return tuple(mean + offset for offset in offsets)


def measured(name: str, figures: tuple[float, ...], **more: Any) -> Candidate:
    """A candidate by its KL on each sequence."""
    own = candidate(name, more.pop("stage", "assembled"), 0.5, more.pop("speed", 1.0), **more)
    kl = mean(figures).metric
    return own.model_copy(update={"kl": kl, "samples": {"kl": figures}})


def compared(*rivals: Candidate) -> ChildReport:
    return report_of().model_copy(update={"candidates": (report_of().candidates[0], *rivals)})


def best_of(report: ChildReport, label: str) -> set[str]:
    row = next(row for row in comparison_rows(report) if row.label == label)
    return {report.candidates[place].name for place in row.best}


HARD = [-0.3, -0.2, 0.0, 0.1, 0.1, 0.3]


@pytest.mark.parametrize(
    ("lead", "noise", "clear"),
    [
        (0.05, 0.0, True),  # every sequence the same: pairs tell what single errors of 0.09 hide
        (0.05, 0.02, True),
        (0.05, 0.3, False),
        (0.0, 0.1, False),
    ],
)
def test_a_star_is_a_lead_that_pairs_make_clear(lead: float, noise: float, clear: bool) -> None:
    ours = spread(0.5, HARD)
    noisy = [offset + noise * (-1) ** place for place, offset in enumerate(HARD)]
    report = compared(measured("child", ours), measured("greedy", spread(0.5 + lead, noisy)))
    assert best_of(report, "KL, nats") == ({"child"} if clear else set())
    assert "whether it is nearer" not in verdict(report) if clear else "whether it is nearer" in verdict(report)
    assert ("is nearer to its parent than every baseline" in verdict(report)) is clear
    lost = compared(measured("child", spread(0.5 + lead, noisy)), measured("greedy", ours))
    assert best_of(lost, "KL, nats") == ({"greedy"} if clear else set())


def test_a_third_that_the_error_covers_takes_the_star() -> None:
    """The best leads the second clearly, and not the third, whose own error is large."""
    wide = [offset + 0.9 * (-1) ** place for place, offset in enumerate(HARD)]
    rivals = (measured("child", spread(0.5, HARD)), measured("greedy", spread(0.55, HARD)))
    assert best_of(compared(*rivals), "KL, nats") == {"child"}
    assert best_of(compared(*rivals, measured("random", spread(0.6, wide))), "KL, nats") == set()


def test_one_sequence_tells_no_winner() -> None:
    report = compared(measured("child", (0.5,)), measured("greedy", (0.9,)))
    assert best_of(report, "KL, nats") == set()
    assert "Not clear: whether it is nearer to its parent than the baseline greedy" in verdict(report)
    assert "A single document of text shows no error." in headlines(report)[1]


@pytest.mark.parametrize("got", [1.8, 2.1])
def test_the_parent_in_few_bits_is_a_rival_where_it_keeps_the_budget(got: float) -> None:
    slow = LimitKept(name="speedup", asked=2.0, floor=True, got=got, timed=True)
    typed = measured("parent iq4_nl", spread(0.1, HARD), limits=(slow,), file_bytes=78_000_000)
    report = compared(measured("child", spread(0.3, HARD)), typed, measured("uniform", spread(0.5, HARD)))
    assert ("is farther from its parent than the baseline parent iq4_nl" in verdict(report)) is (got > 2)
    assert ("is nearer to its parent than every baseline" in verdict(report)) is (got < 2)
    assert next(row for row in comparison_rows(report) if row.label == "file, MB").cells[2] == "78"


@pytest.mark.parametrize(("was", "error", "told"), [(1.64, 0.02, True), (1.9, 0.02, False), (1.7, 0.2, False)])
def test_a_parent_in_one_type_tells_that_the_machine_is_another(was: float, error: float, told: bool) -> None:
    """Off by more than 5 %, and clearly."""
    limit = LimitKept(
        name="speedup", asked=2.0, floor=True, got=1.97, timed=True, measured=Metric(value=was, se=error, n=9)
    )
    typed = measured("parent iq4_nl", spread(0.1, HARD), limits=(limit,), file_bytes=78_000_000)
    report = compared(measured("child", spread(0.3, HARD)), typed)
    (line,) = [one for one in warnings(report) if "equally fast" in one] or [""]
    assert ("was to be 1.97 times the parent's by its costs and was 1.640 ±0.020" in line) is told
    disturbed = report.model_copy(update={"speed": report.speed.model_copy(update={"busy": "load 9"})})
    assert not any("equally fast" in one for one in warnings(disturbed))


@pytest.mark.parametrize("told", [True, False])
def test_a_baseline_with_the_childs_own_architecture_is_no_rival(told: bool) -> None:
    layers = {"layers": (LayerChoice(ffn="no_op"),)} if told else {}
    other = {"layers": (LayerChoice(attention="no_op"),)} if told else {}
    ours = measured("child", spread(0.5, HARD), **layers)
    twin = measured("greedy", spread(0.5, HARD), **layers)
    rival = measured("uniform", spread(0.7, HARD), **other)
    assert "is nearer to its parent than every baseline" in verdict(compared(ours, twin, rival))
    line = headlines(compared(ours, twin, rival))[1]
    assert line.endswith("greedy chose the same child.") and "the best baseline, uniform" in line
    assert best_of(compared(ours, twin, rival), "KL, nats") == {"child", "greedy"}
    alone = headlines(compared(ours, twin))
    assert alone[1].endswith("no other baseline was measured beside it. greedy chose the same child.")
    assert "nearer" not in alone[0] and "farther" not in alone[0]


@pytest.mark.parametrize(
    ("speed", "error", "clear"), [(1.3, 0.2, False), (1.3, 0.05, True), (1.3, 0.0, True), (1.0, 0.01, False)]
)
def test_a_speed_within_noise_has_no_star(speed: float, error: float, clear: bool) -> None:
    def with_gain(own: Candidate, gain: float) -> Candidate:
        one = metric(gain, error)
        gains = Gains(prefill=one, decode=one, request=one, prefill_cpu=one, decode_cpu=one)
        return own.model_copy(update={"gains": gains})

    fast, slow = measured("child", spread(0.5, HARD)), measured("greedy", spread(0.6, HARD))
    later = fast.model_copy(update={"stage": "distilled"})  # the same layers, timed once
    report = compared(with_gain(fast, speed), with_gain(slow, 1.0), with_gain(later, speed))
    assert best_of(report, "decode gain") == ({"child"} if clear else set())


def right(name: str, stage: str, *shares: int, items: int = 20) -> Candidate:
    """A candidate with so many items right of each of the benchmarks a, b, c."""
    own = {label: (1,) * share + (0,) * (items - share) for label, share in zip("abc", shares, strict=False)}
    results = {label: BenchmarkResult(metric=mean(found).metric, correct=found) for label, found in own.items()}
    parents = {
        label: BenchmarkResult(metric=mean(found).metric, correct=found)
        for label, found in {label: (1,) * 10 + (0,) * (items - 10) for label in own}.items()
    }
    kept = retention(results, parents)
    figures = {"benchmarks": {label: found.metric for label, found in results.items()}, "correct": own}
    return measured(name, spread(0.5, HARD), stage=stage, retention=kept, **figures)


@pytest.mark.parametrize(
    ("shares", "told", "covered"),
    [
        ((11, 9, 10), "50.0 % of 60 items right, the parent 50.0 %: +0.0 ±2.4 points", True),
        ((9, 9, 9), "45.0 % of 60 items right, the parent 50.0 %: -5.0 ±2.9 points", True),
        ((5, 5, 5), "25.0 % of 60 items right, the parent 50.0 %: -25.0 ±5.7 points", False),
    ],
)
def test_benchmarks_are_pooled_and_paired(shares: tuple[int, ...], told: str, covered: bool) -> None:
    parent = right("parent", "parent", 10, 10, 10)
    report = report_of().model_copy(update={"candidates": (parent, right("child", "assembled", *shares))})
    line = next(line for line in headlines(report) if line.startswith("Benchmarks"))
    assert ("gets fewer benchmark items right than its parent" in verdict(report)) is not covered
    assert told in line and ("; this is within the error" in line) is covered
    assert re.search(r"Retention \d+ %, 95 % interval \d+ to \d+ %\.$", line)
    cells = {row.label: row.cells for row in comparison_rows(report)}
    assert cells["items over parent, %"][0] == "–" and cells["all items, %"][0].startswith("50.0")
    assert cells["mean of tasks, %"][1].startswith(f"{100 * sum(shares) / 60:.1f}")


def test_twenty_items_give_random_no_star() -> None:
    """11 of 20 right beside 9 of 20 is no lead."""
    rivals = (right("child", "assembled", 9, 10, 10), right("random", "assembled", 11, 9, 9))
    report = compared(*rivals)
    assert best_of(report, "a, %") == best_of(report, "all items, %") == best_of(report, "retention, %") == set()
    clear = compared(right("child", "assembled", 18, 18, 18), rivals[1])
    assert best_of(clear, "a, %") == best_of(clear, "all items, %") == best_of(clear, "retention, %") == {"child"}


def with_gain(report: ChildReport, gain: float, error: float = 0.02) -> ChildReport:
    """The child's requests are so many times as fast as the parent's."""
    one = metric(gain, error)
    gains = Gains(prefill=one, decode=one, request=one, prefill_cpu=one, decode_cpu=one)
    own = [model.model_copy(update={"gains": gains}) if model.name == "child" else model for model in report.candidates]
    return report.model_copy(update={"candidates": tuple(own)})


@pytest.mark.parametrize(
    ("gain", "error", "busy", "told"),
    [
        (1.3, 0.02, "", "better. The child is nearer to its parent than every baseline and is faster than its parent."),
        (0.59, 0.05, "", "mixed. The child is nearer to its parent than every baseline. But it is slower"),
        (0.59, 0.29, "", "not decided. The child is nearer"),  # slower by less than two standard errors
        (1.3, 0.02, "others", "not decided. The child is nearer"),
    ],
)
def test_the_verdict_weighs_speed_beside_quality(gain: float, error: float, busy: str, told: str) -> None:
    report = with_gain(report_of(), gain, error)
    report = report.model_copy(update={"speed": SpeedReport(busy=busy)})
    assert verdict(report).startswith(f"Verdict: {told}")


def test_a_gkd_that_kept_its_start_is_said() -> None:
    report = report_of()
    child = next(own for own in report.candidates if (own.name, own.stage) == ("child", "distilled"))
    kept = tuple(
        own.model_copy(update={"gkd_kept_start": 0.1234}) if own is child else own for own in report.candidates
    )
    assert "GKD" not in " ".join(warnings(report))
    assert "no step lowered the KL on the validation text, 0.1234 before it" in " ".join(
        warnings(report.model_copy(update={"candidates": kept}))
    )
    rounded = tuple(own.model_copy(update={"rounded_kl": (0.2, 0.15)}) for own in kept)
    for candidates, said in ((kept, True), (rounded, False)):  # trained with rounded weights after
        told = " ".join(warnings(report.model_copy(update={"candidates": candidates})))
        assert ("as it was assembled" in told) == said


def test_a_lead_counts_as_the_profile_asks() -> None:
    """By 0.4 nats; the rule of the profile may ask for more, or for another metric."""
    report = report_of()
    assert "nearer to its parent than every baseline" in verdict(report)
    asks = report.model_copy(update={"rule": {"metric": "kl", "min_improvement": 0.5}})
    assert "whether it is nearer to its parent than the baseline" in verdict(asks)
    other = report.model_copy(update={"rule": {"metric": "top1_agreement"}})
    assert any(line.startswith("Quality: top-1 agreement 92.0 ±1.0") for line in headlines(other))


@pytest.mark.parametrize(("kl", "absurd"), [(3.7, True), (1.1, False)])
def test_a_child_that_is_no_model_is_said_first(kl: float, absurd: bool) -> None:
    report = report_of(child_kl=kl)
    assert headlines(report)[0].startswith("Warning: this child is no usable model, KL 3.700") is absurd
    assert verdict(report).startswith("Verdict: not usable.") is absurd
    assert console_of(report).startswith("Warning") is absurd
    assert report_markdown(report).split("\n\n")[1].startswith("Warning") is absurd


def test_the_budget_comes_first_asked_got_and_kept() -> None:
    kept = LimitKept(name="memory_gib", asked=0.1, floor=False, got=0.08)
    broken = LimitKept(name="speedup", asked=1.5, floor=True, got=1.6, timed=True, measured=metric(1.3, 0.05))
    report = report_of()
    own = [
        model if model.stage == "parent" else model.model_copy(update={"limits": (kept, broken)})
        for model in report.candidates
    ]
    report = report.model_copy(update={"candidates": tuple(own)})
    assert budget_rows(report) == [
        ("memory_gib", "at most 0.1 GiB", "0.08 GiB", "–", "kept"),
        (
            "speedup",
            "at least 1.5 times the parent's",
            "1.6 times the parent's, predicted",
            "1.300 ±0.050 times the parent's",
            "not kept",
        ),
    ]
    row = comparison_rows(report)[0]
    assert (row.label, row.cells) == ("budget", ("–", *["not kept"] * 4))
    assert "does not keep its budget (speedup)" in verdict(report)
    assert report_markdown(report).split("\n\n")[1].startswith("| budget | asked | got | measured | kept |")
    text = console_of(report)
    assert (
        text.index("at most 0.1 GiB") < text.index("KL, nats") < text.index("decode gain") < text.index("memory, GiB")
    )


def said(*texts: str, looping: int = 0) -> tuple[Answer, ...]:
    return tuple(
        Answer(
            prompt=f"prompt {place} <b>",
            chat=place == 0,
            text=text,
            tokens=7,
            ended=place == 1,
            repetition=0.25,
            loops=place < looping,
        )
        for place, text in enumerate(texts)
    )


def with_answers(parent: tuple[Answer, ...], child: tuple[Answer, ...]) -> ChildReport:
    report = report_of()
    own = list(report.candidates)
    own[0], own[2] = (own[place].model_copy(update={"answers": those}) for place, those in ((0, parent), (2, child)))
    return report.model_copy(update={"candidates": tuple(own)})


def console_of(report: ChildReport) -> str:
    console = Console(width=160)
    with console.capture() as captured:
        print_report(report, console)
    return captured.get()


def test_a_child_that_loops_is_said_first() -> None:
    report = with_answers(said("a", "b", "c"), said("x", "y", "z", looping=2))
    first = "Warning: 2 of 3 answers loop; the parent's 0."
    assert "But it gives answers that loop." in verdict(report)
    assert headlines(report)[0].startswith(first)
    assert report_markdown(report).split("\n\n")[1].startswith(first)
    assert console_of(report).startswith(first)
    row = next(row for row in comparison_rows(report) if row.label == "answers that loop")
    assert row.cells == ("0 of 3", "–", "2 of 3", "–", "–") and not row.best
    figures = report_metrics(report)
    assert (figures["child_gkd/looping_answers"], figures["parent/looping_answers"], figures["child_gkd/answers"]) == (
        2,
        0,
        3,
    )


@pytest.mark.parametrize(("parents", "childs"), [(0, 0), (2, 2), (2, 1)])
def test_a_child_that_loops_no_more_than_its_parent_is_not_accused(parents: int, childs: int) -> None:
    report = with_answers(said("a", "b", "c", looping=parents), said("x", "y", "z", looping=childs))
    assert "loop;" not in " ".join(headlines(report))


def test_a_child_that_says_nothing_is_said_first() -> None:
    assert headlines(with_answers(said("a", "b"), said("", " \n")))[0].startswith(
        "Warning: 2 of 2 answers are empty; the parent's 0"
    )


@pytest.mark.parametrize(
    "text",
    ["a | b\n\n* c `d` <script>x</script>", "\x1b[2J\x07 \x00 gone", "first\n\n\n\n\nlast", "[x](http://y) $z$ #1"],
)
def test_answers_stand_side_by_side_whatever_they_say(text: str) -> None:
    report = with_answers(said("from the parent", text), said(text, "from the child"))
    markdown = report_markdown(report)
    table = next(block for block in markdown.split("\n\n") if block.startswith("| prompt"))
    lines = table.splitlines()
    assert len(lines) == 4 and {line.count("|") for line in lines} == {4}
    assert (
        "<script>" not in markdown and "\x1b" not in markdown and "7 tokens, ended by itself, 25% repeated" in lines[3]
    )
    shown = console_of(report)
    assert "\x1b[2J" not in shown and "\x07" not in shown
    assert "from the parent" in shown and "from the child" in shown
    assert [(one.kind, one.parent[0] == "from the parent") for one in answered(report)] == [
        ("chat", True),
        ("plain text", False),
    ]


def test_a_report_of_an_older_version_is_read_and_told(tmp_path: Path) -> None:
    report = json.loads(with_answers(said("a"), said("b")).model_dump_json())
    for own in report["candidates"]:
        for field in ("answers", "layers", "samples", "correct", "item_groups"):
            del own[field]
    (tmp_path / "report.json").write_text(json.dumps(report))
    old = read_value(tmp_path / "report.json", ChildReport)
    assert answered(old) == [] and "## Answers" not in report_markdown(old)
    assert "is nearer to its parent than every baseline" in verdict(old)
    assert BEST in console_of(old) and "piqa, %" in console_of(old)


def with_speed() -> ChildReport:
    """The report with one scenario measured end to end, the child's decode 10 % off."""
    parents = [Turn(prefill=2, step=0.2, prefill_cpu=2, step_cpu=0.2)] * 2
    own = [Turn(prefill=1, step=0.1, prefill_cpu=1, step_cpu=0.1)] * 2
    scenario = Scenario(prompt_tokens=8, generated_tokens=10)
    found = summaries({"parent": parents, "child": own}, scenario, 1, {"parent": 2**22, "child": None})
    check = SumCheck(
        model="child",
        scenario="chat",
        batch_size=1,
        phase="decode",
        predicted_seconds=0.11,
        measured_seconds=metric(0.1),
        off=metric(0.1, 0.02),
        gain_off=metric(-0.03, 0.01),
    )
    speed = SpeedReport(
        engine="llama.cpp (x)",
        clock="CPU",
        calibration=Calibration(prefill=1.02, decode=1, origin="the parent"),
        models={name: (one,) for name, one in found.items()},
        sums=(check,),
    )
    return report_of().model_copy(update={"speed": speed})


def test_speed_and_sums_are_told_in_the_report_and_to_mlflow() -> None:
    text = report_markdown(with_speed())
    assert "| child | chat, batch 1 | decode | 0.11 | 0.1 | +10.0 ±2.0 % | -3.0 ±1.0 % |" in text
    assert "off by +10.0 ±2.0 % from the child end to end in llama.cpp (x)" in text
    assert "Predicted times are calibrated: prefill x 1.020" in text
    assert "| parent | chat, batch 1 | 2 | 0.2 | 2.5 | 0.25 | – | 0.003906 |" in text
    assert "| child | chat, batch 1 | 1 | 0.1 | 5 | 0.5 | 2 | – |" in text
    figures = report_metrics(with_speed())
    assert figures["sum_chat/child_decode_off"] == 0.1 and figures["sum_chat/child_decode_off_se"] == 0.02
    assert figures["sum_chat/child_decode_gain_off"] == -0.03
    assert figures["speed_chat/child_first_token_seconds"] == 1
    assert figures["speed_chat/parent_peak_memory_gib"] == 2**22 / 2**30
    assert "speed_chat/child_peak_memory_gib" not in figures


def test_a_speed_of_a_busy_machine_gets_no_star() -> None:
    report = report_of()
    fast = report.candidates[1].model_copy(update={"decode_tokens_per_second": metric(1e6, 1)})
    everyone = (report.candidates[0], fast, *report.candidates[2:])
    quiet, busy = (
        report.model_copy(update={"candidates": everyone, "speed": with_speed().speed.model_copy(update={"busy": who})})
        for who in ("", "others")
    )
    starred, bare = ({row.label: row.best for row in comparison_rows(one)} for one in (quiet, busy))
    changed = {label for label in starred if starred[label] != bare[label]}
    assert "decode, tokens/s" in changed and not any(bare[label] for label in changed)
    assert all(label.split(",")[0].split()[0] in ("prefill", "decode", "request") for label in changed)
    assert busy.speed.disturbed in report_markdown(busy)


def test_written_report_reads_back(tmp_path: Path) -> None:
    report = report_of()
    files = write_report(report, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in files)
    assert read_value(tmp_path / "report.json", ChildReport) == report
    for name in ("architecture.png", "comparison.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in (tmp_path / "report.md").read_text()


def test_colours_tell_kinds_and_sizes_apart() -> None:
    colours = variant_colours(["parent", "ffn256", "ffn768", "ffn512", "linear", "no_op", "kv1", "window128"])
    assert len(set(colours.values())) == 8

    def lightness(label: str) -> int:
        return sum(int(colours[label][place : place + 2], 16) for place in (1, 3, 5))

    assert lightness("ffn256") > lightness("ffn512") > lightness("ffn768")  # the more remains, the darker


def test_architecture_picture_has_a_cell_per_subblock() -> None:
    report = report_of()
    cells, bars = draw_architecture(report.architecture, report.candidates[0], report.candidates[2]).axes
    texts = [text.get_text() for text in cells.texts]
    assert texts == ["kv1", "kv1", "no-op", "ffn512", "ffn512", "linear"]
    assert [text.get_text() for text in bars.get_yticklabels()] == [
        "prefill time",
        "decode time",
        "memory",
        "parameters",
    ]
    widths = [
        patch.get_width() for patch in bars.patches if isinstance(patch, Rectangle)
    ]  # predicted and measured in turn
    assert widths == pytest.approx([0.75, 1 / 1.3, 0.75, 1 / 1.3, 0.75, 0.8, 0.75, 0.75])


def test_comparison_picture_has_two_speeds_and_only_measured_qualities() -> None:
    report = report_of()
    assert len(draw_comparison(report.candidates).axes) == 4
    bare = [own.model_copy(update={"retention": None}) for own in report.candidates]
    figure = draw_comparison(bare)
    assert len(figure.axes) == 2
    assert len(figure.axes[0].containers) == 4  # one mark with error bars per candidate, the parent apart
