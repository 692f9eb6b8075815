"""Every row of the table on the quickstart's policy: groups of the real engine, scored once, train two real steps."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actors.engine import EngineSpec
from algos.methods import methods, resolve
from alignlab.plan import load_tokenizer
from alignlab.prompts import PromptStream
from core.config import RunConfig
from core.schema import Completion, Group, GroupRequest, Sampling, group_id, sample_seed
from examples.quickstart.make_task import make_task
from learner.learner import Learner
from rewards.composer import Composer
from rewards.math_answer import final_answer

pytestmark = pytest.mark.real
P, G, STEPS, MAX_TOKENS = 4, 4, 2, 24


def config(task: Path, method: str = "grpo") -> RunConfig:
    return RunConfig(
        name="every",
        steps=STEPS,
        method=method,
        model={"path": str(task / "policy")},
        data={"path": str(task / "problems.jsonl"), "max_prompt_tokens": 64, "baseline_column": "value"},
        rollout={"prompts": P, "group_size": G, "max_tokens": MAX_TOKENS},
        # An untrained policy solves nothing; about half of its completions begin with an even token.
        rewards={"components": {"even": {"fn": str(task / "even.py:even")}, "math_answer": {"weight": 0.0}}},
        learner={"optimizer": {"lr": 1e-3}},
    )


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    make_task(folder)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()[:32]]
    (folder / "problems.jsonl").write_text("".join(json.dumps({**row, "value": 0.5}) + "\n" for row in rows))
    (folder / "even.py").write_text("def even(completion_ids):\n    return float(completion_ids[0] % 2 == 0)\n")
    return folder


@pytest.fixture(scope="module")
def recorded(task: Path) -> Iterator[list[list[Group]]]:
    """The groups of each step, with everything that a row may need."""
    environment = dict(os.environ)  # vLLM sets LD_PRELOAD and more, which is not meant for the tests that follow
    from actors.vllm_engine import make

    spec = EngineSpec(model=str(task / "policy"), max_model_len=128, max_num_seqs=64, kv_cache_gib=0.1)
    engine, groups = make(spec), []
    prompts = PromptStream(config(task).data, load_tokenizer(config(task).model), seed=0)
    for ordinal in range(P * STEPS):
        seeds = tuple(sample_seed(0, ordinal, sample) for sample in range(G))
        engine.add(GroupRequest(group_id(0, ordinal), prompts[ordinal], seeds, Sampling(MAX_TOKENS), greedy=True))
    while sum(engine.unfinished()):
        groups += engine.step()
    engine.close()
    os.environ.clear()
    os.environ.update(environment)
    scored = sorted(asyncio.run(score(config(task), groups)), key=lambda g: g.prompt.ordinal)
    yield [scored[P * step : P * (step + 1)] for step in range(STEPS)]


async def score(settings: RunConfig, groups: list[Group]) -> list[Group]:
    composer = Composer(settings.rewards)
    try:
        scored = await asyncio.gather(*map(composer.score, groups))
    finally:
        await composer.close()
    return [replace(g, answers=tuple(final_answer(c.text) for c in g.completions)) for g in scored]


def given(group: Group, count: int) -> Group:
    """The first completions of a group as if a person had written them and liked the first."""
    written = (Completion(c.token_ids, (), (), c.text, "stop") for c in group.completions[:count])
    return Group(group.id, group.prompt, tuple(written), totals=(1.0, 0.0) if count == 2 else ())


@pytest.mark.parametrize("name", methods)
def test_a_row_trains_two_steps(task: Path, recorded: list[list[Group]], name: str) -> None:
    method = resolve(name, context={"max_tokens": MAX_TOKENS})
    worker = Learner(config(task, name), method)
    start = parameters(worker)
    for version, groups in enumerate(recorded):
        if "demonstrations" in method.needs:
            groups = [given(group, 2 if "preferences" in method.needs else 1) for group in groups]
        result = worker.step(groups, version)
        assert all(map(math.isfinite, result.metrics.values())), result.metrics
        assert result.metrics["optim/skipped"] == 0.0
    assert not torch.equal(start, parameters(worker))


def test_the_learner_finds_the_log_probs_that_the_engine_reported(task: Path, recorded: list[list[Group]]) -> None:
    logprobs, batch = Learner(config(task), resolve("dapo")).logprobs([g for step in recorded for g in step])
    assert batch.mask.sum() > 500
    assert (logprobs - batch.rollout_logprobs)[batch.mask].abs().max() < 1e-4


def test_the_record_tells_the_methods_apart(recorded: list[list[Group]]) -> None:
    """What the rows above are given: rewards of both kinds in most groups, greedy completions, real log-probs."""
    groups = [group for step in recorded for group in step]
    assert sum(len(set(g.totals)) == 2 for g in groups) >= len(groups) // 2
    assert {g.greedy.totals[0] for g in groups if g.greedy} <= {0.0, 1.0} and all(g.greedy for g in groups)
    assert all(len(c.rollout_logprobs) == len(c.token_ids) for g in groups for c in g.completions)


def parameters(worker: Learner) -> torch.Tensor:
    return worker.export(lambda tensors: torch.cat([t.flatten() for _, t in tensors])).clone()
