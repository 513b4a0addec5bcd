"""Global knowledge distillation of an assembled child: L = sum over layers (1 - cos(h_child, h_parent)) + KL(p || q),
no LM loss (Puzzle, section 5: the best of the published combinations).

The trainer is the same for one process and for several that share the child (tasks/distill/sharding.py). The KL on
validation sequences is measured every few steps, and the best weights are kept. tasks/distill/gkd_job.py starts it.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from blocks.compute import Compute
from blocks.library import keep, read_tensors, read_value, remember, write_tensors, write_value
from blocks.records import Ref, Value
from profiles.schema import GENERAL, GKD
from tasks.distill import gkd_checkpoint
from tasks.distill.gkd_checkpoint import Course
from tasks.distill.gkd_settings import rows_of_step, share_of_rate, texts_of_steps, trial_steps
from tasks.distill.gkd_student import Student, trained_modules
from tasks.distill.gkd_targets import Teacher, TeacherRecord, batch_of
from tasks.distill.sharding import ALONE, Group, held_bytes, whole
from tasks.running.memory import Parts

VERSION = 4
TRIAL_RATES = (3e-4, 1e-4, 3e-5, 1e-5)
SAME = 1e-7  # nats per token: below, a child answers as its parent does
RESULT = "result.json"


class Seen(Value):
    """A step that was done: the two losses on its batch, and the KL on validation text where that was measured.

    on_each: of the capabilities, that KL on each and on the corpus; `validation_kl` is their weighed sum then.
    """

    step: int
    steps: int
    kl: float
    cosine: float
    learning_rate: float
    validation_kl: float | None
    best_kl: float
    on_each: dict[str, float] = {}

    @property
    def text(self) -> str:
        """The step in words, for the line of progress."""
        return f"loss {self.kl + self.cosine:.3f}, best validation KL {self.best_kl:.3f}"

    @property
    def figures(self) -> dict[str, float]:
        """The step in figures, for MLflow's curves over the steps."""
        known = self.model_dump(include={"kl", "cosine", "learning_rate", "validation_kl"}, exclude_none=True)
        return known | {f"validation_kl_on_{name}": kl for name, kl in self.on_each.items()}


Watch = Callable[[Seen], None]


def no_watch(seen: Seen) -> None:
    """The `Watch` of work that nobody looks at."""


class Standing(Value):
    """The best validation KL of a training in its first steps."""

    kl: float

    @staticmethod
    def path(folder: Path, steps: int) -> Path:
        """Where it lies in the folder of the training."""
        return folder / f"after-{steps}.json"


class GKDResult(Value):
    """What GKD left: the trained weights, and the curve of (step, validation KL). stopped: why training ended.

    losses: of every step, the KL and the cosine terms together; kl_losses: the KL alone. tried: (learning rate,
    validation KL after its trial). held_bytes: of what is trained and its optimiser's state, in each process.
    """

    weights: Ref
    best_step: int
    best_kl: float
    curve: tuple[tuple[int, float], ...]
    losses: tuple[float, ...]
    kl_losses: tuple[float, ...]
    learning_rate: float
    tried: tuple[tuple[float, float], ...]
    held_bytes: tuple[int, ...]
    tokens: int
    seconds: float
    cpu_seconds: float
    stopped: str


def finished(workspace: Path, folder: str) -> GKDResult | None:
    """The result of a training that ended, if its weights are whole."""
    return remember(workspace / folder / RESULT, GKDResult, lambda result: [result.weights], workspace)


@dataclass(kw_only=True)
class Training:
    """One child at its GKD, in this process or in one of several.

    beside: the parent, where its targets are not recorded. folder: of checkpoints and result, within the workspace.
    """

    student: Student
    record: TeacherRecord
    settings: GKD
    workspace: Path
    folder: str
    compute: Compute
    beside: Teacher | None = None
    group: Group = ALONE
    watch: Watch = no_watch
    parameters: dict[str, nn.Parameter] = field(init=False)
    best: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = {
            prefix + name: parameter
            for prefix, module in trained_modules(self.student.model, self.settings)
            for name, parameter in module.named_parameters()
        }
        groups = [{"params": list(self.parameters.values())}]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95))
        self.best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.steps = self.settings.steps if self.parameters else 0
        self.order = texts_of_steps(self.settings.steps, self.record.mixed.shares)
        rows = self._rows(self.settings.batch_sequences)
        count = self._parts_of(rows)
        # one process of several cannot take smaller parts: the others would wait for it
        self.parts = Parts("GKD", rows if self.group.size == 1 else count, count)
        self._forget()

    def run(self) -> GKDResult:
        """Train to the end, from the last checkpoint if there is one, and leave the model at its best weights.

        The untrained child takes part as step 0, so the result is never worse on the validation sequences than that.
        """
        course, stopped = self._trained(self.steps)
        return self._finished(course, stopped)

    def run_until(self, steps: int) -> None:
        """Train for the first `steps`, write down the best validation KL until there, and leave a checkpoint from which
        `run` goes on to the same end. 0: measure the untrained child, and leave nothing else.
        """
        if steps == 0:
            kl = self._untrained_kl()
        else:
            course, _ = self._trained(steps)
            gkd_checkpoint.save(self._path, course, self._state(), self.group)
            kl = min(kl for step, kl in course.curve if step <= steps)
        if self.group.first:
            write_value(Standing.path(self._path, steps), Standing(kl=kl))
        self.group.gather(None)

    def _trained(self, until: int) -> tuple[Course, str]:
        """Train until a step, from the last checkpoint if there is one. How far it came, and why it ended there."""
        course = gkd_checkpoint.load(self._path, self._state(), self.group)
        clock = _Clock(course)
        if course is None:
            course = self._begin()
        for state in self.optimizer.state.values():
            state["step"].fill_(course.step)
        while (stopped := self._ended(course)) is None and course.step < until:
            done = self._step(course)
            if done is None:
                stopped = "the loss is not a number"
                break
            course = done
            if self._agreed(clock.since_saved() >= self.settings.checkpoint_minutes):
                gkd_checkpoint.save(self._path, clock.stamp(course), self._state(), self.group)
                clock.saved()
        return clock.stamp(course), stopped or f"{until} of {self.steps} steps done"

    def _untrained_kl(self) -> float:
        kl = self.validation_kl()
        if not math.isfinite(kl):
            raise RuntimeError("the child's validation KL is not a number before any GKD step: its blocks are damaged")
        return kl

    def _begin(self) -> Course:
        kl = self._untrained_kl()
        course = Course(learning_rate=self.settings.learning_rate or TRIAL_RATES[-1], curve=((0, kl),))
        if self.settings.learning_rate is None and self.steps and kl >= SAME:
            tried = self._trials()
            rate, _ = min(tried, key=lambda each: each[1])
            course = course.model_copy(update={"tried": tried, "learning_rate": rate})
            gkd_checkpoint.save(self._path, course, self._state(), self.group)
        return course

    def _trials(self) -> tuple[tuple[float, float], ...]:
        """The KL on validation text that each rate leads to after a few steps, until a lower rate is no better.

        The child is put back after each. A near child wants a lower rate than a broken one (docs/log.md).
        """
        tried: list[tuple[float, float]] = []
        for rate in TRIAL_RATES:
            for step in range(1, trial_steps(self.steps) + 1):
                self._update(step, rate)
            kl = self.validation_kl()
            tried.append((rate, kl if math.isfinite(kl) else sys.float_info.max))
            self._put_best()
            self._forget()
            if len(tried) > 1 and tried[-1][1] >= tried[-2][1]:
                break
        return tuple(tried)

    def _step(self, course: Course) -> Course | None:
        """A training step, and a measurement where one is due. None when the loss is not a number."""
        step, on_each = course.step + 1, dict[str, float]()
        rate = course.learning_rate * share_of_rate(step - 1, self.steps, self.settings)
        loss, kl = self._update(step, rate)
        if not math.isfinite(loss):
            return None
        course = course.model_copy(update={"step": step, "losses": (*course.losses, (loss, kl))})
        measured = None
        if step % self.settings.evaluate_every == 0 or step == self.steps:
            measured, on_each = self.validation()
            course = self._kept(course, measured)
        self.watch(
            Seen(
                step=step,
                steps=self.steps,
                kl=kl,
                cosine=loss - kl,
                learning_rate=rate,
                validation_kl=measured if measured is not None and math.isfinite(measured) else None,
                best_kl=course.best_kl,
                on_each={name: kl for name, kl in on_each.items() if math.isfinite(kl)},
            )
        )
        return course

    def _kept(self, course: Course, kl: float) -> Course:
        """After a measurement. A KL that is not a number is worse than any other, and is left out of the curve."""
        curve = (*course.curve, (course.step, kl)) if math.isfinite(kl) else course.curve
        if not kl < course.best_kl:
            return course.model_copy(update={"curve": curve, "waited": course.waited + 1})
        for name, parameter in self.parameters.items():
            self.best[name].copy_(parameter.detach())
        return course.model_copy(update={"curve": curve, "best_step": course.step, "waited": 0})

    def _ended(self, course: Course) -> str | None:
        """Why training ends here; None where it goes on."""
        if course.step >= self.steps:
            return "all steps done"
        if course.best_kl < SAME:
            return "the child answers as its parent does: there is nothing to distil"
        if self.settings.patience is not None and course.waited >= self.settings.patience:
            return f"no better validation KL since step {course.best_step}"
        return None

    def _finished(self, course: Course, stopped: str) -> GKDResult:
        self.student.requires_grad_(False)
        self._put_best()
        best = {}
        for name, tensor in self.best.items():
            full = whole(tensor)
            if self.group.first:
                best[name] = full.cpu()
        held = [*self.parameters.values(), *(self.best.values()), *self._moments().values()]
        of_each = self.group.gather((held_bytes(held), course.cpu_seconds))
        lengths = [text.sequence_length for text in self.record.texts]
        if self.group.first:
            result = GKDResult(
                weights=write_tensors(self.workspace, f"{self.folder}/layers.safetensors", best),
                best_step=course.best_step,
                best_kl=course.best_kl,
                curve=course.curve,
                losses=tuple(loss for loss, _ in course.losses),
                kl_losses=tuple(kl for _, kl in course.losses),
                learning_rate=course.learning_rate,
                tried=course.tried,
                held_bytes=tuple(held for held, _ in of_each),
                tokens=sum(lengths[place] for place, _ in self.order[: len(course.losses)])
                * self.settings.batch_sequences,
                seconds=course.seconds,
                cpu_seconds=sum(seconds for _, seconds in of_each),
                stopped=stopped,
            )
            keep(self._path / RESULT, result, [result.weights], self.workspace)
            gkd_checkpoint.drop(self._path)
        self.group.gather(None)
        return read_value(self._path / RESULT, GKDResult)

    # --- one step

    def _update(self, step: int, rate: float) -> tuple[float, float]:
        """A step of AdamW. The loss and, of it, the KL, on the batch of all processes."""
        batch = self._batch(step)
        loss, kl = self.parts.run(lambda count: self._gradients(batch, count))
        torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.settings.clip_norm)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        if self.group.size > 1:
            loss, kl = (self.group.sum(self._on_device([loss, kl])) / self.group.size).tolist()
        return loss, kl

    def _batch(self, step: int) -> dict[str, Tensor]:
        """This process's sequences of a step, with the parent's targets where they were recorded."""
        rows = self.group.part(self.settings.batch_sequences)
        if not self.record.steps:
            place, before = self.order[step - 1]
            text = self.record.texts[place]
            wanted = rows_of_step(before, self.settings, text.train_sequences)[rows]
            batch = batch_of(text, "train", wanted, self.workspace)
            return {name: tensor.to(self.compute.device) for name, tensor in batch.items()}
        batch = read_tensors(self.workspace, self.record.steps[step - 1])
        return self._rows_of(batch, rows, batch["tokens"].shape[1])

    def _rows_of(self, batch: dict[str, Tensor], rows: slice, length: int) -> dict[str, Tensor]:
        """Those sequences of a batch: a row of `tokens` each, `length` rows of what there is for every token."""
        tokens = slice(rows.start * length, rows.stop * length)
        chosen = {name: tensor[rows if name == "tokens" else tokens] for name, tensor in batch.items()}
        return {name: tensor.to(self.compute.device) for name, tensor in chosen.items()}

    def _gradients(self, batch: dict[str, Tensor], parts: int) -> tuple[float, float]:
        """Set the gradients of the loss on a batch, which goes through in so many parts; return the loss and the KL."""
        self.optimizer.zero_grad(set_to_none=True)
        sequences, length = batch["tokens"].shape
        total = of_kl = 0.0
        for part in torch.arange(sequences).chunk(parts):
            piece = self._rows_of(batch, slice(int(part[0]), int(part[-1]) + 1), length)
            if self.beside is not None:
                piece |= self.beside(piece["tokens"], self.record.layers)
            loss, kl = self.student(piece, self.record.layers)
            share = len(part) / sequences
            loss = loss * share
            loss.backward()
            total += loss.item()
            of_kl += kl.item() * share
        return total, of_kl

    def validation_kl(self) -> float:
        """KL(parent || child) in nats per token on the validation sequences; over capabilities, by their shares."""
        return self.validation()[0]

    def validation(self) -> tuple[float, dict[str, float]]:
        """The same, and where there are capabilities the KL on each of them and on the corpus."""
        shares, watched = self.record.mixed.shares, self.record.watched
        each = [self._kl_on(ref) for ref in (self.record.validation, *watched)]
        if not watched:
            return each[0], {}
        names = (GENERAL, *(text.capability for text in self.record.mixed.capabilities))
        # one that counts for nothing may be infinite
        total = math.fsum(share * kl for share, kl in zip(shares, each, strict=True) if share)
        return total, dict(zip(names, each, strict=True))

    @torch.no_grad()
    def _kl_on(self, watched: Ref) -> float:
        batch = read_tensors(self.workspace, watched)
        sequences, length = batch["tokens"].shape
        mine, total = self.group.part(sequences), self._on_device([0.0])
        rows = torch.arange(mine.start, mine.stop)
        for part in rows.tensor_split(min(self._parts_of(self._rows(sequences)), sequences // self.group.size)):
            piece = self._rows_of(batch, slice(int(part[0]), int(part[-1]) + 1), length)
            total += self.student(piece, (), True)[0].sum()
        return self.group.sum(total).item() / (sequences * length)

    # --- what a checkpoint holds, and small things

    def _state(self) -> dict[str, Tensor]:
        weights = {f"weights.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        return weights | self._moments() | {f"best.{name}": tensor for name, tensor in self.best.items()}

    def _moments(self) -> dict[str, Tensor]:
        states = {name: self.optimizer.state[parameter] for name, parameter in self.parameters.items()}
        return {f"{key}.{name}": states[name][key] for name in states for key in ("exp_avg", "exp_avg_sq")}

    def _forget(self) -> None:
        """AdamW as it is before its first step."""
        for parameter in self.parameters.values():
            moments = {key: torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}

    def _put_best(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.detach().copy_(self.best[name])

    @property
    def _path(self) -> Path:
        return self.workspace / self.folder

    def _rows(self, sequences: int) -> int:
        """The most of so many sequences that a process has."""
        return -(-sequences // self.group.size)

    def _parts_of(self, rows: int) -> int:
        return -(-rows // self.compute.sequences(self.record.longest))

    def _on_device(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).to(self.compute.device)

    def _agreed(self, answer: bool) -> bool:
        """What the first process says, for all."""
        return bool(self.group.sum(self._on_device([float(answer and self.group.first)])).item())


class _Clock:
    """The time of a training, over all the processes that were killed on the way."""

    def __init__(self, before: Course | None) -> None:
        self.started, self.cpu, self.last = time.perf_counter(), time.process_time(), time.monotonic()
        self.seconds, self.cpu_seconds = (before.seconds, before.cpu_seconds) if before else (0.0, 0.0)

    def stamp(self, course: Course) -> Course:
        """The course with the time until now."""
        seconds = self.seconds + time.perf_counter() - self.started
        cpu = self.cpu_seconds + time.process_time() - self.cpu
        return course.model_copy(update={"seconds": seconds, "cpu_seconds": cpu})

    def since_saved(self) -> float:
        """Minutes since the last checkpoint."""
        return (time.monotonic() - self.last) / 60

    def saved(self) -> None:
        """There is a checkpoint now."""
        self.last = time.monotonic()
