"""The GGUF file that a child is served from: written once, then judged, timed and handed over.

A child has one where the search chose types of numbers, or where the profile names one for llama.cpp's KV cache.

Types of 4 and 5 bits are fitted to the first training sequences of the corpus (tasks/export/quantise.py).
"""

import shutil
from pathlib import Path

from torch import Tensor

from blocks.compute import HOST
from blocks.files import atomic_path, sha256_of
from blocks.library import digest_of, made_once, read_rows
from blocks.records import PARENT, CorpusInfo, ParentInfo, Value
from blocks.typed_labels import FITTED_TO
from profiles.schema import Hardware, Precision
from tasks.distill.rounded import RoundedTraining
from tasks.engines.llama_cpp import LlamaCpp
from tasks.evaluate.compare import Contender, build
from tasks.export.child_tokenizer import find_tokenizer
from tasks.export.logits_check import check_logits
from tasks.export.quantise import Recipe, quantise_layers
from tasks.gguf.reader import read_gguf
from tasks.gguf.writer import write_gguf
from tasks.inputs.children import Origin

VERSION = 2  # iq4_nl is rounded by our own code
GGUF_NAME = "child.gguf"  # beside the child's folder


def is_typed(which: Contender) -> bool:
    """Whether a contender has types of numbers that the search chose."""
    return bool(which.architecture.head or any(choice != choice.bare for choice in which.architecture.layers))


def as_served(which: Contender, hardware: Hardware) -> Contender:
    """The contender with the KV cache that it is judged with, where the hardware names one of llama.cpp.

    The parent has none: all are compared with its own logits.
    """
    named = hardware.engine == "llama.cpp" and which.name != PARENT
    return which.model_copy(update={"cache": (hardware.kv_precision or "") if named else ""})


def needs_file(which: Contender) -> bool:
    """Whether a contender is served from a file of its own that is not written yet."""
    return not which.file and (is_typed(which) or bool(which.cache))


def recipe_of(which: Contender) -> Recipe:
    """The types of a contender's file."""
    return Recipe.of(which.architecture.layers, which.architecture.head)


def fitted_to(corpus: CorpusInfo, workspace: Path) -> Tensor:
    """(S, T) the training text that types of 4 and 5 bits are fitted to."""
    return read_rows(workspace, corpus.tokens, "train", 0, min(FITTED_TO, corpus.train_sequences)).long()


def with_file(
    which: Contender,
    parent: ParentInfo,
    corpus: CorpusInfo,
    precision: Precision,
    workspace: Path,
    training: RoundedTraining | None = None,
) -> Contender:
    """The contender with its file, which is written unless it is there; a contender that needs none as it is.

    precision: that of weights for which no type was chosen. training: of the rounded child, before it is written.
    """
    if not needs_file(which):
        return which
    key = digest_of(model=which.key, corpus=corpus.fingerprint, precision=precision, fitted=FITTED_TO, v=VERSION)
    trained = {} if training is None else {"folder": training.folder(key)}
    path = workspace / "typed" / f"{digest_of(plain=key, **trained) if trained else key}.gguf"
    if not path.exists():
        model, folder = build(which, parent, workspace, HOST), workspace / parent.folder
        recipe, tokens = recipe_of(which), fitted_to(corpus, workspace)
        stored = quantise_layers(model, tokens, recipe if training is None else recipe.with_head(""))
        if training is not None:  # of the layers; the head is fitted to what leaves them then
            stored = {**training.run(model, stored, key), **quantise_layers(model, tokens, recipe.head_alone)}
        tokenizer, _ = find_tokenizer(folder, model.config.vocab_size, Origin(parent_source=parent.source), None)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(model, path, precision, tokenizer, f"{which.name} of {parent.name}", stored)
    result = None if training is None else training.result(key)
    return which.model_copy(update={"file": str(path.relative_to(workspace)), "rounded": result})


class Checked(Value):
    """What came out when llama.cpp ran a file beside torch."""

    said: str


def hand_over(file: Path, target: Path) -> str:
    """Copy a child's file to where its user finds it, if llama.cpp gives torch's logits on it. Returns a sentence.

    The same bytes are compared once with each version of llama.cpp: it takes seconds of a run that is given again.
    """
    key = digest_of(file=sha256_of(file), by=LlamaCpp().version(), v=VERSION)
    kept = file.with_name(f"checked-{key}.json")

    def checked() -> Checked:
        return Checked(said=check_logits(read_gguf(file), file, "the chosen types"))

    found = made_once(kept, Checked, file.parent, checked, fetch="never")
    with atomic_path(target) as part:
        shutil.copyfile(file, part)
    return f"{target.name}: {found.said}"
