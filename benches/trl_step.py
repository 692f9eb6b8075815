"""A whole step against TRL's: prompts, generation, reward, training; the same model, prompts, P, G, lengths.

    pip install -e ".[peers]"
    python -m benches.trl_step                       # about 20 minutes

Ours is `alignlab train` with a vLLM actor and a learner in processes of their own; a round is a run of its own and
gives the mean step after the warm-up. Theirs is `GRPOTrainer.train` with generation by transformers on CPU (its way
with vLLM does not run there); it is loaded once, a round is the mean of STEPS steps. Both draw prompts from the
quickstart's problems, sample at temperature 1, train by GRPO without a reference in float32, one update a step, and
have the machine's two cores in turn. TRL has one thread of torch or two, whichever is faster before the first round.
Ours is on-policy, as TRL's is: actor and learner never work at the same time, so each may have two threads. The rows
without a limit sample one step ahead (max_staleness 1, a thread each), which TRL's trainer cannot do by itself.
`length` is the mean length of completions: it says whether both did the same work.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

from benches import trl_peer
from benches.apart import Apart, Turn
from benches.harness import Ratio, alternate, main, need_model
from benches.runs import ROOT, mean, need_warm_start, train

PROBLEMS = "build/quickstart/train.jsonl"
STEPS = 2  # of theirs in a round
AHEAD = 2  # runs that sample ahead, after the rounds


@dataclass(frozen=True)
class Case:
    """A model, the shape of a step, and what each side is set to.

    rows: of TRL's micro-batch. budget: of ours, in tokens. threads: of our actor and of our learner, on-policy.
    steps, warm: of our run, and how many of them do not count.
    """

    name: str
    model: str
    template: str
    prompts: int
    group: int
    max_tokens: int
    rows: int
    budget: int
    threads: int
    steps: int
    warm: int
    at_least: float


def cases() -> list[Case]:
    """Both models. Exits with what makes them."""
    boxed = "{prompt}\nThink step by step and put the final answer in \\boxed{{}}."
    return [
        Case("quickstart model", need_warm_start(), "{prompt}", 32, 8, 64, 64, 4096, 1, 14, 4, at_least=10),
        Case("SmolLM2-135M", need_model(), boxed, 4, 4, 64, 8, 2048, 2, 4, 1, at_least=3),
    ]


class Step(NamedTuple):
    """What a step takes, and the mean length of its completions in tokens."""

    seconds: float
    length: float


def measure(rounds: int) -> list[Ratio]:
    """Two rows for each model: on-policy, and sampling ahead."""
    trl_peer.need_trl()
    return [row for case in cases() for row in against(case, rounds)]


def against(case: Case, rounds: int) -> list[Ratio]:
    """Seconds of TRL's step over ours."""
    threads = best_threads(case)
    with tempfile.TemporaryDirectory() as folder, Apart(theirs, case, folder, threads=threads) as peer:
        peer()  # loads and allocates; ours has a warm-up in each run
        numbers = count()

        def ours(ahead: int = 0) -> Step:
            return run(case, Path(folder), f"run-{next(numbers)}", ahead)

        pairs = alternate(rounds, ours, lambda: peer_step(peer), warm=0)
        sampled_ahead = [ours(ahead=1) for _ in range(min(rounds, AHEAD))]
    shape = {"P": case.prompts, "G": case.group, "most tokens": case.max_tokens}
    theirs_too = facts("TRL's ", [b for _, b in pairs]) | {"TRL's threads": threads}
    rows = []
    for steps, name, limit in (([a for a, _ in pairs], "", case.at_least), (sampled_ahead, ", one step ahead", None)):
        ratios = [b.seconds / a.seconds for a, (_, b) in zip(steps, pairs, strict=False)]
        name = f"whole step, {case.name}{name}: TRL's seconds / ours"
        rows.append(Ratio(name, ratios, at_least=limit, facts=shape | facts("", steps) | theirs_too))
    return rows


def facts(whose: str, steps: list[Step]) -> dict[str, float]:
    """Medians over the rounds."""
    return {
        f"{whose}seconds": statistics.median(step.seconds for step in steps),
        f"{whose}length": statistics.median(step.length for step in steps),
    }


def run(case: Case, folder: Path, name: str, ahead: int) -> Step:
    """One run of ours, `ahead` its max_staleness."""
    # The first steps sample more than one batch, the last ones none: neither counts.
    changed = changes(case, 1 if ahead else case.threads)
    changed += [f"steps={case.steps + 2 * ahead}", f"rollout.max_staleness={ahead}"]
    rows = train(folder, name, "configs/quickstart.yaml", changed, warm=case.warm)[: case.steps - case.warm]
    return Step(mean(rows, "time/step"), mean(rows, "completion/length_mean"))


def peer_step(peer: Apart) -> Step:
    """The mean of STEPS steps of theirs."""
    done = peer()
    return Step(done.seconds / STEPS, done.facts["length"])


def best_threads(case: Case) -> int:
    """Threads with which TRL's step takes less time here."""
    seconds = {}
    for threads in (1, 2):
        with tempfile.TemporaryDirectory() as folder, Apart(theirs, case, folder, threads=threads) as peer:
            peer()  # loads and allocates
            seconds[threads] = peer().seconds
    return min(seconds, key=seconds.__getitem__)


def changes(case: Case, threads: int) -> list[str]:
    """Our run, as changes of the quickstart's config."""
    return [
        f"model.path={case.model}",
        f"data.path={PROBLEMS}",
        f"data.template={json.dumps(case.template)}",
        "data.max_prompt_tokens=256",
        f"rollout.prompts={case.prompts}",
        f"rollout.group_size={case.group}",
        f"rollout.max_tokens={case.max_tokens}",
        f"learner.token_budget={case.budget}",
        f"learner.threads={threads}",
        f"actors.threads={threads}",
    ]


def problems(template: str) -> Iterator[dict[str, Any]]:
    """Rows of TRL's dataset."""
    for line in (ROOT / PROBLEMS).read_text().splitlines()[:2000]:
        row = json.loads(line)
        message = {"role": "user", "content": template.format(prompt=row["question"])}
        yield {"prompt": [message], "answer": row["answer"]}


def theirs(turn: Turn, case: Case, folder: str) -> None:
    """`STEPS` steps of TRL's trainer a turn, with its own generation."""
    from rewards.math_answer import grade

    lengths: list[list[int]] = []

    def right(completions: list[Any], completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        lengths.append([len(ids) for ids in completion_ids])
        return [grade(c[0]["content"], a).value for c, a in zip(completions, answer, strict=True)]

    def end() -> None:
        if len(lengths) == STEPS:
            turn.end(length=statistics.mean(chain(*lengths)))
            lengths.clear()
            turn.begin()

    settings = {
        **{"per_device_train_batch_size": case.rows, "gradient_checkpointing": False, "bf16": False},
        "gradient_accumulation_steps": case.prompts * case.group // case.rows,
        **{"num_generations": case.group, "max_completion_length": case.max_tokens, "temperature": 1.0},
        "learning_rate": 1e-4,
    }
    turn.begin()
    trl_peer.train(case.model, folder, list(problems(case.template)), right, settings, end)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure))
