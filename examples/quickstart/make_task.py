"""Makes the quickstart's task and its untrained policy, offline and in seconds.

    python examples/quickstart/make_task.py FOLDER

    FOLDER/train.jsonl           20,000 problems {id, question, answer}
    FOLDER/heldout.jsonl         200 more, no question in both
    FOLDER/demonstrations.jsonl  a right completion for each training problem {question, completion, answer}
    FOLDER/policy/               a Qwen3 model of 0.64 M random weights and its tokenizer, in Hugging Face files

The problems are arithmetic of one to three steps on whole numbers from 0 to 20, most of them told as a short story.
The same seed writes the same files.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAIN, HELD_OUT = 20_000, 200
LARGEST = 20  # every value of a problem lies in 0 .. LARGEST
STORIES = 0.7  # share of problems told as a story; the others are formulas

NAMES = ("Tom", "Ann", "Ben", "Eva", "Sam", "Mia", "Leo", "Zoe")
THINGS = ("apples", "books", "coins", "cards", "shells", "pens")
EVENTS = {
    "+": ("finds {} more", "buys {} more", "gets {} more"),
    "-": ("loses {}", "gives away {}", "sells {}"),
    "*": ("doubles them",),
}

TOKENIZER_TEXTS, VOCABULARY = 4_000, 390
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Problem:
    """A start value and one to three (sign, operand) steps, and the words around them.

    >>> p = Problem(start=7, steps=(("+", 5), ("-", 2)), question="Compute (7 + 5) - 2.")
    >>> p.values, p.working
    ((12, 10), '7 + 5 = 12. 12 - 2 = 10.')
    """

    start: int
    steps: tuple[tuple[str, int], ...]
    question: str

    @property
    def values(self) -> tuple[int, ...]:
        """The value after each step."""
        values = [self.start]
        for sign, operand in self.steps:
            values.append(apply(values[-1], sign, operand))
        return tuple(values[1:])

    @property
    def answer(self) -> str:
        """The last value, as text."""
        return str(self.values[-1])

    @property
    def working(self) -> str:
        """One equation per step."""
        befores = (self.start, *self.values)
        lines = zip(befores, self.steps, self.values, strict=False)
        return " ".join(f"{before} {sign} {operand} = {after}." for before, (sign, operand), after in lines)


def apply(value: int, sign: str, operand: int) -> int:
    """`value sign operand`, for the three signs of this task."""
    return {"+": value + operand, "-": value - operand, "*": value * operand}[sign]


def draw_problem(rng: random.Random) -> Problem:
    """A random problem with all values in 0 .. LARGEST."""
    start = value = rng.randint(1, LARGEST)
    steps: list[tuple[str, int]] = []
    for _ in range(rng.choice((1, 2, 2, 3, 3))):  # fewer of one step: those can be answered without working
        sign = rng.choice("++--*" if value > 0 else "+")
        legal = [n for n in ([2] if sign == "*" else range(1, 10)) if 0 <= apply(value, sign, n) <= LARGEST]
        if legal:
            steps.append((sign, rng.choice(legal)))
            value = apply(value, *steps[-1])
    if not steps:  # the only step drawn would have left the range
        return draw_problem(rng)
    return Problem(start, tuple(steps), (story if rng.random() < STORIES else formula)(start, steps, rng))


def story(start: int, steps: list[tuple[str, int]], rng: random.Random) -> str:
    """Tom has 7 apples. Tom finds 5 more. How many apples?"""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    events = [f"{name} {rng.choice(EVENTS[sign]).format(operand)}." for sign, operand in steps]
    return " ".join([f"{name} has {start} {thing}.", *events, f"How many {thing}?"])


def formula(start: int, steps: list[tuple[str, int]], rng: random.Random) -> str:
    """Compute (7 + 5) - 2."""
    expression = str(start)
    for i, (sign, operand) in enumerate(steps):
        left = f"({expression})" if i else expression
        expression = f"{left} {sign} {operand}"
    return f"Compute {expression}."


def draw_problems(rng: random.Random) -> tuple[list[Problem], list[Problem]]:
    """(TRAIN problems, HELD_OUT problems with different questions), of one distribution but with no question in both.

    A training question may repeat: leaving repetitions out would make short formulas, of which there are few, rare.
    """
    held_out: dict[str, Problem] = {}
    while len(held_out) < HELD_OUT:
        problem = draw_problem(rng)
        held_out.setdefault(problem.question, problem)
    train: list[Problem] = []
    while len(train) < TRAIN:
        problem = draw_problem(rng)
        if problem.question not in held_out:
            train.append(problem)
    return train, list(held_out.values())


def demonstration(problem: Problem, rng: random.Random) -> str:
    r"""A right completion in one of three styles: worked and boxed, boxed at once, worked without a box.

    The mixture is the point of the warm start. Worked solutions teach the policy to solve the problems: about four in
    five of its worked answers are right. The other two styles keep it from working with a box in two completions of
    three: answers at once are right one time in four, and answers without a box get no credit. That leaves
    reinforcement learning something to find in minutes. With worked demonstrations only, every group of completions
    is about equally good and GRPO moves nothing.
    """
    style = rng.random()
    if style < 0.45:
        return rf"{problem.working} The answer is \boxed{{{problem.answer}}}."
    if style < 0.85:
        return rf"The answer is \boxed{{{problem.answer}}}."
    return f"{problem.working} The answer is {problem.answer}."


def make_tokenizer(texts: Iterable[str]) -> Any:
    """A fast byte-level BPE tokenizer with a chat template. Every digit is a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_of_words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: Any, seed: int) -> Any:
    """A Qwen3 model with random float32 weights: 0.64 M parameters, most of them in three blocks of width 128."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=3,
        intermediate_size=384,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **ends,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**ends)
    return model


def write_lines(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows(problems: Iterable[Problem], prefix: str) -> Iterator[dict[str, str]]:
    """Dataset rows; the id names the file, so that a row is recognised wherever it turns up."""
    for i, problem in enumerate(problems):
        yield {"id": f"{prefix}-{i:05d}", "question": problem.question, "answer": problem.answer}


def make_task(folder: Path | str, seed: int = 0) -> None:
    """Writes the four parts of the task (see the top of this file) into `folder`, which is made if need be."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    train, held_out = draw_problems(rng)
    completions = [demonstration(problem, rng) for problem in train]
    write_lines(folder / "train.jsonl", rows(train, "train"))
    write_lines(folder / "heldout.jsonl", rows(held_out, "heldout"))
    write_lines(
        folder / "demonstrations.jsonl",
        (
            {"question": problem.question, "completion": completion, "answer": problem.answer}
            for problem, completion in zip(train, completions, strict=True)
        ),
    )
    pairs = list(zip(train, completions, strict=True))[:TOKENIZER_TEXTS]
    tokenizer = make_tokenizer(f"user\n{problem.question}\nassistant\n{completion}" for problem, completion in pairs)
    tokenizer.save_pretrained(folder / "policy")
    make_model(tokenizer, seed).save_pretrained(folder / "policy")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's arithmetic task and its untrained policy.")
    parser.add_argument("folder", type=Path, help="where to write, for example build/quickstart")
    parser.add_argument("--seed", type=int, default=0, help="of the problems, the demonstrations and the weights")
    arguments = parser.parse_args()
    make_task(arguments.folder, arguments.seed)
    print(f"{arguments.folder}: {TRAIN} training and {HELD_OUT} held-out problems, {TRAIN} demonstrations, policy/")


if __name__ == "__main__":
    main()
