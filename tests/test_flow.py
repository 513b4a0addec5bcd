"""The command line on the tiny profile, as a user starts it: the whole flow, a crash, another budget, wrong input."""

import hashlib
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from blocks.library import read_value
from blocks.records import ChildReport
from flows import in_workspace
from profiles.load import load_profile
from tasks.libraries.interchange import open_library, read_library
from tasks.pages.page import read_truth, truth_of
from tasks.running.servers import PREFECT_DATABASE, QUIET, free_port, prefect_server, running
from tasks.search.request import Request, limits
from tasks.search.solve import choose_joint
from tasks.studies.peers import JUDGED
from tests.test_nvlabs import puzzle

pytestmark = pytest.mark.timeout(2400)  # whole runs, each with a server of its own

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "profiles" / "tiny.yaml"
PUZZLE = [sys.executable, "-c", "from flows.cli import main; main()"]
SMALLER = [
    "--set",
    "corpus.sources=[{kind: python_stdlib, max_files: 80}]",
    "--set",
    "evaluate.throughput_rounds=1",
    "--set",
    "search_space.ffn=[ffn96, no_op]",
    "--set",
    "hardware.threads=1",
    "--set",
    "parent.train_steps=40",
    "--set",
    "gkd={steps: 8, evaluate_every: 4, batch_sequences: 8, learning_rate: 2.0e-4, validation_sequences: 8}",
]
ALONE = ("--set", "evaluate.baselines=[]")  # where the child is what is looked at
RACE = "race={candidates: 3, min_different: 1, rounds: [0, 4]}"
OTHER = ("--set", "budget.layer_parameters_fraction=0.45", "--set", RACE)


STRANGE = "we ird [1] 50%? #x é"  # what a URL or a glob would read otherwise


def start(workspace: Path, *more: str) -> subprocess.Popen[str]:
    command = [*PUZZLE, "optimize", "profiles/tiny.yaml", "--workspace", str(workspace), *SMALLER, *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(workspace: Path, *more: str) -> str:
    process = start(workspace, *more)
    output, _ = process.communicate(timeout=800)
    assert process.returncode == 0, output
    return output


def child_of(output: str) -> Path:
    last = output.strip().splitlines()[-1]
    assert last.startswith("child: ")
    return Path(last.removeprefix("child: "))


def digests(child: Path) -> dict[str, str]:
    names = ("config.json", "model.safetensors", "tokenizer.json")
    return {name: hashlib.sha256((child / name).read_bytes()).hexdigest() for name in names}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    workspace = tmp_path_factory.mktemp("flow") / STRANGE
    return workspace, finished(workspace)


def test_a_workspace_of_any_name_keeps_all_of_the_run(run: tuple[Path, str]) -> None:
    workspace, output = run
    assert [path.name for path in workspace.parent.iterdir()] == [STRANGE]
    for database in ("mlflow.db", "prefect/prefect.db"):
        assert (workspace / database).stat().st_size > 0
    assert any((workspace / "mlartifacts").rglob("report.json"))
    assert child_of(output).is_relative_to(workspace.resolve())
    assert all(f"{name}='" in output for name in ("PREFECT_HOME", PREFECT_DATABASE)), (
        "the commands that open the pages name this workspace"
    )


def test_the_graph_of_a_run_has_an_edge_into_every_task(run: tuple[Path, str]) -> None:
    """As Prefect's UI draws it: from the parent to the export, which waits for all that the report shows."""
    with closing(sqlite3.connect(run[0] / "prefect" / "prefect.db")) as database:
        rows = database.execute("select id, name, task_inputs from task_run").fetchall()
        open_ones = database.execute("select name from task_run where state_type != 'COMPLETED'").fetchall()
    assert open_ones == [], "its end waits until Prefect has recorded how each task ended"
    names = {one.replace("-", ""): name for one, name, _ in rows}
    edges = {
        name: {names[one["id"].replace("-", "")] for values in json.loads(inputs).values() for one in values}
        for _, name, inputs in rows
    }
    assert [name for name, needs in edges.items() if not needs] == ["prepare parent"]
    (export,) = (needs for name, needs in edges.items() if name.startswith("export"))
    shown = {name for name in edges if name.startswith(("evaluate", "answers", "throughput"))}
    assert {"GKD of child"} | shown <= export and len(shown) > 5
    measured = {name for name in edges if name.startswith("measure")}
    assert measured | {"score layer 03"} <= edges["choose"] and len(measured) > 5
    assert edges["evaluate child (distilled)"] == {"GKD of child"}


@pytest.fixture(scope="module")
def another(run: tuple[Path, str]) -> tuple[str, dict[Path, int], float]:
    """Another budget on the finished library: output, the library's files before it, CPU-seconds of its processes."""
    library, before = times(run[0] / "library"), cpu_of_children()
    return finished(run[0], *OTHER, *ALONE), library, cpu_of_children() - before


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def times(folder: Path, pattern: str = "*") -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob(pattern)}


def with_database(home: Path, made: Path) -> None:
    """A PREFECT_HOME whose server finds its tables there, and no run in them: to make them takes it seven seconds."""
    home.mkdir(parents=True)
    with closing(sqlite3.connect(made / "prefect.db")) as source, closing(sqlite3.connect(home / "prefect.db")) as copy:
        source.backup(copy)
        for table in ("flow_run", "flow_run_state", "task_run", "task_run_state", "artifact", "log"):
            copy.execute(f"delete from {table}")
        copy.commit()


def report_of(workspace: Path) -> ChildReport:
    """Of the first run: others with other settings come to the same workspace, whatever the order of the tests."""
    first = min(workspace.glob("runs/*/report.json"), key=lambda path: path.stat().st_mtime)
    return read_value(first, ChildReport)


def test_it_ends_with_a_table_and_the_child(run: tuple[Path, str]) -> None:
    workspace, output = run
    report = report_of(workspace)
    stages = {(candidate.name, candidate.stage) for candidate in report.candidates}
    assert {("parent", "parent"), ("child", "assembled"), ("child", "distilled"), ("uniform", "assembled")} <= stages
    own = next(c for c in report.candidates if c.name == "parent")
    assert own.kl is not None and own.kl.value == 0 and own.top1_agreement is not None
    assert own.top1_agreement.value == 1
    for text in ("prefect server start", "mlflow server", "retention" if own.benchmarks else "KL, nats"):
        assert text in output
    for name in ("report.json", "report.md", "architecture.png", "comparison.png", "child/README.md"):
        assert (workspace / "runs").glob(f"*/{name}")
    assert all((child_of(output).parent / name).stat().st_size > 500 for name in ("architecture.png", "report.md"))


def test_the_stages_it_notes_are_those_of_its_plan(run: tuple[Path, str]) -> None:
    """Names, tasks and tokens of the plan against the report, the block library and the tables of the run."""
    from benchmarks.plan import sums
    from tasks.planning.plan import config_parent, machine_rates, plan_of

    profile = load_profile(ROOT / "profiles" / "tiny.yaml", SMALLER[1::2])
    rates = machine_rates(profile, "cpu")
    assert rates is not None
    plan, report = plan_of(profile, config_parent(profile.parent), rates), report_of(run[0])
    matched = {name: planned for name, planned, _, _ in sums(plan, report)}
    assert set(matched) == {stage.name for stage in plan.stages}
    assert sum(seconds or 0 for seconds in matched.values()) == pytest.approx(plan.seconds)
    library, tasks = read_library(run[0] / "tables" / "tiny"), {stage.name: stage.tasks for stage in plan.stages}
    assert plan.blocks == len(library.variants) == tasks["distill"]
    tokens = {stage.name: stage.tokens for stage in plan.stages}
    assert tokens["distill"] == sum(block.tokens for block in library.variants)
    assert tokens["score"] == sum(score.tokens for score in library.scores)
    assert plan.parent_parameters == report.candidates[0].parameters
    assert report.stages[2].cpu_seconds > 0 and sum(s.seconds for s in report.stages) <= report.seconds
    child = next(child for child in plan.children if child.name == "largest within the budget")
    assert child.parameters >= next(c for c in report.candidates if c.name == "child").parameters


def test_the_child_keeps_its_budget_by_its_real_weights(run: tuple[Path, str]) -> None:
    from safetensors import safe_open

    workspace, output = run
    report = report_of(workspace)

    def layer_parameters(file: Path) -> int:
        with safe_open(file, framework="pt") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in list(tensors.keys()) if ".layers." in name]
        return sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes)

    child = layer_parameters(child_of(output) / "model.safetensors")
    parent = layer_parameters(workspace / report.parent.folder / "model.safetensors")
    assert 0.4 * parent < child <= 0.6 * parent  # the profile's budget binds
    assert report.architecture.status == "optimal"


def test_the_library_it_leaves_chooses_the_same_child(run: tuple[Path, str]) -> None:
    """`puzzle choose` on the workspace, with the profile's budget in other words."""
    architecture = report_of(run[0]).architecture
    library = open_library(run[0], "chat", architecture.totals[0].batch_size)
    fixed = library.outside("parameters", 0)
    limit = fixed + 0.6 * (library.of_parent("parameters") - fixed)
    (choice,) = choose_joint(library, Request(limits=limits(parameters=limit)))
    (same,) = choose_joint(library, Request(limits=limits(layer_parameters="60%")))
    assert same == choice
    assert 0 < choice.objective == pytest.approx(architecture.score, rel=1e-5)
    assert choice.memory_gib is not None and choice.memory_gib * 2**30 == pytest.approx(
        architecture.totals[0].memory_bytes
    )
    tables = read_library(run[0] / "tables" / "tiny")
    assert len(tables.variants) == len(tables.scores) == 4 * (3 + 2)


def study(workspace: Path, *words: str) -> tuple[int, str, str]:
    return puzzle(words[0], TINY, "--workspace", workspace, *SMALLER, *words[1:])


@pytest.mark.slow
def test_the_library_it_leaves_is_checked_against_true_kl(run: tuple[Path, str]) -> None:
    """Every search side by side, predicted against true; what they leave; a profile that was never run."""
    workspace, _ = run
    code, out, told = study(workspace, "peers", "--evaluations", "500")
    assert code == 0, told
    assert "lowest true KL: " in out and "peers        done in" in told
    kept = json.loads(next(workspace.glob("studies/peers-tiny-*/study.json")).read_text())
    assert {entry["name"] for entry in kept["entries"]} | set(kept["left_out"]) == set(JUDGED)
    kls = [sum(entry["true"]) for entry in kept["entries"]]
    assert kls == sorted(kls)

    code, out, told = study(workspace, "check", "--top", "4", "--swaps", "4")
    assert code == 0, told
    assert "rank correlation" in out and "swaps: " in out
    (folder,) = workspace.glob("studies/check-tiny-*")
    assert (folder / "predicted-against-true.png").stat().st_size > 10_000
    points = read_truth(folder / "truth.json")
    assert len(points) >= 4 and all(point.true > 0 for point in points) and truth_of(workspace) == points
    child = json.loads((folder / "study.json").read_text())["measured"][0]
    assert child["layers"] == [choice.model_dump() for choice in report_of(workspace).architecture.layers]

    code, _, told = study(workspace, "check", "--set", "search_space.ffn=[ffn64, no_op]")
    assert code == 2 and "4 of" in told and "run `puzzle optimize`" in told
    code, _, told = puzzle("peers", TINY, "--workspace", workspace / "nowhere")
    assert code == 2 and "is no workspace" in told and not (workspace / "nowhere").exists()


def test_prefect_and_mlflow_carry_each_other(run: tuple[Path, str]) -> None:
    workspace, _ = run
    report = report_of(workspace)
    with sqlite3.connect(workspace / "prefect" / "prefect.db") as database:
        (tags,) = database.execute("select tags from flow_run where id = ?", (report.prefect_run_id,)).fetchone()
    assert f"mlflow.run_id:{report.mlflow_run_id}" in json.loads(tags)
    with sqlite3.connect(workspace / "mlflow.db") as database:
        rows = dict(database.execute("select key, value from tags where run_uuid = ?", (report.mlflow_run_id,)))
        names = {name for (name,) in database.execute("select name from runs")}
        metrics = {key for (key,) in database.execute("select distinct key from metrics")}
        params = {key for (key,) in database.execute("select distinct key from params")}
    assert rows["prefect.flow_run_id"] == report.prefect_run_id
    assert {"machine", "distill", "score", "choose"} <= names
    assert {name.split()[0] for name in names} >= {"tiny", "costs"}
    assert {"at_a_glance/kl", "child/loss", "parent/loss", "child/speedup_prefill", "search/score"} <= metrics
    assert {"cost/ffn96/decode_ms_b4", "cost/kv1/kv_bytes_per_token"} <= metrics
    assert {"bld.steps", "hardware.engine", "search_space.ffn", "gkd.steps"} <= params and rows["puzzle.costs_run"]


@pytest.mark.slow
def test_another_budget_reuses_the_library_within_a_minute(
    run: tuple[Path, str], another: tuple[str, dict[Path, int], float]
) -> None:
    (workspace, first), (output, library, seconds) = run, another
    assert seconds < 60  # of CPU time; 37 on a machine with a load of 14, most of them to start Prefect and MLflow
    assert times(workspace / "library") == library and library
    assert child_of(output) != child_of(first)
    with sqlite3.connect(workspace / "prefect" / "prefect.db") as database:
        cached = database.execute("select name from task_run where state_name = 'Cached'").fetchall()
    assert ("measure ffn parent chat x1",) in cached and ("measure parent chat x1",) in cached
    found = [name for (name,) in cached if name.startswith("distill layer")]
    assert len(found) >= sum(path.suffix == ".json" for path in library)


@pytest.mark.slow
def test_a_race_is_told_and_its_winner_is_the_child(another: tuple[str, dict[Path, int], float]) -> None:
    folder = child_of(another[0]).parent
    report = read_value(folder / "report.json", ChildReport)
    first, second, third = report.race
    assert [[steps for steps, _ in racer.kl] for racer in report.race] == [[0, 4], [0, 4], [0]]
    assert first.kl[-1][1] <= second.kl[-1][1] and max(first.kl[0][1], second.kl[0][1]) <= third.kl[0][1]
    assert sorted(racer.place for racer in report.race) == [1, 2, 3] and report.architecture.score == first.score
    child = next(candidate for candidate in report.candidates if candidate.name == "child")
    assert child.layers == report.architecture.layers and child.predicted_kl in (None, first.score)
    assert "### The race that the child won" in (folder / "report.md").read_text()
    assert "race: candidate-3 after 0 steps of GKD" in another[0]


@pytest.mark.slow
def test_a_child_that_passes_a_limit_is_chosen_again(run: tuple[Path, str]) -> None:
    """The limit is just above its summed scores; on this tiny parent whole children are far above those. It is timed
    too, and a machine that tests share may say nothing of its speed.
    """
    workspace, _ = run
    first = next(one for one in report_of(workspace).candidates if one.name == "child" and one.stage == "assembled")
    most = f"{1.02 * (first.predicted_kl or 0):.4g}"
    limit = ("--set", f"capabilities={{general: {{max_kl: {most}}}}}", "--set", "budget.speedup=1.02")
    output = finished(workspace, *limit, "--set", "gkd.steps=0", *ALONE)
    folder = child_of(output).parent
    report = read_value(folder / "report.json", ChildReport)
    (floor,) = report.floors
    assert floor.asked == float(most) and report.request["limits"][-1]["asked"] == floor.limit
    assert f"max_kl of general: {floor.asked:.4g} asked" in output
    told = (folder / "report.md").read_text()
    for held in report.held_times:
        assert held.name == "speedup" and held.asked == 1.02 and "### Limits on time, before GKD" in told
    assert report.held_times or "limits on time are not looked at before GKD" in output
    assert "### Limits on capabilities, before GKD" in (folder / "report.md").read_text()
    assert next(one for one in report.candidates[1].limits if one.name == "speedup").asked == 1.02
    (kept,) = (one for one in report.candidates[1].limits if one.name == "max_kl of general")
    assert kept.asked == float(most), "the report is about what was asked"
    with closing(sqlite3.connect(workspace / "prefect" / "prefect.db")) as database:
        names = [name for (name,) in database.execute("select name from task_run")]
    assert names.count("choose, with other limits") >= 1 and names.count("KL of child before GKD") >= 1
    assert names.count("throughput of 2 models") >= 1
    assert (folder / "report.html").is_file()


@pytest.fixture
def one_server(run: tuple[Path, str], tmp_path: Path) -> Iterator[str]:
    """A Prefect server for many runs: each would take five seconds of processor time to start its own."""
    command, url = prefect_server(free_port())
    with_database(tmp_path / "home", run[0] / "prefect")
    own = {**QUIET, "PREFECT_HOME": str(tmp_path / "home")}
    with running(command, f"{url}/health", tmp_path / "server.log", own, 600):
        yield url


COUNTED = """
import os, sys
from tasks.distill import bld
plain = bld._train_until_it_falls
def counted(course, *rest):
    with open(os.environ["TRAINED"], "a") as file:
        file.write(course.job.key + "\\n")
    return plain(course, *rest)
bld._train_until_it_falls = counted
from flows.cli import main
main()
"""


def killed_when(processes: list[subprocess.Popen[str]], ready: Callable[[], bool]) -> None:
    """Wait for the moment, kill -9."""
    deadline = time.monotonic() + 600
    while not ready():
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.02)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_killed_twice_and_two_at_once_they_make_the_same_children(
    run: tuple[Path, str],
    another: tuple[str, dict[Path, int], float],
    one_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kill -9 one run while it distils, then two that share its library while they distil globally, start both again:
    nothing finished is done twice, each variant is trained by one of them, both children are those of whole runs.
    """
    workspace, trained = tmp_path / "w", tmp_path / "trained"
    monkeypatch.setenv("TRAINED", str(trained))
    monkeypatch.setattr(sys.modules[__name__], "PUZZLE", [sys.executable, "-c", COUNTED])
    monkeypatch.setenv("PREFECT_API_URL", one_server)
    both = (*ALONE, "--set", "orchestration.runs_per_device=2")
    killed_when([start(workspace, *both)], lambda: len(times(workspace / "library", "*.json")) >= 5)
    done, recorded = times(workspace / "library", "*.json"), times(workspace, "record/*/layer_*.json")
    trained.unlink()

    processes = [start(workspace, *both), start(workspace, *OTHER, *both)]
    killed_when(processes, lambda: len(times(workspace, "gkd/teacher-*/step_*.json")) >= 3)
    processes = [start(workspace, *both), start(workspace, *OTHER, *both)]
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)

    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert {path: path.stat().st_mtime_ns for path in recorded} == recorded
    keys = trained.read_text().split()
    fresh = {path.stem for path in times(workspace / "library", "*.safetensors")} - {path.stem for path in done}
    assert len(keys) == len(set(keys)) == len(fresh)
    assert any("another run is at work" in output for output in outputs)
    first, second = (child_of(output) for output in outputs)
    assert first != second and digests(first) == digests(child_of(run[1]))
    assert digests(second) == digests(child_of(another[0]))
    with sqlite3.connect(workspace / "mlflow.db") as database:
        statuses = [status for (status,) in database.execute("select status from runs where name like 'tiny %'")]
    assert statuses == ["FINISHED", "FINISHED"]  # the killed runs went on as the same MLflow runs


def test_a_mistyped_key_is_one_sentence_before_any_work(tmp_path: Path) -> None:
    code, _, told = puzzle("optimize", TINY, "--workspace", tmp_path / "w", "--set", "budget.sped_up=2")
    assert code == 2 and "sped_up" in told and "speedup" in told
    assert not (tmp_path / "w").exists()


def test_show_and_validate(run: tuple[Path, str], tmp_path: Path) -> None:
    code, shown, told = puzzle("show", run[0])
    assert code == 0 and "child: " in shown, told
    code, valid, told = puzzle("validate", TINY.with_name("smollm2-cpu.yaml"))
    assert code == 0 and "valid profile" in valid, told
    code, _, told = puzzle("show", tmp_path)
    assert code == 2 and "holds no finished run" in told


def test_a_failure_names_the_log_and_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> str:
        raise OSError("no space left on device")

    with pytest.raises(SystemExit) as stopped:
        in_workspace.run_logged(tmp_path, broken)
    told = capsys.readouterr().err
    assert stopped.value.code == 1
    assert "no space left" in told and str(tmp_path / "puzzle.log") in told and "to go on" in told
    assert "Traceback" in (tmp_path / "puzzle.log").read_text()
