"""Attention over a window of the last tokens and a few sink tokens, the first of the text, which every token sees.

A token at place q sees the tokens at places k <= q with q - k < size, and the first `sinks` tokens of its row. Padding
on the left is not part of a text: the sinks of a padded row come behind it. Keys keep the rotation of their places.

The cache of such a layer holds, for each row, its sinks and the last size - 1 tokens, whatever the length of the text.
The products are made for blocks of queries, so a prefill's work grows with the length and not with its square.

Legend: B = rows, T = new tokens, L = tokens in the cache, `seen` = tokens before the new ones, H = heads, C = head_dim.
A place counts a row's tokens from 0, its padding included.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# before the name of the attention implementation that a layer with a window is built on; the table of implementations
# is the process's, and copies of this file, one of each child that was loaded, must not replace each other's
PREFIX = f"{__name__}."
WHO = "a child with windows or recurrent attention"  # as messages name it
BLOCK = 256  # queries whose products are made at once, unless the window is longer


@dataclass(frozen=True)
class Padding:
    """Of padded rows: first (B, 1) the place of the first token, valid (B, seen + T) whether a place has a token."""

    first: torch.Tensor
    valid: torch.Tensor


def padding_of(attention_mask: torch.Tensor | None) -> Padding | None:
    """None where no row is padded. ValueError for a mask that is not (B, seen + T), or has padding within a text."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(f"{WHO} takes an attention_mask of shape (batch, tokens), and no other.")
    valid = attention_mask.bool()
    if valid.all():
        return None
    starts = valid[:, 1:] & ~valid[:, :-1]
    if (starts.sum(1) + valid[:, 0] > 1).any():  # windows and states would count the padding as tokens of the text
        raise ValueError(f"{WHO} takes padding before or behind a text, not between its tokens: pad on the left.")
    return Padding(first=valid.int().argmax(1, keepdim=True), valid=valid)


@dataclass(frozen=True)
class Window:
    """size: tokens that a token sees, itself included. sinks: tokens at the beginning that it sees beside them."""

    size: int
    sinks: int

    @property
    def room(self) -> int:
        """Tokens in the cache, at most."""
        return self.size - 1 + self.sinks

    def places(self, seen: int, first: torch.Tensor) -> torch.Tensor:
        """(B, L) places of the tokens that the cache holds after `seen`, ascending. first: (B, 1), see Padding."""
        held = torch.arange(min(self.room, seen), device=first.device)
        gone = seen - len(held)
        return torch.where(held < self.sinks, first.clamp(max=gone), gone) + held

    def indices(self, places: torch.Tensor, seen: int, first: torch.Tensor) -> torch.Tensor:
        """Where tokens at some places (B, n) lie in the cache after `seen`, with the new ones behind it."""
        gone = max(seen - self.room, 0)
        return places - torch.where(places < gone + self.sinks, first.clamp(max=gone), gone)

    def view(self, tokens: int, seen: int, padding: Padding | None, device: torch.device) -> "View | None":
        """What `tokens` new tokens see; None where they see all before them, or as much as the cache holds."""
        if padding is None and (tokens == 1 or (seen == 0 and tokens <= self.size + self.sinks)):
            return None
        first = torch.zeros(1, 1, dtype=torch.long, device=device) if padding is None else padding.first
        return View(window=self, tokens=tokens, seen=seen, first=first, padding=padding)


@dataclass(frozen=True)
class View:
    """What new tokens see of the cache and of each other. It goes to the attention in the place of a mask."""

    window: Window
    tokens: int
    seen: int
    first: torch.Tensor
    padding: Padding | None

    def part(
        self, keys: torch.Tensor, values: torch.Tensor, begin: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values and mask (B, 1, queries, keys) for the new tokens `begin` to `end`: all that they may see."""
        held = keys.shape[2] - self.tokens
        least = self.seen + begin - self.window.size + 1  # the first place in these tokens' windows
        if least < self.seen:  # it may be in the cache: all of it is taken
            new = torch.arange(self.seen, self.seen + end, device=keys.device).expand(len(self.first), -1)
            places = torch.cat([self.window.places(self.seen, self.first), new], 1)
            return keys[:, :, : held + end], values[:, :, : held + end], self.mask(places, begin, end)
        recent = slice(held + least - self.seen, held + end)
        sinks = self.first + torch.arange(self.window.sinks, device=keys.device)
        sinks = sinks.clamp(max=self.seen + self.tokens - 1)
        where = self.window.indices(sinks, self.seen, self.first)
        new = torch.arange(least, self.seen + end, device=keys.device).expand(len(self.first), -1)
        mask = self.mask(torch.cat([sinks, new], 1), begin, end)
        mask[..., : self.window.sinks] &= (sinks < least)[:, None, None]  # else it is among the recent ones
        both = (torch.cat([rows(one, where), one[:, :, recent]], 2) for one in (keys, values))
        return (*both, mask)  # type: ignore[return-value]

    def mask(self, places: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """(B, 1, queries, keys) true where the new tokens `begin` to `end` see the tokens at some places (B, keys)."""
        queries = torch.arange(self.seen + begin, self.seen + end, device=places.device)[:, None]
        keys = places[:, None]
        found = (queries - keys < self.window.size) | (keys < self.first[..., None] + self.window.sinks)
        if self.padding is not None:
            found &= self.padding.valid.gather(1, places)[:, None]
        # padding sees itself: a row of the softmax must not be empty
        return ((found & (keys <= queries)) | (keys == queries))[:, None]


def rows(states: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Some tokens of keys or values (B, H, L, C), those at `where` (B or 1, n). -> (B, H, n, C)"""
    batch, heads, _, channels = states.shape
    return states.gather(2, where[:, None, :, None].expand(batch, heads, -1, channels))


def windowed_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: View | None, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention of a layer with a window, (B, H, T, C) -> (B, T, H, C), by torch's scaled_dot_product_attention."""
    sdpa, view = ALL_ATTENTION_FUNCTIONS["sdpa"], attention_mask
    if view is None:
        return sdpa(module, query, key, value, None, **kwargs)
    size = max(BLOCK, view.window.size)
    found = []
    for begin in range(0, view.tokens, size):
        end = min(begin + size, view.tokens)
        found.append(sdpa(module, query[:, :, begin:end], *view.part(key, value, begin, end), **kwargs)[0])
    return torch.cat(found, 1), None


def windowed_eager(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: View | None, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same by the family's own eager code, which also gives the weights. All products are made at once."""
    eager = importlib.import_module(type(module).__module__).eager_attention_forward
    tokens, held = query.shape[2], key.shape[2] - query.shape[2]
    seen = torch.ones(tokens, held + tokens, dtype=torch.bool, device=key.device).tril(held)[None, None]
    if attention_mask is not None:
        view = attention_mask
        new = torch.arange(view.seen, view.seen + tokens, device=key.device).expand(len(view.first), -1)
        seen = view.mask(torch.cat([view.window.places(view.seen, view.first), new], 1), 0, tokens)
    mask = torch.zeros(seen.shape, dtype=query.dtype, device=key.device).masked_fill(
        ~seen, torch.finfo(query.dtype).min
    )
    found: tuple[torch.Tensor, torch.Tensor | None] = eager(module, query, key, value, mask, **kwargs)
    return found


ALL_ATTENTION_FUNCTIONS.register(f"{PREFIX}eager", windowed_eager)
# whatever the rest of the model runs on: no flash attention kernel knows sinks that are tokens
for _name in ("sdpa", *(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if name.startswith("flash"))):
    ALL_ATTENTION_FUNCTIONS.register(f"{PREFIX}{_name}", windowed_attention)


class OneWay:
    """A cache layer that does not know what it held some tokens ago, as assisted decoding needs it."""

    is_croppable = False

    def activate_past_recording(self) -> None:
        """ValueError, always."""
        raise ValueError(f"{WHO} cannot take tokens back, so no assistant model can help it: leave it out.")

    def crop(self, tokens_to_remove: int) -> None:
        """ValueError, always."""
        self.activate_past_recording()


class WindowCacheLayer(OneWay, DynamicSlidingWindowLayer):
    """The sinks and the last size - 1 tokens of each row.

    sliding_window: that of the parent's own sliding layers, whose masks may be sized by this layer. padding: of the
    rows that are added next.
    """

    def __init__(self, window: Window, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.window = window
        self.padding: Padding | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the new tokens; returns those held before and the new ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        both: Any = ((self.keys, key_states), (self.values, value_states))
        keys, values = (torch.cat(pair, -2) for pair in both)
        seen = self.cumulative_length
        self.cumulative_length += key_states.shape[-2]
        self.keys, self.values = (self._kept(one, seen) for one in (keys, values))
        return keys, values

    def _kept(self, states: torch.Tensor, seen: int) -> torch.Tensor:
        count, window = states.shape[-2], self.window
        if count <= window.room:
            return states
        if self.padding is None:
            recent = states[:, :, count - window.size + 1 :]
            return torch.cat([states[:, :, : window.sinks], recent], 2)
        first = self.padding.first
        return rows(states, window.indices(window.places(self.cumulative_length, first), seen, first))

    def get_max_length(self) -> int:
        """No text is too long."""
        return -1


def window_of(entry: Any) -> Window | None:
    """The window of an `attention` entry of `block_configs`; None where every token is seen."""
    size = entry.get("window_length")
    return Window(size=size, sinks=entry.get("num_sink_tokens") or 0) if size else None
