"""Every number of a run: one writer (metrics.jsonl and TensorBoard), one table of what each name means."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignlab.warnings import warnings
from core.config import RewardsConfig
from core.schema import Group


class Meaning(NamedTuple):
    """What a metric says, where it lies in a healthy run, what to do when it leaves that range."""

    meaning: str
    healthy: str
    advice: str


METRICS: dict[str, Meaning] = {
    "completion/length_mean": Meaning(
        "tokens per completion", "changes slowly", "growth without reward: add a length component"
    ),
    "completion/length_max": Meaning(
        "longest completion of the step", "below rollout.max_tokens", "raise rollout.max_tokens"
    ),
    "completion/truncated": Meaning("share cut off at rollout.max_tokens", "below 0.1", "raise rollout.max_tokens"),
    "rollout/staleness": Meaning(
        "updates between a completion's oldest token and the step, mean",
        "at most rollout.window",
        "lower rollout.max_staleness, or use a method with a correction",
    ),
    "rollout/staleness_max": Meaning("the same, of the oldest token", "at most rollout.window", "as above"),
    "rollout/masked": Meaning(
        "tokens older than rollout.max_token_age, left out of the loss",
        "below 0.1 of the step's tokens",
        "raise rollout.max_token_age, or lower rollout.max_staleness",
    ),
    "rollout/tokens_per_second": Meaning(
        "tokens that all actors sampled, per second of the step", "steady", "below what actors reach alone: see busy"
    ),
    "rollout/busy": Meaning(
        "share of the step in which the actors' engines were at work, mean over the actors",
        "near 1 when max_staleness > 0",
        "low: the learner is the bottleneck; add ranks, or raise rollout.max_staleness",
    ),
    "sources/<source>": Meaning(
        "probability with which a prompt of the source is drawn", "settles", "one vanishes: a floor of the mixer"
    ),
    "rollout/retried": Meaning("groups given to another actor so far, because theirs was lost", "0", "read logs/"),
    "rollout/refused": Meaning("late results of lost actors, thrown away, so far", "0", "raise actors.silence_timeout"),
    "rollout/dropped": Meaning(
        "groups replaced by the next prompt so far (filter or failure)", "steady", "see metrics.jsonl"
    ),
    "eval/<benchmark>/accuracy": Meaning(
        "avg@k: mean over problems of the share of right completions; `low` and `high` bound it at 95 %",
        "rises",
        "flat while reward/total rises: the reward is not what the benchmark asks; read evals/",
    ),
    "eval/<benchmark>/pass_at_<k>": Meaning(
        "unbiased chance that one of k completions is right",
        "steady or rising",
        "falling while accuracy rises: entropy collapses",
    ),
    "eval/<benchmark>/length_mean": Meaning("tokens per completion", "as in training", "see completion/length_mean"),
    "eval/<benchmark>/truncated": Meaning("share cut off by the length limit", "below 0.05", "raise eval.max_tokens"),
    "eval/<benchmark>/reward/<objective>": Meaning(
        "mean of the objective, as shaped, over the evaluation; where the weighting policy looks at evaluations",
        "as reward/<objective>",
        "it stays behind: the reward is overfitted to the training prompts",
    ),
    "eval/<benchmark>/unscored": Meaning("completions without a verdict, left out", "0", "read the details in evals/"),
    "eval/<benchmark>/tokens_per_second": Meaning("sampling speed of the evaluation", "steady", "actors.max_num_seqs"),
    "time/step": Meaning(
        "seconds from the end of the step before to the moment when the actors serve this one's weights; its parts are "
        "wait_groups, weigh, keep, train, wait_publish and publish, and the driver itself",
        "steady",
        "the largest part is the bottleneck; the report says which pool it is",
    ),
    "time/wait_groups": Meaning(
        "seconds the learner waited for scored groups",
        "small when max_staleness > 0",
        "add actors or raise rollout.max_staleness",
    ),
    "time/weigh": Meaning(
        "seconds for columns and weights: rewards with state, the gradients' agreement",
        "far below time/train",
        "rewards with state are scored one group after the other: make them fast",
    ),
    "time/keep": Meaning(
        "seconds until what the learner is given was written", "far below time/train", "a faster disk for output_dir"
    ),
    "time/train": Meaning("seconds in the learner's step", "steady", "add learner ranks"),
    "time/wait_publish": Meaning(
        "seconds until the new weights might be served: a deterministic run first samples what the old ones owe",
        "0 unless rollout.deterministic",
        "rollout.deterministic costs overlap",
    ),
    "time/publish": Meaning("seconds until every actor served the new version", "far below time/step", "use nccl"),
    "weights/bytes": Meaning(
        "of a version's weights on their way to the actors", "steady", "actors.dtype bfloat16, or model.lora"
    ),
    "weights/put_seconds": Meaning(
        "seconds in which the learner put them where the actors fetch them", "far below time/step", "as weights/bytes"
    ),
    "weights/prepare_seconds": Meaning(
        "seconds in which the slowest actor checked and packed them, sampling meanwhile",
        "far below time/step",
        "as weights/bytes",
    ),
    "weights/stall_seconds": Meaning(
        "seconds in which the slowest actor did not sample for them: on CPU pointers change, on GPUs they are loaded",
        "below 0.1 on CPU",
        "use nccl on GPUs",
    ),
    "time/write": Meaning(
        "seconds of writing metrics and rollouts of the step before, while actors sample",
        "far below time/step",
        "a faster disk for output_dir",
    ),
    "time/checkpoint": Meaning("seconds of the checkpoint before this step", "far below time/step", "checkpoint.every"),
    "time/eval": Meaning("seconds of the evaluation", "", "eval.limit, eval.every"),
}


class MetricsWriter:
    """The one writer. `step` counts updates; a resumed run purges what a lost attempt wrote beyond its checkpoint."""

    def __init__(self, folder: Path, *, first_step: int = 0, overview: Mapping[str, list[str]] | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._said: dict[tuple[str, str], int] = {}  # step at which something was last said of it
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        purge = first_step + 1 if first_step else None
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge, flush_secs=10)
        charts = OVERVIEW if overview is None else overview
        self._board.add_custom_scalars({"Overview": {title: ["Multiline", tags] for title, tags in charts.items()}})

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and one point of each curve, or nothing where there is nothing to write.

        NaN (nothing to average) is null and no point.
        """
        if not metrics:
            return
        row = {name: (value if math.isfinite(value) else None) for name, value in sorted(metrics.items())}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **row}) + "\n")
        self._file.flush()
        for name, value in row.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Distributions of a step, and the best and the worst completion of its group with the widest spread."""
        import numpy as np

        for name in ("total", "advantage", "tokens"):
            values = [row[name] for row in rows if row[name] is not None]
            if values:
                self._board.add_histogram(f"completion/{name}", np.asarray(values), step)
        if pair := _best_and_worst(rows):
            self._board.add_text("completion/best and worst of a group", "\n\n---\n\n".join(map(_markdown, pair)), step)

    def warn(self, step: int, metrics: Mapping[str, float], run: Path) -> list[str]:
        """What a person must be told of a step beside its line, each kept as a line of warnings.jsonl.

        What was said of the same thing a few steps ago is not said again.
        """
        new = []
        for found in warnings(metrics, run):
            if step - self._said.get((found.name, found.about), -math.inf) > found.pause:
                self._said[found.name, found.about] = step
                new.append(found)
        if new:
            with (self._folder / "warnings.jsonl").open("a", encoding="utf-8") as file:
                kept = [{"name": w.name, "text": w.text, "advice": w.advice} for w in new]
                file.writelines(json.dumps({"step": step, **row}) + "\n" for row in kept)
        return [f"warning {w.name}: {w.text}; {w.advice}" for w in new]

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._board.close()


def group_metrics(groups: Sequence[Group], version: int, max_token_age: int | None = None) -> dict[str, float]:
    """What a step's groups say by themselves. `version`: that of the weights before the step.

    Tokens older than `max_token_age` are not trained on.
    """
    completions = [completion for group in groups for completion in group.completions]
    lengths = [len(completion.token_ids) for completion in completions]
    staleness = [completion.staleness(version) for completion in completions]
    oldest = -math.inf if max_token_age is None else version - max_token_age
    masked = sum(token < oldest for completion in completions for token in completion.versions)
    return {
        "completion/length_mean": sum(lengths) / len(lengths),
        "completion/length_max": max(lengths),
        "completion/truncated": sum(completion.truncated for completion in completions) / len(completions),
        "rollout/staleness": sum(staleness) / len(staleness),
        "rollout/staleness_max": max(staleness),
        "rollout/masked": masked,
    }


# TensorBoard's first page (Custom Scalars): the curves that one looks at every day, as regular expressions of names.
OVERVIEW = {
    "reward": ["reward/(?!equal_groups|unscorable)(?!.*_(std|shaped|failed|abstained|seconds)$).*"],
    "evaluation": ["eval/.*/accuracy"],
    "length": ["completion/length_mean"],
    "truncated": ["completion/truncated"],
    "policy": ["policy/entropy", "policy/kl_.*", "policy/mismatch_kl"],
    "clipping": ["policy/clip_.*"],
    "groups without signal": ["reward/equal_groups", "reward/unscorable"],
    "gradient": ["optim/grad_norm"],
    "seconds of a step": ["time/(?!learner|eval).*"],
    "seconds of the learner": ["time/learner.*"],
    "actors at work, and what the learner reaches of its device": ["rollout/busy", "learner/mfu"],
}


def overview(rewards: RewardsConfig) -> dict[str, list[str]]:
    """`OVERVIEW` with what the run's rewards move: weights, bounds with their multipliers, gold against the reward."""
    found = {}
    if rewards.weighting.get("policy") != "static":
        found["weights of the objectives"] = ["weighting/weight/.*"]
    if "thresholds" in rewards.weighting:
        found["constraints and their bounds"] = ["weighting/(measured|threshold)/.*"]
        found["multipliers"] = ["weighting/multiplier/.*"]
    if rewards.gold is not None:
        found["gold against the reward"] = ["overoptimization/(gold|proxy)"]
    return OVERVIEW | found


# At most eight numbers, in fixed places; everything else is in the files.
LINE = {
    "reward/total": "reward {:.3f}",
    "completion/length_mean": "length {:.1f}",
    "completion/truncated": "truncated {:.2f}",
    "policy/entropy": "entropy {:.3f}",
    "policy/loss": "loss {:.3f}",
    "optim/grad_norm": "grad {:.2f}",
    "rollout/staleness": "staleness {:.1f}",
    "rollout/tokens_per_second": "{:.0f} tok/s",
}


def step_line(step: int, steps: int, metrics: Mapping[str, float], eta_seconds: float) -> str:
    """One readable line: the step, at most eight numbers, the time left."""
    numbers = [text.format(metrics[name]) for name, text in LINE.items() if name in metrics]
    minutes, seconds = divmod(int(eta_seconds), 60)
    return f"step {step:>{len(str(steps))}}/{steps}  {'  '.join(numbers)}  eta {minutes}:{seconds:02d}"


def rollout_rows(
    step: int, groups: Sequence[Group], advantages: Sequence[Sequence[float]], kl: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """The lines of a rollouts file: one per completion, every reward component a column of its own.

    kl: of each completion to the reference, in the order of the rows.
    """
    rows = []
    each = iter(kl or ())
    for group, row in zip(groups, advantages, strict=True):
        for i, completion in enumerate(group.completions):
            scores = {name: column[i] for name, column in group.components.items()}
            rows.append(
                {
                    "step": step,
                    "group": group.id,
                    "ordinal": group.prompt.ordinal,
                    "sample": i,
                    "prompt": group.prompt.text,
                    "completion": completion.text,
                    "components": {name: _number(score.value) for name, score in scores.items()},
                    "missing": {name: f"{s.status}: {s.detail}" for name, s in scores.items() if s.status != "ok"},
                    "references": {name: list(map(_number, own)) for name, own in group.references.items()},
                    "columns": {name: _number(column[i]) for name, column in group.columns.items()},
                    "weights": {name: column[i] for name, column in group.weights.items()},
                    "total": _number(group.totals[i]) if group.totals else None,
                    "greedy_total": _number(group.greedy.totals[0]) if group.greedy and group.totals else None,
                    "advantage": _number(row[i]),
                    "kl": next(each, None),
                    "source": group.prompt.columns.get("source"),
                    "tokens": len(completion.token_ids),
                    "finish_reason": completion.finish_reason,
                    "versions": sorted(set(completion.versions)),
                    "actor": group.actor,
                    "attempt": group.attempt,
                }
            )
    return rows


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _best_and_worst(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows with the highest and the lowest total of one group: that with the widest spread. Empty without any."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["total"] is not None:
            groups.setdefault(row["group"], []).append(row)
    pairs = [[max(g, key=lambda r: r["total"]), min(g, key=lambda r: r["total"])] for g in groups.values()]
    return max(pairs, key=lambda pair: pair[0]["total"] - pair[1]["total"], default=[])


def _markdown(row: Mapping[str, Any]) -> str:
    scores = ", ".join(f"{name} {value}" for name, value in row["components"].items())
    text = "\n".join("    " + line for line in (row["prompt"] + row["completion"]).splitlines())
    return f"total {row['total']:.3g} ({scores}), advantage {row['advantage']}, {row['tokens']} tokens\n\n{text}"
