"""What a pass does not need on the GPU right now lies in the machine's memory: activations, and optimiser state.

with saved_elsewhere(where):            # `where`: a device, None for no offload
    loss = forward()                    # what autograd saves for the backward pass goes there and comes back in it
move(optimizer, device)                 # the state of a torch optimiser
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

SMALL = 1 << 16
"""Elements below which a tensor stays: it costs more to move it than to hold it."""


def saved_elsewhere(where: torch.device | None) -> Any:
    """A context in which activations that autograd saves are kept on `where`; the same gradients to the last bit.

    Parameters and what is a view of one stay: they are there anyway. With activation checkpointing only the inputs of
    the blocks are saved, and these move.
    """
    return nullcontext() if where is None else torch.autograd.graph.saved_tensors_hooks(_sender(where), _bring_back)


def _sender(where: torch.device) -> Any:
    def send(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        owner = tensor if tensor._base is None else tensor._base
        if tensor.numel() < SMALL or isinstance(owner, nn.Parameter):
            return tensor
        # Pinned memory, so that the copy waits its turn on the GPU's stream and nobody waits for the copy.
        pinned = tensor.is_cuda and where.type == "cpu"
        held = torch.empty(tensor.shape, dtype=tensor.dtype, device=where, pin_memory=pinned)
        return tensor.device, held.copy_(tensor, non_blocking=True)

    return send


def _bring_back(saved: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    return saved if isinstance(saved, Tensor) else saved[1].to(saved[0], non_blocking=True)


def move(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Move moments and the like to `device`; step counts, which are single numbers, stay where torch wants them."""
    for entries in optimizer.state.values():
        for name, tensor in entries.items():
            if tensor.ndim:
                entries[name] = tensor.to(device, non_blocking=True)


@contextmanager
def at_hand(optimizer: torch.optim.Optimizer, device: torch.device, away: torch.device | None) -> Iterator[None]:
    """A context in which the state is on `device`; afterwards it is `away` again. None: it never leaves."""
    if away is not None:
        move(optimizer, device)
    yield
    if away is not None:
        move(optimizer, away)
