"""Real but tiny classifiers with one label for tests: an encoder (BERT) and a decoder (Qwen3), random or nearly so."""

from __future__ import annotations

import json
from pathlib import Path

from tests.tiny import tiny_tokenizer

WORDS = [
    "please",
    "no",
    "you",
    "are",
    "what",
    "is",
    "the",
    "colour",
    "of",
    "sky",
    "blue",
    "red",
    "help",
    "me",
    "thanks",
    "go",
    "away",
    "and",
    "1",
    "2",
    "3",
    "4",
    "5",
    "6",
    "7",
    "8",
    "9",
]
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]


def tiny_encoder(folder: str | Path, seed: int = 0, labels: int = 1, positions: int = 48) -> Path:
    """A BERT of two layers whose tokens are the words above; its config has no labels' names where there are two."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    word_tokenizer(folder, positions)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=64,  # heads of 32: vLLM on CPU has no smaller ones
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=positions,
        initializer_range=0.2,
        num_labels=labels,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertForSequenceClassification(config).save_pretrained(folder)
    return Path(folder)


def word_tokenizer(folder: str | Path, positions: int):
    """One token a word, [CLS] first [SEP] second [SEP]. Also written into `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {name: i for i, name in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=positions,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **names,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_decoder(folder: str | Path, seed: int = 0, template: bool = True, **config: object) -> Path:
    """A Qwen3 of two layers with the tokenizer of `tests.tiny`, with or without its chat template."""
    import torch
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    tokenizer = tiny_tokenizer(folder)
    if not template:
        tokenizer.chat_template = None
        (Path(folder) / "chat_template.jinja").unlink()
        tokenizer.save_pretrained(folder)
    given = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=128,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.2,
        num_labels=1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen3ForSequenceClassification(Qwen3Config(**given | config)).save_pretrained(folder)
    return Path(folder)


def changed(folder: Path, name: str, **values: object) -> Path:
    """`folder` with other values in one of its JSON files; None takes a key out."""
    file = folder / name
    tree = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))
    return folder
