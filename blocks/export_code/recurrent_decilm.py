"""Recurrent attention: a state of one size in the place of a KV cache that grows with the text.

Each query head has a state S, a matrix. A token with query q, key k and value v, where q and k have length 1, does

    S = a S + w k v^T        a, from 0 to 1: what stays; w: how much is written; both from the token itself
    y = S^T q + skip v       then divided by its root mean square, and times a gate from 0 to 1

and the heads' y go through `o_proj`. There is no rotation: what is near counts more because the rest has faded. Before
that, q, k and v are each mixed with those of a few tokens before, channel by channel (`conv`).

This is Mamba-2's form (2405.21060), the rule `ssd`: w is the step that a follows from. By the rule `gdn`, the gated
delta rule (2412.06464), w is a gate of its own, and v - a S^T k is written in the place of v. Many tokens are computed
in chunks: products within a chunk, a state from chunk to chunk. So a prefill's work grows with the length and not with
its square. Padding on the left changes no state.

An `attention` entry of `block_configs` says what a layer is:

    {..., "recurrent": {"rule": "ssd", "gates": 2, "conv_kernel": 4, "chunk_size": 64}}

Legend: B = rows, T = new tokens, N = chunks, L = tokens of a chunk, H = query heads, C = head_dim, G = gates.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer

from .families_decilm import Family
from .windows_decilm import OneWay, Padding


class RecurrentCacheLayer(OneWay, DynamicLayer):
    """What a recurrent attention remembers: `keys` is the state (B, H, C, C), `values` what `conv` still needs.

    The names are those that transformers moves, repeats and selects rows of.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cumulative_length = 0

    def get_seq_length(self) -> int:
        """Tokens that were seen."""
        return self.cumulative_length

    def remember(self, state: torch.Tensor, tail: torch.Tensor, tokens: int) -> None:
        """The state after so many more tokens."""
        self.keys, self.values, self.device = state, tail, state.device
        self.is_initialized = True
        self.cumulative_length += tokens


class RecurrentAttention(nn.Module):
    """A recurrent attention with the projections of the family's own attention. recurrent: see the entry."""

    def __init__(self, recurrent: Any, parents: Any, config: Any, family: Family) -> None:
        super().__init__()
        self.delta, self.eps = recurrent["rule"] == "gdn", getattr(config, family.epsilon)
        self.kernel, self.chunk = recurrent["conv_kernel"], recurrent["chunk_size"]
        self.q_proj, self.k_proj, self.v_proj = projections(parents, config)
        self.o_proj = parents.o_proj
        self.widths = [one.out_features for one in (self.q_proj, self.k_proj, self.v_proj)]
        self.head_dim, self.heads = parents.head_dim, self.widths[0] // parents.head_dim
        self.conv = nn.Parameter(torch.zeros(sum(self.widths), self.kernel))
        self.gates = nn.Linear(config.hidden_size, recurrent["gates"] * self.heads)
        self.log_rate = nn.Parameter(torch.zeros(self.heads))
        self.skip = nn.Parameter(torch.zeros(self.heads))

    def forward(
        self,
        hidden_states: torch.Tensor,
        padding: Padding | None = None,
        held: RecurrentCacheLayer | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """(B, T, D) -> (B, T, D). held: what is remembered of earlier tokens; it is brought up to date."""
        tokens = hidden_states.shape[1]
        mixed = torch.cat([one(hidden_states) for one in (self.q_proj, self.k_proj, self.v_proj)], -1)
        if padding is not None:  # of no value, it writes nothing
            mixed = mixed * padding.valid[:, -tokens:, None]
        state, tail = (None, None) if held is None else (held.keys, held.values)
        if tail is None:
            tail = mixed.new_zeros(len(mixed), self.kernel - 1, mixed.shape[-1])
        mixed = torch.cat([tail, mixed], 1)
        gates = self.gates(hidden_states)
        with torch.autocast(hidden_states.device.type, enabled=False):  # sums over a whole text
            out, state = self.heads_out(mixed.float(), gates.float(), state)
        if held is not None:
            held.remember(state, mixed[:, tokens:].clone(), tokens)  # a view would keep all tokens in memory
        return self.o_proj(out.transpose(1, 2).flatten(2).to(hidden_states.dtype)), None

    def heads_out(
        self, mixed: torch.Tensor, gates: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the heads put out (B, H, T, C), and the new state. mixed: q, k, v (B, kernel - 1 + T, all channels)."""
        tokens, conv = gates.shape[1], self.conv.float()
        mixed = sum(mixed[:, i : i + tokens] * conv[:, i] for i in range(self.kernel))  # type: ignore[assignment]
        query, key, value = (
            one.unflatten(-1, (-1, self.head_dim)).transpose(1, 2).repeat_interleave(self.widths[0] // width, 1)
            for one, width in zip(mixed.split(self.widths, -1), self.widths, strict=True)
        )
        step, output, *write = gates.unflatten(-1, (-1, self.heads)).permute(2, 0, 3, 1)  # (B, H, T) each
        step = F.softplus(step)
        written = write[0].sigmoid() if self.delta else step
        decay = -self.log_rate.float().exp()[:, None] * step
        out, state = scan(unit(query), unit(key), value, decay, written, state, self.chunk, self.delta)
        out = out + self.skip.float()[:, None, None] * value
        return F.rms_norm(out, out.shape[-1:], eps=self.eps) * output.sigmoid()[..., None], state


def projections(parents: Any, config: Any) -> list[nn.Linear]:
    """Those of queries, keys and values of a family's attention; new ones where the family has them in one matrix."""
    if hasattr(parents, "q_proj"):
        return [parents.q_proj, parents.k_proj, parents.v_proj]
    counts = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    return [
        nn.Linear(config.hidden_size, count * parents.head_dim, bias=parents.qkv_proj.bias is not None)
        for count in counts
    ]


def unit(states: torch.Tensor) -> torch.Tensor:
    """Vectors of length 1."""
    return states * torch.rsqrt(states.square().sum(-1, keepdim=True) + 1e-6)


def scan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    write: torch.Tensor,
    state: torch.Tensor | None,
    chunk: int,
    delta: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S = exp(decay) S + write key value^T; out = S^T query. Vectors (B, H, T, C), numbers (B, H, T) -> out, last S.

    delta: what S, decayed, gives for the key is subtracted from the value first. The values of a chunk then depend on
    each other: a triangular system.

    A token that neither decays nor writes changes nothing: with such the last chunk is filled.
    """
    tokens = query.shape[2]
    if state is None:
        state = query.new_zeros(*query.shape[:2], key.shape[-1], value.shape[-1])
    if tokens == 1:
        return step(query, key, value, decay[..., None], write[..., None], state, delta)
    size = min(chunk, tokens)
    query, key, value, decay, write = (
        F.pad(one, (0, 0, 0, -tokens % size)).unflatten(2, (-1, size))
        for one in (query, key, value, decay[..., None], write[..., None])
    )
    total = decay[..., 0].cumsum(-1)  # (B, H, N, L)
    value, erased = value * write, None
    later = torch.ones(size, size, dtype=torch.bool, device=query.device).triu(1)
    between = (total[..., None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()
    if delta:
        right = torch.cat([value, key * write * total.exp()[..., None]], -1)
        system = (key * write) @ key.mT * between
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        value, erased = solved.split(value.shape[-1], -1)
    scores = (query @ key.mT) * between
    query, key = query * total.exp()[..., None], key * (total[..., -1:] - total).exp()[..., None]
    kept = total[..., -1].exp()[..., None, None]
    found = []
    for n in range(query.shape[2]):
        new = value[:, :, n] if erased is None else value[:, :, n] - erased[:, :, n] @ state
        found.append(scores[:, :, n] @ new + query[:, :, n] @ state)
        state = kept[:, :, n] * state + key[:, :, n].mT @ new
    return torch.stack(found, 2).flatten(2, 3)[:, :, :tokens], state


def step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    write: torch.Tensor,
    state: torch.Tensor,
    delta: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scan` of a single token, as it is decoded: three passes over the state. Numbers are (B, H, 1, 1)."""
    state = state * decay.exp()
    if delta:
        value = value - key @ state
    state = state + key.mT * (value * write)
    return query @ state, state
