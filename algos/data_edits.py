"""Edits of training rows: thought dropout (TON), masked thought and the void-turn filter (SimpleTIR).

No draw is made here: uniform draws come in as arguments, so a run can be repeated from its seed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def thought_dropout(text: str, draw: float, *, p: float = 0.5) -> str:
    """Empty the first <think> block of a training target if the uniform `draw` is below `p`.

    TON, "Think or Not? Selective Reasoning via Reinforcement Learning for Vision-Language Models", arXiv 2505.16854;
    read from the authors' code. Supervised training then teaches that a thought may be empty, and plain GRPO decides
    when to think.
    """
    if draw >= p:
        return text
    return re.sub(r"<think>.*?</think>", "<think>\n\n</think>", text, count=1, flags=re.DOTALL)


def masking_rate(step: int, *, p_max: float = 0.4, warmup_steps: int) -> float:
    """Share of response tokens to mask at `step`: p_max * step / (warmup_steps + 1), at most p_max.

    Masked Thought warms up over two thirds of the steps; p_max 0.4 for GSM8K, 0.2 for the larger sets.
    """
    return min(p_max * step / (warmup_steps + 1), p_max)


def masked_thought(
    input_ids: Tensor, labels: Tensor, draw: Tensor, rate: Tensor | float, *, mask_id: int | Tensor, ignore: int = -100
) -> tuple[Tensor, Tensor]:
    """Replace response tokens of the *input* by a mask token where the uniform `draw` is below `rate`; labels stay.

    "Masked Thought: Simply Masking Partial Reasoning Steps Can Improve Mathematical Reasoning Learning of Language
    Models", arXiv 2403.02178; read from the authors' code. All [B, T] (`rate` may be [B, 1]); prompt tokens have the
    label `ignore`. `mask_id` is a token of its own, never generated, or [B, T] random ids. Returns (input_ids, masked
    bool); the release can also remove the masked positions from attention.
    """
    masked = (labels != ignore) & (draw < rate)
    return torch.where(
        masked, torch.as_tensor(mask_id, dtype=input_ids.dtype, device=input_ids.device), input_ids
    ), masked


class Turn(NamedTuple):
    """One turn of a multi-turn completion: the model's text and tokens, then the tokens a tool returned."""

    text: str
    model_tokens: int
    tool_tokens: int = 0


def has_code(text: str) -> bool:
    """A fenced block: three backticks, optionally py or python, a newline, and closing backticks on a new line."""
    return re.search(r"```(?:python|py)?\n.*?\n```", text, flags=re.DOTALL) is not None


def has_answer(text: str) -> bool:
    r"""The text contains `\boxed{`."""
    return "\\boxed{" in text


def void_turn_mask(
    turns: Sequence[Turn],
    truncated: bool,
    *,
    overlong_filter: bool = False,
    acts: Callable[[str], bool] = has_code,
    answers: Callable[[str], bool] = has_answer,
) -> tuple[bool, Tensor]:
    """(keep, loss mask over all tokens) of a completion; a void turn, neither action nor answer, masks all of it.

    "SimpleTIR: End-to-End Reinforcement Learning for Multi-Turn Tool-Integrated Reasoning", arXiv 2509.02479; read from
    the authors' code. Tool tokens are always masked. The completion stays in its group for the advantages: only its own
    gradient goes. `overlong_filter` also masks truncated completions. `acts` and `answers` (ours) fit other tool
    formats.
    """
    keep = all(acts(turn.text) or answers(turn.text) for turn in turns) and not (overlong_filter and truncated)
    pieces = [torch.cat([torch.full((t.model_tokens,), keep), torch.zeros(t.tool_tokens).bool()]) for t in turns]
    return keep, torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.bool)
