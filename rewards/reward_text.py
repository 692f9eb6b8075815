"""What a reward model reads: question and answer as token ids, made the same way when it is trained and when it scores.

    reading = read_reading(path, tokenizer, config)                      # how this model reads
    reading.encode([{"role": "user", "content": "2+3?"}], "5")           # {"input_ids": [...]}

The trainer writes the way, with the tokens of a probe, into the model's folder; whoever scores reads it there and
refuses a tokenizer that makes other tokens of the probe. Token ids are lists: no torch here.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from core.errors import UserError, first_line

FILE = "reward_model.json"
Form = Literal["chat", "pair", "joined"]
FORMS: tuple[Form, ...] = ("chat", "pair", "joined")
Message = Mapping[str, str]
Encoded = Mapping[str, Sequence[int]]
"""input_ids, and token_type_ids where the tokenizer makes them; no padding."""

PROBE: tuple[list[Message], str] = ([{"role": "user", "content": "Name three primary colours."}], "Red, yellow, blue.")
LONGEST = 2048  # tokens, where neither the user nor the model's folder says otherwise
NO_LIMIT = 10**9


@dataclass(frozen=True)
class Reading:
    """How a reward model reads. `max_tokens` is the longest text, special tokens included.

    chat: the tokenizer's chat template, user and assistant. pair: two texts, as encoders take them ([CLS] question
    [SEP] answer [SEP]). joined: one text, question, empty line, answer, end of sequence, for decoders without template.
    """

    tokenizer: Any
    form: Form
    max_tokens: int

    def encode(self, messages: Sequence[Message], answer: str) -> Encoded:
        """The tokens of the prompt and its answer. Too long, the prompt loses its start; then the answer does.

        The end of the answer is never cut. Raises UserError where max_tokens is too small for an empty text.
        """
        parts = [str(message["content"]) for message in messages] + [answer]
        encoded = self._render(messages, parts)
        while (over := len(encoded["input_ids"]) - self.max_tokens) > 0:
            first = next((i for i, part in enumerate(parts) if part), None)
            if first is None:
                raise UserError(f"max_tokens {self.max_tokens} has no room for a text; the form alone takes more")
            parts[first] = without_start(self.tokenizer, parts[first], over)
            encoded = self._render(messages, parts)
        return encoded

    def _render(self, messages: Sequence[Message], parts: Sequence[str]) -> Encoded:
        """Tokens of the conversation with the contents `parts`, the answer's last."""
        if self.form == "chat":
            roles = [message["role"] for message in messages] + ["assistant"]
            chat = [{"role": role, "content": part} for role, part in zip(roles, parts, strict=True)]
            ids = self.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
            return {"input_ids": self._closed(ids)}
        question, answer = "\n\n".join(parts[:-1]), parts[-1]
        if self.form == "pair":
            made = self.tokenizer(question, answer, verbose=False)
            return {name: made[name] for name in ("input_ids", "token_type_ids") if name in made}
        return {"input_ids": self._closed(self.tokenizer(f"{question}\n\n{answer}", verbose=False)["input_ids"])}

    def _closed(self, ids: list[int]) -> list[int]:
        """`ids`, and the end of sequence where no special token ends them; templates like a line break after theirs."""
        return ids if self._special & set(ids[-2:]) else [*ids, self.tokenizer.eos_token_id]

    @functools.cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special)

    def probe(self) -> list[int]:
        """The tokens of a text that is the same for all models, however short their texts must be."""
        return list(dataclasses.replace(self, max_tokens=NO_LIMIT).encode(*PROBE)["input_ids"])

    def save(self, folder: Path) -> None:
        """Write the way of reading into the model's folder."""
        text = {"form": self.form, "max_tokens": self.max_tokens, "probe": self.probe()}
        (folder / FILE).write_text(json.dumps(text) + "\n", encoding="utf-8")


def without_start(tokenizer: Any, text: str, count: int) -> str:
    """`text` without its first `count` tokens, at least one character shorter."""
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    # The tokens of one character of several bytes all begin where it begins.
    return text[next((start for start, _ in spans[count:] if start > 0), len(text)) :]


def as_messages(prompt: Any) -> list[Message]:
    """A prompt as chat messages: messages as they are, a text as the user's. Raises TypeError."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, Sequence) and prompt and all(isinstance(m, Mapping) and "content" in m for m in prompt):
        return list(prompt)
    raise TypeError(f"a question is a text or chat messages, not {prompt!r:.80}")


def read_reading(
    path: str, tokenizer: Any, config: Any, decoder: bool, max_tokens: int | None = None, where: str = "path"
) -> Reading:
    """How the model at `path` (folder or hub name) reads: as its folder says, else as its tokenizer suggests.

    config: the model's; decoder: whether it reads the score off the last token; max_tokens: the user's wish. Raises
    UserError, which names `where`, for a tokenizer that cannot do it, and for a length beyond the model's.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{where}: the tokenizer of {path} has no tokenizer.json, which cutting a prompt needs")
    stored = _stored(path, where)
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or NO_LIMIT)
    longest = max_tokens or stored.get("max_tokens") or min(limit, LONGEST)
    if longest > limit:
        raise UserError(f"max_tokens {longest}: {path} reads at most {limit} tokens; lower it")
    form = stored.get("form") or _usual_form(tokenizer, decoder)
    if decoder and tokenizer.eos_token_id is None:
        raise UserError(f"{where}: the tokenizer of {path} has no end-of-sequence token (eos_token) to end a text with")
    reading = Reading(tokenizer, form, longest)
    if stored and reading.probe() != stored["probe"]:
        raise UserError(
            f"{where}: the tokenizer of {path} makes other tokens of a text than in training ({FILE}: probe); another "
            "tokenizer or chat template lies beside the weights, or another version of transformers reads it"
        )
    return reading


def _usual_form(tokenizer: Any, decoder: bool) -> Form:
    if not decoder:
        return "pair"
    return "chat" if tokenizer.chat_template else "joined"


def _stored(path: str, where: str) -> dict[str, Any]:
    """What the trainer wrote beside the weights; empty where another trainer made them."""
    from transformers.utils import cached_file

    file = cached_file(path, FILE, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return {}
    try:
        stored = json.loads(Path(file).read_text(encoding="utf-8"))
        if stored["form"] not in FORMS or not isinstance(stored["max_tokens"], int):
            raise ValueError(f"form is one of {', '.join(FORMS)}, max_tokens a number")
        return {name: stored[name] for name in ("form", "max_tokens", "probe")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: {file} is not what `alignlab fit-reward` writes: {first_line(error)}") from None
