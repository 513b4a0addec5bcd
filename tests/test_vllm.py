"""vLLM on a CPU: what `limits` says it runs gives torch's logits there, what it refuses fails or is wrong there.

One process holds one model after another, since a start of vLLM takes longer than all loads of tiny models.
"""

import ast
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from blocks.engine_limits import EngineLimit
from blocks.errors import PuzzleError
from blocks.export_code import PLUGIN as PLUGIN_FOLDER
from blocks.export_code.modeling_decilm import DeciLMForCausalLM
from blocks.kinds import kind_of, parse_label
from blocks.parent import config_of
from profiles.schema import Hardware, Measure, Scenario, SearchSpace
from tasks.engines import vllm_engine, vllm_process, vllm_server
from tasks.engines.base import LoadOptions
from tasks.engines.errors import EngineFailed, EngineMissing
from tasks.engines.openai_server import SERVERS, Served
from tasks.engines.registry import installed_engine
from tasks.engines.vllm_engine import INSTALL, PYTHON_VARIABLE, SETTINGS, Vllm, VllmPlugin, VllmSession, cannot
from tasks.export.compressed import INTEGERS
from tasks.export.folder import ExportError, export_folder
from tasks.export.formats import export_as
from tasks.export.logits_check import KL_TOLERANCE, LOGITS_TOLERANCE, check_in_vllm, compare, unreached
from tasks.inputs.children import in_precision
from tasks.loadtest.serving_load import LoadPlan, load_test
from tasks.measure.bench import Point, bench
from tasks.measure.costs import CostRequest, measure_costs
from tests.chain import prepare
from tests.families import SLIDES, made
from tests.families import child_of as child_of_any
from tests.test_engines import ROPES, YARN, longrope, run
from tests.test_gguf import child_of
from tests.test_modeling import FULL, LINEAR, NO_OP, attention, token_ids
from tests.test_recurrent import recurrent
from tests.test_serving_load import OWNER, POINT, wait_until_gone
from tests.test_windows import windowed

pytestmark = pytest.mark.usefixtures("one_thread")
STOCK, PLUGIN = Vllm(), VllmPlugin()
MISSING = STOCK.missing()
needs_vllm = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
HOW = LoadOptions(context_tokens=64, batch_size=2)
HEAD: dict[str, Any] = {"head_dim": 32}  # the least that vLLM has a CPU kernel for
WIDE: dict[str, Any] = HEAD | {"max_position_embeddings": 1024}


def wide(width: int) -> dict[str, Any]:
    return FULL | {"ffn_mult": width * 3 / 64, "intermediate_size": width}


def heads(count: int) -> dict[str, Any]:
    """Query heads that share one KV head."""
    return attention(1) | {"num_attention_heads": count, "n_heads_in_group": count}


def odd(width: int) -> dict[str, Any]:
    """A width that is no multiple of 256: without ffn_mult, as the exports write it."""
    return FULL | {"intermediate_size": width}


# variable GQA, no-op attention, no-op FFN, both, a last layer without FFN
MIXED = [
    (attention(2), wide(256)),
    (NO_OP, odd(48)),
    (attention(1), NO_OP),
    (NO_OP, NO_OP),
    (attention(4), odd(24)),
    (attention(1), NO_OP),
]
ALIKE = [(attention(2), odd(48))] * 6


def blocks_of(pairs: list[Any], place: int | None = None, other: Any = None) -> list[dict[str, Any]]:
    chosen = [other if index == place else pair for index, pair in enumerate(pairs)]
    return [{"attention": dict(first), "ffn": dict(second)} for first, second in chosen]


RUNS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "mixed": ("llama", blocks_of(MIXED), {}),
    "biases": ("llama", blocks_of(MIXED), {"attention_bias": True, "mlp_bias": True}),
    "tied": ("llama", blocks_of(MIXED), {"tie_word_embeddings": True}),
    "llama3": ("llama", blocks_of(MIXED), {"rope_parameters": ROPES[1]}),
    "yarn": ("llama", blocks_of(MIXED), {"rope_parameters": YARN}),
    "window": ("mistral", blocks_of(MIXED), {}),
    "native": ("llama", blocks_of(ALIKE), {}),
    "native window": ("mistral", blocks_of(ALIKE), {}),
    "native family": ("qwen3", blocks_of(ALIKE), {}),
}
LONG: dict[str, Any] = {"rope_parameters": longrope(32), "max_position_embeddings": 128}
REFUSED: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "linear attention": ("llama", blocks_of(MIXED, 1, (LINEAR, odd(48))), "linear subblocks"),
    "linear FFN": ("llama", blocks_of(MIXED, 1, (NO_OP, LINEAR)), "linear subblocks"),
    "bare start": ("llama", blocks_of(MIXED, 0, (NO_OP, odd(48))), "layer 0 without attention"),
    "wrong width": ("llama", blocks_of(MIXED, 1, (NO_OP, wide(48))), "ffn_mult cannot give"),
    "qwen2": ("qwen2", blocks_of(MIXED), "biases, norms or scales"),
    "qwen3": ("qwen3", blocks_of(MIXED), "biases, norms or scales"),
    "longrope": ("llama", blocks_of(MIXED), "this scaling of the rotary frequencies"),
}

# with the plugin: no attention in layer 0, windows of two lengths each with its KV heads, linear subblocks
FREE = [
    (NO_OP, odd(48)),
    (windowed(2, 6, 4), odd(24)),
    (LINEAR, wide(48)),
    (windowed(1, 5, 4), NO_OP),
    (attention(4), LINEAR),
    (attention(1), odd(40)),
]
# fewer query heads, beside as many KV heads with all of them, with and without a window
NARROW = [(heads(2), odd(48)), (attention(1), odd(24)), (windowed(1, 6, 4) | heads(2), LINEAR), *FREE[3:]]
# states beside whole attention, windows and linear blocks, in the first layer and the last
STATES = [
    (recurrent("ssd"), odd(48)),
    (attention(1), odd(24)),
    (recurrent("gdn"), LINEAR),
    (windowed(2, 6, 4), NO_OP),
    (NO_OP, odd(40)),
    (recurrent("gdn"), odd(24)),
]
PLUGIN_RUNS: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "llama": ("llama", FREE, {}),
    "biases": ("llama", FREE, {"attention_bias": True, "mlp_bias": True}),
    "tied": ("llama", FREE, {"tie_word_embeddings": True}),
    "yarn": ("llama", FREE, {"rope_parameters": YARN}),
    "mistral": ("mistral", FREE, {}),  # the parent's own layers slide
    "qwen2": ("qwen2", FREE, {}),
    "qwen3": ("qwen3", FREE, {"attention_bias": True}),
    "stock": ("llama", MIXED, {}),
    "query heads": ("llama", NARROW, {}),
    "query heads, norms": ("qwen3", NARROW, {}),
    "states": ("llama", STATES, {}),
    "states, biases": ("qwen2", STATES, {}),
    "states, norms": ("qwen3", STATES, {"attention_bias": True}),
    "states, slides": ("mistral", STATES, {}),
    "states alone": ("llama", [(recurrent("gdn"), odd(24)), (recurrent("ssd"), NO_OP)] * 3, {}),
    "windows alone": ("llama", [(windowed(2, 6, 4), odd(24))] * 6, {}),
    "no sinks": ("llama", [(windowed(2, 6, 0), odd(24)), *FREE[1:]], {}),
    "no attention": ("llama", [(NO_OP, odd(48)), (LINEAR, LINEAR), *[(NO_OP, odd(24))] * 4], {}),
}
PUZZLES = '{"architectures": ["PuzzleForCausalLM"]}'
UNABLE = [
    ("gemma3_text", attention(2), "a model that is no child of one of the families llama"),
    ("mistral", windowed(2, 8, 4), "a window with sink tokens as long as the parent's own"),
]
PIECES = ((0, 650), (300, 480), (300, 700), (10, 50), (0, 8), (300, 640), (0, 129))


def exported(child: DeciLMForCausalLM, folder: Path) -> Path:
    return export_folder(child, folder, folder / "child", "# x\n")


class Models:
    """One process of vLLM that is handed one folder after another."""

    def __init__(self) -> None:
        self.session: VllmSession | None = None

    def load(self, folder: Path, how: LoadOptions = HOW, engine: Vllm = STOCK) -> VllmSession:
        what = engine.process(folder, how)
        if self.session is None:
            self.session = VllmSession(what)
        else:
            self.session.load(what)
        return self.session


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the process of `models` keeps what it compiles."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def models(compiled: Path) -> Iterator[Models]:
    found = Models()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiled))
        yield found
    if found.session is not None:
        found.session.close()


@needs_vllm
@pytest.mark.parametrize("case", RUNS)
def test_vllm_gives_torchs_logits_and_text(case: str, models: Models, tmp_path: Path) -> None:
    family, blocks, changes = RUNS[case]
    child = child_of(family, blocks=blocks, **(HEAD | changes))
    folder = exported(child, tmp_path)
    assert (config_of(folder).model_type == "nemotron-nas") == (not case.startswith("native"))
    session, ids = models.load(folder), token_ids(1, 24)
    found = compare(session, child, ids)
    assert found.most < LOGITS_TOLERANCE / 20 and found.agreement == 1  # such small sums: 2e-6
    expected: Any = child.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    assert session.generate(ids[0].tolist(), 8) == expected[0, 24:].tolist()


@needs_vllm
@pytest.mark.parametrize("engine", [STOCK, PLUGIN])
def test_ministrals_layers_slide_or_not_each_as_it_should(engine: Vllm, models: Models, tmp_path: Path) -> None:
    parent, ids = made("ministral", SLIDES | HEAD), token_ids(1, 24)
    kept = [{"attention": attention(2), "ffn": odd(48)}, {"attention": attention(1), "ffn": odd(24)}]
    child = child_of_any(parent, [*kept, {"attention": NO_OP, "ffn": odd(32)}, kept[0]])
    found = compare(models.load(exported(child, tmp_path), engine=engine), child, ids)
    assert found.most < LOGITS_TOLERANCE / 20 and found.agreement == 1


@torch.inference_mode()
def behind(child: DeciLMForCausalLM, ids: torch.Tensor, tokens: list[int]) -> float:
    """How far the logits of tokens that an engine made are below the largest, at most, in torch without a cache."""
    whole = torch.cat([ids, torch.tensor([tokens])], 1)
    rows = child(whole, use_cache=False).logits[0, ids.shape[1] - 1 : -1]
    return float((rows.max(-1).values - rows[torch.arange(len(tokens)), tokens]).max())


@needs_vllm
@pytest.mark.parametrize("case", PLUGIN_RUNS)
def test_the_plugin_gives_torchs_logits_and_text(case: str, models: Models, tmp_path: Path) -> None:
    family, pairs, changes = PLUGIN_RUNS[case]
    child, ids = child_of(family, blocks=blocks_of(pairs), **(HEAD | changes)), token_ids(1, 24)
    session = models.load(exported(child, tmp_path), engine=PLUGIN)
    found = compare(session, child, ids)
    assert found.most < LOGITS_TOLERANCE / 20 and found.agreement == 1
    assert behind(child, ids, session.generate(ids[0].tolist(), 8)) == 0


@needs_vllm
def test_fewer_query_heads_are_no_wider(models: Models, tmp_path: Path) -> None:
    """Where the config names no width of a head, as Qwen 2's does not, it is that of all query heads."""
    child = child_of("qwen2", blocks=blocks_of(NARROW), **HEAD, hidden_size=128)
    folder, ids = exported(child, tmp_path), token_ids(1, 24)
    fields = json.loads((folder / "config.json").read_text())
    assert fields.pop("head_dim") == 32
    (folder / "config.json").write_text(json.dumps(fields))
    found = compare(models.load(folder, engine=PLUGIN), child, ids)
    assert found.most < LOGITS_TOLERANCE / 10 and found.agreement == 1  # four times wider than the others: 1e-5


@needs_vllm
def test_what_lies_between_sinks_and_window_may_go(models: Models, tmp_path: Path) -> None:
    """A text over many blocks of the KV cache: those between are freed. Torch's text is computed without a cache."""
    child = child_of(blocks=blocks_of(FREE), **HEAD, max_position_embeddings=1024)
    session = models.load(exported(child, tmp_path), LoadOptions(context_tokens=900, batch_size=2), PLUGIN)
    ids = token_ids(1, 600)
    assert compare(session, child, ids).most < LOGITS_TOLERANCE / 20
    assert behind(child, ids, session.generate(ids[0].tolist(), 290)) < LOGITS_TOLERANCE / 20


# many requests at once, prompts in pieces, beginnings that are in the cache, and no room for all of them
CROWD = """
import json, sys
import puzzle_vllm, torch
from vllm import LLM, SamplingParams

puzzle_vllm.register()
folder, dtype, steps, room, prompts = *sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4]), json.load(sys.stdin)
llm = LLM(
    model=folder, trust_remote_code=True, skip_tokenizer_init=True, dtype=dtype, enforce_eager=True, block_size=32,
    hf_overrides={"architectures": [puzzle_vllm.ARCHITECTURE]}, max_model_len=800, max_num_seqs=4,
    max_num_batched_tokens=200, kv_cache_memory_bytes=room, enable_prefix_caching=True, disable_log_stats=False,
)
asked = [{"prompt_token_ids": prompt} for prompt in prompts]
greedy = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, detokenize=False, logprobs=0)
rounds = []
with torch.compiler.set_stance("force_eager"):
    for some in (asked[:1], asked, asked, asked[:1]):
        found = llm.generate(some, greedy, use_tqdm=False)
        made = [list(one.outputs[0].token_ids) for one in found]
        likely = [
            [at[token].logprob for at, token in zip(one.outputs[0].logprobs, tokens)]
            for one, tokens in zip(found, made)
        ]
        rounds.append(list(zip((one.num_cached_tokens for one in found), made, likely)))
(taken_back,) = (one.value for one in llm.get_metrics() if one.name == "vllm:num_preemptions")
print(json.dumps([taken_back, *rounds]))
"""
# FREE and STATES with longer windows; bytes of the cache; whether beginnings are found in it
CROWDS: dict[str, tuple[list[Any], int, bool]] = {
    "windows": ([*FREE[:3], (windowed(1, 70, 4), NO_OP), FREE[4], (windowed(4, 40, 4), odd(40))], 2_000_000, True),
    "states": ([*STATES[:3], (windowed(2, 70, 4), NO_OP), *STATES[4:]], 600_000, False),
}


@torch.inference_mode()
def likelihoods(child: DeciLMForCausalLM, ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of tokens behind a prompt, in torch without a cache."""
    rows = child(torch.cat([ids, tokens])[None], use_cache=False).logits[0, len(ids) - 1 : -1]
    return rows.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def served(folder: Path, dtype: str, room: int, prompts: list[torch.Tensor]) -> Any:
    """What CROWD prints: how often a request was put off, and in four rounds, of each: tokens found, made, likely."""
    words = json.dumps([prompt.tolist() for prompt in prompts])
    command = [str(vllm_engine.interpreter()), "-c", CROWD, str(folder), dtype, "40", str(room)]
    environment = {**os.environ, **SETTINGS}
    done = subprocess.run(command, env=environment, input=words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_vllm
@pytest.mark.parametrize("case", CROWDS)
def test_requests_do_not_take_each_others_tokens(case: str, tmp_path: Path) -> None:
    pairs, room, found_again = CROWDS[case]
    child = child_of(blocks=blocks_of(pairs), **HEAD, max_position_embeddings=1024)
    folder, ids = exported(child, tmp_path), token_ids(1, 700)[0]
    prompts = [torch.cat([ids[:shared], ids[shared + 7 : end]]) for shared, end in PIECES]
    taken_back, first, _, crowd, last = served(folder, "float32", room, prompts)
    cached, made, likely = zip(*crowd, strict=True)
    assert any(cached) == found_again
    assert taken_back > 1  # there was no room for all
    if not found_again:  # nothing of a beginning is summed in another order
        assert first == last  # bit for bit, and the cache's blocks were the others' in between
    for prompt, tokens, values in zip(prompts, made, likely, strict=True):
        assert behind(child, prompt[None], tokens) < LOGITS_TOLERANCE / 20
        expected = likelihoods(child, prompt, torch.tensor(tokens))
        torch.testing.assert_close(torch.tensor(values), expected, rtol=1e-5, atol=LOGITS_TOLERANCE / 20)


SLIDE, WHOLE = "sliding_attention", "full_attention"
ONE, GDN, WINDOW = attention(1), recurrent("gdn"), windowed(2, 8, 4)
# whether the parent's layers slide, and layers: without whole attention; with less of it than of what slides, so that
# some blocks are shared by states and sliding layers alone
LEFT: dict[str, tuple[list[str], list[dict[str, Any]]]] = {
    "slides": ([SLIDE] * 4, [recurrent("ssd"), ONE, GDN, ONE]),
    "windows": ([WHOLE] * 4, [recurrent("ssd"), WINDOW, GDN, WINDOW]),
    "less whole": ([*[SLIDE] * 4, *[WHOLE] * 3, *[SLIDE] * 4], [*[ONE] * 7, *[GDN] * 4]),
}


@needs_vllm
@pytest.mark.parametrize("case", LEFT)
def test_what_a_state_left_in_a_block_is_no_key(case: str, tmp_path: Path) -> None:
    """Its float32 bits can read as NaN in 16 bits. A key that is not seen counts zero times, and that is NaN again."""
    kinds, entries = LEFT[case]
    parent = made("ministral", WIDE | {"sliding_window": 6, "num_hidden_layers": len(kinds), "layer_types": kinds})
    child = in_precision(child_of_any(parent, blocks_of([(entry, odd(24)) for entry in entries])), torch.bfloat16)
    ids = token_ids(1, 300)[0]
    prompts = [ids[start:end] for start, end in ((0, 90), (5, 7), (9, 10), (40, 240), (70, 73), (2, 4))] * 3
    _, first, *crowds, last = served(exported(child, tmp_path), "bfloat16", 200_000 * len(kinds), prompts)
    child = in_precision(child, torch.float32)
    assert len(first) == len(last) == 1
    for prompt, (_, tokens, values) in zip(prompts * 2, [*crowds[0], *crowds[1]], strict=True):
        expected = likelihoods(child, prompt, torch.tensor(tokens))
        torch.testing.assert_close(torch.tensor(values), expected, rtol=0, atol=0.4)  # .17 was seen


@needs_vllm
def test_logits_start_no_compiler(models: Models, compiled: Path, tmp_path: Path) -> None:
    """A C++ compiler for one sum took half a minute of a check; on a busy machine the check did not end."""
    session = models.load(exported(child_of(blocks=blocks_of(MIXED), **HEAD), tmp_path))
    session.logits(token_ids(1, 24)[0].tolist())
    assert not [path for path in compiled.rglob("*") if path.is_file()]


@needs_vllm
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_fails_or_is_wrong_in_vllm(
    case: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, blocks, reason = REFUSED[case]
    child = child_of(family, blocks=blocks, **HEAD, **(LONG if case == "longrope" else {}))
    folder = exported(child, tmp_path)
    with pytest.raises(EngineLimit, match=reason):
        Vllm().process(folder, HOW)
    assert reason in check_in_vllm(child, folder, "float32")  # the export says so
    monkeypatch.setattr(vllm_engine, "_refused", lambda *_: None)
    try:
        found = compare(models.load(folder), child, token_ids(1, 24))
    except EngineFailed:
        return
    assert found.most > LOGITS_TOLERANCE


@needs_vllm
@pytest.mark.parametrize(("family", "entry", "reason"), UNABLE)
def test_what_the_plugin_does_not_run_it_refuses(
    family: str, entry: dict[str, Any], reason: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing of puzzle is there to refuse it first."""
    folder = exported(child_of(family, blocks=blocks_of([(entry, odd(48)), *FREE[1:]]), **HEAD), tmp_path)
    monkeypatch.setattr(vllm_engine, "_refused", lambda *_: None)
    with pytest.raises(EngineFailed, match=f"puzzle's plugin for vLLM cannot run {reason}"):
        models.load(folder, engine=PLUGIN)


# what the plugin would have to share out, take back or carry beside keys and values
BESIDE = """
import json, sys
import puzzle_vllm
puzzle_vllm.register()
from puzzle_vllm.model import refused
from vllm import EngineArgs
from vllm.model_executor.models.config import MODELS_CONFIG_MAP

def made(**asked):
    return EngineArgs(
        model=sys.argv[1], max_model_len=64, trust_remote_code=True, skip_tokenizer_init=True,
        hf_overrides={"architectures": [puzzle_vllm.ARCHITECTURE]}, **asked,
    ).create_engine_config()

untrusted, ahead, free = made(), made(), made()
untrusted.model_config.trust_remote_code = False  # vLLM would have read no config without
ahead.scheduler_config.async_scheduling = True  # as on a GPU where it was asked for
free.scheduler_config.async_scheduling = None  # as on a GPU where nothing was said
MODELS_CONFIG_MAP[puzzle_vllm.ARCHITECTURE].verify_and_update_config(free)
asked = [
    made(),
    made(tensor_parallel_size=2),
    made(speculative_config={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}),
    made(kv_transfer_config={"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}),
    made(kv_cache_dtype="fp8"),
    untrusted,
    ahead,
]
found = [refused(one.model_config.hf_config, one) for one in asked]
print(json.dumps([free.scheduler_config.async_scheduling, *found]))
"""


@needs_vllm
@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (attention(2), [None] * 7),
        (heads(1), [None, "cannot be shared out evenly among 2 devices", *[None] * 5]),
        (windowed(2, 6, 4), [None, None, None, "KV connector", None, None, None]),
        (
            recurrent("ssd"),
            [None, "several devices", "speculative", "KV connector", "fp8", "trust-remote", "--no-async-scheduling"],
        ),
    ],
)
def test_what_a_window_or_a_state_cannot_stand_beside_is_refused(
    entry: dict[str, Any], told: list[str | None], tmp_path: Path
) -> None:
    folder = exported(child_of(blocks=blocks_of([(entry, odd(48)), *MIXED[1:]]), **HEAD), tmp_path)
    command = [str(vllm_engine.interpreter()), "-c", BESIDE, str(folder)]
    environment = {**os.environ, **SETTINGS, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ahead, *found = json.loads(done.stdout.splitlines()[-1])
    assert ahead == (False if "recurrent" in entry else None)
    assert all(reason is None if word is None else word in reason for reason, word in zip(found, told, strict=True))


@needs_vllm
def test_the_plugin_refuses_rotary_frequencies_that_vllm_computes_otherwise(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported(child_of(blocks=blocks_of(FREE), **HEAD, **LONG), tmp_path)
    monkeypatch.setattr(vllm_engine, "_refused", lambda *_: None)
    with pytest.raises(EngineFailed, match="cannot run rotary frequencies of the type longrope"):
        models.load(folder, engine=PLUGIN)


@needs_vllm
def test_stock_vllm_takes_a_folder_for_the_plugin_as_its_own_model(models: Models, tmp_path: Path) -> None:
    """Left to the config, it would take transformers' code, which it cannot run for all children."""
    child = child_of(blocks=blocks_of(MIXED), **HEAD)
    folder = export_folder(child, tmp_path, tmp_path / "child", "# x\n", "vllm-plugin")
    found = compare(models.load(folder), child, token_ids(1, 24))
    assert found.most < LOGITS_TOLERANCE / 20 and found.agreement == 1


@needs_vllm
def test_a_request_is_timed_in_both_precisions_and_with_the_threads_asked(models: Models, tmp_path: Path) -> None:
    child = in_precision(child_of(blocks=blocks_of(MIXED), **HEAD), torch.bfloat16)
    folder = exported(child, tmp_path)
    session = models.load(folder, LoadOptions(context_tokens=64, batch_size=2, precision="bfloat16"))
    found = compare(session, in_precision(child, torch.float32), token_ids(1, 24))
    assert 0 < found.kl < KL_TOLERANCE["bfloat16"]
    for turn in (session.request(token_ids(2, 16), 4), session.request(token_ids(1, 16), 4, grow=9)):
        assert min(turn.prefill, turn.step, turn.prefill_cpu, turn.step_cpu) > 0
    assert session.worker.memory_bytes() > 2**20
    assert session.worker.ask({"threads": {}}) == {"threads": 1}


@needs_vllm
def test_states_run_in_bfloat16(models: Models, tmp_path: Path) -> None:
    child = in_precision(child_of(blocks=blocks_of(STATES), **HEAD), torch.bfloat16)
    how = LoadOptions(context_tokens=64, batch_size=2, precision="bfloat16")
    session = models.load(exported(child, tmp_path), how, PLUGIN)
    found = compare(session, in_precision(child, torch.float32), token_ids(1, 24))
    assert 0 < found.kl < KL_TOLERANCE["bfloat16"]
    turn = session.request(token_ids(2, 16), 4, grow=9)
    assert min(turn.prefill, turn.step, turn.prefill_cpu, turn.step_cpu) > 0


def in_one_process(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads a model in vLLM gets the process that is already there."""

    def load(self: Vllm, path: Path, how: LoadOptions) -> Any:
        session = models.load(path, how, self)
        monkeypatch.setattr(session, "close", lambda: None)
        return session

    monkeypatch.setattr(Vllm, "load", load)


@needs_vllm
def test_an_export_is_checked_in_vllm(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the whole command."""
    in_one_process(models, monkeypatch)
    child = child_of(blocks=blocks_of(MIXED), **HEAD)
    folder = exported(child, tmp_path)
    notes = export_as(folder, "transformers", "f32", tmp_path / "f32").notes
    assert any("vLLM" in note and "against torch" in note and "8 greedy tokens equal" in note for note in notes)
    assert any("KL" in note for note in export_as(folder, "transformers", "bf16", tmp_path / "bf16").notes)
    assert any("float32 and bfloat16 only" in n for n in export_as(folder, "transformers", "f16", tmp_path / "h").notes)
    child.model.layers[4].mlp.down_proj.weight.data *= 1.1
    with pytest.raises(ExportError, match="vLLM does not give torch's logits on child"):
        check_in_vllm(child, folder, "float32")


def test_a_check_says_that_it_does_not_reach_beyond_a_window() -> None:
    config = child_of(blocks=blocks_of([(windowed(2, 40, 4), odd(48)), *MIXED[1:]]), **HEAD).config
    assert unreached(config, 32) == "; no text longer than its windows (up to 40 tokens) was compared"
    assert unreached(config, 41) == "" == unreached(child_of(blocks=blocks_of(MIXED)).config, 32)


@needs_vllm
@pytest.mark.parametrize(
    ("precision", "first"),
    [(name, first) for name in INTEGERS for first in (attention(1), windowed(1, 6, 4), recurrent("gdn"))],
)
def test_integers_give_torchs_logits_in_vllm(
    precision: str, first: dict[str, Any], models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of different shapes: vLLM multiplies what torch has of the rounded weights; other weights are refused."""
    in_one_process(models, monkeypatch)
    plugged = first != attention(1)
    form, engine = ("vllm-plugin", PLUGIN) if plugged else ("transformers", STOCK)
    second = (LINEAR, LINEAR) if plugged else (NO_OP, odd(96))
    pairs = [(first, odd(64)), second, (attention(2), NO_OP), (attention(4), odd(32))]
    child = in_precision(child_of(blocks=blocks_of([*pairs, *pairs[:2]]), **HEAD), torch.bfloat16)
    tokens = torch.randint(child.config.vocab_size, (16, 32), generator=torch.Generator().manual_seed(0))
    target = tmp_path / "out"
    notes = export_as(exported(child, tmp_path), form, precision, target, calibration=lambda: tokens).notes
    if reason := cannot(config_of(target), engine.name):
        assert "processor" in reason and f"not compared with vLLM's logits: {reason}" in notes
        with pytest.raises(EngineLimit, match="x86 processors with"):
            engine.load(target, LoadOptions(precision="bfloat16"))
        return
    assert any("vLLM" in note and "against torch on the same weights" in note for note in notes)
    child.model.layers[3].mlp.down_proj.weight.data *= 4
    with pytest.raises(ExportError, match="does not give torch's logits on out"):
        check_in_vllm(child, target, precision, engine=engine)


@needs_vllm
def test_bench_measures_parent_and_child_in_vllm(tmp_path: Path) -> None:
    sources = {}
    for name, pairs in (("parent", ALIKE), ("child", MIXED)):
        (tmp_path / name).mkdir()
        sources[name] = exported(child_of(blocks=blocks_of(pairs), **HEAD), tmp_path / name)
    rows = bench(sources, "vllm", [Point.parse("1x8x4"), Point.parse("2x8x3")], rounds=2)
    assert [(row.model, row.batch_size) for row in rows] == [("parent", 1), ("child", 1), ("parent", 2), ("child", 2)]
    for row in rows:
        assert (row.throughput.memory_bytes or 0) > 2**20 and row.version == Vllm().version()
        assert row.throughput.prefill_cpu_seconds.value > 0 and row.throughput.decode_tokens_per_second.n == 2


@needs_vllm
@pytest.mark.parametrize(("engine", "more"), [(STOCK, ()), (PLUGIN, ("linear", "q2", "ssd"))])
def test_costs_in_vllm_are_a_cost_table(engine: Any, more: tuple[str, ...], tmp_path: Path) -> None:
    parent, _ = prepare(tmp_path, train_steps=0)
    config = tmp_path / parent.folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | HEAD))
    space = SearchSpace(attention=("linear", "q2", "ssd", "no_op"), ffn=("ffn32", "no_op"))
    scenarios = (Scenario(prompt_tokens=8, generated_tokens=6),)
    hardware = Hardware(threads=1, engine=engine.name, precision="bfloat16")
    measure = Measure(rounds=3, decode_steps=2)
    asked = CostRequest(parent=parent, space=space, scenarios=scenarios, hardware=hardware, measure=measure)
    table = measure_costs(asked, tmp_path)
    assert table.hardware["engine"] == engine.version() and table.hardware["precision"] == "bfloat16"
    found = {(cost.subblock, cost.variant) for cost in table.costs}
    ffn = {("ffn", label) for label in ("parent", "ffn32", "no_op")}
    assert found == {("attention", label) for label in ("parent", "no_op", *more)} | ffn  # what the engine runs
    assert table.parent_measured[0].prefill_seconds > 0


def test_without_vllm_the_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vllm_engine, "ROOT", tmp_path)
    with pytest.raises(EngineMissing, match="make vllm"):
        installed_engine("vllm")
    refused = run("bench", "child", "--engine", "vllm")
    assert refused.exit_code != 0 and "make vllm" in str(refused.exception)
    child = child_of(blocks=blocks_of(MIXED), **HEAD)
    folder = exported(child, tmp_path)
    assert check_in_vllm(child, folder, "float32") == f"not compared with vLLM's logits: {INSTALL}"
    site = tmp_path / vllm_engine.FOLDER / "lib" / "python3.11" / "site-packages" / "vllm"
    site.mkdir(parents=True)
    (site / "__init__.py").touch()
    assert vllm_engine.interpreter() is None  # packages alone do not run
    python = tmp_path / vllm_engine.FOLDER / "bin" / "python"
    python.parent.mkdir()
    python.touch()
    assert vllm_engine.interpreter() == python
    monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path / "python"))
    with pytest.raises(EngineMissing, match="which is not the interpreter of an environment with vLLM"):
        installed_engine("vllm")


def test_only_puzzles_own_code_is_run(tmp_path: Path) -> None:
    own = exported(child_of(blocks=blocks_of(MIXED), **HEAD), tmp_path)
    assert vllm_engine._trusted(own)
    (tmp_path / "n").mkdir()
    assert not vllm_engine._trusted(exported(child_of(blocks=blocks_of(ALIKE), **HEAD), tmp_path / "n"))
    code, config = own / "configuration_decilm.py", own / "config.json"
    text = code.read_text()
    code.write_text(text + "\nimport os\n")
    with pytest.raises(EngineLimit, match="holds other code .configuration_decilm.py."):
        vllm_engine._trusted(own)
    code.write_text(text)
    fields = json.loads(config.read_text())
    fields["auto_map"]["AutoConfig"] = "another.DeciLMConfig"
    config.write_text(json.dumps(fields))
    with pytest.raises(EngineLimit, match="holds other code .auto_map"):
        vllm_engine._trusted(own)


def test_what_the_cpu_build_cannot_run_is_said_before_it_starts(tmp_path: Path) -> None:
    child = child_of(blocks=blocks_of(MIXED))
    assert cannot(child.config) == (
        "vLLM has no CPU kernel for attention heads of 8, only for 32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512"
    )
    with pytest.raises(EngineLimit, match="is not a folder"):
        vllm_engine._trusted(tmp_path / "x.gguf")
    if MISSING is None:
        with pytest.raises(PuzzleError, match="float32 and bfloat16"):
            Vllm().process(tmp_path, LoadOptions(precision="float16"))


@pytest.mark.parametrize(
    ("form", "has", "reason"),
    [
        ("pack-quantized", {}, "AVX-512 only"),
        ("pack-quantized", {"avx512_f": True}, None),
        ("int-quantized", {"avx512_f": True}, "wrong on x86 processors without VNNI"),
        ("int-quantized", {"avx_vnni": True}, None),
        ("int-quantized", {"architecture": "aarch64"}, None),
        (None, {}, None),
    ],
)
def test_integers_are_refused_on_processors_that_cannot_multiply_them(
    form: str | None, has: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {"architecture": "x86_64", "avx512_f": False, "avx512_vnni": False, "avx_vnni": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: old | has)
    config = child_of(blocks=blocks_of(MIXED), **HEAD).config
    config.quantization_config = {"format": form} if form else None
    found = cannot(config)
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_the_process_imports_nothing_of_puzzle() -> None:
    tree = ast.parse(Path(vllm_process.__file__).read_text())
    nodes = list(ast.walk(tree))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & {"blocks", "tasks", "flows", "profiles"}


class Output:
    """What vLLM's step gives of one sequence, as far as it is read."""

    def __init__(self, tokens: int) -> None:
        self.outputs, self.finished = [type("One", (), {"token_ids": [0] * tokens})()], False


def test_a_step_that_is_not_what_it_is_timed_as_is_refused() -> None:
    vllm_process._expect([Output(3), Output(3)], 2, 3)
    for wrong in ([Output(3)], [Output(3), Output(2)], []):
        with pytest.raises(RuntimeError, match="2 sequences should have 3"):
            vllm_process._expect(wrong, 2, 3)


SMOLLM2 = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}


def test_the_cache_holds_every_sequence() -> None:
    one = 2 * 30 * 3 * 64 * 4
    assert vllm_process.kv_bytes(SMOLLM2, "float32", 4, 320) >= 4 * 320 * one
    assert vllm_process.kv_bytes(SMOLLM2, "bfloat16", 4, 320) == vllm_process.kv_bytes(SMOLLM2, "float32", 4, 320) // 2


@pytest.mark.parametrize("label", ["ssd", "gdn"])
@pytest.mark.parametrize(("precision", "size"), [("float32", 4), ("bfloat16", 2)])
def test_the_cache_counts_a_state_as_the_plan_does(label: str, precision: str, size: int) -> None:
    """vllm_process.py imports nothing of puzzle, so it counts by itself. A state is in a block of each layer."""
    blocks = [{"attention": recurrent(label)}] + [{"attention": attention(3)}] * 29
    variant = parse_label("attention", label, SimpleNamespace(**SMOLLM2))
    state = kind_of(variant).state_bytes(variant, SimpleNamespace(**SMOLLM2), size)
    with_states = vllm_process.kv_bytes(SMOLLM2 | {"block_configs": blocks}, precision, 4, 320)
    assert with_states - vllm_process.kv_bytes(SMOLLM2, precision, 4, 320) == 2 * 4 * 30 * state


@needs_vllm
def test_all_sequences_run_in_one_step(models: Models, tmp_path: Path) -> None:
    """So many texts, with heads so wide, that the least cache would not do. A text that waited would be an error."""
    child = child_of(blocks=blocks_of(STATES), **WIDE | {"head_dim": 128})
    how = LoadOptions(context_tokens=300, batch_size=16)
    turn = models.load(exported(child, tmp_path), how, PLUGIN).request(token_ids(16, 290), 8)
    assert turn.step > 0


@needs_vllm
def test_vllms_server_answers_under_load_and_ends_with_its_owner(tmp_path: Path) -> None:
    """One start for all: it takes longer than the rest. The folder's own config class and rule of recurrent attention
    are run, so it was trusted, and the plugin, in the engine core too.
    """
    folder = exported(child_of(blocks=blocks_of(STATES), **HEAD), tmp_path)
    command = [sys.executable, "-c", OWNER, "vllm-plugin", str(folder), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ}, cwd=Path.cwd()) as owner:
        try:
            assert owner.stdout is not None
            pid, url = owner.stdout.readline().split()
            served = Served(url=url, pid=int(pid))
            (row,) = load_test(
                {"child": served}, LoadPlan(points=(POINT,), rounds=2, requests=3), config_of(folder).vocab_size
            )
            assert (row.requests, row.failed, row.errors) == (6, 0, ())
            family = [int(pid), *(one.pid for one in psutil.Process(int(pid)).children(recursive=True))]
            assert len(family) > 1  # the engine core is a process of its own
            alone = psutil.Process(int(pid)).memory_info().rss
            assert row.memory_bytes and row.memory_bytes > 1.2 * alone
        finally:
            owner.kill()
        owner.wait(20)
        wait_until_gone(family)


def test_the_server_finds_what_pip_would_have_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    vllm_server.install_plugin(tmp_path)
    (found,) = distributions(path=[str(tmp_path)])
    package = tomllib.loads((vllm_engine.CODE / PLUGIN_FOLDER / "pyproject.toml").read_text())["project"]
    assert (found.name, found.version) == (package["name"], package["version"])
    (point,) = found.entry_points
    assert {point.group: {point.name: point.value}} == package["entry-points"]


def test_vllms_server_trusts_no_code_but_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "_installed", lambda: Path("python"))
    folder = exported(child_of(blocks=blocks_of(MIXED), **HEAD), tmp_path)
    command, stock = SERVERS["vllm"](folder, LoadOptions(), 1)
    assert "--trust-remote-code" in command and "--no-enable-prefix-caching" in command
    plugged, environment = SERVERS["vllm-plugin"](folder, LoadOptions(), 1)
    assert command[-2:] == ["--hf-overrides", PUZZLES.replace("Puzzle", "DeciLM")] and stock["VLLM_PLUGINS"] == ""
    assert plugged[-2:] == ["--hf-overrides", PUZZLES] and environment["VLLM_PLUGINS"] == "puzzle"
    native = exported(child_of(blocks=blocks_of(ALIKE), **HEAD), tmp_path / "native")
    assert "--trust-remote-code" not in SERVERS["vllm"](native, LoadOptions(), 1)[0]
    assert "--hf-overrides" not in SERVERS["vllm-plugin"](native, LoadOptions(), 1)[0]
    (folder / "configuration_decilm.py").write_text("import os")
    with pytest.raises(EngineLimit, match="holds other code"):
        SERVERS["vllm"](folder, LoadOptions(), 1)
