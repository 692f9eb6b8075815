"""Rows of the table for methods that reweigh tokens or samples, steer entropy, change clip rules, or learn from pairs.

Their parts register where they are defined: aepo, covariance, entropy_control, grpo_guard, pairs, sample_weights,
steer, step_credit, tw_grpo.
"""

from __future__ import annotations

from algos import aepo, covariance, entropy_control, grpo_guard, pairs, sample_weights, steer, step_credit, tw_grpo
from algos.method import Row

# Imported because they register parts.
assert aepo and covariance and entropy_control and grpo_guard and pairs and sample_weights and steer and step_credit
assert tw_grpo

DEMONSTRATIONS = {"data": "demonstrations", "advantage": "demonstration", "surrogate": "reinforce"}
PAIRS = {"data": "preferences", "surrogate": "reinforce", "aggregation": "seq_mean_token_sum"}
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
    "aepo": Row(
        "Right completions are reinforced as if drawn hotter or colder, to hold the entropy at a target.",
        {"memory": ["entropy_level"], "advantage": "aepo", "surrogate": {"ppo_clip": {}}},
        "AEPO, arXiv 2510.08141",
        "A",
        "The mixed-advantage form of the authors' repository, which draws no second batch; the entropy estimate is "
        "averaged over steps.",
    ),
    "tw_grpo": Row(
        "Positions at which the completions of a group disagree weigh more.",
        {
            "advantage": {"group": {"eps": 1e-4}},
            "surrogate": {"ppo_clip": {}},
            "token_weight": ["tw_grpo"],
        },
        "TW-GRPO, arXiv 2505.24718",
        "A num (weights)",
        "The weights are detached and those of the policy before the step; extremes are over the group's own "
        "positions, padding left out.",
    ),
    "entropy_sft": Row(
        "Likelihood of the demonstrations' tokens that still teach something: high loss for their entropy.",
        {**DEMONSTRATIONS, "reject": ["entropy_sft"], "denominator": "kept"},
        "Light-IF, arXiv 2508.03178",
        "A num (tokens)",
        "Tokens are chosen over the step, with the policy before it.",
    ),
    "loss_weighted_sft": Row(
        "Demonstrations weigh by their loss: the easy ones less.",
        {**DEMONSTRATIONS, "aggregation": "seq_mean_token_mean", "token_weight": [{"by_loss": {"burn_in": 0}}]},
        "Dynamic Loss-Based Sample Reweighting, ICLR 2025",
        "A num (weights)",
        "Losses are those before the step. No burn-in, which is for pretraining (1000 steps there).",
    ),
    "dro_sft": Row(
        "Demonstrations weigh by the worst case within a KL ball: the hard ones more.",
        {**DEMONSTRATIONS, "aggregation": "seq_mean_token_mean", "token_weight": ["by_worst_case"]},
        "Doubly Robust Instance-Reweighted Adversarial Training, arXiv 2308.00311",
        "C",
        "Reconstructed from the closed form; losses are those before the step.",
    ),
    "dpo": Row(
        "Pairs: the chosen completion likelier than the rejected, beyond the reference.",
        {**PAIRS, "advantage": "dpo"},
        "DPO, arXiv 2305.18290",
        "A num (gradients)",
        "The gradient is the published one, the loss value is that of REINFORCE.",
    ),
    "ipo": Row(
        "Pairs: the margin beyond the reference regressed on a constant.",
        {**PAIRS, "advantage": "ipo"},
        "IPO, arXiv 2310.12036",
        "A num (gradients)",
        "As dpo. Sums of log-probabilities; length_average: true is TRL's form.",
    ),
    "simpo": Row(
        "Pairs: mean log-probabilities and a target margin, without a reference.",
        {**PAIRS, "advantage": "simpo"},
        "SimPO, arXiv 2405.14734",
        "A num (gradients)",
        "As dpo.",
    ),
    "redi": Row(
        "Pairs of a right and a wrong trace of a teacher: likelihood of the one, a weaker push-down of the other.",
        {**PAIRS, "advantage": "redi"},
        "REDI, arXiv 2505.24850",
        "A num (gradients)",
        "As dpo.",
    ),
}
