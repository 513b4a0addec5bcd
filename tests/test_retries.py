"""Out of memory goes on in smaller parts, what may pass is asked again, a time limit is a sentence."""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from uuid import UUID, uuid4

import pytest
import torch
from prefect.automations import Automation
from prefect.states import Failed
from prefect.task_engine import TaskRunTimeoutError

from blocks.compute import HOST
from blocks.errors import CorpusError, PuzzleFailure
from blocks.subblock import run_subblock
from flows import stages
from flows.run import Run
from profiles.load import load_profile
from profiles.schema import GKD
from tasks.distill import bld, gkd, gkd_student
from tasks.distill.gkd_targets import record_teacher
from tasks.operating import watch
from tasks.operating.champion import Judgement
from tasks.running import memory, retries
from tasks.running.memory import Parts
from tasks.running.progress import without_tracebacks
from tasks.running.retries import TookTooLong, time_limit_in_words, worth_retrying
from tasks.score import scoring
from tests.chain import Chain

SHORT = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")


def short_of_memory(function: Callable[..., Any], size: Callable[..., int], most: int) -> Callable[..., Any]:
    """The function, on a machine where no more than so much goes through at once while gradients are kept."""

    def limited(*arguments: Any) -> Any:
        if size(*arguments) > most:
            raise SHORT
        return function(*arguments)

    return limited


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(memory, "say", lines.append)
    return lines


def test_parts_double_until_it_fits_and_stay() -> None:
    seen: list[int] = []

    def work(parts: int) -> int:
        seen.append(parts)
        if parts < 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return parts

    parts = Parts("it", most=6)
    assert parts.run(work) == 4 and parts.run(work) == 4 and seen == [1, 2, 4, 4]
    with pytest.raises(MemoryError):
        Parts("it", most=1).run(lambda _: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(ValueError, match="a bug"):
        parts.run(lambda _: (_ for _ in ()).throw(ValueError("a bug")))


def test_bld_in_parts_gives_the_same_variant(chain: Chain, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    def trained() -> dict[str, torch.Tensor]:
        job = chain.job(1, "ffn", "ffn32")
        data = bld.layer_data(job, job.recording.shards[0], chain.workspace, HOST)
        module = chain.reader.empty_layer(1, job.choice).eval()
        bld._start(job, chain.reader, data, module, chain.workspace)
        bld._train(bld._Course(job=job, data=data, module=module, number=0), job.settings.learning_rate)
        return dict(module.state_dict())

    whole = trained()
    size = lambda job, data, module, hidden: len(hidden) if torch.is_grad_enabled() else 0  # noqa: E731
    monkeypatch.setattr(bld, "_output", short_of_memory(bld._output, size, 1))
    in_parts = trained()
    assert said == [f"distill layer 1 ffn ffn32: out of memory, again in {parts} parts" for parts in (2, 4)]
    for name, tensor in whole.items():
        # AdamW divides by the gradient's size: rounding of a sum in another order is all that may differ
        torch.testing.assert_close(in_parts[name], tensor, rtol=1e-3, atol=1e-5)


def test_scores_in_parts_are_the_same(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    members = [block for block in chain.blocks if block.layer == 1]
    whole = [score for score in chain.scores if score.layer == 1]
    size = lambda source, subblock, states, context: len(states)  # noqa: E731
    monkeypatch.setattr("tasks.score.scoring.run_subblock", short_of_memory(run_subblock, size, 2))
    monkeypatch.setattr(scoring, "_path", lambda record, length, workspace: tmp_path / f"{record.key}.json")
    place = (chain.records[1], chain.scored, chain.parent, chain.workspace, HOST)
    found = scoring.score_sequences([(member, tuple(range(6))) for member in members], *place)
    assert said and all("score: out of memory" in line for line in said)
    for one, other in zip(found, whole, strict=True):
        assert one.variant == other.variant and one.kl == pytest.approx(other.kl, rel=1e-4, abs=1e-7)


def test_gkd_in_parts_gives_the_same_child(chain: Chain, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    settings = GKD(steps=3, batch_sequences=4, learning_rate=1e-3, cosine_every=1, validation_sequences=4)
    teacher = record_teacher(chain.parent, chain.corpus, settings, chain.workspace, HOST)
    size = lambda student, batch, layers, watched=False: 0 if watched else len(batch["tokens"])  # noqa: E731

    def distilled(key: str) -> gkd.GKDResult:
        model = chain.reader.model()
        for parameter in model.model.layers.parameters():
            parameter.data *= 0.9
        return chain.training(model, teacher, settings, key).run()

    whole = distilled("whole")
    forward = gkd_student.Student.forward
    monkeypatch.setattr(gkd_student.Student, "forward", short_of_memory(forward, size, 2))
    in_parts = distilled("parts")
    assert said == ["GKD: out of memory, again in 2 parts"]
    assert in_parts.losses == pytest.approx(whole.losses, rel=1e-4)
    assert in_parts.best_kl == pytest.approx(whole.best_kl, rel=1e-3)


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (SHORT, True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (OSError(28, "No space left on device"), True),
        (ConnectionError("refused"), True),
        (TimeoutError("of a socket"), True),
        (TaskRunTimeoutError("Scope timed out after 2.0 second(s)."), False),
        (FileNotFoundError(2, "no such file"), False),
        (PermissionError(13, "not yours"), False),
        (IsADirectoryError(21, "a folder"), False),
        (KeyboardInterrupt(), False),
        (CorpusError("too small"), False),
        (ValueError("a bug"), False),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_what_is_retried(error: BaseException, again: bool) -> None:
    def ended() -> None:
        raise error

    assert worth_retrying(None, None, SimpleNamespace(result=ended)) == again
    if isinstance(error, Exception):
        assert worth_retrying(None, None, Failed(data=error)) == again


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), True),
        (OSError(28, "No space left on device"), False),
        (ValueError("out of memory, says a bug"), False),
    ],
)
def test_what_is_short_of_memory(error: Exception, short: bool) -> None:
    assert memory.out_of_memory(error) == short


def test_a_time_limit_is_a_sentence() -> None:
    sentence = r"'distill' took longer than orchestration.task_timeout allows \(2.0 s\)"
    with pytest.raises(TookTooLong, match=sentence), time_limit_in_words("distill"):
        raise TaskRunTimeoutError("Scope timed out after 2.0 second(s).")
    for seconds, settings in ((2, ["orchestration.task_timeout=2"]), (None, [])):
        run = Run(profile=load_profile("tiny", settings), workspace=Path("nowhere"))
        assert run._limited(stages.distill_task).timeout_seconds == seconds
        assert run._limited(stages.measure_task, limited=False).timeout_seconds is None


@pytest.mark.parametrize("name", ["prefect.events.clients", "prefect._internal.concurrency", "websockets.client"])
def test_a_prefect_server_that_is_away_is_told_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(retries, "say", lines.append)
    passed: list[str] = []
    log = logging.getLogger(name)
    before = log.level
    log.setLevel(logging.INFO)
    passing = ["no trouble"] if log.isEnabledFor(logging.INFO) else []  # one of them has a level of Prefect's own
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: passed.append(record.getMessage()))
    log.addHandler(handler)
    try:
        with retries.one_line_when_prefect_is_away():
            log.warning("Unable to connect")
            log.error("a page of it")
            log.info("no trouble")
        log.error("after it")
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
    assert passed == [*passing, "after it"] and len(lines) == 1 and "the run goes on" in lines[0]


def test_restarts_are_counted_since_somebody_started_the_run() -> None:
    once = ["Scheduled", "Pending", "Running", "Crashed", watch.RESTART, "Pending", "Running"]
    assert watch.restarts_of(once[:4]) == 0 and watch.restarts_of(once) == 1
    assert watch.restarts_of([*once, "Crashed", watch.RESTART]) == 2
    for by_hand in ("AwaitingRetry", "Resuming", "Scheduled"):
        assert watch.restarts_of([*once, "Failed", by_hand, "Running"]) == 0


def test_the_watch_is_on_runs_of_puzzle_alone() -> None:
    silent, crashed = (each.model_dump(mode="json") for each in watch.automations())
    for automation in (silent, crashed):
        assert automation["trigger"]["match_related"]["prefect.resource.id"] == "prefect.tag.puzzle"
    assert silent["trigger"]["within"] > 2 * watch.HEARTBEAT_SECONDS
    assert silent["actions"][0]["state"] == "CRASHED" and crashed["actions"][0]["state"] == "SCHEDULED"


def test_every_end_of_a_served_run_is_one_or_it_would_be_taken_for_dead() -> None:
    (silent, _) = (each.model_dump(mode="json") for each in watch.automations())
    outcomes = [name.capitalize() for name in get_args(Judgement.model_fields["outcome"].annotation)]
    assert len(outcomes) == 4
    for name in ("Completed", "Failed", "Cancelled", "Crashed", *outcomes):  # an event is named after its state's name
        assert f"prefect.flow-run.{name}" in silent["trigger"]["expect"]


def test_failures_keep_their_sentence_on_the_console_and_lose_the_traceback() -> None:
    log, seen = logging.getLogger("prefect.flow_runs"), []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append((record.getMessage(), record.exc_info))  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        for context in (without_tracebacks(), nullcontext()):
            with context:
                try:
                    raise OSError(28, "No space left on device")
                except OSError as error:
                    log.error("failed: %s", error, exc_info=True)
    finally:
        log.removeHandler(handler)
    assert seen[0] == ("failed: [Errno 28] No space left on device", None) and seen[1][1] is not None


class Prefect:
    """Prefect's client with some states and automations of a server."""

    def __init__(self, states: Sequence[Any] = (), there: Sequence[Any] = ()) -> None:
        self.states, self.there = states, there
        self.deleted: list[Any] = []

    def __enter__(self) -> "Prefect":
        return self

    def __exit__(self, *_: object) -> None: ...

    def read_flow_run_states(self, _: UUID) -> Sequence[Any]:
        return self.states

    def read_automations_by_name(self, name: str) -> list[Any]:
        return [one for one in self.there if one.name == name]

    def delete_automation(self, number: Any) -> None:
        self.deleted.append(number)


def test_a_run_that_crashed_too_often_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["Scheduled", "Running"] + ["Crashed", watch.RESTART, "Running"] * (watch.RESTARTS + 1)
    states = [SimpleNamespace(name=name, timestamp=at) for at, name in enumerate(names)]
    watch.refuse_to_crash_for_ever()  # no served run: nobody is asked
    monkeypatch.setattr(watch, "flow_run_id", lambda: str(uuid4()))
    monkeypatch.setattr(watch, "get_client", lambda sync_client: Prefect(states=states[::-1]))
    with pytest.raises(PuzzleFailure, match=f"crashed {watch.RESTARTS + 1} times"):
        watch.refuse_to_crash_for_ever()
    monkeypatch.setattr(watch, "get_client", lambda sync_client: Prefect(states=states[:-3]))
    watch.refuse_to_crash_for_ever()


def test_the_watch_of_now_stays_and_an_older_one_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(Automation, "create", lambda self: made.append(self))

    def kept(*there: Any) -> tuple[list[str], list[Any]]:
        made.clear()
        client = Prefect(there=there)
        monkeypatch.setattr(watch, "get_client", lambda sync_client: client)
        watch.keep_watch()
        return [one.name for one in made], client.deleted

    names = [one.name for one in watch.automations()]
    assert kept() == (names, [])
    there = [SimpleNamespace(id=number, name=one.name, description=one.description) for number, one in enumerate(made)]
    assert kept(*there) == ([], [])
    there[1].description = "kept by puzzle, another version"
    assert kept(*there) == (names[1:], [1])
