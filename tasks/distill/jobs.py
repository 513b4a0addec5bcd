"""The BLD jobs of a profile: one for every (layer, subblock, variant) of its search space, then the coupled ones."""

from collections.abc import Sequence

from blocks.kinds import kind_of, parse_labels
from blocks.parent import Parent
from blocks.records import SUBBLOCKS, BlockRecord, LayerChoice, LayerRecord
from profiles.schema import Profile
from tasks.distill.bld import Job
from tasks.distill.record import Recording
from tasks.inputs.space import layers_of, refused, refused_alone


def jobs_of(profile: Profile, recording: Recording, records: Sequence[LayerRecord], reader: Parent) -> list[Job]:
    """A job for every (layer, subblock, variant) of the search space but the parent's own, and two where the profile
    compares starts: `better_of` takes one.
    """
    jobs = []
    for layer in layers_of(profile, reader):
        for subblock in SUBBLOCKS:
            for variant in parse_labels(subblock, getattr(profile.search_space, subblock), reader.config)[1:]:
                if refused_alone(profile, reader.config, layer, subblock, variant.label):
                    continue  # the target engine cannot run it, so it is not trained, not scored and never chosen
                settings = profile.bld_of(variant.label)
                starts = [settings.closed_form]
                if settings.closed_form == "compare":
                    starts = [True, False] if kind_of(variant).closed_form_may_lose else [True]
                jobs += [
                    Job(
                        recording=recording,
                        record=records[layer],
                        layer=layer,
                        subblock=subblock,
                        variant=variant.label,
                        settings=settings.model_copy(update={"closed_form": start}),
                        seed=profile.seed,
                    )
                    for start in starts
                ]
    return jobs


def better_of(blocks: Sequence[BlockRecord]) -> list[BlockRecord]:
    """Of blocks of one variant in one layer, the one with the lowest loss on held-out text."""
    best: dict[tuple[int, str, str], BlockRecord] = {}
    for block in blocks:
        other = best.setdefault((block.layer, block.subblock, block.variant), block)
        if block.nmse_after is not None and (other.nmse_after is None or block.nmse_after < other.nmse_after):
            best[block.layer, block.subblock, block.variant] = block
    return list(best.values())


def coupled_jobs(profile: Profile, jobs: Sequence[Job], blocks: Sequence[BlockRecord], reader: Parent) -> list[Job]:
    """Jobs of the second stage: whole blocks of the reduced space, which start from the trained subblocks."""
    settings = profile.bld
    trained = {(block.layer, block.subblock, block.variant): block for block in blocks if block.status == "trained"}
    spaces = {part: parse_labels(part, getattr(settings, f"coupled_{part}"), reader.config) for part in SUBBLOCKS}
    coupled = []
    for layer in sorted({job.layer for job in jobs}):
        template = next(job for job in jobs if job.layer == layer)
        start = template.settings.closed_form
        for attention in spaces["attention"]:
            for ffn in spaces["ffn"]:
                if not (kind_of(attention).trainable or kind_of(ffn).trainable):
                    continue  # nothing to train: the sum of the two subblocks' scores stands
                if refused(profile, reader.config, layer, attention.label, ffn.label):
                    continue
                starts = [trained.get((layer, v.subblock, v.label)) for v in (attention, ffn)]
                coupled.append(
                    template.model_copy(
                        update={
                            "subblock": "block",
                            "settings": profile.bld_of("").model_copy(update={"closed_form": start}),
                            "variant": LayerChoice(attention=attention.label, ffn=ffn.label).block_label,
                            "warm_start": tuple(start for start in starts if start is not None),
                        }
                    )
                )
    return coupled
