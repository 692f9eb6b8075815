"""The quickstart's generated task: what the rest of the quickstart, and its numbers, rely on."""

from __future__ import annotations

import filecmp
import importlib.util
import itertools
import json
import re
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "examples" / "quickstart" / "make_task.py"


@pytest.fixture(scope="module")
def make_task():
    spec = importlib.util.spec_from_file_location("make_task", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_task"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["make_task"]


@pytest.fixture(scope="module")
def folder(make_task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    make_task.make_task(folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "policy")


def read(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def evaluate(question: str) -> int:
    """Solves a question from its words alone, independently of the code that wrote it."""
    if question.startswith("Compute"):
        return eval(question.removeprefix("Compute ").removesuffix("."))
    first, *events = re.findall(r"(has|finds|buys|gets|loses|gives away|sells|doubles)(?: (\d+))?", question)
    value = int(first[1])
    for verb, number in events:
        if verb == "doubles":
            value *= 2
        else:
            value += int(number) if verb in ("finds", "buys", "gets") else -int(number)
    return value


def test_counts_and_columns(folder):
    train, held_out = read(folder / "train.jsonl"), read(folder / "heldout.jsonl")
    demonstrations = read(folder / "demonstrations.jsonl")
    assert (len(train), len(held_out), len(demonstrations)) == (20_000, 200, 20_000)
    assert all(set(row) == {"id", "question", "answer"} for row in train + held_out)
    assert all(set(row) == {"question", "completion", "answer"} for row in demonstrations)
    assert len({row["id"] for row in train + held_out}) == 20_200


def test_no_held_out_question_is_trained_on(folder):
    train, held_out = ({row["question"] for row in read(folder / f"{name}.jsonl")} for name in ("train", "heldout"))
    assert len(held_out) == 200
    assert not train & held_out
    assert len(train) > 15_000  # repetitions are few


def test_every_answer_is_the_answer_of_its_question(folder):
    rows = read(folder / "train.jsonl") + read(folder / "heldout.jsonl")
    assert [row for row in rows if evaluate(row["question"]) != int(row["answer"])] == []


def test_about_seven_in_ten_problems_are_stories(folder):
    stories = sum("How many" in row["question"] for row in read(folder / "train.jsonl")) / 20_000
    assert stories == pytest.approx(0.7, abs=0.02)


def test_every_demonstration_is_right_and_stays_in_range(folder):
    for row in read(folder / "demonstrations.jsonl"):
        equations = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)\.", row["completion"])
        for left, sign, right, result in equations:
            assert eval(f"{left} {sign} {right}") == int(result)
            assert 0 <= int(left) <= 20 and 0 <= int(result) <= 20
        for before, after in itertools.pairwise(equations):
            assert before[3] == after[0]  # each step starts where the last one ended
        if equations:
            assert equations[-1][3] == row["answer"]
        assert re.search(rf"The answer is (\\boxed{{)?{row['answer']}}}?\.$", row["completion"])


def test_demonstrations_are_mixed_as_the_warm_start_needs(folder):
    texts = [row["completion"] for row in read(folder / "demonstrations.jsonl")]
    worked = [" = " in text for text in texts]
    boxed = [r"\boxed{" in text for text in texts]
    styles = list(zip(worked, boxed, strict=True))
    shares = [styles.count(style) / 20_000 for style in [(True, True), (False, True), (True, False)]]
    # 20,000 draws: the standard deviation of each share is below 0.004.
    assert shares == pytest.approx([0.45, 0.40, 0.15], abs=0.015)


def test_tokenizer_gives_back_every_text(tokenizer, folder):
    for row in read(folder / "demonstrations.jsonl")[-200:]:
        text = f"{row['question']}\n{row['completion']}"
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_every_digit_is_its_own_token(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("12 + 7 = 19.", add_special_tokens=False).input_ids)
    assert [t for t in tokens if any(c.isdigit() for c in t)] == ["1", "2", "7", "1", "9"]


def test_chat_template_opens_the_turn_that_the_end_token_closes(tokenizer):
    messages = [{"role": "user", "content": "Compute 7 + 5."}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nCompute 7 + 5.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(prompt, add_special_tokens=False).input_ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_policy_has_the_size_and_the_end_token_that_are_promised(folder, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "policy")
    assert 0.63e6 < sum(p.numel() for p in model.parameters()) < 0.65e6
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id


def test_prompt_and_completion_fit_the_quickstart_limits(folder, tokenizer):
    rows = read(folder / "demonstrations.jsonl")
    longest = max(rows, key=lambda row: len(row["question"]) + len(row["completion"]))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": longest["question"]}], tokenize=False)
    assert len(tokenizer(prompt + longest["completion"]).input_ids) <= 80


def test_same_seed_writes_the_same_files_and_another_seed_other_ones(make_task, folder, tmp_path):
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    make_task.make_task(tmp_path / "same", seed=1)
    assert filecmp.cmpfiles(folder, tmp_path / "same", names, shallow=False) == (names, [], [])
    make_task.make_task(tmp_path / "other", seed=2)
    _, different, _ = filecmp.cmpfiles(folder, tmp_path / "other", names, shallow=False)
    assert {"train.jsonl", "heldout.jsonl", "demonstrations.jsonl", "policy/model.safetensors"} <= set(different)
