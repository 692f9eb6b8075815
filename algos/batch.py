"""One optimiser step as tensors: what goes into the objective, and what the objective adds on its way.

All tensors are right-padded rectangles of completion tokens. B sequences (rows), T tokens, R reward components.
Cells outside `mask` may hold anything, NaN and infinities included: every part selects before it computes.

    Batch --advantages--> channels, masks, weights --rows--> minibatch --normalise--> denominators --rows--> loss

A stage returns a copy with its fields filled (`dataclasses.replace`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

Metrics = Mapping[str, tuple[Tensor, Tensor]]
"""Name -> (sum, count): pairs add up over micro-batches and ranks, the metric is sum / count."""


@dataclass(frozen=True)
class Channel:
    """One advantage with the share it has in each row's loss. Nearly every method has a single channel of weight 1."""

    advantages: Tensor  # [B, T] float64
    weight: Tensor  # [B] float64

    def rows(self, index: Tensor | slice) -> Channel:
        """The channel of some rows."""
        return Channel(self.advantages[index], self.weight[index])


@dataclass(frozen=True)
class Batch:
    """A whole step, or some of its rows. Every rank holds all of it: it has no vocabulary axis, so it is small.

    >>> mask = torch.tensor([[1, 1], [1, 0]]).bool()
    >>> batch = Batch(mask=mask, group=torch.tensor([0, 0]), rewards=torch.tensor([1.0, 0.0]))
    >>> batch.lengths.tolist(), batch.rows(slice(0, 1)).rewards.tolist()
    ([2, 1], [1.0])
    """

    # What the learner fills. `method.needs` says which of the optional ones a method reads.
    mask: Tensor  # [B, T] bool, trainable tokens: generated ones, not padding and not tool output
    group: Tensor  # [B] int64, index of the prompt; rows of a group need not be adjacent
    rewards: Tensor  # [B] totals or [B, R] components; NaN is "could not be scored"
    truncated: Tensor | None = None  # [B] bool, cut off by the length limit
    versions: Tensor | None = None  # [B, T] int64, weight version that sampled the token
    rollout_logprobs: Tensor | None = None  # [B, T] of the engine that sampled
    old_logprobs: Tensor | None = None  # [B, T] of the learner before this step; None in `loss`: equal to the current
    ref_logprobs: Tensor | None = None  # [B, T] of the frozen reference
    entropy: Tensor | None = None  # [B, T] of the next-token distribution before this step, nats
    values: Tensor | None = None  # [B, T] of the critic before this step
    token_rewards: Tensor | None = None  # [B, T]; absent: the outcome reward sits on the last valid token
    token_scores: Tensor | None = None  # [B, T] logits of a token reward model
    sum_pi_sq: Tensor | None = None  # [B, T] sum over the vocabulary of pi^2
    given_advantages: Tensor | None = None  # [B] or [B, T], computed elsewhere
    given_weights: Tensor | None = None  # [B, T], computed elsewhere
    greedy_rewards: Tensor | None = None  # [B] reward of the prompt's greedy completion
    baselines: Tensor | None = None  # [B] what the prompt's reward is compared with: from a memory, or from the data
    bootstrap: Tensor | None = None  # [B] value after the last token; 0 where the episode ended
    answers: Tensor | None = None  # [B] int64, equal for equal final answers; "no answer" is a class of its own
    accuracy: Tensor | None = None  # [B] raw correctness for filters; absent: the rewards before shaping
    reward_weights: Tensor | None = None  # [R] or [B, R] weights of the components; absent: 1 each
    extra_reward: Tensor | None = None  # [B] one more component for the advantages, no part of the totals
    extra_weight: float = 0.0  # its weight
    advantage_scale: float = 1.0  # factor of the finished advantages
    tempered_logprobs: Tensor | None = None  # [B, T] of the learner before this step, at `tempering` x the temperature
    divergence: Tensor | None = None  # [B, T] how far the group's next-token distributions are apart at this position
    prompts: tuple[str, ...] = ()  # of each row: a name of its prompt that is the same in every pass over the data
    version: int = 0  # weight version that this step starts from
    max_age: int | None = None  # tokens whose weights lie more updates behind are not counted
    moved: bool = False  # updates of this step lie between the old policy and the current one
    seed: int = 0  # of this step, for the parts that draw at random

    # What memories fill (`algos.memory`).
    entropy_coef: float | None = None  # of the entropy term; absent: the method's own
    adapted_kl_coef: float | None = None  # of the KL term; absent: the method's own
    entropy_average: float | None = None  # nats per token
    entropy_target: float | None = None  # nats per token
    tempering: float | None = None  # factor of the temperature for tempered_logprobs

    # What `advantages` fills.
    kept: Tensor | None = None  # [B] bool, rows of groups that passed the filter
    channels: tuple[Channel, ...] = ()
    pass_rate: Tensor | None = None  # [B] mean raw reward of the row's group
    positive: Tensor | None = None  # [B] bool, raw reward above 0
    scored: Tensor | None = None  # [B] bool, raw reward is not NaN
    returns: Tensor | None = None  # [B, T] targets of the value loss
    count_mask: Tensor | None = None  # [B, T] bool, tokens that denominators count
    loss_mask: Tensor | None = None  # [B, T] bool, tokens in the loss
    correction_weight: Tensor | None = None  # [B, T], or [B, 1] for one weight per row
    token_weight: Tensor | None = None  # [B, T]
    metrics: Metrics = field(default_factory=dict)

    # What companions of parts fill (`algos.statistics`), from a whole minibatch, detached.
    ratio_shift: Tensor | None = None  # [B, T] subtracted from the log-ratio
    ratio_scale: Tensor | None = None  # [B, T] then multiplied with it
    position_weight: Tensor | None = None  # [B, T] of the gradient at a token's position
    selected: Tensor | None = None  # [B, T] bool, tokens that a surrogate treats apart
    entropy_weight: Tensor | None = None  # [B, T] of a token's entropy in the entropy term

    # What `normalise` fills.
    scale: Tensor | None = None  # [B] weight of one token of a row in the policy loss of the optimiser step
    kl_scale: Tensor | None = None  # [B] the same for the KL term
    mean_scale: Tensor | None = None  # [B] the same for plain token means (entropy)
    value_scale: Tensor | None = None  # [B] the same for the value loss
    row_scale: Tensor | None = None  # [B] weight of a row in a mean over the scored rows with tokens in the loss
    kl_coef: Tensor | None = None  # [] coefficient of the KL term

    @property
    def lengths(self) -> Tensor:
        """Trainable tokens of each row, [B] int64."""
        return self.mask.sum(1)

    @property
    def lag(self) -> Tensor | None:
        """Updates between a token's weights and this step, [B, T] int64."""
        return None if self.versions is None else self.version - self.versions

    @property
    def totals(self) -> Tensor:
        """Rewards [B]: components summed with their weights; NaN only where every component is missing."""
        if self.rewards.dim() == 1:
            return self.rewards
        missing = torch.isnan(self.rewards)
        total = (torch.where(missing, torch.zeros_like(self.rewards), self.rewards) * self.component_weights).sum(1)
        return torch.where(missing.all(1), torch.full_like(total, torch.nan), total)

    @property
    def component_weights(self) -> Tensor:
        """[R] or [B, R], 1 each unless given."""
        return torch.ones_like(self.rewards[0]) if self.reward_weights is None else self.reward_weights

    @property
    def behaviour_logprobs(self) -> Tensor | None:
        """Of the policy that sampled; the old one where the engine's are not known."""
        return self.old_logprobs if self.rollout_logprobs is None else self.rollout_logprobs

    def rows(self, index: Tensor | slice) -> Batch:
        """The batch of some rows. Step-level numbers (denominators, coefficients, metrics) stay as they are."""
        changed: dict[str, object] = {"channels": tuple(channel.rows(index) for channel in self.channels)}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor) and not self._of_step(f.name):
                changed[f.name] = value[index]
        return replace(self, **changed)  # type: ignore[arg-type]

    def _of_step(self, name: str) -> bool:
        """Whether a field says something of the whole step rather than of each row."""
        weights = self.reward_weights
        return name == "kl_coef" or (name == "reward_weights" and weights is not None and weights.dim() == 1)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        moved: dict[str, object] = {
            f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        moved["channels"] = tuple(Channel(c.advantages.to(device), c.weight.to(device)) for c in self.channels)
        return replace(self, **moved)  # type: ignore[arg-type]


def select(mask: Tensor, values: Tensor) -> Tensor:
    """`values` where `mask`, else 0. Selection, not multiplication: 0 * NaN is NaN, forwards and backwards."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))
