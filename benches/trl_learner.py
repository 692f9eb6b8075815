"""The learner against TRL's: trained tokens/s and peak memory of one step on the same rollouts, one thread each.

    pip install -e ".[peers]"
    python -m benches.trl_learner                    # about 15 minutes
    python -m benches.trl_learner --dtype bfloat16

2 prompts of 128 tokens with 8 completions each, whose lengths are the quantiles of a log-normal distribution (mean 64,
sigma 0.8, cut at 256); tokens are random, rewards 0 and 1 in turn. Both train SmolLM2-135M-Instruct on them with GRPO
without a reference, one update, AdamW. Trained tokens are the tokens of completions, the same on both sides.

Ours is `learner.Learner.step`. Theirs is TRL's own `GRPOTrainer.train`, whose completions come from a `rollout_func`;
its clock starts when the rewards are there and stops after the optimizer step. The rows with a limit have TRL's default
micro-batch of 8 rows and keep activations: no other setting was faster here. Those without a limit compare with other
settings: its defaults recompute activations, and micro-batches of 2 are as fast on a CPU and take less memory than 8.
Both sides load once and take turns in processes of their own. Peak memory is that of the whole process during a step:
libraries, weights, gradients, optimizer and activations. Of that, 16 bytes for each parameter (2.0 GiB) are weights,
gradients and moments in float32, which full fine-tuning with AdamW has on either side.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benches import samples, trl_peer
from benches.apart import Apart, Done, Turn
from benches.harness import Ratio, alternate, main, need_model
from core.schema import Group

PROMPTS, GROUP, PROMPT_TOKENS = 2, 8, 128
MEAN = 64
TOKEN_BUDGET = 1024  # ours
FAST = {"per_device_train_batch_size": 8, "gradient_checkpointing": False}  # theirs: rows of a micro-batch
OTHERS = {
    "with its defaults": {"per_device_train_batch_size": 8, "gradient_checkpointing": True},
    "in micro-batches of 2": {"per_device_train_batch_size": 2, "gradient_checkpointing": False},
}


def measure(rounds: int, dtype: str = "float32") -> list[Ratio]:
    """Against TRL as FAST says, and in two rounds each, or the only one, as OTHERS say."""
    trl_peer.need_trl()
    model = need_model()
    with Apart(ours, model, dtype) as learner:

        def against(settings: dict[str, Any], rounds: int) -> list[tuple[Done, Done]]:
            with Apart(theirs, model, dtype, settings) as peer:
                return alternate(rounds, learner, peer)

        rows = compared("TRL's", against(FAST, rounds), dtype, at_least=3, at_most=0.5)
        for how, settings in OTHERS.items():
            rows += compared(f"TRL's {how}", against(settings, min(rounds, 2)), dtype)
    return rows


def compared(
    what: str, pairs: list[tuple[Done, Done]], dtype: str, at_least: float | None = None, at_most: float | None = None
) -> list[Ratio]:
    """A row for time, one for memory."""
    return [
        Ratio(f"learner: trained tokens/s / {what}", speed(pairs), at_least=at_least, facts=facts(pairs, dtype)),
        Ratio(f"learner: peak memory / {what}", memory(pairs), at_most=at_most, facts=gib(pairs)),
    ]


def speed(pairs: list[tuple[Done, Done]]) -> list[float]:
    """Their seconds over ours: the tokens are the same."""
    return [b.seconds / a.seconds for a, b in pairs]


def memory(pairs: list[tuple[Done, Done]]) -> list[float]:
    """Our peak over theirs."""
    return [a.peak_gib / b.peak_gib for a, b in pairs]


def facts(pairs: list[tuple[Done, Done]], dtype: str) -> dict[str, Any]:
    """Seconds and tokens/s of both."""
    a, b = (statistics.median(done.seconds for done in side) for side in zip(*pairs, strict=True))
    tokens = pairs[0][0].facts["tokens"]
    assert tokens == pairs[0][1].facts["tokens"]
    return {
        **{"dtype": dtype, "trained tokens": tokens, "seconds": a, "TRL's seconds": b},
        **{"tokens/s": tokens / a, "TRL's tokens/s": tokens / b},
    }


def gib(pairs: list[tuple[Done, Done]]) -> dict[str, float]:
    """Peaks of both, and what of them the step adds to what is resident before it."""
    names = ("GiB", "TRL's GiB"), ("of that in the step", "TRL's in the step")
    found = {}
    for number, side in enumerate(zip(*pairs, strict=True)):
        found[names[0][number]] = statistics.median(done.peak_gib for done in side)
        found[names[1][number]] = statistics.median(done.peak_gib - done.resident_gib for done in side)
    return found


def rollouts(model: str) -> list[Group]:
    """The same for both sides."""
    vocabulary = json.loads(Path(model, "config.json").read_text())["vocab_size"]
    return samples.groups(PROMPTS, GROUP, PROMPT_TOKENS, MEAN, vocabulary)


def ours(turn: Turn, model: str, dtype: str) -> None:
    """Steps of our learner."""
    from algos.methods import resolve
    from learner.learner import Learner

    config = samples.config(model, dtype, token_budget=TOKEN_BUDGET)
    learner, groups = Learner(config, resolve(config.method)), rollouts(model)
    for version in range(config.steps):
        given = samples.at_version(groups, version)
        turn.begin()
        learner.step(given, version)
        turn.end(tokens=samples.trained(given))


def theirs(turn: Turn, model: str, dtype: str, settings: dict[str, Any]) -> None:
    """Steps of TRL's trainer."""
    groups = rollouts(model)
    rows = [(group.prompt, completion) for group in groups for completion in group.completions]

    def rollout(_: list[str], __: Any) -> dict[str, list[Any]]:
        turn.begin()
        return {
            "prompt_ids": [list(prompt.token_ids) for prompt, _ in rows],
            "completion_ids": [list(completion.token_ids) for _, completion in rows],
            "logprobs": [list(completion.rollout_logprobs) for _, completion in rows],
        }

    def right(completions: list[str], **_: Any) -> list[float]:
        turn.restart()
        return [float(i % 2) for i in range(len(completions))]

    more = {
        "gradient_accumulation_steps": len(rows) // settings["per_device_train_batch_size"],
        **{"num_generations": GROUP, "max_completion_length": 4 * MEAN, "bf16": dtype == "bfloat16"},
    }
    data = [{"prompt": "a"}] * PROMPTS
    with tempfile.TemporaryDirectory() as folder:
        end = partial(turn.end, tokens=samples.trained(groups))
        trl_peer.train(model, folder, data, right, settings | more, end, rollout)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, dtype="float32"))
