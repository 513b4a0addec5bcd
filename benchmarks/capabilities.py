"""Floors under capabilities, and children specialised in one, all at the same budget and from one block library.

    .venv/bin/python -m benchmarks.capabilities --workspace /tmp/capabilities     # an hour or more of two cores

`puzzle optimize` runs once per child on benchmarks/capabilities.yaml. The first run makes the library, and the others
choose from it: nothing is trained anew. Figures are of test text that no stage saw, and are read from the run's report.

A floor is a highest KL on one capability. It is set between what was predicted for the child without floors, which so
breaks it, and for the child that is specialised in the capability, which is the least that the budget allows. The
search itself gets a lower limit where the child would pass it (tasks/evaluate/floors.py). Whether the finished child
keeps the floor on test text is judged by a one-sided bound over documents.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import ROOT, arguments, last_report, optimize, table, write_page
from blocks.estimates import lower_bound, rounded, upper_bound
from blocks.records import Candidate, ChildReport, LimitKept
from profiles.load import load_profile
from profiles.schema import GENERAL
from tasks.evaluate.standing import Reading, difference, of_sequences, on_capability

PROFILE = "benchmarks/capabilities.yaml"
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Run:
    """One `puzzle optimize`: its report."""

    report: ChildReport

    @property
    def child(self) -> Candidate:
        """The finished child: reports have it second, after the parent."""
        return self.report.candidates[1]

    def baseline(self, capability: str) -> Candidate | None:
        """The baseline that is nearest to the parent on a capability; None where none keeps the budget."""
        others = [one for one in self.report.candidates[2:] if one.name != self.child.name]
        return min(others, key=lambda one: reading(one, capability).metric.value, default=None)

    @property
    def floor(self) -> LimitKept:
        """The floor of a run that has one."""
        return next(limit for limit in self.child.limits if limit.name.startswith("max_kl"))


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where runs are made, and of what. capabilities: those with text of their own. shares: where floors lie
    between the KL that is predicted for the specialised child (0) and for the general one (1).
    """

    profile: str
    settings: Sequence[str]
    workspace: Path
    capabilities: tuple[str, ...]
    shares: Sequence[float]

    def run(self, counted: str, *more: str) -> Run | None:
        """A child that is chosen by one capability alone; None where nothing keeps what is asked."""
        weights = [f"capabilities.{name}.weight={float(name == counted)}" for name in self.capabilities]
        weights += [f"capabilities.{GENERAL}={{weight: {float(counted == GENERAL)}}}"]
        if optimize(self.profile, self.workspace, (*self.settings, *weights, *more)):
            return None  # the sentence that it printed says what would have to give
        return Run(report=last_report(self.workspace))


def reading(candidate: Candidate, capability: str, figure: str = "kl") -> Reading:
    """A figure of a model on the test text of a capability, with its values by document."""
    found = of_sequences(candidate, figure) if capability == GENERAL else on_capability(candidate, capability, figure)
    assert found is not None, "every model of a run is judged on every text"
    return found


def kl(candidate: Candidate | None, capability: str) -> str:
    """KL with its error over documents."""
    return "-" if candidate is None else rounded(reading(candidate, capability).metric)


def beside(candidate: Candidate | None, other: Candidate, capability: str, figure: str = "kl") -> str:
    """How much more a model has than another, document by document."""
    if candidate is None:
        return "-"
    found = difference(reading(candidate, capability, figure), reading(other, capability, figure))
    return ("+" if found.value > 0 else "") + rounded(found)


def predicted(run: Run, capability: str) -> float:
    """The sum of scores of the chosen child on a capability."""
    found = next(one for one in run.report.candidates if one.name == "child" and one.stage == "assembled")
    value = found.capabilities[capability].predicted_kl
    assert value is not None, "the child is a choice from the library"
    return value


def floors(bench: Bench, free: Run, alone: Mapping[str, Run]) -> list[str]:
    """Children with a floor under one capability each, beside the child without."""
    rows, broken, kept, fitting, asked = [], 0, 0, 0, 0
    for capability in bench.capabilities:
        least, most_of_all = predicted(alone[capability], capability), predicted(free, capability)
        for share in bench.shares:
            most = float(f"{least + share * (most_of_all - least):.4g}")
            found = bench.run(GENERAL, f"capabilities.{capability}.max_kl={most}")
            without, asked = reading(free.child, capability).metric, asked + 1
            broken += lower_bound(without, CONFIDENCE) > most
            if found is None:
                rows.append([capability, most, "nothing fits", "", "", "", rounded(without), "", ""])
                continue
            held = found.floor.measured
            assert held is not None, "a report has what was measured on test text"
            kept, fitting = kept + (upper_bound(held, CONFIDENCE) <= most), fitting + 1
            rows.append(
                [
                    capability,
                    most,
                    f"{found.report.floors[0].limit:.3g}",
                    f"{found.floor.got:.3g}",
                    rounded(held),
                    f"{upper_bound(held, CONFIDENCE):.3g}",
                    rounded(without),
                    kl(found.baseline(capability), capability),
                    beside(found.child, free.child, GENERAL),
                ]
            )
    header = [
        "floor on",
        "asked",
        "of the search",
        "predicted",
        "measured",
        "at most, for 95 %",
        "without floor",
        "best baseline",
    ]
    return [
        f"All children are chosen by their score on the corpus. Without a floor the child is above the limit in "
        f"{broken} of {asked} cases. {fitting} of the floors can be kept within the budget, and with them the child is "
        f"below the limit in {kept} cases. Above and below are by a one-sided bound of {CONFIDENCE:.0%} over "
        "documents of test text. *asked*: the highest KL, in nats per token. *of the search*: its limit on the sum of "
        "scores, after the chosen children were measured on other text. *predicted*: the sum of scores. "
        "*without floor*, *best baseline*: measured on the same text; baselines know no floors. *price*: "
        "KL on the corpus, more than without the floor, paired by document. The parent's KL is 0.",
        table([*header, "price"], rows),
    ]


def specialised(bench: Bench, free: Run, alone: Mapping[str, Run]) -> list[str]:
    """For each capability the child that is chosen by it alone, beside the child that is chosen by the corpus."""
    parts = [
        "A specialised child is chosen by its score on one capability alone, the general child by that on the corpus, "
        "both within the same budget. KL and loss in nats per token. *more*: than the general child has, paired by "
        "document, so a figure below 0 is better. Baselines are searched by the same scores as the specialised child."
    ]
    for capability in bench.capabilities:
        found = alone[capability]
        parent, baseline = free.report.candidates[0], found.baseline(capability)
        models = {"parent": parent, "general": free.child, f"for {capability}": found.child}
        models |= {f"baseline {baseline.name}": baseline} if baseline else {}
        own = [
            [
                name,
                kl(one, capability),
                beside(one, free.child, capability),
                rounded(reading(one, capability, "loss").metric),
                beside(one, free.child, capability, "loss"),
            ]
            for name, one in models.items()
        ]
        elsewhere = [
            [other, kl(free.child, other), kl(found.child, other), beside(found.child, free.child, other)]
            for other in (GENERAL, *bench.capabilities)
            if other != capability
        ]
        parts += [
            f"### {capability}",
            table([f"on {capability}", "KL", "more", "loss", "more"], own),
            "What it lost elsewhere:",
            table(["KL on", "general", f"for {capability}", "more"], elsewhere),
        ]
    return parts


def text_of(free: Run, bench: Bench) -> str:
    """What was measured on how much."""
    counts = {GENERAL: reading(free.child, GENERAL), **{one: reading(free.child, one) for one in bench.capabilities}}
    told = ", ".join(f"{name} {found.metric.n}" for name, found in counts.items())
    budget = ", ".join(f"{limit.name} {limit.asked:g}" for limit in free.child.limits)
    return (
        f"{free.report.parent.name}; budget: {budget}. Blocks and children as in `{bench.profile}`"
        f"{'' if free.child.gkd_tokens else ', without GKD'}. Errors are over documents of test text: {told} of them."
    )


def options_of() -> argparse.Namespace:
    """The command's options."""
    parser = arguments(__doc__ or "")
    parser.set_defaults(profile=PROFILE)
    parser.add_argument("--floors", type=float, nargs="+", default=[0.6, 0.3], help="places of floors")
    return parser.parse_args()


def main() -> None:
    """Run, compare, write the page."""
    options = options_of()
    profile = load_profile(options.profile, options.set)
    workspace = (options.workspace or ROOT / "workspace" / profile.name).resolve()
    own = tuple(profile.own_capabilities)
    bench = Bench(
        profile=options.profile, settings=options.set, workspace=workspace, capabilities=own, shares=options.floors
    )
    free, *others = (bench.run(name) for name in (GENERAL, *own))
    alone = {name: run for name, run in zip(own, others, strict=True) if run is not None}
    assert free is not None and len(alone) == len(own), "the profile's budget can be kept"
    parts = [
        text_of(free, bench),
        "## A floor",
        *floors(bench, free, alone),
        "## Specialised against general",
        *specialised(bench, free, alone),
    ]
    name = "capabilities" if options.profile == PROFILE else f"capabilities_{profile.name}"
    write_page(name, "Capabilities: floors, and children for one alone", parts)


if __name__ == "__main__":
    main()
