"""The program of a problem at given batch sizes, with the way back to a choice per layer: for searches without the MIP.

It is the same program that the MIP solves (tasks/search/cases.py), except for limits on block types and on the KL of
capabilities: simple searches keep what the child may cost. A slot
is one subblock of a layer; where coupled blocks were scored, or when asked, it is the whole layer, and its options are
pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from blocks.errors import PuzzleError
from blocks.records import LayerChoice
from tasks.search.capabilities import Capabilities
from tasks.search.cases import case_at
from tasks.search.joint import HEAD, Option
from tasks.search.program import Floats, Integers, Program
from tasks.search.request import allowed, check
from tasks.search.totals import Batches, Problem, batch_choices
from tasks.search.view import library_of, request_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """options: N of them, slot after slot, as the program has them. parameters: (N,)."""

    batches: Batches
    options: tuple[Option, ...]
    program: Program
    parameters: Floats

    @property
    def starts(self) -> Integers:
        """(S,) index of the first option of every slot."""
        return self.program.starts

    @property
    def scores(self) -> Floats:
        """(N,)."""
        return self.program.scores

    @property
    def usage(self) -> Floats:
        """(R, N) what an option takes of every limit; a whole limit is 1."""
        return self.program.usage

    def choice(self, selection: Integers) -> tuple[LayerChoice, ...]:
        """The choice per layer behind the selected option indices, (S,)."""
        chosen: dict[int, dict[str, Any]] = {}
        for option in (self.options[index] for index in selection):
            chosen.setdefault(option.layer, {}).update(option.choice)
        return tuple(LayerChoice(**chosen[layer]) for layer in sorted(chosen))

    def selection(self, layers: Sequence[LayerChoice]) -> Integers | None:
        """The option indices, (S,), of a choice per layer; None when a slot does not have what it asks for."""
        places = {(o.layer, o.attention, o.ffn, o.coupled): index for index, o in enumerate(self.options)}
        found = []
        for option in (self.options[start] for start in self.starts):
            choice = layers[option.layer]
            pair = (option.attention and choice.attention, option.ffn and choice.ffn)
            found.append(places.get((option.layer, *pair, choice.coupled)))
        return None if None in found else np.array(found, dtype=np.int64)


def make_grid(problem: Problem, batches: Batches, joint: bool = False) -> Grid:
    """The program at these batch sizes. `joint`: a slot is always a layer."""
    return grids_of(problem, [batches], joint)[0]


def grids_of(problem: Problem, places: Sequence[Batches] | None = None, joint: bool = False) -> list[Grid]:
    """A grid per combination of batch sizes; all of them, larger ones first, where none are named."""
    library = library_of(problem, additive=not joint)
    if HEAD in library.layers:
        raise PuzzleError(
            "this search knows no types of number, and the library has them: leave out search_space.precision."
        )
    free = problem.search.model_copy(update={"max_block_types": None})
    request = request_of(replace(problem, capabilities=Capabilities(weights=problem.capabilities.weights)), search=free)
    check(library, request)
    kept = allowed(library, request)
    index = {(place.scenario, place.batch_size): at for at, place in enumerate(library.places)}
    names = [scenario.name for scenario in problem.scenarios]
    found = []
    for batches in batch_choices(problem) if places is None else places:
        combination = tuple(index[item] for item in zip(names, batches, strict=True))
        found.append(
            Grid(
                batches=batches,
                options=tuple(option for at in kept if (option := library.options[at].own) is not None),
                program=case_at(library, request, kept, combination).program,
                parameters=library.column("parameters", 0)[kept],
            )
        )
    return found
