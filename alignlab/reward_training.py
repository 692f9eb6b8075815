"""The verb `fit-reward`: a reward model out of files of preference pairs, and how often it agrees with each file.

    alignlab fit-reward pairs.jsonl --base build/minilm --out build/reward-models/polite-0

A row is {"prompt": [{"role": "user", "content": ...}], "chosen": text, "rejected": text}, with a number `margin` if it
likes. Which rows are held out depends on their prompts alone: the same for every seed, so the members of an ensemble
are measured on rows that none of them has seen, and a prompt is never on both sides.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import UserError, nearest

if TYPE_CHECKING:
    from learner.bradley_terry import Pair, Progress, Read, Recipe
    from rewards.reward_model import Device
    from rewards.reward_text import Reading

Row = Mapping[str, Any]
COLUMNS = ("prompt", "chosen", "rejected")
METRICS = "fit_reward.json"
PAD = "<|pad|>"


@dataclass(frozen=True)
class PairFile:
    """The rows of one file, by what becomes of them."""

    path: str
    train: Sequence[Row]
    measure: Sequence[Row]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `alignlab fit-reward`."""
    count, amount = _number(int, above=0), _number(float, above=0)
    parser.add_argument("files", nargs="+", metavar="FILE.jsonl", help="pairs: rows of prompt, chosen, rejected")
    parser.add_argument("--base", required=True, help="folder or hub name of the model to start from")
    parser.add_argument("--out", required=True, help="folder for the reward model")
    parser.add_argument("--test", action="append", default=[], metavar="FILE.jsonl", help="pairs to measure on only")
    parser.add_argument("--held-out", type=_share, default=0.1, help="share of prompts to measure on (default: 0.1)")
    parser.add_argument("--seed", type=int, default=0, help="of the new head, the order, the dropout (default: 0)")
    parser.add_argument("--epochs", type=count, default=2, help="passes over the pairs (default: 2)")
    parser.add_argument("--batch", type=count, default=16, help="pairs a step (default: 16)")
    parser.add_argument("--batch-tokens", type=count, default=16384, help="padded tokens a pass (default: 16384)")
    parser.add_argument("--max-tokens", type=count, help="longest text (default: the base's limit, at most 2048)")
    parser.add_argument("--lr", type=amount, default=1e-4, help="learning rate at its peak (default: 1e-4)")
    parser.add_argument(
        "--centre", type=_number(float), default=0.0, help="weight of (chosen + rejected)^2 (default: 0)"
    )
    parser.add_argument("--freeze-encoder", action="store_true", help="train only the head, and a pooler before it")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--threads", type=count, default=1, help="on CPU (default: 1)")


def fit_reward(arguments: argparse.Namespace) -> int:
    """Check the rows, train, measure, write. Raises UserError, before anything slow where that is possible."""
    from alignlab.plan import check_folder

    out = Path(arguments.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {arguments.out} is no empty folder; name another, or remove it")
    check_folder("--base", arguments.base)
    train = [split(path, read_pairs(path), arguments.held_out) for path in arguments.files]
    if not any(file.train for file in train):
        raise UserError(f"--held-out {arguments.held_out}: no row is left to train on; lower it, or bring more rows")
    files = without_trained([*train, *(PairFile(path, [], read_pairs(path)) for path in arguments.test)])
    for file in files:
        print(f"{file.path}: {len(file.train)} pairs to train on, {len(file.measure)} to measure on", flush=True)
    _train(arguments, files, out)
    print(f"{arguments.out}: the reward model; its numbers: {METRICS}")
    print(f"next: name it in a run's config, rewards: {{helpful: {{fn: reward_model, path: {arguments.out}}}}}")
    return 0


def _train(arguments: argparse.Namespace, files: Sequence[PairFile], out: Path) -> None:
    """The slow part: load, encode, train, save, measure."""
    import torch
    import transformers

    from learner.bradley_terry import Recipe, fit
    from rewards.reward_model import read_scores

    transformers.logging.set_verbosity_error()  # it would warn of the new head
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    recipe = Recipe(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Recipe) if f.name in arguments})
    torch.manual_seed(recipe.seed)  # the new head's
    model, reading = load_base(arguments.base, arguments.max_tokens, arguments.device)
    read = functools.partial(read_scores, model)
    curve = fit(model, read, [encode(row, reading) for file in files for row in file.train], recipe, print_progress)
    save(model, reading, out)
    numbers = {
        "base": arguments.base,
        "form": reading.form,
        "max_tokens": reading.max_tokens,
        "recipe": dataclasses.asdict(recipe),
        "curve": [dataclasses.asdict(point) for point in curve],
        "files": {file.path: measure(model, read, file, reading, recipe) for file in files},
    }
    (out / METRICS).write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- rows
def read_pairs(path: str) -> list[Row]:
    """The rows of a JSONL file, checked. Raises UserError that names the file and the row."""
    from alignlab.prompts import read_rows

    rows = read_rows(path, option="FILE")
    for number, row in enumerate(rows, 1):
        problem = _problem(row)
        if problem:
            raise UserError(
                f'{path}: row {number}: {problem}; a row is {{"prompt": [{{"role": "user", "content": ...}}], '
                '"chosen": text, "rejected": text}'
            )
    return rows


def _problem(row: Row) -> str | None:
    """What is wrong with a row, if anything."""
    for column in COLUMNS:
        if column not in row:
            return f"no column '{column}' ({nearest(column, row)})"
    prompt = row["prompt"]
    if not isinstance(prompt, list) or not prompt:
        return f"'prompt' is {prompt!r:.60}, not a list of chat messages"
    for message in prompt:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            return f"'prompt' holds {message!r:.60}, not a message with the texts role and content"
    if prompt[-1]["role"] != "user":
        return f"'prompt' ends with the role {prompt[-1]['role']!r}, and the answers follow a user"
    for column in COLUMNS[1:]:
        if not isinstance(row[column], str) or not row[column].strip():
            return f"'{column}' is {row[column]!r:.60}, not a text"
    if row["chosen"] == row["rejected"]:
        return "chosen and rejected are the same text, so there is nothing to learn; remove the row"
    margin = row.get("margin", 0.0)
    if not isinstance(margin, int | float) or not math.isfinite(margin):
        return f"'margin' is {margin!r:.60}, not a number"
    return None


def split(path: str, rows: Sequence[Row], share: float) -> PairFile:
    """About `share` of the prompts held out, by their text."""
    held = [_draw(row) < share for row in rows]
    return PairFile(
        path,
        [row for row, out in zip(rows, held, strict=True) if not out],
        [row for row, out in zip(rows, held, strict=True) if out],
    )


def _draw(row: Row) -> float:
    """A number in [0, 1) that is a function of the prompt."""
    digest = hashlib.blake2b(_prompt(row).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def _prompt(row: Row) -> str:
    return json.dumps([[message["role"], message["content"]] for message in row["prompt"]])


def without_trained(files: Sequence[PairFile]) -> list[PairFile]:
    """The same files without the rows to measure on whose prompt is trained on somewhere."""
    trained = {_prompt(row) for file in files for row in file.train}
    return [
        dataclasses.replace(file, measure=[row for row in file.measure if _prompt(row) not in trained])
        for file in files
    ]


# ---------------------------------------------------------------- the model
def load_base(path: str, max_tokens: int | None, device: Device) -> tuple[Any, Reading]:
    """The model with one label, its head new where it has none, and how it reads. Raises UserError."""
    from rewards.pretrained import chosen_device
    from rewards.reward_model import check_padding, is_decoder, load_classifier
    from rewards.reward_text import read_reading

    folder = str(Path(path).expanduser())
    model, tokenizer = load_classifier(folder, "float32", chosen_device(device), new_head=True, where="--base")
    if is_decoder(model):
        give_padding(model, tokenizer)
    reading = read_reading(folder, tokenizer, model.config, is_decoder(model), max_tokens, where="--base")
    check_padding(model, reading, path)
    return model, reading


def give_padding(model: Any, tokenizer: Any) -> None:
    """A pad token of its own for a decoder that has none, or pads with the end of sequence."""
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": PAD})
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            # Nothing ever attends to it, so how its embedding is drawn does not matter.
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def encode(row: Row, reading: Reading) -> Pair:
    """A row as token ids."""
    from learner.bradley_terry import Pair

    chosen, rejected = (reading.encode(row["prompt"], row[side]) for side in ("chosen", "rejected"))
    return Pair(chosen, rejected, float(row.get("margin", 0.0)))


def save(model: Any, reading: Reading, out: Path) -> None:
    """The folder of a reward model: safetensors, tokenizer, how it reads."""
    model.config.problem_type = "regression"  # so that no server puts a sigmoid on the score
    model.save_pretrained(out)
    reading.tokenizer.save_pretrained(out)
    reading.save(out)


# ---------------------------------------------------------------- numbers
def measure(model: Any, read: Read, file: PairFile, reading: Reading, recipe: Recipe) -> dict[str, Any]:
    """How often the model agrees with a file, printed and returned; a tie counts a half."""
    from alignlab.results import interval
    from learner.bradley_terry import gaps, ranked_right

    found = gaps(model, read, [encode(row, reading) for row in file.measure], recipe.batch_tokens)
    if not found:
        print(f"{file.path}: no pairs to measure on")
        return {"pairs": 0}
    right = ranked_right(found)
    accuracy, (low, high) = sum(right) / len(right), interval(right)
    print(f"{file.path}: accuracy {accuracy:.3f} [{low:.3f}, {high:.3f}] on {len(right)} pairs", flush=True)
    return {"pairs": len(right), "accuracy": accuracy, "low": low, "high": high, "mean_gap": sum(found) / len(found)}


def print_progress(point: Progress) -> None:
    """One line."""
    numbers = f"loss {point.loss:.4f}  ranked right {point.accuracy:.2f}  {point.seconds:.0f} s"
    print(f"step {point.step}/{point.steps}  {numbers}", flush=True)


def _number(kind: Callable[[str], float], above: float | None = None) -> Callable[[str], float]:
    """A number above `above`, or from 0 on, as argparse reads an argument."""

    def read(text: str) -> float:
        number = kind(text)
        if not (number > above if above is not None else number >= 0):
            raise argparse.ArgumentTypeError(
                f"{text} is not {'above' if above is not None else 'at least'} {above or 0}"
            )
        return number

    return read


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share from 0 to below 1")
    return share
