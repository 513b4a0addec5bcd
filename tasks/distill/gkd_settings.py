"""What the settings of GKD say: which layers, which sequences, which rate at a step; without torch's models."""

import math
from collections.abc import Sequence

import torch

from profiles.schema import GKD

LAUNCHER = "PUZZLE_GKD_LAUNCHER"  # what starts the processes of GKD, where torchrun on this machine does not
# settings of GKD that the targets of a step do not depend on
NOT_OF_THE_PARENT = {"learning_rate", "evaluate_every", "patience", "steps", "warmup_fraction", "schedule", "clip_norm"}
NOT_OF_THE_PARENT |= {"also_train"}
# settings that say how GKD is computed, or what comes after it, and not what comes out
HOW = {"recorded_gib", "checkpoint_minutes", "gradient_checkpointing"}
HOW |= {"rounded_steps", "rounded_learning_rate"}


def asked(settings: GKD) -> dict[str, object]:
    """Those settings that decide what GKD makes."""
    return settings.model_dump(exclude=HOW)


def cosine_layers(depth: int, every: int) -> tuple[int, ...]:
    """Layers whose output states are compared: every `every`-th, counted back from the last."""
    return tuple(range(depth - 1, -1, -every))[::-1]


def token_bytes(settings: GKD, depth: int, hidden_size: int) -> int:
    """Bytes of the recorded targets of a token: states in bfloat16; hidden, moment and lse in float32; its id."""
    return (8 + 2 * len(cosine_layers(depth, settings.cosine_every))) * hidden_size + 8


def is_recorded(settings: GKD, length: int, depth: int, hidden_size: int) -> bool:
    """Whether the parent is recorded, or else runs beside the child. length: of a sequence."""
    tokens = settings.steps * settings.batch_sequences * length
    return tokens * token_bytes(settings, depth, hidden_size) <= settings.recorded_gib * 2**30


def rows_of_step(step: int, settings: GKD, available: int) -> list[int]:
    """The train sequences of a step: the corpus in a seeded order, from its start again when it ends."""
    order = torch.randperm(available, generator=torch.Generator().manual_seed(settings.seed)).tolist()
    first = step * settings.batch_sequences
    return [order[(first + row) % available] for row in range(settings.batch_sequences)]


def texts_of_steps(steps: int, shares: Sequence[float]) -> list[tuple[int, int]]:
    """For every step the text that its sequences are of, and how many steps were of that text before.

    The next step is of the text that is farthest behind its share of the steps.
    """
    done, found = [0] * len(shares), list[tuple[int, int]]()
    counted = [place for place, share in enumerate(shares) if share]
    for _ in range(steps):
        text = min(counted, key=lambda place: (done[place] + 1) / shares[place])
        found.append((text, done[text]))
        done[text] += 1
    return found


def trial_steps(steps: int) -> int:
    """Steps in which each learning rate is tried: four tell it in the log's measurements, noise asks for more."""
    return max(1, min(4, steps // 4), min(20, steps // 12))


def share_of_rate(step: int, steps: int, settings: GKD) -> float:
    """The share of the highest learning rate at a step, counted from 0."""
    warm = max(1, int(steps * settings.warmup_fraction + 1e-9))
    if step < warm:
        return (step + 1) / warm
    if settings.schedule == "constant":
        return 1.0
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
