"""The endless stream of prompts: rows of a JSONL file or a hub dataset, rendered, tokenised, in an order that is a pure
function of (seed, position). So a resumed run, or a second actor, sees exactly the same prompts."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.config import DataConfig
from core.errors import UserError, nearest
from core.schema import Prompt

Row = Mapping[str, Any]


def read_rows(path: str, split: str = "train", limit: int | None = None) -> list[Row]:
    """Rows of a JSONL file (a path that exists or ends in .jsonl) or of a hub dataset. Raises UserError."""
    file = Path(path).expanduser()
    local = file.suffix == ".jsonl" or file.exists()
    rows = list(_read_jsonl(file, limit)) if local else _read_hub(path, split, limit)
    if not rows:
        raise UserError(f"{path}: no rows; a JSONL file has one JSON object per line")
    return rows


def _read_jsonl(file: Path, limit: int | None) -> Iterator[Row]:
    try:
        lines = file.open(encoding="utf-8")
    except OSError as error:
        near = sorted(str(p) for p in file.parent.glob("*.jsonl")) if file.parent.is_dir() else []
        hint = nearest(str(file), near) if near else "name a JSONL file or a hub dataset (data.path=...)"
        raise UserError(f"{file}: cannot read the data: {error.strerror}; {hint}") from None
    with lines:
        count = 0
        for number, line in enumerate(lines, 1):
            if limit is not None and count >= limit:
                return
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{file}:{number}: not valid JSON: {error.msg} at column {error.colno}") from None
            if not isinstance(row, dict):
                raise UserError(f"{file}:{number}: a row is a JSON object, not {type(row).__name__}")
            count += 1
            yield row


def _read_hub(name: str, split: str, limit: int | None) -> list[Row]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"data '{name}' is no file here; to read it from the hub install the extra: pip install 'alignlab[hub]'"
        ) from None
    path, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(path, configuration or None, split=split)
    except Exception as error:  # whatever the hub's client raises: the user needs the name, the split and the reason
        raise UserError(
            f"data '{name}', split '{split}': neither a file here nor loadable from the hub: {error}"
        ) from None
    return list(rows if limit is None else rows.select(range(min(limit, len(rows)))))


def render(row: Row, config: DataConfig, tokenizer: Any) -> str:
    """The text that the engine continues: system message and filled template, in the tokenizer's chat format."""
    content = row[config.prompt_column]
    if isinstance(content, str):
        user = config.template.format_map({**row, "prompt": content})
        messages = [{"role": "user", "content": user}]
    else:
        messages = [dict(message) for message in content]
    if config.system is not None:
        messages.insert(0, {"role": "system", "content": config.system})
    if not config.chat_template:
        return "\n".join(message["content"] for message in messages)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def check_columns(rows: Sequence[Row], config: DataConfig) -> None:
    """Refuse data whose first row lacks a column that the config names. Raises UserError."""
    columns = set(rows[0])
    named = {"data.prompt_column": config.prompt_column}
    if config.completion_column is not None:
        named["data.completion_column"] = config.completion_column
    if config.baseline_column is not None:
        named["data.baseline_column"] = config.baseline_column
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(config.template) if name]
    except ValueError as error:
        raise UserError(f"data.template {config.template!r}: {error}; a literal brace is written twice: {{{{") from None
    named |= {f"data.template {{{name}}}": name for name in fields if name != "prompt"}
    for option, column in named.items():
        if column not in columns:
            raise UserError(f"{option}: {config.path} has no column '{column}'; {nearest(column, columns)}")


class PromptStream:
    """Position n -> Prompt. Prompts longer than `max_prompt_tokens` are left out (`too_long` counts them)."""

    def __init__(self, config: DataConfig, tokenizer: Any, seed: int, rows: Sequence[Row] | None = None) -> None:
        self.config, self.seed = config, seed
        rows = read_rows(config.path, config.split, config.limit) if rows is None else rows
        check_columns(rows, config)
        texts = [render(row, config, tokenizer) for row in rows]
        # The chat template has already written the special tokens.
        ids = tokenizer(texts, add_special_tokens=not config.chat_template)["input_ids"]
        kept = [i for i, tokens in enumerate(ids) if 0 < len(tokens) <= config.max_prompt_tokens]
        self.too_long = len(rows) - len(kept)
        self._rows = [rows[i] for i in kept]
        self._texts = [texts[i] for i in kept]
        self._ids = [tuple(ids[i]) for i in kept]
        if not kept:
            raise UserError(
                f"data.max_prompt_tokens {config.max_prompt_tokens}: none of the {len(rows)} prompts of {config.path} "
                f"is that short; the shortest has {min(map(len, ids))} tokens"
            )
        self._order: tuple[int, np.ndarray] = (-1, np.arange(0))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, ordinal: int) -> Prompt:
        """The prompt at `ordinal` (0, 1, ...) of the stream; every pass over the data has an order of its own."""
        epoch, position = divmod(ordinal, len(self))
        if self._order[0] != epoch:
            self._order = (epoch, self._permutation(epoch))
        index = int(self._order[1][position])
        return Prompt(ordinal, self._texts[index], self._ids[index], self._rows[index])

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self.config.shuffle:
            return np.arange(len(self))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self))
