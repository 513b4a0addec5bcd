"""Flow `reoptimize`: what changed, a challenger, the comparison with the champion, the alias in MLflow's registry."""

from pathlib import Path

from prefect import flow

from flows import stages
from flows.optimize import optimize
from flows.run import Run, process_of
from profiles.schema import Profile
from tasks.inputs.parent import at_its_commit
from tasks.measure.costs import costs_of
from tasks.operating import champion, registry
from tasks.operating.artifacts import show_link, show_markdown
from tasks.operating.champion import Judgement
from tasks.operating.champion_limits import judged_texts
from tasks.operating.experiment import compare_url, open_experiment
from tasks.operating.registry import Version
from tasks.running.progress import say
from tasks.running.workers import task_runner


@flow(name="reoptimize", flow_run_name="reoptimize {profile.name}")
def reoptimize(profile: Profile, workspace: str, remeasure: bool = False) -> Judgement:
    """Make and judge a challenger if anything changed that the child depends on.

    Args:
        profile: what is wanted; its `champion` section is the rule.
        workspace: folder that keeps the block library, Prefect's and MLflow's state and the children.
        remeasure: measure the costs again; they count as changed if one has moved beyond its spread.
    """
    folder, name = Path(workspace), registry.model_name(profile.name)
    profile = profile.model_copy(update={"parent": at_its_commit(profile.parent)})
    store = open_experiment(profile, folder)
    run = Run(profile=profile, workspace=folder)
    parent, corpus, capabilities = stages.prepare(run)
    judged_texts(profile, parent, corpus, capabilities, folder)  # what no challenger could keep is refused here
    for moved in stages.measure_again(run, parent) if remeasure else []:
        say(f"cost moved: {moved}")
    table = costs_of(profile, parent, folder)
    now = champion.basis(profile, parent, corpus, table, capabilities)
    changed = champion.changes(registry.judged(store, name), now)
    reigning = registry.champion_of(store, name)
    if reigning and not changed:
        return announce(champion.nothing_changed(reigning.version), reigning, None, "")

    if table is None:
        say(f"no costs of this hardware and traffic are younger than {profile.measure.max_age_days:g} days")
    say(f"{champion.told(changed)} changed: a challenger is made" if reigning else "no champion yet: the first is made")
    report = optimize.fn(profile, workspace)
    run_folder = str(Path(report.child_folder).parent)
    challenger = champion.lineage_of(folder, run_folder)
    with run.stage("judge"):
        against, look = (reigning.run_folder, 1 + registry.challenges_of(store, reigning)) if reigning else (None, 1)
        found = champion.judge(against, challenger, profile, folder, changed, look)
        if run_folder in registry.rolled_back(store, name):
            found = champion.rolled_back(found)
    version = None
    if not found.same_child:
        version = registry.register(store, report, run_folder, folder, registry.standing(found, reigning))
        if found.outcome in ("first", "moved"):
            registry.crown(store, version)
    now = champion.basis(profile, parent, corpus, costs_of(profile, parent, folder), capabilities)
    registry.remember_judged(store, name, report.mlflow_run_id, now)
    registry.log_judgement(store, report.mlflow_run_id, found.outcome, champion.figures(found))
    if reigning:
        url = compare_url(store, [reigning.mlflow_run_id, report.mlflow_run_id])
        show_link("champion and challenger", url, "champion and challenger side by side in MLflow")
    return announce(found, reigning, version, run_folder)


def announce(found: Judgement, reigning: Version | None, version: Version | None, challenger: str) -> Judgement:
    """Two sentences on the console, in the log and in the judgement, and the figures as an artifact."""
    before, after = (which.version if which else None for which in (reigning, version))
    sentences = champion.looked_at(found.changed, not reigning), champion.decided(found, before, after)
    for sentence in sentences:
        say(sentence)
    found = found.model_copy(update={"summary": " ".join(sentences)})
    page = champion.judgement_markdown(found, f"version {before}" if before else "", challenger)
    show_markdown("judgement", page, found.summary)
    return found


def run_reoptimize(profile: Profile, workspace: Path, remeasure: bool) -> Judgement:
    """Run the flow in this process, on the workers that the profile names."""
    with process_of(profile, workspace), task_runner(profile) as runner:
        found: Judgement = reoptimize.with_options(task_runner=runner)(profile, str(workspace), remeasure)
    return found
