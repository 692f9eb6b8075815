"""Combinations of parts that make no sense. Each check gives the reason and the way out, or None."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from algos import coupled, pairs
from algos.advantages import nft
from algos.aggregation import aggregations
from algos.covariance import clip_cov
from algos.grpo_guard import grpo_guard, grpo_guard_weight
from algos.memory import fills
from algos.method import Method
from algos.sample_weights import by_loss, by_worst_case
from algos.surrogates import ppo_clip, reinforce
from core.errors import UserError, nearest
from core.registry import options_of

Check = Callable[[Method], str | None]


def check(method: Method, where: str) -> Method:
    """The method itself; raises UserError with the reason if it makes no sense."""
    for test in CHECKS:
        if reason := test(method):
            raise UserError(f"{where}: {reason}")
    return method


def _dual_above_clip(m: Method) -> str | None:
    dual, high = m.surrogate.option("dual"), m.surrogate.option("high")
    if dual is not None and high is not None and dual <= 1 + high:
        return f"surrogate dual {dual:g} must exceed 1 + high = {1 + high:g}, or it would cut into the clip range"
    return None


def _kl_once(m: Method) -> str | None:
    if m.kl and any("ref_logprobs" in part.inputs for part in m.shaping):
        return "KL is in the reward (shaping) and in the loss (kl), which counts it twice; set one of them to none"
    return None


def _token_rewards_are_read(m: Method) -> str | None:
    per_token = ["token_rewards" in part.inputs for part in m.shaping]
    if any(per_token) and "token_rewards" not in m.advantage.inputs:
        return (
            f"shaping kl_token makes token rewards, which advantage {m.advantage.name} does not read; use kl_sequence"
        )
    if sorted(per_token) != per_token:
        return "shaping of token rewards (kl_token) must come after shaping of rewards"
    return None


def _components_are_plain(m: Method) -> str | None:
    apart = m.combine is not None and m.combine.option("reduce") is not None
    if apart and (m.shaping or "rewards" not in m.advantage.inputs or _per_token(m)):
        return "combine normalise_then_sum takes one outcome advantage per component: no shaping, no token rewards"
    return None


def _binary_rewards_stay_binary(m: Method) -> str | None:
    if "pass_rate" in m.surrogate.inputs and (m.advantage.function is not nft or m.shaping):
        return f"surrogate {m.surrogate.name} needs rewards of 0 and 1: advantage nft, and no shaping"
    return None


def _bypass_has_no_weight(m: Method) -> str | None:
    if m.reads_ratio and m.ratio.option("anchor") == "rollout" and m.correction:
        return "the ratio to the rollout policy already is the correction; set correction to none, or the anchor to old"
    return None


def _late_old_is_not_early(m: Method) -> str | None:
    if m.proximal and any("old_logprobs" in part.inputs for part in (*m.shaping, m.advantage)):
        return "proximal replaces the old policy's forward pass, but shaping or the advantage reads it before the loss"
    return None


def _known_kl_mode(m: Method) -> str | None:
    mode = m.kl.option("mode") if m.kl else None
    plain = [n for n, f in aggregations.items() if all(p.default is not p.empty for p in options_of(f).values())]
    return None if mode is None or mode in plain else f"kl mode '{mode}': {nearest(str(mode), plain)}"


def _rows_whiten_rows(m: Method) -> str | None:
    if m.whiten and "per_row" in m.whiten.inputs and (_per_token(m) or "given_advantages" in m.advantage.inputs):
        return f"whiten {m.whiten.name} needs one advantage per row, {m.advantage.name} gives one per token; use token"
    return None


def _late_advantages_stay_raw(m: Method) -> str | None:
    if m.late_advantage and (m.whiten or m.combine):
        return f"advantage {m.advantage.name} is computed late: whiten and combine do not apply"
    return None


def _a_critic_has_targets(m: Method) -> str | None:
    gives = "WithReturns" in str(inspect.signature(m.advantage.function).return_annotation)
    if m.value and not gives:
        return f"value trains a critic, for which advantage {m.advantage.name} has no targets; use gae or vtrace"
    return None


def _a_token_reward_model_is_read(m: Method) -> str | None:
    if m.credit and not any("token_scores" in part.inputs for part in m.token_weight):
        return "credit trains a token reward model that nothing reads; add token_weight: [oreal], or leave it out"
    return None


def _what_a_memory_fills_is_read(m: Method) -> str | None:
    filled = [field for part in m.memory for field in fills[part.name]]
    if twice := {field for field in filled if filled.count(field) > 1}:
        return f"two memories fill {', '.join(sorted(twice))}; keep one of {', '.join(p.name for p in m.memory)}"
    if "entropy_coef" in filled and m.entropy is None:
        return "the memory adapts the coefficient of an entropy term that is none; set entropy: bonus"
    if "adapted_kl_coef" in filled and (m.kl is None or m.hinged):
        return "memory adaptive_kl adapts the coefficient of a KL term that is none or has a hinge; set kl: {coef: 0.1}"
    tempered = "tempered_logprobs" in m.advantage.inputs
    if tempered != ("tempering" in filled):
        return "advantage aepo and memory entropy_level go together; set both or none"
    return None


def _one_channel_is_whitened(m: Method) -> str | None:
    several = "Channel" in str(inspect.signature(m.advantage.function).return_annotation)
    if several and (m.whiten or m.combine):
        return f"advantage {m.advantage.name} gives several channels: whiten and combine do not apply"
    return None


def _per_token(m: Method) -> bool:
    """The advantage has one number per token: such estimators need to know which tokens there are."""
    return "mask" in m.advantage.inputs and not m.late_advantage


def _given_completions_bring_no_rollout(m: Method) -> str | None:
    if m.data == "rollouts":
        return None
    missing = sorted(m.needs & {"rollout", "versions", "greedy", "components", "answers", "tempered"})
    if missing:
        return f"data {m.data} has no {', '.join(missing)}, which a part of this method reads; leave that part out"
    if m.filter:
        return f"data {m.data} has no rewards that filter {m.filter.name} could judge; set filter: none"
    if m.data == "demonstrations" and {"rewards", "token_rewards", "totals"} & set(m.advantage.inputs):
        return f"demonstrations have no rewards, which advantage {m.advantage.name} reads; use demonstration"
    return None


def _regressions_keep_their_gradient(m: Method) -> str | None:
    if (mode := REGRESSIONS.get(m.advantage.function)) is None:
        return None
    if m.surrogate.function is not reinforce or m.aggregation.name != mode:
        return (
            f"advantage {m.advantage.name} has the gradient of its loss under surrogate reinforce and aggregation "
            f"{mode}; leave both as they are"
        )
    if (m.data == "preferences") != (m.advantage.function.__module__ == pairs.__name__):
        return f"advantage {m.advantage.name} does not go with data {m.data}; pairs are data preferences"
    return None


# Late advantages that stand for a loss of whole groups -> the aggregation under which the gradient is that loss's.
REGRESSIONS: dict[Callable[..., Any], str] = {
    **{f: "seq_mean_token_sum" for f in (pairs.dpo, pairs.ipo, pairs.simpo, pairs.redi, coupled.gvpo, coupled.a_star)},
    **{f: "seq_mean_token_mean" for f in (coupled.drpo, coupled.flow_rl)},
}


def _losses_weigh_demonstrations(m: Method) -> str | None:
    weighing = [part.name for part in m.token_weight if part.function in (by_loss, by_worst_case)]
    if weighing and m.data != "demonstrations":
        return (
            f"token_weight {weighing[0]} weighs completions by their loss, which says something of demonstrations "
            "only; set data: demonstrations, or leave it out"
        )
    return None


def _covariance_rules_exclude_each_other(m: Method) -> str | None:
    sparing = next((part for part in m.token_weight if part.function is clip_cov), None)
    if sparing is None:
        return None
    if m.surrogate.function is not ppo_clip:
        return f"token_weight clip_cov spares what ppo_clip clips; the surrogate is {m.surrogate.name}"
    bounds = [[part.option(name) for name in ("low", "high")] for part in (sparing, m.surrogate)]
    if bounds[0] != bounds[1]:
        return f"token_weight clip_cov has low, high {bounds[0]}, surrogate ppo_clip {bounds[1]}; give both the same"
    return None


def _guard_weight_has_its_ratio(m: Method) -> str | None:
    if any(part.function is grpo_guard_weight for part in m.token_weight) and m.ratio.function is not grpo_guard:
        return f"token_weight grpo_guard_weight goes with ratio grpo_guard, not with {m.ratio.name}"
    return None


CHECKS: tuple[Check, ...] = (
    _dual_above_clip,
    _kl_once,
    _token_rewards_are_read,
    _components_are_plain,
    _binary_rewards_stay_binary,
    _bypass_has_no_weight,
    _late_old_is_not_early,
    _known_kl_mode,
    _rows_whiten_rows,
    _late_advantages_stay_raw,
    _a_critic_has_targets,
    _a_token_reward_model_is_read,
    _what_a_memory_fills_is_read,
    _one_channel_is_whitened,
    _given_completions_bring_no_rollout,
    _regressions_keep_their_gradient,
    _losses_weigh_demonstrations,
    _covariance_rules_exclude_each_other,
    _guard_weight_has_its_ratio,
)
