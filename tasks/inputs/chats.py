"""Write chats (lists of messages, as fine-tuning data holds them) as text, with the chat template of the tokenizer.

Two forms of messages are read: with `role` and `content` (OpenAI), and with `from` and `value` (ShareGPT). A content
may be a list of parts of type text. A chat that cannot be written completely is `Unusable`: the reader counts it and
goes on.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from blocks.errors import CorpusError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
ROLES = ("system", "developer", "user", "assistant")
FIELDS = ("messages", "conversations")  # where chats stand, when no field is named
DAY = datetime(2024, 7, 26)  # the day that Llama's templates fall back to
DIRECTIVES = ("%d", "%-d", "%b", "%B", "%m", "%Y", "%y", "%a", "%A", "%H", "%I", "%p", "%M", "%S", "%j")
# Some templates (Llama 3, SmolLM3) write today's date into every chat. With this macro before them they always write
# the same day, so that a corpus has the same tokens tomorrow. (transformers does not pass functions on to a template.)
SAME_DAY = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('{one}', '{DAY.strftime(one)}')" for one in DIRECTIVES)
    + " }}{%- endmacro %}"
)

# what stands for an image in a text: the sha256 of its file (tasks/inputs/image_questions.py)
IMAGE = re.compile(r"<image ([0-9a-f]{64})>")
Message = Mapping[str, str]
Chat = Callable[[Sequence[Message]], str]
THOUGHT_ENDS = "</think>"
PROBE: Message = {"role": "user", "content": "Is this said?"}  # whose words show how a template wants them
Span = tuple[int, int]


class Conversation(str):
    """A chat as text. answers: (start, end) of what the assistant says in it. singly: each of its questions in a chat
    of its own, where the earlier answers would tell the later ones.
    """

    answers: tuple[Span, ...]
    singly: tuple["Conversation", ...]

    def __new__(cls, text: str, answers: Sequence[Span], singly: Sequence["Conversation"] = ()) -> "Conversation":
        made = super().__new__(cls, text)
        made.singly = tuple(singly)
        made.answers = tuple((start, min(end, len(text))) for start, end in answers if start < len(text))
        return made


def normalise(text: str) -> str:
    """Unicode NFC, Unix line ends, no white space around. What UTF-8 cannot hold (lone surrogates) becomes `?`."""
    unix = text.replace("\r\n", "\n").replace("\r", "\n")
    return unicodedata.normalize("NFC", unix).strip().encode("utf-8", "replace").decode("utf-8")


def answers_in(text: str, messages: Sequence[Message], before: Callable[[Sequence[Message]], str]) -> list[Span]:
    """(start, end) of the assistant's messages in the text of a chat, with the white space behind them.

    before: the text until somebody answers these messages. Templates of reasoning models leave out earlier thoughts.
    Raises Unusable for an answer that is not there.
    """
    found, place = list[Span](), 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or not message["content"]:
            continue
        start = before(messages[:number]) if number else ""
        place = max(place, len(start)) if text.startswith(start) else place
        content = message["content"]
        if content not in text[place:]:
            content = content.rpartition(THOUGHT_ENDS)[2].strip()
        place = text.find(content, place)
        if place < 0:
            raise Unusable("loses an answer of the assistant in the chat template, so its tokens cannot be weighed")
        end = re.compile(r"\s*").match(text, place + len(content)).end()  # type: ignore[union-attr]
        found.append((place, end))
        place = end
    return found


class Unusable(Exception):
    """A line, row or document of a source cannot be used. The message ends a sentence: "has no field ..."."""


def messages_of(value: Sequence[Any]) -> list[Message]:
    """The messages of a chat in one form. Raises Unusable for tools, pictures, and for what is not a chat."""
    if not value:
        raise Unusable("has no messages")
    messages = [_message(item, number) for number, item in enumerate(value, 1)]
    if not any(message["content"].strip() for message in messages):
        raise Unusable("has no text in any message")
    if any(IMAGE.search(message["content"]) for message in messages):
        raise Unusable("holds what stands for an image")
    return messages


def _message(item: Any, number: int) -> Message:
    keys = item if isinstance(item, Mapping) else {}
    speaker, content = ("role", "content") if keys.get("role") is not None else ("from", "value")
    role = keys.get(speaker)
    if not isinstance(role, str):
        raise Unusable(f"holds a list whose item {number} is not a message: neither `role` nor `from` names a speaker")
    role = SPEAKERS.get(role, role)
    if keys.get("tool_calls") or keys.get("function_call") or role not in ROLES:
        called = f"of role `{role[:40]}`" if role not in ROLES else "that calls a tool"
        raise Unusable(f"has a message {called}: system, user and assistant in words are read, tools are not")
    return {"role": role, "content": _content(keys.get(content), number)}


def _content(content: Any, number: int) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Unusable(f"has no text in message {number}")
    parts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    texts = [text for text in parts if isinstance(text, str)]
    if len(texts) < len(content):
        raise Unusable(f"has a part in message {number} that is not text")
    return "".join(texts)


def contents_alone(messages: Sequence[Message]) -> str:
    """A chat as text without a template. A tiny parent is trained on such text before it has a tokenizer."""
    return "\n\n".join(message["content"] for message in messages)


def _rendered(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, Any]], to_be_answered: bool) -> str:
    """Messages as the tokenizer's template writes them, on the same day always. Raises Unusable."""
    from jinja2 import TemplateError

    try:
        template = tokenizer.get_chat_template()
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=SAME_DAY + template if "strftime_now" in template else template,
                tokenize=False,
                add_generation_prompt=to_be_answered,
            )
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise Unusable(f"is refused by the chat template ({first_line(error, 120)})") from error


def _wants_parts(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the template says nothing of a content that is a string, and something of a list of parts."""

    def said(message: Mapping[str, Any]) -> bool:
        with suppress(Unusable):
            return PROBE["content"] in _rendered(tokenizer, [message], True)
        return False

    return not said(PROBE) and said(_in_parts(PROBE))


def template_of(tokenizer: "PreTrainedTokenizerBase", image: str = "") -> Callable[..., str]:
    """Make the function that writes chats with the tokenizer's template; with a second argument, up to where the
    assistant is to answer. It raises Unusable, or CorpusError. image: the token that stands for an image.

    A content is given as a string. Templates of many parents that see read lists of parts alone, and write nothing of a
    string, not even an error: those get parts.
    """
    wants_parts = cache(partial(_wants_parts, tokenizer))

    def rendered(messages: Sequence[Message], to_be_answered: bool) -> str:
        return _rendered(tokenizer, [_in_parts(one) for one in messages] if wants_parts() else messages, to_be_answered)

    def about_images(messages: Sequence[Message], to_be_answered: bool, marks: Sequence[str]) -> str:
        """Most templates of parents that see want parts, an image and a text; others want texts alone."""
        with suppress(Unusable):
            text = _rendered(tokenizer, [_in_parts(message) for message in messages], to_be_answered)
            if text.count(image) == len(marks):
                left = iter(marks)
                return re.sub(re.escape(image), lambda _: next(left), text)
        return rendered(messages, to_be_answered)

    def write(messages: Sequence[Message], to_be_answered: bool = False) -> str:
        if not tokenizer.chat_template:
            raise CorpusError(
                "the corpus holds chats, but the parent's tokenizer has no chat template to write them with: take a "
                "parent that was tuned on chats, add chat_template.jinja to its folder, or give text instead of chats."
            )
        marks = [mark[0] for message in messages for mark in IMAGE.finditer(message["content"])] if image else []
        text = about_images(messages, to_be_answered, marks) if marks else rendered(messages, to_be_answered)
        for message in messages:  # not the assistant's: templates of reasoning models leave out earlier thoughts
            if message["role"] != "assistant" and IMAGE.sub("", message["content"]).strip() not in text:
                raise Unusable(f"loses a message of role {message['role']} in the chat template")
        if any(mark not in text for mark in marks):
            raise Unusable("loses an image in the chat template")
        return text

    return write


def _in_parts(message: Message) -> dict[str, Any]:
    """A message whose content is a list: an image for each mark, then what else it says."""
    images = [{"type": "image"} for _ in IMAGE.finditer(message["content"])]
    text = IMAGE.sub("", message["content"]).strip() if images else message["content"]
    return {"role": message["role"], "content": [*images, {"type": "text", "text": text}]}
