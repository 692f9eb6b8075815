"""Merging models into the start of a run (BAI)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from core.errors import UserError


def average_models(models: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Weighted average of models of the same shapes, in at least float32; `weights` sum to 1."""
    _check_weights(models, weights)
    for other in models[1:]:
        _check_same(models[0], other, larger=())
    return {name: _blend([m[name] for m in models], weights) for name in models[0]}


def bai_merge(
    base: Mapping[str, Tensor],
    finetuned: Sequence[Mapping[str, Tensor]],
    *,
    alpha: float = 0.1,
    weights: Sequence[float] | None = None,
    embeddings: Collection[str] = ("model.embed_tokens.weight", "lm_head.weight"),
) -> dict[str, Tensor]:
    """Balanced actor initialisation: alpha * base + (1 - alpha) * average of the fine-tuned models, by parameter name.

    "Balanced Actor Initialization: Stable RLHF Training of Distillation-Based Reasoning Models", arXiv 2509.00309;
    reconstructed. Reported: best numbers at alpha 0.1, most stable RL at 0.5 to 0.6. Merged in at least float32 and
    cast back; tensors that are not floating point, and rows of `embeddings` beyond the base vocabulary, come from the
    first fine-tuned model; tensors tied in the base stay tied. Raises UserError for different names or shapes.
    """
    weights = weights or [1 / len(finetuned)] * len(finetuned)
    _check_weights(finetuned, weights)
    for model in finetuned:
        _check_same(base, model, larger=embeddings)
    shares = [alpha, *((1 - alpha) * weight for weight in weights)]
    merged: dict[str, Tensor] = {}
    tied: dict[tuple[int, torch.Size], Tensor] = {}
    for name, original in base.items():
        key = (original.data_ptr(), original.shape)
        if key not in tied:
            tied[key] = _merge_one(original, [model[name] for model in finetuned], shares)
        merged[name] = tied[key]
    return merged


def _merge_one(original: Tensor, tuned: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    if not original.is_floating_point():
        return tuned[0].clone()
    if not original.dim():
        return _blend([original, *tuned], shares)
    rows = len(original)
    mixed = _blend([original, *(tensor[:rows] for tensor in tuned)], shares)
    return torch.cat([mixed, tuned[0][rows:].to(mixed.dtype)])


def _blend(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted sum in at least float32, cast back; what is not floating point is taken from the first tensor."""
    if not tensors[0].is_floating_point():
        return tensors[0].clone()
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack([w * t.to(wide) for w, t in zip(weights, tensors, strict=True)]).sum(0).to(tensors[0].dtype)


def _check_weights(models: Sequence[object], weights: Sequence[float]) -> None:
    if len(models) != len(weights) or abs(sum(weights) - 1) > 1e-6:
        raise UserError(f"merge: {len(models)} models need as many weights that sum to 1, got {list(weights)}")


def _check_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor], larger: Collection[str]) -> None:
    if one.keys() != other.keys():
        odd = sorted(one.keys() ^ other.keys())
        raise UserError(
            f"merge: the models do not share the parameters {', '.join(odd[:3])}; only relatives can be merged"
        )
    for name, tensor in one.items():
        a, b = tensor.shape, other[name].shape
        grown = name in larger and a[1:] == b[1:] and a[0] <= b[0]
        if a != b and not grown:
            raise UserError(
                f"merge: '{name}' is {list(a)} in one model and {list(b)} in another; only relatives can be merged"
            )
