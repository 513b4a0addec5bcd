"""Write a child that sees as one whole model again: its text model behind its parent's own vision tower and projector.

A text model whose layers differ travels with its code, as text children do (blocks/export_code/vision_decilm.py). One
whose layers are all alike makes a plain LLaVA.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

from blocks import export_code
from blocks.export_code import CODE_FILES, VISION_AUTO_MAP, VISION_CODE
from blocks.export_code.configuration_decilm import DeciLMConfig
from blocks.export_code.modeling_decilm import DeciLMForCausalLM
from blocks.export_code.vision_decilm import DeciLMLlavaConfig, DeciLMLlavaForConditionalGeneration
from blocks.images import VISION, seeing
from tasks.export.folder import (
    ExportError,
    add_to_config,
    native_config,
    private_code_cache,
    verify_logits,
    write_folder,
)
from tasks.inputs.vision import TEXT, tensors_in, vision_tensors

TOKENS = 8  # that are generated about an image to check a folder
NOT_THE_WHOLES = ("model_type", "architectures", "text_config", "transformers_version", "dtype", "torch_dtype")
SEEING = """
## With images

This folder is a whole model of text and images:

    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder)
"""


def export_whole(model: DeciLMForCausalLM, child: Path, target: Path, card: str) -> list[str]:
    """Write a text model to `target` as a whole model, with tower, projector, tokenizer and processor of the child's
    folder. Returns what was checked, in sentences.

    As `export_folder`, nothing of `target` changes before all checks have passed. Raises ExportError.
    """
    tensors = vision_tensors(child)
    write = partial(_write, model, child / VISION, tensors)
    write_folder(child, target, card.replace(SEEING, "") + SEEING, write, partial(_verify, model, tensors))
    return [
        "checked: loaded again with transformers it gives exactly the child's logits, on words and about an image, and "
        f"the child's {TOKENS} most likely tokens about it; vision tower and projector are the parent's bit for bit",
        "not tried in vLLM: no engine here sees with layers that differ",
    ]


def _write(model: DeciLMForCausalLM, vision: Path, tensors: dict[str, Tensor], folder: Path) -> None:
    config = cast(DeciLMConfig, model.config)
    native = native_config(config)
    values = json.loads((vision / "config.json").read_text(encoding="utf-8"))
    fields = {key: value for key, value in values.items() if key not in NOT_THE_WHOLES}
    fields |= {"tie_word_embeddings": bool(config.tie_word_embeddings), "dtype": model.dtype}
    with torch.device("meta"):
        whole: Any = (
            DeciLMLlavaForConditionalGeneration(DeciLMLlavaConfig(text_config=config.to_dict(), **fields))
            if native is None
            else LlavaForConditionalGeneration(LlavaConfig(text_config=native.to_dict(), **fields))
        )
    text = {
        f"{TEXT}{name.removeprefix('model.')}" if name.startswith("model.") else name: tensor
        for name, tensor in model.state_dict().items()
    }
    whole.load_state_dict(text | tensors, assign=True)
    whole.tie_weights()
    whole.generation_config = model.generation_config or GenerationConfig()
    whole.save_pretrained(folder)
    if native is None:
        add_to_config(folder, auto_map=VISION_AUTO_MAP)
        for name in (*CODE_FILES, VISION_CODE):
            shutil.copyfile(Path(export_code.__path__[0]) / name, folder / name)


@torch.no_grad()
def _verify(model: DeciLMForCausalLM, tensors: dict[str, Tensor], folder: Path) -> None:
    """Raise ExportError unless the folder, loaded as anyone would load it, is the text model behind these tensors."""
    with private_code_cache():
        how: dict[str, Any] = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
        whole: Any = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **how)
    whole = whole.eval().to(model.device)
    verify_logits(model, whole)
    stored = {
        name.removeprefix("model."): tensor for name, tensor in tensors_in(folder).items()
    }  # not what a load casts
    pairs = [(tensor, stored.get(name.removeprefix("model."))) for name, tensor in tensors.items()]
    if any(one is None or one.dtype != tensor.dtype or not torch.equal(one, tensor) for tensor, one in pairs):
        raise ExportError(
            "the exported vision tower or projector is not the parent's: nothing was replaced. Run again."
        )
    words, pixels = _about_an_image(whole)
    features = torch.cat(list(whole.get_image_features(pixel_values=pixels).pooler_output))
    first = model.config.vocab_size
    ids = words.masked_scatter(words == whole.config.image_token_id, first + torch.arange(len(features)).to(words))
    greedy = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    with seeing(model.model.embed_tokens, features):
        expected = model.eval()(ids, use_cache=False).logits
        said = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)[:, ids.shape[1] :]
    if not torch.equal(expected, whole(input_ids=words, pixel_values=pixels, use_cache=False).logits):
        raise ExportError("the exported folder differs from the child about an image: nothing was replaced. Run again.")
    about = {"input_ids": words, "pixel_values": pixels, "attention_mask": torch.ones_like(words)}
    if not torch.equal(whole.generate(**about, **greedy)[:, words.shape[1] :], said):
        raise ExportError("the exported folder says other words about an image than the child: nothing was replaced.")


def _about_an_image(whole: Any) -> tuple[Tensor, Tensor]:
    """Some words with an image between them (1, T), and its pixels."""
    config, noise = whole.config.vision_config, torch.Generator().manual_seed(0)
    shape = (1, config.num_channels, config.image_size, config.image_size)
    pixels = torch.randn(shape, generator=noise).to(whole.device, whole.dtype)
    count = len(whole.get_image_features(pixel_values=pixels).pooler_output[0])
    words = torch.randint(whole.config.text_config.vocab_size, (1, 12), generator=noise)
    image = whole.config.image_token_id
    words[words == image] = 0 if image else 1
    placed = torch.cat([words[:, :4], torch.full((1, count), image), words[:, 4:]], dim=1)
    return placed.to(whole.device), pixels
