"""Profiles: the shipped ones load; a broken one is told completely, with field, allowed values and nearest key."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from profiles.errors import ProfileError
from profiles.load import in_yaml, load_profile, shipped_profiles
from profiles.schema import Corpus, FolderParent, PackageParent

GOOD: dict[str, Any] = {
    "name": "good",
    "parent": {"kind": "tiny"},
    "corpus": {"sources": [{"kind": "python_stdlib"}]},
    "budget": {"speedup": 1.5},
}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "profile.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes), encoding="utf-8")
    return path


def problem(path: Path | str, *overrides: str) -> str:
    with pytest.raises(ProfileError) as caught:
        load_profile(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", shipped_profiles())
def test_shipped_profiles_load_by_name(name: str) -> None:
    assert load_profile(name).name == name.replace(".", "-")


def test_a_file_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").write_text(yaml.safe_dump(GOOD))
    monkeypatch.chdir(tmp_path)
    assert load_profile("tiny").name == "good"


def test_a_share_is_written_in_either_way(tmp_path: Path) -> None:
    """70% and .7 are one wherever a profile takes a share; 70 is none."""
    chat = {"name": "chat", "weight": "70%", "budget": {"time_to_first_token_fraction": "80 %"}}
    asked: dict[str, Any] = {
        "scenarios": [chat],
        "budget": {"memory_fraction": "70%"},
        "champion": {"confidence": "99%"},
    }
    profile = load_profile(write(tmp_path, **asked))
    (scenario,) = profile.scenarios
    assert (profile.budget.memory_fraction, scenario.weight, profile.champion.confidence) == (0.7, 0.7, 0.99)
    assert scenario.budget.time_to_first_token_fraction == 0.8
    for wrong in ("70", "x%", "170%", "%"):
        assert "budget.memory_fraction" in problem(write(tmp_path, budget={"memory_fraction": wrong}))


BROKEN = {
    "unknown key": ({"budget": {"speedupp": 2.0}}, ["budget.speedupp: unknown key", "Did you mean `speedup`?"]),
    "unknown key at the top": ({"budgets": {}}, ["budgets: unknown key", "Did you mean `budget`?", "scenarios"]),
    "unknown key in a union": (
        {"parent": {"kind": "package", "package": "a", "fil": "b"}},
        [
            "parent.fil: unknown key",
            "Allowed: kind, package, file, rotate.",
            "Did you mean `file`?",
            "parent.file: missing",
        ],
    ),
    "no device": ({"hardware": {"device": "gpu"}}, ["hardware.device:"]),
    "unknown key in a list of unions": (
        {"corpus": {"sources": [{"kind": "python_stdlib"}, {"kind": "text", "pth": "x"}]}},
        ["corpus.sources[1].pth: unknown key", "Did you mean `path`?", "corpus.sources[1].path: missing"],
    ),
    "wrong kind": (
        {"parent": {"kind": "foldr"}},
        ["parent.kind: is `foldr`", "Allowed: folder, hub, gguf, package, tiny.", "Did you mean `folder`?"],
    ),
    "no kind": ({"parent": {"path": "x"}}, ["parent.kind: missing", "Allowed: folder, hub, gguf, package, tiny."]),
    "not a mapping": ({"parent": 3}, ["parent: is a int, must be a mapping."]),
    "nothing": ({"gkd": None}, ["gkd: is nothing, must be a mapping."]),
    "not a list": ({"search_space": {"attention": "kv1"}}, ["search_space.attention: is text, must be a list."]),
    "literal": (
        {"evaluate": {"baselines": ["depth", "unifrm"]}},
        ["evaluate.baselines[1]: is `unifrm`", "uniform, depth, greedy, random", "Did you mean `uniform`?"],
    ),
    "too small": ({"budget": {"speedup": 0.5}}, ["budget.speedup: is 0.5, must be greater than 1."]),
    "fraction": ({"budget": {"memory_fraction": 1.5}}, ["budget.memory_fraction: is 1.5, must be less than or equal"]),
    "no number": ({"bld": {"steps": "many"}}, ["bld.steps: is 'many', must be a valid integer"]),
    "empty budget": ({"budget": {}}, ["budget: a budget needs at least one of speedup, memory_fraction"]),
    "empty list": ({"corpus": {"sources": []}}, ["corpus.sources: is [], must have at least 1 item"]),
    "pattern": ({"name": "Has Space"}, ["name: is 'Has Space', must match pattern"]),
    "do not fit": (
        {"record": {"statistics_sequences": 9999}},
        ["record.statistics_sequences is 9999, but train_sequences is 512"],
    ),
    "twice the same scenario": ({"scenarios": [{}, {}]}, ["scenarios need different names"]),
}


@pytest.mark.parametrize(("changes", "expected"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_profile_is_told(tmp_path: Path, changes: dict[str, Any], expected: list[str]) -> None:
    path = write(tmp_path, **changes)
    message = problem(path)
    assert message.startswith(f"{path} is not a valid profile")
    for part in expected:
        assert part in message


def test_all_problems_are_listed_one_a_line(tmp_path: Path) -> None:
    message = problem(write(tmp_path, bld={"steps": -1, "ridges": 1}, scenarios=[{"batch_sizes": [0]}], nme="x"))
    head, *lines = message.splitlines()
    assert head.endswith("4 problems:")
    paths = [line.split(":")[0].strip() for line in lines]
    assert paths == ["bld.steps", "bld.ridges", "scenarios[0].batch_sizes[0]", "nme"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nname: b\n", "line 2, column 1: not valid YAML: key `name` stands twice"),
        ("parent: {kind: tiny, kind: hub}\n", "line 1, column 22: not valid YAML: key `kind` stands twice"),
        ("name: [a\n", "not valid YAML"),
        ("", "holds nothing: a profile is a mapping"),
        ("- name\n", "holds a list: a profile is a mapping"),
        ("? [a]\n: 1\n", "a key must be plain text"),
        ("name: !!python/object:os.system x\n", "could not determine a constructor"),
    ],
)
def test_broken_yaml_is_told_with_its_place(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(text)
    assert expected in problem(path)
    assert str(path) in problem(path)


def test_anchors_and_merge_keys_still_work(tmp_path: Path) -> None:
    path = write(tmp_path)
    text = path.read_text() + "bld: &short {steps: 3}\ngkd: {<<: *short, patience: 5}\n"
    path.write_text(text)
    profile = load_profile(path)
    assert (profile.gkd.steps, profile.gkd.patience) == (3, 5)


def test_missing_file_names_the_shipped_profiles(tmp_path: Path) -> None:
    message = problem("tiney")
    assert "no profile tiney" in message
    assert "smollm2-cpu, smollm2-llama-cpp, tiny" in message
    assert "Did you mean `tiny`?" in message
    assert "is a folder" in problem(tmp_path)
    binary = tmp_path / "latin.yaml"
    binary.write_bytes("name: é".encode("latin-1"))
    assert "not UTF-8" in problem(binary)


def test_overrides_reach_mappings_lists_and_absent_sections(tmp_path: Path) -> None:
    path = write(tmp_path, scenarios=[{"name": "a"}, {"name": "b"}])
    profile = load_profile(
        path,
        [
            "budget.speedup=2.5",
            "scenarios.1.prompt_tokens=9",
            "bld.steps=0",
            "search_space.layers=[0, 2]",
            "parent={kind: folder, path: a=b}",
        ],
    )
    assert profile.budget.speedup == 2.5
    assert [scenario.prompt_tokens for scenario in profile.scenarios] == [256, 9]
    assert profile.bld.steps == 0
    assert profile.search_space.layers == (0, 2)
    assert profile.parent == FolderParent(path="a=b")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("budget.speedup", "is not `path.to.key=value`"),
        ("=3", "is not `path.to.key=value`"),
        ("budget..speedup=3", "is not `path.to.key=value`"),
        ("corpus.sources.1.kind=hub", "`1` is not an index of it (allowed: 0 to 0)"),
        ("corpus.sources.first=hub", "`first` is not an index of it"),
        ("name.first=x", "name is text, there is no `first` in it"),
        ("bld.steps=[", "not valid YAML"),
        ("bld.stps=3", "bld.stps: unknown key. Allowed: steps"),
        ("capabilities.rag.sorces=[]", "capabilities.rag.sorces: unknown key. Allowed: sources"),
        ("capabilities.rag.sources=[{kind: needle}]", "capabilities.rag.sources[0].kind: is `needle`. Allowed: text"),
        ("bld.steps=-3", "bld.steps: is -3"),
    ],
)
def test_broken_overrides_are_told(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in problem(write(tmp_path), override)


def test_profiles_are_frozen(tmp_path: Path) -> None:
    profile = load_profile(write(tmp_path, parent={"kind": "package", "package": "a", "file": "b"}))
    assert isinstance(profile.parent, PackageParent)
    with pytest.raises(ValueError, match="frozen"):
        profile.corpus = Corpus(sources=profile.corpus.sources)


@pytest.mark.parametrize("override", ["evaluate.benchmark_limit=null", "hardware.precision=float32", "seed=3"])
def test_a_profile_as_text_is_the_same_profile(override: str, tmp_path: Path) -> None:
    wanted = load_profile("smollm2-cpu", [override])
    (tmp_path / "profile.yaml").write_text(in_yaml(wanted))
    again = load_profile(tmp_path / "profile.yaml")
    assert again == wanted and again.hardware.model_fields_set >= wanted.hardware.model_fields_set & {"precision"}
