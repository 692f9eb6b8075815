"""LoRA: small trained matrices beside frozen ones, through peft (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    W x  becomes  W x + alpha / rank * B (A x)      A [rank, in] random, B [out, rank] zero: at first nothing changes

peft replaces the linear layers inside the Hugging Face model, which stays the object of the class that it was. Under a
`PeftModel` around it, `base_model` would be another module, every name would get a prefix, and `learner.model` would
have to know of both kinds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from core.config import LoraConfig
from core.errors import UserError, nearest

OURS = "default"  # the name under which peft keeps our adapters


class Pair(NamedTuple):
    """The adapters of one matrix W [out, in], which acts as W + scale * b @ a."""

    a: nn.Parameter  # [rank, in]
    b: nn.Parameter  # [out, rank]
    scale: float


def inject(hf: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Put adapters beside the matrices that `config.targets` names, and freeze everything else.

    They are float32 and a function of the seed, so the same on every rank. Raises UserError.
    """
    try:
        import peft
    except ImportError:
        raise UserError("model.lora: peft is not installed; `make env` installs what pyproject.toml names") from None
    chosen = targets(hf, config)
    options = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft says int, and only divides it by r
        target_modules=chosen,
        base_model_name_or_path=hf.name_or_path,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(options, hf, OURS)
    options.target_modules = chosen  # peft makes a set of it, which would be written in another order each time


def targets(hf: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Names, or ends of names, of the modules that get adapters. Raises UserError for one that cannot.

    The output head cannot: log-probs are taken from its weight without calling it.
    """
    head = hf.get_output_embeddings()
    linear = [name for name, module in hf.named_modules() if isinstance(module, nn.Linear) and module is not head]
    kinds = sorted({name.rpartition(".")[2] for name in linear})
    if not kinds:
        raise UserError(f"model.lora: {type(hf).__name__} has no linear layers that could get adapters; leave it out")
    if config.targets == "all-linear":
        return kinds
    for wanted in config.targets:
        if not any(f".{name}".endswith(f".{wanted}") for name in linear):
            raise UserError(f"model.lora.targets: there is no linear layer '{wanted}'; {nearest(wanted, kinds)}")
    return list(config.targets)


def pairs(hf: PreTrainedModel) -> dict[str, Pair]:
    """The adapters by the Hugging Face name of their matrix; none in a model that has none."""
    return {
        f"{name}.weight": Pair(layer.lora_A[OURS].weight, layer.lora_B[OURS].weight, layer.scaling[OURS])
        for name, layer in _layers(hf)
    }


def plain(name: str) -> str | None:
    """The Hugging Face name of a parameter of a model with adapters; none for the adapters themselves.

    >>> plain("model.layers.0.mlp.up_proj.base_layer.weight"), plain("model.layers.0.mlp.up_proj.lora_A.default.weight")
    ('model.layers.0.mlp.up_proj.weight', None)
    """
    return None if ".lora_" in name else name.replace(".base_layer.", ".")


@contextmanager
def disabled(hf: PreTrainedModel) -> Iterator[None]:
    """The model without its adapters, for passes that need no gradient."""
    layers = [layer for _, layer in _layers(hf)]
    for layer in layers:
        layer.enable_adapters(False)
        # peft also takes their requires_grad, but FSDP2 looks once, in whichever pass is first, for what is trained.
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _layers(hf: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """peft's layers by the name of the module that they have replaced."""
    return ((name, module) for name, module in hf.named_modules() if hasattr(module, "lora_A"))
