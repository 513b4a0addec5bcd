"""The report page: self-contained, the figures of the choice in it, every picture also as PNG."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from blocks.library import write_value
from blocks.records import SpeedReport, TruthPoint
from profiles.schema import Budget
from tasks.libraries.interchange import joint_view, open_library, write_library
from tasks.pages import page
from tasks.pages.front import front_of
from tasks.pages.library_pictures import cells_of, colours_of, draw_strip
from tasks.pages.page import figure, read_truth
from tasks.pages.run_page import following, stored_choice, study_of_run
from tasks.pages.svg import inline_svg
from tasks.probe.records import PROBE
from tasks.probe.words import sentences
from tasks.search.choose import choose
from tasks.search.confidence import Draws
from tasks.search.joint import LibraryFileError
from tasks.search.request import Request, limits
from tasks.search.solve import choose_joint
from tasks.search.view import request_of
from tests import test_nvlabs
from tests.test_choose import CHAT, EXACT, LONG, random_problem
from tests.test_interchange import stored
from tests.test_nvlabs import answers, label, puzzle
from tests.test_probe import probe_report
from tests.test_report import report_of

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def nvlabs(tmp_path: Path) -> Path:
    path = tmp_path / "block_library.json"
    path.write_text(json.dumps(test_nvlabs.library()))
    return path


class Page(HTMLParser):
    """Tags and what they load; text apart from styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data.strip())


def page_of(tmp_path: Path, *words: Any) -> tuple[Page, str]:
    target = tmp_path / "out" / "report.html"
    code, out, err = puzzle("report", *words, "--out", target, "--png", tmp_path / "png", "--points", 5, "--draws", 8)
    assert code == 0, err
    assert str(target) in out
    text = target.read_text()
    page = Page(text)
    assert not page.open, "every tag is closed"
    assert "script" not in page.tags and "link" not in page.tags and "@import" not in text
    assert all(address.startswith("#") for address in page.loads), page.loads
    assert not re.findall(r"url\((?!#)", text)
    assert not [address for address in re.findall(r"https?://[^\"' )]+", text) if "www.w3.org" not in address]
    return page, text


def test_a_library_alone(tmp_path: Path, nvlabs: Path) -> None:
    truth = [{"name": f"top <{i}>", "predicted": 0.1 * i, "true": 0.12 * i, "true_se": 0.01} for i in range(1, 4)]
    (tmp_path / "study.json").write_text(json.dumps(truth))
    words = ("--library", nvlabs, "--memory-gib", 4000 / 1024, "--latency-seconds", 1900 / 1000)
    page, text = page_of(tmp_path, *words, "--study", tmp_path / "study.json")
    answer = answers("choose", *words)
    told = " ".join(page.words)
    assert f"{answer['objective']:.6g}" in told and "optimal" in told
    assert figure(answer["memory_gib"], "GiB") in told and figure(answer["latency_seconds"], "s") in told
    for name in set(answer["layers"].values()):
        assert " ".join(name.split()) in told
    told = " ".join(told.split())
    assert told.index("budget asked got measured kept memory_gib at most 3.906 GiB") < told.index("objective")
    assert f"library {nvlabs.resolve()} this page" in told
    assert "top <2>" in told and "no scores per sequence" in told
    assert page.tags.count("svg") == 3  # strip, front, truth
    assert {path.name for path in (tmp_path / "png").iterdir()} == {"strip.png", "front.png", "truth.png"}
    assert all(path.read_bytes().startswith(PNG) for path in (tmp_path / "png").iterdir())
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_a_floor_is_a_budget_too(tmp_path: Path, nvlabs: Path) -> None:
    """At least so much throughput; the front goes down to a child that takes no time at all, endlessly fast."""
    page, _ = page_of(tmp_path, "--library", nvlabs, "--tokens-per-second", "160%", "--memory-gib", "90%")
    told = " ".join(page.words)
    assert "at least 160 % of the parent's" in told and "Pareto front over latency" in told
    nothing = answers("choose", "--library", nvlabs, "--tokens-per-second", "160%", "--memory-gib", 1e-6)
    assert nothing["latency_seconds"] == 0


def test_confidence_where_the_library_can_tell(tmp_path: Path) -> None:
    write_library(tmp_path / "tables" / "p", stored(random_problem(0, Budget(speedup=1.2))))
    page, _ = page_of(tmp_path, "--library", tmp_path, "--parameters", "70%")
    found = answers("confidence", "--library", tmp_path, "--parameters", "70%", "--draws", 8)
    told = " ".join(page.words)
    assert f"{found['low']:.5g} to {found['high']:.5g}" in told and "8 draws" in told
    assert (tmp_path / "png" / "confidence.png").exists()


def test_scenarios_that_nobody_weighs_have_a_page(tmp_path: Path) -> None:
    """Each has a runtime and a memory of its own, none the least: the front is over parameters, the budgets kept."""
    write_library(tmp_path / "tables" / "p", stored(random_problem(0, Budget(speedup=1.2), scenarios=(CHAT, LONG))))
    words = ("--library", tmp_path, "--latency-seconds", "chat=70%", "--parameters", "95%")
    page, _ = page_of(tmp_path, *words)
    told = " ".join(page.words)
    assert "Pareto front over parameters" in told and f"{answers('choose', *words)['objective']:.6g}" in told
    weighed, _ = page_of(tmp_path, *words, "--traffic", "chat=3", "--traffic", "long=1")
    assert "Pareto front over latency" in " ".join(weighed.words)


def test_the_front_and_the_simple_searches(nvlabs: Path) -> None:
    """No simple search is below the front at its own cost; none breaks the other budget; the front falls."""
    library = open_library(nvlabs)
    request = Request(limits=limits(memory_gib=3500 / 1024, latency_seconds=2.6))
    choice = choose_joint(library, request)[0]
    front = front_of(library, request, choice, "memory_gib", 7)
    assert [y for _, y in sorted(front.front)] == sorted((y for _, y in front.front), reverse=True)
    assert set(front.baselines) == {"uniform", "depth", "stepwise"} and all(front.baselines.values())
    for points in front.baselines.values():
        for used, objective in points:
            best = choose_joint(
                library, Request(limits=limits(memory_gib=max(used, 1e-9) * (1 + 1e-9), latency_seconds=2.6))
            )
            assert objective >= best[0].objective - 1e-9
    data = test_nvlabs.library()
    same = label("2 kv heads", "intermediate size 14e3")
    memory = sum(layer[same]["stats"]["memory_mib"] for layer in data.values()) / 1024
    runtime = sum(layer[same]["stats"]["runtime_ms"] for layer in data.values())
    assert runtime <= 2600, "the request must allow it"
    assert any(used == pytest.approx(memory) for used, _ in front.baselines["uniform"])
    parent = label("8 kv heads", "intermediate size 29e3")
    assert sum(layer[parent]["stats"]["runtime_ms"] for layer in data.values()) > 2600, "the request must bind"
    dearest = sum(layer[parent]["stats"]["memory_mib"] for layer in data.values()) / 1024
    assert not any(used == pytest.approx(dearest) for used, _ in front.baselines["uniform"])


def test_labels_become_cells() -> None:
    cells = cells_of("attention = 2 kv heads (parent * 25%)\t&&\tffn = no_op (parent * 0%)")
    assert (cells["attention"].kind, cells["attention"].percent, cells["ffn"].kind) == ("sized", 25, "no_op")
    own = cells_of("attention = kv1 && ffn = ffn768 (coupled)")
    assert (own["attention"].size, own["attention"].kind, own["ffn"].size) == (1, "sized", 768)
    assert cells_of("attention = parent && ffn = linear")["ffn"].kind == "linear"
    assert cells_of("Mamba mixer 3")["block"].text == "Mamba mixer 3"
    labels = ["2 kv heads (parent * 25%)", "4 kv heads (parent * 50%)", "no_op", "linear", "parent"]
    row = [cells_of(f"attention = {name} && ffn = parent")["attention"] for name in labels]
    assert len(set(colours_of("attention", row).values())) == 5


def test_an_odd_label_is_drawn_and_escaped() -> None:
    text = inline_svg(draw_strip({"a": "<script>alert(1)</script>", "b": r"$\bad{$ & more"}), "strip")
    assert "<script" not in text and text.startswith("<svg") and text.endswith("</svg>")


@pytest.mark.parametrize("found", ["[]", '{"points": []}'])
def test_truth_may_be_empty(tmp_path: Path, found: str) -> None:
    (tmp_path / "s.json").write_text(found)
    assert read_truth(tmp_path / "s.json") == ()


def test_truth_is_a_contract(tmp_path: Path, nvlabs: Path) -> None:
    (tmp_path / "s.json").write_text('{"points": [{"name": "a", "predicted": 1, "true": 2}]}')
    assert read_truth(tmp_path / "s.json") == (TruthPoint(name="a", predicted=1, true=2),)
    for text, told in (("3", "a list of {name"), ('[{"name": "a"}]', "predicted"), ("[", "is not the JSON")):
        (tmp_path / "s.json").write_text(text)
        words = ("report", "--library", nvlabs, "--memory-gib", 4000 / 1024, "--study", tmp_path / "s.json")
        code, _, err = puzzle(*words, "--out", tmp_path / "x.html")
        assert code == 2 and told in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "name a workspace, or a library"),
        (("--library", "{nv}"), "a budget is needed"),
        (
            ("--library", "{nv}", "--memory-gib", "3.90625", "--over", "tokens-per-second"),
            "a front is drawn over one of",
        ),
        (("--library", "{nv}", "--memory-gib", "0.001", "--forbid", "no_op"), "No architecture"),
    ],
)
def test_what_cannot_be_reported(nvlabs: Path, words: tuple[str, ...], told: str) -> None:
    code, _, err = puzzle("report", *(word.format(nv=nvlabs) for word in words))
    assert code == 2 and told in err


@pytest.mark.parametrize("layers", [1, 33])
def test_layers_all_alike(layers: int) -> None:
    strip = draw_strip({f"layer_{i}": "attention = parent && ffn = parent" for i in range(layers)})
    assert len(strip.axes) == -(-layers // 32)


def test_the_view_of_a_run_gives_a_front() -> None:
    view = joint_view(stored(random_problem(1, Budget(speedup=1.2))))
    request = Request(limits=limits(parameters="70%"))
    choice = choose_joint(view, request)[0]
    front = front_of(view, request, choice, "parameters", 5)
    assert front.parent == view.of_parent("parameters") and front.chosen == (choice.parameters, choice.objective)
    assert all(front.baselines.values())


def test_the_page_of_a_run_is_about_the_runs_own_choice() -> None:
    """Under constraints and batch sizes of its own: labels, sums, certificate are the run's, nothing is solved."""
    batches = CHAT.model_copy(update={"batch_sizes": (1, 4)})
    problem = random_problem(3, Budget(layer_parameters_fraction=0.6), scenarios=(batches,))
    problem = replace(problem, search=problem.search.model_copy(update={"max_block_types": 2}))
    library, request = joint_view(stored(problem)), request_of(problem)
    architecture = choose(problem)
    told, solved = stored_choice(library, request, architecture), choose_joint(library, request)[0]
    assert told == solved and len(set(told.layers.values())) == 2
    free = choose_joint(library, request.model_copy(update={"search": EXACT}))[0]
    assert free.layers != told.layers, "the constraint binds, so a new choice would be another"
    unproven = architecture.model_copy(update={"status": "time_limit", "bound": 0.0, "gap": 1.0})
    open_one = stored_choice(library, request, unproven)
    assert (open_one.status, open_one.bound, open_one.gap) == ("time_limit", 0.0, 1.0)


def test_a_library_that_was_made_again_is_not_taken_for_the_runs() -> None:
    problem = random_problem(3, Budget(layer_parameters_fraction=0.6))
    other = random_problem(5, Budget(layer_parameters_fraction=0.6))
    for changed, what in (
        (replace(problem, costs=other.costs), "costs"),
        (replace(problem, scores=other.scores), "scores"),
    ):
        with pytest.raises(
            LibraryFileError, match=f"not the one that its last run chose from: its {what} were measured"
        ):
            stored_choice(joint_view(stored(changed)), request_of(problem), choose(problem))


def test_what_a_page_solves_again_is_kept_for_the_same_choice_in_the_same_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved, plain = list[str](), page._solved

    def counted(*asked: Any) -> page.Solved:
        solved.append("again")
        return plain(*asked)

    monkeypatch.setattr(page, "_solved", counted)

    def study(seed: int, points: int = 3, fraction: float = 0.6) -> page.Study:
        problem = random_problem(seed, Budget(layer_parameters_fraction=fraction))
        write_library(tmp_path / "tables" / "tiny", stored(problem))
        asked = {"request": request_of(problem).model_dump(mode="json"), "architecture": choose(problem)}
        extent = page.Extent(points=points, draws=Draws(most=4))
        return study_of_run(tmp_path, report_of().model_copy(update=asked), extent, ())

    first = study(3)
    assert study(3).solved == first.solved and first.solved.confidence is not None and solved == ["again"]
    for other in (study(5), study(3, points=4), study(3, fraction=0.7)):  # new scores and costs, another page, budget
        assert other.solved != first.solved
    assert len(solved) == 4
    for file in (tmp_path / "pages").iterdir():
        file.write_text(file.read_text()[:-9])
    assert study(3).solved == first.solved and len(solved) == 5, "a damaged file is made again"


def test_a_probe_is_a_part_of_the_page(tmp_path: Path) -> None:
    problem = random_problem(0, Budget(speedup=1.2))
    write_library(tmp_path / "tables" / "tiny", stored(problem))
    asked = {"request": request_of(problem).model_dump(mode="json"), "architecture": choose(problem)}
    report = report_of().model_copy(update=asked)

    def told() -> tuple[str, int]:
        study = study_of_run(tmp_path, report, page.Extent(points=3, draws=Draws(most=4)), ())
        parsed = Page(page.render(study, page.pictures_of(study)))
        return " ".join(parsed.words), parsed.tags.count("svg")

    without, pictures = told()
    assert "Where it breaks" not in without
    found = probe_report(report)
    write_value((tmp_path / report.child_folder).parent / PROBE, found)
    words, more = told()
    assert more == pictures + 1
    assert "Where it breaks" in words and all(line in words for line in sentences(found))
    assert "on upper &" in words and "2.50 ±0.20" in words


def test_a_page_says_what_to_do_next() -> None:
    command = "puzzle optimize mine/profile.yaml --workspace 'a b' --set seed=1"
    report = report_of().model_copy(update={"command": command, "speed": SpeedReport(engine="llama.cpp (x 1)")})
    found = dict(following(report, Path("/w/a b/child")))
    assert list(found.values()) == [
        "puzzle export '/w/a b/child' --format gguf --out tiny.gguf",
        "puzzle bench '/w/a b/child' --engine llama.cpp",
        "puzzle probe '/w/a b/child'",
        "puzzle reoptimize mine/profile.yaml --workspace 'a b' --set seed=1",
        "puzzle serve mine/profile.yaml",
    ]
    served = report.model_copy(update={"command": "prefect deployment run 'optimize/mine'"})
    assert "puzzle reoptimize PROFILE" in dict(following(served, Path("c"))).values()
