"""Chats: which of their tokens have weights, that all stages are linear in them, and the parent's own answers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from blocks.compute import HOST
from blocks.errors import CorpusError
from blocks.library import read_tensors, write_tensors
from blocks.records import CorpusInfo, ParentInfo
from profiles.schema import GKD, Corpus, ParentAnswersSource, TextSource
from tasks.distill import bld
from tasks.distill.gkd_job import distill_globally, job_of
from tasks.distill.gkd_targets import record_teacher
from tasks.distill.record import record_layer
from tasks.engines.llama_cpp import LlamaCpp
from tasks.export.quantise import Recipe
from tasks.inputs import parent_answers
from tasks.inputs.chats import Unusable, answers_in
from tasks.inputs.corpus import document_tokenizer, prepare_corpus, weights_of
from tasks.inputs.corpus_sources import iterate_documents
from tasks.inputs.parent_answers import with_answers
from tasks.inputs.tiny import byte_tokenizer
from tasks.score.scoring import ScoringSet, score_sequences
from tasks.score.typed_scores import score_whole, whole_key
from tests.chain import SETTINGS, Chain, recording
from tests.test_gkd import CHILD

CHATML = """{% for m in messages %}<pad>{{ m.role }}
{{ m.content }}<bos>
{% endfor %}{% if add_generation_prompt %}<pad>assistant
{% endif %}"""
TALK = [
    {"role": "user", "content": "assistant?"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "Two\r\nlines"},
    {"role": "assistant", "content": "Yes: two\r\nlines. "},
]


def test_the_assistants_tokens_and_the_token_that_ends_them_are_told_apart() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    plain, weighs = document_tokenizer(tokenizer), document_tokenizer(tokenizer, weighs=True)
    text = weighs.chat(TALK)
    ids = weighs.ids_of(text, 0, len(text))
    assert [i if i >= 0 else ~i for i in ids.tolist()] == plain.encode(text.replace("\r\n", "\n"))
    assert tokenizer.decode([i for i in ids.tolist() if i >= 0]) == "a<bos>Yes: two\nlines. <bos>"
    middle = text.index("two") + 1
    parts = [*weighs.ids_of(text, 0, middle), *weighs.ids_of(text, middle, len(text))]
    assert parts == ids.tolist()  # long documents are tokenised in parts
    assert (plain.ids_of(plain.chat(TALK), 0, 99) >= 0).all()


def test_an_answer_that_the_template_shortens_is_found_and_one_that_it_drops_is_told() -> None:
    chat = [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "<think>hm</think>\nNo."}]
    assert answers_in("[So?][No.]", chat, lambda _: "[So?]") == [(6, 9)]
    with pytest.raises(Unusable, match="loses an answer"):
        answers_in("[So?][]", chat, lambda _: "")


def chats(folder: Path, count: int, **message: str) -> TextSource:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Count from {i}: {'go on ' * (i % 7)}"},
                {**TALK[1], "content": words},
            ]
        }
        for i, words in ((i, " ".join(map(str, range(i, i + 12)))) for i in range(count))
    ]
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TextSource(kind="jsonl", path=str(path))


def corpus_of(source: TextSource, **more: float) -> Corpus:
    sizes = {"train_sequences": 16, "validation_sequences": 4, "test_sequences": 4}
    return Corpus(sources=(source,), sequence_length=32, near_duplicates=None, **sizes, **more)  # type: ignore[arg-type]


def test_a_prediction_weighs_as_the_token_that_it_predicts(tmp_path: Path, chain: Chain) -> None:
    folder, source = chain.workspace / chain.parent.folder, chats(tmp_path, 200)
    plain = prepare_corpus(corpus_of(source), folder, "p", tmp_path)
    info = prepare_corpus(corpus_of(source, prompt_weight=0.25), folder, "p", tmp_path)
    assert info.fingerprint != plain.fingerprint and weights_of(plain, "train", tmp_path) is None
    there = read_tensors(tmp_path, info.tokens)
    for split in ("train", "validation", "test"):
        assert torch.equal(there[split], read_tensors(tmp_path, plain.tokens)[split])
        weights = there[f"{split}_weights"]
        assert weights.mean().item() == pytest.approx(1) and weights.shape == there[split].shape
        low, high = weights.unique().tolist()
        assert low / high == pytest.approx(0.25)
        answered = [chr(i) for i in there[split].flatten()[1:][weights.flatten()[:-1] == high].tolist() if i < 128]
        assert not set(answered) & set("Cuserg:")  # of "user: Count from 3: go on", not of "assistant: 3 4 5"
    rows = weights_of(info, "train", tmp_path, (2, 5))
    assert rows is not None and torch.equal(rows, there["train_weights"][2:5])


def test_weights_that_mean_nothing_are_refused(tmp_path: Path, chain: Chain) -> None:
    folder = chain.workspace / chain.parent.folder
    text = tmp_path / "a.txt"
    text.write_text("\n\n\n".join(f"{i} " * 40 for i in range(300)))
    with pytest.raises(CorpusError, match="the documents hold none"):
        prepare_corpus(corpus_of(TextSource(kind="text", path=str(text)), prompt_weight=0.5), folder, "p", tmp_path)


HALVES = 2 * torch.rand(48, 32, generator=torch.Generator().manual_seed(1)).round()


def weighted(chain: Chain, workspace: Path, weights: Tensor) -> CorpusInfo:
    """The chain's corpus with these weights of its train sequences, and the first of them for validation."""
    for part in ("parent", "corpus"):
        shutil.copytree(chain.workspace / part, workspace / part, dirs_exist_ok=True)
    own = {"train_weights": weights, "validation_weights": weights[:8].clone()}
    tokens = write_tensors(
        workspace, "corpus/weighted.safetensors", read_tensors(chain.workspace, chain.corpus.tokens) | own
    )
    name = f"{chain.corpus.fingerprint}-{tokens.sha256[:8]}"
    return chain.corpus.model_copy(update={"tokens": tokens, "weighted": True, "fingerprint": name})


def three(chain: Chain, tmp_path: Path) -> list[tuple[CorpusInfo, Path]]:
    """Weights w, 2 - w, and 1: what is linear in them is as much with the third as with the others on average."""
    places = [tmp_path / name for name in "abc"]
    each = (HALVES, 2 - HALVES, torch.ones_like(HALVES))
    return [(weighted(chain, place, weights), place) for weights, place in zip(each, places, strict=True)]


def test_statistics_and_scores_are_linear_in_the_weights(chain: Chain, tmp_path: Path) -> None:
    compute = replace(HOST, micro_batch_tokens=96)
    grams, scores = [], []
    for corpus, place in three(chain, tmp_path):
        records = [record_layer(i, recording(chain.parent, corpus), place, compute) for i in range(3)]
        grams.append(read_tensors(place, records[1].statistics))
        scored = ScoringSet(corpus=corpus, last=records[-1], count=6, length=24)
        shutil.copytree(chain.workspace / "library", place / "library")
        block = next(block for block in chain.blocks if block.layer == 1 and block.variant == "kv1")
        scores += score_sequences([(block, tuple(range(6)))], records[1], scored, chain.parent, place, compute)
    for name in ("ffn_gram", "attention_in_gram", "ffn_in_cross", "ffn_contribution"):
        torch.testing.assert_close((grams[0][name] + grams[1][name]) / 2, grams[2][name], rtol=1e-4, atol=1e-3)
        assert not torch.allclose(grams[0][name], grams[2][name], rtol=1e-3)
    for values in (lambda s: s.kl_per_sequence, lambda s: s.lm_loss_per_sequence):
        one, other, whole = (torch.tensor(values(score), dtype=torch.float64) for score in scores)
        torch.testing.assert_close((one + other) / 2, whole, rtol=1e-6, atol=1e-9)
    plain = next(s for s in chain.scores if (s.layer, s.variant) == (1, "kv1"))
    assert plain.kl != pytest.approx(scores[0].kl, rel=1e-3)


@pytest.mark.skipif(LlamaCpp().missing() is not None, reason="llama.cpp is not installed")
def test_scores_of_the_whole_parent_in_a_type_are_linear_in_the_weights(chain: Chain, tmp_path: Path) -> None:
    recipe, scores = Recipe.uniform("iq4_nl", 3), []
    for corpus, place in three(chain, tmp_path):
        text = ScoringSet(corpus=corpus, last=chain.records[-1], count=6, length=24)
        scores += score_whole([text], chain.parent, recipe, place)
        alike = replace(text, corpus=corpus.model_copy(update={"weighted": False}))
        assert whole_key(text, chain.parent, recipe) != whole_key(alike, chain.parent, recipe)
    for values in (lambda s: s.kl, lambda s: s.lm_loss):
        one, other, whole = (torch.tensor(values(score), dtype=torch.float64) for score in scores)
        torch.testing.assert_close((one + other) / 2, whole, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(one, whole, rtol=1e-3)


def test_losses_of_bld_and_their_gradients_are_linear_in_the_weights(chain: Chain, tmp_path: Path) -> None:
    made = []
    for corpus, place in three(chain, tmp_path):
        wanted = recording(chain.parent, corpus)
        job = chain.job(1, "ffn", "ffn32", SETTINGS).model_copy(
            update={"recording": wanted, "record": record_layer(1, wanted, place, HOST)}
        )
        data = bld.layer_data(job, wanted.shards[0], place, HOST)
        module: Any = chain.reader.empty_layer(1, job.choice)
        module.load_state_dict(
            {n: torch.arange(t.numel()).view_as(t).sin() / 9 for n, t in module.state_dict().items()}
        )
        course = bld._Course(job=job, data=data, module=module, number=0)
        bld._gradients(course, [0, 3, 5], 2)
        scale = data.squares(data.target(job, "train", [0, 3, 5]), "train", [0, 3, 5])
        made.append([module.mlp.up_proj.weight.grad * scale, scale])
        held = data.squares(data.target(job, "validation", slice(0, 6)), "validation", slice(0, 6))
        made[-1].append(bld.held_out_loss(job, data, module) * held)
    for one, other, whole in zip(*made, strict=True):
        torch.testing.assert_close((one + other) / 2, whole, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(one, whole, rtol=1e-3)


def test_tokens_without_weight_leave_no_trace_in_the_fit_of_an_attention(chain: Chain, tmp_path: Path) -> None:
    weights = torch.cat([torch.ones(8, 32), torch.zeros(8, 32)])
    job, made = chain.job(1, "attention", "kv1", SETTINGS), []
    plain = bld.layer_data(job, job.recording.shards[0], chain.workspace, HOST)
    first = {name: states[:8] if name[0] == "train" else states for name, states in plain.states.items()}
    for data in (replace(plain, weights={"train": weights}), replace(plain, states=first), plain):
        module: Any = chain.reader.empty_layer(1, job.choice)
        bld._start(job, chain.reader, data, module, tmp_path)
        made.append(module.self_attn.o_proj.weight.detach())
    apart = [(made[0] - other).abs().max().item() for other in made[1:]]
    assert apart[0] < 0.01 < 0.1 < apart[1]  # the first alone, in other sums; all of them


@pytest.mark.parametrize(
    "settings", [{}, {"also_train": ("head",)}, {"recorded_gib": 0}], ids=["recorded", "head", "beside"]
)
def test_losses_of_gkd_are_linear_in_the_weights(chain: Chain, tmp_path: Path, settings: dict[str, object]) -> None:
    asked = GKD(steps=1, batch_sequences=4, validation_sequences=4, learning_rate=1e-9, **settings)  # type: ignore[arg-type]
    first, kl = [], []
    for corpus, place in three(chain, tmp_path):
        shutil.copytree(chain.workspace / "library", place / "library")
        teacher = record_teacher(chain.parent, corpus, asked, place, HOST)
        result = distill_globally(job_of(CHILD, chain.blocks, teacher, asked, HOST), place, HOST)
        first.append(result.losses[0])
        kl.append(result.curve[0][1])
    for one, other, whole in (first, kl):
        assert (one + other) / 2 == pytest.approx(whole, rel=1e-5) and one != pytest.approx(whole, rel=1e-3)


@pytest.fixture
def talker(chain: Chain, tmp_path: Path) -> ParentInfo:
    """The chain's parent, for whom some letters end an answer."""
    shutil.copytree(chain.workspace / "parent", tmp_path / "parent")
    ends = byte_tokenizer()("eitsS")["input_ids"]
    (tmp_path / chain.parent.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return chain.parent


def asks(folder: Path, **more: Any) -> Corpus:
    prompts = chats(folder, 40).model_dump(exclude={"weight"})
    source = {"kind": "parent_answers", "prompts": prompts, "answers": 40, "answer_tokens": 12, **more}
    sizes = {"train_sequences": 8, "validation_sequences": 2, "test_sequences": 2}
    return Corpus.model_validate({"sources": [source], "sequence_length": 16, "near_duplicates": None, **sizes})


def test_the_parent_answers_once_and_goes_on_where_it_was_killed(
    talker: ParentInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, asked = parent_answers.answer_batch, asks(tmp_path, temperature=1.0)
    done: list[int] = []

    def killed(*arguments: Any) -> Any:
        done.append(arguments[-1])
        if len(done) == 3:
            raise KeyboardInterrupt
        return made(*arguments)

    monkeypatch.setattr(parent_answers, "answer_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        with_answers(asked, talker, tmp_path, HOST)
    (part,) = (tmp_path / "corpus").glob("answers-*.part")
    part.write_bytes(part.read_bytes() + b'{"messages": [{"ro')
    found = with_answers(asked, talker, tmp_path, HOST)
    assert done == [0, 1, 2, 2] and not part.exists()
    (path,) = (source.path for source in found.sources)  # type: ignore[union-attr]
    lines = [json.loads(line)["messages"] for line in Path(path).read_text().splitlines()]
    assert len(lines) == 40 and {len(chat) for chat in lines if chat} == {2}
    assert all(not chat or (chat[0]["role"], chat[1]["role"]) == ("user", "assistant") for chat in lines)
    whole = Path(path).read_bytes()
    Path(path).unlink()
    with_answers(asked, talker, tmp_path, HOST)
    assert Path(path).read_bytes() == whole  # never killed: the same draws
    assert with_answers(asked, talker, tmp_path, HOST) == found and len(done) == 7
    others = with_answers(asks(tmp_path, temperature=1.0, seed=1), talker, tmp_path, HOST)
    assert others != found and with_answers(others, talker, tmp_path, HOST) == others
    weighs = others.model_copy(update={"prompt_weight": 0.0})
    assert prepare_corpus(weighs, tmp_path / talker.folder, talker.fingerprint, tmp_path).weighted


def test_answers_in_a_batch_are_those_alone(
    talker: ParentInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source,) = asks(tmp_path, answer_tokens=24).sources
    assert isinstance(source, ParentAnswersSource)
    monkeypatch.setattr(parent_answers, "PIECE", 5)
    model, tokenizer = parent_answers._opened(tmp_path / talker.folder, HOST)
    torch.manual_seed(0)
    for parameter in model.parameters():  # by itself it says nothing but blanks
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = [56, 71, 158]
    prompts = [prompt for _, prompt in zip(range(6), parent_answers.prompts_of(source, len, []), strict=False)]
    alone = [parent_answers.answer_batch(model, tokenizer, [prompt], source, 0)[0] for prompt in prompts]
    assert parent_answers.answer_batch(model, tokenizer, prompts, source, 0) == alone
    assert len({len(answer) for answer in alone if answer}) > 2  # they end one by one


def test_the_parent_is_asked_on_the_day_that_the_corpus_has(talker: ParentInfo, tmp_path: Path) -> None:
    (source,) = asks(tmp_path).sources
    assert isinstance(source, ParentAnswersSource)
    model, tokenizer = parent_answers._opened(tmp_path / talker.folder, HOST)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}"
    heard: list[str] = []

    def generate(ids: Tensor, **_: Any) -> Any:
        heard.append(tokenizer.decode(ids[0]))
        return SimpleNamespace(sequences=torch.nn.functional.pad(ids, (0, 1), value=tokenizer.eos_token_id))

    model.generate = generate
    parent_answers.answer_batch(model, tokenizer, [[{"role": "user", "content": "So?"}]], source, 0)
    assert heard == ["26 Jul 2024: So?"]


def test_prompts_that_cannot_be_asked_are_skipped_and_told(
    talker: ParentInfo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = asks(tmp_path, temperature=1.0)
    (path,) = (source.prompts.path for source in asked.sources)  # type: ignore[union-attr]
    lines = Path(path).read_text().splitlines()
    long = [{"role": "user", "content": "go on " * 200}]
    more = [json.dumps({"messages": chat}) for chat in (long, [TALK[1]])]
    Path(path).write_text("\n".join([lines[0], *more, *lines[1:]]) + "\n")
    (source,) = with_answers(asked, talker, tmp_path, HOST).sources
    assert "2 of 42 lines of chats.jsonl were skipped: first at line 2 asks in 1,208 tokens" in capsys.readouterr().out
    answered = Path(source.path).read_text().splitlines()  # type: ignore[union-attr]
    assert len(answered) == 40 and not any("go on go on go on go on go on go on go on" in line for line in answered)

    for kind, ending in (("jsonl", json.dumps({"text": "go on " * 200})), ("text", "go on " * 200)):
        texts = TextSource(kind=kind, path=str(tmp_path / kind))  # type: ignore[arg-type]
        Path(texts.path).write_text(ending + "\n")
        alone = ParentAnswersSource(kind="parent_answers", prompts=texts, answer_tokens=12)
        with pytest.raises(CorpusError, match="1 of 1 .* are of no use.*1,012 before 12 of an answer"):
            with_answers(asked.model_copy(update={"sources": (alone,)}), talker, tmp_path, HOST)


def test_answers_without_an_end_and_without_a_parent_are_refused(chain: Chain, tmp_path: Path) -> None:
    shutil.copytree(chain.workspace / "parent", tmp_path / "parent")
    with pytest.raises(CorpusError, match="no answer of the parent ended within 12 tokens"):
        with_answers(asks(tmp_path), chain.parent, tmp_path, HOST)
    with pytest.raises(CorpusError, match="before there is a parent"):
        list(iterate_documents(asks(tmp_path)))
