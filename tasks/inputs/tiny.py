"""Make a tiny parent, so that a whole run works anywhere without a download.

It has a byte-level tokenizer and the architecture of one of the families. A short training on the corpus makes its
layers useful, so that replacing them makes a difference. The same settings and text give the same bytes.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from blocks.errors import CorpusError, ParentError
from blocks.export_code.families_decilm import FAMILIES
from profiles.schema import TinyParent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

CONTEXT_TOKENS = 1024
SLIDING_WINDOW = 32
ALTERNATE = ("gemma3_text", "gemma2", "ministral", "olmo3", "exaone4")  # layers that slide and layers that do not
# scores of heads of so many channels, and multipliers with which so small a parent learns in a few steps
SCALES: dict[str, Callable[[int], dict[str, Any]]] = {
    "gemma3_text": lambda channels: {"query_pre_attn_scalar": channels},
    "gemma2": lambda channels: {"query_pre_attn_scalar": channels},
    "granite": lambda channels: {
        "attention_multiplier": 1 / channels,
        "embedding_multiplier": 4.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
}
SCALES["granitemoe"] = SCALES["granite"]
EXPERTS, PER_TOKEN = 8, 2  # of an FFN, where the family has some
TRAIN_BATCH = 8
TRAIN_TOKENS = 64
TRAIN_CHARACTERS = 1 << 20  # more text than this does not change what a few hundred steps can learn
LEARNING_RATE = 4e-3


def make_tiny_parent(spec: TinyParent, folder: Path, texts: Iterable[str]) -> None:
    """Write a tiny parent to `folder`: config, float32 model.safetensors, tokenizer. Bit-identical when made twice.

    `texts` is read up to one million characters, and not at all for train_steps = 0.
    Raises ParentError for sizes that do not fit together, CorpusError for too little text.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    config = family_config(spec, len(tokenizer))
    with _seeded(spec.seed):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if spec.train_steps:
            _train(model, token_stream(tokenizer, texts), spec.train_steps)
    model.save_pretrained(folder, save_original_format=False)
    tokenizer.save_pretrained(folder)


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """One token per UTF-8 byte, then <bos>, <|endoftext|>, <pad>: 259 tokens; decodes to the very text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # GPT-2's trick: every byte has a printable stand-in, so that bytes can be a vocabulary of strings
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<|endoftext|>",  # Qwen2Tokenizer, forced on every qwen2 folder, would add it
        pad_token="<pad>",
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template="{% for message in messages %}{{ message.role }}: {{ message.content }}\n\n{% endfor %}",
    )


def family_config(spec: TinyParent, vocab_size: int) -> PreTrainedConfig:
    """The family's own config in the sizes of the spec; the last three ids are bos, eos and pad.

    Raises ParentError when the heads do not divide.
    """
    hidden, heads, key_values = spec.hidden_size, spec.num_attention_heads, spec.num_key_value_heads
    if hidden % (2 * heads) or heads % key_values:
        raise ParentError(
            f"parent sizes do not fit: hidden_size {hidden} must be a multiple of 2 x num_attention_heads ({heads}), "
            f"and num_attention_heads a multiple of num_key_value_heads ({key_values})."
        )
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_values,
        "head_dim": hidden // heads,
        "max_position_embeddings": CONTEXT_TOKENS,
        "bos_token_id": vocab_size - 3,
        "eos_token_id": vocab_size - 2,
        "pad_token_id": vocab_size - 1,
        "tie_word_embeddings": True,
        # at this width the usual 0.02 leaves layers that add next to nothing, and then nothing is worth keeping
        "initializer_range": hidden**-0.5,
    }
    experts = FAMILIES[spec.family].experts
    if experts:
        sizes = (EXPERTS, PER_TOKEN, max(1, spec.intermediate_size // PER_TOKEN))
        fields |= dict(zip(experts.fields, sizes, strict=True))
    if spec.family in ALTERNATE:
        kinds = itertools.cycle(("sliding_attention", "full_attention"))
        fields |= {"sliding_window": SLIDING_WINDOW}
        fields |= {"layer_types": list(itertools.islice(kinds, spec.num_hidden_layers))}
    elif FAMILIES[spec.family].slides == "all":
        fields |= {"sliding_window": None}
    return CONFIG_MAPPING[spec.family](**fields | SCALES.get(spec.family, lambda _: {})(hidden // heads))


def training_texts(texts: Iterable[str]) -> Iterator[str]:
    """The part of `texts` that a tiny parent is trained on: the first million characters."""
    left = TRAIN_CHARACTERS
    for text in texts:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def token_stream(tokenizer: "PreTrainedTokenizerFast", texts: Iterable[str]) -> torch.Tensor:
    """Token ids of the training texts, an eos after each: int64 (N,). Raises CorpusError for too little text."""
    ids: list[int] = []
    for text in training_texts(texts):
        ids += [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
    if len(ids) <= TRAIN_TOKENS:
        raise CorpusError(
            f"a tiny parent needs more than {TRAIN_TOKENS} bytes of text to train on, the corpus has {len(ids)}: "
            "add text, or set parent.train_steps to 0."
        )
    return torch.tensor(ids)


def _train(model: "PreTrainedModel", stream: torch.Tensor, steps: int) -> None:
    """AdamW on random windows of the stream, with a linear warm-up and a linear way down."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(stream) - TRAIN_TOKENS, (TRAIN_BATCH, 1))
        batch = stream[starts + torch.arange(TRAIN_TOKENS)]
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Own random numbers and one thread: sums in another order would give other bits on another machine."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
