"""The critic and the token reward model: what they are, that they learn, when the policy waits, and what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForTokenClassification

from algos.methods import resolve
from core.config import RunConfig
from core.errors import UserError
from learner.collate import Micro, collate
from learner.learner import Learner
from tests.learner import samples

CPU = torch.device("cpu")


def learner(tiny: Path, row: str, **options: Any) -> Learner:
    return Learner(samples.config(tiny, **options), resolve(row, context={"max_tokens": 20}))


def weights(hf: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in hf.parameters()]).clone()


def test_a_value_is_read_before_its_token_and_packed_rows_say_what_single_ones_say(tiny: Path) -> None:
    critic = learner(tiny, "ppo").companions["values"].model
    _, sequences = collate(samples.groups(prompts=2, size=2))
    with torch.no_grad():
        (together,) = critic(Micro.of(sequences, [0, 1, 2, 3], CPU))
        critic.hf.config._attn_implementation = "eager"
        apart = []
        for prompt, completion in zip(sequences.prompts, sequences.completions, strict=True):
            plain = critic.hf.base_model(torch.tensor([prompt + completion]), use_cache=False).last_hidden_state[0]
            apart.append(critic.hf.score(plain[len(prompt) - 1 : -1])[:, 0])
    assert torch.allclose(together, torch.cat(apart), atol=1e-4)


def test_every_rank_and_every_run_of_a_seed_starts_from_the_same_head(tiny: Path) -> None:
    one, other = (learner(tiny, "ppo").companions["values"].model.hf for _ in range(2))
    assert torch.equal(one.score.weight, other.score.weight) and one.score.weight.abs().max() > 0


def test_a_critic_learns_what_completions_are_worth(tiny: Path) -> None:
    worker = learner(tiny, "ppo", critic={"lr": 3e-3})
    groups = samples.groups()
    unexplained = [worker.step(groups, version=0).metrics["critic/unexplained"] for _ in range(8)]
    assert unexplained[-1] < 0.5 * unexplained[0]


def test_a_token_reward_model_learns_to_judge(tiny: Path) -> None:
    worker = learner(tiny, "oreal", token_reward_model={"lr": 3e-3})
    groups = samples.groups()
    losses = [worker.step(groups, version=0).metrics["token_reward_model/loss"] for _ in range(12)]
    assert losses[-1] < 0.5 < losses[0]


def test_the_policy_waits_while_its_critic_warms_up(tiny: Path) -> None:
    worker = learner(tiny, "ppo", critic={"warmup_steps": 2, "lr": 1e-3})
    policy, critic = worker.policy.hf, worker.companions["values"].model.hf
    start, start_critic = weights(policy), weights(critic)
    for version in range(2):
        worker.step(samples.groups(seed=version), version=version)
    assert torch.equal(weights(policy), start) and not torch.equal(weights(critic), start_critic)
    worker.step(samples.groups(seed=2), version=2)
    assert not torch.equal(weights(policy), start)


@pytest.mark.parametrize("row", ["ppo", "spo"])
def test_companions_and_memory_resume_bit_for_bit(tiny: Path, tmp_path: Path, row: str) -> None:
    straight, first, second = (learner(tiny, row, critic={"lr": 1e-3}) for _ in range(3))
    groups = [samples.groups(seed=0) for _ in range(3)]  # the same prompts again: memory counts
    for version, step in enumerate(groups):
        straight.step(step, version)
    for version in range(2):
        first.step(groups[version], version)
    first.save(tmp_path)
    second.load(tmp_path)
    second.step(groups[2], 2)
    assert torch.equal(weights(straight.policy.hf), weights(second.policy.hf))
    for field, companion in straight.companions.items():
        assert torch.equal(weights(companion.model.hf), weights(second.companions[field].model.hf))


def test_a_model_that_has_a_head_keeps_it(tiny: Path, tmp_path: Path) -> None:
    hf = AutoModelForTokenClassification.from_pretrained(tiny, num_labels=1)
    torch.nn.init.constant_(hf.score.weight, 0.5)
    hf.save_pretrained(tmp_path)
    critic = learner(tiny, "ppo", critic={"path": str(tmp_path)}).companions["values"].model
    assert (critic.hf.score.weight == 0.5).all()


def test_a_missing_critic_is_said_with_the_option_that_names_it(tiny: Path) -> None:
    config: RunConfig = samples.config(tiny, critic={"path": "/nowhere/critic"})
    with pytest.raises(UserError, match=r"learner\.critic\.path: transformers cannot load '/nowhere/critic'"):
        Learner(config, resolve("ppo"))
