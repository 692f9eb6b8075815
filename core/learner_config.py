"""The options of the learner: `RunConfig.learner`."""

from __future__ import annotations

from typing import Literal

from core.section import Count, NonNegative, Positive, PositiveFloat, Section, Share


class SpikesConfig(Section):
    """Guards against gradient spikes; used by the optimizers spam and stable_spam only (learner/spam.py)."""

    interval: Count = 500
    """Updates between two resets of the moments; 0 never resets."""
    theta: NonNegative = 5000.0
    """spam: entries whose square exceeds theta times the second moment are clipped; 0 does not clip."""
    warmup: Count = 150
    """spam: updates over which the step grows back after a reset."""
    grace: Count = 20
    """spam: updates without clipping at the start and after a reset."""
    gammas: tuple[Share, Share, Share] = (0.7, 0.9, 0.999)
    """stable_spam: decay rates of the trackers of norm, squared norm and largest entry."""
    norm: bool = False
    """stable_spam: also normalise each tensor's gradient; then a step is as large whatever the advantages are."""


class OptimizerConfig(Section):
    name: Literal["adamw", "muon", "spam", "stable_spam"] = "adamw"
    """adamw; muon on the matrices inside the blocks with adamw on all else; or Adam with guards against spikes."""
    spikes: SpikesConfig = SpikesConfig()
    lr: PositiveFloat = 1e-6
    """Peak learning rate of AdamW."""
    muon_lr: PositiveFloat = 0.02
    """Peak learning rate of Muon's matrices; used by muon only."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    eps: PositiveFloat = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of matrices; biases and norms have none."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up, down to 0 at the last step."""
    warmup_steps: Count = 0
    """Steps over which the learning rate rises linearly from 0."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Clip the gradient's global norm; none does not clip."""


class TokenModelConfig(Section):
    """A model trained beside the policy that gives each token a number; only methods that need it have one."""

    path: str | None = None
    """Folder or hub name it starts from, with a fresh head where that has none; none is the policy's."""
    lr: PositiveFloat = 1e-5
    """Peak learning rate of its AdamW; all else is as in learner.optimizer."""
    warmup_steps: Count = 0
    """Steps at the start of the run in which it learns and the policy does not."""


class LearnerConfig(Section):
    ranks: Positive = 1
    """Processes of the learner; parameters are sharded over them with FSDP2."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the learner runs; auto is cuda when the cluster has GPUs."""
    token_budget: Positive = 8192
    """Most tokens (prompts included) of one packed micro-batch; a longer sequence is a micro-batch of its own."""
    minibatches: Positive = 1
    """Updates per epoch: a step's groups are split into so many parts."""
    epochs: Positive = 1
    """Passes over a step's groups."""
    old_logprobs: Literal["recompute", "rollout"] = "recompute"
    """Where a step has several updates: log-probabilities of the policy before it, by a pass of the learner, or those
    of the engine, which saves the pass; look at policy/mismatch_kl. On-policy only."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    offload: list[Literal["activations", "optimizer"]] = []
    """What waits in the machine's memory while the GPU does not need it: activations between forward and backward pass,
    moments of the optimizer between updates. Nothing changes on CPU."""
    compile: bool = False
    """Compile the model's blocks (torch.compile): a minute or more at the start, less memory traffic in each step."""
    logprob_chunk: Positive = 1024
    """Tokens whose logits are held at once while log-probabilities and entropy are taken."""
    threads: Positive = 1
    """Compute threads of each rank on CPU."""
    timeout: PositiveFloat = 3600.0
    """Seconds one step may take; then the learner is started again from the last checkpoint."""
    max_restarts: Count = 3
    """How often a lost learner is started again, without a new checkpoint in between, before the run stops."""
    optimizer: OptimizerConfig = OptimizerConfig()
    critic: TokenModelConfig = TokenModelConfig()
    token_reward_model: TokenModelConfig = TokenModelConfig()
