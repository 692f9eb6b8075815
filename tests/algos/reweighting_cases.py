"""How each method of the reweighting vectors is called: one adapter per method, `case -> outputs by name`.

An adapter only translates names; every number comes from the public functions. `Case` refuses to let a parameter go
unread.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from algos import (
    aepo,
    covariance,
    entropy_control,
    grpo_guard,
    preference,
    sample_weights,
    steer,
    step_credit,
    tw_grpo,
)
from algos.batch import select
from algos.masked import masked_mean, per_token
from algos.surrogates import ppo_clip

Outputs = dict[str, Any]
adapters: dict[str, Callable[[Case], Outputs]] = {}


class Case:
    """One vector case in one precision: inputs as tensors (floating ones are leaves), params as options."""

    def __init__(self, case: dict[str, Any], dtype: torch.dtype, junk: float | None = None) -> None:
        self.inputs, self.params, self.dtype = case["inputs"], case["params"], dtype
        self.read: set[str] = set()
        self.leaves: dict[str, Tensor] = {}
        self.junk = junk  # put into the masked cells of every floating input, to show that they do not matter

    def __call__(self, name: str) -> Tensor:
        if name not in self.leaves:
            tensor = torch.tensor(self.inputs[name])
            if tensor.is_floating_point():
                tensor = torch.tensor(self.inputs[name], dtype=self.dtype)
                tensor = self._with_junk(tensor).requires_grad_()
            self.leaves[name] = tensor
        return self.leaves[name]

    def _with_junk(self, tensor: Tensor) -> Tensor:
        if self.junk is None or "mask" not in self.inputs:
            return tensor
        mask = self.mask
        if tensor.shape[: mask.dim()] != mask.shape:
            return tensor
        return tensor.masked_fill(~mask.view(*mask.shape, *[1] * (tensor.dim() - mask.dim())), self.junk)

    @property
    def mask(self) -> Tensor:
        return torch.tensor(self.inputs["mask"]).bool()

    def option(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return self.params.get(name, default)

    def options(self, function: Callable[..., Any], **renamed: str) -> dict[str, Any]:
        """The params that are keyword-only arguments of `function`; `renamed` maps a param to an argument."""
        taken = {name for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
        chosen = {key: renamed.get(key, key) for key in self.params if renamed.get(key, key) in taken}
        self.read |= set(chosen)
        return {argument: self.params[key] for key, argument in chosen.items()}

    def call(self, function: Callable[..., Any], *args: Any, **renamed: str) -> Any:
        return function(*args, **self.options(function, **renamed))

    def clipped(self, advantage: Tensor, log_ratio: Tensor) -> Tensor:
        names = {"clip_low": "low", "clip_high": "high", "clip_c": "dual"}
        return self.call(ppo_clip, log_ratio.exp(), per_token(advantage, self.mask), **names)

    def log_ratio(self) -> Tensor:
        return select(self.mask, self("logp")) - select(self.mask, self("old_logp"))

    def with_grad(self, loss: Tensor, *names: str, **others: Any) -> Outputs:
        leaves = [self(name) for name in names]
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        filled = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
        return {"loss": loss, "grad": dict(zip(names, filled, strict=True)), **others}


def adapter(function: Callable[[Case], Outputs]) -> Callable[[Case], Outputs]:
    adapters[function.__name__.rstrip("_")] = function
    return function


def cells(mask: Tensor) -> list[list[int]]:
    return mask.nonzero().tolist()


def choice(case: Case, function: Callable[..., Any], inputs: list[str]) -> Outputs:
    return case.call(function, *map(case, inputs))


# --- entropy control, token weights, clip rules ---


@adapter
def steer_(case: Case) -> Outputs:
    mask = case.mask
    change = steer.entropy_change(*map(case, ["logp", "old_logp", "entropy", "advantage"]), mask)
    weight = case.call(steer.steer_weights, change, mask)
    bound = case.option("log_ratio_clamp", 20.0)
    loss = masked_mean(weight * case.clipped(case("advantage").detach(), case.log_ratio().clamp(-bound, bound)), mask)
    rate = case.call(steer.damping, change)
    return case.with_grad(loss, "logp", omega_abs=change, weight=weight, k=rate)


@adapter
def aepo_entropy_estimate(case: Case) -> Outputs:
    return {"entropy": aepo.entropy_estimate(case("logp"), case.mask)}


@adapter
def aepo_batch(case: Case) -> Outputs:
    entropy_now = case.inputs["entropy"]
    batch = case.call(aepo.mixed_batch, entropy_now, case("reg_advantage").detach(), case("grpo_advantage").detach())
    selected, kept = batch.selected.tolist(), batch.kept.tolist()
    return {
        "temperature": case.call(aepo.sampling_temperature, entropy_now),
        "selected": selected_rows(case),
        "n_reg": len(selected),
        "batch": [["reg", row] for row in selected] + [["grpo", row] for row in kept],
        "advantage": batch.advantages,
    }


def selected_rows(case: Case) -> list[int]:
    """S of the specification: every good row, before the number is cut."""
    good = aepo.good_rows(case("reg_advantage"), adv_threshold=case.option("adv_threshold"))
    return good.tolist()


@adapter
def aepo_mixed_advantage(case: Case) -> Outputs:
    now = case.inputs["entropy"]
    alpha = case.call(aepo.mixing_share, now, case("score"))
    args = [case(name) for name in ("score", "advantage", "logp_T", "logp_1")]
    mixed = case.call(aepo.mixed_advantage, alpha, *args, case.mask)
    return {"temperature": case.call(aepo.sampling_temperature, now), "alpha": alpha, "advantage": mixed}


@adapter
def grpo_guard_flow(case: Case) -> Outputs:
    def tensor(value: Any) -> Tensor:
        return torch.tensor(value, dtype=case.dtype)

    steps = [
        grpo_guard.FlowStep(tensor(s["x"]), tensor(s["mu"]), tensor(s["mu_old"]), s["dt"], s["sigma"])
        for s in case.inputs["steps"]
    ]
    ratios = [grpo_guard.flow_log_ratio(step) for step in steps]
    losses = torch.stack([case.call(grpo_guard.flow_step_loss, step, case("advantage")) for step in steps])
    raw, norm = (torch.stack(parts) for parts in zip(*ratios, strict=True))
    return {"log_ratio_raw": raw, "log_ratio_norm": norm, "step_loss": losses, "loss": losses.mean()}


@adapter
def grpo_guard_token(case: Case) -> Outputs:
    lp, old = case("logp"), case("old_logp")
    bucket = case.call(grpo_guard.position_buckets, case.mask)
    guard = case.call(grpo_guard.guard_statistics, lp, old, bucket)
    z = case.call(grpo_guard.guarded_log_ratio, lp, old, guard)
    loss = masked_mean(guard.of_tokens(guard.delta) * case.clipped(case("advantage").detach(), z), case.mask)
    per_bucket = dict(bucket_count=guard.counts, bucket_mean=guard.mean, bucket_scale=guard.scale, delta=guard.delta)
    return case.with_grad(loss, "logp", bucket=bucket, log_ratio_norm=z, **per_bucket)


@adapter
def tw_grpo_(case: Case) -> Outputs:
    mask = case.mask
    divergence = case.call(tw_grpo.group_divergence, case("logprobs"), mask)
    weight = case.call(tw_grpo.divergence_weights, divergence)
    clip = case.option("clip", 0.2)
    ratio = case.log_ratio().exp()
    token_loss = ppo_clip(ratio, per_token(case("advantage").detach(), mask), low=clip, high=clip)
    loss = masked_mean(weight.unsqueeze(1) * token_loss, mask)
    return case.with_grad(loss, "logp", divergence=divergence, weight=weight)


@adapter
def multi_choice_soft_reward(case: Case) -> Outputs:
    rows = zip(case.inputs["answer"], case.inputs["truth"], strict=True)
    return {"reward": [tw_grpo.multi_choice_soft_reward(answer, truth) for answer, truth in rows]}


@adapter
def entropy_sft(case: Case) -> Outputs:
    ce, h = case("ce"), case("entropy")
    kept = case.call(entropy_control.entropy_sft_tokens, ce, h, torch.ones_like(ce).bool())
    ratio = case.option("token_ratio", 0.8)
    out = case.with_grad(entropy_control.entropy_sft_loss(ce, kept), "ce", kept=kept.nonzero().flatten().tolist())
    out["score"] = case.call(entropy_control.entropy_sft_scores, ce, h)
    if (items := case.option("num_items")) is not None:
        out["loss_global"] = entropy_control.entropy_sft_loss(ce, kept, token_ratio=ratio, num_items=items)
    return out


@adapter
def tea_rl(case: Case) -> Outputs:
    coef = case.call(entropy_control.tea_coefficient, case("logp"), case("advantage"), case.mask)
    loss = entropy_control.tea_loss(case("entropy"), coef, case.mask)
    return case.with_grad(loss, "logp", "entropy", coef=coef, entropy_term=-loss)


COV = {"clip_cov_ratio": "fraction", "kl_cov_ratio": "fraction", "cov_lb": "cov_low", "cov_ub": "cov_high"}


@adapter
def clip_cov(case: Case) -> Outputs:
    mask, advantage = case.mask, case("advantage").detach()
    cov = covariance.covariance(case("logp"), advantage, mask)
    ratio = case.log_ratio().exp()
    bounds = {"clip_low": "low", "clip_high": "high"}
    clipped = case.call(covariance.ppo_clipped, ratio, per_token(advantage, mask), mask, **bounds)
    candidates = case.call(covariance.clip_cov_candidates, cov, clipped, mask, **COV)
    options = case.options(covariance.clip_cov_weights, **COV)
    order = torch.tensor(case.inputs["draw"], dtype=torch.int64)
    weight = covariance.clip_cov_weights(candidates, mask, order=order, **options)
    zeroed = cells((weight == 0) & mask)
    loss = masked_mean(weight * case.clipped(advantage, case.log_ratio()), mask)
    found = dict(cov=cov, ppo_clipped=cells(clipped), candidates=cells(candidates), zeroed=zeroed, n_zeroed=len(zeroed))
    return case.with_grad(loss, "logp", **found)


@adapter
def kl_cov(case: Case) -> Outputs:
    mask = case.mask
    cov = covariance.covariance(case("logp"), case("advantage"), mask)
    selected = case.call(covariance.kl_cov_tokens, cov, mask, **COV)
    lp, old = select(mask, case("logp")), select(mask, case("old_logp"))
    advantage = per_token(case("advantage").detach(), mask)
    loss = masked_mean(case.call(covariance.kl_cov, (lp - old).exp(), lp - old, advantage, selected, **COV), mask)
    return case.with_grad(loss, "logp", cov=cov, selected=cells(selected))


@adapter
def entropy_top_mask(case: Case) -> Outputs:
    keep = case.call(entropy_control.entropy_top, case("entropy"), case.mask)
    token_loss = case.clipped(case("advantage").detach(), case.log_ratio())
    full = masked_mean(select(keep, token_loss), case.mask)
    kept = {"k": int(keep.sum()), "keep_mask": keep.long(), "loss_full_denominator": full}
    return case.with_grad(masked_mean(token_loss, keep), "logp", **kept)


@adapter
def entropy_coef_controller(case: Case) -> Outputs:
    controller = entropy_control.EntropyCoefficient(
        **case.options(entropy_control.EntropyCoefficient, min="low", max="high")
    )
    coef, enabled, applied = [], [], []
    for now in case.inputs["entropy"]:
        applied.append(controller.update(now))
        coef.append(controller.value)
        enabled.append(int(controller.enabled))
    return {"coef": coef, "enabled": enabled, "applied": applied}


@adapter
def entropy_log_alpha(case: Case) -> Outputs:
    controller = entropy_control.LogEntropyCoefficient(**case.options(entropy_control.LogEntropyCoefficient))
    return {"alpha": [controller.update(now) for now in case.inputs["entropy"]]}


@adapter
def awm_lm(case: Case) -> Outputs:
    weight = case.call(step_credit.awm_weights, case("advantage"), case.mask)
    old = case("old_logp") if case.option("use_old", False) else None
    clip = case.option("clip")
    loss = masked_mean(step_credit.awm_loss(case("logp"), weight, case.mask, old_logprobs=old, clip=clip), case.mask)
    return case.with_grad(loss, "logp", token_weight=weight)


# --- sample weights and pairs ---


@adapter
def loss_weights(case: Case) -> Outputs:
    losses = case("loss")
    weight = case.call(sample_weights.loss_weights, losses, case.inputs["step"])
    score = case.call(sample_weights.loss_scores, losses)
    return {"score": score, "weight": weight, "objective": (weight * losses).sum()}


@adapter
def trajectory_weights(case: Case) -> Outputs:
    mode, options = case.option("mode"), case.options(sample_weights.trajectory_weights)
    if mode == "topk":
        options["temperature"] = None
    value = case("value") if mode == "advantage" else None
    score, whole, step = sample_weights.trajectory_weights(case("ret"), case("length"), value=value, **options)
    return {"score": score, "trajectory_prob": whole, "transition_prob": step}


@adapter
def group_trajectory_weights(case: Case) -> Outputs:
    value, score, prob = case.call(sample_weights.group_trajectory_weights, case("ret"), case("group"))
    return {"value": value, "score": score, "trajectory_prob": prob}


@adapter
def meta_rescale(case: Case) -> Outputs:
    omega, theta = case("omega"), case("theta")

    def squared(x: str, y: str) -> Callable[[Any], Tensor]:
        return lambda moved: 0.5 * (moved[0] * case(x) - case(y)) ** 2

    step = case.call(
        sample_weights.meta_rescale,
        lambda features: (features @ omega).sigmoid(),
        squared("x", "y"),
        squared("x_val", "y_val"),
        [theta],
        case("feat"),
        case("feat_val"),
    )
    return case.with_grad(step.objective, "omega", inner_weight=step.inner_weight, theta_prime=step.theta[0])


def pair_logprobs(case: Case) -> list[Tensor]:
    """The sums of a case, divided by the lengths if it asks for averages."""
    sides = [case(name) for name in ("logp_w", "logp_l", "ref_w", "ref_l")]
    if not case.option("length_average", False):
        return sides
    return [preference.length_average(x, case(f"len_{'wl'[i % 2]}")) for i, x in enumerate(sides)]


def pair_outputs(case: Case, per_pair: Tensor, **others: Any) -> Outputs:
    case.option("kind")
    return case.with_grad(per_pair.mean(), "logp_w", "logp_l", per_pair=per_pair, **others)


@adapter
def dpo(case: Case) -> Outputs:
    return pair_outputs(case, case.call(preference.dpo, preference.preference_margin(*pair_logprobs(case))))


@adapter
def ipo(case: Case) -> Outputs:
    return pair_outputs(case, case.call(preference.ipo, preference.preference_margin(*pair_logprobs(case))))


def averages(case: Case) -> list[Tensor]:
    return [preference.length_average(case(f"logp_{side}"), case(f"len_{side}")) for side in "wl"]


@adapter
def simpo(case: Case) -> Outputs:
    return pair_outputs(case, case.call(preference.simpo, *averages(case)))


@adapter
def redi(case: Case) -> Outputs:
    return pair_outputs(case, case.call(preference.redi, *averages(case)))


@adapter
def madpo(case: Case) -> Outputs:
    weights = case.call(preference.madpo_weights, case("margin"))
    per_pair = weights.weight * case.call(preference.dpo, preference.preference_margin(*pair_logprobs(case)))
    return pair_outputs(case, per_pair, **weights._asdict())


@adapter
def beta_dpo(case: Case) -> Outputs:
    rule = preference.BetaDPO(**case.options(preference.BetaDPO))
    rule.load_state_dict({"mean": case.inputs["gap_mean"], "std": case.inputs["gap_std"]})
    margin = preference.preference_margin(*pair_logprobs(case))
    rule.update(margin)
    selected = case("selected")
    beta = rule.batch_beta(margin, selected)
    out = pair_outputs(case, preference.dpo(margin[selected], beta=beta))
    size = rule.draw_size(len(margin))
    state = {"gap_mean": rule.mean, "gap_std": rule.std, "k": size, "beta_used": beta}
    return {**out, **state, "sample_weight": rule.sample_weight(margin)}


@adapter
def gradient_entanglement(case: Case) -> Outputs:
    found = case.call(preference.gradient_entanglement, case("grad_w"), case("grad_l"))._asdict()
    names = {"norm2_chosen": "norm2_w", "norm2_rejected": "norm2_l"}
    names |= {"chosen_change": "dlogp_w", "rejected_change": "dlogp_l"}
    return {names.get(name, name): value for name, value in found.items()}


@adapter
def drift_pairs(case: Case) -> Outputs:
    return {"pairs": case.call(preference.drift_pairs, case.inputs["records"])}


@adapter
def kl_dro(case: Case) -> Outputs:
    losses, names = case("loss"), {"lambda": "lambda_"}
    weight = case.call(sample_weights.kl_dro_weights, losses, **names)
    out = {"weight": weight, "objective": case.call(sample_weights.kl_dro_objective, losses, **names)}
    out["check"] = case.call(sample_weights.kl_dro_primal, losses, weight, **names)
    if "minibatches" in case.inputs:
        running = sample_weights.KlDroNormaliser(**case.options(sample_weights.KlDroNormaliser, **names))
        out["u"], out["minibatch_weight"] = [], []
        for batch in case.inputs["minibatches"]:
            out["minibatch_weight"].append(running.weights(torch.tensor(batch, dtype=case.dtype)))
            out["u"].append(running.u)
    return out


@adapter
def step_advantage(case: Case) -> Outputs:
    out: Outputs = {"advantage": [], "pit": [], "token_advantage": []}
    rows = zip(case.inputs["q"], case.inputs["step_tokens"], case.inputs["correct"], strict=True)
    for q, tokens, correct in rows:
        steps = step_credit.step_advantages(torch.tensor(q, dtype=case.dtype))
        pit = case.call(step_credit.find_pit, steps, correct)
        out["advantage"].append(steps)
        out["pit"].append(-1 if pit is None else pit)
        out["token_advantage"].append(step_credit.spread_over_tokens(steps, torch.tensor(tokens)))
    return out
