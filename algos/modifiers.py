"""Modifiers: small changes that combine with every row of the table; several stack.

resolve({"row": "dapo", "modifiers": ["tis", {"top_entropy": {"fraction": 0.1}}]})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from algos.method import PIECES, SETTINGS, Row, Spec, parse
from core.errors import UserError, nearest

MODIFIERS: dict[str, Row] = {
    "tis": Row(
        "Truncated importance weights for the mismatch of rollout and learner.",
        {"correction": {"truncate": {"level": "token", "high": 2.0}}},
        "verl, TRL",
        "B num",
    ),
    "sequence_tis": Row(
        "The same with one weight per completion.",
        {"correction": {"truncate": {"level": "sequence", "high": 2.0}}},
        "verl, TRL",
        "B num",
    ),
    "mis": Row(
        "Completions with too large a weight are masked.",
        {"correction": {"mask": {"level": "sequence", "high": 3.0}}},
        "TRL, sequence_mask",
        "B num",
    ),
    "icepop": Row(
        "Token weights outside a band are masked.",
        {"correction": {"mask": {"level": "token", "low": 0.5, "high": 5.0}}},
        "Ring-1T, arXiv 2510.18855",
        "C for the bounds",
    ),
    "geometric_rejection": Row(
        "Completions with a mean log-ratio outside a narrow band are left out.",
        {"reject": [{"k1": {"level": "seq_mean", "low": 0.999, "high": 1.001}}]},
        "verl",
        "B num",
    ),
    "m2po": Row(
        "Tokens with the largest squared log-ratio are left out until the second moment is small.",
        {"reject": [{"m2": {"threshold": 0.04}}]},
        "M2PO, arXiv 2510.01161",
        "B num",
    ),
    "top_entropy": Row(
        "Only the tokens of highest entropy are trained.",
        {"token_weight": [{"top_entropy": {"fraction": 0.2}}]},
        "Beyond the 80/20 Rule, arXiv 2506.01939",
        "B num",
    ),
    "opsm": Row(
        "No push-down on wrong completions that the policy would no longer produce.",
        {"token_weight": [{"opsm": {"delta": 0.5}}]},
        "DeepSeek-V3.2, arXiv 2512.02556",
        "B num",
    ),
    "adaptive_entropy": Row(
        "An entropy bonus whose coefficient grows while the entropy is below its target.",
        {"memory": ["adaptive_entropy"], "entropy": "bonus"},
        "Skywork-OR1, arXiv 2505.22312",
        "A num",
    ),
    "adaptive_kl": Row(
        "The coefficient of the KL term follows a target KL.",
        {"memory": ["adaptive_kl"]},
        "arXiv 1909.08593; PPO trainers",
        "B",
        "KL per token. It starts at the memory's `init`, not at kl.coef.",
    ),
    "loglinear": Row(
        "An interpolation stands in for the old policy's forward pass.",
        {"proximal": "loglinear"},
        "A-3PO; AReaL",
        "B num",
    ),
    "drop_truncated": Row(
        "Truncated completions lose their tokens, not their place in the group (overlong filtering).",
        {"drop_truncated": True},
        "DAPO, arXiv 2503.14476",
        "A num",
    ),
}


def modified(pieces: Spec, name: str, options: Mapping[str, Any], where: str) -> Spec:
    """`pieces` with a modifier on top; its options change those of its first part."""
    if name not in MODIFIERS:
        raise UserError(f"{where}: there is no modifier '{name}'; {nearest(name, MODIFIERS)}")
    for key, value in MODIFIERS[name].spec.items():
        if key in SETTINGS:
            pieces = {**pieces, key: value}
            continue
        ((part, defaults),) = parse({key: value}, where)[key]
        taken = [] if PIECES[key].many else pieces.get(key, [])
        if taken:
            raise UserError(f"{where}.{name}: {key} is already {taken[0][0]}; a method has one {key}")
        pieces = {**pieces, key: [*pieces.get(key, []), (part, {**defaults, **options})]}
        options = {}
    return pieces
