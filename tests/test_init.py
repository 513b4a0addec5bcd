"""`puzzle init` writes a profile that runs; `puzzle schema` and the profile agree; what fits a parent is found."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import pyarrow
import pytest
import yaml
from pyarrow import parquet
from transformers import LlamaConfig

from blocks.errors import CorpusError, ParentError, PuzzleError
from profiles.editor_schema import editor_schema
from profiles.load import load_profile
from profiles.schema import GgufParent, HubParent, HubSource, PackageParent, TextSource
from tasks.inputs import first_profile as first
from tasks.inputs.corpus import prepare_corpus
from tasks.inputs.parent import prepare_parent
from tasks.measure.roofline import setting_of
from tasks.planning.effort import shape_of
from tasks.planning.machine import target_of
from tasks.planning.plan import bounds_problem, children_of, config_parent
from tests.test_nvlabs import puzzle
from tests.test_plan import RATES
from tests.tiny import tiny_parent


def words(count: int, start: int = 0) -> str:
    return " ".join(f"w{4 + (start * 7 + index * index + index * (start // 60)) % 60}" for index in range(count))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_parent(tmp_path / "My Model", num_key_value_heads=4)
    rows = [json.dumps({"id": "a", "body": words(90, index)}) for index in range(120)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_the_profile_runs(here: Path) -> None:
    """Parent, text and budget go through the stages that a wrong profile would stop at; no stage needs another size."""
    code, out, err = puzzle("init", "--parent", "My Model", "--text", "text.jsonl", "--budget", "60%")
    assert code == 0 and "puzzle optimize my-model.yaml" in out, err
    assert puzzle("validate", "my-model.yaml")[0] == 0
    profile = load_profile("my-model.yaml")
    assert profile.search_space.attention[:2] == ("kv2", "kv1")
    assert profile.search_space.ffn == ("ffn32", "ffn24", "ffn16", "no_op")  # 75, 50, 25 % of 48, in steps of 8
    (source,) = profile.corpus.sources
    assert isinstance(source, TextSource) and source.text_field == "body"
    corpus = profile.corpus
    assert 4_000 < corpus.train_sequences * corpus.sequence_length < 120 * 90
    parent = prepare_parent(profile.parent, here / "w", None)
    info = prepare_corpus(corpus, here / "w" / parent.folder, parent.fingerprint, here / "w")
    assert info.train_sequences == corpus.train_sequences
    sketch = config_parent(profile.parent)
    setting = setting_of(profile.hardware, target_of(RATES, "float32"), sketch)
    children, infeasible = children_of(bounds_problem(shape_of(profile, sketch), setting, [0, 1, 2]))
    assert not infeasible and children[0].name == "largest within the budget"


def test_nothing_is_written_over_and_nobody_is_asked_without_a_console(here: Path) -> None:
    asked = ("init", "--parent", "My Model", "--text", "text.jsonl", "--name", "Mine!")
    assert puzzle(*asked)[0] == 0 and load_profile("mine.yaml").name == "mine"
    assert puzzle(*asked)[::2] == (2, "puzzle: mine.yaml exists already: name another with --out.\n")
    code, _, err = puzzle("init", "--text", "text.jsonl")
    assert code == 2 and "--parent is missing" in err
    for wrong in (["--engine", "onnx"], ["--budget", "170%"], ["--text", "missing.jsonl"]):
        assert puzzle(*asked, *wrong, "--out", "x.yaml")[0] == 2
    assert not [path for path in here.iterdir() if "x.yaml" in path.name]


def test_text_without_wide_gaps_is_cut_at_narrower_ones(here: Path) -> None:
    """A book whose chapters stand close is one document, which fills no split."""
    (here / "book.txt").write_text("\n\n".join(words(60, index) for index in range(150)))

    def written() -> Any:
        wish = first.Wish(
            name="book",
            parent=first.read_parent("My Model"),
            source=first.read_text("book.txt"),
            budget=("speedup", "1.2"),
            engine="torch",
        )
        return yaml.safe_load(first.first_profile(wish))

    assert written()["corpus"]["sources"] == [{"kind": "text", "path": "book.txt", "separator": "\n\n"}]
    assert "\n" not in first._flow(TextSource(kind="text", path="book.txt", separator="\n\n"))  # on one line
    (here / "book.txt").write_text("w5 w6")
    with pytest.raises(CorpusError, match="the corpus is too small"):
        written()


def test_what_a_person_may_name(here: Path) -> None:
    assert isinstance(first.named_parent("HuggingFaceTB/SmolLM2-135M"), HubParent)
    assert first.named_parent("models/x.gguf") == GgufParent(path="models/x.gguf")
    (here / "a.gguf").touch()
    assert first.named_parent("a.gguf") == GgufParent(path="a.gguf")
    assert isinstance(first.named_parent("tests:tiny.py"), PackageParent)
    for wrong in ("nothing", "no_package:x.gguf", "../x/y"):
        with pytest.raises(ParentError):
            first.named_parent(wrong)
    for wrong in ("models/x.gguf", "a.gguf", "."):  # refused where it is asked for, not after the last question
        with pytest.raises(PuzzleError):
            first.read_parent(wrong)
    assert first.read_text("owner/data") == HubSource(kind="hub", hub_id="owner/data")
    parquet.write_table(pyarrow.table({"n": [1, 2], "said": ["w4 w5", "w6"]}), here / "rows.parquet")
    found = first.read_text("rows.parquet")
    assert isinstance(found, TextSource) and (found.kind, found.text_field) == ("parquet", "said")
    (here / "data").mkdir()
    (here / "rows.parquet").rename(here / "data" / "rows.parquet")
    for beside in ("README.md", "dataset_info.json", "state.json"):  # as `datasets` and the hub write a folder
        (here / "data" / beside).write_text("{}")
    found = first.read_text("data")
    assert isinstance(found, TextSource) and (found.kind, found.text_field) == ("parquet", "said")
    for wrong in ("missing.jsonl", "no folder/"):
        with pytest.raises(CorpusError):
            first.read_text(wrong)
    assert first.read_budget(".7") == ("layer_parameters_fraction", ".7")
    assert first.read_budget("memory_fraction = 80%") == ("memory_fraction", "80%")
    with pytest.raises(PuzzleError, match="speedup"):
        first.read_budget("fast")


def test_widths_are_whole_blocks_of_32_where_the_parents_is() -> None:
    """3/4 and 1/4 of 192 are 144 and 48: llama.cpp has neither in q8_0 or fewer bits."""
    config = LlamaConfig(hidden_size=64, intermediate_size=192, num_attention_heads=4, num_key_value_heads=1)
    assert first._space(config, "llama.cpp")[1] == ["ffn128", "ffn96", "ffn32", "no_op"]


def test_a_file_that_export_wrote_is_no_parent(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "child.gguf", "deci")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ParentError, match="--format native"):
        first.read_parent(str(tmp_path / "child.gguf"))


def test_the_schema_knows_what_the_profile_takes() -> None:
    schema = editor_schema()
    number, text, null = schema["$defs"]["Budget"]["properties"]["memory_fraction"]["anyOf"]
    assert number == {"exclusiveMinimum": 0, "maximum": 1, "type": "number"} and null == {"type": "null"}
    assert [bool(re.search(text["pattern"], one)) for one in ("70%", "12.5 %", "70", "x%")] == [
        True,
        True,
        False,
        False,
    ]
    assert schema["additionalProperties"] is False and set(schema["required"]) == {"name", "parent", "corpus", "budget"}
    code, out, err = puzzle("schema")
    assert code == 0 and json.loads(out) == schema and "yaml-language-server: $schema=" in err


def test_show_names_the_workspaces_below(tmp_path: Path) -> None:
    report = tmp_path / "mine" / "runs" / "mine-1" / "report.json"
    report.parent.mkdir(parents=True)
    report.touch()
    code, _, err = puzzle("show", "--workspace", tmp_path)
    assert code == 2 and str(tmp_path / "mine") in err and "optimize" not in err
    code, _, err = puzzle("show", "--workspace", tmp_path / "empty")
    assert code == 2 and "puzzle optimize PROFILE --workspace" in err


def test_a_count_in_percent_is_told_its_field(here: Path) -> None:
    assert puzzle("init", "--parent", "tiny", "--text", "python_stdlib", "--name", "a")[0] == 0
    code, _, err = puzzle("validate", "a.yaml", "--set", "budget.parameters=70%")
    assert code == 2 and "A share of the parent's is written as `parameters_fraction`" in err
