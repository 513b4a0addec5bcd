"""The same full fine-tuning of every model on a text that none was trained on: does a child still learn as its parent?

AdamW on the next token's loss, float32 weights, the same batches and rate. The rate rises over the first tenth of the
steps. The loss on the text's test sequences is measured after 0, 1, 2, 4, 8 ... steps and after the last.
"""

# N, S = sequences, T = tokens, V = vocabulary

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from blocks.compute import Compute
from blocks.errors import PuzzleError, PuzzleFailure
from blocks.library import read_rows
from blocks.records import Value
from blocks.runtime import free_bytes
from tasks.distill.record import open_parent
from tasks.evaluate.compare import Contender
from tasks.probe.records import Asked
from tasks.probe.sides import Bench, ProbedRun
from tasks.probe.texts import Text
from tasks.running.progress import Progress

VERSION = 1
WARM = 10  # the rate rises over 1 / this of the steps
COPIES = 4.5  # of the weights: gradients and two moments beside them, and activations


class Tuned(Value):
    """The loss of every test sequence at each point of a fine-tuning. tokens: seen until there."""

    tokens: tuple[int, ...]
    losses: tuple[tuple[float, ...], ...]


def check_memory(run: ProbedRun, compute: Compute) -> None:
    """PuzzleError where a model and its optimiser do not fit into the memory that the device has free."""
    needed = COPIES * open_parent(run.parent_folder, compute).weight_bytes
    free = free_bytes(compute.device)
    if needed > free:
        raise PuzzleError(
            f"fine-tuning the parent takes about {needed / 2**30:.1f} GiB, and {compute.device} has "
            f"{free / 2**30:.1f} GiB free: leave it out with --finetune-steps 0."
        )


def tune_all(bench: Bench, text: Text, asked: Asked, progress: Progress) -> dict[str, Tuned]:
    """Every model after the same fine-tuning."""
    workspace, corpus = bench.run.workspace, text.corpus
    train = read_rows(workspace, corpus.tokens, "train", 0, asked.trained_sequences)
    texts = (train, text.tokens(workspace))

    def tuned(which: Contender, own: Progress) -> Tuned:
        return fine_tune(bench.take(which), texts, asked, bench.compute, own, which.name)

    rate = {"steps": asked.finetune_steps, "batch": asked.finetune_sequences, "rate": asked.learning_rate}
    decides = {"train": corpus.fingerprint, "test": text.content, "tuned": rate}
    return bench.of_each(Tuned, tuned, progress, **decides, v=VERSION)


def measured_steps(steps: int) -> list[int]:
    """Steps after which the loss is measured: 0, 1, 2, 4, 8 ... and the last."""
    return sorted({0, steps, *(2**power for power in range(steps.bit_length()))})


def fine_tune(
    model: Any, texts: tuple[Tensor, Tensor], asked: Asked, compute: Compute, progress: Progress, name: str = ""
) -> Tuned:
    """Train a model in place. texts: train (N, T) and test (S, T). PuzzleFailure where the loss is not a number."""
    train, test = texts
    model.eval().requires_grad_(True)  # evaluation mode: no dropout, as in GKD
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, betas=(0.9, 0.95))
    tokens, losses = list[int](), list[tuple[float, ...]]()
    for step in range(asked.finetune_steps + 1):
        if step in measured_steps(asked.finetune_steps):
            with torch.no_grad():
                each = torch.cat([_losses(model, part, compute) for part in _parts(test, compute)])
            if not each.isfinite().all():
                raise PuzzleFailure(f"the loss of {name} is not a number after {step} steps: lower --learning-rate")
            tokens.append(step * asked.finetune_sequences * train.shape[1])
            losses.append(tuple(each.double().tolist()))
        if step < asked.finetune_steps:
            first = step * asked.finetune_sequences
            batch = train[first : first + asked.finetune_sequences]
            optimizer.param_groups[0]["lr"] = asked.learning_rate * min(1.0, WARM * (step + 1) / asked.finetune_steps)
            _update(model, optimizer, batch, compute)
            progress(step + 1, asked.finetune_steps, f"{name}, loss {sum(losses[-1]) / len(losses[-1]):.3f}")
    return Tuned(tokens=tuple(tokens), losses=tuple(losses))


def _update(model: Any, optimizer: torch.optim.Optimizer, batch: Tensor, compute: Compute) -> None:
    optimizer.zero_grad(set_to_none=True)
    for part in _parts(batch, compute):
        (_losses(model, part, compute).sum() / len(batch)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _parts(tokens: Tensor, compute: Compute) -> tuple[Tensor, ...]:
    return tokens.split(compute.sequences(tokens.shape[1]))


def _losses(model: Any, tokens: Tensor, compute: Compute) -> Tensor:
    """Mean loss of each sequence. (s, T) -> (s,)"""
    ids = tokens.to(compute.device).long()
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1).cpu()
