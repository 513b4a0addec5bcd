"""Flow `optimize`: a profile in, a measured child out. Reads like the paper: record, BLD, measure, score, MIP, GKD."""

from pathlib import Path

from prefect import flow

from blocks.records import ChildReport
from flows import stages, whole_models
from flows.finish import Findings, best_baseline, open_run
from profiles.schema import Profile
from tasks.evaluate.compare import contender, parent_contender
from tasks.running.workers import task_runner


@flow(name="optimize", flow_run_name="optimize {profile.name}")
def optimize(profile: Profile, workspace: str) -> ChildReport:
    """Make a faster child of a parent.

    Args:
        profile: what is wanted: parent, corpus, search space, scenarios, budget.
        workspace: folder that keeps the block library, Prefect's and MLflow's state and the child.
    """
    folder = Path(workspace)
    with open_run(profile, folder) as run:
        parent, corpus = stages.prepare(profile, folder)
        records = stages.record(profile, parent, corpus, folder)
        blocks = stages.distill_all(profile, parent, corpus, records, folder)
        costs = stages.measure(profile, parent, folder)
        scores = stages.score_all(profile, parent, corpus, records, blocks, costs, folder)
        run.log_library(parent, corpus, blocks, scores, costs)

        problem, architecture = stages.choose_child(profile, scores, costs)
        run.log_architecture(architecture, blocks, scores, costs)
        rivals = stages.choose_baselines(profile, problem, architecture)
        own, child = parent_contender(architecture), contender("child", architecture, blocks)
        baselines = [contender(name, rival, blocks) for name, rival in rivals.items()]
        assembled = [own, child, *baselines]
        found = whole_models.evaluate_all(assembled, parent, corpus, profile, folder)

        best = best_baseline(child, baselines, found[2:]) if profile.evaluate.distill_best_baseline else []
        distilled = whole_models.distill_globally([child, *best], parent, corpus, profile, folder)
        found += whole_models.evaluate_all(distilled, parent, corpus, profile, folder)
        speed = whole_models.measure_speed(assembled, parent, costs, profile, folder)

        final = distilled[0] if distilled else child
        said = whole_models.let_answer([own, final], parent, profile, folder)
        findings = Findings(evaluations=found, speed=speed, answers=said)
        return run.finish(final, assembled + distilled, findings, (parent, corpus), blocks)


def run_optimize(profile: Profile, workspace: Path) -> ChildReport:
    """Run the flow in this process, on the workers that the profile names."""
    with stages.process_of(profile, workspace), task_runner(profile) as runner:
        report: ChildReport = optimize.with_options(task_runner=runner)(profile, str(workspace))
    return report
