"""How new weights enter a vLLM worker, by way of vLLM's own weight-transfer API.

`ObjectStoreTransfer` is a backend of ours that takes a Snapshot; `actors.vllm_nccl` receives from GPU to GPU. Importing
this module registers both under their names; workers import it because it holds their `worker_extension_cls`. A CPU
engine of one worker goes another way, on which nothing stands still: `actors.vllm_shadow`.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from actors.vllm_nccl import NAME as NCCL
from actors.vllm_nccl import NcclReceiver, complete
from actors.vllm_shadow import Shadow, fits
from actors.weights import Snapshot, check_complete, cut, write


@dataclass
class ObjectStoreInit(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class ObjectStoreUpdate(WeightTransferUpdateInfo):
    """A verified snapshot; its buffer lies in `path` where the worker is another process."""

    snapshot: Snapshot
    path: str = ""


class ObjectStoreTransfer(WeightTransferEngine[ObjectStoreInit, ObjectStoreUpdate]):
    """Loads a snapshot by way of vLLM's layerwise reload, which also repacks what the CPU kernels had repacked."""

    init_info_cls = ObjectStoreInit
    update_info_cls = ObjectStoreUpdate

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._parameters = {name for name, _ in self.model.named_parameters()}

    def init_transfer_engine(self, init_info: ObjectStoreInit) -> None:
        """No connection is needed."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class also synchronises an accelerator, which a CPU worker lacks; loading from the CPU blocks anyway.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: ObjectStoreUpdate) -> None:
        weights = update_info.snapshot
        if update_info.path:
            weights = replace(weights, pieces=cut(np.memmap(update_info.path, np.uint8, "r"), weights.manifest))
        tensors = complete(self.model_config, weights.tensors())
        loaded = self.model.load_weights(  # type: ignore[operator]  # vLLM types its models as any torch module
            (name, t.to(self.device)) for name, t in tensors
        )
        check_complete(self._parameters, self._parameters if loaded is None else loaded)

    def finish_weight_update(self) -> None:
        with _quiet():
            finalize_layerwise_reload(self.model, self.model_config)
        # A head tied to the embedding receives no weights of its own, so the reload leaves in place what the CPU
        # kernels had packed of the OLD embedding. Pack again; on a GPU this does nothing.
        for head in (m for m in self.model.modules() if isinstance(m, ParallelLMHead)):
            head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        """Nothing is held."""


BACKENDS: dict[str, type[WeightTransferEngine]] = {"object_store": ObjectStoreTransfer, NCCL: NcclReceiver}
for name, backend in BACKENDS.items():
    if name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(name, backend)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without vLLM's warning for each layer without weights (rotary tables, tied heads): we check ourselves."""
    logger = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class Runner(Protocol):
    """What is used of the worker's part that runs the model."""

    def get_model(self) -> nn.Module: ...


class WorkerExtension:
    """Part of every vLLM worker (`worker_extension_cls`); that is also how the workers come to import this module."""

    # Of the worker that this is mixed into. Only said here: vLLM refuses an extension that brings names of the worker.
    vllm_config: VllmConfig
    device: torch.device
    model_runner: Runner
    weight_transfer_engine: NcclReceiver  # where transfers go by NCCL, and only then its methods are called

    def load_snapshot(self, info: dict[str, Any]) -> None:
        """Load a snapshot whatever the configured transfer is: with NCCL, late joiners and failures come this way."""
        transfer = ObjectStoreTransfer(
            self.vllm_config.weight_transfer_config, self.vllm_config, self.device, self.model_runner.get_model()
        )
        with set_current_vllm_config(self.vllm_config):
            transfer.start_weight_update()
            transfer.update_weights(info)
            transfer.finish_weight_update()

    def can_prepare(self) -> bool:
        """Whether `prepare` is for this worker's model."""
        return fits(self.model_runner.get_model())

    def prepare(self, weights: Snapshot) -> Shadow:
        """A verified snapshot made ready beside the model that serves; called on another thread than all else."""
        return Shadow(self.model_runner.get_model(), complete(self.vllm_config.model_config, weights.tensors()))

    def join_group(self, info: dict[str, Any], seconds: float) -> str:
        """Join the learner's NCCL group; "", or why not: an exception would count as a failure of the worker."""
        try:
            self.weight_transfer_engine.join(info, seconds)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def received(self) -> tuple[str, str]:
        """(digest, "") of the last broadcast, or ("", why it was interrupted)."""
        return self.weight_transfer_engine.outcome


@contextmanager
def snapshot_info(weights: Snapshot, processes: int) -> Iterator[dict[str, Any]]:
    """What `update_weights` of the workers takes: the snapshot itself in this process, a file in memory for several."""
    if processes == 1:
        yield {"snapshot": weights}
        return
    shared = Path("/dev/shm")
    with tempfile.NamedTemporaryFile(dir=shared if os.access(shared, os.W_OK) else None, prefix="alignlab-") as file:
        write(weights, file)
        file.flush()
        yield {"snapshot": replace(weights, pieces=()), "path": file.name}
