"""Training on pairs: the loss by hand, micro-batches that change nothing, a preference that is learned."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from core.errors import UserError
from learner.bradley_terry import Pair, Recipe, _backward, fit, freeze_encoder, gaps, pair_loss, ranked_right
from rewards.reward_model import load_classifier, read_scores
from rewards.reward_text import Reading
from tests.tiny_classifiers import tiny_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def loaded(folder):
    """(model, its reader, encoded pairs): the answer with `please` in it is the chosen one."""
    model, tokenizer = load_classifier(str(folder), "float32", "cpu")
    encode = Reading(tokenizer, "pair", 48).encode
    pairs = [
        Pair(*(encode([{"role": "user", "content": question}], f"{answer} {word}") for word in ("please", "no")))
        for question in ("what is the sky", "help me", "1 2 3 4 5 6 7", "are you red")
        for answer in ("blue", "go away", "thanks and thanks and thanks", "red 1", "you 2", "is me", "3 3 3 3")
    ]
    return model, functools.partial(read_scores, model), pairs


def log(_) -> None:
    """Nobody reads."""


# ---------------------------------------------------------------- the loss
def test_the_loss_is_that_of_a_lost_bet() -> None:
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])
    # sigmoid(1) and sigmoid(0) are the chances it gave to what was chosen
    assert pair_loss(chosen, rejected).item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(2)) / 2)
    # a margin of 1 makes the gaps 0 and -1
    assert pair_loss(chosen, rejected, 1.0).item() == pytest.approx((math.log(2) + math.log(1 + math.e)) / 2)
    assert pair_loss(chosen, rejected, torch.tensor([1.0, 0.0])).item() == pytest.approx(math.log(2))
    # (2 + 1)^2 and 0, half of it a tenth: 0.45 more
    assert (pair_loss(chosen, rejected, centre=0.1) - pair_loss(chosen, rejected)).item() == pytest.approx(0.45)


def test_its_gradient_is_the_chance_of_being_wrong() -> None:
    chosen, rejected = torch.tensor([1.0], requires_grad=True), torch.tensor([0.0], requires_grad=True)
    pair_loss(chosen, rejected).backward()
    wrong = 1 / (1 + math.e)
    assert chosen.grad.item() == pytest.approx(-wrong) and rejected.grad.item() == pytest.approx(wrong)


def test_large_gaps_do_not_overflow() -> None:
    assert pair_loss(torch.tensor([0.0]), torch.tensor([500.0])).item() == 500


def test_a_tie_counts_a_half() -> None:
    assert ranked_right([0.1, 0.0, -3.0]) == [1, 0.5, 0]


# ---------------------------------------------------------------- training
def test_micro_batches_change_memory_and_nothing_else(loaded) -> None:
    model, read, pairs = loaded
    results = []
    for batch_tokens in (1, 150, 10_000):
        model.zero_grad()
        loss, right = _backward(read, pairs[:7], Recipe(batch_tokens=batch_tokens, centre=0.01))
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((loss, right, gradient))
    for loss, right, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5) and right == results[0][1]
        assert torch.allclose(gradient, results[0][2], rtol=1e-3, atol=1e-6)


def test_the_loss_of_a_batch_is_the_loss_of_its_gaps(loaded) -> None:
    model, read, pairs = loaded
    found = gaps(model, read, pairs[:3], 100)
    expected = sum(math.log(1 + math.exp(-gap)) for gap in found) / 3
    assert _backward(read, pairs[:3], Recipe())[0] == pytest.approx(expected, rel=1e-5)


def test_a_preference_is_learned_and_holds_for_pairs_it_has_not_seen(loaded) -> None:
    model, read, pairs = loaded
    train, rest = pairs[::2], pairs[1::2]
    told = fit(model, read, train, Recipe(epochs=30, batch=7, lr=3e-3, seed=3), log)
    assert (told[0].step, told[-1].step, told[-1].steps) == (1, 60, 60)
    assert told[0].loss > 0.3 and told[-1].loss < 0.1 and told[-1].accuracy == 1
    assert min(gaps(model, read, rest, 1000)) > 0


def test_the_same_seed_gives_the_same_model(folder, loaded) -> None:
    def trained(seed: int) -> torch.Tensor:
        model, _ = load_classifier(str(folder), "float32", "cpu")
        fit(model, functools.partial(read_scores, model), loaded[2], Recipe(epochs=1, seed=seed), log)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first = trained(1)
    assert torch.equal(first, trained(1)) and not torch.equal(first, trained(2))


def test_a_frozen_encoder_stays_as_it_is(loaded) -> None:
    model, read, pairs = loaded
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(model, read, pairs, Recipe(epochs=1, freeze_encoder=True), log)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    # The bias gets as much from the chosen as it loses from the rejected.
    assert moved - {"classifier.bias"} == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight"}


def test_freezing_turns_the_dropout_of_the_encoder_off(loaded) -> None:
    model, *_ = loaded
    model.train()
    freeze_encoder(model)
    assert model.dropout.training and not any(module.training for module in model.bert.modules())


def test_a_loss_that_is_no_number_ends_the_training(loaded) -> None:
    model, read, pairs = loaded
    with torch.no_grad():
        model.classifier.weight.fill_(math.nan)
    with pytest.raises(UserError, match="the loss is nan at step 1; lower it"):
        fit(model, read, pairs, Recipe(), log)


def test_the_rate_warms_up_and_falls_to_nothing(loaded, monkeypatch) -> None:
    model, read, pairs = loaded
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    fit(model, read, pairs[:10], Recipe(epochs=1, batch=1, lr=1.0, warmup=0.2, freeze_encoder=True), log)
    assert rates == pytest.approx([1 / 2, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
