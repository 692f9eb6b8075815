"""`fit-reward` from files to a folder that the reward loads, and what it refuses before it starts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from alignlab.reward_training import add_arguments, fit_reward, read_pairs, split, without_trained
from core.errors import UserError
from rewards.reward_model import reward_model
from tests.tiny import tiny_policy
from tests.tiny_classifiers import tiny_decoder, tiny_encoder

QUESTIONS = [f"{word} {number}" for word in ("what is", "help me", "are you") for number in range(1, 10)]
ROWS = [{"prompt": [{"role": "user", "content": q}], "chosen": "blue please", "rejected": "blue no"} for q in QUESTIONS]


def written(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return fit_reward(parser.parse_args([*map(str, words), "--device", "cpu"]))


def refusal(*words: object) -> str:
    with pytest.raises(UserError) as error:
        run(*words)
    return str(error.value)


def test_a_file_of_pairs_becomes_a_reward_model(tmp_path, capsys) -> None:
    base, out = tiny_encoder(tmp_path / "base"), tmp_path / "out"
    pairs = written(tmp_path / "pairs.jsonl", ROWS)
    other = written(tmp_path / "other.jsonl", [ROWS[0] | {"prompt": [{"role": "user", "content": "sky"}]}, *ROWS])
    training = ("--epochs", 8, "--batch", 5, "--lr", 3e-3, "--held-out", 0.3, "--seed", 1)
    assert run(pairs, "--base", base, "--out", out, "--test", other, *training) == 0
    numbers = json.loads((out / "fit_reward.json").read_text())
    held = numbers["files"][pairs]["pairs"]
    assert 0 < held < 20 and numbers["files"][pairs]["accuracy"] == 1 and numbers["files"][pairs]["high"] == 1
    assert numbers["files"][other]["pairs"] == held + 1  # the rest has prompts that were trained on
    assert numbers["recipe"]["seed"] == 1 and numbers["form"] == "pair"
    assert f"{pairs}: accuracy 1.000" in capsys.readouterr().out
    made = reward_model(path=str(out), device="cpu")
    made.prepare()
    polite, rude = made(["help me"] * 2, ["blue please", "blue no"])
    assert polite > rude + 1
    assert json.loads((out / "config.json").read_text())["problem_type"] == "regression"


@pytest.mark.parametrize(("template", "pad", "vocabulary"), [(True, "<|pad|>", 400), (False, "<|new|>", 401)])
def test_a_decoder_gets_a_pad_token_of_its_own(tmp_path, monkeypatch, template, pad, vocabulary) -> None:
    monkeypatch.setattr("alignlab.reward_training.PAD", pad)  # the tokenizer has the first and lacks the second
    base, out = tiny_decoder(tmp_path / "base", template=template, pad_token_id=1), tmp_path / "out"
    config = json.loads((base / "tokenizer_config.json").read_text()) | {"pad_token": "<|end|>"}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    run(written(tmp_path / "pairs.jsonl", ROWS[:6]), "--base", base, "--out", out, "--epochs", 1, "--held-out", 0)
    made = reward_model(path=str(out), device="cpu")
    made.prepare()
    together = made(["help", "what is the sky"], ["blue", "red and blue"])
    assert together == pytest.approx(made(["help"], ["blue"]) + made(["what is the sky"], ["red and blue"]), abs=1e-5)
    assert json.loads((out / "reward_model.json").read_text())["form"] == ("chat" if template else "joined")
    assert json.loads((out / "config.json").read_text())["vocab_size"] == vocabulary


def test_a_policy_is_a_base_too(tmp_path) -> None:
    base, out = tiny_policy(tmp_path / "base"), tmp_path / "out"
    run(written(tmp_path / "pairs.jsonl", ROWS[:6]), "--base", base, "--out", out, "--epochs", 1, "--freeze-encoder")
    reward_model(path=str(out), device="cpu").prepare()


def test_the_same_seed_writes_the_same_weights(tmp_path) -> None:
    base, pairs = tiny_encoder(tmp_path / "base", labels=1), written(tmp_path / "pairs.jsonl", ROWS[:9])
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(pairs, "--base", base, "--out", tmp_path / name, "--epochs", 1, "--seed", seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b and a != c


# ---------------------------------------------------------------- rows
def test_what_is_held_out_depends_on_the_prompt_alone() -> None:
    many = [{**ROWS[0], "prompt": [{"role": "user", "content": str(i)}]} for i in range(1000)]
    file = split("f", many, 0.2)
    assert 160 < len(file.measure) < 240 and len(file.train) + len(file.measure) == 1000
    again = split("g", [{**row, "chosen": "other"} for row in reversed(many)], 0.2)
    assert {row["prompt"][0]["content"] for row in again.measure} == {
        row["prompt"][0]["content"] for row in file.measure
    }
    smaller = split("f", many, 0.1)
    assert all(row in file.measure for row in smaller.measure)
    (kept,) = without_trained([split("f", [ROWS[0], ROWS[0]], 0.0)])
    assert len(kept.train) == 2 and not split("f", ROWS, 0.0).measure


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"chosen": None}, "'chosen' is None, not a text"),
        ({"rejected": " "}, "'rejected' is ' ', not a text"),
        ({"rejected": "blue please"}, "the same text"),
        ({"prompt": "what"}, "'prompt' is 'what', not a list of chat messages"),
        ({"prompt": []}, "not a list of chat messages"),
        ({"prompt": [{"role": "user"}]}, "not a message with the texts role and content"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "ends with the role 'assistant'"),
        ({"margin": "1"}, "'margin' is '1', not a number"),
    ],
)
def test_a_row_that_is_no_pair_is_named(tmp_path, change, problem) -> None:
    path = written(tmp_path / "pairs.jsonl", [ROWS[0], ROWS[1] | change])
    with pytest.raises(UserError) as error:
        read_pairs(path)
    assert f"{path}: row 2: " in str(error.value) and problem in str(error.value)


def test_a_missing_column_is_named_with_the_nearest(tmp_path) -> None:
    row = {("choosen" if key == "chosen" else key): value for key, value in ROWS[0].items()}
    with pytest.raises(UserError, match=r"row 1: no column 'chosen' \(did you mean 'choosen'"):
        read_pairs(written(tmp_path / "pairs.jsonl", [row]))


def test_what_cannot_work_is_refused_before_a_model_is_loaded(tmp_path) -> None:
    base, pairs = tiny_encoder(tmp_path / "base"), written(tmp_path / "pairs.jsonl", ROWS)
    assert "is no empty folder" in refusal(pairs, "--base", base, "--out", base)
    assert "--base: there is no folder" in refusal(pairs, "--base", tmp_path / "none", "--out", tmp_path / "out")
    assert "cannot read" in refusal(tmp_path / "none.jsonl", "--base", base, "--out", tmp_path / "out")
    assert "no row is left" in refusal(pairs, "--base", base, "--out", tmp_path / "out", "--held-out", 0.999999)
    assert not (tmp_path / "out").exists()
    for words in (("--held-out", "1"), ("--lr", "0"), ("--epochs", "0"), ("--centre", "-1"), ("--lr", "nan")):
        with pytest.raises(SystemExit):
            run(pairs, "--base", base, "--out", tmp_path / "out", *words)


def test_a_base_that_is_no_classifier_of_one_label_is_refused(tmp_path) -> None:
    base = tiny_encoder(tmp_path / "base", labels=3)
    assert "--base: transformers cannot load" in refusal(
        written(tmp_path / "pairs.jsonl", ROWS), "--base", base, "--out", tmp_path / "out"
    )
