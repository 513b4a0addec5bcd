"""GKD that knows the rounding: the child is trained as its file will hold it.

In every pass the weights are rounded to the grid of their type; their gradients go to the weights that were rounded, as
if there were no rounding (straight-through estimator, arXiv 1308.3432). It starts from matrices that are corrected
already (blocks/error_correction.py): their scales stay, codes move. The best step counts, the start among them, so the
child is never farther from its parent on the validation text than the correction left it. Embedding and head stay in
float here; they are rounded afterwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.compute import Compute
from blocks.library import digest_of, read_tensors
from profiles.schema import GKD
from tasks.distill.gkd import GKDResult, Training, Watch, finished, no_watch
from tasks.distill.gkd_job import beside_child
from tasks.distill.gkd_settings import asked
from tasks.distill.gkd_student import Student, load_trained
from tasks.distill.gkd_targets import TeacherRecord
from tasks.export.quantise import round_linear
from tasks.gguf.grids import Grid
from tasks.gguf.writer import Stored, precision_of

VERSION = 1


class _Rounded(torch.autograd.Function):
    """The nearest numbers of a grid; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, weight_DK: Tensor, grid: Grid) -> Tensor:
        return grid.values(grid.nearest(weight_DK))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class RoundedLinear(nn.Linear):
    """A linear layer that multiplies by its weight rounded to a grid. `weight` is what is rounded, and trained."""

    def __init__(self, linear: nn.Linear, weight_DK: Tensor, grid: Grid) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias, self.grid = nn.Parameter(weight_DK.float()), linear.bias, grid

    def forward(self, x: Tensor) -> Tensor:
        """See nn.Linear."""
        return F.linear(x, _Rounded.apply(self.weight, self.grid), self.bias)

    def stored(self) -> tuple[Stored, nn.Linear]:
        """What a file holds of its weight, and the plain layer that multiplies by it."""
        codes = self.grid.nearest(self.weight.detach())
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        plain.weight, plain.bias = nn.Parameter(self.grid.values(codes), requires_grad=False), self.bias
        return Stored(kind=self.grid.kind, rows=self.grid.packed(codes)), plain


@dataclass(frozen=True, kw_only=True)
class RoundedTraining:
    """How a child is trained as its file holds it: on which targets, with which settings of GKD, where."""

    teacher: TeacherRecord
    settings: GKD
    workspace: Path
    compute: Compute
    watch: Watch = no_watch

    @property
    def own_settings(self) -> GKD:
        """GKD's settings for this training."""
        own = {"steps": self.settings.rounded_steps, "learning_rate": self.settings.rounded_learning_rate}
        return self.settings.model_copy(update={**own, "also_train": ()})

    def folder(self, model_key: str) -> str:
        """Where checkpoints and result lie. model_key: of the child, and of all that its rounding depends on."""
        told = {
            "teacher": self.teacher.validation.sha256,
            "settings": asked(self.own_settings),
            **self.teacher.mixed.key,
        }
        return f"gkd/rounded-{digest_of(model=model_key, **told, version=VERSION)}"

    def result(self, model_key: str) -> GKDResult | None:
        """How the training of a child went, if it has ended."""
        return finished(self.workspace, self.folder(model_key))

    def run(self, model: Any, stored: Mapping[str, Stored], model_key: str) -> dict[str, Stored]:
        """Train a model whose layers were rounded, in place, and leave it rounded. Returns what its file holds now.

        stored: what the file held of each rounded matrix before, by the weight's name.
        """
        rounded: dict[str, RoundedLinear] = {}
        for name, one in stored.items():
            if one.before is not None:
                path = name.removesuffix(".weight")
                linear, grid = model.get_submodule(path), Grid.of(one.kind, one.rows)
                # ggml's code is not always the nearest on the scale that it settles on: then its number is the start
                nearest = grid.values(grid.nearest(one.before))
                start = torch.where(nearest == linear.weight, one.before, linear.weight.detach())
                rounded[name] = RoundedLinear(linear, start, grid)
                model.set_submodule(path, rounded[name])
        self._train(model, model_key)
        found: dict[str, Stored] = {}
        for name, one in stored.items():
            path = name.removesuffix(".weight")
            if name in rounded:
                found[name], plain = rounded[name].stored()
                model.set_submodule(path, plain)
            else:
                found[name] = round_linear(model.get_submodule(path), precision_of(one.kind), None)
        return found

    def _train(self, model: Any, model_key: str) -> None:
        """Leave the best weights in the model: those of a training that has ended, or of one from its checkpoint on."""
        before = self.result(model_key)
        if before is not None:
            load_trained(model, read_tensors(self.workspace, before.weights))
            return
        Training(
            student=Student(model, self.own_settings, self.compute),
            beside=beside_child(self.teacher, self.workspace, self.compute),
            record=self.teacher,
            settings=self.own_settings,
            workspace=self.workspace,
            folder=self.folder(model_key),
            compute=self.compute,
            watch=self.watch,
        ).run()
