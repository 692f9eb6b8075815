"""TRL's GRPO trainer as the benches run it: on CPU, without files and logs, in its own loop, told when a step ends."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

FIXED: dict[str, Any] = {
    **{"use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True},
    **{"loss_type": "grpo", "beta": 0.0, "max_steps": 1_000_000},
}


def need_trl() -> None:
    """Exit with how to install it, where it is not."""
    if importlib.util.find_spec("trl") is None:
        sys.exit('TRL is not installed: pip install -e ".[peers]"')


def train(
    model: str,
    folder: str,
    data: list[dict[str, Any]],
    reward: Callable[..., list[float]],
    settings: dict[str, Any],
    step_end: Callable[[], None],
    rollout: Callable[..., dict[str, list[Any]]] | None = None,
) -> None:
    """`GRPOTrainer.train` for ever; `step_end` is called after each step of the optimizer, and may end the process.

    settings: of GRPOConfig, beside FIXED. rollout: instead of its generation. Weights are float32, as ours are: bf16 of
    the settings is the precision of the passes.
    """
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # about `rollout_func`
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from transformers.utils.logging import disable_progress_bar
    from trl import GRPOConfig, GRPOTrainer

    class Ends(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            step_end()

    disable_progress_bar()
    kind: Any = GRPOTrainer
    kind(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(model),
        reward_funcs=reward,
        args=GRPOConfig(output_dir=folder, **FIXED | settings),
        train_dataset=Dataset.from_list(data),
        rollout_func=rollout,
        callbacks=[Ends()],
    ).train()
