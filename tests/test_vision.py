"""Parents that see: prepared, asked about images, written back, judged. Held to transformers' own LLaVA throughout."""

import json
import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from benchmarks.multimodal import mostly_right, shown_others
from blocks.compute import HOST
from blocks.engine_limits import EngineLimit
from blocks.errors import ChildError, CorpusError, ParentError
from blocks.files import sha256_of
from blocks.images import image_ids
from blocks.library import read_tensors, write_value
from blocks.parent import Parent, config_of, in_dtype
from blocks.records import CorpusInfo, LayerChoice, ParentInfo
from flows import stages
from flows.serving import _calibration
from profiles.schema import (
    BLD,
    GKD,
    Corpus,
    EasyVqaSource,
    FolderParent,
    HubParent,
    ImageQuestionsSource,
    Profile,
    Record,
    TextSource,
)
from tasks.distill.bld import Job, distill
from tasks.distill.gkd_job import distill_globally, job_of
from tasks.distill.gkd_targets import record_teacher
from tasks.distill.record import record_layer
from tasks.evaluate.answers import continued
from tasks.evaluate.compare import LINEAGE, Lineage, contender, served, targets_of
from tasks.evaluate.exact import answered, questions_of, words_of
from tasks.evaluate.fusion import fusion_text
from tasks.evaluate.loops import beginnings
from tasks.evaluate.quality import sequence_figures
from tasks.export.folder import export_child
from tasks.export.formats import export_as
from tasks.inputs import image_questions, vision
from tasks.inputs.chats import IMAGE as MARK
from tasks.inputs.chats import Unusable, messages_of
from tasks.inputs.corpus import (
    document_tokenizer,
    fit_weights_of,
    prepare_corpus,
    queues_of,
    starts_of,
    weights_of,
    words_alone,
)
from tasks.inputs.image_questions import by_digest, image_ids_of
from tasks.inputs.parent import prepare_parent, write_config
from tasks.inputs.vision import vision_tensors, with_images
from tasks.operating.champion import judge_against
from tasks.operating.champion_limits import reading
from tasks.operating.requirements import MachineLacks, advice, check_profile, lacking
from tasks.planning.plan import config_parent, machine_rates, plan_of
from tasks.probe.records import Asked
from tasks.probe.sides import SeenText
from tasks.probe.texts import own_text
from tasks.score.scoring import ScoringSet, score_sequences
from tasks.studies.truth import other_model
from tests.chain import chosen, recording
from tests.tiny import tiny_parent
from tests.vision import IMAGE, TEMPLATE, TOKENS, coloured, prepared_llava, tiny_llava, whole_llava


@pytest.mark.parametrize(
    ("family", "tower"), [("llama", "clip"), ("qwen2", "siglip"), ("mistral", "clip"), ("qwen3", "clip")]
)
def test_the_text_model_is_the_parent_and_the_rest_is_kept(tmp_path: Path, family: str, tower: str) -> None:
    source = tiny_llava(tmp_path / "source", family, tower)
    if tower == "siglip":  # as late versions of transformers name the weights
        whole_llava(source).save_pretrained(source, save_original_format=False)
    info, whole = prepared_llava(source, tmp_path / "work"), whole_llava(source)
    folder = tmp_path / "work" / info.folder
    assert "writes a whole model of text and images again" in info.notes[-1]
    ids = torch.randint(250, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        assert torch.equal(found, whole(input_ids=ids).logits)
        assert torch.equal(found, Parent(folder, HOST).model()(ids).logits)
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
    save_file(tensors | {name: tensors[name][:8].clone()}, source / "model.safetensors", {"format": "pt"})
    assert "expected [32, 32]" in refusal(source, work)
    save_file(tensors | {name: tensors[name] / 0}, source / "model.safetensors", {"format": "pt"})
    assert "NaN or infinite" in refusal(source, work)


def test_of_the_hub_the_config_alone_tells_what_cannot_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot see, or by a tower that is not carried, or is to be rotated, is refused before the rest comes."""
    snapshot, blind, fetched = tiny_llava(tmp_path / ("c" * 40)), tiny_parent(tmp_path / "blind"), list[list[str]]()
    config = snapshot / "config.json"
    values = config.read_text()

    def download(hub_id: str, revision: str, allow_patterns: list[str]) -> str:
        fetched.append(allow_patterns)
        return str(snapshot)

    def refused(told: str, rotate: bool = False, **asked: bool) -> None:
        source = HubParent(hub_id="some/llava", rotate=rotate)
        with pytest.raises(ParentError, match=told):
            prepare_parent(source, tmp_path / "work", None, **asked)
        assert fetched and all(names == ["config.json"] for names in fetched)
        fetched.clear()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    refused("leave rotate out", rotate=True)
    edit(snapshot, vision_config={"model_type": "pixtral"})
    refused("sees by pixtral: carried are clip_vision_model")
    config.write_text((blind / "config.json").read_text())
    refused("a text asks about images, and some/llava has no vision tower: take a parent of .* llava", must_see=True)
    path = coloured(tmp_path / "images", 4)
    here: Any = SimpleNamespace(source=snapshot, path=path)
    wanted = profile_of(here, parent={"kind": "hub", "hub_id": "some/llava"})
    assert not lacking(wanted) and not fetched, "nothing is known of it before a run"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(config))
    assert any("some/llava has no vision tower" in told for told in lacking(wanted)) and not fetched
    config.write_text(values)
    assert not lacking(wanted)
    assert prepare_parent(HubParent(hub_id="some/llava"), tmp_path / "work", None, must_see=True).revision == "c" * 40


def test_code_that_prepares_pixels_is_refused_and_does_not_travel(tmp_path: Path) -> None:
    source, work = tiny_llava(tmp_path / "source"), tmp_path / "work"
    path = source / "processor_config.json"
    values = json.loads(path.read_text())
    code = {"AutoImageProcessor": "pixels.Own"}
    path.write_text(json.dumps(values | {"image_processor": values["image_processor"] | {"auto_map": code}}))
    (source / "preprocessor_config.json").write_text(json.dumps(values["image_processor"] | {"auto_map": code}))
    (source / "pixels.py").write_text("raise SystemExit('somebody ran it')")
    assert "auto_map in preprocessor_config.json), which is not run here" in refusal(source, work)
    parent = prepare_parent(FolderParent(path=str(source), trust_remote_code=True), work, None)
    folder = work / parent.folder
    assert not any("auto_map" in one.read_text() for one in folder.rglob("*.json"))
    assert {one.name for one in (folder / "vision").glob("*.json")} >= {path.name, "preprocessor_config.json"}
    (source / "preprocessor_config.json").unlink()
    assert "auto_map in processor_config.json" in refusal(source, tmp_path / "other")
    questions = by_digest(asked(coloured(tmp_path / "images", 4)).images)
    assert with_images(parent, questions, work, HOST).fingerprint == parent.fingerprint


# --- images among tokens

QUESTIONS = ("what colour is it?", "is it red?")


def asked(path: Path, **changes: Any) -> Corpus:
    fields = {"sequence_length": 96, "train_sequences": 6, "validation_sequences": 2, "test_sequences": 3}
    source = ImageQuestionsSource(kind="image_questions", path=str(path))
    return Corpus(**{"sources": (source,), "prompt_weight": 0, **fields, **changes})


@dataclass(frozen=True)
class Seen:
    """A prepared LLaVA with the features of its images, and a corpus that asks about them."""

    source: Path
    workspace: Path
    parent: ParentInfo
    corpus: CorpusInfo
    path: Path

    def rows(self, split: str = "train") -> torch.Tensor:
        return read_tensors(self.workspace, self.corpus.tokens, [split])[split].long()

    @property
    def reader(self) -> Parent:
        return Parent(self.workspace / self.parent.folder, HOST)


def seen(folder: Path, template: str = "", wanted: dict[str, Any] | None = None, **changes: Any) -> Seen:
    source = tiny_llava(folder / "source", template=template, **changes)
    workspace, path = folder / "work", coloured(folder / "images", 48)
    corpus = asked(path, **(wanted or {}))
    plain = prepared_llava(source, workspace)
    parent = with_images(plain, by_digest(corpus.images), workspace, HOST)
    assert (
        with_images(plain, by_digest(corpus.images), workspace, HOST) == parent
        and parent.fingerprint == plain.fingerprint
    )
    made = prepare_corpus(corpus, workspace / parent.folder, parent.fingerprint, workspace)
    return Seen(source, workspace, parent, made, path)


def as_transformers_reads(row: torch.Tensor, here: Seen) -> tuple[torch.Tensor, list[Path]]:
    """A row with LLaVA's own image token in the place of features, and the images in their order."""
    first = here.reader.config.vocab_size
    ids = image_ids(here.workspace / here.parent.folder, first)
    by_id = {each.start: digest for digest, each in ids.items()}
    files = {sha256_of(path): path for path in here.path.parent.glob("*.png")}
    found = [files[by_id[token]] for token in row.tolist() if token in by_id]
    return torch.where(row >= first, whole_llava(here.source).config.image_token_index, row), found


PARTS = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}{{ '<image>\n' }}{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{{ '\n' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("family", "tower", "template"),
    [("llama", "clip", ""), ("qwen2", "siglip", TEMPLATE), ("gemma3_text", "clip", PARTS)],
)
def test_logits_are_those_of_transformers_own_llava(tmp_path: Path, family: str, tower: str, template: str) -> None:
    here = seen(tmp_path, template, family=family, tower=tower)
    whole, processor = whole_llava(here.source), AutoProcessor.from_pretrained(here.source)
    embedding, model = here.reader.embedding(), here.reader.model()
    for row in here.rows()[:3]:
        ids, files = as_transformers_reads(row, here)
        assert files and len(files) * TOKENS == int((ids != row).sum())
        pixels = processor.image_processor(images=[Image.open(file) for file in files], return_tensors="pt")
        with torch.no_grad():
            expected = whole(input_ids=ids[None], **pixels, output_hidden_states=True, use_cache=False)
            found = model(row[None], use_cache=False).logits
        assert (found - expected.logits).abs().max() < 1e-5 * expected.logits.abs().max().clamp(min=1)
        assert (embedding(row[None]) - expected.hidden_states[0]).abs().max() < 1e-5
        blind = whole(input_ids=torch.where(ids == row, ids, 7)[None], use_cache=False).logits
        assert (blind - expected.logits).abs().max() > 1e-2


def test_a_row_holds_whole_documents_as_the_processor_reads_them(tmp_path: Path) -> None:
    here = seen(tmp_path, PARTS, wanted={"sequence_length": 128})
    processor = AutoProcessor.from_pretrained(here.source)
    first, end = here.corpus.first_image, processor.tokenizer.eos_token_id
    assert first == here.reader.config.vocab_size
    weights = weights_of(here.corpus, "train", here.workspace)
    assert weights is not None and weights.mean() == pytest.approx(1)
    starts = set(starts_of(here.corpus, "train", here.workspace).tolist())
    for number, row in enumerate(here.rows()):
        ids, files = as_transformers_reads(row, here)
        assert files and number * 128 in starts
        place, counted = 0, torch.zeros(128, dtype=torch.bool)
        for file in files:
            name = json.loads(here.path.read_text().splitlines()[2 * int(file.stem)])["answer"]
            answers = (name, "yes" if name == "red" else "no")
            chat, spans = "", []
            for question, answer in zip(QUESTIONS, answers, strict=True):
                chat += f"user: {'' if chat else IMAGE + chr(10)}{question}\nassistant: "
                spans.append((len(chat), len(chat) + len(answer) + 1))
                chat += f"{answer}\n"
            text = chat.rstrip()
            own = processor(images=[Image.open(file)], text=text, return_tensors="pt")["input_ids"][0]
            assert torch.equal(ids[place : place + len(own)], own) and ids[place + len(own)] == end
            for start, last in spans:  # of bytes; the image takes TOKENS, its name in the text took one character each
                shift = place + TOKENS - len(IMAGE)
                counted[shift + start - 1 : shift + min(last, len(text)) - 1] = True
            counted[place + len(own) - 1] = True  # the end of the document
            place += len(own) + 1
        assert (ids[place:] == end).all() and place > 128 - len(own) - 1
        assert torch.equal(weights[number].bool(), counted)


def test_chats_without_an_image_are_written_in_parts_too(tmp_path: Path) -> None:
    """Words and images in one corpus. The template writes nothing of a content that is a string."""
    source, workspace, path = tiny_llava(tmp_path / "source", template=PARTS), tmp_path / "work", coloured(tmp_path)
    chats = [f"how far is {number}?" for number in range(40)]
    lines = [{"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": "far"}]} for one in chats]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = TextSource(kind="jsonl", path=str(tmp_path / "chats.jsonl"), text_field="messages", weight=1)
    images = ImageQuestionsSource(kind="image_questions", path=str(path), weight=1)
    corpus = asked(path, sources=(words, images))
    parent = with_images(prepared_llava(source, workspace), by_digest(corpus.images), workspace, HOST)
    made = prepare_corpus(corpus, workspace / parent.folder, parent.fingerprint, workspace)
    tokenizer: Any = AutoTokenizer.from_pretrained(workspace / parent.folder)
    rows = read_tensors(workspace, made.tokens, ["train"])["train"].long()
    weights = weights_of(made, "train", workspace)
    assert weights is not None and (rows >= made.first_image).any()
    ids, counts = rows.flatten(), weights.flatten()
    text = tokenizer.decode(ids.where(ids < made.first_image, 32))
    whole = [one for one in chats if f"user: {one}\nassistant: far" in text]
    assert len(whole) > 3 and "user: assistant:" not in text
    usable, image = words_alone(made, "train", workspace), rows >= made.first_image
    pieces, numbers = beginnings(rows, 1000, usable)
    said_there = [tokenizer.decode(piece) for piece in pieces]
    assert len(numbers) > 2 and all("far" in one or "how" in one for one in said_there)
    assert not any("colour" in one or "is it" in one or 2 * tokenizer.eos_token in one for one in said_there)
    assert not usable[image].any() and not usable[tokenizer.eos_token_id == rows][1:].all()
    with pytest.raises(CorpusError, match="nobody can go on from words"):
        beginnings(rows, 9, usable & False)
    answer = torch.tensor(tokenizer("far", add_special_tokens=False)["input_ids"])
    places = (ids.unfold(0, len(answer), 1) == answer).all(1).nonzero().flatten().tolist()
    said = [place for place in places if tokenizer.decode(ids[place - 2 : place].tolist()) == ": "]
    assert len(said) >= len(whole) and all(counts[place - 1] > 0 for place in said)


@pytest.mark.parametrize("kind", ["ids", "text", "chat"])
def test_ids_beyond_the_vocabulary_are_no_image(tmp_path: Path, kind: str) -> None:
    """Of words they are another tokenizer's, which nobody is to read as somebody's image."""
    here = seen(tmp_path)
    first, folder = here.corpus.first_image, here.workspace / here.parent.folder
    said: list[Any] = [f"how far8 is {number} from here to there?" for number in range(60)]
    if kind == "ids":
        said = [[*range(97, 122), first + 2, number % 90 + 1] for number in range(60)]
    else:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([f"far{number}" for number in range(9)])
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
    if kind == "chat":
        answer = {"role": "assistant", "content": "far"}
        said = [[{"role": "user", "content": one}, answer] for one in said]
    rows = [{"input_ids": one} for one in said]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = TextSource(kind="jsonl", path=str(tmp_path / "rows.jsonl"), text_field="input_ids", weight=1)
    images = ImageQuestionsSource(kind="image_questions", path=str(here.path), weight=1)
    with pytest.raises(CorpusError, match=rf"gives token {first + 2 if kind == 'ids' else '[0-9]+'}, but the parent"):
        prepare_corpus(asked(here.path, sources=(words, images)), folder, here.parent.fingerprint, here.workspace)


def test_images_count_where_blocks_are_fitted_and_nowhere_else(tmp_path: Path) -> None:
    here = seen(tmp_path, wanted={"prompt_weight": 0.5})
    rows, weights = here.rows(), weights_of(here.corpus, "train", here.workspace)
    fitted = fit_weights_of(here.corpus, "train", here.workspace, (0, len(rows)))
    assert weights is not None and fitted is not None
    image = rows >= here.corpus.first_image
    assert (fitted[image] == 1).all() and torch.equal(fitted[~image], weights[~image])
    assert not (weights[:, :-1][image[:, 1:]]).any()  # nobody foretells an image


def test_documents_of_one_image_are_in_one_split(tmp_path: Path) -> None:
    here = seen(tmp_path)
    found = [
        set(one[one >= here.corpus.first_image].tolist()) for one in map(here.rows, ("train", "validation", "test"))
    ]
    assert all(found) and not found[0] & found[1] and not found[0] & found[2] and not found[1] & found[2]


@pytest.mark.parametrize("weights", [(None, None), (1, 3)])
def test_an_image_of_two_names_or_sources_is_one_document(tmp_path: Path, weights: tuple[int | None, ...]) -> None:
    here = seen(tmp_path)
    lines = [json.loads(line) for line in here.path.read_text().splitlines()]
    for number in range(24):  # of one folder, half of the other under other names, and new ones
        image = (
            Image.open(here.path.parent / f"{number}.png") if number % 2 else Image.new("RGB", (9, 9), (number, 9, 7))
        )
        image.save(here.path.parent / f"again-{number}.png")
    more = [{"image": f"again-{number}.png", "question": "is it big?", "answer": "no"} for number in range(24)]
    there = here.path.with_name("more.jsonl")
    there.write_text("".join(json.dumps(line) + "\n" for line in more))
    sources = tuple(
        ImageQuestionsSource(kind="image_questions", path=str(path), weight=weight)
        for path, weight in zip((here.path, there), weights, strict=True)
    )
    corpus = asked(here.path, sources=sources)
    queues = queues_of(corpus, image_questions.plain)
    found = [str(text) for queue in queues for text in queue.documents]
    marks = [MARK.findall(text) for text in found]
    assert (
        len(found) == 48 + 12 and all(len(one) == 1 for one in marks) and len({one[0] for one in marks}) == len(found)
    )
    assert sum("is it big?" in text for text in found) == 24 and sum("is it red?" in text for text in found) == 48
    assert sum(text.count("Question:") == 3 for text in found) == 12
    here.path.write_text("".join(json.dumps(line | {"image": "0.png"}) + "\n" for line in lines[:2]))
    there.write_text(here.path.read_text() + json.dumps(lines[0] | {"question": "and now?"}) + "\n")
    (text,) = queues_of(corpus.model_copy(update={"sources": sources[:1]}), image_questions.plain)[0].documents
    assert str(text).count("Question:") == 2
    with pytest.raises(CorpusError, match="images of the sources before it alone"):
        queues_of(corpus, image_questions.plain)


def test_other_images_are_another_corpus_and_the_same_parent(tmp_path: Path) -> None:
    here = seen(tmp_path)
    for number, path in enumerate(here.path.parent.glob("*.png")):
        Image.new("RGB", (20, 24), (1, 2, number)).save(path)
    corpus = asked(here.path)
    again = with_images(prepared_llava(here.source, here.workspace), by_digest(corpus.images), here.workspace, HOST)
    assert again.folder != here.parent.folder and again.fingerprint == here.parent.fingerprint
    made = prepare_corpus(corpus, here.workspace / again.folder, again.fingerprint, here.workspace)
    assert made.fingerprint != here.corpus.fingerprint
    table = here.workspace / again.folder / "images.safetensors"
    bits = load_file(table)
    save_file(bits | {"features": bits["features"] * (1 + 1e-6)}, table)  # as another device would give them
    same = prepare_corpus(corpus, here.workspace / again.folder, again.fingerprint, here.workspace)
    assert same.fingerprint == made.fingerprint
    with pytest.raises(CorpusError, match="an image has changed"):
        prepare_corpus(corpus, here.workspace / here.parent.folder, again.fingerprint, here.workspace)


def test_questions_that_cannot_be_asked_are_refused(tmp_path: Path) -> None:
    source, work, path = tiny_llava(tmp_path / "source"), tmp_path / "work", coloured(tmp_path / "images")
    plain = prepared_llava(source, work)
    parent = with_images(plain, by_digest(asked(path).images), work, HOST)

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(CorpusError, match=match):
            prepare_corpus(asked(path, **changes), work / parent.folder, parent.fingerprint, work)

    refused("does not hold an image with a question", sequence_length=12)
    lines = path.read_text()
    path.write_text(lines.replace("is it red?", "is <image> red?").replace("what colour", "what <image>"))
    refused(r"48 of 48 questions are of no use, the first: question 1 holds the parent's token for an image, <image>")
    path.write_text(lines.replace('"answer"', '"said"'))
    refused("line 1 lacks one of image, question, answer")
    path.write_text(lines.replace('.png"', '.jpg"'))
    refused(r"names an image that is not there \(0.jpg\)")
    path.unlink()
    refused("are no file")
    path.write_text(lines)
    for content, told in (
        (b"not an image", "0.png is no image that can be read .* PNG, JPEG, WEBP, BMP, GIF are, of up to 67 million"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "0.png is no image"),
        ((path.parent / "1.png").read_bytes()[:60], "0.png is no image"),
        (png_header(9000, 9000), "0.png has 81 million pixels, at most 67 million"),
        (png_header(90000, 90000), "0.png is no image .* decompression bomb"),
    ):
        (path.parent / "0.png").write_bytes(content)
        with pytest.raises(CorpusError, match=told):
            with_images(plain, by_digest(asked(path).images), work, HOST)


def png_header(width: int, height: int) -> bytes:
    """A small file that says that it is a large image."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    sum_of = zlib.crc32(header).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + sum_of + (9).to_bytes(4, "big") + b"IDAT"


def test_lines_that_cannot_be_asked_are_counted(tmp_path: Path) -> None:
    """One of many stops no run: not an image by name, not the image's token, nor a question that a template refuses."""
    here = seen(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(here.source)
    many = [{"image": f"{number}.png", "question": "is it big?", "answer": "no"} for number in range(48)]
    odd = ["data:image/png;base64," + "A" * 5000, "x" * 300, "~nobody-at-all/a.png", "a\0b.png", "https://a.b/c.png"]
    named = [{"image": name, "question": "is it odd?", "answer": "yes"} for name in odd]
    worded = [{"image": "3.png", "question": one, "answer": "no"} for one in ("see <image> there", "refuse this")]
    copied = {"image": "3.png", "question": f"<image {'0' * 64}>", "answer": "no"}
    here.path.write_text("".join(json.dumps(line) + "\n" for line in [*many, *named, *worded, copied]))
    tokenizer.chat_template = (
        "{% for m in messages %}{% if 'refuse' in m.content %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}{{ '\n' }}{% endfor %}"
    )
    ids = image_ids_of(here.workspace / here.parent.folder, tokenizer)
    notes: list[str] = []
    (queue,) = queues_of(asked(here.path), document_tokenizer(tokenizer, True, ids).chat, notes)
    assert len(queue.documents) == 48 and not any("odd" in text or "refuse" in text for text in queue.documents)
    lines, questions = notes
    assert "6 of 56 lines" in lines and "names an image that is not there (data:image/png;base64,AAA" in lines
    assert "2 of 50 questions of questions.jsonl were skipped" in questions and "<image>, as a word" in questions
    chat = [{"role": "user", "content": f"copied <image {'0' * 64}>"}, {"role": "assistant", "content": "no"}]
    with pytest.raises(Unusable, match="holds what stands for an image"):
        messages_of(chat)


def test_questions_are_read_once_as_long_as_their_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the table of images, the key of the corpus, its documents, and beside other sources."""
    opened, plainly = list[str](), Path.open

    def counted(path: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(path.name)
        return plainly(path, *arguments, **options)

    source, workspace = tiny_llava(tmp_path / "source"), tmp_path / "work"
    path, more = coloured(tmp_path / "images", 24), coloured(tmp_path / "more", 4, ("is it small?",))
    more = more.rename(more.with_name("more.jsonl"))
    for number in range(4):
        Image.new("RGB", (9, 9), (number, 9, 7)).save(more.parent / f"{number}.png")
    sources = tuple(ImageQuestionsSource(kind="image_questions", path=str(one)) for one in (path, more))
    corpus, plain = asked(path, sources=sources, train_sequences=2), prepared_llava(source, workspace)

    def made() -> CorpusInfo:
        opened.clear()
        parent = with_images(plain, by_digest(corpus.images), workspace, HOST)
        return prepare_corpus(corpus, workspace / parent.folder, parent.fingerprint, workspace)

    monkeypatch.setattr(Path, "open", counted)
    first = made()
    assert opened.count(path.name) == opened.count(more.name) == 1
    assert made() == first and not {path.name, more.name} & set(opened)
    with more.open("a") as file:
        file.write(json.dumps({"image": "0.png", "question": "is it new?", "answer": "yes"}) + "\n")
    second = made()
    assert second.fingerprint != first.fingerprint and opened.count(more.name) == 1 and path.name not in opened
    (path.parent / "23.png").unlink()  # of which its file, as it was, says nothing
    third = made()
    assert third.fingerprint != second.fingerprint and "2 of 48 lines" in third.description
    assert not {path.name, more.name} & set(opened)


def test_of_more_images_the_new_ones_alone_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are taken from tables that are whole and of the same parent, whatever else the profile asks about."""
    path, workspace, looked = coloured(tmp_path / "images", 12), tmp_path / "work", list[str]()
    plain, opened = prepared_llava(tiny_llava(tmp_path / "source"), workspace), vision._opened

    def watched(digest: str, path: Path) -> Any:
        looked.append(path.name)
        return opened(digest, path)

    def table(parent: ParentInfo, numbers: Sequence[int], workspace: Path = workspace) -> dict[str, torch.Tensor]:
        """Features of some images by their digests, and in `looked` what the tower saw for them."""
        looked.clear()
        images = {d: p for d, p in by_digest(asked(path).images).items() if int(p.stem) in numbers}
        folder = workspace / with_images(parent, images, workspace, HOST).folder
        features, places = load_file(folder / "images.safetensors")["features"], image_ids(folder, 0)
        assert list(places) == list(images) and len(features) == TOKENS * len(images)
        return {digest: features[place.start : place.stop] for digest, place in places.items()}

    monkeypatch.setattr(vision, "_opened", watched)
    first, second = table(plain, range(6)), table(plain, range(5, 9))
    assert sorted(looked) == ["6.png", "7.png", "8.png"]
    third = table(plain, range(12))
    assert sorted(looked) == ["10.png", "11.png", "9.png"]
    assert all(torch.equal(one, third[digest]) for digest, one in (first | second).items())
    alone = table(prepared_llava(tmp_path / "source", tmp_path / "other"), range(12), tmp_path / "other")
    assert len(looked) == 12
    torch.testing.assert_close(third, alone, rtol=1e-4, atol=1e-4)  # of other batches
    assert not table(plain, range(3, 11)).keys() - third.keys() and not looked, "and no tower was made"
    edit(tmp_path / "source", vision_feature_layer=-1)
    assert len(table(prepared_llava(tmp_path / "source", workspace), range(2))) == len(looked) == 2
    for damaged in workspace.glob("parent/*/images.safetensors"):
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    table(plain, range(1, 4))
    assert sorted(looked) == ["1.png", "2.png", "3.png"]


def test_a_photo_is_seen_upright(tmp_path: Path) -> None:
    """Its file may say that it lies on its side."""
    upright = Image.new("RGB", (16, 16))
    upright.paste((250, 10, 10), (0, 0, 16, 8))
    lying, how = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    how[274] = 6  # to be turned clockwise
    lying.save(tmp_path / "lying.png", exif=how)
    upright.save(tmp_path / "upright.png")
    lying.save(tmp_path / "plain.png")
    lines = [{"image": f"{name}.png", "question": "?", "answer": "a"} for name in ("lying", "upright", "plain")]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    parent, work = prepared_llava(tiny_llava(tmp_path / "source"), tmp_path / "work"), tmp_path / "work"
    folder = work / with_images(parent, by_digest(asked(tmp_path / "questions.jsonl").images), work, HOST).folder
    ids, features = image_ids(folder, 0), load_file(folder / "images.safetensors")["features"]
    own = {name: features[list(ids[sha256_of(tmp_path / f"{name}.png")])] for name in ("lying", "upright", "plain")}
    assert torch.equal(own["lying"], own["upright"]) and not torch.equal(own["lying"], own["plain"])


# --- a child written back


def child_of(here: Seen, alike: bool = False) -> Any:
    """The text model with layers that differ, or of which all have one KV head."""
    layers = [LayerChoice(attention="kv1") if alike else LayerChoice()] * here.reader.depth
    if not alike:
        layers = [LayerChoice(attention="no_op"), LayerChoice(ffn="ffn24"), *layers[2:]]
    model = here.reader.model(layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for layer, choice in zip(model.model.layers, layers, strict=True):
            if choice != LayerChoice():
                for parameter in layer.parameters():
                    torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(("family", "alike", "dtype"), [("llama", False, "float32"), ("qwen3", True, "bfloat16")])
def test_a_child_is_a_whole_model_again(tmp_path: Path, family: str, alike: bool, dtype: str) -> None:
    here = seen(tmp_path, family=family)
    model = child_of(here, alike)
    child = export_child(model, here.parent, here.workspace, tmp_path / "run" / "child", "# A child\n")
    assert AutoModelForCausalLM.from_pretrained(child, trust_remote_code=True) is not None
    made = export_as(child, "transformers", dtype, tmp_path / "whole")
    assert "vision tower and projector are the parent's bit for bit" in " ".join(made.notes)
    whole: Any = AutoModelForImageTextToText.from_pretrained(made.path, trust_remote_code=True, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(made.path)
    files = {name.replace("model.", ""): tensor for name, tensor in load_file(made.path / "model.safetensors").items()}
    for name, tensor in vision_tensors(here.workspace / here.parent.folder).items():
        assert torch.equal(files[name.replace("model.", "")], tensor)
    assert ("auto_map" in json.loads((made.path / "config.json").read_text())) is not alike
    assert not (made.path / "vision").exists()
    own = in_dtype(in_dtype(model, getattr(torch, dtype)), torch.float32)
    for row in here.rows("test"):
        ids, images = as_transformers_reads(row[:40], here)
        pixels = processor.image_processor(images=[Image.open(file) for file in images], return_tensors="pt")
        with torch.no_grad():
            assert (whole(input_ids=ids[None], **pixels).logits - own(row[None, :40]).logits).abs().max() < 1e-4
        how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        said = whole.generate(input_ids=ids[None], attention_mask=torch.ones(1, 40).long(), **pixels, **how)
        (expected,) = continued(own, row[None, :40], 12, frozenset())
        assert said[0, 40:].tolist() == expected


def test_a_child_that_is_judged_by_its_file_sees(tmp_path: Path) -> None:
    here = seen(tmp_path)
    file = export_as(child_of_kinds(here, tmp_path), "gguf", "float32", here.workspace / "typed" / "child.gguf").path
    layers = (LayerChoice(), LayerChoice(ffn="no_op"), LayerChoice())
    child = contender("child", chosen(layers), [])
    in_file = child.model_copy(update={"file": str(file.relative_to(here.workspace))})
    with torch.no_grad():
        own, read = (
            served(which, here.parent, here.workspace, HOST)(here.rows("test"), use_cache=False).logits
            for which in (child, in_file)
        )
    assert (own - read).abs().max() < 1e-4


def test_formats_that_do_not_see_are_refused(tmp_path: Path) -> None:
    here = seen(tmp_path)
    child = export_child(child_of(here), here.parent, here.workspace, tmp_path / "run" / "child", "# A child\n")
    for form, precision in (("nemotron-nas", None), ("vllm-plugin", None), ("transformers", "w8a8")):
        with pytest.raises(
            EngineLimit, match=f"sees, and no engine that loads {precision or form} runs .* transformers"
        ):
            export_as(child, form, precision, tmp_path / "refused", calibration=lambda: pytest.fail("computed first"))
    made = export_as(child_of_kinds(here, tmp_path), "gguf", "float32", tmp_path / "child.gguf", None)
    assert "give llama.cpp the parent's own mmproj file" in made.notes[-1]
    whole = export_as(child, "transformers", None, tmp_path / "whole").path
    with pytest.raises(ChildError, match="is a whole model of text and images"):
        config_of(whole)
    assert "child that puzzle wrote" in refusal(whole, tmp_path / "other")


def child_of_kinds(here: Seen, folder: Path) -> Path:
    """A child that GGUF can express."""
    model = here.reader.model([LayerChoice(), LayerChoice(ffn="no_op"), LayerChoice()])
    return export_child(model, here.parent, here.workspace, folder / "plain" / "child", "# A child\n")


# --- judged


def test_questions_are_answered_about_their_own_image(tmp_path: Path) -> None:
    here = seen(tmp_path, wanted={"sequence_length": 192, "test_sequences": 4})
    tokenizer, whole = AutoTokenizer.from_pretrained(here.source), whole_llava(here.source)
    processor = AutoProcessor.from_pretrained(here.source)
    found = questions_of(here.corpus, tokenizer, here.workspace, 100)
    documents = starts_of(here.corpus, "test", here.workspace)
    assert len(found) == len(QUESTIONS) * len(documents), "each of every image, the last of a filled sequence too"
    asked_of = []
    for question in found:
        prompt = torch.tensor(question.prompt)
        ids, files = as_transformers_reads(prompt, here)
        assert len(files) == 1 and ids[0] == tokenizer.convert_tokens_to_ids(IMAGE)
        name = json.loads(here.path.read_text().splitlines()[2 * int(files[0].stem)])["answer"]
        last = str(tokenizer.decode(ids)).rpartition("Question: ")[2].partition("\n")[0]
        assert str(tokenizer.decode(ids[TOKENS:])) == f"\nQuestion: {last}\nAnswer:", "and no answer to another"
        assert last in QUESTIONS and question.answer == (name if last == QUESTIONS[0] else ("no", "yes")[name == "red"])
        pixels = processor.image_processor(images=[Image.open(files[0])], return_tensors="pt")
        how = {"max_new_tokens": question.tokens + 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        said = whole.generate(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], **pixels, **how)
        text = str(tokenizer.decode(said[0, len(ids) :].tolist(), skip_special_tokens=True))
        if words_of(text):  # a random model says bytes, hardly ever words
            asked_of.append(replace(question, answer=words_of(text)[0]))
    right = answered(here.reader.model(), tokenizer, asked_of, frozenset(), lambda right, done: None)
    assert len(right) > 4 and all(right)


def test_a_question_is_asked_as_the_processor_writes_it_alone(tmp_path: Path) -> None:
    """By a template that reads parts alone. Without sight a question has another's image, or its commonest answer."""
    begin = "{% if add_generation_prompt %}assistant: {% endif %}"
    here = seen(tmp_path, PARTS + begin, wanted={"sequence_length": 128, "test_sequences": 6})
    processor = AutoProcessor.from_pretrained(here.source)
    found, first = questions_of(here.corpus, processor.tokenizer, here.workspace, 100), here.corpus.first_image
    assert len(found) == len(QUESTIONS) * len(starts_of(here.corpus, "test", here.workspace))
    for number, question in enumerate(found):
        ids, (file,) = as_transformers_reads(torch.tensor(question.prompt), here)
        parts = [{"type": "image"}, {"type": "text", "text": QUESTIONS[number % 2]}]
        text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        own = processor(images=[Image.open(file)], text=text, return_tensors="pt")["input_ids"][0]
        assert ids.tolist() == own.tolist()
    others = shown_others(found, first)
    for one, other in zip(found, others, strict=True):
        pairs = [(a, b) for a, b in zip(one.prompt, other.prompt, strict=True) if a != b]
        assert len(pairs) == TOKENS and all(min(pair) >= first for pair in pairs)
    assert {one.prompt for one in others} == {one.prompt for one in found}, "each image once"
    commonest = mostly_right(found, first)
    red = [one.answer == "no" for one in found[1::2]]
    assert commonest[1::2] == tuple(int(one) for one in red) and sum(red) > len(red) / 2


def test_a_child_is_scored_distilled_and_judged_about_images(tmp_path: Path) -> None:
    """The parent against itself is at nothing everywhere; a block at its score; GKD reads images as the parent does."""
    here = seen(tmp_path)
    reader, corpus = here.reader, here.corpus.model_copy(update={"capability": "images"})
    compute = HOST
    settings = Record(statistics_sequences=4, hidden_sequences=4, validation_sequences=2)
    asked_for = recording(here.parent, here.corpus, settings, trained=4)
    records = [record_layer(layer, asked_for, here.workspace, compute) for layer in range(reader.depth)]
    job = Job(
        recording=asked_for,
        record=records[1],
        layer=1,
        subblock="ffn",
        variant="no_op",
        settings=BLD(steps=0, batch_sequences=4),
        seed=0,
    )
    block = distill(job, here.workspace, compute)
    scored = ScoringSet(corpus=corpus, last=records[-1], count=2, length=96, general=here.corpus)
    (score,) = score_sequences([(block, (0, 1))], records[1], scored, here.parent, here.workspace, compute)
    layers = [LayerChoice(), LayerChoice(ffn="no_op"), LayerChoice()]
    child = reader.model(layers)
    tokens, weights = here.rows("validation"), weights_of(corpus, "validation", here.workspace)
    assert weights is not None
    whole = whole_llava(here.source)
    processor = AutoProcessor.from_pretrained(here.source)
    expected, losses = [], []
    for row, counted in zip(tokens, weights, strict=True):
        ids, files = as_transformers_reads(row, here)
        pixels = processor.image_processor(images=[Image.open(file) for file in files], return_tensors="pt")
        with torch.no_grad():
            p = whole(input_ids=ids[None], **pixels, use_cache=False).logits[0].log_softmax(-1)
            q = child(row[None], use_cache=False).logits[0].log_softmax(-1)
        expected.append(float(((p.exp() * (p - q)).sum(-1) * counted).mean()))
        labels = ids[1:, None]
        losses.append(float(((p - q)[:-1].gather(1, labels)[:, 0] * counted[:-1]).mean()))
    assert score.kl_per_sequence == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert score.lm_loss_per_sequence == pytest.approx(losses, rel=1e-3, abs=1e-5)
    targets = targets_of(reader.model(), "validation", 2, corpus, here.workspace, compute)
    figures = sequence_figures(child, targets, targets.tokens, compute)
    assert figures["kl"].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    trained = GKD(steps=2, batch_sequences=2, validation_sequences=2, evaluate_every=1, learning_rate=1e-3)
    teacher = record_teacher(here.parent, here.corpus, trained, here.workspace, compute)
    result = distill_globally(job_of(layers, [block], teacher, trained, compute), here.workspace, compute)
    assert result.curve[0][1] == pytest.approx(sum(expected) / 2, rel=1e-3) and result.best_kl < result.curve[0][1]


def test_a_champion_reads_images_by_the_table_of_now(tmp_path: Path) -> None:
    here = seen(tmp_path)
    child = contender("child", chosen((LayerChoice(), LayerChoice(ffn="no_op"), LayerChoice())), [])
    before = Lineage(parent=here.parent, corpus=here.corpus, child=child)
    others = coloured(tmp_path / "others", 12)
    for number, path in enumerate(others.parent.glob("*.png")):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(path)
    plain, sources = prepared_llava(here.source, here.workspace), (*asked(here.path).images, *asked(others).images)
    both = with_images(plain, by_digest(sources), here.workspace, HOST)
    corpus = prepare_corpus(asked(here.path), here.workspace / both.folder, both.fingerprint, here.workspace)
    now = Lineage(parent=both, corpus=corpus, child=child)
    assert reading(before, now) == both and reading(before, before) == here.parent
    rows = read_tensors(here.workspace, corpus.tokens, ["test"])["test"].long()
    with torch.no_grad():
        models = [served(child, reading(side, now), here.workspace, HOST) for side in (before, now)]
        found = [model(rows, use_cache=False).logits for model in models]
    assert torch.equal(*found) and not torch.equal(rows, here.rows("test"))
    other = before.model_copy(update={"parent": here.parent.model_copy(update={"fingerprint": "another"})})
    assert reading(other, now) == other.parent
    elsewhere = other.model_copy(
        update={"child": child.model_copy(update={"architecture": chosen((LayerChoice(),) * 3)})}
    )
    judged = judge_against(elsewhere, now, profile_of(here), here.workspace, ())
    assert judged.outcome == "moved" and "sees images otherwise" in judged.reason


def profile_of(here: Seen, **changes: Any) -> Profile:
    """A profile that asks about the images."""
    fields = {
        "name": "seeing",
        "parent": {"kind": "folder", "path": str(here.source)},
        "corpus": {"sources": [{"kind": "image_questions", "path": str(here.path)}], "prompt_weight": 0},
        "budget": {"layer_parameters_fraction": 0.5},
    }
    return Profile.model_validate(fields | changes)


def test_an_image_is_in_one_text_and_like_questions_are_no_duplicates(tmp_path: Path) -> None:
    """All documents ask the same and say nearly the same: only their images tell them apart."""
    here = seen(tmp_path)
    lines = [json.loads(line) for line in here.path.read_text().splitlines()]
    ask = "{0} times {0}: is it red or is it not at all red, what do you say of {0}?"
    many = [line | {"question": ask.format(number)} for line in lines[::2] for number in range(10, 20)]
    here.path.write_text("".join(json.dumps(line | {"answer": "no"}) + "\n" for line in many))
    more = asked(here.path, sequence_length=1200, train_sequences=20, validation_sequences=2, test_sequences=2)
    folder = here.workspace / here.parent.folder
    own = prepare_corpus(more, folder, here.parent.fingerprint, here.workspace, (here.corpus,))
    splits = ("train", "validation", "test")
    ours, theirs = (
        {id for split in splits for id in read_tensors(here.workspace, one.tokens, [split])[split].unique().tolist()}
        for one in (own, here.corpus)
    )
    first = here.corpus.first_image
    assert {id for id in ours if id >= first} and not {id for id in ours & theirs if id >= first}
    known = int(own.description.rpartition("left out: ")[2])
    assert known > 2 and "nearly the same" not in own.description
    with pytest.raises(CorpusError, match="too small"):
        asking = more.model_copy(update={"train_sequences": 48})
        prepare_corpus(asking, folder, here.parent.fingerprint, here.workspace, (here.corpus,))


def test_what_reads_words_alone_says_so(tmp_path: Path) -> None:
    here = seen(tmp_path)
    seeing = SeenText(workspace=here.workspace, parent=here.parent, texts=(here.corpus,))
    with pytest.raises(CorpusError, match="a probe compares every text .* as words, .* asks about images"):
        own_text(seeing, Asked())
    run = tmp_path / "work" / "runs" / "one"
    child = contender("child", chosen((LayerChoice(),) * 3), [])
    write_value(run / LINEAGE, Lineage(parent=here.parent, corpus=here.corpus, child=child))
    with pytest.raises(CorpusError, match="name a text with --text FILE"):
        fusion_text(run / "child", 2)
    with pytest.raises(CorpusError, match="name a text with --calibrate FILE"):
        _calibration(run / "child", None)


def test_a_profile_that_cannot_see_is_refused_before_a_run(tmp_path: Path) -> None:
    here = seen(tmp_path)
    asks = {"sources": [{"kind": "image_questions", "path": str(here.path)}]}
    for changes, expected in (
        ({"parent": {"kind": "tiny"}}, "a parent of kind tiny has no vision tower"),
        ({"parent": {"kind": "gguf", "path": "a.gguf"}}, "a parent of kind gguf has no vision tower"),
        ({"parent": {"kind": "package", "package": "a", "file": "a.gguf"}}, "a parent of kind package has no vision"),
        ({"corpus": asks}, "needs prompt_weight"),
        ({"evaluate": {"loop_prompts": 9}}, "goes on from words of the corpus, and all sources of it ask about"),
        ({"corpus": asks | {"prompt_weight": 0, "one_document_rows": True}}, "goes not with one_document_rows"),
        (
            {"hardware": {"engine": "llama.cpp", "kv_precision": "q8_0"}},
            "judged in llama.cpp then, which is given words",
        ),
    ):
        with pytest.raises(ValidationError, match=expected):
            profile_of(here, **changes)
    blind = FolderParent(path=str(tiny_parent(tmp_path / "blind")))
    told = "a text asks about images, and blind has no vision tower: take a parent of model_type llava, or leave that"
    assert any(one.startswith(f"parent: {told}") for one in lacking(profile_of(here, parent=blind)))
    with pytest.raises(ParentError, match=f"^{told}"):
        with_images(prepare_parent(blind, tmp_path / "other", None), {"": here.path}, tmp_path / "other", HOST)
    assert not lacking(profile_of(here)) and not any("vision" in told for told in advice(profile_of(here)))
    engine = {"hardware": {"must_run": ["vllm"]}}
    assert any(
        told.startswith("vllm runs the text model of the child alone") for told in advice(profile_of(here, **engine))
    )
    words = {"corpus": {"sources": [{"kind": "python_stdlib"}]}}
    assert any("no text asks about images" in told for told in advice(profile_of(here, **words)))
    here.path.unlink()
    assert any("are no file" in told for told in lacking(profile_of(here)))


def test_easy_vqa_is_read_out_of_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of easy_vqa 1.0."""
    said: dict[str, list[tuple[str, str, int]]] = {
        "train": [("what shape?", "circle", 7)],
        "test": [("is it red?", "no", 0), ("big?", "yes", 0)],
    }
    for split, rows in said.items():
        folder = tmp_path / "easy_vqa" / "data" / split
        (folder / "images").mkdir(parents=True)
        (folder / "questions.json").write_text(json.dumps(rows))
        for _, _, number in rows:
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "images" / f"{number}.png")
    source = EasyVqaSource(kind="easy_vqa")
    with pytest.raises(CorpusError, match="pip install --no-deps easy-vqa"):
        list(image_questions.questions(source, []))
    (tmp_path / "easy_vqa" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = list(image_questions.questions(source, []))
    assert [(path.name, *rest) for path, *rest in found] == [
        ("7.png", "what shape?", "circle"),
        ("0.png", "is it red?", "no"),
        ("0.png", "big?", "yes"),
    ]
    assert all(path.is_file() for path, _, _ in found) and len(image_questions.images_of(source)) == 2
    assert len(list(image_questions.documents(source, image_questions.plain, []))) == 2


def test_another_model_is_not_compared_about_images(tmp_path: Path) -> None:
    here = seen(tmp_path)
    meter: Any = SimpleNamespace(finished=SimpleNamespace(corpus=here.corpus))
    with pytest.raises(CorpusError, match="another model is compared on words, and the corpus of this run asks about"):
        other_model(tmp_path, meter)


def test_a_plan_has_what_the_tower_takes(tmp_path: Path) -> None:
    """FLOPs as torch counts them, the table byte for byte; and the rest of the plan where the images are elsewhere."""
    here = seen(tmp_path)
    folder, space = here.workspace / here.parent.folder, {"attention": ["kv1"], "ffn": ["no_op"]}
    wanted = profile_of(here, search_space=space)
    blind = profile_of(here, search_space=space, corpus={"sources": [{"kind": "python_stdlib"}]})
    rates = machine_rates(wanted, "h100")
    assert rates is not None
    plan, words = (plan_of(one, config_parent(one.parent), rates) for one in (wanted, blind))
    row, tower = next(stage for stage in plan.stages if stage.name == "images"), vision._tower(folder)
    tower.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower.get_image_features(pixel_values=torch.zeros(1, 3, 16, 16))
    assert row.tasks == 1 and row.seconds and row.flops == 48 * counter.get_total_flops() > 0
    features = load_file(folder / "images.safetensors")["features"]
    assert plan.disk_bytes - words.disk_bytes == features.nbytes
    weights = sum(4 * tensor.numel() for tensor in vision_tensors(folder).values())
    assert row.device_bytes and 0.8 * weights < row.device_bytes < 3 * weights
    assert "images" not in [stage.name for stage in words.stages] and not plan.unknown
    here.path.unlink()
    elsewhere = plan_of(wanted, config_parent(wanted.parent), rates)
    row = next(stage for stage in elsewhere.stages if stage.name == "images")
    assert row.seconds is None and row.flops is None and elsewhere.unknown == "the images are not here to be counted"
    assert 0 < elsewhere.seconds < plan.seconds and elsewhere.disk_bytes == words.disk_bytes


def run_of(profile: Profile, workspace: Path) -> Any:
    """A run without Prefect."""
    call = lambda task, makes, *values, **_: task.fn(*values)  # noqa: E731
    shown = list[tuple[Any, ...]]()
    stage = lambda name: nullcontext(lambda *told: shown.append((name, *told)))  # noqa: E731
    return SimpleNamespace(profile=profile, workspace=workspace, stage=stage, call=call, shown=shown)


def test_too_few_images_are_refused_before_any_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a run itself, of any size, those of a capability too, of which the corpus has some. Texts are packed first, by
    ids that a table gets later.
    """
    here: Any = SimpleNamespace(source=tiny_llava(tmp_path / "source"), path=coloured(tmp_path / "images", 48))
    fields: dict[str, Any] = {"sequence_length": 128, "validation_sequences": 1, "test_sequences": 1}
    fields |= {"prompt_weight": 0, "sources": [{"kind": "image_questions", "path": str(here.path)}]}
    rest: dict[str, Any] = {"gkd": {"steps": 0, "validation_sequences": 1}, "evaluate": {"sequences": 1}}
    rest |= {"record": {"statistics_sequences": 4, "hidden_sequences": 4, "validation_sequences": 1}}
    rest |= {"scoring": {"sequences": 1}, "search_space": {"attention": ["kv1"], "ffn": ["no_op"]}}

    def run(corpus: int, capability: int) -> Any:
        both = {
            "corpus": fields | {"train_sequences": corpus},
            "capabilities": {"images": fields | {"train_sequences": capability}},
        }
        return run_of(profile_of(here, **both, **rest), tmp_path / "work")

    with monkeypatch.context() as blind:
        blind.setattr(vision, "_tower", lambda _: pytest.fail("the tower has begun"))
        for sizes, told in (((60, 2), "train needs 60 "), ((40, 2), "train needs 2 .* 42 are in the corpus or")):
            with pytest.raises(CorpusError, match=f"the corpus is too small: {told}"):
                stages.prepare(run(*sizes))
    whole = run(4, 2)
    parent, corpus, (capability,) = stages.prepare(whole)
    assert whole.shown[:48] == [("read images", done, 48, "images read") for done in range(1, 49)]
    assert whole.shown[48:] == [("images", done, 48, "images seen") for done in range(8, 49, 8)]
    assert not image_questions._lines.cache_info().currsize, "the rest of a run is not to hold all questions in memory"
    folder, wanted = tmp_path / "work" / parent.folder, run(4, 2).profile
    own = prepare_corpus(wanted.corpus, folder, parent.fingerprint, tmp_path / "work")
    others = (wanted.own_capabilities["images"].corpus, folder, parent.fingerprint, tmp_path / "work", (corpus,))
    assert (folder / "images.safetensors").is_file() and own == corpus
    assert prepare_corpus(*others).fingerprint == capability.fingerprint
    images, plain = by_digest(wanted.images), prepared_llava(here.source, tmp_path / "other")
    Image.new("RGB", (9, 9)).save(here.path.with_name("7.png"))
    with pytest.raises(CorpusError, match="7.png has changed while texts about it were read: run again"):
        with_images(plain, images, tmp_path / "other", HOST)


def test_an_image_that_cannot_be_seen_is_told_before_any_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its header: before the parent answers prompts, and before it sees the images that are whole."""
    here: Any = SimpleNamespace(source=tiny_llava(tmp_path / "source"), path=coloured(tmp_path / "images", 4))
    monkeypatch.setattr(stages, "_packed", lambda *_: pytest.fail("a text is packed"))
    for content, told in ((b"no image", "3.png is no image"), (png_header(9000, 9000), "3.png has 81 million pixels")):
        (here.path.parent / "3.png").write_bytes(content)
        with pytest.raises(CorpusError, match=told):
            stages.prepare(run_of(profile_of(here), tmp_path / "work"))


def test_too_few_images_are_refused_before_a_run(tmp_path: Path) -> None:
    """By a try with as many tokens of each image as its tower will give."""
    for tower, strategy in (("clip", "default"), ("clip", "full"), ("siglip", "full")):
        source = edit(
            tiny_llava(tmp_path / f"{tower}-{strategy}", tower=tower), vision_feature_select_strategy=strategy
        )
        path, workspace = coloured(tmp_path / "images", 24), tmp_path / "work"
        here: Any = SimpleNamespace(source=source, path=path, workspace=workspace)
        images = by_digest(asked(path).images)
        parent = with_images(prepared_llava(source, here.workspace), images, here.workspace, HOST)
        folder = here.workspace / parent.folder
        tokenizer = AutoTokenizer.from_pretrained(folder)
        there, foreseen = (image_ids_of(folder, tokenizer, sources) for sources in ((), images))
        assert there == foreseen and there is not None and len(there.ids) == 24
        fields: dict[str, Any] = {"sequence_length": 128, "validation_sequences": 1, "test_sequences": 1}
        fields |= {"prompt_weight": 0}
        fields |= {"sources": [{"kind": "image_questions", "path": str(here.path)}]}
        record = {"statistics_sequences": 4, "hidden_sequences": 4, "validation_sequences": 1}
        rest = {"record": record, "scoring": {"sequences": 1}, "gkd": {"steps": 0, "validation_sequences": 1}}
        rest["evaluate"] = {"sequences": 1}
        space = {"attention": ["kv1"], "ffn": ["no_op"]}
        check_profile(profile_of(here, corpus=fields | {"train_sequences": 6}, search_space=space, **rest))
        with pytest.raises(MachineLacks, match="the corpus is too small: train needs 40 sequences"):
            check_profile(profile_of(here, corpus=fields | {"train_sequences": 40}, search_space=space, **rest))
