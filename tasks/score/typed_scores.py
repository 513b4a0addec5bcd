"""Scores of variants in types of number, from few that are measured.

    S(v in t) = S(v) + f(t) x share(v) x S(parent's block in t)

share: parameters that the variant keeps of its subblock. f: one factor per type, fitted to the KL of the whole parent
in that type, since sums of quantisation scores overshoot for few bits. Where a variant was itself scored in a type, its
own figure takes the place of the product. Embedding and head are scored on the whole model.

q8_0 beside a type that hurts the whole parent far more (`fine_types`) is not scored block by block: its score of a
block is the coarsest type's, times an f of its own. What this misses is small beside any other figure of a choice.

All of this holds on each text by itself, so a capability has factors of its own. What is rounded is fitted to the
corpus, whatever it is scored on.
"""

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blocks.child import library_of
from blocks.compute import HOST
from blocks.estimates import mean
from blocks.export_code.modeling_decilm import final_logits
from blocks.images import as_words
from blocks.library import digest_of, keep, read_rows, remember
from blocks.records import SUBBLOCKS, BlockRecord, CorpusInfo, CostTable, LayerRecord, ParentInfo, Score, Value
from blocks.typed_labels import FITTED_TO, bare, type_in, typed
from profiles.schema import Profile
from tasks.distill.record import open_parent
from tasks.export.quantise import Recipe, quantise_layers, token_divergences
from tasks.gguf.writer import CORRECTED
from tasks.inputs.corpus import weights_of
from tasks.score.rounding import in_type
from tasks.score.scoring import ScoringSet
from tasks.search.capabilities import METRICS
from tasks.search.choose import choose
from tasks.search.totals import problem_of

VERSION = 1
LEAST, MOST = 0.05, 2.0  # of a factor: beyond, the KL of the whole model says more of chance than of the type
FINE = 0.05  # of the coarsest type's KL of the whole parent, on every text: below, q8_0 is not scored by blocks
Place = tuple[int, str, str]  # layer, subblock, variant


class WholeScore(Value):
    """The whole parent in types of number: KL and rise of the LM loss on every scored sequence, in nats per token."""

    kl: tuple[float, ...]
    lm_loss: tuple[float, ...]


def whole_key(text: ScoringSet, parent: ParentInfo, recipe: Recipe) -> str:
    """Digest of all that the score of the parent in a recipe depends on."""
    return digest_of(
        **({"weighted": True} if text.corpus.weighted else {}),
        **({"fitted_to": text.fitted_to.fingerprint} if text.capability else {}),
        parent=parent.fingerprint,
        corpus=text.corpus.fingerprint,
        sequences=[text.count, text.length],
        recipe=[recipe.layers, recipe.head],
        fitted=FITTED_TO,
        v=VERSION,
    )


def _path(text: ScoringSet, parent: ParentInfo, recipe: Recipe, workspace: Path) -> Path:
    return workspace / "scores" / f"{whole_key(text, parent, recipe)}.json"


def stored_whole(text: ScoringSet, parent: ParentInfo, recipe: Recipe, workspace: Path) -> WholeScore | None:
    """The score of the parent in a recipe on a text, if it was measured."""
    return remember(_path(text, parent, recipe, workspace), WholeScore, lambda _: [], workspace)


@torch.no_grad()
def score_whole(texts: Sequence[ScoringSet], parent: ParentInfo, recipe: Recipe, workspace: Path) -> list[WholeScore]:
    """Score the whole parent in a recipe on every text; it is rounded once for those whose scores are not stored."""
    found = {text: stored_whole(text, parent, recipe, workspace) for text in texts}
    missing = [text for text, score in found.items() if score is None]
    if missing:
        model: Any = open_parent(workspace / parent.folder, HOST).model()
        head, before = deepcopy(model.lm_head), [list(_states(model, text, workspace)) for text in missing]
        corpus = missing[0].fitted_to
        train = read_rows(workspace, corpus.tokens, "train", 0, min(FITTED_TO, corpus.train_sequences)).long()
        quantise_layers(model, train, recipe)
        for text, states in zip(missing, before, strict=True):
            found[text] = score = _compared(model, head, states, text, workspace)
            keep(_path(text, parent, recipe, workspace), score, [], workspace)
    return [score for score in found.values() if score is not None]


def _states(model: Any, text: ScoringSet, workspace: Path) -> Iterator[Tensor]:
    """(1, T, D) that enter the head, a sequence after the other."""
    for one in text.validation(text.corpus.tokens, workspace).long():
        yield model.model(one.unsqueeze(0), use_cache=False).last_hidden_state


def _compared(model: Any, head: Any, before: Sequence[Tensor], text: ScoringSet, workspace: Path) -> WholeScore:
    """A rounded model beside the states and the head that it had before; log-probabilities a sequence at a time."""
    tokens = text.validation(text.corpus.tokens, workspace).long()
    known = weights_of(text.corpus, "validation", workspace, (text.first, text.first + text.count))
    weights = torch.ones(tokens.shape) if known is None else known[:, : text.length]
    kl, rises = [], []
    for states, now, one, w in zip(before, _states(model, text, workspace), tokens, weights, strict=True):
        p, q = (
            final_logits(model.config, own(hidden))[0].log_softmax(-1)
            for own, hidden in ((head, states), (model.lm_head, now))
        )
        kl.append(float((token_divergences([p], [q])[0] * w).mean()))
        rises.append(float(((p[:-1] - q[:-1]).gather(1, as_words(one[1:, None], p.shape[-1]))[:, 0] * w[:-1]).mean()))
    return WholeScore(kl=tuple(kl), lm_loss=tuple(rises))


def recipes(depth: int, kinds: Sequence[str], heads: Sequence[str]) -> dict[str, Recipe]:
    """What of the whole parent is scored: every type in all layers, and every type of the head, by label."""
    whole = {typed("whole", kind): Recipe.uniform(kind, depth) for kind in kinds}
    return whole | {typed("head", kind): Recipe(layers=(("", ""),) * depth, head=kind) for kind in heads}


def parents_in_types(
    parent: ParentInfo, corpus: CorpusInfo, records: Sequence[LayerRecord], kinds: Sequence[str]
) -> list[BlockRecord]:
    """The parent's own blocks in every type, as what is scored. records: what they are fitted to, layer by layer."""
    states = [record.boundary.sha256 if record.boundary else "" for record in records]
    return [
        in_type(
            BlockRecord(
                key=digest_of(
                    parent=parent.fingerprint,
                    corpus=corpus.fingerprint,
                    states=states[layer],
                    layer=layer,
                    subblock=subblock,
                ),
                layer=layer,
                subblock=subblock,
                variant="parent",
                status="free",
            ),
            kind,
        )
        for layer in range(len(records))
        for subblock in SUBBLOCKS
        for kind in kinds
    ]


def scores_in_types(
    scores: Sequence[Score],
    measured: Sequence[Score],
    whole: Mapping[str, Mapping[str, WholeScore]],
    costs: CostTable,
) -> list[Score]:
    """All scores: those of `scores`, of every variant in every type that it was measured in, and of the head.

    measured: the parent's blocks in every type but the fine ones, and variants that were scored in a type themselves.
    whole: by text, "" for the corpus first, and then the name of each capability; all scores have them in this order.
    """
    each = [
        _in_types([_seen(one, text) for one in scores], [_seen(one, text) for one in measured], own, costs)
        for text, own in whole.items()
    ]
    return [
        first.model_copy(
            update={"capabilities": tuple(one.on(text) for text, one in zip(list(whole)[1:], others, strict=True))}
        )
        for first, *others in zip(*each, strict=True)
    ]


def _seen(score: Score, text: str) -> Score:
    """The same block's score on one text alone."""
    own = {one.name: one for one in score.capabilities}[text].model_dump(exclude={"name"}) if text else {}
    return score.model_copy(update={**own, "capabilities": ()})


def _in_types(
    scores: Sequence[Score], measured: Sequence[Score], whole: Mapping[str, WholeScore], costs: CostTable
) -> list[Score]:
    """See `scores_in_types`, on one text."""
    by_place: dict[Place, Score] = {(one.layer, one.subblock, one.variant): one for one in measured}
    known = {type_in(one.variant) for one in measured if bare(one.variant) == "parent"}
    kinds = [type_in(label) for label in whole if bare(label) == "whole"]
    like = {kind: kind if kind in known else coarsest(whole, known) for kind in kinds}
    factors = {kind: _factor(kind, like[kind], measured, whole) for kind in kinds}
    sizes: dict[tuple[str, str], int] = {(cost.subblock, cost.variant): cost.parameters for cost in costs.costs}
    heads = [_of_head(label, score, measured[0]) for label, score in whole.items() if bare(label) == "head"]
    parents = [
        _sum(part, typed("parent", kind), [(factors[kind], part)])
        for kind in kinds
        for part in measured
        if part.variant == typed("parent", like[kind])
    ]
    variants = []
    for score in scores:
        for kind in kinds if score.variant != "no_op" else ():
            label, factor = typed(score.variant, kind), factors[kind]
            own = by_place.get((score.layer, score.subblock, label))
            part = by_place.get((score.layer, score.subblock, typed("parent", like[kind])))
            if own is not None:
                variants.append(_sum(score, label, [(1.0, score), (factor, own), (-factor, score)]))
            elif part is not None and (score.subblock, score.variant) in sizes:
                share = sizes[score.subblock, score.variant] / sizes[score.subblock, "parent"]
                variants.append(_sum(score, label, [(1.0, score), (factor * share, part)]))
    return [*scores, *parents, *variants, *heads]


def _kl(kind: str, whole: Mapping[str, WholeScore]) -> float:
    """KL of the whole parent in a type."""
    found = whole[typed("whole", kind)].kl
    return math.fsum(found) / len(found)


def coarsest(whole: Mapping[str, WholeScore], among: Container[str] | None = None) -> str:
    """The type that hurts the whole parent most on a text; among these types, or all."""
    kinds = [type_in(label) for label in whole if bare(label) == "whole"]
    return max((kind for kind in kinds if among is None or kind in among), key=lambda kind: _kl(kind, whole))


def fine_types(whole: Mapping[str, Mapping[str, WholeScore]]) -> frozenset[str]:
    """Types that are not scored block by block: they hurt the whole parent little on every text, beside the type that
    hurts it most on the corpus. whole: as in `scores_in_types`.

    Types of 4 and 5 bits are always scored: a parent may lie on their grid, and its narrower blocks do not.
    """
    scored = [label for label in whole[""] if bare(label) == "whole"]
    kinds, most = [type_in(label) for label in scored if type_in(label) not in CORRECTED], coarsest(whole[""])
    return frozenset(
        kind
        for kind in kinds
        if all(_kl(kind, own) <= FINE * _kl(most, own) for own in whole.values()) and kind != most
    )


def _factor(kind: str, like: str, measured: Sequence[Score], whole: Mapping[str, WholeScore]) -> float:
    """True KL of the whole parent in a type over the sum of its blocks' scores in a type that was scored by blocks."""
    summed = math.fsum(score.kl for score in measured if score.variant == typed("parent", like))
    if summed <= 0:
        return 1.0
    found = min(_kl(kind, whole) / summed, MOST)
    return max(found, LEAST) if kind == like else max(found, 0.0)


def _of_head(label: str, whole: WholeScore, like: Score) -> Score:
    empty = dict.fromkeys((f"{metric}_per_sequence" for metric in METRICS), (0.0,) * len(whole.kl))
    base = like.model_copy(update={"layer": 0, "subblock": "head", **empty})
    return _with_figures(base, label, {"kl": whole.kl, "lm_loss": whole.lm_loss})


def _sum(like: Score, label: str, parts: Sequence[tuple[float, Score]]) -> Score:
    """A score of the same place whose figures on every sequence are a weighted sum."""
    figures = {
        metric: tuple(
            math.fsum(weight * value for (weight, _), value in zip(parts, values, strict=True))
            for values in zip(*(getattr(score, f"{metric}_per_sequence") for _, score in parts), strict=True)
        )
        for metric in METRICS
    }
    return _with_figures(like, label, figures)


def _with_figures(like: Score, label: str, figures: Mapping[str, tuple[float, ...]]) -> Score:
    update: dict[str, Any] = {"variant": label}
    for metric, values in figures.items():
        estimate = mean(values, like.documents)
        update |= {f"{metric}_per_sequence": values, metric: estimate.value, f"{metric}_se": estimate.error}
    return like.model_copy(update=update)


def to_measure(
    layers: Sequence[Any],
    blocks: Mapping[tuple[int, str, str], BlockRecord],
    known: Sequence[Score],
    fine: Container[str] = (),
) -> list[BlockRecord]:
    """The chosen variants in types that nobody scored in their type yet; fine types are left out."""
    there = {(one.layer, one.subblock, one.variant) for one in known}
    found = []
    for layer, choice in enumerate(layers):
        for subblock in SUBBLOCKS:
            label = getattr(choice, subblock)
            record = blocks.get((layer, subblock, bare(label)))
            kind = type_in(label)
            if kind and kind not in fine and record is not None and (layer, subblock, label) not in there:
                found.append(in_type(record, kind))
    return found


def settled(
    profile: Profile,
    scores: Sequence[Score],
    parents: Sequence[Score],
    whole: Mapping[str, Mapping[str, WholeScore]],
    costs: CostTable,
    blocks: Sequence[BlockRecord],
    measure: Callable[[list[BlockRecord]], list[Score]],
) -> list[Score]:
    """All scores, those of the chosen variants measured: choose, score what was chosen in its type, choose again.

    parents: scores of the parent's blocks in every type but the fine ones. It ends when the choice holds no product of
    the other types any more.
    """
    measured, library, fine = list(parents), library_of(list(blocks)), fine_types(whole)
    while True:
        found = scores_in_types(scores, measured, whole, costs)
        missing = to_measure(choose(problem_of(profile, found, costs)).layers, library, measured, fine)
        more = measure(missing) if missing else []
        if not more:
            return found
        measured += more
