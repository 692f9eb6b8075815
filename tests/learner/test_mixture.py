"""What a weighting policy decides reaches the advantages: as on the host, in every policy, to the same numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from algos.loss import advantages, loss, normalise
from algos.methods import resolve
from core.errors import UserError
from core.schema import Mixture
from learner.collate import collate
from learner.gram import GRPO as COMPARED
from learner.gram import gradients, gram, pulls
from learner.learner import Learner
from learner.logprobs import Head, hidden_gradients, token_logprobs
from learner.mixture import mixed, reference_kl
from rewards.composer import _mixture
from rewards.mixing import compose
from rewards.policies import build
from tests.learner import samples
from tests.rewards.test_policies import NAMES, SPECS, step_of, taken

GRPO = resolve({"row": "grpo", "advantage": {"group": {"eps": 1e-4}}, "kl": "none"})
WHITE = resolve(
    {"row": "grpo", "advantage": {"group": {"eps": 1e-4}}, "kl": "none", "whiten": {"sequence": {"eps": 1e-4}}}
)


def groups_of(batch, mix):
    """The rows of a policy's batch as groups, their totals as the composer makes them."""
    weights = np.broadcast_to(mix.weights, batch.scores.shape)
    order = [np.flatnonzero(batch.group == g) for g in range(4)]
    groups = []
    for number, (group, rows) in enumerate(zip(samples.groups(4, 5), order, strict=True)):
        columns = {n: tuple(batch.scores[rows, k]) for k, n in enumerate(batch.names)}
        each = {n: tuple(weights[rows, k]) for k, n in enumerate(batch.names)}
        there = np.isfinite(batch.scores[rows])
        totals = np.where(there.any(1), (weights[rows] * np.where(there, batch.scores[rows], 0)).sum(1), math.nan)
        groups.append(replace(group, id=str(number), columns=columns, weights=each, totals=tuple(totals)))
    return groups, np.concatenate(order)


@pytest.mark.parametrize("spec", [s for s in SPECS.values() if s["policy"] != "tchebycheff"], ids=lambda s: s["policy"])
def test_the_learner_joins_columns_as_compose_does(spec):
    policy = build(spec, NAMES)
    for step in range(3):
        batch = step_of(step)
        mix = taken(policy, batch)
        groups, rows = groups_of(batch, mix)
        mixture = _mixture(mix)
        tensors, _ = collate(groups, apart=mixture.apart)
        # Every token carries an equal part of the KL that the policy's batch has for its row.
        gap = torch.tensor(batch.kl[rows])[:, None] / tensors.lengths[:, None]
        tensors = replace(tensors, ref_logprobs=(tensors.rollout_logprobs - gap).double())
        lengths = tensors.lengths.numpy()
        expected, _ = compose(replace(batch, lengths=lengths[np.argsort(rows)]), mix)
        method = WHITE if mixture.apart else GRPO
        found = advantages(*mixed(method, tensors, mixture)).channels[0].advantages[:, 0]
        np.testing.assert_allclose(found.numpy(), expected[rows], atol=1e-6)


def test_a_method_that_divides_by_nothing_cannot_leave_the_division_out():
    tensors, _ = collate(samples.groups(), apart=True)
    with pytest.raises(UserError, match="'reward', which is not divided by a spread"):
        mixed(resolve({"row": "grpo", "advantage": "reward"}), tensors, Mixture(apart=True, by_std=False))


def test_the_scale_multiplies_finished_advantages_and_the_policy_steers_the_kl():
    method, batch = resolve({"row": "grpo", "kl": {"coef": 0.1}}), collate(samples.groups())[0]
    batch = replace(batch, ref_logprobs=batch.rollout_logprobs, old_logprobs=batch.rollout_logprobs)
    plain = advantages(*mixed(method, batch, Mixture()))
    half = advantages(*mixed(method, batch, Mixture(scale=0.5, kl_coef=0.7)))
    assert torch.equal(half.channels[0].advantages, plain.channels[0].advantages * 0.5)
    assert normalise(method, half).kl_coef.item() == pytest.approx(0.7)


def test_the_kl_of_a_completion_is_the_sum_over_its_tokens():
    batch, _ = collate(samples.groups(1, 2))  # rollout_logprobs are -5
    batch = replace(batch, ref_logprobs=torch.full(batch.mask.shape, -5.5))
    assert reference_kl(batch).tolist() == (0.5 * batch.lengths.double()).tolist()
    assert reference_kl(replace(batch, ref_logprobs=None)) is None


def test_the_gradient_of_a_log_prob_with_respect_to_the_hidden_state():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(7, 4, requires_grad=True), torch.randn(9, 4), torch.arange(7)
    head = Head(temperature=1.3, softcap=5.0, scale=0.8)
    logprobs, _ = token_logprobs(hidden, weight, None, targets, head, 3)
    (expected,) = torch.autograd.grad(logprobs.sum(), hidden)
    found, states = hidden_gradients(hidden.detach(), weight, None, targets, head, 3)
    torch.testing.assert_close(found, expected)
    assert torch.equal(states, hidden.detach())


def test_the_gram_matrix_is_that_of_the_gradients_of_a_map_before_the_head():
    torch.manual_seed(0)
    groups, width, vocabulary = samples.groups(), 6, samples.VOCABULARY
    batch, sequences = collate(groups, apart=True)
    hidden, weight = torch.randn(*batch.mask.shape, width), torch.randn(vocabulary, width) / 3
    targets = torch.zeros(batch.mask.shape, dtype=torch.int64)
    for row, completion in enumerate(sequences.completions):
        targets[row, : len(completion)] = torch.tensor(completion)
    cells = batch.mask.nonzero()
    rows, steps = cells.unbind(1)
    slopes, states = hidden_gradients(hidden[batch.mask], weight, None, targets[batch.mask], Head(), 100)
    found = gradients(pulls(batch), [(rows, steps, slopes, states)], width)

    expected = []
    for column in batch.rewards.unbind(1):
        linear = torch.eye(width, requires_grad=True)
        current = ((hidden @ linear.T) @ weight.T).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        # A ratio of 1 everywhere: the policy that sampled is the current one.
        alone = normalise(COMPARED, advantages(COMPARED, replace(batch, rewards=column, reward_weights=None)))
        same = replace(alone, old_logprobs=current.detach())
        expected.append(torch.autograd.grad(loss(COMPARED, same, current).policy, linear)[0])
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-6, rtol=1e-4)

    table = torch.tensor(gram(found))
    cut = found.flatten(1) / found.flatten(1).norm(dim=1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(table, (cut @ cut.T).to(table.dtype), atol=1e-6, rtol=1e-4)


def test_the_learner_compares_gradients_and_takes_no_step(tiny):
    worker = Learner(samples.config(tiny), resolve("grpo"))
    before = worker.export(lambda tensors: {name: tensor.clone() for name, tensor in tensors})
    groups = samples.groups()
    table, lr = worker.gram(groups)
    assert lr == 1e-3 and len(table) == 2
    assert table[0][0] > 0 and table[0][1] == pytest.approx(table[1][0])
    same = [replace(g, columns={n: g.columns["right"] for n in g.columns}) for g in groups]
    ((a, b), (c, d)), _ = worker.gram(same)
    assert a == pytest.approx(b) == pytest.approx(c) == pytest.approx(d)
    after = worker.export(dict)
    assert all(torch.equal(before[name], after[name]) for name in before) and worker.steps_done == 0


def test_a_reference_for_the_rewards_alone_measures_the_kl_of_every_row(tiny):
    worker = Learner(samples.config(tiny), resolve({"row": "grpo", "kl": "none"}), reference=True)
    groups = samples.groups()
    result = worker.step(groups, 0, Mixture(apart=True, whiten=False, task=0.5))
    assert result.kl is not None and len(result.kl) == 16 and all(map(math.isfinite, result.kl))
    assert Learner(samples.config(tiny), resolve({"row": "grpo", "kl": "none"})).step(groups, 0).kl is None
