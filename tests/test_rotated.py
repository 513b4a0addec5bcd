"""A rotated parent gives its own logits, in another basis; a parent that cannot be rotated is refused."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from blocks.errors import ParentError
from profiles.errors import ProfileError
from profiles.load import load_profile
from profiles.schema import FolderParent
from tasks.inputs.parent import prepare_parent
from tasks.inputs.rotated import ROTATABLE, rotate
from tests.families import SPECIAL, made, save, token_ids
from tests.test_parent import assert_config_alone_is_the_same
from tests.tiny import FAMILIES, tiny_model, tiny_parent, tiny_tokens

BIASED: dict[str, dict[str, bool]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"attention_bias": True},
}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family in ROTATABLE])
def test_the_same_logits_in_another_basis(tmp_path: Path, family: str) -> None:
    """Gains and biases are drawn: one that stayed behind or went elsewhere would move the logits."""
    changes = {"tie_word_embeddings": True, **BIASED.get(family, {})}
    model, source = tiny_model(family, **changes), tiny_parent(tmp_path / "source", family, **changes)
    asked = FolderParent(path=str(source), rotate=True)
    info = prepare_parent(asked, tmp_path, None)
    plain = prepare_parent(asked.model_copy(update={"rotate": False}), tmp_path, None)
    rotated = AutoModelForCausalLM.from_pretrained(tmp_path / info.folder, dtype=torch.float32)
    tokens = tiny_tokens()
    with torch.no_grad():
        expected, found = model(tokens).logits, rotated(tokens).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert plain.fingerprint != info.fingerprint
    assert "no longer the embedding" in info.notes[-1]
    assert not torch.allclose(rotated.lm_head.weight, rotated.model.embed_tokens.weight, atol=1e-2)
    state = rotated.state_dict()
    for name, tensor in model.state_dict().items():
        if name.endswith("layernorm.weight"):
            assert torch.equal(state[name], torch.ones_like(tensor))
        elif name.endswith("proj.weight"):  # not one matrix stayed as it was
            assert not torch.allclose(state[name], tensor, atol=1e-2), name
    assert_config_alone_is_the_same(asked, tmp_path, info)


@pytest.mark.parametrize("family", [family for family in ROTATABLE if family not in FAMILIES])
@torch.no_grad()
def test_a_family_of_the_table_is_rotated_by_what_its_matrices_are(tmp_path: Path, family: str) -> None:
    model = made(family, SPECIAL[family])
    save(model, tmp_path)
    rotate(tmp_path)
    rotated, ids = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), token_ids(2, 16)
    torch.testing.assert_close(rotated(ids).logits, model(ids).logits, atol=1e-3, rtol=1e-3)
    state = rotated.state_dict()
    same = {name for name, tensor in model.state_dict().items() if torch.allclose(state[name], tensor, atol=1e-2)}
    assert {name for name in same if not name.endswith((".bias", "q_norm.weight", "k_norm.weight"))} == set()


def test_norms_that_no_matrix_can_take_are_refused(tmp_path: Path) -> None:
    source = tiny_parent(tmp_path / "source", "gemma3_text")
    with pytest.raises(
        ParentError, match="gemma3_text has norms .* take a parent of llama, mistral, qwen2, qwen3, smollm3"
    ):
        prepare_parent(FolderParent(path=str(source), rotate=True), tmp_path / "work", None)


def test_a_rotated_parent_is_refused_beside_gkd() -> None:
    with pytest.raises(ProfileError, match="set gkd.steps: 0, or leave parent.rotate out"):
        load_profile("tiny", ["parent.rotate=true"])
    assert load_profile("tiny", ["parent.rotate=true", "gkd.steps=0"]).parent.rotate
