"""How a model does on a text, sequence by sequence: loss, KL, entropy, calibration, and the loss by length of context.

The expected calibration error is the mean of |how often the first choice is right - how sure the model was of it| over
bins of equally many tokens. It is a mean over tokens too: of that difference, with its bin's sign. So it has an error
over documents, and two models' errors compare in pairs. Few tokens overstate it, in all models alike.
"""

# S = sequences, T = tokens

from pathlib import Path

import torch
from torch import Tensor

from blocks.library import keep, remember
from blocks.records import Value
from tasks.evaluate.compare import Contender
from tasks.evaluate.quality import ParentTargets, compared, parent_targets, token_figures
from tasks.probe.sides import Bench
from tasks.probe.texts import Text
from tasks.running.progress import Progress

VERSION = 1
BINS = 15
FIRST_SPAN = 16  # contexts below it are one span


class Reading(Value):
    """A model on a text: figures of each sequence, and its loss in each span of `spans_of`."""

    samples: dict[str, tuple[float, ...]]
    by_context: tuple[tuple[float, ...], ...]


def probed(models: Tensor, parents: Tensor, labels: Tensor) -> Tensor:
    """Loss, KL, entropy, the probability of the first choice, and whether that is right: (5, t) float64."""
    loss, kl, _ = compared(models, parents, labels)
    entropy = torch.special.entr(models.exp()).sum(dim=-1)
    sure, choice = models.max(dim=-1)
    return torch.stack([loss, kl, entropy.double(), sure.double().exp(), (choice == labels).double()])


def spans_of(length: int) -> list[tuple[int, int]]:
    """Spans of context in sequences of some tokens, in powers of two: (1, 15), (16, 31), (32, 63) ..."""
    firsts = [1]
    while max(FIRST_SPAN, 2 * firsts[-1]) < length:
        firsts.append(max(FIRST_SPAN, 2 * firsts[-1]))
    return [(first, after - 1) for first, after in zip(firsts, [*firsts[1:], length], strict=True)]


def signed_gaps(sure: Tensor, right: Tensor) -> Tensor:
    """For every token right - sure, with the sign of its bin's sum; their mean is the expected calibration error."""
    gaps = (right - sure).flatten()
    signed = torch.zeros_like(gaps)
    for tokens in sure.flatten().argsort(stable=True).tensor_split(BINS):
        signed[tokens] = gaps[tokens] * gaps[tokens].sum().sign()
    return signed.view_as(sure)


def reading_of(figures: Tensor) -> Reading:
    """From the figures of `probed` for every token (5, S, T)."""
    loss, kl, entropy, sure, right = figures
    loss, sure, right = loss[:, :-1], sure[:, :-1], right[:, :-1]  # no token follows the last
    each = {"loss": loss, "kl": kl, "entropy": entropy, "calibration": signed_gaps(sure, right)}
    return Reading(
        samples={name: tuple(one.mean(1).tolist()) for name, one in each.items()},
        by_context=tuple(
            tuple(loss[:, first - 1 : last].mean(1).tolist()) for first, last in spans_of(figures.shape[2])
        ),
    )


Readings = dict[tuple[str, str], Reading]  # by the name of a model and the content of a text


def read_all(bench: Bench, texts: tuple[Text, ...], progress: Progress) -> Readings:
    """All models on all texts; what is stored is not computed again."""
    run, found = bench.run, Readings()
    for which in run.models:
        for text in texts:
            stored = remember(_path(bench, which, text), Reading, lambda _: [], run.workspace)
            if stored is not None:
                found[which.name, text.content] = stored
    open_texts = [text for text in texts if any((which.name, text.content) not in found for which in run.models)]
    total, done = len(open_texts) * (1 + len(run.models)), 0
    targets: dict[str, ParentTargets] = {}
    for text in open_texts:
        targets[text.content] = parent_targets(bench.model(run.models[0]), text.tokens(run.workspace), bench.compute)
        done += 1
        progress(done, total, f"the parent on {text.name}")
    for which in run.models:
        for text in open_texts:
            if (which.name, text.content) not in found:
                figures = token_figures(bench.model(which), targets[text.content], bench.compute, probed)
                found[which.name, text.content] = reading_of(figures)
                keep(_path(bench, which, text), found[which.name, text.content], [], run.workspace)
            done += 1
            progress(done, total, f"{which.name} on {text.name}")
    return found


def _path(bench: Bench, which: Contender, text: Text) -> Path:
    return bench.path(which, text=text.content, v=VERSION)
