"""A process reward model: every step of a completion is scored at its end, and the steps make one number.

    steps: {fn: process_reward, path: models/prm, how: min, max_steps: 30, wrong_below: 0.5}

Two kinds, as they are published. `token`: a token classifier with two labels (TRL's PRMTrainer), read at the separator
after each step. `causal`: a language model whose texts carry a tag after each step (Math-Shepherd), read as the
probability of good_token against bad_token at the tag. A policy that writes the tag itself adds no scored place.

Such models are hacked by many trivially right steps and by repeating right ones: `max_steps` caps their number, and
nothing after the first step below `wrong_below` counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from core.budget import by_budget
from core.errors import UserError
from rewards.guard import visible, without_special
from rewards.pretrained import check_folder, chosen_device, pretrained
from rewards.process import How, collapse, counted
from rewards.reward import Folder, rewards
from rewards.templates import See, fill, names, question_of, seen, text_of

Kind = Literal["token", "causal"]
Tokens = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]

_BLANK = re.compile(r"\n[ \t\r]*\n")


@dataclass(frozen=True, slots=True)
class Steps:
    """A text as token ids, and the places at which its steps are scored."""

    ids: list[int]
    places: list[int]


@rewards
class process_reward:
    """Steps scored by a process reward model, collapsed by `how`: min, mean, last, prod or mean_logit; 0 to 1.

    step_separator splits the completion (none: blank lines, or lines where there is no blank one) and, for the kind
    token, follows each step in the model's text. kind causal needs step_tag. template: the model's text before the
    steps. Abstains where there are no steps, or where they and one token of the prompt do not fit into max_tokens.
    """

    pool = True

    def __init__(
        self,
        *,
        path: Folder,
        kind: Kind = "token",
        step_separator: str | None = None,
        step_tag: str | None = None,
        good_token: str = "+",
        bad_token: str = "-",
        template: str = "{question}\n",
        question_column: str = "question",
        see: See = "all",
        how: How = "min",
        max_steps: Tokens | None = None,
        wrong_below: Share | None = None,
        max_tokens: Tokens = 4096,
        batch_tokens: Tokens = 16384,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        if (kind == "causal") != (step_tag is not None):
            what = "needs it: the text that marks the end of a step" if kind == "causal" else "has none; leave it out"
            raise UserError(f"process_reward.step_tag: kind {kind} {what}")
        if step_separator is not None and not step_separator:
            raise UserError("process_reward.step_separator: it is empty; leave it out to split at blank lines")
        if odd := set(names(template)) - {"question"}:
            raise UserError(f"process_reward.template: it names '{min(odd)}'; only {{question}} is filled in")
        check_folder("process_reward.path", path)
        self.path, self.kind, self.dtype, self.device = path, kind, dtype, device
        self.separator, self.tag, self.answers = step_separator, step_tag, (good_token, bad_token)
        self.template, self.question_column, self.see = template, question_column, see
        self.how, self.max_steps, self.wrong_below = how, max_steps, wrong_below
        self.max_tokens, self.batch_tokens = max_tokens, batch_tokens
        self.model: Any = None
        self.tokenizer: Any = None

    def prepare(self) -> None:
        """Load the model. Raises UserError where its scores could not be meant."""
        self.model, self.tokenizer = load(str(Path(self.path).expanduser()), self.kind, self.dtype, self.device)
        if self.kind == "causal":
            good, bad = self._answer_ids()
            if good == bad:
                raise UserError(
                    f"process_reward.good_token: {self.answers[0]!r} and {self.answers[1]!r} are one token of it"
                )

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        if self.model is None:
            raise RuntimeError("process_reward: prepare() was not called, so no model is loaded")
        questions = columns.get(self.question_column) or [None] * len(prompts)
        texts = [
            self._encode(question_of(prompt, question), text_of(completion))
            for prompt, question, completion in zip(prompts, questions, completions, strict=True)
        ]
        return [self._collapsed(scores) for scores in self._score(texts)]

    def _encode(self, question: str, completion: str) -> Steps | None:
        """The model's text; none where there is no step or no room."""
        special = self.tokenizer.all_special_tokens
        steps = split_steps(seen(without_special(visible(completion), special), self.see) or "", self.separator)[
            : self.max_steps
        ]
        head = self._ids(fill(self.template, {"question": without_special(question, special)}))
        start = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        # Published data have line breaks between steps; where completions are split at blank lines they stay.
        joint = self.separator or "\n"
        ids: list[int] = []
        places: list[int] = []
        for step in steps:
            ids += self._ids(step + self.tag) if self.tag is not None else [*self._ids(step), *self._ids(joint)]
            places.append(len(ids) - 1)
            ids += self._ids(joint) if self.tag is not None else []
        room = self.max_tokens - len(ids) - len(start)
        if not steps or room < 1:
            return None
        kept = start + head[-room:]  # the question loses its start, never the steps their end
        return Steps(kept + ids, [len(kept) + place for place in places])

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _answer_ids(self) -> list[int]:
        return [self._ids(token)[-1] for token in self.answers]

    def _score(self, texts: Sequence[Steps | None]) -> list[list[float]]:
        """The scores of the steps of each text, in batches of at most `batch_tokens` padded tokens."""
        import torch

        known = [i for i, text in enumerate(texts) if text is not None]
        rows = [text for text in texts if text is not None]
        found: list[list[float]] = [[] for _ in texts]
        with torch.inference_mode():
            for batch in by_budget([len(row.ids) for row in rows], self.batch_tokens):
                for index, good in zip(batch, self._good([rows[i] for i in batch]), strict=True):
                    found[known[index]] = good
        return found

    def _good(self, rows: Sequence[Steps]) -> list[list[float]]:
        """Probability that a step is right, of every step of each text; padded on the right, which changes nothing."""
        import torch

        longest = max(len(row.ids) for row in rows)
        pad = self.tokenizer.pad_token_id or 0
        device = self.model.device
        ids = torch.tensor([[*row.ids, *[pad] * (longest - len(row.ids))] for row in rows], device=device)
        lengths = torch.tensor([len(row.ids) for row in rows], device=device)
        mask = (torch.arange(longest, device=device)[None] < lengths[:, None]).long()
        places = sorted({place for row in rows for place in row.places})
        if self.kind == "token":
            logits = self.model(input_ids=ids, attention_mask=mask).logits[:, places]
            good = logits.float().softmax(-1)[..., 1].tolist()
        else:  # a vocabulary of logits at every token would be the largest thing in memory
            keep = torch.tensor(places, device=device)
            logits = self.model(input_ids=ids, attention_mask=mask, logits_to_keep=keep).logits
            good = logits[..., self._answer_ids()].float().softmax(-1)[..., 0].tolist()
        return [[column[places.index(place)] for place in row.places] for row, column in zip(rows, good, strict=True)]

    def _collapsed(self, scores: Sequence[float]) -> float | None:
        if not scores:
            return None
        value = collapse(counted(scores, wrong_below=self.wrong_below), self.how)
        if not math.isfinite(value):
            raise ValueError(f"{self.path} gives {scores} to the steps of a completion")
        return value


def split_steps(text: str, separator: str | None = None) -> list[str]:
    r"""The steps of a text, without the empty ones: split at `separator`; none is blank lines, else lines.

    >>> split_steps("a\nb\n\n \n\nc"), split_steps("a\nb"), split_steps("a; b;", ";")
    (['a\nb', 'c'], ['a', 'b'], ['a', 'b'])
    """
    if separator is None:
        blank = _BLANK.split(text.strip())
        parts = blank if len(blank) > 1 else text.split("\n")
    else:
        parts = text.split(separator)
    return [step for part in parts if (step := part.strip())]


def load(path: str, kind: Kind, dtype: str, device: str) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer). UserError: no such device, not loadable, weights missing, not two labels."""
    where = chosen_device(device, "process_reward.device")
    auto = "AutoModelForTokenClassification" if kind == "token" else "AutoModelForCausalLM"
    model, tokenizer, missing = pretrained(auto, path, dtype, "process_reward.path")
    if kind == "token" and model.config.num_labels != 2:
        raise UserError(f"process_reward.path: {path} has {model.config.num_labels} labels; wrong and right are two")
    if missing:
        lacking = ", ".join(missing[:3])
        raise UserError(f"process_reward.path: the files of {path} lack {lacking}, so its scores would be random")
    return model.to(where).eval(), tokenizer
