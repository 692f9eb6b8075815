"""How each kind of the objectives vectors is called: one adapter per kind, `case -> outputs by name`.

An adapter translates the vectors' vocabulary into a spec for `resolve`, or calls a public part directly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from algos.advantages import copo_prompt_statistics
from algos.aggregation import Counts, aggregations, weighted_sum
from algos.batch import Batch, select
from algos.corrections import corrections, loglinear, mismatch_ratio, rejections
from algos.coupled import drpo_objective
from algos.critic import outcome_at_end, squared, vtrace_targets
from algos.filters import filters
from algos.kl import in_loss
from algos.loss import advantages, late, loss, normalise
from algos.method import Method
from algos.methods import resolve
from algos.metrics import effective_share, mismatch
from algos.shaping import kl_sequence, kl_token, overlong_penalty
from algos.token_weights import outcome
from core.registry import options_of

adapters: dict[str, Callable[[Case], dict[str, Any]]] = {}

FIELDS = {
    **{"old": "old_logprobs", "rollout": "rollout_logprobs", "ref": "ref_logprobs", "entropy": "entropy"},
    **{"values": "values", "token_rewards": "token_rewards", "token_scores": "token_scores"},
    **{"sum_pi_sq": "sum_pi_sq", "advantages": "given_advantages", "greedy_reward": "greedy_rewards"},
    **{"bootstrap": "bootstrap", "versions": "versions"},
}


def adapter(function: Callable[[Case], dict[str, Any]]) -> Callable[[Case], dict[str, Any]]:
    adapters[function.__name__] = function
    return function


@dataclass
class Case:
    """A case in one precision; `junk` replaces masked cells."""

    raw: dict[str, Any]
    dtype: torch.dtype = torch.float64
    junk: float | None = None

    @property
    def config(self) -> dict[str, Any]:
        return self.raw["config"]

    def has(self, name: str) -> bool:
        return name in self.raw["inputs"]

    @property
    def mask(self) -> Tensor:
        return torch.tensor(self.raw["inputs"]["mask"]).bool()

    def tensor(self, name: str) -> Tensor:
        values = torch.tensor(numbers(self.raw["inputs"][name]), dtype=self.dtype)
        if self.junk is not None and values.dim() == 2 and self.has("mask") and values.shape == self.mask.shape:
            values = values.masked_fill(~self.mask, self.junk)
        return values

    def leaf(self, name: str) -> Tensor:
        return self.tensor(name).requires_grad_()

    def batch(self) -> Batch:
        inputs = self.raw["inputs"]
        mask = self.mask
        rewards = self.tensor("rewards") if self.has("rewards") else torch.zeros(len(mask), dtype=self.dtype)
        if self.has("rewards"):  # rewards have no masked cells, even where R equals T
            rewards = torch.tensor(numbers(inputs["rewards"]), dtype=torch.float64)
        fields = {field: self.tensor(name) for name, field in FIELDS.items() if self.has(name)}
        if self.has("truncated"):
            fields["truncated"] = torch.tensor(inputs["truncated"]).bool()
        if self.has("answers"):
            classes = sorted(set(inputs["answers"]))
            fields["answers"] = torch.tensor([classes.index(answer) for answer in inputs["answers"]])
        return Batch(mask=mask, group=torch.tensor(inputs["group"]), rewards=rewards, **fields)


def numbers(value: Any) -> Any:
    return [numbers(v) for v in value] if isinstance(value, list) else float(value)


# The vectors' vocabulary -> a spec.


def method_of(config: dict[str, Any]) -> Method:
    spec: dict[str, Any] = {"drop_truncated": bool(config.get("drop_truncated"))}
    spec |= advantage_spec(config["advantage"])
    ratio = dict(config.get("ratio", {}))
    spec["ratio"] = {ratio.pop("level", "token"): ratio}
    spec["surrogate"] = surrogate_spec(config.get("surrogate", {"rule": "reinforce"}))
    spec["token_weight"] = [named(weight) for weight in config.get("token_weight") or []]
    spec |= correction_spec(config.get("correction") or {})
    if config.get("kl"):
        spec["kl"] = {"in_loss": {"gradient": "naive", **config["kl"]}}
    spec |= aggregation_spec(config.get("aggregate", {"mode": "token-mean"}))
    return resolve(spec)


def named(config: dict[str, Any], key: str = "name") -> dict[str, Any]:
    options = dict(config)
    return {options.pop(key): options}


def advantage_spec(config: dict[str, Any]) -> dict[str, Any]:
    config = dict(config)
    spec: dict[str, Any] = {}
    whiten = config.pop("whiten", None)
    settings = {key: config.pop(f"whiten_{key}") for key in ("eps", "ddof") if f"whiten_{key}" in config}
    if whiten not in (None, "none"):
        spec["whiten"] = {whiten: settings}
    if coef := config.pop("kl_coef", 0.0):
        spec["shaping"] = [{"kl_token": {"coef": coef}}]
    if "lambda" in config:
        config["lam"] = config.pop("lambda")
    if config["name"] == "multi":
        combine = {key: config[key] for key in ("weights", "reduce") if key in config}
        return {**advantage_spec(config["inner"]), **spec, "combine": {"normalise_then_sum": combine}}
    if config["name"] == "bnpo":
        assert config.pop("degenerate", "flat") == "flat"
    if config["name"] == "oreal":
        assert config.pop("baseline") == "leave_one_out"
    return {**spec, "advantage": named(config)}


def surrogate_spec(config: dict[str, Any]) -> dict[str, Any]:
    config = dict(config)
    caps = [cap for cap in (config.pop("dual", None), config.pop("two_sided", None)) if cap is not None]
    return named({**config, **({"dual": min(caps)} if caps else {})}, "rule")


def bounded(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


def correction_spec(config: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = {key: config[key] for key in ("numerator", "denominator") if key in config}
    if config.get("weight"):
        spec["correction"] = named({"high": None, "low": None, **config["weight"]}, "mode")
    spec["reject"] = [named(bounded(rule), "stat") for rule in config.get("reject") or []]
    return spec


def aggregation_spec(config: dict[str, Any]) -> dict[str, Any]:
    mode = config["mode"].replace("-", "_")
    known = {k: v for k, v in config.items() if k in options_of(aggregations[mode]) and v is not None}
    spec: dict[str, Any] = {"aggregation": {mode: known}}
    if config.get("partition"):
        factors = {key: config[key] for key in ("pos_factor", "neg_factor") if key in config}
        spec["partition"] = {config["partition"]: factors}
    return spec


# Whole objectives and advantages.


def channels(batch: Batch) -> dict[str, Any]:
    if len(batch.channels) == 1:
        return {"advantages": batch.channels[0].advantages}
    return {"channels": [{"advantages": c.advantages, "weight": c.weight} for c in batch.channels]}


@adapter
def advantage(case: Case) -> dict[str, Any]:
    batch = case.batch()
    out = channels(advantages(method_of({"advantage": case.config}), batch))
    if batch.answers is not None:
        discount = {"consistency_discount": case.config["consistency_discount"]}
        statistics = copo_prompt_statistics(batch.rewards, batch.group, batch.answers, **discount)
        out["answer_entropy_bits"], out["prompt_reward"] = statistics
    return out


@adapter
def objective(case: Case) -> dict[str, Any]:
    method, logprobs = method_of(case.config), case.leaf("logp")
    batch = advantages(method, case.batch())
    batch = late(method, batch, logprobs) if "late" in method.needs else normalise(method, batch)
    parts = [loss(method, batch.rows(index), logprobs[index]) for index in (slice(0, 3), slice(3, None))]
    whole = loss(method, batch, logprobs)
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    whole.loss.backward()
    mask = batch.mask
    out = channels(batch) | {"loss": whole.loss, "loss_pg": whole.policy, "token_loss": whole.token_loss}
    out |= {"grad_logp": logprobs.grad, "effective_mask": batch.loss_mask}
    optional = {"token_kl": whole.token_kl, "loss_kl": whole.kl, "token_weight": batch.token_weight}
    out |= {name: value for name, value in optional.items() if value is not None}
    if batch.correction_weight is not None:
        out["correction_weight"] = batch.correction_weight.expand(mask.shape)
    if batch.token_scores is not None:
        out["token_reward_model_loss"] = (outcome(batch.token_scores, batch.positive, mask) * batch.row_scale).sum()
    return out


@adapter
def group_coupled(case: Case) -> dict[str, Any]:
    config, logprobs = case.config, case.leaf("logp")
    own = {key: config[key] for key in ("tau", "length_lambda", "max_length")}
    estimator = {"kl": "k1", "low_var_kl": "k3"}[config["kl_type"]]
    penalty = {"coef": config["beta"], "hinge": config["delta"], "estimator": estimator}
    method = resolve({"row": "drpo", "advantage": {"drpo": own}, "kl": {"in_loss": penalty}})
    batch = late(method, advantages(method, case.batch()), logprobs)
    output = loss(method, batch, logprobs)
    output.loss.backward()
    value = drpo_objective(logprobs, batch.rewards, batch.group, batch.mask, **own)
    share = batch.mask.any(1).sum()
    per_row = select(batch.mask, batch.channels[0].advantages).sum(1) / batch.lengths.clamp(min=1)
    return {
        "loss": -value + batch.kl_coef * output.kl,
        "objective": value,
        "kl": output.kl,
        "kl_coef": batch.kl_coef,
        "equivalent_advantage": per_row / share,
        "grad_logp": logprobs.grad,
    }


# Pieces.


@adapter
def value_loss(case: Case) -> dict[str, Any]:
    mask, values = case.mask, case.leaf("values")
    old, returns = (select(mask, case.tensor(name)) for name in ("old_values", "returns"))
    errors = squared(select(mask, values), old, returns, clip=case.config["clip"])
    mode = named({k: v for k, v in case.config["aggregate"].items()}, "mode")
    ((name, options),) = mode.items()
    total = weighted_sum(errors, mask, scale(name, options, Counts.of(mask, torch.arange(len(mask)))))
    total.backward()
    return {"token_loss": select(mask, errors), "loss": total, "grad_values": values.grad}


@adapter
def vtrace(case: Case) -> dict[str, Any]:
    config, mask = case.config, case.mask
    log_ratio = case.tensor("logp") - case.tensor("old")
    names = {"gamma": "gamma", "lam": "lambda", "rho_bar": "rho_bar", "c_bar": "c_bar", "pg_rho_bar": "pg_rho_bar"}
    options = {ours: config[theirs] for ours, theirs in names.items() if theirs in config}
    bootstrap = case.tensor("bootstrap") if case.has("bootstrap") else torch.zeros(len(mask), dtype=case.dtype)
    given = (case.tensor("token_rewards"), case.tensor("values"), bootstrap, mask)
    targets, advantage = vtrace_targets(log_ratio, *given, **options)
    return {"vs": targets, "advantages": advantage}


@adapter
def kl(case: Case) -> dict[str, Any]:
    mask, logprobs = case.mask, case.leaf("logp")
    options = {k: v for k, v in case.config.items() if k != "coef"}
    anchors = (select(mask, case.tensor(name)) for name in ("ref", "old"))
    token_kl = select(mask, in_loss(select(mask, logprobs), *anchors, **options))
    token_kl.sum().backward()
    return {"token_kl": token_kl, "grad_of_sum": logprobs.grad}


def scale(mode: str, options: dict[str, Any], counts: Counts) -> Tensor:
    function = aggregations[mode.replace("-", "_")]
    return function(counts, **{k: v for k, v in options.items() if k in options_of(function) and v is not None})


@adapter
def aggregate(case: Case) -> dict[str, Any]:
    mask, matrix = case.mask, case.leaf("matrix")
    group = torch.tensor(case.raw["inputs"]["group"])
    weights = scale(case.config["mode"], case.config, Counts.of(mask, group))
    if case.config.get("partition"):
        spec = aggregation_spec(case.config)
        batch = replace(advantages(resolve(spec), case.batch()), old_logprobs=matrix.detach())
        weights = normalise(resolve(spec), batch).scale
    total = weighted_sum(matrix, mask, weights)
    total.backward()
    return {"loss": total, "grad_matrix": matrix.grad}


@adapter
def aggregate_split(case: Case) -> dict[str, Any]:
    config, mask, matrix = case.config, case.mask, case.tensor("matrix")
    group = torch.tensor(case.raw["inputs"]["group"])
    known = {"tokens": config["global_tokens"], "valid": config["global_rows"], "all": config["global_rows"]}
    counts = replace(Counts.of(mask, group), **{k: torch.tensor(float(v)).double() for k, v in known.items()})
    weights, cut = scale(config["mode"], config, counts), config["split_at"]
    parts = [weighted_sum(matrix[i], mask[i], weights[i]) for i in (slice(0, cut), slice(cut, None))]
    return {"parts": torch.stack(parts), "loss": sum(parts)}


@adapter
def correction_weight(case: Case) -> dict[str, Any]:
    options = dict(case.config)
    mode, mask = options.pop("mode"), case.mask
    given = (case.tensor("logp" if options.pop("numerator", "old") == "logp" else "old"), case.tensor("rollout"), mask)
    weight, raw = corrections[mode](*given, **options), mismatch_ratio(*given, options["level"])
    return {"weight": weight.expand(mask.shape), "raw": raw.expand(mask.shape)}


@adapter
def reject(case: Case) -> dict[str, Any]:
    keep = case.mask
    for rule in case.config["rules"]:
        ((name, options),) = named(bounded(rule), "stat").items()
        keep = keep & rejections[name](case.tensor("old"), case.tensor("rollout"), case.mask, **options)
    return {"mask": keep}


@adapter
def reject_m2(case: Case) -> dict[str, Any]:
    given = (case.tensor("old"), case.tensor("rollout"), case.mask)
    return {"mask": rejections["m2"](*given, threshold=case.config["threshold"])}


@adapter
def offpolicy_metrics(case: Case) -> dict[str, Any]:
    old, rollout, mask = case.tensor("old"), case.tensor("rollout"), case.mask
    weight = None
    if case.config.get("weight"):
        ((mode, options),) = named(case.config["weight"], "mode").items()
        weight = corrections[mode](old, rollout, mask, **options)
    found = mismatch(old, rollout, mask) | ({} if weight is None else {"policy/ess": effective_share(weight, mask)})
    pairs = {name: total / count for name, (total, count) in found.items()}
    names = {
        **{"kl_rollout_train_k1": "mismatch_k1", "kl_rollout_train_k3": "mismatch_kl"},
        **{"train_ppl": "old_perplexity", "rollout_ppl": "rollout_perplexity", "chi2_token": "chi2_token"},
        **{"chi2_sequence": "chi2_sequence", "effective_sample_fraction": "ess"},
    }
    return {theirs: pairs[f"policy/{ours}"] for theirs, ours in names.items() if f"policy/{ours}" in pairs}


@adapter
def proximal_loglinear(case: Case) -> dict[str, Any]:
    versions = torch.tensor(case.raw["inputs"]["versions"])
    given = (case.tensor("logp"), case.tensor("rollout"), versions, case.config["current_version"])
    return {"proximal": loglinear(*given)}


@adapter
def overlong(case: Case) -> dict[str, Any]:
    return {"penalty": overlong_penalty(case.tensor("lengths"), **case.config)}


@adapter
def kl_in_reward(case: Case) -> dict[str, Any]:
    config, mask, rewards = case.config, case.mask, case.tensor("rewards")
    given = (case.tensor("old"), case.tensor("ref"), mask)
    options = {"coef": config["kl_coef"], "estimator": config.get("estimator", "k1")}
    if config["level"] == "token":
        return {"token_rewards": kl_token(outcome_at_end(rewards, mask), *given, **options)}
    penalty = kl_sequence(torch.zeros_like(rewards), *given, **{**options, "coef": 1.0})
    return {"rewards": kl_sequence(rewards, *given, **options), "kl": -penalty}


@adapter
def filter(case: Case) -> dict[str, Any]:
    options = dict(case.config)
    rewards, rule = case.tensor("rewards"), options.pop("rule")
    if rule == "none":
        return {"keep": torch.ones_like(rewards)}
    known = {name: value for name, value in options.items() if name in options_of(filters[rule])}
    return {"keep": filters[rule](rewards, torch.tensor(case.raw["inputs"]["group"]), **known)}
