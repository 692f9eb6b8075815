"""Two actors against one in a run that is bound by generation: steps per second, one core for each actor.

    python -m benches.two_actors                     # about 10 minutes, after `make quickstart`

A real run whose learner has next to nothing to do: the policy (28 M random weights, the quickstart's tokenizer) never
ends a completion by itself, so all are truncated, and the method drops truncated ones from the loss. What is left are
generation, scores of a rule, records, and the hand-off of weights after each step. max_staleness 1 keeps both actors'
queues full. Actor 0 has the first core, actor 1 the second, which the learner and the driver share: what the driver
does for a batch is in the second actor's way, as it would not be on a machine with a third core.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benches.harness import Ratio, alternate, main
from benches.runs import ROOT, Row, mean, train

TASK = ROOT / "build" / "quickstart"
STEPS, WARM = 8, 2
CORES = {"actor-0": 0, "actor-1": 1, "learner-0": 1}
CHANGES = [
    *("method.drop_truncated=true", "rollout.prompts=16", "rollout.group_size=8", "rollout.max_tokens=64"),
    *("rollout.max_staleness=1", "actors.max_num_seqs=64", f"data.path={TASK}/train.jsonl"),
]


def measure(rounds: int) -> list[Ratio]:
    """One row."""
    if not (TASK / "policy" / "config.json").exists():
        sys.exit(f"{TASK} is missing: `make quickstart` makes it")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        make_model(model)
        names = iter(f"run-{number}" for number in range(2 * rounds))

        def run(actors: int) -> list[Row]:
            changes = [f"steps={STEPS}", f"model.path={model}", f"actors.count={actors}", *CHANGES]
            cores = {name: core for name, core in CORES.items() if name != "actor-1" or actors == 2}
            rows = train(Path(folder), next(names), "configs/quickstart.yaml", changes, warm=WARM, cores=cores)
            return rows[:-2]  # the last steps have nothing to sample ahead

        pairs = alternate(rounds, lambda: run(2), lambda: run(1), warm=0)
    two, one = pairs[-1]
    return [
        Ratio(
            "actors: steps/s of two / of one",
            [mean(one, "time/step") / mean(two, "time/step") for two, one in pairs],
            at_least=1.8,
            facts={
                "seconds a step of one": mean(one, "time/step"),
                "of two": mean(two, "time/step"),
                "learner's seconds a step": mean(two, "time/train"),
                "hand-off": mean(two, "time/publish"),
            },
        )
    ]


def make_model(folder: Path) -> None:
    """Random weights with the quickstart's tokenizer, which hardly ever end a completion."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, Qwen3ForCausalLM

    config = AutoConfig.from_pretrained(TASK / "policy")
    config.update({"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8})
    config.update({"num_key_value_heads": 4, "head_dim": 64, "layer_types": ["full_attention"] * 8})
    torch.manual_seed(0)
    model, tokenizer = Qwen3ForCausalLM(config), AutoTokenizer.from_pretrained(TASK / "policy")
    with torch.no_grad():  # logits far apart but for that of the end, 0: its share is below 1e-4
        model.lm_head.weight *= 10
        model.lm_head.weight[tokenizer.eos_token_id] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure))
