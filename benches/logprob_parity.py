"""Log-probs of the same tokens by the engine that sampled them (vLLM) and by the learner, in one process.

    python benches/logprob_parity.py MODEL_FOLDER QUESTIONS.jsonl [prompts] [max_tokens]

Prints the largest and the mean absolute difference. In float32 the largest stays below 1e-3.
"""

from __future__ import annotations

import sys

import torch

from actors.engine import EngineSpec
from actors.vllm_engine import make, prepare_environment
from alignlab.plan import load_tokenizer
from alignlab.prompts import PromptStream
from core.config import RunConfig
from core.loading import parse_config
from core.schema import Group, GroupRequest, Sampling, group_id, sample_seed


def main(model: str, questions: str, prompts: int = 8, max_tokens: int = 64) -> float:
    """Sample 4 completions of each of the first prompts, compare; the largest absolute difference in nats."""
    tree = {
        "name": "parity",
        "steps": 1,
        "model": {"path": model},
        "data": {"path": questions, "max_prompt_tokens": 256},
        "rollout": {"max_tokens": max_tokens},
        "actors": {"kv_cache_gib": 1},
    }
    config = parse_config(tree, "benches")
    spec = EngineSpec.of(config, "cpu")
    prepare_environment(spec)
    engine = make(spec)
    stream = PromptStream(config.data, load_tokenizer(config.model), config.seed)
    for n in range(prompts):
        seeds = tuple(sample_seed(0, n, k) for k in range(4))
        engine.add(GroupRequest(group_id(0, n), stream[n], seeds, Sampling(max_tokens)))
    groups = []
    while sum(engine.unfinished()):
        groups += engine.step()
    engine.close()
    differences = _difference(config, groups)
    print(
        f"{model}: {len(differences)} tokens, largest difference {differences.max():.2e}, "
        f"mean {differences.mean():.2e} nats"
    )
    return differences.max().item()


def _difference(config: RunConfig, groups: list[Group]) -> torch.Tensor:
    """|engine - learner| of every sampled token, [tokens]."""
    from algos.methods import resolve
    from learner.learner import Learner

    torch.set_num_threads(1)
    logprobs, batch = Learner(config, resolve({"row": "grpo", "kl": "none"})).logprobs(groups)
    return (logprobs - batch.rollout_logprobs)[batch.mask].abs()


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
