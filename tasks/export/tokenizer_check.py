"""Compare the tokenizer of a GGUF file in llama.cpp with the child's in transformers: ids, decoded text, chat template.

They are compared on texts with what tokenizers often differ in, on every added token, and on words from the vocabulary.
"""

import json
import random
import tempfile
import unicodedata
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from blocks.errors import PuzzleError, first_line
from tasks.engines.base import LoadOptions
from tasks.engines.llama_cpp import LlamaCpp, LlamaSession
from tasks.engines.openai_server import serving
from tasks.gguf.header import read_header
from tasks.gguf.tokenizer_writer import WAY_OUT, TokenizerLimit, chat_templates, left_out

TEXTS = (
    "",
    " ",
    "Hello, world!",
    " leading and trailing ",
    "  two   three    four\u00a0and no-break",
    "\ttab\t\ttabs \t mixed",
    "line\nline\n\nline\n\n\nend\n",
    "windows\r\nline\r\n\r\n",
    " \n \n\n  x\n   ",
    "1 12 123 1234 12345 1234567 3.14159 1,000,000 2\u00b2 \u00bd \u0664\u0662 1e-9 0xFF v1.2.3",
    "I'm you're they've we'll he'd it's don't I'M YOU'RE THEY'VE WE'LL HE'D IT'S DON'T 'quoted' rock'n'roll",
    "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m stra\u00dfe \u0130stanbul",
    "cafe\u0301",
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m",
    "a\u00dcber M\u00c9t\u00e9o \u03b1\u0392\u03b3 \u043f\u0420\u0438",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \ud55c\uad6d\uc5b4",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440 \u0645\u0631\u062d\u0628\u0627",
    "\u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f600 \U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f \U0001f1e9\U0001f1ea",
    "def f(x):\n    if x >= 10:\n\treturn {'a': [x**2, -1]}  # why?\n\n\nprint(f(3) != None)\n",
    "CamelCaseWord HTTPServer snake_case_word SCREAMING_CASE a/b/c https://example.org/x?y=1&z=%20",
    "... --- *** !!! ??? <> </tag> $10 50% a+b=c x^2 ~`|\\ \u2014 \u201cquote\u201d \u2026",
    "<|endoftext|>",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<s>x</s> <unk> <pad> [INST] a [/INST] <0x0A> [PAD0] <|begin_of_text|>a<|eot_id|>",
    "\u2581underline \u2581\u2581 a\u2581b",
    "\u0120\u010a\u00e2\u0122\u013b",
)
CONVERSATIONS = (
    [("user", "Hi, 12 apples?")],
    [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye")],
)
DRAWN, WORDS = 400, 8  # texts drawn from the vocabulary, tokens in each


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """A text for which llama.cpp gives something else than transformers."""

    text: str
    what: str
    own: Any
    other: Any

    def __str__(self) -> str:
        """What differs, on one line."""
        short = [str(one) if len(str(one)) < 90 else f"{str(one)[:90]}..." for one in (self.own, self.other)]
        return f"for {self.text!r} transformers gives {self.what} {short[0]}, llama.cpp {short[1]}"


def check_tokenizer(path: Path, tokenizer: Any, named: bool = False) -> list[str]:
    """Sentences on what was compared. Raises TokenizerLimit when a GGUF file's ids or template are not transformers'.

    named: a person named the GGUF file that the tokenizer was copied from. If its tokens are the child's, differences
    are reported and not refused, because llama.cpp has no better tokenizer for the child.
    """
    header = read_header(path).fields
    if named:
        _same_tokens(header.get("tokenizer.ggml.tokens", ()), tokenizer)
    missing = LlamaCpp().missing()
    if missing:
        return [f"tokenizer: not compared with llama.cpp's: {missing}"]
    with closing(LlamaCpp().load(path, LoadOptions(context_tokens=32))) as session:
        texts = texts_for(tokenizer, session.vocab_size)
        found = [one for text in texts for one in divergences(session, tokenizer, text)]
        return [_verdict(found, len(texts), tokenizer, named), *_check_template(path, session, tokenizer)]


def _same_tokens(tokens: Sequence[str], tokenizer: Any) -> None:
    """Raise TokenizerLimit when a GGUF file's tokens are not the child's."""
    for token, index in tokenizer.get_vocab().items():
        if index < len(tokens) and tokens[index] != token:
            raise TokenizerLimit(
                f"the GGUF of --tokenizer-from is of another tokenizer: its token {index} is {tokens[index]!r}, the "
                f"child's {token!r}. Leave --tokenizer-from out, or name a GGUF of the parent."
            )


def _verdict(found: Sequence[Divergence], texts: int, tokenizer: Any, named: bool) -> str:
    """A sentence on the comparison. Raises TokenizerLimit when the file would tokenize otherwise than transformers."""
    composed = _composes(tokenizer)
    wrong = sorted((one for one in found if not (composed and _decomposed(one.text))), key=lambda one: len(one.text))
    differ = f"{wrong[0]} ({len(wrong)} of {texts} texts differ)" if wrong else ""
    if wrong and named:
        return f"tokenizer: llama.cpp DIFFERS from transformers with the named GGUF's: {differ}"
    if wrong:
        raise TokenizerLimit(f"the tokenizer cannot be carried into GGUF exactly: {differ}. {WAY_OUT}")
    said = (
        f"checked: {LlamaCpp().version()} gives transformers' token ids on {texts - len(found)} texts, with and "
        f"without the special tokens that begin and end a text{_and_back(tokenizer)}"
    )
    if found:
        said += (
            "; but llama.cpp does not compose accents (Unicode NFC) as this tokenizer does in transformers: "
            f"{found[0]}. Give it text in NFC"
        )
    return said


def _and_back(tokenizer: Any) -> str:
    return "" if tokenizer.backend_tokenizer.decoder is None else ", and the same text back"


def texts_for(tokenizer: Any, vocab_size: int) -> list[str]:
    """The texts to compare on, without those that hold an added token which the file does not have."""
    gone = left_out(tokenizer, vocab_size)
    added = [token.content for index, token in tokenizer.added_tokens_decoder.items() if index < vocab_size]
    texts = [*TEXTS, "".join(added), " ".join(added)]
    for token in added:
        texts += [token, f"a{token}b", f" a {token} b ", f"{token}\n{token}", f"{token[:-1]} {token[1:]}"]
    draw = random.Random(0)
    ordinary = sorted(set(range(min(vocab_size, len(tokenizer)))) - set(tokenizer.added_tokens_decoder))
    for _ in range(DRAWN if ordinary else 0):
        text = tokenizer.decode(draw.choices(ordinary, k=WORDS))
        texts.append(text.replace("\ufffd", ""))
    return [text for text in dict.fromkeys(texts) if not any(token in text for token in gone)]


def divergences(session: LlamaSession, tokenizer: Any, text: str) -> list[Divergence]:
    """Where llama.cpp's ids of a text, or the text of these ids, are not transformers'."""
    found = []
    for special in (False, True):
        own = tokenizer(text, add_special_tokens=special)["input_ids"]
        other = session.tokenize(text, add_special=special)
        if own != other:
            return [Divergence(text=text, what="the ids", own=own, other=other)]
    if tokenizer.backend_tokenizer.decoder is not None:
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        own_text = tokenizer.decode(plain, clean_up_tokenization_spaces=False)
        other_text = session.text(plain)
        if own_text not in (other_text, other_text.removeprefix(" ")):  # the space that was put before a text
            found.append(Divergence(text=text, what="back the text", own=repr(own_text), other=repr(other_text)))
    return found


def _composes(tokenizer: Any) -> bool:
    return "NFC" in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()).get("normalizer"))


def _decomposed(text: str) -> bool:
    return unicodedata.normalize("NFC", text) != text


def _check_template(path: Path, session: LlamaSession, tokenizer: Any) -> list[str]:
    """Sentences on the chat template. Raises TokenizerLimit when the file holds another one than transformers."""
    wanted = chat_templates(tokenizer)
    written = read_header(path).fields.get("tokenizer.chat_template")
    if written != wanted.get("default"):
        raise TokenizerLimit(
            f"{path.name} holds {'another' if written else 'no'} chat template and transformers has "
            f"{'one' if wanted else 'none'}: the GGUF that the tokenizer was copied from is of another model. {WAY_OUT}"
        )
    if not wanted:
        return []
    try:
        return [_rendered(path, session, tokenizer)]
    except (PuzzleError, httpx.HTTPError, OSError, ValueError, KeyError) as error:
        reason = first_line(error).split(" It ends with:")[0]
        return [f"chat template: the text is transformers' own; not compared as llama.cpp renders it: {reason}"]


def _rendered(path: Path, session: LlamaSession, tokenizer: Any) -> str:
    """Have llama.cpp's server render conversations, and compare the ids with transformers'."""
    with tempfile.TemporaryDirectory(prefix="puzzle-template-") as folder:
        how = LoadOptions(context_tokens=64)
        with serving("llama.cpp", path, how, Path(folder) / "server.log") as server:
            compared = 0
            for conversation in CONVERSATIONS:
                messages = [{"role": role, "content": content} for role, content in conversation]
                own = _own_ids(tokenizer, messages)
                if own is None:  # this template has no such conversation
                    continue
                other = session.tokenize(_ask(f"{server.url}/apply-template", messages), add_special=True)
                if own != other:
                    return (
                        "chat template: the text is transformers' own, but llama.cpp RENDERS IT OTHERWISE: "
                        f"{Divergence(text=str(messages), what='the ids', own=own, other=other)}"
                    )
                compared += 1
    if not compared:
        return "chat template: the text is transformers' own; it renders none of the conversations that are compared"
    return f"checked: llama.cpp's server renders {compared} conversations to transformers' token ids"


def _own_ids(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int] | None:
    try:
        ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except Exception:  # a template may raise whatever it likes
        return None
    return ids


def _ask(url: str, messages: Sequence[dict[str, str]]) -> str:
    answer = httpx.post(url, json={"messages": list(messages)}, timeout=60)
    if answer.is_error:
        raise ValueError(f"its server answers {answer.text[:200]}")
    return str(answer.json()["prompt"])
