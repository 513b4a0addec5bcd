"""How far a racer is from its parent as the file that it would be served from, its weights rounded and corrected.

A race that compared float weights would favour blocks that lose most when they are rounded. So in every round each
racer is rounded as it stands, as for its file (tasks/evaluate/typed_file.py), and what the file holds is judged.
"""

import tempfile
from functools import partial
from pathlib import Path

from blocks.library import digest_of, made_once
from blocks.records import Value
from blocks.typed_labels import FITTED_TO
from profiles.schema import Precision
from tasks.distill.gkd_job import Job, model_after
from tasks.evaluate.compare import Contender, figures_of, served, targets_on
from tasks.evaluate.typed_file import fitted_to, recipe_of
from tasks.export.quantise import quantise_layers
from tasks.gguf.tokenizer_writer import NO_TOKENIZER
from tasks.gguf.writer import write_gguf
from tasks.running.progress import say

VERSION = 1


class AsFile(Value):
    """Mean KL from the parent, in nats per token. step: of GKD, whose weights were judged."""

    kl: float
    step: int


def kl_as_file(
    which: Contender,
    steps: int,
    job: Job,
    precision: Precision,
    workspace: Path,
    devices: tuple[str, ...] = (),
) -> float:
    """The KL of a contender's file on the validation text of GKD, its best weights after so many steps in it; over
    capabilities, the sum by their shares.

    It is measured once, and tokens count as in the final comparison. job: the contender's GKD. precision: that of
    weights for which no type was chosen.
    """
    recipe = recipe_of(which)
    key = digest_of(
        training=job.folder,
        steps=steps,
        recipe=[recipe.layers, recipe.head],
        served=[precision, which.cache],
        text=[job.record.corpus.fingerprint, job.settings.validation_sequences, FITTED_TO],
        v=VERSION,
        **job.record.mixed.key,
    )
    path = workspace / "race" / f"{key}.json"
    judged = partial(_judged, which, steps, job, precision, workspace, devices)
    found = made_once(path, AsFile, workspace, judged)
    if found.step > steps:
        say(f"race: {which.name} is judged by its weights of step {found.step}: those of step {steps} were left behind")
    return found.kl


def _judged(
    which: Contender, steps: int, job: Job, precision: Precision, workspace: Path, devices: tuple[str, ...]
) -> AsFile:
    parent, corpus, compute, recipe = job.record.parent, job.record.corpus, job.compute, recipe_of(which)
    model, step = model_after(steps, job, workspace, compute, devices)
    stored = quantise_layers(model, fitted_to(corpus, workspace), recipe)
    with tempfile.TemporaryDirectory(prefix=".race-", suffix=".part", dir=workspace) as folder:
        file = write_gguf(model, Path(folder) / "racer.gguf", precision, NO_TOKENIZER, which.name, stored)
        written = which.model_copy(update={"file": str(file.relative_to(workspace))})
        in_torch = partial(served, written, parent, workspace, compute)
        kl = 0.0
        for text, share in zip(job.record.texts, job.record.mixed.shares, strict=True):
            if share:
                count = text.validation_sequences if text.capability else job.settings.validation_sequences
                targets = targets_on("validation", count, parent, text, workspace, compute)
                kl += share * float(figures_of(written, targets, workspace, compute, in_torch)["kl"].mean())
    return AsFile(kl=kl, step=step)
