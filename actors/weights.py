"""A version of the policy's weights on its way from the learner to the engines: its tensors, their manifest, a digest.

The tensors are numpy arrays of bytes, so Ray's object store takes each as it lies in the learner's memory and hands it
to every actor of a machine without copying it. `actors.vllm_weights` brings them into a vLLM worker. torch is imported
where a tensor is touched.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
ALIGNMENT = 64  # bytes: in one buffer every tensor starts where any dtype may start


class Refused(Exception):
    """Weights that were not loaded, or a group that was not joined. The version that served before serves on."""


class Interrupted(Exception):
    """A broadcast ended halfway. The engine samples nothing until it has whole weights again; it may be given them."""


class Entry(NamedTuple):
    """One tensor."""

    name: str  # as in the checkpoint of the model ("model.embed_tokens.weight")
    dtype: str  # "float32", "bfloat16", ...
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


ITEM_SIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1}


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """All weights of one version.

    `digest` is the XXH3 of 128 bits over (name, dtype, shape, bytes) of each tensor in order. It is computed as fast as
    memory is read. Two versions never share one by accident; it would not stop an adversary.
    """

    version: int
    digest: str
    manifest: tuple[Entry, ...]
    pieces: tuple[np.ndarray, ...]  # of each entry, [bytes] uint8

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(piece.nbytes for piece in self.pieces)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) pairs; the tensors are views of the pieces and must not be written to."""
        import torch

        for entry, piece in zip(self.manifest, self.pieces, strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the object store's memory is read-only, and nobody writes
                flat = torch.from_numpy(piece) if len(piece) else torch.empty(0, dtype=torch.uint8)
            yield entry.name, flat.view(getattr(torch, entry.dtype)).view(entry.shape)


@dataclass(frozen=True, slots=True)
class Stored:
    """A Snapshot in an object store: what must be known of it without fetching its bytes."""

    version: int
    digest: str
    reference: Any
    nbytes: int = 0
    seconds: float = 0.0  # that the learner spent on it


Layout = tuple[tuple[str, str, Shape], ...]  # (name, dtype, shape) in the order of sending


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Says that the learner is about to send this version over NCCL; the bytes do not pass here.

    Their digest (see Checksum) is known to both ends when they have passed.
    """

    version: int
    layout: Layout
    seconds: float = 300.0  # after which a receiver gives up


def view(named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, dtype: str | None = None) -> Snapshot:
    """A Snapshot that is good until the tensors change; floating-point ones become `dtype` (the engine's).

    Nothing is copied of contiguous tensors that lie on the CPU in this dtype.
    """
    import torch

    manifest, pieces, digest = [], [], xxhash.xxh3_128()
    for name, tensor in named_tensors:
        tensor = tensor.detach()
        if dtype and tensor.is_floating_point():
            tensor = tensor.to(getattr(torch, dtype))
        manifest.append(Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)))
        pieces.append(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
        _add(digest, manifest[-1], pieces[-1])
    return Snapshot(version, _text(digest), tuple(manifest), tuple(pieces))


def snapshot(named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, dtype: str | None = None) -> Snapshot:
    """A `view` of copies, made one at a time."""
    return view(((name, tensor.detach().clone()) for name, tensor in named_tensors), version, dtype)


def write(weights: Snapshot, stream: IO[bytes]) -> None:
    """Put all pieces into one buffer, of which `cut` makes them again."""
    for piece in weights.pieces:
        stream.write(np.ascontiguousarray(piece).data)
        stream.write(bytes(-piece.nbytes % ALIGNMENT))


def cut(buffer: np.ndarray, manifest: Sequence[Entry]) -> tuple[np.ndarray, ...]:
    """Views of what `write` has written."""
    pieces, offset = [], 0
    for entry in manifest:
        pieces.append(buffer[offset : offset + entry.size])
        offset += entry.size + -entry.size % ALIGNMENT
    return tuple(pieces)


def layout(named_tensors: Iterable[tuple[str, torch.Tensor]], dtype: str | None = None) -> Layout:
    """What `Broadcast` announces of these tensors, of which floating-point ones will travel as `dtype`."""
    return tuple(
        (name, dtype if dtype and t.is_floating_point() else str(t.dtype).removeprefix("torch."), tuple(t.shape))
        for name, t in named_tensors
    )


def size(plan: Layout) -> int:
    """Bytes of what travels so."""
    return sum(Entry(*each).size for each in plan)


def verify(weights: Snapshot) -> None:
    """Raises Refused unless the pieces are exactly what the digest says. Lets other threads run meanwhile."""
    digest = xxhash.xxh3_128()
    for entry, piece in zip(weights.manifest, weights.pieces, strict=True):
        if piece.nbytes != entry.size:
            raise Refused(
                f"weights of version {weights.version}: '{entry.name}' has {piece.nbytes} bytes, not {entry.size}; "
                "send them again"
            )
        _add(digest, entry, piece)
    if _text(digest) != weights.digest:
        raise Refused(
            f"weights of version {weights.version}: their digest is {_text(digest)}, not the promised "
            f"{weights.digest}; they changed on the way, send them again"
        )


def check_complete(parameters: Set[str], loaded: Set[str]) -> None:
    """Raises ValueError for parameters without weights: they would keep the values of an older version, silently."""
    if missing := parameters - loaded:
        raise ValueError(f"the weights lack {len(missing)} of the model's parameters, like {sorted(missing)[:3]}")


LORA_A, LORA_B = ".lora_A", ".lora_B"  # ends of the names of an adapter's two tensors: [r, in], [out, r] scaled


def adapted(names: Iterable[str]) -> set[str]:
    """The parameters for which there are adapters among these tensors."""
    return {name.removesuffix(end) for name in names for end in (LORA_A, LORA_B) if name.endswith(end)}


def check_adapters(given: Mapping[str, Shape], base: Mapping[str, Shape], version: int) -> None:
    """Raises Refused for adapters that do not fit the model's own parameters, of which `base` says the shapes."""
    for name in sorted(adapted(given)):
        a, b, whole = given.get(name + LORA_A, ()), given.get(name + LORA_B, ()), base.get(name, ())
        if not whole:
            problem = "which the engine's own model lacks"
        elif not (len(a) == len(b) == 2 and a[0] == b[1] and (b[0], a[1]) == tuple(whole)):
            problem = f"of shapes A {list(a)} and B {list(b)}, which do not make its {list(whole)}"
        else:
            continue
        raise Refused(f"weights of version {version} have an adapter for '{name}' {problem}")


def merged(base: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights of a model of which `given` is what was trained: adapters, and parameters as a whole.

        W = W0 + B A        in float32, W0 of `base`

    What has no adapter comes from `given` if it is there, else from `base`, in which a tensor is read when its turn is.
    """
    names = adapted(given)
    plain = [name for name in given if not name.endswith((LORA_A, LORA_B))]
    for name in dict.fromkeys([*base, *plain]):
        weight = given[name] if name in given else base[name]
        if name in names:
            a, b = given[name + LORA_A].float(), given[name + LORA_B].float()
            weight = weight.to(a.device, a.dtype).addmm(b, a)
        yield name, weight


class ModelFiles(Mapping[str, "torch.Tensor"]):
    """The tensors of a model's safetensors files by name, read from the mapped file when asked for."""

    def __init__(self, model: str, revision: str | None = None) -> None:
        """`model`: a folder, or a hub name whose files the engine has fetched already."""
        from safetensors import safe_open

        if not (folder := Path(model)).is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(model, revision=revision, allow_patterns="*.safetensors"))
        files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shapes(self) -> dict[str, Shape]:
        """From the files' headers."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}


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


def _add(digest: xxhash.xxh3_128, entry: Entry, piece: np.ndarray) -> None:
    digest.update(repr((entry.name, entry.dtype, entry.shape)).encode())
    digest.update(np.ascontiguousarray(piece).data)


def _text(digest: xxhash.xxh3_128) -> str:
    return f"xxh3:{digest.hexdigest()}"
