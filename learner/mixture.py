"""What a weighting policy decides, put into the terms of a method: which columns, joined how, scaled by what."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from algos.batch import Batch
from algos.method import Method, apart
from core.schema import Mixture


def mixed(method: Method, batch: Batch, mixture: Mixture) -> tuple[Method, Batch]:
    """Method and batch such that `advantages` joins the columns as the mixture says."""
    batch = replace(batch, advantage_scale=mixture.scale)
    if mixture.kl_coef is not None:
        batch = replace(batch, adapted_kl_coef=mixture.kl_coef)
    if not mixture.apart:
        return method, batch
    if mixture.task:
        kl = reference_kl(batch)
        assert kl is not None  # the run loads a reference where the weighting policy needs the KL
        per = batch.lengths.clamp(min=1) if mixture.kl_mean else 1
        batch = replace(batch, extra_reward=-kl / per, extra_weight=mixture.task)
    return apart(method, whiten=mixture.whiten, by_std=mixture.by_std, sharpness=mixture.sharpness), batch


def reference_kl(batch: Batch) -> Tensor | None:
    """Sum over a completion's tokens of log pi - log pi_ref [B], pi the policy that sampled; none without reference."""
    if batch.ref_logprobs is None or batch.behaviour_logprobs is None:
        return None
    gap = batch.behaviour_logprobs.double() - batch.ref_logprobs.double()
    return torch.where(batch.mask, gap, 0.0).sum(1)
