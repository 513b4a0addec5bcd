"""The flows that a person starts from Prefect's UI, or a schedule does: deployments of `puzzle serve` and prefect.yaml.

The form of each is made from its parameters. Without `from __future__ import annotations`: with it Prefect could not
resolve the parameters' models in a served run.
"""

from typing import Annotated, Any, Literal

from blocks.runtime import configure

configure()  # before torch is imported: a served run is a process of its own

from prefect import State, flow, runtime  # noqa: E402
from prefect.states import Completed  # noqa: E402
from pydantic import Field  # noqa: E402

from blocks.records import ChildReport, CostTable  # noqa: E402
from flows.admitted import at_work  # noqa: E402
from flows.optimize import optimize as pipeline  # noqa: E402
from flows.reoptimize import reoptimize as challenge  # noqa: E402
from flows.run import Run  # noqa: E402
from flows.stages import measure, parent_of  # noqa: E402
from flows.tracked_run import show_costs  # noqa: E402
from tasks.measure.costs import costs_of  # noqa: E402
from tasks.operating import study_runs, sweeping  # noqa: E402
from tasks.operating.admission import Roots, WorkspaceName, WorkspaceOrProfile, admitted_workspace  # noqa: E402
from tasks.operating.artifacts import show_link, show_table  # noqa: E402
from tasks.operating.champion import Judgement  # noqa: E402
from tasks.operating.experiment import open_experiment  # noqa: E402
from tasks.operating.form import AskedBudget, AskedHardware, More  # noqa: E402
from tasks.operating.tracking import run_url  # noqa: E402
from tasks.running.progress import say  # noqa: E402

OFFERED = list(Roots.from_environment().profiles)
ProfileName = Annotated[str, Field(json_schema_extra={"enum": OFFERED})]
DEFAULT, NO_LIMITS, SAME_HARDWARE = OFFERED[0], AskedBudget(), AskedHardware()


def run_name() -> str:
    """`optimize tiny in first`."""
    given = runtime.flow_run.parameters
    return f"{runtime.flow_run.flow_name} {given['profile']} in {given['workspace'] or given['profile']}"


@flow(name="optimize", flow_run_name=run_name)
def optimize(
    profile: ProfileName = DEFAULT,
    budget: AskedBudget = NO_LIMITS,
    hardware: AskedHardware = SAME_HARDWARE,
    workspace: WorkspaceOrProfile = "",
    more: More | None = None,
) -> ChildReport:
    """Make a faster child of a parent: record, distil, score, measure, choose, distil globally, evaluate.

    Whatever the workspace holds already is not done again. Cancel and start again as you like.

    Args:
        profile: What is wanted: parent, corpus, search space, hardware, scenarios, budget. Read when the run starts.
        budget: Left empty: the profile's own. As soon as you give one limit, those that you give are all there are.
        hardware: What the child is made for. What you leave empty is the profile's own.
        workspace: Name of the folder that keeps the block library and the children. Empty: the profile's name.
        more: The rest of the profile. What you leave empty is the profile's own.
    """
    with at_work(profile, budget, hardware, more, workspace) as (admitted, folder):
        report: ChildReport = pipeline.fn(admitted, str(folder))
    return report


@flow(name="reoptimize", flow_run_name=run_name)
def reoptimize(
    profile: ProfileName = DEFAULT,
    budget: AskedBudget = NO_LIMITS,
    hardware: AskedHardware = SAME_HARDWARE,
    workspace: WorkspaceOrProfile = "",
    remeasure: bool = False,
    more: More | None = None,
) -> State[Judgement]:
    """If anything changed that the child depends on, make a challenger and compare it with the champion.

    Args:
        profile: What is wanted; its champion section is the rule. Read when the run starts.
        budget: Left empty: the profile's own. As soon as you give one limit, those that you give are all there are.
        hardware: What the child is made for. What you leave empty is the profile's own.
        workspace: Name of the folder that keeps the block library and the children. Empty: the profile's name.
        remeasure: Measure the costs again first; they count as changed if one moved by 10 % and three times its spread.
        more: The rest of the profile. What you leave empty is the profile's own.
    """
    with at_work(profile, budget, hardware, more, workspace) as (admitted, folder):
        found = challenge.fn(admitted, str(folder), remeasure)
    return Completed(name=found.outcome.capitalize(), message=found.summary, data=found)


@flow(name="measure-hardware", flow_run_name=run_name)
def measure_hardware(
    profile: ProfileName = DEFAULT,
    hardware: AskedHardware = SAME_HARDWARE,
    workspace: WorkspaceOrProfile = "",
    more: More | None = None,
) -> CostTable:
    """Measure what every variant costs on this machine, and nothing else.

    Args:
        profile: Its parent, search space, hardware, scenarios and measure are used. Read when the run starts.
        hardware: What is measured. What you leave empty is the profile's own.
        workspace: Name of the folder that keeps the costs. Empty: the profile's name.
        more: The rest of the profile. What you leave empty is the profile's own.
    """
    with at_work(profile, NO_LIMITS, hardware, more, workspace) as (admitted, folder):
        run = Run(profile=admitted, workspace=folder)
        parent = parent_of(run)
        if (known := costs_of(admitted, parent, folder)) and not known.modelled:
            say(
                f"nothing is measured: the costs of {known.measured_at} are of this hardware and traffic, and younger "
                f"than {admitted.measure.max_age_days:g} days; reoptimize with remeasure measures them again"
            )
        table = measure(run, parent)
        show_costs(table)
        store = open_experiment(admitted, folder)
        own = study_runs.log_costs(store, table, admitted.hardware)
        show_link("mlflow costs", run_url(store, own), "what every variant costs, in MLflow")
    return table


Share = Annotated[
    str | None,
    Field(pattern=r"^([0-9]+(\.[0-9]+)?|\.[0-9]+)%?$", description="a number, or a share of the parent such as 80%"),
]


@flow(name="sweep", flow_run_name="sweep {over} in {workspace}")
def sweep(
    workspace: WorkspaceName = DEFAULT,
    over: Literal[
        "latency_seconds", "time_to_first_token_seconds", "tokens_per_second", "memory_gib", "parameters"
    ] = "latency_seconds",
    points: Annotated[int, Field(ge=2, le=1000, description="how many limits, 2 to 1000")] = 20,
    memory_gib: Share = None,
    latency_seconds: Share = None,
    parameters: Share = None,
) -> list[Any]:
    """Every budget between the cheapest child and the parent, on a finished block library: a table in a minute.

    Args:
        workspace: Name of a folder that holds a finished block library.
        over: The budget that is swept.
        points: How many limits, evenly between the cheapest child and the parent: 2 to 1000.
        memory_gib: A second budget, kept at every limit: GiB such as 0.9, or a share of the parent such as 80%.
        latency_seconds: A second budget, kept at every limit: seconds such as 0.04, or a share such as 80%.
        parameters: A second budget, kept at every limit: a number such as 90000000, or a share such as 80%.
    """
    kept = {"memory_gib": memory_gib, "latency_seconds": latency_seconds, "parameters": parameters}
    folder = admitted_workspace(workspace, Roots.from_environment())
    found = sweeping.sweep_library(folder, over, points, kept)
    show_table("sweep", found, tuple(sweeping.SweepPoint.model_fields), f"best child at {points} limits of {over}")
    page = study_runs.log_sweep(folder, over, found)
    if page:
        show_link("mlflow sweep", page, "the front as a run in MLflow")
    return [point.model_dump() for point in found]
