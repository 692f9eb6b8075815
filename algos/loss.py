"""The composed objective: executes the parts of a method, in the order of their definition.

    batch, states = remember(method, batch, states) once per step, on all its rows
    batch  = advantages(method, batch)              once per step, after it
    mini   = normalise(method, batch.rows(index))   once per update (or `late`, if "late" in method.needs)
    output = loss(method, mini.rows(i), logprobs)   per micro-batch; parts are summed over micro-batches and ranks

    loss = aggregate( token_weight * correction * sum_c w_c surrogate(ratio, A_c) ) + coef * KL - coef * entropy
           + the losses of the critic and of the token reward model

Only current log-probabilities (and entropy, values, token scores) carry gradient. Denominators are those of the whole
update, so the loss does not depend on the split into micro-batches. Masked cells may hold anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from algos.aggregation import Counts, aggregations, weighted_sum
from algos.batch import Batch, Channel, Metrics, select
from algos.critic import WithReturns, outcome_at_end
from algos.groups import Groups
from algos.memory import State
from algos.method import Method
from algos.metrics import effective_share, mean_over, mismatch, update
from algos.parts import Part, supply
from algos.surrogates import bounds
from core.registry import options_of


@dataclass(frozen=True)
class LossOutput:
    """A part of the update's loss: the parts of all rows of a minibatch add up to its loss."""

    loss: Tensor  # [] with gradient
    metrics: Metrics
    token_loss: Tensor  # [B, T] policy term after all weights, 0 at masked cells
    policy: Tensor  # [] aggregated policy term
    token_kl: Tensor | None = None  # [B, T]
    kl: Tensor | None = None  # [] aggregated KL term, not multiplied by its coefficient


def remember(method: Method, batch: Batch, states: Sequence[State]) -> tuple[Batch, list[State]]:
    """Before `advantages`: the batch with what the method's memories fill, and their next states; {} at the start."""
    following: list[State] = []
    for part, state in zip(method.memory, states, strict=True):
        filled, state = part(batch, state=state)
        batch, following = replace(batch, **filled), [*following, state]
    return batch, following


def advantages(method: Method, batch: Batch) -> Batch:
    """Once per step, on the whole step: filter, shaping, channels, correction, weights; metrics in `.metrics`.

    Raises ValueError when the batch lacks a field that the method reads (see `method.needs`).
    """
    batch = _filtered(method, batch)
    if not method.late_advantage:
        batch = _with_channels(method, batch)
    if not method.late_correction:
        batch = _corrected(method, batch)
    if not method.late:
        batch = _weighted(method, batch)
    return replace(batch, metrics={**batch.metrics, **_step_metrics(batch)})


def late(method: Method, minibatch: Batch, logprobs: Tensor) -> Batch:
    """`normalise` for methods with "late" in their needs: first what depends on current logprobs [B, T] of all rows."""
    current = logprobs.detach()
    if method.proximal:
        minibatch = replace(minibatch, old_logprobs=method.proximal(minibatch, logprobs=current))
    if method.late_advantage:
        minibatch = _with_channels(method, minibatch, logprobs=current)
    if method.late_correction:
        minibatch = _corrected(method, minibatch, current)
    minibatch = normalise(method, _weighted(method, minibatch, logprobs=current))
    if method.kl is None or not method.hinged:
        return minibatch
    value = _kl(method.kl, minibatch, _current(method, minibatch, current))[1]
    excess = method.kl.option("coef") * (value - method.kl.option("hinge"))
    return replace(minibatch, kl_coef=excess.clamp(min=0))


def normalise(method: Method, minibatch: Batch) -> Batch:
    """Denominators of one update (a Batch made by `.rows`), before it is split into micro-batches."""
    mask, group, kept = _filled(minibatch.count_mask), minibatch.group, _filled(minibatch.kept)
    plain = Counts.of(mask, group, kept)
    aggregate = method.aggregation
    scale = whole = aggregate(minibatch, counts=plain)
    if method.partition:
        scale = torch.zeros_like(scale)
        for rows, factor in method.partition(minibatch):
            counts = Counts.of(mask & rows[:, None], group, kept & rows)
            scale = scale + select(rows, factor * aggregate(minibatch, counts=counts))
    token_mean = 1 / plain.tokens.clamp(min=1).expand(len(group))
    judged = _filled(minibatch.loss_mask).any(1) & _filled(minibatch.scored)
    mode = method.kl.option("mode") if method.kl else None
    return replace(
        minibatch,
        scale=scale,
        kl_scale=whole if mode is None else aggregations[mode](plain),
        mean_scale=token_mean,
        value_scale=token_mean,
        row_scale=judged / judged.sum().clamp(min=1),
        kl_coef=scale.new_tensor(_kl_coef(method.kl, minibatch)) if method.kl else None,
    )


def loss(
    method: Method,
    rows: Batch,
    logprobs: Tensor,
    entropy: Tensor | None = None,
    values: Tensor | None = None,
    token_scores: Tensor | None = None,
) -> LossOutput:
    """The part of the update's loss that comes from `rows`; logprobs and the three others [B, T] with gradient.

    `rows.old_logprobs` None says that the weights have not changed since the step began: the ratio is 1.
    """
    mask, current = _filled(rows.loss_mask), _current(method, rows, logprobs)
    token_loss = _policy(method, rows, current)
    policy = weighted_sum(token_loss, mask, _filled(rows.scale))
    total, token_kl, kl = policy, None, None
    if method.kl:
        token_kl, kl = _kl(method.kl, rows, current)
        total = total + _filled(rows.kl_coef).to(kl.dtype) * kl
    if method.entropy:
        total = total - _entropy_bonus(method.entropy, rows, mask, entropy)
    old_known = rows.old_logprobs is not None or not rows.moved
    metrics: dict[str, Any] = update(current, rows.ref_logprobs, entropy, old_known)
    metrics |= _clip_metrics(method, rows, current)
    if method.value:
        total = total + _value_loss(method.value, rows, mask, values, metrics)
    if method.credit:
        total = total + _credit_loss(method.credit, rows, mask, token_scores, metrics)
    if rows.rollout_logprobs is not None and not rows.moved and "policy/mismatch_kl" not in rows.metrics:
        metrics |= mismatch(logprobs.detach(), rows.rollout_logprobs, mask, rows.lag)
    if rows.token_weight is not None:
        metrics["policy/token_weight"] = mean_over(rows.token_weight.expand(mask.shape), mask)
    return LossOutput(total, metrics, select(mask, token_loss), policy, token_kl, kl)


# Once per step.


def _filtered(method: Method, batch: Batch) -> Batch:
    """Which rows and tokens are counted. Truncated rows and tokens that are too old are in no loss.

    The rows stay in the statistics of their group all the same.
    """
    batch = replace(batch, rewards=batch.rewards.double())
    raw = batch.totals
    judged = raw if batch.accuracy is None else batch.accuracy.double()
    kept = method.filter(batch, rewards=judged) if method.filter else torch.ones_like(batch.group, dtype=torch.bool)
    counted = kept & ~_filled(batch.truncated) if method.drop_truncated else kept
    mask = batch.mask & counted[:, None]
    if batch.max_age is not None and batch.lag is not None:
        mask = mask & (batch.lag <= batch.max_age)
    groups = Groups.of(batch.group, raw)
    rate = groups.spread(groups.mean(raw))
    batch = replace(batch, pass_rate=rate, positive=raw > 0, scored=~torch.isnan(raw))
    return replace(batch, kept=kept, count_mask=mask, loss_mask=mask)


def _with_channels(method: Method, batch: Batch, **current: Tensor) -> Batch:
    """Advantage channels from the shaped rewards; a group without a kept row is in no statistic of the step."""
    groups = Groups.of(batch.group, torch.where(_filled(batch.kept), 0.0, torch.nan))
    alive = groups.spread(groups.present)
    mask = _filled(batch.count_mask) if current else batch.mask

    # What a completion is compared with may be missing too: then it cannot be judged, and its peers can.
    for name in {"greedy_rewards", "baselines"} & set(method.advantage.inputs):
        alive = alive & ~torch.isnan(_filled(getattr(batch, name)))

    def estimate(rewards: Tensor) -> Any:
        rewards = torch.where(alive, rewards, torch.full_like(rewards, torch.nan))
        known = {"mask": mask, **_shaped(method, batch, rewards), **current}
        return method.advantage(batch, **known)

    if method.combine and batch.rewards.dim() == 2:
        components, weights = _with_extra(batch)
        result = method.combine(batch, components=components, component_weights=weights, estimate=estimate)
    else:
        result = estimate(batch.totals)
    reads_rewards = {"rewards", "token_rewards"} & set(method.advantage.inputs)
    scored = ~torch.isnan(batch.totals) & alive if reads_rewards else torch.ones_like(alive)
    member = batch.mask & scored[:, None]
    if isinstance(result, list):
        scale = batch.advantage_scale
        channels = [Channel(select(member, c.advantages) * scale, select(scored, c.weight)) for c in result]
        return replace(batch, channels=tuple(channels))
    if isinstance(result, WithReturns):
        # An unscorable row has no target: the critic is to stay where it is.
        targets = torch.where(member, result.returns, select(batch.mask, _filled(batch.values)).double())
        batch, result = replace(batch, returns=targets), result.advantages
    raw = select(member, _broadcast(result.detach().double(), member))
    white = _whitened(method, result, raw, scored, member) if method.whiten else raw
    white = white * batch.advantage_scale
    return replace(batch, channels=(Channel(white, torch.ones_like(white[:, 0])),))


def _with_extra(batch: Batch) -> tuple[Tensor, Tensor]:
    """Components and weights [B, R], with the extra reward in front where there is one.

    A row whose every component is missing has no extra one either: it must not be trained on that alone.
    """
    weights = batch.component_weights.expand(batch.rewards.shape)
    if batch.extra_reward is None:
        return batch.rewards, weights
    extra = torch.where(torch.isnan(batch.rewards).all(1), torch.nan, batch.extra_reward.double())
    share = torch.full_like(extra, batch.extra_weight)
    return torch.column_stack([extra, batch.rewards]), torch.column_stack([share, weights])


def _shaped(method: Method, batch: Batch, rewards: Tensor) -> dict[str, Tensor]:
    """Rewards [B] and token rewards [B, T] after shaping; without any, the outcome sits on the last valid token.

    A greedy completion's reward is shaped with the others, by what reads nothing else of a completion.
    """
    outcome = [part for part in method.shaping if "token_rewards" not in part.inputs]
    greedy = None if batch.greedy_rewards is None else batch.greedy_rewards.double()
    for part in outcome:
        rewards = part(batch, rewards=rewards)
        greedy = part(batch, rewards=greedy) if greedy is not None and part.inputs == ("rewards",) else greedy
    given = batch.token_rewards
    token_rewards = outcome_at_end(rewards, batch.mask) if given is None else given.double()
    for part in method.shaping[len(outcome) :]:
        token_rewards = part(batch, token_rewards=token_rewards)
    shaped = {"rewards": rewards, "token_rewards": token_rewards}
    return shaped if greedy is None else {**shaped, "greedy_rewards": greedy}


def _whitened(method: Method, result: Tensor, raw: Tensor, scored: Tensor, member: Tensor) -> Tensor:
    per_row = torch.where(scored, result, torch.zeros_like(result)) if result.dim() == 1 else None
    given = {"per_row": per_row, "per_token": raw, "scored": scored, "member": member}
    part = _filled(method.whiten)
    white = supply(part.function, {**given, **_options(part)})
    return select(member, _broadcast(white, member))


def _corrected(method: Method, batch: Batch, numerator: Tensor | None = None) -> Batch:
    """Correction weight and rejection, from the mask before rejection."""
    if not method.correction and not method.reject:
        return batch
    mask = _filled(batch.count_mask)
    numerator = batch.old_logprobs if method.numerator == "old" else numerator
    given = {"numerator_logprobs": numerator, "mask": mask}
    keep = mask
    for rule in method.reject:
        keep = keep & rule(batch, **given)
    counted = keep if method.denominator == "kept" else mask
    weight = method.correction(batch, **given) if method.correction else None
    share = mean_over(mask & ~keep, mask)
    metrics = {**batch.metrics, "policy/rejected": share} if method.reject else dict(batch.metrics)
    if weight is not None:
        metrics["policy/ess"] = effective_share(weight, mask)
    return replace(batch, correction_weight=weight, loss_mask=keep, count_mask=counted, metrics=metrics)


def _weighted(method: Method, batch: Batch, **current: Tensor) -> Batch:
    """The product of the token weights; before them, what companions of parts know of the whole minibatch."""
    weight = None
    whole = sum(c.advantages * c.weight[:, None] for c in batch.channels)
    for part in method.statistics:
        batch = replace(batch, **part(batch, mask=batch.loss_mask, advantages=whole, **current))
    for part in method.token_weight:
        factor = part(batch, mask=batch.loss_mask, advantages=whole, **current)
        weight = factor if weight is None else weight * factor
    return replace(batch, token_weight=weight)


def _step_metrics(batch: Batch) -> Metrics:
    kept = _filled(batch.kept)
    metrics = {"policy/filtered": mean_over(~kept, torch.ones_like(kept))}
    known = {"policy/entropy_coef": batch.entropy_coef, "policy/entropy_average": batch.entropy_average}
    known["policy/kl_coef"] = batch.adapted_kl_coef
    metrics |= {name: (torch.tensor(value), torch.tensor(1.0)) for name, value in known.items() if value is not None}
    if batch.channels:
        silent = torch.stack([(c.advantages == 0).all(1) | (c.weight == 0) for c in batch.channels]).all(0)
        metrics["policy/silent"] = mean_over(silent, kept)
    old, rollout = batch.old_logprobs, batch.rollout_logprobs
    # Where the engine's stand in for the old ones, the first update's own pass says how far they are apart.
    if old is not None and rollout is not None and old is not rollout:
        metrics |= mismatch(old, rollout, _filled(batch.count_mask), batch.lag)
    return metrics


# Once per micro-batch.


def _current(method: Method, rows: Batch, logprobs: Tensor) -> dict[str, Tensor]:
    """What surrogates and KL may read, safe at masked cells: 0 for log-probabilities, 1 for ratios."""
    mask = _filled(rows.loss_mask)
    logprobs = select(mask, logprobs)
    old = logprobs.detach() if rows.old_logprobs is None else select(mask, rows.old_logprobs).to(logprobs.dtype)
    anchor = old
    if method.reads_ratio and method.ratio.option("anchor") == "rollout":
        anchor = select(mask, _filled(rows.rollout_logprobs)).to(logprobs.dtype)
    delta = logprobs - anchor
    ratio = method.ratio(rows, delta=delta, mask=mask).exp()
    known = {"logprobs": logprobs, "old_logprobs": old, "anchor_logprobs": anchor, "delta": delta, "ratio": ratio}
    return {**known, "mask": mask}


def _policy(method: Method, rows: Batch, current: dict[str, Tensor]) -> Tensor:
    """Z [B, T] after all weights."""
    logprobs = current["logprobs"]
    correction = rows.correction_weight
    neutral = torch.ones_like(logprobs[:, :1]) if correction is None else correction
    loss = torch.zeros_like(logprobs)
    for channel in rows.channels:
        advantages = channel.advantages.to(logprobs.dtype)
        part = method.surrogate(rows, **current | {"advantages": advantages, "correction_weight": neutral})
        loss = loss + channel.weight[:, None].to(logprobs.dtype) * part
    # A surrogate that reads the correction applies it in its own way.
    used = None if "correction_weight" in method.surrogate.inputs else correction
    for factor in (rows.token_weight, used):
        if factor is not None:
            loss = loss * select(current["mask"], factor.expand(loss.shape)).to(loss.dtype)
    return loss


def _kl(part: Part, rows: Batch, current: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """KL per token [B, T] and aggregated []."""
    mask = current["mask"]
    anchor = current["old_logprobs"]
    if part.option("anchor") == "ref":
        anchor = select(mask, _filled(rows.ref_logprobs)).to(anchor.dtype)
    token_kl = select(mask, part(rows, **current | {"kl_anchor_logprobs": anchor}))
    return token_kl, weighted_sum(token_kl, mask, _filled(rows.kl_scale))


def _kl_coef(part: Part, batch: Batch) -> float:
    return part.option("coef") if batch.adapted_kl_coef is None else batch.adapted_kl_coef


def _entropy_bonus(part: Part, rows: Batch, mask: Tensor, entropy: Tensor | None) -> Tensor:
    coef = part.option("coef") if rows.entropy_coef is None else rows.entropy_coef
    return coef * weighted_sum(part(rows, entropy=entropy), mask, _filled(rows.mean_scale))


def _value_loss(part: Part, rows: Batch, mask: Tensor, values: Tensor | None, metrics: dict[str, Any]) -> Tensor:
    values = select(mask, _filled(values))
    old, returns = (select(mask, _filled(x)).to(values.dtype) for x in (rows.values, rows.returns))
    errors = part(rows, values=values, old_values=old, returns=returns)
    metrics["critic/loss"] = mean_over(errors, mask)
    metrics["critic/unexplained"] = mean_over((returns - values) ** 2, mask)
    metrics["critic/value"] = mean_over(values, mask)
    return part.option("coef") * weighted_sum(errors, mask, _filled(rows.value_scale))


def _credit_loss(part: Part, rows: Batch, mask: Tensor, scores: Tensor | None, metrics: dict[str, Any]) -> Tensor:
    """The rows' parts of the token reward model's loss; its scores are as often right as it is worth anything."""
    scores, scale, positive = select(mask, _filled(scores)), _filled(rows.row_scale), _filled(rows.positive)
    judged = scale > 0
    losses = select(judged, part(rows, token_scores=scores, outcomes=positive, mask=mask))
    metrics["token_reward_model/loss"] = mean_over(losses, judged)
    metrics["token_reward_model/accuracy"] = mean_over((scores.sum(1) > 0) == positive, judged)
    return (losses * scale.to(losses.dtype)).sum()


def _clip_metrics(method: Method, rows: Batch, current: dict[str, Tensor]) -> Metrics:
    region = bounds.get(method.surrogate.name)
    if region is None or not rows.channels:
        return {}
    strongest = rows.channels[0].advantages.to(current["logprobs"].dtype)
    lower, upper = supply(region, {**_options(method.surrogate), **current, "advantages": strongest})
    mask = current["mask"]
    return {"policy/clip_low": mean_over(lower, mask), "policy/clip_high": mean_over(upper, mask)}


def _options(part: Part) -> dict[str, Any]:
    """All options of a part, set or default."""
    return {name: part.option(name) for name in options_of(part.function)}


def _broadcast(values: Tensor, mask: Tensor) -> Tensor:
    return values if values.dim() == 2 else values[:, None].expand(mask.shape)


def _filled(value: Any) -> Any:
    """A field that an earlier stage must have filled."""
    if value is None:
        raise ValueError(
            "this batch has not been through `advantages` and `normalise`, or lacks a field in method.needs"
        )
    return value
