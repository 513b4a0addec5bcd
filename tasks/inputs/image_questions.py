"""Questions about images as text: an image stands in a document as a mark that names its file's content, and as the
ids of its features (blocks/images.py) among the tokens.

A document is an image with all its questions and answers in turn, so that no image is in two splits. Where the parent
has a chat template, the document is the chat that the template writes; else each question stands behind `Question:`.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blocks.errors import CorpusError, first_line
from blocks.files import sha256_of
from blocks.images import image_ids, vision_of
from profiles.schema import EasyVqaSource, ImageQuestionsSource, ImagesSource
from tasks.inputs.chats import IMAGE, Chat, Conversation, Message, Span, Unusable, normalise
from tasks.inputs.installed_packages import folders_of
from tasks.inputs.questions import marked
from tasks.inputs.text_files import Document, Tally
from tasks.running.progress import Progress, no_progress

VERSION = 1  # raise it when the same images and questions would give other tokens
LONGEST_PATH = 4096  # characters
FIELDS = ("image", "question", "answer")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # others, such as EPS, start programs
MOST_PIXELS = 1 << 26  # of an image: a small file may unpack to any number
INSTALL = "pip install --no-deps easy-vqa==1.0"
Asked = tuple[Path, str, str]
Row = tuple[str, str, str]  # an image by its name, question, answer
State = tuple[int, int]  # of a file, when it was changed and its size: what was read of it holds as long as this does
Tokenize = Callable[[str, Sequence[Span]], list[int]]


def documents(
    source: ImagesSource, chat: Chat, tallies: list[Tally], beside: Sequence[object] = ()
) -> Iterator[Document]:
    """Each image with its questions, in the order of the first of them. chat: writes messages as text.

    beside: the sources of the corpus, this one among them. Of an image that several ask about, the first of them has
    all questions. An image is known by the content of its file. Raises CorpusError.
    """
    others = [one for one in beside if isinstance(one, ImagesSource)]
    place = others.index(source) if source in others else len(others)
    earlier = {digest_of_image(image) for one in others[:place] for image in images_of(one)}
    by_image: dict[str, list[tuple[str, str]]] = {}
    for image, question, answer in questions(source, tallies):
        if (digest := digest_of_image(image)) not in earlier:
            by_image.setdefault(digest, []).append((question, answer))
    if not by_image:
        raise CorpusError(
            "an image source asks about images of the sources before it alone: put the questions of both in one file."
        )
    for image, question, answer in (asked for one in others[place + 1 :] for asked in questions(one, [])):
        if (digest := digest_of_image(image)) in by_image:
            by_image[digest].append((question, answer))
    tally = Tally(tallies[-1].name if tallies else source.kind, "question")
    for digest, asked in by_image.items():
        yield from _document(digest, list(dict.fromkeys(asked)), chat, tally)
    tallies += [tally] if tally.bad else []
    tally.judge()


def _document(digest: str, asked: Sequence[tuple[str, str]], chat: Chat, tally: Tally) -> Iterator[Document]:
    """An image with those of its questions that the chat template writes; none where there are none."""
    usable, singly = list[tuple[str, str]](), list[str]()
    for one in asked:
        tally.read += 1
        try:
            singly.append(chat(_messages(digest, [one])))
            usable.append(one)
        except Unusable as reason:
            tally.skip(tally.read, str(reason))
    if usable:
        try:
            text = chat(_messages(digest, usable))
        except Unusable as reason:
            tally.skip(tally.read, str(reason))
            return
        kept = [one for one in singly if isinstance(one, Conversation)]
        yield Conversation(str(text), text.answers, kept) if isinstance(text, Conversation) else text


def _messages(digest: str, asked: Sequence[tuple[str, str]]) -> list[Message]:
    found: list[Message] = []
    for question, answer in asked:
        mark = "" if found else f"{mark_of(digest)}\n"
        found.append({"role": "user", "content": f"{mark}{normalise(question)}"})
        found.append({"role": "assistant", "content": normalise(answer)})
    return found


def _state(path: Path) -> State:
    now = path.stat()
    return now.st_mtime_ns, now.st_size


def digest_of_image(path: Path) -> str:
    """sha256 of an image's file, which is read once as long as it does not change. Raises CorpusError for a file whose
    header is of no image that can be seen.
    """
    return _digest(path, _state(path))


@lru_cache(maxsize=1 << 20)
def _digest(path: Path, state: State) -> str:
    with opened_image(path):
        return sha256_of(path)


@contextmanager
def opened_image(path: Path) -> Iterator[Any]:
    """An image of which the header alone is read. Raises CorpusError for one that is too large, or cannot be read; also
    where that is found out within the block.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as image:
            if (size := image.width * image.height) > MOST_PIXELS:
                raise CorpusError(
                    f"{path.name} has {size / 1e6:,.0f} million pixels, at most {MOST_PIXELS / 1e6:.0f} million are "
                    "read: make it smaller, the tower sees a few hundred pixels a side."
                )
            yield image
    except CorpusError:
        raise
    except Exception as error:  # each format of Pillow raises what it likes
        raise CorpusError(
            f"{path.name} is no image that can be read ({first_line(error, 120)}): {', '.join(FORMATS)} are, of up to "
            f"{MOST_PIXELS / 1e6:.0f} million pixels. Replace it, or take its lines out."
        ) from error


def images_of(source: ImagesSource) -> list[Path]:
    """The files of all images that are asked about."""
    return list(dict.fromkeys(image for image, _, _ in questions(source, [])))


def by_digest(sources: Iterable[ImagesSource], progress: Progress = no_progress) -> dict[str, Path]:
    """A file of each image that is asked about, by the sha256 of its content, in the order in which they are numbered.

    Raises CorpusError.
    """
    paths = list(dict.fromkeys(path for source in sources for path in images_of(source)))
    found = dict[str, Path]()
    for done, path in enumerate(paths, 1):
        found[digest_of_image(path)] = path
        progress(done, len(paths), "images read")
    return dict(sorted(found.items()))


def questions(source: ImagesSource, tallies: list[Tally]) -> Iterator[Asked]:
    """Image, question and answer. A line that cannot be used is counted. Raises CorpusError.

    A file is read once as long as it does not change; whether its images are there is looked up each time.
    """
    if isinstance(source, EasyVqaSource):
        yield from _easy_vqa(source)
        return
    path, tally = file_of(source), Tally(source.path, "line")
    tallies.append(tally)
    there = lru_cache(maxsize=None)(partial(_there, path.parent))
    for number, row in _lines(path, source.path, _state(path)):
        tally.read += 1
        if isinstance(row, str):
            tally.skip(number, row)
        elif (image := there(row[0])) is None:
            tally.skip(number, _not_there(row[0]))
        else:
            yield image, row[1], row[2]
    tally.judge()


def file_of(source: ImageQuestionsSource) -> Path:
    """The JSON-lines file. Raises CorpusError."""
    path = Path(source.path).expanduser()
    if not path.is_file():
        raise CorpusError(
            f"the questions about images {source.path} are no file (current folder: {Path.cwd()}): name a JSON-lines "
            f"file whose lines have {', '.join(FIELDS)}."
        )
    return path


@lru_cache(maxsize=8)  # as many sources as a profile may well have: all are read beside each other
def _lines(path: Path, name: str, state: State) -> tuple[tuple[int, Row | str], ...]:
    """The lines of a file that are not empty, by their numbers: what they ask, or why they are of no use.

    name: by which the profile has it. Raises CorpusError where so many are of no use that reading on makes no sense.
    """
    found, tally = list[tuple[int, Row | str]](), Tally(name, "line")
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                tally.read += 1
                found.append((number, row := _row(line)))
                if isinstance(row, str):
                    tally.skip(number, row)
    return tuple(found)


def _row(line: str) -> Row | str:
    try:
        row = json.loads(line)
    except ValueError:
        return "is not valid JSON"
    there = [row.get(field) for field in FIELDS] if isinstance(row, Mapping) else []
    found = [value for value in there if isinstance(value, str) and value.strip()]
    if len(found) < len(FIELDS):
        return f"lacks one of {', '.join(FIELDS)}, each a text"
    name, question, answer = found
    if len(name) > LONGEST_PATH:  # images themselves, perhaps, which are not to be kept here
        return _not_there(name)
    if IMAGE.search(question) or IMAGE.search(answer):
        return "holds what stands for an image"
    return name, question, answer


def _not_there(name: str) -> str:
    return f"names an image that is not there ({name[:80]}); name a file, by its path"


def _there(folder: Path, name: str) -> Path | None:
    """The file of an image, None where it is none: the image itself (data:...) may stand there, or any text."""
    with suppress(OSError, RuntimeError, ValueError):  # too long a name, no such user's home, a zero byte
        path = folder / Path(name).expanduser()
        return path if path.is_file() else None
    return None


def _easy_vqa(source: EasyVqaSource) -> Iterator[Asked]:
    folder = next((one / "data" for one in folders_of(source.package) if (one / "data").is_dir()), None)
    if folder is None:
        raise CorpusError(f"easy_vqa is read from the package {source.package}, which is not installed: {INSTALL}")
    for split in ("train", "test"):
        path = folder / split / "questions.json"
        for question, answer, number in _drawn(path, _state(path)):
            yield folder / split / "images" / f"{number}.png", question, answer


@lru_cache(maxsize=2)
def _drawn(path: Path, state: State) -> list[tuple[str, str, int]]:
    """Questions, answers and numbers of images."""
    found: list[tuple[str, str, int]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def forget_questions() -> None:
    """Let go what was kept of files of questions: whoever asks for them from now on reads them again."""
    _lines.cache_clear()
    _drawn.cache_clear()


def content_of(source: ImagesSource) -> list[str]:
    """Images by their digests, questions and answers."""
    asked = list(questions(source, []))
    return [json.dumps([digest_of_image(image), question, answer]) for image, question, answer in asked]


# --- images among tokens


def mark_of(digest: str) -> str:
    """What stands for an image in a text. It is long, so that texts that ask the same of two images are not nearly the
    same.
    """
    return f"<image {digest}>"


def plain(messages: Sequence[Message]) -> Conversation:
    """The document without a chat template."""

    def parts() -> Iterator[tuple[str, bool]]:
        for message in messages:
            if message["role"] == "assistant":
                yield f" {message['content']}\n", True
            else:
                mark = IMAGE.match(message["content"])
                image = f"{mark[0]}\n" if mark else ""
                yield f"{image}Question: {IMAGE.sub('', message['content']).strip()}\nAnswer:", False

    return marked(parts())


@dataclass(frozen=True, kw_only=True)
class ImageIds:
    """The token that stands for an image in a text, and the ids of each image's features, by the sha256 of its file;
    `first` is the least of them.
    """

    first: int
    token: str
    token_id: int
    ids: Mapping[str, range]

    @property
    def all(self) -> range:
        """The ids of all features."""
        return range(self.first, max((one.stop for one in self.ids.values()), default=self.first))

    def read(self, tokenize: Tokenize, text: str, answers: Sequence[Span]) -> list[int]:
        """The ids of a text with images; ~id outside of the answers. tokenize: does so with a text that has `token`."""
        marks = list(IMAGE.finditer(text))
        longer = [(mark.end(), len(mark[0]) - len(self.token)) for mark in marks]

        def moved(place: int) -> int:
            return place - sum(by for end, by in longer if end <= place)

        ids = tokenize(IMAGE.sub(lambda _: self.token, text), [(moved(first), moved(last)) for first, last in answers])
        check_words(ids, self.first)
        if not marks:
            return ids
        if sum(token in (self.token_id, ~self.token_id) for token in ids) != len(marks):
            raise CorpusError(f"a question or an answer holds the image's own token {self.token}: take it out.")
        found, left = list[int](), (mark[1] for mark in marks)
        for token in ids:
            if token not in (self.token_id, ~self.token_id):
                found.append(token)
                continue
            image = self.ids.get(next(left))
            if image is None:
                raise CorpusError("an image has changed since its features were made, or is not among them: run again.")
            found += [~one for one in image]
        return found


def check_words(ids: Sequence[int] | NDArray[np.int32], known: int) -> None:
    """Raise CorpusError for token ids of words that a model of so many has no embedding for: they would be read as
    somebody's image. Ids are as they are, or marked: ~id.
    """
    read = np.asarray(ids, dtype=np.int64)
    largest = int(np.maximum(read, ~read).max(initial=0))
    if largest >= known:
        raise CorpusError(
            f"the tokenizer gives token {largest}, but the parent knows {known} tokens: "
            "take the tokenizer that belongs to the parent."
        )


def tower_of(values: Mapping[str, Any]) -> tuple[Any, int]:
    """The config of a LLaVA's tower, by the LLaVA's config.json, and how many states it has of an image."""
    from transformers import CONFIG_MAPPING

    vision: Any = CONFIG_MAPPING[values["vision_config"]["model_type"]](**values["vision_config"])
    patches = int(vision.image_size // vision.patch_size) ** 2
    return vision, patches + (vision.model_type == "clip_vision_model")  # CLIP's have one more before the patches


def tokens_of_an_image(values: Mapping[str, Any]) -> int:
    """How many features an image has, by a LLaVA's config.json."""
    return tower_of(values)[1] - (values.get("vision_feature_select_strategy", "default") == "default")


def places_of(folder: Path, first: int, foreseen: Iterable[str] = ()) -> dict[str, range]:
    """The ids that stand for each image of a parent's table, the least of them `first`, by the sha256 of its file.

    foreseen: there is no table yet, and ids are wanted as they will be for these images, in the order of `by_digest`.
    """
    digests = list(foreseen)
    if not digests:
        return image_ids(folder, first)
    each = tokens_of_an_image(vision_of(folder) or {})
    return {digest: range(at, at + each) for digest, at in zip(digests, itertools.count(first, each), strict=False)}


def image_ids_of(folder: Path, tokenizer: Any, foreseen: Iterable[str] = ()) -> ImageIds | None:
    """The ids of the images that a parent sees; None for a parent without a vision tower. foreseen: see `places_of`."""
    values = vision_of(folder)
    if values is None:
        return None
    first = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    token = values.get("image_token_index", values.get("image_token_id", 32000))  # transformers' default
    name = str(tokenizer.convert_ids_to_tokens(token))
    return ImageIds(first=first, token=name, token_id=token, ids=places_of(folder, first, foreseen))
