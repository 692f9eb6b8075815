"""The processes of one learner and the few collectives it uses besides FSDP2's own."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Ranks:
    """This process among its equals: `rank` of `world`, computing on `device`."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable

    @classmethod
    def join(cls, rank: int, world: int, address: str, device: torch.device, timeout: float) -> Ranks:
        """Meet the other ranks at `address` (tcp://host:port, rank 0 listens). Raises after `timeout` seconds.

        A GPU must have an index (`own_device`); NCCL binds to it at the first collective, so no `device_id` is passed.
        """
        if device.type == "cuda":
            torch.cuda.set_device(device)
        patience = timedelta(seconds=timeout)
        dist.init_process_group(_backend(device), init_method=address, rank=rank, world_size=world, timeout=patience)
        return cls(rank, world, device)

    def mesh(self) -> DeviceMesh:
        """All ranks in one dimension. A rank alone that met nobody makes a group of its own, without a port."""
        if not dist.is_initialized():
            dist.init_process_group(_backend(self.device), store=dist.HashStore(), rank=0, world_size=1)
        return init_device_mesh(self.device.type, (self.world,))

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the ranks, in place; every rank gets the same bits."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in the order of the ranks; for a few numbers, not for tensors."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def own_device(kind: str) -> torch.device:
    """The device of one rank: Ray shows each of its processes only the GPU that it has lent to it."""
    return torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")


def _backend(device: torch.device) -> str:
    # Checkpoints and counters are CPU tensors on a GPU machine too, so both backends are there; torch sends objects and
    # barriers through the CPU's.
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
