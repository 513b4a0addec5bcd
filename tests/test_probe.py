"""Probes against oracles and identities: a child that is its parent breaks nowhere; figures are the whole softmax's."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blocks.compute import HOST
from blocks.errors import PuzzleError, PuzzleFailure, TooLittleText
from blocks.library import read_rows, read_value, write_tensors, write_value
from blocks.records import ChildReport, CorpusInfo, LayerChoice, Metric, Ref
from flows.finish import best_baseline, lineage_of
from tasks.evaluate.compare import LINEAGE, Contender, Evaluation, Lineage, contender
from tasks.evaluate.quality import Quality, parent_targets, sequence_figures, token_figures
from tasks.inputs.tiny import byte_tokenizer
from tasks.pages.picture import draw_probe
from tasks.probe import figures as probe_figures
from tasks.probe.agreement import in_common
from tasks.probe.figures import probed, reading_of, signed_gaps, spans_of
from tasks.probe.probe import length_figures, prepare, probe, usual_length
from tasks.probe.records import PROBE, Asked, DomainFigures, OnDomain, ProbeReport
from tasks.probe.sides import Bench, ProbedRun, open_run
from tasks.probe.texts import NOISE, Text, long_text, named_files, own_text, text_of, with_noise
from tasks.probe.tuning import check_memory, fine_tune, measured_steps
from tasks.probe.words import figures, sentences, tables, worst_domain
from tasks.running.progress import Progress, no_progress
from tests.chain import Chain, chosen
from tests.test_evaluate import SMALL, tiny_model
from tests.test_nvlabs import puzzle

ASKED = Asked(sequences=8, length=64, finetune_steps=3, finetune_sequences=2, prompts=6, answer_tokens=5)
CUT = (LayerChoice(), LayerChoice(ffn="no_op"), LayerChoice(attention="linear", ffn="ffn32"))


@contextmanager
def quiet(name: str) -> Iterator[Progress]:
    yield no_progress


def run_of(chain: Chain, layers: tuple[LayerChoice, ...], **more: Any) -> ProbedRun:
    """A run of the tiny chain that ended with these layers, on disk as a run leaves it."""
    folder = chain.workspace / "runs" / "z"
    architecture = chosen(layers)
    report = ChildReport(
        profile="z",
        parent=chain.parent,
        corpus=chain.corpus,
        architecture=architecture,
        candidates=(),
        child_folder="runs/z/child",
    )
    child = contender("child", architecture, chain.blocks)
    write_value(folder / "report.json", report)
    write_value(folder / LINEAGE, Lineage(parent=chain.parent, corpus=chain.corpus, child=child, **more))
    (folder / "child").mkdir(exist_ok=True)
    (folder / "child" / "config.json").write_text((chain.workspace / chain.parent.folder / "config.json").read_text())
    return open_run(folder / "child")


@pytest.fixture(scope="module")
def report(chain: Chain) -> ProbeReport:
    """A probe of a child that lost blocks, with a baseline that is the parent."""
    rival = contender("greedy", chosen((LayerChoice(),) * 3), chain.blocks)
    run = run_of(chain, CUT, rival=rival)
    return probe(prepare(run, {}, ASKED, HOST), HOST, quiet)


# --- figures of a text


def test_figures_are_those_of_whole_softmax() -> None:
    tokens = torch.randint(48, (3, 40), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    parent, child = tiny_model(0), tiny_model(1)
    targets = parent_targets(parent, tokens, SMALL)
    every = token_figures(child, targets, SMALL, probed)
    found, known = reading_of(every), sequence_figures(child, targets, tokens, SMALL)
    for name in ("loss", "kl"):
        assert found.samples[name] == tuple(known[name].tolist())
    with torch.no_grad():
        p = torch.softmax(child(tokens.long()).logits.double(), -1)
    assert found.samples["entropy"] == pytest.approx((-(p * p.log()).sum(-1)).mean(1).tolist(), rel=1e-5)
    assert every[3].numpy() == pytest.approx(p.max(-1).values.numpy(), rel=1e-5)
    assert torch.equal(every[4][:, :-1], (p.argmax(-1)[:, :-1] == tokens[:, 1:]).double())
    # the mean over spans, weighed by their sizes, is the mean over the sequence
    sizes = [last - first + 1 for first, last in spans_of(40)]
    assert np.average(found.by_context, axis=0, weights=sizes) == pytest.approx(found.samples["loss"])


@pytest.mark.parametrize("length", [2, 8, 16, 17, 32, 33, 64, 1000, 1024, 4096])
def test_spans_cover_every_context_once(length: int) -> None:
    spans = spans_of(length)
    assert [one for first, last in spans for one in range(first, last + 1)] == list(range(1, length))
    assert all(first in (1, 16) or (first & (first - 1)) == 0 for first, _ in spans)


def test_the_calibration_error_is_that_of_equally_full_bins() -> None:
    chance = torch.Generator().manual_seed(0)
    sure = torch.rand(12, 50, generator=chance, dtype=torch.float64)
    right = (torch.rand(12, 50, generator=chance) < sure**2).double()
    order = np.argsort(sure.flatten().numpy(), kind="stable")
    bins = np.array_split(order, 15)
    s, r = sure.flatten().numpy(), right.flatten().numpy()
    expected = sum(len(one) / 600 * abs(r[one].mean() - s[one].mean()) for one in bins)
    assert float(signed_gaps(sure, right).mean()) == pytest.approx(expected)
    assert expected > 0.1
    assert float(signed_gaps(torch.ones(3, 40), torch.ones(3, 40)).mean()) == 0


# --- texts


@pytest.mark.parametrize("name", NOISE)
def test_noise_is_seeded_and_leaves_special_tokens(name: str) -> None:
    tokenizer, text = byte_tokenizer(), "the quick brown fox jumps over the lazy dog, and further on it runs " * 4
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] + tokenizer(text)["input_ids"]

    def noisy(seed: int) -> list[int]:
        chance = random.Random(seed)
        return with_noise(ids, tokenizer, lambda part: NOISE[name][1](part, chance))

    assert noisy(0) == noisy(0) != ids
    assert noisy(0).count(tokenizer.eos_token_id) == 1
    assert (noisy(0) == noisy(1)) == (name == "upper_case")
    assert with_noise(ids, tokenizer, str) == ids
    if name == "upper_case":
        assert tokenizer.decode(noisy(0)[: len(text)]) == text.upper()


def test_noisy_rows_keep_the_documents_of_the_test_text(chain: Chain) -> None:
    run = run_of(chain, CUT)
    texts = {text.name: text for text in prepare(run, {}, ASKED.model_copy(update={"length": 0}), HOST).texts}
    assert list(texts) == ["test", "python", *NOISE]
    own = texts["test"]
    assert len(own.documents) == 8 and all(name.startswith("test ") for name in own.documents)
    for name in NOISE:
        assert set(texts[name].documents) <= set(own.documents)
        assert texts[name].tokens(run.workspace).shape == (texts[name].sequences, 32)
    upper = texts["upper_case"]  # as many bytes: the rows are the same ones
    assert upper.documents == own.documents
    assert not set(texts["python"].documents) & set(own.documents)


def test_what_stages_saw_is_left_out(chain: Chain, tmp_path: Path) -> None:
    """A file with the run's own training text gives nothing; the same with other words is taken."""
    run, decode = run_of(chain, CUT), byte_tokenizer().decode
    rows = read_rows(chain.workspace, chain.corpus.tokens, "train", 0, 48).tolist()
    seen = [str(decode(row)) for row in rows]
    (tmp_path / "seen.txt").write_text("\n\n\n".join(seen))
    asked = ASKED.model_copy(update={"length": 0, "finetune_steps": 0})
    with pytest.raises(TooLittleText, match=r"the text mine \(seen.txt\) is too little: 8 test sequences of 32 tokens"):
        prepare(run, named_files([f"mine={tmp_path / 'seen.txt'}"]), asked, HOST)
    (tmp_path / "new.txt").write_text("\n\n\n".join(text[::-1] for text in seen))
    texts = prepare(run, named_files([f"mine={tmp_path / 'new.txt'}"]), asked, HOST).texts
    assert [text.name for text in texts] == ["test", "mine"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["news"], "a name and a file"),
        (["=x.txt"], "a name and a file"),
        (["a/b=x.txt"], "a name and a file"),
        (["news=none.jsonl"], "there is no file none.jsonl"),
        (["test={here}"], "the name test is taken"),
        (["typos={here}"], "the name typos is taken"),
        (["a={here}", "a={here}"], "the name a is taken"),
    ],
)
def test_texts_that_cannot_be_named(tmp_path: Path, given: list[str], told: str) -> None:
    (tmp_path / "x.txt").write_text("some text")
    with pytest.raises(PuzzleError, match=told):
        named_files([text.format(here=tmp_path / "x.txt") for text in given])


@pytest.mark.parametrize(
    ("length", "told"), [(1025, "beyond the parent's context of 1024"), (16, "too short"), (1, "too short")]
)
def test_a_length_that_shows_nothing_is_refused(chain: Chain, length: int, told: str) -> None:
    with pytest.raises(PuzzleError, match=told):
        prepare(run_of(chain, CUT), {}, ASKED.model_copy(update={"length": length}), HOST)


def test_long_rows_that_no_text_gives_are_refused(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepared(*_: Any) -> CorpusInfo:
        raise TooLittleText("the corpus is too small")

    monkeypatch.setattr("tasks.probe.texts.prepare_corpus", prepared)
    with pytest.raises(PuzzleError, match="no text gives 8 rows of 64 tokens"):
        long_text(run_of(chain, CUT).seen, {}, ASKED)


def test_stages_saw_the_longer_text_of_a_capability(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = chain.corpus.model_copy(update={"sequence_length": 600})
    assert run_of(chain, CUT).trained == 32 and usual_length(run_of(chain, CUT)) == 1024
    run = run_of(chain, CUT, capabilities=(longer, chain.corpus))
    assert run.trained == 600 and usual_length(run) == 1024  # the parent's context
    monkeypatch.setattr(ProbedRun, "context", None)
    assert usual_length(run) == 1200


def test_a_test_text_of_one_document_is_refused(chain: Chain) -> None:
    one = ASKED.model_copy(update={"sequences": 1})
    with pytest.raises(PuzzleError, match="of 1 documents"):
        own_text(run_of(chain, CUT).seen, one)


def test_the_same_tokens_in_rows_of_another_length_are_another_text(chain: Chain, tmp_path: Path) -> None:
    """Where every document is long, 32 rows of 256 tokens and 8 long rows of 1024 are the same documents."""
    tokens = torch.arange(64, dtype=torch.int32)
    corpora = [
        chain.corpus.model_copy(
            update={
                "tokens": write_tensors(tmp_path, f"{rows}.safetensors", {"test": tokens.view(rows, -1)}),
                "sequence_length": 64 // rows,
                "test_sequences": rows,
            }
        )
        for rows in (8, 2)
    ]
    short, long = (text_of("x", "rows", one, 8, tmp_path) for one in corpora)
    assert (short.sequences, long.sequences) == (8, 2)
    assert short.content != long.content


# --- fine-tuning


def test_fine_tuning_is_adamw_on_the_next_token() -> None:
    model, asked = tiny_model(0), Asked(finetune_steps=1, finetune_sequences=3, learning_rate=1e-2)
    other = deepcopy(model)
    train = torch.randint(48, (3, 9), generator=torch.Generator().manual_seed(1))
    test = torch.randint(48, (4, 9), generator=torch.Generator().manual_seed(2))
    found = fine_tune(model, (train, test), asked, SMALL, no_progress)  # SMALL: two sequences at a time
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0)
    losses = []
    for _ in range(2):
        with torch.no_grad():
            logits = other(test).logits[:, :-1]
            each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), test[:, 1:], reduction="none")
        losses.append(each.mean(1).tolist())
        optimizer.zero_grad()
        other(train, labels=train).loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
    assert found.tokens == (0, 27)
    assert np.array(found.losses) == pytest.approx(np.array(losses), rel=1e-4)
    assert found.losses[0] != found.losses[1]


@pytest.mark.parametrize(
    ("steps", "measured"), [(1, [0, 1]), (3, [0, 1, 2, 3]), (8, [0, 1, 2, 4, 8]), (12, [0, 1, 2, 4, 8, 12])]
)
def test_losses_are_measured_often_at_first(steps: int, measured: list[int]) -> None:
    assert measured_steps(steps) == measured


def test_a_loss_that_is_no_number_is_a_failure() -> None:
    model = tiny_model(0)
    model.lm_head.weight.data[0] = torch.nan
    with pytest.raises(PuzzleFailure, match="the loss of child is not a number after 0 steps"):
        fine_tune(model, (torch.zeros(1, 9), torch.ones(2, 9)), Asked(finetune_steps=1), SMALL, no_progress, "child")


def test_too_little_memory_is_said_before(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.probe.tuning.free_bytes", lambda _: 1000)
    with pytest.raises(PuzzleError, match="--finetune-steps 0"):
        check_memory(run_of(chain, CUT), HOST)


# --- the whole


@pytest.mark.parametrize(
    ("first", "second", "common"),
    [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2], 2), ([1, 2, 3], [1, 4, 3], 1), ([5], [6], 0)],
)
def test_tokens_in_common(first: list[int], second: list[int], common: int) -> None:
    assert in_common(first, second) == in_common(second, first) == common


def test_a_model_that_is_the_parent_breaks_nowhere(report: ProbeReport) -> None:
    """The baseline is the parent's own blocks: every difference is exactly 0."""
    assert report.models == ("parent", "child", "greedy")
    for domain in report.domains:
        own = domain.models["greedy"]
        assert own.kl.value == 0 and own.times is None
        for name in ("loss", "entropy", "calibration"):
            difference = getattr(own, f"{name}_over_parent")
            assert (difference.value, difference.se) == (0, 0)
    assert report.length and report.tuning and report.agreement
    assert report.length.grows_from["greedy"] is None
    assert all(span.over_parent["greedy"].value == 0 for span in report.length.spans)
    curve = report.tuning.models["greedy"]
    assert curve.loss == report.tuning.models["parent"].loss and curve.tokens_to_parent == 0
    answers = report.agreement.models["greedy"]
    assert answers.never is not None and answers.never.value == 1
    assert answers.loops == report.agreement.models["parent"].loops


def test_a_child_that_lost_blocks_is_compared_in_pairs(report: ProbeReport, chain: Chain) -> None:
    for domain in report.domains:
        own, parent = domain.models["child"], domain.models["parent"]
        assert own.kl.value > 0.01 and own.kl.n == domain.documents == own.kl.n
        assert own.loss_over_parent is not None
        assert own.loss_over_parent.value == pytest.approx(own.loss.value - parent.loss.value)
        assert 0 <= parent.calibration.value < 1 and parent.kl.value == 0
    test, *others = report.domains
    assert test.models["child"].times is None
    for domain in others:
        times = domain.models["child"].times
        assert times is not None
        assert times.value == pytest.approx(domain.models["child"].kl.value / test.models["child"].kl.value)
    worst = worst_domain(report)
    assert worst is not None
    assert worst.models["child"].times == max(
        (one.models["child"].times for one in others), key=lambda one: one.value if one else 0
    )
    assert report.length and report.length.spans[-1].last == 63 and report.length.trained == 32
    assert read_value(chain.workspace / "runs" / "z" / PROBE, ProbeReport) == report


def test_a_probe_is_not_computed_twice(report: ProbeReport, chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(chain.workspace / "runs" / "z" / "child")
    if run.lineage.rival is None:  # another test wrote its own run there
        run = run_of(chain, CUT, rival=contender("greedy", chosen((LayerChoice(),) * 3), chain.blocks))
    monkeypatch.setattr("tasks.probe.sides.served", None)  # no model is opened
    again = probe(prepare(run, {}, ASKED, HOST), HOST, quiet)
    assert again.model_copy(update={"probed_at": ""}) == report.model_copy(update={"probed_at": ""})


def test_a_model_in_memory_is_not_loaded_again(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a probe begins with the model that the part before it ended with, even to train it."""
    run, loaded = (
        run_of(chain, CUT, rival=contender("greedy", chosen(CUT[:1] * 2 + CUT[1:2]), chain.blocks)),
        list[str](),
    )

    def load(which: Contender, *_: Any) -> str:
        loaded.append(which.name)
        return which.name

    monkeypatch.setattr("tasks.probe.sides.served", load)
    bench, given = Bench(run=run, compute=HOST), list[str]()
    for part, give in enumerate((bench.model, bench.model, bench.take)):

        def find(which: Contender, _: Progress, give: Callable[[Contender], str] = give) -> Asked:
            given.append(give(which))
            return Asked()

        assert list(bench.of_each(Asked, find, no_progress, part=part)) == ["parent", "child", "greedy"]
    assert given == ["parent", "child", "greedy", "greedy", "parent", "child", "child", "parent", "greedy"]
    assert loaded == ["parent", "child", "greedy", "parent", "child", "parent", "greedy"]


def test_words_name_the_worst_text(report: ProbeReport) -> None:
    told = sentences(report)
    worst = worst_domain(report)
    assert worst is not None and told[0].startswith(f"Other text: worst on {worst.name} ({worst.about})")
    assert [line.split(":")[0] for line in told] == [
        "Other text",
        "Length",
        "Confidence",
        "Fine-tuning on python",
        "Answers",
    ]
    found = tables(report)
    assert [title.split(",")[0].split(" to ")[0] for title, _, _ in found] == [
        "Other text",
        "Confidence",
        "Length",
        "Fine-tuning",
        "Answers",
    ]
    for _, header, rows in found:
        assert rows and all(len(row) == len(header) for row in rows)
    part = {"length": None, "tuning": None, "agreement": None}
    assert len(tables(report.model_copy(update=part))) == 2
    names = dict(figures(report))
    assert names["probe_python/child_kl"] == report.domains[1].models["child"].kl
    assert len(draw_probe(report).axes[0].patches) == 2 * len(report.domains)


def test_a_loss_that_grows_is_said_from_where() -> None:
    """Rows of which the loss over the parent's is .1 up to a context of 63 and .5 behind it, with a little noise."""
    chance = np.random.default_rng(0)
    spans = spans_of(256)
    noise = chance.normal(scale=0.02, size=(len(spans), 12))
    gaps = np.array([0.5 if first >= 64 else 0.1 for first, _ in spans])[:, None] + noise
    text = own_rows(12, 256)
    zeros = np.zeros_like(gaps)
    readings = {
        (model, "rows"): probe_figures.Reading(samples={}, by_context=tuple(map(tuple, one.tolist())))
        for model, one in (("parent", zeros), ("child", gaps), ("flat", zeros + 0.2 + noise))
    }
    found = length_figures(text, readings, 64)
    assert found.grows_from == {"child": 64, "flat": None}
    growth = next(span.growth["child"] for span in found.spans if span.first == 64)
    assert growth.value == pytest.approx(0.4, abs=0.05) and growth.n == 12


def own_rows(rows: int, length: int) -> Text:
    corpus = CorpusInfo(
        tokens=Ref(path="x", sha256="0" * 64),
        fingerprint="f",
        sequence_length=length,
        train_sequences=0,
        validation_sequences=0,
        test_sequences=rows,
        documents=rows,
    )
    return Text(name="long", about="rows", corpus=corpus, content="rows", documents=tuple(map(str, range(rows))))


def probe_report(made: ChildReport) -> ProbeReport:
    """A probe of two texts and nothing else, for pages and MLflow."""

    def on(kl: float, **more: Any) -> OnDomain:
        one = Metric(value=0.1, se=0.01, n=9)
        measured = {"loss": one, "kl": one.model_copy(update={"value": kl}), "entropy": one, "calibration": one}
        return OnDomain(**measured, **more)

    zero = Metric(value=0.0, se=0.1, n=9)
    over: dict[str, Any] = {f"{name}_over_parent": zero for name in ("loss", "entropy", "calibration")}
    times = Metric(value=2.5, se=0.2, n=9)
    texts = {"test": "the run's own", "upper": "on upper & lower"}
    domains = tuple(
        DomainFigures(
            name=name,
            about=about,
            sequences=9,
            documents=9,
            models={"parent": on(0), "child": on(0.2, **over, times=None if name == "test" else times)},
        )
        for name, about in texts.items()
    )
    return ProbeReport(
        profile=made.profile,
        parent=made.parent,
        child_folder=made.child_folder,
        probed_at="2026-01-01T00:00:00",
        asked=ASKED,
        models=("parent", "child"),
        domains=domains,
    )


def test_the_best_baseline_is_the_one_that_is_best_at_the_end(chain: Chain) -> None:
    """After GKD where it had any, in its file where it has one; none where there is no other architecture."""
    plain = contender("greedy", chosen(CUT), chain.blocks)
    filed, trained = (plain.model_copy(update={"file": name}) for name in ("a.gguf", "b.gguf"))
    other = contender("uniform", chosen((LayerChoice(),) * 3), chain.blocks)
    child = contender("child", chosen((LayerChoice(), LayerChoice(), CUT[2])), chain.blocks)

    def rival(*models: tuple[Contender, float]) -> Contender | None:
        kl = [Metric(value=value, se=0.0, n=1) for _, value in models]
        found = [
            Evaluation(quality=Quality(loss=one, kl=one, top1_agreement=one), samples={}, benchmarks={}) for one in kl
        ]
        return best_baseline(child, [plain, other], [model for model, _ in models], found)

    assert rival((child, 0.1), (filed, 0.4), (other, 0.3)) == other
    assert rival((child, 0.1), (filed, 0.4), (other, 0.3), (child, 0.1), (trained, 0.2)) == trained
    assert rival((child, 0.1), (filed, 0.2), (other, 0.3), (child, 0.1), (trained, 0.4)) == other
    twin = child.model_copy(update={"name": "greedy"})
    assert best_baseline(child, [twin], [], []) is None
    source = (chain.parent, chain.corpus)
    assert lineage_of(child, trained, source, ()).rival == trained
    lineage = lineage_of(child, None, source, [chain.corpus])
    assert lineage.rival is None and lineage.capabilities == (chain.corpus,) and lineage.child == child


# --- the command


def test_a_probe_without_a_child_is_refused(tmp_path: Path, chain: Chain) -> None:
    for words, told in (
        ((tmp_path / "none",), "is no folder"),
        ((tmp_path,), "holds no finished run, and so no child"),
        ((chain.workspace / chain.parent.folder,), "holds no report.json"),
        ((tmp_path, "--text", "news"), "a name and a file"),
        ((tmp_path, "--text", "news=gone.txt"), "there is no file gone.txt"),
        ((tmp_path, "--answer-tokens", 5000), "--answer-tokens"),
    ):
        code, out, err = puzzle("probe", *words)
        assert (code, out) == (2, "") and told in err, err


@pytest.mark.parametrize(("device", "told"), [("cuda:7", "is not on this machine"), ("gpu", "neither cpu nor cuda")])
def test_a_device_that_is_not_there_is_refused(chain: Chain, device: str, told: str) -> None:
    run_of(chain, CUT)
    code, out, err = puzzle("probe", chain.workspace / "runs" / "z" / "child", "--device", device)
    assert (code, out) == (2, "") and told in err, err


def test_the_command_prints_what_was_found(chain: Chain, report: ProbeReport) -> None:
    run_of(chain, CUT, rival=contender("greedy", chosen((LayerChoice(),) * 3), chain.blocks))
    child = chain.workspace / "runs" / "z" / "child"
    words = ("--sequences", 8, "--length", 0, "--finetune-steps", 0, "--prompts", 0, "--threads", 1)
    code, out, err = puzzle("probe", child, *words, "--json")
    assert code == 0, err
    found = ProbeReport.model_validate_json(out)
    assert found.domains == report.domains  # which do not depend on the other parts, left out here
    assert found.length is None and found.tuning is None and found.agreement is None
    assert "no report.html" in err  # the chain has no tables of a search
    code, out, err = puzzle("probe", child, *words)
    assert code == 0 and "Other text: worst on" in out, err
