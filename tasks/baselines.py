"""Baselines of the search: what simpler ways make of the same library and the same budget (Puzzle, appendix F).

    uniform   the same attention and the same ffn in every layer
    depth     whole layers dropped, those with the lowest summed score first
    greedy    an equal budget per layer, savings carried on (F.2.2)
    random    random choices, brought within the budget and filled up to it
    no_op_only       the MIP over the parent's own subblocks and no-ops alone
    max_params       as many parameters as the budget allows, whatever they score
    evolutionary     differential evolution on the summed score (tasks/black_box.py)
    policy_gradient  REINFORCE on the summed score (tasks/black_box.py)

Every layer is one slot here, its options are pairs (attention, ffn). Like the MIP, a baseline is tried at every
combination of batch sizes and the best is kept; random keeps the first that works.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from blocks.errors import InfeasibleBudget
from blocks.records import Architecture
from profiles.schema import BaselineName, Search
from tasks.black_box import evolve, reinforce
from tasks.choose import Grid, Option, make_grid
from tasks.mip import ROOM, Floats, Integers, minimise
from tasks.totals import Problem, batch_choices, predicted

_ATTEMPTS = 64  # random: draws before a combination of batch sizes is given up
_FULL = 0.98  # random: share of the tightest limit at which filling up may stop
_NEEDS = {"depth": " (it drops layers that have no_op as attention and as ffn, nothing else)"}

Pair = tuple[str | None, str | None]
Method = Callable[[Grid, np.random.Generator], Integers | None]


def baseline(name: BaselineName, problem: Problem, seed: int = 0) -> Architecture:
    """The architecture of one baseline; `seed` matters for random, evolutionary and policy_gradient.

    Raises InfeasibleBudget when the method finds none within the budget, even where the MIP does.
    """
    best: tuple[float, Grid, Integers] | None = None
    for batches in batch_choices(problem):
        grid = make_grid(problem, batches, joint=True)
        selection = _METHODS[name](grid, np.random.default_rng(seed))
        if selection is None:
            continue
        score = float(grid.scores[selection].sum())
        if best is None or score < best[0]:
            best = score, grid, selection
        if name == "random":
            break
    if best is None:
        raise InfeasibleBudget(
            f"The {name} baseline finds no architecture within the budget{_NEEDS.get(name, '')}: ease the budget, add "
            f"variants to search_space, or take {name} out of evaluate.baselines."
        )
    _, grid, selection = best
    return predicted(problem, grid.choice(selection), name, grid.batches)


def fits(grid: Grid, selection: Integers) -> bool:
    """True when the selected options, (S,), keep every limit of the grid."""
    return bool((_taken(grid, selection) <= 1 - grid.fixed + ROOM).all())


def _taken(grid: Grid, selection: Integers) -> Floats:
    """What the selected options take of every limit, (R,)."""
    return grid.usage[:, selection].sum(axis=1)


def _slots(grid: Grid) -> list[Integers]:
    """Option indices of every slot; the first of each is the parent's own pair."""
    return np.split(np.arange(len(grid.options)), grid.starts[1:])


def _pair(option: Option) -> Pair:
    return option.attention, option.ffn


def _best_of(grid: Grid, slot: Integers, pair: Pair) -> int | None:
    """The better-scoring option of a slot that is this pair, coupled or not; None when the layer does not have it."""
    found = [int(index) for index in slot if _pair(grid.options[index]) == pair]
    return min(found, key=lambda index: grid.scores[index], default=None)


def _uniform(grid: Grid, _: np.random.Generator) -> Integers | None:
    """The best-scoring pair of labels that fits; layers that are not searched keep the parent's."""
    pairs = dict.fromkeys(_pair(option) for option in grid.options)
    everywhere = [selection for pair in pairs if (selection := _in_all_layers(grid, pair)) is not None]
    within = [selection for selection in everywhere if fits(grid, selection)]
    return min(within, key=lambda selection: float(grid.scores[selection].sum()), default=None)


def _in_all_layers(grid: Grid, pair: Pair) -> Integers | None:
    picks = [_best_of(grid, slot, pair) if len(slot) > 1 else int(slot[0]) for slot in _slots(grid)]
    return None if None in picks else np.array(picks)


def _depth(grid: Grid, _: np.random.Generator) -> Integers | None:
    """Drop whole layers, lowest score first, until the rest fits; only layers with both no-ops can go."""
    selection = grid.starts.copy()
    dropped = {layer: _best_of(grid, slot, ("no_op", "no_op")) for layer, slot in enumerate(_slots(grid))}
    droppable = {layer: index for layer, index in dropped.items() if index is not None}
    for layer, index in sorted(droppable.items(), key=lambda item: float(grid.scores[item[1]])):
        if fits(grid, selection):
            break
        selection[layer] = index
    return selection if fits(grid, selection) else None


def _greedy(grid: Grid, _: np.random.Generator) -> Integers | None:
    """Equal budget per searched layer, layers by mean score ascending; the lowest score within it, the rest carried on.

    A layer where nothing fits takes what overruns least, and the next layers owe the difference.
    """
    selection = grid.starts.copy()
    slots = _slots(grid)
    searched = sorted((i for i, slot in enumerate(slots) if len(slot) > 1), key=lambda i: grid.scores[slots[i]].mean())
    kept = grid.starts[[len(slot) == 1 for slot in slots]]
    share = (1 - grid.fixed - _taken(grid, kept)) / max(len(searched), 1)
    carried = np.zeros_like(share)
    for layer in searched:
        available = share + carried
        selection[layer] = _lowest_within(grid, slots[layer], available)
        carried = available - grid.usage[:, selection[layer]]
    return selection if fits(grid, selection) else None


def _lowest_within(grid: Grid, slot: Integers, available: Floats) -> int:
    overrun = (grid.usage[:, slot] - available[:, None]).max(axis=0)
    within = slot[overrun <= ROOM]
    return int(within[grid.scores[within].argmin()]) if len(within) else int(slot[overrun.argmin()])


def _random(grid: Grid, generator: np.random.Generator) -> Integers | None:
    """Random choices; random layers are made cheap until all fits, then others dearer until the budget is used."""
    for _ in range(_ATTEMPTS):
        selection = np.array([generator.choice(slot) for slot in _slots(grid)])
        if _repair(grid, selection, generator):
            _fill(grid, selection, generator)
            return selection
    return None


def _repair(grid: Grid, selection: Integers, generator: np.random.Generator) -> bool:
    """Swap random layers of `selection`, in place, to their cheapest option until it fits; False when it never does.

    With several limits "cheapest" weighs them anew at random in every layer: the limits may want different variants.
    """
    slots = _slots(grid)
    for layer in generator.permutation(len(slots)):
        if fits(grid, selection):
            return True
        price = generator.dirichlet(np.ones(len(grid.limits))) @ grid.usage[:, slots[layer]]
        selection[layer] = slots[layer][price.argmin()]
    return fits(grid, selection)


def _fill(grid: Grid, selection: Integers, generator: np.random.Generator) -> None:
    """Swap random layers, in place, to random dearer options that fit, until the tightest limit is nearly used.

    Each swap takes more of the limit that is tightest, so it ends.
    """
    slot_of = np.repeat(np.arange(len(grid.starts)), [len(slot) for slot in _slots(grid)])
    room = 1 - grid.fixed
    while True:
        taken = _taken(grid, selection)
        tightest = int((taken / room).argmax())
        after = taken[:, None] + grid.usage - grid.usage[:, selection[slot_of]]
        dearer = after[tightest] > taken[tightest] + ROOM
        swaps = np.flatnonzero(dearer & (after <= room[:, None] + ROOM).all(axis=0))
        if taken[tightest] >= _FULL * room[tightest] or not len(swaps):
            return
        swap = int(generator.choice(swaps))
        selection[slot_of[swap]] = swap


def _no_op_only(grid: Grid, _: np.random.Generator) -> Integers | None:
    """The paper's ablation: subblocks are kept or removed, nothing in between."""
    kept = np.array([set(_pair(option)) <= {"parent", "no_op"} for option in grid.options])
    answer = minimise(grid.program.only(kept), Search())
    return None if answer is None else np.flatnonzero(kept)[answer.selection]


def _max_params(grid: Grid, _: np.random.Generator) -> Integers | None:
    """The paper's ablation: the scores are not looked at."""
    answer = minimise(replace(grid.program, scores=-grid.parameters), Search())
    return None if answer is None else answer.selection


def _evolutionary(grid: Grid, generator: np.random.Generator) -> Integers | None:
    return evolve(grid.program, generator)


def _policy_gradient(grid: Grid, generator: np.random.Generator) -> Integers | None:
    return reinforce(grid.program, generator)


_METHODS: dict[str, Method] = {
    "uniform": _uniform,
    "depth": _depth,
    "greedy": _greedy,
    "random": _random,
    "no_op_only": _no_op_only,
    "max_params": _max_params,
    "evolutionary": _evolutionary,
    "policy_gradient": _policy_gradient,
}
