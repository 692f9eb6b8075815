"""How many operations a packed row needs, and how many a second this device can do: together, how good its use is.

    needs = needed(hf)                          # once a model; None where it cannot be known
    done = needs.forward(micro) + needs.backward(micro)
    share = done / (seconds * peak(device, dtype))

A multiplication and an addition are two operations. Counted is what the mathematics needs: the matrices of the blocks
for each token that is read, attention for each pair of a token with one that it sees, the head for each token that is
predicted. Not counted is what an implementation does beside it: padding, masked pairs, what is computed twice to save
memory. Norms, activations and softmax are left out, too: they are few.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from learner.collate import Micro

CUDA_PEAKS = {  # operations a second of dense bfloat16 matrices, as the makers say; the first name that fits counts
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX A6000": 155e12,
}
MEASURE_SECONDS = 0.2  # for the rate of a device that is not in the table
LARGEST = 4096  # rows of the matrices that are multiplied then


@dataclass(frozen=True)
class Needs:
    """Operations of one forward pass: of the matrices for a token that is read, of the head for one that is predicted.

    `trained`: how much of either belongs to weights that are trained. `pairs`: operations of all layers of one window
    for a token and one that it sees, by the window (None: a token sees all before it).
    """

    token: float
    head: float
    pairs: dict[int | None, float]
    trained: tuple[float, float]

    def forward(self, micro: Micro) -> Tensor:
        """Operations of one pass without gradient, a number on the row's device: reading it would make a GPU wait."""
        return self._matrices(micro, self.token, self.head) + self._attention(micro)

    def backward(self, micro: Micro) -> Tensor:
        """Operations of the gradients: again as many for what a product was made of, and for each weight that learns.

        A matrix needs one product for its input's gradient and one for its own; attention has no weights, but the
        gradients of both factors of its products.
        """
        inputs = self._matrices(micro, self.token, self.head)
        return inputs + self._matrices(micro, *self.trained) + 2 * self._attention(micro)

    def _matrices(self, micro: Micro, token: float, head: float) -> Tensor:
        count = token * micro.tokens.numel() + head * micro.targets.numel()
        # Without rows the token is a stand-in, for a rank without work.
        return torch.full((), count if micro.rows else 0.0, dtype=torch.float64, device=micro.tokens.device)

    def _attention(self, micro: Micro) -> Tensor:
        """A token at position p sees p + 1, whoever else reads the prompt that they share."""
        total = torch.zeros((), dtype=torch.float64, device=micro.tokens.device)
        for window, cost in self.pairs.items() if micro.rows else ():
            seen = micro.positions + 1
            total += cost * (seen if window is None else seen.clamp(max=window)).sum()
        return total


def needed(hf: PreTrainedModel) -> Needs | None:
    """What a transformers model needs, from its matrices and its config; sharded parameters count as a whole.

    Of a mixture's experts a token needs as many as the config says. None where it does not say so, and for layers
    that are neither matrices nor attention.
    """
    config: Any = hf.config
    config = config.get_text_config()
    head = getattr(hf.get_output_embeddings(), "weight", None)
    token = trained = 0.0
    for name, weight in _matrices(hf, head):
        share = _active(config, name)
        if share is None or (weight.dim() > 2 and ".experts." not in name):
            return None
        operations = 2.0 * weight.numel() * share
        token += operations
        trained += operations * weight.requires_grad
    last = 0.0 if head is None else 2.0 * head.numel()
    learns = head is not None and head.requires_grad
    pairs = _pairs(config)
    return None if pairs is None else Needs(token, last, pairs, (trained, last * learns))


def _matrices(hf: PreTrainedModel, head: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of what multiplies every token that is read: neither vectors, tables nor the head."""
    tables = {id(module.weight) for module in hf.modules() if isinstance(module, nn.Embedding)} | {id(head)}
    for name, weight in hf.named_parameters():
        if weight.dim() >= 2 and id(weight) not in tables:
            yield name, weight


def _active(config: Any, name: str) -> float | None:
    """The share of a matrix that works on one token; None where the config does not say it."""
    if ".experts." not in name:
        return 1.0
    active = getattr(config, "num_experts_per_tok", None)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    every = next((n for n in (getattr(config, name, None) for name in names) if n), None)
    return active / every if active and every else None


def _pairs(config: Any) -> dict[int | None, float] | None:
    """Operations by window: a score and a share of a value, for every query head; heads that share keys count alike.

    None for layers that look at what came before them in another way.
    """
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    query, value = getattr(config, "qk_head_dim", None) or width, getattr(config, "v_head_dim", None) or width
    # A model whose layers are all of a kind has a window for all of them, or none.
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    if not {"sliding_attention", "full_attention"} >= set(kinds):
        return None
    window = getattr(config, "sliding_window", None)
    layers = Counter(window if kind == "sliding_attention" else None for kind in kinds)
    return {window: 2.0 * heads * (query + value) * count for window, count in layers.items()}


@functools.cache
def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that matrix products reach here: of known GPUs from a table, of others measured, once.

    On CPU it is that of the process's present threads (`torch.set_num_threads`).
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        if (rate := next((rate for known, rate in CUDA_PEAKS.items() if known in name), None)) is not None:
            return rate
    return _measured(device, dtype)


@torch.no_grad()
def _measured(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of square matrices that grow until MEASURE_SECONDS are spent: small ones do not fill the device."""
    best, spent, size, seconds = 0.0, 0.0, 128, 0.0
    while spent + seconds < MEASURE_SECONDS:
        a, b = torch.ones(2, size, size, device=device, dtype=dtype)
        a @ b  # allocates, and loads what it needs
        seconds = min(_seconds(a, b) for _ in range(2))
        spent, best = spent + 3 * seconds, max(best, 2.0 * size**3 / seconds)
        if size < LARGEST and spent + 3 * 8 * seconds < MEASURE_SECONDS:
            size, seconds = 2 * size, 8 * seconds
    return best


def _seconds(a: Tensor, b: Tensor) -> float:
    wait = torch.cuda.synchronize if a.is_cuda else lambda: None
    wait()
    started = time.perf_counter()
    a @ b
    wait()
    return time.perf_counter() - started
