"""Parents that see: prepared, asked about images, written back, judged. Held to transformers' own LLaVA throughout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from blocks.errors import ParentError
from profiles.schema import FolderParent
from tasks.inputs.parent import prepare_parent, write_config
from tasks.inputs.vision import vision_tensors
from tests.vision import prepared_llava, tiny_llava, whole_llava


@pytest.mark.parametrize(
    ("family", "tower"), [("llama", "clip"), ("qwen2", "siglip"), ("mistral", "clip"), ("qwen3", "clip")]
)
def test_the_text_model_is_the_parent_and_the_rest_is_kept(tmp_path: Path, family: str, tower: str) -> None:
    source = tiny_llava(tmp_path / "source", family, tower)
    if tower == "siglip":  # as late versions of transformers name the weights
        whole_llava(source).save_pretrained(source, save_original_format=False)
    info, whole = prepared_llava(source, tmp_path / "work"), whole_llava(source)
    folder = tmp_path / "work" / info.folder
    ids = torch.randint(250, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        assert torch.equal(found, whole(input_ids=ids).logits)
    kept, own = vision_tensors(folder), whole.state_dict()
    assert {name for name in own if "vision_tower" in name or "projector" in name} == set(kept)
    assert all(torch.equal(tensor, own[name]) for name, tensor in kept.items())
    assert not any("vision" in name for name in load_file(folder / "model.safetensors"))
    assert (folder / "vision" / "preprocessor_config.json").is_file() or (
        folder / "vision" / "processor_config.json"
    ).is_file()


def edit(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_another_tower_is_another_parent_and_a_plan_reads_the_text_config(tmp_path: Path) -> None:
    source = tiny_llava(tmp_path / "source")
    first = prepared_llava(source, tmp_path / "work")
    (tmp_path / "alone").mkdir()
    assert write_config(FolderParent(path=str(source)), tmp_path / "alone")
    alone, whole = (
        json.loads((one / "config.json").read_text()) for one in (tmp_path / "alone", tmp_path / "work" / first.folder)
    )
    assert alone["model_type"] == "llama" and {**alone, "transformers_version": ""} == {
        **whole,
        "transformers_version": "",
    }
    assert prepared_llava(edit(source, vision_feature_layer=-1), tmp_path / "work").fingerprint != first.fingerprint


def refusal(folder: Path, work: Path, **options: Any) -> str:
    with pytest.raises(ParentError) as caught:
        prepare_parent(FolderParent(path=str(folder), **options), work, None)
    assert not list((work / "parent").glob("*"))
    return str(caught.value)


def test_what_is_not_carried_is_refused_in_a_sentence(tmp_path: Path) -> None:
    source, work = tiny_llava(tmp_path / "source"), tmp_path / "work"
    values = json.loads((source / "config.json").read_text())
    assert "leave rotate out" in refusal(source, work, rotate=True)
    for changes, expected in (
        ({"model_type": "idefics3"}, "model of text and images (model_type idefics3): of those llava is carried"),
        ({"vision_config": {"model_type": "pixtral"}}, "sees by pixtral: carried are clip_vision_model"),
        ({"text_config": values["text_config"] | {"model_type": "granite"}}, "a granite, whose logits are scaled"),
        ({"text_config": values["text_config"] | {"model_type": "gpt2"}}, "model_type 'gpt2' is not known here"),
        ({"text_config": values["text_config"] | {"model_type": "nemotron-nas"}}, "child that puzzle wrote"),
        ({"image_token_index": 5000}, "the image's token must be one of them"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "set trust_remote_code: true"),
    ):
        assert expected in refusal(edit(source, **changes), work), changes
        (source / "config.json").write_text(json.dumps(values))
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if "linear_2.weight" in name)
    from safetensors.torch import save_file

    save_file(tensors | {name: tensors[name][:8].clone()}, source / "model.safetensors", {"format": "pt"})
    assert "expected [32, 32]" in refusal(source, work)
    save_file(tensors | {name: tensors[name] / 0}, source / "model.safetensors", {"format": "pt"})
    assert "NaN or infinite" in refusal(source, work)
