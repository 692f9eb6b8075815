"""The numbers of an evaluation: accuracy with its interval, pass@k, lengths. Pure functions of graded groups."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.schema import Group


@dataclass(frozen=True)
class Evaluation:
    """One benchmark's result. Shares are in 0 .. 1; `low` and `high` bound accuracy at 95 %, clustered by problem."""

    benchmark: str
    problems: int
    samples: int
    accuracy: float  # avg@k: mean over problems of the share of right completions
    low: float
    high: float
    pass_at: Mapping[int, float]  # k -> unbiased estimate
    length_mean: float  # tokens of a completion
    truncated: float
    unscored: int  # completions without a verdict (timeout, error): left out, never counted as wrong
    left_out: int  # problems that were not asked because their prompt is too long
    seconds: float
    tokens_per_second: float

    def metrics(self) -> dict[str, float]:
        """The numbers as `eval/<benchmark>/<name>`."""
        names = ("accuracy", "low", "high", "length_mean", "truncated", "unscored", "left_out")
        names += ("tokens_per_second",)
        numbers = {name: float(getattr(self, name)) for name in names}
        numbers |= {f"pass_at_{k}": value for k, value in self.pass_at.items() if k > 1}
        return {f"eval/{self.benchmark}/{name}": value for name, value in numbers.items()}

    def plain(self) -> dict[str, Any]:
        """All of it as JSON has it: what does not exist is null."""
        numbers = {name: getattr(self, name) for name in self.__dataclass_fields__}
        numbers["pass_at"] = {k: _known(value) for k, value in self.pass_at.items()}
        return {name: _known(value) for name, value in numbers.items()}

    def line(self) -> str:
        """The result in one readable line."""
        passes = "".join(f"  pass@{k} {value:.3f}" for k, value in self.pass_at.items() if k > 1)
        unscored = f"  unscored {self.unscored}" if self.unscored else ""
        left_out = f", {self.left_out} left out as too long" if self.left_out else ""
        return (
            f"{self.benchmark}: accuracy {self.accuracy:.3f} [{self.low:.3f}, {self.high:.3f}]{passes}  "
            f"({self.problems} problems x {self.samples}{left_out})  length {self.length_mean:.1f}  "
            f"truncated {self.truncated:.3f}{unscored}  {self.tokens_per_second:.0f} tokens/s  {self.seconds:.1f} s"
        )


def problem_rows(group: Group) -> Iterable[dict[str, Any]]:
    """One row per completion of a graded group."""
    for sample, (completion, score) in enumerate(zip(group.completions, group.components["math_answer"], strict=True)):
        yield {
            "problem": group.prompt.columns.get("id", group.prompt.ordinal),
            "sample": sample,
            "correct": None if score.status != "ok" else bool(score.value > 0.5),
            "status": score.status,
            "answer": group.prompt.columns.get("answer"),
            "completion": completion.text,
            "tokens": len(completion.token_ids),
            "truncated": completion.truncated,
            "prompt": group.prompt.text,
        }


def summarise(name: str, groups: Sequence[Group], samples: int, seconds: float, left_out: int = 0) -> Evaluation:
    """The numbers of one benchmark from its graded groups (each problem one group)."""
    verdicts = [[s.value > 0.5 for s in g.components["math_answer"] if s.status == "ok"] for g in groups]
    scored = [v for v in verdicts if v]
    shares = [sum(v) / len(v) for v in scored]
    low, high = interval(shares)
    completions = [c for g in groups for c in g.completions]
    lengths = [len(c.token_ids) for c in completions]
    sizes = {k for k in (1, 2, 4, 8, 16, 32, 64, samples) if k <= samples}
    return Evaluation(
        benchmark=name,
        problems=len(groups),
        samples=samples,
        accuracy=_mean(shares),
        low=low,
        high=high,
        pass_at={k: _mean([pass_at_k(len(v), sum(v), k) for v in scored if len(v) >= k]) for k in sorted(sizes)},
        length_mean=_mean(lengths),
        truncated=_mean([c.truncated for c in completions]),
        unscored=len(completions) - sum(map(len, verdicts)),
        left_out=left_out,
        seconds=seconds,
        tokens_per_second=sum(lengths) / max(seconds, 1e-9),
    )


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that at least one of k completions drawn from these n is right: 1 - C(n - correct, k) / C(n, k).

    Chen et al., "Evaluating Large Language Models Trained on Code", arXiv 2107.03374. Needs n >= k.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def interval(shares: Sequence[float], z: float = 1.96) -> tuple[float, float]:
    """95 % interval of the mean of per-problem shares: Wilson's where all are 0 or 1, else mean +- z standard errors.

    The standard error is that between problems, so repeated samples of one problem do not narrow it falsely. NaN
    without data.

    >>> [round(x, 3) for x in interval([1.0] * 5 + [0.0] * 5)]
    [0.237, 0.763]
    """
    n = len(shares)
    if n == 0:
        return math.nan, math.nan
    mean = _mean(shares)
    if n == 1 or all(share in (0, 1) for share in shares):
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    else:
        centre = mean
        half = z * math.sqrt(sum((share - mean) ** 2 for share in shares) / (n - 1) / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
