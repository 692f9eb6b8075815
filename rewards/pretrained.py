"""Models of rewards as transformers loads them: safetensors only, no remote code, weights that are missing told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.errors import UserError, first_line, nearest


def check_folder(option: str, path: str) -> None:
    """Refuse a path that can only be a local folder and is no model, without asking a hub. Raises UserError."""
    folder = Path(path).expanduser()
    if (folder / "config.json").exists():
        return
    if folder.is_dir():
        raise UserError(f"{option}: {path} holds no config.json; name a Hugging Face model folder or a hub name")
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        beside = sorted(str(p.parent) for p in folder.parent.glob("*/config.json")) if folder.parent.is_dir() else []
        hint = nearest(path, beside) if beside else "name a Hugging Face model folder or a hub name"
        raise UserError(f"{option}: there is no folder {path}; {hint}")


def chosen_device(device: str, option: str = "device") -> str:
    """`device`, auto resolved. Raises UserError, naming `option`, where there is no such device."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{option}: cuda, but torch sees no GPU here; use cpu or auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def pretrained(
    kind: str, path: str, dtype: str, option: str, meant: str = "", **config: Any
) -> tuple[Any, Any, list[str]]:
    """(model, tokenizer, names of weights that the files lack, which are then random).

    kind: name of a transformers Auto class. meant: what it is loaded as, for the message. Raises UserError, naming
    `option`, when transformers cannot load it.
    """
    import torch
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model, info = getattr(transformers, kind).from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **config,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"{option}: transformers cannot load '{path}'{meant}: {first_line(error)}") from error
    return model, tokenizer, sorted(info["missing_keys"])
