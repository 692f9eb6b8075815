"""A real but tiny policy for tests: a random Qwen3 of 0.6 million parameters, a byte-level tokenizer of 400 tokens."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|end|>"
    "{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_policy(folder: str | Path, seed: int = 0, scale: float = 0.08) -> Path:
    """Write model and tokenizer into `folder`, as transformers and vLLM load them; the same bytes for the same seed.

    `scale` is the standard deviation of the weights: 0.02 samples almost uniformly, larger values have opinions.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = Path(folder)
    tokenizer = tiny_tokenizer(folder)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=3,
        intermediate_size=384,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        initializer_range=scale,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


def tiny_tokenizer(folder: str | Path):
    """400 tokens: 4 special, 256 bytes, 100 pairs of digits, 40 pairs of letters. Also written into `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [*itertools.product("0123456789", repeat=2), *itertools.islice(itertools.product("aeinorst", repeat=2), 40)]
    names = [PAD, END, USER, ASSISTANT, *letters, *("".join(pair) for pair in pairs)]
    backend = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, additional_special_tokens=[USER, ASSISTANT]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_data(path: str | Path, rows: int = 8) -> Path:
    """A JSONL file of additions: {"question": "2+3=", "answer": "5"}."""
    pairs = ((3 * i % 10, 7 * i % 10) for i in range(1, rows + 1))
    path = Path(path)
    path.write_text("".join(json.dumps({"question": f"{a}+{b}=", "answer": str(a + b)}) + "\n" for a, b in pairs))
    return path
