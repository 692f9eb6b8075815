"""A learner on disk: `trainer/` to continue bit-equal, `model/` for vLLM and transformers.

    trainer/   torch.distributed.checkpoint: float32 master weights and optimiser state, each rank its shards, readable
               by any number of ranks; counters and the method's memory in learner.json
    model/     Hugging Face folder: config, generation config, tokenizer, safetensors in the model's `dtype`
    adapter/   with LoRA: the adapters as a folder of peft's. Then trainer/ holds nothing else either, and model/ holds
               the weights with the adapters merged into them

There is no random state to save: nothing in the learner draws numbers except the order of the groups, which is a
function of (seed, step). The caller renames the folder when everything is in it, so nothing here is atomic by itself.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from core import disk
from core.errors import UserError
from learner import adapters
from learner.model import changing, full, whole_tensors
from learner.optim import Optimizer
from learner.ranks import Ranks

Trained = Mapping[str, tuple[PreTrainedModel, Optimizer | None]]
"""What changes in a run, by the prefix of its names: "" is the policy; a reference that moves has no optimiser."""


def save_trainer(folder: Path, trained: Trained, counters: dict[str, Any], ranks: Ranks) -> None:
    """Write `folder` (made here) from all ranks and fsync it. `counters` is plain JSON."""
    if ranks.rank == 0:
        folder.mkdir()
    ranks.wait()
    with _without_warning(ranks):
        dcp.save(_state(trained), checkpoint_id=folder, no_dist=ranks.world == 1)
    if ranks.rank == 0:
        (folder / "learner.json").write_text(json.dumps(counters))
        flush(folder)
    ranks.wait()


def load_trainer(folder: Path, trained: Trained, ranks: Ranks) -> dict[str, Any]:
    """Read weights and optimiser state in place; returns the counters. UserError when they are of another model."""
    counters = folder / "learner.json"
    if not counters.is_file():
        raise UserError(f"{folder}: not a complete trainer state (learner.json is missing)")
    try:
        with _without_warning(ranks):
            dcp.load(_state(trained), checkpoint_id=folder, no_dist=ranks.world == 1)
    except (dcp.api.CheckpointException, RuntimeError, ValueError) as error:
        raise UserError(f"{folder}: does not fit the configured model and optimizer: {error}") from error
    return json.loads(counters.read_text())


def save_model(folder: Path, hf: PreTrainedModel, tokenizer_path: str, dtype: torch.dtype, ranks: Ranks) -> None:
    """Write the Hugging Face folder on rank 0 (whose memory holds one full copy in `dtype`) and fsync it."""
    tensors: dict[str, Tensor] = {}
    for name, whole in whole_tensors(hf):
        if ranks.rank == 0:
            tensors[name] = whole.to("cpu", dtype if whole.is_floating_point() else whole.dtype)
    if ranks.rank == 0:
        hf.config.dtype = dtype
        hf.save_pretrained(folder, state_dict=tensors)
        AutoTokenizer.from_pretrained(tokenizer_path).save_pretrained(folder)
        flush(folder)
    ranks.wait()


def save_adapter(folder: Path, hf: PreTrainedModel, ranks: Ranks) -> None:
    """Write the folder that `peft.PeftModel.from_pretrained(base, folder)` reads, on rank 0, float32, and fsync it."""
    tensors: dict[str, Tensor] = {}
    for name, pair in adapters.pairs(hf).items():
        for kind, tensor in (("lora_A", pair.a), ("lora_B", pair.b)):
            tensors[f"base_model.model.{name.removesuffix('weight')}{kind}.weight"] = full(tensor).cpu()
    if ranks.rank == 0:
        hf.peft_config[adapters.OURS].save_pretrained(folder)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        flush(folder)
    ranks.wait()


def flush(folder: Path) -> None:
    """fsync all files below `folder` and the folders themselves, so that a rename of it is a promise kept."""
    for path in [*folder.rglob("*"), folder]:
        disk.sync(path)


@contextmanager
def _without_warning(ranks: Ranks) -> Iterator[None]:
    """torch warns that a rank alone saves alone, which is what we ask of it."""
    with warnings.catch_warnings():
        if ranks.world == 1:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _state(trained: Trained) -> dict[str, Tensor]:
    """The live tensors by name; torch.distributed.checkpoint reads into them."""
    state: dict[str, Tensor] = {}
    for prefix, (hf, optimiser) in trained.items():
        state |= {f"{prefix}model/{name}": tensor.detach() for name, tensor in changing(hf)}
        if optimiser is not None:
            state |= {f"{prefix}optimizer/{name}": tensor for name, tensor in optimiser.state()}
    return state
