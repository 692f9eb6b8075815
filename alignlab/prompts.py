"""The endless stream of prompts: rows of a JSONL file or a hub dataset, rendered, tokenised, in an order that is a pure
function of (seed, position). So a resumed run, or a second actor, sees exactly the same prompts."""

from __future__ import annotations

import itertools
import json
import math
import re
import reprlib
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.config import DataConfig
from core.errors import UserError, first_line, nearest
from core.schema import Prompt

Row = Mapping[str, Any]


def is_file(path: str) -> bool:
    """Whether `path` means a file here, not a hub dataset: it exists, or says that it is JSONL."""
    return path.endswith(".jsonl") or Path(path).expanduser().exists()


def load_rows(config: DataConfig) -> list[Row]:
    """The rows that `config` names, checked. Raises UserError."""
    rows = read_rows(config.path, config.split, config.limit)
    check_rows(rows, config)
    return rows


def read_rows(path: str, split: str = "train", limit: int | None = None, option: str = "data.path") -> list[Row]:
    """Rows of a JSONL file or of a hub dataset. Raises UserError; `option` is where the path is written."""
    rows = list(_read_jsonl(path, limit, option)) if is_file(path) else _read_hub(path, split, limit, option)
    if not rows:
        raise UserError(f"{option}: {path} has no rows; a JSONL file has one JSON object per line")
    return rows


def _read_jsonl(path: str, limit: int | None, option: str) -> Iterator[Row]:
    file = Path(path).expanduser()
    try:
        lines = file.open("rb")
    except OSError as error:
        near = sorted(str(p) for p in file.parent.glob("*.jsonl")) if file.parent.is_dir() else []
        hint = nearest(path, near) if near else "name a JSONL file or a hub dataset"
        raise UserError(f"{option}: cannot read {path}: {error.strerror}; {hint}") from None
    with lines:
        written = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        yield from (_parse(line, f"{path}:{number}") for number, line in itertools.islice(written, limit))


def _parse(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text: {error.reason} at byte {error.start} of the line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row is a JSON object, not {type(row).__name__}")
    return row


def _read_hub(name: str, split: str, limit: int | None, option: str) -> list[Row]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{option}: {name} is no file here; to read it from the hub install the extra hub: "
            '.venv/bin/pip install -e ".[hub]"'
        ) from None
    path, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(path, configuration or None, split=split)
    except Exception as error:  # whatever the hub's client raises: the user needs the name, the split and the reason
        raise UserError(
            f"{option}: {name}, split '{split}': neither a file here nor loadable from the hub: {error}"
        ) from None
    return list(rows if limit is None else rows.select(range(min(limit, len(rows)))))


# ---------------------------------------------------------------- what a row must hold
def check_rows(rows: Sequence[Row], config: DataConfig) -> None:
    """Refuse data of which any row lacks what `config` takes from it. Raises UserError that names the row."""
    check_column(rows, config.path, "data.prompt_column", config.prompt_column, PROMPT)
    if config.completion_column is not None:
        check_column(rows, config.path, "data.completion_column", config.completion_column, TEXT)
    if config.rejected_column is not None:
        check_column(rows, config.path, "data.rejected_column", config.rejected_column, TEXT)
    if config.baseline_column is not None:
        check_column(rows, config.path, "data.baseline_column", config.baseline_column, NUMBER)
    for name in check_template(config.template) - {"prompt"}:
        check_column(rows, config.path, f"data.template {{{name}}}", name, VALUE)
    for number, row in enumerate(rows, 1):
        try:
            _messages(row, config)
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # "{answer:.2f}" of a text
            raise UserError(
                f"data.template {config.template!r}: cannot be filled from {config.path}, row {number}: {error}"
            ) from None


def check_template(template: str) -> set[str]:
    """The columns that a template names. Raises UserError where a brace does not belong to one."""
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        names = {re.split(r"[.\[]", field)[0] for field in fields}
        for name in names:
            if not name or name.isdigit():
                raise ValueError(f"{{{name}}} names no column")
    except ValueError as error:
        raise UserError(
            f"data.template {template!r}: {error}; {{column}} stands for a column, a literal brace is written twice: "
            "\\boxed{{}}"
        ) from None
    return names


Kind = tuple[str, Callable[[Any], bool]]
"""What a column holds, in words and as a test of one value."""


def _is_prompt(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return isinstance(value, str)
    return all(isinstance(m, Mapping) and all(isinstance(m.get(k), str) for k in ("role", "content")) for m in value)


TEXT: Kind = ("a text", lambda value: isinstance(value, str))
NUMBER: Kind = ("a finite number", lambda value: type(value) in (int, float) and math.isfinite(value))
VALUE: Kind = ("a value", lambda value: value is not None)
PROMPT: Kind = ("a text, or chat messages [{role: text, content: text}, ...]", _is_prompt)


def check_column(rows: Sequence[Row], path: str, option: str, column: str, kind: Kind) -> None:
    """Raise UserError for the first row without `column`, or with something else in it than `kind`."""
    what, fits = kind
    for number, row in enumerate(rows, 1):
        if column not in row:
            raise UserError(f"{option}: {path}, row {number}: no column '{column}'; {nearest(column, row)}")
        if not fits(row[column]):
            got = reprlib.repr(row[column])
            raise UserError(f"{option}: {path}, row {number}: column '{column}' holds {got}; it must be {what}")


# ---------------------------------------------------------------- from a row to what the engine continues
def _messages(row: Row, config: DataConfig) -> list[dict[str, str]]:
    content = row[config.prompt_column]
    if isinstance(content, str):
        messages = [{"role": "user", "content": config.template.format_map({**row, "prompt": content})}]
    else:
        messages = [dict(message) for message in content]
    return messages if config.system is None else [{"role": "system", "content": config.system}, *messages]


def render(row: Row, config: DataConfig, tokenizer: Any) -> str:
    """The text that the engine continues: system message and filled template, in the tokenizer's chat format.

    Raises UserError when the tokenizer has no chat format, or its format refuses these messages.
    """
    messages = _messages(row, config)
    if not config.chat_template:
        return "\n".join(message["content"] for message in messages)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a chat template is a program that comes with the model
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"data.chat_template: the model's tokenizer cannot render the messages ({roles}); use an instruct model, "
            f"or set data.chat_template=false to continue the bare text (base models). It says: {first_line(error)}"
        ) from None


class PromptStream:
    """Position n -> Prompt. Prompts longer than `max_prompt_tokens` are left out (`too_long` counts them)."""

    def __init__(self, config: DataConfig, tokenizer: Any, seed: int, rows: Sequence[Row] | None = None) -> None:
        self.config, self.seed = config, seed
        rows = read_rows(config.path, config.split, config.limit) if rows is None else rows
        check_rows(rows, config)
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
