"""Rows of the table for methods that reweigh tokens, steer entropy or change the clip rule.

Their parts register where they are defined: steer, covariance, entropy_control, grpo_guard, step_credit.
"""

from __future__ import annotations

from algos import covariance, entropy_control, grpo_guard, steer, step_credit
from algos.method import Row

assert covariance and entropy_control and grpo_guard and steer and step_credit  # imported because they register parts

CLIP_HIGHER = {"ppo_clip": {"low": 0.2, "high": 0.28, "dual": 10.0}}

ROWS: dict[str, Row] = {
    "steer": Row(
        "Tokens whose update would change the entropy most weigh less.",
        {"surrogate": CLIP_HIGHER, "token_weight": ["steer"]},
        "STEER, arXiv 2510.10150",
        "A num",
        "Extremes are those of the minibatch (the authors' code: of the micro-batch).",
    ),
    "clip_cov": Row(
        "A few random tokens of high covariance between log-probability and advantage lose their gradient.",
        {"surrogate": {"ppo_clip": {"low": 1.0, "high": 1.0}}, "token_weight": ["clip_cov"]},
        "The Entropy Mechanism, arXiv 2505.22617",
        "A num",
        "Chosen over the minibatch, from the step's seed (the authors' code: over the micro-batch, unseeded).",
    ),
    "kl_cov": Row(
        "Tokens of highest covariance are pulled to the old policy; no clip.",
        {"surrogate": "kl_cov"},
        "The Entropy Mechanism, arXiv 2505.22617",
        "A num",
        "Chosen over the minibatch (the authors' code: over the micro-batch).",
    ),
    "entropy_top": Row(
        "DAPO on the fifth of the tokens with the highest entropy; the others leave the denominator too.",
        {
            "filter": "mixed",
            "shaping": ["overlong"],
            "surrogate": CLIP_HIGHER,
            "reject": ["entropy_top"],
            "denominator": "kept",
        },
        "Beyond the 80/20 Rule, arXiv 2506.01939",
        "A num (mask)",
        "The entropy is that of the old policy, the k tokens those of the step. Modifier top_entropy keeps the "
        "denominator instead.",
    ),
    "tea_rl": Row(
        "An entropy bonus on tokens of high probability and high advantage.",
        {
            "surrogate": {"ppo_clip": {"low": 1.0, "high": 1.0, "dual": 10.0}},
            "entropy": "tea_rl",
            "kl": {"in_loss": {"coef": 0.001}},
        },
        "Light-IF, arXiv 2508.03178",
        "A num (entropy term)",
        "The coefficient is detached. Whether the authors' runs reached this term is unknown.",
    ),
    "grpo_guard": Row(
        "Log-ratios centred and scaled by position, so that clipping acts on both sides.",
        {"ratio": "grpo_guard", "surrogate": {"ppo_clip": {}}, "token_weight": ["grpo_guard_weight"]},
        "GRPO-Guard, arXiv 2510.22319",
        "adaptation",
        "The paper is about flow matching; buckets of token positions in place of denoising steps are ours.",
    ),
    "awm": Row(
        "Advantage-weighted likelihood: no ratio, no clip, one update per step.",
        {"surrogate": "awm"},
        "Advantage Weighted Matching, arXiv 2509.25050",
        "adaptation",
        "The paper is about diffusion models; the language-model form is ours.",
    ),
}
