"""How each function of the reward vectors is called: one adapter per `fn`, `case -> outputs by name`.

An adapter translates the vectors' words and calls the public pieces. Sequences go through `Case.steps`, which can save
the part before one of the steps, send its state through JSON, and go on with a fresh part.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from rewards.constrained import AdaptiveKl, Kind, Multipliers, constraint_columns
from rewards.constrained import mix_constrained as mixed
from rewards.diagnostics import diagnostics as report
from rewards.diagnostics import gao_fit as fit
from rewards.diagnostics import overoptimization as alarm
from rewards.dynamic import FrontProgress, influence, pareto_front
from rewards.dynamic import hypervolume as volume
from rewards.ensemble import best_of_n, best_of_n_kl, combine
from rewards.mixing import StepBatch, compose, in_order, soft_min, tchebycheff, weighted_sum
from rewards.mixing import normalize_then_sum as normalize_first
from rewards.mixing import sum_then_normalize as sum_first
from rewards.neighbours import variation
from rewards.policies import build
from rewards.process import collapse
from rewards.process import process_advantages as token_advantages
from rewards.recap import Recap
from rewards.shaping import Context, chain
from rewards.sources import ScaleBio, alignment, mixers, scalebio_gradient
from rewards.sources import dreamprm_weights as positive_weights
from rewards.threshold_search import NelderMead
from rewards.threshold_search import proxy_point as proxy
from rewards.trust import trust
from rewards.uncertainty import uncertainty

Outputs = dict[str, Any]
adapters: dict[str, Callable[[Case], Outputs]] = {}


def adapter(function: Callable[[Case], Outputs]) -> Callable[[Case], Outputs]:
    adapters[function.__name__] = function
    return function


@dataclass
class Case:
    """A case; `cut`: the step of a sequence before which state goes through JSON into a fresh part."""

    raw: dict[str, Any]
    cut: int | None = None

    @property
    def params(self) -> dict[str, Any]:
        return self.raw["params"]

    @property
    def inputs(self) -> dict[str, Any]:
        return self.raw["inputs"]

    def array(self, name: str) -> Any:
        return numbers(self.inputs[name])

    @property
    def group(self) -> Any:
        return np.array(self.inputs["groups"])

    def some(self, *names: str) -> dict[str, Any]:
        """Those of the parameters that the case has."""
        return {name: self.params[name] for name in names if name in self.params}

    def steps(self, make: Callable[[], Any], rows: Any) -> Iterator[tuple[Any, Any]]:
        """(part, row) for each row, the part being resumed from its saved state before step `cut`."""
        part = make()
        for index, row in enumerate(rows):
            if index == self.cut:
                part = resumed(part, make)
            yield part, row
        self.last = part


def resumed(part: Any, make: Callable[[], Any]) -> Any:
    fresh = make()
    fresh.load_state_dict(json.loads(json.dumps(part.state_dict(), allow_nan=False)))
    return fresh


def numbers(value: Any) -> Any:
    """float64, with null as NaN and "inf" as infinity."""
    if isinstance(value, list):
        return np.array([numbers(v) for v in value])
    return math.nan if value is None else float(value)


def named(values: Any, names: list[str] | None = None) -> dict[str, float]:
    values = list(values)
    return dict(zip(names or labels(len(values)), (float(v) for v in values), strict=True))


def labels(count: int) -> list[str]:
    return [f"o{k}" for k in range(count)]


def batch_of(scores: Any, group: Any, **fields: Any) -> StepBatch:
    names = tuple(fields.pop("names", labels(scores.shape[1])))
    plain = {"raw": scores, "scores": scores, "group": np.asarray(group), "lengths": np.ones(len(scores), np.int64)}
    return StepBatch(names=names, **{**plain, **fields})


# Composition.


@adapter
def sum_then_normalize(case: Case) -> Outputs:
    reduce = partial(weighted_sum, **case.some("renormalize_missing"))
    given = (case.array("scores"), case.array("weights"), case.group)
    done = sum_first(*given, reduce=reduce, **case.some("scale", "eps"))
    return {"total": done.total, "advantages": done.advantages}


@adapter
def normalize_then_sum(case: Case) -> Outputs:
    reduce = partial(weighted_sum, **case.some("renormalize_missing"))
    given = (case.array("scores"), case.array("weights"), case.group)
    done = normalize_first(*given, reduce=reduce, **case.some("whiten", "eps"))
    return {"columns": done.columns, "sum": done.total, "advantages": done.advantages}


def shaper_of(kind: str) -> Any:
    return chain([] if kind == "none" else [kind], "shape")


def composite_policy(case: Case) -> Any:
    p, names = case.params, case.params["names"]
    kind = p["policy"]
    if kind in ("mu", "xi", "all"):
        spec = {"policy": "lagrange", "kind": kind, **case.some("lr", "momentum", "max_grad_norm")}
        spec |= {key: named(p[key], names) for key in ("thresholds", "init")}
    elif kind == "recap":
        spec = {"policy": "recap", "unbounded": ["ensemble"], **case.some("window", "temperature")}
    elif kind == "hypervolume":
        inner = {"policy": "static", "weights": named(p["weights"], names)}
        spec = {
            "policy": "hypervolume",
            "inner": inner,
            "objectives": names[:2],
            "reference": named(p["ref"], names[:2]),
        }
    elif kind == "static":
        order = p["aggregation"].split("/")[0]
        spec = {"policy": "static", "weights": named(p["weights"], names), "order": order}
    else:
        raise ValueError(f"unknown policy {kind}")
    return build(spec, names)


class Path:
    """The whole path of the composite cases: two shapers and a policy, with the state of all three."""

    def __init__(self, case: Case) -> None:
        self.policy = composite_policy(case)
        self.shapers = {"rm": shaper_of("par"), "ensemble": shaper_of("meanstd")}

    def state_dict(self) -> dict[str, Any]:
        return {"policy": self.policy.state_dict(), **{name: s.state_dict() for name, s in self.shapers.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        for name, shaper in self.shapers.items():
            shaper.load_state_dict(state[name])


@adapter
def composite(case: Case) -> Outputs:
    out = []
    for path, step in case.steps(partial(Path, case), case.inputs["steps"]):
        ensemble = combine(numbers(step["ensemble"]), mode="uwo", coef=0.5, ddof=0).reward
        raw = np.column_stack([numbers(step["accuracy"]), numbers(step["rm"]), ensemble])
        rm = path.shapers["rm"](raw[:, 1], Context(references=numbers(step["rm_refs"])))
        shaped = np.column_stack([raw[:, 0], rm, path.shapers["ensemble"](raw[:, 2], Context())])
        batch = batch_of(shaped, case.group, raw=raw, kl=numbers(step["kl"]), names=case.params["names"])
        if "validation" in path.policy.needs:  # batch means stand in for a validation pass
            batch = batch_of(shaped, case.group, raw=raw, names=batch.names, validation=batch.means())
        if path.policy.update_first:
            path.policy.update(batch)
        mix = path.policy.weigh(batch)
        constrained = "thresholds" in case.params
        used = in_order(path.policy.multipliers.weights(), batch.names) if constrained else mix.weights
        advantages, _ = compose(batch, mix, **case.some("eps"))
        if not path.policy.update_first:
            path.policy.update(batch)
        after = {"raw_after": path.policy.multipliers.raw} if constrained else {}
        out.append({"shaped": shaped, "weights": used, "advantages": advantages, "scale": mix.scale, **after})
    return {"steps": out}


# Constrained.


def learn(case: Case, make: Callable[[], Multipliers], thresholds: dict[str, float]) -> tuple[list[Any], list[Any]]:
    used, after = [], []
    for multipliers, means in case.steps(make, case.inputs["means"]):
        used.append(list(multipliers.weights().values()))
        multipliers.update(named(numbers(means)), thresholds)
        after.append(multipliers.raw)
    return used, after


@adapter
def lagrange_sequence(case: Case) -> Outputs:
    init, thresholds = named(case.array("init")), named(case.array("thresholds"))
    options = case.some("lr", "momentum", "max_grad_norm")
    make = partial(Multipliers, list(thresholds), case.params["kind"], init=init, **options)
    used, after = learn(case, make, thresholds)
    task = [len(w) - sum(w) for w in used]
    return {"weights": used, "task_weight": task, "raw_after": after, "momentum_after": case.last.buffer}


@adapter
def dual_ascent_sequence(case: Case) -> Outputs:
    init, thresholds = named(case.array("init")), named(case.array("thresholds"))
    senses = dict(zip(thresholds, case.inputs["sense"], strict=True))
    kind: Kind = "projected"
    make = partial(Multipliers, list(thresholds), kind, init=init, senses=senses, **case.some("lr", "cap"))
    used, after = learn(case, make, thresholds)
    return {"weights": used, "raw_after": after}


@adapter
def mix_constrained(case: Case) -> Outputs:
    given = (case.array("task_adv"), case.array("cons_adv"), case.array("weights"), case.params["kind"])
    return {"mixed": mixed(*given, **case.some("rescale"))}


@adapter
def constrained_group_advantages(case: Case) -> Outputs:
    scores, kl, weights = case.array("scores"), case.array("kl"), case.array("weights")
    task, constraints = constraint_columns(scores, kl, case.group, **case.some("eps", "by_std"))
    total = mixed(task, constraints, weights, case.params["kind"], **case.some("rescale"))
    return {"task_adv": task, "cons_adv": constraints, "mixed": total}


@adapter
def adaptive_kl_sequence(case: Case) -> Outputs:
    make = partial(AdaptiveKl, **case.some("target", "init", "rate", "clip"))
    return {"coef": [controller.update(kl) for controller, kl in case.steps(make, case.array("kl"))]}


@adapter
def nelder_mead(case: Case) -> Outputs:
    goal = case.params["objective"]
    center, scale = numbers(goal["center"]), numbers(goal["scale"])
    options = case.some("alpha", "gamma", "rho", "sigma", "cache_tol", "tol_f", "max_evals")
    make = partial(NelderMead, case.inputs["simplex"], **options)
    search = make()
    while (point := search.ask()) is not None:
        if len(search.evaluations) == case.cut:
            search = resumed(search, make)
            assert search.ask() == point
        search.tell(goal["height"] * math.exp(-float((((np.array(point) - center) / scale) ** 2).sum())))
    best, value = search.best
    trace = [move._asdict() for move in search.trace]
    return {"queried": search.evaluations, "trace": trace, "best_point": best, "best_value": value}


@adapter
def proxy_point(case: Case) -> Outputs:
    options = case.some("degree", "ridge", "grid", "density_frac")
    return proxy(case.array("points"), case.array("gold"), **options)._asdict()


# Dynamic.


@adapter
def hypervolume(case: Case) -> Outputs:
    points, maximise = case.array("points"), case.params.get("maximise")
    return {"value": volume(points, case.array("ref"), maximise), "front": pareto_front(points, maximise)}


@adapter
def hv_meta_sequence(case: Case) -> Outputs:
    p, names = case.params, labels(len(case.inputs["ref"]))
    minimise = [name for name, up in zip(names, p.get("maximise", [True] * len(names)), strict=True) if not up]
    options = {"scale": named(p["scale"], names) if "scale" in p else {n: 1.0 for n in names}}
    options |= case.some("base", "gain")
    make = partial(FrontProgress, names, reference=named(case.array("ref")), minimise=minimise, **options)
    used, gains, after = [], [], []
    for front, evaluation in case.steps(make, case.inputs["evals"]):
        used.append(front.multiplier)
        gains.append(front.observe(named(numbers(evaluation))))
        after.append(front.multiplier)
    archive = [list(point.values()) for point in case.last.archive]
    found = {"used": used, "contribution": gains, "meta_after": after}
    return {**found, "archive": archive, "hypervolume": case.last.volume}


@adapter
def gradient_weights_sequence(case: Case) -> Outputs:
    grads = case.array("grads")
    names = labels(grads.shape[1])
    spec = {"policy": "gradient", **case.some("mu", "every", "min_weight")}
    spec |= {"init": named(case.params["init"])} if "init" in case.params else {}
    steps, weights = list(zip(grads, case.inputs["lr"], strict=True)), []
    for policy, (g, lr) in case.steps(lambda: build(spec, names), steps):
        policy.update(batch_of(np.zeros((1, len(names))), [0], gram=g @ g.T, lr=lr))
        weights.append(policy.weigh(batch_of(np.zeros((1, len(names))), [0])).weights)
    return {"influence": [influence(g @ g.T) for g in grads], "weights": weights}


# RECAP, trust, uncertainty.


@adapter
def recap_sequence(case: Case) -> Outputs:
    names = labels(len(case.inputs["losses"][0]))
    out: Outputs = {"weights": [], "convergence": [], "instability": []}
    make = partial(Recap, names, **case.some("window", "temperature", "center", "eps", "c_max"))
    for policy, losses in case.steps(make, case.inputs["losses"]):
        moved = policy.push(named(numbers(losses)))
        out["weights"].append(in_order(policy.weights, names))
        out["convergence"].append([moved[n].convergence if moved else math.nan for n in names])
        out["instability"].append([moved[n].instability if moved else math.nan for n in names])
    return out


@adapter
def trust_rewards(case: Case) -> Outputs:
    p, outcome, thinking = case.params, case.array("outcome"), case.array("thinking")
    options = case.some("alpha", "threshold", "degenerate")
    found = trust(outcome, thinking, case.group, step=p["step"], total_steps=p["total"], **options)
    weights = np.column_stack([np.ones(len(outcome)), found.coefficient])
    return {**found._asdict(), "reward": weighted_sum(np.column_stack([outcome, thinking]), weights)}


@adapter
def uncertainty_rewards(case: Case) -> Outputs:
    return uncertainty(case.array("a"), case.array("b"), case.group, **case.some("mode", "scale"))._asdict()


# Ensembles, shaping.


@adapter
def ensemble(case: Case) -> Outputs:
    return combine(case.array("scores"), **case.some("mode", "coef", "ddof"))._asdict()


@adapter
def bon_unbiased(case: Case) -> Outputs:
    rows = []
    for n in case.params["n"]:
        expected = best_of_n(case.array("proxy"), case.array("gold"), n)
        rows.append({"n": n, "proxy": expected[0], "gold": expected[1], "kl": best_of_n_kl(n)})
    return {"rows": rows}


@adapter
def shape_sequence(case: Case) -> Outputs:
    options = {key: value for key, value in case.params.items() if key != "kind"}
    outputs = []
    for shaper, step in case.steps(lambda: chain([{case.params["kind"]: options}], "shape"), case.inputs["steps"]):
        context = Context(lengths=np.array(step["lengths"]), references=numbers(step["refs"]) if step["refs"] else None)
        outputs.append(shaper(numbers(step["rewards"]), context))
    ((_, state),) = case.last.state_dict()["shapers"]
    return {"outputs": outputs, "state": state or None}


# Sources, process rewards.


@adapter
def dga_sequence(case: Case) -> Outputs:
    gradients, targets = case.array("domain_grads"), case.array("target_grads")
    names = labels(gradients.shape[1])
    options = case.some("eta", "beta", "floor", "every")
    options |= {"init": named(case.params["init"])} if "init" in case.params else {}
    signals, weights = [alignment(g, t) for g, t in zip(gradients, targets, strict=True)], []
    for mixer, signal in case.steps(lambda: mixers["dga"](names, **options), signals):
        mixer.update(named(signal))
        weights.append(in_order(mixer.probabilities, names))
    return {"alignment": signals, "weights": weights}


@adapter
def scalebio_step(case: Case) -> Outputs:
    q, gaps = case.array("p"), case.array("loss_w") - case.array("loss_u")
    names = labels(len(q))
    mixer = ScaleBio(names, init=named(q), adam=False, **case.some("alpha", "lr"))
    before = in_order(mixer.probabilities, names)
    mixer.update(named(gaps))
    found = {"prob": before, "grad": scalebio_gradient(q, gaps, **case.some("alpha"))}
    after = {"p_after": in_order(mixer.q, names), "prob_after": in_order(mixer.probabilities, names)}
    return {**found, **after}


@adapter
def dreamprm_weights(case: Case) -> Outputs:
    return {"weights": positive_weights(case.array("raw"))}


@adapter
def process_advantages(case: Case) -> Outputs:
    steps = [numbers(rewards) for rewards in case.inputs["step_rewards"]]
    given = (steps, case.inputs["step_ends"], case.inputs["lengths"])
    return {"advantages": token_advantages(*given, **case.some("ddof", "eps"))}


@adapter
def prm_outcome(case: Case) -> Outputs:
    return {"value": collapse(case.array("scores"), **case.some("how"))}


# Diagnostics, neighbours.


@adapter
def diagnostics(case: Case) -> Outputs:
    bounds = {"low": numbers(case.params["lo"]), "high": numbers(case.params["hi"])}
    return report(case.array("scores"), case.group, **bounds, **case.some("tol"))._asdict()


@adapter
def overoptimization(case: Case) -> Outputs:
    return alarm(case.array("proxy"), case.array("gold"), **case.some("window", "margin"))._asdict()


@adapter
def gao_fit(case: Case) -> Outputs:
    return fit(case.array("d"), case.array("gold"), **case.some("kind"))._asdict()


@adapter
def cv_weights(case: Case) -> Outputs:
    cv, weights = variation(case.array("scores"), **case.some("offsets", "eps"))
    return {"cv": cv, "weights": weights}


@adapter
def softmin_rows(case: Case) -> Outputs:
    return {"values": soft_min(case.array("z"), sharpness=case.params["k"])}


@adapter
def tchebycheff_sequence(case: Case) -> Outputs:
    batches = [numbers(rows) for rows in case.inputs["batches"]]
    names = labels(batches[0].shape[1])
    spec = {"policy": "tchebycheff", "weights": named(case.params["weights"])}
    reward, ideal = [], []
    for policy, scores in case.steps(lambda: build(spec, names), batches):
        batch = batch_of(scores, np.zeros(len(scores), np.int64))
        policy.update(batch)
        mix = policy.weigh(batch)
        reward.append(tchebycheff(scores, mix.weights, ideal=mix.ideal))
        ideal.append(mix.ideal)
    return {"reward": reward, "ideal": ideal}


@adapter
def covariance_weights_sequence(case: Case) -> Outputs:
    batches = [numbers(rows) for rows in case.inputs["batches"]]
    names = labels(batches[0].shape[1])
    options = {"targets": named(case.params["targets"]), "init": named(case.params["init"])}
    spec = {"policy": "covariance", **options, **case.some("lr", "tau", "use_corr")}
    weights, ema = [], []
    for policy, scores in case.steps(lambda: build(spec, names), batches):
        batch = batch_of(scores, case.group)
        weights.append(policy.weigh(batch).weights)
        policy.update(batch)
        ema.append(in_order(policy.ema, names))
    after = case.last.weigh(batch).weights
    return {"weights": weights, "ema": ema, "weights_after": after}
