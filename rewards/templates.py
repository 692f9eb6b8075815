"""Texts for models that score: a template filled with question, completion and columns of the data.

    fill("Q: {question}\nA: {completion}", {"question": "2+3?", "completion": "{answer}"})   ->   "Q: 2+3?\nA: {answer}"

What is filled in is never looked at again, so a completion cannot name a column (the right answer, say) and get it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from core.errors import nearest
from rewards.math_answer import after_thinking

See = Literal["answer", "thinking", "all"]
"""What is shown of a completion: what follows its thinking, the thinking, or both."""

_NAMED = re.compile(r"\{\{([A-Za-z_]\w*)\}\}|\{([A-Za-z_]\w*)\}")
_TAGS = re.compile(r"</?think>")
_MARKER = re.compile(r"</?[A-Za-z][\w ]*>|\[/?[A-Za-z][\w ]*\]")


def names(template: str) -> tuple[str, ...]:
    """The words in braces, each once: what a template wants filled in. {{word}} stands for {word} itself."""
    return tuple(dict.fromkeys(match[2] for match in _NAMED.finditer(template) if match[2]))


def fill(template: str, values: Mapping[str, Any]) -> str:
    """The template with every {word} replaced; other braces stay. Raises LookupError for a word without a value."""
    for name in names(template):
        if name not in values:
            raise LookupError(f"the template names '{name}', which is not there; {nearest(name, values)}")
    return _NAMED.sub(lambda match: str(values[match[2]]) if match[2] else f"{{{match[1]}}}", template)


def markers(template: str) -> tuple[str, ...]:
    """The tags that a template sets around its parts: whoever fills it in must not be able to close them."""
    return tuple(dict.fromkeys(_MARKER.findall(template)))


def text_of(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a completion as the batch signature has it: a string, or chat messages, the last one's."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def question_of(prompt: str | Sequence[Mapping[str, Any]], question: Any = None) -> str:
    """What was asked: the data's question where it has one, else the prompt. Chat messages: their texts, by role."""
    asked = prompt if question is None else question
    if isinstance(asked, str):
        return asked
    if len(asked) == 1:
        return str(asked[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in asked)


def seen(text: str, see: See) -> str | None:
    """The part of a completion that is to be scored; none where it has no thinking and that is what is asked for.

    Thinking may have been opened by the prompt. Where it never ends there is no answer: "".

    >>> seen("<think>2+3</think> 5", "answer"), seen("2+3</think> 5", "thinking"), seen("<think>2+", "answer")
    ('5', '2+3', '')
    """
    if see == "all":
        return text.strip()
    thinking, end, _ = text.rpartition("</think>")
    answer, opened, unfinished = after_thinking(text).partition("<think>")
    if see == "answer":
        return answer.strip()
    thought = thinking if end else unfinished
    return _TAGS.sub(" ", thought).strip() if end or opened else None
