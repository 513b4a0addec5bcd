"""Limits of the champion's rule: how much worse than the champion a challenger may be, and where.

A limit is kept when that is shown: the one-sided upper bound of how much worse the challenger is, paired and over
documents, lies within what is allowed (a test of non-inferiority). Too little text does not show it, and the champion
stays. So the error that is controlled is to crown a challenger that is in truth worse than allowed.

A challenger must keep all limits and be better on the whole. Whichever of these fails in truth, its own test would have
to err, so several limits need no further correction (an intersection-union test). Several challengers do: the
confidence of each is that of its look.
"""

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from torch import Tensor

from blocks import estimates
from blocks.errors import DamagedBlock, PuzzleError, TooLittleText
from blocks.export_code.modeling_decilm import DeciLMForCausalLM
from blocks.records import CorpusInfo, Looping, Metric, ParentInfo, Value
from profiles.schema import GENERAL, Champion, ProbeLimits, Profile
from tasks.distill.record import open_parent
from tasks.evaluate.compare import Contender, Lineage, figures_of, served, targets_of
from tasks.evaluate.loops import looping_of
from tasks.evaluate.quality import mean_metric
from tasks.evaluate.typed_file import as_served, with_file
from tasks.inputs.corpus import documents_of
from tasks.inputs.precision import child_dtype
from tasks.probe.records import Asked
from tasks.probe.sides import SeenText
from tasks.probe.texts import Text, texts_at_hand
from tasks.running.workers import compute_of

CHAMPION = 1  # where there are two sides: the challenger comes first
UNITS = {"kl": "nats", "loss": "nats", "top1_agreement": "of the tokens"}


class LostChampion(PuzzleError):
    """What the champion is made of is not there any more, or damaged: nobody can compare it."""


class Limit(Value):
    """A limit that was looked at. worse: of the challenger, paired; below 0 where it is better. most: what is allowed.
    bound: the upper bound of `worse`; None where a single document shows no error.
    """

    name: str
    most: float
    worse: Metric
    bound: float | None
    unit: str

    @property
    def kept(self) -> bool:
        """Whether the challenger is certainly not worse than allowed."""
        return self.bound is not None and self.bound <= self.most

    @property
    def state(self) -> str:
        """Broken, where the figure itself is above what is allowed; not shown, where its bound alone is."""
        return "kept" if self.kept else "broken" if self.worse.value > self.most else "not shown"

    @property
    def figures(self) -> dict[str, float]:
        """As metrics."""
        name = f"champion/{self.name.replace(' ', '_')}_worse"
        bound = {} if self.bound is None else {f"{name}_bound": self.bound}
        return {name: self.worse.value, f"{name}_se": self.worse.se, **bound}

    def __str__(self) -> str:
        bound = "no error known" if self.bound is None else f"upper bound {self.bound:.3g}"
        worse = f"worse by {estimates.rounded(self.worse)} {self.unit}"
        return f"{self.name} {self.state} ({worse}, {bound}, {self.most:g} allowed)"


@dataclass(frozen=True, kw_only=True)
class JudgedText:
    """The first test sequences of a text, on which champion and challenger are compared. most: how much worse the
    challenger may be there; None: any.
    """

    corpus: CorpusInfo
    sequences: int
    documents: Sequence[Hashable]
    most: float | None


def has_limits(rule: Champion) -> bool:
    """Whether the rule looks at more than the whole."""
    return bool(rule.not_worse or rule.max_more_loops is not None or rule.not_worse_probed != ProbeLimits())


def limit(name: str, worse: Metric, most: float, confidence: float, unit: str, is_share: bool = False) -> Limit:
    """What a paired difference says of a limit. is_share: it is a share of the documents, above 0 in none or below in
    none.

    Such a share hardly spreads where few differ, and its spread would say that more cannot loop. So its bound is no
    less than the exact one (Clopper and Pearson), over documents.
    """
    bound = estimates.upper_bound(worse, confidence)
    if is_share:
        bound = max(bound, estimates.exact_upper_bound(max(0.0, worse.value), worse.n, confidence))
    return Limit(name=name, most=most, worse=worse, bound=bound if worse.n > 1 else None, unit=unit)


def gains(ours: Tensor, theirs: Tensor, metric: str) -> Tensor:
    """(S,) by how much the challenger is better on each sequence."""
    return ours - theirs if metric == "top1_agreement" else theirs - ours


def loops_limit(ours: Looping, theirs: Looping, most: float, confidence: float) -> Limit:
    """By how much the challenger's share of answers that loop exceeds the champion's, beginning by beginning."""
    each = np.subtract(ours.loops, theirs.loops)
    one_way = not ((each > 0).any() and (each < 0).any())
    worse = estimates.mean(each, ours.documents).metric
    return limit("looping answers", worse, most, confidence, "of the answers", is_share=one_way)


def judged_texts(
    profile: Profile, parent: ParentInfo, corpus: CorpusInfo, capabilities: Sequence[CorpusInfo], workspace: Path
) -> dict[str, JudgedText]:
    """All text that the rule looks at, the corpus first. PuzzleError where the text of a limit could never show that it
    is kept.
    """
    rule, own = profile.champion, {one.capability: one for one in capabilities}
    found = {GENERAL: _judged(corpus, profile.evaluate.sequences, rule.not_worse.get(GENERAL), workspace)}
    for name, most in rule.not_worse.items():
        if name != GENERAL:
            found[name] = _judged(own[name], own[name].test_sequences, most, workspace)
    probed = rule.not_worse_probed.model_dump(exclude_none=True)
    seen = SeenText(workspace=workspace, parent=parent, texts=(corpus, *capabilities))
    for one in _probed(profile, seen, probed):
        found[f"probe-{one.name}"] = JudgedText(  # no capability has a - in its name
            corpus=one.corpus, sequences=one.sequences, documents=one.documents, most=probed[one.name]
        )
    counted = _judged(corpus, corpus.test_sequences, rule.max_more_loops, workspace)
    for name, text in [*((f"not_worse.{name}", text) for name, text in found.items()), ("max_more_loops", counted)]:
        if text.most is not None and len(set(text.documents or range(text.sequences))) == 1:
            raise PuzzleError(
                f"champion.{name}: the test text is of a single document, which shows no error, so no challenger could "
                "be shown to keep the limit: ask for more test sequences, or leave it out."
            )
    return found


def _judged(corpus: CorpusInfo, sequences: int, most: float | None, workspace: Path) -> JudgedText:
    documents = documents_of(corpus, "test", workspace)[:sequences]
    return JudgedText(corpus=corpus, sequences=sequences, documents=documents, most=most)


def _probed(profile: Profile, seen: SeenText, names: Collection[str]) -> tuple[Text, ...]:
    try:
        return texts_at_hand(seen, names, Asked(sequences=profile.evaluate.sequences)) if names else ()
    except TooLittleText as error:
        raise TooLittleText(
            "champion.not_worse_probed.python: too little of it is left, since what the run's texts hold is left out: "
            f"lower evaluate.sequences, or leave the limit out. {error}"
        ) from error


def figures_of_both(
    sides: Sequence[Lineage], texts: Mapping[str, JudgedText], now: Lineage, profile: Profile, workspace: Path
) -> list[dict[str, Tensor]]:
    """For each side, by text, (S,) of the rule's metric against the parent of now."""
    compute = compute_of(profile)
    reader = open_parent(workspace / now.parent.folder, compute)
    parent, dtype = reader.model(), child_dtype(profile.hardware, reader)
    targets = {
        name: targets_of(parent, "test", text.sequences, text.corpus, workspace, compute)
        for name, text in texts.items()
    }
    del parent
    found = []
    for number, side in enumerate(sides):
        with missed(number):
            child = served_as_now(side, profile, workspace)

            @cache
            def model(child: Contender = child, side: Lineage = side) -> DeciLMForCausalLM:
                return served(child, reading(side, now), workspace, compute, dtype)

            figures = {name: figures_of(child, each, workspace, compute, model) for name, each in targets.items()}
            found.append({name: each[profile.champion.metric] for name, each in figures.items()})
    return found


def reading(side: Lineage, now: Lineage) -> ParentInfo:
    """A side's parent as it reads the texts of now: the same parent may have known other images before."""
    return now.parent if side.parent.fingerprint == now.parent.fingerprint else side.parent


@contextmanager
def missed(side: int) -> Iterator[None]:
    """What is damaged is the champion's loss only where it is the champion's; else DamagedBlock stands."""
    try:
        yield
    except DamagedBlock as error:
        if side == CHAMPION:
            raise LostChampion(str(error)) from error
        raise


def served_as_now(side: Lineage, profile: Profile, workspace: Path) -> Contender:
    """A side's child with today's KV cache and precision: else the figures of both would be of two kinds."""
    child = as_served(side.child, profile.hardware)
    return with_file(child, side.parent, side.corpus, profile.hardware.precision, workspace)


def limits_of(
    sides: Sequence[Lineage],
    figures: Sequence[Mapping[str, Tensor]],
    texts: Mapping[str, JudgedText],
    profile: Profile,
    workspace: Path,
    confidence: float,
) -> tuple[Limit, ...]:
    """Every limit of the rule. sides, figures: the challenger's, then the champion's."""
    (ours, theirs), rule, found = figures, profile.champion, []
    for name, text in texts.items():
        if text.most is not None:
            worse = mean_metric(-gains(ours[name], theirs[name], rule.metric), text.documents)
            found.append(limit(f"{rule.metric} on {name}", worse, text.most, confidence, UNITS[rule.metric]))
    if rule.max_more_loops is not None:
        how = (profile.evaluate, workspace, compute_of(profile))
        loops = []
        for number, side in enumerate(sides):
            with missed(number):
                child = served_as_now(side, profile, workspace)
                loops.append(looping_of(child, (reading(side, sides[0]), sides[0].corpus), *how))
        found.append(loops_limit(loops[0], loops[CHAMPION], rule.max_more_loops, confidence))
    return tuple(found)
