"""A tiny LLaVA for tests: random weights, CLIP's tower of three layers, a byte tokenizer; images of one colour each."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
)

from profiles.schema import FolderParent
from tasks.inputs.parent import prepare_parent
from tasks.inputs.tiny import byte_tokenizer
from tests.tiny import tiny_model

IMAGE = "<image>"
TOKENS = 4  # of an image: 2 x 2 patches
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 230), "grey": (120, 120, 120)}
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ '\n' }}{% endfor %}"


def tiny_llava(folder: Path, family: Any = "llama", tower: str = "clip", template: str = "", **changes: Any) -> Path:
    """Save a tiny LLaVA with its processor; returns the folder. changes: of the text model's config."""
    tokenizer: Any = byte_tokenizer()
    tokenizer.chat_template = template or None
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = tiny_model(family, vocab_size=len(tokenizer) + 4, **changes)
    for name, value in special.items():
        setattr(text.config, name, value)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    kind = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[tower]
    config = LlavaConfig(
        text_config=text.config,
        vision_config=kind(**sizes, image_size=16, patch_size=8),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = LlavaForConditionalGeneration(config)
        for name, parameter in model.named_parameters():
            if "vision" in name or "projector" in name:  # a fresh tower hardly tells one image from another
                torch.nn.init.normal_(parameter, std=0.3)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.save_pretrained(folder)
    pixels = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(tower == "clip"),
        image_token=IMAGE,
    )
    processor.save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    return folder


def whole_llava(folder: Path) -> Any:
    """The whole model of a folder, as transformers has it."""
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def coloured(folder: Path, count: int = 24, questions: Sequence[str] = ("what colour is it?", "is it red?")) -> Path:
    """A JSON-lines file of questions about so many images of one colour each, beside the images."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        name = list(COLOURS)[number % len(COLOURS)]
        Image.new("RGB", (20, 24), tuple(part + number % 30 for part in COLOURS[name])).save(folder / f"{number}.png")
        for question in questions:
            answer = name if question.startswith("what") else "yes" if name == "red" else "no"
            lines.append(json.dumps({"image": f"{number}.png", "question": question, "answer": answer}))
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def prepared_llava(folder: Path, workspace: Path) -> Any:
    """The prepared parent of a LLaVA's folder."""
    return prepare_parent(FolderParent(path=str(folder)), workspace, None)
