"""A reward model: a transformers classifier with one label, trained on pairs to score the better answer higher.

Bradley-Terry: P(a beats b) = sigmoid(score(a) - score(b)), so scores of different prompts are not comparable without
references. `alignlab fit-reward` makes such models; models of the hub work where their tokenizer reads the text as they
were trained. A decoder gives its score at the rightmost token that is not the pad token, an encoder at its first.

What silently changes scores is refused when the model is loaded: a head that the files do not hold, a pad token that is
the last token of every text, another tokenizer than in training, and vLLM where its scores are not transformers' own.
"""

from __future__ import annotations

import functools
import gc
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from core.budget import by_budget
from core.errors import UserError, first_line, nearest
from rewards.pretrained import chosen_device, pretrained
from rewards.reward import Folder, rewards
from rewards.reward_text import Encoded, Reading, as_messages, read_reading
from rewards.templates import text_of

if TYPE_CHECKING:
    from torch import Tensor

Tokens = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Backend = Literal["transformers", "vllm"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["float32", "bfloat16"]
Scorer = Callable[[Sequence[Encoded]], list[float]]

QUESTION = "question"
KIND = "ForSequenceClassification"
MOST_APART = 0.1  # largest difference between the scores of vLLM and transformers
_QUESTIONS = ("What is 17 + 5?", "Who wrote Hamlet?", "Why is the sky blue?", "Write a haiku about rain.")
_ANSWERS = (
    "22",
    "I am not sure, but I could look it up for you.",
    "William Shakespeare wrote Hamlet around 1600.",
    "Air scatters blue light more than red light, so blue reaches us from all sides. " * 4,
    "",
)


@rewards
class reward_model:
    """Score of a Bradley-Terry reward model, the classifier with one label at `path` (a folder or hub name).

    It reads the column `question_column`, or the run's prompts where the data has none, and the completion, at most
    max_tokens long (none: as in training): a longer prompt loses its start. batch_tokens are padded tokens a pass.
    backend vllm serves decoders and BERTs faster on a GPU, of whose memory it takes a share. bfloat16 leaves the head
    in float32: near 10 bfloat16 has steps of 0.06. A score that is not finite raises ValueError.
    """

    pool = True

    def __init__(
        self,
        *,
        path: Folder,
        backend: Backend = "transformers",
        device: Device = "auto",
        dtype: Precision = "float32",
        batch_tokens: Tokens = 16384,
        max_tokens: Tokens | None = None,
        question_column: str = QUESTION,
        gpu_memory_utilization: Share = 0.9,
    ) -> None:
        check_files(path)
        self.path, self.backend, self.device, self.dtype = path, backend, device, dtype
        self.batch_tokens, self.max_tokens, self.question_column = batch_tokens, max_tokens, question_column
        self.gpu_memory_utilization = gpu_memory_utilization
        self._reading: Reading | None = None
        self._score: Scorer | None = None

    def prepare(self) -> None:
        """Load the model. Raises UserError where its scores could not be trusted."""
        path = str(Path(self.path).expanduser())
        device = chosen_device(self.device)
        model, tokenizer = load_classifier(path, self.dtype, device)
        self._reading = reading = read_reading(path, tokenizer, model.config, is_decoder(model), self.max_tokens)
        check_padding(model, reading, path)
        if self.backend == "transformers":
            self._score = functools.partial(scores, model, batch_tokens=self.batch_tokens)
            return
        rows = [reading.encode(as_messages(question), answer) for question in _QUESTIONS for answer in _ANSWERS]
        expected = scores(model, rows, self.batch_tokens)
        del model
        _free_memory()  # vLLM takes its share of what is free
        self._score = vllm_scorer(path, reading, self.dtype, device, self.gpu_memory_utilization)
        check_agreement(expected, self._score(rows), path)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        if self._reading is None or self._score is None:
            raise RuntimeError("reward_model: prepare() was not called, so no model is loaded")
        if self.question_column != QUESTION and self.question_column not in columns:
            raise LookupError(
                f"the data has no column '{self.question_column}'; {nearest(self.question_column, columns)}"
            )
        questions = columns.get(self.question_column, prompts)
        rows = [
            self._reading.encode(as_messages(question), text_of(completion))
            for question, completion in zip(questions, completions, strict=True)
        ]
        found = self._score(rows)
        bad = [index for index, score in enumerate(found) if not math.isfinite(score)]
        if bad:
            raise ValueError(f"{self.path} gives {found[bad[0]]} to completion {bad[0]}: {completions[bad[0]]!r:.80}")
        return list(found)


# ---------------------------------------------------------------- loading
def check_files(path: str) -> None:
    """Refuse a folder that does not hold a classifier's files; a name that is no folder may be the hub's. UserError."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if path.startswith((".", "/", "~")) or path.count("/") != 1 or folder.parent.is_dir():
            raise UserError(f"path: there is no folder {path}; `alignlab fit-reward` makes reward models")
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"path: {path} holds no config.json; name the folder of a reward model or a hub name")
    try:
        kinds = [str(kind) for kind in json.loads((folder / "config.json").read_text("utf-8"))["architectures"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"path: {folder / 'config.json'} names no architectures: {first_line(error)}") from None
    if not any(kind.endswith(KIND) for kind in kinds):
        raise UserError(
            f"path: {path} holds {', '.join(kinds)}, which has no head for scores (...{KIND}); "
            f"train one: alignlab fit-reward PAIRS.jsonl --base {path} --out DIR"
        )
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"path: {path} holds no .safetensors; other files of weights are not loaded")


def load_classifier(
    path: str, dtype: Precision, device: str, new_head: bool = False, where: str = "path"
) -> tuple[Any, Any]:
    """(model with one label in eval mode, its tokenizer), the head in float32. Raises UserError naming `where`.

    `new_head`: weights that the files do not hold are drawn anew, for training; else they are refused.
    """
    labels = {"num_labels": 1} if new_head else {}
    kind = "AutoModelForSequenceClassification"
    model, tokenizer, lacking = pretrained(kind, path, dtype, where, " as a classifier", **labels)
    if model.config.num_labels != 1:
        raise UserError(f"{where}: {path} has {model.config.num_labels} labels; a reward model has one")
    missing = [name for name in lacking if not (new_head and _of_head(model, name))]
    if missing:
        raise UserError(f"{where}: the files of {path} lack {', '.join(missing[:3])}, which would be random numbers")
    if dtype != "float32":
        _keep_head_in_float32(model)
    return model.to(device).eval(), tokenizer


def _of_head(model: Any, name: str) -> bool:
    """Whether a parameter belongs to the head, or to a pooler before it, and not to the body."""
    return not name.startswith(f"{model.base_model_prefix}.") or ".pooler." in name


def _keep_head_in_float32(model: Any) -> None:
    """Everything beside the body computes in float32."""
    for name, part in model.named_children():
        if name != model.base_model_prefix:
            part.float()
            part.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))


def is_decoder(model: Any) -> bool:
    """Whether the score is read off the last token: transformers calls the head of such models `score`."""
    return hasattr(model, "score")


def pad_id(model: Any) -> int | None:
    """The token that a decoder skips to find its last one, by the model's config."""
    found: int | None = model.config.get_text_config().pad_token_id
    return found


def check_padding(model: Any, reading: Reading, path: str) -> None:
    """Give the config the tokenizer's pad token where it has none; refuse one that hides the end of every text.

    A decoder whose texts end with the pad token (often the end of sequence) is read one token early. Raises UserError.
    """
    if pad_id(model) is None:
        model.config.get_text_config().pad_token_id = reading.tokenizer.pad_token_id
    token = pad_id(model)
    if token is None:
        raise UserError(f"path: {path} has no pad token (pad_token_id in its config), so texts cannot share a batch")
    if is_decoder(model) and reading.probe()[-1] == token:
        raise UserError(
            f"path: the pad token of {path} ({reading.tokenizer.decode([token])!r}) also ends its texts, so the score "
            "would be read one token early; give its config and tokenizer a pad token of its own"
        )


# ---------------------------------------------------------------- scores
def read_scores(model: Any, rows: Sequence[Encoded]) -> Tensor:
    """Scores [N] float32 of encoded texts, differentiable; padded on the right to the longest."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> Tensor:
        table = [[*row[name], *[fill] * (longest - len(row[name]))] for row in rows]
        return torch.tensor(table, device=model.device)

    inputs = {name: padded(name, (pad_id(model) or 0) if name == "input_ids" else 0) for name in rows[0]}
    lengths = torch.tensor([len(row["input_ids"]) for row in rows], device=model.device)
    mask = (torch.arange(longest, device=model.device)[None] < lengths[:, None]).long()
    scores: Tensor = model(**inputs, attention_mask=mask).logits[:, 0].float()
    return scores


def scores(model: Any, rows: Sequence[Encoded], batch_tokens: int) -> list[float]:
    """Scores of any number of texts, in batches of at most `batch_tokens` padded tokens."""
    import torch

    found = [math.nan] * len(rows)
    with torch.inference_mode():
        for batch in by_budget([len(row["input_ids"]) for row in rows], batch_tokens):
            for index, score in zip(batch, read_scores(model, [rows[i] for i in batch]).tolist(), strict=True):
                found[index] = score
    return found


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def vllm_scorer(path: str, reading: Reading, dtype: Precision, device: str, memory: float) -> Scorer:
    """Scores by vLLM's `classify`, without the sigmoid that it applies to one label unless told not to."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if device == "cpu":
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, PoolingParams, TokensPrompt

    engine = LLM(
        path,
        runner="pooling",
        trust_remote_code=False,
        dtype=dtype,
        max_model_len=reading.max_tokens,
        enforce_eager=device == "cpu",
        gpu_memory_utilization=memory,
        disable_log_stats=True,
    )

    def score(rows: Sequence[Encoded]) -> list[float]:
        prompts = [TokensPrompt(prompt_token_ids=list(row["input_ids"])) for row in rows]
        settings = [PoolingParams(use_activation=False, extra_kwargs=_second_text(row)) for row in rows]
        found = engine.classify(prompts, pooling_params=settings, use_tqdm=False)
        return [float(output.outputs.probs[0]) for output in found]

    return score


def _second_text(row: Encoded) -> dict[str, int] | None:
    """Where the second of two texts begins, as vLLM takes token types: 0s, then 1s."""
    types = list(row.get("token_type_ids", ()))
    return {"compressed_token_type_ids": types.index(1)} if 1 in types else None


def check_agreement(expected: Sequence[float], found: Sequence[float], path: str) -> None:
    """Refuse scores of vLLM that are not transformers'. Raises UserError."""
    differences = [abs(a - b) for a, b in zip(expected, found, strict=True)]
    apart = math.inf if any(map(math.isnan, differences)) else max(differences)
    if apart > MOST_APART:
        raise UserError(
            f"backend: vllm scores {len(expected)} texts up to {apart:.3g} apart from transformers with {path}, more "
            f"than {MOST_APART}; use backend: transformers"
        )
