"""Baselines of the search: what simpler ways make of the same library and the same budget (Puzzle, appendix F).

    uniform     the same attention and the same ffn in every layer
    depth       whole layers dropped, those with the lowest summed score first
    greedy      an equal budget per layer, savings carried on (F.2.2)
    random      random choices, brought within the budget and filled up to it
    no_op_only  the MIP over the parent's own subblocks and no-ops alone
    max_params  as many parameters as the budget allows, whatever they score
    minitron    one FFN width in every layer, the widest that fits, and the parent's attention

The blocks of minitron are not those of the library but the parent's own with their least active channels cut off
(flows/stages.py, `cut`): Minitron (arXiv 2407.14679) trains nothing before GKD. It cuts query heads and channels of the
hidden state too, which a child's config cannot express.

Each takes a grid whose slots are whole layers and whose options are pairs (attention, ffn). A new one needs its name in
two more places: BASELINES in tasks/studies/peers.py, by which it is called, and BaselineName in profiles/schema.py, by
which a profile asks for it. It may have a colour of its own: COLOURS in tasks/pages/picture.py.
"""

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from profiles.schema import Search
from tasks.search.grid import Grid
from tasks.search.joint import Option
from tasks.search.mip import minimise
from tasks.search.program import ROOM, Floats, Integers
from tasks.studies.repair import draw, keeps, taken, within

_ATTEMPTS = 64  # random: draws before a combination of batch sizes is given up

Pair = tuple[str | None, str | None]


# the selection, (S,), and how many whole architectures it was picked from; None when none keeps the budget
Picked = tuple[Integers, int] | None
Baseline = Callable[[Grid, Search, np.random.Generator], Picked]


def _fits(grid: Grid, selection: Integers) -> bool:
    return bool(keeps(grid.program, selection[None])[0])


def _pair(option: Option) -> Pair:
    return option.attention, option.ffn


def _best_of(grid: Grid, slot: Integers, pair: Pair, coupled: bool = True) -> int | None:
    """The better-scoring option of a slot that is this pair, coupled too if that may be; None when the layer does not
    have it.
    """
    own = {int(index): grid.options[index] for index in slot}
    found = [index for index, option in own.items() if _pair(option) == pair and option.coupled <= coupled]
    return min(found, key=lambda index: grid.scores[index], default=None)


def uniform(grid: Grid, *_: object) -> Picked:
    """The best-scoring pair of labels that fits; layers that are not searched keep the parent's."""
    pairs = dict.fromkeys(_pair(option) for option in grid.options)
    everywhere = [selection for pair in pairs if (selection := _in_all_layers(grid, pair)) is not None]
    fitting = [selection for selection in everywhere if _fits(grid, selection)]
    best = min(fitting, key=lambda selection: float(grid.scores[selection].sum()), default=None)
    return None if best is None else (best, len(fitting))


def _in_all_layers(grid: Grid, pair: Pair, coupled: bool = True) -> Integers | None:
    picks = [_best_of(grid, slot, pair, coupled) if len(slot) > 1 else int(slot[0]) for slot in grid.program.slots]
    return None if None in picks else np.array(picks)


def depth(grid: Grid, *_: object) -> Picked:
    """Drop whole layers, lowest score first, until the rest fits; only layers with both no-ops can go."""
    selection = grid.starts.copy()
    dropped = {layer: _best_of(grid, slot, ("no_op", "no_op")) for layer, slot in enumerate(grid.program.slots)}
    droppable = {layer: index for layer, index in dropped.items() if index is not None}
    for layer, index in sorted(droppable.items(), key=lambda item: float(grid.scores[item[1]])):
        if _fits(grid, selection):
            break
        selection[layer] = index
    return (selection, 1) if _fits(grid, selection) else None


def greedy(grid: Grid, *_: object) -> Picked:
    """Equal budget per searched layer, layers by mean score ascending; the lowest score within it, the rest carried on.

    A layer where nothing fits takes what overruns least, and the next layers owe the difference.
    """
    selection = grid.starts.copy()
    slots = grid.program.slots
    searched = sorted((i for i, slot in enumerate(slots) if len(slot) > 1), key=lambda i: grid.scores[slots[i]].mean())
    kept = grid.starts[[len(slot) == 1 for slot in slots]]
    share = (grid.program.room - taken(grid.program, kept[None])[0]) / max(len(searched), 1)
    carried = np.zeros_like(share)
    for layer in searched:
        available = share + carried
        selection[layer] = _lowest_within(grid, slots[layer], available)
        carried = available - grid.usage[:, selection[layer]]
    return (selection, 1) if _fits(grid, selection) else None


def _lowest_within(grid: Grid, slot: Integers, available: Floats) -> int:
    overrun = (grid.usage[:, slot] - available[:, None]).max(axis=0)
    within = slot[overrun <= ROOM]
    return int(within[grid.scores[within].argmin()]) if len(within) else int(slot[overrun.argmin()])


def minitron(grid: Grid, *_: object) -> Picked:
    """The widest FFN that fits in every searched layer, beside the parent's attention, each a subblock of its own."""
    widths = dict.fromkeys(option.ffn for option in grid.options if re.fullmatch(r"(ffn|ewidth)\d+", option.ffn or ""))
    pairs = [("parent", width) for width in widths]
    everywhere = [found for pair in pairs if (found := _in_all_layers(grid, pair, coupled=False)) is not None]
    fitting = [selection for selection in everywhere if _fits(grid, selection)]
    best = max(fitting, key=lambda selection: float(grid.parameters[selection].sum()), default=None)
    return None if best is None else (best, len(fitting))


def random(grid: Grid, _: Search, generator: np.random.Generator) -> Picked:
    """The first of some random choices that can be brought within the budget."""
    for attempt in range(1, _ATTEMPTS + 1):
        drawn, kept = within(grid.program, draw(grid.program, 1, generator), generator)
        if kept[0]:
            return drawn[0], attempt
    return None


def no_op_only(grid: Grid, search: Search, *_: object) -> Picked:
    """The paper's ablation: subblocks are kept or removed, nothing in between."""
    kept = np.array([set(_pair(option)) <= {"parent", "no_op"} for option in grid.options])
    answer = minimise(grid.program.only(kept), search)
    return None if answer is None else (np.flatnonzero(kept)[answer.selection], 0)


def max_params(grid: Grid, search: Search, *_: object) -> Picked:
    """The paper's ablation: the scores are not looked at.

    Very many choices come close to filling a budget, and no solver tells them apart in time: a gap of 1e-4 is enough.
    """
    search = search.model_copy(update={"gap": max(search.gap, 1e-4)})
    answer = minimise(replace(grid.program, scores=-grid.parameters), search)
    return None if answer is None else (answer.selection, 0)
