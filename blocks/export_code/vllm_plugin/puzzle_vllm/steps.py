"""The tokens of one step of vLLM, cut into parts whose products torch makes at once.

Decode steps of all requests are one part, and a prompt is cut into blocks. Parts of one request are in its order.

Legend: R = requests of a part, T = tokens of each.
"""

from dataclasses import dataclass
from typing import Any

import torch

TOKENS = 256  # of one prompt, whose products are made at once


@dataclass(frozen=True)
class Part:
    """Tokens whose products are made at once. requests: (R,). where: (R, T) among all of the step. first: (R,) the
    place of the first one in its text.
    """

    requests: torch.Tensor
    where: torch.Tensor
    first: torch.Tensor


def parts_of(step: Any, device: torch.device) -> list[Part]:
    """The parts of a step. step: vLLM's CommonAttentionMetadata."""
    starts = step.query_start_loc_cpu[: step.num_reqs + 1].tolist()
    lengths = [starts[one + 1] - starts[one] for one in range(step.num_reqs)]
    first = step.seq_lens[: step.num_reqs] - step.query_start_loc[: step.num_reqs + 1].diff()

    def part(requests: list[int], begin: int, count: int) -> Part:
        chosen = torch.tensor(requests, device=device)
        offsets = torch.tensor([starts[one] + begin for one in requests], device=device)
        where = offsets[:, None] + torch.arange(count, device=device)
        return Part(requests=chosen, where=where, first=first[chosen] + begin)

    single = [one for one, length in enumerate(lengths) if length == 1]
    parts = [part(single, 0, 1)] if single else []
    for one, length in enumerate(lengths):
        if length > 1:
            parts += [part([one], begin, min(TOKENS, length - begin)) for begin in range(0, length, TOKENS)]
    return parts
