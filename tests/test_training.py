"""A child is trained and used as its parent's class is: Trainer, checkpointing, LoRA, caches, padding, round trips."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, Trainer, TrainingArguments

from blocks.export_code.modeling_decilm import CACHE, DeciLMForCausalLM
from tasks.export.folder import export_folder
from tasks.inputs.children import in_precision
from tests.test_modeling import (
    FAMILIES,
    LINEAR,
    NO_OP,
    SIZES,
    attention,
    ffn,
    mixed_blocks,
    parents_twin,
    tiny_child,
    tiny_parent,
    token_ids,
)
from tests.test_recurrent import recurrents
from tests.test_windows import windows

# children by what is special about them: every kind of subblock, nothing at all in a layer, no attention in front, none
SHAPES: dict[str, list[dict[str, Any]]] = {
    "mixed": mixed_blocks(),
    "empty layers": [
        {"attention": NO_OP, "ffn": NO_OP},
        *[{"attention": attention(1), "ffn": ffn(16)}] * 4,
        {"attention": NO_OP, "ffn": NO_OP},
    ],
    "linear in front": [
        {"attention": LINEAR, "ffn": LINEAR},
        {"attention": LINEAR, "ffn": NO_OP},
        *[{"attention": attention(2), "ffn": LINEAR}] * 4,
    ],
    "windows": windows(),
    "recurrent": recurrents(),
    "no attention": [{"attention": LINEAR, "ffn": ffn(32)}, *[{"attention": NO_OP, "ffn": ffn(24)}] * 5],
}
CASES = [("llama", "mixed"), ("mistral", "linear in front"), ("qwen2", "empty layers"), ("qwen3", "mixed")]
CASES += [("gemma3_text", "mixed"), ("gemma3_text", "empty layers")]
CASES += [("llama", "windows"), ("gemma3_text", "windows"), ("qwen3", "recurrent"), ("llama", "no attention")]
cases = pytest.mark.parametrize(("family", "shape"), CASES)
cached_cases = pytest.mark.parametrize(("family", "shape"), CASES[:-1])
static_cases = pytest.mark.parametrize(
    ("family", "shape"), [case for case in CASES[:-1] if case[1] not in ("windows", "recurrent")]
)


pytestmark = pytest.mark.usefixtures("one_thread")


def child_of(family: str, shape: str, **changes: Any) -> Any:
    return tiny_child(tiny_parent(family, **changes), SHAPES[shape])


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def folder_of(child: DeciLMForCausalLM, path: Path) -> Path:
    return export_folder(child, path, path / "child", "# child\n")


def opened(folder: Path, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **more)


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Rows of unequal numbers of labels."""

    def __init__(self, rows: int) -> None:
        self.ids = token_ids(rows, 12)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.ids[index].clone()
        labels[: index + 1] = -100
        return {"input_ids": self.ids[index], "labels": labels}


def trained(folder: Path, batch: int, steps: int, **more: Any) -> tuple[float, float]:
    """Loss and gradient norm of one optimiser step."""
    arguments = TrainingArguments(
        output_dir=str(folder.parent / "out"),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=steps,
        max_steps=1,
        max_grad_norm=1e9,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **more,
    )
    trainer = Trainer(model=opened(folder).eval(), args=arguments, train_dataset=Rows(6))
    trainer.train()
    row = next(row for row in trainer.state.log_history if "loss" in row)
    return float(row["loss"]), float(row["grad_norm"])


@pytest.mark.parametrize(("family", "shape"), [CASES[0], CASES[4], CASES[-1]])
def test_accumulated_batches_give_the_loss_and_gradient_of_one(family: str, shape: str, tmp_path: Path) -> None:
    folder = folder_of(child_of(family, shape), tmp_path)
    whole = trained(folder, batch=6, steps=1)
    for batch, steps in ((1, 6), (2, 3)):
        assert trained(folder, batch, steps) == pytest.approx(whole, rel=1e-3)
    assert trained(folder, 2, 3, gradient_checkpointing=True) == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
@cases
def test_checkpointing_changes_no_gradient(family: str, shape: str, reentrant: bool) -> None:
    child, ids = child_of(family, shape).train(), token_ids(2, 10)
    child(ids, labels=ids).loss.backward()
    plain = gradients(child)
    child.zero_grad()
    child.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    ran: list[int] = []
    hooks = [
        (layer.mlp or layer.self_attn).register_forward_pre_hook(lambda *_, i=i: ran.append(i))
        for i, layer in enumerate(child.model.layers)
        if layer.mlp is not None or layer.self_attn is not None
    ]
    child(ids, labels=ids).loss.backward()
    assert len(ran) == 2 * len(hooks)  # each layer ran a second time: nothing of it was kept
    found = gradients(child)
    assert set(found) == set(plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)
    child.gradient_checkpointing_disable()
    assert not child.is_gradient_checkpointing


@pytest.mark.parametrize(("family", "shape"), [CASES[0], CASES[2], CASES[4]])
def test_lora_attaches_trains_and_merges(family: str, shape: str, tmp_path: Path) -> None:
    folder, ids = folder_of(child_of(family, shape), tmp_path), token_ids(2, 10)
    torch.manual_seed(0)
    settings = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(opened(folder), settings)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1.0)
    before = model(ids, labels=ids).loss
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        after = model(ids, labels=ids)
        assert after.loss < before
        model.save_pretrained(tmp_path / "adapter")
        again: Any = PeftModel.from_pretrained(opened(folder), str(tmp_path / "adapter")).eval()
        assert torch.equal(again(ids).logits, after.logits)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, after.logits, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        assert torch.equal(opened(tmp_path / "merged")(ids).logits, merged(ids).logits)


@cases
@torch.no_grad()
def test_saved_and_loaded_twice_in_a_row(family: str, shape: str, tmp_path: Path) -> None:
    child, ids = child_of(family, shape, tie_word_embeddings=family in ("qwen2", "gemma3_text")), token_ids(2, 9)
    folder = folder_of(child, tmp_path)
    for name in ("first", "second"):
        opened(folder).save_pretrained(tmp_path / name)
        shutil.rmtree(folder)  # what was saved stands alone, code included
        folder = tmp_path / name
    back = opened(folder, low_cpu_mem_usage=True, dtype="auto")
    assert torch.equal(back(ids).logits, child(ids).logits)
    assert back.config.to_dict()["block_configs"] == SHAPES[shape]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_dtype_of_the_folder_is_what_auto_loads(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    child = in_precision(child_of(family, "mixed"), dtype)
    folder = folder_of(child, tmp_path)
    for more in ({}, {"dtype": "auto"}, {"device_map": "cpu"}):
        assert {weight.dtype for weight in opened(folder, **more).parameters()} == {dtype}


def generated(child: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    quiet = {"pad_token_id": 0, "eos_token_id": SIZES["vocab_size"], "do_sample": False, "max_new_tokens": 8}
    tokens: torch.Tensor = child.generate(ids, **quiet, **more)
    return tokens


@cases
@torch.no_grad()
def test_beams_are_the_same_with_and_without_a_cache(family: str, shape: str) -> None:
    child, ids = child_of(family, shape), token_ids(2, 9)
    settings: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2}
    cached, whole = (generated(child, ids, use_cache=use, **settings) for use in (True, False))
    assert cached.shape == (4, 17) and torch.equal(cached, whole)


@static_cases
@torch.no_grad()
def test_a_static_cache_generates_the_same(family: str, shape: str) -> None:
    child, ids = child_of(family, shape), token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    plain = generated(child, ids, attention_mask=mask)
    for kind in ("static", "offloaded_static"):
        if kind == "static" or torch.cuda.is_available():
            assert torch.equal(generated(child, ids, attention_mask=mask, cache_implementation=kind), plain)
    cache = StaticCache(config=child.config, max_cache_len=32)
    child(ids[:, :5], use_cache=True, **{CACHE: cache})
    step = child(ids[:, 5:], use_cache=True, **{CACHE: cache}).logits
    torch.testing.assert_close(step, child(ids).logits[:, 5:], rtol=1e-4, atol=1e-4)


@cases
@torch.no_grad()
def test_padded_rows_equal_rows_alone(family: str, shape: str) -> None:
    child, ids = child_of(family, shape), token_ids(3, 14)
    for left in (True, False):
        mask = torch.ones_like(ids)
        for row, padded in enumerate((0, 4, 11)):
            mask[row, slice(0, padded) if left else slice(14 - padded, 14)] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = child(ids, attention_mask=mask, position_ids=positions).logits
        for row in range(3):
            here = mask[row].bool()
            alone = child(ids[row][here].unsqueeze(0)).logits[0]
            torch.testing.assert_close(logits[row][here], alone, rtol=1e-4, atol=1e-4)


@cases
@torch.no_grad()
def test_attention_implementations_agree_when_loaded_and_when_switched(family: str, shape: str, tmp_path: Path) -> None:
    child, ids = child_of(family, shape), token_ids(2, 12)
    folder, expected = folder_of(child, tmp_path), child(ids).logits
    for first, second in (("eager", "sdpa"), ("sdpa", "eager")):
        model = opened(folder, attn_implementation=first)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        model.set_attn_implementation(second)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_attention_weights_are_the_parents(family: str) -> None:
    parent, ids = tiny_parent(family), token_ids(2, 12)
    twin, mixed = parents_twin(parent), tiny_child(parent, mixed_blocks())
    with pytest.raises(ValueError, match="needs attn_implementation='eager'"):
        twin(ids, output_attentions=True)
    for model in (parent, twin, mixed):
        model.set_attn_implementation("eager")
    expected = parent(ids, output_attentions=True).attentions
    found = twin(ids, output_attentions=True).attentions
    assert len(found) == len(expected) == 6
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    seen = mixed(ids, output_attentions=True).attentions
    assert [weights is None for weights in seen] == [True, True, False, False, False, False]
    assert mixed(ids).attentions is None


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_arguments_of_forward_mean_what_they_mean_to_the_parent(family: str) -> None:
    parent, ids = tiny_parent(family), token_ids(2, 11)
    twin = parents_twin(parent)
    embedded = parent.get_input_embeddings()(ids)
    for more in (
        {"logits_to_keep": 1},
        {"logits_to_keep": 4},
        {"logits_to_keep": torch.tensor([0, 7])},
        {"input_ids": None, "inputs_embeds": embedded},
        {"position_ids": torch.arange(3, 14).unsqueeze(0)},
    ):
        arguments = {"input_ids": ids} | more
        assert torch.equal(twin(**arguments).logits, parent(**arguments).logits)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="exactly one"):
            twin(**wrong)
    loss, logits = twin(ids, labels=ids, use_cache=False, return_dict=False)
    assert (loss, logits.shape) == (parent(ids, labels=ids).loss, (2, 11, 64))
    twin.config.output_hidden_states = True
    assert len(twin(ids).hidden_states) == 7


@cached_cases
@torch.no_grad()
def test_the_next_step_sees_the_cache_that_a_plain_forward_left(family: str, shape: str) -> None:
    child, ids = child_of(family, shape), token_ids(1, 12)
    first = child(ids[:, :11])  # use_cache is not named: the config's counts, as with the parent
    step = child(ids[:, 11:], **{CACHE: getattr(first, CACHE)}).logits[:, -1]
    torch.testing.assert_close(step, child(ids).logits[:, -1], rtol=1e-4, atol=1e-4)
    assert getattr(child(ids, use_cache=False), CACHE) is None


@cached_cases
@torch.no_grad()
def test_a_cache_made_without_a_config_sees_what_was_before(family: str, shape: str) -> None:
    child, ids, cache = child_of(family, shape), token_ids(1, 20), DynamicCache()
    child(ids[:, :12], past_key_values=cache)
    step = child(ids[:, 12:], past_key_values=cache).logits
    torch.testing.assert_close(step, child(ids).logits[:, 12:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", True), ("gemma3_text", True)])
@torch.no_grad()
def test_the_vocabulary_grows_and_stays_tied(family: str, tied: bool, tmp_path: Path) -> None:
    child, ids = child_of(family, "mixed", tie_word_embeddings=tied), token_ids(2, 9)
    before = child(ids).logits
    child.resize_token_embeddings(70)
    assert (child.lm_head.weight is child.model.embed_tokens.weight) == tied
    assert torch.equal(child(ids).logits[..., :64], before)
    assert child(ids, labels=torch.full_like(ids, 69)).loss.isfinite()
    back = opened(folder_of(child, tmp_path))
    assert back.config.vocab_size == 70 and torch.equal(back(ids).logits, child(ids).logits)
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == tied
    back.resize_token_embeddings(64)
    assert torch.equal(back(ids).logits, before)


@pytest.mark.parametrize(("family", "shape"), [CASES[0], CASES[2], CASES[4], CASES[6]])
@torch.no_grad()
def test_compiled_logits_are_the_same(family: str, shape: str) -> None:
    child, ids = child_of(family, shape), token_ids(2, 12)
    torch._dynamo.reset()
    compiled = torch.compile(child, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, child(ids).logits, rtol=1e-5, atol=1e-5)
