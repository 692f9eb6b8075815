"""Adapters of the vectors for rule rewards: extraction, format, length, repetition, means (see reward_cases.py)."""

from __future__ import annotations

from rewards.extraction import gsm8k_flexible, gsm8k_strict, last_number
from rewards.format import tag_count, think_format
from rewards.length import cosine_length as cosine
from rewards.length import kimi_length as kimi
from rewards.length import l1_max as l1_max_reward
from rewards.length import soft_overlong as overlong
from rewards.length_rules import drpo_weights as drpo
from rewards.length_rules import l1_exact as exact
from rewards.length_rules import l1_max_released
from rewards.length_rules import traac_length as traac
from rewards.math_answer import last_boxed as boxed
from rewards.repetition import repetition
from rewards.soft_credit import soft_multichoice as multichoice
from rewards.soft_credit import weighted_means as means_of
from tests.rewards.reward_cases import Case, Outputs, adapter

RIGHT, WRONG = r"\boxed{1}", r"\boxed{2}"  # completions of a problem whose answer is 1


@adapter
def weighted_means(case: Case) -> Outputs:
    return means_of(case.inputs["a"], case.inputs["b"], case.params["wa"], case.params["wb"])._asdict()


@adapter
def soft_multichoice(case: Case) -> Outputs:
    return {"value": multichoice(case.inputs["pred"], case.inputs["gold"])}


@adapter
def soft_overlong(case: Case) -> Outputs:
    return {"value": overlong(range(case.inputs["length"]), **case.some("max_len", "cache", "factor"))}


@adapter
def cosine_length(case: Case) -> Outputs:
    text, bounds = RIGHT if case.inputs["correct"] else WRONG, case.params.get("bounds", {})
    return {"value": cosine(text, range(case.inputs["length"]), **case.some("max_len"), **bounds, answer="1")}


@adapter
def kimi_length(case: Case) -> Outputs:
    correct = case.inputs["correct"]
    ids = [range(length) for length in case.inputs["lengths"]]
    return {"values": kimi([RIGHT if c else WRONG for c in correct], ids, answer=["1"] * len(correct))}


@adapter
def l1_exact(case: Case) -> Outputs:
    given = case.inputs
    return {"value": exact(given["correct"], given["used"], given["target"], **case.some("alpha"))}


@adapter
def l1_max(case: Case) -> Outputs:
    correct, used, budget = (case.inputs[key] for key in ("correct", "used", "budget"))
    options = case.some("alpha", "delta")
    value = l1_max_reward(RIGHT if correct else WRONG, range(used), budget=budget, answer="1", **options)
    return {"value": value, "released_code": l1_max_released(correct, used, budget, **case.some("alpha"))}


@adapter
def traac_length(case: Case) -> Outputs:
    given = case.inputs
    return {"value": traac(given["length"], given["difficulty"], given["history"], **case.some("eps"))}


@adapter
def drpo_weights(case: Case) -> Outputs:
    options = {"max_len": case.params["max_len"], "temper": case.params["lambda"]}
    return {"weights": drpo(case.inputs["lengths"], case.inputs["correct"], **options)}


@adapter
def repetition_penalty(case: Case) -> Outputs:
    return {"value": repetition(case.inputs["ids"], **case.some("n", "max_penalty"))}


@adapter
def tags(case: Case) -> Outputs:
    text = case.inputs["text"]
    return {"tag_count": tag_count(text), "think_format": think_format(text)}


@adapter
def gsm8k_extract(case: Case) -> Outputs:
    text, tail = case.inputs["text"], case.params.get("clip", 300)
    found = {"strict": gsm8k_strict(text, tail=tail), "flexible": gsm8k_flexible(text, tail=tail)}
    return {**found, "last_number": last_number(text)}


@adapter
def last_boxed(case: Case) -> Outputs:
    return {"value": boxed(case.inputs["text"])}
