"""A version of the policy's weights on its way from the learner to the engines: one buffer, its manifest, its digest.

The buffer is a numpy array of bytes, so Ray's object store hands it to every actor of a machine without copying it.
`actors.vllm_weights` brings it into a vLLM worker. torch is imported where a tensor is touched.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

ALIGNMENT = 64  # bytes: every tensor starts where any dtype may start


class Refused(Exception):
    """Weights that were not loaded, or a group that was not joined. The version that served before serves on."""


class Interrupted(Exception):
    """A broadcast ended halfway. The engine samples nothing until it has whole weights again; it may be given them."""


class Entry(NamedTuple):
    """One tensor in the buffer."""

    name: str  # as in the checkpoint of the model ("model.embed_tokens.weight")
    dtype: str  # "float32", "bfloat16", ...
    shape: tuple[int, ...]
    offset: int  # bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


ITEM_SIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1}


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """All weights of one version. `digest` is a sha256 over (name, dtype, shape, bytes) of each tensor in order."""

    version: int
    digest: str
    manifest: tuple[Entry, ...]
    buffer: np.ndarray  # [bytes] uint8

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) pairs; the tensors are views of the buffer and must not be written to."""
        import torch

        for entry in self.manifest:
            piece = self.buffer[entry.offset : entry.offset + entry.size]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the object store's memory is read-only, and nobody writes
                flat = torch.from_numpy(piece)
            yield entry.name, flat.view(getattr(torch, entry.dtype)).view(entry.shape)


@dataclass(frozen=True, slots=True)
class Stored:
    """A Snapshot in an object store: what must be known of it without fetching its bytes."""

    version: int
    digest: str
    reference: Any


Layout = tuple[tuple[str, str, tuple[int, ...]], ...]  # (name, dtype, shape) in the order of sending


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Says that the learner is about to send this version over NCCL; the bytes do not pass here.

    Their digest (see Checksum) is known to both ends when they have passed.
    """

    version: int
    layout: Layout
    seconds: float = 300.0  # after which a receiver gives up


def snapshot(named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, dtype: str | None = None) -> Snapshot:
    """Copy tensors into a Snapshot, one at a time; floating-point ones become `dtype` (the engine's)."""
    import torch

    buffer, manifest, digest = bytearray(), [], hashlib.sha256()  # a bytearray grows in place: one copy of the model
    for name, tensor in named_tensors:
        tensor = tensor.detach()
        if dtype and tensor.is_floating_point():
            tensor = tensor.to(getattr(torch, dtype))
        buffer += bytes(-len(buffer) % ALIGNMENT)
        entry = Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), len(buffer))
        piece = tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        _add(digest, entry, piece)
        buffer += memoryview(piece)
        manifest.append(entry)
    return Snapshot(version, digest.hexdigest(), tuple(manifest), np.frombuffer(buffer, dtype=np.uint8))


def layout(named_tensors: Iterable[tuple[str, torch.Tensor]], dtype: str | None = None) -> Layout:
    """What `Broadcast` announces of these tensors, of which floating-point ones will travel as `dtype`."""
    return tuple(
        (name, dtype if dtype and t.is_floating_point() else str(t.dtype).removeprefix("torch."), tuple(t.shape))
        for name, t in named_tensors
    )


def verify(weights: Snapshot) -> None:
    """Raises Refused unless the buffer holds exactly what its digest says."""
    digest = hashlib.sha256()
    for entry in weights.manifest:
        if entry.offset + entry.size > len(weights.buffer):
            raise Refused(
                f"weights of version {weights.version}: the buffer ends within '{entry.name}'; send them again"
            )
        _add(digest, entry, weights.buffer[entry.offset : entry.offset + entry.size])
    if digest.hexdigest() != weights.digest:
        raise Refused(
            f"weights of version {weights.version}: their sha256 is {digest.hexdigest()[:12]}..., not the promised "
            f"{weights.digest[:12]}...; they changed on the way, send them again"
        )


def check_complete(parameters: Set[str], loaded: Set[str]) -> None:
    """Raises ValueError for parameters without weights: they would keep the values of an older version, silently."""
    if missing := parameters - loaded:
        raise ValueError(f"the weights lack {len(missing)} of the model's parameters, like {sorted(missing)[:3]}")


class Checksum:
    """A digest of tensors that pass by, computed on their own device. Both ends of a broadcast compare theirs.

    Of each tensor it takes sum over i of (2 i + 1) x_i modulo 2^64, x_i being the bits of element i: the same in
    whatever order a device adds, and another one if an element changes or two elements change places. It finds
    accidents and would not stop an adversary.
    """

    def __init__(self) -> None:
        self._headers: list[tuple[str, str, tuple[int, ...]]] = []
        self._sums: list[torch.Tensor] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor; nothing waits for the device here."""
        self._headers.append((name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)))
        self._sums.append(_weighted_sum(tensor))

    def sums(self) -> torch.Tensor:
        """[8 * tensors] uint8: a number for each tensor, in the order of adding."""
        import torch

        if any(each.is_cuda for each in self._sums):
            torch.cuda.synchronize()  # they were computed on several streams, which do not wait for each other
        return torch.stack(self._sums).view(torch.uint8)

    def digest(self) -> str:
        """Of names, dtypes, shapes and bytes of all tensors in their order."""
        text = repr(self._headers).encode() + self.sums().cpu().numpy().tobytes()
        return "nccl:" + hashlib.sha256(text).hexdigest()


BLOCK = 1 << 22  # elements that are widened to 8 bytes at once


def _weighted_sum(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    flat = tensor.detach().reshape(-1)
    # Never wider than the elements: received tensors lie packed, where nothing aligns them to more.
    bits = flat.view({1: torch.int8, 2: torch.int16}.get(flat.element_size(), torch.int32))
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), BLOCK):
        block = bits[start : start + BLOCK].to(torch.int64)
        places = torch.arange(start, start + len(block), device=bits.device)
        total += (block * (2 * places + 1)).sum()
    return total


def _add(digest: hashlib._Hash, entry: Entry, piece: np.ndarray) -> None:
    digest.update(repr((entry.name, entry.dtype, entry.shape)).encode())
    digest.update(memoryview(np.ascontiguousarray(piece)))
