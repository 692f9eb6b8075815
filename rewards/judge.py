"""A generative judge as a reward: a language model reads question and completion and ends with `Score: x`.

    helpful: {fn: judge, path: models/judge, low: 1, high: 5}
    better:  {fn: judge, path: models/judge, reference_column: answer_of_the_old_model}

The judge never sees the right answer unless a template of the user names its column. Completions are cleared of what
speaks to the judge (`rewards.guard`). What is not answered with a score is asked again, then there is none: never 0.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field

from core.errors import UserError, nearest
from rewards import judge_text
from rewards.guard import guarded, without_special
from rewards.pretrained import check_folder
from rewards.reward import Folder, rewards
from rewards.templates import See, fill, markers, names, question_of, seen, text_of
from rewards.vllm_judge import Ask, Engine, VLLMJudge

CACHE = 20_000  # verdicts that are kept
WATCHED = 200  # latest prompts over which the share of unread replies is taken
AGAIN = 0.5  # temperature of a second try, where the first was greedy and would only repeat itself

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


@rewards
class judge:
    """What a language model says: its `Score: x` from low to high, as 0 to 1; or its choice against a reference.

    template names {completion}, and may name {question}, {low}, {high} and columns; with `reference_column` it names
    {a} and {b}, asked in both orders (1 better, 0.5 tie, 0 worse). {question} is `question_column`, or the run's prompt
    where the data has none. samples > 1: their mean; spread: also largest less smallest, as a mapping score, spread.
    see: what of a completion is judged. Above the share max_unread of unread replies it fails.
    """

    pool = True

    def __init__(
        self,
        *,
        path: Folder,
        revision: str | None = None,
        template: str | None = None,
        question_column: str = "question",
        reference_column: str | None = None,
        low: float = 0.0,
        high: float = 10.0,
        samples: Count = 1,
        temperature: Annotated[float, Field(ge=0)] = 0.0,
        max_tokens: Count = 512,
        retries: Annotated[int, Field(ge=0)] = 2,
        see: See = "answer",
        chat: bool = True,
        spread: bool = False,
        max_unread: Share = 0.05,
        max_model_len: Count = 4096,
        kv_cache_gib: Annotated[float, Field(gt=0)] = 1.0,
        gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.3,
    ) -> None:
        self.mode: judge_text.Mode = "score" if reference_column is None else "pair"
        default, self.reminder = {
            "score": (judge_text.SCORE_TEMPLATE, judge_text.SCORE_REMINDER),
            "pair": (judge_text.PAIR_TEMPLATE, judge_text.PAIR_REMINDER),
        }[self.mode]
        self.path, self.revision = path, revision
        self.template = default if template is None else template
        self.question_column, self.reference_column = question_column, reference_column
        self.low, self.high = low, high
        self.samples, self.temperature = samples, temperature
        self.max_tokens, self.retries = max_tokens, retries
        self.see, self.chat = see, chat
        self.spread, self.max_unread = spread, max_unread
        self.room: dict[str, Any] = {
            "max_model_len": max_model_len,
            "kv_cache_gib": kv_cache_gib,
            "gpu_memory_utilization": gpu_memory_utilization,
        }
        self._check(max_model_len)
        columns = [name for name in names(self.template) if name not in judge_text.OWN[self.mode]]
        self.reads = (*columns, *filter(None, [reference_column]))
        """Columns that the data must have."""
        self.engine: Engine | None = None
        self.special_tokens: tuple[str, ...] = markers(self.template)
        self._identity = json.dumps(self.manifest(), sort_keys=True)
        self._cache: OrderedDict[str, list[float]] = OrderedDict()
        self._unread: deque[bool] = deque(maxlen=WATCHED)

    def _check(self, max_model_len: int) -> None:
        """Raise UserError for options that do not go together."""
        if not self.low < self.high:
            raise UserError(f"judge.low: {self.low:g} is not below high, {self.high:g}")
        if self.samples > 1 and self.temperature == 0:
            raise UserError(
                f"judge.samples: {self.samples} greedy replies are all the same; give a temperature above 0"
            )
        if self.spread and self.samples < 2:
            raise UserError("judge.spread: one reply has none; set samples to 2 or more, and a temperature above 0")
        if self.max_tokens >= max_model_len:
            raise UserError(
                f"judge.max_tokens: {self.max_tokens} leaves no room for a prompt in {max_model_len} tokens"
            )
        written = names(self.template)
        for name in judge_text.NEEDED[self.mode]:
            if name not in written:
                near = nearest(name, written) if written else "it names nothing"
                raise UserError(f"judge.template: it does not show {{{name}}}, so there is nothing to judge; {near}")
        check_folder("judge.path", self.path)

    def prepare(self) -> None:
        """Start the engine. Raises UserError where the judge has no chat template but is to use one."""
        from transformers import AutoTokenizer

        path = str(Path(self.path).expanduser())
        tokenizer = AutoTokenizer.from_pretrained(path, revision=self.revision, trust_remote_code=False)
        if self.chat and not tokenizer.chat_template:
            raise UserError(
                f"judge.chat: {self.path} has no chat template; set chat to false, or take a model that has"
            )
        engine = VLLMJudge(path, revision=self.revision, chat=self.chat, max_tokens=self.max_tokens, **self.room)
        self.engine, self.special_tokens = engine, (*self.special_tokens, *engine.special_tokens())

    def manifest(self) -> dict[str, Any]:
        """What decides a verdict, for the records of a run."""
        return {
            "model": self.path,
            "revision": self.revision,
            "template": hashlib.blake2b(self.template.encode(), digest_size=8).hexdigest(),
            "chat": self.chat,
            "see": self.see,
            "mode": self.mode,
            "range": [self.low, self.high],
            "sampling": {
                "samples": self.samples,
                "temperature": self.temperature,
                "max_tokens": self.max_tokens,
                "retries": self.retries,
            },
        }

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float | None] | dict[str, list[float | None]]:
        wanted = [name for name in dict.fromkeys((*self.reads, self.question_column)) if name in columns]
        rows = [{name: columns[name][i] for name in wanted} for i in range(len(completions))]
        asked = [self._prompts(*row) for row in zip(prompts, completions, rows, strict=True)]
        verdicts = self._verdicts([prompt for prompts_of_row in asked for prompt in prompts_of_row])
        self._watch([verdicts[prompt] for prompts_of_row in asked for prompt in prompts_of_row])
        found = [self._joined([verdicts[prompt] for prompt in prompts_of_row]) for prompts_of_row in asked]
        scores = [fmean(values) if values else None for values in found]
        if not self.spread:
            return scores
        return {"score": scores, "spread": [max(v) - min(v) if len(v) > 1 else None for v in found]}

    def _prompts(self, prompt: Any, completion: Any, row: Mapping[str, Any]) -> list[str]:
        """What is asked about one completion: one prompt, or one per order, or none where there is nothing to judge."""
        for name in self.reads:
            if name not in row:
                raise LookupError(f"the data has no column '{name}'; {nearest(name, row)}")
        shown = seen(text_of(completion), self.see)
        if shown is None or any(row[name] is None for name in self.reads):
            return []
        shown = guarded(shown, self.special_tokens)
        question = without_special(question_of(prompt, row.get(self.question_column)), self.special_tokens)
        values = {**row, "question": question}
        if self.reference_column is None:
            scale = {"low": f"{self.low:g}", "high": f"{self.high:g}"}
            return [fill(self.template, {**values, **scale, "completion": shown})]
        # Treated alike, or what was removed would tell which is which.
        other = guarded(seen(text_of(row[self.reference_column]), self.see) or "", self.special_tokens)
        return [fill(self.template, {**values, "a": a, "b": b}) for a, b in ((shown, other), (other, shown))]

    def _joined(self, verdicts: Sequence[Sequence[float | None]]) -> list[float]:
        """The values of one completion, one per sample that was read, from the samples of its prompts."""
        if self.mode == "pair" and verdicts:
            joined: Sequence[float | None] = [
                judge_text.in_both_orders(first, second) for first, second in zip(*verdicts, strict=True)
            ]
        else:
            joined = verdicts[0] if verdicts else ()
        return [value for value in joined if value is not None]

    def _verdicts(self, prompts: Sequence[str]) -> dict[str, list[float | None]]:
        """For each different prompt its samples, from the cache where they are there."""
        found: dict[str, list[float | None]] = {}
        for prompt in dict.fromkeys(prompts):
            key = self._key(prompt)
            if key in self._cache:
                self._cache.move_to_end(key)
                found[prompt] = list(self._cache[key])
        found |= self._ask([prompt for prompt in dict.fromkeys(prompts) if prompt not in found])
        for prompt, values in found.items():
            known = [value for value in values if value is not None]
            if len(known) == self.samples:  # what could not be read may be readable another time
                self._cache[self._key(prompt)] = known
        while len(self._cache) > CACHE:
            self._cache.popitem(last=False)
        return found

    def _ask(self, prompts: Sequence[str]) -> dict[str, list[float | None]]:
        """Ask each prompt `samples` times, and those whose reply says nothing again, up to `retries` times."""
        if self.engine is None:
            raise RuntimeError("the judge has no engine yet: call prepare() first")
        found: dict[str, list[float | None]] = {prompt: [None] * self.samples for prompt in prompts}
        for attempt in range(1 + self.retries):
            missing = [
                (prompt, i) for prompt, values in found.items() for i in range(self.samples) if values[i] is None
            ]
            if not missing:
                break
            replies = self.engine([self._question(prompt, i, attempt) for prompt, i in missing])
            for (prompt, i), reply in zip(missing, replies, strict=True):
                found[prompt][i] = self._read(reply)
        return found

    def _question(self, prompt: str, sample: int, attempt: int) -> Ask:
        # The seed depends on nothing else, so a verdict does not depend on what was asked beside it.
        seed = int(self._key(f"{prompt}\n{sample}/{attempt}")[:8], 16) % 2**31
        temperature = self.temperature if not attempt else max(self.temperature, AGAIN)
        return Ask(prompt + self.reminder if attempt else prompt, temperature, seed)

    def _read(self, reply: str | None) -> float | None:
        if reply is None:
            return None
        return (
            judge_text.read_verdict(reply) if self.mode == "pair" else judge_text.read_score(reply, self.low, self.high)
        )

    def _key(self, text: str) -> str:
        return hashlib.blake2b(f"{self._identity}\n{text}".encode(errors="replace"), digest_size=16).hexdigest()

    def _watch(self, verdicts: Sequence[Sequence[float | None]]) -> None:
        """Raise RuntimeError when too many of the latest prompts had no readable reply at all."""
        self._unread.extend(all(value is None for value in values) for values in verdicts)
        count, share = sum(self._unread), sum(self._unread) / max(1, len(self._unread))
        if len(self._unread) == WATCHED and share > self.max_unread:
            raise RuntimeError(
                f"the judge's replies say nothing for {count} of the last {WATCHED} prompts (max_unread is "
                f"{self.max_unread:g}): no `Score: x` or `Verdict: x` line, cut off at max_tokens {self.max_tokens}, "
                f"or prompts beyond max_model_len {self.room['max_model_len']}; read them, or take another judge"
            )
