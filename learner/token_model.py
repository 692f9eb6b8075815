"""A model that gives every token a number: the critic (its value) and the token reward model (its score).

A transformers backbone with a linear head of one output, trained beside the policy by an optimiser of its own. A folder
without such a head (the policy's own, by default) gets a fresh one, the same on every rank and for every run of a seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForTokenClassification

from core.config import RunConfig
from learner.collate import Micro
from learner.model import Packed, load_hf, shard
from learner.optim import Optimizer
from learner.ranks import Ranks

# What a method needs -> the field of the batch that the model fills, and the section of the config that describes it.
ROLES = {"critic": ("values", "critic"), "credit": ("token_scores", "token_reward_model")}


class TokenModel(Packed):
    """`hf` is a transformers model for token classification with one label."""

    def forward(self, micro: Micro) -> tuple[Tensor]:
        """A number for each of `micro.targets`, from what comes before it: [M] float32, alone in a tuple."""
        return (self.hf.get_submodule("score")(self.hidden(micro))[:, 0].float(),)


@dataclass(frozen=True)
class Companion:
    """A token model, its optimiser, and how many steps it learns before the policy does."""

    model: TokenModel
    optimiser: Optimizer
    warmup_steps: int


def load_companions(config: RunConfig, needs: frozenset[str], ranks: Ranks) -> dict[str, Companion]:
    """The token models that a method needs, by the field of the batch that they fill. Raises UserError."""
    wanted = {ROLES[need] for need in ROLES if {need, ROLES[need][0]} & needs}
    return {field: _load(config, section, ranks) for field, section in sorted(wanted)}


def _load(config: RunConfig, section: str, ranks: Ranks) -> Companion:
    own = getattr(config.learner, section)
    path = own.path or config.model.path
    option = f"learner.{section}.path" if own.path else "model.path"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        hf = load_hf(
            AutoModelForTokenClassification,
            config.model,
            path,
            option,
            config.learner.activation_checkpointing,
            num_labels=1,
        )
    model = shard(TokenModel(hf), getattr(torch, config.model.dtype), ranks)
    options = config.learner.optimizer.model_copy(update={"name": "adamw", "lr": own.lr})
    return Companion(model, Optimizer(options, hf.named_parameters(), set()), own.warmup_steps)
