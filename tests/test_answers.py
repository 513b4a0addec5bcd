"""Greedy answers against a loop over whole forwards; what loops and what only has a refrain; templates and stops."""

from pathlib import Path
from typing import Any

import pytest
import torch

from blocks.compute import HOST
from blocks.records import LayerChoice, ParentInfo
from profiles.schema import Chat, Evaluate, Profile
from tasks.evaluate.answers import (
    answer_all,
    answers_of,
    answers_path,
    greedy,
    loops,
    prompt_ids,
    repetition,
    stop_tokens,
)
from tasks.evaluate.compare import contender, parent_contender
from tasks.inputs.tiny import byte_tokenizer
from tests.chain import Chain, chosen
from tests.test_evaluate import tiny_model

POEM = """The sea, the sea, it calls to me,
the waves that roll, the wind so free.
The sea, the sea, it sings to me
of ships and stars and mystery.
The moon, the tide, the moon, the tide,
and I upon the shore beside."""
# SmolLM2-135M-Instruct's own answer to the second default prompt
PARENTS_POEM = """The waves of the ocean, a tapestry woven with life,
A canvas of endless blue, a canvas of endless blue,
A realm where the unknown lies, a realm where the unknown lies,
A world where the sea is a place, a place where the sea is a place,
"""
VILLANELLE = """Do not go gentle into the night.
Old men should burn and rave at close of day.
Do not go gentle into the night.
Rage, rage against the dying of the light."""
CODE = """    if n == 0:
        return 0
    if n == 1:
        return 1
    return fibonacci(n - 1) + fibonacci(n - 2)"""
CHINESE = "法国的首都是巴黎。巴黎位于塞纳河畔，是法国的政治、经济和文化中心，也是法国最大的城市。"


def pieces(text: str, size: int = 3) -> list[int]:
    """Token ids of a text whose tokens are runs of three characters; an answer is not cut within a token."""
    return [hash(text[i : i + size]) for i in range(0, len(text) - size + 1, size)]


@pytest.mark.parametrize(
    "text",
    [
        "I am not sure what you mean by that. " * 5,
        "The Empire was the first empire to be the first empire to be the first empire to be the first",
        "The capital is Paris" + "!" * 60,
        "\n" * 60,
        "the the the the the the the the",
        "The capital of France is Paris, which lies on the Seine and is known for its " + "very, " * 3 + "!?" * 25,
        "The capital of France is Paris, a city that everybody who lives there loves dearly.\n" + "\n" * 50,
    ],
)
def test_what_loops(text: str) -> None:
    assert loops(text, pieces(text))


@pytest.mark.parametrize(
    "text", ["我喜欢猫。" * 6, "哈" * 40, "東京は日本の首都です。一、東京は日本の首都です。二、東京は日本の首都です。"]
)
def test_what_loops_without_spaces(text: str) -> None:
    for tokens in ([ord(sign) for sign in text], list(text.encode())):
        assert loops(text, tokens)


@pytest.mark.parametrize(
    "text", [POEM, PARENTS_POEM, VILLANELLE, CODE, CHINESE, "Paris.", "", "a b c d e " * 2, "Ha ha ha!"]
)
def test_what_repeats_and_does_not_loop(text: str) -> None:
    for tokens in (pieces(text), [ord(sign) for sign in text], list(text.encode())):
        assert not loops(text, tokens)


@pytest.mark.parametrize(
    ("tokens", "share"), [([], 0), ([1, 2, 3], 0), ([1, 2, 3, 4, 5, 6], 0), ([7] * 13, 0.9), ([1, 2, 3, 4] * 2, 0.2)]
)
def test_repetition_is_the_share_of_runs_that_were_there(tokens: list[int], share: float) -> None:
    assert repetition(tokens) == pytest.approx(share)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_greedy_is_the_most_likely_token_of_whole_forwards(seed: int) -> None:
    model, ids = tiny_model(seed), [3, 1, 4]
    expected = list(ids)
    with torch.no_grad():
        for _ in range(12):
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    new = expected[3:]
    assert greedy(model, ids, 12, frozenset()) == (new, False)
    last = new.index(new[5])
    assert greedy(model, ids, 12, frozenset({new[5]})) == (new[:last], True)


def test_a_generation_config_hides_no_loop() -> None:
    """Penalties and sampling of the parent's own config are not used."""
    model = tiny_model(0)
    plain = greedy(model, [3, 1, 4], 12, frozenset())
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.no_repeat_ngram_size = 1
    model.generation_config.do_sample = True
    assert greedy(model, [3, 1, 4], 12, frozenset()) == plain


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
)


# as LLaVA's templates are: of a content that is a string they write nothing
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content | selectattr('type', 'equalto', 'text') %}"
    "{{ part.text }}{% endfor %}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "prompt", "text", "chat"),
    [
        (TEMPLATE, Chat(chat="Hi"), "<user>Hi<me>", True),
        (TEMPLATE, "Hi", "Hi", False),
        (None, Chat(chat="Hi"), "Hi", False),
        ("{{ raise_exception('a system turn first') }}", Chat(chat="Hi"), "Hi", False),
        (PARTS, Chat(chat="U"), "<user>U<me>", True),
        ("{{ 'nothing of it' }}", Chat(chat="Hi"), "Hi", False),
    ],
)
def test_chats_are_asked_by_the_template(template: str | None, prompt: Any, text: str, chat: bool) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    ids, asked = prompt_ids(tokenizer, prompt)
    assert (tokenizer.decode(ids), asked) == (text, chat)


@pytest.mark.parametrize(
    ("written", "own", "expected"),
    [
        (None, 5, {5, 257}),
        (None, [5, 6], {5, 6, 257}),
        ('{"eos_token_id": [7, 8]}', 5, {7, 8, 257}),
        ("{}", None, {257}),
    ],
)
def test_the_tokens_that_stop_an_answer(tmp_path: Path, written: str | None, own: Any, expected: set[int]) -> None:
    if written:
        (tmp_path / "generation_config.json").write_text(written)
    config = tiny_model(0).config
    config.eos_token_id = own
    assert stop_tokens(tmp_path, config, byte_tokenizer()) == expected


class Parrot:
    """A model that goes on with a fixed text, token by token, and then stops."""

    def __init__(self, text: str) -> None:
        self.ids = byte_tokenizer()(text)["input_ids"] + [257]

    def parameters(self) -> Any:
        return iter([torch.zeros(1)])

    def eval(self) -> Any:
        return self

    def generate(self, prompt: torch.Tensor, generation_config: Any, **_: Any) -> torch.Tensor:
        said = torch.tensor([self.ids[: generation_config.max_new_tokens]])
        return torch.cat([prompt, said], dim=1)


@pytest.mark.parametrize(
    ("text", "limit", "looping", "ended"),
    [
        ("and the sea is blue and wide " * 8, 120, True, False),
        (POEM, 400, False, True),
        (VILLANELLE, 400, False, True),
        ("", 10, False, True),
    ],
)
def test_a_looping_model_is_called_looping_and_a_poem_is_not(text: str, limit: int, looping: bool, ended: bool) -> None:
    asked = Evaluate(prompts=("Once", Chat(chat="Speak")), answer_tokens=limit)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    found = answer_all(Parrot(text), tokenizer, asked, frozenset({257}))
    assert [answer.prompt for answer in found] == ["Once", "Speak"]
    for answer in found:
        assert (answer.loops, answer.ended, answer.chat) == (looping, ended, False)
        assert answer.text == text[:limit] and answer.tokens == len(answer.text)


def test_parent_and_child_answer_and_are_remembered(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = (LayerChoice(), LayerChoice(ffn="no_op"), LayerChoice(attention="linear", ffn="ffn32"))
    own = parent_contender(chosen(layers))
    child = contender("child", chosen(layers), chain.blocks)
    asked = Evaluate(prompts=("import ", "def f(", Chat(chat="class ")), answer_tokens=6)
    for which in (own, child):
        found = answers_of(which, chain.parent, asked, chain.workspace, HOST)
        assert len(found.answers) == 3 and all(answer.tokens <= 6 for answer in found.answers)
        with monkeypatch.context() as patched:
            patched.setattr("tasks.evaluate.answers.served", None)  # not asked again
            assert answers_of(which, chain.parent, asked, chain.workspace, HOST) == found
    paths = {
        answers_path(which, chain.parent, settings)
        for which in (own, child)
        for settings in (asked, asked.model_copy(update={"answer_tokens": 7}), asked.model_copy(update={"prompts": ()}))
    }
    assert len(paths) == 6


@pytest.mark.parametrize("prompts", [[""], [{"chat": " "}], [{"chat": "Hi", "system": "x"}], [3]])
def test_prompts_that_say_nothing_are_refused(prompts: list[Any]) -> None:
    with pytest.raises(ValueError, match="prompts"):
        Evaluate.model_validate({"prompts": prompts})


def test_there_are_six_prompts_by_default() -> None:
    assert len(Evaluate().prompts) == 6 and sum(isinstance(prompt, Chat) for prompt in Evaluate().prompts) == 3
    assert Evaluate.model_validate(Evaluate().model_dump(mode="json")) == Evaluate()
    assert Profile.model_fields["evaluate"].default == Evaluate()


def test_a_parent_info_is_part_of_the_address(chain: Chain) -> None:
    own = parent_contender(chosen((LayerChoice(),) * 3))
    other: ParentInfo = chain.parent.model_copy(update={"fingerprint": "other"})
    assert answers_path(own, chain.parent, Evaluate()) != answers_path(own, other, Evaluate())
