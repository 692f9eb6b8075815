"""Adapters of the vectors for hybrids with demonstrations, edits of data and optimisers (see reweighting_cases.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from algos import compression, data_edits, demonstrations, merging, prefix
from algos.masked import masked_mean
from learner.spam import Spam, StableSpam
from tests.algos.reweighting_cases import Case, Outputs, adapter, cells


@adapter
def relift_buffer(case: Case) -> Outputs:
    buffer = demonstrations.FailureBuffer(**case.options(demonstrations.FailureBuffer))
    steps = []
    for step in case.inputs["steps"]:
        added, due = buffer.update(step["uid"], step["rewards"])
        steps.append({"added": added, "sft": due, "buffer": list(buffer.waiting)})
    return {"steps": steps}


@adapter
def relift_sft_loss(case: Case) -> Outputs:
    loss = case.call(demonstrations.relift_sft_loss, case("logp"), case("entropy"), case.mask)
    return case.with_grad(loss, "logp", "entropy")


@adapter
def prefix_schedule(case: Case) -> Outputs:
    return {"value": [case.call(prefix.prefix_schedule, step) for step in case.inputs["step"]]}


@adapter
def prefix_length(case: Case) -> Outputs:
    rows = zip(*(case.inputs[name] for name in ("demo_len", "beta_draw", "low", "high")), strict=True)
    options = case.options(prefix.prefix_length)
    return {"prefix_len": [prefix.prefix_length(n, u, low=low, high=high, **options) for n, u, low, high in rows]}


@adapter
def prefix_advantage(case: Case) -> Outputs:
    case.option("rollouts_per_prefix")  # counted from the rows themselves
    args = [case(name).detach() for name in ("score", "group", "prefix_id", "prefix_len")]
    return {"advantage": case.call(prefix.prefix_advantages, *args, case.mask)}


@adapter
def prefix_entropy_reshape(case: Case) -> Outputs:
    mask = case("prefix_mask").bool()
    advantage, dropped = case.call(prefix.keep_uncertain_prefix, case("advantage").detach(), case("entropy"), mask)
    return {"advantage": advantage, "dropped": cells(dropped)}


@adapter
def expo_mix(case: Case) -> Outputs:
    coefficient = case.call(demonstrations.expo_coefficient, case.inputs["step"])
    explanations = [torch.tensor(row, dtype=case.dtype) for row in case.inputs["expl_logp"]]
    threshold = case.option("fail_threshold", 0.0)
    rewards = case("group_rewards")
    mixed = demonstrations.expo_mix(
        case("pg_loss"), rewards, explanations, coefficient=coefficient, fail_threshold=threshold
    )
    return {"coef": coefficient, "used": mixed.used.long(), "sft_loss": mixed.sft_loss, "loss": mixed.loss}


@adapter
def superhf_filter(case: Case) -> Outputs:
    return {"kept": case.call(demonstrations.superhf_filter, case("reward"), case("length"))}


@adapter
def superhf_loss(case: Case) -> Outputs:
    found = case.call(demonstrations.superhf_loss, case("label"), case("logprobs"), case("ref_logprobs"))
    return case.with_grad(found.loss, "logprobs", ce=found.ce, kl=found.kl)


@adapter
def luffy(case: Case) -> Outputs:
    off = case("off_mask").bool()
    mask = case.mask
    rows = (off & mask).any(-1)
    advantage = case.call(demonstrations.luffy_advantages, case("reward").detach(), case("group"), rows)
    args = [case("logp"), case("old_logp"), advantage, mask, off]
    token_loss = case.call(demonstrations.luffy_loss, *args)
    constant = case.option("constant")
    loss = token_loss.sum() / constant if case.option("aggregate") == "constant" else masked_mean(token_loss, mask)
    return case.with_grad(loss, "logp", advantage=advantage)


@adapter
def thought_dropout(case: Case) -> Outputs:
    rows = zip(case.inputs["text"], case.inputs["u"], strict=True)
    return {"text": [case.call(data_edits.thought_dropout, text, u) for text, u in rows]}


@adapter
def masked_thought(case: Case) -> Outputs:
    rates = [case.call(data_edits.masking_rate, step) for step in case.inputs["step"]]
    rate = torch.tensor(rates, dtype=torch.float64).unsqueeze(1)
    ids, labels, draw = case("input_ids"), case("labels"), torch.tensor(case.inputs["u"], dtype=torch.float64)
    edited, _ = case.call(data_edits.masked_thought, ids, labels, draw, rate)
    return {"p": rates, "input_ids": edited, "labels": labels}


@adapter
def bai_merge(case: Case) -> Outputs:
    def model(named: dict[str, Any]) -> dict[str, Tensor]:
        return {name: torch.tensor(values, dtype=case.dtype) for name, values in named.items()}

    base, tuned = model(case.inputs["base"]), [model(named) for named in case.inputs["finetuned"]]
    weights = case.option("weights")
    merged = merging.bai_merge(base, tuned, alpha=case.option("alpha", 0.1), weights=weights)
    return {"stage1": merging.average_models(tuned, weights), "merged": merged}


@adapter
def void_turn_filter(case: Case) -> Outputs:
    keeps, masks = [], []
    for trajectory in case.inputs["trajectories"]:
        turns = [data_edits.Turn(t["text"], t["n_model_tokens"], t["n_tool_tokens"]) for t in trajectory["turns"]]
        keep, mask = case.call(data_edits.void_turn_mask, turns, trajectory["truncated"])
        keeps.append(int(keep))
        masks.append(mask.long())
    return {"keep": keeps, "loss_mask": masks}


@adapter
def traac_difficulty(case: Case) -> Outputs:
    return {"difficulty": [case.call(compression.difficulty, row) for row in case.inputs["correct"]]}


@adapter
def traac_evict(case: Case) -> Outputs:
    rows = zip(case.inputs["step_score"], case.inputs["difficulty"], strict=True)
    return {"rows": [case.call(compression.evict_steps, scores, band)._asdict() for scores, band in rows]}


@adapter
def traac_length_reward(case: Case) -> Outputs:
    rows = zip(*(case.inputs[name] for name in ("length", "correct", "difficulty")), strict=True)
    history = case.inputs["history"]
    return {
        "reward": [
            case.call(compression.length_reward, length, correct, band, history.get(band, []))
            for length, correct, band in rows
        ]
    }


def optimiser_trace(case: Case, optimiser: Spam | StableSpam, p: torch.nn.Parameter) -> Outputs:
    trace = []
    for gradient in case.inputs["grads"]:
        p.grad = torch.tensor(gradient, dtype=case.dtype)
        optimiser.step()
        state, seen = optimiser.state[p], optimiser.last.get(p, {})
        if isinstance(optimiser, Spam):
            scale = optimiser.metrics()["optim/spam_scale"]
            numbers = {"scale": scale, "clipped": int(optimiser.metrics()["optim/spam_clipped"])}
        else:
            numbers = {"cap": seen["cap"], "norm_target": seen.get("target")}
        trace.append({"p": p.detach().clone(), **numbers})
    return {"trace": trace, "m": state["m"], "v": state["v"]}


@adapter
def spam(case: Case) -> Outputs:
    p = torch.nn.Parameter(torch.tensor(case.inputs["p"], dtype=case.dtype))
    betas = (case.option("beta1", 0.9), case.option("beta2", 0.999))
    return optimiser_trace(case, Spam([p], betas=betas, **case.options(Spam)), p)


@adapter
def stable_spam(case: Case) -> Outputs:
    p = torch.nn.Parameter(torch.tensor(case.inputs["p"], dtype=case.dtype))
    betas = (case.option("beta1", 0.9), case.option("beta2", 0.999))
    gammas = (case.option("gamma1", 0.7), case.option("gamma2", 0.9), case.option("gamma3", 0.999))
    return optimiser_trace(case, StableSpam([p], betas=betas, gammas=gammas, **case.options(StableSpam)), p)
