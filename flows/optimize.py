"""Flow `optimize`: a profile in, a measured child out. Reads like the paper: record, BLD, measure, score, MIP, GKD."""

from pathlib import Path

from prefect import flow

from blocks.records import ChildReport
from flows import number_types, stages, whole_models
from flows.finish import Findings, best_baseline, finish, lineage_of, report_of, to_distill
from flows.floors import Library, hold_floors, named
from flows.run import process_of
from flows.tracked_run import open_run
from profiles.schema import MINITRON, Profile
from tasks.evaluate.compare import contender, parent_contender
from tasks.running.workers import task_runner


@flow(name="optimize", flow_run_name="optimize {profile.name}")
def optimize(profile: Profile, workspace: str) -> ChildReport:
    """Make a faster child of a parent.

    Args:
        profile: what is wanted: parent, corpus, search space, scenarios, budget.
        workspace: folder that keeps the block library, Prefect's and MLflow's state and the child.
    """
    with open_run(profile, Path(workspace)) as run:
        parent, corpus, capabilities = stages.prepare(run)
        run.log_inputs(parent, corpus)
        records = stages.record(run, parent, corpus)
        blocks = stages.distill_all(run, parent, corpus, records)
        costs = stages.measure(run, parent)
        run.log_costs(costs)
        plain, source = stages.score_all(run, parent, corpus, records, blocks, capabilities), (parent, corpus)
        scores = number_types.score_types(run, source, records, blocks, plain, costs, capabilities)
        run.log_library(parent, corpus, blocks, scores, costs)

        first = stages.choose_child(run, parent, scores, costs)
        library = Library(records=records, blocks=blocks, scores=plain, costs=costs)
        held = hold_floors(run, source, capabilities, first, library)
        problem, near = held.chosen.problem, held.chosen.near
        teacher = whole_models.record_teacher(run, parent, corpus, capabilities)
        racing = [contender(name, each, blocks) for name, each in named(near)]
        child, racers = whole_models.race(run, racing, teacher)
        run.log_architecture(child.architecture, blocks, held.chosen.scores, costs)
        own = parent_contender(child.architecture)
        rivals = stages.choose_baselines(run, parent, problem, child.architecture)
        whole = stages.cut(run, parent, corpus, records, rivals)
        baselines = [contender(name, one, whole if name == MINITRON else blocks) for name, one in rivals.items()]
        references = number_types.references(run, problem, child.architecture, own)
        assembled = number_types.with_files(run, [own, child, *baselines, *references], parent, corpus)
        unfinished = child.name if profile.gkd.steps else ""
        found = whole_models.evaluate_all(run, assembled, parent, corpus, capabilities, unfinished)

        more = to_distill(profile, child, baselines, found[2 : 2 + len(baselines)])
        distilled = whole_models.distill_globally(run, [child, *more], teacher)
        distilled = number_types.with_files(run, distilled, parent, corpus, teacher)
        found += whole_models.evaluate_all(run, distilled, parent, corpus, capabilities)
        speed = whole_models.measure_speed(run, assembled, parent, costs)

        final = distilled[0] if distilled else assembled[1]
        contenders = assembled + distilled
        rival = best_baseline(child, baselines, contenders, found)
        spoken = whole_models.let_speak(run, [own, final], rival, source, capabilities)
        seen = whole_models.look_for_items(run, parent, corpus, capabilities)
        findings = Findings(
            evaluations=found,
            speed=speed,
            spoken=spoken,
            race=racers,
            looks=held.of(child.architecture),
            seen_items=seen,
        )
        report = report_of(run, final, contenders, findings, source, (blocks, problem))
        return finish(run, lineage_of(final, rival, source, capabilities), report)


def run_optimize(profile: Profile, workspace: Path) -> ChildReport:
    """Run the flow in this process, on the workers that the profile names."""
    with process_of(profile, workspace), task_runner(profile) as runner:
        report: ChildReport = optimize.with_options(task_runner=runner)(profile, str(workspace))
    return report
