"""Served runs: what they may ask for, what their forms show, what prefect.yaml and `puzzle serve` offer."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import jsonschema
import pytest
import yaml
from prefect.utilities.callables import parameter_schema
from pydantic import TypeAdapter, ValidationError

from flows import admitted as run
from flows import serve, served
from profiles.load import load_profile
from profiles.schema import Profile
from tasks.operating import admission, watch
from tasks.operating.admission import Refused, Roots, WorkspaceName, admit, admitted_workspace
from tasks.running.sharing import try_exclusive

ROOT = Path(__file__).resolve().parent.parent
FLOWS = (served.optimize, served.reoptimize, served.sweep, served.measure_hardware)


def asking(**changes: Any) -> Profile:
    """The tiny profile with some of its tree replaced."""
    tree = load_profile("tiny").model_dump(mode="json")
    for path, value in changes.items():
        node = tree
        *above, last = path.split("__")
        for key in above:
            node = node[key]
        node[last] = value
    return Profile.model_validate(tree)


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    for name in ("root", "data", "secret"):
        (tmp_path / name).mkdir()
    (tmp_path / "secret" / "key.txt").write_text("secret")
    (tmp_path / "data" / "text.txt").write_text("text")
    (tmp_path / "data" / "link.txt").symlink_to(tmp_path / "secret" / "key.txt")
    (tmp_path / "data" / "out").symlink_to(tmp_path / "secret")
    return Roots(workspaces=tmp_path / "root", data=(tmp_path / "data",))


def text(path: str) -> list[dict[str, str]]:
    return [{"kind": "text", "path": path}]


def test_a_file_below_a_data_root_is_admitted(roots: Roots, tmp_path: Path) -> None:
    admit(asking(corpus__sources=text(f"{tmp_path}/data/text.txt")), roots)
    admit(asking(corpus__sources=text(f"{tmp_path}/data/t*.txt")), roots)
    admit(load_profile("tiny"), roots)
    admit(load_profile("smollm2-cpu"), roots)


@pytest.mark.parametrize(
    "path",
    [
        "{0}/secret/key.txt",
        "{0}/data/../secret/key.txt",
        "{0}/data/link.txt",
        "{0}/data/out/key.txt",
        "{0}/data/*.txt",  # matches the link
        "{0}/*/key.txt",
        "{0}/data/**/*.txt",
        "~/.ssh/id_rsa",
        "/etc/passwd",
        "relative.txt",
        "*",
    ],
)
def test_a_path_that_leaves_the_data_roots_is_refused(path: str, roots: Roots, tmp_path: Path) -> None:
    given = path.format(tmp_path)
    with pytest.raises(Refused, match=r"corpus\.sources\.0\.path"):
        admit(asking(corpus__sources=text(given)), roots)
    with pytest.raises(Refused, match=r"parent\.path"):
        admit(asking(parent={"kind": "folder", "path": given}), roots)


def test_a_parent_whose_folder_links_out_is_refused(roots: Roots, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "parent"
    folder.mkdir()
    admit(asking(parent={"kind": "folder", "path": str(folder)}), roots)
    (folder / "config.json").symlink_to(tmp_path / "secret" / "key.txt")
    with pytest.raises(Refused, match=r"parent\.path"):
        admit(asking(parent={"kind": "folder", "path": str(folder)}), roots)


def test_code_and_packages_are_refused_with_every_reason(roots: Roots) -> None:
    profile = asking(
        parent={"kind": "hub", "hub_id": "a/b", "trust_remote_code": True},
        corpus__sources=[{"kind": "wikipedia_dump", "package": "os", "file": "../../etc/passwd"}],
        evaluate__benchmark_package="antigravity",
    )
    with pytest.raises(Refused) as refused:
        admit(profile, roots)
    for word in ("trust_remote_code", "'os'", "leaves its package", "'antigravity'"):
        assert word in str(refused.value)
    with pytest.raises(Refused, match=r"hardware\.name '/etc/x.yaml' is a file"):
        admit(asking(hardware={"name": "/etc/x.yaml", "engine": "roofline"}), roots)
    with pytest.raises(Refused, match="leaves its package"):
        admit(asking(parent={"kind": "package", "package": "gensim", "file": "/etc/passwd"}), roots)
    allowed = Roots(workspaces=roots.workspaces, data=(), remote_code=True)
    admit(asking(parent={"kind": "hub", "hub_id": "a/b", "trust_remote_code": True}), allowed)


@pytest.mark.parametrize("name", ["link[1].txt", "fol?der", "*"])
def test_a_link_whose_name_is_a_glob_leads_nowhere(name: str, roots: Roots, tmp_path: Path) -> None:
    """A file or folder of that very name is read, not what the glob matches."""
    (tmp_path / "data" / "link.txt").unlink()
    (tmp_path / "data" / "out").unlink()
    path = tmp_path / "data" / name
    admit(asking(corpus__sources=text(str(path))), roots)
    if name == "fol?der":
        path.mkdir()
        path = path / "a.txt"
    path.symlink_to(tmp_path / "secret" / "key.txt")
    with pytest.raises(Refused, match="is not below a folder"):
        admit(asking(corpus__sources=text(f"{tmp_path}/data/{name}")), roots)


@pytest.mark.parametrize("name", ["..", "../data", "a/b", "/etc", ".hidden", "", "A", "x" * 65, "a\n"])
def test_a_workspace_is_a_plain_name(name: str, roots: Roots) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(WorkspaceName).validate_python(name)


def test_a_workspace_lies_right_below_the_root_even_behind_the_schema(roots: Roots) -> None:
    assert admitted_workspace("mine", roots) == roots.workspaces / "mine"
    (roots.workspaces / "link").symlink_to(roots.data[0])
    for name in ("..", "a/b", ".", "link", str(roots.data[0])):
        with pytest.raises(Refused):
            admitted_workspace(name, roots)


def test_code_of_a_folder_and_a_target_that_is_not_ours_are_refused(roots: Roots, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "parent"
    folder.mkdir()
    with pytest.raises(Refused, match="trust_remote_code"):
        admit(asking(parent={"kind": "folder", "path": str(folder), "trust_remote_code": True}), roots)
    with pytest.raises(Refused, match="'nowhere' is no shipped target"):
        admit(asking(hardware={"name": "nowhere", "engine": "roofline"}), roots)
    with pytest.raises(Refused, match="leaves its package"):
        admit(asking(parent={"kind": "package", "package": "gensim", "file": "a/../../b"}), roots)


def test_roots_are_what_the_server_was_started_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (admission.ROOT, admission.DATA_ROOTS, admission.REMOTE_CODE, admission.STORES):
        monkeypatch.delenv(name, raising=False)
    assert Roots.from_environment() == Roots(workspaces=Path("workspace").resolve(), data=())
    told = serve.served_environment(tmp_path / "root", [tmp_path / "a", tmp_path / "b"], True, ["s3://a", "s3://b/c"])
    for name in (admission.ROOT, admission.DATA_ROOTS, admission.REMOTE_CODE, admission.STORES):
        monkeypatch.setenv(name, told[name])
    data = (tmp_path / "a", tmp_path / "b")
    stores = ("s3://a", "s3://b/c")
    assert Roots.from_environment() == Roots(workspaces=tmp_path / "root", data=data, remote_code=True, stores=stores)


def test_a_served_run_is_judged_before_it_is_at_work_and_once(
    roots: Roots, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done: list[str] = []
    number = str(uuid4())

    @contextmanager
    def noted(what: str, *_: Any) -> Iterator[None]:
        done.append(what)
        with try_exclusive(roots.workspaces / "mine", watch.key_of_run(number).key) as free:
            assert not free
        yield

    monkeypatch.setattr(run, "refuse_to_crash_for_ever", lambda: done.append("crashes counted"))
    monkeypatch.setattr(run, "flow_run_id", lambda: number)
    for name in ("process_of", "logged", "workers"):
        monkeypatch.setattr(run, name, partial(noted, name))
    monkeypatch.setattr(Roots, "from_environment", lambda: roots)
    with run.at_work(load_profile("tiny"), "mine") as folder:
        assert folder == roots.workspaces / "mine" and folder.is_dir()
    assert done == ["crashes counted", "process_of", "logged", "workers"]
    with pytest.raises(Refused), run.at_work(asking(corpus__sources=text("/etc/passwd")), "other"):
        pass
    assert done[4:] == ["crashes counted"] and not (roots.workspaces / "other").exists()


def test_the_form_begins_with_the_profile_that_the_server_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUZZLE_PROFILE", "smollm2-cpu")
    assert run.default_profile() == load_profile("smollm2-cpu")
    monkeypatch.delenv("PUZZLE_PROFILE")
    assert run.default_profile() == load_profile("tiny")


def schema_of(flow: Any) -> dict[str, Any]:
    return parameter_schema(flow).model_dump()


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)
def test_every_flow_has_a_form_whose_defaults_are_valid(flow: Any) -> None:
    schema = schema_of(flow)
    assert schema["properties"] and flow.description
    for name, field in schema["properties"].items():
        assert field.get("description"), f"{flow.name}: {name} has no help text"
        assert "default" in field, f"{flow.name}: {name} has no default"
    jsonschema.validate({name: field["default"] for name, field in schema["properties"].items()}, schema)


def test_every_field_of_the_form_has_a_help_text_and_examples_that_are_valid() -> None:
    definitions = schema_of(served.optimize)["definitions"]
    for section, definition in definitions.items():
        for name, field in definition["properties"].items():
            told = field.get("description") or "const" in field or name == "kind" or "$ref" in field or "anyOf" in field
            assert told, f"{section}.{name} has no help text"
            for example in field.get("examples", ()):
                bare = {key: value for key, value in field.items() if key != "examples"} | {"definitions": definitions}
                jsonschema.validate(example, bare)
        assert definition.get("description"), f"{section} has no help text"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"budget__layer_parameters_fraction": 7}, "a share above 1"),
        ({"scoring__metric": "bleu"}, "no such choice"),
        ({"parent": {"kind": "tiny", "hidden_size": -1}}, "a width below 1, inside a union"),
        ({"parent": {"kind": "floppy"}}, "no such kind"),
        ({"corpus__sources": [{"kind": "text"}]}, "a source without its path"),
        ({"bld__stepz": 3}, "no such field"),
        ({"scenarios": [{"name": "chat", "batch_sizes": []}]}, "a scenario without a batch size"),
        ({"budget__speedup": 0.9}, "a child that need not be faster"),
    ],
)
def test_the_form_refuses_a_wrong_value(change: dict[str, Any], why: str) -> None:
    tree = load_profile("tiny").model_dump(mode="json")
    for path, value in change.items():
        node = tree
        *above, last = path.split("__")
        for key in above:
            node = node[key]
        node[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"profile": tree}, schema_of(served.optimize))


def test_unions_are_choices_in_the_form() -> None:
    definitions = schema_of(served.optimize)["definitions"]
    assert len(definitions["Profile"]["properties"]["parent"]["anyOf"]) == 5
    assert len(definitions["Corpus"]["properties"]["sources"]["items"]["anyOf"]) == 4
    assert "oneOf" not in str(definitions)


def test_puzzle_serve_offers_four_flows_per_profile_and_a_schedule() -> None:
    tiny = load_profile("tiny")
    made = serve.deployments([tiny, load_profile("smollm2-cpu")], "0 3 * * 1")
    assert {(each.flow_name, each.name) for each in made} == {
        (flow.name, profile) for flow in FLOWS for profile in ("tiny", "smollm2-cpu")
    }
    assert {each.flow_name for each in made if each.schedules} == {"reoptimize"}
    own = next(each for each in made if (each.flow_name, each.name) == ("optimize", "smollm2-cpu"))
    assert Profile.model_validate(own.parameters["profile"]) == load_profile("smollm2-cpu")
    assert own.entrypoint == "flows.served.optimize" and own.enforce_parameter_schema


def test_prefect_yaml_names_flows_that_are_there() -> None:
    described = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    entrypoints = [each["entrypoint"].split(":") for each in described["deployments"]]
    assert {file for file, _ in entrypoints} == {"flows/served.py"}
    assert {getattr(served, name).name for _, name in entrypoints} == {flow.name for flow in FLOWS}


def test_whoever_serves_runs_sees_to_it_that_their_deaths_are_noticed() -> None:
    described = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    assert described["build"] == [{f"{watch.__name__}.{watch.keep_watch.__name__}": {}}]
    beats = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(watch.HEARTBEAT_SECONDS)}
    for each in described["deployments"]:
        assert watch.TAG in each["tags"] and each["work_pool"]["job_variables"]["env"] == beats
    environment = serve.served_environment(ROOT, [], False, [])
    assert beats.items() <= environment.items()
    assert all(watch.TAG in each.tags for each in serve.deployments([load_profile("tiny")]))
    kept = TypeAdapter(timedelta).validate_python(environment["PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER"])
    assert kept == watch.FORGET


def test_servers_listen_on_loopback_only() -> None:
    from tasks.running.servers import mlflow_server, prefect_server

    for command, url in (prefect_server(1234), mlflow_server(1234, "sqlite:///x", "x")):
        assert command[command.index("--host") + 1] == "127.0.0.1" and "127.0.0.1:1234" in url
