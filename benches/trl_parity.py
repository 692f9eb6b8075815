"""Our objectives against the code of TRL's GRPO trainer: the same rewards and log-probs into both, in float64.

    pip install -e ".[peers]"
    python benches/trl_parity.py

A row of the table is a trainer as TRL makes it from these settings, and a method as `resolve` makes it from this spec.
TRL runs its own code from the rewards to the loss: advantages, correction weights, token counts, objective. Replaced is
what needs a model: a `rollout_func` gives the completions, the forward pass returns given log-probs and entropies, and
no engine starts behind `use_vllm`. Advantages and loss are compared by absolute difference; gradients, with respect to
log-probs and entropies, relative to the largest one. A row repeats if an earlier one has the same gradient: then its
settings do nothing on these inputs.

Where TRL's definition is another one than ours, the spec takes TRL's: eps 1e-4 beside a standard deviation, rows
without tokens counted (`rows=all`), the KL weighed by the ratio (`gradient=ratio`) unless use_bias_correction_kl is
false, no filter and no overlong penalty in DAPO, CISPO's epsilon_high as an absolute cap (5 is our 1 + 4). An update is
one micro-batch here: some of TRL's losses are means over micro-batches, ours do not depend on the split. GMPO's step
alone has no row without tokens, to which TRL gives the loss -A (without a gradient) and we give 0.

Not compared, because the definitions differ and no option of ours is TRL's: the KL weight under sequence ratios (TRL's
is the sequence's ratio, ours the token's), the entropy bonus under `top_entropy_quantile` (TRL's is over the chosen
tokens, ours over all), the adaptive entropy coefficient (TRL's follows the entropy of the last update, ours that of the
policy before the step), and tokens that the engine could not score (TRL gives them weight 1).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from algos.batch import Batch
from algos.loss import advantages, late, loss, normalise
from algos.methods import resolve
from core.loading import override

Result = tuple[Tensor, Tensor, Tensor]
"""Advantages [B, T], loss [], gradient [2, B, T] with respect to log-probs and entropies; 0 at masked cells."""

TOLERANCE = 1e-6
GROUPS, SIZE, TOKENS = 4, 4, 12
WORD, END, PAD = range(3)

EPS, NO_SCALE = "advantage.group.eps=1e-4", "advantage.group.scale=none"
ROWS_ALL = "aggregation.seq_mean_token_mean.rows=all"
CLIP = f"surrogate=ppo_clip {EPS}"
SEQUENCE = "importance_sampling_level=sequence"
NAIVE_KL = "beta=0.04 use_bias_correction_kl=false"


def _engine(mode: str) -> str:
    bounds = "vllm_importance_sampling_clip_min=0.9 vllm_importance_sampling_clip_max=1.2"
    return f"use_vllm=true vllm_importance_sampling_mode={mode} {bounds}"


def _correction(kind: str, level: str) -> str:
    return f"correction.{kind}.level={level} correction.{kind}.low=0.9 correction.{kind}.high=1.2"


CASES = (  # TRL's settings, our spec
    ("loss_type=grpo", f"row=grpo kl=none {EPS} {ROWS_ALL}"),
    (f"loss_type=grpo {NAIVE_KL}", f"row=grpo {EPS} {ROWS_ALL}"),
    (f"loss_type=grpo {NAIVE_KL} num_iterations=1", f"row=grpo {EPS} {ROWS_ALL}"),
    ("loss_type=grpo beta=0.04", f"row=grpo kl.gradient=ratio {EPS} {ROWS_ALL}"),
    ("loss_type=grpo beta=0.04 num_iterations=1", f"row=grpo kl.gradient=ratio {EPS} {ROWS_ALL}"),
    ("loss_type=grpo delta=1.5", f"row=grpo kl=none surrogate.ppo_clip.dual=1.5 {EPS} {ROWS_ALL}"),
    ("loss_type=grpo mask_truncated_completions=true", f"row=grpo kl=none drop_truncated=true {EPS} {ROWS_ALL}"),
    ("loss_type=bnpo", CLIP),
    ("loss_type=bnpo scale_rewards=none", f"surrogate=ppo_clip {NO_SCALE}"),
    ("loss_type=bnpo scale_rewards=batch", "row=lite_ppo"),
    ("loss_type=dr_grpo scale_rewards=none", "row=dr_grpo"),
    ("loss_type=dapo epsilon_high=0.28 delta=10", f"row=dapo filter=none shaping=none {EPS}"),
    ("loss_type=dapo multi_objective_aggregation=normalize_then_sum", "row=gdpo"),
    (f"loss_type=grpo {SEQUENCE} epsilon=3e-4 epsilon_high=4e-4", f"row=gspo {EPS} {ROWS_ALL}"),
    (f"loss_type=luspo {SEQUENCE} epsilon=2e-3 epsilon_high=2.5e-3", f"row=luspo {EPS}"),
    ("trainer=gmpo epsilon=0.4", f"row=gmpo {EPS} {ROWS_ALL}"),
    ("loss_type=cispo epsilon_high=5", f"row=cispo {EPS}"),
    (f"loss_type=cispo {SEQUENCE} epsilon_high=1.1", f"row=cispo ratio=seq_mean surrogate.cispo.high=0.1 {EPS}"),
    ("loss_type=sapo", f"row=sapo {EPS} {ROWS_ALL}"),
    ("loss_type=vespo", f"row=vespo {EPS}"),
    (f"loss_type=vespo {_engine('token_truncate')}", f"row=vespo {_correction('truncate', 'token')} {EPS}"),
    (f"loss_type=vespo {_engine('token_mask')}", f"row=vespo {_correction('mask', 'token')} {EPS}"),
    (f"loss_type=dapo {_engine('token_truncate')}", f"{CLIP} {_correction('truncate', 'token')}"),
    (f"loss_type=dapo {_engine('token_mask')}", f"{CLIP} {_correction('mask', 'token')}"),
    (f"loss_type=dapo {_engine('sequence_truncate')}", f"{CLIP} {_correction('truncate', 'sequence')}"),
    (f"loss_type=dapo {_engine('sequence_mask')}", f"{CLIP} {_correction('mask', 'sequence')}"),
    ("loss_type=dapo entropy_coef=0.01", f"{CLIP} entropy.coef=0.01"),
    ("loss_type=dapo top_entropy_quantile=0.2", f"{CLIP} token_weight.top_entropy.fraction=0.2"),
    ("loss_type=dapo off_policy_mask_threshold=0.05", f"{CLIP} token_weight.opsm.delta=0.05"),
    (
        f"loss_type=dapo beta=0.04 mask_truncated_completions=true top_entropy_quantile=0.5 {_engine('token_mask')}",
        f"{CLIP} kl.coef=0.04 kl.gradient=ratio drop_truncated=true token_weight.top_entropy.fraction=0.5 "
        f"{_correction('mask', 'token')}",
    ),
)


def main() -> int:
    """Print the table; 0 if everything agrees, 1 if not, 2 without TRL."""
    if importlib.util.find_spec("trl") is None:
        print('TRL is not installed: pip install -e ".[peers]"', file=sys.stderr)
        return 2
    _quiet()
    torch.set_default_dtype(torch.float64)  # of the tensors that TRL makes of lists
    agreeing, seen = 0, []
    print(f"trl {importlib.metadata.version('trl')}, float64, tolerance {TOLERANCE:g}")
    _print_row("advantage", "loss", "gradient", "verdict", "trl", "ours")
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(folder)
        for settings, spec in CASES:
            batch, logprobs = step(empty="gmpo" not in settings)
            theirs = peer(settings, batch, logprobs, folder)
            found = differences(ours(settings, spec, batch, logprobs), theirs)
            new = not any(torch.allclose(theirs[2], other, rtol=1e-4, atol=0) for other in seen)
            seen.append(theirs[2])
            agrees = all(x <= TOLERANCE for x in found)  # NaN is not
            agreeing += agrees and new
            verdict = "differs" if not agrees else "agrees" if new else "repeats"
            _print_row(*(f"{x:.1e}" for x in found), verdict, settings, spec)
    print(f"{agreeing} of {len(CASES)} agree")
    return int(agreeing < len(CASES))


def _print_row(advantage: str, loss: str, gradient: str, verdict: str, settings: str, spec: str) -> None:
    numbers = f"{advantage:>9} {loss:>9} {gradient:>9}  {verdict:7}"
    columns = (textwrap.wrap(text, 54, break_long_words=False, break_on_hyphens=False) for text in (settings, spec))
    for left, right in zip_longest(*columns, fillvalue=""):
        print(f"{numbers:38}  {left:54}  {right}".rstrip())
        numbers = ""


def _quiet() -> None:
    """Nothing from the net, and no warnings: TRL has one for each unscorable row, of which the step has one."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def step(empty: bool) -> tuple[Batch, Tensor]:
    """A step of 16 completions and current log-probs [B, T], with what is easy to get wrong: tool output inside rows,
    truncated rows, a group of equal rewards, a missing component, an unscorable row, tokens that have moved far, and,
    if `empty`, a row of nothing but tool output."""
    torch.manual_seed(0)
    shape = (GROUPS * SIZE, TOKENS)
    lengths = torch.randint(4, TOKENS + 1, shape[:1])
    lengths[0] = TOKENS
    place = torch.arange(TOKENS)
    mask = (place < lengths[:, None]) & ((torch.rand(shape) < 0.8) | (place == lengths[:, None] - 1))
    mask[10] &= not empty
    rewards = torch.randint(9, (len(lengths), 2)) / 8  # TRL keeps rewards in float32: these are exact
    rewards[-SIZE:], rewards[1, 0], rewards[6] = 0.5, torch.nan, torch.nan
    current = -0.1 - 2 * torch.rand(shape)
    old = current - 0.3 * torch.randn(shape)
    old[2:6, 0] -= 2.5
    batch = Batch(
        mask=mask,
        group=torch.arange(GROUPS).repeat_interleave(SIZE),
        rewards=rewards,
        reward_weights=torch.tensor([1.0, 0.5]),
        truncated=torch.isin(torch.arange(len(lengths)), torch.tensor([3, 8])),
        rollout_logprobs=old + 0.2 * torch.randn(shape),
        old_logprobs=old,
        ref_logprobs=current + 0.3 * torch.randn(shape),
        entropy=torch.rand(shape).float().double(),  # TRL's quantile is in float32
    )
    return batch, current


def ours(settings: str, spec: str, batch: Batch, logprobs: Tensor) -> Result:
    """The stages of `algos.loss` on the step as one update."""
    method = resolve(override({}, spec.split()), context={"max_tokens": TOKENS})
    if "num_iterations=1" in settings:
        batch = replace(batch, old_logprobs=None)
    logprobs, entropy = logprobs.clone().requires_grad_(), batch.entropy.clone().requires_grad_()
    batch = advantages(method, batch)
    batch = late(method, batch, logprobs) if "late" in method.needs else normalise(method, batch)
    value = loss(method, batch, logprobs, entropy).loss
    return batch.channels[0].advantages, value.detach(), gradient(value, logprobs, entropy)


def peer(settings: str, batch: Batch, logprobs: Tensor, folder: str) -> Result:
    """TRL's trainer on the same step."""
    logprobs, entropy = logprobs.clone().requires_grad_(), batch.entropy.clone().requires_grad_()
    trainer = make_trainer(override({}, settings.split()), batch, folder)

    def forward(model: Any, *_: Any, compute_entropy: bool = False, **__: Any) -> tuple[Tensor, Tensor | None, None]:
        if compute_entropy:
            return logprobs, entropy, None
        return batch.ref_logprobs if model is trainer.ref_model else batch.old_logprobs, None, None

    trainer._get_per_token_logps_and_entropies = forward
    trainer.current_gradient_accumulation_steps = 1  # else the training loop sets it
    inputs = trainer._generate_and_score_completions([{"prompt": "a"}] * len(batch.mask))
    value = trainer.compute_loss(trainer.model, inputs)
    spread = torch.where(batch.mask, inputs["advantages"][:, None], 0.0)
    return spread, value.detach(), gradient(value, logprobs, entropy)


def make_trainer(settings: dict[str, Any], batch: Batch, folder: str) -> Any:
    """The trainer of these settings, whose rollouts and rewards are those of the batch."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.experimental.gmpo import GMPOTrainer

    kind = GMPOTrainer if settings.pop("trainer", None) == "gmpo" else GRPOTrainer
    fixed = {
        **{"output_dir": folder, "report_to": "none", "use_cpu": True, "bf16": False, "vllm_mode": "colocate"},
        **{"per_device_train_batch_size": len(batch.mask), "num_generations": SIZE, "num_iterations": 2},
        **{"max_completion_length": TOKENS, "reward_weights": batch.reward_weights.tolist()},
    }
    with patch("trl.trainer.grpo_trainer.VLLMGeneration"):
        return kind(
            model=folder,
            reward_funcs=[reward(column) for column in batch.rewards.unbind(1)],
            args=GRPOConfig(**fixed | settings),
            train_dataset=Dataset.from_dict({"prompt": ["a"]}),
            rollout_func=lambda prompts, trainer: rollout(batch),
        )


def reward(column: Tensor) -> Callable[..., list[float]]:
    """A reward function of TRL that returns these rewards [B]."""

    def given(completions: list[str], **_: Any) -> list[float]:
        return column.tolist()

    return given


def rollout(batch: Batch) -> dict[str, list[list[Any]]]:
    """The batch's completions as TRL's lists: a completion is truncated if it does not stop; tool output is masked."""
    lengths = ((batch.mask * torch.arange(TOKENS)).amax(1) + 1).tolist()
    ends = [WORD if cut else END for cut in batch.truncated]
    return {
        "prompt_ids": [[WORD] for _ in lengths],
        "completion_ids": [[WORD] * (length - 1) + [end] for length, end in zip(lengths, ends, strict=True)],
        "logprobs": [row[:n].tolist() for row, n in zip(batch.rollout_logprobs, lengths, strict=True)],
        "env_mask": [row[:n].int().tolist() for row, n in zip(batch.mask, lengths, strict=True)],
    }


def tiny_model(folder: str) -> None:
    """A model folder, because a trainer has a model; nothing here depends on its numbers."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    words = Tokenizer(models.WordLevel({"a": WORD, "</s>": END, "<pad>": PAD}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    sizes = {"vocab_size": 3, "hidden_size": 4, "intermediate_size": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(folder)


def gradient(value: Tensor, logprobs: Tensor, entropy: Tensor) -> Tensor:
    """[2, B, T]."""
    return torch.stack(torch.autograd.grad(value, (logprobs, entropy), allow_unused=True, materialize_grads=True))


def differences(mine: Result, theirs: Result) -> tuple[float, float, float]:
    """Largest differences of advantages, loss and gradient."""
    a, b, c = (float((x - y).abs().max()) for x, y in zip(mine, theirs, strict=True))
    return a, b, c / float(theirs[2].abs().max())


if __name__ == "__main__":
    sys.exit(main())
