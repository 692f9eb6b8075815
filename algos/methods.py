"""THE table: a published method is a row of parts. `resolve` turns what a user writes into a Method.

    resolve("dapo")
    resolve({"row": "dapo", "surrogate": {"ppo_clip": {"high": 0.3}}, "modifiers": ["tis"]})
    resolve({"advantage": "group", "surrogate": "cispo"})            # parts alone

Confidence of a row: A read from the authors' code, B from a widely used public trainer, C from papers and others, num:
numbers compared with that code, adaptation: the form for completions is ours. Pieces that a row leaves out have the
defaults of `method.PIECES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from algos import reweighting
from algos.checks import check
from algos.method import PIECES, SETTINGS, Method, Row, build, merge, parse
from algos.modifiers import MODIFIERS, modified
from core.errors import UserError, nearest

__all__ = ["MODIFIERS", "ROWS", "Method", "Row", "methods", "resolve"]


MEAN = {"group": {"scale": "none"}}  # R - mean of the group
SEQ_MEAN, SEQ_SUM = "seq_mean_token_mean", "seq_mean_token_sum"
KL_K3 = {"in_loss": {"coef": 0.04, "estimator": "k3", "gradient": "naive"}}


def _clip(low: float = 0.2, high: float = 0.2, dual: float | None = None) -> dict[str, Any]:
    return {"ppo_clip": {"low": low, "high": high, "dual": dual}}


ROWS: dict[str, Row] = {
    "grpo": Row(
        "Group-normalised advantage, PPO clip, sample-level mean, k3 in the loss.",
        {"surrogate": _clip(), "kl": KL_K3, "aggregation": SEQ_MEAN},
        "DeepSeekMath, arXiv 2402.03300",
        "B num",
        "Rows without tokens leave the row count (the paper divides by all G; aggregation rows: all does too). The k3 "
        "gradient is the published one, biased for the reverse KL; kl gradient: ratio mends it.",
    ),
    "dapo": Row(
        "Clip-higher, token-level loss, dynamic sampling, overlong penalty, no KL.",
        {"filter": "mixed", "shaping": ["overlong"], "surrogate": _clip(0.2, 0.28, 10.0)},
        "DAPO, arXiv 2503.14476",
        "A B num",
        "The overlong cache is a fifth of the longest completion (4096 of 20480 in the recipe). Truncated rows are "
        "penalised, not dropped; drop_truncated: true drops them.",
    ),
    "dr_grpo": Row(
        "No division by the group's std, constant length normalisation: neither length nor difficulty bias.",
        {
            "advantage": MEAN,
            "surrogate": _clip(),
            "aggregation": {"seq_mean_token_sum_norm": {"length_constant": "max_tokens", "rows": "all"}},
        },
        "Understanding R1-Zero-Like Training, arXiv 2503.20783",
        "A B num",
    ),
    "lite_ppo": Row(
        "Group mean, std over the whole step, token mean.",
        {"advantage": {"group": {"scale": "batch_std", "eps": 1e-4}}, "surrogate": _clip()},
        "Tricks or Traps, arXiv 2508.08221",
        "B num",
    ),
    "gspo": Row(
        "Clip the geometric-mean ratio of the whole completion.",
        {"ratio": "seq_mean", "surrogate": _clip(3e-4, 4e-4), "aggregation": SEQ_MEAN},
        "Group Sequence Policy Optimization, arXiv 2507.18071",
        "B num",
    ),
    "gspo_token": Row(
        "GSPO whose gradient goes through each token alone: for advantages that vary along a row.",
        {"ratio": "seq_mean_token", "surrogate": _clip(3e-4, 4e-4), "aggregation": SEQ_MEAN},
        "Group Sequence Policy Optimization, arXiv 2507.18071",
        "B num",
    ),
    "luspo": Row(
        "GSPO with each completion's loss times its length.",
        {"ratio": "seq_mean", "surrogate": _clip(2e-3, 2.5e-3), "aggregation": {SEQ_SUM: {"rows": "all"}}},
        "Length-Unbiased Sequence Policy Optimization, arXiv 2602.05261",
        "B num",
    ),
    "gmpo": Row(
        "Geometric mean of token ratios, clipped per token in log space.",
        {"ratio": "seq_mean", "surrogate": {"log_clip": {"low": 0.4, "high": 0.4}}, "aggregation": SEQ_MEAN},
        "Geometric-Mean Policy Optimization, arXiv 2507.20673",
        "A B num",
    ),
    "cispo": Row(
        "Bounded, detached importance weight: every token keeps a gradient.",
        {"surrogate": {"cispo": {"low": None, "high": 4.0}}},
        "MiniMax-M1, arXiv 2506.13585",
        "B num; the bound C",
        "high = 4 is an absolute cap of 5 (ScaleRL, arXiv 2510.13786); the paper does not state its bound.",
    ),
    "sapo": Row(
        "A sigmoid gate instead of a clip.",
        {"surrogate": {"sapo": {"tau_pos": 1.0, "tau_neg": 1.05}}, "aggregation": SEQ_MEAN},
        "Soft Adaptive Policy Optimization, arXiv 2511.20347",
        "B num",
    ),
    "topr": Row(
        "Positives without importance weight, negatives with a ratio truncated to [0, 1]. Rewards +1 / -1.",
        {
            "advantage": {"group": {"baseline": "constant", "scale": "none"}},
            "ratio": {"seq_sum": {"anchor": "rollout"}},
            "surrogate": {"topr": {"pos": [1.0, 1.0], "neg": [0.0, 1.0]}},
            "aggregation": SEQ_SUM,
        },
        "Tapered Off-Policy REINFORCE, arXiv 2503.14286",
        "C",
    ),
    "topr_token": Row(
        "TOPR with token ratios and token mean, as public trainers run it.",
        {
            "advantage": {"group": {"baseline": "constant", "scale": "none"}},
            "ratio": {"token": {"anchor": "rollout"}},
            "surrogate": {"topr": {"pos": [1.0, 1.0], "neg": [0.0, 1.0]}},
        },
        "Tapered Off-Policy REINFORCE, arXiv 2503.14286; Trinity-RFT, ROLL",
        "B num",
    ),
    "vespo": Row(
        "A Gamma-shaped window on the sequence ratio as detached weight.",
        {"ratio": "seq_sum", "surrogate": "vespo"},
        "VESPO, arXiv 2602.10693",
        "B num",
    ),
    "dppo_tv": Row(
        "Trust region on the sampled token's probability: total variation.",
        {"surrogate": {"dppo_tv": {"low": 0.2, "high": 0.2, "cap": 20.0}}},
        "DPPO, arXiv 2602.04879",
        "B num",
        "The authors' thresholds were not available; 0.2 is a default of ours.",
    ),
    "dppo_kl": Row(
        "Trust region on the sampled token's probability: binary KL.",
        {"surrogate": {"dppo_kl": {"low": 0.05, "high": 0.05, "cap": 20.0}}},
        "DPPO, arXiv 2602.04879",
        "B num",
        "The authors' thresholds were not available; 0.05 is a default of ours.",
    ),
    "reinforce": Row(
        "Reward minus the step's mean, no trust region: exactly on-policy data.",
        {
            "advantage": {"group": {"baseline": "batch_mean", "scale": "none"}},
            "surrogate": "reinforce",
            "aggregation": SEQ_SUM,
        },
        "Williams, 1992; single-sample form of OpenRLHF",
        "B",
        "A completion is one action (sum over its tokens).",
    ),
    "rloo": Row(
        "Leave-one-out baseline, REINFORCE on whole completions, KL in the reward.",
        {
            "shaping": [{"kl_sequence": {"coef": 0.05}}],
            "advantage": {"group": {"baseline": "leave_one_out", "scale": "none"}},
            "surrogate": "reinforce",
            "aggregation": SEQ_SUM,
        },
        "Back to Basics, arXiv 2402.14740",
        "B num",
    ),
    "reinforce_pp": Row(
        "Discounted token returns with KL, whitened over the step's tokens, PPO clip. Needs no groups.",
        {
            "shaping": [{"kl_token": {"coef": 0.01}}],
            "advantage": "returns",
            "whiten": {"token": {"eps": 1e-8}},
            "surrogate": _clip(),
        },
        "REINFORCE++, arXiv 2501.03262",
        "B num",
        "Variance with divisor M - 1 (verl; OpenRLHF divides by M).",
    ),
    "reinforce_pp_baseline": Row(
        "Group mean, whitened over the step's tokens, k2 in the loss.",
        {
            "advantage": MEAN,
            "whiten": {"token": {"eps": 1e-8}},
            "surrogate": _clip(),
            "kl": {"in_loss": {"coef": 0.01, "estimator": "k2", "gradient": "naive"}},
        },
        "REINFORCE++, arXiv 2501.03262",
        "B num for the parts",
        "The whole is put together from two trainers; no single public counterpart.",
    ),
    "remax": Row(
        "Reward minus that of the prompt's greedy completion, KL in the reward.",
        {
            "shaping": [{"clip": {"limit": 5.0}}, {"kl_token": {"coef": 0.05}}],
            "advantage": {"greedy_baseline": {"kl_horizon": "to_go"}},
            "surrogate": "reinforce",
        },
        "ReMax, arXiv 2310.10505",
        "A B num",
        "kl_horizon to_go is the gradient of the penalised return; the authors' code is one_step.",
    ),
    "ppo": Row(
        "GAE, whitened, PPO with dual clip, KL in the reward, a critic.",
        {
            "shaping": [{"kl_token": {"coef": 0.02}}],
            "advantage": {"gae": {"gamma": 1.0, "lam": 0.95}},
            "whiten": {"token": {"eps": 1e-8}},
            "surrogate": _clip(dual=3.0),
            "value": {"squared": {"clip": 0.5}},
        },
        "PPO, arXiv 1707.06347; GAE, 1506.02438; dual clip, 1912.09729",
        "B num",
    ),
    "vtrace": Row(
        "Off-policy actor-critic with truncated importance weights.",
        {"advantage": "vtrace", "surrogate": "reinforce", "value": {"squared": {"clip": None}}},
        "IMPALA, arXiv 1802.01561",
        "B num",
        "A completion that the length limit cut off is not bootstrapped.",
    ),
    "ngrpo": Row(
        "An imagined perfect completion in every group: all-wrong groups push down. Rewards up to 1.",
        {
            "filter": "drop_all_correct",
            "advantage": {"group": {"baseline": "virtual_max", "scale": "virtual_std"}},
            "surrogate": _clip(0.16, 0.24),
        },
        "NGRPO, arXiv 2509.18851",
        "A num",
        "A group of one gets 0 (the authors' code: the raw reward).",
    ),
    "bnpo": Row(
        "Advantages weighted by a Beta model of the pass rates.",
        {"advantage": "bnpo", "surrogate": _clip(0.2, 0.28, 10.0), "aggregation": SEQ_SUM},
        "BNPO, arXiv 2506.02864",
        "A num",
        "Where the moments are undefined alpha = beta = 1 (the authors' code gives NaN).",
    ),
    "nft": Row(
        "Maximum likelihood on right rows and on an implicit negative policy for wrong ones. Rewards 0 or 1.",
        {
            "filter": "mixed",
            "advantage": "nft",
            "surrogate": "nft",
            "aggregation": {"token_sum_constant": {"length_constant": 1000.0}},
        },
        "NFT, arXiv 2505.18116",
        "A num",
    ),
    "oreal": Row(
        "Likelihood on right rows, policy gradient on wrong ones, token credit from a reward model.",
        {
            "filter": "one_pos_one_neg",
            "advantage": "oreal",
            "surrogate": "sign_split",
            "token_weight": [{"oreal": {"threshold": 0.5}}],
            "kl": {"in_loss": {"coef": 0.01, "estimator": "k3", "gradient": "naive"}},
            "partition": {"sign": {"pos_factor": 1.0, "neg_factor": 0.5}},
            "credit": "outcome",
        },
        "OREAL, arXiv 2502.06781",
        "A num",
        "Follows the released configuration: positives are multiplied by their advantage. Its first 10 steps, in which "
        "only the reward model learns, are learner.token_reward_model.warmup_steps.",
    ),
    "drpo": Row(
        "Right against wrong rows of a group on mean log-probability; length reweighs right rows only. Rewards 0 or 1.",
        {
            "advantage": {"drpo": {"length_lambda": 0.1}},
            "surrogate": "reinforce",
            "aggregation": SEQ_MEAN,
            "kl": {
                "in_loss": {
                    **{"coef": 1e3, "hinge": 1e-4, "estimator": "k1", "gradient": "naive"},
                    **{"anchor": "old", "direction": "forward", "mode": "token_mean"},
                }
            },
        },
        "DRPO, arXiv 2510.04474",
        "A num (gradients)",
        "The loss value is that of REINFORCE with the equivalent late advantage; the gradient is the published one.",
    ),
    "copo": Row(
        "Two advantages, within the group and between prompts, blended by how consistent the answers are.",
        {"advantage": "copo", "surrogate": _clip(dual=3.0), "aggregation": SEQ_MEAN},
        "COPO, arXiv 2508.04138",
        "A num",
        "blend soft_with_zero, as in the authors' scripts; the abstract describes soft.",
    ),
    "gdpo": Row(
        "Each reward component normalised in its group, then summed and whitened.",
        {
            "combine": "normalise_then_sum",
            "advantage": {"group": {"eps": 1e-4}},
            "whiten": {"sequence": {"eps": 1e-4}},
            "surrogate": _clip(),
        },
        "GDPO, arXiv 2601.05242",
        "A B num",
        "Whitened over rows, as the authors' fork (verl: over tokens).",
    ),
    "gpg": Row(
        "Group mean, divided by the share of rewarded rows; plain policy gradient.",
        {"advantage": {"group": {"scale": "nonzero_fraction"}}, "surrogate": "reinforce"},
        "GPG, arXiv 2504.02546",
        "B num",
    ),
    "opo": Row(
        "Length-weighted baseline, exactly on-policy, no clip.",
        {"advantage": {"group": {"baseline": "length_weighted", "scale": "none"}}, "surrogate": "reinforce"},
        "OPO, arXiv 2505.23585",
        "B num",
    ),
    "maxrl": Row(
        "Group mean as baseline and as scale: hard prompts weigh more. Rewards not below 0.",
        {"advantage": {"group": {"scale": "group_mean"}}, "surrogate": _clip()},
        "MaxRL; SkyRL",
        "B num",
    ),
    "passk": Row(
        "Only the best row of a group is trained.",
        {"advantage": "passk", "surrogate": _clip()},
        "arXiv 2503.19595",
        "B num",
    ),
    "spo": Row(
        "One completion per prompt against a running estimate, standardised over the step.",
        {
            "memory": ["beta_tracker"],
            "advantage": "tracker",
            "whiten": {"sequence": {"eps": 1e-8}},
            "surrogate": _clip(0.2, 0.28, 10.0),
        },
        "Single-stream Policy Optimization, arXiv 2509.13232",
        "A",
        "The estimates decay at a constant rate and prompts are not drawn by priority.",
    ),
    "dro": Row(
        "A quadratic pull to the old policy instead of a clip.",
        {"advantage": MEAN, "surrogate": {"dro": {"beta": 0.5}}},
        "arXiv 2405.19107; verl",
        "B num",
    ),
    "gvpo": Row(
        "Squared regression of centred log-ratios on centred rewards.",
        {"advantage": "gvpo", "surrogate": "reinforce", "aggregation": SEQ_SUM},
        "GVPO, arXiv 2504.19599",
        "A",
        "Averaged over groups. The gradient is the published one, the loss value is that of REINFORCE.",
    ),
    "a_star_po": Row(
        "Squared regression of log-ratios on reward minus the reference's optimal value.",
        {"advantage": "a_star", "surrogate": "reinforce", "aggregation": SEQ_SUM},
        "A*-PO, arXiv 2505.20686",
        "B",
        "The optimal values, which `coupled.optimal_value` makes of the reference's rewards, are a column of the data "
        "(data.baseline_column). Gradient as published.",
    ),
    "flow_rl": Row(
        "Squared flow balance: completions in proportion to their reward's exponential, with a learnt partition.",
        {
            "advantage": "flow_rl",
            "surrogate": "reinforce",
            "aggregation": SEQ_MEAN,
            "value": {"squared": {"clip": None}},
        },
        "FlowRL, arXiv 2509.15207",
        "A",
        "The critic at the first token is the log-partition head; its loss leaves out the importance weight. Gradient "
        "as published.",
    ),
    "decoupled_ppo": Row(
        "PPO clip against the recomputed old policy, times the capped ratio of old to rollout policy.",
        {"surrogate": _clip(), "correction": {"mask": {"level": "token", "high": 5.0}}},
        "arXiv 2110.00641; AReaL, arXiv 2505.24298",
        "B num",
    ),
    "bypass_ppo": Row(
        "The rollout policy is the clipping anchor: two policies, no forward pass for the old one.",
        {"ratio": {"token": {"anchor": "rollout"}}, "surrogate": _clip()},
        "verl, bypass mode",
        "B num",
    ),
    "bypass_reinforce": Row(
        "REINFORCE with the truncated weight of current to rollout policy.",
        {
            "surrogate": "reinforce",
            "correction": {"truncate": {"level": "sequence", "high": 2.0}},
            "numerator": "logp",
            "aggregation": SEQ_SUM,
        },
        "verl, bypass mode",
        "B num",
    ),
    "sft": Row(
        "Likelihood of demonstrations, token mean.",
        {"data": "demonstrations", "advantage": "demonstration", "surrogate": "reinforce"},
        "maximum likelihood",
        "definition",
    ),
}
ROWS["disco"] = Row(
    "DRPO without the length weights.",
    {**ROWS["drpo"].spec, "advantage": {"drpo": {"length_lambda": None}}},
    "DisCO, arXiv 2505.12366",
    "A num (gradients)",
    ROWS["drpo"].deviations,
)
ROWS |= reweighting.ROWS


def resolve(spec: str | Mapping[str, Any], where: str = "method", context: Mapping[str, float] | None = None) -> Method:
    """The method of a spec: a row's name, {row: NAME, piece: choice, modifiers: [...]}, or pieces alone.

    `context` fills symbols of rows: {"max_tokens": longest completion of the run}. Raises UserError with the nearest
    name for anything unknown, and with the reason for combinations that make no sense.
    """
    given: dict[str, Any] = {"row": spec} if isinstance(spec, str) else dict(spec)
    row, wanted = given.pop("row", None), given.pop("modifiers", [])
    if row is not None and (not isinstance(row, str) or row not in ROWS):
        raise UserError(f"{where}.row: there is no method {row!r}; {nearest(str(row), ROWS)}")
    if row is None and not given:
        raise UserError(f"{where}: empty; name a row or give pieces. Allowed: {', '.join([*PIECES, *SETTINGS])}")
    pieces = parse(ROWS[row].spec, where) if row else {}
    pieces = merge(pieces, parse(given, where))
    names = []
    for item in [wanted] if isinstance(wanted, (str, Mapping)) else wanted:
        if not isinstance(item, (str, Mapping)) or len(item) == 0:
            raise UserError(f"{where}.modifiers: got {item!r}; write a name, or {{name: options}}")
        name, options = (item, {}) if isinstance(item, str) else next(iter(item.items()))
        pieces = modified(pieces, name, options or {}, f"{where}.modifiers")
        names.append(name)
    return check(build(row or "custom", pieces, where, context or {}, names), where)


methods: dict[str, Method] = {name: resolve(name) for name in ROWS}
