"""The two ends of a broadcast over NCCL: vLLM's own, with an end in time and a digest of what went over the wire.

Receiving: `NcclReceiver`, vLLM's worker engine under a name of ours. Sending: `NcclSender` on learner rank 0, around
vLLM's trainer engine. The sender's checksums travel last, so a worker knows by itself whether it has what was sent.

NCCL waits for ever for a member that is gone. So joining happens on a thread that can be left behind, and a broadcast
is watched by a clock that aborts the communicator: the kernels end, and vLLM's code runs on without sending anything.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.nccl_common import worker_init_process_group
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)

from actors.weights import Broadcast, Checksum, Layout, ModelFiles, adapted, check_complete, merged

NAME = "nccl_verified"  # NcclReceiver's among vLLM's weight transfers
CHECKSUMS = "alignlab.checksums"  # what travels after the last tensor
BUFFER_BYTES = 256 << 20  # tensors travel packed into buffers of this size; vLLM's 1 GiB is much for a full GPU

Result = TypeVar("Result")


def broadcast_info(weights: Broadcast) -> dict[str, Any]:
    """What `update_weights` of workers in an NCCL group takes."""
    names, dtypes, shapes = zip(*_on_the_wire(weights.layout), strict=True)
    return {
        "names": list(names),
        "dtype_names": list(dtypes),
        "shapes": [list(shape) for shape in shapes],
        "seconds": weights.seconds,
    }


def _on_the_wire(layout: Layout) -> Layout:
    return (*layout, (CHECKSUMS, "uint8", (8 * len(layout),)))


# Receiving -----------------------------------------------------------------------------------------------------------


@dataclass
class NcclUpdate(NCCLWeightTransferUpdateInfo):
    """vLLM's announcement of what comes, and how long to wait for it."""

    seconds: float = 300.0


class NcclReceiver(NCCLWeightTransferEngine):
    """What a worker receives is loaded as it comes; whether it was all of it and intact says `outcome` at the end."""

    update_info_cls = NcclUpdate
    outcome = ("", "nothing was sent yet")  # (digest, "") of the last broadcast, or ("", why there is none)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._parameters = {name for name, _ in self.model.named_parameters()}

    def join(self, info: dict[str, Any], seconds: float) -> None:
        """Leave the group of before and join a new one. Raises when not all have joined within `seconds`."""
        self.shutdown()
        init_info = self.parse_init_info(info)
        self.packed, self.packed_buffer_size_bytes = True, BUFFER_BYTES
        group = within(
            seconds,
            lambda: worker_init_process_group(init_info, self.parallel_config),
            late=lambda group: group.destroy(),
        )
        self.model_update_group = _usable(group)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Raises ValueError for weights that are not those that were sent: they are in the model all the same.

        An interruption is no error here, because vLLM has to finish the update: that puts its layers together again.
        """
        assert isinstance(update_info, NcclUpdate)  # the base class makes an `update_info_cls` of what is announced
        self.outcome = ("", "it has not ended")
        model, intake = self.model, _Intake(self.model, hold=bool(adapted(update_info.names)))
        # All that the base class does with it is to call its load_weights.
        self.model = intake  # type: ignore[assignment]  # vLLM types it as any torch module
        try:
            with abort_after(update_info.seconds, self.shutdown) as late:
                super().receive_weights(update_info)
                intake.load_held(self.model_config)
            problem = f"not all of it came within {update_info.seconds:.0f} s" if late.is_set() else ""
        except Exception as error:
            self.shutdown()
            problem = f"{type(error).__name__}: {error}"
        finally:
            self.model = model
        self.outcome = ("", problem) if problem else (intake.digest(self._parameters), "")


class _Intake:
    """Stands in for the model while weights come in: it sees them before vLLM cuts, fuses and repacks them.

    With `hold`, for adapters, it keeps them until the last has come: an adapter's halves may come apart.
    """

    def __init__(self, model: Any, hold: bool = False) -> None:
        self._model, self._checksum = model, Checksum()
        self._sent: torch.Tensor | None = None
        self._loaded: set[str] | None = set()
        self._held: dict[str, torch.Tensor] | None = {} if hold else None

    def load_weights(self, weights: Sequence[tuple[str, torch.Tensor]]) -> None:
        """A part of the tensors, as they came; the sender's checksums are the last of the last part."""
        *rest, last = weights
        if last[0] == CHECKSUMS:
            self._sent = last[1]
        else:
            rest.append(last)
        for name, tensor in rest:
            self._checksum.add(name, tensor)
        if self._held is not None:
            self._held |= {name: tensor.clone() for name, tensor in rest}  # their buffer is used again
        elif rest:
            self._load(rest)

    def load_held(self, model_config: Any) -> None:
        """Load what was held, with the engine's own model."""
        if self._held is not None:
            self._load(complete(model_config, self._held.items()))

    def _load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        loaded = self._model.load_weights(weights)
        self._loaded = None if loaded is None or self._loaded is None else self._loaded | loaded  # some do not say

    def digest(self, parameters: set[str]) -> str:
        """Raises ValueError unless exactly what was sent came, and filled all parameters."""
        if self._sent is None or not torch.equal(self._checksum.sums(), self._sent):
            raise ValueError("the weights that came are not those that were sent")
        check_complete(parameters, parameters if self._loaded is None else self._loaded)
        return self._checksum.digest()


def complete(model_config: Any, sent: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
    """All weights of which these were sent: themselves, or where they are adapters, merged with the engine's own."""
    given = dict(sent)
    if not adapted(given):
        return given.items()
    return merged(ModelFiles(model_config.model, model_config.revision), given)


# Sending -------------------------------------------------------------------------------------------------------------


class NcclSender:
    """Learner rank 0's end of the NCCL group; every engine calls `Engine.connect` while this is constructed.

    `layout` fixes order, dtypes and shapes of all later sends: that of their Broadcast.
    """

    def __init__(self, address: str, port: int, world_size: int, layout: Layout, seconds: float) -> None:
        """Raises when not all `world_size` - 1 workers of all engines have joined within `seconds`."""
        self._source = _Stream(layout)
        info = NCCLTrainerInitInfo(
            rank=0,
            master_address=address,
            master_port=port,
            world_size=world_size,
            packed_buffer_size_bytes=BUFFER_BYTES,
        )
        self._engine = within(
            seconds,
            lambda: NCCLTrainerWeightTransferEngine.trainer_init(info, client=_Elsewhere(), source=self._source),
            late=lambda engine: engine.shutdown(),
        )
        _usable(self._engine.model_update_group)

    def send(self, named_tensors: Iterable[tuple[str, torch.Tensor]], seconds: float) -> str:
        """Broadcast one version, while every engine is inside `update_weights(Broadcast(...))`; its digest.

        Raises when it did not all go out within `seconds`; then this is of no use any more.
        """
        if torch.cuda.is_available():  # vLLM reads on streams of its own, which do not wait for the optimiser's
            torch.cuda.current_stream().synchronize()
        self._source.tensors = named_tensors
        with abort_after(seconds, self.close) as late:
            self._engine.send_weights()
        if late.is_set():
            raise TimeoutError(f"not all of it was received within {seconds:.0f} s")
        return self._source.checksum.digest()

    def close(self) -> None:
        """Leave the group, whatever is under way in it."""
        self._engine.shutdown()


class _Stream(WeightSource):
    """The learner's (name, tensor) pairs as vLLM wants them: announced first, then on the GPU in that dtype."""

    def __init__(self, layout: Layout, device: str = "cuda") -> None:
        self._device = device
        self._metas = [ParamMeta(name, getattr(torch, dtype), shape) for name, dtype, shape in _on_the_wire(layout)]
        self.tensors: Iterable[tuple[str, torch.Tensor]] = ()
        self.checksum = Checksum()  # of what was sent last

    def metadata(self) -> list[ParamMeta]:
        return self._metas

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        dtypes = {meta.name: meta.dtype for meta in self._metas}
        self.checksum = Checksum()
        for name, tensor in self.tensors:
            tensor = tensor.detach().to(device=self._device, dtype=dtypes.get(name, tensor.dtype)).contiguous()
            self.checksum.add(name, tensor)
            yield name, tensor
        yield CHECKSUMS, self.checksum.sums()


class _Elsewhere:
    """vLLM's trainer wants to tell the engines what to do; here the driver tells them, at the same time."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Any) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


# Time ----------------------------------------------------------------------------------------------------------------


def within(seconds: float, work: Callable[[], Result], late: Callable[[Result], None]) -> Result:
    """What `work` returns or raises on a thread of its own; TimeoutError after `seconds`.

    The thread cannot be ended and is left behind then; what it still returns goes to `late`.
    """
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # a new thread would begin with device 0
            result = work()
        except BaseException as error:
            if outcome.set_running_or_notify_cancel():
                outcome.set_exception(error)
            return
        if outcome.set_running_or_notify_cancel():
            outcome.set_result(result)
        else:
            late(result)

    threading.Thread(target=run, daemon=True).start()
    try:
        return outcome.result(max(seconds, 0.0))
    except TimeoutError:
        if not outcome.cancel():
            return outcome.result()  # it ended in this very moment, or the error is its own
        raise TimeoutError(f"not within {seconds:.0f} s") from None


@contextmanager
def abort_after(seconds: float, abort: Callable[[], None]) -> Iterator[threading.Event]:
    """Calls `abort` on another thread if the block takes longer; the event says, after the block, whether it did."""
    late = threading.Event()

    def fire() -> None:
        late.set()
        abort()

    clock = threading.Timer(max(seconds, 0.0), fire)
    clock.daemon = True
    clock.start()
    try:
        yield late
    finally:
        clock.cancel()
        clock.join()


def _usable(group: Any) -> Any:
    """Raises RuntimeError for a communicator that sends nothing, which vLLM makes where it does not find NCCL."""
    if group.disabled:
        raise RuntimeError("vLLM did not find the NCCL library (VLLM_NCCL_SO_PATH can name it)")
    return group
