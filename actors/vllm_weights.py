"""The two ends of a weight transfer inside vLLM's own weight-transfer API.

Receiving: `ObjectStoreTransfer`, a backend of ours that vLLM workers find under the name `object_store` (importing this
module registers it; workers import it because it holds their `worker_extension_cls`). For GPUs vLLM's `nccl` backend
receives, and `NcclSender` is its counterpart on learner rank 0.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from actors.weights import Broadcast, Snapshot


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
            weights = replace(weights, buffer=np.memmap(update_info.path, dtype=np.uint8, mode="r"))
        loaded = self.model.load_weights((name, t.to(self.device)) for name, t in weights.tensors())
        missing = self._parameters - (loaded if loaded is not None else self._parameters)
        if missing:  # they would keep the values of an older version, silently
            raise ValueError(f"the weights lack {len(missing)} of the model's parameters, like {sorted(missing)[:3]}")

    def finish_weight_update(self) -> None:
        with _quiet():
            finalize_layerwise_reload(self.model, self.model_config)
        # A head tied to the embedding receives no weights of its own, so the reload leaves in place what the CPU
        # kernels had packed of the OLD embedding. Pack again; on a GPU this does nothing.
        for head in (m for m in self.model.modules() if isinstance(m, ParallelLMHead)):
            head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        """Nothing is held."""


if "object_store" not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine("object_store", ObjectStoreTransfer)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without vLLM's warning for each layer without weights (rotary tables, tied heads): `missing` above knows more."""
    logger = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class WorkerExtension:
    """Part of every vLLM worker (`worker_extension_cls`); that is also how the workers come to import this module."""

    def load_snapshot(self, info: dict[str, Any]) -> None:
        """Load a snapshot whatever the configured transfer is: an actor that joins late is in no NCCL group yet."""
        transfer = ObjectStoreTransfer(
            self.vllm_config.weight_transfer_config, self.vllm_config, self.device, self.model_runner.get_model()
        )
        with set_current_vllm_config(self.vllm_config):
            transfer.start_weight_update()
            transfer.update_weights(info)
            transfer.finish_weight_update()


@contextmanager
def snapshot_info(weights: Snapshot, processes: int) -> Iterator[dict[str, Any]]:
    """What `update_weights` of the workers takes: the snapshot itself in this process, a file in memory for several."""
    if processes == 1:
        yield {"snapshot": weights}
        return
    shared = Path("/dev/shm")
    with tempfile.NamedTemporaryFile(dir=shared if os.access(shared, os.W_OK) else None, prefix="alignlab-") as file:
        weights.buffer.tofile(file)
        file.flush()
        yield {"snapshot": replace(weights, buffer=np.empty(0, np.uint8)), "path": file.name}


def broadcast_info(weights: Broadcast) -> dict[str, Any]:
    """What `update_weights` of workers in an NCCL group takes."""
    names, dtypes, shapes = zip(*weights.manifest, strict=True)
    return {"names": list(names), "dtype_names": list(dtypes), "shapes": [list(shape) for shape in shapes]}


class NcclSender:
    """Learner rank 0's end of the NCCL group; every engine calls `Engine.connect` while this is constructed.

    `manifest` fixes order, dtypes and shapes of all later sends: `Broadcast.manifest`.
    """

    def __init__(self, address: str, port: int, world_size: int, manifest: Broadcast) -> None:
        """Blocks until all `world_size` - 1 workers of all engines have joined."""
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

        self._source = _Stream(manifest)
        info = NCCLTrainerInitInfo(rank=0, master_address=address, master_port=port, world_size=world_size)
        self._engine = NCCLTrainerWeightTransferEngine.trainer_init(info, client=_Elsewhere(), source=self._source)

    def send(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Broadcast one version, while every engine is inside `update_weights(Broadcast(...))`."""
        self._source.tensors = named_tensors
        self._engine.send_weights()

    def close(self) -> None:
        """Leave the group."""
        self._engine.shutdown()


class _Stream(WeightSource):
    """The learner's (name, tensor) pairs as vLLM wants them: announced first, then on the GPU in that dtype."""

    def __init__(self, manifest: Broadcast) -> None:
        self._metas = [ParamMeta(name, getattr(torch, dtype), shape) for name, dtype, shape in manifest.manifest]
        self.tensors: Iterable[tuple[str, torch.Tensor]] = ()

    def metadata(self) -> list[ParamMeta]:
        return self._metas

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        dtypes = {meta.name: meta.dtype for meta in self._metas}
        for name, tensor in self.tensors:
            yield name, tensor.detach().to(device="cuda", dtype=dtypes.get(name, tensor.dtype))


class _Elsewhere:
    """vLLM's trainer wants to tell the engines what to do; here the driver tells them, at the same time."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Any) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...
