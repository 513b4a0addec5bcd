"""Tiny parents of five families for tests: random, seeded, sharp enough that a mistake shows. Of all: families.py.

Fresh weights are near zero and fresh norms are all ones, so a forgotten norm or bias would change nothing. Here every
matrix has gain about one, norms and biases are random, head_dim is not hidden_size / heads where the family allows it.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from profiles.schema import TinyParent
from tasks.inputs.tiny import family_config

FAMILIES: tuple[Any, ...] = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
HIDDEN_SIZE = 32
INTERMEDIATE_SIZE = 48
VOCAB_SIZE = 64
SLIDING_WINDOW = 6  # tests run on sequences longer than this


def tiny_model(family: Any = "llama", layers: int = 3, seed: int = 0, **changes: Any) -> Any:
    """A model of a family, float32, in eval mode: width 32, 4 heads, 2 KV heads, FFN 48, vocabulary 64.

    `changes` are set on the config, e.g. `attention_bias=True`.
    """
    spec = TinyParent(
        family=family,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config: Any = family_config(spec, VOCAB_SIZE)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 3
    config.initializer_range = HIDDEN_SIZE**-0.5
    if family in ("qwen3", "gemma3_text"):
        config.head_dim = 16
    if family == "gemma3_text":
        config.query_pre_attn_scalar = 12
        config.sliding_window = SLIDING_WINDOW
    else:
        config.tie_word_embeddings = family == "qwen3"
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def tiny_parent(folder: Path, family: Any = "llama", layers: int = 3, seed: int = 0, **changes: Any) -> Path:
    """Save a tiny model with a 64-word tokenizer as a Hugging Face folder; returns the folder."""
    tiny_model(family, layers, seed, **changes).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def word_tokenizer() -> PreTrainedTokenizerFast:
    """<unk>, <bos>, <eos>, <pad> and the words w4 ... w63, split at white space."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<bos>", "<eos>", "<pad>", *(f"w{index}" for index in range(4, VOCAB_SIZE))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def tiny_tokens(sequences: int = 2, length: int = 16, seed: int = 1) -> torch.Tensor:
    """Random token ids without special tokens, int64 (sequences, length)."""
    return torch.randint(4, VOCAB_SIZE, (sequences, length), generator=torch.Generator().manual_seed(seed))
