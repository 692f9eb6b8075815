"""Tokens/s of one actor / tokens/s of a bare `vllm.LLM.generate`, on the same 256 completions of skewed lengths.

    python -m benches.rollout [--dtype bfloat16]        # about 5 minutes

SmolLM2-135M, 64 prompts x 4 completions of log-normal length (sigma 0.8), the same seed for each completion on both
sides, one thread a side. The actor is a `RolloutActor` with vLLM inside, given its requests and polled as the pool does
it; it also returns a log-prob and a version for each token. The bare side is vLLM as one installs it: `LLM(...)` and
one `generate` of all requests, without log-probs, with its progress bar off. Each side is a process of its own.
"""

from __future__ import annotations

import math
import os
import random
import sys
from typing import Any

from benches.apart import Apart, Turn
from benches.harness import Ratio, alternate, main, need_model

PROMPTS, SAMPLES, MEDIAN, SIGMA, LONGEST = 64, 4, 16, 0.8, 160
MAX_MODEL_LEN = 256


def requests(tokens: int, salt: int) -> list[tuple[list[int], int, list[int]]]:
    """(prompt, max_tokens, seeds) of each group; `tokens` in the vocabulary. Another `salt` makes other prompts."""
    lengths, words = random.Random(0), random.Random(salt)
    found = []
    for number in range(PROMPTS):
        prompt = [words.randrange(1000, tokens) for _ in range(24)]
        length = min(LONGEST, max(2, round(MEDIAN * math.exp(SIGMA * lengths.gauss(0.0, 1.0)))))
        found.append((prompt, length, [number * SAMPLES + sample for sample in range(SAMPLES)]))
    return found


def actor(turn: Turn, model: str, dtype: str) -> None:
    """Side: one actor of a pool."""
    from actors.actor import RolloutActor
    from actors.engine import EngineSpec
    from actors.vllm_engine import make
    from core.schema import GroupRequest, Prompt, Sampling

    spec = EngineSpec(model, MAX_MODEL_LEN, dtype=dtype, max_num_seqs=256, kv_cache_gib=2.0)
    rollout = RolloutActor("actor-0", 0, spec, make)
    rollout.ready(300)
    sequence = 0
    while True:
        salt = turn.begin()
        wanted = [
            GroupRequest(f"{salt}-{i}", Prompt(i, "", tuple(prompt)), tuple(seeds), Sampling(length, ignore_eos=True))
            for i, (prompt, length, seeds) in enumerate(requests(40_000, salt))
        ]
        turn.restart()
        rollout.submit(wanted)
        groups: list[Any] = []
        while len(groups) < len(wanted):
            poll = rollout.poll(1.0, sequence)
            sequence = poll.sequence
            groups += poll.groups
        turn.end(tokens=sum(group.tokens for group in groups))


def bare(turn: Turn, model: str, dtype: str) -> None:
    """Side: `vllm.LLM`."""
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the cores are those that the system gives, as on the other side
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype=dtype,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=256,
        enforce_eager=True,
        enable_chunked_prefill=False,
        max_num_batched_tokens=4096,
    )
    while True:
        prompts, params = [], []
        for prompt, length, seeds in requests(40_000, turn.begin()):
            for seed in seeds:
                prompts.append({"prompt_token_ids": prompt})
                params.append(SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True, seed=seed))
        turn.restart()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        turn.end(tokens=sum(len(output.outputs[0].token_ids) for output in outputs))


def measure(rounds: int, dtype: str = "float32") -> list[Ratio]:
    """One row."""
    model = need_model()
    turns = iter(range(10_000))
    with Apart(actor, model, dtype) as ours, Apart(bare, model, dtype) as theirs:

        def rate(side: Apart) -> float:
            done = side(next(turns))
            return done.facts["tokens"] / done.seconds

        pairs = alternate(rounds, lambda: rate(ours), lambda: rate(theirs))
    tokens = SAMPLES * sum(length for _, length, _ in requests(40_000, 0))
    facts = {"dtype": dtype, "tokens/s of the actor": max(a for a, _ in pairs), "tokens of a round": tokens}
    return [
        Ratio("rollout: tokens/s of an actor / of a bare vLLM", [a / b for a, b in pairs], at_least=0.95, facts=facts)
    ]


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, dtype="float32"))
