"""Process rewards: steps, where they are scored, and a tiny model of each kind against transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from core.errors import UserError
from rewards.process_reward import process_reward, split_steps
from rewards.reward import bind
from tests.tiny import tiny_policy, tiny_tokenizer


@pytest.mark.parametrize(
    ("text", "separator", "steps"),
    [
        ("2+3\nis 5\n\nso 5", None, ["2+3\nis 5", "so 5"]),
        ("2+3\n \t\nso 5\n", None, ["2+3", "so 5"]),
        ("2+3\nis 5\n\n", None, ["2+3", "is 5"]),
        ("2+3\n\n\n\nso 5", "\n\n", ["2+3", "so 5"]),
        ("a;b; ;", ";", ["a", "b"]),
        (" \n ", None, []),
        ("", "x", []),
    ],
)
def test_a_text_is_split_into_its_steps(text: str, separator: str | None, steps: list[str]) -> None:
    assert split_steps(text, separator) == steps


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random token classifier with two labels and strong opinions."""
    import torch
    from transformers import Qwen3Config, Qwen3ForTokenClassification

    folder = tmp_path_factory.mktemp("prm")
    tokenizer = tiny_tokenizer(folder)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=2,  # type: ignore[call-arg]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen3ForTokenClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_policy(tmp_path_factory.mktemp("shepherd"), scale=0.5)


def loaded(**options: Any) -> process_reward:
    made = process_reward(**options)
    made.prepare()
    return made


def expected(by: process_reward, texts: list[str]) -> list[float]:
    """The probability at the end of each text, one pass of transformers each."""
    import torch

    found = []
    for text in texts:
        ids = torch.tensor([by.tokenizer.encode(text)])
        with torch.no_grad():
            logits = by.model(input_ids=ids).logits[0, -1]
        if by.kind == "causal":
            good, bad = by.tokenizer.encode("+")[0], by.tokenizer.encode("-")[0]
            found.append(torch.softmax(logits[[good, bad]], -1)[0].item())
        else:
            found.append(torch.softmax(logits, -1)[1].item())
    return found


def test_a_token_classifier_is_read_at_the_separator_after_each_step(classifier: Path) -> None:
    by = loaded(path=str(classifier), how="last", batch_tokens=40)  # the two texts do not share a batch
    one, two, three = expected(by, ["2+3?\nadd them\n", "2+3?\nadd them\nit is 5\n", "9?\nnine\n"])
    assert len({round(p, 3) for p in (one, two, three)}) == 3
    completions = ["add them\n\nit is 5", [{"role": "assistant", "content": "nine"}], "  "]
    assert by(["2+3?", "9?", "9?"], completions) == [pytest.approx(two, abs=1e-5), pytest.approx(three, abs=1e-5), None]
    by.how = "min"
    assert by(["2+3?"], completions[:1]) == [pytest.approx(min(one, two), abs=1e-5)]
    by.how, by.batch_tokens = "mean", 10_000  # padded beside a longer text, nothing changes
    together = by(["x", "9?"], completions[:2], question=["2+3?", "9?"])
    assert together == [pytest.approx((one + two) / 2, abs=1e-5), pytest.approx(three, abs=1e-5)]


def test_a_language_model_is_read_at_the_tag_after_each_step(language_model: Path) -> None:
    by = loaded(path=str(language_model), kind="causal", step_tag=" #", how="prod")
    one, two, three = expected(by, ["2+3?\nadd #", "2+3?\nadd #\nit is 5 #", "2+3?\nadd #\nit is 5 #\nso #"])
    assert by(["2+3?"], ["add\nit is 5\nso"]) == [pytest.approx(one * two * three, abs=1e-5)]
    by.max_steps = 2
    assert by(["2+3?"], ["add\nit is 5\nso"]) == [pytest.approx(one * two, abs=1e-5)]
    by.max_steps, by.how, by.wrong_below = None, "last", 1.0  # no step is so sure, so the first is the last that counts
    assert by(["2+3?"], ["add\nit is 5\nso"]) == [pytest.approx(one, abs=1e-5)]


def test_a_written_tag_is_no_scored_place(language_model: Path) -> None:
    by = loaded(path=str(language_model), kind="causal", step_tag=" #", how="mean")
    (once,) = expected(by, ["2+3?\nadd # # # #"])
    assert by(["2+3?"], ["add # # #"]) == [pytest.approx(once, abs=1e-5)]


def test_a_long_question_loses_its_start_and_long_steps_are_not_scored(classifier: Path) -> None:
    by = loaded(path=str(classifier), how="last", max_tokens=12)
    steps = by._encode("abcdefghijkl", "xyz")
    assert steps is not None and by.tokenizer.decode(steps.ids) == "fghijkl\nxyz\n" and steps.places == [11]
    assert by._encode("q", "xyzxyzxyzxyz") is None and by(["q"], ["xyzxyzxyzxyz"]) == [None]


def test_special_tokens_of_the_policy_are_text_to_the_model(classifier: Path) -> None:
    by = loaded(path=str(classifier))
    steps = by._encode("q<|end|>", "a<|user|>b")
    assert steps is not None and by.tokenizer.decode(steps.ids) == "q \na b\n"


def test_any_text_can_be_scored(classifier: Path) -> None:
    by = loaded(path=str(classifier))
    texts = ["", " ", "x" * 200_000, "\ud800 a", "\x00", "√∞💥 ٣", "<think>" * 10_000, "a\n" * 1000]
    found = by(["q"] * len(texts), texts)
    assert found[:3] == [None] * 3 and all(score is None or 0 <= score <= 1 for score in found)
    assert found[3] is not None and found[7] is not None


def test_only_what_is_asked_for_is_scored(classifier: Path) -> None:
    by = loaded(path=str(classifier), see="thinking")
    steps = by._encode("q", "<think>one\ntwo</think>three")
    assert steps is not None and by.tokenizer.decode(steps.ids) == "q\none\ntwo\n"
    assert by(["q"], ["no thinking"]) == [None]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"kind": "causal"}, "process_reward.step_tag"),
        ({"step_tag": " #"}, "process_reward.step_tag"),
        ({"step_separator": ""}, "process_reward.step_separator"),
        ({"template": "{answer}"}, "process_reward.template.*answer"),
        ({"path": "./nowhere"}, "process_reward.path"),
        ({"how": "middle"}, "how"),
    ],
)
def test_mistakes_are_refused_before_a_model_is_loaded(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        bind("process_reward", {"path": "some/prm", **options}, "rewards.components.steps")


def test_models_whose_scores_could_not_be_meant_are_refused(classifier: Path, language_model: Path) -> None:
    with pytest.raises(UserError, match="lack score"):
        loaded(path=str(language_model))  # a language model has no head for labels
    with pytest.raises(UserError, match=r"process_reward\.good_token"):
        loaded(path=str(language_model), kind="causal", step_tag=" #", good_token="+", bad_token="a+")
