"""Weights of tokens: which tokens of a chat have them, and that statistics, BLD, scores and GKD are linear in them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blocks.compute import HOST
from blocks.errors import CorpusError
from blocks.library import read_tensors, write_tensors
from blocks.records import CorpusInfo
from profiles.schema import GKD, Corpus, TextSource
from tasks.distill import bld
from tasks.distill.gkd_job import distill_globally, job_of
from tasks.distill.gkd_targets import record_teacher
from tasks.distill.record import record_layer
from tasks.inputs.chats import Unusable, answers_in
from tasks.inputs.corpus import document_tokenizer, prepare_corpus, weights_of
from tasks.inputs.tiny import byte_tokenizer
from tasks.score.scoring import ScoringSet, score_sequences
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
