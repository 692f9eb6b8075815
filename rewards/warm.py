"""WARM: one reward model whose parameters are the mean of several that were trained from the same start.

Ramé et al., "WARM: On the Benefits of Weight Averaged Reward Models", arXiv 2401.12187. It costs one forward pass where
an ensemble costs one per member, and like an ensemble it is harder to exploit than its members.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import UserError
from rewards.reward_text import FILE

if TYPE_CHECKING:
    from torch import Tensor

NOT_ARCHITECTURE = ("_name_or_path", "transformers_version")
NOT_COPIED = (".safetensors", ".safetensors.index.json", "fit_reward.json")  # the last are numbers of one member


def average(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each parameter, computed in float64 and given in its own precision; whole numbers must be equal.

    Raises ValueError where names, shapes or whole numbers differ.
    """
    import torch

    first = states[0]
    means: dict[str, Tensor] = {}
    for state in states[1:]:
        if odd := first.keys() ^ state.keys():
            raise ValueError(f"the parameter {min(odd)} is not in all of them")
    for name, tensor in first.items():
        members = [state[name] for state in states]
        if any(member.shape != tensor.shape for member in members):
            raise ValueError(f"{name} has the shapes {' and '.join(sorted({str(list(m.shape)) for m in members}))}")
        if tensor.is_floating_point():
            means[name] = torch.stack([member.double() for member in members]).mean(0).to(tensor.dtype)
        elif all(torch.equal(member, tensor) for member in members):
            means[name] = tensor
        else:
            raise ValueError(f"{name} holds whole numbers that differ")
    return means


def average_folders(folders: Sequence[str | Path], out: str | Path) -> None:
    """Writes to `out` the mean of the models in `folders`, with the tokenizer and files of the first.

    Raises UserError where they are not of one architecture, do not read texts the same way, or `out` is not empty.
    """
    from safetensors.torch import save_file

    paths, target = [Path(folder).expanduser() for folder in folders], Path(out).expanduser()
    if len(paths) < 2:
        raise UserError("a mean of models needs two or more folders")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is not empty; name a new folder for the mean")
    for path in paths:
        _check_alike(paths[0], path)
    try:
        means = average([_state(path) for path in paths])
    except ValueError as error:
        raise UserError(f"{', '.join(map(str, paths))} are not of one architecture: {error}") from None
    target.mkdir(parents=True, exist_ok=True)
    save_file(means, target / "model.safetensors", metadata={"format": "pt"})
    for file in paths[0].iterdir():
        if file.is_file() and not file.name.endswith(NOT_COPIED):
            shutil.copyfile(file, target / file.name)


def _check_alike(first: Path, other: Path) -> None:
    """Raises UserError where two models differ in their config, or in how they read a text."""
    for name, ignored in (("config.json", NOT_ARCHITECTURE), (FILE, ())):
        one, two = _json(first / name, ignored), _json(other / name, ignored)
        differing = sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key))
        if differing:
            key = differing[0]
            raise UserError(
                f"{other / name}: {key} is {two.get(key)!r:.60}, but {one.get(key)!r:.60} in {first}; "
                "only models of one architecture and one way of reading have a mean"
            )


def _json(file: Path, ignored: Sequence[str]) -> dict[str, Any]:
    if not file.is_file():
        if file.name == FILE:  # another trainer's
            return {}
        raise UserError(f"{file.parent} holds no {file.name}; name the folder of a reward model")
    return {key: value for key, value in json.loads(file.read_text("utf-8")).items() if key not in ignored}


def _state(folder: Path) -> dict[str, Tensor]:
    """All parameters of a folder's safetensors."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no .safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
